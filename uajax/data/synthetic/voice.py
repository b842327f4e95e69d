"""A voice from nothing: glottal pulses and noise through moving formants.

The source-filter model of Klatt's synthesiser, with the vocal tract applied to overlapping
short spectra instead of by recursive filters, so that a whole sentence is a few array
operations. Axes: n samples, s steps of 5 ms, b frequency bins.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from uajax.types import SAMPLE_RATE_HZ

STEP_S = 0.005
_HOP = round(STEP_S * SAMPLE_RATE_HZ)
_WINDOW = 4 * _HOP
_FFT = 1024  # long enough for the narrowest formant to ring out
_BINS_HZ = np.fft.rfftfreq(_FFT, 1 / SAMPLE_RATE_HZ)
_BANDWIDTHS_HZ = (70.0, 95.0, 140.0, 220.0, 280.0, 350.0, 420.0, 500.0)
_UPPER_HZ = (3500.0, 4500.0, 5500.0, 6500.0, 7500.0)  # the formants that hardly move


class Tract(NamedTuple):
  """What the speaker does, at steps of `STEP_S`."""

  f0_hz: Float[np.ndarray, " s"]
  formants_hz: Float[np.ndarray, "s 3"]
  voicing: Float[np.ndarray, " s"]
  breath: Float[np.ndarray, " s"]
  hiss: Float[np.ndarray, " s"]
  hiss_hz: Float[np.ndarray, "s 2"]  # centre, bandwidth
  tilt_db: Float[np.ndarray, " s"]  # at 3 kHz: positive is a softer, duller voice


def speak(
  tract: Tract, rng: np.random.Generator, *, stature: float = 1.0
) -> Float[np.ndarray, " n"]:
  """The sound pressure, float64, not yet scaled; n = s * 80.

  `stature` divides the formants of the table (1 for the reference speaker, less for a shorter
  vocal tract).
  """
  steps = len(tract.f0_hz)
  n = steps * _HOP
  pulses = _glottis(np.repeat(tract.f0_hz, _HOP), rng)
  noise = rng.standard_normal((2, n))
  grain = 0.5 + 0.5 * np.abs(pulses) / max(np.abs(pulses).max(), 1e-9)  # breath comes in pulses
  source = _glide(tract.voicing) * pulses + _glide(tract.breath) * noise[0] * grain

  formants = _formants(tract, stature)
  tilt = 10 ** (-tract.tilt_db[:, None] * (_BINS_HZ / 3000)[None, :].clip(max=2) / 20)
  centre, width = tract.hiss_hz[:, :1], tract.hiss_hz[:, 1:]
  band = 1 / (1 + ((_BINS_HZ[None, :] - centre) / (0.5 * width)) ** 2)
  return _shape(source, formants * tilt) + _shape(_glide(tract.hiss) * noise[1], band)


def _glottis(f0_hz: Float[np.ndarray, " n"], rng) -> Float[np.ndarray, " n"]:
  """Derivative of the glottal flow t^2 - t^3 over an open phase of 60 %, with jitter, shimmer."""
  n = len(f0_hz)
  knots = np.arange(0, n + 160, 160)
  wander = np.interp(np.arange(n), knots, rng.standard_normal(len(knots)))
  phase = np.cumsum(f0_hz * (1 + 0.012 * wander)) / SAMPLE_RATE_HZ
  cycle = phase.astype(int)
  x = (phase - cycle) / 0.6
  shimmer = 1 + 0.04 * rng.standard_normal(cycle[-1] + 1)[cycle]
  pulse = np.where(x < 1, 2 * x - 3 * x**2, 0.0) * shimmer
  # the corner at closure folds over the Nyquist frequency: a two-point mean takes the worst
  return 0.5 * (pulse + np.concatenate([[0.0], pulse[:-1]]))


def _formants(tract: Tract, stature: float) -> np.ndarray:
  """Cascade of second-order resonators, unit gain at 0 Hz, [s b] complex."""
  upper = np.broadcast_to(np.array(_UPPER_HZ), (len(tract.f0_hz), len(_UPPER_HZ)))
  centres = np.concatenate([tract.formants_hz, upper], axis=1) / stature
  s = (2j * np.pi * _BINS_HZ)[None, :]
  gain = np.ones((len(centres), len(_BINS_HZ)), complex)
  for k, bandwidth in enumerate(_BANDWIDTHS_HZ):
    pole = -np.pi * bandwidth + 2j * np.pi * centres[:, k : k + 1]
    gain *= np.abs(pole) ** 2 / ((s - pole) * (s - pole.conj()))
  return gain


def _shape(source: np.ndarray, gain: np.ndarray) -> np.ndarray:
  """Filters `source` by the response of each step, windows overlapping by three quarters."""
  steps = len(gain)
  window = np.hanning(_WINDOW + 1)[:-1] / 2
  padded = np.concatenate([np.zeros(_WINDOW // 2), source, np.zeros(_WINDOW)])
  frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[: steps * _HOP : _HOP]
  shaped = np.fft.irfft(np.fft.rfft(frames * window[None, :], _FFT) * gain, _FFT)
  # overlap-add by blocks of one hop
  blocks = -(-_FFT // _HOP)
  shaped = np.pad(shaped, ((0, 0), (0, blocks * _HOP - _FFT))).reshape(steps, blocks, _HOP)
  out = np.zeros((steps + blocks, _HOP))
  for k in range(blocks):
    out[k : k + steps] += shaped[:, k]
  out = out.reshape(-1)
  return out[_WINDOW // 2 : _WINDOW // 2 + steps * _HOP]


def _glide(steps: np.ndarray) -> np.ndarray:
  """Values at steps to values at samples, linear between the steps' centres."""
  at = (np.arange(len(steps)) + 0.5) * _HOP
  return np.interp(np.arange(len(steps) * _HOP), at, steps)
