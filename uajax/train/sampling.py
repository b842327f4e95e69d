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

SHUT_MOST = 8  # times as often as it comes in the clip is no frame drawn for its shut eyes
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
  """Lips that open wider and wider while static; then lips, lids and brows at any height alike.

  Wide mouths, shut eyes and raised brows are rare, and no motion is learnt from what is hardly
  seen. Lips have every other guided draw, lids and brows share the rest. (Official: eyes only,
  that close further and further.) Besides, a share of all steps looks at shut eyes: a lid has to
  pass over the eye before it explains anything, and an eye that is a little grey all the time is
  the nearer answer as long as few frames ask for more.
  """
  turn = step // stage.guide_every
  static = step < stage.warm_steps
  at = jax.random.uniform(jax.random.fold_in(draw, 1))
  lips = _misfit(guide.lip_height_px, jnp.where(static, step / stage.guide_until, at))
  eyes = jnp.where(turn % 4 == 0, _misfit(guide.blink, at), _misfit(guide.brow, at))
  misfit = jnp.where(static | (turn % 2 == 1), lips, eyes)
  shut = _misfit(guide.blink, 1.0)
  share = jnp.minimum(stage.shut, SHUT_MOST * jnp.mean(shut <= 0))
  closing = ~static & (jax.random.uniform(jax.random.fold_in(draw, 2)) < share)
  guided = closing | (step % stage.guide_every == 0)
  return jnp.where(closing, shut, misfit), (step < stage.guide_until) & guided


def _misfit(values, at):
  """How far values are from `at` of the way to their highest, beyond a fifth of it.

  The way begins a fifth above the lowest, which is common enough (method.md D.3).
  """
  low = values.min() + 0.2 * (values.max() - values.min())
  way = values.max() - low
  return jnp.abs(values - (low + at * way)) - 0.2 * way


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
