"""Finds the face: boxes, 478 landmarks and 52 blendshape scores a frame.

MediaPipe's three face networks, run through LiteRT without the MediaPipe package. A detector
finds faces in the whole frame; the landmark network reads a rotated square around one, and the
landmarks it finds give the square of the next frame, so that the detector is asked only when the
face is lost, and now and then. A second pass reads every frame again through squares smoothed
over time, several slightly different ones, and averages: the network's answer depends a little
on how the square lies, and that is most of what would shake the head later.

Points lie in continuous pixels (the first pixel's centre is (0.5, 0.5)); their third value is the
network's relative depth in the same unit, smaller towards the camera.
Axes: f frames, p landmarks (478), b blendshapes (52), v mesh vertices (468), t triangles.
"""

import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from uajax.errors import UserError

LANDMARKS = 478
DETECTOR_SIDE, LANDMARK_SIDE = 128, 256
MIN_SCORE = 0.5  # of the detector, and of the landmark network that a face is there
ROI_SCALE = 1.5  # the square is this much larger than what it is drawn around
CLOSELY_EVERY = 10  # frames without a face after which the detector looks closely
LOOK_EVERY = 25  # frames after which the detector looks for other faces

# Order of the blendshape network's output.
_SCORES = """
_neutral browDownLeft browDownRight browInnerUp browOuterUpLeft browOuterUpRight cheekPuff
cheekSquintLeft cheekSquintRight eyeBlinkLeft eyeBlinkRight eyeLookDownLeft eyeLookDownRight
eyeLookInLeft eyeLookInRight eyeLookOutLeft eyeLookOutRight eyeLookUpLeft eyeLookUpRight
eyeSquintLeft eyeSquintRight eyeWideLeft eyeWideRight jawForward jawLeft jawOpen jawRight
mouthClose mouthDimpleLeft mouthDimpleRight mouthFrownLeft mouthFrownRight mouthFunnel
mouthLeft mouthLowerDownLeft mouthLowerDownRight mouthPressLeft mouthPressRight mouthPucker
mouthRight mouthRollLower mouthRollUpper mouthShrugLower mouthShrugUpper mouthSmileLeft
mouthSmileRight mouthStretchLeft mouthStretchRight mouthUpperUpLeft mouthUpperUpRight
noseSneerLeft noseSneerRight
"""
BLENDSHAPES = tuple(_SCORES.split())


def _numbers(text: str) -> np.ndarray:
  """`"1 4-6"` -> [1, 4, 5, 6]."""
  parts = (part.partition("-") for part in text.split())
  return np.concatenate([np.arange(int(a), int(b or a) + 1) for a, _, b in parts])


# The 146 landmarks that the blendshape network reads, in ascending order (MediaPipe's interface).
BLENDSHAPE_INPUT = _numbers(
  "0-1 4-8 10 13-14 17 21 33 37 39-40 46 52-55 58 61 63 65-67 70 78 80-82 84 87-88 91 93 95 103 "
  "105 107 109 127 132-133 136 144-146 148-150 152-155 157-163 168 172-173 176 178 181 185 191 "
  "195 197 234 246 249 251 263 267 269-270 276 282-285 288 291 293 295-297 300 308 310-312 314 "
  "317-318 321 323-324 332 334 336 338 356 361-362 365 373-375 377-382 384-390 397-398 400 402 "
  "405 409 415 454 466 468-477"
)

# Closed outlines, as indices into the 478. "Right" is the person's right, left in the picture.
FACE_OVAL = (
  [10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377]
  + [152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109]
)  # fmt: skip
OUTER_LIPS = (
  [61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291]
  + [375, 321, 405, 314, 17, 84, 181, 91, 146]
)  # fmt: skip
INNER_LIPS = (
  [78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308]
  + [324, 318, 402, 317, 14, 87, 178, 88, 95]
)  # fmt: skip
RIGHT_EYE = [33, 246, 161, 160, 159, 158, 157, 173, 133, 155, 154, 153, 145, 144, 163, 7]
LEFT_EYE = [263, 466, 388, 387, 386, 385, 384, 398, 362, 382, 381, 380, 374, 373, 390, 249]

