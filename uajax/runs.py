"""A run folder: what `train` writes and every other command reads.

    run.json        version, experiment, subject, when and by what it was made
    checkpoints/N/  Orbax: the avatar, the optimiser's state, and where training stands; sums.json
                    holds the SHA-256 of every file
    extractors/     the speech networks the avatar was trained with
    consent.json    the subject folder's consent note, where it has one
    metrics.jsonl   a line each logging point; events.* the same for TensorBoard
    pictures/       renders beside truth while training
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import logging
import pathlib
import shutil
import time
import types as pytypes
import typing
from collections.abc import Iterator

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp

from uajax import saving
from uajax.avatar import Avatar, Layer
from uajax.config import Audio, Experiment, Model, Motion, Rates, Stage, Weights
from uajax.errors import UserError
from uajax.types import Splats

VERSION = 1
# Settings that came later, as runs without them were trained.
_BEFORE: dict[type, dict] = {
  Stage: {"silence": 0.0, "noise": 0.0, "vague": 0.0, "shut": 0.0},
  Weights: {"eyes": 0.0, "doubt": 0.0},
  Rates: {"doubt": 5e-3},
  Motion: {"acts": False, "ajar": 0.0, "blink_gain": 1.0, "calibrated": False, "uncertainty": True,
           "modalities": ["audio", "content", "style", "emotion"]}}
SUMS = "sums.json"
MARKS = ("_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax's, written last, never read
_UNNAMED = "orbax-checkpoint-tmp*"  # how Orbax calls a checkpoint that it still writes
_OLD = "old"  # where checkpoints go to be deleted: none loses files while it has its name
_log = logging.getLogger("uajax")


class Progress(typing.NamedTuple):
  """Where training stands."""

  stage: int  # index into Experiment.stages(); 3 when all are done
  step: int  # within the stage
  total: int  # steps over all stages so far
  capacity: int | None = None  # of the rasteriser's pair list, once it had to be raised
  rollbacks: int = 0  # within the stage; each draws other random numbers


class Run:
  """An opened run folder. Use `create` or `open_run`."""

  def __init__(self, path: pathlib.Path, record: dict):
    self.path = path
    self.record = record
    self.experiment: Experiment = decode(Experiment, record["experiment"], "run.json: experiment")
    self.subject = pathlib.Path(record["subject"])
    self.extractors = path / "extractors"
    self.checkpoints = path / "checkpoints"

  def save(self, avatar: Avatar, training: typing.Any, progress: Progress) -> None:
    """Writes a checkpoint; the ones before it stay (as many as `experiment.keep`) if that fails."""
    with self.saver(progress.total) as saver:
      saver.save(avatar, training, progress)

  @contextlib.contextmanager
  def saver(self, newest: int = 0) -> Iterator["Saver"]:
    """Yields a Saver, and waits at the end for what it still writes.

    Args:
      newest: the checkpoint that training goes on from, 0 for none. Later ones could not be read.

    Raises:
      UserError: a checkpoint could not be saved.
    """
    saver = Saver(self, newest)
    try:
      yield saver
    except BaseException:
      try:
        saver.close()
      except UserError as error:  # must not hide the failure that came first
        _log.warning("%s", error)
      raise
    saver.close()

  def restore(self, training=None) -> tuple[Avatar, typing.Any, Progress] | None:
    """The newest readable checkpoint; None where there is none yet.

    Args:
      training: function of the restored avatar and progress that makes a template of the training
        state; None, or a function that gives None, leaves that part unread.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    if not self.checkpoints.is_dir():
      return None
    steps = self.steps()
    for step in reversed(steps):
      try:
        return self.read(step, training)
      except UserError:
        raise
      except Exception as error:
        _log.warning("checkpoint %d of %s cannot be read (%s): trying the one before", step,
                     self.path, _first_line(error))
    if steps:
      raise UserError(f"no checkpoint of {self.path} can be read: train into a new folder")
    return None

  def steps(self) -> list[int]:
    """The checkpoints that were written to their end, oldest first."""
    options = ocp.CheckpointManagerOptions(
      read_only=True, create=False, multiprocessing_options=_first_alone())
    with ocp.CheckpointManager(self.checkpoints.resolve(), options=options) as manager:
      return sorted(manager.all_steps())

  def avatar(self) -> Avatar:
    """The newest avatar. Raises UserError where none was saved yet."""
    found = self.restore()
    if found is None:
      raise UserError(f"{self.path} holds no checkpoint yet: run `uajax train {self.subject} "
                      f"--workdir {self.path}` first")
    return found[0]

  def progress(self) -> str:
    """Where the run stands, in words."""
    found = self.restore()
    if found is None:
      return "not begun"
    at, stages = found[2], self.experiment.stages()
    if at.stage == len(stages):
      return f"complete ({at.total} steps)"
    stage = stages[at.stage]
    return f"{stage.name} stage, step {at.step} of {stage.steps}"

  def read(self, step: int, training=None) -> tuple[Avatar, typing.Any, Progress]:
    """One checkpoint, see `restore`; fails in any way if it is not what was saved."""
    _check_sums(self.checkpoints / str(step))
    avatar_tree = self._read(step, "avatar")
    state = self._item(step, "progress", ocp.JsonCheckpointHandler, ocp.args.JsonRestore())
    sh_degree = state.pop("sh_degree")
    avatar = _avatar(avatar_tree, self.experiment, sh_degree)
    progress = Progress(**state)
    template = training(avatar, progress) if training else None
    if template is None:
      return avatar, None, progress
    return avatar, _fill(template, self._read(step, "training")), progress

  def _read(self, step: int, item: str):
    """A saved tree as NumPy arrays, whatever devices wrote it."""
    path = self.checkpoints.resolve() / str(step) / item
    alone = _first_alone()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
      metadata = reader.metadata(path).item_metadata.tree
      as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
      return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))

  def _item(self, step: int, item: str, handler, args):
    alone = _first_alone()
    made = handler(multiprocessing_options=alone)
    with ocp.Checkpointer(made, multiprocessing_options=alone) as reader:
      return reader.restore(self.checkpoints.resolve() / str(step) / item, args=args)


