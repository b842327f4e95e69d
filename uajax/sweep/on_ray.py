"""Many trials over devices and hosts: Ray Tune decides when and where, a process trains each.

The processes that Ray starts only watch: each starts `worker` as a process of its own with the
devices that Ray gave it, and tells Tune what that one logs. What a sweep knows lies in its folder
(`trials`), not in Ray's files; those are thrown away. Machines of a cluster must all see that
folder and the subjects under the same paths, and are asked before anything runs.
"""

import collections
import contextlib
import dataclasses
import logging
import os
import pathlib
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import ray  # pyright: ignore[reportMissingImports]
from ray import tune  # pyright: ignore[reportMissingImports]
from ray.tune import schedulers  # pyright: ignore[reportMissingImports]
from ray.tune.search import Searcher  # pyright: ignore[reportMissingImports]
from ray.util import scheduling_strategies  # pyright: ignore[reportMissingImports]

from uajax.errors import Stopped, UserError
from uajax.progress import Progress
from uajax.sweep import search, trials, worker

Stopping = Literal["none", "asha", "median"]
LOOK_S = 0.5  # between looks at what a trial has logged
REACH_S = 5.0  # for the first answer of a cluster; Ray itself would try for minutes
ASK_S = 120.0  # for the answers of its machines, whose first process imports all of uajax
STORE_BYTES = 128 * 2**20  # shared memory of a local Ray, through which only figures go
_QUIET = {
  "RAY_USAGE_STATS_ENABLED": "0",  # Ray would report its use to its makers
  "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
  "RAY_AIR_NEW_OUTPUT": "0",
  "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
  "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not every line holds the metric
  "TUNE_DISABLE_SIGINT_HANDLER": "1",
  "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


@dataclasses.dataclass(frozen=True)
class Settings:
  cpus: float | None = None  # a trial; None: all of a machine's, or 1 beside a GPU
  gpus: float | None = None  # a trial, or a fraction of one; None: 1 where there are any, no TPUs
  # A trial, by Ray's name; {}: 1 TPU where there are any, no GPUs.
  resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
  address: str | None = None  # of a Ray cluster; None: a Ray of this machine's own
  at_once: int | None = None  # no more trials at a time than these; None: as many as have room
  dashboard: bool = False
  stopping: Stopping = "none"
  grace: int = 50  # per cent of its steps that every trial may train
  retries: int = 3  # of a trial whose process died


def run(folder: pathlib.Path, proposals: search.Proposals, settings: Settings,
        metric: str, mode: str) -> None:
  """Runs all trials that are left. Failed ones do not stop the others.

  Raises:
    UserError: Ray cannot be started or joined, or has not what a trial asks for; a machine of the
      cluster does not see the sweep's folder or a subject, or cannot import uajax.
    Stopped: by SIGTERM. Trials save before they end, and go on with the same command.
  """
  if not proposals.left:
    return
  with _joined(settings) as machines:
    share = _share(settings, machines)
    if settings.address is not None:
      _ask_machines([folder.resolve(), *map(pathlib.Path, proposals.subjects)], share)
    watch = _Watch(folder, proposals, metric, mode)
    temporary = folder / ".ray"
    try:
      tune.Tuner(
        tune.with_resources(_Training, _placement(share)),
        tune_config=tune.TuneConfig(
          num_samples=proposals.left, search_alg=_Search(proposals, metric, mode, share),
          scheduler=_scheduler(settings, metric, mode), reuse_actors=False,
          max_concurrent_trials=settings.at_once),
        run_config=tune.RunConfig(
          name="tune", storage_path=str(temporary.resolve()), verbose=0, callbacks=[watch],
          failure_config=tune.FailureConfig(max_failures=settings.retries),
          checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False)),
      ).fit()
    finally:
      watch.close()
      ray.shutdown()
      shutil.rmtree(temporary, ignore_errors=True)
      if settings.address is None:
        _await_processes(folder)


