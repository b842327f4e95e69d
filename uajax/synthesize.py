"""A recording becomes a film of the person speaking it, frame by frame, of any length.

What is heard drives mouth and face. Head pose, brows and torso come from the training clip,
walked back and forth, so that they go on for ever without a jump; blinks are made anew.
Frames are rendered in chunks of one compiled shape and streamed to the encoder: memory does
not grow with the film, apart from the speech features themselves (about 5 kB a frame).

Axes: f frames, h w pixels, w also audio window steps, d channels.
"""

import collections
import concurrent.futures
import functools
import itertools
import os
import pathlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from uajax import direction
from uajax import provenance as origin
from uajax.avatar import Avatar, Known, know, render
from uajax.errors import UserError
from uajax.progress import Progress
from uajax.types import ACTION_UNITS, FPS, Camera, Controls

CHUNK = 8  # frames a compiled call draws
EYES = ACTION_UNITS.index("AU45")
BLINK = (0.5, 0.9, 1.0, 0.9, 0.5)  # of a full blink, a value a frame: 0.2 s (method.md A.1.4)
GAP_S = (2.0, 5.5)  # between blinks: about 16 a minute, as people do
TORN = 3  # frames missing between two training frames that the eye takes for a jump

Background = Literal["subject", "black", "white", "green"]
COLOURS = {"black": (0, 0, 0), "white": (255, 255, 255), "green": (0, 255, 0)}


class Scene(NamedTuple):
  """Everything one frame is drawn from (NumPy on the host)."""

  controls: Controls
  camera: Camera
  background: UInt8[np.ndarray, "h w 3"]


class Drawn(NamedTuple):
  """A frame of the film."""

  image: UInt8[np.ndarray, "h w 3"]
  uncertainty: Float[np.ndarray, "h w"]


class Film(NamedTuple):
  """What `synthesize` made."""

  path: pathlib.Path
  frames: int
  duration_s: float


