"""Splat compositing as Pallas kernels for TPUs: lowered for them and interpreted, never run there.

The pairs of each tile are cut into chunks, and the grid walks over the chunks one after the
other: a tile's image stays in VMEM while its chunks pass, and scratch keeps what light they
leave. A chunk is handled at once, as matrices of splats by pixels: the vector unit makes the
alphas, and products of matrices run along the splats and sum over splats or pixels. So there
is neither loop nor scalar arithmetic, and Pallas fetches the next chunk while one is blended.
Once no pixel of a tile lets light through, the rest of its chunks is passed over.

Both passes go front to back: what lies behind a splat is all that the pixel shows less what
the splats up to it have shown.

Axes: r splats of all cameras, t tiles of all cameras, b chunks, k splats of a chunk, m channels
with alpha, filled up to a multiple of 8, f = m + 8 numbers of a pair, s pixels of a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels.splat import xla
from kernels.splat.bins import Bins, Grid, sum_by_splat
from kernels.splat.moments import SHAPE
from kernels.splat.project import ALPHA_MIN
from kernels.splat.reference import ALPHA_MAX, OPAQUE
from kernels.splat.tuning import Config

LANES, SUBLANES = 128, 8  # of a vector register

# Which block of an array [_ _ _] each step of the grid sees.
BY_CHUNK = lambda i, tile: (i, 0, 0)
BY_TILE = lambda i, tile: (tile[i], 0, 0)
ALWAYS = lambda i, tile: (0, 0, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def composite(
    shapes: Float[Array, "r 6"],
    values: Float[Array, "r m"],
    bins: Bins,
    attached: tuple[bool, ...],
    tiles: Grid,
    config: Config,
) -> Float[Array, "t m+1 s"]:
  """`xla.composite`, of which it is another implementation.

  Tiles hold a multiple of 128 pixels, chunks (`config.block`) a multiple of 128 pairs.
  """
  return _forward(shapes, values, bins, attached, tiles, config)[0]


def _forward(shapes, values, bins, attached, tiles, config):
  del attached
  if tiles.width * tiles.height % LANES or config.block % LANES:
    raise ValueError(f"tiles of {tiles.width}x{tiles.height} px and chunks of {config.block} "
                     f"pairs where multiples of {LANES} are needed")
  chunks, _ = xla.cut(bins, config)
  pairs = _pack(shapes, values, bins, chunks, tiles, config)
  t, m = len(bins.starts) - 1, pairs.shape[1] - SUBLANES
  # Chunks without pairs belong to a tile of their own, t.
  out = jax.ShapeDtypeStruct((t + 1, m, tiles.width * tiles.height), jnp.float32)
  shown = _launch(functools.partial(_forward_body, empty=t), chunks.tile,
                  ((pairs, BY_CHUNK), (_basis(tiles), ALWAYS)), (out, BY_TILE), 1, config)
  # What no chunk has drawn may be anything.
  drawn = jnp.concatenate([jnp.diff(bins.starts) > 0, jnp.zeros(1, bool)])
  shown = jnp.where(drawn[:, None, None], shown, 0)
  return shown[:-1, :values.shape[1] + 1], (shapes, values, bins, pairs, shown)


def _backward(attached, tiles, config, residuals, d_shown):
  shapes, values, bins, pairs, shown = residuals
  chunks, _ = xla.cut(bins, config)
  t, m = len(bins.starts) - 1, pairs.shape[1] - SUBLANES
  d_shown = jnp.pad(d_shown, ((0, 1), (0, m - d_shown.shape[1]), (0, 0)))
  mask = jnp.array((*attached, True, *(m - len(attached) - 1) * (False,)))
  d_attached = jnp.where(mask[:, None], d_shown, 0)
  d_pairs = _launch(
      functools.partial(_backward_body, empty=t), chunks.tile,
      ((pairs, BY_CHUNK), (_basis(tiles), ALWAYS), (shown, BY_TILE), (d_shown, BY_TILE),
       (d_attached, BY_TILE)),
      (jax.ShapeDtypeStruct(pairs.shape, jnp.float32), BY_CHUNK), 2, config)
  pairs, d_pairs = (jnp.moveaxis(x, 1, 2) for x in (pairs, d_pairs))
  # Means are about the tile's middle already.
  x0, y0 = (jnp.full(len(pairs), -side / 2) for side in (tiles.width, tiles.height))
  place = slice(m, m + SHAPE)
  moments = xla.about_means(pairs[..., place], d_pairs[..., place], x0, y0, tiles)
  rows = jnp.concatenate([moments, d_pairs[..., :values.shape[1]]], -1)
  index = (chunks.starts * config.block - bins.starts)[bins.tiles] + jnp.arange(
      len(bins.splats), dtype=jnp.int32)
  sums = sum_by_splat(rows.reshape(-1, rows.shape[-1]), rows.shape[-1], index, bins, tiles)
  return sums[:, :SHAPE], sums[:, SHAPE:], None


composite.defvjp(_forward, _backward)


def _pack(shapes, values, bins, chunks, tiles, config):
  """What the pairs blend [b f k]: values, a one for alpha, from row m on shapes; else zeros."""
  shape, value = xla.fetch((xla.pad(shapes), xla.pad(xla.with_one(values))), bins, chunks,
                           config.block)
  x0, y0 = (corner[chunks.tile] for corner in xla.corners(tiles, len(bins.starts)))
  middle = jnp.stack([x0 + tiles.width / 2, y0 + tiles.height / 2], 1)
  shape = jnp.concatenate([shape[..., :2] - middle[:, None], shape[..., 2:]], -1)
  # Pairs lie along the lanes, lest HBM be filled with padding.
  return jnp.concatenate([_fill(jnp.moveaxis(x, 2, 1), SUBLANES) for x in (value, shape)], 1)


def _basis(tiles):
  """1, x, y, xx, xy, yy [1 8 s] of the pixels about the tile's middle; two rows of zeros."""
  return _fill(xla.moments(tiles, jnp.float32).T[None], SUBLANES)


