"""Which frames of a clip can be used: shots, scenes, and the spans that are left out.

A shot ends where the picture changes at once. Shots that show the same surroundings belong to one
scene; only one scene has one background plate, so one is used: the scene and the face in it that
last longest. Frames left out keep their numbers (method.md Q60).

Axes: f frames, p landmarks, h w pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

THUMB = (32, 18)  # width and height of what shots are told apart by
CUT = 14.0  # mean change of a thumbnail's values (0..255) at a cut, and
CUT_RATIO = 4.0  # how much more that is than the changes before it
SAME_SCENE = 14.0  # mean difference of thumbnails around the person, within a scene
PROFILE_DEG = 60.0  # turned farther, the landmarks of the far half are guessed
STILL = 0.002  # mean motion of landmarks from frame to frame, in faces; who speaks moves 5 times it
LEAST_RUN = 5  # frames; shorter runs between others are chance finds

USED, NO_FACE, OTHER_SCENE, OTHER_FACE, PROFILE, TOO_SHORT = range(6)
REASONS = (
  "", "no face", "another scene", "another face", "turned to profile", "only a few frames"
)  # fmt: skip


class Span(NamedTuple):
  """Frames first .. last."""

  first: int
  last: int
  reason: str


class Shots:
  """Told every picture of a clip, finds its shots."""

  def __init__(self):
    self.begins: list[int] = []  # first frames
    self._sums: list[Float[np.ndarray, "h w 3"]] = []
    self._count = 0
    self._last: Float[np.ndarray, "h w 3"] | None = None
    self._changes: list[float] = []

  def watch(self, image: UInt8[np.ndarray, "h w 3"]) -> bool:
    """Whether a new shot begins with this picture."""
    stride = max(min(image.shape[:2]) // 128, 1)
    small = Image.fromarray(np.ascontiguousarray(image[::stride, ::stride]))
    thumb = np.asarray(small.resize(THUMB, Image.Resampling.BOX), np.float32)
    change = 0.0 if self._last is None else float(np.abs(thumb - self._last).mean())
    usual = float(np.mean(self._changes)) if self._changes else 0.0
    cut = self._last is None or change > max(CUT, CUT_RATIO * usual)
    if cut:
      self.begins.append(self._count)
      self._sums.append(np.zeros_like(thumb))
      self._changes = []
    else:
      self._changes = [*self._changes[-11:], change]
    self._sums[-1] += thumb
    self._last, self._count = thumb, self._count + 1
    return cut

  def thumbs(self) -> list[Float[np.ndarray, "h w 3"]]:
    """The mean picture of every shot."""
    lengths = np.diff([*self.begins, self._count])
    return [total / n for total, n in zip(self._sums, lengths, strict=True)]


def judge(
  begins: Sequence[int],
  thumbs: Sequence[Float[np.ndarray, "h w 3"]],
  boxes: Float[np.ndarray, "f 4"],
  segments: Int[np.ndarray, " f"],
  yaw_deg: Float[np.ndarray, " f"],
) -> Int[np.ndarray, " f"]:
  """Why each frame is left out (an index of REASONS), 0 where it is used.

  Args:
    begins: first frames of the shots.
    thumbs: their mean pictures.
    boxes: of the followed face, x0 y0 x1 y1 as shares of the picture's width and height; NaN
      where there is none.
    segments: a number that grows when another face is followed.
    yaw_deg: how far the face is turned sideways.
  """
  frames = len(boxes)
  out = np.full(frames, USED)
  found = np.isfinite(boxes).all(1)
  out[~found] = NO_FACE
  shot = np.searchsorted(begins, np.arange(frames), side="right") - 1
  scenes = _scenes(thumbs, [_median(boxes[(shot == s) & found]) for s in range(len(begins))])
  # Faces: stretches of one face, put together where they have one place and size in one scene.
  faces: list[tuple[int, np.ndarray, np.ndarray]] = []  # scene, box, frames
  for s, number in np.unique(np.stack([shot[found], segments[found]], 1), axis=0).tolist():
    here = found & (shot == s) & (segments == number)
    box = _median(boxes[here])
    assert box is not None
    for k, (scene, other, mask) in enumerate(faces):
      if scene == scenes[s] and _alike(box, other):
        faces[k] = (scene, other, mask | here)
        break
    else:
      faces.append((scenes[s], box, here))
  if not faces:
    return out
  lengths = [sum(int(m.sum()) for n, _, m in faces if n == scene) for scene, _, _ in faces]
  main = max(range(len(faces)), key=lambda k: (int(faces[k][2].sum()), lengths[k]))
  in_scene = np.array(scenes)[shot] == faces[main][0]
  out[found & ~faces[main][2]] = OTHER_FACE
  out[found & ~in_scene] = OTHER_SCENE
  out[(out == USED) & (np.abs(yaw_deg) > PROFILE_DEG)] = PROFILE
  for begin, end in runs(out == USED, begins):
    if end - begin < LEAST_RUN:
      out[begin:end] = TOO_SHORT
  return out


def is_still(points: Float[np.ndarray, "f p 3"]) -> bool:
  """Whether a face, NaN where it is not seen, hardly ever moves: a photograph."""
  moves = np.linalg.norm(np.diff(points[:, :468, :2], axis=0), axis=2).mean(1)
  sizes = np.ptp(points[1:, :468, 1], axis=1)
  share = (moves / np.maximum(sizes, 1e-6))[np.isfinite(moves)]
  return len(share) > 0 and float(np.percentile(share, 95)) < STILL


def runs(mask: Bool[np.ndarray, " f"], begins: Sequence[int] = ()) -> list[tuple[int, int]]:
  """Stretches [begin, end) of true values; a new one begins at each of `begins`."""
  edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
  out = []
  for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
    marks = [begin, *(int(b) for b in begins if begin < b < end), end]
    out += list(zip(marks[:-1], marks[1:], strict=True))
  return out


def left_out(why: Int[np.ndarray, " f"]) -> list[Span]:
  """The spans that are not used, in order."""
  marks = np.flatnonzero(np.diff(why)) + 1
  begins, ends = [0, *marks.tolist()], [*marks.tolist(), len(why)]
  return [
    Span(a, b - 1, REASONS[why[a]]) for a, b in zip(begins, ends, strict=True) if why[a] != USED
  ]


def _scenes(thumbs, boxes) -> list[int]:
  """A number for each shot: alike where the surroundings of the person are."""
  out: list[int] = []
  known: list[int] = []  # a shot of every scene: its longest would be better, its first will do
  for s, (thumb, box) in enumerate(zip(thumbs, boxes, strict=True)):
    for number, k in enumerate(known):
      if _apart(thumb, thumbs[k], box, boxes[k]) < SAME_SCENE:
        out.append(number)
        break
    else:
      out.append(len(known))
      known.append(s)
  return out


def _apart(a, b, box_a, box_b) -> float:
  """Mean difference of two thumbnails where neither shows the person."""
  w, h = THUMB
  clear = np.ones((h, w), bool)
  for box in (box_a, box_b):
    if box is not None:
      x0, y0, x1, y1 = box
      wide, high = x1 - x0, y1 - y0
      r, c = max(int((y0 - 0.6 * high) * h), 0), max(int((x0 - wide) * w), 0)
      clear[r:, c : int(np.ceil((x1 + wide) * w))] = False
  if clear.mean() < 0.1:  # nothing but the person
    clear[:] = True
  return float(np.abs(a - b)[clear].mean())


def _median(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "4"] | None:
  return np.median(boxes, axis=0) if len(boxes) else None


def _alike(a: Float[np.ndarray, "4"], b: Float[np.ndarray, "4"]) -> bool:
  """Whether two boxes have about one place and size."""
  size_a, size_b = a[2:] - a[:2], b[2:] - b[:2]
  apart = np.abs((a[:2] + a[2:]) - (b[:2] + b[2:])) / 2 / np.maximum(size_a, size_b)
  return bool(apart.max() < 1.0 and 0.6 < size_a.max() / max(size_b.max(), 1e-9) < 1.7)
