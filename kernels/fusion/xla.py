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
  return _mean(means, log_vars, ddof), *_traces(means, log_vars, ddof)


def _fuse_single(means, log_vars):
  """One member a modality: every latent dimension is a softmax over the modalities."""
  mean = (jax.nn.softmax(-log_vars, axis=0) * means).sum(0)
  aleatoric = jnp.exp(-jax.nn.logsumexp(-log_vars, axis=0)).sum(-1)
  return mean, aleatoric, jnp.zeros_like(aleatoric)


class _System(NamedTuple):
  """All that the two solves share."""

  centre: Float[Array, "m n z"]
  precision: Float[Array, "m n z"]  # 1 / d_m
  total: Float[Array, "n z"]  # sum of the precisions
  spread: Float[Array, "m i n z"]  # A_m
  coupling: Float[Array, "m i n z"]  # G: A_m / d_m
  inverse: Float[Array, "n q q"]  # of the system


def _helmert(count: int, ddof: int, dtype) -> Float[Array, "k i"]:
  """Orthonormal contrasts of `count` members over sqrt(count - ddof): spreads without centring."""
  contrasts = np.zeros((count, count - 1))
  for k in range(1, count):
    contrasts[:k, k - 1] = 1 / np.sqrt(k * (k + 1))
    contrasts[k, k - 1] = -k / np.sqrt(k * (k + 1))
  return jnp.asarray(contrasts / np.sqrt(count - ddof), dtype)


def _assemble(means, log_vars, ddof) -> _System:
  modalities, count, splats, latent = means.shape
  contrasts = _helmert(count, ddof, means.dtype)
  precision = 1 / jnp.exp(log_vars).mean(1)
  total = precision.sum(0)
  spread = jnp.einsum("mknz,ki->minz", means, contrasts, precision="highest")
  coupling = spread * precision[:, None]
  # Off the diagonal blocks the system is -A_m^T (p_m p_l / total) A_l; on them it is
  # 1 + A_m^T p_m (total - p_m) / total A_m. The difference is summed from the others'
  # precisions: subtracting would cancel where one modality is by far the surest.
  flat = coupling.reshape(-1, splats, latent)
  size = flat.shape[0]
  system = -jnp.einsum("inz,jnz->nij", flat / total[None], flat, precision="highest")
  others = jnp.stack(
    [sum(precision[j] for j in range(modalities) if j != m) for m in range(modalities)]
  ) if modalities > 1 else jnp.zeros_like(precision)
  weighted = coupling * (others / total[None])[:, None]
  blocks = jnp.einsum("minz,mjnz->mnij", spread, weighted, precision="highest")
  width = count - 1
  for m in range(modalities):
    at = slice(m * width, (m + 1) * width)
    system = system.at[:, at, at].set(blocks[m])
  system = system + jnp.eye(size, dtype=system.dtype)[None]
  return _System(precision=precision, centre=means.mean(1), total=total, spread=spread,
                 coupling=coupling, inverse=_invert(system))


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


def _unknowns(system: _System, b: Float[Array, "m i n"]) -> Float[Array, "m i n"]:
  """Solves for the member weights w."""
  rows = b.reshape(-1, b.shape[-1])
  w = jnp.einsum("nij,jn->in", system.inverse, rows, precision="highest")
  return w.reshape(b.shape)


def _weigh(columns: Float[Array, "m i n z"], w: Float[Array, "m i n"]) -> Float[Array, "m n z"]:
  return (columns * w[..., None]).sum(1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mean(means, log_vars, ddof: int):
  return _mean_forward(means, log_vars, ddof)[0]


def _mean_forward(means, log_vars, ddof):
  system = _assemble(means, log_vars, ddof)
  start = (system.precision * system.centre).sum(0) / system.total  # were all members agreed
  b = (system.coupling * (start[None] - system.centre)[:, None]).sum(-1)
  w = _unknowns(system, b)
  mean = start + _weigh(system.coupling, w).sum(0) / system.total
  return mean, (means, log_vars, system, w, mean)


def _mean_backward(ddof, residuals, g):
  means, log_vars, system, w, mean = residuals
  count = means.shape[1]
  pull = system.precision * (system.centre + _weigh(system.spread, w) - mean[None])  # r_m
  start = g / system.total
  v = _unknowns(system, (system.coupling * start[None, None]).sum(-1))
  step = start + _weigh(system.coupling, v).sum(0) / system.total  # P^-1 g
  push = system.precision * (step[None] - _weigh(system.spread, v))  # s_m
  # A_m^T r_m = -w_m and A_m^T s_m = v_m hold exactly at the optimum: taking the products
  # instead would cancel where noise is small beside the spread.
  contrasts = _helmert(count, ddof, means.dtype)
  share = 1 / count + jnp.einsum("ki,min->mkn", contrasts, w, precision="highest")
  turn = jnp.einsum("ki,min->mkn", contrasts, v, precision="highest")
  d_means = share[..., None] * push[:, None] - turn[..., None] * pull[:, None]
  d_log_vars = (-push * pull / count)[:, None] * jnp.exp(log_vars)
  return d_means, d_log_vars


_mean.defvjp(_mean_forward, _mean_backward)


def _traces(means, log_vars, ddof):
  system = _assemble(means, log_vars, ddof)
  splats, latent = system.total.shape
  columns = (system.coupling / system.total[None, None]).reshape(-1, splats, latent)
  doubt = jnp.einsum("inz,nij,jnz->n", columns, system.inverse, columns, precision="highest",
                     optimize=[(0, 1), (0, 1)])
  return (1 / system.total).sum(-1), doubt