def synthesize(
  run_path: str | os.PathLike,
  audio: str | os.PathLike,
  out: str | os.PathLike,
  *,
  emotion: str | None = None,
  intensity: float = 1.0,
  emotion_reference: str | os.PathLike | None = None,
  audio_weights: str | os.PathLike | None = None,
  audio_windows: str | os.PathLike | None = None,
  blink: Literal["auto", "none"] = "auto",
  script: str | os.PathLike | None = None,
  action_units: Mapping[str, float] | None = None,
  uncertainty: str | os.PathLike | None = None,
  subject: str | os.PathLike | None = None,
  background: Background = "subject",
  mark: str | None = None,
  provenance: bool = True,
  seed: int = 0,
) -> Film:
  """Writes an MP4 at 25 fps of the run's person saying `audio`, with its sound.

  Args:
    run_path: a run folder.
    audio: speech, any sound or video file; its length is the film's, to a frame.
    out: the MP4; appears when it is whole.
    emotion: an emotion by name; None: as the recording sounds.
    intensity: of the named emotion, 0 (neutral) to 1 (full).
    emotion_reference: a recording whose emotion is taken instead.
    audio_weights: folder of the audio encoder's weights, if it is no longer where it was.
    audio_windows: .npy file of audio windows of `audio`, made elsewhere; none are computed then.
    blink: "auto" blinks at random intervals as strongly as in training; "none" never.
    script: a file that says which emotion and which action units hold when (`uajax.direction`).
    action_units: values of action units (AU01 ...) that hold for the whole film.
    uncertainty: a second MP4, the uncertainty of every pixel from black (none) to yellow.
    subject: the subject folder, if it is no longer where it was when training.
    background: behind the head: the training frames' own (with torso), or a colour.
    mark: a line of text to be seen in every picture.
    provenance: whether the films carry a signed manifest that says what they are.
    seed: of the blinks.

  Raises:
    UserError: the run, the recording, the subject, the script or the emotion cannot be used; disk
      full.
  """
  from uajax import media, runs  # the machine that trains may lack what media needs
  from uajax.emotion import control
  from uajax.priors import extract
  from uajax.speech import features

  out = _film_path(out, "--out")
  films = [out]
  if uncertainty is not None:
    films.append(_film_path(uncertainty, "--uncertainty"))
  if len({path.resolve() for path in (*films, pathlib.Path(audio))}) != len(films) + 1:
    raise UserError(f"{out} is named twice: sound, film and uncertainty need different files")
  spans = [direction.whole_film(action_units)] if action_units else []
  spans += direction.read(script) if script is not None else []
  credentials = origin.credentials() if provenance else None
  run = runs.open_run(run_path)
  sound = media.read_audio(audio)
  media.check_speech(sound, audio)
  frames = features.frame_count(len(sound))
  source = open_source(run, "train", subject, priors=False)
  avatar = run.avatar()
  extractors = extract.load(run.extractors)
  wanted = _emotion(extractors, emotion, intensity, emotion_reference)
  listen = listener(run, audio_weights, audio_windows)
  speech = extract.hear(extractors, sound, frames, emotion=wanted, listen=listen)
  speech = speech._replace(emotion=direction.feel(
    spans, np.asarray(speech.emotion), functools.partial(control.resolve, extractors)))
  size = avatar.config.audio_width, avatar.config.audio_channels
  if speech.audio.shape[1:] != size:
    raise UserError(
      f"{run.path} listens to windows of {size[0]} steps and {size[1]} channels, these have "
      f"{speech.audio.shape[1]} and {speech.audio.shape[2]}: give what it was trained with"
    )
  numbers = [source.numbers(i) for i in range(len(source))]
  cameras = [camera for camera, *_ in numbers]
  poses = walk(frames, source.ids)
  units = np.stack([controls.action_units for _, controls, *_ in numbers])
  units = direction.act(spans, eyes(units, poses, blink, np.random.default_rng(seed)))

  def behind(pose: int) -> np.ndarray:
    if background == "subject":
      return np.asarray(source.pictures(pose).background)
    return np.full((source.height, source.width, 3), COLOURS[background], np.uint8)

  def scenes() -> Iterator[Scene]:
    for i, picture in enumerate(ahead(behind, poses)):
      heard: Any = (  # NumPy leaves, as everything on the host
        features.neighbouring(np.asarray(speech.audio), i),
        units[i],
        speech.f_exp[i],
        speech.f_tone[i],
        speech.emotion[i],
      )
      controls = Controls(*heard)
      yield Scene(controls, cameras[poses[i]], picture)

  drawn = _report(draw(avatar, scenes(), doubt=uncertainty is not None),
                  Progress("synthesize", frames))
  if mark:
    drawn = (frame._replace(image=origin.mark(frame.image, mark)) for frame in drawn)
  write = functools.partial(media.write_video, fps=FPS, audio=sound)
  if uncertainty is None:
    write(out, (frame.image for frame in drawn))
  else:
    _write_both(write, films, drawn)
  if credentials is not None:
    _sign(films, credentials, {
      "run": run.path.name, "run_sha256": origin.digest(run.path / "run.json"),
      "sound_sha256": origin.digest(audio), "emotion": emotion or "as heard",
      "intensity": intensity if emotion else None})
  return Film(out, frames, frames / FPS)


def _sign(films: list[pathlib.Path], credentials, synthesis: dict[str, Any]) -> None:
  """Signs all, or leaves none behind."""
  try:
    for film in films:
      origin.sign(film, synthesis, credentials)
  except BaseException:
    for film in films:
      film.unlink(missing_ok=True)
    raise


def walk(frames: int, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " f"]:
  """Which training frame lends its pose to each frame of the film: to and fro without a jump.

  Args:
    frames: length of the film.
    ids: frame numbers of the training frames in the source video, rising. Where some are
      missing the head would jump, so that the walk stays inside the longest whole stretch.

  Returns:
    indices into the training frames; neighbours differ by at most 1.
  """
  torn = np.flatnonzero(np.diff(ids) > TORN) + 1
  begins, ends = np.append(0, torn), np.append(torn, len(ids))
  longest = int(np.argmax(ends - begins))
  begin, count = int(begins[longest]), int((ends - begins)[longest])
  if count == 1:
    return np.full(frames, begin)
  place = np.arange(frames) % (2 * count - 2)
  return begin + np.where(place < count, place, 2 * count - 2 - place)


