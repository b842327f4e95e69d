"""Splat compositing as Pallas kernels for NVIDIA GPUs, one program a tile, one thread a pixel.

No atomics: going forward a program owns its tile's pixels, going backward its tile's pairs, and
XLA adds up the pairs of each splat. Both passes go front to back and stop once no pixel of the
tile lets light through. What lies behind a splat is all that the pixel shows less what the
splats up to it have shown.

Splats come to shared memory a chunk at a time, in the order of the pairs, and the next chunk is
fetched while one is blended. Going backward, every thread leaves its pixel's part of each
splat's gradient in a matrix, splats by pixels; then threads take splats instead of pixels and
add up the rows. So nothing is summed across threads but a handful of numbers a chunk.

Bodies are written once and know no backend; `_Mosaic` and `_Interpreter` alone do.

Axes: r splats of all cameras, t tiles of all cameras, p pairs, m channels, s pixels of a tile.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels.splat.bins import Bins, Grid, sum_by_splat
from kernels.splat.project import ALPHA_MIN
from kernels.splat.reference import ALPHA_MAX, OPAQUE
from kernels.splat.tuning import Config

TILE = 16, 8  # px: a pixel for each thread of a warpgroup
PIXELS = TILE[0] * TILE[1]
AHEAD = 128  # pairs fetched at once going forward
BACK = 64  # and backward: as many rows as the matrices of gradients have
PITCH = PIXELS + 8  # of those rows in shared memory: neighbours lie in different banks
SHAPE = 6  # numbers: mean x, y, conic xx, xy, yy, opacity
MOST = 64  # channels that registers and shared memory hold
LOG2_E = math.log2(math.e)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def composite(
    shapes: Float[Array, "r 6"],
    values: Float[Array, "r m"],
    bins: Bins,
    attached: tuple[bool, ...],
    tiles: Grid,
    config: Config,
) -> Float[Array, "t m+1 s"]:
  """`xla.composite`, of which it is the other implementation. Tiles are `TILE`."""
  return _forward(shapes, values, bins, attached, tiles, config)[0]


def _forward(shapes, values, bins, attached, tiles, config):
  del attached
  if (tiles.width, tiles.height) != TILE:
    raise ValueError(f"tiles of {tiles.width}x{tiles.height} px where {TILE} are needed")
  t, m = len(bins.starts) - 1, values.shape[1]
  if m > MOST:
    raise ValueError(f"{m} channels (colour, depth and features) where the Pallas kernels hold at "
                     f"most {MOST}: draw fewer at a time, or take implementation='xla'")
  pairs = _pack(shapes, values, bins)
  width = pairs.shape[1]
  out = (jax.ShapeDtypeStruct((t, m + 1, PIXELS), jnp.float32),)
  body = functools.partial(_forward_body, tiles=tiles, m=m)
  shown, = BACKENDS[config.backend]().launch(body, t, out, ((AHEAD, width),))(
      pairs, bins.starts)
  return shown, (shapes, values, bins, pairs, shown)


def _backward(attached, tiles, config, residuals, d_shown):
  shapes, values, bins, pairs, shown = residuals
  t, m, width = len(bins.starts) - 1, values.shape[1], pairs.shape[1]
  # Every tile's rows begin anew at a multiple of the chunk, lest one tile's last chunk and the
  # next one's first be the same.
  chunks = -(-jnp.diff(bins.starts) // BACK)
  firsts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(chunks, dtype=jnp.int32)])
  rows = len(bins.splats) // BACK + t
  out = (jax.ShapeDtypeStruct((rows * BACK, -(-(SHAPE + m) // 8) * 8), jnp.float32),)
  body = functools.partial(_backward_body, tiles=tiles, attached=attached)
  scratch = ((BACK, width), (BACK, PITCH), (BACK, PITCH), (m, PIXELS))
  rows, = BACKENDS[config.backend]().launch(body, t, out, scratch)(
      pairs, bins.starts, firsts, shown, d_shown)
  place = jnp.arange(len(bins.splats), dtype=jnp.int32)
  index = (firsts * BACK - bins.starts)[bins.tiles] + place
  sums = sum_by_splat(rows, index, bins, tiles)
  return _d_shape(shapes, sums), sums[:, SHAPE:SHAPE + m], None


composite.defvjp(_forward, _backward)


def _pack(shapes, values, bins):
  """What each pair blends [p+ width], and some rows of zeros to read ahead into."""
  u, v, a, b, c, opacity = (shapes[:, i] for i in range(SHAPE))
  # The kernels take powers of two.
  table = jnp.stack([u, v, -0.5 * LOG2_E * a, -LOG2_E * b, -0.5 * LOG2_E * c, opacity], 1)
  # Chunks of rows of even width fill whole warpgroups.
  odd = jnp.zeros((len(values), (SHAPE + values.shape[1]) % 2))
  # Made once a splat, not once a pair.
  table = lax.optimization_barrier(jnp.concatenate([table, values, odd], 1))
  ahead = jnp.full(2 * AHEAD, len(table), jnp.int32)
  return table.at[jnp.concatenate([bins.splats, ahead])].get(mode="fill", fill_value=0)


def _d_shape(shapes, sums):
  """Cotangents [r 6] of the shapes from moments (1, x, y, xx, xy, yy) of the power's."""
  _, _, a, b, c, opacity = (shapes[:, i] for i in range(SHAPE))
  one, x, y, xx, xy, yy = (sums[:, i] for i in range(SHAPE))
  return jnp.stack([a * x + b * y, b * x + c * y, -0.5 * xx, -xy, -0.5 * yy,
                    # No pair has opacity 0: the support of such a splat is empty.
                    one / jnp.where(opacity > 0, opacity, 1)], 1)


