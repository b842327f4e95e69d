"""Large pictures, many splats, several devices, and JAX's transformations around the op."""

import functools
import resource
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from kernels.splat import api, rasterize
from kernels.splat.cases import CASES, scene

SPLATS = ("means", "quats", "scales", "opacities", "colors", "features")
CAPACITY = 8192
OFFSET = np.array([[0, 0, 1]], np.float32)[None]  # of intrinsics: the column of the principal point


def split(inputs):
  """What is learnt of the splats, and the rest."""
  return {k: jnp.asarray(inputs[k]) for k in SPLATS}, {
      k: x for k, x in inputs.items() if k not in SPLATS}


def energy(splats, viewmats, Ks, capacity=CAPACITY, **rest):
  out = rasterize(**splats, viewmats=viewmats, Ks=Ks, capacity=capacity, **rest)
  return sum(jnp.sum(x**2) for x in (out.color, out.depth, out.features)), out


@pytest.mark.slow
def test_checkpoint_changes_nothing():
  splats, rest = split(scene(CASES["sharp"]))
  viewmats, Ks = rest.pop("viewmats"), rest.pop("Ks")
  run = functools.partial(energy, **rest)
  slope = [jax.jit(jax.grad(f, (0, 1), has_aux=True))(splats, viewmats, Ks)[0]
           for f in (run, jax.checkpoint(run))]
  assert jnp.abs(slope[0][1]).max() > 0
  chex.assert_trees_all_close(*slope, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(len(jax.devices()) < 2, reason="one device: nothing to spread over")
@pytest.mark.parametrize("implementation", ("reference", "xla"))
def test_cameras_spread_over_devices(implementation):
  splats, rest = split(scene(CASES["sharp"]) | dict(implementation=implementation))
  viewmats, Ks = np.tile(rest.pop("viewmats"), (4, 1, 1)), np.tile(rest.pop("Ks"), (4, 1, 1))
  viewmats[:, 0, 3] = [0, 0.02, -0.03, 0.01]
  alone = functools.partial(energy, **rest, capacity=4 * CAPACITY)
  (cameras, everywhere) = PartitionSpec("cameras"), PartitionSpec()

  @functools.partial(
      jax.shard_map, mesh=Mesh(np.array(jax.devices()[:2]), ("cameras",)),
      in_specs=(everywhere, cameras, cameras), out_specs=(everywhere, cameras))
  def spread(splats, viewmats, Ks):
    loss, out = energy(splats, viewmats, Ks, 2 * CAPACITY, **rest)
    return jax.lax.psum(loss, "cameras"), (out.color, out.depth, out.radii)

  expected, want = jax.jit(jax.grad(alone, (0, 1), has_aux=True))(splats, viewmats, Ks)
  slope, got = jax.jit(jax.grad(spread, (0, 1), has_aux=True))(splats, viewmats, Ks)
  assert len(got[0].sharding.device_set) == 2 and want.overflow == 0
  chex.assert_trees_all_close(got, (want.color, want.depth, want.radii), atol=1e-5)
  for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(expected), strict=True):
    assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="one device: nothing to spread over")
def test_the_kernels_spread_if_unchecked_and_say_so_otherwise(monkeypatch):
  inputs = scene(CASES["sharp"]) | dict(capacity=CAPACITY)
  viewmats = np.tile(inputs.pop("viewmats"), (2, 1, 1))
  viewmats[1, 0, 3] = 0.02
  alone = [rasterize(**inputs, viewmats=v[None]).color[0] for v in viewmats]

  def spread(implementation, check):
    def draw(viewmats):
      return rasterize(**inputs, viewmats=viewmats, implementation=implementation).color

    cameras = PartitionSpec("cameras")
    return jax.jit(jax.shard_map(draw, mesh=Mesh(np.array(jax.devices()[:2]), ("cameras",)),
                                 in_specs=cameras, out_specs=cameras, check_vma=check))(viewmats)

  np.testing.assert_allclose(spread("pallas", False), np.stack(alone), atol=1e-4)
  with pytest.raises(ValueError, match="check_vma=False"):
    spread("pallas", True)
  monkeypatch.setattr(api, "_choose", lambda platform: ("pallas", "for the test"))
  with pytest.warns(RuntimeWarning, match="check_vma=False, so plain XLA"):
    shown = spread(None, True)
  np.testing.assert_allclose(shown, np.stack(alone), atol=1e-4)