def eyes(
  action_units: Float[np.ndarray, "n 6"],
  poses: Int[np.ndarray, " f"],
  blink: Literal["auto", "none"],
  rng: np.random.Generator,
) -> Float[np.ndarray, "f 6"]:
  """The action units of the film: those of the walked frames, with eyes that blink in its own time.

  A blink is as strong as the person's strong ones in training (98th percentile of AU45), so
  that the eyes are never asked for what was not seen.
  """
  units = np.array(action_units, np.float32)[poses]
  units[:, EYES] = 0.0
  if blink == "none":
    return units
  strength = np.percentile(np.clip(action_units[:, EYES], 0, 2), 98)
  at = 0.0
  while True:
    at += rng.uniform(*GAP_S)
    begin = round(at * FPS)
    if begin >= len(units):
      return units
    pulse = np.array(BLINK[: len(units) - begin], np.float32)
    units[begin : begin + len(pulse), EYES] = strength * pulse
    at += len(BLINK) / FPS


def draw(avatar: Avatar, scenes: Iterable[Scene], chunk: int = CHUNK, *, doubt: bool = True
         ) -> Iterator[Drawn]:
  """Renders frame after frame; the device draws a chunk while the one before is handed out.

  Args:
    chunk: frames a compiled call draws.
    doubt: whether the uncertainty is wanted; zeros, sooner, if not.

  Raises:
    UserError: the avatar holds values that are not finite (splats of such are not drawn at all,
      so that the pictures alone would not show it).
  """
  if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(avatar)):
    raise UserError("the avatar holds NaN or infinity: its training diverged, train it anew")
  scenes = iter(scenes)
  waiting: tuple[int, Scene, tuple] | None = None
  capacity, known = None, know(avatar)
  while True:
    taken = list(itertools.islice(scenes, chunk))
    begun = None
    if taken:
      # The last chunk is filled up: a second shape would compile again.
      filled = taken + taken[-1:] * (chunk - len(taken))
      stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *filled)
      begun = len(taken), stacked, _draw(avatar, known, stacked, capacity, doubt)
    if waiting is not None:
      count, stacked, results = waiting
      while int(results[2].max()):  # splats were left out: once more, with room for them
        slots = max(len(avatar.face.alive), len(avatar.mouth.alive))
        capacity = 64 * slots if capacity is None else 2 * capacity
        results = _draw(avatar, known, stacked, capacity, doubt)
      images, maps = np.asarray(results[0]), np.asarray(results[1])
      for i in range(count):
        yield Drawn(images[i], maps[i])
    if begun is None:
      return
    waiting = begun


@functools.partial(jax.jit, static_argnames=("capacity", "doubt"))
def _draw(avatar: Avatar, known: Known, scenes: Scene, capacity: int | None, doubt: bool):
  def one(scene: Scene):
    back = jnp.asarray(scene.background, jnp.float32) / 255
    image = render(avatar, scene.controls, scene.camera, back, known=known, doubt=doubt,
                   capacity=capacity)
    pixels = jnp.round(image.composite * 255).astype(jnp.uint8)
    return pixels, image.uncertainty, image.overflow

  return jax.lax.map(one, scenes)


def colour(uncertainty: Float[np.ndarray, "h w"], full: float) -> UInt8[np.ndarray, "h w 3"]:
  """0 black, through violet and red, to `full` (and above) yellow."""
  stops = np.array(
    [[0, 0, 0], [81, 18, 124], [183, 55, 84], [252, 137, 97], [252, 253, 191]], np.float32
  )
  place = np.clip(uncertainty / max(full, 1e-12), 0, 1) * (len(stops) - 1)
  low = np.minimum(place.astype(np.int32), len(stops) - 2)
  part = (place - low)[..., None]
  return np.round(stops[low] * (1 - part) + stops[low + 1] * part).astype(np.uint8)


