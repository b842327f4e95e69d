"""Training killed again and again, at moments nobody chose, ends with the bits of an unbroken run.

`UAJAX_KILLS=200` kills more often than the twenty times of the suite.
"""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.uajax.data import subject_folder
from tests.uajax.train import loop_test
from uajax import runs

KILLS = int(os.environ.get("UAJAX_KILLS", "20"))
LONGEST_S = 300  # of one training, with nothing compiled yet


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost(tmp_path, capsys):
  subject, path = tmp_path / "subject", tmp_path / "run"
  subject_folder.make(subject)
  whole = loop_test.train(subject, tmp_path / "whole")
  rng = random.Random(int(os.environ.get("UAJAX_KILLS_SEED", "0")))
  kills = saving = finished = checkpoints = 0
  while kills < KILLS:
    child = _start(subject, path)
    torn = _wait_for_the_moment(child, path, rng)
    child.send_signal(signal.SIGKILL)
    ended = child.wait()
    if ended == 0:  # it was done before the moment came: begin anew
      finished += 1
      assert loop_test.same(whole, runs.open_run(path))
      shutil.rmtree(path)
      continue
    assert ended == -signal.SIGKILL, f"it failed by itself: {_said(path)}"
    kills += 1
    saving += torn
    if (path / "run.json").exists():
      checkpoints += _read_all(runs.open_run(path))
  assert _start(subject, path).wait() == 0
  assert loop_test.same(whole, runs.open_run(path))
  with capsys.disabled():
    print(f"{kills} kills, {saving} of them while a checkpoint was written; {checkpoints} "
          f"checkpoints read; {finished + 1} trainings ended with the same bits")


def _start(subject: pathlib.Path, path: pathlib.Path) -> subprocess.Popen:
  code = ("from tests.uajax.train import loop_test\n"
          f"loop_test.train({str(subject)!r}, {str(path)!r})\n")
  with open(_words(path), "w") as words:
    return subprocess.Popen([sys.executable, "-c", code], stderr=words,
                            env=os.environ | {"PYTHONPATH": str(loop_test.ROOT)})


def _words(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix(".stderr")


def _said(path: pathlib.Path) -> str:
  return _words(path).read_text()[-2000:]


def _wait_for_the_moment(child: subprocess.Popen, path: pathlib.Path, rng: random.Random) -> bool:
  """Returns while a checkpoint is written, while it trains, or at any time since its start.

  Returns:
    whether a checkpoint is being written now.
  """
  known, deadline = loop_test._newest(path), time.monotonic() + LONGEST_S
  writing = lambda: any((path / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
  made = lambda: loop_test._newest(path) - known  # in steps, two a checkpoint

  def wait(until, then_s: float):
    while child.poll() is None and time.monotonic() < deadline and not until():
      time.sleep(0.001)
    time.sleep(rng.uniform(0, then_s))

  moment = rng.random()
  if moment < 0.5:
    enough = 2 * rng.randrange(3)
    wait(lambda: made() >= enough and writing(), 0.1)
  elif moment < 0.9:
    wait(lambda: made() > 0, 1.5)
  else:
    wait(lambda: True, 12)
  return writing()


def _read_all(run: runs.Run) -> int:
  """Reads every checkpoint that has its name; fails where one cannot be read."""
  steps = run.steps()
  for step in steps:
    run.read(step, lambda avatar, at: loop_test.loop._resume_template(avatar, run.experiment, at))
  return len(steps)
