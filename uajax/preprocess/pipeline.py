"""From a video of one talking person to a subject folder.

The steps, each of which reads the video anew (decoding is cheap, keeping frames is not):

  look       follow the face, find shots and spans that cannot be used, choose the square to cut out
  landmarks  478 points and 52 blendshape scores a frame
  track      camera, head pose, face
  layers     what each pixel is, and the empty background
  pictures   the files of every frame
  tables     sound, poses, action units, gaze, report.json, report.html, contact_sheet.png

Each step has a key: the digest of the video, the settings, the models and the code that it hangs
on. What a step found lies in OUT.work until the folder is whole, so that an interrupted run takes
up where it stood; what later runs need then lies in OUT/steps, so that a run with other settings
redoes only what hangs on those. OUT appears, or is replaced, at the end or not at all. Frames that
cannot be used are left out by number; nothing is shifted (method.md Q60).

Axes: f frames, p landmarks, h w pixels.
"""

import contextlib
import csv
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from uajax import consent, media, pretrained, saving
from uajax.data import folder
from uajax.errors import UserError
from uajax.preprocess import (
  action_units,
  landmarks,
  lips,
  masks,
  refine,
  report,
  spans,
  track,
  weights,
  workers,
)  # fmt: skip
from uajax.progress import Progress
from uajax.types import FPS, SAMPLE_RATE_HZ

