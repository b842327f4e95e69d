"""Every way to hear: windows on the video's clock, and the same encoder again or none."""

import json

import numpy as np
import pytest

from tests.uajax.speech import tiny_model
from uajax.errors import UserError
from uajax.speech import encoders


def noise(seconds: float, seed: int = 0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return (0.1 * rng.normal(size=round(16_000 * seconds))).astype(np.float32)


def test_hubert_windows_are_its_steps_two_a_frame_at_the_frames_time(tmp_path):
  tensors = tiny_model.write(tmp_path, large=True)
  made = encoders.make("hubert", tmp_path)
  wav = noise(1.0) + 0.3
  windows = made.windows(wav, 25)
  assert windows.shape == (25, 2, tiny_model.HIDDEN) and windows.dtype == np.float32
  wav = (wav - wav.mean()) / wav.std()
  truth = tiny_model.hidden(tensors, np.pad(wav, (0, 80)), large=True)
  np.testing.assert_allclose(windows.reshape(50, -1), truth, atol=5e-5)
  # Without normalisation where the model was trained without.
  (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false}')
  loud = encoders.make("hubert", tmp_path).windows(noise(1.0) + 0.3, 25)
  truth = tiny_model.hidden(tensors, np.pad(noise(1.0) + 0.3, (0, 80)), large=True)
  np.testing.assert_allclose(loud.reshape(50, -1), truth, atol=5e-5)


def test_long_speech_is_heard_in_pieces_without_seams(tmp_path, monkeypatch):
  tensors = tiny_model.write(tmp_path, large=True)
  # Attention that looks everywhere alike would see where a piece ends: let it see nothing.
  for name in tensors:
    if "attention.out_proj" in name:
      tensors[name][:] = 0
  import safetensors.numpy

  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  made = encoders.make("hubert", tmp_path)
  wav = noise(3.9)
  whole = made.windows(wav, 98)  # the last frame is not filled
  monkeypatch.setattr(encoders, "_PIECE", 80)
  monkeypatch.setattr(encoders, "_MARGIN", 8)
  pieces = made.windows(wav, 98)
  assert pieces.shape == (98, 2, tiny_model.HIDDEN)
  np.testing.assert_allclose(pieces, whole, atol=1e-4)


def test_the_recorded_encoder_is_made_again_and_no_other(tmp_path):
  folder, weights, other = (tmp_path / name for name in ("extractors", "weights", "other"))
  tiny_model.write(weights, "wav2vec2")
  tiny_model.write(other, "wav2vec2", seed=1)
  folder.mkdir()
  made = encoders.make("wav2vec2", weights)
  file = folder / encoders.record_name("wav2vec2")
  file.write_text(json.dumps(encoders.record(made)))
  again = encoders.recalled(folder, "wav2vec2")
  np.testing.assert_array_equal(again.windows(noise(0.2), 5), made.windows(noise(0.2), 5))
  with pytest.raises(UserError, match="was heard with wav2vec2 .*, this is wav2vec2"):
    encoders.recalled(folder, "wav2vec2", other)
  weights.rename(tmp_path / "moved")
  with pytest.raises(UserError, match="is gone: .*--audio-weights"):
    encoders.recalled(folder, "wav2vec2")
  assert encoders.recalled(folder, "wav2vec2", tmp_path / "moved").made_with["model"]
  file.write_text("{")
  with pytest.raises(UserError, match="damaged"):
    encoders.recalled(folder, "wav2vec2")


def test_what_cannot_be_made_is_said_in_one_line_with_the_remedy(tmp_path):
  cases = [
    (("deepspeech", None), "aud_ds.npy.*--audio-windows"),
    (("hubert", None), "HuBERT features want weights: .*--audio-weights"),
    (("mel", tmp_path), "want no weights"),
    (("hubert", tmp_path), "config.json"),
  ]
  for arguments, words in cases:
    with pytest.raises(UserError, match=words) as caught:
      encoders.make(*arguments)
    assert "\n" not in str(caught.value)
  tiny_model.write(tmp_path, "wav2vec2")
  with pytest.raises(UserError, match="holds a wav2vec2 model: --audio hubert wants hubert"):
    encoders.make("hubert", tmp_path)
  with pytest.raises(UserError, match=r"\(4, 16, 80\), not \[frames, 16, 29\]"):
    encoders.check(np.zeros((4, 16, 80)), "deepspeech", "a.npy")
  assert encoders.check(np.zeros((4, 2, 768)), "hubert", "a.npy").shape == (4, 2, 768)


def test_silence_is_what_is_heard_beyond_the_end():
  mel = encoders.make("mel").windows(noise(0.4), 20)
  assert (mel[15:] == -1).all() and mel[4].max() > -1
