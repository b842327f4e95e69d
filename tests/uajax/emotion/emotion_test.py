"""Emotion: the network's sizes, its teaching, and control by name."""

import jax
import numpy as np
import pytest

from uajax.emotion import control, distill, network
from uajax.errors import UserError


def test_adaptive_average_agrees_with_torch(shared):
  golden = np.load(shared("golden/speech/bilstm_io.npz"))
  pooled = network.adaptive_average(golden["pool_x"].transpose(0, 2, 3, 1), (6, 6))
  np.testing.assert_allclose(np.transpose(pooled, (0, 3, 1, 2)), golden["pool_y"], atol=1e-6)


def test_paper_sizes():
  """Shapes only, nothing is computed: method.md B.2, G.9."""
  shapes = jax.eval_shape(lambda: network.initialise(network.EmotionConfig(), 4, 0))
  assert shapes["spectrogram"]["kernel"].shape == (9216, 128)
  assert shapes["mfcc"]["kernel"].shape == (300 * 512, 128)
  assert shapes["attention"]["kernel"].shape == (256, 149)
  assert shapes["waveform"]["kernel"].shape == (768, 128)
  assert shapes["discriminate_0"]["kernel"].shape == (384, 128)
  assert shapes["discriminate_2"]["kernel"].shape == (128, 4)


def test_picture_shows_low_notes_at_the_bottom():
  spectrum = np.full((1, 200, 100), -80.0, np.float32)
  spectrum[:, :20] = 0.0
  low, high = np.full(200, -80.0, np.float32), np.zeros(200, np.float32)
  image = np.asarray(network.picture(spectrum, low, high, (64, 48), 3))
  assert image.shape == (1, 64, 48, 3)
  assert image[0, -1].min() > 1.5 and image[0, 0].max() < -1.5


def test_intensity_is_a_share_of_the_label():
  rows = distill.shares(["neutral", "happy"], np.array([1.0, 0.3]), ("neutral", "happy"))
  np.testing.assert_allclose(rows, [[1, 0], [0.7, 0.3]])
  means = distill.window_means(np.repeat(np.eye(2), 25, axis=0), np.array([5, 25, 45]), 1.0)
  np.testing.assert_allclose(means[[0, 2]], [[1, 0], [0, 1]])
  np.testing.assert_allclose(means[1], [0.5, 0.5], atol=0.05)


def test_between_frames_the_feature_is_linear():
  at = np.array([0, 5, 7])
  rows = np.array([[0.0], [5.0], [9.0]])
  assert distill.between(at, rows, 8)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 7, 9]
  assert distill.between(np.array([0]), rows[:1], 3).shape == (3, 1)


@pytest.fixture
def known():
  rows = np.zeros((30, 128), np.float32)
  rows[10:20, 0], rows[20:, 0] = 1.0, 2.0
  labels = ["neutral"] * 10 + ["happy"] * 20
  return control.prototypes(rows, labels, np.repeat([1.0, 0.5, 1.0], 10))


def test_named_emotions_grow_with_intensity_and_stop_at_the_guard(known):
  assert sorted(known) == ["happy", "neutral"]
  along = [control.interpolate(known, "Happy ", x)[0] for x in (0, 0.25, 0.5, 0.8, 1.0, 1.2, 2.0)]
  np.testing.assert_allclose(along, [0, 0.5, 1.0, 1.6, 2.0, 2.4, 3.0], atol=1e-6)
  assert control.interpolate(known, "neutral", 0.7)[0] == 0


def test_unknown_emotions_list_the_known(known):
  with pytest.raises(UserError, match="happy, neutral"):
    control.interpolate(known, "smug", 1.0)
  for bad in (-0.1, 2.5, float("nan")):
    with pytest.raises(UserError, match="outside 0 to 2"):
      control.interpolate(known, "happy", bad)
  with pytest.raises(UserError, match="no emotion labels"):
    control.interpolate({}, "happy", 1.0)
