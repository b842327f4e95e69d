"""Tiny random speech models in Hugging Face's layout, and what they compute, in plain NumPy."""

import json

import numpy as np
import safetensors.numpy
import scipy.special

from uajax import torchfile

HIDDEN, LAYERS, HEADS, INNER, CHANNELS, KERNEL, GROUPS = 16, 2, 2, 24, 8, 6, 4
KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


def write(folder, model_type="hubert", *, large=False, seed=0, torch=False, **settings):
  """Writes a model's folder and returns its tensors, without a prefix."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
  tensors = {}

  def both(name, *shape):
    tensors[f"{name}.weight"] = normal(*shape)
    tensors[f"{name}.bias"] = normal(shape[0])

  for i, kernel in enumerate(KERNELS):
    layer = f"feature_extractor.conv_layers.{i}"
    both(f"{layer}.conv", CHANNELS, CHANNELS if i else 1, kernel)
    if not large:
      del tensors[f"{layer}.conv.bias"]
    if large or not i:
      both(f"{layer}.layer_norm", CHANNELS)
  both("feature_projection.layer_norm", CHANNELS)
  both("feature_projection.projection", HIDDEN, CHANNELS)
  conv = "encoder.pos_conv_embed.conv"
  tensors[f"{conv}.weight_g"] = np.abs(normal(1, 1, KERNEL)) + 0.5
  tensors[f"{conv}.weight_v"] = normal(HIDDEN, HIDDEN // GROUPS, KERNEL)
  tensors[f"{conv}.bias"] = normal(HIDDEN)
  both("encoder.layer_norm", HIDDEN)
  for i in range(LAYERS):
    layer = f"encoder.layers.{i}"
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
      both(f"{layer}.attention.{name}", HIDDEN, HIDDEN)
    both(f"{layer}.layer_norm", HIDDEN)
    both(f"{layer}.feed_forward.intermediate_dense", INNER, HIDDEN)
    both(f"{layer}.feed_forward.output_dense", HIDDEN, INNER)
    both(f"{layer}.final_layer_norm", HIDDEN)
  config = {
    "model_type": model_type, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "intermediate_size": INNER, "hidden_act": "gelu",
    "layer_norm_eps": 1e-5, "feat_extract_norm": "layer" if large else "group",
    "feat_extract_activation": "gelu", "conv_dim": [CHANNELS] * 7, "conv_kernel": list(KERNELS),
    "conv_stride": list(STRIDES), "conv_bias": large, "num_conv_pos_embeddings": KERNEL,
    "num_conv_pos_embedding_groups": GROUPS, "do_stable_layer_norm": large, **settings,
  }  # fmt: skip
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  stored = {f"{model_type}.{k}": v for k, v in tensors.items()} | {"lm_head.bias": normal(32)}
  if torch:
    torchfile.save(folder / "pytorch_model.bin", stored)
  else:
    safetensors.numpy.save_file(stored, folder / "model.safetensors")
  return tensors


def hidden(tensors, wav, *, large=False):
  """Last hidden states [t d] of samples [s]: the definition, one operation after another."""
  gelu = lambda x: 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))

  def norm(x, name, axis=-1):
    x = (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-5)
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

  def dense(x, name):
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

  x = np.asarray(wav, np.float64)[:, None]
  for i, (kernel, stride) in enumerate(zip(KERNELS, STRIDES, strict=True)):
    layer = f"feature_extractor.conv_layers.{i}"
    at = stride * np.arange((len(x) - kernel) // stride + 1)[:, None] + np.arange(kernel)
    x = np.einsum("tkc,dck->td", x[at], tensors[f"{layer}.conv.weight"])
    if large:
      x = norm(x + tensors[f"{layer}.conv.bias"], f"{layer}.layer_norm")
    elif not i:
      x = norm(x, f"{layer}.layer_norm", axis=0)
    x = gelu(x)
  x = dense(norm(x, "feature_projection.layer_norm"), "feature_projection.projection")
  conv = "encoder.pos_conv_embed.conv"
  v = tensors[f"{conv}.weight_v"]
  weight = tensors[f"{conv}.weight_g"] * v / np.sqrt((v**2).sum((0, 1), keepdims=True))
  padded = np.pad(x, ((KERNEL // 2, KERNEL // 2), (0, 0)))
  at = np.arange(len(x))[:, None] + np.arange(KERNEL)
  width = HIDDEN // GROUPS
  position = [
    np.einsum("tkc,dck->td", padded[at][..., g : g + width], weight[g : g + width])
    for g in range(0, HIDDEN, width)
  ]
  x = x + gelu(np.concatenate(position, 1) + tensors[f"{conv}.bias"])
  x = x if large else norm(x, "encoder.layer_norm")
  for i in range(LAYERS):
    layer = f"encoder.layers.{i}"

    def attend(x, layer=layer):
      q, k, v = (
        dense(x, f"{layer}.attention.{n}_proj").reshape(len(x), HEADS, -1).swapaxes(0, 1)
        for n in "qkv"
      )
      shares = scipy.special.softmax(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), axis=-1)
      return dense((shares @ v).swapaxes(0, 1).reshape(x.shape), f"{layer}.attention.out_proj")

    def feed(x, layer=layer):
      inner = gelu(dense(x, f"{layer}.feed_forward.intermediate_dense"))
      return dense(inner, f"{layer}.feed_forward.output_dense")

    if large:
      x = x + attend(norm(x, f"{layer}.layer_norm"))
      x = x + feed(norm(x, f"{layer}.final_layer_norm"))
    else:
      x = norm(x + attend(x), f"{layer}.layer_norm")
      x = norm(x + feed(x), f"{layer}.final_layer_norm")
  return norm(x, "encoder.layer_norm") if large else x
