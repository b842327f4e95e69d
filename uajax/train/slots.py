"""How many slots a layer in training has: more where growth wants them, fewer where most are empty.

Programs are compiled for a number of slots, and a step costs what its slots cost.
"""

import functools

from uajax.config import Stage
from uajax.train import densify
from uajax.train.step import State

FEWEST = 128  # what a program of the fusion's kernels takes at once


def make_room(stage: Stage, state: State, change: densify.Change) -> State:
  """Twice the slots where growth found none left, up to the stage's limit."""
  layer = getattr(state.avatar, stage.name)
  slots = layer.alive.shape[0]
  if int(change.missed) == 0 or 2 * slots > stage.densify.max_slots:
    return state
  splats, alive = densify.double((layer.splats, layer.alive), slots)
  return state.replace(
    avatar=state.avatar.replace(**{stage.name: layer.replace(splats=splats, alive=alive)}),
    opt=state.opt | {"splats": densify.double(state.opt["splats"], slots)},
    stats=densify.no_stats(2 * slots))


def give_up_spare(stage: Stage, state: State) -> State:
  """As many slots as are wanted; asked only where another program takes over anyway."""
  fewer = wanted(stage, state)
  layer = getattr(state.avatar, stage.name)
  return state if fewer == layer.alive.shape[0] else keep(stage, fewer, state)


def wanted(stage: Stage, state: State) -> int:
  """Half the slots, and half of those, while that leaves half as many again as are used.

  A step costs what its slots cost.
  """
  layer = getattr(state.avatar, stage.name)
  slots, used = layer.alive.shape[0], int(layer.alive.sum())
  while slots % (2 * FEWEST) == 0 and slots >= 3 * used:
    slots //= 2
  return slots


def keep(stage: Stage, fewer: int, state: State) -> State:
  """What lives, in `fewer` slots."""
  layer = getattr(state.avatar, stage.name)
  fit = functools.partial(densify.compact, alive=layer.alive, fewer=fewer)
  splats, alive = fit((layer.splats, layer.alive))
  return state.replace(
    avatar=state.avatar.replace(**{stage.name: layer.replace(splats=splats, alive=alive)}),
    opt=state.opt | {"splats": fit(state.opt["splats"])}, stats=fit(state.stats))
