"""A bidirectional LSTM that reads sequences of any length, padded ones included.

Axes: b batch, t steps, d features, u hidden units, k = 4 u gates in torch's order (input, forget,
cell, output), z the two directions.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


class BiLSTM(nn.Module):
  """Layers of forward and backward LSTMs; each layer reads both directions of the one below."""

  hidden: int
  layers: int = 2
  dropout: float = 0.0  # between layers

  @nn.compact
  def __call__(
    self,
    x: Float[Array | np.ndarray, "b t d"],
    valid: Bool[Array, "b t"] | None = None,
    *,
    train: bool = False,
  ) -> Float[Array, "b t 2u"]:
    """Where `valid` is False the state stands still, so padding changes nothing before or after."""
    x = jnp.asarray(x)
    if valid is None:
      valid = jnp.ones(x.shape[:2], bool)
    for layer in range(self.layers):
      if layer and self.dropout:
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
      bound = 1.0 / np.sqrt(self.hidden)
      gates = 4 * self.hidden
      init = _uniform(float(bound))
      w_in = self.param(f"in_{layer}", init, (2, x.shape[-1], gates))
      w_state = self.param(f"state_{layer}", init, (2, self.hidden, gates))
      bias = self.param(f"bias_{layer}", init, (2, gates))
      x = _scan_both(x, valid, w_in, w_state, bias)
    return x


def _uniform(bound: float):
  return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _scan_both(x, valid, w_in, w_state, bias):
  both = jnp.stack([x, x[:, ::-1]])  # z b t d: one scan runs the two directions side by side
  drive = jnp.einsum("zbtd,zdk->tzbk", both, w_in) + bias[None, :, None, :]
  live = jnp.stack([valid, valid[:, ::-1]]).transpose(2, 0, 1)[..., None]

  def step(carry, at):
    state, cell = carry
    drive_t, live_t = at
    gates = drive_t + jnp.einsum("zbu,zuk->zbk", state, w_state)
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    new_cell = nn.sigmoid(f) * cell + nn.sigmoid(i) * jnp.tanh(g)
    new_state = nn.sigmoid(o) * jnp.tanh(new_cell)
    carry = jnp.where(live_t, new_state, state), jnp.where(live_t, new_cell, cell)
    return carry, carry[0]

  zeros = jnp.zeros((2, x.shape[0], w_state.shape[1]), drive.dtype)
  _, states = jax.lax.scan(step, (zeros, zeros), (drive, live))
  states = states.transpose(1, 2, 0, 3)  # z b t u
  return jnp.concatenate([states[0], states[1][:, ::-1]], axis=-1)


def from_torch(tensors: Mapping[str, np.ndarray], layers: int) -> dict:
  """Parameters of `BiLSTM` from a torch LSTM's state (`weight_ih_l0`, `weight_hh_l0_reverse` ..).

  Torch's two biases only ever act as their sum.
  """
  params = {}
  for layer in range(layers):
    ends = (f"_l{layer}", f"_l{layer}_reverse")
    params[f"in_{layer}"] = np.stack([tensors["weight_ih" + e].T for e in ends])
    params[f"state_{layer}"] = np.stack([tensors["weight_hh" + e].T for e in ends])
    params[f"bias_{layer}"] = np.stack(
      [tensors["bias_ih" + e] + tensors["bias_hh" + e] for e in ends]
    )
  return params
