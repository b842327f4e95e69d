"""A recording becomes a film of the person speaking it, frame by frame, of any length.

What is heard drives mouth and face. Head pose and torso come from the training clip, walked back
and forth or cut anew (`uajax.poses`), so that they go on for ever without a jump; brows, too, but
for what was felt there: they do what is felt in the film (`uajax.emotion.mien`). Blinks are made as
the person makes them (`uajax.blinks`). Sound is read from a file as it is needed, heard piece by
piece, drawn in chunks of one compiled shape and streamed to the encoder: memory does not grow with
the film, apart from some hundred bytes a frame (and, where other audio encoders than mel hear,
their windows).

Axes: f frames, h w pixels, c channels (3, or 4 with opacity), n training frames, w also audio
window steps, d channels.
"""

import collections
import concurrent.futures
import functools
import itertools
import logging
import os
import pathlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from uajax import blinks as blinking
from uajax import consent, direction, poses
from uajax import provenance as origin
from uajax.avatar import Avatar, Known, know, render
from uajax.errors import UserError
from uajax.progress import Progress
from uajax.types import FPS, NEIGHBOURS, SAMPLE_RATE_HZ, Camera, Controls, Speech

if TYPE_CHECKING:
  from uajax.emotion.mien import Mien
  from uajax.priors.extract import Extractors

_LOG = logging.getLogger("uajax")
CHUNK = 8  # frames a compiled call draws

Background = Literal["image", "black", "white", "green", "alpha"]
COLOURS = {"black": (0, 0, 0), "white": (255, 255, 255), "green": (0, 255, 0), "alpha": (0, 0, 0)}


class Scene(NamedTuple):
  """Everything one frame is drawn from (NumPy on the host)."""

  controls: Controls
  camera: Camera
  background: UInt8[np.ndarray, "h w 3"]


class Drawn(NamedTuple):
  """A frame of the film."""

  image: UInt8[np.ndarray, "h w c"]
  uncertainty: Float[np.ndarray, "h w"]


class Film(NamedTuple):
  """What `synthesize` made."""

  path: pathlib.Path
  frames: int
  duration_s: float


def synthesize(
  run_path: str | os.PathLike, audio: str | os.PathLike, out: str | os.PathLike, **how: Any
) -> Film:
  """Writes a film of the run's person saying `audio`; all else as in `synthesize_all`."""
  return synthesize_all(run_path, [(audio, out)], **how)[0]


