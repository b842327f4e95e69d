"""How many slots a layer in training has: more where growth wants them, fewer where most are empty.

Programs are compiled for a number of slots, and a step costs what its slots cost.
"""

import fractions
import functools
from typing import Any, NamedTuple

import jax

from uajax.config import Stage
from uajax.train import densify
from uajax.train.ahead import Ahead, Call
from uajax.train.step import State
from uajax.types import Alive, Splats

FEWEST = 128  # what a program of the fusion's kernels takes at once
FILLING = 0.6  # of the slots: so many are used when more will be wanted before long


class Held(NamedTuple):
  """All that slots hold."""

  splats: Splats
  alive: Alive
  opt: Any  # the moments of the splats
  stats: densify.Stats


def make_room(stage: Stage, state: State, change: densify.Change, programs: Ahead) -> State:
  """More slots where growth found none left, up to the stage's limit."""
  larger = growth(stage, state) if int(change.missed) else None
  return state if larger is None else put(stage, state, programs(larger))


def growth(stage: Stage, state: State) -> Call | None:
  """The program that makes half as many slots again, and next time what makes that twice as many.

  None where there are as many as there may be.
  """
  slots = len(getattr(state.avatar, stage.name).alive)
  more = _larger(stage, slots)
  return Call(_extend, dict(more=more), (_take(stage, state),)) if more > slots else None


@functools.partial(jax.jit, static_argnames="more")
def _extend(held: Held, *, more: int) -> Held:
  larger = densify.extend(held, len(held.alive), more)
  return larger._replace(stats=densify.no_stats(more))


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


def give_up_spare(stage: Stage, state: State, programs: Ahead) -> State:
  """As many slots as are wanted; asked only where another program takes over anyway."""
  alive = getattr(state.avatar, stage.name).alive
  fewer = wanted(len(alive), int(alive.sum()))
  if fewer == len(alive):
    return state
  return put(stage, state, programs(thinning(stage, state, fewer)))


def wanted(slots: int, used: int) -> int:
  """Half the slots, and half of those, while that leaves half as many again as are used.

  A step costs what its slots cost.
  """
  while slots % (2 * FEWEST) == 0 and slots >= 3 * used:
    slots //= 2
  return slots


def thinning(stage: Stage, state: State, fewer: int) -> Call:
  """The program that moves what lives into `fewer` slots."""
  return Call(_compact, dict(fewer=fewer), (_take(stage, state),))


@functools.partial(jax.jit, static_argnames="fewer")
def _compact(held: Held, *, fewer: int) -> Held:
  return densify.compact(held, held.alive, fewer)


def _take(stage: Stage, state: State) -> Held:
  layer = getattr(state.avatar, stage.name)
  return Held(layer.splats, layer.alive, state.opt["splats"], state.stats)


def put(stage: Stage, state: State, held: Held) -> State:
  """The state with other slots in the layer that the stage trains."""
  layer = getattr(state.avatar, stage.name).replace(splats=held.splats, alive=held.alive)
  return state.replace(avatar=state.avatar.replace(**{stage.name: layer}),
                       opt=state.opt | {"splats": held.opt}, stats=held.stats)
