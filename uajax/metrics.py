"""How near a result comes to the truth, in the figures the field reports (method.md D.7).

Pictures are float in 0..1. All work under `jax.jit` and on NumPy arrays alike.

Axes: h w pixels, c channels, f frames, n values.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from uajax import losses

FACE, MOUTH = slice(0, 68), slice(48, 68)  # of the 68 landmarks


def psnr(
  a: Float[Array, "h w c"], b: Float[Array, "h w c"], mask: Bool[Array, "h w"] | None = None
) -> Float[Array, ""]:
  """Peak signal-to-noise ratio in dB for a peak of 1; infinite where equal.

  Args:
    mask: measures its pixels only, such as the mouth's; NaN where it has none.
  """
  squares = jnp.mean((a - b) ** 2, axis=-1)
  if mask is None:
    return -10 * jnp.log10(jnp.mean(squares))
  return -10 * jnp.log10(jnp.sum(jnp.where(mask, squares, 0.0)) / jnp.sum(mask))


def region_psnr(
  a: Float[Array, "h w c"], b: Float[Array, "h w c"], rect: Float[Array, " 4"]
) -> Float[Array, ""]:
  """PSNR within rows r0:r1 and columns c0:c1, such as `types.Frame.lips`. `rect` may be traced."""
  r0, r1, c0, c1 = rect
  rows, columns = jnp.arange(a.shape[0])[:, None], jnp.arange(a.shape[1])[None, :]
  return psnr(a, b, (rows >= r0) & (rows < r1) & (columns >= c0) & (columns < c1))


def ssim(a: Float[Array, "h w c"], b: Float[Array, "h w c"]) -> Float[Array, ""]:
  """Structural similarity as scikit-image and the papers take it: 11x11 Gaussian of sigma 1.5.

  Unlike the loss it leaves out the border of 5 pixels, where the window is not full; pictures
  below 11 pixels have nothing else and are taken whole.
  """
  whole = losses.ssim_map(a, b)
  return jnp.mean(whole[5:-5, 5:-5] if min(whole.shape[:2]) > 10 else whole)


def lmd(
  a: Float[Array, "*f 68 2"], b: Float[Array, "*f 68 2"], part: slice = MOUTH
) -> Float[Array, "*f"]:
  """Landmark distance in pixels: the mean over the points of a part after each set is centred."""
  a, b = a[..., part, :], b[..., part, :]
  a, b = (points - jnp.mean(points, axis=-2, keepdims=True) for points in (a, b))
  return jnp.mean(jnp.linalg.norm(a - b, axis=-1), axis=-1)


def correlation(a: Float[Array, " n"], b: Float[Array, " n"]) -> Float[Array, ""]:
  """Pearson's coefficient, -1..1; 0 where either does not vary."""
  a, b = a - jnp.mean(a), b - jnp.mean(b)
  scale = jnp.sqrt(jnp.sum(a * a) * jnp.sum(b * b))
  return jnp.where(scale > 0, jnp.sum(a * b) / jnp.where(scale > 0, scale, 1.0), 0.0)
