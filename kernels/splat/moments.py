"""Splats' shapes as the tiled implementations take them, and gradients as they give them back.

Whatever pixels ask of a splat's shape, they ask through one number each: the slope with respect
to the power, the Gaussian's exponent. So all gradients of a shape follow from six sums of slopes
over pixels, their moments about the splat's mean: times 1, x, y, xx, xy and yy. Implementations
give those for the cotangent of shapes; once they are added up, a splat at a time, they become it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SHAPE = 6  # numbers: mean x, y, conic xx, xy, yy, opacity


@jax.custom_vjp
def shapes(
    xy: Float[Array, "... 2"], conic: Float[Array, "... 3"], opacity: Float[Array, "..."]
) -> Float[Array, "... 6"]:
  """Shapes to be composited, whose cotangents come as moments."""
  return jnp.concatenate([xy, conic, opacity[..., None]], -1)


def _forward(xy, conic, opacity):
  return shapes(xy, conic, opacity), (conic, opacity)


def _backward(residuals, moments):
  conic, peak = residuals
  xy, conic = ellipse(*([z[..., i] for i in range(z.shape[-1])] for z in (moments, conic)))
  return jnp.stack(xy, -1), jnp.stack(conic, -1), opacity(moments, peak)


def opacity(moments: Float[Array, "... 6"], value: Float[Array, "..."]) -> Float[Array, "..."]:
  """The cotangent of opacities. No pixel sees one of 0."""
  return moments[..., 0] / jnp.where(value > 0, value, 1)


def ellipse(moments: Sequence, conic: Sequence) -> tuple[tuple, tuple]:
  """Cotangents of the means (x, y) and of the conics (xx, xy, yy)."""
  _, x, y, xx, xy, yy = moments
  a, b, c = conic
  return (a * x + b * y, b * x + c * y), (-0.5 * xx, -xy, -0.5 * yy)


shapes.defvjp(_forward, _backward)


def shift(moments: Sequence, x, y) -> tuple:
  """Moments about another point, from where the old one lies at (x, y)."""
  one, mx, my, mxx, mxy, myy = moments
  return (one, x * one + mx, y * one + my, x * x * one + 2 * x * mx + mxx,
          x * y * one + x * my + y * mx + mxy, y * y * one + 2 * y * my + myy)
