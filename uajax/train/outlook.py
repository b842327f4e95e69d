"""The programs that a stage calls, and those that follow: what is compiled while the device trains.

A program is one for its shapes. How many slots a layer will have is known when its splats no longer
come and go in numbers; until then nothing is compiled that would depend on it, unless the slots
have room for growth and are not too many.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from uajax.avatar import Avatar
from uajax.config import Experiment, Stage
from uajax.train import slots
from uajax.train.ahead import Ahead, Call
from uajax.train.step import (
  Chunk,
  Material,
  State,
  enter,
  grow_and_prune,
  is_perceptual,
  mesh_of,
  phase_of,
  run_steps,
  turning_points,
)

STEADY = 0.1  # share of the splats by which they may change between two looks
LONG = 20_000  # steps of one program that make it worth tuning


def is_long(stage: Stage, step: int) -> bool:
  """Whether the program of a step serves for so many that tuning it pays.

  Never the mouth's: on an H200 its small products took 2.03 ms tuned and 1.72 ms untuned.
  """
  turns = (0, *turning_points(stage))
  served = min(p for p in turns if p > step) - max(p for p in turns if p <= step)
  return stage.name != "mouth" and served >= LONG


class Given(NamedTuple):
  """What a program of steps is given; or the shapes of it."""

  state: State
  sums: dict
  count: Int[Array, ""]  # steps
  material: Material
  chunk: Chunk
  key: Any


class Outlook:
  """The programs of one stage and of those after it."""

  def __init__(self, experiment: Experiment, number: int, perceptual,
               drawing: Callable[[Avatar], Call]):
    """
    Args:
      number: of the stage.
      perceptual: LPIPS parameters, or None.
      drawing: the program that shows an avatar.
    """
    self._experiment, self._number = experiment, number
    self._stage = experiment.stages()[number]
    self._perceptual, self._drawing = perceptual, drawing
    self._used: int | None = None  # slots, at the last look

  def steps(self, step: int, capacity: int | None, given: Given) -> Call:
    """The program that trains from a step on."""
    return self._steps(self._stage, step, capacity, given)

  def growth(self, given: Given) -> Call:
    """The program by which splats are born and die."""
    return self._growth(self._stage, given)

  def prepare(self, programs: Ahead, step: int, capacity: int | None, given: Given) -> None:
    """Has what follows a step compiled."""
    if not programs.active:
      return
    stage, state = self._stage, given.state
    later = [point for point in turning_points(stage) if point > step]
    fewer = growing = None
    known = True
    if stage.name != "fuse":
      alive = getattr(state.avatar, stage.name).alive
      there, used = len(alive), int(alive.sum())
      fewer = slots.wanted(there, used)
      rising, steady = self._trend(step, used)
      growing = rising and step < stage.densify.until and slots.are_filling(stage, there, used)
      known = steady or slots.are_ample(there, used)
    held = tuple(len(layer.alive) for layer in (state.avatar.face, state.avatar.mouth))
    programs.prepare(self._following(step, later, capacity, given, fewer, growing, known),
                     about=(self._number, len(later), held, fewer, growing, known, capacity))

  def _trend(self, step: int, used: int) -> tuple[bool, bool]:
    """Whether splats become more, and whether their number says how many there will be."""
    before, self._used = self._used, used
    if step <= self._stage.densify.start:
      return False, False
    if before is None:  # the first look of a resumed run
      return True, True
    return used > before, abs(used - before) <= STEADY * before

  def _following(self, step: int, later: list[int], capacity: int | None, given: Given,
                 fewer: int | None, growing: bool | None, known: bool) -> Iterator[Call]:
    """The programs to come, in order."""
    experiment, stage, number = self._experiment, self._stage, self._number
    if fewer is not None:
      yield self._growth(stage, given)
    if growing and (larger := slots.growth(stage, given.state)):
      grown = given._replace(state=slots.put(stage, given.state, self._answer(larger)))
      yield larger
      yield self._steps(stage, step, capacity, grown)
      yield self._growth(stage, grown)
    if not known:
      return
    drawings = [self._drawing(given.state.avatar)]
    if fewer is not None and fewer < len(getattr(given.state.avatar, stage.name).alive):
      thinning = slots.thinning(stage, given.state, fewer)
      yield thinning
      given = given._replace(state=slots.put(stage, given.state, self._answer(thinning)))
      drawings.insert(0, self._drawing(given.state.avatar))  # of these there will be more
    while True:
      turns = [self._steps(stage, point, capacity, given)
               for point in later if point < stage.steps]
      yield from turns[:1]
      yield from drawings
      yield from turns[1:]
      number += 1
      if number == len(experiment.stages()):
        return
      stage = experiment.stages()[number]
      later = [0, *turning_points(stage)]
      given = given._replace(
        state=self._shapes(functools.partial(enter, stage), given.state.avatar))
      if stage.name == "fuse":  # it alone looks at what is behind the head
        pictures = given.chunk.pictures
        given = given._replace(chunk=given.chunk.replace(
          pictures=pictures._replace(background=pictures.image)))
      else:
        yield self._growth(stage, given)
      drawings = [self._drawing(given.state.avatar)]

  def _steps(self, stage: Stage, step: int, capacity: int | None, given: Given) -> Call:
    state, sums, count, material, chunk, key = given
    weights = self._perceptual if is_perceptual(stage, step) else None
    static = dict(experiment=self._experiment, stage=stage, phase=phase_of(stage, step),
                  capacity=capacity, mesh=mesh_of(self._experiment))
    return Call(run_steps, static, (state, sums, count, material, chunk, weights, key),
                long=is_long(stage, step))

  def _growth(self, stage: Stage, given: Given) -> Call:
    static = dict(experiment=self._experiment, stage=stage)
    return Call(grow_and_prune, static, (given.state, given.material, given.key))

  def _answer(self, call: Call):
    """The shapes of what a program returns."""
    return self._shapes(functools.partial(call.function, **call.static), *call.arrays)

  def _shapes(self, function, tree):
    """Of what a function of shapes would return, spread over the devices that train."""
    mesh = mesh_of(self._experiment)
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere, weak_type=x.weak_type),
      jax.eval_shape(function, tree))
