"""Which splats each tile blends, and in which order: packed lists of pairs.

A pair is one splat on one tile. Splats are sorted by depth once and expanded in that order, a
slot a pair; one stable sort of the slots by tile then puts the pairs of each tile next to each
other, front to back. Tiles of all cameras are numbered through.

Axes: c cameras, n splats of each, r = c * n splats of all cameras, t tiles of all cameras,
p pairs (the capacity).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from kernels.splat.project import ALPHA_MIN, Projected


class Grid(NamedTuple):
  """The tiles of one camera's image."""

  width: int  # of a tile, px
  height: int
  columns: int
  rows: int


class Bins(NamedTuple):
  """Pairs sorted by tile, then by depth. Places from starts[-1] on are empty."""

  splats: Int[Array, " p"]  # 0..r-1, and r in empty places
  tiles: Int[Array, " p"]  # 0..t-1, and t in empty places
  starts: Int[Array, " t+1"]  # tile i owns the places starts[i]:starts[i + 1]
  overflow: Int[Array, ""]  # pairs that found no slot; at most 2**31 - 1
  # The same pairs once more, ordered by splat, for sums over a splat's pairs.
  slots: Int[Array, " p"]  # the slot that the pair in this place came from
  runs: Int[Array, "r 2"]  # begin and end of each splat's slots


