"""A whole sweep by its command: interrupted, its processes killed, and the table still right;
on this machine's own Ray, and on a cluster that it joins.
"""

import contextlib
import csv
import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from tests.uajax.data import subject_folder
from uajax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[3]
EXPERIMENT = """
import dataclasses
from uajax import config

def get_config():
  planes = config.Planes(features=4, resolution=4, multiples=(1,))
  motion = config.Motion(planes=planes, emotion_planes=planes, members=2, hidden=4, latent=4,
                         features=4)
  def small(stage, slots):
    still = dataclasses.replace(stage.densify, until=0, slots=slots, max_slots=slots)
    return dataclasses.replace(
      config.shorten(stage, 200, splats=24), warm_steps=0, ensemble_from=0, guide_until=0,
      hair_until=0, lpips_from=200, densify=still)
  return config.Experiment(
    model=config.Model(motion=motion), mouth=small(config.MOUTH, 32), face=small(config.FACE, 64),
    fuse=dataclasses.replace(config.FUSE, steps=20, lpips_from=20), log_every=5, picture_every=20,
    save_every=5)

def sweep():
  for seed in range(5):
    yield f"seed{seed}", dataclasses.replace(get_config(), seed=seed)
  yield "cannot", dataclasses.replace(get_config(), model=dataclasses.replace(
    get_config().model, audio="phones"))
"""
STEPS = 420


def processes(folder: pathlib.Path) -> dict[int, int]:
  """The trials in training: number -> process."""
  found = {}
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      words = path.read_bytes().split(b"\0")
    except OSError:
      continue
    if b"uajax.sweep.worker" in words and str(folder).encode() in words[-2]:
      found[int(words[-2].decode().rsplit("/", 1)[1])] = int(path.parent.name)
  return found


def parent(process: int) -> int:
  return int(pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])


def step(folder: pathlib.Path, number: int) -> int:
  """The newest checkpoint of a trial."""
  steps = (folder / f"trials/{number:04d}/run/checkpoints").glob("[0-9]*")
  return max((int(path.name) for path in steps if path.name.isdigit()), default=0)


def under_way(folder: pathlib.Path, but: int | None = None) -> tuple[int, int] | None:
  """A trial that trains and has checkpoints, and its process."""
  for number, process in processes(folder).items():
    if number != but and 20 <= step(folder, number) < STEPS - 40:
      return number, process
  return None


def resumed(folder: pathlib.Path, number: int) -> int:
  """How often a trial went on from a checkpoint."""
  return (folder / f"trials/{number:04d}/log.txt").read_text().count("resuming")


def await_(condition, sweep: subprocess.Popen):
  deadline = time.monotonic() + 600
  while not (found := condition()):
    assert sweep.poll() is None, f"the sweep ended before its time: {sweep.communicate()}"
    assert time.monotonic() < deadline
    time.sleep(0.1)
  return found


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_killed_and_interrupted_a_sweep_goes_on_and_its_table_is_right(tmp_path):
  pytest.importorskip("ray")
  subject, out, file = tmp_path / "subject", tmp_path / "sweep", tmp_path / "tiny.py"
  subject_folder.make(subject)
  file.write_text(EXPERIMENT)
  words = [sys.executable, "-m", "uajax", "sweep", str(file), str(subject), "--out", str(out),
           "--cpus-per-trial", "1", "--at-once", "2"]  # fmt: skip
  settings = {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

  def start():
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | settings, cwd=tmp_path)

  sweep = start()
  await_(lambda: step(out, 0) >= 20 and step(out, 1) >= 20, sweep)
  sweep.send_signal(signal.SIGINT)
  said = sweep.communicate(timeout=300)
  assert sweep.returncode == 130 and "the same command goes on" in said[1]
  assert not processes(out), "no process outlives its sweep"
  stood = step(out, 0), step(out, 1)
  assert all(20 <= at < STEPS for at in stood)

  sweep = start()
  # One trial's own process dies, and of another the one that Ray watches it by.
  first, process = await_(lambda: under_way(out), sweep)
  before = {first: resumed(out, first)}
  os.kill(process, signal.SIGKILL)
  second, process = await_(lambda: under_way(out, but=first), sweep)
  before[second] = resumed(out, second)
  os.kill(parent(process), signal.SIGKILL)
  said = sweep.communicate(timeout=900)
  assert sweep.returncode == 0, said
  assert not processes(out)

  with (out / "results.csv").open() as table:
    rows = {row["variant"]: row for row in csv.DictReader(table)}
  assert len(rows) == 6
  for variant, row in rows.items():
    if variant == "cannot":
      assert row["state"] == "failed" and "phones" in row["reason"], row
      continue
    assert row["state"] == "finished" and row["steps"] == f"{STEPS}/{STEPS}", row
    report = json.loads((out / row["run"] / "evaluation_val.json").read_text())
    assert float(row["held_out_psnr_db"]) == report["psnr_db"] > 0
    logged = (out / row["run"] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["total"] for line in logged] == list(range(5, STEPS + 1, 5))
  scores = [float(row["held_out_psnr_db"]) for row in rows.values() if row["state"] == "finished"]
  assert scores == sorted(scores, reverse=True)
  assert all(resumed(out, number) > count for number, count in before.items())
  assert (out / "curves.png").exists() and not (out / ".ray").exists()

  ends = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/end.json")}
  sweep = start()
  said = sweep.communicate(timeout=300)
  assert sweep.returncode == 0 and said[0].count("| finished |") == 5
  assert {path: path.stat().st_mtime_ns for path in out.glob("trials/*/end.json")} == ends


def environment(process: int) -> dict[str, str]:
  entries = pathlib.Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
  return dict(entry.split("=", 1) for entry in entries if "=" in entry)


