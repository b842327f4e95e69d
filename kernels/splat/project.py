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

from kernels.splat import moments

NEAR = 0.2  # splats nearer than this along z are not drawn
BLUR = 0.3  # px^2 added to the projected covariance
ALPHA_MIN = 1 / 255  # a splat's share of a pixel below which it is skipped
OFFICIAL_TILE = 16  # px; the official extent is rounded out to this grid
SHORT = 1e-24  # squared length below which a vector has no direction: its derivative overflows
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


def mend(whole: Bool[Array, " n"], *arrays: Array) -> list[Array]:
  """Zeros in place of what is not whole [n], before anything is computed of it.

  A NaN that is masked only afterwards would come back in the gradient.
  """
  return [jnp.where(whole.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0) for x in arrays]


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
  """Projects finite splats into one camera; those that are not `whole` are invisible."""
  seen, z, mean, (xx, xy, yy), det = ellipses(
      _columns(means), _columns(quats), _columns(scales), True if whole is None else whole,
      viewmat, K, width, height)
  u, v = mean
  if probe is not None:
    u, v = u + probe[:, 0], v + probe[:, 1]
  conic = conics(xx, xy, yy, det)

  radius, rect = support(*map(jax.lax.stop_gradient, (u, v, xx, yy, det, opacities)),
                         width=width, height=height, extent=extent)
  seen &= (rect[:, 1] > rect[:, 0]) & (rect[:, 3] > rect[:, 2])
  return Projected(
      jnp.stack([jnp.where(seen, u, 0), jnp.where(seen, v, 0)], 1), z,
      jnp.stack([jnp.where(seen, a, b) for a, b in zip(conic, (1, 0, 1), strict=True)], 1),
      jnp.where(seen, opacities, 0), jnp.where(seen[:, None], rect, 0),
      jnp.where(seen, radius, 0))


def see(
    means: Float[Array, "n 3"],
    quats: Float[Array, "n 4"],
    scales: Float[Array, "n 3"],
    opacities: Float[Array, " n"],
    viewmats: Float[Array, "c 4 4"],
    Ks: Float[Array, "c 3 3"],
    probe: Float[Array, "c n 2"] | None,
    whole: Bool[Array, " n"],
    **settings,
) -> tuple[Projected, Float[Array, "c n 6"]]:
  """`look` of all cameras (leaves [c n ...])."""
  def one(viewmat, K, probe):
    return look(means, quats, scales, opacities, viewmat, K, probe, whole, **settings)

  return jax.vmap(one)(viewmats, Ks, probe)


def look(means, quats, scales, opacities, viewmat, K, probe, whole, **settings):
  """`project` of splats that may hold anything where not `whole`, and shapes to be composited."""
  means, quats, scales, opacities = mend(whole, means, quats, scales, opacities)
  seen = project(means, quats, scales, opacities, viewmat, K, probe, whole=whole, **settings)
  return seen, moments.shapes(seen.xy, seen.conic, seen.opacity)


def ellipses(means, quats, scales, whole, viewmat, K, width: int, height: int):
  """The projection itself, of columns [n] and of components of the camera one at a time.

  So it can be traced by kernels, which have no stacks.

  Args:
    means, quats, scales: three, four and three columns.
    whole: [n], which are projected at all.
    viewmat, K: indexed by row and column.

  Returns:
    Whether each lies ahead [n], its depth (1 if not), its mean (u, v) in px, its covariance
    (xx, xy, yy) in px^2 with the blur in it, and the determinant of that, which is summed from
    squares (Cauchy-Binet), so that the thinnest needle still has a positive one.
  """
  turn = [[viewmat[i, j] for j in range(3)] for i in range(3)]
  x, y, z = (_dot(turn[i], means) + viewmat[i, 3] for i in range(3))
  ahead = (z > NEAR) & whole
  x, y, z = jnp.where(ahead, x, 0.0), jnp.where(ahead, y, 0.0), jnp.where(ahead, z, 1.0)
  fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
  u, v = quotient(fx * x, z) + cx, quotient(fy * y, z) + cy

  # Rows of T = J W R S, 2x3: the linearised projection of the unit sphere. Far outside the
  # image the linearisation explodes, hence the clamp.
  margin_x, margin_y = 0.15 * width / fx, 0.15 * height / fy  # 0.3 tan(fov / 2)
  slope_x = jnp.clip(quotient(x, z), -cx / fx - margin_x, (width - cx) / fx + margin_x)
  slope_y = jnp.clip(quotient(y, z), -cy / fy - margin_y, (height - cy) / fy + margin_y)
  zoom_x, zoom_y = quotient(fx, z), quotient(fy, z)
  jacobian_x = [zoom_x * (turn[0][i] - slope_x * turn[2][i]) for i in range(3)]
  jacobian_y = [zoom_y * (turn[1][i] - slope_y * turn[2][i]) for i in range(3)]
  axes = _rotation(quats)
  t0, t1 = ([s * _dot(row, [axes[i][k] for i in range(3)]) for k, s in enumerate(scales)]
            for row in (jacobian_x, jacobian_y))
  xx, xy, yy = _dot(t0, t0), _dot(t0, t1), _dot(t1, t1)
  cross = [t0[i - 2] * t1[i - 1] - t0[i - 1] * t1[i - 2] for i in range(3)]
  det = _dot(cross, cross) + BLUR * (xx + yy) + BLUR**2
  return ahead, z, (u, v), (xx + BLUR, xy, yy + BLUR), det


