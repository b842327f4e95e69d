"""Every knob of an experiment, typed. Frozen and hashable, so jit can close over it.

Defaults are the paper's (method.md §0, C, D) where they are sound; a comment names the
official behaviour a field can bring back.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Planes:
  """A tri-plane encoder (method.md C.1)."""

  features: int = 16  # channels a plane
  resolution: int = 64  # of the coarsest scale
  multiples: tuple[int, ...] = (1, 2, 4, 8)  # of `resolution`, one a scale
  bound: float = 0.15  # metres; positions in [-bound, bound]^3


@dataclasses.dataclass(frozen=True)
class Motion:
  """The uncertainty-aware deformation field (method.md C.2 to C.6)."""

  audio_channels: int = 80  # d of the audio windows: 80 log-mel, 29 DeepSpeech, 1024 HuBERT
  audio_width: int = 16  # w
  audio_code: int = 32
  planes: Planes = Planes()
  emotion_planes: Planes = Planes(features=64, multiples=(1, 2, 4))
  members: int = 10  # T, ensemble members a modality
  hidden: int = 64
  latent: int = 48  # D
  features: int = 64  # of the fused code that the heads read
  ddof: int = 1  # of the members' spread: 1 as the official code, 0 the law of total variance
  log_var_limit: float = 10.0  # log-variances are clipped to +-this (official: not at all, Q3)
  still_heads: bool = True  # start every head at zero motion (official: rotation and scale jump, Q11)


@dataclasses.dataclass(frozen=True)
class Model:
  motion: Motion = Motion()
  audio: Literal["mel", "deepspeech", "hubert"] = "mel"  # which aud_*.npy of the subject
