"""A z-buffer that remembers which triangle each sample shows, compiled by numba.

Axes: v vertices, t triangles, h w samples. Sample (r, c) lies at (c + 0.5, r + 0.5).
"""

import numba
import numpy as np
from jaxtyping import Float, Int


@numba.njit(cache=True, nogil=True)
def visible(
  pixels: Float[np.ndarray, "v 3"], triangles: Int[np.ndarray, "t 3"], height: int, width: int
):
  """The nearest triangle of every sample.

  Args:
    pixels: projected vertices: x and y in samples, z the distance along the view axis (> 0).
    triangles: vertex ids.
    height: of the picture, in samples.
    width: of the picture, in samples.

  Returns:
    Triangle ids [h w], -1 where nothing is, and perspective-correct barycentric weights [h w 3].
  """
  nearest = np.full((height, width), np.inf)
  ids = np.full((height, width), -1, np.int32)
  weights = np.zeros((height, width, 3))
  for t in range(len(triangles)):
    a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
    ax, ay, az = pixels[a, 0], pixels[a, 1], pixels[a, 2]
    bx, by, bz = pixels[b, 0], pixels[b, 1], pixels[b, 2]
    cx, cy, cz = pixels[c, 0], pixels[c, 1], pixels[c, 2]
    area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
    if area == 0.0 or min(az, bz, cz) <= 0.0:
      continue
    left = max(int(np.floor(min(ax, bx, cx) - 0.5)), 0)
    right = min(int(np.ceil(max(ax, bx, cx) - 0.5)) + 1, width)
    top = max(int(np.floor(min(ay, by, cy) - 0.5)), 0)
    bottom = min(int(np.ceil(max(ay, by, cy) - 0.5)) + 1, height)
    for r in range(top, bottom):
      y = r + 0.5
      for q in range(left, right):
        x = q + 0.5
        u = ((bx - x) * (cy - y) - (cx - x) * (by - y)) / area
        v = ((cx - x) * (ay - y) - (ax - x) * (cy - y)) / area
        w = 1.0 - u - v
        if u < 0.0 or v < 0.0 or w < 0.0:
          continue
        pa, pb, pc = u / az, v / bz, w / cz
        depth = 1.0 / (pa + pb + pc)
        if depth < nearest[r, q]:
          nearest[r, q] = depth
          ids[r, q] = t
          weights[r, q, 0] = pa * depth
          weights[r, q, 1] = pb * depth
          weights[r, q, 2] = pc * depth
  return ids, weights


@numba.njit(cache=True, nogil=True)
def normals(points: Float[np.ndarray, "v 3"], triangles: Int[np.ndarray, "t 3"]):
  """Unit vertex normals, area-weighted over the triangles that meet there, [v 3]."""
  out = np.zeros_like(points)
  for t in range(len(triangles)):
    a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
    ux, uy, uz = (
      points[b, 0] - points[a, 0],
      points[b, 1] - points[a, 1],
      points[b, 2] - points[a, 2],
    )
    vx, vy, vz = (
      points[c, 0] - points[a, 0],
      points[c, 1] - points[a, 1],
      points[c, 2] - points[a, 2],
    )
    nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    for j in range(3):
      k = triangles[t, j]
      out[k, 0] += nx
      out[k, 1] += ny
      out[k, 2] += nz
  for k in range(len(out)):
    length = np.sqrt(out[k, 0] ** 2 + out[k, 1] ** 2 + out[k, 2] ** 2)
    if length > 0.0:
      out[k, 0] /= length
      out[k, 1] /= length
      out[k, 2] /= length
  return out


@numba.njit(cache=True, nogil=True)
def blend(
  ids: Int[np.ndarray, " s"],
  weights: Float[np.ndarray, "s 3"],
  triangles: Int[np.ndarray, "t 3"],
  values: Float[np.ndarray, "v c"],
):
  """Vertex values at samples, [s c]."""
  out = np.zeros((len(ids), values.shape[1]))
  for s in range(len(ids)):
    a, b, c = triangles[ids[s], 0], triangles[ids[s], 1], triangles[ids[s], 2]
    for k in range(values.shape[1]):
      out[s, k] = (
        weights[s, 0] * values[a, k] + weights[s, 1] * values[b, k] + weights[s, 2] * values[c, k]
      )
  return out


@numba.njit(cache=True, nogil=True)
def sample(texture: Float[np.ndarray, "r c k"], coords: Float[np.ndarray, "s 2"]):
  """Bilinear look-up; coords are row and column in 0..1 from first to last texel, [s k]."""
  rows, columns, channels = texture.shape
  out = np.empty((len(coords), channels))
  for s in range(len(coords)):
    y = min(max(coords[s, 0], 0.0), 1.0) * (rows - 1)
    x = min(max(coords[s, 1], 0.0), 1.0) * (columns - 1)
    r, q = min(int(y), rows - 2), min(int(x), columns - 2)
    fy, fx = y - r, x - q
    for k in range(channels):
      above = texture[r, q, k] * (1 - fx) + texture[r, q + 1, k] * fx
      below = texture[r + 1, q, k] * (1 - fx) + texture[r + 1, q + 1, k] * fx
      out[s, k] = above * (1 - fy) + below * fy
  return out
