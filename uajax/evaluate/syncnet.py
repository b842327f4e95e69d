"""Whether lips and sound belong together: Sync-C and Sync-D by SyncNet (Chung & Zisserman 2016).

The network as published with its weights (`syncnet_v2.model`, which users bring themselves): one
branch sees five pictures of a face, the other hears the 0.2 s of sound that belong to them, and
what fits together lies close. Sync-D is the distance at the best offset between them, Sync-C how
much farther apart they are at other offsets (the median). The layout of the file is checked; the
published figures can not be checked without it.

Faces are cut out as the authors do about their detector's box; ours is that of the landmarks, so
that figures differ a little from those of papers. Batch norms are folded into the convolutions.

Axes: f frames, n feature windows, t steps of 10 ms, h w pixels, d features (1024).
"""

import collections
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
from jaxtyping import Array, Float, UInt8

from uajax import pretrained, torchfile
from uajax.errors import UserError
from uajax.preprocess.landmarks import Roi, crop
from uajax.types import FPS, SAMPLE_RATE_HZ

FILE = "syncnet_v2.model"
SIDE = 224  # of the pictures of faces
SEEN = 5  # pictures that a window sees
STEPS, CEPSTRA = 20, 13  # of sound that a window hears
STEPS_A_FRAME = 100 // FPS
MAX_SHIFT = 15  # frames by which sound is tried earlier and later
LEAST_FRAMES = FPS  # in a row; a shorter film has hardly an offset to be told from others
CHUNK = 8  # windows seen at a time
STEADY_FRAMES = 13  # over which the place of the face is a median
_BELOW, _AROUND = 0.4, 2.8  # the square in half sizes of the face: moved down, its side
_EPSILON = 1e-5  # of the batch norms


class _Layer(NamedTuple):
  """A convolution, its batch norm and ReLU after it."""

  place: int  # in the file; its batch norm lies at the next
  outputs: int
  kernel: tuple[int, int]
  stride: int = 1
  padding: int = 0
  pool: tuple[tuple[int, int], tuple[int, int], int] | None = None  # window, stride, padding


_HEARING = (
  _Layer(0, 64, (3, 3), padding=1), _Layer(4, 192, (3, 3), padding=1, pool=((3, 3), (1, 2), 0)),
  _Layer(8, 384, (3, 3), padding=1), _Layer(11, 256, (3, 3), padding=1),
  _Layer(14, 256, (3, 3), padding=1, pool=((3, 3), (2, 2), 0)), _Layer(18, 512, (5, 4)),
)  # fmt: skip
_SEEING = (
  _Layer(0, 96, (7, 7), 2, pool=((3, 3), (2, 2), 0)),  # and over SEEN pictures
  _Layer(4, 256, (5, 5), 2, 1, ((3, 3), (2, 2), 1)), _Layer(8, 256, (3, 3), padding=1),
  _Layer(11, 256, (3, 3), padding=1), _Layer(14, 256, (3, 3), padding=1, pool=((3, 3), (2, 2), 0)),
  _Layer(18, 512, (6, 6)),
)  # fmt: skip
_HIDDEN, _FEATURES = 512, 1024

# A branch: kernel and bias of each convolution, then of the two dense layers.
Branch = list[tuple[Float[Array, "..."], Float[Array, " o"]]]


class Params(NamedTuple):
  hearing: Branch
  seeing: Branch