def grid(width: int, height: int, tile: tuple[int, int]) -> Grid:
  """Tiles (width, height) that cover the image; the last column and row may stick out."""
  return Grid(*tile, -(-width // tile[0]), -(-height // tile[1]))


def demand(rect: Int[Array, "... 4"], tile: tuple[int, int]) -> UInt32[Array, "..."]:
  """How many tiles each pixel rectangle touches."""
  x0, x1, y0, y1 = jnp.moveaxis(_tiles(rect, tile), -1, 0)
  return ((x1 - x0) * (y1 - y0)).astype(jnp.uint32)


def running(counts: UInt32[Array, " r"], most: int) -> UInt32[Array, " r"]:
  """Running sums of counts up to `most`; all from 2**32 on are 2**32 - 1."""
  ends = jnp.cumsum(counts, dtype=jnp.uint32)
  if most * len(counts) < 2**32:
    return ends
  index = jnp.arange(len(counts), dtype=jnp.int32)
  wrapped = jnp.min(jnp.where(ends < counts, index, len(counts)))
  return jnp.where(index < wrapped, ends, jnp.uint32(2**32 - 1))


def build(seen: Projected, tiles: Grid, capacity: int) -> Bins:
  """Lists the pairs of all cameras.

  Args:
    seen: leaves [c n ...].
    tiles: of each camera.
    capacity: slots; pairs of the farthest splats of the last cameras are left out and counted
      where they do not suffice.
  """
  cameras, n = seen.depth.shape
  per_camera = tiles.columns * tiles.rows
  t, size = cameras * per_camera, (tiles.width, tiles.height)
  # Projected once a splat, not once a pair.
  seen = lax.optimization_barrier(jax.tree.map(lax.stop_gradient, seen))
  # Invisible splats touch no tile; where they stand in the order is all the same.
  _, order = lax.sort((seen.depth, lax.broadcasted_iota(jnp.int32, (cameras, n), 1)),
                      dimension=1, num_keys=1)
  order = (order + n * jnp.arange(cameras, dtype=jnp.int32)[:, None]).reshape(-1)
  rect = _tiles(seen.rect, size).reshape(-1, 4)[order]
  counts = demand(seen.rect, size).reshape(-1)[order]
  ends = running(counts, per_camera)
  total = ends[-1]
  ends = jnp.minimum(ends, capacity).astype(jnp.int32)
  begins = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])

  slot = jnp.arange(capacity, dtype=jnp.int32)
  place = owner(ends, capacity)
  splat = order[place]
  x0, x1, y0, _ = (rect[place, i] for i in range(4))
  within, wide = slot - begins[place], jnp.maximum(x1 - x0, 1)
  x, y = x0 + within % wide, y0 + within // wide
  tile = (place // n * tiles.rows + y) * tiles.columns + x
  touched = (slot < ends[-1]) & _touch(seen, splat, x, y, tiles)
  tile, slots = _sort(jnp.where(touched, tile, t), t)  # empty slots come last
  starts = _search(tile, jnp.arange(t + 1, dtype=jnp.int32), "left")
  runs = jnp.zeros((cameras * n, 2), jnp.int32).at[order].set(
      jnp.stack([begins, ends], 1), unique_indices=True)
  overflow = jnp.minimum(total - ends[-1].astype(jnp.uint32), 2**31 - 1).astype(jnp.int32)
  return Bins(jnp.where(slot < starts[-1], splat[slots], cameras * n), tile, starts, overflow,
              slots, runs)


def sum_by_splat(rows: Float[Array, "q w"], width: int, index: Int[Array, " p"], bins: Bins,
                 tiles: Grid, blank: int | None = None) -> Float[Array, "r k"]:
  """Adds up the rows of each splat's pairs, in the same order every time.

  A CPU adds one row after the other; elsewhere that would take atomics, whose order is chance,
  so there every splat fetches its rows.

  Args:
    rows: a row a pair, in any order.
    width: how many of their columns count: k.
    index: the row of the pair in each place; without meaning for empty places.
    bins: the pairs.
    tiles: of one camera.
    blank: the index of a row of zeros, if there is one. It saves masks as large as the index.
  """
  scatter = functools.partial(sum_by_scatter, width=width)
  fetch = functools.partial(sum_by_runs, width=width, longest=tiles.columns * tiles.rows,
                            blank=blank)
  return lax.platform_dependent(rows, index, bins, cpu=scatter, default=fetch)


def sum_by_scatter(rows, index, bins, width):
  """`sum_by_splat`, one row after the other."""
  rows = rows[:, :width].at[_used(index, bins, len(rows))].get(mode="fill", fill_value=0)
  return jax.ops.segment_sum(rows, bins.splats, len(bins.runs))


def sum_by_runs(rows, index, bins, width, longest, blank=None):
  """`sum_by_splat`, all splats at once; none has more than `longest` pairs."""
  # Slots that hold no pair, because the ellipse misses the tile, have no row either.
  blank = len(rows) if blank is None else blank
  index = _used(index, bins, blank)
  index = jnp.zeros_like(index).at[bins.slots].set(index, unique_indices=True)
  fan = 8 if len(index) <= 4 * len(bins.runs) else 16  # 32 would not fuse any more
  sums = _sum_runs(rows, index, bins.runs[:, 0], bins.runs[:, 1], longest, fan, width, blank)
  return lax.optimization_barrier(sums)  # or all that reads the sums would add up anew


def _used(index, bins, none):
  """The index of each place's row, and `none` for empty places."""
  return jnp.where(jnp.arange(len(index), dtype=jnp.int32) < bins.starts[-1], index, none)


def _sum_runs(rows, index, begins, ends, longest, fan, width, blank):
  """Sums of rows[index[begins:ends], :width] for each run; a row is zero if `blank` or beyond.

  The first few rows of each run are added at once. The rest of the long runs is cut into
  pieces as short, and the pieces of one run make a run in turn.
  """
  how = dict(mode="promise_in_bounds") if blank < len(rows) else dict(mode="fill", fill_value=0)

  def add(begins, ends):
    at = begins[:, None] + jnp.arange(fan, dtype=jnp.int32)[None, :]
    here = jnp.where(at < ends[:, None], index.at[at].get(mode="clip"), blank)
    return jnp.sum(rows.at[here, :width].get(**how), 1)

  total = add(begins, ends)
  if longest <= fan:
    return total
  pieces = jnp.maximum(-(-(ends - begins) // fan) - 1, 0)
  last = jnp.cumsum(pieces, dtype=jnp.int32)
  size = len(index) // fan + 1  # the last is blank
  piece = jnp.arange(size, dtype=jnp.int32)
  run = owner(last, size)
  first = jnp.where(run > 0, last[run - 1], 0)
  begin = begins[run] + fan * (piece - first + 1)
  sums = add(begin, jnp.where(piece < last[-1], ends[run], begin))
  leads = (piece == first) & (piece < last[-1])
  sums = _sum_runs(sums, piece, piece, jnp.where(leads, last[run], piece), longest // fan, fan,
                   width, size - 1)
  return total.at[jnp.where(leads, run, len(total) + piece)].add(
      sums, mode="drop", unique_indices=True)


def zero(*arrays: Array) -> Array:
  """Nought that varies over devices as the arrays do: in `shard_map`, loops must start so."""
  firsts = (x.reshape(-1)[0] for x in arrays)
  return functools.reduce(jnp.add, (jnp.where(x == 0, 0, 0) for x in firsts))


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


def _sort(tile: Int[Array, " p"], t: int):
  """Tiles 0..t of all slots in order, and the slots; equal tiles keep theirs."""
  size = len(tile)
  slot = jnp.arange(size, dtype=jnp.int32)

  def pairs(tile):
    short = jnp.uint16 if t < 2**16 else jnp.uint32  # a GPU sorts few bits faster
    tile, slots = lax.sort((tile.astype(short), slot), num_keys=1, is_stable=True)
    return tile.astype(jnp.int32), slots

  def numbers(tile):
    key = lax.sort(tile.astype(jnp.uint32) * size + slot.astype(jnp.uint32))
    return (key // size).astype(jnp.int32), (key % size).astype(jnp.int32)

  if (t + 1) * size > 2**32:
    return pairs(tile)
  return lax.platform_dependent(tile, cpu=numbers, default=pairs)


def owner(ends: Int[Array, " m"], size: int) -> Int[Array, " size"]:
  """Which run each index lies in, of runs that follow one another; any beyond them."""
  def repeat(ends):
    return jnp.repeat(jnp.arange(len(ends), dtype=jnp.int32), jnp.diff(ends, prepend=0),
                      total_repeat_length=size)

  def search(ends):  # to repeat, a GPU would have all empty runs write to one address
    index = _search(ends, jnp.arange(size, dtype=jnp.int32), "right")
    return jnp.minimum(index, len(ends) - 1)

  return lax.platform_dependent(ends, cpu=repeat, default=search)


def _search(ordered: Int[Array, " m"], x: Int[Array, "..."], side: str) -> Int[Array, "..."]:
  """`searchsorted` of integers as few kernels; a loop would wait for the host at every step."""
  steps = len(ordered).bit_length()
  rest = jnp.full(2**steps - len(ordered), jnp.iinfo(ordered.dtype).max, ordered.dtype)
  ordered = jnp.concatenate([ordered, rest])
  at = jnp.zeros_like(x)  # all before it lie left of x
  for step in (2**i for i in reversed(range(steps))):
    value = ordered.at[at + (step - 1)].get(mode="promise_in_bounds")
    at = jnp.where(value <= x if side == "right" else value < x, at + step, at)
  return at


def _touch(seen, splat, column, row, tiles):
  """Whether an ellipse of alpha >= 1/255 reaches any pixel centre of a tile.

  The least of a convex form over a box lies on one of the two sides that face its centre.
  """
  xy, conic = seen.xy.reshape(-1, 2)[splat], seen.conic.reshape(-1, 3)[splat]
  a, b, c = (conic[:, i] for i in range(3))
  level = 2 * jnp.log(jnp.maximum(seen.opacity.reshape(-1)[splat] / ALPHA_MIN, 1.0))
  left = column * tiles.width + 0.5 - xy[:, 0]
  top = row * tiles.height + 0.5 - xy[:, 1]
  right, bottom = left + tiles.width - 1, top + tiles.height - 1
  x, y = jnp.clip(0, left, right), jnp.clip(0, top, bottom)
  along = jnp.clip(-b * x / c, top, bottom)
  across = jnp.clip(-b * y / a, left, right)
  least = jnp.minimum(a * x * x + 2 * b * x * along + c * along * along,
                      a * across * across + 2 * b * across * y + c * y * y)
  return least <= level * 1.001 + 0.01  # rounding may not cost a pixel


def _tiles(rect, tile):
  """Pixel rectangles in tiles: starts round down, ends up."""
  width, height = tile
  up = jnp.array([0, width - 1, 0, height - 1], rect.dtype)
  over = jnp.array([width, width, height, height], rect.dtype)
  shape = (1,) * (rect.ndim - 1) + (4,)
  return (rect + up.reshape(shape)) // over.reshape(shape)
