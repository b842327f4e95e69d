"""The Style Net: the tone in which all is said, f_tone (method.md A.2).

A bidirectional LSTM over the mel windows of a whole recording, in order (the official code runs it
over the mini-batch instead, Q40), then three linear layers of which only the hidden ones are
activated and dropped out (officially the output too, Q41).

Axes: b recordings or chunks of them, t frames.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from uajax.priors.fit import FitConfig, Params
from uajax.speech.recurrent import BiLSTM
from uajax.types import EXPRESSION

_BUCKET = 256  # frames; recordings are padded to a multiple of it


@dataclasses.dataclass(frozen=True)
class StyleConfig:
  hidden: int = 640
  layers: int = 2
  lead: int = 0  # as in LipConfig
  dropout: float = 0.1
  chunk: int = 96  # frames of a training sequence
  fuse_dropout: float = 0.5
  fit: FitConfig = FitConfig(steps=10_000, batch=8)  # of Style Net and FuseNet together


class StyleNet(nn.Module):
  config: StyleConfig = StyleConfig()

  @nn.compact
  def __call__(
    self,
    mel: Float[Array, "b t 80 16"],
    valid: Bool[Array, "b t"] | None = None,
    *,
    train: bool = False,
  ) -> Float[Array, "b t 64"]:
    """f_tone from mel in [-4, 4]; frames that are not `valid` are padding."""
    c = self.config
    drop = nn.Dropout(c.dropout, deterministic=not train)
    x = mel.reshape(*mel.shape[:2], -1) / 4.0
    x = BiLSTM(c.hidden, c.layers, c.dropout)(x, valid, train=train)
    x = drop(nn.leaky_relu(nn.Dense(c.hidden)(x), 0.2))
    x = drop(nn.leaky_relu(nn.Dense(c.hidden // 2)(x), 0.2))
    return nn.Dense(EXPRESSION)(x)


def tone(
  params: Params, windows: Float[np.ndarray, "f 80 16"], config: StyleConfig
) -> Float[np.ndarray, "f 64"]:
  """f_tone of every frame of one recording."""
  frames = len(windows)
  short = -frames % _BUCKET
  padded = np.pad(windows, ((0, short), (0, 0), (0, 0)))
  valid = np.arange(frames + short) < frames
  return np.asarray(_tone(params, padded[None], valid[None], config))[0, :frames]


@functools.partial(jax.jit, static_argnames="config")
def _tone(params, mel, valid, config):
  return StyleNet(config).apply({"params": params}, mel, valid)
