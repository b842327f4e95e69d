"""wav2vec2 (the base layout: group norm in front, layer norms behind the residuals).

Reads Hugging Face weights (`config.json` + `model.safetensors`, for instance
facebook/wav2vec2-base-960h) and computes what the original computes in evaluation mode.

Axes: b batch, s samples at 16 kHz (each window of mean 0 and variance 1), t steps of 20 ms,
c convolution channels, d hidden units.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uajax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Wav2Vec2Config:
  """Sizes; the defaults are wav2vec2-base."""

  conv_channels: int = 512
  conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
  conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
  hidden: int = 768
  layers: int = 12
  heads: int = 12
  feed_forward: int = 3072
  position_kernel: int = 128
  position_groups: int = 16
  epsilon: float = 1e-5
  dropout: float = 0.1  # in training only

  def steps(self, samples: int) -> int:
    """Output steps of that many samples: 48 000 -> 149."""
    for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
      samples = (samples - kernel) // stride + 1
    return samples


class Wav2Vec2(nn.Module):
  config: Wav2Vec2Config = Wav2Vec2Config()

  @nn.compact
  def __call__(
    self, wav: Float[Array | np.ndarray, "b s"], *, train: bool = False
  ) -> tuple[Float[Array, "b t d"], Float[Array, "b t c"]]:
    """The last hidden states, and the normalised features of the convolutions."""
    c = self.config
    drop = nn.Dropout(c.dropout, deterministic=not train)
    x = wav[..., None]
    for i, (kernel, stride) in enumerate(zip(c.conv_kernels, c.conv_strides, strict=True)):
      x = nn.Conv(
        c.conv_channels, (kernel,), (stride,), padding="VALID", use_bias=False, name=f"conv_{i}"
      )(x)
      if i == 0:  # over time, each channel by itself
        x = nn.GroupNorm(
          num_groups=c.conv_channels, epsilon=1e-5, use_fast_variance=False, name="conv_norm"
        )(x)
      x = nn.gelu(x, approximate=False)
    heard = self.norm("features_norm")(x)
    x = drop(nn.Dense(c.hidden, name="project")(heard))
    half = c.position_kernel // 2
    position = nn.Conv(
      c.hidden,
      (c.position_kernel,),
      padding=((half, half),),
      feature_group_count=c.position_groups,
      name="position",
    )(x)[:, : x.shape[1]]  # an even kernel gives one step too many
    x = drop(self.norm("norm")(x + nn.gelu(position, approximate=False)))
    for i in range(c.layers):
      x = self.norm(f"attend_norm_{i}")(x + drop(self.attend(x, i)))
      inner = nn.gelu(nn.Dense(c.feed_forward, name=f"widen_{i}")(x), approximate=False)
      inner = nn.Dense(c.hidden, name=f"narrow_{i}")(drop(inner))
      x = self.norm(f"feed_norm_{i}")(x + drop(inner))
    return x, heard

  def norm(self, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=self.config.epsilon, use_fast_variance=False, name=name)

  def attend(self, x: Float[Array, "b t d"], i: int) -> Float[Array, "b t d"]:
    c = self.config
    split = (*x.shape[:2], c.heads, c.hidden // c.heads)
    q, k, v = (nn.Dense(c.hidden, name=f"{n}_{i}")(x).reshape(split) for n in "qkv")
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(split[-1])
    mixed = jnp.einsum("bhij,bjhd->bihd", nn.softmax(scores), v)
    return nn.Dense(c.hidden, name=f"out_{i}")(mixed.reshape(x.shape))


def load(folder: str | pathlib.Path) -> tuple[Wav2Vec2Config, dict]:
  """Settings and parameters from a folder with `config.json` and `model.safetensors`.

  Raises:
    UserError: a file is missing or damaged, or the model is of another layout.
  """
  folder = pathlib.Path(folder)
  config = read_config(folder / "config.json")
  return config, from_huggingface(_read_tensors(folder / "model.safetensors"), config)


def read_config(path: str | pathlib.Path) -> Wav2Vec2Config:
  """Settings from a Hugging Face `config.json`."""
  try:
    raw = json.loads(pathlib.Path(path).read_text())
    channels = raw["conv_dim"]
    known = (
      raw["model_type"] == "wav2vec2"
      and raw["feat_extract_norm"] == "group"
      and not raw["do_stable_layer_norm"]
      and not raw["conv_bias"]
      and len(set(channels)) == 1
    )
    config = Wav2Vec2Config(
      conv_channels=int(channels[0]),
      conv_kernels=tuple(map(int, raw["conv_kernel"])),
      conv_strides=tuple(map(int, raw["conv_stride"])),
      hidden=int(raw["hidden_size"]),
      layers=int(raw["num_hidden_layers"]),
      heads=int(raw["num_attention_heads"]),
      feed_forward=int(raw["intermediate_size"]),
      position_kernel=int(raw["num_conv_pos_embeddings"]),
      position_groups=int(raw["num_conv_pos_embedding_groups"]),
      epsilon=float(raw["layer_norm_eps"]),
    )
  except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
    raise UserError(
      f"{path} is no wav2vec2 config ({error!r}): give the folder of a Hugging Face model"
    ) from error
  if not known:
    raise UserError(
      f"{path} is not of wav2vec2's base layout (group norm, post-norm layers): use"
      " wav2vec2-base or wav2vec2-base-960h"
    )
  return config


def _read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  import safetensors
  import safetensors.numpy

  try:
    return safetensors.numpy.load_file(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"{path} cannot be read as safetensors ({error}): download it anew") from error


def from_huggingface(tensors: Mapping[str, np.ndarray], config: Wav2Vec2Config) -> dict:
  """Parameters of `Wav2Vec2` from Hugging Face tensors, with or without the `wav2vec2.` prefix.

  Heads on top (CTC) and the mask embedding are left out.

  Raises:
    UserError: a tensor is missing or its shape does not fit `config`.
  """
  tensors = {k.removeprefix("wav2vec2."): np.asarray(v, np.float32) for k, v in tensors.items()}

  def take(name: str, *shape: int) -> np.ndarray:
    if name not in tensors or tensors[name].shape != shape:
      found = tensors[name].shape if name in tensors else "nothing"
      raise UserError(
        f"wav2vec2 weights: {name} should be {shape}, found {found}: config and weights differ"
      )
    return tensors[name]

  def dense(name: str, outputs: int, inputs: int) -> dict:
    return {
      "kernel": take(f"{name}.weight", outputs, inputs).T,
      "bias": take(f"{name}.bias", outputs),
    }

  def norm(name: str, size: int) -> dict:
    return {"scale": take(f"{name}.weight", size), "bias": take(f"{name}.bias", size)}

  c = config
  params = {
    "conv_norm": norm("feature_extractor.conv_layers.0.layer_norm", c.conv_channels),
    "features_norm": norm("feature_projection.layer_norm", c.conv_channels),
    "project": dense("feature_projection.projection", c.hidden, c.conv_channels),
    "norm": norm("encoder.layer_norm", c.hidden),
  }
  for i, kernel in enumerate(c.conv_kernels):
    inputs = c.conv_channels if i else 1
    weight = take(f"feature_extractor.conv_layers.{i}.conv.weight", c.conv_channels, inputs, kernel)
    params[f"conv_{i}"] = {"kernel": weight.transpose(2, 1, 0)}
  conv = "encoder.pos_conv_embed.conv"
  new, old = f"{conv}.parametrizations.weight.original", f"{conv}.weight_"
  length, direction = (new + "0", new + "1") if new + "0" in tensors else (old + "g", old + "v")
  v = take(direction, c.hidden, c.hidden // c.position_groups, c.position_kernel)
  g = take(length, 1, 1, c.position_kernel)
  weight = g * v / np.sqrt(np.square(v).sum((0, 1), keepdims=True))  # the weight norm, done once
  params["position"] = {"kernel": weight.transpose(2, 1, 0), "bias": take(conv + ".bias", c.hidden)}
  for i in range(c.layers):
    layer = f"encoder.layers.{i}."
    for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "out_proj")):
      params[f"{ours}_{i}"] = dense(f"{layer}attention.{theirs}", c.hidden, c.hidden)
    params[f"attend_norm_{i}"] = norm(layer + "layer_norm", c.hidden)
    params[f"widen_{i}"] = dense(
      layer + "feed_forward.intermediate_dense", c.feed_forward, c.hidden
    )
    params[f"narrow_{i}"] = dense(layer + "feed_forward.output_dense", c.hidden, c.feed_forward)
    params[f"feed_norm_{i}"] = norm(layer + "final_layer_norm", c.hidden)
  return params