class _Training(tune.Trainable):
  """Watches the process of one trial."""

  def setup(self, config: dict):
    if unseen := _unseen([config["folder"]]):  # on a machine that joined later
      raise RuntimeError(f"the machine {socket.gethostname()} does not see {unseen[0]}")
    self._trial = trials.load(config["folder"])
    self._metric = config["metric"]
    # What was logged before is no news: nobody shall stop it for what it has outgrown since.
    self._told = max((row["total"] for row in trials.rows(self._trial)), default=0)
    self._process = worker.launch(self._trial.folder, _environment(config["share"]))

  def step(self) -> dict:
    while True:
      ended = self._process.poll()  # before the lines are read: the last ones count too
      row = self._next_row()
      if row is not None:
        return row
      if ended is not None:
        break
      time.sleep(LOOK_S)
    if trials.end_of(self._trial) is None:
      how = f"signal {signal.Signals(-ended).name}" if ended < 0 else f"exit status {ended}"
      raise RuntimeError(f"its process died ({how})")
    value = trials.score(self._trial, self._metric)
    return {"done": True, "percent": 100} | ({} if value is None else {self._metric: value})

  def _next_row(self) -> dict | None:
    """The next line with the metric, or the last line, that was not told yet."""
    steps = self._trial.steps
    new = [row for row in trials.rows(self._trial) if self._told < row["total"] < steps]
    if not new:
      return None
    row = next((row for row in new if trials.value_of(row, self._metric) is not None), new[-1])
    self._told = row["total"]
    value = trials.value_of(row, self._metric)
    told = {"percent": 100 * row["total"] / steps}
    return told if value is None else told | {self._metric: value}

  def cleanup(self):
    worker.stop(self._process)


class _Unsaved:
  """Left out of what Tune saves to go on with: a sweep goes on from its own folder."""

  def __reduce__(self):
    return object, ()

  def __deepcopy__(self, _):
    return self


class _Search(_Unsaved, Searcher):
  """Tune asks it for trials."""

  def __init__(self, proposals: search.Proposals, metric: str, mode: str, share: Mapping):
    Searcher.__init__(self, metric=metric, mode=mode)
    self._proposals, self._share = proposals, dict(share)

  def suggest(self, trial_id: str):
    trial = self._proposals.ask()
    if trial is None:
      return Searcher.FINISHED
    return {"folder": str(trial.folder.resolve()), "metric": self.metric, "share": self._share}

  def on_trial_complete(self, trial_id: str, result=None, error: bool = False):
    pass  # `_Watch` tells, when it is written down how the trial ended

  def save(self, checkpoint_path: str):
    pass  # the folder of the sweep holds everything

  def restore(self, checkpoint_path: str):
    pass


class _Watch(_Unsaved, tune.Callback):
  """Writes down how trials end, keeps the table, says how far the sweep is."""

  def __init__(self, folder: pathlib.Path, proposals: search.Proposals, metric: str, mode: str):
    self._folder, self._proposals, self._metric, self._mode = folder, proposals, metric, mode
    self._percent: dict[str, float] = {}
    ends = map(trials.end_of, trials.load_all(folder))
    self._states = collections.Counter(end.state for end in ends if end is not None)
    self._progress = Progress("sweep, % of trials", 100 * proposals.count, 100 * proposals.ended)

  def on_trial_result(self, *, trial, result, **_):
    self._advance(trial.config["folder"], result["percent"])

  def on_trial_complete(self, *, trial, **_):
    at = (trial.last_result or {}).get("percent", 0)
    self._conclude(trial, "stopped", f"early, at {at:.0f} % of its steps")

  def on_trial_error(self, *, trial, **_):
    last = _reason(trial.get_error())
    self._conclude(trial, "failed", f"given up after {trial.num_failures} failures: {last}")

  def close(self) -> None:
    trials.write_results(self._folder, list(self._proposals.axes), self._metric, self._mode)
    self._progress.close(self._note())

  def _conclude(self, ran, state: trials.State, reason: str) -> None:
    trial = trials.load(ran.config["folder"])
    trials.conclude(trial, trials.End(state, reason))
    end = trials.end_of(trial)
    assert end is not None
    self._states[end.state] += 1
    self._proposals.tell(trial)
    trials.write_results(self._folder, list(self._proposals.axes), self._metric, self._mode)
    self._advance(ran.config["folder"], 100)

  def _advance(self, folder: str, percent: float) -> None:
    before = self._percent.get(folder, 0)
    whole = max(int(percent), int(before))
    self._percent[folder] = whole
    self._progress.advance(whole - int(before), self._note())

  def _note(self) -> str:
    return ", ".join(f"{count} {state}" for state, count in self._states.items())


