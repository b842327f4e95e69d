"""Which trial comes next: those left unfinished, then the rest of a grid, or of a search."""

import importlib.util
import logging
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any, Literal

from uajax.errors import UserError
from uajax.sweep import space, trials

Search = Literal["grid", "random", "optuna"]
USUAL_TRIALS = 20  # of a search that would never end


def require(package: str) -> None:
  """Raises UserError where a package that sweeps alone need is not installed."""
  if importlib.util.find_spec(package) is None:
    raise UserError(f"sweeps need the package {package}: pip install 'uajax[sweep]', or in a "
                    "checkout pip install -r requirements-sweep.txt")


def check(wanted: space.Space, kind: Search) -> None:
  """Raises UserError where that search in that space cannot be; before anything is written."""
  wanted.check()
  if kind == "grid":
    space.grid(wanted.axes)
  if kind == "optuna":
    require("optuna")


class Proposals:
  """Hands out the trials of a sweep one by one; those that ended before are not run again.

  Args:
    folder: of the sweep.
    wanted: a space that was checked.
    search: "grid" tries every combination, "random" draws, "optuna" draws near what went well.
    count: how many trials in all; None: the whole grid, or USUAL_TRIALS.
    seed: of the draws.
    metric, mode: what "optuna" is after, and whether to have it large ("max") or small ("min").
    retry_failed: run failed trials again too.

  Raises:
    UserError: the folder is damaged.
  """

  def __init__(self, folder: pathlib.Path, wanted: space.Space, search: Search, *,
               count: int | None = None, seed: int = 0, metric: str = trials.METRIC,
               mode: str = "max", retry_failed: bool = False):
    self.axes, self.subjects = wanted.axes, wanted.subjects
    self._folder, self._space, self._metric = folder, wanted, metric
    self._search, self._seed = search, seed
    self._grid = space.grid(self.axes) if search == "grid" else []
    self.count = len(self._grid) if search == "grid" else USUAL_TRIALS
    if count is not None:
      self.count = min(count, self.count) if search == "grid" else count
    known = trials.load_all(folder)
    self.count = max(self.count, len(known))
    if retry_failed:
      for trial in known:
        end = trials.end_of(trial)
        if end is not None and end.state == "failed":
          trials.reopen(trial)
    ended = [trial for trial in known if trials.end_of(trial) is not None]
    self._study = _Study(self.axes, seed + len(known), mode) if search == "optuna" else None
    for trial in ended:
      self.tell(trial)
    self.ended = len(ended)
    self._left = self._remaining(known, {trial.number for trial in ended})

  @property
  def left(self) -> int:
    """How many trials are still to be run, when none has been asked for yet."""
    return self.count - self.ended

  def ask(self) -> trials.Trial | None:
    """The next trial, its folder made; None when there are no more."""
    return next(self._left, None)

  def tell(self, trial: trials.Trial) -> None:
    """Lets the search know how a trial ended."""
    if self._study is not None:
      self._study.tell(trial, trials.end_of(trial), trials.score(trial, self._metric))

  def _remaining(self, known: list[trials.Trial], ended: set[int]) -> Iterator[trials.Trial]:
    yield from (trial for trial in known if trial.number not in ended)
    taken = {trial.number for trial in known}
    for number in range(self.count):
      if number not in taken:
        point = self._point(number)
        yield trials.create(self._folder, number, point, *self._space.at(point))

  def _point(self, number: int) -> space.Point:
    if self._search == "grid":
      return self._grid[number]
    if self._study is None:
      return space.draw(self.axes, self._seed, number)
    return self._study.ask(number)


class _Study:
  """Optuna's tree-structured Parzen estimator over the axes of a sweep.

  Values of a list are told by their place in it: Optuna knows no lists as values.
  """

  def __init__(self, axes: dict[str, space.Axis], seed: int, mode: str):
    import optuna  # pyright: ignore[reportMissingImports]

    self._optuna: Any = optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("optuna").setLevel(logging.WARNING)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # trials in parallel: experimental in Optuna
      sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    self._axes = axes
    self._study = optuna.create_study(
      sampler=sampler, direction="maximize" if mode == "max" else "minimize")
    self._kinds = {name: self._kind(axis) for name, axis in axes.items()}
    self._asked: dict[int, Any] = {}

  def _kind(self, axis: space.Axis):
    kinds = self._optuna.distributions
    if not isinstance(axis, space.Range):
      return kinds.CategoricalDistribution(tuple(range(len(axis))))
    if axis.whole:
      return kinds.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return kinds.FloatDistribution(float(axis.low), float(axis.high), log=axis.log)

  def ask(self, number: int) -> space.Point:
    asked = self._asked[number] = self._study.ask(self._kinds)
    return {name: value if isinstance(axis, space.Range) else space.plain(axis[value])
            for (name, axis), value in zip(
              self._axes.items(), (asked.params[name] for name in self._axes), strict=True)}

  def tell(self, trial: trials.Trial, end: trials.End | None, value: float | None) -> None:
    states = self._optuna.trial.TrialState
    state = "failed" if end is None or value is None else end.state
    state = {"finished": states.COMPLETE, "stopped": states.PRUNED}.get(state, states.FAIL)
    if trial.number in self._asked:
      asked = self._asked.pop(trial.number)
      if state == states.PRUNED:
        asked.report(value, 0)
      self._study.tell(asked, value if state == states.COMPLETE else None, state=state)
      return
    params = {name: trial.point[name] if isinstance(axis, space.Range)
              else [space.plain(choice) for choice in axis].index(trial.point[name])
              for name, axis in self._axes.items()}
    self._study.add_trial(self._optuna.trial.create_trial(
      state=state, value=value if state == states.COMPLETE else None, params=params,
      distributions=self._kinds,
      intermediate_values={0: value} if state == states.PRUNED else None))
