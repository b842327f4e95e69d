"""Splat compositing as plain JAX: slow, obvious, and the meaning of the op.

Every pixel looks at every splat, nearest first. Differentiated by JAX; works in float64.
Axes: n splats of one camera, m channels, h w pixels.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.splat.bins import zero
from kernels.splat.project import ALPHA_MIN, Projected

ALPHA_MAX = 0.99  # no splat hides all that lies behind it
OPAQUE = 1e-4  # a pixel that would let less light than this through is finished


def composite(
    seen: Projected,
    values: Float[Array, "n m"],
    attached: tuple[bool, ...],
    width: int,
    height: int,
) -> Float[Array, "m+1 h w"]:
  """Sums value * alpha * transmittance over the splats of each pixel, front to back.

  The last channel is alpha: the same sum with the value 1.

  A splat is skipped where its alpha falls below 1/255 and outside its rectangle. Where it would
  bring the transmittance below 1e-4, the pixel is finished and the splat not drawn.
  Channels that are not attached give no gradient but to their values.
  """
  x = jnp.arange(width, dtype=values.dtype)[None, :] + 0.5
  y = jnp.arange(height, dtype=values.dtype)[:, None] + 0.5
  values = jnp.concatenate([values, jnp.ones((len(values), 1), values.dtype)], 1)
  attached_channel = jnp.array((*attached, True))[:, None, None]
  order = jnp.argsort(lax.stop_gradient(seen.depth), stable=True)

  def blend(carry, splat):
    shown, light, open_ = carry
    (u, v), (a, b, c), opacity, (x0, x1, y0, y1), value = splat
    dx, dy = x - u, y - v
    power = -0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy
    alpha = jnp.minimum(opacity * jnp.exp(jnp.minimum(power, 0)), ALPHA_MAX)
    inside = (x > x0) & (x < x1) & (y > y0) & (y < y1)
    alpha = jnp.where(inside & (power <= 0) & (alpha >= ALPHA_MIN), alpha, 0)
    left = light * (1 - alpha)
    open_ &= left >= OPAQUE
    share = jnp.where(open_, alpha * light, 0)[None]
    share = jnp.where(attached_channel, share, lax.stop_gradient(share))
    return (shown + value[:, None, None] * share, jnp.where(open_, left, light), open_), None

  nought = zero(values, seen.depth)
  light = jnp.ones((height, width), values.dtype) + nought
  start = jnp.zeros((values.shape[1], height, width), values.dtype) + nought, light, light > 0
  splats = (seen.xy, seen.conic, seen.opacity, seen.rect, values)
  # Recomputing each splat going backward keeps n images out of memory.
  return lax.scan(jax.checkpoint(blend), start, jax.tree.map(lambda z: z[order], splats))[0][0]