MIN_FRAMES = 2 * FPS
LONGEST_S = 600.0  # of a video, unless the user asks for more: ten minutes fit into 2 GB
LARGEST_PX = 512  # of the side, unless the user asks for another
BUNDLE = "face_landmarker.task"
PERSON = "selfie_segmentation.tflite"
HAIR_MATTE = "hair_segmentation.tflite"
PARSER = "bisenetv2_celebamaskhq_448x448_integer_quant.tflite"
PLATE_BYTES = 100_000_000  # of pictures that the background is gathered from, 64 at most
FACE_SHARE = 0.86  # side of the face detector's box, in sides of the landmarks'
STEPS = ("look", "landmarks", "track", "layers", "pictures", "tables")
KEPT = ("look", "landmarks", "track")  # in OUT/steps
# What `uajax extract` adds to a subject: made from it, and stale when it changes.
_FEATURES = ("train_", "val_", "mser_emotion_", "extractors", "points3d.ply", "aud_")


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the user may choose."""

  size: int | None = None  # side of the square pictures in pixels; None: the video's, at most 512
  limit_s: float | None = None  # only the first so many seconds
  av_offset: int | None = None  # frames by which the sound is late; None: estimated
  focal_px: float | None = None  # of the cut-out picture, if known
  parser: bool = True  # the 19-class parser where it is at hand; else mattes and landmarks
  looks: int = 6  # how often each frame's landmarks are read; more is steadier and slower
  jobs: int = 1  # processes; what is found does not depend on it


class Plan(NamedTuple):
  """What the first step found."""

  box: tuple[int, int, int]  # what is cut out: left, top, side, in the video's pixels
  size: int  # side of the pictures
  points: Float[np.ndarray, "f p 3"]  # in the pictures' pixels; NaN where no face is
  why: Int[np.ndarray, " f"]  # each frame is left out, spans.REASONS
  begins: list[int]  # first frames of shots
  others: Int[np.ndarray, " f"]  # further faces seen
  yaw_deg: Float[np.ndarray, " f"]

  @property
  def frames(self) -> int:
    return len(self.why)

  @property
  def used(self) -> Bool[np.ndarray, " f"]:
    return self.why == spans.USED

  @property
  def runs(self) -> list[tuple[int, int]]:
    """Used frames without a cut between them, [begin, end)."""
    return spans.runs(self.used, self.begins)


class Read(NamedTuple):
  """The landmarks step's findings; rows of frames left out hold their neighbours'."""

  points: Float[np.ndarray, "f p 3"]
  scores: Float[np.ndarray, "f 52"]


class Models(NamedTuple):
  """Files of the networks."""

  bundle: pathlib.Path
  person: pathlib.Path
  hair: pathlib.Path | None
  parser: pathlib.Path | None


def run(
  video: str | os.PathLike, out: str | os.PathLike, settings: Settings | None = None
) -> dict[str, Any]:
  """Makes the subject folder `out` of `video`; returns what report.json says.

  A folder that an earlier run made of it under the same settings is left as it is; under others
  it is replaced by one in which only what hangs on them was done anew.

  Raises:
    UserError: no video, no sound, no face, too short, out taken, disk full. `out` is then as it
      was; OUT.work stays only where a further run can use it.
  """
  settings = settings or Settings()
  video, out = pathlib.Path(video), pathlib.Path(out)
  _check_settings(settings)
  info = media.probe(video)
  if info.duration_s and info.duration_s < MIN_FRAMES / FPS:
    raise _too_short(video, info.duration_s)
  if not info.has_audio:
    raise UserError(f"{video} holds no sound: give a video in which the person is heard speaking")
  parser = _find_parser(settings)
  hair = None if parser else weights.find(HAIR_MATTE)
  models = Models(weights.find(BUNDLE), weights.find(PERSON), hair, parser)

  keys = _keys(video, settings, models)
  work = out.with_name(out.name + ".work")
  _take_up_swap(out, work, keys)
  before = _record(out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    if before is None:
      raise UserError(f"{out} already holds something: remove it or choose another place")
    if before["keys"] == keys:
      _say(f"{out} was made of this video with these settings: nothing to do")
      return json.loads((out / "report.json").read_text())
    _require_untouched(out, before, keys)
    redo = [name for name in STEPS if before["keys"].get(name) != keys[name]]
    _say(f"{out} is there already; to do again: {', '.join(redo)}")
  speech = media.read_audio(video, limit_s=(settings.limit_s or LONGEST_S) + 1)
  media.check_speech(speech, video)
  work = _open_work(work, out, keys, before)
  steps = _Steps(work, video, settings, models, keys)
  try:
    landmarker = landmarks.Landmarker(models.bundle, threads=1)
    with steps.timed("look"):
      plan = _look(steps, info, landmarker)
  except UserError:
    shutil.rmtree(work, ignore_errors=True)  # of no use to a further run
    raise
  with workers.pool(settings.jobs) as each:
    with steps.timed("landmarks"):
      read = _read(steps, plan, each)
    with steps.timed("track"):
      tracked = _track(steps, plan, read, landmarker.mesh, each)
    made = before is not None and before["keys"].get("pictures") == keys["pictures"]
    if made:
      with steps.timed("pictures"):
        _link_pictures(out, work)
    else:
      with steps.timed("layers"):
        _layers(steps, plan, read, each)
      with steps.timed("pictures"):
        _pictures(steps, plan, read, each)
  with steps.timed("tables"):
    _write(steps, out, info, plan, read, tracked, speech)
  found = json.loads((work / "subject" / "report.json").read_text())
  _swap(out, work)
  return found


def _say(line: str) -> None:
  sys.stderr.write(line + "\n")


def _check_settings(settings: Settings) -> None:
  if settings.size is not None and not 64 <= settings.size <= 2048:
    raise UserError(f"--size {settings.size} is out of reach: choose 64 to 2048 pixels")
  if settings.limit_s is not None and not settings.limit_s * FPS >= MIN_FRAMES:
    raise UserError(f"--limit-s {settings.limit_s} is too short: give at least 2 seconds")
  if settings.av_offset is not None and abs(settings.av_offset) > FPS:
    raise UserError(f"--av-offset {settings.av_offset} is out of reach: give -25 to 25 frames")
  if settings.focal_px is not None and not 0 < settings.focal_px < math.inf:
    raise UserError(f"--focal-px {settings.focal_px} is no focal length: give pixels, above 0")
  if settings.looks < 1:
    raise UserError(f"--looks {settings.looks} reads nothing: give at least 1")
  if not 1 <= settings.jobs <= 256:
    raise UserError(f"--jobs {settings.jobs} is out of reach: give 1 to 256 processes")


def _too_short(video: pathlib.Path, seconds: float) -> UserError:
  return UserError(
    f"{video} is {seconds:.1f} s long: give at least 2 s of one talking person, better a minute"
  )


def _find_parser(settings: Settings) -> pathlib.Path | None:
  """The parser's file, if it is wanted and can be had; the report says where it lacked."""
  if settings.parser:
    with contextlib.suppress(UserError):
      return weights.find(PARSER)
  return None


