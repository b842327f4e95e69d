"""Kernel ridge regression from mel windows to expression, for where speech is scarce.

After a minute of speech a convolutional encoder alone does no better on speech held out than
ridge regression on the same windows. This module remembers windows of the training speech (the
centres of a Nystroem approximation) and answers by likeness to them; the weights are solved for,
not stepped towards, in seconds. The mean of the two is better than either (uajax.priors.lip).

Axes: b windows, m centres.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from uajax.types import EXPRESSION

# Of the Gaussian, against the mean square of standardised differences. Chosen on one minute of a
# real speaker, four blocks of the training frames left out in turn, all frames as centres, by the
# mean correlation of mouth and jaw. The choice was made with mel windows of another making: 0.596
# at 0.1, 0.610 at 0.3 (ridge 0.561). With the windows of `speech.features`, 0.3 gave 0.593.
SHARPNESS = 0.3
COPIES = 1  # of the training windows as other microphones would hear them, beside the clean ones
RIDGES = tuple(10.0**k for k in range(-6, 0))  # frames left out choose among these
BLOCKS = 5  # of consecutive frames, left out in turn to choose by
CHUNK = 512  # windows taken at a time


class KernelMachine(nn.Module):
  """Weighted likeness to `centres` remembered windows; what it knows comes from `solve`."""

  centres: int

  @nn.compact
  def __call__(self, mel: Float[Array, "b 80 16"]) -> Float[Array, "b 64"]:
    size = mel.shape[1] * mel.shape[2]
    zeros = nn.initializers.zeros
    known: Any = {
      "centres": self.param("centres", zeros, (self.centres, size)),
      "deviation": self.param("deviation", nn.initializers.ones, (size,)),
    }
    weights = self.param("weights", zeros, (self.centres, EXPRESSION))
    bias = self.param("bias", zeros, (EXPRESSION,))
    return likeness(known, mel) @ weights + bias[None, :]


def likeness(known, mel: Float[Array, "b 80 16"]) -> Float[Array, "b m"]:
  """exp(-SHARPNESS d^2) with d^2 the mean square of differences in units of the deviation."""
  x = mel.reshape(mel.shape[0], -1) / known["deviation"][None, :]
  c = known["centres"] / known["deviation"][None, :]
  # The squares cancel where windows are alike: TF32 would take them for strangers.
  product = jnp.matmul(x, c.T, precision=jax.lax.Precision.HIGHEST)
  square = (x**2).sum(1)[:, None] + (c**2).sum(1)[None, :] - 2 * product
  return jnp.exp(-SHARPNESS * jnp.maximum(square, 0.0) / x.shape[1])


def solve(
  windows: Callable[[np.ndarray], Float[np.ndarray, "b 80 16"]],
  target: Float[np.ndarray, "f 64"],
  frames: Int[np.ndarray, " n"],
  odds: Float[np.ndarray, " n"],
  centres: int,
  disguise: Callable[[Array, Array], Array],
  key: Array,
) -> dict[str, np.ndarray]:
  """The parameters of a `KernelMachine` that fit the target best in weighted least squares.

  How strongly the weights are held back is chosen by blocks of consecutive frames that are left
  out in turn: neighbouring frames are too much alike to judge each other.

  Args:
    windows: gives the mel windows of frames.
    target: standardised expression of every frame.
    frames: those to fit, in order; odds: the weight of each, 1 in all.
    disguise: (windows, key) -> the same speech from another microphone (`lip.augment`).
  """
  # Where there are fewer frames than centres, some stay unused: their weights are 0.
  chosen = np.unique(np.linspace(0, len(frames) - 1, centres).round().astype(int))
  some = windows(frames[chosen]).reshape(len(chosen), -1)
  known = {"centres": some, "deviation": some.std(axis=0) + 0.1}
  compare = jax.jit(lambda mel: likeness(known, mel))
  hidden = jax.jit(disguise)

  bias = odds @ target[frames]
  size = -(-len(frames) // BLOCKS)
  chunk = min(CHUNK, size)
  blocks = [np.arange(b, min(b + size, len(frames))) for b in range(0, len(frames), size)]
  normals = []
  for rows in blocks:
    lhs = np.zeros((len(chosen), len(chosen)))
    rhs = np.zeros((len(chosen), EXPRESSION))
    for begin in range(0, len(rows), chunk):
      taken = rows[begin : begin + chunk]
      filled = np.resize(taken, chunk)  # one compiled shape; what fills it has weight 0
      weight = odds[filled] * (np.arange(chunk) < len(taken)) / (1 + COPIES)
      mel = jnp.asarray(windows(frames[filled]))
      error = target[frames[filled]] - bias
      for copy in range(1 + COPIES):
        key, used = jax.random.split(key)
        like = np.asarray(compare(hidden(mel, used) if copy else mel), np.float64)
        lhs += like.T @ (weight[:, None] * like)
        rhs += like.T @ (weight[:, None] * error)
    normals.append((lhs, rhs))
  held = np.asarray(compare(jnp.asarray(some.reshape(-1, 80, 16))), np.float64)
  all_lhs, all_rhs = (np.sum([n[i] for n in normals], axis=0) for i in range(2))

  def answer(lhs, rhs, ridge):
    return np.linalg.solve(lhs + ridge * held + 1e-9 * np.eye(len(held)), rhs)

  # The squared error on a block, but for a constant, from the block's own sums.
  errors = np.zeros((len(RIDGES), EXPRESSION))
  for lhs, rhs in normals if len(normals) > 1 else []:
    for i, ridge in enumerate(RIDGES):
      w = answer(all_lhs - lhs, all_rhs - rhs, ridge)
      errors[i] += (w * (lhs @ w)).sum(axis=0) - 2 * (w * rhs).sum(axis=0)
  best = errors.argmin(axis=0)  # eyes and brows are heard less than lips: each its own
  answers = np.stack([answer(all_lhs, all_rhs, ridge) for ridge in RIDGES])
  weights = np.take_along_axis(answers, best[None, None, :], axis=0)[0]
  spare = ((0, centres - len(chosen)), (0, 0))
  return {
    "centres": np.pad(known["centres"], spare).astype(np.float32),
    "deviation": known["deviation"].astype(np.float32),
    "weights": np.pad(weights, spare).astype(np.float32),
    "bias": np.asarray(bias, np.float32),
  }