def _forward_body(on, tile, pairs, starts, shown_out, chunk, *, tiles, m):
  x, y = _pixels(on, tile, tiles)
  end = starts[tile + 1]

  def blend(at, carry):
    light, *shown = carry
    alpha = _alpha(chunk, at, x, y)
    light, share = _share(alpha, light)
    shown = [c + chunk[at, SHAPE + i] * share for i, c in enumerate(shown[:-1])] + [
        shown[-1] + share]
    return light, *shown

  def run(at, carry):
    return _each(jnp.minimum(AHEAD, end - at), blend, carry)

  start = (1 + 0 * x,) + (0 * x,) * (m + 1)
  _, (_, *shown) = _walk(on, starts[tile], end, pairs, chunk, AHEAD, run, start)
  for i, channel in enumerate(shown):
    shown_out[tile, i] = channel


def _backward_body(on, tile, pairs, starts, firsts, shown, d_shown, rows_out,
                   chunk, slopes, shares, g_pixels, *, tiles, attached):
  x, y = _pixels(on, tile, tiles)
  begin, end = starts[tile], starts[tile + 1]
  m = len(attached)
  g = [d_shown[tile, i] for i in range(m + 1)]
  seen = [i for i in range(m) if attached[i]]
  behind = sum((g[i] * shown[tile, i] for i in seen), g[m] * shown[tile, m])
  for i in range(m):
    g_pixels[i] = g[i]

  def unblend(at, carry):
    light, behind = carry
    alpha = _alpha(chunk, at, x, y)
    light, share = _share(alpha, light)
    weight = sum((g[i] * chunk[at, SHAPE + i] for i in seen), g[m])
    behind = behind - weight * share
    # share / light is alpha / (1 - alpha); a reciprocal square root is one instruction. Alpha
    # does not follow the shape where it is capped, nor in a finished pixel.
    root = lax.rsqrt(jnp.maximum(light, OPAQUE))
    slopes[at, pl.ds(0, PIXELS)] = jnp.where(
        alpha < ALPHA_MAX, share * (weight - behind * (root * root)), 0.0)
    shares[at, pl.ds(0, PIXELS)] = share
    return light, behind

  def rows_of(at):
    return pl.ds((firsts[tile] + (at - begin) // BACK) * BACK, BACK)

  def run(at, carry):
    here = jnp.minimum(BACK, end - at)
    carry = _each(here, unblend, carry)
    on.barrier()
    row = _moments(on, slopes, shares, g_pixels, m)
    # The moments were about the tile's middle.
    px, py = (middle - on.load(chunk.at[:, i], on.rows)
              for i, middle in enumerate(_middle(tile, tiles)))
    one, mx, my, mxx, mxy, myy = row[:SHAPE]
    row[:SHAPE] = (one, px * one + mx, py * one + my, px * px * one + 2 * px * mx + mxx,
                   px * py * one + px * my + py * mx + mxy, py * py * one + 2 * py * my + myy)
    field = on.iota((BACK, rows_out.shape[1]), 1, on.matrix)
    together = jnp.zeros(field.shape, jnp.float32)
    for i, numbers in enumerate(row):
      together = jnp.where(field == i, lax.broadcast_in_dim(numbers, field.shape, (0,)), together)
    rows_out[rows_of(at)] = together
    return carry

  reached, _ = _walk(on, begin, end, pairs, chunk, BACK, run,
                     (1 + 0 * x, behind))

  def clear(at):
    rows_out[rows_of(at)] = jnp.zeros((BACK, rows_out.shape[1]), jnp.float32)
    return at + BACK

  lax.while_loop(lambda at: at < end, clear, reached)


def _moments(on, slopes, shares, g_pixels, m):
  """Sums over a tile's pixels, for each row: of slopes times 1, x, y, xx, xy, yy about its
  middle, and of shares times each channel's cotangent."""
  wide, high = TILE
  lines = [pl.ds(wide * j, wide) for j in range(high)]
  x = on.iota((BACK, wide), 1, on.matrix).astype(jnp.float32) - (wide - 1) / 2
  plain = by_y = by_yy = 0.0
  for j, line in enumerate(lines):
    slope, y = on.load(slopes.at[:, line], on.matrix), j - (high - 1) / 2
    plain, by_y, by_yy = plain + slope, by_y + y * slope, by_yy + y * y * slope
  sums = [jnp.sum(z, 1) for z in (plain, plain * x, by_y, plain * x * x, by_y * x, by_yy)]
  for group in range(0, m, 8):  # what the registers hold
    channels = range(group, min(group + 8, m))
    totals = [0.0] * len(channels)
    for line in lines:
      share = on.load(shares.at[:, line], on.matrix)
      totals = [total + share * lax.broadcast_in_dim(
          on.load(g_pixels.at[i, line], on.columns), share.shape, (1,))
                for i, total in zip(channels, totals, strict=True)]
    sums += [jnp.sum(total, 1) for total in totals]
  return sums


def _walk(on, begin, end, pairs, chunk, size, run, carry):
  """Runs `run(at, carry)` for each chunk of pairs, as long as light (the first of `carry`) is
  left anywhere; returns how far it came."""
  def fetch(at):
    return pairs[pl.ds(at, size)]

  def go_on(state):
    at, lit, *_ = state
    return (at < end) & (lit > 0)

  def step(state):
    at, _, fetched, carry = state
    on.barrier()  # nobody reads the last chunk any more
    chunk[...] = fetched
    on.barrier()
    fetched = fetch(at + size)
    carry = run(at, carry)
    return at + size, jnp.sum(jnp.where(carry[0] >= OPAQUE, 1.0, 0.0)), fetched, carry

  at, _, _, carry = lax.while_loop(go_on, step, (begin, jnp.float32(1), fetch(begin), carry))
  return at, carry


def _each(count, step, carry, together=4):
  """Runs `step(i, carry)` for i in 0..count, a few at a time."""
  def some(i, carry):
    for j in range(together):
      carry = step(i * together + j, carry)
    return carry

  whole = count // together
  carry = lax.fori_loop(0, whole, some, carry)
  return lax.fori_loop(whole * together, count, step, carry)


def _alpha(chunk, at, x, y):
  """A splat's alpha at each pixel of the tile."""
  u, v, a, b, c, opacity = (chunk[at, i] for i in range(SHAPE))
  dx, dy = x - u, y - v
  power = (a * dx + b * dy) * dx + c * dy * dy
  raw = opacity * jnp.exp2(power)
  return jnp.where((raw >= ALPHA_MIN) & (power <= 0.0), jnp.minimum(raw, ALPHA_MAX), 0.0)


def _share(alpha, light):
  """The light behind a splat, and its share of its pixels: 0 where they are finished."""
  share = alpha * light
  left = light - share
  return left, jnp.where(left >= OPAQUE, share, 0.0)


def _pixels(on, tile, tiles):
  """x and y of the tile's pixel centres."""
  index = on.iota((PIXELS,), 0, on.pixels)
  middle_x, middle_y = _middle(tile, tiles)
  return (index % TILE[0]).astype(jnp.float32) + (middle_x - (TILE[0] - 1) / 2), (
      index // TILE[0]).astype(jnp.float32) + (middle_y - (TILE[1] - 1) / 2)


def _middle(tile, tiles):
  """x and y of the tile's middle."""
  at = tile % (tiles.columns * tiles.rows)
  return ((at % tiles.columns * TILE[0] + TILE[0] // 2).astype(jnp.float32),
          (at // tiles.columns * TILE[1] + TILE[1] // 2).astype(jnp.float32))


class _Mosaic:
  """Where the bodies run: an NVIDIA GPU of compute capability 9.0 or later.

  Lane semantics, since there every array lies where it is told to.
  """

  def __init__(self):
    # Imported here: where JAX has no NVIDIA parts, all else still works.
    from jax.experimental.pallas import mosaic_gpu
    self._gpu = mosaic_gpu
    self.matrix = mosaic_gpu.Layout.WGMMA  # splats by pixels: few threads share a row
    self.rows, self.columns = self.matrix.reduce(1), self.matrix.reduce(0)
    self.pixels = mosaic_gpu.Layout.WG_STRIDED((PIXELS,), vec_size=1)

  def iota(self, shape, axis, layout):
    return self._gpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)

  def load(self, ref, layout):
    # Until 0.11 the index was an argument of its own.
    index = () if jax.__version_info__ >= (0, 11) else ((),)
    return self._gpu.load(ref, *index, layout=layout, optimized=False)

  def barrier(self):
    self._gpu.commit_smem()

  def launch(self, body, programs, out, scratch):
    def run(*refs):
      body(self, lax.axis_index("tile"), *refs)

    return self._gpu.kernel(
        run, out_type=out, grid=(programs,), grid_names=("tile",),
        scratch_types=[self._gpu.SMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=self._gpu.CompilerParams(
            lowering_semantics=self._gpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True))  # `barrier` stands wherever one is needed


class _Interpreter:
  """Where the bodies run: anywhere, one program after the other, for tests."""

  matrix = rows = columns = pixels = None

  def iota(self, shape, axis, layout):
    del layout
    return lax.broadcasted_iota(jnp.int32, shape, axis)

  def load(self, ref, layout):
    del layout
    return ref[...]

  def barrier(self):
    pass

  def launch(self, body, programs, out, scratch):
    def run(*refs):
      body(self, pl.program_id(0), *refs)

    return pl.pallas_call(
        run, out_shape=out, grid=(programs,), interpret=True,
        scratch_shapes=[pl.MemorySpace.ANY(shape, jnp.float32) for shape in scratch])


BACKENDS = {"mosaic": _Mosaic, "interpret": _Interpreter}
