"""A layer of splats as it moves at one frame, seen by a camera.

Applied motion (method.md C.3): displaced means, softplus of displaced raw scales, displaced
quaternions, unchanged opacities. Axes: n splats, h w pixels, f features.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.splat import Rasterized, rasterize
from uajax.types import Camera, Motion, Splats

_BANDS = (0, 1, 1, 1, 2, 2, 2, 2, 2)  # degree of each spherical harmonic


def render_layer(
  splats: Splats,
  alive: Bool[Array, " n"],
  motion: Motion | None,
  camera: Camera,
  width: int,
  height: int,
  *,
  background: Float[Array, " 3"],
  active_sh: Int[Array, ""] | None = None,
  features: Float[Array, "n f"] | None = None,
  detached: bool | tuple[int, ...] | None = None,
  probe: Float[Array, "n 2"] | None = None,
  implementation: str | None = None,
  capacity: int | None = None,
  extent: str = "exact",
) -> Rasterized:
  """Draws one layer, all channels in one pass.

  Args:
    alive: slots in use; the others are not drawn.
    motion: None for the splats at rest.
    background: what shows through, 0..1.
    active_sh: spherical harmonics of higher degree are muted; an array, so that raising it
      compiles nothing. None for all.
    features: more channels, composited like colours over zero.
    detached: which of `features` give no gradient to geometry or opacity; True for all.
    probe: zeros, added to the projected means (px): its gradient drives densification.
    implementation, capacity, extent: as in `kernels.splat.rasterize`.

  Returns:
    What `rasterize` does, without its camera axis.
  """
  means, quats, raw_scales = splats.means, splats.quats, splats.raw_scales
  if motion is not None:
    means = means + motion.d_mean
    quats = quats + motion.d_quat
    raw_scales = raw_scales + motion.d_scale
  colors = jnp.concatenate([splats.sh_dc, splats.sh_rest], 1)
  if active_sh is not None:
    colors = colors * (jnp.asarray(_BANDS) <= active_sh)[None, :, None]
  opacities = jnp.where(alive, jax.nn.sigmoid(splats.logit_opacities), 0)
  out = rasterize(
    means, quats, jax.nn.softplus(raw_scales), opacities, colors, camera.viewmat[None],
    camera.K[None], width, height, sh_degree=2, backgrounds=background[None], features=features,
    detached=detached, extent=extent, implementation=implementation, capacity=capacity,
    probe=None if probe is None else probe[None])
  return out._replace(color=out.color[0], alpha=out.alpha[0], depth=out.depth[0],
                      features=out.features[0], radii=out.radii[0])
