"""How many slots a layer in training has: more where growth wants them, fewer where most are empty.

Programs are compiled for a number of slots, and a step costs what its slots cost.
"""

import fractions
import functools

from uajax.config import Stage
from uajax.train import densify
from uajax.train.step import State

FEWEST = 128  # what a program of the fusion's kernels takes at once
FILLING = 0.6  # of the slots: so many are used when more will be wanted before long


def make_room(stage: Stage, state: State, change: densify.Change) -> State:
  """More slots where growth found none left, up to the stage's limit."""
  return grow(stage, state) if int(change.missed) else state


def grow(stage: Stage, state: State) -> State:
  """Half as many slots again, and next time what makes that twice as many."""
  layer = getattr(state.avatar, stage.name)
  slots = layer.alive.shape[0]
  more = _larger(stage, slots)
  if more <= slots:
    return state
  splats, alive = densify.extend((layer.splats, layer.alive), slots, more)
  return state.replace(
    avatar=state.avatar.replace(**{stage.name: layer.replace(splats=splats, alive=alive)}),
    opt=state.opt | {"splats": densify.extend(state.opt["splats"], slots, more)},
    stats=densify.no_stats(more))


def are_filling(stage: Stage, slots: int, used: int) -> bool:
  """Whether there will be more slots before long, if growth goes on."""
  return _larger(stage, slots) > slots and used > FILLING * slots


def _larger(stage: Stage, slots: int) -> int:
  times = fractions.Fraction(slots, stage.densify.slots)
  doubled = not any(n & (n - 1) for n in (times.numerator, times.denominator))
  return min(slots * 3 // 2 if doubled else slots * 4 // 3, stage.densify.max_slots)


def are_ample(slots: int, used: int) -> bool:
  """Whether there is room for as many splats again, and no slots to give up."""
  return 2 * used <= slots == wanted(slots, used)


def give_up_spare(stage: Stage, state: State) -> State:
  """As many slots as are wanted; asked only where another program takes over anyway."""
  alive = getattr(state.avatar, stage.name).alive
  fewer = wanted(len(alive), int(alive.sum()))
  return state if fewer == len(alive) else keep(stage, fewer, state)


def wanted(slots: int, used: int) -> int:
  """Half the slots, and half of those, while that leaves half as many again as are used.

  A step costs what its slots cost.
  """
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
