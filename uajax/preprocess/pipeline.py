"""From a video of one talking person to a subject folder.

The steps, each of which reads the video anew (decoding is cheap, keeping frames is not):

  1 look       find the face, choose the square that is cut out, check picture and sound
  2 landmarks  478 points and 52 blendshape scores a frame
  3 track      camera, head pose, face
  4 layers     what each pixel is
  5 write      background plate, torso, tables, report.json, contact_sheet.png

What a step found lies in OUT.work until the folder is whole, under the fingerprint of the video
and the settings: an interrupted run takes up where it stood. OUT appears at the end, or not at
all. Frames without a face are left out by number; nothing is shifted (method.md Q60).

Axes: f frames, p landmarks, h w pixels.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw

from uajax import contact, media, saving
from uajax.data import folder
from uajax.errors import UserError
from uajax.preprocess import action_units, landmarks, masks, track, weights
from uajax.progress import Progress
from uajax.types import BACKGROUND, FACE, FPS, HAIR, MOUTH, NECK, SAMPLE_RATE_HZ, TORSO

VERSION = 1  # of what lies in OUT.work
MIN_FRAMES = 2 * FPS
LARGEST_PX = 512  # of the side, unless the user asks for another
BUNDLE = "face_landmarker.task"
PERSON = "selfie_segmentation.tflite"
HAIR_MATTE = "hair_segmentation.tflite"
PARSER = "bisenetv2_celebamaskhq_448x448_integer_quant.tflite"
SHEET_PX = 448  # height of the contact sheet's cells
NAMES = {FACE: "face", HAIR: "hair", MOUTH: "mouth", NECK: "neck", TORSO: "torso"}
_COLOURS = [[40, 40, 40], [255, 160, 120], [120, 60, 0], [255, 0, 80], [240, 240, 0], [0, 160, 255]]
PALETTE = np.array(_COLOURS, np.uint8)  # of the overlays


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the user may choose."""

  size: int | None = None  # side of the square pictures in pixels; None: the video's, at most 512
  limit_s: float | None = None  # only the first so many seconds
  av_offset: int | None = None  # frames by which the sound is late; None: estimated
  focal_px: float | None = None  # of the cut-out picture, if known
  parser: bool = True  # the 19-class parser where it is at hand; else mattes and landmarks
  looks: int = 6  # how often each frame's landmarks are read; more is steadier and slower


class Plan(NamedTuple):
  """What is cut out of the video."""

  frames: int
  box: tuple[int, int, int]  # left, top, side, in the video's pixels
  size: int  # side of the pictures


class Read(NamedTuple):
  """The landmarks step's findings; rows of missing frames hold their neighbours' points."""

  points: Float[np.ndarray, "f p 3"]
  scores: Float[np.ndarray, "f 52"]
  present: Bool[np.ndarray, " f"]
  others: int  # most further faces seen at once


