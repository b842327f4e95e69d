"""Named scenes for tests, tuning and benchmarks: the shapes that this op meets in life.

A scene is what `rasterize` takes, as NumPy arrays made from a seed.
"""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
  """A head-sized shell of splats in front of one camera, or a small cloud for close looks.

  Attributes:
    splats: how many.
    width: px.
    height: px.
    features: further channels.
    sh_degree: of the colours.
    crowded: share of the splats that lie about the mouth, in a few tiles.
    smooth: few wide faint splats: no pixel is near a cut-off, so derivatives exist.
  """

  splats: int
  width: int
  height: int
  features: int = 2
  sh_degree: int = 2
  crowded: float = 0.0
  smooth: bool = False


CASES = {
    "smooth": Case(12, 30, 22, smooth=True),  # against finite differences
    "sharp": Case(150, 50, 44),  # crosses every cut-off; sides are no multiple of a tile
    "crowded": Case(150, 50, 44, crowded=0.8),
    "demo": Case(3_000, 128, 128),  # the demo's training step
    "demo crowded": Case(3_000, 128, 128, crowded=0.5),
    "demo large": Case(10_000, 256, 256),
    "head 10k": Case(10_000, 512, 512),  # an avatar on a GPU
    "head 30k": Case(30_000, 512, 512),
    "head 60k": Case(60_000, 512, 512),
}


def scene(case: Case, seed: int = 0) -> dict[str, Any]:
  """Keyword arguments of `rasterize`: arrays float32, image size, degree, background."""
  rng = np.random.default_rng(seed)
  n = case.splats
  if case.smooth:
    depth, focal = 2.0, 1.25 * case.width
    means = rng.uniform(-0.3, 0.3, (n, 3))
    means[:, 2] = rng.permutation(n) * 0.05
    scales = rng.uniform(0.8, 1.2, (n, 3))
    opacities = rng.uniform(0.1, 0.4, n)
  else:
    depth, focal = 0.6, 1200 / 512 * case.width  # the head fills the image's height
    shell = rng.normal(size=(n, 3))
    shell /= np.linalg.norm(shell, axis=1, keepdims=True)
    means = shell * rng.uniform(0.9, 1, (n, 1)) * [0.08, 0.11, 0.09]
    scales = np.exp(rng.normal(np.log(0.3464 / np.sqrt(n)), 0.5, (n, 3)))
    opacities = rng.uniform(0.05, 0.95, n)
    mouth = rng.random(n) < case.crowded
    means[mouth] = [0, 0.04, -0.06] + [0.006, 0.004, 0.01] * rng.normal(size=(mouth.sum(), 3))
    scales[mouth] *= 0.4
  viewmat = np.eye(4)
  viewmat[2, 3] = depth
  K = np.array([[focal, 0, case.width / 2], [0, focal, case.height / 2], [0, 0, 1]])
  harmonics = 0.3 * rng.normal(size=(n, (case.sh_degree + 1)**2, 3))
  arrays = dict(means=means, quats=rng.normal(size=(n, 4)), scales=scales, opacities=opacities,
                colors=harmonics, viewmats=viewmat[None], Ks=K[None],
                features=rng.normal(size=(n, case.features)), backgrounds=np.array([0.1, 1, 0.3]))
  return {name: x.astype(np.float32) for name, x in arrays.items()} | dict(
      width=case.width, height=case.height, sh_degree=case.sh_degree)
