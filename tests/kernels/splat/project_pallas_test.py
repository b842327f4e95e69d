"""The kernels for gradients of projection and shading give what plain JAX gives."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.splat import project, project_pallas
from kernels.splat.cases import Case, scene

SETTINGS = dict(width=40, height=32, extent="exact")


def splats(count, cameras):
  """Splats of which some are broken or out of sight, and cameras side by side."""
  inputs = {k: jnp.asarray(v) for k, v in scene(Case(count, 40, 32)).items()}
  views = jnp.tile(inputs["viewmats"], (cameras, 1, 1)).at[:, 0, 3].add(
      0.02 * jnp.arange(cameras, dtype=jnp.float32))
  Ks = jnp.tile(inputs["Ks"], (cameras, 1, 1))
  means = inputs["means"].at[3].set(jnp.nan).at[5, 2].add(-50).at[7, 0].add(9)
  colors = inputs["colors"].at[9].set(jnp.inf)
  quats = inputs["quats"].at[11].set(0)
  whole = project.finite(means) & project.finite(colors)
  return means, quats, inputs["scales"], inputs["opacities"], colors, views, Ks, whole


def gradients(function, inputs, cotangents):
  """Of an arbitrary but fixed scalar of what the function returns."""
  return jax.jit(lambda *x: jax.vjp(function, *x)[1](cotangents))(*inputs)


@pytest.mark.parametrize("count, cameras, probed", ((128, 1, False), (300, 3, True)))
def test_projection(count, cameras, probed):
  *learnt, _, views, Ks, whole = splats(count, cameras)
  probe = jnp.zeros((cameras, count, 2)) if probed else None
  key = jax.random.key(0)
  d_shapes = jax.random.normal(key, (cameras, count, 6))
  d_depth = jax.random.normal(key, (cameras, count))

  def through(see):
    def function(*x):
      seen, shapes = see(*x, whole)
      return jnp.where(seen.radius > 0, seen.depth, 0), jnp.where(
          (seen.radius > 0)[:, :, None], shapes, 0)
    return gradients(function, (*learnt, views, Ks, probe), (d_depth, d_shapes))

  got = through(lambda *x: project_pallas.see(*x, *SETTINGS.values(), "interpret"))
  expected = through(lambda *x: project.see(*x, **SETTINGS))
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert jnp.linalg.norm(theirs) > 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(jnp.abs(theirs).max()))
  assert not got[0][3].any() and not got[0][5].any()


@pytest.mark.parametrize("count, cameras, degree", ((128, 1, 0), (300, 2, 1), (200, 1, 2)))
def test_shading(count, cameras, degree):
  means, *_, colors, views, _, whole = splats(count, cameras)
  cotangent = jax.random.normal(jax.random.key(0), (cameras, count, 3))
  got = gradients(lambda at, colors, views: project_pallas.shade(
      at, colors, views, whole, degree, "interpret"), (means, colors, views), cotangent)
  expected = gradients(lambda at, colors, views: project.shade_all(
      at, colors, views, whole, degree), (means, colors, views), cotangent)
  chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)
  assert got[1][:, :(degree + 1)**2].any() and not got[1][:, (degree + 1)**2:].any()
  assert not got[1][9].any() and not got[0][3].any()
