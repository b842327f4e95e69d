"""Cameras: the tracker's pixel, and there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.splat import rasterize
from uajax.camera import from_opengl, to_opengl

WIDTH, HEIGHT, FOCAL_PX = 60, 48, 90.0


def tracked(seed=0):
  """A tracker's frame: rotation and translation of X_c = R X + t, in metres (t / 10)."""
  q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
  rotation = q * np.sign(np.linalg.det(q))
  shift = np.array([0.02, -0.03, -0.7])
  c2w = np.eye(4)
  c2w[:3, :3], c2w[:3, 3] = rotation.T, -rotation.T @ shift
  return rotation, shift, c2w


def test_what_the_tracker_projects_to_u_v_falls_on_pixel_u_v_less_a_half():
  rotation, shift, c2w = tracked()
  camera = from_opengl(c2w, FOCAL_PX, WIDTH, HEIGHT)
  # The tracker: u = -f X / Z + W / 2, v = f Y / Z + H / 2 (method.md E 8); here a pixel centre.
  u, v, z = 41.5, 12.5, -0.68
  inside = np.array([-(u - WIDTH / 2) * z / FOCAL_PX, (v - HEIGHT / 2) * z / FOCAL_PX, z])
  point = rotation.T @ (inside - shift)

  out = rasterize(
    jnp.asarray(point[None], jnp.float32), jnp.array([[1.0, 0, 0, 0]]), jnp.full((1, 3), 0.005),
    jnp.array([0.9]), jnp.ones((1, 3)), camera.viewmat[None], camera.K[None], WIDTH, HEIGHT,
    implementation="reference")
  alpha = np.asarray(out.alpha)[0, ..., 0]
  assert np.unravel_index(alpha.argmax(), alpha.shape) == (12, 41)
  np.testing.assert_allclose(alpha[12, 40], alpha[12, 42], atol=1e-4)
  np.testing.assert_allclose(alpha[11, 41], alpha[13, 41], atol=1e-4)
  np.testing.assert_allclose(out.depth[0, 12, 41] / alpha[12, 41], 0.68, rtol=1e-4)


@pytest.mark.parametrize("xp", [np, jnp])
def test_there_and_back(xp):
  _, _, c2w = tracked(1)
  camera = from_opengl(xp.asarray(c2w), FOCAL_PX, WIDTH, HEIGHT)
  assert isinstance(camera.viewmat, np.ndarray if xp is np else jax.Array)
  assert camera.viewmat.dtype == camera.K.dtype == np.float32
  np.testing.assert_allclose(to_opengl(camera), c2w, atol=1e-5)
  np.testing.assert_allclose(camera.K, [[90, 0, 30], [0, 90, 24], [0, 0, 1]])


def test_differentiable_in_the_pose():
  _, _, c2w = tracked(2)
  grad = jax.grad(lambda m: from_opengl(m, FOCAL_PX, WIDTH, HEIGHT).viewmat[0, 3])(jnp.asarray(c2w))
  assert np.isfinite(grad).all() and np.abs(grad).max() > 0
