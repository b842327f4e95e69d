"""Tile lists: complete, in order, and no longer than needed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.splat import bins, project
from kernels.splat.cases import CASES, scene

TILES = bins.grid(50, 44, 8)
CAPACITY = 8192


@functools.cache
def seen():
  """The sharp case by two cameras."""
  inputs = scene(CASES["sharp"])
  views = jnp.asarray(np.concatenate([inputs["viewmats"]] * 2)).at[1, 0, 3].set(0.03)
  return jax.jit(jax.vmap(lambda view: project.project(
      *(inputs[k] for k in ("means", "quats", "scales", "opacities")), view, inputs["Ks"][0],
      None, width=50, height=44, extent="exact")))(views)


@functools.cache
def build(capacity):
  return jax.jit(bins.build, static_argnums=(1, 2))(seen(), TILES, capacity)


def lists(pairs):
  splats, starts = np.asarray(pairs.splats), np.asarray(pairs.starts)
  return [splats[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]


def alphas(splats, camera):
  """[n h w] on whole tiles, by the formula."""
  x, y = np.arange(TILES.columns * 8) + 0.5, np.arange(TILES.rows * 8) + 0.5
  xy, conic = np.asarray(splats.xy[camera]), np.asarray(splats.conic[camera])
  dx, dy = x[None, None, :] - xy[:, :1, None], y[None, :, None] - xy[:, 1:, None]
  a, b, c = (conic[:, i, None, None] for i in range(3))
  power = -0.5 * (a * dx**2 + c * dy**2) - b * dx * dy
  return np.asarray(splats.opacity[camera])[:, None, None] * np.exp(power)


def test_every_tile_lists_what_it_shows_nearest_first():
  pairs, splats = build(CAPACITY), seen()
  n = splats.depth.shape[1]
  depth = np.asarray(splats.depth).reshape(-1)
  listed = lists(pairs)
  for camera in range(2):
    shown = alphas(splats, camera)
    split = (n, TILES.rows, 8, TILES.columns, 8)
    anywhere = shown.reshape(split).max((2, 4)).reshape(n, -1)
    shown[:, 44:], shown[:, :, 50:] = 0, 0  # beyond the image
    needed = (shown.reshape(split).max((2, 4)) >= 1 / 255).reshape(n, -1)
    for tile in range(TILES.rows * TILES.columns):
      got = listed[camera * TILES.rows * TILES.columns + tile]
      assert set(np.nonzero(needed[:, tile])[0] + camera * n) <= set(got)
      assert len(set(got)) == len(got) and (np.diff(depth[got]) >= 0).all()
      # What is listed in vain was within rounding of the support.
      assert (anywhere[got - camera * n, tile] >= 0.97 / 255).all()
  assert pairs.overflow == 0 and (pairs.splats[int(pairs.starts[-1]):] == 2 * n).all()


def test_lists_are_shorter_than_rectangles_and_overflow_is_counted():
  demanded = int(bins.demand(seen().rect, 8).sum())
  assert int(build(CAPACITY).starts[-1]) < 0.95 * demanded
  assert build(demanded).overflow == 0
  assert build(1000).overflow == demanded - 1000
  assert build(1000).starts[-1] <= 1000


@pytest.mark.parametrize("capacity", (CAPACITY, 1000))
def test_sums_by_splat_are_sums(capacity):
  pairs = build(capacity)
  rows = jnp.where((pairs.splats < len(pairs.runs))[:, None],
                   jax.random.normal(jax.random.key(0), (capacity, 3)), 0)
  expected = np.zeros((len(pairs.runs) + 1, 3))
  np.add.at(expected, np.asarray(pairs.splats), np.asarray(rows))
  for total in (bins.sum_by_scatter, bins.sum_by_runs, bins.sum_by_splat):
    np.testing.assert_allclose(total(rows, pairs), expected[:-1], atol=1e-5)


def test_runs_are_scanned_apart():
  first = jnp.array([0, 0, 0, 3, 4, 4])
  x = jnp.arange(1.0, 7)
  np.testing.assert_allclose(bins.scan_runs(jnp.add, x, first, 3), [1, 3, 6, 4, 5, 11])
  np.testing.assert_allclose(bins.scan_runs(jnp.multiply, x, first, 3), [1, 2, 6, 4, 5, 30])


def test_too_many_tiles_and_splats_are_refused():
  many = jax.eval_shape(lambda s: jax.tree.map(lambda x: jnp.repeat(x, 70_000, 1), s), seen())
  with pytest.raises(ValueError, match="fewer cameras"):
    jax.eval_shape(lambda s: bins.build(s, bins.grid(4096, 4096, 8), 16), many)
