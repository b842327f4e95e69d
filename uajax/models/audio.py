"""What a frame's neighbouring audio windows become: one short code (method.md C.2).

Axes: b neighbouring windows (8), d audio channels, w steps of a window, c code.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from uajax.models.initial import uniform, within

_SLOPE = 0.02


class Linear(nn.Module):
  """A dense layer whose weights and biases start within +-1 / sqrt(inputs), as torch's do."""

  features: int
  use_bias: bool = True
  still: bool = False  # start at zero
  positive: bool = False  # start with no weight below zero

  @nn.compact
  def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
    inputs = x.shape[-1]
    limit = 0.0 if self.still else inputs**-0.5
    draw = uniform(0, limit) if self.positive else within(limit)
    y = x @ self.param("kernel", draw, (inputs, self.features))
    if not self.use_bias:
      return y
    bias = self.param("bias", within(limit), (self.features,))
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class Convolution(nn.Module):
  """Three taps along the steps, zeros beyond the ends, as one product.

  A GPU's convolutions are made for larger arrays: each of these waited longer than it worked.
  """

  features: int
  stride: int

  @nn.compact
  def __call__(self, x: Float[Array, "b w i"]) -> Float[Array, "b v o"]:
    inputs = x.shape[-1]
    draw = within((3 * inputs) ** -0.5)
    kernel = self.param("kernel", draw, (3, inputs, self.features))
    bias = self.param("bias", draw, (self.features,))
    ends = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    reach = x.shape[1]  # of each tap, in steps
    taps = [ends[:, tap:tap + reach:self.stride] for tap in range(3)]
    return jnp.concatenate(taps, -1) @ kernel.reshape(3 * inputs, -1) + bias[None, None]


def _convolve(x: Float[Array, "b w d"], width: int, stride: int, name: str):
  return nn.leaky_relu(Convolution(width, stride, name=name)(x), _SLOPE)


class AudioNet(nn.Module):
  """Encodes each window: four convolutions that halve its steps, then two dense layers."""

  code: int = 32
  widths: Sequence[int] = (32, 32, 64, 64)

  @nn.compact
  def __call__(self, windows: Float[Array, "b d w"]) -> Float[Array, "b c"]:
    x = windows.swapaxes(1, 2)
    for i, width in enumerate(self.widths):
      x = _convolve(x, width, 2, f"conv_{i}")
    # Windows of up to 16 steps end as one step; longer ones are flattened, step by step.
    x = x.reshape(x.shape[0], -1)
    x = nn.leaky_relu(Linear(self.widths[-1], name="hidden")(x), _SLOPE)
    return Linear(self.code, name="code")(x)


class AudioAttention(nn.Module):
  """Weighs the neighbouring windows' codes into one."""

  widths: Sequence[int] = (16, 8, 4, 2, 1)

  @nn.compact
  def __call__(self, codes: Float[Array, "b c"]) -> Float[Array, " c"]:
    x = codes
    for i, width in enumerate(self.widths):
      x = _convolve(x[None], width, 1, f"conv_{i}")[0]
    weights = nn.softmax(Linear(codes.shape[0], name="weights")(x[:, 0]))
    return weights @ codes