@pytest.mark.parametrize("extent", ("exact", "official"))
def test_the_principal_point_may_lie_anywhere(extent):
  inputs = scene(CASES["sharp"]) | dict(capacity=CAPACITY, extent=extent)
  part = rasterize(**inputs)
  Ks = inputs["Ks"] + OFFSET * np.array([32, 16, 0], np.float32)[None, :, None]
  whole = rasterize(**inputs | dict(Ks=Ks, width=85, height=61))
  for got, want in ((whole.color, part.color), (whole.depth, part.depth)):
    np.testing.assert_allclose(got[0, 16:60, 32:82], want[0], atol=1e-4)


@pytest.mark.slow
def test_a_4k_picture_shows_what_its_window_shows():
  inputs = scene(CASES["sharp"]) | dict(capacity=2**15)
  inputs["Ks"] = inputs["Ks"] * np.array([2, 2, 1], np.float32)[None, :, None]  # 100 px large
  splats, rest = split(inputs)
  Ks, column, row, width, height = rest.pop("Ks"), 2500, 1333, 101, 87

  @functools.partial(jax.jit, static_argnames=("size", "corner"))
  def slope(splats, Ks, size, corner=(0, 0)):
    def loss(splats):
      out = rasterize(**splats, **rest | dict(Ks=Ks, width=size[0], height=size[1]))
      color = out.color[0, corner[1]:corner[1] + height, corner[0]:corner[0] + width]
      return jnp.sum(color**2), (color, out.overflow, jnp.isfinite(out.color).all())

    return jax.grad(loss, has_aux=True)(splats)

  expected, (want, *_) = slope(splats, Ks, (width, height))
  Ks = Ks + OFFSET * np.array([column, row, 0], np.float32)[None, :, None]
  got, (color, overflow, finite) = slope(splats, Ks, (3840, 2160), (column, row))
  assert overflow == 0 and finite
  np.testing.assert_allclose(color, want, atol=2e-3)  # a float32 px is coarse out there
  for name in SPLATS:
    gap = np.linalg.norm(got[name] - expected[name])
    assert gap <= 1e-2 * np.linalg.norm(expected[name]), name


@pytest.mark.slow
def test_pairs_that_find_no_room_are_counted_under_jit():
  splats, rest = split(scene(CASES["crowded"]))
  run = jax.jit(jax.grad(lambda *x: energy(*x, **rest), has_aux=True), static_argnums=3)
  viewmats, Ks = rest.pop("viewmats"), rest.pop("Ks")
  slope, out = run(splats, viewmats, Ks, 100)
  chex.assert_tree_all_finite((slope, out))
  enough, whole = run(splats, viewmats, Ks, 100 + int(out.overflow))
  assert out.overflow > 0 and whole.overflow == 0
  assert jnp.abs(whole.color - out.color).max() > 0.1
  _, free = run(splats, viewmats, Ks, CAPACITY)
  np.testing.assert_allclose(whole.color, free.color, atol=1e-6)
  assert any(jnp.any(slope[k] != enough[k]) for k in SPLATS)


@pytest.mark.slow
def test_two_million_splats():
  n, size = 2_000_000, 200  # 625 tiles of room for 8 million pairs: 2**32 and more
  rng = np.random.default_rng(0)
  uniform = lambda *shape: rng.random(shape, np.float32)
  splats = dict(means=uniform(n, 3) * 2 - 1, quats=uniform(n, 4) - 0.5,
                scales=0.002 * uniform(n, 3), opacities=0.02 * uniform(n), colors=uniform(n, 3))
  view = np.eye(4, dtype=np.float32)
  view[2, 3] = 4
  K = np.array([[300, 0, 100], [0, 300, 100], [0, 0, 1]], np.float32)
  draw = functools.partial(rasterize, viewmats=view[None], Ks=K[None], width=size, height=size)

  @jax.jit
  def slope(splats):
    def loss(splats):
      out = draw(**splats)
      return jnp.mean(out.color**2), (out.color, out.alpha, out.overflow, out.dropped)

    return jax.grad(loss, has_aux=True)(splats)

  begin = time.perf_counter()
  compiled = slope.lower(splats).compile()
  memory = compiled.memory_analysis()
  middle = time.perf_counter()
  grads, (color, alpha, overflow, dropped) = jax.block_until_ready(compiled(splats))
  end = time.perf_counter()
  print(f"2 million splats: compiled in {middle - begin:.0f} s, drawn with gradient in "
        f"{end - middle:.1f} s, {memory.temp_size_in_bytes / 2**30:.2f} GiB of working memory, "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB at most resident")
  chex.assert_tree_all_finite((grads, color, alpha))
  assert overflow == dropped == 0
  assert alpha[0, 50:150, 50:150].min() > 0.3
  assert (jnp.abs(grads["colors"]).sum(1) > 0).mean() > 0.5
