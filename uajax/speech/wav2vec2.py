"""wav2vec2 and HuBERT, which are one network trained in two ways, base and large.

Reads Hugging Face weights (`config.json` with `model.safetensors` or `pytorch_model.bin`, for
instance facebook/wav2vec2-base-960h or facebook/hubert-large-ls960-ft) and computes what the
original computes in evaluation mode.

Axes: b batch, s samples at 16 kHz (each window of mean 0 and variance 1), t steps of 20 ms,
c convolution channels, d hidden units.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax
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
  conv_norm: Literal["group", "layer"] = "group"  # after the first convolution, or after each
  conv_bias: bool = False
  stable: bool = False  # layer norms before what the residuals add, and one at the end (large)

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
        c.conv_channels, (kernel,), (stride,), padding="VALID", use_bias=c.conv_bias,
        name=f"conv_{i}",
      )(x)  # fmt: skip
      if c.conv_norm == "layer":  # over the channels, each step by itself
        x = self.norm(f"conv_norm_{i}", epsilon=1e-5)(x)
      elif i == 0:  # over time, each channel by itself
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
    x = x + nn.gelu(position, approximate=False)
    x = drop(x if c.stable else self.norm("norm")(x))
    for i in range(c.layers):
      attend_norm, feed_norm = self.norm(f"attend_norm_{i}"), self.norm(f"feed_norm_{i}")
      if c.stable:
        x = x + drop(self.attend(attend_norm(x), i))
        x = x + drop(self.feed(feed_norm(x), i, drop))
      else:
        x = attend_norm(x + drop(self.attend(x, i)))
        x = feed_norm(x + drop(self.feed(x, i, drop)))
    return (self.norm("norm")(x) if c.stable else x), heard

  def norm(self, name: str, epsilon: float | None = None) -> nn.LayerNorm:
    epsilon = self.config.epsilon if epsilon is None else epsilon
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name)

  def feed(self, x: Float[Array, "b t d"], i: int, drop: nn.Dropout) -> Float[Array, "b t d"]:
    inner = nn.gelu(nn.Dense(self.config.feed_forward, name=f"widen_{i}")(x), approximate=False)
    return nn.Dense(self.config.hidden, name=f"narrow_{i}")(drop(inner))

  def attend(self, x: Float[Array, "b t d"], i: int) -> Float[Array, "b t d"]:
    c = self.config
    split = (*x.shape[:2], c.heads, c.hidden // c.heads)
    q, k, v = (nn.Dense(c.hidden, name=f"{n}_{i}")(x).reshape(split) for n in "qkv")
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(split[-1])
    mixed = jnp.einsum("bhij,bjhd->bihd", nn.softmax(scores), v)
    return nn.Dense(c.hidden, name=f"out_{i}")(mixed.reshape(x.shape))


@functools.partial(jax.jit, static_argnums=0)
def hidden(
  config: Wav2Vec2Config, params: dict, wav: Float[Array | np.ndarray, "b s"]
) -> Float[Array, "b t d"]:
  """The last hidden states, in evaluation mode."""
  last, _ = Wav2Vec2(config).apply({"params": params}, wav)
  return last


def load(folder: str | pathlib.Path) -> tuple[Wav2Vec2Config, dict]:
  """Settings and parameters from a folder with `config.json` and the weights.

  Raises:
    UserError: a file is missing or damaged, or the model is of another layout.
  """
  folder = pathlib.Path(folder)
  config = read_config(folder / "config.json")
  return config, from_huggingface(_read_tensors(weights_file(folder)), config)


def weights_file(folder: str | pathlib.Path) -> pathlib.Path:
  """`model.safetensors` of the folder, or `pytorch_model.bin` where that alone is there.

  Raises:
    UserError: neither is there.
  """
  files = [pathlib.Path(folder) / name for name in ("model.safetensors", "pytorch_model.bin")]
  for file in files:
    if file.is_file():
      return file
  raise UserError(
    f"{folder} holds neither {files[0].name} nor {files[1].name}: give the folder of a Hugging"
    " Face model"
  )


def read_config(path: str | pathlib.Path) -> Wav2Vec2Config:
  """Settings from a Hugging Face `config.json` of wav2vec2 or HuBERT.

  Raises:
    UserError: it is missing or damaged, or of another layout.
  """
  try:
    raw = json.loads(pathlib.Path(path).read_text())
    channels = raw["conv_dim"]
    known = (
      raw["model_type"] in ("wav2vec2", "hubert")
      and raw["feat_extract_norm"] in ("group", "layer")
      and len(set(channels)) == 1
      and len(channels) == len(raw["conv_kernel"]) == len(raw["conv_stride"])
      # Switches that rare variants turn, with what holds where a file does not name them.
      and raw.get("feat_extract_activation", "gelu") == raw.get("hidden_act", "gelu") == "gelu"
      and raw.get("feat_proj_layer_norm", True)
      and not raw.get("conv_pos_batch_norm", False)
      and not raw.get("add_adapter", False)
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
      conv_norm=raw["feat_extract_norm"],
      conv_bias=bool(raw["conv_bias"]),
      stable=bool(raw["do_stable_layer_norm"]),
    )
  except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
    raise UserError(
      f"{path} is no config of wav2vec2 or HuBERT ({error!r}): give the folder of a Hugging Face"
      " model"
    ) from error
  if not known:
    raise UserError(
      f"{path} is not of the layout of wav2vec2 or HuBERT: use for instance wav2vec2-base-960h,"
      " hubert-base-ls960 or hubert-large-ls960-ft"
    )
  return config


def _read_tensors(path: pathlib.Path) -> Mapping[str, np.ndarray]:
  if path.suffix == ".bin":
    from uajax import torchfile

    tensors = torchfile.load(path)
    if not isinstance(tensors, Mapping):
      raise UserError(f"{path} holds no named tensors: download it anew")
    return {k: v for k, v in tensors.items() if isinstance(v, np.ndarray)}
  import safetensors
  import safetensors.numpy

  try:
    return safetensors.numpy.load_file(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"{path} cannot be read as safetensors ({error}): download it anew") from error


def from_huggingface(tensors: Mapping[str, np.ndarray], config: Wav2Vec2Config) -> dict:
  """Parameters of `Wav2Vec2` from Hugging Face tensors, with or without the model's prefix.

  Heads on top (CTC) and the mask embedding are left out.

  Raises:
    UserError: a tensor is missing or its shape does not fit `config`.
  """
  tensors = {
    k.removeprefix("wav2vec2.").removeprefix("hubert."): np.asarray(v, np.float32)
    for k, v in tensors.items()
  }

  def take(name: str, *shape: int) -> np.ndarray:
    if name not in tensors or tensors[name].shape != shape:
      found = tensors[name].shape if name in tensors else "nothing"
      raise UserError(
        f"speech weights: {name} should be {shape}, found {found}: config and weights differ"
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
    "features_norm": norm("feature_projection.layer_norm", c.conv_channels),
    "project": dense("feature_projection.projection", c.hidden, c.conv_channels),
    "norm": norm("encoder.layer_norm", c.hidden),
  }
  for i, kernel in enumerate(c.conv_kernels):
    layer, inputs = f"feature_extractor.conv_layers.{i}.", c.conv_channels if i else 1
    weight = take(layer + "conv.weight", c.conv_channels, inputs, kernel)
    params[f"conv_{i}"] = {"kernel": weight.transpose(2, 1, 0)}
    if c.conv_bias:
      params[f"conv_{i}"]["bias"] = take(layer + "conv.bias", c.conv_channels)
    if c.conv_norm == "layer":
      params[f"conv_norm_{i}"] = norm(layer + "layer_norm", c.conv_channels)
    elif i == 0:
      params["conv_norm"] = norm(layer + "layer_norm", c.conv_channels)
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
