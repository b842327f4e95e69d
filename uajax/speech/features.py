"""What the networks hear: speech as spectra, cut into windows on the video's clock.

Speech is float mono at 16 kHz in [-1, 1]. Video frame i is taken at (i + 0.5) / 25 s.
Two families live here: mel windows of 200 ms for the avatar and the priors (method.md A.0), and
spectrogram, MFCC and waveform views of seconds for emotion (method.md B.1, B.3).

Axes: n mel steps (80 a second), t spectral steps (100 a second), s samples, f video frames,
m windows, w steps of a window, d channels of a step.
librosa is imported where it is called: reading this module's names costs nothing without it.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from uajax.errors import UserError
from uajax.types import FPS, NEIGHBOURS, SAMPLE_RATE_HZ

MEL_HOP = 200  # samples: 80 mel steps a second
MEL_BANDS = 80
WINDOW = 16  # mel steps, 200 ms
SILENCE = -4.0  # the lowest value of `mel`
HOP = 160  # samples: 100 spectral steps a second
SPECTRUM_BINS = 200  # of 401: up to 3980 Hz
SILENT_DB = -80.0  # lowest value of `spectrogram`
CEPSTRA = 40


class Views(NamedTuple):
  """Three views of speech for the emotion network: of a recording, or of m windows of it."""

  spectrogram: Float[Array | np.ndarray, "*m 200 t"]  # dB below the recording's peak, -80..0
  mfcc: Float[Array | np.ndarray, "*m t 40"]
  waveform: Float[Array | np.ndarray, "*m s"]  # pre-emphasised; windows have mean 0 and variance 1


class Peaks(NamedTuple):
  """The loudest that a recording gets; its views are told relative to that."""

  magnitude: float  # of a bin of `spectrogram`, before it is told in dB
  band_db: float  # of a mel band under `mfcc`


def frame_count(samples: int) -> int:
  """Video frames that `samples` of speech fill: every frame begun counts, none is cut short."""
  return -(-samples * FPS // SAMPLE_RATE_HZ)


def preemphasize(wav: Float[np.ndarray, " s"]) -> Float[np.ndarray, " s"]:
  """y[n] = x[n] - 0.97 x[n-1], with x[-1] = 0."""
  wav = checked(wav)
  return wav - 0.97 * np.concatenate([np.zeros(1, np.float32), wav[:-1]])


def checked(wav: Float[np.ndarray, " s"]) -> Float[np.ndarray, " s"]:
  """`wav` as float32 if it is speech at all.

  Raises:
    UserError: it is empty, not mono, or holds NaN or infinity.
  """
  wav = np.asarray(wav, np.float32)
  if wav.ndim != 1:
    raise UserError(f"speech has shape {wav.shape}: give one channel, float samples at 16 kHz")
  if wav.size < HOP:
    raise UserError(f"speech has only {wav.size} samples at 16 kHz: give at least 10 ms of it")
  if not np.isfinite(wav).all():
    raise UserError("speech holds NaN or infinite samples: decode the recording anew")
  return wav


def mel(wav: Float[np.ndarray, " s"]) -> Float[np.ndarray, "80 n"]:
  """Normalised log-mel spectrogram in [-4, 4]; n = 1 + s // 200 (method.md A.0).

  50 ms Hann windows every 12.5 ms, centred, zero-padded at the ends; 80 Slaney bands from 55 to
  7600 Hz; 100 dB span the range.
  """
  import librosa

  spectrum = librosa.stft(
    preemphasize(wav), n_fft=800, hop_length=MEL_HOP, win_length=800, pad_mode="constant"
  )
  basis = librosa.filters.mel(
    sr=SAMPLE_RATE_HZ, n_fft=800, n_mels=MEL_BANDS, fmin=55.0, fmax=7600.0
  )
  db = 20.0 * np.log10(np.maximum(1e-5, basis @ np.abs(spectrum))) - 20.0
  return np.clip(8.0 * (db + 100.0) / 100.0 - 4.0, -4.0, 4.0).astype(np.float32)


def mel_windows(wav: Float[np.ndarray, " s"], frames: int) -> Float[np.ndarray, "f 16 80"]:
  """The avatar's own audio windows (`aud_mel.npy`), mel / 4 in [-1, 1].

  Window i is the 16 mel steps centred on frame i's time, to half a step (6 ms): from
  round(3.2 i - 5.9). What lies outside the recording is silence, -1.
  """
  starts = (32 * np.arange(frames) - 54) // 10  # round(3.2 (i + 0.5) - 7.5), in whole numbers
  return gather(mel(wav), starts).transpose(0, 2, 1) / 4.0


def lip_windows(
  wav: Float[np.ndarray, " s"], frames: int, *, lead: int = 0
) -> Float[np.ndarray, "f 80 16"]:
  """Mel windows of the prior networks, in [-4, 4]; see `lip_starts` for `lead`."""
  spectrum = mel(wav)
  indices = lip_indices(frames, spectrum.shape[1], lead=lead)
  if spectrum.shape[1] < WINDOW:  # a recording shorter than one window ends in silence
    spectrum = np.pad(spectrum, ((0, 0), (0, WINDOW - spectrum.shape[1])), constant_values=SILENCE)
  return spectrum[:, indices].transpose(1, 0, 2)


def lip_starts(frames: int, steps: int, *, lead: int = 0) -> Int[np.ndarray, " f"]:
  """Mel step where each frame's window begins in a recording of `steps` (method.md A.0, table).

  lead=0: int(3.2 i), but never later than the last 16 steps (Wav2Lip, Style Net).
  lead=2: two frames earlier, so that the frame lies near the window's middle: int(3.2 (i - 2)),
  rounded toward zero; a window may reach out of the recording (Audio2Exp).
  """
  shifted = 16 * (np.arange(frames) - lead)
  starts = np.sign(shifted) * (np.abs(shifted) // 5)
  return np.minimum(starts, max(steps, WINDOW) - WINDOW) if lead == 0 else starts


def lip_indices(frames: int, steps: int, *, lead: int = 0) -> Int[np.ndarray, "f 16"]:
  """Mel steps that each frame's window takes of `steps`, clamped to the recording."""
  at = lip_starts(frames, steps, lead=lead)[:, None] + np.arange(WINDOW)[None, :]
  return np.clip(at, 0, max(steps, WINDOW) - 1)


