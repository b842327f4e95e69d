import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from uajax import config
from uajax.train import densify, seeding

SETTINGS = config.Densify(slots=32, grad_threshold=1.0, until=1000, min_opacity_rise=0.0)
SCENE_M = 0.2


def population(count=8, slots=32, scale_m=5e-4):
  stage = dataclasses.replace(
    config.FACE, splats=count, carve=False,
    densify=dataclasses.replace(config.FACE.densify, slots=slots))
  splats, alive = seeding.seed(stage, None, jax.random.key(0))
  raw = float(np.log(np.expm1(scale_m)))
  return splats._replace(raw_scales=jnp.full((slots, 3), raw)), alive


def run(splats, alive, grads, settings=SETTINGS, size_limit=True):
  stats = densify.Stats(jnp.zeros(alive.shape).at[: len(grads)].set(jnp.asarray(grads)),
                        jnp.ones(alive.shape))
  return densify.densify(settings, splats, alive, stats, scene_m=SCENE_M, step=0,
                         size_limit=size_limit, key=jax.random.key(1))


def test_nothing_happens_where_nothing_is_asked():
  splats, alive = population()
  grown, now, born, change = run(splats, alive, [0.0] * 8)
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), grown, splats))
  assert (now == alive).all() and not born.any() and int(sum(change)) == 0


def test_small_splats_are_cloned_in_place():
  splats, alive = population()
  grown, now, born, change = run(splats, alive, [2.0, 0.0, 3.0])
  assert (int(change.cloned), int(change.split), int(now.sum())) == (2, 0, 10)
  new = np.flatnonzero(np.asarray(born))
  assert (new >= 8).all(), "a clone takes a free slot and its parent keeps its moments"
  means = {tuple(m) for m in np.asarray(grown.means[new])}
  assert means == {tuple(m) for m in np.asarray(splats.means)[[0, 2]]}


def test_large_splats_split_into_two_smaller_ones_nearby():
  splats, alive = population(scale_m=4e-3)
  grown, now, born, change = run(splats, alive, [2.0])
  assert (int(change.split), int(now.sum()), int(born.sum())) == (1, 9, 2)
  children = np.flatnonzero(np.asarray(born))
  np.testing.assert_allclose(jax.nn.softplus(grown.raw_scales[children]), 4e-3 / 1.6, rtol=1e-4)
  apart = np.linalg.norm(np.asarray(grown.means)[children] - np.asarray(splats.means[0]), axis=1)
  assert (apart > 0).all() and (apart < 5 * 4e-3).all()


def test_faint_and_oversized_splats_go_and_their_slots_are_used_again():
  splats, alive = population(slots=9)
  settings = dataclasses.replace(SETTINGS, slots=9)
  splats = splats._replace(
    logit_opacities=splats.logit_opacities.at[3].set(-9.0),
    raw_scales=splats.raw_scales.at[5].set(0.1))
  grown, now, _, change = run(splats, alive, [0.0], settings)
  assert int(change.pruned) == 2 and not now[3] and not now[5]
  _, unlimited, _, _ = run(splats, alive, [0.0], settings, size_limit=False)
  assert unlimited[5], "size is no reason before motion is on"
  _, again, born, _ = run(grown, now, [2.0, 2.0, 2.0], settings)
  assert int(again.sum()) == 9 and born[3] and born[5]


def test_growth_beyond_the_slots_is_counted_and_the_neediest_is_served():
  splats, alive = population(slots=9)
  grown, now, born, change = run(splats, alive, [2.0, 5.0, 3.0])
  assert (int(change.missed), int(now.sum())) == (2, 9)
  np.testing.assert_array_equal(grown.means[8], splats.means[1])


def test_moments_of_the_newborn_are_zero_and_of_the_others_untouched():
  born = jnp.zeros(4, bool).at[2].set(True)
  state = {"mu": jnp.ones((4, 3)), "count": jnp.asarray(7)}
  cleared = densify.clear_moments(state, born)
  np.testing.assert_array_equal(cleared["mu"].sum(1), [3, 3, 0, 3])
  assert cleared["count"] == 7


def test_more_slots_keep_what_lives():
  splats, alive = population(slots=9)
  more, lives = densify.extend((splats, alive), 9, 13)
  assert lives.shape == (13,) and int(lives.sum()) == 8
  np.testing.assert_array_equal(more.means[:9], splats.means)


def test_compaction_keeps_what_lives_in_its_order():
  alive = jnp.arange(12) % 3 == 1
  rows, other = densify.compact((jnp.arange(24).reshape(12, 2), jnp.arange(5)), alive, 6)
  np.testing.assert_array_equal(rows[:4, 0], [2, 8, 14, 20])
  assert rows.shape == (6, 2) and other.shape == (5,)


def test_demotion_makes_smaller_not_larger():
  splats, alive = population(scale_m=4e-3)
  small = densify.demote(splats, jnp.zeros_like(alive).at[1].set(True))
  scales = jax.nn.softplus(small.raw_scales)
  np.testing.assert_allclose(scales[1], 4e-4, rtol=1e-3)
  np.testing.assert_allclose(scales[0], 4e-3, rtol=1e-3)

