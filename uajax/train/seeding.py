"""The first splats of a layer.

The official code scatters grey splats over a cube, most of them in empty air, and lets tens of
thousands of steps sort it out (method.md D.2). Here the cube is first carved by the masks: a
point stays if it projects into the layer's region in nearly all of a handful of frames, and it
takes the colour it has there. `Stage.carve` brings the official start back.
Axes: n splats or points, f frames, h w pixels.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from scipy.spatial import cKDTree  # pyright: ignore[reportAttributeAccessIssue]  # no stubs there

from uajax.config import Stage
from uajax.data.loader import Source
from uajax.types import FACE, HAIR, MOUTH, Alive, Splats

LOOKS = 24  # frames that carve
AGREE = 0.75  # share of them that must see a point inside
TRIES = 64  # points drawn for each splat wanted
OPACITY = 0.1
SH_0 = 0.28209479177387814


def seed(stage: Stage, frames: Source, key) -> tuple[Splats, Alive]:
  """Splats as wide as their gaps, faint, unrotated.

  The raw scale is the log of the neighbour distance although softplus activates it: softplus(log
  d) = log(1 + d), which is d for the small d at hand.

  Raises:
    ValueError: more splats to begin with than slots.
  """
  count, slots = stage.splats, stage.densify.slots
  if count > slots:
    raise ValueError(f"{stage.name}: {count} splats to begin with do not fit {slots} slots")
  points, colors = scatter(stage, frames, key) if stage.carve else _cube(stage, count, key)
  near = cKDTree(points).query(points, k=4)[0][:, 1:]
  raw = np.log(np.sqrt(np.maximum((near**2).mean(1), 1e-7)))

  def fill(value, *width):  # by NumPy: of such small things a compiler would make forty programs
    array = np.zeros((slots, *width), np.float32)
    array[:count] = value
    return jnp.asarray(array)

  splats = Splats(
    means=fill(points, 3), raw_scales=fill(raw[:, None], 3),
    quats=jnp.asarray(np.tile(np.array([1, 0, 0, 0], np.float32), (slots, 1))),
    logit_opacities=jnp.asarray(np.full(slots, np.log(OPACITY / (1 - OPACITY)), np.float32)),
    sh_dc=fill((colors[:, None] - 0.5) / SH_0, 1, 3),
    sh_rest=jnp.asarray(np.zeros((slots, 8, 3), np.float32)))
  return splats, jnp.asarray(np.arange(slots) < count)


def scatter(
  stage: Stage, frames: Source, key
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"]]:
  """Points of the carved cube and their mean colours, 0..1."""
  points, _ = _cube(stage, stage.splats * TRIES, key)
  inside = np.zeros(len(points))
  colors = np.zeros((len(points), 3))
  for i in np.linspace(0, len(frames) - 1, LOOKS).round().astype(int):
    frame = frames[int(i)]
    region = _region(stage.name, frame.classes, frame.lips)
    row, column, seen = _project(points, *frame.camera, region.shape)
    seen &= region[row, column]
    inside += seen
    colors += np.where(seen[:, None], np.asarray(frame.image)[row, column] / 255, 0)
  # The best points, whether or not they are good ones: a mask may be missing in many frames.
  kept = np.argsort(-np.minimum(inside, AGREE * LOOKS), kind="stable")[: stage.splats]
  hits = np.maximum(inside[kept, None], 1)
  colors = np.where(inside[kept, None] > 0, colors[kept] / hits, 0.5)
  return points[kept], colors.astype(np.float32)


def _cube(stage: Stage, count: int, key):
  unit = jax.random.uniform(key, (count, 3), minval=-1, maxval=1)
  return np.asarray(unit) * stage.splats_extent, np.full((count, 3), 127 / 255, np.float32)


def _region(name: str, classes, lips) -> Bool[np.ndarray, "h w"]:
  """Where the layer's splats may lie: the head, or the square of the lips."""
  if name == "face":
    return np.isin(classes, (FACE, HAIR, MOUTH))
  region = classes == MOUTH
  r0, r1, c0, c1 = (int(v) for v in lips)
  region[r0:r1, c0:c1] = True
  return region


def _project(points, viewmat, K, shape):
  """Row and column (clipped) of each point, and whether it is in the picture."""
  seen = points @ np.asarray(viewmat)[:3, :3].T + np.asarray(viewmat)[:3, 3]
  depth = np.maximum(seen[:, 2], 1e-6)
  column = np.floor(K[0, 0] * seen[:, 0] / depth + K[0, 2]).astype(int)
  row = np.floor(K[1, 1] * seen[:, 1] / depth + K[1, 2]).astype(int)
  height, width = shape
  within = (seen[:, 2] > 0) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
  return np.clip(row, 0, height - 1), np.clip(column, 0, width - 1), within
