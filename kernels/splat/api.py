"""The rasteriser as the rest of the project sees it.

Axes: c cameras, n splats, k spherical harmonics, f feature channels, h w pixels.
"""

import functools
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import trial
from kernels.splat import bins as binning
from kernels.splat import (
    moments,
    pallas,
    pallas_tpu,
    project,
    project_pallas,
    reference,
    tuning,
    xla,
)
from kernels.varying import UNCHECKED, varies

IMPLEMENTATIONS = ("reference", "xla", "pallas")
EXTENTS = ("exact", "official")
# The kernels behind implementation="pallas", by backend.
KERNELS = {"mosaic": pallas, "interpret": pallas, "tpu": pallas_tpu, "tpu interpret": pallas_tpu}
ROOM = 2**30  # pairs that int32 can number in every implementation
FREE = 2**22  # pairs a camera up to which the guessed room grows by `pairs` a splat
MANY, PIECES = 2**18, 4  # so many splats are projected in so many pieces


class Rasterized(NamedTuple):
  """What the cameras see. Pixel (row r, column c) has its centre at (c + 0.5, r + 0.5)."""

  color: Float[Array, "c h w 3"]  # over the background
  alpha: Float[Array, "c h w 1"]  # 0..1; 1 - alpha of the background shows
  depth: Float[Array, "c h w 1"]  # sum of z * alpha * transmittance; not divided by alpha
  features: Float[Array, "c h w f"]  # over nothing
  radii: Int[Array, "c n"]  # px, 3 sigma of the longer axis rounded up; 0 where invisible
  overflow: Int[Array, ""]  # pairs of splat and tile beyond the capacity, hence not drawn
  dropped: Int[Array, ""]  # splats left out because a value of theirs is not finite


