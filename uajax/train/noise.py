"""White noise in the speech that is learnt from: who never heard any cannot know what it costs.

Mel windows alone are covered: their bands say what noise would have made of them. Axes: ... any,
d bands.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uajax.speech import features
from uajax.types import SAMPLE_RATE_HZ

LEVELS_DB = (-75.0, -20.0)  # of full scale: hardly heard, and as loud as speech
_DB = 50.0  # of a mel window's unit (method.md A.0, by 4)
_FLUTTER_DB = 4.4  # spread of a noise's band about its mean
_REFERENCE_DB = -40.0


def add(windows: Float[Array, "... d w"], share: float, key) -> Float[Array, "... d w"]:
  """The windows with noise of a random level in them, with probability `share`.

  Args:
    windows: of mel, in [-1, 1].
  """
  k_whether, k_level, k_flutter = jax.random.split(key, 3)
  level = jax.random.uniform(k_level, minval=LEVELS_DB[0], maxval=LEVELS_DB[1])
  hiss = jnp.asarray(_bands())[:, None] + (level - _REFERENCE_DB) / _DB
  hiss = hiss.reshape((1,) * (windows.ndim - 2) + hiss.shape)
  hiss = hiss + _FLUTTER_DB / _DB * jax.random.normal(k_flutter, windows.shape)
  scale = np.log(10) * _DB / 10  # powers add up
  mixed = jnp.clip(jnp.logaddexp(scale * windows, scale * hiss) / scale, -1, 1)
  return jnp.where(jax.random.uniform(k_whether) < share, mixed, windows)


@functools.cache
def _bands() -> Float[np.ndarray, " d"]:
  """What white noise of the reference level makes of each band."""
  wav = np.random.default_rng(0).standard_normal(2 * SAMPLE_RATE_HZ) * 10 ** (_REFERENCE_DB / 20)
  return features.mel(wav.astype(np.float32)).mean(1) / 4
