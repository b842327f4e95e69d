import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uajax import config
from uajax.train import sampling
from uajax.types import Guide

FRAMES = 40
KEY = jax.random.key(0)


RAMP = jnp.linspace(0, 1, FRAMES)
GUIDE = Guide(lip_height_px=10 * RAMP, blink=RAMP, au25=RAMP, brow=5 * RAMP - 2)


def drawn(stage, steps, guide=GUIDE, share=None):
  share = jnp.full(FRAMES, 0.01) if share is None else share
  choose = jax.vmap(lambda step: sampling.choose(stage, guide, share, step, KEY))
  return np.asarray(jax.jit(choose)(jnp.asarray(steps)))


def test_an_epoch_shows_every_frame_once_and_epochs_differ():
  stage = dataclasses.replace(config.FUSE)
  first, second = (drawn(stage, range(e * FRAMES, (e + 1) * FRAMES)) for e in (0, 1))
  assert sorted(first) == sorted(second) == list(range(FRAMES))
  assert (first != second).any()


def test_face_guidance_opens_the_lips_first():
  stage = config.shorten(config.FACE, 5_000)
  early = drawn(stage, range(0, 10 * stage.guide_every, stage.guide_every))
  assert (early < 0.5 * FRAMES).all(), "lips begin little open"


@pytest.mark.parametrize("turn, name", [(1, "lip_height_px"), (0, "blink"), (2, "brow")])
def test_what_is_rare_in_a_face_is_drawn_as_often_as_the_usual(turn, name):
  stage = config.shorten(config.FACE, 5_000)
  seldom = GUIDE._replace(**{name: jnp.ones(FRAMES).at[-3:].set(10.0)})
  first = 20 + turn
  guided = range(first * stage.guide_every, (first + 160) * stage.guide_every,
                 4 * stage.guide_every)
  assert (drawn(stage, guided, seldom) >= FRAMES - 3).mean() > 0.3


def test_shut_eyes_are_looked_at_often_but_no_frame_too_often():
  stage = config.shorten(config.FACE, 5_000)
  moving = range(stage.warm_steps, stage.warm_steps + 800)
  seldom = GUIDE._replace(blink=jnp.zeros(FRAMES).at[-3:].set(1.0))
  shut = drawn(stage, moving, seldom) >= FRAMES - 3
  assert 0.25 < shut.mean() < 0.4
  static = drawn(stage, range(stage.warm_steps), seldom) >= FRAMES - 3
  assert static.mean() < 0.15, "eyes begin open"
  many = 20
  once = Guide(*(jnp.tile(leaf, many) for leaf in GUIDE))._replace(
    blink=jnp.zeros(many * FRAMES).at[-1].set(1.0))
  assert (drawn(stage, moving, once, jnp.full(many * FRAMES, 0.01)) == many * FRAMES - 1
          ).mean() < 0.05


def test_guidance_without_any_fitting_frame_takes_the_nearest():
  stage = config.shorten(config.FACE, 5_000)
  hardly_open = GUIDE._replace(lip_height_px=jnp.linspace(0, 0.1, FRAMES).at[-1].set(10.0))
  early = drawn(stage, [4 * stage.guide_every], hardly_open)  # of lips a little open
  assert early[0] == FRAMES - 2


def test_mouth_begins_with_the_widest_and_never_draws_a_closed_one():
  stage = config.shorten(config.MOUTH, 5_000)
  share = jnp.full(FRAMES, 0.01).at[::2].set(0.0)
  assert set(drawn(stage, range(20), share=share)) == {FRAMES - 1}
  later = drawn(stage, range(stage.warm_steps, stage.warm_steps + 60), share=share)
  assert (later % 2 == 1).all() and len(set(later)) > 5
