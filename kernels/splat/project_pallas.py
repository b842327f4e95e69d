"""Gradients of projection and shading as Pallas kernels for NVIDIA GPUs: one thread a splat.

Left to XLA they fall apart into several kernels, between which tens of numbers a splat go through
memory. Here a splat's values and cotangents are read once, and its gradient is written once; what
lies between is the projection itself, differentiated by JAX within the kernel. Going forward,
plain XLA does as well.

Axes: c cameras, n splats, k spherical harmonics.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.extend.core import Literal
from jaxtyping import Array, Bool, Float

from kernels.splat import moments, project
from kernels.splat.pallas import BACKENDS, PIXELS

BLOCK = PIXELS  # splats of a program, a thread each
LEARNT = 3, 4, 3  # numbers of each splat's mean, quaternion and scales


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9, 10, 11))
def see(
    means: Float[Array, "n 3"],
    quats: Float[Array, "n 4"],
    scales: Float[Array, "n 3"],
    opacities: Float[Array, " n"],
    viewmats: Float[Array, "c 4 4"],
    Ks: Float[Array, "c 3 3"],
    probe: Float[Array, "c n 2"] | None,
    whole: Bool[Array, " n"],
    width: int,
    height: int,
    extent: str,
    backend: str,
) -> tuple[project.Projected, Float[Array, "c n 6"]]:
  """`project.see`, whose gradient goes through the depth and the shapes alone.

  There must be at least `BLOCK` splats.
  """
  del backend
  return project.see(means, quats, scales, opacities, viewmats, Ks, probe, whole, width=width,
                     height=height, extent=extent)


def _forward(*args):
  return see(*args), args[:8]


def _backward(width, height, extent, backend, residuals, cotangents):
  means, quats, scales, opacities, viewmats, Ks, probe, whole = residuals
  seen, shapes = cotangents
  whole, shapes = lax.optimization_barrier((whole, shapes))  # a byte each until now
  n, cameras, probed = len(means), len(viewmats), probe is not None
  out = jax.ShapeDtypeStruct((n, sum(LEARNT) + 2 * cameras * probed), jnp.float32)
  body = functools.partial(_body, width=width, height=height, probed=probed)
  rows = BACKENDS[backend]().launch(body, -(-n // BLOCK), out, ())(
      means, quats, scales, whole.astype(jnp.int32), viewmats, Ks, shapes, seen.depth)
  d_means, d_quats, d_scales, d_probe = jnp.split(rows, (3, 7, 10), 1)

  # Of the cameras plain XLA tells, where anybody asks for it.
  def of_cameras(viewmats, Ks):
    return project.see(means, quats, scales, opacities, viewmats, Ks, probe, whole, width=width,
                       height=height, extent=extent)

  _, to_cameras = jax.vjp(of_cameras, viewmats, Ks)
  return (d_means, d_quats, d_scales,
          jnp.where(whole, moments.opacity(shapes.sum(0), opacities), 0),
          *to_cameras(cotangents),
          jnp.swapaxes(d_probe.reshape(n, cameras, 2), 0, 1) if probed else None, None)


see.defvjp(_forward, _backward)


def _body(on, block, means, quats, scales, whole, viewmats, Ks, shapes, depth, out, *, width,
          height, probed):
  here, kept = _block(on, block, whole)

  def columns(ref, count):
    return [on.load(ref.at[here, i], on.pixels) for i in range(count)]

  learnt = [[jnp.where(kept, x, 0.0) for x in columns(ref, k)]
            for ref, k in zip((means, quats, scales), LEARNT, strict=True)]
  total = []
  for camera in range(viewmats.shape[0]):
    viewmat, K = _matrix(viewmats, camera, 4), _matrix(Ks, camera, 3)

    def look(means, quats, scales, viewmat=viewmat, K=K):
      _, z, mean, covariance, det = project.ellipses(
          means, quats, scales, kept, viewmat, K, width, height)
      return mean, project.conics(*covariance, det), z

    def slopes(learnt, shape, d_depth, look=look):
      (_, conic, _), vjp = jax.vjp(look, *learnt)
      d_mean, d_conic = moments.ellipse(shape, conic)
      return *d_mean, *jax.tree.leaves(vjp((d_mean, d_conic, d_depth)))

    u, v, *numbers = _with_plain_sums(slopes)(
        learnt, columns(shapes.at[camera], moments.SHAPE),
        on.load(depth.at[camera, here], on.pixels))
    total = [a + b for a, b in zip(total, numbers, strict=True)] if total else numbers
    for i, slope in enumerate((u, v) if probed else ()):
      out[here, sum(LEARNT) + 2 * camera + i] = slope
  for i, slope in enumerate(total):
    out[here, i] = jnp.where(kept, slope, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def shade(
    means: Float[Array, "n 3"],
    colors: Float[Array, "n k 3"],
    viewmats: Float[Array, "c 4 4"],
    whole: Bool[Array, " n"],
    degree: int,
    backend: str,
) -> Float[Array, "c n 3"]:
  """`project.shade_all`, of at least `BLOCK` splats."""
  del backend
  return project.shade_all(means, colors, viewmats, whole, degree)


def _shade_forward(*args):
  return shade(*args), args[:4]


def _shade_backward(degree, backend, residuals, d_shown):
  means, colors, viewmats, whole = residuals
  (n, bands, _), like = colors.shape, lambda k: jax.ShapeDtypeStruct((n, k), jnp.float32)
  whole, d_shown = lax.optimization_barrier((whole, d_shown))  # a byte each until now
  body = functools.partial(_shade_body, degree=degree)
  d_means, d_colors = BACKENDS[backend]().launch(
      body, -(-n // BLOCK), (like(3), like(3 * bands)), ((BLOCK, 3 * bands),))(
          means, colors.reshape(n, 3 * bands), whole.astype(jnp.int32), viewmats, d_shown)
  _, to_cameras = jax.vjp(lambda x: project.shade_all(means, colors, x, whole, degree), viewmats)
  return d_means, d_colors.reshape(n, bands, 3), *to_cameras(d_shown), None


shade.defvjp(_shade_forward, _shade_backward)


def _shade_body(on, block, means, colors, whole, viewmats, d_shown, d_means, d_colors, stage, *,
                degree):
  here, kept = _block(on, block, whole)
  width = stage.shape[1]
  # Through shared memory, or each thread would reach for memory of its own.
  stage[...] = on.load(colors.at[here], on.lines(width, BLOCK))
  on.barrier()
  used = 3 * (degree + 1)**2
  learnt = [[jnp.where(kept, on.load(ref.at[:, i], on.pixels), 0.0) for i in range(k)]
            for ref, k in ((means.at[here], 3), (stage, used))]
  total = []
  for camera in range(viewmats.shape[0]):
    viewmat = _matrix(viewmats, camera, 4)

    def look(means, colors, viewmat=viewmat):
      basis = project.shading(means, viewmat, degree)
      return [jnp.maximum(sum(b * colors[3 * i + c] for i, b in enumerate(basis)) + 0.5, 0.0)
              for c in range(3)]

    def slopes(learnt, d_shown, look=look):
      _, vjp = jax.vjp(look, *learnt)
      return jax.tree.leaves(vjp(d_shown))

    numbers = _with_plain_sums(slopes)(
        learnt, [on.load(d_shown.at[camera, here, i], on.pixels) for i in range(3)])
    total = [a + b for a, b in zip(total, numbers, strict=True)] if total else numbers
  for i, slope in enumerate(total[:3]):
    d_means[here, i] = jnp.where(kept, slope, 0.0)
  for i in range(width):
    stage[:, i] = jnp.where(kept, total[3 + i] if i < used else 0.0, 0.0)
  on.barrier()
  d_colors[here] = on.load(stage, on.lines(width, BLOCK))


def _block(on, block, whole):
  """The splats of a program (the last two overlap), and which of them are whole."""
  here = pl.ds(jnp.minimum(block * BLOCK, whole.shape[0] - BLOCK), BLOCK)
  return here, on.load(whole.at[here], on.pixels) > 0


def _matrix(ref, camera, columns):
  """The first three rows of a camera's matrix, a number at a time."""
  return {(i, j): ref[camera, i, j] for i in range(3) for j in range(columns)}


def _with_plain_sums(function):
  """The function, where cotangents are added by `add`: JAX has an addition of its own for them,
  which Mosaic does not know."""
  def call(*args):
    with jax.disable_jit():  # or sums hide in what is jitted
      closed = jax.make_jaxpr(function)(*args)
    known = dict(zip((*closed.jaxpr.constvars, *closed.jaxpr.invars),
                     (*closed.consts, *jax.tree.leaves(args)), strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else known[atom]
    for step in closed.jaxpr.eqns:
      values = [read(atom) for atom in step.invars]
      if step.primitive.name == "add_any":
        results = [operator.add(*values)]
      else:
        results = step.primitive.bind(*values, **step.params)
        results = results if step.primitive.multiple_results else [results]
      known.update(zip(step.outvars, results, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]

  return call