def gather(
  spectrum: Float[np.ndarray, "d n"], starts: Int[np.ndarray, " f"], width: int = WINDOW
) -> Float[np.ndarray, "f d w"]:
  """`width` steps from each start; steps outside the recording are silence."""
  before = max(0, -int(starts.min(initial=0)))
  after = max(0, int(starts.max(initial=0)) + width - spectrum.shape[1])
  padded = np.pad(spectrum, ((0, 0), (before, after)), constant_values=SILENCE)
  return padded[:, starts[:, None] + before + np.arange(width)[None, :]].transpose(1, 0, 2)


def neighbouring(windows: Float[np.ndarray, "f w d"], i: int) -> Float[np.ndarray, "8 d w"]:
  """The windows of frames i-4 .. i+3, channels first; zeros where there is no frame (D.1)."""
  rows = np.arange(i - NEIGHBOURS // 2, i + NEIGHBOURS // 2)
  inside = (rows >= 0) & (rows < len(windows))
  taken = windows[np.where(inside, rows, 0)] * inside[:, None, None]
  return taken.transpose(0, 2, 1).astype(windows.dtype)


def spectrogram(
  wav: Float[np.ndarray, " s"], peaks: Peaks | None = None
) -> Float[np.ndarray, "200 t"]:
  """dB below the loudest bin of the recording, in [-80, 0]; t = 1 + s // 160 (method.md B.1).

  40 ms Hamming windows every 10 ms of pre-emphasised speech; bins up to 3980 Hz. Where nothing
  sounds at all everything is -80 dB, not 0. `peaks` are the recording's where `wav` is a part.
  """
  import librosa

  magnitude = _magnitude(wav)
  loudest: Any = magnitude.max() if peaks is None else np.float32(peaks.magnitude)
  if loudest < 1e-5:
    return np.full((SPECTRUM_BINS, magnitude.shape[1]), SILENT_DB, np.float32)
  db = librosa.amplitude_to_db(magnitude, ref=loudest, amin=1e-5, top_db=None)
  return np.maximum(db[:SPECTRUM_BINS], SILENT_DB).astype(np.float32)


def _magnitude(wav: Float[np.ndarray, " s"]) -> Float[np.ndarray, "401 t"]:
  import librosa

  return np.abs(
    librosa.stft(
      preemphasize(wav),
      n_fft=800,
      hop_length=HOP,
      win_length=640,
      window="hamming",
      pad_mode="constant",
    )
  )


def mfcc(wav: Float[np.ndarray, " s"], peaks: Peaks | None = None) -> Float[np.ndarray, "t 40"]:
  """Mel cepstra every 10 ms of pre-emphasised speech; t = 1 + s // 160 (method.md B.1).

  Bands are cut 80 dB below the recording's loudest; `peaks` as in `spectrogram`.
  """
  import librosa

  bands = _bands_db(wav)
  loudest = bands.max() if peaks is None else np.float32(peaks.band_db)
  bands = np.maximum(bands, loudest + SILENT_DB)
  return librosa.feature.mfcc(S=bands, n_mfcc=CEPSTRA).T.astype(np.float32)


def _bands_db(wav: Float[np.ndarray, " s"]) -> Float[np.ndarray, "128 t"]:
  import librosa

  power = librosa.feature.melspectrogram(
    y=preemphasize(wav),
    sr=SAMPLE_RATE_HZ,
    n_fft=2048,
    hop_length=HOP,
    n_mels=128,
    htk=True,
    pad_mode="constant",
  )
  return librosa.power_to_db(power, top_db=None)


def peaks(wav: Float[np.ndarray, " s"], piece_s: int = 40) -> Peaks:
  """The peaks of a recording of any length, searched for piece by piece.

  Pieces overlap by a second at either side, so that no step that counts looks beyond them.
  """
  piece, margin = piece_s * SAMPLE_RATE_HZ, SAMPLE_RATE_HZ
  magnitude, band_db = 0.0, -np.inf
  for begin in range(0, max(len(wav) - HOP, 1), piece):
    start = max(begin - margin, 0)
    part = wav[start : begin + piece + margin]
    skip = (begin - start) // HOP
    steps = slice(skip, skip + piece // HOP + 1)
    magnitude = max(magnitude, float(_magnitude(part)[:, steps].max()))
    band_db = max(band_db, float(_bands_db(part)[:, steps].max()))
  return Peaks(magnitude, band_db)


def views(wav: Float[np.ndarray, " s"], peaks: Peaks | None = None) -> Views:
  """The three views of a whole recording, or of a part of one with those `peaks`."""
  return Views(spectrogram(wav, peaks), mfcc(wav, peaks), preemphasize(wav))


def cut(whole: Views, starts_s: Float[np.ndarray, " m"], window_s: float) -> Views:
  """Windows of `window_s` seconds of a recording's views, one for each start.

  What lies outside the recording is padded on the side where it is missing, alike in all three
  views: -80 dB, the edge's cepstra, zero samples (Q50, Q51).
  """
  steps = round(window_s * SAMPLE_RATE_HZ) // HOP
  t = np.round(np.asarray(starts_s) * (SAMPLE_RATE_HZ / HOP)).astype(np.int64)
  at = t[:, None] + np.arange(steps)[None, :]
  last = whole.mfcc.shape[0] - 1
  clamped = np.clip(at, 0, last)
  spectra = np.where(
    (at == clamped)[:, None, :], whole.spectrogram[:, clamped].transpose(1, 0, 2), SILENT_DB
  )
  samples = HOP * t[:, None] + np.arange(HOP * steps)[None, :]
  inside = (samples >= 0) & (samples < whole.waveform.size)
  waves = whole.waveform[np.clip(samples, 0, whole.waveform.size - 1)]
  # As the wav2vec2 processor does: each window to mean 0, variance 1, over what was recorded.
  heard = np.maximum(inside.sum(1, keepdims=True), 1)
  mean = np.where(inside, waves, 0).sum(1, keepdims=True) / heard
  deviation = np.where(inside, waves - mean, 0)
  variance = np.square(deviation).sum(1, keepdims=True) / heard
  waves = deviation / np.sqrt(variance + 1e-7)
  return Views(spectra.astype(np.float32), whole.mfcc[clamped], waves.astype(np.float32))


def segments(wav: Float[np.ndarray, " s"], window_s: float = 3.0) -> Views:
  """Consecutive windows of an utterance, the last padded at its end (method.md B.1).

  A remainder under half a second is dropped (Q55), unless it is all there is.
  """
  seconds = checked(wav).size / SAMPLE_RATE_HZ
  whole = int(seconds // window_s)
  remainder = seconds - whole * window_s
  count = whole + (remainder >= 0.5 or whole == 0)
  return cut(views(wav), np.arange(count) * window_s, window_s)


def centres(frames: int, stride: int = 5) -> Int[np.ndarray, " m"]:
  """The frames at which emotion is heard: every `stride`-th, and the last."""
  return np.unique(np.append(np.arange(0, frames, stride), frames - 1))


def centred(whole: Views, at: Int[np.ndarray, " m"], window_s: float = 3.0) -> Views:
  """Windows centred on the times of the frames `at` (method.md B.3)."""
  return cut(whole, (np.asarray(at) + 0.5) / FPS - window_s / 2, window_s)