# The 68 points in iBUG order: jaw from the picture's left to its right, brows, nose bridge, nose
# base, eyes, outer lips, inner lips.
IBUG = np.array(
  [127, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 356]  # jaw 0..16
  + [70, 63, 105, 66, 107]  # 17..21
  + [336, 296, 334, 293, 300]  # 22..26
  + [168, 197, 5, 4]  # 27..30
  + [98, 97, 2, 326, 327]  # 31..35
  + [33, 160, 158, 133, 153, 144]  # 36..41
  + [362, 385, 387, 263, 373, 380]  # 42..47
  + [61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181]  # 48..59
  + [78, 81, 13, 311, 308, 402, 14, 178]  # 60..67
)


class Mesh(NamedTuple):
  """The average face that ships with the landmark networks."""

  vertices: Float[np.ndarray, "v 3"]  # metres; x to the picture's right, y up, z to the viewer
  triangles: Int[np.ndarray, "t 3"]
  mirror: Int[np.ndarray, " v"]  # the vertex on the other side


class Detection(NamedTuple):
  score: float
  box: Float[np.ndarray, "4"]  # x0 y0 x1 y1, pixels
  eyes: Float[np.ndarray, "2 2"]  # the person's right, then left


class Roi(NamedTuple):
  """A rotated square."""

  x: float  # centre, pixels
  y: float
  side: float  # pixels
  angle: float  # radians, clockwise in the picture


class Seen(NamedTuple):
  """What the first pass saw in a frame."""

  points: Float[np.ndarray, "p 3"] | None  # of the face that is followed
  others: int  # further faces, where the detector was asked, else 0
  segment: int  # grows when the face is lost and found elsewhere, and with every cut