def synthesize_all(
  run_path: str | os.PathLike,
  recordings: Sequence[tuple[str | os.PathLike, str | os.PathLike]],
  *,
  emotion: str | None = None,
  intensity: float = 1.0,
  emotion_reference: str | os.PathLike | None = None,
  audio_weights: str | os.PathLike | None = None,
  audio_windows: str | os.PathLike | None = None,
  movement: Literal["clip", "generated"] = "clip",
  blinks: bool = True,
  script: str | os.PathLike | None = None,
  action_units: Mapping[str, float] | None = None,
  uncertainty: str | os.PathLike | None = None,
  subject: str | os.PathLike | None = None,
  background: Background = "image",
  orbit: float | None = None,
  camera: str | os.PathLike | None = None,
  mark: str | None = None,
  provenance: bool = True,
  seed: int = 0,
) -> list[Film]:
  """Writes films at 25 fps of the run's person saying recordings, with their sound.

  Args:
    run_path: a run folder.
    recordings: of each film the speech, any sound or video file, whose length is the film's, to
      a frame; and the MP4 to write (MOV for background "alpha"), which appears when it is whole.
    emotion: an emotion by name; None: as the recording sounds.
    intensity: of the named emotion, 0 (neutral) to 1 (full).
    emotion_reference: a recording whose emotion is taken instead.
    audio_weights: folder of the audio encoder's weights, if it is no longer where it was.
    audio_windows: .npy file of audio windows of the one recording, made elsewhere; none are
      computed then.
    movement: of the head: "clip" walks to and fro over the training clip, "generated" recuts it.
    blinks: whether the eyes blink, as often and as strongly as in training.
    script: a file that says which emotion and which action units hold when (`uajax.direction`).
    action_units: values of action units (AU01 ...) that hold for the whole film.
    uncertainty: a second MP4 of the one recording, the uncertainty of every pixel from black
      (none) to yellow.
    subject: the subject folder, if it is no longer where it was when training.
    background: behind the head: the training frames' own (with torso), a colour, or nothing.
    orbit: the camera goes about the head, to and fro, so many degrees to each side.
    camera: a file of cameras that see the head instead of the clip's (`poses.read_path`).
    mark: a line of text to be seen in every picture.
    provenance: whether the films carry a signed manifest that says what they are.
    seed: of blinks and of generated movement.

  Raises:
    UserError: the run, a recording, the subject, the script, the cameras or the emotion cannot be
      used; disk full.
  """
  from uajax import media, runs  # the machine that trains may lack what media needs
  from uajax.emotion import control
  from uajax.priors import extract

  if not recordings:
    raise UserError("no recording was given: give a file of speech")
  if len(recordings) > 1 and (uncertainty is not None or audio_windows is not None):
    raise UserError("--uncertainty and --audio-windows belong to one recording: give one --audio")
  if orbit is not None and camera is not None:
    raise UserError("--orbit and --camera exclude each other: give one of them")
  if orbit is not None and not 0 <= orbit <= 180:
    raise UserError(f"--orbit {orbit} is out of reach: give 0 to 180 degrees to each side")
  suffix = ".mov" if background == "alpha" else ".mp4"
  outs = [_film_path(out, "--out", suffix) for _, out in recordings]
  films = list(outs)
  if uncertainty is not None:
    films.append(_film_path(uncertainty, "--uncertainty", ".mp4"))
  named = [path.resolve() for path in films]
  sounds = {pathlib.Path(audio).resolve() for audio, _ in recordings}
  for path, place in zip(films, named, strict=True):
    if named.count(place) > 1 or place in sounds:
      raise UserError(f"{path} is named twice: sound, film and uncertainty need different files")
  spans = [direction.whole_film(action_units)] if action_units else []
  spans += direction.read(script) if script is not None else []
  credentials = origin.credentials() if provenance else None
  run = runs.open_run(run_path)
  consented = consent.summarize(run.path)
  for audio, _ in recordings[1:]:  # sooner than after the films before
    media.check_sound(audio)
  source = open_source(run, "train", subject, priors=False)
  avatar = run.avatar()
  felt = emotion is not None or emotion_reference is not None or any(
    span.emotion is not None for span in spans)
  if felt and "emotion" not in avatar.config.modalities:
    raise UserError(f"{run.path} was trained without the modality emotion and shows none: leave "
                    "the emotion out, or train with --model.motion.modalities ... emotion")
  if uncertainty is not None and not avatar.config.uncertainty:
    raise UserError(f"{run.path} was trained without uncertainty: leave --uncertainty out, or "
                    "train with --model.motion.uncertainty")
  if uncertainty is not None and not avatar.config.calibrates:
    _LOG.warning("the uncertainty of %s is not calibrated (an imported avatar, or trained without "
                 "model.motion.calibrated): nothing ties it to errors or to noise", run.path)
  extractors = extract.load(run.extractors)
  resolve = functools.partial(control.resolve, extractors)
  for span in spans:
    if span.emotion is not None:
      resolve(span.emotion, span.intensity)  # a wrong name is found now, not in the film's midst
  wanted = _emotion(extractors, emotion, intensity, emotion_reference)
  listen = listener(run, audio_weights, audio_windows)
  numbers = [source.numbers(i) for i in range(len(source))]
  feeling, units = bearing(avatar, extractors, [controls for _, controls, *_ in numbers])
  clip = Clip(source, [camera for camera, *_ in numbers], units)
  shown = poses.turned_degrees(clip.cameras)
  if orbit is not None and orbit > shown:
    _LOG.warning("--orbit %g: the clip turns the head by %.0f degrees; farther round is guessed",
                 orbit, shown)
  route = None
  if camera is not None:
    route = poses.read_path(camera, source.width, source.height, np.asarray(clip.cameras[0].K))
  centre, made = _centre(avatar), []
  for index, (audio, _) in enumerate(recordings):
    sound = media.map_audio(audio)
    media.check_speech(sound, audio)
    frames = -(-len(sound) * FPS // SAMPLE_RATE_HZ)
    rng = np.random.default_rng([seed, index])
    course, units = _act(clip, centre, sound, frames, movement, blinks, rng)
    speech = extract.hear_in_pieces(extractors, sound, frames, emotion=wanted, listen=listen)
    rows = heard_rows(speech, functools.partial(direction.feel, spans, resolve=resolve))
    rows = _checked(rows, avatar, run)

    def standing(i: int, course=course) -> Camera:
      if route is not None:
        return route.at(i / FPS)
      seen = poses.between(clip.cameras[course.main[i]], clip.cameras[course.other[i]],
                           float(course.share[i]))
      return seen if orbit is None else poses.orbit(seen, orbit, i / FPS, centre)

    def scenes(course=course, units=units, rows=rows, standing=standing, frames=frames
               ) -> Iterator[Scene]:
      behind = ahead(functools.partial(clip.behind, course, background), range(frames))
      for i, (row, picture) in enumerate(zip(rows, behind, strict=True)):
        acted = direction.act(spans, feeling.put_on(units[i:i + 1], np.asarray(row.emotion)), i)[0]
        controls = Controls(row.audio, acted, row.f_exp, row.f_tone, row.emotion)  # pyright: ignore
        yield Scene(controls, standing(i), picture)

    of = f" {index + 1} of {len(recordings)}" if len(recordings) > 1 else ""
    drawn = _report(
      draw(avatar, scenes(), doubt=uncertainty is not None, alpha=background == "alpha"),
      f"synthesize{of}", frames)
    if mark:
      drawn = (frame._replace(image=origin.mark(frame.image, mark)) for frame in drawn)
    write = functools.partial(media.write_video, fps=FPS, audio=sound)
    written = [outs[index], *films[len(outs):]]
    if uncertainty is None:
      write(outs[index], (frame.image for frame in drawn))
    else:
      _write_both(write, written, drawn)
    if credentials is not None:
      _sign(written, credentials, {
        "run": run.path.name, "run_sha256": origin.digest(run.path / "run.json"),
        "sound_sha256": origin.digest(audio), "emotion": emotion or "as heard",
        "intensity": intensity if emotion else None, "consent": consented})
    made.append(Film(outs[index], frames, frames / FPS))
  return made


def bearing(avatar: Avatar, extractors: "Extractors", clip: list[Controls]
            ) -> tuple["Mien", Float[np.ndarray, "n 6"]]:
  """What feelings do to the face in the training frames, and their action units without that."""
  from uajax.emotion import mien

  units, felt = (np.stack([getattr(controls, name) for controls in clip])
                 for name in ("action_units", "emotion"))
  named = extractors.prototypes if "emotion" in avatar.config.modalities else {}
  learnt = mien.learn(named, felt, units)
  return learnt, learnt.without(units, felt)


class Clip(NamedTuple):
  """What films borrow from the training clip."""

  source: Any  # data.folder.Source
  cameras: list[Camera]
  units: Float[np.ndarray, "n 6"]  # ACTION_UNITS less what was felt, see `emotion.mien`

  def behind(self, course: poses.Course, background: Background, i: int
             ) -> UInt8[np.ndarray, "h w 3"]:
    """What is behind the head in frame i of the film."""
    if background != "image":
      return np.full((self.source.height, self.source.width, 3), COLOURS[background], np.uint8)
    picture = np.asarray(self.source.pictures(int(course.main[i])).background)
    share = course.share[i]
    if not share:
      return picture
    other = np.asarray(self.source.pictures(int(course.other[i])).background, np.float32)
    return np.round(picture * np.float32(1 - share) + other * np.float32(share)).astype(np.uint8)


def _act(
  clip: Clip, centre: Float[np.ndarray, " 3"], sound: Float[np.ndarray, " s"], frames: int,
  movement: str, blinks: bool, rng: np.random.Generator,
) -> tuple[poses.Course, Float[np.ndarray, "f 6"]]:
  """Where each frame of a film has its pose from, and its action units."""
  ids = clip.source.ids
  if movement == "clip":
    course = poses.steady(poses.walk(frames, ids))
  else:
    own = _own_loudness(clip)
    voices = None if own is None else (own, loudness_db(sound, frames))
    course = poses.recut(frames, ids, clip.cameras, centre, rng, voices)
  return course, eyes(clip.units, ids, course, blinks, rng)


def eyes(
  action_units: Float[np.ndarray, "n 6"], ids, course: poses.Course, blinks: bool,
  rng: np.random.Generator,
) -> Float[np.ndarray, "f 6"]:
  """The action units of the film: those of the poses, with eyes that blink in their own time."""
  habit = blinking.habit(action_units, ids)
  units = course.mix(np.asarray(action_units, np.float32))
  units[:, blinking.EYES] = blinking.track(habit, len(units), rng) if blinks else habit.rest
  return units


def _centre(avatar: Avatar) -> Float[np.ndarray, " 3"]:
  """Of the head: the mean of the face's splats, metres."""
  alive = np.asarray(avatar.face.alive)
  means = np.asarray(avatar.face.splats.means, np.float64)[alive]
  return means.mean(axis=0) if len(means) else np.zeros(3)


def _own_loudness(clip: Clip) -> Float[np.ndarray, " n"] | None:
  """Loudness of the training frames, dB; None where the clip's sound is not there."""
  from uajax import media

  path = clip.source.path / "aud.wav"
  if not path.is_file():
    return None
  sound = media.map_audio(path)
  ids = np.asarray(clip.source.ids)
  return loudness_db(sound, int(ids.max()) + 1)[ids]


def loudness_db(sound: Float[np.ndarray, " s"], frames: int) -> Float[np.ndarray, " f"]:
  """The level of each frame's 40 ms of sound; -60 dB and lower count as silence."""
  samples = SAMPLE_RATE_HZ // FPS
  power = np.zeros(frames)
  for i in range(min(frames, len(sound) // samples)):
    power[i] = np.mean(np.square(sound[i * samples : (i + 1) * samples], dtype=np.float64))
  return 10 * np.log10(power + 1e-6)


def heard_rows(
  pieces: Iterable[Speech],
  feel: Callable[..., Float[np.ndarray, "f 128"]] | None = None,
) -> Iterator[Speech]:
  """What is heard in frame after frame: with [8 d w] audio, the windows of frames i-4 .. i+3.

  Args:
    feel: gives the emotion of a piece [f 128], of which it is told `begin`.
  """
  def rows() -> Iterator[Speech | None]:
    yield from [None] * (NEIGHBOURS // 2)
    begin = 0
    for piece in pieces:
      if feel is not None:
        felt: Any = feel(np.asarray(piece.emotion), begin=begin)
        piece = piece._replace(emotion=felt)
      begin += len(piece.audio)
      for leaves in zip(*map(np.asarray, piece), strict=True):
        yield Speech(*leaves)
    yield from [None] * (NEIGHBOURS // 2 - 1)

  around: collections.deque[Speech | None] = collections.deque(maxlen=NEIGHBOURS)
  for row in rows():
    around.append(row)
    now = around[NEIGHBOURS // 2] if len(around) == NEIGHBOURS else None
    if now is not None:
      silent = np.zeros_like(now.audio)  # where there is no frame (method.md D.1)
      windows = np.stack([silent if near is None else near.audio for near in around])
      audio: Any = windows.transpose(0, 2, 1)
      yield now._replace(audio=audio)


def _checked(rows: Iterator[Speech], avatar: Avatar, run) -> Iterator[Speech]:
  """The same, once it is seen that the avatar can listen to them: before a film is begun.

  Raises:
    UserError: the windows are not such as it was trained with.
  """
  first = next(rows)
  width, channels = avatar.config.audio_width, avatar.config.audio_channels
  if first.audio.shape[1:] != (channels, width):
    raise UserError(
      f"{run.path} listens to windows of {width} steps and {channels} channels, these have "
      f"{first.audio.shape[2]} and {first.audio.shape[1]}: give what it was trained with"
    )
  return itertools.chain([first], rows)


def _sign(films: list[pathlib.Path], credentials, synthesis: dict[str, Any]) -> None:
  """Signs all, or leaves none behind."""
  try:
    for film in films:
      origin.sign(film, synthesis, credentials)
  except BaseException:
    for film in films:
      film.unlink(missing_ok=True)
    raise


def draw(avatar: Avatar, scenes: Iterable[Scene], chunk: int = CHUNK, *, doubt: bool = True,
         alpha: bool = False) -> Iterator[Drawn]:
  """Renders frame after frame; the device draws a chunk while the one before is handed out.

  Args:
    chunk: frames a compiled call draws.
    doubt: whether the uncertainty is wanted; zeros, sooner, if not.
    alpha: whether images get their opacity, of the head alone, as a fourth channel; the colours
      are not multiplied by it, and backgrounds should be black.

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
      begun = len(taken), stacked, _draw(avatar, known, stacked, capacity, doubt, alpha)
    if waiting is not None:
      count, stacked, results = waiting
      while int(results[2].max()):  # splats were left out: once more, with room for them
        slots = max(len(avatar.face.alive), len(avatar.mouth.alive))
        capacity = 64 * slots if capacity is None else 2 * capacity
        results = _draw(avatar, known, stacked, capacity, doubt, alpha)
      images, maps = np.asarray(results[0]), np.asarray(results[1])
      for i in range(count):
        yield Drawn(images[i], maps[i])
    if begun is None:
      return
    waiting = begun


@functools.partial(jax.jit, static_argnames=("capacity", "doubt", "alpha"))
def _draw(avatar: Avatar, known: Known, scenes: Scene, capacity: int | None, doubt: bool,
          alpha: bool):
  def one(scene: Scene):
    back = jnp.asarray(scene.background, jnp.float32) / 255
    image = render(avatar, scene.controls, scene.camera, back, known=known, doubt=doubt,
                   capacity=capacity)
    picture = image.composite
    if alpha:
      opacity = 1 - (1 - image.face_alpha) * (1 - image.mouth_alpha)
      picture = jnp.concatenate([picture / jnp.maximum(opacity, 1e-3), opacity], -1)
    pixels = jnp.round(jnp.clip(picture, 0, 1) * 255).astype(jnp.uint8)
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


def _report(drawn: Iterator[Drawn], label: str, frames: int) -> Iterator[Drawn]:
  """Says how long it takes yet."""
  progress = Progress(label, frames, compiles=True)
  for frame in drawn:
    yield frame
    progress.advance()
  progress.close()


def _film_path(path: str | os.PathLike, name: str, suffix: str) -> pathlib.Path:
  path = pathlib.Path(path)
  if path.suffix.lower() != suffix:
    written = "MP4 films are written, MOV for --background alpha" if suffix == ".mp4" else (
      "--background alpha makes MOV films (ProRes 4444)")
    raise UserError(f"{name} {path} does not end in {suffix}: {written}")
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
    short = max(frames - len(windows), 0)  # silent, as beyond any recording's end (method.md D.1)
    return np.pad(windows[:frames], ((0, short), (0, 0), (0, 0)))

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
