"""What a sweep varies, and how a point of that space becomes an experiment.

An axis is a name with the values it may take: `subject` (folders), `variant` (the experiments
that a file's `sweep()` yields by name) or a setting by the name that `uajax train` gives it
(`face.densify.slots`). A point holds one value an axis, as JSON has it.
"""

import dataclasses
import difflib
import itertools
import json
import math
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uajax import config, runs
from uajax.errors import UserError

SUBJECT, VARIANT = "subject", "variant"

Point = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Range:
  """All values from `low` to `high`, both included: whole numbers if both ends are whole."""

  low: float
  high: float
  log: bool = False  # drawn evenly in the logarithm

  @property
  def whole(self) -> bool:
    return isinstance(self.low, int) and isinstance(self.high, int)

  def at(self, share: float) -> float:
    """The value at a share 0..1 (below 1 for whole numbers) of the way."""
    low, high = self.low, self.high + self.whole
    if self.log:
      value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    else:
      value = low + share * (high - low)
    return min(int(value), int(self.high)) if self.whole else value


Axis = tuple | Range


@dataclasses.dataclass(frozen=True)
class Space:
  """Everything that the trials of a sweep may be."""

  base: config.Experiment
  subjects: tuple[str, ...]
  variants: Mapping[str, config.Experiment] = dataclasses.field(default_factory=dict)
  settings: Mapping[str, Axis] = dataclasses.field(default_factory=dict)

  @property
  def axes(self) -> dict[str, Axis]:
    """What differs between trials: an axis of one value does not."""
    named: dict[str, Axis] = {}
    if len(self.subjects) > 1:
      named[SUBJECT] = self.subjects
    if len(self.variants) > 1:
      named[VARIANT] = tuple(self.variants)
    return named | dict(self.settings)

  def at(self, point: Mapping) -> tuple[str, config.Experiment]:
    """The subject and the experiment of a point."""
    subject = point.get(SUBJECT, self.subjects[0])
    only = next(iter(self.variants), None)
    variant = point.get(VARIANT, only)
    experiment = self.base if variant is None else self.variants[variant]
    changes = {name: value for name, value in point.items() if name in self.settings}
    return str(subject), replaced(experiment, changes)

  def check(self) -> None:
    """Raises UserError where nothing varies, or an axis holds what its setting cannot be."""
    if not self.axes:
      raise UserError("there is nothing to vary: give --over NAME=A,B, several subjects, or an "
                      "experiment file with space() or sweep()")
    for name, axis in self.settings.items():
      if isinstance(axis, Range):
        ends = (axis.low, axis.high)
        numbers = all(isinstance(end, int | float) and math.isfinite(end) for end in ends)
        if not numbers or axis.low >= axis.high or (axis.log and axis.low <= 0):
          raise UserError(f"{name} cannot range over {axis}: give low < high, and with log 0 < low")
      elif not axis:
        raise UserError(f"{name} has no value to try: give one or more")
      for value in (axis.low, axis.high) if isinstance(axis, Range) else axis:
        for experiment in self.variants.values() or [self.base]:
          replaced(experiment, {name: value})

  def encode(self) -> dict:
    """As plain JSON values, to tell whether two sweeps are the same."""
    settings = {name: dataclasses.asdict(axis) if isinstance(axis, Range) else runs.encode(axis)
                for name, axis in self.settings.items()}
    variants = {name: runs.encode(experiment) for name, experiment in self.variants.items()}
    return {"base": runs.encode(self.base), "subjects": list(self.subjects), "variants": variants,
            "settings": settings}


def of_module(module: types.ModuleType, base: config.Experiment, wanted: config.Experiment,
              subjects: Sequence[str | os.PathLike], over: Sequence[str]) -> Space:
  """What an experiment file and the command line together ask for.

  Args:
    module: of the file. `space()` gives a dict from the names of settings to a tuple of values
      or a `Range`; `sweep()` yields names and whole experiments. Both are optional.
    base: what its `get_config()` gives.
    wanted: the same with the command line's changes, which all variants get.
    over: settings to vary besides, as `parse_axis` reads them; they go before the file's.

  Raises:
    UserError: the file's functions fail or give something else; no such subject folder.
  """
  try:
    settings = dict(module.space()) if hasattr(module, "space") else {}
    variants = dict(module.sweep()) if hasattr(module, "sweep") else {}
  except Exception as error:
    line = " ".join(f"{type(error).__name__}: {error}".split())
    raise UserError(f"space() or sweep() of {module.__file__} fails with {line}: mend the "
                    "file") from error
  settings |= dict(map(parse_axis, over))
  for name, axis in settings.items():
    if not isinstance(name, str) or not isinstance(axis, tuple | list | Range):
      raise UserError(f"space() of {module.__file__} gives {name!r}: {axis!r}: give the name of a "
                      "setting, and a tuple of values or a uajax.sweep.space.Range")
  for name, variant in variants.items():
    if not isinstance(name, str) or not isinstance(variant, config.Experiment):
      raise UserError(f"sweep() of {module.__file__} yields {name!r} with a "
                      f"{type(variant).__name__}: yield a name and a uajax.config.Experiment")
  for subject in subjects:
    if not os.path.isdir(subject):
      raise UserError(f"there is no subject folder {subject}: `uajax preprocess` makes one")
  changes = differences(base, wanted)
  return Space(
    wanted, tuple(os.path.abspath(subject) for subject in dict.fromkeys(subjects)),
    {name: replaced(variant, changes) for name, variant in variants.items()},
    {name: axis if isinstance(axis, Range) else tuple(axis) for name, axis in settings.items()})


