"""The fusion without one latent x latent matrix: exact, cheap and accurate in float32.

Write modality m as centre c_m, noise d_m and spread A_m A_m^T, with one column of A_m for each
member but one (a Helmert contrast takes the mean out). The product of all modalities is the
minimum over x and w of  sum_m |x - c_m - A_m w_m|^2 / d_m + |w_m|^2.  Eliminating x leaves one
symmetric system in w, of m (k - 1) unknowns and with every eigenvalue >= 1 (method.md C.6 ii).

The gradient needs two more vectors a modality and the same factor:
  s_m = Sigma_m^-1 P^-1 g,  r_m = Sigma_m^-1 (c_m - x),  with v_m = A_m^T s_m, w_m = -A_m^T r_m:
  dL/dc_m = s_m,  dL/dd_m = -s_m r_m,  dL/dA_m = s_m w_m^T - r_m v_m^T.

Axes: m modalities, k members, n splats, z latent, i j contrasts (k - 1), q = m i unknowns.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_SMALL = 12  # unknowns up to which a system is inverted in one elementwise loop


def fuse(
  means: Float[Array, "m k n z"], log_vars: Float[Array, "m k n z"], ddof: int
) -> tuple[Float[Array, "n z"], Float[Array, " n"], Float[Array, " n"]]:
  """Returns mean, aleatoric and epistemic trace; see `kernels.fusion.fuse`."""
  if means.shape[1] == 1:  # no spread: all is diagonal
    return _fuse_single(means[:, 0], log_vars[:, 0])
  # The traces take their own path, so that XLA drops it where nobody looks at them.
  return _mean(means, log_vars, ddof), *traces(means, log_vars, ddof)


def split(
  answers: Sequence[Float[Array, "k a n"]], limit: float | None
) -> tuple[Float[Array, "m k n z"], Float[Array, "m k n z"]]:
  """Means and clipped log-variances, as `fuse` takes them, of what the members answered."""
  means, log_vars = jnp.split(jnp.stack(list(answers)).swapaxes(2, 3), 2, -1)
  return means, clip(log_vars, limit)


def clip(log_vars: Array, limit: float | None) -> Array:
  return log_vars if limit is None else jnp.minimum(jnp.maximum(log_vars, -limit), limit)


def _fuse_single(means, log_vars):
  """One member a modality: every latent dimension is a softmax over the modalities."""
  mean = (jax.nn.softmax(-log_vars, axis=0) * means).sum(0)
  aleatoric = jnp.exp(-jax.nn.logsumexp(-log_vars, axis=0)).sum(-1)
  return mean, aleatoric, jnp.zeros_like(aleatoric)


class _System(NamedTuple):
  """All that the two solves share."""

  centre: Float[Array, "n m z"]
  precision: Float[Array, "n m z"]  # 1 / d_m
  total: Float[Array, "n z"]  # sum of the precisions
  spread: Float[Array, "n m i z"]  # A_m
  inverse: Float[Array, "n q q"]  # of the system


def contrasts(count: int, ddof: int) -> np.ndarray:
  """Weights [k i] of orthonormal contrasts (Helmert's) over sqrt(count - ddof)."""
  weights = np.zeros((count, count - 1), np.float32)
  for k in range(1, count):
    weights[:k, k - 1] = (k * (k + 1) * (count - ddof)) ** -0.5
    weights[k, k - 1] = -k * weights[0, k - 1]
  return weights


def _contrast(means: Float[Array, "m k n z"], ddof: int):
  """Spread [n m i z] and centre [n m z] of the members, both in one pass of running sums."""
  count = means.shape[1]
  scale = contrasts(count, ddof)[0]
  running, spread = means[:, 0], []
  for k in range(1, count):
    spread.append((running - k * means[:, k]) * float(scale[k - 1]))
    running = running + means[:, k]
  return jnp.stack(spread, 1).transpose(2, 0, 1, 3), running.swapaxes(0, 1) / count


def _assemble(means, log_vars, ddof) -> _System:
  spread, centre = _contrast(means, ddof)
  splats, modalities, width, latent = spread.shape
  size = modalities * width
  # The barriers keep XLA from computing all exponentials and contrasts anew for every row that
  # they scale below.
  spread = jax.lax.optimization_barrier(spread)
  precision = jax.lax.optimization_barrier(1 / jnp.exp(log_vars).mean(1).swapaxes(0, 1))
  total = precision.sum(1)
  # Off the diagonal blocks the system is -A_m^T (p_m p_l / total) A_l; on them it is
  # 1 + A_m^T p_m (total - p_m) / total A_m. The difference is summed from the others'
  # precisions: subtracting would cancel where one modality is by far the surest.
  others = jnp.stack(
    [sum((precision[:, j] for j in range(modalities) if j != m), jnp.zeros_like(total))
     for m in range(modalities)], 1)
  share = precision / total[:, None]
  inner, share = jax.lax.optimization_barrier((share * others, share))
  gram = functools.partial(jnp.einsum, "niz,njz->nij", precision="highest")

  def flat(rows):
    return (spread * rows[:, :, None]).reshape(splats, size, latent)

  within = gram(spread.reshape(splats, size, latent), flat(inner))
  across = gram(flat(share), flat(precision))
  block = np.arange(size) // width
  same = jnp.asarray(block[:, None] == block[None])[None]
  system = jnp.where(same, within, -across) + jnp.eye(size, dtype=within.dtype)[None]
  return _System(centre, precision, total, spread, _invert(system))


def _invert(system: Float[Array, "n q q"]) -> Float[Array, "n q q"]:
  """Inverse of symmetric matrices with eigenvalues >= 1, block by block.

  LAPACK is out of the question: two of its batched factorisations at once wait for each other
  for ever on a small machine (jaxlib 0.10), and it is slower besides. Large matrices are halved
  by batched products; small ones are done with the splats last, where one elementwise loop does
  them all. The inverse is kept, not a factor: the gradient and the traces use it again.
  """
  size = system.shape[1]
  if size <= _SMALL:
    return _invert_small(system.transpose(1, 2, 0)).transpose(2, 0, 1)
  multiply = functools.partial(jnp.einsum, "nij,njk->nik", precision="highest")
  return _by_halves(system, 1, _invert, multiply)


def _invert_small(system: Float[Array, "q q n"]) -> Float[Array, "q q n"]:
  if system.shape[0] == 1:
    return 1 / system

  def multiply(a, b):
    return sum(a[:, k, None] * b[None, k] for k in range(b.shape[0]))

  return _by_halves(system, 0, _invert_small, multiply)


def _by_halves(system, rows: int, invert, multiply):
  """[[a, b], [b^T, c]] through a^-1 and (c - b^T a^-1 b)^-1; `rows` is the axis of the rows."""
  columns, half = rows + 1, system.shape[rows] // 2
  above, below = jnp.split(system, [half], rows)
  a, b = jnp.split(above, [half], columns)
  c = below[(slice(None),) * columns + (slice(half, None),)]
  inverse_a = invert(a)
  w = multiply(inverse_a, b)
  inverse_c = invert(c - multiply(b.swapaxes(rows, columns), w))
  across = multiply(w, inverse_c)
  above = jnp.concatenate(
    [inverse_a + multiply(across, w.swapaxes(rows, columns)), -across], columns)
  below = jnp.concatenate([-across.swapaxes(rows, columns), inverse_c], columns)
  return jnp.concatenate([above, below], rows)


def _unknowns(system: _System, x: Float[Array, "n m z"]) -> Float[Array, "n m i"]:
  """Solves for the member weights that pull x down: the system's right side is A_m^T p_m x_m."""
  b = (system.spread * (system.precision * x)[:, :, None]).sum(-1)
  w = jnp.einsum("nij,nj->ni", system.inverse, b.reshape(b.shape[0], -1), precision="highest")
  return w.reshape(b.shape)


def _weigh(system: _System, w: Float[Array, "n m i"]) -> Float[Array, "n m z"]:
  """A_m w_m."""
  return (system.spread * w[..., None]).sum(2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mean(means, log_vars, ddof: int):
  return _mean_forward(means, log_vars, ddof)[0]


def _mean_forward(means, log_vars, ddof):
  system = _assemble(means, log_vars, ddof)
  start = (system.precision * system.centre).sum(1) / system.total  # were all members agreed
  w = _unknowns(system, start[:, None] - system.centre)
  moved = _weigh(system, w)
  mean = start + (system.precision * moved).sum(1) / system.total
  pull = system.precision * (system.centre + moved - mean[:, None])  # r_m
  return mean, (log_vars, system, w, pull)


def _mean_backward(ddof, residuals, g):
  log_vars, system, w, pull = residuals
  count = log_vars.shape[1]
  start = g / system.total
  v = _unknowns(system, jnp.broadcast_to(start[:, None], pull.shape))
  moved = _weigh(system, v)
  step = start + (system.precision * moved).sum(1) / system.total  # P^-1 g
  push = system.precision * (step[:, None] - moved)  # s_m
  # A_m^T r_m = -w_m and A_m^T s_m = v_m hold exactly at the optimum: taking the products
  # instead would cancel where noise is small beside the spread.
  weights = jnp.asarray(contrasts(count, ddof), push.dtype)
  share = 1 / count + jnp.einsum("ki,nmi->mkn", weights, w, precision="highest")
  turn = jnp.einsum("ki,nmi->mkn", weights, v, precision="highest")
  push, pull = push.swapaxes(0, 1)[:, None], pull.swapaxes(0, 1)[:, None]  # [m 1 n z]
  d_means = share[..., None] * push - turn[..., None] * pull
  d_log_vars = -push * pull / count * jnp.exp(log_vars)
  return d_means, d_log_vars


_mean.defvjp(_mean_forward, _mean_backward)


def traces(means, log_vars, ddof):
  system = _assemble(means, log_vars, ddof)
  splats, latent = system.total.shape
  share = system.precision / system.total[:, None]
  columns = (system.spread * share[:, :, None]).reshape(splats, -1, latent)
  spun = jnp.einsum("nij,njz->niz", system.inverse, columns, precision="highest")
  return (1 / system.total).sum(-1), (columns * spun).sum((-2, -1))
