"""CA-MSER: emotion heard in three views of speech that attend to each other (method.md B.2).

A convolutional branch sees the spectrogram, a BiLSTM follows the MFCC; together they weigh the
steps of wav2vec2's hidden states. Default sizes are the paper's.

Axes: b windows, t spectral steps (100 a second), s samples, u wav2vec2 steps (50 a second).
"""

import dataclasses
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uajax.priors.fit import random_key
from uajax.speech.features import CEPSTRA, SILENT_DB, SPECTRUM_BINS, Views
from uajax.speech.recurrent import BiLSTM
from uajax.speech.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from uajax.types import EMOTION, SAMPLE_RATE_HZ


@dataclasses.dataclass(frozen=True)
class EmotionConfig:
  window_s: float = 3.0
  image: tuple[int, int] = (256, 384)  # rows, columns that the spectrogram is resized to
  channels: int = 3  # equal copies of it, as networks trained on pictures expect
  convolutions: tuple[int, int, int, int, int] = (64, 192, 384, 256, 256)  # AlexNet's
  pool: tuple[int, int] = (6, 6)
  # What follows the convolutions: means over a grid of `pool` cells (the paper), or mean and
  # deviation over time of what goes in and what comes out.
  look_pool: Literal["grid", "statistics"] = "grid"
  lstm: int = 256
  lstm_layers: int = 2
  lstm_dropout: float = 0.5
  # What follows the BiLSTM: all its steps side by side (the paper), or mean and deviation over
  # time of what goes in and what comes out (far fewer weights, which little data needs).
  lstm_pool: Literal["flatten", "statistics"] = "flatten"
  # The BiLSTM's input: each frame brought to length 1 (the paper), or each coefficient to mean 0
  # and variance 1 over the training speech, which little data needs (c0 outweighs all else).
  cepstra: Literal["unit", "standard"] = "unit"
  deltas: bool = False  # whether the BiLSTM is given the cepstra's slopes besides
  lstm_stride: int = 1  # steps of 10 ms that it reads at once, as their mean
  wav: Wav2Vec2Config = Wav2Vec2Config()
  # What goes on of the waveform's steps: their sum by attention (the paper), or besides it their
  # mean and deviation.
  wav_pool: Literal["attention", "statistics"] = "attention"
  # Whether each branch's numbers are brought to mean 0 and variance 1 over the training windows
  # before its layer (from where they train on); what little data cannot learn otherwise.
  standardise: bool = False
  skip_silence: bool = False  # statistics leave out steps where nothing sounds, padding above all
  dropout: float = 0.1
  tap: Literal["F1", "F2", "F3"] = "F1"  # which 128 numbers are the emotion feature

  @property
  def samples(self) -> int:
    return round(self.window_s * SAMPLE_RATE_HZ)


class Ranges(NamedTuple):
  """How the training speech spreads; kept beside the parameters (Q54)."""

  low_db: Float[Array | np.ndarray, " 200"]  # of every frequency bin
  high_db: Float[Array | np.ndarray, " 200"]
  mean: Float[Array | np.ndarray, " 40"]  # of the cepstra
  deviation: Float[Array | np.ndarray, " 40"]


class Heard(NamedTuple):
  """What the network makes of each window."""

  F1: Float[Array, "b 128"]  # the attention-weighted waveform path
  F2: Float[Array, "b 128"]  # first and second layer of the discriminator
  F3: Float[Array, "b 128"]
  logits: Float[Array, "b labels"]
  joint: Float[Array, "b 384"]  # the three branches side by side, for the aligning net
  tap_logits: Float[Array, "b labels"]  # the labels read off the tapped feature alone


