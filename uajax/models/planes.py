"""Tri-planes: a position's features from three axis-aligned feature planes, at several scales.

Position x reads the planes of the axis pairs (0, 1), (0, 2) and (1, 2) bilinearly, multiplies
what it finds and concatenates the scales (method.md C.1). The first axis of a pair runs along a
plane's columns, the second along its rows, both flipped: coordinate -x / bound in [-1, 1] from
the first texel's centre to the last's; beyond the bound the border holds.

Axes: n positions, s scales, p planes (3), r texels a side, c channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uajax.config import Planes as PlanesConfig
from uajax.models.initial import uniform

PAIRS = ((0, 1), (0, 2), (1, 2))  # (columns, rows)
# Official: 0.1 to 0.5, whose products begin about 0.03. That tells next to nothing of a place until
# it has grown, and what is to move apart from its surroundings (lids) comes late or never.
START = (0.8, 1.2)


class Planes(nn.Module):
  """Features of positions, one [n c] a scale; see `sample`. Parameters: `scale_s` [p r r c]."""

  config: PlanesConfig

  @nn.compact
  def __call__(self, points: Float[Array, "n 3"]) -> list[Float[Array, "n c"]]:
    channels = self.config.features
    scales = []
    for i, multiple in enumerate(self.config.multiples):
      side = self.config.resolution * multiple
      planes = self.param(f"scale_{i}", uniform(*START), (3, side, side, channels))
      scales.append(sample(planes, points, self.config.bound))
    return scales


def sample(
  planes: Float[Array, "p r r c"], points: Float[Array, "n 3"], bound: float
) -> Float[Array, "n c"]:
  """The product of the three planes at each position, differentiable in both.

  Args:
    planes: at least two texels a side.
    points: metres.
    bound: metres, where the planes end.
  """
  planes, points = jnp.asarray(planes), jnp.asarray(points)
  side = planes.shape[1]
  # In the order of the official code: on fine planes another rounding is another value.
  coordinate = (points - bound) * (2 / (-bound - bound)) - 1
  at = jnp.clip((coordinate + 1) / 2 * (side - 1), 0, side - 1)
  low = jnp.clip(jnp.floor(at), 0, side - 2).astype(jnp.int32)  # the last texel has weight 1
  weight = at - low

  def by_plane(x, which):  # [n 3] to [p n]; slices, since an index array would be scattered back
    return jnp.stack([x[:, pair[which]] for pair in PAIRS])

  right, down = by_plane(weight, 0)[..., None], by_plane(weight, 1)[..., None]
  plane = jnp.broadcast_to(jnp.arange(3)[:, None], (3, points.shape[0]))
  corners = jnp.stack([plane, by_plane(low, 1), by_plane(low, 0)], -1)
  # One window of 2 x 2 texels a plane: a quarter of the look-ups, which is what a CPU pays for.
  windows = _windows(planes, corners)
  rows = windows[:, :, :, 0] * (1 - right[:, :, None]) + windows[:, :, :, 1] * right[:, :, None]
  return (rows[:, :, 0] * (1 - down) + rows[:, :, 1] * down).prod(0)


@jax.custom_vjp
def _windows(planes: Float[Array, "p r r c"], corners: Int[Array, "p n 3"]
             ) -> Float[Array, "p n 2 2 c"]:
  """The 2 x 2 texels from each corner (plane, row, column) on."""
  return jax.lax.gather(
    planes, corners,
    jax.lax.GatherDimensionNumbers(
      offset_dims=(2, 3, 4), collapsed_slice_dims=(0,), start_index_map=(0, 1, 2)),
    (1, 2, 2, planes.shape[3]), mode="promise_in_bounds")


def _scattered(residuals, d_windows):
  planes, corners = residuals
  # Zeros that the compiler does not know to be any: of those it would keep one array apart from
  # the loop of steps, and copy it at each, which takes twice as long as to fill it.
  nought = jnp.where(corners[:1, :1].sum() < 0, 1.0, 0.0).astype(d_windows.dtype)
  d_planes = jax.lax.scatter_add(
    jnp.broadcast_to(nought, planes.shape), corners, d_windows,
    jax.lax.ScatterDimensionNumbers(
      update_window_dims=(2, 3, 4), inserted_window_dims=(0,),
      scatter_dims_to_operand_dims=(0, 1, 2)),
    mode="promise_in_bounds")
  return d_planes, None


_windows.defvjp(lambda planes, corners: (_windows(planes, corners), (planes, corners)), _scattered)