def rasterize(
    means: Float[Array, "n 3"],
    quats: Float[Array, "n 4"],
    scales: Float[Array, "n 3"],
    opacities: Float[Array, " n"],
    colors: Float[Array, "n 3"] | Float[Array, "n k 3"],
    viewmats: Float[Array, "c 4 4"],
    Ks: Float[Array, "c 3 3"],
    width: int,
    height: int,
    *,
    sh_degree: int | None = None,
    backgrounds: Float[Array, "c 3"] | Float[Array, " 3"] | None = None,
    features: Float[Array, "n f"] | None = None,
    detached: bool | tuple[int, ...] | None = None,
    extent: str = "exact",
    implementation: str | None = None,
    capacity: int | None = None,
    probe: Float[Array, "c n 2"] | None = None,
) -> Rasterized:
  """Draws Gaussian splats, differentiably.

  Alpha is min(0.99, opacity * Gaussian); splats below 1/255 are skipped at a pixel, and a pixel
  is finished before the splat that would leave it less than 1e-4 of the light. All values are
  activated ones. A splat with a NaN or an infinity anywhere is left out, counted in `dropped`,
  and gets zero gradient.

  Args:
    means: world units, below 1e4.
    quats: rotations wxyz of any length.
    scales: standard deviations along the axes, world units, below 1e4.
    opacities: 0..1.
    colors: RGB, or spherical harmonics if `sh_degree` is given; then the colour is
      max(0, harmonics + 0.5).
    viewmats: world to camera, OpenCV axes (x right, y down, z forward).
    Ks: intrinsics in px.
    width: of the image, px.
    height: of the image, px.
    sh_degree: 0..3; the first (sh_degree + 1)^2 harmonics count.
    backgrounds: RGB behind the splats; black if None.
    features: further channels, blended with the colour in the same pass.
    detached: feature channels whose gradient goes to the features alone, not to geometry or
      opacity; True for all.
    extent: "exact": every pixel where alpha reaches 1/255; "official": a square of 3 sigma
      rounded out to 16 px tiles, as the official rasteriser cuts splats.
    implementation: "reference": every pixel looks at every splat; slow, for tests, and the only
      one that reckons in float64. "xla": plain JAX by tiles, on any device. "pallas": kernels
      for NVIDIA GPUs, Hopper and later, and for TPUs; on a CPU they are interpreted. They need
      `shard_map` to be given check_vma=False. None: what `choose` says, "pallas" on a GPU where
      it compiles and "xla" elsewhere, and wherever there are more than 60 feature channels.
    capacity: how many pairs of splat and tile are held. If None they are counted first where
      the values are known; under `jit` a generous guess is made. What does not fit is not
      drawn and counted in `overflow`: double the capacity then and run again.
    probe: zeros, added to the projected means in px, to differentiate with respect to.

  Returns:
    The images, and what was seen.

  Raises:
    ValueError: where shapes or settings do not fit together.

  Source: Kerbl et al. 2023; method.md D.2; names and conventions are gsplat's.
  """
  means, quats, scales, opacities, colors, viewmats, Ks = map(
      jnp.asarray, (means, quats, scales, opacities, colors, viewmats, Ks))
  n, cameras = len(means), len(viewmats)
  features = jnp.zeros((n, 0)) if features is None else jnp.asarray(features)
  backgrounds = jnp.zeros(3) if backgrounds is None else jnp.asarray(backgrounds)
  if backgrounds.shape == (3,):
    backgrounds = jnp.broadcast_to(backgrounds[None], (cameras, 3))
  bands = 0 if sh_degree is None or colors.ndim < 2 else colors.shape[1]
  expected = dict(means=(means, (n, 3)), quats=(quats, (n, 4)), scales=(scales, (n, 3)),
                  opacities=(opacities, (n,)),
                  colors=(colors, (n, 3) if sh_degree is None else (n, bands, 3)),
                  viewmats=(viewmats, (cameras, 4, 4)), Ks=(Ks, (cameras, 3, 3)),
                  backgrounds=(backgrounds, (cameras, 3)),
                  features=(features, (n, features.shape[-1])))
  if probe is not None:
    probe = jnp.asarray(probe)
    expected["probe"] = (probe, (cameras, n, 2))
  for name, (x, shape) in expected.items():
    if x.shape != shape:
      raise ValueError(f"{name} has shape {x.shape} where {shape} is needed")
  if sh_degree is not None and not (0 <= sh_degree <= 3 and (sh_degree + 1)**2 <= bands):
    raise ValueError(f"{sh_degree=} needs 0..3 and {(sh_degree + 1)**2} harmonics; "
                     f"colors holds {bands}")
  if min(width, height, cameras) < 1:
    raise ValueError(f"an image of {width}x{height} px by {cameras} cameras is empty")
  if extent not in EXTENTS:
    raise ValueError(f"{extent=} is none of {EXTENTS}")
  platform = jax.default_backend()
  attached = _attached(features.shape[1], detached)
  varying = varies(means, quats, scales, opacities, colors, viewmats, Ks, features)
  if implementation is None:
    implementation, _ = _choose(platform)
    if implementation == "pallas" and 4 + features.shape[1] > pallas.MOST:
      implementation = "xla"
    if implementation == "pallas" and varying:
      warnings.warn(f"kernels.splat: {UNCHECKED}, so plain XLA draws instead", RuntimeWarning,
                    stacklevel=2)
      implementation = "xla"
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"{implementation=} is none of {IMPLEMENTATIONS}")
  if implementation == "pallas" and varying:
    raise ValueError(UNCHECKED)
  config = tuning.pick(platform, implementation)
  if extent == "exact":
    config = tuning.coarsen(config, n, width * height)

  # Only the reference reckons in float64, and only if it is asked to.
  double = implementation == "reference" and means.dtype == jnp.float64
  means, quats, scales, opacities, colors, viewmats, Ks, features, backgrounds, probe = (
      jax.tree.map(lambda x: x.astype(jnp.float64 if double else jnp.float32), (
          means, quats, scales, opacities, colors, viewmats, Ks, features, backgrounds, probe)))
  if n == 0:  # one splat that nobody sees spares all others the question
    means, quats, scales, opacities, colors, features = jax.tree.map(
        lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype),
        (means, quats, scales, opacities, colors, features))
    probe = None if probe is None else jnp.zeros((cameras, 1, 2))
  splats = means, quats, scales, opacities, colors, features
  settings = dict(width=width, height=height, sh_degree=sh_degree, extent=extent)
  if capacity is None and implementation != "reference":
    capacity = _capacity(splats, viewmats, Ks, probe, config, settings)
  elif capacity is not None and not 1 <= capacity <= ROOM:
    raise ValueError(f"{capacity=} is not in 1..{ROOM}")
  out = _rasterize(splats, viewmats, Ks, backgrounds, probe, **settings, attached=attached,
                   implementation=implementation, config=config, capacity=capacity)
  return out if n else out._replace(radii=out.radii[:, :0])


@functools.partial(jax.jit, static_argnames=(
    "width", "height", "sh_degree", "extent", "attached", "implementation", "config", "capacity"))
