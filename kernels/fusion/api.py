"""The one door to the fusion.

Axes: m modalities, k members, n splats, z latent, a answers of a member (2 z).
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import trial
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
  modalities, members, splats, _ = means.shape
  implementation = _settle(implementation, (means, log_vars), modalities, members, splats, ddof)
  if implementation == "pallas":
    answers = jnp.concatenate([means, log_vars], -1).swapaxes(2, 3)
    return Fused(*pallas.fuse(list(answers), ddof, None, _backend()))
  run = reference.fuse if implementation == "reference" else xla.fuse
  return Fused(*run(means, log_vars, ddof))


def fuse_answers(
  answers: Sequence[Float[Array, "k a n"]],
  *,
  limit: float | None = None,
  ddof: int = 1,
  implementation: Implementation | None = None,
) -> Fused:
  """`fuse` for networks: nothing is copied between what they answer and the kernels.

  Args:
    answers: one array a modality, splats last: every member's means [k z n] and below them its
      log-variances. Where the kernels differentiate, the gradients take the answers' memory.
    limit: log-variances are clipped to +-limit.
    ddof, implementation: as of `fuse`.

  Raises:
    ValueError: as `fuse`; for answers of different shapes, or of an odd number of rows.
  """
  answers = [jnp.asarray(x) for x in answers]
  shapes = {x.shape for x in answers}
  if len(shapes) != 1 or answers[0].ndim != 3 or answers[0].shape[1] % 2:
    raise ValueError(f"want answers of one shape [k, 2 z, n], got {[x.shape for x in answers]}")
  members, _, splats = answers[0].shape
  implementation = _settle(implementation, answers, len(answers), members, splats, ddof)
  if implementation == "pallas":
    return Fused(*pallas.fuse(answers, ddof, limit, _backend()))
  run = reference.fuse if implementation == "reference" else xla.fuse
  return Fused(*run(*xla.split(answers, limit), ddof))


def _settle(implementation, arrays, modalities: int, members: int, splats: int, ddof: int
            ) -> Implementation:
  """Which implementation is to fuse these arrays."""
  if members > 1 and not members > ddof >= 0:
    raise ValueError(f"ddof must be in [0, members), got {ddof} for {members} members")
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(f"{implementation=} is none of {IMPLEMENTATIONS}")
  held = pallas.fits(members, modalities) and all(x.dtype == jnp.float32 for x in arrays)
  if implementation == "pallas" and not held:
    raise ValueError(f"the Pallas kernels hold 2 to {pallas.MOST_MEMBERS} members and "
                     f"{pallas.MOST_UNKNOWNS} unknowns in float32, not {modalities} modalities "
                     f"of {members} members in {arrays[0].dtype}: take implementation='xla'")
  if implementation == "pallas" and varies(*arrays):
    raise ValueError(UNCHECKED)
  if implementation is None:
    implementation = choose()[0] if held and splats else "xla"
    if implementation == "pallas" and varies(*arrays):
      warnings.warn(f"kernels.fusion: {UNCHECKED}, so plain XLA fuses instead", RuntimeWarning,
                    stacklevel=3)
      implementation = "xla"
  return implementation


def _backend() -> str:
  return "mosaic" if jax.default_backend() == "gpu" else "interpret"


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
  def both(*answers):
    out, vjp = jax.vjp(lambda *x: pallas.fuse(x, 1, 10.0)[0], *answers)
    return pallas.fuse(answers, 1, 10.0), vjp(out)

  shape = jax.ShapeDtypeStruct((2, 8, pallas.SPLATS), jnp.float32)
  return trial.problem(both, shape, shape)
