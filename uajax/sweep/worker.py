"""The process of one trial: trains, measures, writes down how it ended.

    python -m uajax.sweep.worker TRIAL_FOLDER

Whoever starts it keeps its standard input open. When that ends, on purpose or because the one
who started it died, training saves a checkpoint and the process ends: no trial outlives its
sweep, and none works in a folder that another process was given.
"""

import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping

from uajax import cache
from uajax.errors import Stopped, UserError

SAVING_S = 60.0  # for a checkpoint, once asked to stop
PACKING_S = 3600.0  # for the records of a subject
UNENDED = 75  # exit status where the trial is to be gone on with


def launch(folder: pathlib.Path, environment: Mapping[str, str]) -> subprocess.Popen:
  """Starts the process of a trial with further environment variables."""
  root = str(pathlib.Path(__file__).resolve().parents[2])
  paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
  with (folder / "log.txt").open("ab") as log:
    return subprocess.Popen(
      [sys.executable, "-m", "uajax.sweep.worker", str(folder.resolve())],
      env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | dict(environment),
      stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def stop(process: subprocess.Popen) -> None:
  """Has it save and end, or ends it."""
  if process.stdin is not None:
    process.stdin.close()
  try:
    process.wait(SAVING_S)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()


def run(folder: pathlib.Path) -> int:
  """Runs a trial to its end. Returns the exit status: 0 finished or failed for good."""
  from uajax import cli, evaluate, lpips
  from uajax.data import loader
  from uajax.sweep import trials
  from uajax.train import loop

  trial = trials.load(folder)
  # A process whose starter was killed may still be saving here.
  with trials.held(folder, patience_s=SAVING_S + 15):
    if trials.end_of(trial) is not None:
      return 0
    try:
      try:
        perceptual = lpips.load()
      except UserError:
        perceptual = None  # the loop says what follows from that
      # Records of a subject that has none yet are written once, not by all trials at a time.
      with trials.held(folder.parent / ".packing", patience_s=PACKING_S):
        loader.open_source(trial.subject, audio=trial.experiment.model.audio)
      loop.train(trial.subject, trial.run, trial.experiment, perceptual=perceptual)
      report = evaluate.evaluate(trial.run)
    except Stopped as stopped:
      print(f"uajax: {stopped}", file=sys.stderr)
      return UNENDED
    except Exception as error:
      traceback.print_exc()
      trials.conclude(trial, trials.End("failed", cli.explain(error)))
      return 0
    scores = {trials.METRIC: report["psnr_db"], "ssim": report["ssim"], "lpips": report["lpips"]}
    scores |= {f"mouth_{name}": value for name, value in report.get("mouth", {}).items()}
    trials.conclude(trial, trials.End("finished", scores={
      name: value for name, value in scores.items() if value is not None}))
  return 0


def _heed_the_end_of_input() -> None:
  def wait():
    while os.read(0, 1):
      pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAVING_S)
    os.kill(os.getpid(), signal.SIGKILL)

  threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
  _heed_the_end_of_input()
  logging.basicConfig(level=logging.WARNING, format="uajax: %(message)s")
  cache.keep_compiled()
  sys.exit(run(pathlib.Path(sys.argv[1])))
