"""The folder of a sweep: goes on where it stands, and its table tells what happened."""

import csv
import json

import pytest

from uajax import config
from uajax.errors import UserError
from uajax.sweep import search, space, trials
from uajax.sweep.trials import METRIC, End

AXES = {"seed": (0, 1, 2), "batch": (1, 2)}
SPACE = space.Space(config.demo(), ("a/subject",), settings=AXES)


def log(trial: trials.Trial, *rows: dict, torn: str = "") -> None:
  trial.run.mkdir(parents=True, exist_ok=True)
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (trial.run / "metrics.jsonl").write_text(lines + torn)


def proposals(tmp_path, kind="grid", **settings) -> search.Proposals:
  return search.Proposals(tmp_path, SPACE, kind, **settings)


def drain(asked: search.Proposals) -> list[int]:
  return [trial.number for trial in iter(asked.ask, None)]


def test_a_trial_is_read_back_as_it_was_written(tmp_path):
  made = proposals(tmp_path).ask()
  assert made is not None and trials.load(made.folder) == made
  assert made.point == {"seed": 0, "batch": 1} and made.subject == "a/subject"
  assert made.experiment == space.replaced(SPACE.base, {"seed": 0, "batch": 1})


def test_ended_trials_are_not_run_again_and_interrupted_ones_come_first(tmp_path):
  first = proposals(tmp_path)
  begun = [first.ask() for _ in range(4)]
  for trial, state in zip(begun, ("finished", None, "failed", "stopped"), strict=True):
    if state:
      trials.conclude(trial, End(state))
  again = proposals(tmp_path)
  assert (again.count, again.ended, again.left) == (6, 3, 3)
  assert drain(again) == [1, 4, 5]
  assert drain(proposals(tmp_path, retry_failed=True)) == [1, 2, 4, 5]
  assert proposals(tmp_path).left == 4


def test_the_first_end_of_a_trial_holds(tmp_path):
  trial = proposals(tmp_path).ask()
  assert trial is not None and trials.end_of(trial) is None
  trials.conclude(trial, End("finished", scores={METRIC: 30.0}))
  trials.conclude(trial, End("stopped", "early"))
  assert trials.end_of(trial) == End("finished", scores={METRIC: 30.0})


def test_a_random_search_can_grow_and_keeps_its_points(tmp_path):
  few = [trial.point for trial in iter(proposals(tmp_path / "a", "random", count=3).ask, None)]
  drain(proposals(tmp_path / "b", "random", count=2))
  grown = proposals(tmp_path / "b", "random", count=3)
  assert [trial.point for trial in iter(grown.ask, None)] == few


def test_another_sweep_does_not_touch_a_folder(tmp_path):
  what = {"search": "grid"} | SPACE.encode()
  folder = trials.open_sweep(tmp_path / "sweep", what)
  assert trials.open_sweep(folder, what) == folder
  other = space.Space(SPACE.base, SPACE.subjects, settings={"seed": (0, 1)})
  with pytest.raises(UserError, match="begun with another settings"):
    trials.open_sweep(folder, {"search": "grid"} | other.encode())
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "letter.txt").touch()
  with pytest.raises(UserError, match="is no sweep"):
    trials.open_sweep(tmp_path / "mine", what)


def test_two_processes_are_never_at_work_in_one_folder(tmp_path):
  with (trials.held(tmp_path), pytest.raises(UserError, match="another process"),
        trials.held(tmp_path)):
    pass
  with trials.held(tmp_path):
    pass


def test_the_table_tells_of_every_trial_the_best_first(tmp_path):
  asked = proposals(tmp_path)
  good, better, early, broken, torn = (asked.ask() for _ in range(5))
  steps = good.steps
  for trial, value in ((good, 30.0), (better, 32.5)):
    log(trial, {"total": 50, "step_ms": 60.0, METRIC: 20.0}, {"total": steps, "step_ms": 30.0})
    trials.conclude(trial, End("finished", scores={METRIC: value, "ssim": 0.9}))
  log(early, {"total": 100, "step_ms": 600.0, METRIC: 11.0}, {"total": 200, "step_ms": 600.0})
  trials.conclude(early, End("stopped", "early, at 5 % of its steps"))
  trials.conclude(broken, End("failed", "out of memory: a | b"))
  log(torn, {"total": 50, METRIC: float("nan")}, torn='{"total": 10')
  table = trials.write_results(tmp_path, list(AXES), METRIC, "max")
  assert [row["trial"] for row in table] == [1, 0, 2, 4, 3]
  assert [row["state"] for row in table] == [
    "finished", "finished", "stopped", "unfinished", "failed"]
  assert [row[METRIC] for row in table] == [32.5, 30.0, 11.0, None, None]
  assert [row["steps"] for row in table] == [
    f"{at}/{steps}" for at in (steps, steps, 200, 50, 0)]
  assert table[2]["minutes"] == 2.0 and table[2]["ssim"] is None
  assert table[0]["batch"] == 2 and table[0]["run"] == "trials/0001/run"
  with (tmp_path / "results.csv").open() as file:
    told = list(csv.DictReader(file))
  assert [row["trial"] for row in told] == ["1", "0", "2", "4", "3"]
  assert told[-1]["reason"] == "out of memory: a | b"
  lines = (tmp_path / "results.md").read_text().splitlines()
  assert len(lines) == 7 and "a \\| b" in lines[-1]
  assert (tmp_path / "curves.png").stat().st_size > 1000
  assert trials.table(trials.load_all(tmp_path), [], METRIC, "min")[0]["trial"] == 0


def test_a_damaged_record_is_one_line(tmp_path):
  trial = proposals(tmp_path).ask()
  assert trial is not None
  (trial.folder / "end.json").write_text('{"state": "fine"}')
  with pytest.raises(UserError, match=r"end.json is damaged"):
    trials.end_of(trial)
  (trial.folder / "trial.json").write_text("{")
  with pytest.raises(UserError, match=r"trial.json is damaged"):
    trials.load(trial.folder)


def test_optuna_goes_where_it_was_good_and_knows_of_earlier_trials(tmp_path):
  pytest.importorskip("optuna")
  wanted = space.Space(config.demo(), ("s",), settings={
    "scene_m": space.Range(0.0, 1.0), "model.motion.planes.multiples": ((1,), (1, 2))})

  def run(count):
    asked = search.Proposals(tmp_path, wanted, "optuna", count=count, seed=3)
    for trial in iter(asked.ask, None):
      if trial.number % 5 == 4:
        end = End("failed", "for the test")
      else:
        multiples = trial.experiment.model.motion.planes.multiples
        far = abs(trial.experiment.scene_m - 0.7) + len(multiples)
        end = End("finished", scores={METRIC: -far})
      trials.conclude(trial, end)
      asked.tell(trial)

  run(15)
  run(40)
  late = trials.load_all(tmp_path)[25:]
  assert len(late) == 15
  near = [abs(trial.experiment.scene_m - 0.7) for trial in late]
  assert sorted(near)[7] < 0.15, "by chance it would be 0.28"
  assert sum(trial.point["model.motion.planes.multiples"] == [1] for trial in late) > 9