class Landmarker:
  """The three networks of `face_landmarker.task` and its mesh."""

  def __init__(self, model: Path, threads: int = 2):
    """Reads the bundle. Raises UserError where it is not one."""
    try:
      with zipfile.ZipFile(model) as bundle:
        parts = {name: bundle.read(name) for name in bundle.namelist()}
      self._detector = Network(parts["face_detector.tflite"], threads)
      self._landmarks = Network(parts["face_landmarks_detector.tflite"], threads)
      self._blendshapes = Network(parts["face_blendshapes.tflite"], threads)
      self.mesh = read_mesh(parts["geometry_pipeline_metadata_landmarks.binarypb"])
    except (zipfile.BadZipFile, KeyError, OSError, ValueError, RuntimeError) as error:
      raise UserError(
        f"{model} is not MediaPipe's face_landmarker.task bundle ({error}): delete it, so that it"
        " is fetched again"
      ) from error
    self._anchors = _anchors()

  def detect(
    self, image: UInt8[np.ndarray, "h w 3"], *, closely: bool = True
  ) -> list[Detection]:
    """Faces of the picture, the largest first.

    The detector sees little of a face smaller than a tenth of its view: where the whole picture
    shows it none, it looks through smaller squares if told to look `closely`, at ten times the
    cost.
    """
    h, w = image.shape[:2]
    views = ((max(h, w), 1, 1), (min(h, w), 3, 1), (min(h, w) // 2, 5, 3))
    for side, across, down in views if closely else views[:1]:
      xs = np.linspace(side / 2, w - side / 2, across) if across > 1 else [w / 2]
      ys = np.linspace(side / 2, h - side / 2, down) if down > 1 else [h / 2]
      found = [d for y in ys for x in xs for d in self._detect(image, Roi(x, y, side, 0.0))]
      if found:
        break
    faces: list[Detection] = []  # squares overlap: a face may have been seen in several
    for one in sorted(found, key=lambda d: -d.score):
      if not faces or _overlaps(one.box, np.stack([d.box for d in faces])).max() <= 0.3:
        faces.append(one)
    return sorted(faces, key=lambda d: -(d.box[2] - d.box[0]))

  def _detect(self, image: UInt8[np.ndarray, "h w 3"], view: Roi) -> list[Detection]:
    """Faces in an upright square of the picture."""
    side, corner = view.side, np.array([view.x, view.y]) - view.side / 2
    square = crop(image, view, DETECTOR_SIDE)
    boxes, logits = self._detector(square.astype(np.float32) / 127.5 - 1)
    scores = 1 / (1 + np.exp(-np.clip(logits.reshape(-1), -50, 50)))
    keep = scores > MIN_SCORE
    raw = boxes.reshape(-1, 8, 2)[keep] / DETECTOR_SIDE
    scores, anchors = scores[keep], self._anchors[keep]
    centres = raw[:, 0] + anchors
    points = (raw[:, 2:4] + anchors[:, None]) * side + corner
    boxes = np.concatenate([centres - raw[:, 1] / 2, centres + raw[:, 1] / 2], 1) * side
    boxes += np.tile(corner, 2)
    found = []
    rest = list(np.argsort(-scores))
    while rest:  # overlapping answers are one face: their mean, weighted by score
      overlap = _overlaps(boxes[rest[0]], boxes[rest])
      group = [i for i, o in zip(rest, overlap, strict=True) if o > 0.3]
      rest = [i for i, o in zip(rest, overlap, strict=True) if o <= 0.3]
      weight = scores[group] / scores[group].sum()
      found.append(
        Detection(
          float(scores[group].max()),
          np.einsum("i,ij->j", weight, boxes[group]),
          np.einsum("i,ijk->jk", weight, points[group]),
        )
      )
    return found

  def read(
    self, image: UInt8[np.ndarray, "h w 3"], roi: Roi
  ) -> tuple[Float[np.ndarray, "p 3"], float]:
    """Landmarks in the picture's pixels, and how sure the network is that a face is there."""
    patch = crop(image, roi, LANDMARK_SIDE).astype(np.float32) / 255
    points, presence, _ = self._landmarks(patch)
    points = points.reshape(LANDMARKS, 3) / LANDMARK_SIDE
    points[:, :2] -= 0.5
    c, s = np.cos(roi.angle), np.sin(roi.angle)
    turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    points = points @ turn * roi.side + np.array([roi.x, roi.y, 0.0])
    return points, float(1 / (1 + np.exp(-np.clip(presence.item(), -50, 50))))

  def score(self, points: Float[np.ndarray, "p 3"]) -> Float[np.ndarray, " b"]:
    """Blendshape scores 0..1 in the order of BLENDSHAPES."""
    (scores,) = self._blendshapes(points[BLENDSHAPE_INPUT, :2].astype(np.float32))
    return scores.reshape(-1)


def follow(
  frames: Iterable[tuple[UInt8[np.ndarray, "h w 3"], bool]], landmarker: Landmarker
) -> Iterator[Seen]:
  """First pass over frames, each with whether a new shot begins with it.

  Follows one face: at first the largest; where it is lost, the one nearest to its last place.
  Nothing is carried over a cut. The detector looks in once a second: for others, and whether the
  face that was in the shot longest is back where it was.
  """
  place: Roi | None = None  # of the face, where it is or was last
  here = False
  segment: int = 0
  segments: int = 0
  lasted: dict[int, tuple[int, Roi]] = {}  # of the shot: frames and last place of each segment
  for index, (image, cut) in enumerate(frames):
    if cut:
      place, here, lasted = None, False, {}
    others = 0
    points: np.ndarray | None = None
    presence: float = 0.0
    if here and place is not None:
      points, presence = landmarker.read(image, place)
    missed = presence < MIN_SCORE
    if missed or index % LOOK_EVERY == 0:
      found = landmarker.detect(image, closely=cut or index % CLOSELY_EVERY == 0)
      others = max(len(found) - 1, 0)
      if missed and found:
        near = place or roi_of_detection(found[0])
        found.sort(key=lambda d: _distance(d, near))
      elif lasted:
        main = _longest(list(lasted), lasted)
        found = [d for d in found if main != segment and _is_at(d, lasted[main][1])]
      else:
        found = []
      for one in found[:3]:  # the detector also takes other things for faces
        again, sure = landmarker.read(image, roi_of_detection(one))
        if sure >= MIN_SCORE:  # once more through a square drawn around the landmarks
          again, sure = landmarker.read(image, roi_of_points(again))
        if sure >= MIN_SCORE:
          points, presence = again, sure
          same = [k for k, (_, roi) in lasted.items() if _is_at(one, roi)]
          segment = _longest(same, lasted) if same else segments
          segments = max(segments, segment + 1)
          break
    here = points is not None and presence >= MIN_SCORE
    if points is not None and here:
      place = roi_of_points(points)
      lasted[segment] = (lasted.get(segment, (0, place))[0] + 1, place)
    yield Seen(points if here else None, others, segment)


def _longest(some: list[int], lasted: dict[int, tuple[int, Roi]]) -> int:
  """Of some segments the one that lasted longest."""
  return max(some, key=lambda k: lasted[k][0])


def steady(
  image: UInt8[np.ndarray, "h w 3"], roi: Roi, landmarker: Landmarker, looks: int = 6
) -> tuple[Float[np.ndarray, "p 3"], Float[np.ndarray, " b"]]:
  """Second pass: landmarks averaged over `looks` squares around `roi`, and the scores."""
  # Squares that differ in place, size and turn, spread evenly and alike in every frame: what they
  # add is a constant that the fit absorbs, and the network's scatter averages out.
  reads = []
  for phase in 2 * np.pi * np.arange(looks) / looks:
    look = Roi(
      roi.x + 0.02 * np.cos(phase) * roi.side,
      roi.y + 0.02 * np.sin(phase) * roi.side,
      roi.side * (1 + 0.04 * np.cos(2 * phase + 0.5)),
      roi.angle + 0.05 * np.sin(2 * phase + 0.5),
    )
    reads.append(landmarker.read(image, look)[0])
  points = np.mean(reads, axis=0)
  return points, landmarker.score(points)


def smooth_rois(
  points: Float[np.ndarray, "f p 3"], runs: Iterable[tuple[int, int]]
) -> dict[int, Roi]:
  """Squares around landmarks by frame, smoothed (about +-0.2 s) over runs [begin, end)."""
  out: dict[int, Roi] = {}
  kernel = np.exp(-0.5 * (np.arange(-5, 6) / 2.0) ** 2)
  for begin, end in runs:
    run = np.array([roi_of_points(points[f]) for f in range(begin, end)])
    run[:, 3] = np.unwrap(run[:, 3])
    padded = np.pad(run, ((5, 5), (0, 0)), mode="edge")
    for i in range(end - begin):
      mean = kernel @ padded[i : i + 11] / kernel.sum()
      out[begin + i] = Roi(*(float(x) for x in mean))
  return out


def rough_yaw(
  points: Float[np.ndarray, "f p 3"], mesh: Mesh
) -> Float[np.ndarray, " f"]:
  """How far each face is turned sideways, degrees: the average face laid upon the landmarks."""
  base = mesh.vertices - mesh.vertices.mean(0)
  seen = points[:, :468] * np.array([1.0, -1.0, -1.0])  # the mesh's axes: y up, z to the viewer
  seen = seen - seen.mean(1, keepdims=True)
  u, _, vt = np.linalg.svd(np.einsum("fpa,pb->fab", seen, base))
  turn = u @ (vt * np.sign(np.linalg.det(u @ vt))[:, None, None] ** np.array([0, 0, 1])[:, None])
  return np.degrees(np.arctan2(turn[:, 0, 2], turn[:, 2, 2]))


def roi_of_points(points: Float[np.ndarray, "p 3"]) -> Roi:
  """The square MediaPipe draws: 1.5 times the landmarks' box in axes turned with the eyes."""
  right, left = points[33, :2], points[263, :2]
  angle = float(np.arctan2(left[1] - right[1], left[0] - right[0]))
  c, s = np.cos(angle), np.sin(angle)
  turned = points[:468, :2] @ np.array([[c, -s], [s, c]])
  low, high = turned.min(0), turned.max(0)
  x, y = (low + high) / 2 @ np.array([[c, s], [-s, c]])
  return Roi(float(x), float(y), float((high - low).max()) * ROI_SCALE, angle)


def roi_of_detection(found: Detection) -> Roi:
  (x0, y0), (x1, y1) = found.eyes
  low, high = found.box[:2], found.box[2:]
  side = float((high - low).max()) * ROI_SCALE
  x, y = (low + high) / 2
  return Roi(float(x), float(y), side, float(np.arctan2(y1 - y0, x1 - x0)))


def crop(image: UInt8[np.ndarray, "h w 3"], roi: Roi, size: int) -> UInt8[np.ndarray, "s s 3"]:
  """The picture seen through a rotated square, resampled to size x size; black outside."""
  h, w = image.shape[:2]
  c, s = np.cos(roi.angle), np.sin(roi.angle)
  factor = max(int(roi.side / size), 1)  # shrink first, lest pixels be skipped
  reach = roi.side / 2 * (abs(c) + abs(s)) + 2 * factor
  left, right = _clip_to(roi.x - reach, roi.x + reach, factor, w)
  top, bottom = _clip_to(roi.y - reach, roi.y + reach, factor, h)
  if right <= left or bottom <= top:
    return np.zeros((size, size, 3), np.uint8)
  source = Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))
  if factor > 1:
    source = source.reduce(factor)
  step = roi.side / size / factor
  x, y = (roi.x - left) / factor, (roi.y - top) / factor
  half = roi.side / 2 / factor
  data = (
    step * c, -step * s, x - half * c + half * s,
    step * s, step * c, y - half * s - half * c,
  )  # fmt: skip
  return np.asarray(
    source.transform((size, size), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
  )


def _clip_to(low: float, high: float, factor: int, length: int) -> tuple[int, int]:
  """The range in whole multiples of `factor`, within the picture."""
  begin, end = int(np.floor(low / factor)) * factor, int(np.ceil(high / factor)) * factor
  return min(max(begin, 0), length), min(max(end, 0), length)


def to_ibug(points: Float[np.ndarray, "... p d"]) -> Float[np.ndarray, "... 68 d"]:
  """The 68 points in iBUG order."""
  return points[..., IBUG, :]


def read_mesh(data: bytes) -> Mesh:
  """Reads the average face from the bundle's geometry file (a protocol buffer)."""
  vertices: list[float] = []
  triangles: list[int] = []
  for number, value in _fields(data):
    if number == 1 and isinstance(value, bytes):
      for inner, entry in _fields(value):
        if inner == 3 and isinstance(entry, bytes):
          vertices += [x for (x,) in struct.iter_unpack("<f", entry)]
        elif inner == 4 and isinstance(entry, int):
          triangles.append(entry)
  if len(vertices) != 468 * 5 or len(triangles) % 3 or not triangles or max(triangles) >= 468:
    raise ValueError("unexpected geometry")
  points = np.array(vertices).reshape(468, 5)[:, :3] / 100  # centimetres
  flipped = points * np.array([-1.0, 1.0, 1.0])
  mirror = np.argmin(np.linalg.norm(points[:, None] - flipped[None], axis=2), axis=1)
  return Mesh(points, np.array(triangles).reshape(-1, 3), mirror)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
  """Fields of a protocol buffer message: number and raw value."""
  at = 0

  def varint() -> int:
    nonlocal at
    value = shift = 0
    while True:
      if at >= len(data) or shift > 63:
        raise ValueError("truncated geometry")
      byte = data[at]
      at += 1
      value |= (byte & 127) << shift
      shift += 7
      if byte < 128:
        return value

  while at < len(data):
    key = varint()
    kind = key & 7
    if kind == 0:
      yield key >> 3, varint()
      continue
    size = {1: 8, 5: 4}[kind] if kind in (1, 5) else varint()
    if at + size > len(data):
      raise ValueError("truncated geometry")
    yield key >> 3, data[at : at + size]
    at += size


def _anchors() -> Float[np.ndarray, "a 2"]:
  """Centres of the detector's anchors, 0..1: 2 a cell of 16 x 16, then 6 a cell of 8 x 8."""
  out = []
  for cells, count in ((16, 2), (8, 6)):
    line = (np.arange(cells) + 0.5) / cells
    grid = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 1, 2)
    out.append(np.repeat(grid, count, axis=1).reshape(-1, 2))
  return np.concatenate(out)


