"""Splat compositing as Pallas kernels, one program a tile.

No atomics: going forward a program owns its tile's pixels, going backward its tile's pairs, and
XLA adds up the pairs of each splat. Both passes go front to back and stop once no pixel of the
tile lets light through. Bodies are written once and know no backend; `_launch` alone does.

Axes: r splats of all cameras, t tiles of all cameras, p pairs, m channels, s pixels of a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels.splat.bins import Bins, Grid, sum_by_splat
from kernels.splat.project import ALPHA_MIN
from kernels.splat.reference import ALPHA_MAX, OPAQUE
from kernels.splat.tuning import Config


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def composite(
    shapes: Float[Array, "r 6"],
    values: Float[Array, "r m"],
    bins: Bins,
    attached: tuple[bool, ...],
    tiles: Grid,
    config: Config,
) -> Float[Array, "t m+1 s"]:
  """`xla.composite`, of which it is the other implementation."""
  return _forward(shapes, values, bins, attached, tiles, config)[0]


def _forward(shapes, values, bins, attached, tiles, config):
  del attached
  t, m, side = len(bins.starts) - 1, values.shape[1], tiles.side
  out = jax.ShapeDtypeStruct((t, m + 1, side, side), jnp.float32)
  body = functools.partial(_forward_body, tiles=tiles, m=m, chunk=config.block)
  shown = _launch(body, t, out, config.backend)(shapes, values, bins.splats, bins.starts)
  return shown.reshape(t, m + 1, side * side), (shapes, values, bins, shown)


def _backward(attached, tiles, config, residuals, d_shown):
  shapes, values, bins, shown = residuals
  t, m, p = len(bins.starts) - 1, values.shape[1], len(bins.splats)
  out = (jax.ShapeDtypeStruct((p, 6 + m), jnp.float32), jax.ShapeDtypeStruct((t,), jnp.int32))
  body = functools.partial(_backward_body, tiles=tiles, attached=attached, chunk=config.block)
  rows, reached = _launch(body, t, out, config.backend)(
      shapes, values, bins.splats, bins.starts, shown, d_shown.reshape(shown.shape))
  # Rows beyond a tile's last visible splat were never written and may hold anything.
  slot = jnp.arange(p, dtype=jnp.int32)
  tile = jnp.repeat(jnp.arange(t, dtype=jnp.int32), jnp.diff(bins.starts), total_repeat_length=p)
  rows = jnp.where((slot < reached[tile])[:, None], rows, 0)
  sums = sum_by_splat(rows, bins)
  return sums[:, :6], sums[:, 6:], None


composite.defvjp(_forward, _backward)


def _forward_body(tile, shapes, values, splats, starts, shown_out, *, tiles, m, chunk):
  x, y = _pixels(tile, tiles)

  def blend(pair, carry):
    light, *shown = carry
    splat = splats[pair]
    alpha, *_ = _alpha(shapes, splat, x, y)
    light, share = _share(alpha, light)
    shown = [c + values[splat, i] * share for i, c in enumerate(shown[:-1])] + [shown[-1] + share]
    return light, *shown

  start = (jnp.ones_like(x),) + (jnp.zeros_like(x),) * (m + 1)
  _, (_, *shown) = _walk(starts[tile], starts[tile + 1], chunk, blend, start)
  for i, channel in enumerate(shown):
    shown_out[tile, i] = channel


def _backward_body(tile, shapes, values, splats, starts, shown, d_shown, rows_out, reached_out,
                   *, tiles, attached, chunk):
  x, y = _pixels(tile, tiles)
  m = len(attached)
  g = [d_shown[tile, i] for i in range(m + 1)]
  seen = [i for i in range(m) if attached[i]]
  # What lies behind splat j, weighed by the cotangent, is all that the pixel shows less what
  # splats 0..j have shown.
  behind = sum((g[i] * shown[tile, i] for i in seen), g[m] * shown[tile, m])

  def unblend(pair, carry):
    light, behind = carry
    splat = splats[pair]
    alpha, dx, dy, (a, b, c, opacity) = _alpha(shapes, splat, x, y)
    light, share = _share(alpha, light)
    weight = sum((g[i] * values[splat, i] for i in seen), g[m])
    lit = weight * share
    behind = behind - lit
    # Alpha does not follow the shape where it is capped, nor in a finished pixel.
    d_power = jnp.where((share > 0) & (alpha < ALPHA_MAX), lit - behind * alpha / (1 - alpha), 0.0)
    by_x, by_y = d_power * dx, d_power * dy
    sum_x, sum_y = jnp.sum(by_x), jnp.sum(by_y)
    row = [a * sum_x + b * sum_y, b * sum_x + c * sum_y, -0.5 * jnp.sum(by_x * dx),
           -jnp.sum(by_x * dy), -0.5 * jnp.sum(by_y * dy),
           # No pair has opacity 0: the support of such a splat is empty.
           jnp.sum(d_power) / opacity]
    row += [jnp.sum(g[i] * share) for i in range(m)]
    for i, d in enumerate(row):
      rows_out[pair, i] = d
    return light, behind

  reached, _ = _walk(starts[tile], starts[tile + 1], chunk, unblend, (jnp.ones_like(x), behind))
  reached_out[tile] = reached


def _walk(begin, end, chunk, step, carry):
  """Runs `step` over begin..end, as long as light (the first of `carry`) is left anywhere.

  Whether some is left takes a sum over the whole tile, so it is asked once a chunk only.
  """
  def go_on(state):
    at, lit, _ = state
    return (at < end) & (lit > 0)

  def run(state):
    at, _, carry = state
    stop = jnp.minimum(at + chunk, end)
    carry = lax.fori_loop(at, stop, step, carry)
    return stop, jnp.sum(jnp.where(carry[0] >= OPAQUE, 1.0, 0.0)), carry

  at, _, carry = lax.while_loop(go_on, run, (begin, jnp.float32(1), carry))
  return at, carry


def _alpha(shapes, splat, x, y):
  """A splat's alpha at each pixel of the tile, and what it was made of."""
  u, v, a, b, c, opacity = (shapes[splat, i] for i in range(6))
  dx, dy = x - u, y - v
  power = -0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy
  raw = opacity * jnp.exp(power)
  alpha = jnp.where((raw >= ALPHA_MIN) & (power <= 0.0), jnp.minimum(raw, ALPHA_MAX), 0.0)
  return alpha, dx, dy, (a, b, c, opacity)