def _write_both(write, films: list[pathlib.Path], drawn: Iterator[Drawn]) -> None:
  """Two encoders drink from one stream of frames: the map's in a thread, a few frames behind."""
  maps: queue.Queue = queue.Queue(maxsize=2 * CHUNK)
  failure: list[BaseException] = []
  over = object()

  class Abandoned(Exception):
    pass

  def pour() -> Iterator[np.ndarray]:
    full = 0.0
    while (item := maps.get()) is not over:
      if item is None:
        raise Abandoned  # the film failed: no map without it
      full = full or 1.25 * float(np.percentile(item, 99.5))  # one scale for the whole film
      yield colour(item, full)

  def encode() -> None:
    try:
      write(films[1], pour())
    except Abandoned:
      pass
    except BaseException as error:
      failure.append(error)
      while (left := maps.get()) is not over and left is not None:
        pass  # else the film would wait for room in the queue

  thread = threading.Thread(target=encode, name="uncertainty film")
  thread.start()

  def images() -> Iterator[np.ndarray]:
    for frame in drawn:
      if failure:
        raise failure[0]
      maps.put(frame.uncertainty)
      yield frame.image

  ending: object = None
  try:
    write(films[0], images())
    ending = over
  finally:
    maps.put(ending)
    thread.join()
  if failure:
    raise failure[0]


def _report(drawn: Iterator[Drawn], progress: Progress) -> Iterator[Drawn]:
  for frame in drawn:
    yield frame
    progress.advance()
  progress.close()


def _film_path(path: str | os.PathLike, name: str) -> pathlib.Path:
  path = pathlib.Path(path)
  if path.suffix.lower() != ".mp4":
    raise UserError(f"{name} {path} does not end in .mp4: only MP4 films are written")
  if path.is_dir():
    raise UserError(f"{name} {path} is a folder: give the name of a file")
  return path


def open_source(run, split: Literal["train", "val"], subject=None, *, priors: bool = True):
  """The frames of a run's subject, read from disk one at a time (`data.folder.Source`).

  Args:
    run: runs.Run.
    subject: the folder's new place, if it was moved.
    priors: whether the files of f_exp, f_tone and emotion must be there.

  Raises:
    UserError: the folder is gone, lacks or mismatches files.
  """
  from uajax.data import folder

  path = pathlib.Path(subject) if subject is not None else run.subject
  if not path.is_dir():
    raise UserError(
      f"the subject folder {path} of {run.path} is gone: give its new place with --subject"
    )
  audio = run.experiment.model.audio
  return folder.Source(path, split, audio=audio, allow_missing_priors=not priors)


def ahead(function: Callable[[Any], Any], items: Iterable, depth: int = 2 * CHUNK) -> Iterator:
  """`map` in order, with `depth` results computed ahead in threads (pictures decode there)."""
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    waiting: collections.deque = collections.deque()
    try:
      for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > depth:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      for future in waiting:
        future.cancel()


def listener(run, weights, file):
  """What makes the audio windows of speech for this run (`encoders.Windows`)."""
  from uajax.data import folder
  from uajax.speech import encoders

  kind = run.experiment.model.audio
  if file is None:
    return encoders.recalled(run.extractors, kind, weights).windows
  windows = folder.read_window_file(file, kind)

  def given(wav, frames: int):
    if not frames - folder.LATE <= len(windows) <= frames + folder.LATE:
      raise UserError(
        f"{file} has {len(windows)} windows, the recording lasts {frames} frames: make them of "
        "the same recording"
      )
    return windows[:frames]

  return given


def _emotion(extractors, name, intensity: float, reference):
  """The emotion vector [128] asked for, or None: as the recording sounds."""
  from uajax import media
  from uajax.emotion import control
  from uajax.priors import extract
  from uajax.speech import features

  if name is not None and reference is not None:
    raise UserError("an emotion by name and one by recording exclude each other: give one of them")
  if name is not None:
    if not 0 <= intensity <= 2:
      raise UserError(f"intensity {intensity} is outside 0 to 2: 0 is neutral, 1 is full")
    return control.resolve(extractors, name, intensity)
  if reference is not None:
    sound = media.read_audio(reference)
    media.check_speech(sound, reference)
    heard = extract.hear(extractors, sound, features.frame_count(len(sound)))
    return np.asarray(heard.emotion).mean(axis=0)
  return None
