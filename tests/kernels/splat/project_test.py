"""Projection: ellipses, their supports and colours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.splat import project
from kernels.splat.cases import CASES, scene


def seen(extent="exact", case="sharp", **changes):
  inputs = scene(CASES[case]) | changes
  return project.project(
      *(jnp.asarray(inputs[k]) for k in ("means", "quats", "scales", "opacities")),
      jnp.asarray(inputs["viewmats"][0]), jnp.asarray(inputs["Ks"][0]), None,
      width=inputs["width"], height=inputs["height"], extent=extent)


def alphas(splats, width, height):
  """[n h w], by the formula."""
  x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
  dx = x[None, None, :] - np.asarray(splats.xy[:, 0])[:, None, None]
  dy = y[None, :, None] - np.asarray(splats.xy[:, 1])[:, None, None]
  a, b, c = (np.asarray(splats.conic[:, i])[:, None, None] for i in range(3))
  power = -0.5 * (a * dx**2 + c * dy**2) - b * dx * dy
  return np.asarray(splats.opacity)[:, None, None] * np.exp(power)


def test_exact_rectangles_are_tight_and_lose_nothing():
  splats = seen()
  shown = alphas(splats, 50, 44) >= 1 / 255
  for alive, (x0, x1, y0, y1) in zip(shown, np.asarray(splats.rect), strict=True):
    rows, columns = np.nonzero(alive)
    if len(rows):
      assert x0 <= columns.min() and columns.max() < x1 and y0 <= rows.min() and rows.max() < y1
      if x0 > 0 and x1 < 50 and y0 > 0 and y1 < 44:  # else its widest place may lie outside
        assert x1 - x0 <= columns.max() - columns.min() + 5


def test_projected_gaussians_match_samples():
  inputs = scene(CASES["sharp"])
  splats = seen(scales=inputs["scales"] * 0.02)  # small ones, where projection is nearly linear
  noise = np.random.default_rng(0).normal(size=(4000, 1, 3)) * inputs["scales"] * 0.02
  turn = np.asarray(project.rotation(jnp.asarray(inputs["quats"])))
  points = inputs["means"] + np.einsum("nij,knj->kni", turn, noise)
  points[..., 2] += 0.6
  xy = points[..., :2] / points[..., 2:] * inputs["Ks"][0, 0, 0] + [25, 22]
  np.testing.assert_allclose(xy.mean(0), splats.xy, atol=0.05)
  expected = np.stack([np.cov(xy[:, i].T) for i in range(xy.shape[1])]) + 0.3 * np.eye(2)
  a, b, c = np.asarray(splats.conic.T, np.float64)
  covariance = np.stack([c, -b, -b, a], 1).reshape(-1, 2, 2) / (a * c - b * b)[:, None, None]
  np.testing.assert_allclose(covariance, expected, atol=0.02)


def test_official_rectangles_are_whole_tiles_of_the_radius():
  splats = seen("official")
  x0, x1, y0, y1 = np.asarray(splats.rect).T
  assert ((x0 % 16 == 0) & ((x1 % 16 == 0) | (x1 == 50))).all()
  assert ((y0 % 16 == 0) & ((y1 % 16 == 0) | (y1 == 44))).all()
  reach = np.asarray(splats.xy[:, 0]) - 0.5 + np.asarray(splats.radius)
  visible = np.asarray(splats.radius) > 0
  assert (x1 >= np.minimum(np.floor(reach), 50))[visible].all()


@pytest.mark.parametrize("quat", [(0, 0, 0, 0), (3, -1, 2, 0.5), (1e-12, 0, 0, 1e-12)])
def test_rotations_are_rotations(quat):
  turn = project.rotation(jnp.array([quat], jnp.float32))[0]
  np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-5)
  np.testing.assert_allclose(np.linalg.det(turn), 1, atol=1e-5)


@pytest.mark.parametrize("length", (0, 1e-42, 1e-30, 1e-20, 1e-13, 1e-11, 1e13))
def test_vectors_of_any_length_have_a_finite_derivative(length):
  turn = jax.jit(jax.jacobian(project.rotation))(length * jnp.array([[0.6, 0.0, 0.8, 0.0]]))
  colors = jnp.ones((1, 9, 3))
  shade = jax.jit(jax.jacobian(lambda p: project.shade(p, colors, jnp.eye(4), 2)))(
      length * jnp.array([[0.0, 0.6, 0.8]]))
  assert jnp.isfinite(turn).all() and jnp.isfinite(shade).all()


def test_harmonics_are_orthonormal():
  # Gauss-Legendre by equal angles integrates products of degree 3 exactly.
  z, weight = np.polynomial.legendre.leggauss(8)
  angle = np.arange(16) * 2 * np.pi / 16
  ring = np.sqrt(1 - z**2)[:, None]
  directions = np.stack([ring * np.cos(angle), ring * np.sin(angle),
                         np.repeat(z[:, None], 16, 1)], -1).reshape(-1, 3)
  directions = jnp.asarray(directions, jnp.float32).T
  basis = np.stack(project.harmonics(*directions, 3), 1)
  weights = np.repeat(weight, 16) * 2 * np.pi / 16
  np.testing.assert_allclose(basis.T @ (basis * weights[:, None]), np.eye(16), atol=1e-5)
  for degree in range(3):
    np.testing.assert_allclose(np.stack(project.harmonics(*directions, degree), 1),
                               basis[:, :(degree + 1)**2], atol=1e-6)


def test_colours_follow_the_view_and_stay_positive():
  means = jnp.array([[0, 0, 1.0], [0, 0, 1.0]])
  harmonics = jnp.zeros((2, 4, 3)).at[:, 2, 0].set(0.4).at[1, 0].set(-9)
  front = project.shade(means, harmonics, jnp.eye(4), 1)
  behind = project.shade(means, harmonics, jnp.eye(4).at[2, 3].set(-2), 1)  # camera at z = 2
  np.testing.assert_allclose(front[0], [0.5 + 0.4 * 0.48860251, 0.5, 0.5], rtol=1e-5)
  np.testing.assert_allclose(behind[0], [0.5 - 0.4 * 0.48860251, 0.5, 0.5], rtol=1e-5)
  np.testing.assert_array_equal(front[1], 0)
  grad = jax.grad(lambda m: project.shade(m, harmonics, jnp.eye(4), 1).sum())(jnp.zeros((2, 3)))
  assert jnp.isfinite(grad).all()  # a splat in the camera's very centre
