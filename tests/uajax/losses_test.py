import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from uajax import losses

SSIM = jax.jit(losses.ssim)


def _pair(size=(24, 33)):
  a, b = (jax.random.uniform(jax.random.key(k), (*size, 3)) for k in (0, 1))
  return a, 0.7 * a + 0.3 * b


@pytest.mark.parametrize("frame", [0, 1])
@pytest.mark.golden
def test_golden_ssim_and_l1(shared, frame):
  golden = np.load(shared(f"golden/official/official_frame{frame}.npz"))
  a, b = (jnp.moveaxis(jnp.asarray(golden[k]), 0, -1) for k in ("out_composite", "background"))
  np.testing.assert_allclose(SSIM(a, b), golden["out_ssim_vs_bg"], rtol=1e-5)
  np.testing.assert_allclose(losses.l1(a, b), golden["out_l1_vs_bg"], rtol=1e-5)


def test_ssim_is_the_standard_one_away_from_the_edges():
  a, b = _pair()
  _, whole = structural_similarity(
    np.asarray(a), np.asarray(b), gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=1.0, channel_axis=-1, full=True)
  ours = jax.jit(losses.ssim_map)(a, b)
  np.testing.assert_allclose(ours[5:-5, 5:-5], whole[5:-5, 5:-5], atol=2e-5)


def test_ssim_of_equal_pictures_is_one_and_cannot_rise():
  a, b = _pair()
  assert SSIM(a, a) == pytest.approx(1, abs=1e-6)
  assert jnp.abs(jax.jit(jax.grad(losses.ssim))(a, a)).max() < 1e-6
  assert SSIM(a, b) < 1


@pytest.mark.parametrize("argument", [0, 1])
def test_ssim_gradient_is_that_of_its_values(argument):
  a, b = _pair((14, 13))
  step = jax.random.normal(jax.random.key(2), a.shape)
  grad = jax.jit(jax.grad(losses.ssim, argument))(a, b)
  with jax.enable_x64(True):
    a, b, step = (jnp.asarray(np.asarray(x), jnp.float64) for x in (a, b, step))
    move = jax.jit(
      lambda t: losses.ssim(*((a + t * step, b) if argument == 0 else (a, b + t * step))))
    slope = (move(1e-4) - move(-1e-4)) / 2e-4
  np.testing.assert_allclose(jnp.sum(grad * np.asarray(step, np.float32)), slope, rtol=2e-4)


def test_ssim_through_vmap():
  a, b = _pair()
  both = jax.jit(jax.vmap(losses.ssim))(jnp.stack([a, b]), jnp.stack([b, b]))
  np.testing.assert_allclose(both, [SSIM(a, b), 1.0], rtol=1e-6)


def test_masks_weigh_what_they_cover():
  inside = jnp.zeros((4, 5), bool).at[:2].set(True)
  alpha = jnp.full((4, 5), 0.25)
  np.testing.assert_allclose(losses.alpha_penalty(alpha, inside), 0.5 * 0.75 + 0.5 * 0.25)
  free = losses.alpha_penalty(alpha, inside, outside=jnp.zeros((4, 5), bool))
  np.testing.assert_allclose(free, 0.5 * 0.75)
  image = jnp.arange(20.0).reshape(4, 5)
  np.testing.assert_allclose(losses.mean_inside(image, inside), 4.5)


def test_empty_masks_and_dead_splats_give_zero_with_zero_gradient():
  image, nothing = jnp.ones((4, 5)), jnp.zeros((4, 5), bool)
  value, grad = jax.value_and_grad(losses.mean_inside)(image, nothing)
  assert value == 0 and not grad.any()
  motion = jnp.asarray([[1.0, -3.0, 2.0], [jnp.inf, 5.0, 5.0]])
  assert losses.mean_magnitude(motion, jnp.asarray([True, False])) == 2
  value, grad = jax.value_and_grad(losses.mean_magnitude)(motion, jnp.zeros(2, bool))
  assert value == 0 and not grad.any()


def test_doubt_is_best_where_it_is_the_error_and_errors_learn_nothing_from_it():
  wrong, head = jnp.asarray([[0.02, 0.1]]), jnp.ones((1, 2), bool)
  judge = lambda doubt: float(losses.unlikelihood(wrong, doubt**2, head))
  assert judge(wrong) < min(judge(1.2 * wrong), judge(wrong / 1.2), judge(wrong[:, ::-1]))
  d_wrong, d_doubt = jax.grad(losses.unlikelihood, (0, 1))(wrong, (2 * wrong) ** 2, head)
  assert not d_wrong.any() and (d_doubt > 0).all()


def test_no_error_however_great_pulls_at_a_sure_uncertainty_without_bound():
  """Of the variance's logarithm, which is what is learnt."""
  pull = jax.vmap(jax.grad(lambda log_var, wrong: losses.unlikelihood(
    jnp.full((1, 1), wrong), jnp.full((1, 1), jnp.exp(log_var)), jnp.ones((1, 1), bool))),
    (0, None))(jnp.linspace(-60, 10, 200), 1.0)
  assert np.abs(pull).max() < 200 and np.isfinite(pull).all()


def test_patches_lie_side_by_side_and_drop_the_remainder():
  image = jnp.arange(7 * 9 * 2.0).reshape(7, 9, 2)
  cut = losses.patches(image, 3)
  assert cut.shape == (6, 3, 3, 2)
  np.testing.assert_array_equal(cut[4], image[3:6, 3:6])
  assert losses.patches(image, 36).shape == (1, 7, 7, 2)


def test_closing_fills_gaps_and_keeps_the_outline():
  mask = jnp.zeros((9, 12), bool).at[2:6, 0:4].set(True).at[2:6, 6:9].set(True)
  closed = losses.close(mask)
  assert closed[2:6, 4:6].all() and (closed & mask == mask).all()
  assert not closed[7:].any() and not closed[:2].any() and not closed[:, 9:].any()
  assert losses.dilate(mask)[1:7, 0:10].all() and losses.dilate(mask).sum() == 6 * 10
  np.testing.assert_array_equal(losses.erode(mask)[3:5, 1:3], True)
