"""The one door to the fusion.

Axes: m modalities, k members, n splats, z latent.
"""

from typing import Literal, NamedTuple

from jaxtyping import Array, Float

from kernels.fusion import reference, xla

Implementation = Literal["reference", "xla"]


class Fused(NamedTuple):
  mean: Float[Array, "n z"]
  aleatoric: Float[Array, " n"]  # trace of the fused covariance were all members agreed
  epistemic: Float[Array, " n"]  # what their disagreement adds to it


def fuse(
  means: Float[Array, "m k n z"],
  log_vars: Float[Array, "m k n z"],
  *,
  ddof: int = 1,
  implementation: Implementation | None = None,
) -> Fused:
  """Multiplies the modalities' Gaussians, each the moment-matched mixture of its members.

  With one member a modality the covariances are diagonal (method.md C.5, stage 1); with more,
  they hold the members' spread over k - ddof besides the mean of their variances (stage 2).
  All outputs are differentiable; the traces cost nothing where they are not used.

  Args:
    means: members' means.
    log_vars: log of their variances, finite; clip them before.
    ddof: 1 for the unbiased spread (the official code), 0 for the law of total variance.
    implementation: None for the best on every device; "reference" is the dense definition.

  Raises:
    ValueError: for shapes that differ or are not [m, k, n, z], or an unknown implementation.
  """
  if means.ndim != 4 or means.shape != log_vars.shape:
    raise ValueError(f"want means and log_vars of one shape [m, k, n, z], "
                     f"got {means.shape} and {log_vars.shape}")
  if means.shape[1] > 1 and not means.shape[1] > ddof >= 0:
    raise ValueError(f"ddof must be in [0, members), got {ddof} for {means.shape[1]} members")
  if implementation not in (None, "reference", "xla"):
    raise ValueError(f"unknown implementation {implementation!r}: take 'reference' or 'xla'")
  run = reference.fuse if implementation == "reference" else xla.fuse
  return Fused(*run(means, log_vars, ddof))
