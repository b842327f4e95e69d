"""The one place that iterates: stages, densification, logs, pictures, checkpoints, resuming."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Float, UInt8

from uajax import consent, hosts, metrics, runs, saving
from uajax.avatar import Avatar, Layer, acquaint, init_motion, render
from uajax.config import Experiment, Stage
from uajax.data import loader
from uajax.errors import Stopped, UserError
from uajax.progress import Progress
from uajax.train import feed, seeding, slots
from uajax.train.ahead import Ahead, Call
from uajax.train.outlook import Given, Outlook
from uajax.train.step import State, enter, mesh_of, no_sums, phase_of, spread, turning_points
from uajax.types import Camera, Controls, Frame

GIVE_UP_AFTER = 20  # steps without a finite gradient in a row
_log = logging.getLogger("uajax")


def train(subject, workdir, experiment: Experiment, *, perceptual=None,
          source: loader.Store = "auto", frames: feed.Place = "auto",
          ahead: bool | None = None) -> runs.Run:
  """Trains the three stages into `workdir`, or goes on where that folder stands.

  Args:
    subject: subject folder with its extracted features.
    perceptual: LPIPS parameters, or None to leave those terms out (a line says so).
    source: where frames come from, see `data.loader.load`.
    frames: where pictures lie while training, see `Feed`; all places give the same bits.
    ahead: whether programs are compiled while earlier ones train. None: by a single process that
      trains on an accelerator; on a CPU compiling would take from training what it gives.

  Raises:
    UserError: the subject cannot be used, the folder belongs to another experiment, a checkpoint
      cannot be written, or training diverged.
    Stopped: by SIGTERM or Ctrl-C, after a checkpoint (in the main thread).
  """
  subject = pathlib.Path(subject)
  clip, val = (loader.open_source(subject, split, audio=experiment.model.audio, source=source)
               for split in ("train", "val"))
  experiment = fit_audio(experiment, clip)
  record = hosts.told(lambda: _open(workdir, subject, experiment))
  run = runs.Run(pathlib.Path(workdir), json.loads(record))
  experiment = run.experiment  # the first process's
  if perceptual is None and any(s.lpips_from < s.steps for s in experiment.stages()):
    _log.warning("LPIPS weights are not at hand: trained without the perceptual terms "
                 "(`uajax doctor` says how to get them)")

  avatar, training, at = _stand(run, clip)
  if at.total:
    _log.warning("resuming %s at step %d", run.path, at.total)
  if at.stage == len(experiment.stages()):
    return run
  shown = Shown(val[len(val) // 2])
  if ahead is None:
    ahead = hosts.count() == 1 and jax.default_backend() != "cpu"
  with (_heeded() as asked, feed.Feed(clip, experiment, mesh_of(experiment), frames) as fed,
        Ahead(active=ahead) as programs):
    while True:
      try:
        with contextlib.ExitStack() as opened:
          saver = journal = None
          if hosts.is_first():
            saver = opened.enter_context(run.saver(at.total))
            journal = opened.enter_context(Journal(run.path, at.total))
          _train_stages(run, avatar, training, at, fed, programs, shown, perceptual, journal, saver,
                        asked)
        return run
      except _Diverged as fault:
        avatar, training, at = _roll_back(run, clip, fault)


class _Diverged(Exception):
  """Raised where training found no finite gradient for GIVE_UP_AFTER steps."""

  def __init__(self, stage: Stage, at: runs.Progress, skipped: int):
    super().__init__()
    self.stage, self.at = stage, at
    self.seen = (f"no finite gradient in the last {skipped} steps before step {at.step} of the "
                 f"{stage.name} stage")


def _stand(run: runs.Run, clip: loader.Source) -> tuple[Avatar, dict | None, runs.Progress]:
  """Where training stands: the last checkpoint, or the beginning."""
  template = lambda avatar, at: _resume_template(avatar, run.experiment, at)

  def stand():
    return run.restore(template) or (_begin(run.experiment, clip), None, runs.Progress(0, 0, 0))

  if hosts.count() == 1:
    return stand()
  return runs.unpack(hosts.told(lambda: runs.pack(*stand())), run.experiment, template)


def _open(workdir, subject: pathlib.Path, experiment: Experiment) -> bytes:
  """The record of the run in `workdir`, which is made if need be."""
  run = runs.create(workdir, subject, experiment)
  runs.copy_extractors(subject, run)
  consent.keep(subject, run.path)
  return json.dumps(run.record).encode()


def _roll_back(run: runs.Run, clip: loader.Source, fault: _Diverged):
  """The last checkpoint, to go on from with other random numbers; once a stage."""
  if fault.at.rollbacks:
    raise UserError(
      f"training diverged: {fault.seen}, once more after going back to an earlier checkpoint; run "
      f"again to resume from the last checkpoint in {run.path}, with lower rates "
      f"(--{fault.stage.name}.rates.*)") from None
  avatar, training, at = _stand(run, clip)
  _log.warning("%s: going back from step %d to step %d, to try once more with other random numbers",
               fault.seen, fault.at.total, at.total)
  return avatar, training, at._replace(rollbacks=fault.at.rollbacks + 1)


@contextlib.contextmanager
def _heeded() -> Iterator[list[int]]:
  """Collects SIGTERM and Ctrl-C, so that training ends where it can go on; a second one kills.

  Signals are left alone in other threads than the main one, and where they were ignored.
  """
  asked: list[int] = []
  before = {}
  if threading.current_thread() is threading.main_thread():
    before = {number: handler for number in (signal.SIGTERM, signal.SIGINT)
              if (handler := signal.getsignal(number)) not in (None, signal.SIG_IGN)}

  def heed(number, _):
    asked.append(number)
    for each in before:
      signal.signal(each, signal.SIG_DFL)

  for number in before:
    signal.signal(number, heed)
  try:
    yield asked
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  if asked:  # too late to stop anything here
    os.kill(os.getpid(), asked[0])


def fit_audio(experiment: Experiment, clip: loader.Source) -> Experiment:
  """The experiment with the audio channels and width that the clip has."""
  _, controls, *_ = clip.numbers(0)
  channels, width = controls.audio.shape[-2:]
  motion = dataclasses.replace(
    experiment.model.motion, audio_channels=channels, audio_width=width)
  return dataclasses.replace(
    experiment, model=dataclasses.replace(experiment.model, motion=motion))


def _train_stages(run, avatar: Avatar, training: dict | None, at: runs.Progress,
                  fed: feed.Feed, programs: Ahead, shown: "Shown", perceptual, journal, saver,
                  asked) -> None:
  stages = run.experiment.stages()
  progress = Progress("train", sum(stage.steps for stage in stages), at.total)
  for number in range(at.stage, len(stages)):
    stage = stages[number]
    if training is None and stage.name == "fuse" and avatar.config.calibrates:
      avatar = acquaint(*hosts.local((avatar, fed.material.controls)))
    state = enter(stage, avatar) if training is None else State(avatar=avatar, **training)
    training = None
    state = spread(state, mesh_of(run.experiment))
    avatar, at = _train_stage(run, number, stage, state, at, fed, programs, shown, perceptual,
                              journal, progress, saver, asked)
  progress.close()


def _train_stage(run, number: int, stage: Stage, state: State, at: runs.Progress,
                 fed: feed.Feed, programs: Ahead, shown: "Shown", perceptual, journal, progress,
                 saver, asked):
  experiment = run.experiment
  key = jax.random.fold_in(jax.random.key(experiment.seed), number)
  if at.rollbacks:
    key = jax.random.fold_in(key, 1000 + at.rollbacks)  # apart from what steps fold in
  before = sum(s.steps for s in experiment.stages()[:number])
  begun = step = int(state.step)  # `begun`: where the steps begin that one report sums up
  ends = list(_ends(experiment, stage, step))
  began, waited, sums = time.monotonic(), programs.waited_s, no_sums()
  running, last, aside_s = None, None, 0.0
  outlook = Outlook(experiment, number, perceptual, shown.drawing)
  foresee = lambda given: outlook.prepare(programs, step, at.capacity, given)
  for end, chunk in fed.chunks(stage, key, step, ends):
    jax.block_until_ready(last)  # one chunk trains, one is at hand: more would fill the memory
    given = Given(state, sums, jnp.asarray(end - step), fed.material, chunk, key)
    state, sums = programs(outlook.steps(step, at.capacity, given))
    if running is None:  # not before: the first program, from disk or compiled, is waited for
      foresee(given._replace(state=state))
    last, running = running, sums
    progress.advance(end - step, f"{stage.name} {phase_of(stage, step)}")
    step = end
    if end not in ends:
      continue
    count, changed = end - begun, None
    if _grows(stage, step):
      state, changed = programs(outlook.growth(given._replace(state=state)))
      state = slots.make_room(stage, state, changed, programs)
    if stage.name != "fuse" and step in turning_points(stage):
      state = slots.give_up_spare(stage, state, programs)
    # A picture on the way is not worth waiting for its program.
    shows = journal and (step == stage.steps or (
      step % experiment.picture_every == 0 and programs.at_hand(shown.drawing(state.avatar))))
    reached = time.monotonic()
    if step % experiment.log_every == 0 or step == stage.steps:
      report = {name: float(value) / count for name, value in sums.items()}
      foresee(given._replace(state=state))
      compile_s = programs.waited_s - waited
      reached = time.monotonic()
      took = reached - began - compile_s
      report |= _census(stage, state, changed) | {
        "step_ms": 1e3 * took / count, "compile_s": compile_s, "aside_s": aside_s}
      aside_s = 0.0
      if shows:
        report |= shown.keep(journal, before + step, stage, state.avatar, programs)
      if journal:
        journal.write(before + step, stage.name, step, report)
      at = _with_capacity(stage, state, at, report["overflow"])
      if int(state.skipped) >= GIVE_UP_AFTER:
        here = at._replace(stage=number, step=step, total=before + step)
        raise _Diverged(stage, here, int(state.skipped))
    elif shows:
      shown.keep(journal, before + step, stage, state.avatar, programs)
    done, stopping = step == stage.steps, hosts.largest(asked[0] if asked else 0)
    here = at._replace(stage=number, step=step, total=before + step)
    training = _training(state)
    if done:
      here = here._replace(stage=number + 1, step=0, rollbacks=0)
      training = {"step": state.step}
    # A state without a finite gradient is none to go back to.
    wanted = step % experiment.save_every == 0 or stopping > 0
    due = done or (wanted and int(state.skipped) == 0)
    hosts.alone(functools.partial(
      _save, saver, state.avatar, training, here, due, stopping > 0))
    if stopping:
      progress.close()
      raise Stopped(
        f"stopped by {signal.Signals(stopping).name} after step {step} of {stage.steps} of the "
        f"{stage.name} stage: the same command resumes from the last checkpoint in {run.path}",
        stopping)
    if done:
      at = here
    aside_s += time.monotonic() - reached  # pictures, the journal, a checkpoint's copy
    begun, began, waited, sums = step, time.monotonic(), programs.waited_s, no_sums()
  return state.avatar, at


def _grows(stage: Stage, step: int) -> bool:
  """Whether splats are born or die after a step."""
  return stage.name != "fuse" and step > stage.densify.start and (
    step % stage.densify.every == 0) and (
    step < stage.densify.until or (stage.name == "face" and step < stage.steps))


def _save(saver: runs.Saver, avatar: Avatar, training: dict, at: runs.Progress, due: bool,
          last: bool) -> None:
  """Says if an earlier checkpoint failed, begins this one if `due`, ends it if it is the `last`."""
  saver.check()
  if due:
    saver.save(avatar, training, at)
  if last:
    saver.wait()


def _ends(experiment: Experiment, stage: Stage, step: int) -> Iterator[int]:
  """Steps after which the host has something to do.

  Programs change, splats grow and checkpoints are written at steps that do not depend on where
  the run was resumed; so the bits do not either.
  """
  turns = turning_points(stage)
  rhythms = (experiment.log_every, stage.densify.every, experiment.picture_every,
             experiment.save_every)
  while step < stage.steps:
    step = min(e for e in (*turns, *((step // n + 1) * n for n in rhythms)) if e > step)
    yield step


def _begin(experiment: Experiment, clip: loader.Source) -> Avatar:
  """Splats scattered and motion networks drawn."""
  k_motion, k_face, k_mouth = jax.random.split(jax.random.key(experiment.seed), 3)
  face_motion, mouth_motion = init_motion(k_motion, experiment.model.motion)
  layers = {}
  for stage, key, motion in ((experiment.face, k_face, face_motion),
                             (experiment.mouth, k_mouth, mouth_motion)):
    splats, alive = seeding.seed(stage, clip, key)
    layers[stage.name] = Layer(splats, alive, motion)
  return Avatar(**layers, config=experiment.model.motion, sh_degree=2)


def _training(state: State) -> dict:
  """The part of the state that only training needs."""
  return {"opt": state.opt, "stats": state.stats, "step": state.step, "skipped": state.skipped}


def _resume_template(avatar: Avatar, experiment: Experiment, at: runs.Progress):
  return None if at.step == 0 else _training(enter(experiment.stages()[at.stage], avatar))


def _with_capacity(stage: Stage, state: State, at: runs.Progress, overflow: float):
  """More room in the rasteriser's pair list where pairs of splat and tile did not fit.

  It is part of the checkpoint: a resumed run draws with the room that it had.
  """
  if not overflow:
    return at
  held = getattr(state.avatar, "mouth" if stage.name == "mouth" else "face").alive.shape[0]
  capacity = 64 * held if at.capacity is None else 2 * at.capacity
  _log.warning("%s: splats overlap more tiles than there was room for; going on with room for %d "
               "pairs", stage.name, capacity)
  return at._replace(capacity=capacity)


def _census(stage: Stage, state: State, changed) -> dict:
  counts = {f"{name}_splats": float(getattr(state.avatar, name).alive.sum())
            for name in (("face", "mouth") if stage.name == "fuse" else (stage.name,))}
  if changed is not None:
    counts |= {name: float(value) for name, value in changed._asdict().items()}
  return counts


class Shown:
  """A held-out frame that pictures are drawn of while training."""

  def __init__(self, frame: Frame):
    self._truth = np.asarray(frame.image)
    self._scene = jax.tree.map(
      jnp.asarray, (frame.controls, frame.camera, frame.background, frame.image))

  def drawing(self, avatar: Avatar) -> Call:
    """The program that draws it; of a spread avatar the first process's copy is drawn."""
    near = lambda x: (jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type)
                      if isinstance(x, jax.ShapeDtypeStruct) else hosts.local(x))
    return Call(_draw, {}, (jax.tree.map(near, avatar), *self._scene))

  def keep(self, journal: "Journal", total: int, stage: Stage, avatar: Avatar, programs: Ahead
           ) -> dict:
    """Keeps a picture of it, the stage's layer beside the truth.

    Returns:
      held_out_psnr_db of the frame as both layers and the background now make it, whatever the
      stage: what runs of the same subject can be compared by while they train.
    """
    layers, psnr = programs(self.drawing(avatar))
    journal.picture(total, stage.name, np.concatenate([layers[stage.name], self._truth], 1))
    return {"held_out_psnr_db": float(psnr)}


