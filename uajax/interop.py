"""Official UA-3DTalk checkpoints become avatars (method.md D.8).

Every size is read from the checkpoint's shapes; nothing is assumed of it but the names.
torch keeps a linear layer as [out, in], a convolution as [out, in, width] and a plane as
[1, channels, rows, columns]; here inputs and channels come before outputs, or last.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from uajax import torchfile, types
from uajax.avatar import Avatar, Layer
from uajax.config import Motion, Planes
from uajax.errors import UserError
from uajax.models.codebook import ENTRIES
from uajax.models.motion import FACE_MODALITIES, MOUTH_MODALITIES

_UNLIMITED = 80.0  # log-variances are not clipped officially; exp(80) is still a float32
_HIDDEN = ("fc1", "fc_mu", "fc_var")


def load_official(path: str | os.PathLike) -> Avatar:
  """Reads an official `chkpnt_fuse_latest.pth`: face and mouth, splats and motion.

  Every splat of the avatar is alive.

  Raises:
    UserError: where the file is no such checkpoint, or lacks or misshapes anything.
  """
  loaded = torchfile.load(path)
  if not isinstance(loaded, list | tuple) or len(loaded) < 4 or not (
      isinstance(loaded[1], dict) and isinstance(loaded[3], dict)):
    raise UserError(f"{path} is not a checkpoint of the fuse stage (face and mouth, splats and "
                    "motion): give chkpnt_fuse_latest.pth")
  face, mouth = _Weights(path, "face", loaded[1]), _Weights(path, "mouth", loaded[3])
  config = _config(face)
  if (other := _shared_config(mouth, config)) != config:
    raise UserError(f"{path} has a mouth network of other sizes than its face network ({other}): "
                    "give a checkpoint of the official code")
  degrees = [_splats_degree(path, name, loaded[i]) for name, i in (("face", 0), ("mouth", 2))]
  return Avatar(
    face=_layer(path, "face", loaded[0], _face_motion(face, config)),
    mouth=_layer(path, "mouth", loaded[2], _mouth_motion(mouth, config)),
    config=config, sh_degree=max(degrees))


class _Weights:
  """A state dict that says what it lacks."""

  def __init__(self, path, part: str, tensors: dict):
    self.path, self.part, self.tensors = path, part, tensors

  def __contains__(self, name: str) -> bool:
    return name in self.tensors

  def take(self, name: str, *shape: int | None) -> np.ndarray:
    """The tensor of that name, float32; None in `shape` is any size."""
    value = self.tensors.get(name)
    if not isinstance(value, np.ndarray):
      raise UserError(f"{self.path} lacks {name} of the {self.part}: give a checkpoint of the "
                      "official code")
    fits = value.ndim == len(shape) and all(
      want in (None, got) for want, got in zip(shape, value.shape, strict=True))
    if not fits or not np.issubdtype(value.dtype, np.floating):
      want = "x".join("?" if n is None else str(n) for n in shape)
      raise UserError(f"{self.path} has {name} of the {self.part} as {value.dtype} {value.shape} "
                      f"where {want} is needed: give a checkpoint of the official code")
    if not np.isfinite(value).all():
      raise UserError(f"{self.path} has values that are not finite in {name} of the {self.part}: "
                      "give a checkpoint from before the training broke")
    return np.ascontiguousarray(value, np.float32)

  def count(self, pattern: str) -> int:
    """How many of pattern.format(0), pattern.format(1), ... there are."""
    i = 0
    while pattern.format(i) in self:
      i += 1
    return i


def _planes_config(weights: _Weights, prefix: str) -> Planes:
  scales = weights.count(prefix + ".grids.{}.0")
  sides = [weights.take(f"{prefix}.grids.{i}.0", 1, None, None, None).shape[2]
           for i in range(max(scales, 1))]
  features = weights.take(f"{prefix}.grids.0.0", 1, None, None, None).shape[1]
  if any(side % sides[0] for side in sides):
    raise UserError(f"{weights.path} has planes of sides {sides}, which are no multiples of the "
                    "first: give a checkpoint of the official code")
  box = weights.take(f"{prefix}.aabb", 2, 3)
  bound = float(np.round(box[0, 0], 6))
  if bound <= 0 or not np.allclose(box, [[bound] * 3, [-bound] * 3], rtol=1e-5):
    raise UserError(f"{weights.path} has a box {box.tolist()} where a cube around the origin is "
                    "needed: give a checkpoint of the official code")
  return Planes(features, sides[0], tuple(side // sides[0] for side in sides), bound)


def _shared_config(weights: _Weights, face: Motion | None) -> Motion:
  """The config that the weights both layers have speak of; the rest from `face`."""
  windows = weights.take("audio_net.encoder_conv.0.weight", 32, None, 3)
  audio_code, _ = weights.take("audio_net.encoder_fc1.2.weight", None, 64).shape
  hidden, _ = weights.take("fuse_net.audio_net.0.fc1.weight", None, None).shape
  latent, _ = weights.take("fuse_net.audio_net.0.fc_mu.weight", None, hidden).shape
  features, _ = weights.take("fuse_net.fc.weight", None, None).shape
  return Motion(
    audio_channels=windows.shape[1], audio_width=16, audio_code=audio_code,
    planes=_planes_config(weights, "xyz_encoder"),
    emotion_planes=face.emotion_planes if face else Planes(),
    members=weights.count("fuse_net.audio_net.{}.fc1.weight"), hidden=hidden, latent=latent,
    features=features, ddof=1, log_var_limit=_UNLIMITED, ajar=0.0, acts=False,
    blink_gain=1.0, calibrated=False, still_heads=False)


def _config(weights: _Weights) -> Motion:
  return dataclasses.replace(
    _shared_config(weights, None),
    emotion_planes=_planes_config(weights, "emotion_encoder.xyz_encoder"))


def _linear(weights: _Weights, name: str, inputs: int, outputs: int, bias: bool = True) -> dict:
  layer = {"kernel": weights.take(f"{name}.weight", outputs, inputs).T.copy()}
  return layer | {"bias": weights.take(f"{name}.bias", outputs)} if bias else layer


def _convolutions(weights: _Weights, name: str, widths: tuple[int, ...]) -> dict:
  """Convolutions at every other place of a sequence."""
  layers = {}
  for i, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
    kernel = weights.take(f"{name}.{2 * i}.weight", outputs, inputs, 3)
    bias = weights.take(f"{name}.{2 * i}.bias", outputs)
    layers[f"conv_{i}"] = {"kernel": kernel.transpose(2, 1, 0).copy(), "bias": bias}
  return layers


def _gate(weights: _Weights, name: str, inputs: int, hidden: int, outputs: int) -> dict:
  return {"first": _linear(weights, f"{name}.net.0", inputs, hidden, bias=False),
          "second": _linear(weights, f"{name}.net.1", hidden, outputs, bias=False)}


def _planes(weights: _Weights, prefix: str, config: Planes) -> dict:
  scales = {}
  for i, multiple in enumerate(config.multiples):
    side = config.resolution * multiple
    planes = [weights.take(f"{prefix}.grids.{i}.{j}", 1, config.features, side, side)[0]
              for j in range(3)]
    scales[f"scale_{i}"] = np.stack(planes).transpose(0, 2, 3, 1).copy()
  return scales


def _ensemble(weights: _Weights, modality: str, inputs: int, config: Motion) -> dict:
  sizes = (inputs, config.hidden), (config.hidden, config.latent), (config.hidden, config.latent)
  layers = {}
  for name, official, size in zip(("hidden", "mean", "log_var"), _HIDDEN, sizes, strict=True):
    members = [_linear(weights, f"fuse_net.{modality}_net.{t}.{official}", *size)
               for t in range(config.members)]
    for kind in ("kernel", "bias"):
      layers[f"{name}_{kind}"] = np.stack([member[kind] for member in members])
  return layers


def _motion(weights: _Weights, config: Motion, inputs: dict[str, int], heads: dict) -> dict:
  """What face and mouth have in common."""
  code, where = config.audio_code, _where(config)
  return {
    "planes": _planes(weights, "xyz_encoder", config.planes),
    "audio": _convolutions(weights, "audio_net.encoder_conv",
                           (config.audio_channels, 32, 32, 64, 64)) | {
      "hidden": _linear(weights, "audio_net.encoder_fc1.0", 64, 64),
      "code": _linear(weights, "audio_net.encoder_fc1.2", 64, code)},
    "audio_attention": _convolutions(weights, "audio_att_net.attentionConvNet",
                                     (code, 16, 8, 4, 2, 1)) | {
      "weights": _linear(weights, "audio_att_net.attentionNet.0", types.NEIGHBOURS,
                         types.NEIGHBOURS)},
    "fusion": {
      "ensembles": {name: _ensemble(weights, name, size, config) for name, size in inputs.items()},
      "fuse": _linear(weights, "fuse_net.fc", config.latent + where, config.features)},
  } | {name: {
    "first": _linear(weights, f"{official}.1", config.features, config.features),
    "second": _linear(weights, f"{official}.3", config.features, size),
  } for name, (official, size) in heads.items()}


def _where(config: Motion) -> int:
  return config.planes.features * len(config.planes.multiples)


def _face_motion(weights: _Weights, config: Motion) -> dict:
  where, emotion = _where(config), config.emotion_planes
  sizes = (config.audio_code + 6 + where, types.EXPRESSION + where, types.EXPRESSION + where,
           emotion.features * len(emotion.multiples))
  heads = {"mean_head": ("xyz_decoder", 3), "rotation_head": ("rotation_decoder", 4),
           "scale_head": ("scale_decoder", 3)}
  books = {f"codebook_{i}": weights.take(f"emotion_encoder.codebook.{i}", ENTRIES * multiple,
                                         emotion.features)
           for i, multiple in enumerate(emotion.multiples)}
  return _motion(weights, config, dict(zip(FACE_MODALITIES, sizes, strict=True)), heads) | {
    "audio_channels": _gate(weights, "aud_ch_att_net", where, 32, config.audio_code),
    "eye_attention": _gate(weights, "eye_att_net", where, 16, 6),
    "expression": _gate(weights, "exp_encode_net", 5, 16, 5),
    "emotion": books | {
      "query": _linear(weights, "emotion_encoder.emotion_fc1", types.EMOTION, emotion.features),
      "planes": _planes(weights, "emotion_encoder.xyz_encoder", emotion)},
  }


def _mouth_motion(weights: _Weights, config: Motion) -> dict:
  where = _where(config)
  sizes = (config.audio_code + where, types.EXPRESSION + where, types.EXPRESSION + where)
  return _motion(weights, config, dict(zip(MOUTH_MODALITIES, sizes, strict=True)),
                 {"mean_head": ("xyz_decoder", 3)})


_SPLAT_FIELDS = ("active_sh", "means", "sh_dc", "sh_rest", "identity", "raw_scales", "quats",
                 "logit_opacities")


def _splats_degree(path, part: str, gaussians) -> int:
  if not isinstance(gaussians, list | tuple) or len(gaussians) < len(_SPLAT_FIELDS):
    raise UserError(f"{path} lacks the Gaussians of the {part}: give chkpnt_fuse_latest.pth")
  degree = gaussians[0]
  if not isinstance(degree, int) or not 0 <= degree <= 2:
    raise UserError(f"{path} has Gaussians of the {part} of SH degree {degree!r} where 0..2 is "
                    "needed: give a checkpoint of the official code")
  return degree


def _layer(path, part: str, gaussians, motion: dict) -> Layer:
  fields = dict(zip(_SPLAT_FIELDS, gaussians, strict=False))
  weights = _Weights(path, part, fields)
  count = weights.take("means", None, 3).shape[0]
  rest = weights.take("sh_rest", count, None, 3)
  if rest.shape[1] != 8:  # a lower degree has fewer; the others are silent
    rest = np.concatenate([rest[:, :8], np.zeros((count, max(8 - rest.shape[1], 0), 3), "f4")], 1)
  splats = types.Splats(
    means=jnp.asarray(weights.take("means", count, 3)),
    raw_scales=jnp.asarray(weights.take("raw_scales", count, 3)),
    quats=jnp.asarray(weights.take("quats", count, 4)),
    logit_opacities=jnp.asarray(weights.take("logit_opacities", count, 1)[:, 0]),
    sh_dc=jnp.asarray(weights.take("sh_dc", count, 1, 3)), sh_rest=jnp.asarray(rest))
  return Layer(splats, jnp.ones(count, bool), jax.tree.map(jnp.asarray, motion))
