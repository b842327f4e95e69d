import jax
import jax.numpy as jnp
import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from uajax import metrics


def _pair(size=(24, 33)):
  a, b = (jax.random.uniform(jax.random.key(k), (*size, 3)) for k in (0, 1))
  return a, 0.8 * a + 0.2 * b


def test_psnr_and_ssim_are_those_of_scikit_image():
  a, b = _pair()
  truth = peak_signal_noise_ratio(np.asarray(b), np.asarray(a), data_range=1.0)
  np.testing.assert_allclose(metrics.psnr(a, b), truth, rtol=1e-5)
  truth = structural_similarity(
    np.asarray(a), np.asarray(b), gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=1.0, channel_axis=-1)
  np.testing.assert_allclose(jax.jit(metrics.ssim)(a, b), truth, rtol=1e-5)
  assert metrics.psnr(a, a) == jnp.inf and np.isclose(jax.jit(metrics.ssim)(a, a), 1)


def test_regions_see_nothing_else():
  a, _ = _pair()
  b = a.at[4:8, 5:9].add(0.1).at[0, 0].add(5.0)
  inside = jnp.asarray([4, 8, 5, 9])
  np.testing.assert_allclose(jax.jit(metrics.region_psnr)(a, b, inside), 20, atol=1e-3)
  assert metrics.region_psnr(a, b, jnp.asarray([10, 12, 10, 12])) == jnp.inf


def test_lmd_ignores_where_the_mouth_is_and_what_is_no_mouth():
  points = np.random.default_rng(0).uniform(0, 100, (3, 68, 2)).astype(np.float32)
  moved = points + np.asarray([7, -3], np.float32)
  moved[:, :48] += 50
  np.testing.assert_allclose(metrics.lmd(points, moved), 0, atol=1e-4)
  # two points apart by +-2: each centred set differs by 2 at those points, mean 2 * 2 / 20
  moved[:, 50, 0] += 2
  moved[:, 60, 0] -= 2
  np.testing.assert_allclose(metrics.lmd(points, moved), 0.2, atol=1e-4)


def test_correlation():
  a = np.random.default_rng(1).normal(size=50).astype(np.float32)
  b = a + np.random.default_rng(2).normal(size=50).astype(np.float32)
  np.testing.assert_allclose(metrics.correlation(a, b), np.corrcoef(a, b)[0, 1], atol=1e-6)
  np.testing.assert_allclose(metrics.correlation(a, 3 - 2 * a), -1, atol=1e-6)
  assert metrics.correlation(a, np.ones(50, np.float32)) == 0
