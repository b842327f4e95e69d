"""The fusion as Pallas kernels for NVIDIA GPUs: a thread a splat, its system in registers.

The algebra is that of `kernels.fusion.xla`. What a block of splats goes through from the members'
answers to the fused mean stays on chip, but for the Cholesky factor of its systems, which is left
to the backward kernel and the traces. The factor is made block by block, a block being a pair of
modalities: the block's products run over the latents, and the members' contrasts are formed anew
wherever they are wanted, for arithmetic costs less than memory.

Splats come last in every array, so that threads read neighbours.

Axes: m modalities, k members, z latent, n splats, b contrasts of a modality (k - 1),
q = m b unknowns, e entries of a lower triangle (q (q + 1) / 2, by rows; on the diagonal stand
the pivots' reciprocals).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels.fusion import xla

SPLATS = 128  # of a program: a splat for each thread of a warpgroup
MOST_MEMBERS = 11  # whose block of products fits the registers
MOST_UNKNOWNS = 48  # that do so at once
TOGETHER = 4  # latents that the traces solve for at once


def fits(members: int, modalities: int) -> bool:
  """Whether the kernels hold that many."""
  return 1 < members <= MOST_MEMBERS and modalities * (members - 1) <= MOST_UNKNOWNS


def fuse(
  means: Float[Array, "m k n z"], log_vars: Float[Array, "m k n z"], ddof: int,
  backend: str = "mosaic",
) -> tuple[Float[Array, "n z"], Float[Array, " n"], Float[Array, " n"]]:
  """Returns mean, aleatoric and epistemic trace; see `kernels.fusion.fuse`.

  Args:
    backend: "mosaic" (NVIDIA, Hopper and later) or for tests on any device "interpret".
  """
  splats = means.shape[2]
  short = max(SPLATS - splats, 0)  # a program wants a full block
  means, log_vars = (jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, 0))) if short else x
                     for x in (means, log_vars))
  means, log_vars = means.swapaxes(2, 3), log_vars.swapaxes(2, 3)
  fused: Any = _fuse(means, log_vars, ddof, backend)
  mean, aleatoric, epistemic = fused
  return mean.T[:splats], aleatoric[:splats], epistemic[:splats]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _fuse(means, log_vars, ddof, backend):
  return _forward(means, log_vars, ddof, backend)[0]


def _forward(means, log_vars, ddof, backend):
  modalities, members, latent, splats = means.shape
  unknowns = modalities * (members - 1)
  precision = 1 / jnp.exp(log_vars).mean(1)
  total = precision.sum(0)
  start = (precision * means.mean(1)).sum(0) / total  # were all members agreed
  mean, weights, factor = _launch(
    functools.partial(_solve_body, ddof=ddof), backend, splats,
    (latent, unknowns, unknowns * (unknowns + 1) // 2))(means, precision, start)
  disagreement, = _launch(functools.partial(_traces_body, ddof=ddof), backend, splats, (1,))(
    means, precision, factor)
  out = mean, (1 / total).sum(0), disagreement[0]
  return out, (means, log_vars, precision, mean, weights, factor)


def _forward_symbolic(means, log_vars, ddof, backend):
  return _forward(means.value, log_vars.value, ddof, backend)


def _backward(ddof, backend, residuals, cotangents):
  means, log_vars, precision, mean, weights, factor = residuals
  modalities, members, latent, splats = means.shape
  g, *traces = cotangents
  grads = jnp.zeros_like(means), jnp.zeros_like(log_vars)
  if not isinstance(g, SymbolicZero):
    d_means, d_variances = _launch(
      functools.partial(_gradient_body, ddof=ddof), backend, splats,
      ((modalities, members, latent), (modalities, latent)))(
        means, precision, mean, weights, factor, g)
    grads = d_means, d_variances[:, None] * jnp.exp(log_vars)
  if not all(isinstance(trace, SymbolicZero) for trace in traces):
    # Nobody trains on them in earnest: plain XLA will do.
    def plain(means, log_vars):
      return xla.traces(means.swapaxes(2, 3), log_vars.swapaxes(2, 3), ddof)

    zero = jnp.zeros(splats, means.dtype)
    traces = tuple(zero if isinstance(trace, SymbolicZero) else trace for trace in traces)
    grads = jax.tree.map(jnp.add, grads, jax.vjp(plain, means, log_vars)[1](traces))
  return grads


_fuse.defvjp(_forward_symbolic, _backward, symbolic_zeros=True)


class _Block:
  """A program's splats: what it reads of them at a latent, one number a thread."""

  def __init__(self, here, means, precision, ddof: int):
    self.here, self._means, self._precision = here, means, precision
    self.modalities, self.members, self.latent = means.shape[:3]
    self._scale = xla.contrasts(self.members, ddof)[0]  # of the first member, in each contrast
    self.contrasts = self.members - 1

  def beliefs(self, z) -> tuple[list, Any]:
    """Each modality's precision, and the reciprocal of their sum."""
    precision = [self._precision[m, z, self.here] for m in range(self.modalities)]
    return precision, 1 / sum(precision[1:], precision[0])

  def spread(self, m: int, z) -> tuple[list, Any]:
    """Contrasts of a modality's members, and their sum."""
    running, rows = self._means[m, 0, z, self.here], []
    for k in range(1, self.members):
      mean = self._means[m, k, z, self.here]
      rows.append((running - float(k) * mean) * float(self._scale[k - 1]))
      running = running + mean
    return rows, running

  def pull(self, m: int, z, weights: list):
    """A_m w_m."""
    return _dot(self.spread(m, z)[0], weights[self.of(m)])

  def of(self, m: int) -> slice:
    """A modality's unknowns."""
    return slice(m * self.contrasts, (m + 1) * self.contrasts)


