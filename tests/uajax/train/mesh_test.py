"""Several devices take a batch's frames apart and arrive where one device does."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.uajax import tiny_run
from tests.uajax.data import subject_folder
from uajax import config
from uajax.data import loader
from uajax.train import densify, feed, optimizer, step

# One member a modality: its program compiles in half the time of all.
STAGE = dataclasses.replace(config.FACE, guide_until=0)
SEED = 4  # of an avatar without steep places: where gradients are in thousands, rounding is, too


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  path = tmp_path_factory.mktemp("subjects") / "tiny"
  subject_folder.make(path)
  return loader.open_source(path, "train", audio="mel", source="folder")


def steps(source, batch, mesh):
  experiment = dataclasses.replace(tiny_run.EXPERIMENT, batch=batch)
  avatar = tiny_run.avatar(SEED)
  state = step.State(
    avatar=avatar, opt=optimizer.init(optimizer.trainable(avatar, STAGE)),
    stats=densify.no_stats(16), step=jnp.asarray(5), skipped=jnp.asarray(0))
  key = jax.random.key(0)
  with feed.Feed(source, experiment, mesh, "resident") as fed:
    [(_, chunk)] = fed.chunks(STAGE, key, 5, [6])
    return step.run_steps(
      step.spread(state, mesh), step.no_sums(), jnp.asarray(1), fed.material, chunk, None, key,
      experiment=experiment, stage=STAGE, phase="sample", mesh=mesh)


def test_two_devices_take_the_step_that_one_takes(source):
  mesh = step.mesh_of(dataclasses.replace(tiny_run.EXPERIMENT, batch=2))
  assert mesh is not None and mesh.size == 2
  alone, report = steps(source, 2, None)
  together, shared = steps(source, 2, mesh)
  for name in ("loss", "l1", "psnr", "grad_norm"):
    np.testing.assert_allclose(shared[name], report[name], rtol=1e-4, err_msg=name)
  np.testing.assert_array_equal(together.stats.seen, alone.stats.seen)
  np.testing.assert_allclose(together.stats.grad, alone.stats.grad, rtol=1e-2, atol=1e-6)
  # After one step the first moments are the gradients, those of tri-planes and splats too.
  chex.assert_trees_all_equal_shapes(alone.opt, together.opt)
  got, expected = (jax.tree_util.tree_leaves_with_path(
    {kind: state.opt[kind].mu for kind in state.opt}) for state in (together, alone))
  for (path, x), (_, y) in zip(got, expected, strict=True):
    off = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-12)
    assert off < 2e-3, (jax.tree_util.keystr(path), off)
  assert max(np.abs(y).max() for path, y in expected if "planes" in str(path)) > 0
  # Adam's first step has the size of the rate whatever the gradient is, so rounding may turn
  # the few that have next to none.
  before, one, two = (np.asarray(x.face.splats.sh_dc)
                      for x in (tiny_run.avatar(SEED), alone.avatar, together.avatar))
  assert np.abs(two - one).mean() < 0.01 * np.abs(one - before).mean()


def test_a_batch_that_devices_cannot_share_evenly_takes_fewer():
  for batch, devices in ((1, None), (3, None), (4, 2)):
    mesh = step.mesh_of(dataclasses.replace(tiny_run.EXPERIMENT, batch=batch))
    assert (mesh and mesh.size) == devices