@jax.jit
def _draw(avatar: Avatar, controls: Controls, camera: Camera, background: UInt8[Array, "h w 3"],
          truth: UInt8[Array, "h w 3"]) -> tuple[dict, Float[Array, ""]]:
  """What each stage trains as bytes, and the PSNR of the whole."""
  image = render(avatar, controls, camera, background / 255)
  layers = {"fuse": image.composite, "face": image.face, "mouth": image.mouth}
  bytes_of = lambda layer: (jnp.clip(layer, 0, 1) * 255 + 0.5).astype(jnp.uint8)
  return (jax.tree.map(bytes_of, layers),
          metrics.psnr(jnp.clip(image.composite, 0, 1), truth / 255))


class Journal:
  """metrics.jsonl, TensorBoard events and pictures of a run.

  A resumed run cuts what was written after the checkpoint it resumes from.
  """

  def __init__(self, path: pathlib.Path, total: int):
    self._path = path
    lines = path / "metrics.jsonl"
    kept = []
    if lines.exists():
      kept = [line for line in lines.read_text().splitlines() if _total(line) <= total]
    with saving.aside(lines) as partial:
      partial.write_text("".join(line + "\n" for line in kept))
    self._lines = lines.open("a")
    self._events = _event_writer(path / "tensorboard", total)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._lines.close()
    if self._events:
      self._events.close()

  def write(self, total: int, stage: str, step: int, report: dict) -> None:
    report = {name: round(value, 6) for name, value in report.items()}
    self._lines.write(json.dumps({"total": total, "stage": stage, "step": step} | report) + "\n")
    self._lines.flush()
    if self._events:
      self._events.scalars(total, {f"{stage}/{name}": v for name, v in report.items()})

  def picture(self, total: int, stage: str, image: np.ndarray) -> None:
    folder = self._path / "pictures"
    folder.mkdir(exist_ok=True)
    path = folder / f"{total:07d}_{stage}.png"
    with saving.aside(path) as partial:
      PIL.Image.fromarray(image).save(partial, format="PNG")
    if self._events:
      self._events.image(total, f"{stage}/render_truth", path.read_bytes(), image.shape)


def _total(line: str) -> int:
  try:
    return int(json.loads(line)["total"])
  except (ValueError, KeyError, TypeError):
    return 1 << 62  # a torn line, written when the run was killed


def _event_writer(path: pathlib.Path, total: int):
  try:
    from uajax.train.events import Events
  except ImportError:
    _log.warning("tensorboard is not installed: metrics go to metrics.jsonl only")
    return None
  return Events(path, total)