def _fill(x, multiple):
  """Appends rows of zeros to x [... rows lanes] up to a multiple."""
  rows = -x.shape[-2] % multiple
  return jnp.concatenate([x, jnp.zeros((*x.shape[:-2], rows, x.shape[-1]), x.dtype)], -2)


def _launch(body, tile, inputs, out, scratch, config):
  """Runs a body for each chunk, in order: body(tile, *inputs, out, *scratch).

  Args:
    body: the kernel.
    tile: of each chunk [b], in scalar memory, which holds those of some 30 million pairs.
    inputs: arrays [_ _ _], and which block of each a chunk sees.
    out: the same of the output.
    scratch: rows [1 s] that stay from chunk to chunk.
    config: settings.
  """
  # Imported here: where JAX has no TPU parts, all else still works.
  from jax.experimental.pallas import tpu as pltpu

  def spec(x, place):
    return pl.BlockSpec((None, *x.shape[1:]), place)

  pixels = inputs[1][0].shape[2]
  grid = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=(len(tile),), in_specs=[spec(*x) for x in inputs],
      out_specs=spec(*out), scratch_shapes=[pltpu.VMEM((1, pixels), jnp.float32)] * scratch)
  return pl.pallas_call(body, grid_spec=grid, out_shape=out[0],
                        interpret=config.backend == "tpu interpret")(
                            tile, *(x for x, _ in inputs))


def _forward_body(tile, pairs, basis, shown, light, *, empty):
  @pl.when(_first(tile))
  def _():
    light[...] = jnp.ones(light.shape, jnp.float32)
    shown[...] = jnp.zeros(shown.shape, jnp.float32)

  @pl.when(_lit(tile, light, empty))
  def _():
    alpha = _alpha(_columns(pairs), len(shown), basis)
    left, share = _share(alpha, light)
    shown[...] += _dot(pairs[:len(shown)], share)
    light[...] = left


def _backward_body(tile, pairs, basis, shown, d_shown, d_attached, d_pairs, light, behind, *,
                   empty):
  m = len(shown)

  @pl.when(_first(tile))
  def _():
    light[...] = jnp.ones(light.shape, jnp.float32)
    behind[...] = jnp.sum(d_attached[...] * shown[...], 0, keepdims=True)

  go_on = _lit(tile, light, empty)

  @pl.when(go_on)
  def _():
    columns = _columns(pairs)
    alpha = _alpha(columns, m, basis)
    left, share = _share(alpha, light)
    lit = _dot(columns[:, :m], d_attached[...]) * share
    beyond = behind[...] - lit - _before(lit)
    # Alpha does not follow the shape where it is capped, nor in a finished pixel.
    slope = jnp.where((share > 0) & (alpha < ALPHA_MAX), lit - beyond * alpha / (1 - alpha), 0)
    d_pairs[:m] = _dot_over_pixels(d_shown[...], share)
    d_pairs[m:] = _dot_over_pixels(basis[...], slope)
    light[...] = left
    behind[...] -= jnp.sum(lit, 0, keepdims=True)

  @pl.when(~go_on)
  def _():
    d_pairs[...] = jnp.zeros(d_pairs.shape, jnp.float32)


def _first(tile):
  """Whether a chunk is the first of its tile."""
  i = pl.program_id(0)
  return (i == 0) | (tile[i] != tile[jnp.maximum(i - 1, 0)])


def _lit(tile, light, empty):
  """Whether a chunk has pairs and any light to blend them with."""
  return (tile[pl.program_id(0)] < empty) & (jnp.max(light[...]) >= OPAQUE)


def _columns(pairs):
  """Numbers of the pairs as columns [k f+]; only whole registers are sure to be transposed."""
  return _fill(pairs[...], LANES).T


def _alpha(columns, m, basis):
  """Alpha [k s] of the splats at the pixels."""
  u, v, a, b, c, opacity = (columns[:, m + i:m + i + 1] for i in range(SHAPE))
  dx, dy = basis[1:2] - u, basis[2:3] - v
  power = -0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy
  raw = opacity * jnp.exp(power)
  return jnp.where((raw >= ALPHA_MIN) & (power <= 0), jnp.minimum(raw, ALPHA_MAX), 0)


def _share(alpha, light):
  """The light [1 s] behind the splats, and their shares [k s]: 0 where a pixel is finished."""
  through = light[...] * jnp.exp(_before(jnp.log(1 - alpha)))
  left = through * (1 - alpha)
  # Light grows nowhere on its way, so the least is the last.
  return jnp.min(left, 0, keepdims=True), jnp.where(left >= OPAQUE, alpha * through, 0)


def _before(x):
  """Sums [k s] of what lies before each splat."""
  shape = len(x), len(x)
  row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
  return _dot((row > column).astype(jnp.float32), x)


def _dot(a, b):
  return jnp.dot(a, b, precision="highest", preferred_element_type=jnp.float32)


def _dot_over_pixels(a, b):
  """a [m s] times b [k s]: [m k]."""
  return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision="highest",
                         preferred_element_type=jnp.float32)