def _reason(error: Exception | None) -> str:
  """The last line of what Ray reports of a failure, which can be pages."""
  lines = str(error or "").strip().splitlines() or ["no reason given"]
  died = any("The actor died" in line or "actor is dead" in line for line in lines)
  if died and not any("creation task" in line for line in lines):
    return "the process that watched it died"
  return lines[-1].removeprefix("RuntimeError: ")[:200]


@contextlib.contextmanager
def _joined(settings: Settings) -> Iterator[list[dict[str, float]]]:
  """Within, Ray runs; yields what each of its machines holds, by Ray's names."""
  before = {name: os.environ.get(name) for name in (*_QUIET, "PYTHONPATH")}
  root = str(pathlib.Path(__file__).resolve().parents[2])
  os.environ.update(_QUIET)
  # Ray's processes find this very package.
  os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [before["PYTHONPATH"]])])
  temporary = None
  more: dict[str, Any] = {}
  if settings.address is None:
    temporary = tempfile.mkdtemp(prefix="uajax-ray-")
    more = {"object_store_memory": STORE_BYTES, "include_dashboard": settings.dashboard,
            "_temp_dir": temporary}
  else:
    _reach(settings.address)
    ours = {name: value for name, value in os.environ.items() if name.startswith("UAJAX_")}
    # Its processes have the environment in which each machine joined, and theirs for the rest.
    more = {"runtime_env": {"env_vars": ours | {
      "PYTHONPATH": os.pathsep.join([root, "${PYTHONPATH}"]),
      "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}}
  handler = signal.getsignal(signal.SIGTERM)
  terminated = []

  def terminate(number, _):
    terminated.append(number)
    raise KeyboardInterrupt  # Tune would take any other exception for a failure of its own

  try:
    try:
      ray.init(address=settings.address or "local", log_to_driver=False, logging_level="CRITICAL",
               **more)
    except Exception as error:
      line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
      if settings.address is None:
        raise UserError(f"cannot start Ray ({line}): see `ray status`, or --debug") from error
      raise UserError(
        f"cannot join the Ray cluster at {settings.address} ({line}): this machine must be one of "
        "it (`ray start --address=HOST:PORT`), with its versions of Python and Ray and, if it "
        "asks for one, its token (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)") from error
    if threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGTERM, terminate)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures stand in the table
    yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
  except KeyboardInterrupt:
    if not terminated:
      raise
    raise Stopped("stopped by SIGTERM: the same command goes on from here",
                  signal.SIGTERM) from None
  finally:
    ray.shutdown()
    if threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGTERM, handler)
    for name, value in before.items():
      if value is None:
        os.environ.pop(name, None)
      else:
        os.environ[name] = value
    if temporary:
      shutil.rmtree(temporary, ignore_errors=True)


def _reach(address: str) -> None:
  """Raises UserError where nothing answers at HOST:PORT; "auto" is Ray's to find."""
  if address == "auto":
    return
  host, _, port = address.rpartition(":")
  if not host or "/" in host or not port.isdecimal():
    raise UserError(f"--address {address} is no HOST:PORT: give that of the cluster's head, as "
                    "`ray start --head` said, or auto for the cluster that this machine is one of")
  try:
    socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
  except (OSError, OverflowError) as error:
    reason = getattr(error, "strerror", None) or str(error)
    raise UserError(f"nothing answers at {address} ({reason}): see `ray status` on the cluster's "
                    "head, or leave out --address to use this machine") from error


def _unseen(paths: Sequence[str | os.PathLike]) -> list[str]:
  """Those of some folders that are not to be seen on this machine."""
  return [str(path) for path in paths if not os.path.isdir(path)]


def _ask_machines(paths: Sequence[pathlib.Path], share: Mapping[str, float]) -> None:
  """Asks every machine of the cluster that a trial fits on for uajax and for folders.

  Raises:
    UserError: a machine lacks one of them.
  """
  def look() -> list[str]:  # defined here, it travels whole: uajax may be what is lacking
    from uajax.sweep import on_ray
    return on_ray._unseen(paths)

  nodes = [node for node in ray.nodes() if node["Alive"] and _fits(share, node["Resources"])]
  asked = {}
  for node in nodes:
    there = scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    remote: Any = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(look)
    asked[node["NodeManagerAddress"], node["NodeManagerHostname"]] = remote.remote()
  deadline = time.monotonic() + ASK_S
  for (address, name), answer in asked.items():
    machine = f"the machine {name} ({address}) of the Ray cluster"
    try:
      unseen = ray.get(answer, timeout=max(deadline - time.monotonic(), 1))
    except Exception as error:
      lines = str(error).strip().splitlines() or [type(error).__name__]
      raise UserError(f"{machine} cannot import uajax ({lines[-1][:200]}): install it and its "
                      "packages there as they are here") from error
    if unseen:
      raise UserError(f"{machine} does not see {unseen[0]}: put the sweep (--out) and its subjects "
                      "into folders that all machines share under the same path")


def _fits(share: Mapping[str, float], machine: Mapping[str, float]) -> bool:
  return all(amount <= machine.get(name, 0) for name, amount in share.items())


def _share(settings: Settings, machines: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """What each trial gets, by Ray's names; one device where there are any.

  Raises:
    UserError: no machine holds that much.
  """
  resources, gpus = dict(settings.resources), settings.gpus
  if gpus is None:
    gpus = float("TPU" not in resources and any(machine.get("GPU") for machine in machines))
    if not gpus and "TPU" not in resources and any(machine.get("TPU") for machine in machines):
      resources["TPU"] = 1.0
  cpus = settings.cpus
  if cpus is None:
    beside = gpus or "TPU" in resources
    cpus = 1.0 if beside else min(
      (machine["CPU"] for machine in machines if machine.get("CPU")), default=1.0)
  share = {"CPU": cpus, "GPU": gpus} | resources
  share = {name: amount for name, amount in share.items() if amount}
  if not any(_fits(share, machine) for machine in machines):
    most = {name: max(machine.get(name, 0) for machine in machines) for name in share}
    raise UserError(f"a trial asks for {_told(share)}, but no machine has so much (at most "
                    f"{_told(most)}): ask for less, or join a cluster with --address")
  return share


def _told(share: Mapping[str, float]) -> str:
  return ", ".join(f"{amount:g} {name}" for name, amount in share.items())


def _placement(share: Mapping[str, float]) -> dict:
  names = {"CPU": "cpu", "GPU": "gpu"}
  return {names.get(name, name): amount for name, amount in share.items()}


def _environment(share: Mapping[str, float]) -> dict[str, str]:
  """Variables by which a trial's process uses its share and no more.

  Ray names the devices in the environment of the process that watches, which hands it on.
  """
  gpus = share.get("GPU", 0)
  if not gpus:
    return {} if "TPU" in share else {"JAX_PLATFORMS": "cpu"}
  chosen = {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys()
  if gpus >= 1 or chosen:
    return {}
  # JAX takes three quarters of a device's memory at once, whoever else is on it.
  return {"XLA_CLIENT_MEM_FRACTION": f"{0.9 * gpus:.3f}"}


def _scheduler(settings: Settings, metric: str, mode: str):
  """Stops trials early; time is the share of its steps that a trial has trained."""
  if settings.stopping == "asha":
    return schedulers.AsyncHyperBandScheduler(
      time_attr="percent", metric=metric, mode=mode, max_t=101, grace_period=settings.grace,
      reduction_factor=1.5)
  if settings.stopping == "median":
    return schedulers.MedianStoppingRule(
      time_attr="percent", metric=metric, mode=mode, grace_period=settings.grace)
  return None


def _await_processes(folder: pathlib.Path) -> None:
  """Waits until the processes of all trials have saved and ended."""
  for trial in trials.load_all(folder):
    with contextlib.suppress(UserError), trials.held(trial.folder, worker.SAVING_S + 15):
      pass