def _solve_body(here, means, precision, start, mean_out, weights_out, factor, *, ddof):
  block = _Block(here, means, precision, ddof)
  modalities, wide = block.modalities, block.contrasts
  nought = 0 * start[0, here]
  right = []
  for column in range(modalities):
    pivot = None
    for rows in _groups(column, modalities):
      products, right_here = _products(block, rows, column, start, nought)
      right += right_here
      products = _less_what_is_done(factor, here, rows, column, wide, products)
      for row, product in zip(rows, products, strict=True):
        if row == column:
          pivot = _cholesky(product)
          done = pivot
        else:
          done = [_forward_substitute(pivot, each) for each in product]
        for i, line in enumerate(done):
          for j, number in enumerate(line):
            factor[_entry(row * wide + i, column * wide + j), here] = number
  read = _reader(factor, here)
  weights = _back_substitute(read, _forward_substitute(read, right))
  for i, weight in enumerate(weights):
    weights_out[i, here] = weight

  def average(z, _):
    beliefs, share = block.beliefs(z)
    moved = _dot(beliefs, [block.pull(m, z, weights) for m in range(modalities)])
    mean_out[z, here] = start[z, here] + moved * share
    return _

  lax.fori_loop(0, block.latent, average, 0)


def _groups(column: int, modalities: int) -> list[list[int]]:
  """Rows of blocks whose products are summed up together; the one on the diagonal comes first."""
  rows = list(range(column, modalities))
  return [rows[i:i + 2] for i in range(0, len(rows), 2)]


def _products(block: _Block, rows, column: int, start, nought):
  """Blocks of the system, each a list of rows; and the right side's, if the diagonal is asked.

  Off the diagonal a block is -A_m^T (p_m p_l / total) A_l. On it stands 1 + A_m^T p_m (total -
  p_m) / total A_m, whose difference is summed from the others' precisions: subtracting would
  cancel where one modality is by far the surest.
  """
  wide, diagonal = block.contrasts, column in rows

  def add(z, sums):
    products, right = sums
    beliefs, share = block.beliefs(z)
    mine, total = block.spread(column, z)
    new = []
    for row, product in zip(rows, products, strict=True):
      others = [p for m, p in enumerate(beliefs) if m != row] if row == column else [
        -beliefs[column]]
      scale = beliefs[row] * share * sum(others[1:], others[0]) if others else nought
      theirs = mine if row == column else block.spread(row, z)[0]
      new.append([[number + (scale * a) * b for number, b in zip(line, mine, strict=False)]
                  for line, a in zip(product, theirs, strict=True)])
    if diagonal:
      gap = beliefs[column] * (start[z, block.here] - total * (1 / block.members))
      right = [number + a * gap for number, a in zip(right, mine, strict=True)]
    return new, right

  zeros = [[[nought + float(row == column and i == j)
             for j in range(i + 1 if row == column else wide)] for i in range(wide)]
           for row in rows]
  return lax.fori_loop(0, block.latent, add, (zeros, [nought] * wide if diagonal else []))


def _less_what_is_done(factor, here, rows, column: int, wide: int, products):
  """Takes the finished columns' part off blocks of the system."""
  if column == 0:
    return products

  def take(j, products):
    above = [factor[_entry(column * wide + i, 0) + j, here] for i in range(wide)]
    new = []
    for row, product in zip(rows, products, strict=True):
      left = above if row == column else [
        factor[_entry(row * wide + i, 0) + j, here] for i in range(wide)]
      new.append([[number - a * b for number, b in zip(line, above, strict=False)]
                  for line, a in zip(product, left, strict=True)])
    return new

  return lax.fori_loop(0, column * wide, take, products)


def _cholesky(system: list[list]) -> list[list]:
  """Lower factor of a lower triangle; on its diagonal the pivots' reciprocals."""
  factor: list[list] = []
  for i, line in enumerate(system):
    row = _forward_substitute(factor, line[:i])
    left = line[i]
    for number in row:
      left = left - number * number
    root = lax.rsqrt(left)  # to within a few units in the last place, mended by a Newton step
    factor.append([*row, root * (1.5 - 0.5 * left * (root * root))])
  return factor


def _forward_substitute(factor, right: list) -> list:
  """Solves L y = right; `factor` is a list of rows or a function of row and column."""
  at = factor if callable(factor) else lambda i, j: factor[i][j]
  solved: list = []
  for i, number in enumerate(right):
    for j, known in enumerate(solved):
      number = number - at(i, j) * known
    solved.append(number * at(i, i))
  return solved


