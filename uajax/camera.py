"""Cameras of the data folder (OpenGL axes: x right, y up, z backward) and ours (OpenCV axes).

method.md D.1: the principal point is the image's centre. Pixel centres lie at +0.5, so that what
the tracker projects to (u, v) falls on pixel (u - 0.5, v - 0.5).
"""

from typing import cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uajax.types import Camera

_FLIP = np.diag([1.0, -1.0, -1.0, 1.0])  # y and z


def from_opengl(
  c2w: Float[Array | np.ndarray, "4 4"],
  focal_px: float | Float[Array, ""],
  width: int,
  height: int,
) -> Camera:
  """The camera of a frame's `transform_matrix` (camera to world, metres, rigid or nearly so).

  NumPy in gives NumPy out, inverted in float64; JAX in gives JAX out. Both float32.
  """
  xp = np if isinstance(c2w, np.ndarray | list) else jnp
  pose = xp.asarray(c2w, np.float64 if xp is np else None)
  viewmat = xp.linalg.inv(pose @ xp.asarray(_FLIP, pose.dtype))
  zero, one = xp.zeros_like(viewmat[0, 0]), xp.ones_like(viewmat[0, 0])
  rows = [[focal_px * one, zero, width / 2 * one], [zero, focal_px * one, height / 2 * one],
          [zero, zero, one]]
  K = xp.stack([xp.stack(row) for row in rows])
  return Camera(*(cast(Array, x.astype(np.float32)) for x in (viewmat, K)))


def to_opengl(camera: Camera) -> Float[Array | np.ndarray, "4 4"]:
  """The camera's `transform_matrix`, float32; undoes `from_opengl`."""
  xp = np if isinstance(camera.viewmat, np.ndarray) else jnp
  viewmat = xp.asarray(camera.viewmat, np.float64 if xp is np else None)
  return (xp.linalg.inv(viewmat) @ xp.asarray(_FLIP, viewmat.dtype)).astype(np.float32)
