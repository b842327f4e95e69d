"""How much of what is heard lies beyond what was heard in training.

An ensemble cannot tell: where speech is drowned in noise the audio code leaves the place where
its members were taught, and there they may agree by chance. How far it left is a Mahalanobis
distance from the training frames' codes, a measure of unknown inputs by itself (Lee et al. 2018),
taken here as metrology takes an excess of chi-square: the variances that were stated hold for
what they were stated on, and grow by the ratio where the data lie further out (Birge 1932, the
scale factor of the Particle Data Group). Nothing is assumed about what the disturbance is.

Axes: f frames, c code.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

KNOWN = 0.95  # share of the training frames within which nothing counts as strange
MOST = 1e4  # of the factor, so that no sound drives it out of range
_FLOOR = 0.03  # of the mean variance of a direction, added to each: what hardly varies says little
_ROUNDING = 1e-10  # of the codes' power: variance below it is none


class Familiar(nn.Module):
  """The factor on variances, 1 where the code is as in training; nothing is strange unlearnt.

  Its parameters come from `learn`, not from gradients.
  """

  @nn.compact
  def __call__(self, code: Float[Array, " c"]) -> Float[Array, ""]:
    size = code.shape[0]
    mean = self.param("mean", nn.initializers.zeros, (size,))
    whiten = self.param("whiten", nn.initializers.zeros, (size, size))
    distance = jnp.square(_turn(code - mean, whiten)).sum()
    return jax.lax.stop_gradient(jnp.clip(distance, 1, MOST))


def learn(codes: Float[Array, "f c"]) -> dict[str, Array]:
  """The parameters of `Familiar` for codes of training frames; nothing is strange if all agree."""
  mean = codes.mean(0)
  off = codes - mean[None]
  values, vectors = jnp.linalg.eigh(_turn(off.T, off) / len(codes))
  values = jnp.maximum(values, 0)
  differ = values.mean() > _ROUNDING * jnp.square(codes).mean()
  whiten = vectors / jnp.sqrt(jnp.where(differ, values + _FLOOR * values.mean(), 1))[None]
  # Where nearly all frames are one, silence, say, the rest of them is no stranger than it varies.
  edge = jnp.maximum(jnp.quantile(jnp.square(_turn(off, whiten)).sum(1), KNOWN), 1)
  return {"mean": mean, "whiten": jnp.where(differ, whiten / jnp.sqrt(edge), 0)}


def _turn(x: Float[Array, "*f c"], by: Float[Array, "c d"]) -> Float[Array, "*f d"]:
  """Their product, in full: TF32 would take the large directions' rounding for small ones."""
  return jnp.matmul(x, by, precision=jax.lax.Precision.HIGHEST)
