import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from uajax import config
from uajax.train import sampling
from uajax.types import Guide

FRAMES = 40
KEY = jax.random.key(0)


RAMP = jnp.linspace(0, 1, FRAMES)
GUIDE = Guide(lip_height_px=10 * RAMP, blink=RAMP, au25=RAMP)


def drawn(stage, steps, guide=GUIDE, share=None):
  share = jnp.full(FRAMES, 0.01) if share is None else share
  choose = jax.jit(lambda step: sampling.choose(stage, guide, share, step, KEY))
  return np.array([choose(step) for step in steps])


def test_an_epoch_shows_every_frame_once_and_epochs_differ():
  stage = dataclasses.replace(config.FUSE)
  first, second = (drawn(stage, range(e * FRAMES, (e + 1) * FRAMES)) for e in (0, 1))
  assert sorted(first) == sorted(second) == list(range(FRAMES))
  assert (first != second).any()


def test_face_guidance_opens_the_lips_and_then_shuts_the_eyes():
  stage = config.shorten(config.FACE, 5_000)
  every = stage.guide_every
  early = drawn(stage, range(0, 10 * every, every))
  assert (early < 0.5 * FRAMES).all(), "lips begin little open"
  blink_early = drawn(stage, range(every * 22, every * 40, 2 * every))
  blink_late = drawn(stage, range(every * 240, every * 260, 2 * every))
  assert blink_early.mean() + 5 < blink_late.mean()


def test_wide_mouths_are_drawn_as_often_as_others_though_they_are_rare():
  stage = config.shorten(config.FACE, 5_000)
  seldom = GUIDE._replace(lip_height_px=jnp.ones(FRAMES).at[-3:].set(10.0))
  every = stage.guide_every
  lips = drawn(stage, range(every * 21, every * 101, 2 * every), seldom)
  assert (lips >= FRAMES - 3).mean() > 0.5


def test_guidance_without_any_fitting_frame_takes_the_nearest():
  stage = config.shorten(config.FACE, 5_000)
  nobody_blinks = GUIDE._replace(blink=jnp.linspace(0, 0.1, FRAMES))
  late = drawn(stage, [stage.guide_every * 260], nobody_blinks)  # an even draw: for the eyes
  assert late[0] == FRAMES - 1


def test_mouth_begins_with_the_widest_and_never_draws_a_closed_one():
  stage = config.shorten(config.MOUTH, 5_000)
  share = jnp.full(FRAMES, 0.01).at[::2].set(0.0)
  assert set(drawn(stage, range(20), share=share)) == {FRAMES - 1}
  later = drawn(stage, range(stage.warm_steps, stage.warm_steps + 60), share=share)
  assert (later % 2 == 1).all() and len(set(later)) > 5
