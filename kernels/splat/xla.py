"""Splat compositing in plain XLA: tiled, vectorised, the default on a CPU.

The pairs of each tile are cut into blocks of consecutive splats. A group of blocks, whichever
tiles they belong to, is handled at once: what light reaches each block is a scan of products
over the blocks before it in its tile. So a tile with thousands of splats costs no more than as
many tiles with few, and working memory is bounded by the group, not by the scene.

Going backward, the light is followed from the front and what lies behind each splat is summed
from the back, so that gradients in deep shade are as exact as those in the open.

What a CPU likes shaped the code: exponentials of a whole group in one sweep, sums over splats
and over pixels as products of matrices, and between them one loop over a block's splats that
does as little as can be.

Axes: r splats of all cameras, t tiles of all cameras, p pairs, b blocks, g blocks of one group,
k splats of one block, m channels, s pixels of a tile.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels.splat.bins import Bins, Grid, owner, scan_runs, sum_by_splat, zero
from kernels.splat.moments import SHAPE, shift
from kernels.splat.project import ALPHA_MIN
from kernels.splat.reference import ALPHA_MAX, OPAQUE
from kernels.splat.tuning import Config


class Blocks(NamedTuple):
  """Consecutive pairs of one tile; a row for every block that may be needed."""

  tile: Int[Array, " b"]  # t in unused rows
  begin: Int[Array, " b"]  # pairs begin:end
  end: Int[Array, " b"]
  first: Int[Array, " b"]  # the first block of this block's tile
  starts: Int[Array, " t+1"]  # tile i owns the blocks starts[i]:starts[i + 1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def composite(
    shapes: Float[Array, "r 6"],
    values: Float[Array, "r m"],
    bins: Bins,
    attached: tuple[bool, ...],
    tiles: Grid,
    config: Config,
) -> Float[Array, "t m+1 s"]:
  """`reference.composite` tile by tile; the last channel is alpha.

  Args:
    shapes: mean x, y, conic xx, xy, yy, opacity of each splat; their cotangents are moments.
    values: what the splats show.
    bins: the pairs.
    attached: which of the values give gradient to the shapes.
    tiles: of one camera.
    config: settings.
  """
  return _forward(shapes, values, bins, attached, tiles, config)[0]


def _forward(shapes, values, bins, attached, tiles, config):
  del attached
  blocks, groups = cut(bins, config)
  padded = pad(shapes), pad(with_one(values))
  m, s = values.shape[1] + 1, tiles.width * tiles.height
  corner, nought = corners(tiles, len(bins.starts)), zero(shapes, values, bins.starts)

  def step(state):
    i, light, shown, carry = state
    here = _take(blocks, i, config.group)
    shape, value = fetch(padded, bins, here, config.block)
    x0, y0 = (z[here.tile] for z in corner)
    alpha = _alpha(shape, x0, y0, tiles)
    clear = lax.fori_loop(0, config.block, lambda k, light: light * (1 - alpha[:, k]),
                          jnp.ones((config.group, s), values.dtype) + nought)
    enter, carry = _enter(clear, here, i * config.group, carry)

    def blend(k, state):
      raw, share = state
      raw, now = _share(alpha[:, k], raw)
      return raw, lax.dynamic_update_index_in_dim(share, now, k, 1)

    share = jnp.zeros_like(alpha) + nought
    _, share = lax.fori_loop(0, config.block, blend, (enter, share))
    total = jnp.einsum("gks,gkm->gms", share, value, precision="highest")
    light = lax.dynamic_update_slice(light, enter, (i * config.group, 0))
    shown = lax.dynamic_update_slice(shown, total, (i * config.group, 0, 0))
    return i + 1, light, shown, carry

  size = len(blocks.tile)
  start = (jnp.zeros((size, s), values.dtype), jnp.zeros((size, m, s), values.dtype),
           jnp.ones(s, values.dtype))
  state = (jnp.int32(0), *(x + nought for x in start))
  _, light, shown, _ = lax.while_loop(lambda state: state[0] < groups, step, state)
  total = _sum_by_tile(shown, blocks)
  return total, (shapes, values, bins, light, shown)


def _backward(attached, tiles, config, residuals, d_total):
  shapes, values, bins, light, shown = residuals
  blocks, groups = cut(bins, config)
  padded = pad(shapes), pad(with_one(values))
  m, s = values.shape[1] + 1, tiles.width * tiles.height
  corner = corners(tiles, len(bins.starts))
  mask = jnp.array((*attached, True), values.dtype)
  d_total = jnp.concatenate([d_total, jnp.zeros((1, m, s), d_total.dtype)])
  d_shown = d_total[blocks.tile]
  # What each pixel shows behind this block, weighed by the cotangent: summed from the back, not
  # what it shows less what lies before, of which rounding would leave nothing in deep shade.
  weighed = jnp.einsum("bms,bms,m->bs", d_shown, shown, mask)
  index = jnp.arange(len(blocks.tile), dtype=jnp.int32)
  last = jnp.where(index < blocks.starts[-1], blocks.starts[blocks.tile + 1] - 1, index)
  behind = scan_runs(jnp.add, weighed[::-1], (len(index) - 1 - last)[::-1],
                     jnp.max(jnp.diff(blocks.starts)))[::-1]
  behind = jnp.where((index < last)[:, None], jnp.roll(behind, -1, 0), 0)
  basis, nought = moments(tiles, values.dtype), zero(shapes, values, bins.starts, d_total)

  def step(state):
    i, d_rows = state
    here = _take(blocks, i, config.group)
    shape, value = fetch(padded, bins, here, config.block)
    x0, y0 = (z[here.tile] for z in corner)
    enter, behind_here, d_here = (
        lax.dynamic_slice_in_dim(z, i * config.group, config.group) for z in
        (light, behind, d_shown))

    alpha = _alpha(shape, x0, y0, tiles)
    weight = jnp.einsum("gkm,gms->gks", value * mask[None, None], d_here, precision="highest")

    def blend(k, state):
      raw, share = state
      raw, now = _share(alpha[:, k], raw)
      return raw, lax.dynamic_update_index_in_dim(share, now, k, 1)

    def unblend(i, state):
      k = config.block - 1 - i
      behind, d_power = state
      now = share[:, k]
      lit = weight[:, k] * now
      # Alpha does not follow the shape where it is capped, nor in a finished pixel.
      slope = jnp.where((now > 0) & (alpha[:, k] < ALPHA_MAX),
                        lit - behind * alpha[:, k] / (1 - alpha[:, k]), 0)
      return behind + lit, lax.dynamic_update_index_in_dim(d_power, slope, k, 1)

    start = jnp.zeros_like(alpha) + nought
    _, share = lax.fori_loop(0, config.block, blend, (enter, start))
    _, d_power = lax.fori_loop(0, config.block, unblend, (behind_here, start))
    d_value = jnp.einsum("gks,gms->gkm", share, d_here, precision="highest")
    sums = jnp.einsum("gks,sq->gkq", d_power, basis, precision="highest")
    rows = jnp.concatenate([about_means(shape, sums, x0, y0, tiles), d_value], -1)
    return i + 1, lax.dynamic_update_slice(d_rows, rows, (i * config.group, 0, 0))

  d_rows = jnp.zeros((len(blocks.tile), config.block, SHAPE + m), values.dtype) + nought
  _, d_rows = lax.while_loop(lambda state: state[0] < groups, step, (jnp.int32(0), d_rows))
  # From slots of blocks to pairs.
  place = jnp.arange(len(bins.splats), dtype=jnp.int32)
  index = (blocks.starts * config.block - bins.starts)[bins.tiles] + place
  sums = sum_by_splat(d_rows.reshape(-1, SHAPE + m), SHAPE + m, index, bins, tiles)
  return sums[:, :SHAPE], sums[:, SHAPE:-1], None


composite.defvjp(_forward, _backward)


def cut(bins: Bins, config: Config):
  """Blocks of the pairs, and how many groups of them are in use."""
  t = len(bins.starts) - 1
  per_tile = -(-jnp.diff(bins.starts) // config.block)
  starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(per_tile, dtype=jnp.int32)])
  most = -(-len(bins.splats) // config.block) + t
  size = -(-most // config.group) * config.group
  index = jnp.arange(size, dtype=jnp.int32)
  tile = owner(starts[1:], size)
  begin = bins.starts[tile] + (index - starts[tile]) * config.block
  used = index < starts[-1]
  blocks = Blocks(jnp.where(used, tile, t), begin,
                  jnp.where(used, bins.starts[tile + 1], begin),
                  jnp.where(used, starts[tile], index), starts)
  return blocks, -(-starts[-1] // config.group)


def _take(blocks: Blocks, i, group) -> Blocks:
  """The i-th group of blocks."""
  tile, begin, end, first = (
      lax.dynamic_slice_in_dim(z, i * group, group) for z in blocks[:4])
  return Blocks(tile, begin, end, first, blocks.starts)


def fetch(padded, bins, here, block):
  """Shapes [g k 6] and values [g k m] of the blocks' splats; zeros where a block is short."""
  shapes, values = padded
  pair = here.begin[:, None] + jnp.arange(block, dtype=jnp.int32)[None, :]
  ids = bins.splats.at[pair].get(mode="clip")
  ids = jnp.where(pair < here.end[:, None], ids, len(shapes) - 1)
  return shapes[ids], values[ids]