@contextlib.contextmanager
def cluster(settings: dict[str, str]):
  """A Ray cluster of a head without devices and two machines with one each, all of them this one.

  Yields its address and the processes of the two.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  folder = pathlib.Path(tempfile.mkdtemp(prefix="ray"))  # sockets lie in it: no long name
  started = []

  def start(*words: str) -> subprocess.Popen:
    path = folder / f"said{len(started)}"
    with path.open("w") as said:
      started.append(subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", *words, "--block",
         "--object-store-memory", str(100 * 2**20)],
        stdout=said, stderr=said, start_new_session=True, cwd=folder,
        env=os.environ | {"RAY_raylet_start_wait_time_s": "120"} | settings))  # a busy machine
    deadline = time.monotonic() + 180
    while "Ray runtime started" not in (told := path.read_text()):  # two at once take one port
      assert time.monotonic() < deadline and started[-1].poll() is None, told
      time.sleep(0.5)
    return started[-1]

  try:
    start("--head", "--port", str(port), "--num-cpus", "0", "--include-dashboard", "false",
          "--temp-dir", str(folder), "--disable-usage-stats")  # fmt: skip
    address = f"127.0.0.1:{port}"
    machines = [start("--address", address, "--num-cpus", "1", "--num-gpus", "1") for _ in "ab"]
    yield address, machines
  finally:
    for process in reversed(started):
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    for process in started:
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_cluster_is_joined_devices_shared_and_a_machine_that_dies_does_no_harm(tmp_path):
  pytest.importorskip("ray")
  subject, out, file = tmp_path / "subject", tmp_path / "sweep", tmp_path / "tiny.py"
  subject_folder.make(subject)
  file.write_text(EXPERIMENT.split("def sweep")[0])
  # The cluster's own environment knows nothing of uajax; what the command has is handed on.
  token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "PYTHONPATH": ""}
  ours = {"PYTHONPATH": str(ROOT), "UAJAX_MODELS": str(tmp_path)}
  with cluster(token) as (address, machines):
    sweep = subprocess.Popen(
      [sys.executable, "-m", "uajax", "sweep", str(file), str(subject), "--out", str(out),
       "--over", "seed=0,1,2", "--gpus-per-trial", "0.5", "--cpus-per-trial", "0.5",
       "--address", address],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | token | ours,
      cwd=tmp_path)  # fmt: skip
    at_work = await_(lambda: (found := processes(out)) and len(found) == 3 and found, sweep)
    homes = {}
    for number, process in at_work.items():
      given = environment(process)
      assert given["CUDA_VISIBLE_DEVICES"] == "0" and given["XLA_CLIENT_MEM_FRACTION"] == "0.450"
      assert given.get("JAX_PLATFORMS") == os.environ.get("JAX_PLATFORMS")
      assert given["UAJAX_MODELS"] == str(tmp_path)
      homes.setdefault(os.getsid(parent(process)), []).append(number)
    assert sorted(map(len, homes.values())) == [1, 2], "two halves of one device, and of the other"
    await_(lambda: all(step(out, number) >= 20 for number in at_work), sweep)
    dying = next(machine for machine in machines if len(homes.get(machine.pid, ())) == 2)
    os.killpg(dying.pid, signal.SIGKILL)
    said = sweep.communicate(timeout=900)
    assert sweep.returncode == 0, said
    assert not processes(out)
  with (out / "results.csv").open() as table:
    rows = list(csv.DictReader(table))
  assert [row["state"] for row in rows] == ["finished"] * 3, rows
  assert {row["steps"] for row in rows} == {f"{STEPS}/{STEPS}"}
  assert any(resumed(out, number) for number in homes[dying.pid])


@pytest.mark.parametrize("address, said", [
  ("127.0.0.1:1", "nothing answers at 127.0.0.1:1"),
  ("127.0.0.1:99999", "nothing answers at"),
  ("ray://127.0.0.1:10001", "is no HOST:PORT"), ("nonsense", "is no HOST:PORT"),
])  # fmt: skip
def test_a_cluster_that_is_not_there_is_one_line_at_once(address, said):
  pytest.importorskip("ray")
  from uajax.sweep import on_ray

  with pytest.raises(UserError, match=said) as failed:
    on_ray._reach(address)
  assert "\n" not in str(failed.value)


def test_a_trial_gets_one_device_of_what_there_is_and_never_more_than_a_machine_has():
  pytest.importorskip("ray")
  from uajax.sweep import on_ray

  def share(*machines, **settings):
    return on_ray._share(on_ray.Settings(**settings), machines)

  head, cpu = {"memory": 1e9}, {"CPU": 8.0}
  gpu, tpu = {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "TPU": 4.0}
  assert share(head, cpu, {"CPU": 4.0}) == {"CPU": 4.0}
  assert share(head, gpu) == {"CPU": 1.0, "GPU": 1.0}
  assert share(tpu) == {"CPU": 1.0, "TPU": 1.0}
  assert share(tpu, resources={"TPU": 4.0}, cpus=2.0) == {"CPU": 2.0, "TPU": 4.0}
  assert share(gpu, gpus=0.0) == {"CPU": 8.0}
  for machines, settings in (
    ((gpu, gpu), {"gpus": 4.0}),  # a trial cannot lie on two machines
    ((gpu, {"big": 1.0}), {"resources": {"big": 1.0}}), ((cpu,), {"gpus": 0.5}),
  ):  # fmt: skip
    with pytest.raises(UserError, match="no machine has so much"):
      share(*machines, **settings)
  assert on_ray._environment({"CPU": 8.0}) == {"JAX_PLATFORMS": "cpu"}
  assert on_ray._environment({"CPU": 1.0, "TPU": 1.0}) == {}