def _back_substitute(at, right: list) -> list:
  """Solves L^T w = right."""
  solved: dict[int, Any] = {}
  for i in reversed(range(len(right))):
    number = right[i]
    for j, known in solved.items():
      number = number - at(j, i) * known
    solved[i] = number * at(i, i)
  return [solved[i] for i in range(len(right))]


def _entry(row: int, column: int) -> int:
  return row * (row + 1) // 2 + column


def _reader(factor, here):
  return lambda row, column: factor[_entry(row, column), here]


def _dot(a: list, b: list):
  first, *rest = (x * y for x, y in zip(a, b, strict=True))
  return sum(rest, first)


def _traces_body(here, means, precision, factor, out, *, ddof):
  """The epistemic trace: squares of L^-1 (A_m p_m / total), summed up."""
  block = _Block(here, means, precision, ddof)
  together = next(n for n in range(TOGETHER, 0, -1) if block.latent % n == 0)
  read = _reader(factor, here)

  def add(i, total):
    columns = []
    for z in (together * i + j for j in range(together)):
      beliefs, share = block.beliefs(z)
      columns.append([a * (beliefs[m] * share)
                      for m in range(block.modalities) for a in block.spread(m, z)[0]])
    solved: list[list] = [[] for _ in columns]
    for row in range(len(columns[0])):
      entries = [read(row, j) for j in range(row + 1)]  # once for all columns
      for column, known in zip(columns, solved, strict=True):
        number = column[row]
        for entry, other in zip(entries, known, strict=False):
          number = number - entry * other
        number = number * entries[row]
        known.append(number)
        total = total + number * number
    return total

  out[0, here] = lax.fori_loop(0, block.latent // together, add, 0 * precision[0, 0, here])


def _gradient_body(here, means, precision, mean, weights, factor, g, d_means, d_variances, *,
                   ddof):
  """dL/dc_m = s_m, dL/dd_m = -s_m r_m, dL/dA_m = s_m w_m^T - r_m v_m^T; see `xla`."""
  block = _Block(here, means, precision, ddof)
  modalities, members = block.modalities, block.members

  def add(z, right):
    beliefs, share = block.beliefs(z)
    pull = g[z, here] * share
    return [number + a * (beliefs[m] * pull)
            for m in range(modalities)
            for number, a in zip(right[block.of(m)], block.spread(m, z)[0], strict=True)]

  nought = 0 * g[0, here]
  read = _reader(factor, here)
  v = _back_substitute(read, _forward_substitute(read, lax.fori_loop(
    0, block.latent, add, [nought] * (modalities * block.contrasts))))
  w = [weights[i, here] for i in range(len(v))]
  contrasts = xla.contrasts(members, ddof)

  def mix(x, m):  # from contrasts to members
    return [_dot([float(c) for c in line[max(k - 1, 0):]], x[block.of(m)][max(k - 1, 0):])
            for k, line in enumerate(contrasts)]

  stay = [[1 / members + number for number in mix(w, m)] for m in range(modalities)]
  turn = [mix(v, m) for m in range(modalities)]

  def write(z, _):
    beliefs, share = block.beliefs(z)
    rows = [block.spread(m, z) for m in range(modalities)]
    moved = [_dot(spread, v[block.of(m)]) for m, (spread, _) in enumerate(rows)]
    step = (g[z, here] + _dot(beliefs, moved)) * share
    for m, (spread, total) in enumerate(rows):
      push = beliefs[m] * (step - moved[m])
      pull = beliefs[m] * (total * (1 / members) + _dot(spread, w[block.of(m)]) - mean[z, here])
      for k in range(members):
        d_means[m, k, z, here] = push * stay[m][k] - pull * turn[m][k]
      d_variances[m, z, here] = -push * pull * (1 / members)
    return _

  lax.fori_loop(0, block.latent, write, 0)


def _launch(body, backend: str, splats: int, heights):
  """A function that runs the body for every block of splats and returns arrays [*height n]."""
  heights = [height if isinstance(height, tuple) else (height,) for height in heights]
  out = tuple(jax.ShapeDtypeStruct((*height, splats), jnp.float32) for height in heights)
  programs = -(-splats // SPLATS)

  def run(program, *refs):
    # The last block begins early: some splats are then done twice, and the same.
    body(pl.ds(jnp.minimum(program * SPLATS, splats - SPLATS), SPLATS), *refs)

  if backend == "interpret":
    return pl.pallas_call(lambda *refs: run(pl.program_id(0), *refs), out_shape=out,
                          grid=(programs,), interpret=True)
  # Imported here: where JAX has no NVIDIA parts, all else still works.
  from jax.experimental.pallas import mosaic_gpu

  return mosaic_gpu.kernel(
    lambda *refs: run(lax.axis_index("block"), *refs), out_type=out, grid=(programs,),
    grid_names=("block",), compiler_params=mosaic_gpu.CompilerParams(
      lowering_semantics=mosaic_gpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True))
