"""Phone posteriors: probabilities, on the clock, the same whatever the pieces."""

import sys

import numpy as np
import pytest

from uajax import media
from uajax.errors import UserError
from uajax.speech import encoders, phones


@pytest.fixture(scope="module")
def obama(shared):
  pytest.importorskip("pocketsphinx")
  return media.read_audio(shared("data/clips/obama_20s.mp4"))[: 8 * 16_000]


@pytest.fixture(scope="module")
def likely(obama):
  return phones.posteriors(obama)


def test_words_are_heard(likely):
  assert likely.shape == (800, 42) and likely.dtype == np.float32
  np.testing.assert_allclose(likely.sum(1), 1, atol=1e-5)
  assert "pocketsphinx" in phones.require()
  # "... is, always" and a pause between 2.96 and 3.48 s
  best = [phones.PHONES[p] for p in likely.argmax(1)]
  assert best[300:340].count("SIL") == 40
  assert best[0:100].count("SIL") < 20
  assert len({*best}) > 20 and 0.6 < likely.max(1).mean() < 0.95


def test_pieces_leave_no_seams(obama, likely, monkeypatch):
  monkeypatch.setattr(phones, "_PIECE_S", 5.0)
  apart = np.abs(phones.posteriors(obama) - likely).sum(1) / 2
  # The level of the whole recording is taken out before it is scored, hence not quite the same.
  assert apart.mean() < 0.12 and apart[390:410].mean() < 0.3


def test_windows_are_centred_on_their_frames(obama):
  wav = np.zeros(32_000, np.float32)
  wav[15_680:16_960] = obama[40_000:41_280]  # 80 ms about 1.02 s, frame 25's time
  windows = encoders.make("phones").windows(wav, 50)
  assert windows.shape == (50, 16, 42)
  heard = 1 - windows[..., phones.SILENCE]
  centre = (heard[25] * np.arange(16)).sum() / heard[25].sum()
  assert abs(centre - 7.5) < 1.5
  assert heard[0, :7].max() == 0 and heard[49, 10:].max() == 0  # beyond the ends


def test_without_pocketsphinx_the_remedy_is_said(monkeypatch):
  monkeypatch.setitem(sys.modules, "pocketsphinx", None)
  with pytest.raises(UserError, match="pip install 'pocketsphinx"):
    encoders.make("phones")


def test_scores_kept_in_another_way_are_not_misread():
  for blob in (b"s3\nn_sen 5\nendhdr\n" + b"\x44\x33\x22\x11" + bytes(24), b"endhdr\n" + bytes(40)):
    with pytest.raises(UserError, match="in another way"):
      phones._read_scores(blob, 2)
