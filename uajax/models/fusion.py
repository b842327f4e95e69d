"""Ensembles that say how sure they are, and their fusion into one code a splat.

For each modality T small networks answer with a diagonal Gaussian over a latent motion code;
`kernels.fusion` makes one code of all (method.md C.3 steps 5, 6).

What a modality contributes the same to every splat of a frame never meets the splats: it enters
the first layer as a bias, and what only scales features scales that layer's weights (C.6 a, b).

Axes: n splats, m modalities, k members (T of them, or 1 where one is picked), h hidden,
z latent, f features of a modality that vary over splats, c features that do not.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.fusion import Fused, fuse
from uajax.config import Motion as MotionConfig
from uajax.models.audio import Linear
from uajax.models.initial import within


class Modality(NamedTuple):
  """The input [constant ; varying * gain] of an ensemble, kept apart."""

  varying: Float[Array, "n f"]
  gain: Float[Array, " f"] | None = None
  constant: Float[Array, " c"] | None = None


class Layers(NamedTuple):
  """Weights and biases of one linear layer of an ensemble's members."""

  kernel: Float[Array, "*m k i o"]
  bias: Float[Array, "*m k o"]


class Ensemble(nn.Module):
  """One modality's members. Every parameter has leading axis T."""

  members: int
  hidden: int
  latent: int

  @nn.compact
  def __call__(
    self, x: Modality, member: Int[Array, ""] | None
  ) -> tuple[Float[Array, "k n h"], Layers, Layers]:
    """Returns the hidden layer's output and the layers that read mean and log-variance from it."""
    fixed = 0 if x.constant is None else x.constant.shape[0]
    first = self._layers("hidden", fixed + x.varying.shape[1], self.hidden, member)
    mean = self._layers("mean", self.hidden, self.latent, member)
    log_var = self._layers("log_var", self.hidden, self.latent, member)
    bias = first.bias
    if x.constant is not None:
      bias = bias + jnp.einsum("c,kch->kh", x.constant, first.kernel[:, :fixed])
    kernel = first.kernel[:, fixed:]
    if x.gain is not None:
      kernel = kernel * x.gain[None, :, None]
    return nn.relu(jnp.einsum("nf,kfh->knh", x.varying, kernel) + bias[:, None]), mean, log_var

  def _layers(self, name: str, inputs: int, outputs: int, member) -> Layers:
    init = within(inputs**-0.5)
    kernel = self.param(f"{name}_kernel", init, (self.members, inputs, outputs))
    bias = self.param(f"{name}_bias", init, (self.members, outputs))
    if member is not None:  # what the others would say is never computed
      kernel, bias = kernel[member][None], bias[member][None]
    return Layers(kernel, bias)


class Ensembles(nn.Module):
  """All modalities' members, asked in one batched product a layer."""

  config: MotionConfig

  @nn.compact
  def __call__(
    self, modalities: dict[str, Modality], members: Int[Array, " m"] | None
  ) -> tuple[Float[Array, "m k n z"], Float[Array, "m k n z"]]:
    """Returns means and log-variances."""
    take = self.config
    answers = [
      Ensemble(take.members, take.hidden, take.latent, name=name)(
        x, None if members is None else members[i])
      for i, (name, x) in enumerate(modalities.items())
    ]
    hidden = jnp.stack([answer[0] for answer in answers])

    # Mean and log-variance in one product, splats last: so the fusion's kernels read them.
    both = [[jnp.concatenate(pair, -1) for pair in zip(mean, log_var, strict=True)]
            for _, mean, log_var in answers]
    kernel, bias = (jnp.stack(parts) for parts in zip(*both, strict=True))
    answer = jnp.einsum("mknh,mkhz->mkzn", hidden, kernel) + bias[..., None]
    means, log_vars = jnp.split(answer.swapaxes(2, 3), 2, -1)
    return means, jnp.clip(log_vars, -take.log_var_limit, take.log_var_limit)


class UncertaintyFusion(nn.Module):
  """The modalities' ensembles and the fusion of their answers."""

  config: MotionConfig

  @nn.compact
  def __call__(
    self,
    modalities: dict[str, Modality],
    points: Float[Array, "n p"],
    members: Int[Array, " m"] | None = None,
  ) -> tuple[Float[Array, "n g"], Fused]:
    """Returns the code that the heads read, and the fused belief.

    Args:
      modalities: by name; their order is the order of `members`.
      points: what is known of the positions, joined to the fused mean.
      members: one member a modality, for the warm-up (stage 1); None asks all (stage 2).
        An array, so that another choice compiles nothing.
    """
    take = self.config
    fused = fuse(*Ensembles(take, name="ensembles")(modalities, members), ddof=take.ddof)
    code = Linear(take.features, name="fuse")(jnp.concatenate([fused.mean, points], -1))
    return code, fused
