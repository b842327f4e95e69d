"""The folder of a sweep: what its trials are, how they ended, and the table of them all.

    sweep.json          what is swept; the same command goes on with it
    trials/N/trial.json the point, the subject and the experiment of a trial
    trials/N/run/       its run folder, as of `uajax train`
    trials/N/log.txt    what its process said
    trials/N/end.json   how it ended; absent while it has not
    results.csv, results.md, curves.png
"""

import contextlib
import csv
import dataclasses
import fcntl
import io
import json
import math
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

from uajax import config, contact, runs, saving
from uajax.errors import UserError

VERSION = 1
METRIC = "held_out_psnr_db"  # logged while training; in the end of all held-out frames
State = Literal["finished", "stopped", "failed", "unfinished"]


@dataclasses.dataclass(frozen=True)
class Trial:
  folder: pathlib.Path
  number: int
  point: Mapping  # axis -> value
  subject: str
  experiment: config.Experiment

  @property
  def run(self) -> pathlib.Path:
    return self.folder / "run"

  @property
  def log(self) -> pathlib.Path:
    return self.folder / "log.txt"

  @property
  def steps(self) -> int:
    return sum(stage.steps for stage in self.experiment.stages())


@dataclasses.dataclass(frozen=True)
class End:
  """How a trial ended: "stopped" early as no good one, or "failed" for a `reason` in one line."""

  state: State
  reason: str = ""
  scores: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of a finished one


def open_sweep(folder, what: Mapping) -> pathlib.Path:
  """Makes the folder of a sweep, or opens the one that is there if it is of the same sweep.

  Args:
    what: all that makes out the sweep, as plain JSON values by name.

  Raises:
    UserError: the folder holds something else, or another sweep.
  """
  folder = pathlib.Path(folder)
  path = folder / "sweep.json"
  what = json.loads(json.dumps({"version": VERSION, **what}))
  if not path.exists():
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
      raise UserError(f"{folder} exists and is no sweep: choose another --out")
    with saving.aside(path) as partial:
      partial.write_text(json.dumps(what, indent=1) + "\n")
    return folder
  before = _read(path)
  changed = [name for name in {**what, **before} if what.get(name) != before.get(name)]
  if changed:
    raise UserError(f"{folder} was begun with another {', '.join(changed)}: give the same to go "
                    "on, or another --out")
  return folder


@contextlib.contextmanager
def held(path: pathlib.Path, patience_s: float = 0.0) -> Iterator[None]:
  """Within, this process alone works in a folder; another one that dies lets go of it.

  Raises:
    UserError: another process is still at it after `patience_s`.
  """
  path.mkdir(parents=True, exist_ok=True)
  deadline = time.monotonic() + patience_s
  with (path / ".lock").open("a") as file:
    while True:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except OSError:
        if time.monotonic() >= deadline:
          raise UserError(f"another process is at work in {path}: wait for it or stop it") from None
      time.sleep(0.2)
    yield


def create(sweep: pathlib.Path, number: int, point: Mapping, subject: str,
           experiment: config.Experiment) -> Trial:
  trial = Trial(sweep / "trials" / f"{number:04d}", number, point, subject, experiment)
  record = {"number": number, "point": dict(point), "subject": subject,
            "experiment": runs.encode(experiment)}
  with saving.aside(trial.folder / "trial.json") as partial:
    partial.write_text(json.dumps(record, indent=1) + "\n")
  return trial


def load(folder) -> Trial:
  """Raises UserError: no trial, or a damaged one."""
  path = pathlib.Path(folder) / "trial.json"
  record = _read(path)
  try:
    experiment = runs.decode(config.Experiment, record["experiment"], f"{path}: experiment")
    return Trial(path.parent, record["number"], record["point"], record["subject"], experiment)
  except KeyError as error:
    raise UserError(f"{path} lacks {error}: remove {path.parent} to run the trial anew") from None


def load_all(sweep: pathlib.Path) -> list[Trial]:
  """In the order of their numbers."""
  return [load(path.parent) for path in sorted(sweep.glob("trials/*/trial.json"))]


def conclude(trial: Trial, end: End) -> None:
  """Writes down how a trial ended, if that is not known yet."""
  path = trial.folder / "end.json"
  if not path.exists():
    with saving.aside(path) as partial:
      partial.write_text(json.dumps(dataclasses.asdict(end), indent=1) + "\n")


def reopen(trial: Trial) -> None:
  """Forgets how a trial ended: it is run again, from its last checkpoint on."""
  (trial.folder / "end.json").unlink(missing_ok=True)