def _rasterize(splats, viewmats, Ks, backgrounds, probe, *, width, height, sh_degree, extent,
               attached, implementation, config, capacity):
  backend = config.backend if implementation == "pallas" else None
  seen, shapes, values, dropped = _see(splats, viewmats, Ks, probe, width=width, height=height,
                                       sh_degree=sh_degree, extent=extent, backend=backend)
  cameras, n = seen.depth.shape
  if implementation == "reference":
    draw = functools.partial(reference.composite, attached=attached, width=width, height=height)
    shown, overflow = jax.vmap(draw)(seen, values), jnp.int32(0)
  else:
    tiles = binning.grid(width, height, config.tile)
    pairs = binning.build(seen, tiles, capacity)
    composite = (xla if implementation == "xla" else KERNELS[config.backend]).composite
    shown = composite(shapes.reshape(cameras * n, 6), values.reshape(cameras * n, -1), pairs,
                      attached, tiles, config)
    shown, overflow = _assemble(shown, tiles, cameras)[:, :, :height, :width], pairs.overflow
  shown = jnp.moveaxis(shown, 1, -1)
  alpha = shown[..., -1:]
  color = shown[..., :3] + (1 - alpha) * backgrounds[:, None, None, :]
  return Rasterized(color, alpha, shown[..., 3:4], shown[..., 4:-1], seen.radius, overflow,
                    dropped)


def _see(splats, viewmats, Ks, probe, *, width, height, sh_degree, extent, backend=None):
  """Projects into all cameras: leaves [c n ...], shapes [c n 6], values [c n m], how many broke.

  The values are what splats show: colour, depth and features.
  """
  means, quats, scales, opacities, colors, features = splats
  whole = (project.finite(means, project.LIMIT) & project.finite(scales, project.LIMIT)
           & project.finite(quats) & project.finite(opacities) & project.finite(colors)
           & project.finite(features))
  if backend in pallas.BACKENDS and len(means) >= project_pallas.BLOCK:
    look: Any = functools.partial(project_pallas.see, backend=backend)
    shade = functools.partial(project_pallas.shade, backend=backend)
  else:
    look = _project
    # Keeping what the shading went through takes memory; shading anew going backward, little time.
    shade = jax.checkpoint(project.shade_all, static_argnums=4)
  seen, shapes = look(means, quats, scales, opacities, viewmats, Ks, probe, whole, width=width,
                      height=height, extent=extent)
  if sh_degree is None:
    shown, = project.mend(whole, colors)
    shown = jnp.broadcast_to(shown[None], (len(viewmats), *shown.shape))
  else:
    shown = shade(means, colors, viewmats, whole, sh_degree)
  features, = project.mend(whole, features)
  show = lambda shown, depth: jnp.concatenate([shown, depth[:, None], features], 1)
  return seen, shapes, jax.vmap(show)(shown, seen.depth), jnp.sum(~whole, dtype=jnp.int32)


def _project(means, quats, scales, opacities, viewmats, Ks, probe, whole, **settings):
  """`project.see`, many splats in pieces.

  Keeping all that the projection went through takes a quarter of the memory of a large scene;
  projecting anew going backward, a tenth of the time.
  """
  def look(viewmat, K, probe):
    @jax.checkpoint
    def of(some):
      means, quats, scales, opacities, probe, whole = some
      return project.look(means, quats, scales, opacities, viewmat, K, probe, whole, **settings)

    return _in_pieces(of, (means, quats, scales, opacities, probe, whole))

  return jax.vmap(look)(viewmats, Ks, probe)


