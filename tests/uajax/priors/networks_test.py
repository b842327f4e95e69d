"""The prior networks: sizes, windows, and that training follows sound and not pictures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uajax.errors import UserError
from uajax.priors import fit, fuse, lip, style
from uajax.priors.fit import FitConfig


def test_paper_sizes():
  """Shapes only, nothing is computed: method.md A.1.4, A.2, A.3."""
  shapes = jax.eval_shape(lambda: lip.initialise(lip.LipConfig(norm="folded"), 0))
  assert shapes["Dense_0"]["kernel"].shape == (577, 64)
  both = jax.eval_shape(lambda: fuse.initialise(style.StyleConfig(), 0))
  lstm = both["style"]["BiLSTM_0"]
  assert lstm["in_0"].shape == (2, 1280, 2560) and lstm["in_1"].shape == (2, 1280, 2560)
  count = sum(np.prod(x.shape) for x in jax.tree.leaves(both["style"]))
  # torch's LSTM has each bias twice, 20.73 M in all
  assert count + 2 * 2 * 2560 == pytest.approx(20.73e6, rel=1e-3)
  assert sum(np.prod(x.shape) for x in jax.tree.leaves(both["fuse"])) == 64 * 129 + 64 * 65


def test_tone_does_not_depend_on_the_padding():
  config = style.StyleConfig(hidden=8, layers=1)
  params = fuse.initialise(config, 0)["style"]
  windows = np.random.default_rng(0).normal(size=(300, 80, 16)).astype(np.float32)
  long = style.tone(params, windows, config)
  assert long.shape == (300, 64)
  direct = style.StyleNet(config).apply({"params": params}, windows[None])[0]
  np.testing.assert_allclose(long, direct, atol=1e-5)


def test_lessons_never_cross_recordings_nor_touch_held_out_frames():
  frames = np.arange(10)
  lessons = lip.Lessons(
    mel=np.arange(64, dtype=np.float32)[None].repeat(80, 0),
    starts=3 * frames,
    low=np.where(frames < 5, 0, 32),
    high=np.where(frames < 5, 31, 63),
    expression=np.zeros((10, 64), np.float32),
    ratio=np.zeros(10, np.float32),
    clip=(frames >= 5).astype(int),
    learn=frames != 8,
    judge=frames == 8,
  )
  assert lessons.runs(4, lessons.learn).tolist() == [0, 1]
  assert lessons.runs(2, lessons.learn).tolist() == [0, 1, 2, 3, 5, 6]
  windows = lessons.windows(np.array([0, 4]), np.array([-1, 1]))
  assert windows[0, 0].tolist() == [0, *range(15)]  # clamped to its recording
  assert windows[1, 0].tolist() == [*range(13, 29)]


def test_augmentation_keeps_the_range_and_differs_by_window():
  mel = jnp.full((4, 80, 16), -1.0)
  heard = lip.augment(mel, jax.random.key(0))
  assert heard.min() >= -4 and heard.max() <= 4
  assert np.unique(np.round(heard.mean((1, 2)), 3)).size == 4


def test_fit_minimises_keeps_the_best_and_names_divergence():
  target = np.arange(3, dtype=np.float32)
  config = FitConfig(steps=400, batch=1, rate=0.05, block=50, patience=8, weight_decay=0.0)

  def loss(params, batch, key):
    return jnp.abs(params["x"] - batch).sum()

  start = {"x": np.zeros(3, np.float32)}
  done = fit.fit(
    loss, start, lambda rng: target, config, seed=0, label="test", held_out=target,
    score=lambda params, batch: jnp.abs(params["x"] - batch).sum(),
  )  # fmt: skip
  assert done.score == min(done.history) < 0.1
  np.testing.assert_allclose(done.params["x"], target, atol=0.1)
  assert (start["x"] == 0).all()
  with pytest.raises(UserError, match="no longer finite"):
    fit.fit(
      loss, start, lambda rng: target * np.nan, dataclasses.replace(config, steps=50),
      seed=0, label="test",
    )  # fmt: skip


def test_in_batches_gives_every_row_once():
  rows = np.arange(7, dtype=np.float32)[:, None]
  np.testing.assert_array_equal(fit.in_batches(lambda x: 2 * x, rows, size=3), 2 * rows)