def end_of(trial: Trial) -> End | None:
  path = trial.folder / "end.json"
  if not path.exists():
    return None
  record = _read(path)
  if record.get("state") not in get_args(State):
    raise UserError(f"{path} is damaged: remove it to run the trial again")
  return End(record["state"], record.get("reason", ""), record.get("scores", {}))


def rows(trial: Trial) -> list[dict]:
  """The lines of metrics that the trial has logged so far; a torn last one is left out."""
  try:
    lines = (trial.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  except (FileNotFoundError, UnicodeDecodeError):
    return []
  found = []
  for line in lines:
    with contextlib.suppress(ValueError):
      row = json.loads(line)
      if isinstance(row, dict) and isinstance(row.get("total"), int):
        found.append(row)
  return found


def value_of(row: Mapping, metric: str) -> float | None:
  """The metric of a line, None where it has none that is finite."""
  value = row.get(metric)
  number = isinstance(value, int | float) and math.isfinite(value)
  return float(value) if number else None  # pyright: ignore[reportArgumentType]


def score(trial: Trial, metric: str) -> float | None:
  """The metric in the end, or the last that was logged."""
  end = end_of(trial)
  found = value_of(end.scores, metric) if end else None
  logged = [value for row in rows(trial) if (value := value_of(row, metric)) is not None]
  return logged[-1] if found is None and logged else found


def table(trials: Sequence[Trial], axes: Sequence[str], metric: str, mode: str) -> list[dict]:
  """A row a trial, the best finished one first, then those stopped, unfinished and failed.

  Columns: trial, state, the axes, the metric, other scores, steps, minutes of training, reason,
  run.
  """
  ends = [end_of(trial) or End("unfinished") for trial in trials]
  others = sorted({name for end in ends for name in end.scores} - {metric})
  made = []
  for trial, end in zip(trials, ends, strict=True):
    logged = rows(trial)
    at = [0, *(row["total"] for row in logged)]
    spent_ms = sum((value_of(row, "step_ms") or 0.0) * max(now - before, 0)
                   for row, before, now in zip(logged, at, at[1:], strict=False))
    made.append(
      {"trial": trial.number, "state": end.state} | {name: trial.point.get(name) for name in axes}
      | {metric: score(trial, metric)} | {name: end.scores.get(name) for name in others}
      | {"steps": f"{at[-1]}/{trial.steps}", "minutes": round(spent_ms / 60_000, 2),
         "reason": end.reason, "run": trial.run.relative_to(trial.folder.parents[1]).as_posix()})
  order = ("finished", "stopped", "unfinished", "failed")
  sign = -1 if mode == "max" else 1

  def rank(row: dict):
    value = row[metric]
    return order.index(row["state"]), value is None, sign * (value or 0.0), row["trial"]

  return sorted(made, key=rank)


def write_results(sweep: pathlib.Path, axes: Sequence[str], metric: str, mode: str) -> list[dict]:
  """Writes results.csv, results.md and curves.png; returns the table."""
  trials = load_all(sweep)
  made = table(trials, axes, metric, mode)
  with saving.aside(sweep / "results.csv") as partial:
    partial.write_text(_as_csv(made), encoding="utf-8")
  with saving.aside(sweep / "results.md") as partial:
    partial.write_text(as_markdown(made), encoding="utf-8")
  curves = {}
  for trial in trials:
    points = [(row["total"], value) for row in rows(trial)
              if (value := value_of(row, metric)) is not None]
    if points:
      label = ", ".join(f"{name}={value}" for name, value in trial.point.items())
      curves[f"{trial.number}: {label}"[:60]] = tuple(zip(*points, strict=True))
  contact.write_curves(sweep / "curves.png", curves, y_label=metric)
  return made


def as_markdown(made: Sequence[Mapping]) -> str:
  if not made:
    return "no trials yet\n"
  heads = list(made[0])
  lines = [heads, ["---"] * len(heads), *([_cell(row[name]) for name in heads] for row in made)]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _as_csv(made: Sequence[Mapping]) -> str:
  text = io.StringIO()
  writer = csv.DictWriter(text, list(made[0]) if made else ["trial"], lineterminator="\n")
  writer.writeheader()
  writer.writerows(made)
  return text.getvalue()


def _cell(value) -> str:
  if value is None:
    return ""
  text = f"{value:.5g}" if isinstance(value, float) else str(value)
  return " ".join(text.split()).replace("|", "\\|")


def _read(path: pathlib.Path) -> dict:
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"there is no {path}: give the folder of a sweep") from None
  except (ValueError, UnicodeDecodeError):
    raise UserError(f"{path} is damaged: restore it or choose another --out") from None
  if not isinstance(record, dict):
    raise UserError(f"{path} is damaged: restore it or choose another --out")
  return record
