"""Tile lists: complete, in order, and no longer than needed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.splat import bins, project
from kernels.splat.cases import CASES, scene

TILES = bins.grid(50, 44, (8, 8))
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
  demanded = int(bins.demand(seen().rect, (8, 8)).sum())
  assert int(build(CAPACITY).starts[-1]) < 0.95 * demanded
  assert build(demanded).overflow == 0
  assert build(1000).overflow == demanded - 1000
  assert build(1000).starts[-1] <= 1000


def test_more_pairs_than_32_bits_count_are_cut_off():
  tiles, n = bins.grid(3840, 2160, (8, 8)), 100_000  # everything everywhere: 1.3e10 pairs
  rect = jnp.broadcast_to(jnp.array([0, 3840, 0, 2160])[None, None], (1, n, 4))
  depth = jax.random.permutation(jax.random.key(0), n)[None].astype(jnp.float32)
  wide = jnp.broadcast_to(jnp.array([1e-9, 0, 1e-9])[None, None], (1, n, 3))
  everywhere = project.Projected(jnp.zeros((1, n, 2)), depth, wide, jnp.ones((1, n)), rect,
                                 jnp.ones((1, n), jnp.int32))
  pairs = jax.jit(bins.build, static_argnums=(1, 2))(everywhere, tiles, 2**18)
  assert pairs.overflow == 2**31 - 1 and pairs.starts[-1] == 2**18
  nearest = np.argsort(np.asarray(depth[0]))[:3]
  assert [listed.tolist() for listed in lists(pairs)[:2]] == [nearest.tolist()] * 2
  counts = jnp.full(5, 2**31 - 5, jnp.uint32)
  np.testing.assert_array_equal(bins.running(counts, 2**31), np.uint32(
      [2**31 - 5, 2**32 - 10, *[2**32 - 1] * 3]))


@pytest.mark.parametrize("capacity", (CAPACITY, 1000))
def test_sums_by_splat_are_sums(capacity):
  pairs = build(capacity)
  used = int(pairs.starts[-1])
  # Rows lie anywhere, and those that belong to no pair hold what may not be looked at.
  index = jax.random.permutation(jax.random.key(0), 2 * capacity)[:capacity]
  rows = jnp.full((2 * capacity, 3), jnp.nan).at[index[:used]].set(
      jax.random.normal(jax.random.key(1), (used, 3)))
  expected = np.zeros((len(pairs.runs), 3))
  np.add.at(expected, np.asarray(pairs.splats[:used]), np.asarray(rows[index[:used]]))
  longest = TILES.columns * TILES.rows
  for width in (2, 3):
    for total in (bins.sum_by_scatter(rows, index, pairs, width),
                  bins.sum_by_runs(rows, index, pairs, width, longest),
                  bins.sum_by_splat(rows, width, index, pairs, TILES)):
      np.testing.assert_allclose(total, expected[:, :width], atol=1e-5)


@pytest.mark.parametrize("blank", (False, True))
@pytest.mark.parametrize("fan", (pytest.param(8, marks=pytest.mark.slow), 32))
def test_the_longest_runs_are_summed(fan, blank):
  lengths = np.array([0, 1, 16, 17, 0, 300, 1500, 33, 0])
  ends = jnp.asarray(lengths.cumsum(), jnp.int32)
  rows = jax.random.normal(jax.random.key(0), (int(ends[-1]), 3))
  index = jax.random.permutation(jax.random.key(1), len(rows))
  if blank:
    rows = jnp.concatenate([rows, jnp.zeros((1, 3))])
  got = bins._sum_runs(rows, index, ends - lengths, ends, 1500, fan, 2, int(ends[-1]))
  expected = np.zeros((len(lengths), 2))
  np.add.at(expected, np.repeat(np.arange(len(lengths)), lengths), np.asarray(rows[index, :2]))
  np.testing.assert_allclose(got, expected, atol=1e-3)


def test_runs_are_scanned_apart():
  first = jnp.array([0, 0, 0, 3, 4, 4])
  x = jnp.arange(1.0, 7)
  np.testing.assert_allclose(bins.scan_runs(jnp.add, x, first, 3), [1, 3, 6, 4, 5, 11])
  np.testing.assert_allclose(bins.scan_runs(jnp.multiply, x, first, 3), [1, 2, 6, 4, 5, 30])


@pytest.mark.parametrize("size", (1, 2, 7, 8, 1000))
def test_searches_as_numpy_does(size):
  rng = np.random.default_rng(size)
  ordered = np.sort(rng.integers(0, size // 2 + 2, size)).astype(np.int32)
  x = np.arange(-1, size // 2 + 3, dtype=np.int32)
  for side in ("left", "right"):
    np.testing.assert_array_equal(bins._search(jnp.asarray(ordered), jnp.asarray(x), side),
                                  np.searchsorted(ordered, x, side))


@pytest.mark.parametrize("tiles,capacity", [(300, 1000), (70_000, 2**17)])
def test_pairs_are_sorted_by_tile_and_keep_their_order(tiles, capacity):
  tile = jax.random.randint(jax.random.key(0), (capacity,), 0, tiles + 1)
  got, slots = bins._sort(tile, tiles)
  order = np.argsort(np.asarray(tile), kind="stable")
  np.testing.assert_array_equal(slots, order)
  np.testing.assert_array_equal(got, np.asarray(tile)[order])
