"""Which splats each tile blends, and in which order: packed lists of pairs.

A pair is one splat on one tile. Splats are sorted by depth once; every pair then gets the key
tile * n + (place of its splat in that order), and one sort of single integers puts the pairs of
each tile next to each other, front to back. Tiles of all cameras are numbered through.

Axes: c cameras, n splats of each, r = c * n splats of all cameras, t tiles of all cameras,
p pairs (the capacity).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from kernels.splat.project import ALPHA_MIN, Projected

EMPTY = 2**32 - 1  # key of a slot without a pair: sorts last


class Grid(NamedTuple):
  """The tiles of one camera's image."""

  side: int  # px
  columns: int
  rows: int


class Bins(NamedTuple):
  """Pairs sorted by tile, then by depth. Slots from starts[-1] on are empty."""

  splats: Int[Array, " p"]  # 0..r-1, and r in empty slots
  starts: Int[Array, " t+1"]  # tile i owns the pairs starts[i]:starts[i + 1]
  overflow: Int[Array, ""]  # pairs that found no slot
  # The same pairs once more, ordered by splat, for sums over a splat's pairs.
  by_splat: Int[Array, " p"]  # where the pair lies in `splats`; p if it was culled
  first: Int[Array, " p"]  # where the run of this pair's splat begins
  runs: Int[Array, "r 2"]  # begin and end of each splat's run


