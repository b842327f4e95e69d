"""What a step draws by chance: who is silent, and the noise on what is heard and felt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uajax import config, types
from uajax.models.motion import FACE_MODALITIES
from uajax.speech import features
from uajax.train import noise, step


def test_modalities_are_silent_as_often_as_asked_and_never_all_that_a_layer_has():
  experiment = config.demo()
  motion = dataclasses.replace(experiment.model.motion, modalities=("audio", "style"))
  model = dataclasses.replace(experiment.model, motion=motion)
  fewer = dataclasses.replace(experiment, model=model)
  draw = lambda experiment, stage: np.asarray(jax.vmap(
    lambda n: step._silent(experiment, stage, n, jax.random.key(0)))(jnp.arange(4000)))
  face = dataclasses.replace(experiment.face, silence=0.5)
  mouth = dataclasses.replace(experiment.mouth, silence=0.5)
  assert not draw(experiment, face).all(1).any()
  assert not draw(experiment, mouth)[:, :3].all(1).any()
  there = [FACE_MODALITIES.index(name) for name in ("audio", "style")]
  silent = draw(fewer, face)[:, there]
  assert not silent.all(1).any()
  np.testing.assert_allclose(silent.mean(0), 0.25, atol=0.03)
  assert step._silent(experiment, experiment.fuse, jnp.asarray(0), jax.random.key(0)) is None


def test_noise_makes_of_windows_what_it_would_have_made_of_the_sound(monkeypatch):
  rng = np.random.default_rng(3)
  tones = 0.1 * sum(np.sin(2 * np.pi * f * np.arange(32_000) / 16_000) for f in (300, 1200, 3000))
  hiss_db = -45.0
  loud = tones + rng.standard_normal(32_000) * 10 ** (hiss_db / 20)
  clean, noisy = (features.mel_windows(wav.astype(np.float32), 40)[5:35].transpose(0, 2, 1)
                  for wav in (tones, loud))
  monkeypatch.setattr(noise, "LEVELS_DB", (hiss_db, hiss_db))
  guess = np.asarray(noise.add(jnp.asarray(clean), 1.0, jax.random.key(0)))
  assert np.abs(noisy - clean).mean() > 0.2
  off = np.abs(guess.mean((0, 2)) - noisy.mean((0, 2)))
  assert off.mean() < 0.02 and off.max() < 0.06  # 1 and 3 dB
  np.testing.assert_array_equal(noise.add(jnp.asarray(clean), 0.0, jax.random.key(0)), clean)


def test_priors_and_emotion_are_blurred_frame_by_frame_and_nothing_else():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=(3, *shape)), jnp.float32)
  clear = types.Controls(draw(8, 5, 4), draw(6), draw(64), draw(64), draw(128))
  stage = dataclasses.replace(config.FACE, vague=0.5)
  blurred = lambda index, number: step._vaguely(
    stage, clear, jnp.asarray(index), jnp.asarray(number), jax.random.key(0))
  first = blurred([4, 9, 4], 7)
  np.testing.assert_array_equal(first.audio, clear.audio)
  np.testing.assert_array_equal(first.action_units, clear.action_units)
  noise = np.concatenate([first.f_exp - clear.f_exp, first.f_tone - clear.f_tone,
                          first.emotion - clear.emotion], 1)
  assert noise.std() == pytest.approx(0.5, rel=0.1) and abs(noise.mean()) < 0.1
  np.testing.assert_allclose(noise[0], noise[2], atol=1e-6)  # the same frame at the same step
  other = np.asarray(blurred([4, 9, 4], 8).f_exp - clear.f_exp)
  for a, b in ((noise[0], noise[1]), (noise[0, :64], noise[0, 64:128]), (noise[0, :64], other[0])):
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.4
