"""Ensembles that say how sure they are, and their fusion into one code a splat.

For each modality T small networks answer with a diagonal Gaussian over a latent motion code;
`kernels.fusion` makes one code of all (method.md C.3 steps 5, 6).

What a modality contributes the same to every splat of a frame never meets the splats: it enters
the first layer as a bias, and what only scales features scales that layer's weights (C.6 a, b).

Axes: n splats, m modalities, k members (T of them, or 1 where one is picked), h hidden,
z latent, f features of a modality that vary over splats, c features that do not.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
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
  """Weights and biases of one linear layer of a modality's members."""

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
  ) -> tuple[Layers, Layers, Layers]:
    """Returns the hidden layer of what varies, and those that read mean and log-variance."""
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
    return Layers(kernel, bias), mean, log_var

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
    first, mean, log_var = zip(*(
      Ensemble(take.members, take.hidden, take.latent, name=name)(
        x, None if members is None else members[i])
      for i, (name, x) in enumerate(modalities.items())), strict=True)
    # The hidden layers are the widest of all that a frame computes, and cheap to have again.
    ask: Callable[..., tuple[Array, Array]] = jax.checkpoint(_ask)
    means, log_vars = ask([x.varying for x in modalities.values()], first, mean, log_var)
    limited: Any = _limit(log_vars, take.log_var_limit)
    return means.swapaxes(2, 3), limited.swapaxes(2, 3)


def _ask(
  varying: list[Float[Array, "n _"]],
  first: Sequence[Layers],
  mean: Sequence[Layers],
  log_var: Sequence[Layers],
) -> tuple[Float[Array, "m k z n"], Float[Array, "m k z n"]]:
  """Means and log-variances, splats last: so the fusion's kernels read them."""
  hidden = jnp.stack([
    nn.relu(jnp.einsum("nf,kfh->knh", x, layer.kernel) + layer.bias[:, None])
    for x, layer in zip(varying, first, strict=True)])

  def read(layers: Sequence[Layers]):
    kernel = jnp.stack([layer.kernel for layer in layers])
    bias = jnp.stack([layer.bias for layer in layers])
    return jnp.einsum("mknh,mkhz->mkzn", hidden, kernel) + bias[..., None]

  return read(mean), read(log_var)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _limit(x: Array, bound: float) -> Array:
  """Clips to +-bound. Backward looks at what came out, which is kept anyway, not at x."""
  return jnp.clip(x, -bound, bound)


def _limit_forward(x, bound):
  out = _limit(x, bound)
  return out, out


def _limit_backward(bound, out, g):
  return (jnp.where(jnp.abs(out) < bound, g, 0),)


_limit.defvjp(_limit_forward, _limit_backward)


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