def grid(width: int, height: int, side: int) -> Grid:
  """Tiles that cover the image; the last column and row may stick out."""
  return Grid(side, -(-width // side), -(-height // side))


def demand(rect: Int[Array, "... 4"], side: int) -> UInt32[Array, "..."]:
  """How many tiles each pixel rectangle touches."""
  x0, x1, y0, y1 = jnp.moveaxis(_tiles(rect, side), -1, 0)
  return ((x1 - x0) * (y1 - y0)).astype(jnp.uint32)


def build(seen: Projected, tiles: Grid, capacity: int) -> Bins:
  """Lists the pairs of all cameras.

  Args:
    seen: leaves [c n ...].
    tiles: of each camera.
    capacity: slots; pairs of the farthest splats of the last cameras are left out and counted
      where they do not suffice.

  Raises:
    ValueError: if tiles times splats pass 2**32.
  """
  cameras, n = seen.depth.shape
  per_camera = tiles.columns * tiles.rows
  if cameras * per_camera * n >= EMPTY:
    raise ValueError(f"{cameras} cameras x {per_camera} tiles x {n} splats pass 2**32: "
                     "rasterize fewer cameras at a time")
  seen = jax.tree.map(lax.stop_gradient, seen)
  # Invisible splats touch no tile; where they stand in the order is all the same.
  _, order = lax.sort((seen.depth, lax.broadcasted_iota(jnp.int32, (cameras, n), 1)),
                      dimension=1, num_keys=1)
  order = (order + n * jnp.arange(cameras, dtype=jnp.int32)[:, None]).reshape(-1)
  rect = _tiles(seen.rect, tiles.side).reshape(-1, 4)[order]
  counts = demand(seen.rect, tiles.side).reshape(-1)[order]
  ends = jnp.cumsum(counts, dtype=jnp.uint32)
  total = ends[-1]
  ends = jnp.minimum(ends, capacity).astype(jnp.int32)
  begins = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])

  slot = jnp.arange(capacity, dtype=jnp.int32)
  place = jnp.repeat(jnp.arange(cameras * n, dtype=jnp.int32), ends - begins,
                     total_repeat_length=capacity)
  x0, x1, y0, _ = rect[place].T
  within, wide = slot - begins[place], jnp.maximum(x1 - x0, 1)
  x, y = x0 + within % wide, y0 + within // wide
  tile = (place // n * tiles.rows + y) * tiles.columns + x
  key = tile.astype(jnp.uint32) * n + (place % n).astype(jnp.uint32)
  touched = (slot < ends[-1]) & _touch(seen, order[place], x, y, tiles.side)
  key = lax.sort(jnp.where(touched, key, jnp.uint32(EMPTY)))

  first = begins[place]
  tile, rank = (key // n).astype(jnp.int32), (key % n).astype(jnp.int32)
  limits = jnp.arange(cameras * per_camera + 1, dtype=jnp.uint32) * n
  starts = jnp.searchsorted(key, limits).astype(jnp.int32)
  used = slot < starts[-1]
  camera = jnp.where(used, tile // per_camera, 0)
  place = jnp.where(used, camera * n + rank, 0)
  # A key names its pair, so the slot that the pair came from can be computed.
  x0, x1, y0, _ = rect[place].T
  y, x = tile // tiles.columns % tiles.rows, tile % tiles.columns
  origin = jnp.where(used, begins[place] + (y - y0) * (x1 - x0) + x - x0, capacity + slot)
  by_splat = jnp.full(capacity, capacity, jnp.int32).at[origin].set(
      slot, mode="drop", unique_indices=True)
  runs = jnp.zeros((cameras * n, 2), jnp.int32).at[order].set(
      jnp.stack([begins, ends], 1), unique_indices=True)
  return Bins(jnp.where(used, order[place], cameras * n), starts,
              (total - ends[-1].astype(jnp.uint32)).astype(jnp.int32),
              by_splat, first, runs)


def sum_by_splat(rows: Float[Array, "p k"], bins: Bins) -> Float[Array, "r k"]:
  """Adds up the rows of each splat's pairs, in the same order every time.

  A CPU adds one row after the other; elsewhere that would take atomics, whose order is chance,
  so there the rows are put in order of their splats and added up by doubling strides.
  """
  return lax.platform_dependent(rows, bins, cpu=sum_by_scatter, default=sum_by_runs)


def sum_by_scatter(rows, bins):
  """`sum_by_splat`, one row after the other."""
  return jax.ops.segment_sum(rows, bins.splats, len(bins.runs))


def sum_by_runs(rows, bins):
  """`sum_by_splat`, all splats at once."""
  rows = rows.at[bins.by_splat].get(mode="fill", fill_value=0)
  begins, ends = bins.runs.T
  rows = scan_runs(jnp.add, rows, bins.first, jnp.max(ends - begins, initial=0))
  last = rows.at[ends - 1].get(mode="clip")
  return jnp.where((ends > begins)[:, None], last, 0)


def scan_runs(combine, x: Array, first: Int[Array, " m"], longest: Int[Array, ""]) -> Array:
  """Inclusive scan within runs of consecutive rows of x [m ...].

  Args:
    combine: associative, of two arrays.
    x: rows.
    first: index of the first row of each row's run.
    longest: no run has more rows.
  """
  index = jnp.arange(len(x), dtype=jnp.int32)

  def double(carry):
    stride, x = carry
    inside = (index - stride >= first).reshape((-1,) + (1,) * (x.ndim - 1))
    return 2 * stride, jnp.where(inside, combine(x, jnp.roll(x, stride, 0)), x)

  return lax.while_loop(lambda carry: carry[0] < longest, double, (jnp.int32(1), x))[1]


def _touch(seen, splat, column, row, side):
  """Whether an ellipse of alpha >= 1/255 reaches any pixel centre of a tile.

  The least of a convex form over a box lies on one of the two sides that face its centre.
  """
  xy, conic = seen.xy.reshape(-1, 2)[splat], seen.conic.reshape(-1, 3)[splat]
  a, b, c = conic.T
  level = 2 * jnp.log(jnp.maximum(seen.opacity.reshape(-1)[splat] / ALPHA_MIN, 1.0))
  left = column * side + 0.5 - xy[:, 0]
  top = row * side + 0.5 - xy[:, 1]
  right, bottom = left + side - 1, top + side - 1
  x, y = jnp.clip(0, left, right), jnp.clip(0, top, bottom)
  along = jnp.clip(-b * x / c, top, bottom)
  across = jnp.clip(-b * y / a, left, right)
  least = jnp.minimum(a * x * x + 2 * b * x * along + c * along * along,
                      a * across * across + 2 * b * across * y + c * y * y)
  return least <= level * 1.001 + 0.01  # rounding may not cost a pixel


def _tiles(rect, side):
  """Pixel rectangles in tiles: starts round down, ends up."""
  up = jnp.array([0, side - 1, 0, side - 1], rect.dtype)
  return (rect + up.reshape((1,) * (rect.ndim - 1) + (4,))) // side
