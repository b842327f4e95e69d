"""Refines the head's poses on the pictures themselves.

Landmark networks take expressions for nods: a raised brow lifts the whole face. The picture knows
better. Some two hundred anchors, small patches of skin, hair and ears, are chosen where the
picture has texture, and every sampled frame is compared with what the clip on the whole shows
there (Lucas-Kanade). From how far each anchor seems to have moved, all its places in the head and
all poses are solved at once, again and again, from coarse patches to fine. An anchor counts by how
firmly its texture holds it, and less, the more it moves by itself: brows, nostrils, the head's
outline and what lies behind it are found out by that, while hair, temples and the eyes' corners
hold the head. Brightness, contrast and shading across a patch are taken out, since light stays
where it is when the head turns. The focal length is found beforehand by anchors
likewise, in the calmest frames and by the firmest anchors (bundle adjustment), since expression
and the head's outline would say it wrong, and landmarks hardly know it. Where the head hardly
turns, anchors know as little, and what the landmarks said stays.

The head's axes and the camera's are those of `track`.
Axes: f frames, s sampled frames, n anchors, k pixels of a patch, l levels, h w pixels.
"""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.interpolate
import scipy.ndimage
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from scipy.spatial.transform import Rotation

from uajax.errors import UserError
from uajax.preprocess import landmarks, track, workers

SAMPLES = 60  # frames that the anchors are learnt from
FACE_PX = 200  # height of a face whose patches are read pixel by pixel
SIDE = 13  # of a patch, pixels of such a face
LEAST_PX = 0.6  # pixels of the picture that such a pixel takes, however small the face
CELL = 12  # each square of so many pixels may hold one anchor,
MOST = 260  # the best textured ones
FEWEST = 12  # anchors without which poses stay what they were
STILL = 0.25  # anchors lie where expression moves the face less than this says (track.stillness)
# Head and ears about the face's points: an ellipsoid in the head's axes, metres; anchors may lie
# somewhat off it, since its outline is not the person's. Their depths are found.
MIDDLE, SEMI_AXES, REACH = np.array([0.0, 0.02, -0.045]), np.array([0.078, 0.11, 0.09]), 1.2
DEPTH_SPREAD_M = 0.025  # how far an anchor lies from there
LEVELS = (3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0)  # pixels of a patch, in order
FINAL_LEVELS = ((2.0, 2), (1.0, 3))  # the same for one frame, and how often each
BLUR = 0.6  # of a level's pixels
WANDER_PX = (0.1, 1.5)  # least that an anchor moves by itself, and at first; of FACE_PX
GREY = 0.5  # squared noise of a picture, levels of 255
ALIKE = 30.0  # errors of neighbouring anchors and pixels are alike: so many count as one
# How far landmarks may mislead a pose, as far as the anchors' own places go: radians, metres.
TRUST = np.array([0.05, 0.05, 0.05, 0.02, 0.02, 0.02])
LOOSE_M = 2.0  # the same for the distance while anchors are placed: with it goes their scale
CALM = 0.37  # share of the frames, those of least expression, in which the focal length is sought,
FIRM = 0.45  # and of the anchors, those that wander least, by which it is
# Blendshapes that tell an expression; the jaw, as it speaks, leaves the upper face still.
UPPER = ("brow", "cheek", "eyeBlink", "eyeSquint", "eyeWide", "mouthFrown", "mouthSmile", "nose")
FOCAL_ROUNDS = 12  # of Gauss-Newton, at most

_ROW = np.arange(SIDE) - SIDE // 2
_RIGHT, _DOWN = (x.ravel().astype(np.float32) for x in np.meshgrid(_ROW, _ROW))
_WINDOW = np.exp(-0.5 * (_RIGHT**2 + _DOWN**2) / (SIDE / 3) ** 2)
_RAMPS = np.linalg.qr(np.stack([np.ones_like(_RIGHT), _RIGHT, _DOWN], 1))[0].astype(np.float32)


class Anchors(NamedTuple):
  """What `learn` found of a head's texture."""

  points: Float[np.ndarray, "n 3"]  # in the head's axes, metres
  tangents: Float[np.ndarray, "n 2 3"]  # along the surface: right and down, a pixel of FACE_PX
  patches: Float[np.ndarray, "l n k"]  # at FINAL_LEVELS
  noise: Float[np.ndarray, "l n"]  # squared, of a pixel of a patch
  wander: Float[np.ndarray, " n"]  # square of how far an anchor moves by itself, px
  focal_px: float
  unit_px: float  # a pixel of FACE_PX