def _in_pieces(function, splats):
  """function(splats), of many splats a piece after the other.

  Its gradient goes through tens of numbers a splat, which are in memory for one piece at a time.
  """
  n = len(splats[0])
  if n < MANY or n % PIECES:
    return function(splats)
  cut = lambda x: x.reshape(PIECES, n // PIECES, *x.shape[1:])
  join = lambda x: x.reshape(n, *x.shape[2:])
  return jax.tree.map(join, lax.map(function, jax.tree.map(cut, splats)))


def _assemble(shown, tiles, cameras):
  """Images [c m h w] from tiles [t m s]."""
  split = shown.reshape(cameras, tiles.rows, tiles.columns, -1, tiles.height, tiles.width)
  return split.transpose(0, 3, 1, 4, 2, 5).reshape(
      cameras, -1, tiles.rows * tiles.height, tiles.columns * tiles.width)


def _attached(width, detached):
  """Which values give gradient to the shapes: colour, depth, features."""
  if detached is True:
    detached = tuple(range(width))
  detached = tuple(detached or ())
  if any(not 0 <= i < width for i in detached):
    raise ValueError(f"{detached=} names channels beyond the {width} features")
  return (True,) * 4 + tuple(i not in detached for i in range(width))


def choose() -> tuple[str, str]:
  """The implementation that draws where `rasterize` is given none, and why, in a few words."""
  return _choose(jax.default_backend())


@functools.cache
def _choose(platform):
  """The implementation that suits a platform, if it works there, and why; warns once if not."""
  if tuning.DEFAULT.get(platform, "xla") != "pallas":
    return "xla", f"the default on {platform}"
  problem = _trial(platform)
  if problem is None:
    return "pallas", f"compiled and chosen on {platform}"
  warnings.warn("kernels.splat: the Pallas kernels do not compile here, so plain XLA draws "
                f"instead ({problem})", RuntimeWarning, stacklevel=3)
  return "xla", f"the Pallas kernels do not compile here: {problem}"


def _trial(platform):
  """Compiles the Pallas kernels, for few splats; returns what went wrong or None."""
  config, attached = tuning.pick(platform, "pallas"), (True, True, False)
  tiles = binning.Grid(*config.tile, 2, 2)
  composite = KERNELS[config.backend].composite

  def draw(shapes, values):
    z, still = jnp.zeros((1, 8)), jnp.zeros((1, 8), jnp.int32)
    seen = project.Projected(jnp.zeros((1, 8, 2)), z, jnp.zeros((1, 8, 3)), z,
                             jnp.zeros((1, 8, 4), jnp.int32), still)
    pairs = binning.build(seen, tiles, 64)
    shown, vjp = jax.vjp(lambda s, v: composite(s, v, pairs, attached, tiles, config),
                         shapes, values)
    return vjp(shown)

  def look(means, quats, opacities, colors):
    seen, shapes, values, _ = _see(
        (means, quats, means, opacities, colors, jnp.zeros((len(means), 0))), jnp.eye(4)[None],
        jnp.eye(3)[None], None, width=1, height=1, sh_degree=1, extent="exact",
        backend=config.backend)
    return jnp.sum(shapes) + jnp.sum(values) + jnp.sum(seen.depth)

  def everything(shapes, values, *splats):
    return draw(shapes, values), jax.grad(look, range(len(splats)))(*splats)

  # Shapes by hand: where this comes up within `shard_map`, what `eval_shape` returned would lie
  # on a mesh without devices, for which nothing compiles.
  n = project_pallas.BLOCK
  return trial.problem(everything, *(
      jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (
          (8, moments.SHAPE), (8, len(attached)), (n, 3), (n, 4), (n,), (n, 4, 3))))


@functools.partial(jax.jit, static_argnames=("tile", "width", "height", "sh_degree", "extent"))
def _demand(splats, viewmats, Ks, probe, *, tile, width, height, sh_degree, extent):
  seen, *_ = _see(splats, viewmats, Ks, probe, width=width, height=height, sh_degree=sh_degree,
                    extent=extent)
  tiles = binning.grid(width, height, tile)
  counts = binning.demand(seen.rect, tile).reshape(-1)
  return binning.running(counts, tiles.columns * tiles.rows)[-1]


def _capacity(splats, viewmats, Ks, probe, config, settings):
  """Pairs to make room for: counted if the values are known, else guessed.

  The guess is `config.pairs` a splat, but beyond `FREE` pairs a camera only two a splat: scenes
  of many splats have small ones. No splat touches more tiles than there are.
  """
  values = jax.tree.map(lax.stop_gradient, (splats, viewmats, Ks, probe))
  try:
    needed = int(_demand(*values, tile=config.tile, **settings))
  except jax.errors.ConcretizationTypeError:
    n, cameras = splats[0].shape[0], viewmats.shape[0]
    tiles = binning.grid(settings["width"], settings["height"], config.tile)
    guess = max(config.pairs * n, config.least)
    needed = cameras * min(guess, 2 * n + FREE, tiles.columns * tiles.rows * n)
  needed = min(needed, ROOM)
  # A few sizes only, so that growing scenes compile anew but seldom.
  step = 2 ** max(10, math.ceil(math.log2(max(needed, 1))) - 2)
  return -(-needed // step) * step or step
