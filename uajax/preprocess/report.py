"""What the user is told of a clip: report.json, report.html and contact_sheet.png.

The page needs nothing but itself: no network, no scripts; the contact sheet and the plots lie in
it, and all text from outside is escaped.

Axes: f frames of the clip, u of these the used ones, p landmarks, h w pixels.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw

from uajax import contact, media, page
from uajax.data import folder
from uajax.preprocess import landmarks, masks, spans
from uajax.preprocess.action_units import Measures, Offset
from uajax.preprocess.track import Track, project
from uajax.types import BACKGROUND, FACE, FPS, HAIR, MOUTH, NECK, SAMPLE_RATE_HZ, TORSO

SHEET_PX = 448  # height of the contact sheet's cells
NAMES = {FACE: "face", HAIR: "hair", MOUTH: "mouth", NECK: "neck", TORSO: "torso"}
WIDE_GAP_M, SHUT_GAP_M = 0.012, 0.002  # of the inner lips: an open vowel; lips that meet
SHUT_EYES = 1.5  # AU45 above it: a blink
PROFILE_DEG = 40.0  # turned farther, tracking is weak
# Of layers: on real clips these lie at 0, at 0.94 to 0.998, and at 0.85 to 0.93.
MOST_EMPTY, LEAST_STEADY, LEAST_AT_JAW = 0.02, 0.9, 0.7
# How a layer that flickers will show.
_RESTLESS = {
  "face": "the face's edge will be soft and restless",
  "hair": "hair will look smeared at its outline",
  "neck": "the throat and the edge under the chin will be soft and restless",
  "torso": "shoulders and collar will be soft and restless",
}
_COLOURS = [[40, 40, 40], [255, 160, 120], [120, 60, 0], [255, 0, 80], [240, 240, 0], [0, 160, 255]]
PALETTE = np.array(_COLOURS, np.uint8)  # of the overlays


class Found(NamedTuple):
  """All that was found out about a clip."""

  video: str  # its name
  info: media.VideoInfo
  settings: dict[str, Any]
  box: tuple[int, int, int]  # cut out: left, top, side, in the video's pixels
  size: int  # side of the pictures
  why: Int[np.ndarray, " f"]  # frames are left out, spans.REASONS
  begins: Sequence[int]  # first frames of shots
  others: Int[np.ndarray, " f"]  # further faces seen
  yaw_deg: Float[np.ndarray, " f"]  # roughly, before tracking
  parser: str | None  # name of the parser that was not used
  tracked: Track
  offset: Offset
  moved: int  # frames by which the sound was moved earlier
  measures: Measures
  units: Mapping[str, Float[np.ndarray, " f"]]
  gaze: Float[np.ndarray, "f 2"]  # yaw and pitch in the head's axes, degrees
  speech: Float[np.ndarray, " s"]
  shares: Float[np.ndarray, "u c"]  # of the picture, by class
  overlaps: Float[np.ndarray, " u"]  # of the head with that of the frame before; NaN at cuts
  steadiness: Float[np.ndarray, "u c"]  # masks.find_steadiness, a column of masks.LAYERS each
  jaws: Float[np.ndarray, " u"]  # masks.find_jaw_agreement; both NaN where it was not looked
  teeth: Bool[np.ndarray, " u"]  # whether any are seen
  seen: float  # share of the background that was seen
  took: dict[str, float]  # seconds by step

  @property
  def used(self) -> Bool[np.ndarray, " f"]:
    return self.why == spans.USED


def describe(found: Found) -> dict[str, Any]:
  """What report.json says."""
  used, offset = found.used, found.offset
  left_out = spans.left_out(found.why)
  overlaps = found.overlaps[np.isfinite(found.overlaps)]
  turned = np.abs(found.yaw_deg) > PROFILE_DEG
  document: dict[str, Any] = {
    "video": {"name": found.video, "width": found.info.width, "height": found.info.height,
              "fps": round(found.info.fps, 3), "duration_s": round(found.info.duration_s, 3)},
    "settings": found.settings,
    "size_px": found.size,
    "cut_out": dict(zip(("left", "top", "side"), found.box, strict=True)),
    "frames": {"all": len(used), "used": int(used.sum()),
               "left_out": [[a, b - 1] for a, b in spans.runs(~used)]},
    "spans": {
      "left_out": [s._asdict() | {"from_s": s.first / FPS, "to_s": (s.last + 1) / FPS}
                   for s in left_out],
      "cuts": [int(b) for b in found.begins[1:]],
      "turned_beyond_40_deg": [[a, b - 1] for a, b in spans.runs(used & turned)],
      "several_faces": [int(f) for f in np.flatnonzero(found.others)],
    },
    "other_faces": int(found.others.max()),
    "masks_by": "person and hair mattes, landmarks" if found.parser else "19-class parser",
    "camera": _describe_track(found.tracked, used),
    "sound": {"late_by_frames": round(offset.frames, 2), "clear": offset.clear,
              "correlation": round(offset.correlation, 3), "moved_earlier_by_frames": found.moved,
              "loud_over_quiet_db": round(_loudness(found.speech), 1)},
    "face": {
      "width_in_video_px": round(_face_px(found)),
      "mouth_gap_mm": _quantiles(found.measures.gap[used] * 1e3),
      "frames_open_wide": int((found.measures.gap[used] > WIDE_GAP_M).sum()),
      "frames_lips_shut": int((found.measures.gap[used] < SHUT_GAP_M).sum()),
      "blinks": count_blinks(found.units["AU45"][used]),
      "gaze_yaw_deg": _quantiles(found.gaze[used, 0]),
      "gaze_pitch_deg": _quantiles(found.gaze[used, 1]),
      "action_units_95th": {n: round(float(np.percentile(u[used], 95)), 2)
                            for n, u in found.units.items()},
    },
    "layers": {
      "share_of_picture": {n: round(float(found.shares.mean(0)[c]), 4) for c, n in NAMES.items()},
      "head_overlap_with_next_frame": round(float(overlaps.mean()), 4) if len(overlaps) else None,
      "frames_without": {n: int((found.shares[:, c] == 0).sum()) for c, n in NAMES.items()},
      "steadiness": {NAMES[c]: _mean(row)
                     for c, row in zip(masks.LAYERS, found.steadiness.T, strict=True)},
      "face_ends_at_jaw": _mean(found.jaws),
      "background_seen": round(found.seen, 3),
      "frames_with_teeth": int(found.teeth.sum()),
    },
  }  # fmt: skip
  document["warnings"] = _warn(document, found)
  document["seconds"] = {**found.took, "all": round(sum(found.took.values()), 1)}
  return document


def write(path: pathlib.Path, document: dict[str, Any], found: Found, sheet: np.ndarray) -> None:
  """Writes the three files into a folder."""
  (path / "report.json").write_text(json.dumps(document, indent=2) + "\n")
  (path / "report.html").write_text(draw_page(document, found, sheet))
  contact.write_png(path / "contact_sheet.png", sheet)


# What is weak


def _warn(document: dict[str, Any], found: Found) -> list[str]:
  """What is weak, and how it will show in the avatar."""
  out = []
  size, frames, face = document["size_px"], document["frames"], document["face"]
  used_s = frames["used"] / FPS
  if used_s < 40:
    out.append(
      f"only {used_s:.0f} s of speech: sounds that are rare in it will be shaped"
      " roughly; a minute or more is better"
    )
  if found.settings["limit_s"] is None and found.info.duration_s > frames["all"] / FPS + 1:
    out.append(
      f"only the first {frames['all'] / FPS / 60:.0f} minutes were read (of"
      f" {found.info.duration_s / 60:.0f}): more hardly helps; --limit-s sets another length"
    )
  out += _warn_of_spans(document)
  if face["width_in_video_px"] < 0.3 * size:
    out.append(
      f"the face is {face['width_in_video_px']} px wide in the video, and was enlarged to {size} px"
      " pictures: skin, lashes and teeth will look soft"
    )
  if face["frames_open_wide"] < 10:
    never = "hardly ever" if face["frames_open_wide"] else "never"
    out.append(
      f"the mouth {never} opens wide: {face['frames_open_wide']} frames above"
      f" {1e3 * WIDE_GAP_M:.0f} mm, {face['mouth_gap_mm']['max']} mm at most: open vowels will look"
      " too closed"
    )
  if face["frames_lips_shut"] < 10:
    out.append(
      f"the lips hardly ever meet: {face['frames_lips_shut']} frames below"
      f" {1e3 * SHUT_GAP_M:.0f} mm: p, b and m will not close"
    )
  teeth = document["layers"]["frames_with_teeth"]
  if teeth < 25:
    out.append(f"teeth are seen in {teeth} frames only: they will be blurred or missing")
  if not face["blinks"]:
    out.append("the eyes never close: blinks cannot be learnt, the avatar's eyes will not shut")
  units = face["action_units_95th"]
  if max(units[name] for name in ("AU01", "AU02", "AU04", "AU06", "AU12", "AU15")) < 0.75:
    out.append(
      "brows and cheeks hardly move: the avatar's upper face will be still, and no emotion can be"
      " learnt from this clip"
    )
  camera = document["camera"]
  if camera["jitter_px"] > 0.3 * size / 450:
    out.append(f"the tracked head shakes by {camera['jitter_px']} px: edges will look soft")
  if camera["reprojection_px"] > 1.5 * size / 450:
    out.append(
      f"the tracked face misses the landmarks by {camera['reprojection_px']} px: its features will"
      " look blurred"
    )
  yaw = camera["yaw_deg"]
  if max(abs(yaw["min"]), abs(yaw["max"])) > PROFILE_DEG:
    out.append("the head turns beyond 40 degrees: profiles are tracked badly and may smear")
  elif yaw["max"] - yaw["min"] < 4:
    out.append(
      f"the head turns by {yaw['max'] - yaw['min']:.0f} degrees in all: seen from the side, the"
      " avatar will be flat"
    )
  layers = document["layers"]
  if layers["background_seen"] < 0.3:
    out.append("most of the background is never seen: what the head uncovers will look painted")
  overlap = layers["head_overlap_with_next_frame"]
  if overlap is not None and overlap < 0.95:
    out.append("the head's outline changes much from frame to frame: hair and edges may flicker")
  return out + _warn_of_sound(document) + _warn_of_masks(document, found)


def _warn_of_spans(document: dict[str, Any]) -> list[str]:
  out = []
  by_reason: dict[str, list[dict]] = {}
  for span in document["spans"]["left_out"]:
    by_reason.setdefault(span["reason"], []).append(span)
  for reason, some in by_reason.items():
    count = sum(s["last"] - s["first"] + 1 for s in some)
    where = ", ".join(f"{s['from_s']:.1f}-{s['to_s']:.1f} s" for s in some[:4])
    more = f" and {len(some) - 4} more spans" if len(some) > 4 else ""
    out.append(
      f"{count} frames are left out, {reason}: {where}{more}: what is said there is not learnt"
    )
  cuts = len(document["spans"]["cuts"])
  if cuts:
    out.append(
      f"the video is cut {cuts} times: one scene was kept; hair, clothes or light that changed at a"
      " cut will blur into each other"
    )
  if document["other_faces"]:
    out.append(
      f"{document['other_faces']} further face(s) were seen: the one that is in the picture longest"
      " was followed; check the contact sheet"
    )
  return out


def _warn_of_sound(document: dict[str, Any]) -> list[str]:
  out = []
  sound, told = document["sound"], document["settings"]["av_offset"] is not None
  if not sound["clear"] and not told:
    out.append(
      "whether the sound is late could not be told from this clip; it was left as it is: if lips"
      " and sound are apart, set --av-offset"
    )
  elif sound["moved_earlier_by_frames"] and not told:
    out.append(
      f"the sound was {sound['moved_earlier_by_frames']} frames late and was moved; --av-offset 0"
      " keeps it"
    )
  if sound["loud_over_quiet_db"] < 12:
    out.append("noise or music lies under the voice: the lips will stir with it")
  return out


def _warn_of_masks(document: dict[str, Any], found: Found) -> list[str]:
  out = warn_of_layers(document["layers"], document["frames"]["used"])
  if found.parser is not None:
    why = "is not at hand" if document["settings"]["parser"] else "was not wanted"
    out.append(
      f"masks come from mattes and landmarks ({found.parser} {why}): neck and hair edges are"
      " rougher"
    )
  return out


def warn_of_layers(layers: Mapping[str, Any], used: int) -> list[str]:
  """What is weak in the layers of `used` frames; `layers` as `describe` has them."""
  out = []
  for name, steadiness in layers["steadiness"].items():
    without = layers["frames_without"][name]
    if without == used:
      out.append(f"no {name} was found: if there is any in the video, the avatar will be without")
    elif without > MOST_EMPTY * used:
      out.append(
        f"the {name} was not found in {without} of {used} frames: it will be pale and ragged where"
        " it came and went; check the contact sheet"
      )
    if steadiness is not None and steadiness < LEAST_STEADY:
      out.append(
        f"the {name}'s mask flickers ({100 * (1 - steadiness):.0f} % of it changes from frame to"
        f" frame, beyond what the head moves; 1 to 6 % is usual): {_RESTLESS[name]}"
      )
  if layers["frames_without"]["mouth"] == used:
    out.append("the inner mouth was never found: the avatar's will be closed")
  at_jaw = layers["face_ends_at_jaw"]
  if at_jaw is not None and at_jaw < LEAST_AT_JAW:
    out.append(
      f"the face's mask leaves the jaw in {100 * (1 - at_jaw):.0f} % of its length: chin and cheeks"
      " will smear into what is behind them when the mouth opens or the head turns"
    )
  return out


def _describe_track(tracked: Track, used) -> dict[str, Any]:
  return {
    "focal_px": round(tracked.focal_px, 1),
    "focal_known_within": round(tracked.focal_spread, 3),
    "distance_m": round(float(tracked.viewmats[used][:, 2, 3].mean()), 3),
    "reprojection_px": round(tracked.reprojection_px, 3),
    "held_out_px": round(tracked.held_out_px, 3),
    "jitter_px": round(tracked.jitter_px, 3),
    "jitter_untied_px": round(tracked.raw_jitter_px, 3),
    **{name: _quantiles(values[used]) for name, values in _angles(tracked).items()},
  }


def _angles(tracked: Track) -> dict[str, Float[np.ndarray, " f"]]:
  turns = tracked.viewmats[:, :3, :3] @ np.diag([1.0, -1.0, -1.0])
  return {
    "yaw_deg": np.degrees(np.arcsin(np.clip(turns[:, 0, 2], -1, 1))),
    "pitch_deg": np.degrees(np.arcsin(np.clip(turns[:, 1, 2], -1, 1))),
    "roll_deg": np.degrees(np.arctan2(turns[:, 1, 0], turns[:, 0, 0])),
  }


def _face_px(found: Found) -> float:
  """Width of the face in the video, from the tracked shape and its distance."""
  width_m = float(np.ptp(found.tracked.shape[:468, 0]))
  distance_m = float(found.tracked.viewmats[found.used][:, 2, 3].mean())
  return found.tracked.focal_px * width_m / distance_m * found.box[2] / found.size


def _loudness(speech: Float[np.ndarray, " s"]) -> float:
  """How much louder loud moments are than quiet ones, decibels."""
  hop = SAMPLE_RATE_HZ // FPS
  rows = speech[: len(speech) // hop * hop].reshape(-1, hop)
  levels = 20 * np.log10(np.sqrt((rows**2).mean(1)) + 1e-5)
  return float(np.percentile(levels, 95) - np.percentile(levels, 10))


def _quantiles(values) -> dict[str, float]:
  found = np.percentile(values, [0, 50, 100])
  return {n: round(float(q), 2) for n, q in zip(("min", "median", "max"), found, strict=True)}


def _mean(values: Float[np.ndarray, " u"]) -> float | None:
  """Of the values that are known; None where none is."""
  known = values[np.isfinite(values)]
  return round(float(known.mean()), 4) if len(known) else None


def count_blinks(au45: Float[np.ndarray, " u"]) -> int:
  """How often the eyes shut."""
  shut = au45 > SHUT_EYES
  return int(shut[0]) + int((shut[1:] & ~shut[:-1]).sum())


# The contact sheet


def draw_sheet(
  found: Found, pictures: pathlib.Path, plate: UInt8[np.ndarray, "h w 3"], points
) -> UInt8[np.ndarray, "h w 3"]:
  """Eight frames of the clip with what was found on them; reads the picture folders."""
  shown = _choose_shown(found)
  sheet: dict[str, list[np.ndarray]] = {
    "picture, landmarks, still points": [], "layers": [], "person over plate": [],
    "torso over plate": [],
  }  # fmt: skip
  tracked = found.tracked
  still = project(
    tracked.shape[tracked.weights > 0.5], tracked.viewmats[sorted(shown)], tracked.focal_px,
    found.size, found.size,
  )  # fmt: skip
  for f, fixed in zip(sorted(shown), still, strict=True):
    image = _read(pictures / "ori_imgs" / f"{f}.jpg", "RGB")
    colours = _read(pictures / "parsing" / f"{f}.png", "RGB")
    teeth = np.load(pictures / "teeth_mask" / f"{f}.npy", allow_pickle=False)
    classes = np.zeros(teeth.shape, np.uint8)
    for label, colour in folder.COLOURS.items():
      classes[(colours == colour).all(-1)] = label
    for column, picture in zip(
      sheet.values(),
      (
        _draw_points(image, points[f], fixed),
        _draw_classes(image, classes, teeth),
        _scale(_read(pictures / "gt_imgs" / f"{f}.jpg", "RGB")),
        _scale(folder.over(_read(pictures / "torso_imgs" / f"{f}.png", "RGBA"), plate)),
      ),
      strict=True,
    ):
      column.append(picture)
  labels = [f"frame {f}: {why}" for f, why in sorted(shown.items())]
  return contact.draw_sheet(sheet, labels, height_px=SHEET_PX)


def _choose_shown(found: Found) -> dict[int, str]:
  """Frames for the contact sheet and why they are there."""
  used, gap, closed = np.flatnonzero(found.used), found.measures.gap, found.units["AU45"]
  shown = {int(used[i]): "" for i in np.linspace(0, len(used) - 1, 6).astype(int)}
  shown[int(used[np.argmax(gap[used])])] = "widest mouth"
  shown[int(used[np.argmax(closed[used])])] = "eyes most closed"
  turned = np.abs(_angles(found.tracked)["yaw_deg"])
  shown[int(used[np.argmax(turned[used])])] = "turned farthest"
  return {
    f: f"{why}{', ' if why else ''}gap {1e3 * gap[f]:.0f} mm, AU45 {closed[f]:.1f}"
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


def _read(file: pathlib.Path, mode: str) -> np.ndarray:
  with Image.open(file) as picture:
    return np.asarray(picture.convert(mode))


# The page

def draw_page(document: dict[str, Any], found: Found, sheet: UInt8[np.ndarray, "h w 3"]) -> str:
  """report.html: one file that says what was found, what is weak, and how it will show."""
  video, frames, camera = document["video"], document["frames"], document["camera"]
  face, sound, layers = document["face"], document["sound"], document["layers"]
  facts = {
    "video": f"{video['name']}, {video['width']} x {video['height']}, {video['fps']} fps,"
             f" {video['duration_s']:.1f} s",
    "used": f"{frames['used']} of {frames['all']} frames ({frames['used'] / FPS:.1f} s at 25 fps),"
            f" {document['size_px']} px",
    "cuts": ", ".join(f"{b / FPS:.2f} s" for b in document["spans"]["cuts"][:20]) or "none",
    "camera": f"focal length {camera['focal_px']} px, face {camera['distance_m']} m away",
    "tracking": f"landmarks missed by {camera['reprojection_px']} px (held out:"
                f" {camera['held_out_px']}), head shakes by {camera['jitter_px']} px",
    "mouth": f"{face['mouth_gap_mm']['min']} to {face['mouth_gap_mm']['max']} mm open;"
             f" {face['frames_open_wide']} frames wide, {face['frames_lips_shut']} shut;"
             f" teeth in {layers['frames_with_teeth']} frames",
    "eyes": f"{face['blinks']} blinks; they look {_range(face['gaze_yaw_deg'])} degrees to the"
            f" side and {_range(face['gaze_pitch_deg'])} up, from what is usual",
    "sound": f"late by {sound['late_by_frames']} frames"
             f" ({'clear' if sound['clear'] else 'not clear'}), moved earlier by"
             f" {sound['moved_earlier_by_frames']}; loud over quiet"
             f" {sound['loud_over_quiet_db']} dB",
    "background": f"{100 * layers['background_seen']:.0f} % seen",
    "masks": document["masks_by"] + (
      "" if layers["face_ends_at_jaw"] is None
      else f"; the face ends at {100 * layers['face_ends_at_jaw']:.0f} % of the jaw's landmarks"
    ),
  }  # fmt: skip
  angles = _angles(found.tracked)
  plots = [
    _plot("opening of the mouth, mm", {"gap": 1e3 * found.measures.gap}, found),
    _plot("closing of the eyes (AU45), 0 to 5", {"AU45": found.units["AU45"]}, found),
    _plot("smile (AU12) and brows (AU04), 0 to 5",
          {"AU12": found.units["AU12"], "AU04": found.units["AU04"]}, found),
    _plot("gaze in the head's axes, degrees",
          {"yaw": found.gaze[:, 0], "pitch": found.gaze[:, 1]}, found),
    _plot("turn of the head, degrees", {n.removesuffix("_deg"): v for n, v in angles.items()},
          found),
  ]  # fmt: skip
  return page.document(video["name"], [
    page.heading("What is weak, and how it will show"),
    page.bullets(document["warnings"], "nothing was found"),
    page.heading("What was found"),
    page.table(facts.items()),
    page.heading("Layers"),
    page.table(_layers(layers, frames["used"])),
    page.heading("Over time"),
    page.paragraph("Grey: frames left out. Dashed: cuts."),
    *plots,
    page.heading("Contact sheet"),
    page.paragraph(
      "Green: landmarks. Yellow: the 68 of them that are written. Red: points fixed to the tracked"
      " head; they should not slide on the face."
    ),
    page.picture(sheet, "contact sheet"),
  ])


def _range(quantiles: Mapping[str, float]) -> str:
  return f"{quantiles['min']:.0f} to {quantiles['max']:.0f}"


def _layers(layers: Mapping[str, Any], used: int) -> list[tuple[str, ...]]:
  """Rows of the page's table of layers."""
  def percent(share: float | None, digits: int = 0) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"

  heads = ("layer", "of the picture", "frames without", "stays from frame to frame")
  return [heads] + [
    (name, percent(layers["share_of_picture"][name], 1),
     f"{layers['frames_without'][name]} of {used}", percent(layers["steadiness"].get(name), 1))
    for name in NAMES.values()
  ]


def _plot(title: str, series: Mapping[str, Float[np.ndarray, " f"]], found: Found) -> str:
  """Lines over the clip's time; frames left out are grey."""
  shown = {name: np.where(found.used, values, np.nan) for name, values in series.items()}
  return page.plot(title, shown, grey=spans.runs(~found.used), dashed=found.begins[1:])