def _share(alpha, light):
  """The light behind a splat, and its share of its pixels: 0 where they are finished."""
  left = light * (1 - alpha)
  return left, jnp.where(left >= OPAQUE, alpha * light, 0.0)


def _pixels(tile, tiles):
  """x and y of the tile's pixel centres."""
  at = tile % (tiles.columns * tiles.rows)
  shape = (tiles.side, tiles.side)
  x = lax.broadcasted_iota(jnp.int32, shape, 1) + at % tiles.columns * tiles.side
  y = lax.broadcasted_iota(jnp.int32, shape, 0) + at // tiles.columns * tiles.side
  return x.astype(jnp.float32) + 0.5, y.astype(jnp.float32) + 0.5


def _launch(body, programs, out, backend):
  """A function of arrays that runs `body(program, *refs in, *refs out)` for every program."""
  if backend == "mosaic":
    # Imported here: where JAX has no NVIDIA parts, all else still works.
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(*refs):
      body(lax.axis_index("tile"), *refs)

    launch = plgpu.kernel(run, out_type=out, grid=(programs,), grid_names=("tile",),
                          compiler_params=plgpu.CompilerParams(
                              lowering_semantics=plgpu.LoweringSemantics.Warpgroup))
  elif backend == "interpret":
    def run(*refs):
      body(pl.program_id(0), *refs)

    launch = pl.pallas_call(run, out_shape=out, grid=(programs,), interpret=True)
  else:
    raise ValueError(f"{backend=} is neither mosaic nor interpret")
  # Under vmap: one launch after the other.
  return jax.custom_batching.sequential_vmap(lambda *arrays: launch(*arrays))
