"""From splats in the world to ellipses on the image: what all implementations share.

Every function here is plain JAX and differentiated by JAX. Axes: n splats, k spherical
harmonics. Everything is for one camera; the api maps it over cameras.

Sources: Zwicker et al. 2001 (EWA splatting), Kerbl et al. 2023 (the blur of 0.3 px^2, the
clamp of the Jacobian, the 3 sigma radius), gsplat's conventions for names and axes,
method.md D.2 for the official rasteriser's rules.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NEAR = 0.2  # splats nearer than this along z are not drawn
BLUR = 0.3  # px^2 added to the projected covariance
ALPHA_MIN = 1 / 255  # a splat's share of a pixel below which it is skipped
OFFICIAL_TILE = 16  # px; the official extent is rounded out to this grid
LIMIT = 1e4  # world units of a mean or scale; beyond, the determinant may overflow float32


class Projected(NamedTuple):
  """Splats as one camera sees them. Invisible ones have opacity 0 and harmless values."""

  xy: Float[Array, "n 2"]  # px
  depth: Float[Array, " n"]  # z in camera axes
  conic: Float[Array, "n 3"]  # inverse covariance (xx, xy, yy), px^-2
  opacity: Float[Array, " n"]
  rect: Int[Array, "n 4"]  # pixels it may touch: columns x0:x1, rows y0:y1; empty if invisible
  radius: Int[Array, " n"]  # px, the official rule; 0 if invisible


def finite(x: Float[Array, "n ..."], limit: float = 1e15) -> Bool[Array, " n"]:
  """Which splats' values are all finite and below `limit`, where squares are finite too."""
  flat = x.reshape(len(x), math.prod(x.shape[1:]))
  return jnp.all(jnp.abs(flat) < limit, 1)  # a comparison with NaN is false


def project(
    means: Float[Array, "n 3"],
    quats: Float[Array, "n 4"],
    scales: Float[Array, "n 3"],
    opacities: Float[Array, " n"],
    viewmat: Float[Array, "4 4"],
    K: Float[Array, "3 3"],
    probe: Float[Array, "n 2"] | None,
    *,
    width: int,
    height: int,
    extent: str,
    whole: Bool[Array, " n"] | None = None,
) -> Projected:
  """Projects finite splats into one camera; those that are not `whole` are invisible.

  The determinant is summed from squares (Cauchy-Binet), so that the thinnest needle still has
  a positive one.
  """
  rotate, shift = viewmat[:3, :3], viewmat[:3, 3]
  camera = jnp.einsum("ij,nj->ni", rotate, means, precision="highest") + shift[None]
  z = camera[:, 2]
  ahead = z > NEAR if whole is None else (z > NEAR) & whole
  camera = jnp.where(ahead[:, None], camera, jnp.array([0, 0, 1], camera.dtype)[None])
  x, y, z = camera.T
  fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
  xy = jnp.stack([fx * x / z + cx, fy * y / z + cy], 1)
  if probe is not None:
    xy = xy + probe

  # Rows of T = J W R S, 2x3: the linearised projection of the unit sphere. Far outside the
  # image the linearisation explodes, hence the clamp.
  margin_x, margin_y = 0.15 * width / fx, 0.15 * height / fy  # 0.3 tan(fov / 2)
  slope_x = jnp.clip(x / z, -cx / fx - margin_x, (width - cx) / fx + margin_x)
  slope_y = jnp.clip(y / z, -cy / fy - margin_y, (height - cy) / fy + margin_y)
  jacobian_x = (fx / z)[:, None] * (rotate[None, 0] - slope_x[:, None] * rotate[None, 2])
  jacobian_y = (fy / z)[:, None] * (rotate[None, 1] - slope_y[:, None] * rotate[None, 2])
  axes = rotation(quats) * scales[:, None, :]
  t0 = jnp.einsum("ni,nij->nj", jacobian_x, axes, precision="highest")
  t1 = jnp.einsum("ni,nij->nj", jacobian_y, axes, precision="highest")
  xx, yy, cross = jnp.sum(t0 * t0, 1), jnp.sum(t1 * t1, 1), jnp.cross(t0, t1)
  det = jnp.sum(cross * cross, 1) + BLUR * (xx + yy) + BLUR**2
  cov = jnp.stack([xx + BLUR, jnp.sum(t0 * t1, 1), yy + BLUR], 1)
  conic = jnp.stack([cov[:, 2], -cov[:, 1], cov[:, 0]], 1) / det[:, None]

  radius, rect = support(*map(jax.lax.stop_gradient, (xy, cov, det, opacities)),
                         width=width, height=height, extent=extent)
  seen = ahead & (rect[:, 1] > rect[:, 0]) & (rect[:, 3] > rect[:, 2])
  return Projected(
      jnp.where(seen[:, None], xy, 0), z,
      jnp.where(seen[:, None], conic, jnp.array([1, 0, 1], conic.dtype)[None]),
      jnp.where(seen, opacities, 0), jnp.where(seen[:, None], rect, 0),
      jnp.where(seen, radius, 0))


