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
from uajax.speech.features import CEPSTRA, SPECTRUM_BINS, Views
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
  lstm: int = 256
  lstm_layers: int = 2
  lstm_dropout: float = 0.5
  # What follows the BiLSTM: all its steps side by side (the paper), or mean and deviation over
  # time of what goes in and what comes out (far fewer weights, which little data needs).
  lstm_pool: Literal["flatten", "statistics"] = "flatten"
  # The BiLSTM's input: each frame brought to length 1 (the paper), or each coefficient to mean 0
  # and variance 1 over the training speech, which little data needs (c0 outweighs all else).
  cepstra: Literal["unit", "standard"] = "unit"
  wav: Wav2Vec2Config = Wav2Vec2Config()
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

    image = picture(views.spectrogram, ranges.low_db, ranges.high_db, c.image, c.channels)
    seen = self.look(image)
    s = nn.relu(dense(seen, EMOTION, "spectrogram"))
    if c.cepstra == "unit":
      lengths = jnp.linalg.norm(views.mfcc, axis=-1, keepdims=True)
      cepstra = views.mfcc / jnp.maximum(lengths, 1e-6)
    else:
      cepstra = (views.mfcc - ranges.mean[None, None]) / ranges.deviation[None, None]
    followed = BiLSTM(c.lstm, c.lstm_layers, c.lstm_dropout, name="follow")(cepstra, train=train)
    if c.lstm_pool == "flatten":
      followed = followed.reshape(len(followed), -1)
    else:
      both = jnp.concatenate([cepstra, followed], axis=-1)
      followed = jnp.concatenate([both.mean(axis=1), both.std(axis=1)], axis=-1)
    m = nn.relu(dense(followed, EMOTION, "mfcc"))
    steps = c.wav.steps(c.samples)
    attention = nn.relu(dense(jnp.concatenate([s, m], -1), steps, "attention"))  # raw, as Q53
    hidden, _ = Wav2Vec2(c.wav, name="listen")(views.waveform, train=train)
    weighed = jnp.einsum("bu,bud->bd", attention, hidden)
    w = nn.relu(dense(weighed, EMOTION, "waveform"))
    joint = jnp.concatenate([s, m, w], -1)
    f2 = nn.relu(dense(joint, EMOTION, "discriminate_0"))
    f3 = nn.relu(dense(f2, EMOTION, "discriminate_1"))
    logits = nn.Dense(self.labels, name="discriminate_2")(f3)
    tapped = {"F1": w, "F2": f2, "F3": f3}[c.tap]
    return Heard(w, f2, f3, logits, joint, nn.Dense(self.labels, name="tapped")(tapped))

  def look(self, x: Float[Array, "b h w c"]) -> Float[Array, "b e"]:
    """AlexNet's convolutions, channels flattened first as torch does."""
    shapes = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))  # kernel, stride, padding
    for i, (width, (kernel, stride, pad)) in enumerate(
      zip(self.config.convolutions, shapes, strict=True)
    ):
      x = nn.relu(
        nn.Conv(width, (kernel, kernel), (stride, stride), padding=pad, name=f"look_{i}")(x)
      )
      if i in (0, 1, 4):
        x = nn.max_pool(x, (3, 3), (2, 2))
    x = adaptive_average(x, self.config.pool)
    return x.transpose(0, 3, 1, 2).reshape(len(x), -1)


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
