"""Whether figures about the uncertainty say what they claim to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.uajax import tiny_run
from tests.uajax.data import subject_folder
from uajax import doubt, media
from uajax.avatar import acquaint
from uajax.data import synthetic
from uajax.errors import UserError
from uajax.models.motion import FACE_MODALITIES, FaceMotion
from uajax.speech import features
from uajax.types import ACTION_UNITS, Controls


def test_a_map_that_knows_its_errors_is_told_from_one_that_does_not():
  rng = np.random.default_rng(0)
  truth = rng.integers(60, 190, (20, 30, 3), dtype=np.uint8)
  wrong = rng.integers(0, 60, (20, 30))
  image = (truth + wrong[..., None]).astype(np.uint8)
  head = np.ones((20, 30), bool)
  head[:, :5] = False
  knows = doubt.compare((wrong / 7.0) ** 2, image, truth, head)  # ranks: any rising scale
  assert knows["rank_correlation"] > 0.999 and knows["error_ratio"] > 1.7
  reverse = doubt.compare(60.0 - wrong, image, truth, head)
  assert reverse["rank_correlation"] < -0.999 and reverse["error_ratio"] < 0.3
  blind = doubt.compare(rng.uniform(size=(20, 30)), image, truth, head)
  assert abs(blind["rank_correlation"]) < 0.2
  np.testing.assert_allclose(knows["error"], wrong[head].mean(), rtol=1e-5)


@pytest.mark.parametrize("name", ["white", "hum"])
def test_noise_has_the_power_that_was_asked_for(name):
  wav = (0.05 * np.sin(np.arange(32_000) / 9)).astype(np.float32)
  noise = doubt.make_noise(name, len(wav), np.random.default_rng(1))
  added = doubt.with_noise(wav, noise, 10.0) - wav
  assert abs(10 * np.log10(np.mean(wav**2) / np.mean(added**2)) - 10) < 0.1
  assert np.abs(doubt.with_noise(20 * wav, noise, 0.0)).max() <= 1


def test_a_recording_serves_as_noise_unless_it_is_silent(tmp_path):
  rng = np.random.default_rng(2)
  media.write_wav(tmp_path / "babble.wav", 0.1 * rng.standard_normal(8_000))
  media.write_wav(tmp_path / "later.wav", np.r_[np.zeros(30_000), np.ones(100)])
  noise = doubt.make_noise(tmp_path / "babble.wav", 20_000, rng)
  assert noise.shape == (20_000,)
  np.testing.assert_array_equal(noise[:8_000], noise[8_000:16_000])
  with pytest.raises(UserError, match="later.wav is silent for as long"):
    doubt.make_noise(tmp_path / "later.wav", 20_000, rng)


def test_noise_makes_speech_strange_to_ears_that_were_taught_without_it():
  """By how strong it is, and another's speech less. None of these ears is learnt: among eight drawn
  at random, five hear the loudest noise, and two of those hear every step towards it."""
  wav, other = (np.concatenate([item[0] for item in synthetic.corpus(seed, 2, 2.0)])
                for seed in (3, 4))

  def heard(sound):
    windows = features.mel_windows(sound, 100)
    audio = np.stack([features.neighbouring(windows, i) for i in range(100)])
    return Controls(*map(jnp.asarray, (
      audio, *(np.zeros((100, n), np.float32) for n in (len(ACTION_UNITS), 64, 64, 128)))))

  avatar = acquaint(tiny_run.avatar(seed=4), heard(wav))
  network = functools.partial(FaceMotion(avatar.config).apply, {"params": avatar.face.motion})
  ask = jax.jit(jax.vmap(lambda controls: network(
    network(controls, method="code"), method="strangeness")))
  strange = lambda sound: float(ask(heard(sound)).mean())
  noise = doubt.make_noise("white", len(wav), np.random.default_rng(0))
  rise = [strange(doubt.with_noise(wav, noise, snr_db)) for snr_db in doubt.SNRS_DB]
  assert strange(wav) < 1.02 and rise[0] < 1.05, "clean or nearly so, little is strange"
  assert (np.diff(rise) > 0).all() and rise[-1] > 1.3 > strange(other)


def test_ratios_and_runs_that_cannot_be_are_refused(tmp_path):
  for snr_db in (1e9, float("nan")):
    with pytest.raises(UserError, match="give -100 to 100"):
      doubt.measure(tmp_path, snrs_db=[snr_db])


@pytest.mark.slow
def test_a_run_is_judged_whole_and_told_in_words(tmp_path):
  subject_folder.make(tmp_path / "subject")
  run = tiny_run.make(tmp_path / "run", tmp_path / "subject")
  report = doubt.measure(run.path, snrs_db=[0.0])
  clean, noisy = report["noise"]
  assert clean["snr_db"] is None and noisy["snr_db"] == 0
  for name in FACE_MODALITIES:
    assert clean[name] > 0 and noisy[name] > 0
  assert clean["audio"] != noisy["audio"], "the noise is heard"
  assert -1 <= report["map"]["pixel_rank_correlation"] <= 1 and report["map"]["frames"] == 2
  assert "clean" in doubt.describe(report)