def _alpha(shape, x0, y0, tiles):
  """Alpha [g k s] of the blocks' splats at the pixels of their tiles."""
  u, v, a, b, c, opacity = (shape[:, :, i, None] for i in range(SHAPE))
  column, row = (z[None, None, :] for z in _offsets(tiles, shape.dtype))
  dx, dy = column + x0[:, None, None] - u, row + y0[:, None, None] - v
  power = -0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy
  raw = opacity * jnp.exp(power)
  return jnp.where((raw >= ALPHA_MIN) & (power <= 0), jnp.minimum(raw, ALPHA_MAX), 0)


def _share(alpha, light):
  """The light behind a splat, and its share of its pixels: 0 where they are finished.

  Light that once fell below the bound stays below it, so no flag need be kept.
  """
  left = light * (1 - alpha)
  return left, jnp.where(left >= OPAQUE, alpha * light, 0)


def _enter(clear, here, offset, carry):
  """Light [g s] that reaches each block, and what leaves the last one."""
  first = here.first - offset
  index = jnp.arange(len(clear), dtype=jnp.int32)
  # A tile that began in an earlier group goes on with what came through there.
  clear = clear.at[0].multiply(jnp.where(first[0] < 0, carry, 1))
  first = jnp.maximum(first, 0)
  through = scan_runs(jnp.multiply, clear, first, jnp.max(index - first) + 1)
  enter = jnp.where((index > first)[:, None], jnp.roll(through, 1, 0), 1)
  enter = enter.at[0].set(jnp.where(here.first[0] < offset, carry, 1))
  return enter, through[-1]


