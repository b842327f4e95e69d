"""The one door to the fusion.

Axes: m modalities, k members, n splats, z latent.
"""

import functools
import warnings
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.fusion import pallas, reference, xla
from kernels.varying import UNCHECKED, varies

Implementation = Literal["reference", "xla", "pallas"]
IMPLEMENTATIONS = ("reference", "xla", "pallas")


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

  In float32 the mean is good to 1e-5 however small the variances are beside the spread, as long
  as there are more latents than unknowns, modalities times (members - 1). With fewer, an answer
  whose variances fall below 1e-5 of the squared spread loses its digits: 2e-5 is left at a
  ratio of 400, nothing at 160 000; the reference in float64 tells.

  Args:
    means: members' means.
    log_vars: log of their variances, finite; clip them before.
    ddof: 1 for the unbiased spread (the official code), 0 for the law of total variance.
    implementation: "reference" is the dense definition, in float64 if asked. "xla": plain JAX, on
      any device. "pallas": kernels for NVIDIA GPUs, Hopper and later; on a CPU they are
      interpreted, for tests. They hold 2 to 11 members and 48 unknowns (modalities times members
      but one), reckon in float32, and need `shard_map` to be given check_vma=False. None: what
      `choose` says, and plain XLA for what the kernels do not hold.

  Raises:
    ValueError: for shapes that differ or are not [m, k, n, z], an unknown implementation, or one
      that cannot do what is asked.
  """
  if means.ndim != 4 or means.shape != log_vars.shape:
    raise ValueError(f"want means and log_vars of one shape [m, k, n, z], "
                     f"got {means.shape} and {log_vars.shape}")
  if means.shape[1] > 1 and not means.shape[1] > ddof >= 0:
    raise ValueError(f"ddof must be in [0, members), got {ddof} for {means.shape[1]} members")
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(f"{implementation=} is none of {IMPLEMENTATIONS}")
  modalities, members, splats, _ = means.shape
  held = pallas.fits(members, modalities) and means.dtype == log_vars.dtype == jnp.float32
  if implementation == "pallas" and not held:
    raise ValueError(f"the Pallas kernels hold 2 to {pallas.MOST_MEMBERS} members and "
                     f"{pallas.MOST_UNKNOWNS} unknowns in float32, not {means.dtype} "
                     f"{means.shape}: take implementation='xla'")
  if implementation == "pallas" and varies(means, log_vars):
    raise ValueError(UNCHECKED)
  if implementation is None:
    implementation = choose()[0] if held and splats else "xla"
    if implementation == "pallas" and varies(means, log_vars):
      warnings.warn(f"kernels.fusion: {UNCHECKED}, so plain XLA fuses instead", RuntimeWarning,
                    stacklevel=2)
      implementation = "xla"
  if implementation == "pallas":
    backend = "mosaic" if jax.default_backend() == "gpu" else "interpret"
    return Fused(*pallas.fuse(means, log_vars, ddof, backend))
  run = reference.fuse if implementation == "reference" else xla.fuse
  return Fused(*run(means, log_vars, ddof))


def choose() -> tuple[Implementation, str]:
  """The implementation that fuses ensembles where `fuse` is given none, and why."""
  return _choose(jax.default_backend())


@functools.cache
def _choose(platform: str) -> tuple[Implementation, str]:
  if platform != "gpu":
    return "xla", f"the default on {platform}"
  problem = _trial()
  if problem is None:
    return "pallas", f"compiled and chosen on {platform}"
  warnings.warn("kernels.fusion: the Pallas kernels do not compile here, so plain XLA fuses "
                f"instead ({problem})", RuntimeWarning, stacklevel=3)
  return "xla", f"the Pallas kernels do not compile here: {problem}"


def _trial() -> str | None:
  """Compiles the kernels, small; returns what went wrong or None."""
  def both(means, log_vars):
    out, vjp = jax.vjp(lambda m, s: pallas.fuse(m, s, 1)[0], means, log_vars)
    return pallas.fuse(means, log_vars, 1), vjp(out)

  shape = jax.ShapeDtypeStruct((2, 2, pallas.SPLATS, 4), jnp.float32)
  try:
    jax.jit(both).lower(shape, shape).compile()
  except Exception as error:  # whatever the compiler's trouble is, plain XLA fuses the same
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
  return None