def grid(axes: Mapping[str, Axis]) -> list[Point]:
  """Every combination; the last axis turns fastest.

  Raises:
    UserError: one of them is a range.
  """
  listed = []
  for name, axis in axes.items():
    if isinstance(axis, Range):
      raise UserError(f"{name} is a range, which no grid can fill: list its values, or use "
                      "--search random or optuna")
    listed.append([plain(value) for value in axis])
  return [dict(zip(axes, values, strict=True)) for values in itertools.product(*listed)]


def draw(axes: Mapping[str, Axis], seed: int, number: int) -> Point:
  """The point of one trial of a random search, the same however many are asked for."""
  random = np.random.default_rng([seed, number])
  point = {}
  for name, axis in axes.items():
    share = float(random.random())
    point[name] = axis.at(share) if isinstance(axis, Range) else plain(
      axis[int(share * len(axis))])
  return point


def replaced(experiment: config.Experiment, changes: Mapping) -> config.Experiment:
  """The experiment with other values for some settings, by their dotted names.

  Raises:
    UserError: there is no such setting, or it cannot have that value.
  """
  tree: Any = runs.encode(experiment)
  for name, value in changes.items():
    *path, last = name.split(".")
    node: Any = tree
    for part in path:
      node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node or isinstance(node[last], dict):
      near = difflib.get_close_matches(name, names(experiment), 3, 0.5)
      hint = f"did you mean {' or '.join(near)}?" if near else "see uajax train --help"
      raise UserError(f"there is no setting {name}: {hint}")
    before, node[last] = node[last], runs.encode(_listed(value))
    try:
      runs.decode(config.Experiment, tree, name)
    except UserError:
      raise UserError(f"{name} cannot be {value!r}: it is {before!r} in the experiment; give a "
                      "value of that kind") from None
  return runs.decode(config.Experiment, tree, "experiment")


def names(experiment: config.Experiment) -> list[str]:
  """The dotted names of all settings."""
  return list(_leaves(runs.encode(experiment)))


def differences(base: config.Experiment, other: config.Experiment) -> Point:
  """The settings of `other` that `base` has otherwise."""
  before = dict(_leaves(runs.encode(base)).items())
  return {n: v for n, v in _leaves(runs.encode(other)).items() if v != before[n]}


def parse_axis(text: str) -> tuple[str, tuple]:
  """`"face.densify.slots=1024,2048"` -> the name and its values, read as JSON or else as words.

  Raises:
    UserError: there is no name or no value.
  """
  name, _, listed = text.partition("=")
  name = name.strip().removeprefix("--").replace("-", "_")
  if not name or not listed.strip():
    raise UserError(f"{text!r} says nothing to vary: give NAME=VALUE,VALUE such as "
                    "face.densify.slots=1024,2048")
  try:
    return name, tuple(json.loads(f"[{listed}]", parse_constant=_refuse))
  except ValueError:
    return name, tuple(_word(word.strip()) for word in listed.split(","))


def _word(word: str):
  try:
    return json.loads(word, parse_constant=_refuse)
  except ValueError:
    return word


def _refuse(constant: str):
  raise ValueError(f"{constant} is no number to try")


def _leaves(tree, prefix: str = "") -> dict:
  if not isinstance(tree, dict):
    return {prefix: tree}
  inner: dict = {}
  for key, value in tree.items():
    inner |= _leaves(value, f"{prefix}.{key}".strip("."))
  return inner


def _listed(value):
  """Lists within as tuples, which is how `runs.encode` knows them."""
  return tuple(map(_listed, value)) if isinstance(value, Sequence) and not isinstance(
    value, str) else value


def plain(value):
  return runs.encode(_listed(value))