class Saver:
  """Writes checkpoints of a run beside the training, one at a time. Use `Run.saver`."""

  def __init__(self, run: Run, newest: int):
    self._run = run
    self._newest = newest
    self._manager: ocp.CheckpointManager | None = None
    self._writing: int | None = None

  def save(self, avatar: Avatar, training: typing.Any, progress: Progress) -> None:
    """Begins to write a checkpoint; the arrays may be overwritten as soon as this returns.

    Raises:
      UserError: this one, or the one before it, could not be saved.
    """
    self.wait()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # its tracebacks are told in one line
    args = ocp.args.Composite(
      avatar=ocp.args.PyTreeSave(_snapshot(_arrays(avatar))),
      training=ocp.args.PyTreeSave(_snapshot(training)),
      progress=ocp.args.JsonSave(progress._asdict() | {"sh_degree": avatar.sh_degree}))
    self._writing = progress.total
    with self._explained():
      self._open().save(progress.total, args=args, force=True)

  def check(self) -> None:
    """Raises UserError if the last checkpoint failed by now; does not wait for it."""
    if self._manager is not None and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Returns when the last checkpoint is whole; UserError if it could not be saved."""
    if self._manager is None or self._writing is None:
      return
    with self._explained():
      self._manager.wait_until_finished()
    self._newest, self._writing = self._writing, None
    self._sweep()

  def close(self) -> None:
    try:
      self.wait()
    finally:
      if self._manager is not None:
        with contextlib.suppress(Exception):  # what failed in writing has been told
          self._manager.close()
        self._manager = None

  def _open(self) -> ocp.CheckpointManager:
    if self._manager is None:
      run = self._run
      for folder in run.checkpoints.glob("*"):  # unreadable ones would crowd out the good ones
        if folder.name.isdigit() and int(folder.name) > self._newest:
          shutil.rmtree(folder)
      self._sweep()
      run.checkpoints.mkdir(exist_ok=True)
      options = ocp.CheckpointManagerOptions(
        max_to_keep=run.experiment.keep, todelete_subdir=_OLD, enable_async_checkpointing=True,
        create=False, multiprocessing_options=_first_alone(),
        async_options=ocp.AsyncOptions(post_finalization_callback=self._seal))
      self._manager = ocp.CheckpointManager(run.checkpoints.resolve(), options=options)
    return self._manager

  def _sweep(self) -> None:
    """Deletes the checkpoints that later ones have replaced."""
    shutil.rmtree(self._run.checkpoints / _OLD, ignore_errors=True)

  def _seal(self) -> None:
    """Adds the digests; Orbax calls this in its thread before the checkpoint gets its name."""
    folder = self._run.checkpoints / str(self._writing)
    for unnamed in self._run.checkpoints.glob(f"{self._writing}.{_UNNAMED}"):
      folder = unnamed
    (folder / SUMS).write_text(json.dumps(_sums(folder), indent=1) + "\n")

  def _give_up(self) -> None:
    """Leaves nothing of a checkpoint that could not be written."""
    manager, self._manager = self._manager, None
    if manager is not None:
      with contextlib.suppress(Exception):  # the same failure once more
        manager.close()
    for _ in range(10):  # threads of Orbax that were still at it may write another file
      for torn in self._run.checkpoints.glob(f"*.{_UNNAMED}"):
        shutil.rmtree(torn, ignore_errors=True)
      time.sleep(0.05)

  @contextlib.contextmanager
  def _explained(self):
    try:
      yield
    except Exception as error:
      step, self._writing = self._writing, None
      self._give_up()
      free = shutil.disk_usage(self._run.path).free
      raise UserError(
        f"checkpoint {step} could not be saved to {self._run.checkpoints} "
        f"({_first_line(error)}; {free / 2**20:.0f} MiB free): make room and run the same command "
        "again, it resumes from the checkpoint before") from error


def create(path, subject, experiment: Experiment) -> Run:
  """Makes a run folder, or opens the one that is there if it is of the same experiment.

  Raises:
    UserError: the folder holds something else, another version, or another experiment.
  """
  path = pathlib.Path(path)
  if (path / "run.json").exists():
    run = open_run(path)
    if run.experiment != experiment:
      changed = ", ".join(_differences(encode(run.experiment), encode(experiment))[:4])
      raise UserError(f"{path} was begun with other settings ({changed}): give the same ones to "
                      "resume, or another --workdir")
    return run
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f"{path} exists and is no run folder: choose another --workdir")
  path.mkdir(parents=True, exist_ok=True)
  record = {
    "version": VERSION, "made_by": f"uajax {own_version()}, jax {jax.__version__}",
    "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "subject": str(pathlib.Path(subject).resolve()), "experiment": encode(experiment)}
  with saving.aside(path / "run.json") as partial:
    partial.write_text(json.dumps(record, indent=2) + "\n")
  return Run(path, record)


def adopt(path, avatar: Avatar, origin, subject=None) -> Run:
  """Makes a complete run of an avatar that was trained elsewhere.

  Args:
    origin: the file it came from, named in run.json.
    subject: its subject folder, where there is one.

  Raises:
    UserError: `path` holds something already.
  """
  path = pathlib.Path(path)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f"{path} already holds something: choose another folder for the run")
  widths: dict[int, Audio] = {29: "deepspeech", 1024: "hubert"}
  audio = widths.get(avatar.config.audio_channels, "mel")
  experiment = Experiment(model=Model(motion=avatar.config, audio=audio))
  run = create(path, subject or path / "no_subject", experiment)
  _log.info("adopted %s", origin)
  run.save(avatar, {"step": np.zeros((), np.int32)}, Progress(len(experiment.stages()), 0, 0))
  return run


def open_run(path) -> Run:
  """Opens a run folder.

  Raises:
    UserError: no such folder, not a run, or of another version.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise UserError(f"run folder {path} does not exist: `uajax train SUBJECT --workdir {path}` "
                    "makes one")
  try:
    record = json.loads((path / "run.json").read_text())
    version = record["version"]
  except FileNotFoundError:
    raise UserError(f"{path} is no run folder (it has no run.json): give the --workdir of a "
                    "training") from None
  except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
    raise UserError(f"{path / 'run.json'} is damaged ({_first_line(error)}): restore it or train "
                    "into a new folder") from None
  if version != VERSION:
    raise UserError(f"{path} was made by another version of uajax (run format {version}, this one "
                    f"reads {VERSION}; {record.get('made_by', 'maker unknown')}): use that version "
                    "or train again")
  try:
    return Run(path, record)
  except KeyError as error:
    raise UserError(f"{path / 'run.json'} lacks {error}: restore it or train into a new "
                    "folder") from None


