"""Which frame a step looks at (method.md D.3, D.4): epochs in random order, and guided draws.

Guided draws replace the official redraw-until-it-fits, which can hang (Q21), by one uniform
draw among the frames that fit; where none fits, the nearest is taken. Everything follows from
the key and the step, so that a resumed run sees the same frames.
Axes: f frames.
"""

import jax
import jax.numpy as jnp

from uajax.config import Stage
from uajax.types import Guide

MOUTH_PIXELS = 20 / 512**2  # share of the picture below which a mouth teaches nothing


def choose(stage: Stage, guide: Guide, mouth_share, step, key):
  """The frame of a step, as an int32 scalar.

  Args:
    guide: a value a frame each, [f].
    mouth_share: [f] share of the picture that is mouth.
    step: int32 scalar within the stage.
    key: of the run; folded here.
  """
  count = guide.blink.shape[0]
  epoch, place = step // count, step % count
  order = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, 0), epoch), count)
  usual = order[place]
  if stage.name == "fuse" or not stage.guide_until:
    return usual
  draw = jax.random.fold_in(jax.random.fold_in(key, 1), step)
  if stage.name == "face":
    misfit, guided = _face_misfit(stage, guide, step, draw)
  else:
    misfit, guided = _mouth_misfit(stage, guide, mouth_share, step)
  chance = jnp.where(misfit <= 0, jax.random.uniform(draw, (count,)), -1 - misfit)
  return jnp.where(guided, jnp.argmax(chance).astype(usual.dtype), usual)


def _face_misfit(stage, guide, step, draw):
  """Lips that open wider and wider while static; then eyes that close further and further.

  From then on every other guided draw is for the lips again, at any height alike: wide mouths
  are rare, and no motion is learnt from what is hardly seen. (Official: eyes only.)
  """
  done = step / stage.guide_until
  height = guide.lip_height_px
  low = height.min() + 0.2 * (height.max() - height.min())
  width = 0.2 * (height.max() - low)
  static = step < stage.warm_steps
  at = jnp.where(static, done, jax.random.uniform(jax.random.fold_in(draw, 1)))
  lips = jnp.abs(height - (low + at * (height.max() - low))) - width
  eyes = jnp.abs(guide.blink - (done + 0.075)) - 0.225
  misfit = jnp.where(static | (step // stage.guide_every % 2 == 1), lips, eyes)
  return misfit, (step < stage.guide_until) & (step % stage.guide_every == 0)


def _mouth_misfit(stage, guide, mouth_share, step):
  """The widest open mouths while static; then every so often one from a widening range."""
  au25 = guide.au25
  top = au25.max()
  low = top - step / stage.guide_until * (top - jnp.percentile(au25, 25))
  warm = step < stage.warm_steps
  now = warm | ((step < stage.guide_until) & (step % stage.guide_every == 0))
  misfit = jnp.where(warm, top - au25, jnp.where(now, low - au25, 0.0))
  # A closed mouth is never drawn, guided or not.
  closed = (mouth_share < MOUTH_PIXELS) & jnp.any(mouth_share >= MOUTH_PIXELS)
  misfit = jnp.where(closed, jnp.maximum(misfit, 0) + 1e3, misfit)
  return misfit, now | True
