"""Speech features: the values and the clock that everything downstream relies on."""

import numpy as np
import pytest

from uajax.errors import UserError
from uajax.speech import features


def tone(hz: float, seconds: float, gain: float = 0.5) -> np.ndarray:
  t = np.arange(int(16_000 * seconds)) / 16_000
  return (gain * np.sin(2 * np.pi * hz * t)).astype(np.float32)


def test_mel_of_a_tone_peaks_in_its_band_at_its_level():
  wav = tone(1000.0, 1.0)
  spectrum = features.mel(wav)
  assert spectrum.shape == (80, 1 + wav.size // 200)
  assert spectrum.min() >= -4 and spectrum.max() <= 4
  # Slaney bands: 55..7600 Hz, linear below 1 kHz at 15 mel; 1000 Hz is mel 15.
  top = 15 + 27 * np.log(7.6) / np.log(6.4)
  low = 55 * 3 / 200
  band = (15 - low) / (top - low) * 81 - 1
  assert abs(int(spectrum[:, 40].argmax()) - band) <= 1
  quieter = features.mel(wav / 10)
  # 20 dB less is 1.6 less on the normalised scale, wherever the floor is not touched.
  np.testing.assert_allclose(spectrum[:, 40].max() - quieter[:, 40].max(), 1.6, atol=0.01)


def test_silence_is_the_lowest_value_everywhere():
  silence = np.zeros(16_000, np.float32)
  assert (features.mel(silence) == features.SILENCE).all()
  assert (features.mel_windows(silence, 25) == -1).all()
  assert (features.spectrogram(silence) == features.SILENT_DB).all()


def test_window_tables():
  # method.md A.0: the forward row ends on the last 16 steps, the centred row clamps each step.
  forward = features.lip_indices(25, 81)
  assert forward[:4, 0].tolist() == [0, 3, 6, 9]
  assert forward[20, 0] == 64 and forward[21, 0] == 65 and forward[24].tolist() == [*range(65, 81)]
  centred = features.lip_indices(25, 81, lead=2)
  assert centred[0].tolist() == [0] * 6 + [*range(10)]
  assert centred[1, :5].tolist() == [0, 0, 0, 0, 1]  # int(-3.2) = -3, toward zero
  assert centred[2, 0] == 0 and centred[24, 0] == 70 and centred[24, -1] == 80


def test_avatar_windows_are_centred_on_their_frames():
  wav = np.zeros(32_000, np.float32)
  wav[int(16_000 * 1.02)] = 1.0  # a click at frame 25's time, (25 + 0.5) / 25 s
  windows = features.mel_windows(wav, 50)
  assert windows.shape == (50, 16, 80) and windows.dtype == np.float32
  loud = np.flatnonzero(windows[25].mean(1) > -1)
  assert abs(loud.mean() - 7.5) <= 0.6
  assert (windows[10] == -1).all()
  assert (windows[20].mean(1) > -1).any() == False  # noqa: E712  200 ms later, out of sight


def test_frame_count_covers_the_sound():
  assert features.frame_count(0) == 0
  assert features.frame_count(640) == 1
  assert features.frame_count(641) == 2
  assert features.frame_count(16_000 * 12) == 300


def test_neighbouring_pads_with_zeros_at_both_ends():
  windows = np.ones((6, 16, 80), np.float32) * np.arange(1, 7, dtype=np.float32)[:, None, None]
  assert features.neighbouring(windows, 0)[:, 0, 0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
  last = features.neighbouring(windows, 5)
  assert last.shape == (8, 80, 16)
  assert last[:, 0, 0].tolist() == [2, 3, 4, 5, 6, 0, 0, 0]


def test_emotion_views_have_the_papers_shapes():
  wav = tone(300.0, 3.0) + 0.01 * np.random.default_rng(0).normal(size=48_000).astype(np.float32)
  whole = features.views(wav)
  assert whole.spectrogram.shape == (200, 301) and whole.mfcc.shape == (301, 40)
  assert whole.spectrogram.max() <= 0 and whole.spectrogram.min() >= -80
  assert int(whole.spectrogram[:, 100].argmax()) == 15  # 300 Hz in bins of 20 Hz
  cuts = features.segments(wav)  # exactly 3 s: one segment, no empty second one (Q55)
  assert [x.shape for x in cuts] == [(1, 200, 300), (1, 300, 40), (1, 48_000)]
  assert len(features.segments(tone(300.0, 3.6)).mfcc) == 2
  assert len(features.segments(tone(300.0, 3.4)).mfcc) == 1
  assert len(features.segments(tone(300.0, 0.2)).mfcc) == 1


def test_padding_lies_on_the_same_side_in_every_view():
  wav = tone(300.0, 1.0)
  cuts = features.centred(features.views(wav), np.array([0, 24]), 1.0)
  first, last = (features.Views(*(x[i] for x in cuts)) for i in (0, 1))
  assert (first.spectrogram[:, :48] == -80).all() and first.spectrogram[:, 52:].max() > -5
  assert (first.waveform[:7600] == 0).all() and np.abs(first.waveform[8400:]).max() > 1
  assert (last.spectrogram[:, 54:] == -80).all() and (last.waveform[8400:] == 0).all()
  assert (first.mfcc[:48] == first.mfcc[48]).all()
  np.testing.assert_allclose(first.waveform[7680:].std(), 1.0, atol=0.05)


def test_what_is_not_speech_is_refused():
  for bad in (np.zeros(0), np.zeros((2, 16_000)), np.full(16_000, np.nan)):
    with pytest.raises(UserError):
      features.mel(bad)