def encode(value):
  """A config dataclass as plain JSON values."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, tuple):
    return [encode(v) for v in value]
  return value


def decode(kind, value, where: str) -> typing.Any:
  """The config dataclass `kind` from `encode`d values; UserError where they do not fit."""
  if isinstance(kind, type) and dataclasses.is_dataclass(kind):
    hints = typing.get_type_hints(kind)
    if isinstance(value, dict):
      value = _BEFORE.get(kind, {}) | value
    if not isinstance(value, dict) or value.keys() != hints.keys():
      odd = sorted(set(value) ^ set(hints)) if isinstance(value, dict) else value
      raise UserError(f"{where} does not fit this version of uajax (differs in {odd}): use the "
                      "version that made it or train again")
    return kind(**{name: decode(hint, value[name], f"{where}.{name}")
                   for name, hint in hints.items()})
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple and isinstance(value, list):
    inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
    return tuple(decode(k, v, where) for k, v in zip(inner, value, strict=True))
  if origin is typing.Literal and value in args:
    return value
  if origin in (typing.Union, pytypes.UnionType) and any(_fits(k, value) for k in args):
    return value
  if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
    return float(value)
  if isinstance(kind, type) and type(value) is kind:
    return value
  raise UserError(f"{where} is {value!r}, not {kind}: restore the file or train again")


def _fits(kind, value) -> bool:
  return value is None if kind is type(None) else isinstance(value, kind)


def _differences(a, b, name: str = "") -> list[str]:
  if isinstance(a, dict) and isinstance(b, dict):
    return [d for key in a.keys() | b.keys()
            for d in _differences(a.get(key), b.get(key), f"{name}.{key}".strip("."))]
  return [] if a == b else [f"{name} {a} -> {b}"]


def _arrays(avatar: Avatar) -> dict:
  return {name: {"splats": getattr(avatar, name).splats._asdict(),
                 "alive": getattr(avatar, name).alive, "motion": getattr(avatar, name).motion}
          for name in ("face", "mouth")}


def _avatar(tree: dict, experiment: Experiment, sh_degree: int) -> Avatar:
  layers = {}
  for name in ("face", "mouth"):
    layer = jax.tree.map(jax.numpy.asarray, tree[name])
    layers[name] = Layer(Splats(**layer["splats"]), layer["alive"], layer["motion"])
  return Avatar(**layers, config=experiment.model.motion, sh_degree=sh_degree)


def pack(avatar: Avatar, training: typing.Any, progress: Progress) -> bytes:
  """A checkpoint as a message to other processes."""
  arrays = _snapshot({"avatar": _arrays(avatar), "training": training})
  return flax.serialization.msgpack_serialize(
    arrays | {"progress": progress._asdict(), "sh_degree": avatar.sh_degree})


def unpack(message: bytes, experiment: Experiment, training=None
           ) -> tuple[Avatar, typing.Any, Progress]:
  """What was packed; `training` as in `Run.restore`."""
  tree: typing.Any = flax.serialization.msgpack_restore(message)
  progress = Progress(**tree["progress"])
  avatar = _avatar(tree["avatar"], experiment, tree["sh_degree"])
  template = training(avatar, progress) if training else None
  return avatar, template and _fill(template, tree["training"]), progress


def _fill(template, tree):
  return jax.tree.map(jax.numpy.asarray, flax.serialization.from_state_dict(template, tree))


def _first_alone() -> ocp.options.MultiprocessingOptions:
  """For Orbax: of several processes the first reads and writes, and waits for none."""
  if jax.process_count() == 1:
    return ocp.options.MultiprocessingOptions()
  return ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix="first")


def _snapshot(tree):
  """The tree in memory of its own: training overwrites its buffers while a copy is written."""
  return jax.tree.map(np.array, jax.device_get(flax.serialization.to_state_dict(tree)))


def _sums(folder: pathlib.Path) -> dict[str, str]:
  """SHA-256 of every file that a checkpoint is read from."""
  sums = {}
  for path in sorted(folder.rglob("*")):
    name = path.relative_to(folder).as_posix()
    if path.is_file() and name not in (SUMS, *MARKS):
      with path.open("rb") as file:
        sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
  return sums


def _check_sums(folder: pathlib.Path) -> None:
  if not (folder / SUMS).exists():  # made by an earlier version
    return
  wanted, found = json.loads((folder / SUMS).read_text()), _sums(folder)
  changed = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
  if changed:
    raise ValueError(f"{changed[0]} is not as it was written")


def own_version() -> str:
  """The installed version of uajax."""
  try:
    return importlib.metadata.version("uajax")
  except importlib.metadata.PackageNotFoundError:
    return "from source"


def _first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def copy_extractors(subject: pathlib.Path, run: Run) -> None:
  """Copies the subject's speech networks into the run, so that it can be driven on its own."""
  source = pathlib.Path(subject) / "extractors"
  if source.is_dir() and not run.extractors.exists():
    with saving.aside(run.extractors, folder=True) as partial:
      for file in source.iterdir():  # copytree would wrap a full disk into a list of lists
        shutil.copyfile(file, partial / file.name)
