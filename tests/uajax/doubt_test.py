"""Whether figures about the uncertainty say what they claim to."""

import numpy as np
import pytest

from tests.uajax import tiny_run
from tests.uajax.data import subject_folder
from uajax import doubt
from uajax.models.motion import FACE_MODALITIES


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


def test_noise_has_the_power_that_was_asked_for():
  rng = np.random.default_rng(1)
  wav = (0.05 * np.sin(np.arange(32_000) / 9)).astype(np.float32)
  noise = doubt.with_noise(wav, 10.0, rng) - wav
  assert abs(10 * np.log10(np.mean(wav**2) / np.mean(noise**2)) - 10) < 0.1
  assert np.abs(doubt.with_noise(20 * wav, 0.0, rng)).max() <= 1


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
