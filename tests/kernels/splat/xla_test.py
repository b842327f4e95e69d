"""Plain XLA compositing: its settings are about time, never about the picture."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.splat import bins, moments, reference, xla
from kernels.splat.project import Projected
from kernels.splat.tuning import Config

ATTACHED = (True, False)


def pile(n=160):
  """Very many faint splats on one tile, fewer beside it: lists of many blocks and groups."""
  rng = np.random.default_rng(0)
  xy = np.where(np.arange(n)[:, None] % 8, rng.uniform(1, 7, (n, 2)), rng.uniform(0, 22, (n, 2)))
  conic = np.stack([rng.uniform(0.2, 0.4, n), rng.uniform(-0.1, 0.1, n),
                    rng.uniform(0.2, 0.4, n)], 1)
  rect = np.broadcast_to([0, 20, 0, 12], (n, 4))
  seen = Projected(*map(jnp.asarray, (
      xy.astype(np.float32), rng.permutation(n).astype(np.float32), conic.astype(np.float32),
      rng.uniform(0.02, 0.2, n).astype(np.float32), rect.astype(np.int32),
      np.ones(n, np.int32))))
  return seen, jnp.asarray(rng.normal(size=(n, 2)), jnp.float32)


@pytest.mark.parametrize("config", [
    Config((8, 8), 4, 2), Config((16, 8), 16, 3), Config((4, 4), 64, 1)])
def test_blocks_and_groups_do_not_show(config):
  seen, values = pile()
  tiles = bins.grid(20, 12, config.tile)
  weights = jax.random.normal(jax.random.key(1), (3, 12, 20))

  @jax.jit
  def tiled(xy, conic, opacity, values):
    splats = seen._replace(xy=xy, conic=conic, opacity=opacity)
    pairs = bins.build(jax.tree.map(lambda x: x[None], splats), tiles, 4000)
    shown = xla.composite(moments.shapes(xy, conic, opacity), values, pairs, ATTACHED, tiles,
                          config)
    width, height = config.tile
    shown = shown.reshape(tiles.rows, tiles.columns, 3, height, width).transpose(2, 0, 3, 1, 4)
    shown = shown.reshape(3, tiles.rows * height, -1)[:, :12, :20]
    return jnp.sum(shown * weights), (shown, pairs.overflow)

  def plain(xy, conic, opacity, values):
    splats = seen._replace(xy=xy, conic=conic, opacity=opacity)
    shown = reference.composite(splats, values, ATTACHED, 20, 12)
    return jnp.sum(shown * weights), shown

  learnt = seen.xy, seen.conic, seen.opacity, values
  expected, shown = jax.jit(jax.grad(plain, (0, 1, 2, 3), has_aux=True))(*learnt)
  got, (image, overflow) = jax.grad(tiled, (0, 1, 2, 3), has_aux=True)(*learnt)
  assert overflow == 0 and shown[-1].max() > 0.99
  np.testing.assert_allclose(image, shown, atol=1e-5)
  chex.assert_trees_all_close(got, expected, rtol=1e-3, atol=1e-4)