def load(path: str | os.PathLike | None = None) -> Params:
  """The weights, by default of FILE where pretrained files lie.

  Raises:
    UserError: not at hand, or of another layout.
  """
  if path is None:
    path = pretrained.find(FILE)
    if path is None:
      raise UserError(
        f"{FILE} (SyncNet's weights, from its authors' page) is not at hand: put it into"
        f" {pretrained.cache()} or a folder that $UAJAX_MODELS names"
      )
  tensors = torchfile.load(path)
  if not isinstance(tensors, dict):
    raise UserError(f"{path} holds no named tensors: give SyncNet's {FILE}")

  def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
    value = tensors.get(name)
    if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype.kind != "f":
      found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else "nothing"
      raise UserError(f"{path} has {found} as {name} where {shape} is needed: give {FILE}")
    if not np.isfinite(value).all():
      raise UserError(f"{path} has values that are not finite in {name}: download it anew")
    return value.astype(np.float32)

  def folded(layer: str, norm: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A layer with its batch norm, as kernel [o ...] and bias."""
    kernel, bias = take(f"{layer}.weight", shape), take(f"{layer}.bias", shape[:1])
    scale, shift, mean, variance = (
      take(f"{norm}.{n}", shape[:1]) for n in ("weight", "bias", "running_mean", "running_var")
    )
    if (variance < 0).any():
      raise UserError(f"{path} has a negative variance in {norm}: download it anew")
    scale = scale / np.sqrt(variance + _EPSILON)
    return kernel * scale.reshape(-1, *[1] * (kernel.ndim - 1)), (bias - mean) * scale + shift

  def branch(name: str, layers: tuple[_Layer, ...], inputs: int, deep: bool) -> Branch:
    out = []
    for i, layer in enumerate(layers):
      # Those of the seeing branch are 3D; only the first spans several pictures.
      over = (SEEN if i == 0 else 1,) if deep else ()
      place = f"netcnn{name}.{layer.place}", f"netcnn{name}.{layer.place + 1}"
      kernel, bias = folded(*place, (layer.outputs, inputs, *over, *layer.kernel))
      if deep and i:
        kernel = kernel[:, :, 0]
      out.append((np.moveaxis(kernel, (0, 1), (-1, -2)), bias))
      inputs = layer.outputs
    hidden = folded(f"netfc{name}.0", f"netfc{name}.1", (_HIDDEN, inputs))
    last = (take(f"netfc{name}.3.weight", (_FEATURES, _HIDDEN)),
            take(f"netfc{name}.3.bias", (_FEATURES,)))  # fmt: skip
    out += [(kernel.T, bias) for kernel, bias in (hidden, last)]
    return jax.tree.map(jnp.asarray, out)

  return Params(branch("aud", _HEARING, 1, False), branch("lip", _SEEING, 3, True))


@jax.jit
def hear(params: Params, windows: Float[Array, "n c t"]) -> Float[Array, "n d"]:
  """Features of sound, `STEPS` columns of `CEPSTRA` (see `cepstra`) a window."""
  x = windows[..., None]
  for layer, weights in zip(_HEARING, params.hearing, strict=False):
    x = _pool(layer, jax.nn.relu(_convolve(layer, weights, x)))
  return _connect(params.hearing, x)


@jax.jit
def see(params: Params, faces: UInt8[Array, "f h w 3"]) -> Float[Array, "n d"]:
  """Features of every SEEN pictures in a row, n = f - SEEN + 1. RGB; the network wants BGR."""
  kernel, bias = params.seeing[0]
  x = faces[None, ..., ::-1].astype(jnp.float32)
  x = jax.lax.conv_general_dilated(
    x, kernel, (1, _SEEING[0].stride, _SEEING[0].stride), "VALID",
    dimension_numbers=("NDHWC", "DHWIO", "NDHWC"), precision="highest",
  )[0]  # fmt: skip
  x = _pool(_SEEING[0], jax.nn.relu(x + _row(bias, x)))
  for layer, weights in zip(_SEEING[1:], params.seeing[1:], strict=False):
    x = _pool(layer, jax.nn.relu(_convolve(layer, weights, x)))
  return _connect(params.seeing, x)


def _convolve(layer: _Layer, weights, x):
  kernel, bias = weights
  pads = ((layer.padding, layer.padding),) * 2
  x = jax.lax.conv_general_dilated(
    x, kernel, (layer.stride,) * 2, pads,
    dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest",
  )  # fmt: skip
  return x + _row(bias, x)


def _row(bias, x):
  return bias.reshape(*[1] * (x.ndim - 1), -1)


def _pool(layer: _Layer, x):
  if layer.pool is None:
    return x
  window, stride, padding = layer.pool
  pads = ((0, 0), *((padding, padding),) * 2, (0, 0))
  return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *stride, 1), pads)


def _connect(branch: Branch, x):
  (kernel, bias), (last, last_bias) = branch[-2:]
  x = x.reshape(len(x), -1)  # one pixel is left
  x = jax.nn.relu(jnp.dot(x, kernel, precision="highest") + bias[None])
  return jnp.dot(x, last, precision="highest") + last_bias[None]


def cepstra(speech: Float[np.ndarray, " s"]) -> Float[np.ndarray, "t 13"]:
  """MFCC as the network was trained on, every 10 ms: those of HTK on 16-bit samples.

  25 ms rectangular windows of pre-emphasised sound, 512 bins, 26 bands up to 8 kHz, cepstra
  liftered by 22, the first replaced by the log energy; t = 1 + ceil((s - 400) / 160).
  """
  size, hop, bins, bands, lifter = 400, 160, 512, 26, 22
  sound = np.round(np.asarray(speech, np.float64) * 32768).clip(-32768, 32767)
  sound = np.append(sound[:1], sound[1:] - 0.97 * sound[:-1])
  count = 1 + max(math.ceil((len(sound) - size) / hop), 0)
  padded = np.pad(sound, (0, max((count - 1) * hop + size - len(sound), 0)))
  rows = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop][:count]
  power = np.abs(np.fft.rfft(rows, bins)) ** 2 / bins
  floor = np.finfo(float).eps
  mels = np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE_HZ / 2 / 700), bands + 2)
  edges = np.floor((bins + 1) * 700 * (10 ** (mels / 2595) - 1) / SAMPLE_RATE_HZ)
  at = np.arange(bins // 2 + 1)[:, None]
  low, middle, high = edges[:-2], edges[1:-1], edges[2:]
  rising, falling = (at - low) / (middle - low), (high - at) / (high - middle)
  bank = np.clip(np.minimum(rising, falling), 0, None)
  out: Any = scipy.fft.dct(np.log(np.maximum(power @ bank, floor)), norm="ortho")
  out = out[:, :CEPSTRA] * (1 + lifter / 2 * np.sin(np.pi * np.arange(CEPSTRA) / lifter))
  out[:, 0] = np.log(np.maximum(power.sum(1), floor))
  return out.astype(np.float32)


class Watcher:
  """Sees the faces of a film, given frame by frame, and keeps what the network says of them."""

  def __init__(self, params: Params):
    self._params = params
    self._faces: list[np.ndarray] = []  # not seen yet, and SEEN - 1 before them
    self._boxes: collections.deque = collections.deque(maxlen=STEADY_FRAMES)
    self._next: int | None = None
    self.runs: list[tuple[int, list[np.ndarray]]] = []  # first frame, features in pieces

  def add(self, number: int, image: UInt8[np.ndarray, "h w 3"], points) -> None:
    """Frame `number`; `points` [p 2+] are the landmarks about which the face is cut out."""
    if number != self._next:
      self.flush()
      self._boxes.clear()
      self.runs.append((number, []))
    self._next = number + 1
    low, high = points[:468, :2].min(0), points[:468, :2].max(0)
    self._boxes.append((*(low + high) / 2, (high - low).max() / 2))
    x, y, half = np.median(np.array(self._boxes), axis=0)
    roi = Roi(float(x), float(y + _BELOW * half), float(_AROUND * half), 0.0)
    self._faces.append(crop(image, roi, SIDE))
    if len(self._faces) == CHUNK + SEEN - 1:
      self._see()

  def flush(self) -> None:
    """Sees what is left; a row of frames ends."""
    self._see()
    self._faces.clear()
    self._next = None

  def _see(self) -> None:
    windows = len(self._faces) - SEEN + 1
    if windows < 1:
      return
    # Always as many pictures, so that the network is compiled once.
    missing = [self._faces[-1]] * (CHUNK - windows)
    features = np.asarray(see(self._params, np.stack([*self._faces, *missing])))
    self.runs[-1][1].append(features[:windows])
    self._faces = self._faces[windows:]


class Sync(NamedTuple):
  confidence: float  # Sync-C, higher is better
  distance: float  # Sync-D, lower is better
  offset_frames: int  # by which the sound comes late; the authors' code gives its negative


def judge(
  params: Params, watcher: Watcher, speech: Float[np.ndarray, " s"]
) -> Sync | None:
  """The figures of all that was seen, against the film's sound; None where rows are too short."""
  watcher.flush()
  whole: Any = cepstra(speech)
  rows = []
  for first, pieces in watcher.runs:
    seen = np.concatenate([np.zeros((0, _FEATURES), np.float32), *pieces])
    begins = STEPS_A_FRAME * (first + np.arange(len(seen)))
    begins = begins[begins + STEPS <= len(whole)]
    seen = seen[: len(begins)]
    if len(seen) < LEAST_FRAMES - SEEN + 1:
      continue
    windows = whole[begins[:, None] + np.arange(STEPS)[None]].transpose(0, 2, 1)
    rows.append(distances(seen, listen(params, windows)))
  return conclude(np.concatenate(rows)) if rows else None


def listen(params: Params, windows: Float[np.ndarray, "n c t"]) -> Float[np.ndarray, "n d"]:
  """`hear` in pieces of equal size."""
  out = []
  for begin in range(0, len(windows), CHUNK):
    some = windows[begin : begin + CHUNK]
    padded = np.pad(some, ((0, CHUNK - len(some)), (0, 0), (0, 0)))
    out.append(np.asarray(hear(params, padded))[: len(some)])
  return np.concatenate(out)


def distances(
  seen: Float[np.ndarray, "n d"], heard: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "n 31"]:
  """Of what is seen to what is heard -MAX_SHIFT .. MAX_SHIFT frames later; beyond the ends 0."""
  padded = np.pad(heard, ((MAX_SHIFT, MAX_SHIFT), (0, 0)))
  return np.stack(
    [np.linalg.norm(seen - padded[k : k + len(seen)], axis=1) for k in range(2 * MAX_SHIFT + 1)], 1
  )


def conclude(table: Float[np.ndarray, "n 31"]) -> Sync:
  """Sync-C, Sync-D and offset of the distances of all windows."""
  mean: Any = table.mean(0)
  best = int(np.argmin(mean))
  return Sync(float(np.median(mean) - mean[best]), float(mean[best]), best - MAX_SHIFT)