class EmotionNet(nn.Module):
  labels: int
  config: EmotionConfig = EmotionConfig()

  @nn.compact
  def __call__(
    self,
    views: Views,
    ranges: Ranges,
    *,
    train: bool = False,
  ) -> Heard:
    c = self.config

    def dense(x, width, name):
      return nn.Dense(width, name=name)(nn.Dropout(c.dropout, deterministic=not train)(x))

    def branch(x, name):
      return dense(Standard(name=f"{name}_scale")(x) if c.standardise else x, EMOTION, name)

    image = picture(views.spectrogram, ranges.low_db, ranges.high_db, c.image, c.channels)
    sounds = (jnp.asarray(views.spectrogram) > SILENT_DB + 0.5).any(axis=1) | (not c.skip_silence)
    sounds = sounds.astype(jnp.float32)
    s = nn.relu(branch(self.look(image, sounds), "spectrogram"))
    m = nn.relu(branch(self.follow(views.mfcc, ranges, sounds, train), "mfcc"))
    steps = c.wav.steps(c.samples)
    attention = nn.relu(dense(jnp.concatenate([s, m], -1), steps, "attention"))  # raw, as Q53
    hidden, _ = Wav2Vec2(c.wav, name="listen")(views.waveform, train=train)
    weighed = jnp.einsum("bu,bud->bd", attention, hidden)
    if c.wav_pool == "statistics":
      weighed = jnp.concatenate([weighed, statistics(hidden, resampled(sounds, steps))], -1)
    w = nn.relu(branch(weighed, "waveform"))
    joint = jnp.concatenate([s, m, w], -1)
    f2 = nn.relu(dense(joint, EMOTION, "discriminate_0"))
    f3 = nn.relu(dense(f2, EMOTION, "discriminate_1"))
    logits = nn.Dense(self.labels, name="discriminate_2")(f3)
    tapped = {"F1": w, "F2": f2, "F3": f3}[c.tap]
    return Heard(w, f2, f3, logits, joint, nn.Dense(self.labels, name="tapped")(tapped))

  def look(self, x: Float[Array, "b h w c"], sounds: Float[Array, "b t"]) -> Float[Array, "b e"]:
    """AlexNet's convolutions, channels flattened first as torch does."""
    c, image = self.config, x
    shapes = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))  # kernel, stride, padding
    for i, (width, (kernel, stride, pad)) in enumerate(zip(c.convolutions, shapes, strict=True)):
      x = nn.relu(
        nn.Conv(width, (kernel, kernel), (stride, stride), padding=pad, name=f"look_{i}")(x)
      )
      if i in (0, 1, 4):
        x = nn.max_pool(x, (3, 3), (2, 2))
    if c.look_pool == "statistics":
      parts = (image[..., :1], x)
      return jnp.concatenate(
        [statistics(rows_as_channels(y), resampled(sounds, y.shape[2])) for y in parts], axis=-1
      )
    x = adaptive_average(x, c.pool)
    return x.transpose(0, 3, 1, 2).reshape(len(x), -1)

  def follow(
    self,
    mfcc: Float[Array | np.ndarray, "b t 40"],
    ranges: Ranges,
    sounds: Float[Array, "b t"],
    train: bool,
  ) -> Float[Array, "b e"]:
    """What the BiLSTM makes of the cepstra."""
    c = self.config
    if c.cepstra == "unit":
      lengths = jnp.linalg.norm(mfcc, axis=-1, keepdims=True)
      x = mfcc / jnp.maximum(lengths, 1e-6)
    else:
      x = (mfcc - ranges.mean[None, None]) / ranges.deviation[None, None]
    if c.deltas:
      edged = jnp.pad(x, ((0, 0), (2, 2), (0, 0)), mode="edge")
      x = jnp.concatenate([x, edged[:, 4:] - edged[:, :-4]], axis=-1)
    full = jnp.asarray(x)
    if c.lstm_stride > 1:
      steps = x.shape[1] // c.lstm_stride
      x = x[:, : steps * c.lstm_stride].reshape(len(x), steps, c.lstm_stride, -1).mean(axis=2)
    followed = BiLSTM(c.lstm, c.lstm_layers, c.lstm_dropout, name="follow")(x, train=train)
    if c.lstm_pool == "flatten":
      return followed.reshape(len(followed), -1)
    into = statistics(full, sounds)
    out = statistics(followed, resampled(sounds, followed.shape[1]))
    means, deviations = zip(jnp.split(into, 2, -1), jnp.split(out, 2, -1), strict=True)
    return jnp.concatenate([*means, *deviations], axis=-1)


