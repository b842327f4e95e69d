"""Ensembles that say how sure they are, and their fusion into one code a splat.

For each modality T small networks answer with a diagonal Gaussian over a latent motion code;
`kernels.fusion` makes one code of all (method.md C.3 steps 5, 6).

What a modality contributes the same to every splat of a frame never meets the splats: it enters
the first layer as a bias, and what only scales features scales that layer's weights (C.6 a, b).

Axes: n splats, m modalities, k members (T of them, or 1 where one is picked), h hidden,
z latent, a answers (2 z; z where nobody doubts), f features of a modality that vary over splats,
c features that do not.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels.fusion import Fused, Implementation, fuse_answers
from uajax.config import Motion as MotionConfig
from uajax.models.audio import Linear
from uajax.models.initial import within


class Modality(NamedTuple):
  """The input [constant ; varying * gain] of an ensemble, kept apart."""

  varying: Float[Array, "n f"]
  gain: Float[Array, " f"] | None = None
  constant: Float[Array, " c"] | None = None


class Layer(NamedTuple):
  """Weights and biases of one linear layer of a modality's members."""

  kernel: Float[Array, "k i o"]
  bias: Float[Array, "k o"]


class Ensemble(nn.Module):
  """One modality's members. Every parameter has leading axis T."""

  members: int
  hidden: int
  latent: int
  doubting: bool = True  # answer with log-variances, too

  @nn.compact
  def __call__(self, x: Modality, member: Int[Array, ""] | None) -> Float[Array, "k a n"]:
    """Returns means and below them log-variances (a = 2 z), splats last: as kernels.fusion reads.

    Without doubt there are means alone (a = z).
    """
    fixed = 0 if x.constant is None else x.constant.shape[0]
    first = self._layer("hidden", fixed + x.varying.shape[1], self.hidden, member)
    read = self._layer("mean", self.hidden, self.latent, member)
    if self.doubting:
      log_var = self._layer("log_var", self.hidden, self.latent, member)
      read = Layer(*(jnp.concatenate(pair, -1) for pair in zip(read, log_var, strict=True)))
    bias = first.bias
    if x.constant is not None:
      bias = bias + jnp.einsum("c,kch->kh", x.constant, first.kernel[:, :fixed])
    kernel = first.kernel[:, fixed:]
    if x.gain is not None:
      kernel = kernel * x.gain[None, :, None]
    # The hidden layers are the widest of all that a frame computes, and cheap to have again.
    ask: Callable[..., Array] = jax.checkpoint(_ask)
    return ask(x.varying, Layer(kernel, bias), read)

  def _layer(self, name: str, inputs: int, outputs: int, member) -> Layer:
    init = within(inputs**-0.5)
    kernel = self.param(f"{name}_kernel", init, (self.members, inputs, outputs))
    bias = self.param(f"{name}_bias", init, (self.members, outputs))
    if member is not None:  # what the others would say is never computed
      kernel, bias = kernel[member][None], bias[member][None]
    return Layer(kernel, bias)


def _ask(varying: Float[Array, "n f"], first: Layer, read: Layer) -> Float[Array, "k a n"]:
  """Two layers. A one among the inputs carries the biases: no pass over the answers adds them."""
  splats, features = varying.shape
  one = jnp.ones((1, splats), varying.dtype)
  keep = np.zeros((len(first.kernel), features + 1, 1), np.float32)
  keep[:, -1] = 1  # the hidden layer's last unit is one, too
  hidden = nn.relu(jnp.einsum(
    "fn,kfh->khn", jnp.concatenate([varying.T, one]),
    jnp.concatenate([_with_bias(first), keep], -1)))
  return jnp.einsum("khn,kha->kan", hidden, _with_bias(read))


def _with_bias(layer: Layer) -> Float[Array, "k i+1 o"]:
  return jnp.concatenate([layer.kernel, layer.bias[:, None]], 1)


class Ensembles(nn.Module):
  """All modalities' members."""

  config: MotionConfig

  @nn.compact
  def __call__(
    self, modalities: dict[str, Modality], members: Int[Array, " m"] | None
  ) -> list[Float[Array, "k a n"]]:
    """Returns each modality's answers."""
    take = self.config
    return [Ensemble(take.members, take.hidden, take.latent, take.uncertainty, name=name)(
              x, None if members is None else members[i])
            for i, (name, x) in enumerate(modalities.items())]


class UncertaintyFusion(nn.Module):
  """The modalities' ensembles and the fusion of their answers."""

  config: MotionConfig
  implementation: Implementation | None = None  # of `kernels.fusion`

  @nn.compact
  def __call__(
    self,
    modalities: dict[str, Modality],
    points: Float[Array, "n p"],
    members: Int[Array, " m"] | None = None,
    silent: Bool[Array, " m"] | None = None,
  ) -> tuple[Float[Array, "n g"], Fused]:
    """Returns the code that the heads read, and the fused belief.

    Without uncertainty the belief is all the modalities' answers side by side, held for certain.

    Args:
      modalities: by name; their order is the order of `members`.
      points: what is known of the positions, joined to the fused mean.
      members: one member a modality, for the warm-up (stage 1); None asks all (stage 2).
        An array, so that another choice compiles nothing.
      silent: modalities whose answers count for next to nothing: zero, at the highest variance.
    """
    take = self.config
    answers = Ensembles(take, name="ensembles")(modalities, members)
    if silent is not None:
      nothing = jnp.zeros(take.latent * (1 + take.uncertainty))
      nothing = nothing.at[take.latent:].set(take.log_var_limit)[None, :, None]
      answers = [jnp.where(still, nothing.astype(answer.dtype), answer)
                 for still, answer in zip(silent, answers, strict=True)]
    if take.uncertainty:
      fused = fuse_answers(answers, limit=take.log_var_limit, ddof=take.ddof,
                           implementation=self.implementation)
    else:
      joined = jnp.concatenate([answer.mean(0) for answer in answers]).T
      certain = jnp.zeros(joined.shape[0], joined.dtype)
      fused = Fused(joined, certain, certain)
    code = Linear(take.features, name="fuse")(jnp.concatenate([fused.mean, points], -1))
    return code, fused