# Keys, and folders between runs


def _keys(video: pathlib.Path, settings: Settings, models: Models) -> dict[str, str]:
  """The key of each step: digests of all that its findings hang on."""
  mark = hashlib.sha256()
  with open(video, "rb") as file:
    size = os.fstat(file.fileno()).st_size
    for at in (0, max(size // 2, 0), max(size - 2**20, 0)):
      file.seek(at)
      mark.update(file.read(2**20))
  s, own = settings, {name: path and pretrained.digest(path) for name, path in
                      models._asdict().items()}  # fmt: skip

  def key(*parts) -> str:
    code = [pretrained.digest(pathlib.Path(p.__file__)) if hasattr(p, "__file__") else p
            for p in parts]  # fmt: skip
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()

  keys = {"look": key(mark.hexdigest(), size, s.limit_s, own["bundle"], media, landmarks, spans)}
  keys["landmarks"] = key(keys["look"], s.size, s.looks)
  keys["track"] = key(keys["landmarks"], s.focal_px, track, refine)
  keys["layers"] = key(keys["landmarks"], own["person"], own["hair"], own["parser"], masks, workers,
                       lips)  # fmt: skip
  keys["pictures"] = key(keys["layers"])
  keys["tables"] = key(
    keys["track"], keys["pictures"], s.av_offset, video.name, action_units, report
  )
  return keys


def _record(out: pathlib.Path) -> dict[str, Any] | None:
  """What an earlier run noted in the subject folder it made; None where none did."""
  try:
    found = json.loads((out / "steps" / "record.json").read_text())
    if isinstance(found["keys"], dict) and isinstance(found["files"], dict):
      return found
  except (OSError, ValueError, KeyError, TypeError):
    pass
  return None


def _require_untouched(out: pathlib.Path, record: dict[str, Any], keys: dict[str, str]) -> None:
  """Refuses to replace a subject folder into which somebody has put something.

  A consent note is taken along where the person is the same: in the same video.
  """
  known = {*folder.PICTURES, "steps", *record["files"]}
  if record["keys"].get("look") == keys["look"]:
    known.add(consent.FILE)
  for path in sorted(out.iterdir()):
    changed = path.is_file() and path.name in record["files"] and (
      pretrained.digest(path) != record["files"][path.name]
    )  # fmt: skip
    if changed or (path.name not in known and not path.name.startswith(_FEATURES)):
      what = "was changed since" if changed else "is not of its making"
      raise UserError(
        f"{out} would be made anew with other settings, but {path.name} in it {what}: move it away"
        " or choose another place"
      )


def _take_up_swap(out: pathlib.Path, work: pathlib.Path, keys: dict[str, str]) -> None:
  """Ends an exchange of folders that was interrupted."""
  if not out.exists() and (work / "replaced").is_dir():
    os.replace(work / "replaced", out)
  made, there = _record(work / "subject"), _record(out)
  free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
  if made is not None and made["keys"] == keys and (free or there is not None):
    if there is not None:
      _require_untouched(out, there, keys)
    _swap(out, work)


def _swap(out: pathlib.Path, work: pathlib.Path) -> None:
  """Puts the finished folder into its place, and the work folder away."""
  if out.exists() and any(out.iterdir()):
    consent.keep(out, work / "subject")
    shutil.rmtree(work / "replaced", ignore_errors=True)
    os.replace(out, work / "replaced")
  os.replace(work / "subject", out)
  shutil.rmtree(work, ignore_errors=True)


def _open_work(
  work: pathlib.Path, out: pathlib.Path, keys: dict[str, str], before: dict[str, Any] | None
) -> pathlib.Path:
  """The work folder with what of earlier runs can be used."""
  mark = work / "made_by_uajax_preprocess"
  try:
    if work.exists() and not mark.is_file() and any(work.iterdir()):
      raise UserError(f"{work} is in the way: remove it or choose another place for the subject")
    work.mkdir(parents=True, exist_ok=True)
    mark.touch()
    if (work / "subject").exists():  # it took the pictures, and is of no use
      shutil.rmtree(work / "subject")
      shutil.rmtree(work / "pictures", ignore_errors=True)
    shutil.rmtree(work / "replaced", ignore_errors=True)
    for name in STEPS:
      into = work / name
      key = into / "key"
      if into.exists() and not (key.is_file() and key.read_text() == keys[name]):
        shutil.rmtree(into)
      if not into.exists():
        into.mkdir()
        if name in KEPT and before is not None and before["keys"].get(name) == keys[name]:
          with contextlib.suppress(OSError):  # then it is made anew
            shutil.copyfile(out / "steps" / f"{name}.npz", into / "found.npz")
        with saving.aside(key) as partial:
          partial.write_text(keys[name])
  except OSError as error:
    raise UserError(
      f"{work} cannot be written ({error.strerror}): choose another place"
    ) from error
  return work


@dataclasses.dataclass
class _Steps:
  """What every step needs to know."""

  work: pathlib.Path
  video: pathlib.Path
  settings: Settings
  models: Models
  keys: dict[str, str]
  took: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds

  def found(self, name: str) -> dict[str, np.ndarray] | None:
    return workers.load(self.work / name / "found.npz")

  def keep(self, name: str, **arrays) -> dict[str, np.ndarray]:
    workers.save(self.work / name / "found.npz", **arrays)
    return {key: np.asarray(value) for key, value in arrays.items()}

  @contextlib.contextmanager
  def timed(self, name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    self.took[name] = round(time.monotonic() - start, 1)


# Steps


def _cut_out(
  video: pathlib.Path, plan: Plan, wanted: Bool[np.ndarray, " f"]
) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
  """Numbers and pictures of the wanted frames, cut out and scaled."""
  left, top, side = plan.box
  end = int(np.flatnonzero(wanted)[-1]) + 1 if wanted.any() else 0
  for f, image in enumerate(itertools.islice(media.read_frames(video), end)):
    if not wanted[f]:
      continue
    image = image[top : top + side, left : left + side]
    if side != plan.size:
      resample = Image.Resampling.LANCZOS if side > plan.size else Image.Resampling.BICUBIC
      scaled = Image.fromarray(np.ascontiguousarray(image)).resize(
        (plan.size, plan.size), resample
      )
      image = np.asarray(scaled)
    yield f, np.ascontiguousarray(image)


def _look(steps: _Steps, info: media.VideoInfo, landmarker: landmarks.Landmarker) -> Plan:
  """Follows the face through the clip, judges its frames, and chooses the square."""
  found = steps.found("look")
  if found is None:
    settings, video = steps.settings, steps.video
    limit = math.floor((settings.limit_s or LONGEST_S) * FPS)
    progress = Progress("look for the face", min(round(info.duration_s * FPS), limit))
    shots = spans.Shots()
    points, others, segments = [], [], []
    nowhere = np.full((landmarks.LANDMARKS, 3), np.nan, np.float32)
    frames = itertools.islice(media.read_frames(video), limit)
    watched = ((image, shots.watch(image)) for image in frames)
    for seen in landmarks.follow(watched, landmarker):
      points.append(nowhere if seen.points is None else seen.points.astype(np.float32))
      others.append(seen.others)
      segments.append(seen.segment)
      progress.advance()
    number = sum(p is not nowhere for p in points)
    progress.close(f"seen in {number} frames, {len(shots.begins) - 1} cuts")
    if len(points) < MIN_FRAMES:
      raise _too_short(video, len(points) / FPS)
    if number < MIN_FRAMES:
      seen_in = f"in only {number} of {len(points)} frames" if number else "nowhere"
      raise UserError(
        f"no face was found in {video}, or too seldom ({seen_in}): give a video of one person whose"
        " face is seen from the front for at least 2 s"
      )
    table = np.stack(points)
    if spans.is_still(table):
      raise UserError(
        f"the face in {video} never moves: give a video of a person speaking, not a still picture"
      )
    boxes = np.concatenate([table[:, :468, :2].min(1), table[:, :468, :2].max(1)], 1)
    there = np.isfinite(boxes).all(1)
    yaw = np.zeros(len(table))
    yaw[there] = landmarks.rough_yaw(table[there], landmarker.mesh)
    scale = np.tile([info.width, info.height], 2)
    why = spans.judge(shots.begins, shots.thumbs(), boxes / scale, np.array(segments), yaw)
    if (why == spans.USED).sum() < MIN_FRAMES:
      counts = [f"{int((why == k).sum())} {spans.REASONS[k]}" for k in np.unique(why) if k]
      raise UserError(
        f"only {int((why == spans.USED).sum())} of {len(why)} frames of {video} can be used (left"
        f" out: {', '.join(counts)}): give a video of one person seen from the front for at least"
        " 2 s"
      )
    box = choose_square(_shrink(boxes[why == spans.USED]), info.width, info.height)
    found = steps.keep(
      "look", points=table, why=why, begins=np.array(shots.begins), others=np.array(others),
      yaw=yaw, box=np.array(box),
    )  # fmt: skip
  box = found["box"].tolist()
  size = steps.settings.size or min(box[2], LARGEST_PX)
  size -= size % 2
  points = found["points"]
  points[:, :, :2] -= np.array(box[:2], np.float32)
  points *= np.float32(size / box[2])
  return Plan(
    (box[0], box[1], box[2]), size, points, found["why"], found["begins"].tolist(),
    found["others"], found["yaw"],
  )  # fmt: skip


def _shrink(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
  """Boxes around landmarks to those that the face detector draws."""
  middle = (boxes[:, :2] + boxes[:, 2:]) / 2
  half = FACE_SHARE * (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True) / 2
  return np.concatenate([middle - half, middle + half], 1)


def choose_square(
  boxes: Float[np.ndarray, "n 4"], width: int, height: int
) -> tuple[int, int, int]:
  """Left, top and side of the square to cut out around faces (boxes x0 y0 x1 y1 in pixels).

  A square picture is kept unless the face is tiny in it. Else the side is what leaves the face
  about 0.45 of it, with room for all its wandering, and stays inside the picture.
  """
  sides = (boxes[:, 2:] - boxes[:, :2]).max(1)
  face = float(np.median(sides))
  if width == height and face > 0.2 * width:
    return 0, 0, width
  centres = (boxes[:, :2] + boxes[:, 2:]) / 2
  low, high = np.percentile(centres, 2, axis=0), np.percentile(centres, 98, axis=0)
  side = int(min(2.2 * face + float((high - low).max()), width, height))
  middle = (low + high) / 2
  left = int(np.clip(round(float(middle[0]) - side / 2), 0, width - side))
  top = int(np.clip(round(float(middle[1]) - side / 2), 0, height - side))
  return left, top, side


def _each(steps: _Steps, plan: Plan, name: str, label: str, pieces, function, arguments, each):
  """Runs `function` over the pieces whose results lack, with the pictures of each."""
  into = steps.work / name
  todo = [piece for piece in pieces if workers.load(workers.result(into, piece)) is None]
  if not todo:
    return
  left = sum(piece.end - piece.begin for piece in todo)
  progress = Progress(label, int(plan.used.sum()), int(plan.used.sum()) - left)
  wanted = np.zeros(plan.frames, bool)
  for piece in todo:
    wanted[piece.first : piece.last] = True
  fed = workers.feed(_cut_out(steps.video, plan, wanted), todo)
  tasks = ((into, piece, images, *arguments(piece)) for piece, images in fed)
  for done in each(function, tasks):
    progress.advance(done)
  progress.close()


def _read(steps: _Steps, plan: Plan, each: workers.Run) -> Read:
  found = steps.found("landmarks")
  if found is None:
    rois = landmarks.smooth_rois(plan.points, plan.runs)
    pieces = workers.cut(plan.runs, plan.size)
    _each(
      steps, plan, "landmarks", "landmarks", pieces, workers.steady,
      lambda piece: ([rois[f] for f in range(piece.begin, piece.end)], steps.models.bundle,
                     steps.settings.looks),
      each,
    )  # fmt: skip
    into = steps.work / "landmarks"
    parts = [workers.load(workers.result(into, piece)) or {} for piece in pieces]
    found = steps.keep(
      "landmarks",
      points=np.concatenate([p["points"] for p in parts]),
      scores=np.concatenate([p["scores"] for p in parts]),
    )
    for piece in pieces:
      workers.result(into, piece).unlink(missing_ok=True)
  # Frames left out take the points of their neighbours: only poses and tables read them.
  near = np.flatnonzero(plan.used)
  middles = (near[1:] + near[:-1]) / 2
  nearest = np.searchsorted(middles, np.arange(plan.frames))
  return Read(found["points"][nearest], found["scores"][nearest])


def _track(
  steps: _Steps, plan: Plan, read: Read, mesh: landmarks.Mesh, each: workers.Run
) -> track.Track:
  found = steps.found("track")
  if found is None:
    into, cuts = steps.work / "track", np.isin(np.arange(plan.frames), plan.begins)
    begun = workers.load(into / "fitted.npz")
    if begun is None:
      focal_px = steps.settings.focal_px
      progress = Progress("track the head", track.steps(focal_px))
      fitted = track.fit(
        read.points, read.scores, plan.used, mesh, plan.size, plan.size,
        focal_px=focal_px, cuts=cuts, advance=progress.advance,
      )  # fmt: skip
      progress.close(f"focal length {fitted.focal_px:.0f} px")
      workers.save(into / "fitted.npz", **fitted._asdict())
    else:
      fitted = _to_track(begun)
    fitted = _refine(steps, plan, read, mesh, fitted, cuts, each)
    found = steps.keep("track", **fitted._asdict())
  return _to_track(found)


def _refine(steps: _Steps, plan: Plan, read: Read, mesh, fitted: track.Track, cuts, each):
  """The track with poses that the pictures confirm, if they show enough."""
  into = steps.work / "track"
  anchors = workers.load(into / "anchors.npz")
  if anchors is None:
    chosen, still = refine.choose_frames(fitted, plan.used), track.stillness(mesh)
    free = fitted.focal_spread > 0  # else the user gave the focal length
    calm = refine.choose_calm_frames(plan.used, read.scores) if free else []
    wanted = np.isin(np.arange(plan.frames), chosen + calm)
    pictures = {f: refine.to_grey(image) for f, image in _cut_out(steps.video, plan, wanted)}
    progress = Progress("learn the head's texture", (1 + free) * len(refine.LEVELS))
    focal = fitted.focal_px, fitted.focal_spread
    if free:
      focal = refine.find_focal(
        [pictures[f] for f in calm], fitted.viewmats[calm], fitted, still, progress.advance
      )
    fitted = refine.refocus(fitted, *focal)
    learnt = refine.learn(
      [pictures[f] for f in chosen], fitted.viewmats[chosen], fitted, still, progress.advance
    )
    count = len(learnt.points) if learnt else 0
    progress.close(f"{count} anchors, focal length {focal[0]:.0f} px")
    anchors = {**learnt._asdict(), "focal_spread": focal[1]} if learnt else {}
    workers.save(into / "anchors.npz", **anchors)
  if not anchors:
    return fitted
  fitted = refine.refocus(fitted, float(anchors["focal_px"]), float(anchors["focal_spread"]))
  pieces = workers.cut(plan.runs, plan.size)
  _each(
    steps, plan, "track", "follow the head", pieces, refine.follow_piece,
    lambda piece: (into / "anchors.npz", fitted.viewmats[piece.begin : piece.end]), each,
  )  # fmt: skip
  viewmats, information = fitted.viewmats.copy(), np.zeros((plan.frames, 6, 6))
  for piece in pieces:
    found = workers.load(workers.result(into, piece)) or {}
    viewmats[piece.begin : piece.end] = found["viewmats"]
    information[piece.begin : piece.end] = found["information"]
  return track.repose(
    fitted, viewmats, information, read.points, plan.used, plan.size, plan.size, cuts=cuts
  )


def _to_track(found: dict[str, np.ndarray]) -> track.Track:
  values: dict[str, Any] = {n: v.item() if v.ndim == 0 else v for n, v in found.items()}
  return track.Track(**values)


def _layers(steps: _Steps, plan: Plan, read: Read, each: workers.Run) -> None:
  """Classes of every piece, work/layers/<begin>.npz; lips.npz and plate.npy beside them."""
  into, models = steps.work / "layers", steps.models
  used = np.flatnonzero(plan.used)
  rois = landmarks.smooth_rois(read.points, plan.runs)
  number = min(masks.PLATE_SAMPLES, max(PLATE_BYTES // (plan.size**2 * 3), 8), len(used))
  samples = used[np.linspace(0, len(used) - 1, number).astype(int)].tolist()
  mouths = np.unique(used[np.linspace(0, len(used) - 1, lips.SAMPLES).astype(int)]).tolist()
  pieces = workers.cut(plan.runs, plan.size, around=1)
  _each(
    steps, plan, "layers", "layers", pieces, workers.layers,
    lambda piece: (
      read.points[piece.first : piece.last], [rois[f] for f in range(piece.first, piece.last)],
      (models.person, models.hair, models.parser), samples, mouths,
    ),
    each,
  )  # fmt: skip
  if not (into / "lips.npz").exists():
    look = workers.learn_lips(into, pieces)
    workers.save(into / "lips.npz", **(look._asdict() if look else {}))
  if (into / "plate.npy").exists():
    return
  background = masks.Plate(number)
  for piece in pieces:
    classes = (workers.load(workers.result(into, piece)) or {})["classes"]
    for f in samples:
      if piece.begin <= f < piece.end:
        image = np.load(workers.sample(into, f), allow_pickle=False)
        background.add(image, classes[f - piece.begin])
  plate, known = background.finish()
  with saving.aside(into / "plate.json") as partial:
    partial.write_text(json.dumps({"seen": known}))
  with saving.aside(into / "plate.npy") as partial:
    np.save(partial, plate)


def _pictures(steps: _Steps, plan: Plan, read: Read, each: workers.Run) -> None:
  """The picture folders, and what is known of all layers, in work/pictures."""
  into, layers = steps.work / "pictures", steps.work / "layers"
  for name in folder.PICTURES:
    (into / name).mkdir(exist_ok=True)
  pieces = workers.cut(plan.runs, plan.size, around=1)
  bare = [piece._replace(before=0, after=0) for piece in pieces]
  _each(
    steps, plan, "pictures", "pictures", bare, workers.pictures,
    lambda piece: (read.points[piece.begin : piece.end], workers.result(layers, piece),
                   layers / "plate.npy", layers / "lips.npz"),
    each,
  )  # fmt: skip
  seen = [workers.load(workers.result(into, piece)) or {} for piece in bare]
  found = [workers.load(workers.result(layers, piece)) or {} for piece in pieces]
  steps.keep(
    "pictures",
    plate=np.load(layers / "plate.npy", allow_pickle=False),
    seen=np.array(json.loads((layers / "plate.json").read_text())["seen"]),
    **{name: np.concatenate([p[name] for p in found])
       for name in ("overlaps", "steadiness", "jaws")},
    **{name: np.concatenate([p[name] for p in seen])
       for name in ("shares", "teeth", "reds", "gaps")},
  )  # fmt: skip


def _link_pictures(out: pathlib.Path, work: pathlib.Path) -> None:
  """Takes the picture folders of an earlier run over; it keeps its own names for the files."""

  def link(source: str, target: str) -> None:
    try:
      os.link(source, target)
    except OSError:  # a disk without hard links
      shutil.copyfile(source, target)

  into = work / "pictures"
  for name in folder.PICTURES:
    shutil.rmtree(into / name, ignore_errors=True)
    shutil.copytree(out / name, into / name, copy_function=link)
  shutil.copyfile(out / "steps" / "pictures.npz", into / "found.npz")


def _write(steps, out, info, plan: Plan, read: Read, tracked: track.Track, speech) -> None:
  """The whole folder, as work/subject."""
  from uajax.speech import features

  settings, used = steps.settings, plan.used
  layers = steps.found("pictures")
  length = plan.frames * SAMPLE_RATE_HZ // FPS
  speech = np.pad(speech[:length], (0, max(length - len(speech), 0)))
  head = track.unproject(read.points[:, :, :2], tracked, plan.size, plan.size)
  measures = action_units.measure(head)
  for lengths, name in ((measures.red, "reds"), (measures.gap, "gaps")):
    lengths[used] = layers[name] * measures.width[used] / 2  # exacter than the landmarks
  offset = action_units.find_offset(measures, speech, used)
  move = settings.av_offset
  if move is None:
    move = round(offset.frames) if offset.clear and abs(offset.frames) >= 0.75 else 0
  speech = action_units.shift_sound(speech, move)
  units = action_units.estimate(read.scores, measures, used)
  gaze = action_units.look(head, units["AU45"], used)
  expression = action_units.express(read.scores, head, measures, used)
  found = report.Found(
    video=steps.video.name, info=info, settings=dataclasses.asdict(settings), box=plan.box,
    size=plan.size, why=plan.why, begins=plan.begins, others=plan.others, yaw_deg=plan.yaw_deg,
    parser=PARSER if steps.models.parser is None else None, tracked=tracked, offset=offset,
    moved=move, measures=measures, units=units, gaze=gaze, shares=layers["shares"],
    overlaps=layers["overlaps"], steadiness=layers["steadiness"], jaws=layers["jaws"],
    teeth=layers["teeth"], seen=float(layers["seen"]),
    took=steps.took, speech=speech,
  )  # fmt: skip
  document = report.describe(found)
  with folder.writer(steps.work / "subject") as writer:
    kept = writer.path / "steps"
    kept.mkdir()
    for name in (*KEPT, "pictures"):
      shutil.copyfile(steps.work / name / "found.npz", kept / f"{name}.npz")
    sheet = report.draw_sheet(
      found, steps.work / "pictures", layers["plate"], read.points
    )
    report.write(writer.path, document, found, sheet)
    _write_gaze(writer.path / "gaze.csv", gaze)
    writer.adopt(
      steps.work / "pictures", np.flatnonzero(used).tolist(), plan.frames, (plan.size, plan.size)
    )
    writer.finish(
      speech=speech, viewmats=tracked.viewmats, focal_px=tracked.focal_px, action_units=units,
      plate=layers["plate"], windows={"mel": features.mel_windows(speech, plan.frames)},
      expression=expression,
    )  # fmt: skip
    files = {p.name: pretrained.digest(p) for p in sorted(writer.path.iterdir()) if p.is_file()}
    (kept / "record.json").write_text(json.dumps({"keys": steps.keys, "files": files}, indent=1))


def _write_gaze(file: pathlib.Path, gaze: Float[np.ndarray, "f 2"]) -> None:
  with open(file, "w", newline="") as lines:
    table = csv.writer(lines)
    table.writerow(["frame", "yaw_deg", "pitch_deg"])
    table.writerows([f, f"{yaw:.2f}", f"{pitch:.2f}"] for f, (yaw, pitch) in enumerate(gaze))