def _sum_by_tile(shown, blocks):
  """Adds up what the blocks [b m s] of each tile show."""
  def scatter(shown):
    return jax.ops.segment_sum(shown, blocks.tile, len(blocks.starts) - 1,
                               indices_are_sorted=True)

  def gather(shown):
    counts = jnp.diff(blocks.starts)
    runs = scan_runs(jnp.add, shown, blocks.first, jnp.max(counts))
    last = runs.at[blocks.starts[1:] - 1].get(mode="clip")
    return jnp.where((counts > 0)[:, None, None], last, 0)

  return lax.platform_dependent(shown, cpu=scatter, default=gather)


def about_means(shape, sums, x0, y0, tiles):
  """Moments [g k 6] about the splats' means, from those about the tile's centre."""
  px, py = x0[:, None] + tiles.width / 2, y0[:, None] + tiles.height / 2
  sums = tuple(sums[..., i] for i in range(SHAPE))
  return jnp.stack(shift(sums, px - shape[..., 0], py - shape[..., 1]), -1)


def moments(tiles, dtype):
  """1, x, y, xx, xy, yy [s 6] of a tile's pixel centres about its centre."""
  x, y = _offsets(tiles, dtype)
  x, y = x - tiles.width / 2, y - tiles.height / 2
  return jnp.stack([jnp.ones_like(x), x, y, x * x, x * y, y * y], 1)


def _offsets(tiles, dtype):
  """Column and row [s] of a tile's pixel centres."""
  index = jnp.arange(tiles.width * tiles.height)
  return (index % tiles.width).astype(dtype) + 0.5, (index // tiles.width).astype(dtype) + 0.5


def corners(tiles: Grid, rows: int):
  """x and y [rows] of the upper left corner of every tile."""
  index = jnp.arange(rows, dtype=jnp.int32) % (tiles.columns * tiles.rows)
  x, y = index % tiles.columns, index // tiles.columns
  return (x * tiles.width).astype(jnp.float32), (y * tiles.height).astype(jnp.float32)


def with_one(values):
  """Values with a channel that makes alpha."""
  return jnp.concatenate([values, jnp.ones((len(values), 1), values.dtype)], 1)


def pad(rows):
  """A last row of zeros: the splat that shows nothing."""
  return jnp.concatenate([rows, jnp.zeros((1, rows.shape[1]), rows.dtype)])
