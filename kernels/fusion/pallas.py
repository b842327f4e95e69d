"""The fusion as Pallas kernels for NVIDIA GPUs: a thread a splat, its system in registers.

The algebra is that of `kernels.fusion.xla`. What a block of splats goes through from the members'
answers to the fused mean stays on chip, but for the Cholesky factor of its systems, which is left
to the backward kernel and the traces. The factor is made block by block, a block being a pair of
modalities: the block's products run over the latents, and the members' contrasts are formed anew
wherever they are wanted, for arithmetic costs less than memory.

Splats come last in every array, so that threads read neighbours. A modality's answers are one
array, and the backward kernel writes their gradients over them: they are the largest of all that
a training step holds.

Axes: m modalities, k members, z latent, a answers (2 z: means, then log-variances), n splats,
b contrasts of a modality (k - 1), q = m b unknowns, e entries of a lower triangle (q (q + 1) / 2,
by rows; on the diagonal stand the pivots' reciprocals).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels import steady
from kernels.fusion import xla

SPLATS = 128  # of a program: a splat for each thread of a warpgroup
MOST_MEMBERS = 11  # whose block of products fits the registers
MOST_UNKNOWNS = 48  # that do so at once
TOGETHER = 4  # latents that the traces solve for at once


def fits(members: int, modalities: int) -> bool:
  """Whether the kernels hold that many."""
  return 1 < members <= MOST_MEMBERS and modalities * (members - 1) <= MOST_UNKNOWNS


def fuse(
  answers: Sequence[Float[Array, "k a n"]], ddof: int, limit: float | None,
  backend: str = "mosaic",
) -> tuple[Float[Array, "n z"], Float[Array, " n"], Float[Array, " n"]]:
  """Returns mean, aleatoric and epistemic trace; see `kernels.fusion.fuse_answers`.

  Args:
    backend: "mosaic" (NVIDIA, Hopper and later) or for tests on any device "interpret".
  """
  splats = answers[0].shape[2]
  short = -splats % SPLATS  # a program wants a full block
  fused: Any = _fuse(
    tuple(jnp.pad(x, ((0, 0), (0, 0), (0, short))) if short else x for x in answers),
    ddof, limit, backend)
  mean, aleatoric, epistemic = fused
  return mean.T[:splats], aleatoric[:splats], epistemic[:splats]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _fuse(answers, ddof, limit, backend):
  return _forward(answers, ddof, limit, backend)[0]


def _forward(answers, ddof, limit, backend):
  modalities, (members, width, splats) = len(answers), answers[0].shape
  latent, unknowns = width // 2, modalities * (members - 1)
  precision = jnp.stack(
    [1 / jnp.exp(xla.clip(x[:, latent:], limit)).mean(0) for x in answers])
  total = precision.sum(0)
  centres = jnp.stack([x[:, :latent].mean(0) for x in answers])
  start = (precision * centres).sum(0) / total  # were all members agreed
  mean, weights, factor = _launch(
    functools.partial(_solve_body, ddof=ddof), backend, splats,
    (latent, unknowns, unknowns * (unknowns + 1) // 2))(answers, precision, start)
  disagreement, = _launch(functools.partial(_traces_body, ddof=ddof), backend, splats, (1,))(
    answers, precision, factor)
  out = mean, (1 / total).sum(0), disagreement[0]
  return out, (answers, precision, mean, weights, factor)


def _forward_symbolic(answers, ddof, limit, backend):
  return _forward(tuple(x.value for x in answers), ddof, limit, backend)


def _backward(ddof, limit, backend, residuals, cotangents):
  answers, precision, mean, weights, factor = residuals
  g, *traces = cotangents
  grads = ()
  if not all(isinstance(trace, SymbolicZero) for trace in traces):
    # Nobody trains on them in earnest: plain XLA will do.
    def plain(*answers):
      return xla.traces(*xla.split(answers, limit), ddof)

    zero = jnp.zeros(mean.shape[1], mean.dtype)
    traces = tuple(zero if isinstance(trace, SymbolicZero) else trace for trace in traces)
    grads = jax.vjp(plain, *answers)[1](traces)
  if not isinstance(g, SymbolicZero):
    own = _rewrite(functools.partial(_gradient_body, ddof=ddof, limit=limit), backend)(
      answers, precision, mean, weights, factor, g)
    grads = tuple(a + b for a, b in zip(grads, own, strict=True)) if grads else own
  return grads or tuple(jnp.zeros_like(x) for x in answers),


_fuse.defvjp(_forward_symbolic, _backward, symbolic_zeros=True)


class _Block:
  """A program's splats: what it reads of them at a latent, one number a thread."""

  def __init__(self, here, answers, precision, ddof: int):
    self.here, self._answers, self._precision = here, answers, precision
    self.modalities, self.members = len(answers), answers[0].shape[0]
    self.latent = answers[0].shape[1] // 2
    self._scale = xla.contrasts(self.members, ddof)[0]  # of the first member, in each contrast
    self.contrasts = self.members - 1

  def beliefs(self, z) -> tuple[list, Any]:
    """Each modality's precision, and the reciprocal of their sum."""
    precision = [self._precision[m, z, self.here] for m in range(self.modalities)]
    return precision, 1 / sum(precision[1:], precision[0])

  def spread(self, m: int, z) -> tuple[list, Any]:
    """Contrasts of a modality's members, and their sum."""
    running, rows = self._answers[m][0, z, self.here], []
    for k in range(1, self.members):
      mean = self._answers[m][k, z, self.here]
      rows.append((running - float(k) * mean) * float(self._scale[k - 1]))
      running = running + mean
    return rows, running

  def pull(self, m: int, z, weights: list):
    """A_m w_m."""
    return _dot(self.spread(m, z)[0], weights[self.of(m)])

  def of(self, m: int) -> slice:
    """A modality's unknowns."""
    return slice(m * self.contrasts, (m + 1) * self.contrasts)