def support(xy, cov, det, opacity, *, width: int, height: int, extent: str):
  """Radius [n] px and pixel rectangle [n 4] of each ellipse, cut to the image.

  "official": a square of 3 sigma of the longer axis, rounded out to 16 px tiles; what lies
  outside is not drawn, so this rule shows in the picture.
  "exact": the box around all pixels with alpha >= 1/255; nothing is lost.
  """
  middle = 0.5 * (cov[:, 0] + cov[:, 2])
  longest = middle + jnp.sqrt(jnp.maximum(0.1, middle**2 - det))
  radius = jnp.ceil(3 * jnp.sqrt(longest))
  if extent == "official":
    reach, grid = jnp.stack([radius, radius], 1), OFFICIAL_TILE
    low = jnp.floor((xy - 0.5 - reach) / grid) * grid
    high = jnp.floor((xy - 0.5 + reach + grid - 1) / grid) * grid
  else:
    level = 2 * jnp.log(jnp.maximum(opacity / ALPHA_MIN, 1.0))
    # A hair wider than the ellipse: rounding may not cost a pixel.
    reach = jnp.sqrt(level[:, None] * cov[:, ::2]) * 1.0001 + 0.01
    low = jnp.ceil(xy - 0.5 - reach)
    high = jnp.where((opacity >= ALPHA_MIN)[:, None], jnp.floor(xy - 0.5 + reach) + 1, low)
  size = jnp.array([width, height], xy.dtype)[None]
  low, high = (jnp.clip(v, 0, size).astype(jnp.int32) for v in (low, high))
  rect = jnp.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1)
  return jnp.minimum(radius, 2**30).astype(jnp.int32), rect


def rotation(quats: Float[Array, "n 4"]) -> Float[Array, "n 3 3"]:
  """Rotation matrices of quaternions wxyz of any length; zero turns nothing."""
  squared = jnp.sum(quats * quats, 1, keepdims=True)
  w, x, y, z = (quats * jax.lax.rsqrt(jnp.where(squared > 0, squared, 1))).T
  rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
          2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
          2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
  return jnp.stack(rows, 1).reshape(-1, 3, 3)


def shade(
    means: Float[Array, "n 3"],
    colors: Float[Array, "n k 3"],
    viewmat: Float[Array, "4 4"],
    degree: int,
) -> Float[Array, "n 3"]:
  """Colours >= 0 that spherical harmonics show to a camera; 0.5 is what zeros show."""
  centre = -viewmat[:3, :3].T @ viewmat[:3, 3]
  away = means - centre[None]
  squared = jnp.sum(away * away, 1, keepdims=True)
  away = away * jax.lax.rsqrt(jnp.where(squared > 0, squared, 1))
  basis = harmonics(away, degree)
  shown = jnp.einsum("nk,nkc->nc", basis, colors[:, :basis.shape[1]], precision="highest")
  return jnp.maximum(shown + 0.5, 0)


def harmonics(direction: Float[Array, "n 3"], degree: int) -> Float[Array, "n k"]:
  """Real spherical harmonics up to `degree` (0..3) of unit vectors, in the usual order."""
  x, y, z = direction.T
  basis = [jnp.full_like(x, 0.5 * math.sqrt(1 / math.pi))]
  if degree > 0:
    c = math.sqrt(3 / (4 * math.pi))
    basis += [-c * y, c * z, -c * x]
  if degree > 1:
    c = 0.5 * math.sqrt(15 / math.pi)
    basis += [c * x * y, -c * y * z, 0.25 * math.sqrt(5 / math.pi) * (3 * z * z - 1),
              -c * x * z, 0.5 * c * (x * x - y * y)]
  if degree > 2:
    c3, c2 = 0.25 * math.sqrt(35 / (2 * math.pi)), 0.5 * math.sqrt(105 / math.pi)
    c1, c0 = 0.25 * math.sqrt(21 / (2 * math.pi)), 0.25 * math.sqrt(7 / math.pi)
    basis += [-c3 * y * (3 * x * x - y * y), c2 * x * y * z, -c1 * y * (5 * z * z - 1),
              c0 * z * (5 * z * z - 3), -c1 * x * (5 * z * z - 1),
              0.5 * c2 * z * (x * x - y * y), -c3 * x * (x * x - 3 * y * y)]
  return jnp.stack(basis, 1)