def conics(xx, xy, yy, det):
  """Inverse covariances (xx, xy, yy)."""
  return quotient(yy, det), quotient(-xy, det), quotient(xx, det)


@jax.custom_jvp
def quotient(x, y):
  """x / y, whose derivative takes no power of y: kernels have none."""
  return x / y


@quotient.defjvp
def _quotient_jvp(primals, tangents):
  (x, y), (dx, dy) = primals, tangents
  return x / y, (dx - x / y * dy) / y


def _columns(x):
  """Columns of x [n k]; a transpose would have XLA turn whole arrays about."""
  return [x[:, i] for i in range(x.shape[1])]


def _dot(a, b):
  """Inner product of three components each; spelt out, it melts into what is around it."""
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def support(u, v, xx, yy, det, opacity, *, width: int, height: int, extent: str):
  """Radius [n] px and pixel rectangle [n 4] of each ellipse, cut to the image.

  Its mean is (u, v), xx and yy are on the diagonal of its covariance, det its determinant.

  "official": a square of 3 sigma of the longer axis, rounded out to 16 px tiles; what lies
  outside is not drawn, so this rule shows in the picture.
  "exact": the box around all pixels with alpha >= 1/255; nothing is lost.
  """
  middle = 0.5 * (xx + yy)
  longest = middle + jnp.sqrt(jnp.maximum(0.1, middle**2 - det))
  radius = jnp.ceil(3 * jnp.sqrt(longest))
  rect = []
  for at, variance, size in (u, xx, width), (v, yy, height):
    if extent == "official":
      low, high = at - 0.5 - radius, at - 0.5 + radius + OFFICIAL_TILE - 1
      low, high = (jnp.floor(x / OFFICIAL_TILE) * OFFICIAL_TILE for x in (low, high))
    else:
      level = 2 * jnp.log(jnp.maximum(opacity / ALPHA_MIN, 1.0))
      # A hair wider than the ellipse: rounding may not cost a pixel.
      reach = jnp.sqrt(level * variance) * 1.0001 + 0.01
      low = jnp.ceil(at - 0.5 - reach)
      high = jnp.where(opacity >= ALPHA_MIN, jnp.floor(at - 0.5 + reach) + 1, low)
    rect += [jnp.clip(x, 0, size).astype(jnp.int32) for x in (low, high)]
  return jnp.minimum(radius, 2**30).astype(jnp.int32), jnp.stack(rect, 1)


def rotation(quats: Float[Array, "n 4"]) -> Float[Array, "n 3 3"]:
  """Rotation matrices of quaternions wxyz of any length; below 1e-12 they turn nothing."""
  return jnp.stack([jnp.stack(row, 1) for row in _rotation(_columns(quats))], 1)


def _rotation(quats):
  """Rows of `rotation`, as lists of components [n], from four columns."""
  w, x, y, z = quats
  squared = w * w + x * x + y * y + z * z
  scale = jax.lax.rsqrt(jnp.where(squared > SHORT, squared, 1))
  w, x, y, z = (q * scale for q in (w, x, y, z))
  return [[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
          [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
          [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]]


def shade(
    means: Float[Array, "n 3"],
    colors: Float[Array, "n k 3"],
    viewmat: Float[Array, "4 4"],
    degree: int,
) -> Float[Array, "n 3"]:
  """Colours >= 0 that spherical harmonics show to a camera; 0.5 is what zeros show."""
  basis = shading(_columns(means), viewmat, degree)
  # A sum of terms, since a product of stacks would leave the stacks in memory.
  bands = jax.lax.split(colors[:, :len(basis)], (1,) * len(basis), 1)
  shown = sum(b[:, None] * band[:, 0] for b, band in zip(basis, bands, strict=True))
  return jnp.maximum(shown + 0.5, 0)


def shade_all(
    means: Float[Array, "n 3"],
    colors: Float[Array, "n k 3"],
    viewmats: Float[Array, "c 4 4"],
    whole: Bool[Array, " n"],
    degree: int,
) -> Float[Array, "c n 3"]:
  """`shade` for all cameras; splats that are not `whole` may hold anything."""
  means, colors = mend(whole, means, colors)
  return jax.vmap(lambda viewmat: shade(means, colors, viewmat, degree))(viewmats)


def shading(means, viewmat, degree: int) -> list[Float[Array, " n"]]:
  """How much of each harmonic a camera sees, of columns as in `ellipses`."""
  turn = [[viewmat[i, j] for j in range(3)] for i in range(3)]
  shift = [viewmat[i, 3] for i in range(3)]
  # The centre of the camera is minus the transposed rotation times the shift.
  away = [p + _dot([row[i] for row in turn], shift) for i, p in enumerate(means)]
  squared = _dot(away, away)
  scale = jax.lax.rsqrt(jnp.where(squared > SHORT, squared, 1.0))
  x, y, z = (a * scale for a in away)
  return harmonics(x, y, z, degree)


def harmonics(x: Float[Array, " n"], y: Float[Array, " n"], z: Float[Array, " n"],
              degree: int) -> list[Float[Array, " n"]]:
  """Real spherical harmonics up to `degree` (0..3) of unit vectors, in the usual order."""
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
  return basis
