"""Cuts a frame into layers: face, hair, inner mouth, neck, torso and background.

What each pixel is comes from the 19-class face parser where it is at hand, else from the person
and hair mattes and the landmarks; the inner mouth lies between the lips' edges as lips.py finds
them, which is better than any mask. Class probabilities are averaged over neighbouring frames,
so that edges do not flicker. From the layers come the clean background plate, the picture with
that plate behind the person, and the torso with its neck painted on beneath the chin, as
method.md E.5 and E.6 have them.

Soft layers are bytes: how many 255ths of a pixel belong to each of LAYERS; what is left of it is
background. A clip's soft layers need not be read from every frame: `carry` moves them along with
the landmarks.

Axes: h w pixels, c layers, p landmarks.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import scipy.ndimage as ndi
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image, ImageDraw, ImageFilter

from uajax.preprocess import landmarks as marks
from uajax.preprocess.landmarks import Roi
from uajax.types import BACKGROUND, FACE, HAIR, MOUTH, NECK, TORSO

LAYERS = (FACE, HAIR, NECK, TORSO)
LAYER_IDS = np.array(LAYERS, np.uint8)
PERSON_SIDE, HAIR_SIDE, PARSER_SIDE = 256, 512, 448
# The parser's 19 classes (CelebAMask-HQ) as ours. Ears, brows, eyes, glasses and lips are face,
# a hat is hair (both move with the head), and so is the inner mouth at first.
PARSER_CLASSES = np.array(
  [BACKGROUND] + [FACE] * 13 + [NECK, NECK, TORSO, HAIR, HAIR], np.uint8
)  # fmt: skip
_PARSER_LAYERS = 255 * (PARSER_CLASSES[:, None] == LAYER_IDS).astype(np.uint8)  # 19 c
PARSER_SPAN = 1.6  # side of what the parser sees, in landmark squares
SHARE = (51, 154, 51)  # 256ths: of the frame before, this one and the next
MARGIN = 0.016  # of the picture's height: nearer to the person a pixel is not yet background
PLATE_SAMPLES = 64
RED_TEETH, DARK_TEETH = 0.35, 0.8  # see find_teeth
CRUMB = 0.002  # of the mouth's width squared: a smaller piece of an inner mouth is none
WARP_CELLS = 16  # along a side of the picture, where layers are carried
STEADY = [10, 338, 297, 332, 284, 251, 389, 356, 454, 234, 127, 162, 21, 54, 103, 67, 109]
STEADY += [168, 6, 197, 195, 5, 4, 1, 2, 98, 327, 33, 133, 362, 263]  # brow to nose and ears


class Segmenter:
  """The networks that tell what a pixel is."""

  def __init__(self, person: Path, hair: Path | None, parser: Path | None, threads: int = 2):
    """Of the hair matte and the parser one is needed; with the parser the other is not read."""
    if hair is None and parser is None:
      raise ValueError("either the hair matte or the parser is needed")
    self._person = marks.load_network(person, threads)
    self._hair = marks.load_network(hair, threads) if hair and not parser else None
    self._parser = marks.load_network(parser, threads) if parser else None

  def __call__(
    self, image: UInt8[np.ndarray, "h w 3"], points: Float[np.ndarray, "p 3"], roi: Roi
  ) -> UInt8[np.ndarray, "h w c"]:
    """Soft layers; the mouth is still face. `roi` is the square around the face."""
    h, w = image.shape[:2]
    small = _resize(image, PERSON_SIDE, PERSON_SIDE).astype(np.float32) / 255
    person = self._person(small)[0].reshape(PERSON_SIDE, PERSON_SIDE)
    if self._parser is not None:
      out = self._parse(self._parser, image, person, roi)
      return _claim_shoulders(out, person, float(points[marks.IBUG[48:60], 1].mean()))
    return self._guess(image, _stretch(person, h, w), points)

  def _parse(self, parser, image, person, roi) -> np.ndarray:
    h, w = image.shape[:2]
    side = roi.side * PARSER_SPAN
    if side > 0.85 * max(h, w):  # nearly all of the picture: then all of it
      square = Roi(w / 2, h / 2, float(max(h, w)), 0.0)
    else:
      square = Roi(roi.x, roi.y, side, 0.0)
    patch = marks.crop(image, square, PARSER_SIDE).astype(np.float32)
    labels = np.clip(parser(patch / 127.5 - 1)[0], 0, 18).reshape(PARSER_SIDE, PARSER_SIDE)
    labels = _trim_hair(labels.astype(np.uint8))
    step = PARSER_SIDE / square.side
    c0, r0 = square.x - square.side / 2, square.y - square.side / 2
    rows = slice(max(int(np.ceil(r0)), 0), min(int(r0 + square.side), h))
    columns = slice(max(int(np.ceil(c0)), 0), min(int(c0 + square.side), w))
    size = (columns.stop - columns.start, rows.stop - rows.start)
    box = (
      (columns.start - c0) * step, (rows.start - r0) * step,
      (columns.stop - c0) * step, (rows.stop - r0) * step,
    )  # fmt: skip
    # Pillow filters four channels at once; it takes CMYK for what they are.
    layers = Image.fromarray(_PARSER_LAYERS[labels], "CMYK")
    layers = layers.filter(ImageFilter.GaussianBlur(1.2))
    inside = np.asarray(layers.resize(size, Image.Resampling.BILINEAR, box=box))
    if size == (w, h):
      return inside.copy()
    # Beyond the parser's view the person is torso.
    out = np.zeros((h, w, len(LAYERS)), np.uint8)
    out[..., LAYERS.index(TORSO)] = 255 * _stretch(person, h, w)
    out[rows, columns] = inside
    return out

  def _guess(self, image, person, points) -> np.ndarray:
    """Without the parser: the person is head above the jaw, neck and torso below it."""
    h, w = image.shape[:2]
    assert self._hair is not None
    small = _resize(image, HAIR_SIDE, HAIR_SIDE).astype(np.float32) / 255
    # The fourth channel is the matte of the frame before; none is given.
    scores = self._hair(np.concatenate([small, np.zeros_like(small[..., :1])], -1))[0]
    scores = scores.reshape(HAIR_SIDE, HAIR_SIDE, 2)
    hair = _stretch(1 / (1 + np.exp(np.clip(scores[..., 0] - scores[..., 1], -30, 30))), h, w)
    hair = hair * person
    outline = points[marks.FACE_OVAL, :2]
    oval = fill_polygon(outline, h, w)
    right, left, chin = points[234, :2], points[454, :2], points[152, :2]
    across = (left - right) / max(np.linalg.norm(left - right), 1e-6)
    down = np.array([-across[1], across[0]])
    width = float(np.linalg.norm(left - right))
    # Head: above the jaw line drawn on sideways from the ears' height, and ears within reach.
    jaw = points[marks.IBUG[2:15], :2]
    wide = np.concatenate([
      [jaw[0] - across * width * 0.6 - down * width * 3],
      [jaw[0] - across * width * 0.6 + down * width * 0.22],
      [jaw[0] - across * width * 0.04 + down * width * 0.22],
      jaw[1:-1],
      [jaw[-1] + across * width * 0.04 + down * width * 0.22],
      [jaw[-1] + across * width * 0.6 + down * width * 0.22],
      [jaw[-1] + across * width * 0.6 - down * width * 3],
    ])  # fmt: skip
    above = np.maximum(fill_polygon(wide, h, w), oval)
    skin = np.median(image[oval > 0.9].astype(np.float32), axis=0) if (oval > 0.9).any() else None
    likeness = np.zeros((h, w), np.float32)
    if skin is not None:
      tint = skin / max(float(skin.sum()), 1.0)
      own = image.astype(np.float32)
      total = own.sum(-1)
      apart = np.abs(own / np.maximum(total, 1)[..., None] - tint[None, None]).sum(-1)
      bright = total / max(float(skin.sum()), 1.0)
      loose = 0.12 + 0.3 * np.clip(0.6 - bright, 0, 1)  # skin in shadow has little colour
      likeness = np.exp(-((apart / loose) ** 2)) * np.clip((bright - 0.08) / 0.1, 0, 1)
    throat = np.stack([
      points[136, :2], points[365, :2],
      points[365, :2] + down * width * 0.5, points[136, :2] + down * width * 0.5,
    ])  # fmt: skip
    throat[2:] += down[None] * max(float((chin - throat[0]) @ down), 0.0)
    neck = fill_polygon(throat, h, w) * _blur(likeness, 2.0) * (1 - above)
    shares = {
      HAIR: hair * (1 - oval * (1 - hair)),
      FACE: np.maximum(person, oval) * above * (1 - hair),
      NECK: person * neck * (1 - hair),
      TORSO: person * (1 - above) * (1 - neck) * (1 - hair),
    }
    out = np.stack([shares[layer] for layer in LAYERS], -1)
    total = out.sum(-1) + (1 - person) * (1 - oval)
    return np.round(out * (255 / np.maximum(total, 1e-6))[..., None]).astype(np.uint8)


def _trim_hair(labels: UInt8[np.ndarray, "s s"]) -> UInt8[np.ndarray, "s s"]:
  """The parser's labels with hair taken back by a pixel: it draws hair too wide on all sides.

  By 1.5 pixels and more on the procedural person, and on real clips against the hair matte.
  """
  hair, around = PARSER_CLASSES[labels] == HAIR, np.pad(labels, 1, mode="edge")
  out = labels.copy()
  for rows, columns in ((0, 1), (2, 1), (1, 0), (1, 2)):
    beside = around[rows : rows + labels.shape[0], columns : columns + labels.shape[1]]
    edge = hair & (PARSER_CLASSES[beside] != HAIR)
    out[edge] = beside[edge]
  return out


def _claim_shoulders(layers: np.ndarray, person: np.ndarray, lips_row: float) -> np.ndarray:
  """Gives to the torso what the matte is sure of and the parser, used to faces, calls background.

  Bare shoulders above all. Only regions of some width below the lips: along edges, and about the
  hair, the parser is the sharper. `person` is the matte, 0..1, [PERSON_SIDE PERSON_SIDE].
  """
  h, w = layers.shape[:2]
  top = max(int(lips_row / h * PERSON_SIDE), 0)
  known = Image.fromarray(layers, "CMYK").resize((PERSON_SIDE, PERSON_SIDE))
  region = person > 0.9
  region[top:] &= np.asarray(known)[top:].sum(-1, dtype=np.uint16) < 128
  region[:top] = False
  if not region.any():
    return layers
  region = ndi.binary_opening(region, np.ones((5, 5), bool))
  if not region.any():
    return layers
  region = ndi.binary_dilation(region, np.ones((5, 5), bool))
  room = np.clip(255 - layers.sum(-1, dtype=np.int16), 0, 255)
  layers[..., LAYERS.index(TORSO)] += (_stretch(region * person, h, w) * room).astype(np.uint8)
  return layers


def smooth(layers: Iterable[np.ndarray | None]) -> Iterator[np.ndarray | None]:
  """Averages each frame's soft layers with its neighbours'; None stays None."""
  before: np.ndarray | None = None
  this: np.ndarray | None = None
  first = True
  for after in layers:
    if not first:
      yield _mix(before, this, after)
    before, this, first = this, after, False
  if not first:
    yield _mix(before, this, None)


def _mix(before, this, after):
  if this is None:
    return None
  out = this.astype(np.uint16) * SHARE[1]
  for neighbour, share in ((before, SHARE[0]), (after, SHARE[2])):
    out += (this if neighbour is None else neighbour) * np.uint16(share)
  return ((out + 128) >> 8).astype(np.uint8)


def carry(
  before: UInt8[np.ndarray, "h w c"],
  after: UInt8[np.ndarray, "h w c"],
  points_before: Float[np.ndarray, "p 3"],
  points_after: Float[np.ndarray, "p 3"],
  points: Float[np.ndarray, "p 3"],
  share: float,
) -> UInt8[np.ndarray, "h w c"]:
  """Soft layers of a frame between two whose layers are known, moved along with the landmarks.

  Each known frame's head is brought to where the landmarks say that it is now; torso and room
  stay. The two then mix.

  Args:
    before: layers of the earlier frame.
    after: layers of the later frame; both of one size.
    points_before: landmarks of the earlier frame, pixels.
    points_after: of the later frame.
    points: of the frame wanted.
    share: of the later frame in the mix, 0..1: how far the frame lies between the two.
  """
  late = round(256 * share)
  if late <= 0:
    return _bring(before, points_before, points)
  if late >= 256:
    return _bring(after, points_after, points)
  out = _bring(before, points_before, points) * np.uint16(256 - late)
  out += _bring(after, points_after, points) * np.uint16(late)
  return ((out + 128) >> 8).astype(np.uint8)


def _bring(layers, points_then, points_now) -> np.ndarray:
  """Layers seen at `points_then`, all but the torso moved to `points_now`.

  The head shifts, turns and grows as the upper face does, and about each landmark as that does
  (the jaw, the cheeks); under the chin the motion fades out.
  """
  h, w = layers.shape[:2]
  then, now = points_then[:468, :2], points_now[:468, :2]
  # Read as complex numbers, a turn with a scale is one factor. Not from lips and jaw: they speak.
  middle, shift = now[STEADY].mean(0), (then - now)[STEADY].mean(0)
  x, y = ((q[STEADY] - q[STEADY].mean(0)) @ (1, 1j) for q in (now, then))
  factor = np.vdot(x, y) / np.vdot(x, x)

  def whole(at: np.ndarray) -> np.ndarray:
    stretch = ((at - middle) @ (1, 1j)) * (factor - 1)
    return np.stack([stretch.real, stretch.imag], -1) + shift

  rest = then - now - whole(now)
  xs, ys = np.linspace(0, w, WARP_CELLS + 1), np.linspace(0, h, WARP_CELLS + 1)
  nodes = np.stack(np.meshgrid(xs, ys), -1)  # r c 2
  some = slice(None, None, 4)  # landmarks lie denser than the nodes
  apart = ((nodes[:, :, None] - now[some]) ** 2).sum(-1)
  top, chin = now[10], now[152]
  size = max(float(np.linalg.norm(chin - top)), 1.0)
  near = np.exp(-0.5 * apart / (0.08 * size) ** 2)
  local = near @ rest[some] / (near.sum(-1, keepdims=True) + 0.1)
  below = (nodes - chin) @ (chin - top) / size**2
  move = (whole(nodes) + local) * np.clip(1 - below / 0.4, 0, 1)[..., None]
  moved = np.linalg.norm(move, axis=-1) > 0.1
  if not moved.any():
    return layers
  # Only cells with a moved corner are drawn anew.
  cells = moved[:-1, :-1] | moved[1:, :-1] | moved[:-1, 1:] | moved[1:, 1:]
  source = np.clip(nodes + move, 0, [w, h])
  edges_x, edges_y = np.round(xs).astype(int), np.round(ys).astype(int)
  source += np.stack(np.meshgrid(edges_x - xs, edges_y - ys), -1)
  rows, columns = np.flatnonzero(cells.any(1)), np.flatnonzero(cells.any(0))
  r0, r1, c0, c1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
  left, upper = edges_x[c0], edges_y[r0]
  mesh = [
    (
      (edges_x[c] - left, edges_y[r] - upper, edges_x[c + 1] - left, edges_y[r + 1] - upper),
      (*source[r, c], *source[r + 1, c], *source[r + 1, c + 1], *source[r, c + 1]),
    )
    for r in range(r0, r1)
    for c in range(c0, c1)
  ]
  size_px = (edges_x[c1] - left, edges_y[r1] - upper)
  picture = Image.fromarray(layers, "CMYK")
  drawn = picture.transform(size_px, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
  out = layers.copy()
  head = slice(0, LAYERS.index(TORSO))
  out[upper : edges_y[r1], left : edges_x[c1], head] = np.asarray(drawn)[..., head]
  return out


def classify(layers: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w"]:
  """One class a pixel: the likeliest, without specks and holes; the inner mouth is still face."""
  h, w = layers.shape[:2]
  planes = [np.ascontiguousarray(layers[..., c]) for c in range(len(LAYERS))]
  likeliest, top = np.full((h, w), LAYERS[0], np.uint8), planes[0].copy()
  for label, plane in zip(LAYERS[1:], planes[1:], strict=True):
    likeliest[plane > top] = label
    np.maximum(top, plane, out=top)
  classes = likeliest.copy()
  classes[255 - layers.sum(-1, dtype=np.int16) >= top] = BACKGROUND
  # The person is one piece without holes.
  person = classes != BACKGROUND
  loose = _pieces(person, share=1.0)
  classes[loose] = BACKGROUND
  person &= ~loose
  hole = _pieces(~person, pixels=0.002 * h * w)
  classes[hole] = likeliest[hole]
  # Each layer loses its specks to what lies nearest.
  speck = np.zeros((h, w), bool)
  for label in LAYERS:
    speck |= _pieces(classes == label, share=0.1)
  if speck.any():
    lost = (speck | (classes == BACKGROUND))[::2, ::2]
    if not lost.all():
      nearest = ndi.distance_transform_edt(lost, return_distances=False, return_indices=True)
      r, c = np.nonzero(speck)
      at = 2 * np.asarray(nearest)[:, r // 2, c // 2]
      classes[r, c] = classes[at[0], at[1]]
  return classes


def open_mouth(
  classes: UInt8[np.ndarray, "h w"], outline: Float[np.ndarray, "n 2"]
) -> UInt8[np.ndarray, "h w"]:
  """Classes with the inner mouth in them, whose outline lips.outline gives in pixels.

  Pixels count that lie in it by more than half, but for crumbs: lips that all but touch are shut.
  """
  h, w = classes.shape
  inside = fill_polygon(outline, h, w) > 0.5
  if inside.any():
    box = _surround(inside, 0)
    width = float(np.ptp(outline[:, 0]))
    inside[box] &= ~_pieces(inside[box], share=0.1, pixels=CRUMB * width**2)
  return np.where(inside, np.uint8(MOUTH), classes)


def find_steadiness(
  earlier: UInt8[np.ndarray, "h w"],
  then: Float[np.ndarray, "p 3"],
  classes: UInt8[np.ndarray, "h w"],
  points: Float[np.ndarray, "p 3"],
) -> Float[np.ndarray, " c"]:
  """Overlap (IoU) of each of LAYERS with that of an earlier frame, moved along with the landmarks.

  1 where nothing flickers, however the head moves; NaN where neither frame has the class. The
  inner mouth, which opens and shuts of itself, is counted with the face.
  """
  before, whole = (
    np.where(c == MOUTH, FACE, c)[..., None] == LAYER_IDS for c in (earlier, classes)
  )
  moved = _bring(255 * before.astype(np.uint8), then, points) > 127
  both, either = (whole & moved).sum((0, 1)), (whole | moved).sum((0, 1))
  return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def find_jaw_agreement(
  classes: UInt8[np.ndarray, "h w"], points: Float[np.ndarray, "p 3"]
) -> float:
  """Share of the jaw's landmarks within 0.03 face heights of where the face's mask ends."""
  h, w = classes.shape
  face = np.isin(classes, (FACE, MOUTH))
  middle = points[marks.FACE_OVAL, :2].mean(0)
  jaw = points[marks.IBUG[2:15], :2]
  reach = 0.03 * float(np.linalg.norm(points[10, :2] - points[152, :2]))
  outward = (jaw - middle) / np.maximum(np.linalg.norm(jaw - middle, axis=1, keepdims=True), 1e-6)

  def inside(at: np.ndarray) -> np.ndarray:
    c, r = np.floor(at).astype(int).T
    return face[np.clip(r, 0, h - 1), np.clip(c, 0, w - 1)]

  return float((inside(jaw - reach * outward) & ~inside(jaw + reach * outward)).mean())


def find_teeth(
  image: UInt8[np.ndarray, "h w 3"],
  classes: UInt8[np.ndarray, "h w"],
  teeth: Float[np.ndarray, "3"],
) -> Bool[np.ndarray, "h w"]:
  """Pixels of the inner mouth nearer in hue to the clip's teeth than to its lips, and not dark.

  Tongue and gums are about as red as lips. `teeth` is lips.Look.teeth; pixels redder than
  RED_TEETH of the way from its teeth to its lips, or darker than DARK_TEETH of lips, are none.
  """
  mouth = classes == MOUTH
  out = np.zeros(mouth.shape, bool)
  if mouth.sum() < 12:
    return out
  box = _surround(mouth, 2)
  values = image[box].astype(np.float32)
  red = (values[..., 0] - values[..., 1]) / (values.sum(-1) + 30)
  pale, lip_red, lip_green = (float(x) for x in teeth)
  found = (red < pale + RED_TEETH * (lip_red - pale)) & (values[..., 1] > DARK_TEETH * lip_green)
  out[box] = ndi.binary_opening(found & mouth[box], np.ones((2, 2), bool))
  return out


class Plate:
  """Gathers the empty background from frames spread over the clip."""

  def __init__(self, frames: int):
    self._every = max(frames // PLATE_SAMPLES, 1)
    self._count = 0
    self._images: list[np.ndarray] = []
    self._away: list[np.ndarray] = []

  def wants(self) -> bool:
    """Whether the next frame is one to `add`; else `skip` it."""
    return self._count % self._every == 0

  def add(self, image: UInt8[np.ndarray, "h w 3"], classes: UInt8[np.ndarray, "h w"]) -> None:
    away = np.asarray(ndi.distance_transform_edt(classes == BACKGROUND))
    self._images.append(image)
    self._away.append(np.minimum(away, 255).astype(np.uint8))
    self._count += 1

  def skip(self) -> None:
    self._count += 1

  def finish(self) -> tuple[UInt8[np.ndarray, "h w 3"], float]:
    """The plate and the share of its pixels that were seen; the rest is painted in.

    A pixel is the median over the frames in which it lies clear of the person; where it never
    does, what it was when farthest from the person.
    """
    images, away = np.stack(self._images), np.stack(self._away)
    h, w = images.shape[1:3]
    clear = max(MARGIN * h, 4)
    plate = np.zeros((h, w, 3), np.float32)
    for r in range(0, h, 32):  # in strips, for the memory's sake
      rows = slice(r, r + 32)
      seen = (away[:, rows] > clear)[..., None]
      some = seen.any(0)
      values = np.where(seen, images[:, rows].astype(np.float32), np.nan)
      values[:, ~some[..., 0]] = 0
      plate[rows] = np.nanmedian(values, axis=0)
      best = np.argmax(away[:, rows], axis=0)[None, ..., None]
      last = np.take_along_axis(images[:, rows], best, axis=0)[0]
      plate[rows] = np.where(some, plate[rows], last)
    known = away.max(0) > clear / 2
    filled = fill_in(plate, known)
    return np.clip(np.round(filled), 0, 255).astype(np.uint8), float(known.mean())


def fill_in(
  image: Float[np.ndarray, "h w 3"], known: Bool[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w 3"]:
  """Unknown pixels from the known around them, ever coarser the farther those are."""
  if known.all() or not known.any():
    return image.copy()
  weight = known.astype(np.float32)
  sums = image.astype(np.float32) * weight[..., None]
  levels = [(sums, weight)]
  while min(levels[-1][1].shape) > 2 and (levels[-1][1] == 0).any():
    sums, weight = levels[-1]
    even = ((0, sums.shape[0] % 2), (0, sums.shape[1] % 2))
    sums, weight = np.pad(sums, (*even, (0, 0))), np.pad(weight, even)
    h, w = weight.shape
    sums = sums.reshape(h // 2, 2, w // 2, 2, 3).sum((1, 3))
    weight = weight.reshape(h // 2, 2, w // 2, 2).sum((1, 3))
    scale = np.minimum(1, 1 / np.maximum(weight, 1e-9))  # one full pixel is enough
    levels.append((sums * scale[..., None], weight * scale))
  sums, weight = levels[-1]
  total = (sums.reshape(-1, 3).sum(0) / max(weight.sum(), 1e-9))[None, None]
  guess = sums + (1 - weight)[..., None] * total
  for sums, weight in levels[-2::-1]:
    h, w = weight.shape
    up = np.stack([_stretch(guess[..., c], h, w) for c in range(3)], -1)
    guess = sums + (1 - weight)[..., None] * up
  return np.where(known[..., None], image, guess)


def put_behind(
  image: UInt8[np.ndarray, "h w 3"],
  classes: UInt8[np.ndarray, "h w"],
  plate: UInt8[np.ndarray, "h w 3"],
) -> UInt8[np.ndarray, "h w 3"]:
  """The person over the plate: what training aims at."""
  return np.where((classes == BACKGROUND)[..., None], plate, image)


def cut_torso(
  image: UInt8[np.ndarray, "h w 3"], classes: UInt8[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 4"]:
  """Neck and torso, opaque, carried on upwards under the head.

  Each column of the neck goes on by a tenth of the picture, of the torso by a fiftieth
  (method.md E.6). The torso does so in the colour at its upper end, a little darker with every
  row; the neck in that of its skin below, into which the chin's shadow at its upper end fades:
  where a head that moves bares it, the shadow has moved too.
  """
  h, w = classes.shape
  head = np.isin(classes, (FACE, HAIR, MOUTH))
  body = np.isin(classes, (NECK, TORSO))
  colour = image.astype(np.float32)
  covered = body.copy()
  painted = np.zeros((h, w), bool)
  inset = max(round(h / 128), 1)
  # The upper end of a column: body whose neighbour above is head.
  ends = np.zeros((h, w), bool)
  ends[1:] = body[1:] & head[:-1]
  skin = _find_neck_skin(image, classes, ends)
  for column in np.flatnonzero(ends.any(0)):
    row = int(np.argmax(ends[:, column]))
    is_neck = classes[row, column] == NECK
    reach = round(h * (53 if is_neck else 9) / 512)
    run = body[row : row + 2 * inset + 1, column]
    depth = int(np.argmin(run)) if not run.all() else len(run)
    begin = min(inset, max(depth - 1, 0)) if is_neck else 0
    source = colour[row + begin : row + max(depth, begin + 1), column].mean(0)
    top = max(row + begin - reach, 0)
    steps = np.arange(row + begin - top, 0, -1)[:, None]
    if is_neck:
      own = skin[column]
      colour[top : row + begin, column] = own + (source - own) * np.exp(-steps * (64 / h))
    else:
      colour[top : row + begin, column] = source * 0.98**steps
    covered[top : row + begin, column] = True
    painted[top : row + begin, column] = True
  # Smooth what was painted, across columns above all, without the picture's own pixels.
  fresh = painted & ~body
  if fresh.any():
    box = _surround(fresh, 12)  # the filters reach no farther
    weight = np.maximum(ndi.gaussian_filter(covered[box].astype(np.float32), (2, 3)), 1e-3)
    known = colour[box] * covered[box][..., None]
    soft = ndi.gaussian_filter(known, (2, 3, 0)) / weight[..., None]
    colour[box] = np.where(fresh[box][..., None], soft, colour[box])
  out = np.zeros((h, w, 4), np.uint8)
  shown = np.where(covered[..., None], colour, 0)
  np.round(shown, out=shown)
  out[..., :3] = np.clip(shown, 0, 255, out=shown)
  out[..., 3] = covered * np.uint8(255)
  return out


def _find_neck_skin(
  image: UInt8[np.ndarray, "h w 3"],
  classes: UInt8[np.ndarray, "h w"],
  ends: Bool[np.ndarray, "h w"],
) -> Float32[np.ndarray, "w 3"]:
  """The colour of the neck below its upper end, column by column, changing slowly across."""
  h, w = classes.shape
  colours, weights = np.zeros((w, 3), np.float32), np.full(w, 1e-9, np.float32)
  for column in np.flatnonzero((ends & (classes == NECK)).any(0)):
    row = int(np.argmax(ends[:, column]))
    rows = row + np.flatnonzero(classes[row : row + max(h // 10, 4), column] == NECK)
    rows = rows[len(rows) // 3 :]  # the first third lies in the chin's shadow
    weights[column] = len(rows)
    colours[column] = np.median(image[rows, column], axis=0) if len(rows) else 0
  total = ndi.gaussian_filter1d(weights, h / 64)
  sums = ndi.gaussian_filter1d(colours * weights[:, None], h / 64, axis=0)
  return sums / np.maximum(total, 1e-6)[:, None]


def fill_polygon(
  points: Float[np.ndarray, "n 2"], height: int, width: int
) -> Float32[np.ndarray, "h w"]:
  """How much of each pixel a polygon in pixels covers, 0..1."""
  out = np.zeros((height, width), np.float32)
  fine = 8
  low = np.clip(np.floor(points.min(0)).astype(int) - 1, 0, [width, height])
  high = np.clip(np.ceil(points.max(0)).astype(int) + 1, 0, [width, height])
  size = high - low
  if (size <= 0).any():
    return out
  canvas = Image.new("L", (int(size[0]) * fine, int(size[1]) * fine))
  corners = [(float(x), float(y)) for x, y in (points - low) * fine - 0.5]
  ImageDraw.Draw(canvas).polygon(corners, fill=1)
  cover = np.asarray(canvas, np.float32).reshape(size[1], fine, size[0], fine).mean((1, 3))
  out[low[1] : high[1], low[0] : high[0]] = cover
  return out


def _pieces(
  mask: Bool[np.ndarray, "h w"], *, share: float = 0.0, pixels: float = 0.0
) -> Bool[np.ndarray, "h w"]:
  """The connected pieces of a mask with fewer pixels than `pixels` or `share` of the largest's."""
  pieces = np.zeros(mask.shape, np.int32)
  count = int(np.asarray(ndi.label(mask, output=pieces)))
  if not count:
    return mask
  sizes = np.bincount(pieces.ravel())
  sizes[0] = 0
  small = sizes < max(pixels, share * sizes.max())
  small[0] = False
  return small[pieces] if small.any() else np.zeros_like(mask)


def _surround(mask: Bool[np.ndarray, "h w"], margin: int) -> tuple[slice, slice]:
  """The rows and columns that hold all of a mask that is not empty, and `margin` more."""
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  return (
    slice(max(int(rows[0]) - margin, 0), int(rows[-1]) + margin + 1),
    slice(max(int(columns[0]) - margin, 0), int(columns[-1]) + margin + 1),
  )


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
  return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _stretch(layer: np.ndarray, height: int, width: int) -> Float32[np.ndarray, "h w"]:
  picture = Image.fromarray(np.asarray(layer, np.float32))
  return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def _blur(layer: np.ndarray, sigma: float) -> np.ndarray:
  return ndi.gaussian_filter(layer.astype(np.float32), sigma)


