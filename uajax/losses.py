"""What a picture is judged by while training: pure functions of JAX arrays, no state.

Pictures are float [h w c] in 0..1; a batch goes through `jax.vmap`. The target of a comparison
is the second argument.

Axes: h w pixels, c channels, n splats, p side of a square patch, k patches.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

_RADIUS = 5  # of the SSIM window: 11 x 11
_GAUSS = np.exp(-(np.arange(-_RADIUS, _RADIUS + 1) ** 2) / (2 * 1.5**2))
_TAPS = tuple(float(tap) for tap in _GAUSS / _GAUSS.sum())
_C1, _C2 = 0.01**2, 0.03**2


def l1(a: Float[Array, "*d"], b: Float[Array, "*d"]) -> Float[Array, ""]:
  """Mean absolute difference."""
  return jnp.mean(jnp.abs(a - b))


def ssim(a: Float[Array, "h w c"], b: Float[Array, "h w c"]) -> Float[Array, ""]:
  """Structural similarity, 1 where equal: the mean over pixels and channels.

  Gaussian window 11x11 of sigma 1.5 with zeros beyond the edges, C1 = 1e-4, C2 = 9e-4
  (Wang et al. 2004, as in Gaussian splatting; method.md D.3).
  """
  return jnp.mean(ssim_map(a, b))


def ssim_map(a: Float[Array, "h w c"], b: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
  """The similarity at every pixel."""
  # Channels first: rows of one kind lie together, which vectorises (6 times the speed on CPU).
  a, b = jnp.moveaxis(a, -1, 0), jnp.moveaxis(b, -1, 0)
  # Three kinds of blur for the pair and not four: only the sum of the variances is wanted. The
  # target's mean stands apart, so that the gradient for a picture does not pass through it.
  mean_a, squares, product = jnp.split(_blur(jnp.concatenate([a, a * a + b * b, a * b])), 3)
  mean_b = _blur(b)
  variances = squares - mean_a**2 - mean_b**2
  covariance = product - mean_a * mean_b
  similarity = ((2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)) / (
    (mean_a**2 + mean_b**2 + _C1) * (variances + _C2)
  )
  return jnp.moveaxis(similarity, 0, -1)


@jax.custom_vjp
def _blur(images: Float[Array, "k h w"]) -> Float[Array, "k h w"]:
  """The Gaussian window over rows, then columns: sums of shifted pictures.

  Measured on two CPU cores at 128x128: 1.3 ms for a loss with its gradient, where matrix
  products with bands took 2.7 ms and XLA's convolution 46 ms.
  """
  for axis in (1, 2):
    size = images.shape[axis]
    pad = [(0, 0)] * 3
    pad[axis] = (_RADIUS, _RADIUS)
    padded = jnp.pad(images, pad)
    shifted = (jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(len(_TAPS)))
    images = functools.reduce(jnp.add, (tap * x for tap, x in zip(_TAPS, shifted, strict=True)))
  return images


# A symmetric window with zeros beyond the edges is its own transpose. XLA would build the
# transpose of each slice as a padded picture, several times slower.
_blur.defvjp(lambda images: (_blur(images), None), lambda _, d_out: (_blur(d_out),))


def alpha_penalty(
  alpha: Float[Array, "h w"],
  inside: Bool[Array, "h w"],
  *,
  outside: Bool[Array, "h w"] | None = None,
) -> Float[Array, ""]:
  """What a layer lacks inside its mask and has outside of it (method.md D.3, D.4).

  Means over the whole picture, as the official code takes them. `outside` is ~inside unless a
  band between them is to stay free.
  """
  outside = ~inside if outside is None else outside
  return jnp.mean(jnp.where(inside, 1 - alpha, 0.0)) + jnp.mean(jnp.where(outside, alpha, 0.0))


def mean_inside(image: Float[Array, "h w"], mask: Bool[Array, "h w"]) -> Float[Array, ""]:
  """The mean over the pixels of a mask; 0 where it has none."""
  return jnp.sum(jnp.where(mask, image, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def mean_magnitude(motion: Float[Array, "n d"], alive: Bool[Array, " n"]) -> Float[Array, ""]:
  """Mean absolute value over the living splats; 0 where none lives."""
  total = jnp.sum(jnp.where(alive[:, None], jnp.abs(motion), 0.0))
  return total / jnp.maximum(jnp.sum(alive) * motion.shape[1], 1)


def unlikelihood(
  wrong: Float[Array, "h w"], variance: Float[Array, "h w"], mask: Bool[Array, "h w"]
) -> Float[Array, ""]:
  """Negative log-likelihood of absolute errors as Laplace distributions of a variance have it.

  The mean over a mask, least where the scale (the root of the variance and of that of half a grey
  level, so that no gradient is steep) is the error to be expected. The errors get no gradient: to
  doubt shall not be a way to be wrong (after Kendall and Gal 2017).
  """
  scale = jnp.sqrt(jnp.square(0.5 / 255) + variance)
  return mean_inside(jax.lax.stop_gradient(wrong) / scale + jnp.log(scale), mask)


def patches(image: Float[Array, "h w c"], size: int) -> Float[Array, "k p p c"]:
  """Squares of `size` pixels side by side from the upper left; what remains is left out.

  A picture smaller than `size` gives the largest square that fits.
  """
  height, width, channels = image.shape
  size = min(size, height, width)
  rows, columns = height // size, width // size
  grid = image[: rows * size, : columns * size].reshape(rows, size, columns, size, channels)
  return grid.swapaxes(1, 2).reshape(rows * columns, size, size, channels)


def dilate(mask: Bool[Array, "h w"]) -> Bool[Array, "h w"]:
  """True within one pixel (3x3) of the mask."""
  padded = jnp.pad(mask, 1)
  rows = padded[:-2] | padded[1:-1] | padded[2:]
  return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def erode(mask: Bool[Array, "h w"]) -> Bool[Array, "h w"]:
  """True where all pixels within one (3x3) are; beyond the edges the mask goes on."""
  return ~dilate(~mask)


def close(mask: Bool[Array, "h w"]) -> Bool[Array, "h w"]:
  """Fills holes and gaps up to two pixels wide."""
  return erode(dilate(mask))
