"""The meaning of the fusion, dense and obvious: the oracle of every other implementation.

Each modality is an ensemble of diagonal Gaussians. It becomes one Gaussian that holds the
noise its members report and their disagreement; the modalities are then multiplied, so that
each counts as it is certain (method.md C.5).

In float32 the inverses lose all accuracy once disagreement is far above noise (Q2): call it
with float64 to judge others.

Axes: m modalities, k members, n splats, z latent.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def fuse(
  means: Float[Array, "m k n z"], log_vars: Float[Array, "m k n z"], ddof: int
) -> tuple[Float[Array, "n z"], Float[Array, " n"], Float[Array, " n"]]:
  """Returns mean, aleatoric and epistemic trace; see `kernels.fusion.fuse`."""
  count, latent = means.shape[1], means.shape[3]
  centre = means.mean(1)
  noise = jnp.exp(log_vars).mean(1)
  cov = noise[..., None] * jnp.eye(latent, dtype=means.dtype)[None, None]
  if count > 1:
    off = means - centre[:, None]
    cov = cov + jnp.einsum("mkni,mknj->mnij", off, off) / (count - ddof)
  precision = jnp.linalg.inv(cov)
  fused_cov = jnp.linalg.inv(precision.sum(0))
  mean = jnp.einsum("nij,mnjk,mnk->ni", fused_cov, precision, centre)
  aleatoric = (1 / (1 / noise).sum(0)).sum(-1)
  return mean, aleatoric, jnp.trace(fused_cov, axis1=-2, axis2=-1) - aleatoric
