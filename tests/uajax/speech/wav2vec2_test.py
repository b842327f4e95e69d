"""wav2vec2 and HuBERT against Hugging Face's and their definition; weights that do not fit."""

import json
import shutil

import jax
import numpy as np
import pytest

from tests.uajax.speech import tiny_model
from uajax.errors import UserError
from uajax.speech import wav2vec2


@pytest.fixture
def folder(shared, tmp_path):
  shutil.copy(shared("golden/speech/wav2vec2_tiny.safetensors"), tmp_path / "model.safetensors")
  shutil.copy(shared("golden/speech/wav2vec2_tiny_config.json"), tmp_path / "config.json")
  (tmp_path / "model.safetensors").chmod(0o644)
  (tmp_path / "config.json").chmod(0o644)
  return tmp_path


def test_agrees_with_hugging_face(shared, folder):
  golden = np.load(shared("golden/speech/wav2vec2_tiny_io.npz"))
  config, params = wav2vec2.load(folder)
  net = wav2vec2.Wav2Vec2(config)
  hidden, heard = jax.jit(net.apply)({"params": params}, golden["input_values"])
  np.testing.assert_allclose(hidden, golden["last_hidden_state"], atol=2e-5)
  np.testing.assert_allclose(heard, golden["extract_features"], atol=2e-5)


@pytest.mark.parametrize("model_type", ["hubert", "wav2vec2"])
@pytest.mark.parametrize("large", [False, True])
def test_both_layouts_compute_their_definition(tmp_path, model_type, large):
  tensors = tiny_model.write(tmp_path, model_type, large=large, torch=large)
  config, params = wav2vec2.load(tmp_path)
  wav = np.random.default_rng(1).normal(size=4000).astype(np.float32)
  hidden = wav2vec2.hidden(config, params, wav[None])
  truth = tiny_model.hidden(tensors, wav, large=large)
  assert truth.shape == (config.steps(4000), tiny_model.HIDDEN)
  np.testing.assert_allclose(hidden[0], truth, atol=2e-5)


def test_steps_of_the_base_model():
  assert wav2vec2.Wav2Vec2Config().steps(48_000) == 149
  assert wav2vec2.Wav2Vec2Config().steps(16_000) == 49


def test_weights_of_another_size_are_refused(folder):
  raw = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(raw | {"hidden_size": 96}))
  with pytest.raises(UserError, match="config and weights differ"):
    wav2vec2.load(folder)
  (folder / "config.json").write_text(json.dumps(raw | {"feat_extract_norm": "layer"}))
  with pytest.raises(UserError, match="conv_layers.*config and weights differ"):
    wav2vec2.load(folder)
  for strange in ({"model_type": "bert"}, {"hidden_act": "relu"}, {"conv_pos_batch_norm": True}):
    (folder / "config.json").write_text(json.dumps(raw | strange))
    with pytest.raises(UserError, match="not of the layout"):
      wav2vec2.load(folder)
  (folder / "model.safetensors").write_bytes(b"\x00" * 20)
  (folder / "config.json").write_text(json.dumps(raw))
  with pytest.raises(UserError, match="cannot be read as safetensors"):
    wav2vec2.load(folder)
  (folder / "model.safetensors").unlink()
  with pytest.raises(UserError, match="neither model.safetensors nor pytorch_model.bin"):
    wav2vec2.load(folder)
