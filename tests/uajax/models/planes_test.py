"""Tri-planes on planes made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from uajax.config import Planes as PlanesConfig
from uajax.models.planes import Planes, sample

BOUND = 0.15


def ramp(side=5):
  """Planes of ones but the first, which tells its row (channel 0) and its column (channel 1)."""
  planes = np.ones((3, side, side, 2), np.float32)
  planes[0, :, :, 0] = np.arange(side)[:, None]
  planes[0, :, :, 1] = np.arange(side)[None]
  return jnp.asarray(planes)


def test_first_axis_runs_along_columns_and_second_along_rows_both_flipped():
  corners = jnp.array([[BOUND, BOUND, 0], [-BOUND, BOUND, 0], [BOUND, -BOUND, 0], [0, 0.075, 0]])
  rows, columns = np.asarray(sample(ramp(), corners, BOUND)).T
  np.testing.assert_allclose(columns, [0, 4, 0, 2], atol=1e-5)
  np.testing.assert_allclose(rows, [0, 0, 4, 1], atol=1e-5)


@pytest.mark.parametrize("plane,axes", [(0, (0, 1)), (1, (0, 2)), (2, (1, 2))])
def test_each_plane_reads_its_pair_of_axes(plane, axes):
  planes = np.ones((3, 3, 3, 1), np.float32)
  planes[plane, 2, 0] = 7  # last row: second axis at -bound; first column: first axis at +bound
  point = np.zeros((1, 3), np.float32)
  point[0, axes[0]], point[0, axes[1]] = BOUND, -BOUND
  assert sample(jnp.asarray(planes), jnp.asarray(point), BOUND)[0, 0] == pytest.approx(7)


def test_planes_are_multiplied():
  planes = jnp.stack([jnp.full((4, 4, 1), v) for v in (2.0, 3.0, 5.0)])
  np.testing.assert_allclose(sample(planes, jnp.zeros((2, 3)), BOUND), 30.0)


def test_beyond_the_bound_the_border_holds_and_gives_no_gradient():
  far = jnp.array([[10 * BOUND, -3 * BOUND, 0.0]])
  np.testing.assert_allclose(sample(ramp(), far, BOUND), [[4, 0]], atol=1e-5)
  grad = jax.grad(lambda x: sample(ramp(), x, BOUND).sum())(far)
  np.testing.assert_allclose(grad[0, :2], 0)


def test_gradients_of_positions_and_planes_are_those_of_finite_differences():
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    planes = jnp.asarray(rng.uniform(0.1, 0.5, (3, 8, 8, 2)))
    points = jnp.asarray(rng.uniform(-0.1, 0.1, (5, 3)))
    check_grads(
      lambda p, x: sample(p, x, BOUND), (planes, points), order=1, modes=["rev"], eps=1e-7)


def test_one_entry_a_scale():
  net = Planes(PlanesConfig(features=3, resolution=4, multiples=(1, 2)))
  scales, params = net.init_with_output(jax.random.key(0), jnp.zeros((6, 3)))
  assert [s.shape for s in scales] == [(6, 3), (6, 3)]
  assert params["params"]["scale_1"].shape == (3, 8, 8, 3)