def _overlaps(box: Float[np.ndarray, "4"], boxes: Float[np.ndarray, "n 4"]) -> np.ndarray:
  inside = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
  shared = np.clip(inside, 0, None).prod(1)
  areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
  return shared / np.maximum((box[2:] - box[:2]).prod() + areas - shared, 1e-9)


def _distance(found: Detection, roi: Roi) -> float:
  x, y = (found.box[:2] + found.box[2:]) / 2
  return float(np.hypot(x - roi.x, y - roi.y))


def _is_at(found: Detection, roi: Roi) -> bool:
  """Whether a face is where another was: nearer than most of its own size, and as large."""
  side = roi_of_detection(found).side
  return _distance(found, roi) < 0.5 * roi.side and 0.6 < side / roi.side < 1.7


def load_network(model: Path, threads: int = 2) -> "Network":
  """Reads a .tflite. Raises UserError where it is none."""
  try:
    return Network(model.read_bytes(), threads)
  except (OSError, ValueError, RuntimeError) as error:
    raise UserError(
      f"{model} is not a TensorFlow Lite model ({error}): delete it, so that it is fetched again"
    ) from error


class Network:
  """A .tflite with one input: array without the batch axis in, arrays out."""

  def __init__(self, model: bytes, threads: int):
    from ai_edge_litert.interpreter import Interpreter

    self._net = Interpreter(model_content=model, num_threads=threads)
    self._net.allocate_tensors()
    self._into = self._net.get_input_details()[0]
    self._out = [d["index"] for d in self._net.get_output_details()]

  def __call__(self, value: np.ndarray) -> tuple[np.ndarray, ...]:
    self._net.set_tensor(self._into["index"], value[None].astype(self._into["dtype"]))
    self._net.invoke()
    return tuple(self._net.get_tensor(i) for i in self._out)