def run(
  video: str | os.PathLike, out: str | os.PathLike, settings: Settings | None = None
) -> dict[str, Any]:
  """Makes the subject folder `out` of `video`; returns what report.json says.

  Raises:
    UserError: no video, no sound, no face, too short, out taken, disk full. Nothing is left in
      `out`; OUT.work stays only where a further run can use it.
  """
  settings = settings or Settings()
  video, out = pathlib.Path(video), pathlib.Path(out)
  _check_settings(settings)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f"{out} already holds something: remove it or choose another place")
  info = media.probe(video)
  if info.duration_s and info.duration_s < MIN_FRAMES / FPS:
    raise _too_short(video, info.duration_s)
  if not info.has_audio:
    raise UserError(f"{video} holds no sound: give a video in which the person is heard speaking")
  speech = media.read_audio(video)
  media.check_speech(speech, video)

  parser = _find_parser(settings)
  bundle, person = weights.find(BUNDLE), weights.find(PERSON)
  hair = None if parser else weights.find(HAIR_MATTE)
  work = out.with_name(out.name + ".work")
  _open_work(work, video, settings)
  began = time.monotonic()
  took: dict[str, float] = {}

  @contextlib.contextmanager
  def timed(name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    took[name] = round(time.monotonic() - start, 1)

  try:
    landmarker = landmarks.Landmarker(bundle)
    segmenter = masks.Segmenter(person, hair, parser)
    with timed("look"):
      plan = _look(work, video, settings, info, landmarker)
    with timed("landmarks"):
      read = _read(work, video, plan, settings, landmarker)
  except UserError:
    shutil.rmtree(work, ignore_errors=True)  # of no use to a further run
    raise
  with timed("track"):
    tracked = _track(work, plan, read, settings, landmarker.mesh)
  with timed("layers"):
    _layers(work, video, plan, read, segmenter, parser is not None)

  speech = np.pad(speech, (0, max(plan.frames * SAMPLE_RATE_HZ // FPS - len(speech), 0)))
  speech = speech[: plan.frames * SAMPLE_RATE_HZ // FPS]
  head = track.unproject(read.points[:, :, :2], tracked, plan.size, plan.size)
  measures = action_units.measure(head)
  offset = action_units.find_offset(measures, speech, read.present)
  move = settings.av_offset
  if move is None:
    move = round(offset.frames) if offset.clear and abs(offset.frames) >= 0.75 else 0
  speech = action_units.shift_sound(speech, move)
  units = action_units.estimate(read.scores, measures, read.present)
  expression = action_units.express(read.scores, head, measures, read.present)

  report: dict[str, Any] = {
    "video": {"name": video.name, "width": info.width, "height": info.height,
              "fps": round(info.fps, 3), "duration_s": round(info.duration_s, 3)},
    "settings": dataclasses.asdict(settings),
    "size_px": plan.size,
    "cut_out": dict(zip(("left", "top", "side"), plan.box, strict=True)),
    "frames": {"all": plan.frames, "used": int(read.present.sum()),
               "left_out": _spans(~read.present)},
    "other_faces": read.others,
    "masks_by": "19-class parser" if parser else "person and hair mattes, landmarks",
    "camera": _describe_track(tracked, read.present),
    "sound": {"late_by_frames": round(offset.frames, 2), "clear": offset.clear,
              "correlation": round(offset.correlation, 3), "moved_earlier_by_frames": move},
    "face": {
      "mouth_gap_mm": _quantiles(measures.gap[read.present] * 1e3),
      "blinks": _count_blinks(units["AU45"]),
      "action_units_95th": {n: round(float(np.percentile(u, 95)), 2) for n, u in units.items()},
    },
  }  # fmt: skip
  with timed("write"):
    _write(work, video, out, plan, read, tracked, measures, report, took, began, dict(
      speech=speech, action_units=units, expression=expression,
    ))  # fmt: skip
  shutil.rmtree(work, ignore_errors=True)
  return report


def _check_settings(settings: Settings) -> None:
  if settings.size is not None and not 64 <= settings.size <= 2048:
    raise UserError(f"--size {settings.size} is out of reach: choose 64 to 2048 pixels")
  if settings.limit_s is not None and settings.limit_s * FPS < MIN_FRAMES:
    raise UserError(f"--limit-s {settings.limit_s} is too short: give at least 2 seconds")
  if settings.av_offset is not None and abs(settings.av_offset) > FPS:
    raise UserError(f"--av-offset {settings.av_offset} is out of reach: give -25 to 25 frames")
  if settings.looks < 1:
    raise UserError(f"--looks {settings.looks} reads nothing: give at least 1")


def _too_short(video: pathlib.Path, seconds: float) -> UserError:
  return UserError(
    f"{video} is {seconds:.1f} s long: give at least 2 s of one talking person, better a minute"
  )


# The work folder


def _open_work(work: pathlib.Path, video: pathlib.Path, settings: Settings) -> None:
  """Empties the folder unless it belongs to this video under these settings."""
  mark = hashlib.sha256(json.dumps([VERSION, dataclasses.asdict(settings)]).encode())
  with open(video, "rb") as file:
    size = os.fstat(file.fileno()).st_size
    for at in (0, max(size // 2, 0), max(size - 2**20, 0)):
      file.seek(at)
      mark.update(file.read(2**20))
  mark.update(str(size).encode())
  key = work / "fingerprint"
  with contextlib.suppress(OSError):
    if key.read_text() == mark.hexdigest():
      return
  try:
    if work.exists():
      if not key.is_file() and any(work.iterdir()):
        raise UserError(f"{work} is in the way: remove it or choose another place for the subject")
      shutil.rmtree(work)
    work.mkdir(parents=True)
  except OSError as error:
    raise UserError(
      f"{work} cannot be written ({error.strerror}): choose another place"
    ) from error
  with saving.aside(key) as partial:
    partial.write_text(mark.hexdigest())


def _save(path: pathlib.Path, **arrays) -> None:
  with saving.aside(path) as partial:
    np.savez(partial, **arrays)


def _load(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  """What `_save` wrote; None where there is none, or it is damaged."""
  try:
    with np.load(path, allow_pickle=False) as data:
      return dict(data)
  except (OSError, ValueError, EOFError, KeyError):
    return None


# Steps


def _pictures(video: pathlib.Path, plan: Plan) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
  """The frames, cut out and scaled."""
  left, top, side = plan.box
  for image in itertools.islice(media.read_frames(video), plan.frames):
    image = image[top : top + side, left : left + side]
    if side != plan.size:
      resample = Image.Resampling.LANCZOS if side > plan.size else Image.Resampling.BICUBIC
      scaled = Image.fromarray(np.ascontiguousarray(image)).resize(
        (plan.size, plan.size), resample
      )
      image = np.asarray(scaled)
    yield np.ascontiguousarray(image)


def _look(work, video, settings, info, landmarker) -> Plan:
  """Counts the frames and chooses the square."""
  file = work / "plan.json"
  with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
    saved = json.loads(file.read_text())
    return Plan(saved["frames"], tuple(saved["box"]), saved["size"])
  limit = round(settings.limit_s * FPS) if settings.limit_s else None
  stated = round(info.duration_s * FPS)
  progress = Progress("look for the face", min(stated, limit) if limit else stated)
  count, boxes = 0, []
  for image in itertools.islice(media.read_frames(video), limit):
    if count % 10 == 0:
      found = landmarker.detect(image)
      boxes += [d.box for d in found[:1]]
    count += 1
    progress.advance()
  progress.close(f"{len(boxes)} of {-(-count // 10)} looks found one")
  if count < MIN_FRAMES:
    raise _too_short(video, count / FPS)
  if not boxes:
    raise UserError(
      f"no face was found in {video}: give a video of one person whose face is seen from the front"
    )
  box = choose_square(np.stack(boxes), info.width, info.height)
  size = settings.size or min(box[2], LARGEST_PX)
  plan = Plan(count, box, size - size % 2)
  with saving.aside(file) as partial:
    partial.write_text(json.dumps(plan._asdict()))
  return plan


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


def _read(work, video, plan: Plan, settings: Settings, landmarker) -> Read:
  data = _load(work / "landmarks.npz")
  if data is None:
    first = _load(work / "first.npz")
    if first is None:
      points, others = np.full((plan.frames, landmarks.LANDMARKS, 3), np.nan), 0
      progress = Progress("landmarks", plan.frames)
      for f, (found, more) in enumerate(landmarks.follow(_pictures(video, plan), landmarker)):
        if found is not None:
          points[f] = found
        others = max(others, more)
        progress.advance()
      progress.close()
      first = {"points": points, "others": np.array(others)}
      _save(work / "first.npz", **first)
    present = np.isfinite(first["points"]).all(axis=(1, 2)).reshape(plan.frames)
    if present.sum() < MIN_FRAMES:
      raise UserError(
        f"a face was found in only {int(present.sum())} of {plan.frames} frames of {video}: give a"
        " video of one person whose face is seen from the front for at least 2 s"
      )
    points, scores = first["points"].copy(), np.zeros((plan.frames, len(landmarks.BLENDSHAPES)))
    progress = Progress("landmarks, steadied", plan.frames)
    known = [points[f] if present[f] else None for f in range(plan.frames)]
    steady = landmarks.refine(_pictures(video, plan), landmarker, known, settings.looks)
    for f, found in enumerate(steady):
      if found is not None:
        points[f], scores[f] = found
      progress.advance()
    progress.close()
    data = {"points": points, "scores": scores, "present": present, "others": first["others"]}
    _save(work / "landmarks.npz", **data)
  # Missing frames take the points of their neighbours: only poses and tables read them.
  present = data["present"]
  near = np.flatnonzero(present)
  middles = (near[1:] + near[:-1]) / 2
  nearest = near[np.searchsorted(middles, np.arange(plan.frames))]
  return Read(
    data["points"][nearest], data["scores"][nearest], present, int(data["others"])
  )


def _track(work, plan: Plan, read: Read, settings: Settings, mesh) -> track.Track:
  data = _load(work / "track.npz")
  if data is None:
    progress = Progress("track the head", track.steps(settings.focal_px))
    found = track.fit(
      read.points, read.scores, read.present, mesh, plan.size, plan.size,
      focal_px=settings.focal_px, advance=progress.advance,
    )  # fmt: skip
    progress.close(
      f"focal length {found.focal_px:.0f} px, reprojection {found.reprojection_px:.2f} px, "
      f"jitter {found.jitter_px:.2f} px"
    )
    data = {name: np.asarray(value) for name, value in found._asdict().items()}
    _save(work / "track.npz", **data)
  values: dict[str, Any] = {n: v.item() if v.ndim == 0 else v for n, v in data.items()}
  return track.Track(**values)


def _find_parser(settings: Settings) -> pathlib.Path | None:
  """The parser's file, if it is wanted and can be had; the report says where it lacked."""
  if settings.parser:
    with contextlib.suppress(UserError):
      return weights.find(PARSER)
  return None


def _layers(work, video, plan: Plan, read: Read, segmenter: masks.Segmenter, parser: bool) -> None:
  """Writes work/classes_*/<i>.png."""
  into = work / f"classes_{'parser' if parser else 'mattes'}"
  into.mkdir(exist_ok=True)
  todo = [f for f in range(plan.frames) if read.present[f] and not (into / f"{f}.png").exists()]
  if not todo:
    return
  rois = landmarks.smooth_rois(
    [read.points[f] if read.present[f] else None for f in range(plan.frames)]
  )
  begin = todo[0]
  progress = Progress("layers", plan.frames, begin)

  def soft() -> Iterator[np.ndarray | None]:
    for f, image in enumerate(_pictures(video, plan)):
      roi = rois[f]
      # One frame earlier than needed: its neighbour is smoothed with it.
      yield None if roi is None or f < begin - 1 else segmenter(image, read.points[f], roi)

  for f, layers in enumerate(masks.smooth(soft())):
    if f < begin:
      continue
    if layers is not None:
      with saving.aside(into / f"{f}.png") as partial:
        Image.fromarray(masks.classify(layers, read.points[f])).save(partial, compress_level=1)
    progress.advance()
  progress.close("by the 19-class parser" if parser else "by mattes and landmarks")


def _classes(work: pathlib.Path, parser: bool, frame: int) -> UInt8[np.ndarray, "h w"]:
  file = work / f"classes_{'parser' if parser else 'mattes'}" / f"{frame}.png"
  with Image.open(file) as picture:
    return np.asarray(picture.convert("L"))


def _write(work, video, out, plan, read, tracked, measures, report, took, began, tables) -> None:
  from uajax.speech import features

  parser = report["masks_by"] == "19-class parser"
  used = np.flatnonzero(read.present)
  background = masks.Plate(len(used))
  progress = Progress("background", plan.frames)
  for f, image in enumerate(_pictures(video, plan)):
    if read.present[f] and background.wants():
      background.add(image, _classes(work, parser, f))
    elif read.present[f]:
      background.skip()
    progress.advance()
  plate, known = background.finish()
  progress.close(f"{100 * known:.0f} % seen")

  shown = _choose_shown(used, measures, tables["action_units"])
  sheet: dict[str, list[np.ndarray]] = {
    "picture, landmarks, still points": [], "layers": [], "person over plate": [],
    "torso over plate": [],
  }  # fmt: skip
  projected = track.project(
    tracked.shape[tracked.weights > 0.5], tracked.viewmats, tracked.focal_px, plan.size, plan.size
  )
  areas = np.zeros((plan.frames, len(PALETTE)))
  before, overlap, teeth_seen = None, [], 0
  with folder.writer(out) as writer:
    progress = Progress("write", plan.frames)
    for f, image in enumerate(_pictures(video, plan)):
      progress.advance()
      if not read.present[f]:
        writer.frame(
          f, truth=image, torso_rgba=np.zeros((*image.shape[:2], 4), np.uint8),
          parsing_classes=np.zeros(image.shape[:2], np.uint8), landmarks=np.zeros((68, 2)),
        )  # fmt: skip
        before = None
        continue
      classes = _classes(work, parser, f)
      truth = masks.put_behind(image, classes, plate)
      torso = masks.cut_torso(image, classes)
      teeth = masks.find_teeth(image, classes)
      teeth_seen += int(teeth.any())
      points = read.points[f]
      writer.frame(
        f, truth=truth, original=image, torso_rgba=torso, parsing_classes=classes, teeth=teeth,
        landmarks=landmarks.to_ibug(points)[:, :2],
      )  # fmt: skip
      areas[f] = np.bincount(classes.ravel(), minlength=len(PALETTE)) / classes.size
      head = np.isin(classes, (FACE, HAIR, MOUTH))
      if before is not None:
        overlap.append((head & before).sum() / max((head | before).sum(), 1))
      before = head
      if f in shown:
        for column, picture in zip(
          sheet.values(),
          (
            _draw_points(image, points, projected[f]),
            _draw_classes(image, classes, teeth),
            _scale(truth),
            _scale(folder.over(torso, plate)),
          ),
          strict=True,
        ):
          column.append(picture)
    progress.close()
    windows = features.mel_windows(tables["speech"], plan.frames)
    writer.finish(
      viewmats=tracked.viewmats, focal_px=tracked.focal_px, plate=plate, windows={"mel": windows},
      **tables,
    )  # fmt: skip
    _leave_out(writer.path, ~read.present)
    mean = areas[read.present].mean(0)
    report["layers"] = {
      "share_of_picture": {name: round(float(mean[c]), 4) for c, name in NAMES.items()},
      "head_overlap_with_next_frame": round(float(np.mean(overlap)), 4) if overlap else None,
      "background_seen": round(known, 3),
      "frames_with_teeth": teeth_seen,
    }
    report["warnings"] = _warn(report, read, tables["action_units"], measures)
    report["seconds"] = {**took, "all": round(time.monotonic() - began, 1)}
    (writer.path / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    labels = [f"frame {f}: {why}" for f, why in sorted(shown.items())]
    contact.write_sheet(writer.path / "contact_sheet.png", sheet, labels, height_px=SHEET_PX)


def _leave_out(path: pathlib.Path, missing: Bool[np.ndarray, " f"]) -> None:
  """Takes frames without a face out of a folder; all others keep their numbers."""
  if not missing.any():
    return
  for split in folder.SPLITS:
    file = path / f"transforms_{split}.json"
    document = json.loads(file.read_text())
    document["frames"] = [e for e in document["frames"] if not missing[e["img_id"]]]
    if not document["frames"]:
      raise UserError(
        f"the {'first' if split == 'train' else 'last'} part of the video shows no face, so there"
        " is nothing to train or to test on: cut the video to where the person is seen"
      )
    file.write_text(json.dumps(document))
  for f in np.flatnonzero(missing):
    for name in ("ori_imgs/{}.jpg", "ori_imgs/{}.lms", "gt_imgs/{}.jpg", "torso_imgs/{}.png",
                 "parsing/{}.png", "teeth_mask/{}.npy"):  # fmt: skip
      (path / name.format(f)).unlink(missing_ok=True)


# What the user is told


def _describe_track(tracked: track.Track, present) -> dict[str, Any]:
  turns = tracked.viewmats[present][:, :3, :3] @ np.diag([1.0, -1.0, -1.0])
  angles = {
    "yaw_deg": np.degrees(np.arcsin(np.clip(turns[:, 0, 2], -1, 1))),
    "pitch_deg": np.degrees(np.arcsin(np.clip(turns[:, 1, 2], -1, 1))),
    "roll_deg": np.degrees(np.arctan2(turns[:, 1, 0], turns[:, 0, 0])),
  }
  return {
    "focal_px": round(tracked.focal_px, 1),
    "distance_m": round(float(tracked.viewmats[present][:, 2, 3].mean()), 3),
    "reprojection_px": round(tracked.reprojection_px, 3),
    "held_out_px": round(tracked.held_out_px, 3),
    "jitter_px": round(tracked.jitter_px, 3),
    "jitter_untied_px": round(tracked.raw_jitter_px, 3),
    **{name: _quantiles(values) for name, values in angles.items()},
  }


def _warn(report, read: Read, units, measures) -> list[str]:
  """What is weak, and how it will show in the avatar."""
  out = []
  size, frames = report["size_px"], report["frames"]
  if frames["used"] < 40 * FPS:
    out.append(
      f"only {frames['used'] / FPS:.0f} s of speech: sounds that are rare in it will be shaped"
      " roughly; a minute or more is better"
    )
  if frames["left_out"]:
    out.append(f"frames {frames['left_out']} show no face and are left out")
  if read.others:
    out.append(
      f"{read.others} further face(s) were seen: the largest was followed; check the contact sheet"
    )
  wide = int((measures.gap[read.present] > 0.012).sum())
  if wide < 10:
    out.append(f"the mouth opens wide in only {wide} frames: open vowels will look too closed")
  if not report["face"]["blinks"]:
    out.append("no blink was seen: the avatar's eyes will not shut")
  camera = report["camera"]
  if camera["jitter_px"] > 0.3 * size / 450:
    out.append(f"the tracked head shakes by {camera['jitter_px']} px: edges will look soft")
  if camera["reprojection_px"] > 1.5 * size / 450:
    out.append(
      f"the tracked face misses the landmarks by {camera['reprojection_px']} px: its features will"
      " look blurred"
    )
  yaw = camera["yaw_deg"]
  if max(abs(yaw["min"]), abs(yaw["max"])) > 40:
    out.append("the head turns beyond 40 degrees: profiles are tracked badly and may smear")
  layers = report["layers"]
  if layers["background_seen"] < 0.3:
    out.append("most of the background is never seen: what the head uncovers will look painted")
  overlap = layers["head_overlap_with_next_frame"]
  if overlap is not None and overlap < 0.95:
    out.append("the head's outline changes much from frame to frame: hair and edges may flicker")
  sound = report["sound"]
  if not sound["clear"] and report["settings"]["av_offset"] is None:
    out.append(
      "whether the sound is late could not be told from this clip; it was left as it is: if lips"
      " and sound are apart, set --av-offset"
    )
  elif sound["moved_earlier_by_frames"] and report["settings"]["av_offset"] is None:
    out.append(
      f"the sound was {sound['moved_earlier_by_frames']} frames late and was moved; --av-offset 0"
      " keeps it"
    )
  if report["masks_by"] != "19-class parser":
    why = "is not at hand" if report["settings"]["parser"] else "was not wanted"
    out.append(
      f"masks come from mattes and landmarks ({PARSER} {why}): neck and hair edges are rougher"
    )
  return out


def _choose_shown(used, measures, units) -> dict[int, str]:
  """Frames for the contact sheet and why they are there."""
  shown = {int(used[i]): "" for i in np.linspace(0, len(used) - 1, 6).astype(int)}
  shown[int(used[np.argmax(measures.gap[used])])] = "widest mouth"
  shown[int(used[np.argmax(units["AU45"][used])])] = "eyes most closed"
  return {
    f: f"{why}{', ' if why else ''}gap {1e3 * measures.gap[f]:.0f} mm, AU45 {units['AU45'][f]:.1f}"
    for f, why in shown.items()
  }


def _draw_points(image, points, still) -> np.ndarray:
  """Landmarks green, the tracked face's still points red, iBUG's 68 yellow."""
  scale = SHEET_PX / image.shape[0]
  picture = Image.fromarray(image).resize((SHEET_PX, SHEET_PX))
  pen = ImageDraw.Draw(picture)
  for some, colour, size in (
    (points, (0, 255, 0), 0.5), (landmarks.to_ibug(points), (255, 255, 0), 1.5),
    (still, (255, 0, 0), 0.5),
  ):  # fmt: skip
    for x, y in some[:, :2] * scale:
      pen.ellipse((x - size, y - size, x + size, y + size), fill=colour)
  return np.asarray(picture)


def _draw_classes(image, classes, teeth) -> np.ndarray:
  mixed = image // 2 + PALETTE[classes] // 2
  mixed[classes == BACKGROUND] = image[classes == BACKGROUND] // 3
  mixed[teeth] = 255
  return _scale(mixed)


def _scale(image) -> np.ndarray:
  return np.asarray(Image.fromarray(image).resize((SHEET_PX, SHEET_PX)))


def _quantiles(values) -> dict[str, float]:
  found = np.percentile(values, [0, 50, 100])
  return {n: round(float(q), 2) for n, q in zip(("min", "median", "max"), found, strict=True)}


def _count_blinks(au45) -> int:
  shut = au45 > 1.5
  return int(shut[0]) + int((shut[1:] & ~shut[:-1]).sum())


def _spans(mask: Bool[np.ndarray, " f"]) -> list[list[int]]:
  """Runs of true values as [first, last]."""
  edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
  return [[int(a), int(b) - 1] for a, b in zip(edges[::2], edges[1::2], strict=True)]