class Standard(nn.Module):
  """x scale + offset; `distill.train` sets both from the training windows before it begins."""

  @nn.compact
  def __call__(self, x: Float[Array, "b e"]) -> Float[Array, "b e"]:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    offset = self.param("offset", nn.initializers.zeros, (x.shape[-1],))
    self.sow("intermediates", "raw", x)
    return x * scale[None] + offset[None]


def statistics(x: Float[Array, "b t d"], weight: Float[Array, "b t"]) -> Float[Array, "b 2d"]:
  """Mean and deviation over the steps that sound."""
  share = (weight / jnp.maximum(weight.sum(axis=1, keepdims=True), 1e-3))[..., None]
  mean = (share * x).sum(axis=1)
  variance = (share * jnp.square(x - mean[:, None])).sum(axis=1)
  return jnp.concatenate([mean, jnp.sqrt(variance + 1e-6)], axis=-1)


def rows_as_channels(x: Float[Array, "b h w c"]) -> Float[Array, "b w hc"]:
  return x.transpose(0, 2, 1, 3).reshape(len(x), x.shape[2], -1)


def resampled(sounds: Float[Array, "b t"], steps: int) -> Float[Array, "b n"]:
  """The share of each of fewer steps that sounds."""
  return adaptive_average(sounds[:, :, None, None], (steps, 1))[:, :, 0, 0]


class AligningNet(nn.Module):
  """Draws the heard emotion towards the one seen in the face (method.md B.3)."""

  width: int  # of the visual network's feature

  @nn.compact
  def __call__(self, joint: Float[Array, "b 384"]) -> Float[Array, "b v"]:
    return nn.Dense(self.width)(nn.relu(nn.Dense(256)(joint)))


def picture(
  spectrogram: Float[Array | np.ndarray, "b 200 t"],
  low: Float[Array | np.ndarray, " 200"],
  high: Float[Array | np.ndarray, " 200"],
  size: tuple[int, int],
  channels: int,
) -> Float[Array, "b h w c"]:
  """The spectrogram as the image AlexNet expects: low notes at the bottom (method.md B.1)."""
  span = jnp.maximum(high - low, 1e-6)
  unit = ((spectrogram - low[None, :, None]) / span[None, :, None]).clip(0.0, 1.0)
  # 8-bit steps (method.md B.1) are left out: they are below what the network can tell.
  image = jax.image.resize(unit[:, ::-1], (len(unit), *size), "bilinear")
  if channels == 3:
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
  else:
    mean, deviation = np.full(channels, 0.449), np.full(channels, 0.226)
  mean, deviation = mean.astype(np.float32), deviation.astype(np.float32)
  return (image[..., None] - mean[None, None, None]) / deviation[None, None, None]


def adaptive_average(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b p q c"]:
  """Means over floor(r n / p) .. ceil((r + 1) n / p) - 1, as torch's adaptive pooling."""

  def bins(n: int, parts: int) -> np.ndarray:
    weights = np.zeros((parts, n), np.float32)
    for r in range(parts):
      begin, end = r * n // parts, -(-(r + 1) * n // parts)
      weights[r, begin:end] = 1 / (end - begin)
    return weights

  rows, columns = bins(x.shape[1], size[0]), bins(x.shape[2], size[1])
  return jnp.einsum("ph,qw,bhwc->bpqc", rows, columns, x)


def initialise(config: EmotionConfig, labels: int, seed: int) -> dict:
  """Parameters as drawn, before any training."""
  steps = config.samples // 160
  views = Views(
    jnp.zeros((1, SPECTRUM_BINS, steps)),
    jnp.zeros((1, steps, CEPSTRA)),
    jnp.zeros((1, config.samples)),
  )
  zeros, ones = jnp.zeros(SPECTRUM_BINS), jnp.ones(SPECTRUM_BINS)
  ranges = Ranges(zeros, ones, zeros[:CEPSTRA], ones[:CEPSTRA])
  init = jax.jit(EmotionNet(labels, config).init)
  return init(random_key(seed), views, ranges)["params"]
