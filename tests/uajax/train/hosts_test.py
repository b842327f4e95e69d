"""Two processes with a device each train what one process trains; either can stop both."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.uajax.data import subject_folder
from tests.uajax.train import loop_test
from uajax import config, hosts, runs
from uajax.errors import UserError
from uajax.train import loop, step

LONGEST_S = 400


def experiment() -> config.Experiment:
  """Still splats only, which compile soonest, and a batch for two."""
  base = loop_test.experiment()
  still = lambda stage: dataclasses.replace(
    stage, steps=4, warm_steps=4, ensemble_from=4, lpips_from=4,
    densify=dataclasses.replace(stage.densify, start=100))
  fuse = dataclasses.replace(base.fuse, lpips_from=2)
  return dataclasses.replace(
    base, mouth=still(base.mouth), face=still(base.face), fuse=fuse, batch=2)


def train(subject, path, frames):
  return loop.train(subject, path, experiment(), source="folder", frames=frames)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
  path = tmp_path_factory.mktemp("subjects") / "tiny"
  subject_folder.make(path)
  return path


def start(subject, path, frames) -> list[subprocess.Popen]:
  """Two processes of one training, each with one device."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  environment = os.environ | {
    "PYTHONPATH": str(loop_test.ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
  children = []
  for number in range(2):
    code = ("import sys\n"
            "from tests.uajax.train import hosts_test\n"
            "from uajax import hosts\n"
            "from uajax.errors import Stopped\n"
            "try:\n"
            f"  with hosts.joined('127.0.0.1:{port}', 2, {number}):\n"
            f"    hosts_test.train({str(subject)!r}, {str(path)!r}, {frames!r})\n"
            "except Stopped as stop:\n"
            "  sys.exit(128 + stop.signal)\n")
    children.append(subprocess.Popen([sys.executable, "-c", code], env=environment))
  return children


def ended(children) -> list[int]:
  deadline = time.monotonic() + LONGEST_S
  try:
    return [child.wait(max(deadline - time.monotonic(), 1)) for child in children]
  finally:
    for child in children:
      child.kill()


def near(a: runs.Run, b: runs.Run) -> None:
  """As near as rounding lets them be: Adam turns the sign of a gradient of nothing into a step."""
  for x, y in zip(loop_test.leaves(a), loop_test.leaves(b), strict=True):
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    assert np.abs(x - y).mean() < 1e-4 and (np.abs(x - y) > 1e-3).mean() < 0.02


@pytest.mark.slow
def test_two_processes_train_what_one_trains_and_stop_and_resume(subject, tmp_path):
  path = tmp_path / "two"
  children = start(subject, path, "streamed")
  while loop_test._newest(path) < 2 and all(child.poll() is None for child in children):
    time.sleep(0.05)
  children[1].send_signal(signal.SIGTERM)
  assert ended(children) == [128 + signal.SIGTERM] * 2
  stood = loop_test._newest(path)
  assert 2 <= stood < 10
  assert ended(start(subject, path, "resident")) == [0, 0]
  two = runs.open_run(path)
  assert "complete" in two.progress()
  assert [row["total"] for row in loop_test.metrics(two)] == [2, 4, 6, 8, 10]
  near(two, train(subject, tmp_path / "one", "resident"))
  assert step.mesh_of(experiment()).size == 2, "one process with two devices"


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
  monkeypatch.setattr(step.jax, "process_count", lambda: 3)
  monkeypatch.setattr(step.jax, "local_devices", lambda process_index: [None])
  with pytest.raises(UserError, match="3 processes .* batch of 2 evenly: give --batch 3"):
    step.mesh_of(experiment())


def test_a_process_alone_does_everything_itself():
  def refuse():
    raise UserError("no")

  assert hosts.is_first() and hosts.largest(3) == 3 and hosts.told(lambda: b"word") == b"word"
  with pytest.raises(UserError, match="no"):
    hosts.alone(refuse)