def choose_frames(found: track.Track, present: Bool[np.ndarray, " f"]) -> list[int]:
  """Frames to learn from, spread over those in which the face is; the plainest is the first."""
  seen = np.flatnonzero(present)
  picked = seen[np.unique(np.linspace(0, len(seen) - 1, SAMPLES).astype(int))]
  # Nearest to the average pose and expression: anchors are chosen in it.
  turns = Rotation.from_matrix(found.viewmats[picked, :3, :3])
  far = (turns * turns.mean().inv()).magnitude()
  far = far + 0.02 * np.linalg.norm(found.coefficients[picked], axis=1)
  picked = picked.tolist()
  picked.insert(0, picked.pop(int(np.argmin(far))))
  return picked


def to_grey(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
  """Luma."""
  return np.asarray(Image.fromarray(image).convert("L"))


def choose_calm_frames(
  present: Bool[np.ndarray, " f"], scores: Float[np.ndarray, "f b"]
) -> list[int]:
  """Frames to find the focal length in; the calmest, in which anchors are chosen, is the first."""
  seen = np.flatnonzero(present)
  upper = scores[seen][:, [name.startswith(UPPER) for name in landmarks.BLENDSHAPES]]
  apart = np.abs(upper - np.median(upper, 0)) / (upper.std(0) + 0.02)
  restless = (np.clip(apart, 0, 3) ** 2).sum(1)
  order = np.argsort(restless, kind="stable")
  calm = np.sort(order[: max(round(CALM * len(seen)), SAMPLES)])
  picked = calm[np.unique(np.linspace(0, len(calm) - 1, SAMPLES).astype(int))].tolist()
  picked.insert(0, picked.pop(int(np.argmin(restless[picked]))))
  return seen[picked].tolist()


def refocus(found: track.Track, focal_px: float, focal_spread: float) -> track.Track:
  """The track under another focal length: the head farther away, and as large."""
  viewmats = found.viewmats.copy()
  viewmats[:, 2, 3] *= focal_px / found.focal_px
  return found._replace(viewmats=viewmats, focal_px=focal_px, focal_spread=focal_spread)


def find_focal(
  pictures: Sequence[UInt8[np.ndarray, "h w"]],
  viewmats: Float[np.ndarray, "s 4 4"],
  found: track.Track,
  still: Float[np.ndarray, " p"],
  advance=lambda: None,
) -> tuple[float, float]:
  """Focal length in pixels, and the standard deviation of its logarithm.

  What landmarks said of it, within `found.focal_spread`, counts as one more observation.

  Args:
    pictures: grey, of calm frames.
    viewmats: as `learn` has them.
    found: as `learn` has it.
    still: as `learn` has it.
    advance: called after each of len(LEVELS) rounds.
  """
  placed = _place(pictures, viewmats, found, still, advance)
  if placed is None:
    return found.focal_px, found.focal_spread
  return _bundle(pictures, *placed, found.focal_spread)


def learn(
  pictures: Sequence[UInt8[np.ndarray, "h w"]],
  viewmats: Float[np.ndarray, "s 4 4"],
  found: track.Track,
  still: Float[np.ndarray, " p"],
  advance=lambda: None,
) -> Anchors | None:
  """Chooses anchors in the first picture, and finds where in the head they lie.

  Args:
    pictures: grey.
    viewmats: their poses by landmarks.
    found: what landmarks said of face and camera.
    still: of the face's points, 0..1 (track.stillness).
    advance: called after each of len(LEVELS) rounds.

  Returns:
    None where the head has too little texture.
  """
  placed = _place(pictures, viewmats, found, still, advance)
  if placed is None:
    return None
  viewmats, anchors = placed
  final = []
  for level, _ in FINAL_LEVELS:
    sights = _see_all(pictures, viewmats, anchors, level)
    patches, weights = _average(sights)
    energy = _compare(sights, patches)[2]
    final.append((patches, np.average(energy, 0, weights + 1e-6)))
  patches, noise = (np.stack(x).astype(np.float32) for x in zip(*final, strict=True))
  return anchors._replace(patches=patches, noise=noise)


def follow(
  picture: UInt8[np.ndarray, "h w"], viewmat: Float[np.ndarray, "4 4"], anchors: Anchors
) -> tuple[Float[np.ndarray, "4 4"], Float[np.ndarray, "6 6"]]:
  """One frame's pose, near to what landmarks said, and how firmly it is known."""
  start = viewmat
  firm = np.diag(1 / TRUST**2)
  information = firm
  for which, (level, rounds) in enumerate(FINAL_LEVELS):
    blurred, corner = _blur(picture, viewmat, anchors, level)
    for _ in range(rounds):
      sight = _see(blurred, corner, picture.shape, viewmat, anchors, level)
      sights = _Sight(*(x[None] for x in sight))
      info, pull, energy = _compare(sights, anchors.patches[which])
      noise = anchors.noise[which]
      trust = sights.facing / (1 + energy / (3 * noise)) / (noise + GREY)
      info, pull = _weigh(info, pull, trust, anchors.wander)
      by_pose = sight.by_pose
      information = firm + np.einsum("nia,nij,njb->ab", by_pose, info[0], by_pose, optimize=True)
      rhs = np.einsum("nia,ni->a", by_pose, pull[0]) + firm @ _apart(viewmat, start)
      viewmat = _move(viewmat, -np.linalg.solve(information, rhs))
  return viewmat, information


def follow_piece(
  into: pathlib.Path,
  piece: workers.Piece,
  images: UInt8[np.ndarray, "f h w 3"],
  anchors_file: pathlib.Path,
  viewmats: Float[np.ndarray, "f 4 4"],
) -> int:
  """Poses of a piece and their information, saved; returns the number of frames."""
  found = workers.load(anchors_file)
  if found is None:
    raise UserError(f"{anchors_file} is damaged: remove {into.parent} and run again")
  numbers = {name: found[name].item() for name in ("focal_px", "unit_px")}
  anchors = Anchors(**{name: numbers.get(name, found[name]) for name in Anchors._fields})
  poses = [follow(to_grey(image), start, anchors)
           for image, start in zip(images, viewmats, strict=True)]  # fmt: skip
  workers.save(
    workers.result(into, piece),
    viewmats=np.stack([viewmat for viewmat, _ in poses]),
    information=np.stack([information for _, information in poses]),
  )
  return len(images)


class _Sight(NamedTuple):
  """Anchors as frames show them; leading axes s n."""

  patches: Float[np.ndarray, "s n k"]  # without brightness and shading
  stretch: Float[np.ndarray, "s n 2 2"]  # pixels of the picture a pixel of the patch, transposed
  by_pose: Float[np.ndarray, "s n 2 6"]  # derivatives of the pixel
  by_point: Float[np.ndarray, "s n 2 3"]
  facing: Float[np.ndarray, "s n"]  # 0: turned away or outside, 1: seen well


def _place(pictures, viewmats, found, still, advance):
  """Poses of the pictures, and anchors that lack their patches; None where they are too few."""
  height = np.ptp(found.shape[:468, 1])
  unit = max(found.focal_px * height / np.median(viewmats[:, 2, 3]) / FACE_PX, LEAST_PX)
  points, tangents = _choose(pictures[0], viewmats[0], found, still, unit)
  if len(points) < FEWEST:
    return None
  wander = np.full(len(points), (WANDER_PX[1] * unit) ** 2)
  none = np.zeros((0, len(points), SIDE**2), np.float32)
  anchors = Anchors(points, tangents, none, none[..., 0], wander, found.focal_px, unit)
  start = viewmats.copy()
  for level in LEVELS:
    viewmats, anchors = _adjust(pictures, viewmats, anchors, level, start, points)
    advance()
  return viewmats, anchors


def _choose(picture, viewmat, found, still, unit):
  """Points [n 3] and tangents [n 2 3] of anchors: where the picture has corners, well spread."""
  step = 0.0015
  x, y = np.meshgrid(np.arange(-0.09, 0.09, step), np.arange(-0.12, 0.14, step))
  face = scipy.interpolate.LinearNDInterpolator(
    found.shape[:468, :2], np.stack([found.shape[:468, 2], still[:468]], 1)
  )(np.stack([x, y], -1))
  square = ((x - MIDDLE[0]) / SEMI_AXES[0]) ** 2 + ((y - MIDDLE[1]) / SEMI_AXES[1]) ** 2
  round_ = MIDDLE[2] + SEMI_AXES[2] * np.sqrt(np.clip(1 - square, 0, None))
  beyond = np.isnan(face[..., 0])
  z = np.where(beyond, round_, face[..., 0])
  wanted = np.where(beyond, (square < REACH) & (y > -0.02), face[..., 1] > STILL)
  down, right = np.gradient(scipy.ndimage.gaussian_filter(z, 3), step)
  slopes = np.clip(np.stack([right, down], -1), -2, 2)
  normals = np.concatenate([-slopes, np.ones_like(slopes[..., :1])], -1).reshape(-1, 3)
  normals /= np.linalg.norm(normals, axis=1, keepdims=True)
  points = np.stack([x, y, z], -1).reshape(-1, 3)
  at = points @ viewmat[:3, :3].T + viewmat[:3, 3]
  pixels = found.focal_px * at[:, :2] / at[:, 2:] + np.array(picture.shape[::-1]) / 2
  margin = (SIDE // 2 + 2) * unit
  inside = ((pixels > margin) & (pixels < np.array(picture.shape[::-1]) - margin)).all(1)
  wanted = wanted.ravel() & inside & (_cosine(normals, at, viewmat) > 0.15)

  smooth = scipy.ndimage.gaussian_filter(picture.astype(np.float32), unit)
  dy, dx = np.gradient(smooth)
  a, b, c = (scipy.ndimage.gaussian_filter(p, 3 * unit) for p in (dx * dx, dx * dy, dy * dy))
  corners = (a + c) / 2 - np.sqrt((a - c) ** 2 / 4 + b * b)  # smaller eigenvalue
  score = scipy.ndimage.map_coordinates(corners, (pixels - 0.5)[:, ::-1].T, order=1, cval=0)
  ids = np.flatnonzero(wanted & (score > 0))
  ids = ids[np.argsort(-score[ids], kind="stable")]
  _, first = np.unique((pixels[ids] // (CELL * unit)).astype(int), axis=0, return_index=True)
  ids = ids[np.sort(first)[:MOST]]
  right = np.cross([0.0, 1.0, 0.0], normals[ids])
  right /= np.linalg.norm(right, axis=1, keepdims=True)
  pixel_m = unit * viewmat[2, 3] / found.focal_px
  return points[ids], pixel_m * np.stack([right, np.cross(right, normals[ids])], 1)


def _cosine(normals, at, viewmat) -> Float[np.ndarray, " n"]:
  """Of the angle between a surface and the way to the camera."""
  away = at / np.linalg.norm(at, axis=1, keepdims=True)
  return -((normals @ viewmat[:3, :3].T) * away).sum(1)


def _blur(picture, viewmat, anchors: Anchors, level):
  """The blurred part of the picture in which the head is, and its upper left corner (x, y)."""
  at = anchors.points @ viewmat[:3, :3].T + viewmat[:3, 3]
  pixels = anchors.focal_px * at[:, :2] / at[:, 2:] + np.array(picture.shape[::-1]) / 2
  margin = 1.5 * SIDE * level * anchors.unit_px
  low = np.clip(pixels.min(0) - margin, 0, None).astype(int)
  high = np.clip(pixels.max(0) + margin, low + 2, picture.shape[::-1]).astype(int)
  low = np.minimum(low, high - 2)
  part = picture[low[1] : high[1], low[0] : high[0]].astype(np.float32)
  return scipy.ndimage.gaussian_filter(part, BLUR * level * anchors.unit_px, truncate=3), low


def _see(blurred, corner, size, viewmat, anchors: Anchors, level) -> _Sight:
  """The anchors of one frame, without the leading axis."""
  rotation, focal = viewmat[:3, :3], anchors.focal_px
  at, by_pose, by_point = _derive(viewmat, anchors.points, focal)
  flat, z = at[:, :2] / at[:, 2:], at[:, 2]
  pixels = focal * flat + np.array(size[::-1]) / 2
  along = level * anchors.tangents @ rotation.T
  stretch = (focal / z)[:, None, None] * (along[..., :2] - along[..., 2:] * flat[:, None])
  places = (pixels - 0.5 - corner)[..., None] + (
    stretch[:, 0, :, None] * _RIGHT + stretch[:, 1, :, None] * _DOWN
  )  # n 2 k
  patches = scipy.ndimage.map_coordinates(
    blurred, [places[:, 1], places[:, 0]], order=1, mode="nearest", output=np.float32
  )
  normals = np.cross(anchors.tangents[:, 1], anchors.tangents[:, 0])
  normals /= np.linalg.norm(normals, axis=1, keepdims=True)
  inside = ((pixels > 2) & (pixels < np.array(size[::-1]) - 2)).all(1)
  facing = inside * np.clip((_cosine(normals, at, viewmat) - 0.1) / 0.2, 0, 1)
  return _Sight(_level(patches), stretch, by_pose, by_point, facing)


def _derive(viewmat, points, focal):
  """Points in the camera's axes [n 3], and their pixels' derivatives: [n 2 6], [n 2 3]."""
  turned = points @ viewmat[:3, :3].T
  at = turned + viewmat[:3, 3]
  at[:, 2] = np.maximum(at[:, 2], 1e-2)
  x, y, z = at.T
  zero = np.zeros_like(z)
  by_place = (focal / z)[:, None, None] * np.stack(
    [np.stack([zero + 1, zero, -x / z], -1), np.stack([zero, zero + 1, -y / z], -1)], 1
  )
  a, b, c = turned.T
  cross = np.stack(
    [np.stack([zero, c, -b], -1), np.stack([-c, zero, a], -1), np.stack([b, -a, zero], -1)], 1
  )
  by_pose = np.concatenate([by_place @ cross, by_place], -1)
  return at, by_pose, by_place @ viewmat[:3, :3]


def _see_all(pictures, viewmats, anchors: Anchors, level) -> _Sight:
  sights = []
  for picture, viewmat in zip(pictures, viewmats, strict=True):
    blurred, corner = _blur(picture, viewmat, anchors, level)
    sights.append(_see(blurred, corner, picture.shape, viewmat, anchors, level))
  return _Sight(*(np.stack(x) for x in zip(*sights, strict=True)))


def _level(patches: Float[np.ndarray, "... k"]) -> Float[np.ndarray, "... k"]:
  """Patches without their mean and slope."""
  return patches - (patches @ _RAMPS) @ _RAMPS.T


def _average(sights: _Sight) -> tuple[Float[np.ndarray, "n k"], Float[np.ndarray, "s n"]]:
  """What the frames show of each anchor, and how well each frame agrees."""
  weights = sights.facing
  patches = np.zeros(sights.patches.shape[1:], np.float32)
  for _ in range(3):
    total = np.maximum(weights.sum(0), 1e-6)
    patches = np.einsum("sn,snk->nk", weights / total, sights.patches, optimize=True)
    error = ((sights.patches - patches) ** 2) @ (_WINDOW / _WINDOW.sum())
    weights = sights.facing / (1 + error / (3 * np.median(error, axis=0) + 1e-6))
  return patches, weights


def _compare(sights: _Sight, patches: Float[np.ndarray, "n k"]):
  """Lucas-Kanade: normal equations of the pixels by which anchors are off.

  Returns information [s n 2 2], pull [s n 2] (the gradient) and the squared error of a pixel
  [s n], all in units of squared grey.
  """
  grid = patches.reshape(-1, SIDE, SIDE)
  down, right = np.gradient(grid, axis=1), np.gradient(grid, axis=2)
  slopes = _level(np.stack([right, down], 1).reshape(len(patches), 2, -1))
  norm = np.maximum((patches**2) @ _WINDOW, 1e-6)
  gain = np.clip(
    np.einsum("snk,nk->sn", sights.patches, patches * _WINDOW, optimize=True) / norm, 0.5, 2
  )
  error = sights.patches - gain[..., None] * patches
  weighted = slopes * _WINDOW
  own = gain[..., None, None] ** 2 * np.einsum("nik,njk->nij", weighted, slopes, optimize=True)
  pull = gain[..., None] * np.einsum("snk,nik->sni", error, weighted, optimize=True)
  inverse = np.linalg.inv(sights.stretch + 1e-6 * np.eye(2))  # of one seen edge-on, too
  information = inverse @ own @ inverse.swapaxes(-1, -2)
  return information, (inverse @ pull[..., None])[..., 0], error**2 @ (_WINDOW / _WINDOW.sum())


def _weigh(information, pull, trust, wander):
  """Normal equations of anchors that also move by themselves, as many as count."""
  information, pull = information * trust[..., None, None], pull * trust[..., None]
  share = np.linalg.inv(np.eye(2) + information * wander[:, None, None]) / ALIKE
  information = share @ information
  information = (information + information.swapaxes(-1, -2)) / 2
  return information, (share @ pull[..., None])[..., 0]


def _find_wander(information, pull, use, wander, unit) -> Float[np.ndarray, " n"]:
  """Square of how far each anchor moves by itself: expectation maximisation."""
  for _ in range(3):
    spread = np.linalg.inv(information + np.eye(2) / wander[:, None, None])
    moved = (spread @ pull[..., None])[..., 0]
    each = ((moved**2).sum(-1) + np.trace(spread, axis1=2, axis2=3)) / 2
    few = (0.3 * unit) ** 2  # what an anchor is taken for that is never seen
    wander = ((each * use).sum(0) + few) / (use.sum(0) + 1) + (WANDER_PX[0] * unit) ** 2
  return wander


def _adjust(pictures, viewmats, anchors: Anchors, level, start, places):
  """One Gauss-Newton step of all poses and anchors, drawn towards `start` and `places`."""
  sights = _see_all(pictures, viewmats, anchors, level)
  patches, weights = _average(sights)
  information, pull, energy = _compare(sights, patches)
  trust = weights / (np.average(energy, 0, weights + 1e-6) + GREY)
  wander = _find_wander(
    information * trust[..., None, None], pull * trust[..., None], weights > 0.05, anchors.wander,
    anchors.unit_px,
  )  # fmt: skip
  information, pull = _weigh(information, pull, trust, wander)
  loose = np.append(TRUST[:5], LOOSE_M)
  apart = np.stack([_apart(*pair) for pair in zip(viewmats, start, strict=True)])
  away = anchors.points - places
  steps, _, moved, _ = _solve(
    information, pull, sights.by_pose, np.zeros_like(pull), sights.by_point,
    (1 / loose**2, apart / loose**2), (1.0, 0.0), away,
  )  # fmt: skip
  viewmats = np.stack([_move(*pair) for pair in zip(viewmats, steps, strict=True)])
  return viewmats, anchors._replace(points=anchors.points + moved, wander=wander)


def _bundle(pictures, viewmats, anchors: Anchors, spread: float) -> tuple[float, float]:
  """Focal length that agrees best, and the spread of its logarithm: bundle adjustment.

  The poses are free, since the landmarks' turn more or less with the focal length that they were
  found with. Only the firmest anchors have a say: those on the head's outline, which slide over it
  as the head turns, and those that expression moves pull it to a wide angle.
  """
  firm = anchors.wander <= np.quantile(anchors.wander, FIRM)
  few = anchors._replace(
    **{name: getattr(anchors, name)[firm] for name in ("points", "tangents", "wander")}
  )
  sights = _see_all(pictures, viewmats, few, LEVELS[-1])
  patches, weights = _average(sights)
  information, slope, energy = _compare(sights, patches)
  trust = weights / (np.average(energy, 0, weights + 1e-6) + GREY) / ALIKE
  information, slope = information * trust[..., None, None], slope * trust[..., None]
  points, wander, focal, begun = few.points, few.wander, few.focal_px, None
  known = 1 / spread**2
  for _ in range(FOCAL_ROUNDS):
    derived = zip(*[_derive(viewmat, points, focal) for viewmat in viewmats], strict=True)
    at, by_pose, by_point = (np.stack(x) for x in derived)
    pixels = focal * at[..., :2] / at[..., 2:]
    begun = pixels if begun is None else begun
    pull = slope + (information @ (pixels - begun)[..., None])[..., 0]
    # With the focal length the distance grows, and the head stays as large.
    by_focal = pixels * (1 - viewmats[:, None, 2, 3, None] / at[..., 2:])
    wander = _find_wander(information, pull, weights > 0.05, wander, few.unit_px)
    share = np.linalg.inv(np.eye(2) + information * wander[:, None, None])
    steps, longer, moved, spread = _solve(
      share @ information, (share @ pull[..., None])[..., 0], by_pose, by_focal, by_point,
      (np.full(6, 1e-3), np.zeros((len(viewmats), 6))),
      (known, known * np.log(focal / few.focal_px)), points - few.points,
    )  # fmt: skip
    viewmats = np.stack([_move(*pair) for pair in zip(viewmats, steps, strict=True)])
    viewmats[:, 2, 3] *= np.exp(longer)
    points, focal = points + moved, float(focal * np.exp(longer))
    if abs(longer) < 1e-3:
      break
  return focal, float(spread)


def _solve(information, pull, by_pose, by_focal, by_point, pose_prior, focal_prior, away):
  """A Gauss-Newton step; the anchors' places are eliminated (Schur complement).

  Args:
    information: of each anchor's pixel in each frame, [s n 2 2].
    pull: the gradient there, [s n 2].
    by_pose: derivatives of the pixel, [s n 2 6].
    by_focal: by the focal length's logarithm, [s n 2].
    by_point: [s n 2 3].
    pose_prior: information [6] and gradient [s 6].
    focal_prior: information and gradient.
    away: how far the anchors are from where they are drawn to, [n 3].

  Returns:
    Steps of the poses [s 6], of the focal length's logarithm and of the anchors [n 3], and the
    standard deviation of that logarithm.
  """
  count, points = pull.shape[:2]
  tied, bound = information @ by_pose, (information @ by_focal[..., None])[..., 0]
  own = np.einsum("snia,snib->sab", by_pose, tied, optimize=True) + np.diag(pose_prior[0])
  lhs = np.zeros((6 * count + 1, 6 * count + 1))
  lhs[:-1, :-1].reshape(count, 6, count, 6)[np.arange(count), :, np.arange(count)] = own
  lhs[-1, :-1] = lhs[:-1, -1] = np.einsum("snia,sni->sa", by_pose, bound, optimize=True).ravel()
  lhs[-1, -1] = (by_focal * bound).sum() + focal_prior[0]
  rhs = np.einsum("snia,sni->sa", by_pose, pull, optimize=True) + pose_prior[1]
  rhs = np.append(rhs, (by_focal * pull).sum() + focal_prior[1])
  face = np.einsum("snia,snib->nab", by_point, information @ by_point, optimize=True)
  face = face + np.eye(3) / DEPTH_SPREAD_M**2
  tug = np.einsum("snia,sni->na", by_point, pull, optimize=True) + away / DEPTH_SPREAD_M**2
  both = np.einsum("snia,snib->nbsa", tied, by_point, optimize=True).reshape(points, 3, -1)
  last = np.einsum("sni,snib->nb", bound, by_point, optimize=True)
  both = np.concatenate([both, last[..., None]], -1)
  solved = np.linalg.solve(face, np.concatenate([both, tug[..., None]], -1))
  lhs -= np.tensordot(both, solved[..., :-1], ([0, 1], [0, 1]))
  rhs -= np.tensordot(both, solved[..., -1], ([0, 1], [0, 1]))
  step = -np.linalg.solve(lhs, rhs)
  moved = -solved[..., -1] - solved[..., :-1] @ step
  sure = lhs[-1, -1] - lhs[-1, :-1] @ np.linalg.solve(lhs[:-1, :-1], lhs[:-1, -1])
  return (
    np.clip(step[:-1].reshape(count, 6), -0.05, 0.05), np.clip(step[-1], -0.15, 0.15),
    np.clip(moved, -0.005, 0.005), 1 / np.sqrt(max(sure, 1e-9)),
  )  # fmt: skip


def _move(viewmat: Float[np.ndarray, "4 4"], step: Float[np.ndarray, "6"]) -> np.ndarray:
  """The pose turned and shifted in the camera's axes."""
  out = viewmat.copy()
  out[:3, :3] = Rotation.from_rotvec(step[:3]).as_matrix() @ viewmat[:3, :3]
  out[:3, 3] += step[3:]
  return out


def _apart(viewmat: Float[np.ndarray, "4 4"], start: Float[np.ndarray, "4 4"]) -> np.ndarray:
  """The step that leads from `start` to the pose, [6]."""
  turn = Rotation.from_matrix(viewmat[:3, :3] @ start[:3, :3].T).as_rotvec()
  return np.concatenate([turn, viewmat[:3, 3] - start[:3, 3]])
