"""The kernel machine, and the ridge regression that it is held against."""

import jax
import numpy as np

from uajax.preprocess import landmarks
from uajax.priors import heldout, kernel


def test_ridge_finds_a_linear_rule_and_gives_up_on_noise():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(300, 20))
  y = np.stack([x @ rng.normal(size=20), rng.normal(size=300)], axis=1)
  said = heldout.ridge(x[:200], y[:200], x[200:])
  first, second = heldout.correlation(said, y[200:])
  assert first > 0.98 and abs(second) < 0.4
  assert np.abs(said[:, 1] - y[:200, 1].mean()).max() < 0.7


def test_columns_of_jaw_and_lips_are_named_so():
  names = landmarks.BLENDSHAPES[1:]  # all but _neutral: the columns of `action_units.express`
  chosen = [i for i, name in enumerate(names) if name.startswith(("jaw", "mouth"))]
  assert chosen == list(heldout.MOUTH["jaw and lips (blendshapes)"])


def test_the_kernel_machine_hears_what_no_linear_rule_does():
  rng = np.random.default_rng(1)
  loud = np.repeat(rng.uniform(-3, 3, 150), 4)[:, None, None]
  mel = (loud + 0.3 * rng.normal(size=(600, 80, 16))).astype(np.float32)
  target = np.zeros((600, 64), np.float32)
  target[:, 0] = np.cos(1.5 * loud[:, 0, 0])  # even: its slope over loudness is nought
  learn = np.arange(480)
  params = kernel.solve(
    lambda frames: mel[frames], target, learn, np.full(480, 1 / 480), 64,
    lambda windows, key: windows + 0.1 * jax.random.normal(key, windows.shape), jax.random.key(0),
  )  # fmt: skip
  said = np.asarray(kernel.KernelMachine(64).apply({"params": params}, mel[480:]))
  assert heldout.correlation(said[:, :1], target[480:, :1])[0] > 0.9
  line = heldout.ridge(mel[:480].reshape(480, -1), target[:480], mel[480:].reshape(120, -1))
  assert heldout.correlation(line[:, :1], target[480:, :1])[0] < 0.6
  few = kernel.solve(
    lambda frames: mel[frames], target, learn[:9], np.full(9, 1 / 9), 64, lambda w, key: w,
    jax.random.key(0),
  )  # fmt: skip
  assert few["centres"].shape == (64, 1280) and not few["weights"][9:].any()
  assert all(np.isfinite(x).all() for x in few.values())