def _solve_body(here, answers, precision, start, mean_out, weights_out, factor, *, ddof):
  block = _Block(here, answers, precision, ddof)
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


def _traces_body(here, answers, precision, factor, out, *, ddof):
  """The epistemic trace: squares of L^-1 (A_m p_m / total), summed up."""
  block = _Block(here, answers, precision, ddof)
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


def _gradient_body(here, answers, precision, mean, weights, factor, g, out, *, ddof, limit):
  """dL/dc_m = s_m, dL/dd_m = -s_m r_m, dL/dA_m = s_m w_m^T - r_m v_m^T; see `xla`.

  `out` may be `answers`: what stands at a latent is read before it is written.
  """
  block = _Block(here, answers, precision, ddof)
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
      d_variance = -push * pull * (1 / members)
      for k in range(members):
        out[m][k, z, here] = push * stay[m][k] - pull * turn[m][k]
        log_var = answers[m][k, block.latent + z, here]
        clipped = xla.clip(log_var, limit)
        slope = d_variance * jnp.exp(clipped)
        out[m][k, block.latent + z, here] = jnp.where(clipped == log_var, slope, 0.0)
    return _

  lax.fori_loop(0, block.latent, write, 0)


def _launch(body, backend: str, splats: int, heights):
  """A function of answers and more that runs the body for all splats, into arrays [height n]."""
  out = tuple(jax.ShapeDtypeStruct((height, splats), jnp.float32) for height in heights)

  def run(answers, *rest):
    count = len(answers)
    return _kernel(lambda here, *refs: body(here, refs[:count], *refs[count:]), backend, splats,
                   out)(*answers, *rest)

  return run


def _rewrite(body, backend: str):
  """A function of answers and more whose body's results take the answers' place in memory."""
  def run(answers, *rest):
    count, splats = len(answers), answers[0].shape[2]
    if backend == "mosaic" and jax.__version_info__ >= (0, 11):
      places = [jax.new_ref(x) for x in answers]
      _kernel(lambda here, *refs: body(here, refs[:count], *refs[count:], refs[:count]), backend,
              splats, ())(*places, *rest)
      return tuple(jax.freeze(place) for place in places)
    # Kernels of 0.10 take no references under their rule for `vmap`, nor does the interpreter.
    out = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in answers)
    return tuple(_kernel(
      lambda here, *refs: body(here, refs[:count], *refs[count:-count], refs[-count:]), backend,
      splats, out)(*answers, *rest))

  return run


def _kernel(body, backend: str, splats: int, out):
  """Runs the body once for every block of splats."""
  programs = splats // SPLATS

  def run(program, *refs):
    body(pl.ds(program * SPLATS, SPLATS), *refs)

  if backend == "interpret":
    return pl.pallas_call(lambda *refs: run(pl.program_id(0), *refs), out_shape=out,
                          grid=(programs,), interpret=True)
  # Imported here: where JAX has no NVIDIA parts, all else still works.
  from jax.experimental.pallas import mosaic_gpu

  steady.keep_names()
  return mosaic_gpu.kernel(
    lambda *refs: run(lax.axis_index("block"), *refs), out_type=out, grid=(programs,),
    grid_names=("block",), compiler_params=mosaic_gpu.CompilerParams(
      lowering_semantics=mosaic_gpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True))
