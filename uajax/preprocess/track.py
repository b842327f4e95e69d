"""Tracks the head: one camera, one face, and a pose a frame, fitted to the whole clip at once.

The face is a set of points, one a landmark: its own still shape, drawn towards the landmark
networks' average face (which fixes the scale in metres) and towards the depth that the network
saw, plus directions in which its points move with the blendshape scores. Pose, shape and
directions are fitted in turn by Gauss-Newton steps on the landmarks' reprojection, with weights
that fall for landmarks and frames that do not fit (so mouth, lids and brows hardly turn the
head), and poses of neighbouring frames are tied by a penalty on their acceleration. The focal
length is found beforehand, with all the others at once, on a sample of the frames (bundle
adjustment); where the head hardly turns the frames say little of it, and what is usual wins.

World: metres, x to the picture's right when the head looks at the camera, y up, z out of the
face; the origin is the middle of the head. Camera: OpenCV axes.
Axes: f frames, p landmarks (478; 468 without irises), k directions of expression.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Bool, Float

from uajax.preprocess import landmarks as marks
from uajax.types import FPS

# Middle of the head in the average face's axes: on the middle line, a little above the eyes' line,
# 4 cm behind the nose bridge. Chin, ears and hair then lie within about 0.12 m.
CENTRE = np.array([0.0, 0.01, 0.01])
SHAPE_SPREAD_M = 0.004  # how far a person's face point lies from the average's
MOVING_SPREAD_M = 0.004  # how far expression moves a lip; a tenth of it on still regions
NOISE_PX = 1.0  # landmark noise at which a residual counts half; grows with the picture
MEMORY_FRAMES = 10  # landmark errors stay alike that long: so many frames count as one
# Half of a head motion of this frequency is kept. Held against the picture (the nose, registered
# frame by frame), heads of lively speakers truly move faster than JITTER_HZ: 0.9 px RMS at 512 px
# in one clip, of which landmarks miss 0.2 px. Poses that are tied more firmly than this miss more.
PASS_HZ = 8.0
JITTER_HZ = 5.0  # motion above it is given in the report
DIRECTIONS = 12
SETTLE_ROUNDS = 10
STILL_M = 0.0002  # motion of a landmark below which it counts as still
SHAPE_FRAMES = 1500
POSE_BLOCK = 1500  # frames whose poses are fitted at once
BUNDLE_FRAMES = 80
SURE = 0.5  # of the noise: no landmark counts for surer, since the network errs alike in all frames
FREEDOM = 20  # landmark errors of one frame are as alike as so many free numbers allow
FOCAL_PRIOR = (2.4, 0.3)  # of image widths, and its spread in the logarithm


class Track(NamedTuple):
  """The fitted clip."""

  focal_px: float
  viewmats: Float[np.ndarray, "f 4 4"]  # world to camera
  shape: Float[np.ndarray, "p 3"]  # still face, metres
  directions: Float[np.ndarray, "k p 3"]  # metres a unit of coefficient
  coefficients: Float[np.ndarray, "f k"]  # unit variance
  weights: Float[np.ndarray, " p"]  # how still each landmark is, 0..1
  reprojection_px: float  # RMS of the still landmarks
  held_out_px: float  # RMS of still landmarks that the pose was fitted without
  jitter_px: float  # RMS motion above JITTER_HZ of points fixed to the head
  raw_jitter_px: float  # the same, were poses not tied in time
  focal_spread: float = 0.0  # standard deviation of the focal length's logarithm; 0: it was given


def fit(
  points: Float[np.ndarray, "f p 3"],
  scores: Float[np.ndarray, "f b"],
  present: Bool[np.ndarray, " f"],
  mesh: marks.Mesh,
  width: int,
  height: int,
  *,
  focal_px: float | None = None,
  cuts: Bool[np.ndarray, " f"] | None = None,
  rounds: int = 2,
  advance=lambda: None,
) -> Track:
  """Fits camera, face and poses to landmarks in pixels.

  Args:
    points: landmarks and relative depth; rows of frames without a face are ignored.
    scores: blendshape scores.
    present: frames that have a face; at least 10.
    mesh: the average face.
    width: of the picture.
    height: of the picture.
    focal_px: the camera's, if known; else it is searched.
    cuts: frames that new shots begin with: poses are not tied over them.
    rounds: of fitting pose and shape in turn to all frames, after the bundle adjustment.
    advance: called after each of `steps(focal_px)` pieces of work.

  Returns:
    Poses for every frame; where no face is, what smooth motion between the neighbours says.
  """
  seen = np.flatnonzero(present)
  pixels = np.where(present[:, None, None], points[:, :, :2], 0.0) - np.array([width, height]) / 2
  noise = NOISE_PX * max(_face_size(pixels[seen]) / 200, 0.25)
  prior = _start_shape(points, seen, mesh)
  still = stillness(mesh)
  coefficients = _compress(scores, present)
  jumps = breaks(points, present)
  jumps = jumps if cuts is None else jumps | cuts
  problem = _Problem(pixels, present, prior, still, coefficients, noise, jumps)
  few = seen[np.unique(np.linspace(0, len(seen) - 1, BUNDLE_FRAMES).astype(int))]
  sample = problem.pick(few)
  begun = _solve(sample, _begin(sample, focal_px or FOCAL_PRIOR[0] * width), 3)
  advance()
  usual = None if focal_px else (float(np.log(FOCAL_PRIOR[0] * width)), FOCAL_PRIOR[1])
  bundle, spread = _bundle(sample, begun, usual, _bundle_rounds(focal_px), advance)
  start = _start_poses(pixels, present, bundle.shape, still, bundle.focal_px)
  solution = _solve(problem, bundle._replace(poses=start), rounds)
  advance()

  raw = _pose(problem, solution, np.ones(len(still)))
  # Poses fitted to nine tenths of the landmarks, measured on the rest.
  out = np.arange(len(still)) % 10 == 3
  partial = _pose(problem, solution, np.where(out, 0.0, 1.0))
  rest = np.where(out, solution.weights, 0.0)
  untouched = solution._replace(poses=_smooth(problem, partial))
  advance()

  viewmats = np.tile(np.eye(4), (len(points), 1, 1))
  viewmats[:, :3, :3], viewmats[:, :3, 3] = solution.poses
  return Track(
    focal_px=solution.focal_px,
    viewmats=viewmats,
    shape=solution.shape,
    directions=solution.directions,
    coefficients=coefficients,
    weights=solution.weights,
    reprojection_px=_rms(problem, solution, solution.weights),
    held_out_px=_rms(problem, untouched, rest),
    jitter_px=_shake(problem, solution, solution.poses),
    raw_jitter_px=_shake(problem, solution, raw),
    focal_spread=spread,
  )


def steps(focal_px: float | None) -> int:
  """How often `fit` calls `advance`."""
  return _bundle_rounds(focal_px) + 3


def repose(
  found: Track,
  viewmats: Float[np.ndarray, "f 4 4"],
  information: Float[np.ndarray, "f 6 6"],
  points: Float[np.ndarray, "f p 3"],
  present: Bool[np.ndarray, " f"],
  width: int,
  height: int,
  *,
  cuts: Bool[np.ndarray, " f"] | None = None,
) -> Track:
  """The track with poses that were found without the landmarks, tied in time.

  Face and directions are fitted to the landmarks anew, under these poses; the directions may now
  turn the face, as landmarks do that take an expression for a nod. Since no landmark had a say in
  the poses, every one counts as held out.

  Args:
    found: what `fit` found.
    viewmats: each frame's pose; of frames without a face ignored.
    information: how firmly turns (radians) and shifts (metres) in the camera's axes are known.
    points: landmarks and relative depth, as `fit` had them.
    present: as `fit` had it.
    width: of the picture.
    height: of the picture.
    cuts: as `fit` had it.
  """
  pixels = np.where(present[:, None, None], points[:, :, :2], 0.0) - np.array([width, height]) / 2
  noise = NOISE_PX * max(_face_size(pixels[present]) / 200, 0.25)
  jumps = breaks(points, present)
  jumps = jumps if cuts is None else jumps | cuts
  problem = _Problem(pixels, present, found.shape, found.weights, found.coefficients, noise, jumps)
  raw = _Raw(viewmats[:, :3, :3], viewmats[:, :3, 3], information)
  now = _Solution(
    found.focal_px, _smooth(problem, raw), found.shape, found.directions, found.weights
  )
  for _ in range(2):
    shape, directions = _shape(problem, now, settle=False)
    now = now._replace(shape=shape, directions=directions)
  out = np.tile(np.eye(4), (len(points), 1, 1))
  out[:, :3, :3], out[:, :3, 3] = now.poses
  error = _rms(problem, now, now.weights)
  return found._replace(
    viewmats=out, shape=now.shape, directions=now.directions, reprojection_px=error,
    held_out_px=error, jitter_px=_shake(problem, now, now.poses),
    raw_jitter_px=_shake(problem, now, raw),
  )  # fmt: skip


def project(
  points: Float[np.ndarray, "p 3"],
  viewmats: Float[np.ndarray, "f 4 4"],
  focal_px: float,
  width: int,
  height: int,
) -> Float[np.ndarray, "f p 2"]:
  """World points to pixels, the principal point in the picture's middle."""
  flat = _project(points, viewmats[:, :3, :3], viewmats[:, :3, 3], focal_px)
  return flat + np.array([width, height]) / 2


def unproject(
  pixels: Float[np.ndarray, "f p 2"], track: Track, width: int, height: int
) -> Float[np.ndarray, "f p 3"]:
  """Landmarks in the head's axes, metres: each where its ray passes the still face's depth.

  What is left in them is what the face does, whatever the head does.
  """
  rotations, translations = track.viewmats[:, :3, :3], track.viewmats[:, :3, 3]
  depth = np.einsum("fb,pb->fp", rotations[:, 2], track.shape) + translations[:, None, 2]
  flat = (pixels - np.array([width, height]) / 2) / track.focal_px
  at = np.concatenate([flat, np.ones_like(flat[..., :1])], -1) * depth[..., None]
  return np.einsum("fba,fpb->fpa", rotations, at - translations[:, None, :])


def jitter(pixels: Float[np.ndarray, "f p 2"], cutoff_hz: float = JITTER_HZ) -> float:
  """RMS length in pixels of what moves faster than `cutoff_hz`."""
  if len(pixels) < 8:
    return 0.0
  # A line through the ends is taken off and the rest mirrored, lest the ends ring.
  ramp = np.linspace(0, 1, len(pixels))[:, None, None]
  level = pixels - (pixels[:1] * (1 - ramp) + pixels[-1:] * ramp)
  mirrored = np.concatenate([level, -level[-2:0:-1]])
  spectrum = np.fft.rfft(mirrored, axis=0)
  spectrum[np.fft.rfftfreq(len(mirrored), 1 / FPS) < cutoff_hz] = 0
  fast = np.fft.irfft(spectrum, len(mirrored), axis=0)[: len(pixels)]
  return float(np.sqrt((fast**2).sum(-1).mean()))


def breaks(
  points: Float[np.ndarray, "f p 3"], present: Bool[np.ndarray, " f"]
) -> Bool[np.ndarray, " f"]:
  """Frames at which the face has jumped from the frame before: a cut."""
  out = np.zeros(len(points), bool)
  both = present[1:] & present[:-1]
  size = np.ptp(points[1:, :, 1], axis=1)
  moved = np.median(np.linalg.norm(np.diff(points[:, :, :2], axis=0), axis=2), axis=1)
  out[1:] = both & (np.nan_to_num(moved) > 0.2 * np.nan_to_num(size, nan=1.0))
  return out


class _Poses(NamedTuple):
  rotations: Float[np.ndarray, "f 3 3"]
  translations: Float[np.ndarray, "f 3"]


class _Raw(NamedTuple):
  """Poses each fitted alone, and how firmly."""

  rotations: Float[np.ndarray, "f 3 3"]
  translations: Float[np.ndarray, "f 3"]
  information: Float[np.ndarray, "f 6 6"]


class _Solution(NamedTuple):
  focal_px: float
  poses: _Poses
  shape: Float[np.ndarray, "p 3"]
  directions: Float[np.ndarray, "k p 3"]
  weights: Float[np.ndarray, " p"]


class _Problem(NamedTuple):
  """What is known: pixels are relative to the principal point."""

  pixels: Float[np.ndarray, "f p 2"]
  present: Bool[np.ndarray, " f"]
  prior: Float[np.ndarray, "p 3"]
  still: Float[np.ndarray, " p"]
  coefficients: Float[np.ndarray, "f k"]
  noise: float
  cuts: Bool[np.ndarray, " f"]

  def pick(self, frames: np.ndarray) -> "_Problem":
    """The chosen frames, untied in time."""
    return self._replace(
      pixels=self.pixels[frames],
      present=self.present[frames],
      coefficients=self.coefficients[frames],
      cuts=np.ones(len(frames), bool),
    )


def _begin(problem: _Problem, focal: float) -> _Solution:
  """The average face, as it lies."""
  poses = _start_poses(problem.pixels, problem.present, problem.prior, problem.still, focal)
  nothing = np.zeros((problem.coefficients.shape[1], *problem.prior.shape))
  return _Solution(focal, poses, problem.prior, nothing, problem.still)


def _solve(problem: _Problem, now: _Solution, rounds: int) -> _Solution:
  """Pose and shape in turn, `rounds` times; the focal length stays."""
  every = np.ones(len(problem.still))
  for _ in range(rounds):
    now = now._replace(poses=_smooth(problem, _pose(problem, now, every)))
    shape, directions = _shape(problem, now)
    now = now._replace(shape=shape, directions=directions)
    now = now._replace(weights=_reweigh(problem, now))
  return now._replace(poses=_smooth(problem, _pose(problem, now, every)))


def _bundle_rounds(focal_px: float | None) -> int:
  return 5 if focal_px else 10


def _bundle(
  problem: _Problem,
  now: _Solution,
  prior: tuple[float, float] | None,
  rounds: int,
  advance=lambda: None,
) -> tuple[_Solution, float]:
  """Focal length, poses, shape and directions at once: bundle adjustment.

  Fitted in turn, they would creep along the valley where a longer lens, a flatter face and wider
  turns look alike. Gauss-Newton with the landmarks' unknowns eliminated (Schur complement). A
  landmark counts by how far it strays from the fit, but never for surer than the network is.

  Args:
    problem: some frames of the clip, with faces.
    now: where to begin.
    prior: of the focal length's logarithm, mean and standard deviation; None keeps the focal.
    rounds: of Gauss-Newton.
    advance: called after each.

  Returns:
    The solution and the standard deviation of the focal length's logarithm.
  """
  sure = 0.0
  for _ in range(rounds):
    now, sure = _bundle_step(problem, now, prior)
    advance()
  alike = problem.pixels.shape[1] / FREEDOM
  return now, 0.0 if prior is None else float(np.sqrt(alike / max(sure, 1e-9)))


def _bundle_step(
  problem: _Problem, now: _Solution, prior: tuple[float, float] | None
) -> tuple[_Solution, float]:
  """One Gauss-Newton step of `_bundle`; also how firm the focal length's logarithm then is."""
  frames, count = problem.pixels.shape[:2]
  basis = np.concatenate([np.ones((frames, 1)), problem.coefficients], 1)
  q = basis.shape[1]
  spread_m = MOVING_SPREAD_M * np.clip(1 - problem.still, 0.1, 1.0)
  deviation = np.sqrt(((now.shape - problem.prior) ** 2).mean())
  firm = np.empty((count, q, 3))
  firm[:, 0] = 1 / max(SHAPE_SPREAD_M, float(deviation)) ** 2
  firm[:, 1:] = 1 / spread_m[:, None, None] ** 2
  target = np.zeros((count, q, 3))
  target[:, 0] = problem.prior

  focal = now.focal_px
  faces = np.concatenate([now.shape[:, None], now.directions.transpose(1, 0, 2)], 1)  # p q 3
  rotations, translations = now.poses
  turned = np.einsum(
    "fab,fpb->fpa", rotations, np.einsum("fq,pqc->fpc", basis, faces, optimize=True)
  )
  at = turned + translations[:, None]
  x, y, z = at[..., 0], at[..., 1], np.maximum(at[..., 2], 1e-2)
  by_focal = focal * at[..., :2] / z[..., None]
  residual = by_focal - problem.pixels
  square = (residual**2).sum(-1)
  noise = square.mean(0) / 2 + (SURE * problem.noise) ** 2
  outlier = np.median(square, axis=0) + (SURE * problem.noise) ** 2
  weight = 1 / noise / MEMORY_FRAMES / (1 + square / (9 * outlier))

  zero = np.zeros_like(z)
  by_point = (focal / z)[..., None, None] * np.stack(
    [np.stack([zero + 1, zero, -x / z], -1), np.stack([zero, zero + 1, -y / z], -1)], -2
  )  # f p 2 3
  a, b, c = (turned[..., i] for i in range(3))
  cross = np.stack(
    [np.stack([zero, c, -b], -1), np.stack([-c, zero, a], -1), np.stack([b, -a, zero], -1)], -2
  )
  by_pose = np.concatenate([by_point @ cross, by_point], -1)  # f p 2 6
  by_face = by_point @ rotations[:, None]

  # Unknowns: 6 a frame and the focal length; 3 q a landmark, which are eliminated.
  own = np.einsum("fp,fpia,fpib->fab", weight, by_pose, by_pose, optimize=True)
  pull = np.einsum("fp,fpia,fpi->fa", weight, by_pose, residual, optimize=True).reshape(-1)
  lhs = np.array(scipy.linalg.block_diag(*own, np.zeros((1, 1))), np.float64)
  rhs = np.append(pull, np.einsum("fp,fpi,fpi->", weight, by_focal, residual))
  lhs[-1, :-1] = np.einsum("fp,fpia,fpi->fa", weight, by_pose, by_focal, optimize=True).ravel()
  lhs[-1, -1] = np.einsum("fp,fpi,fpi->", weight, by_focal, by_focal)
  face = np.einsum("fp,fpia,fpib->fpab", weight, by_face, by_face, optimize=True)
  face = np.einsum("fq,fr,fpab->pqarb", basis, basis, face, optimize=True)
  face = face.reshape(count, 3 * q, 3 * q) + firm.reshape(count, -1)[:, :, None] * np.eye(3 * q)
  tug = np.einsum("fq,fp,fpia,fpi->pqa", basis, weight, by_face, residual, optimize=True)
  tug = (tug + firm * (faces - target)).reshape(count, -1, 1)
  both = np.einsum("fp,fpia,fpib->fpab", weight, by_pose, by_face, optimize=True)
  both = np.einsum("fq,fpab->pqbfa", basis, both).reshape(count, 3 * q, -1)
  last = np.einsum("fq,fp,fpi,fpib->pqb", basis, weight, by_focal, by_face, optimize=True)
  both = np.concatenate([both, last.reshape(count, -1, 1)], -1)
  if prior is None:
    lhs[-1], rhs[-1], both[..., -1] = 0.0, 0.0, 0.0
    lhs[-1, -1] = 1.0
  else:  # all landmarks err together, as a few free numbers would
    lhs[-1, -1] += count / FREEDOM / prior[1] ** 2
    rhs[-1] += count / FREEDOM * (np.log(focal) - prior[0]) / prior[1] ** 2
  lhs[:-1, -1] = lhs[-1, :-1]
  half = np.linalg.inv(np.linalg.cholesky(face)) @ np.concatenate([both, tug], -1)
  half = half.reshape(-1, half.shape[-1])
  inner = half.T @ half
  lhs[np.diag_indices(len(lhs))] *= 1 + 1e-8
  lhs = lhs - inner[:-1, :-1]
  rhs = rhs - inner[:-1, -1]
  step = -np.linalg.solve(lhs, rhs)
  shift = np.linalg.solve(face, tug + (both @ step)[..., None])[..., 0]
  faces = faces - shift.reshape(count, q, 3)
  sure = lhs[-1, -1] - lhs[-1, :-1] @ np.linalg.solve(lhs[:-1, :-1], lhs[:-1, -1])

  moves = np.clip(step[:-1].reshape(frames, 6), -0.2, 0.2)
  rotations = np.stack([_rotation(w) for w in moves[:, :3]]) @ rotations
  weights = problem.still * np.clip(np.median(noise) / noise, 0, 1)
  directions = _settle(faces[:, 1:].transpose(1, 0, 2), _rigid_motions(faces[:, 0]), weights)
  now = _Solution(
    float(focal * np.exp(np.clip(step[-1], -0.15, 0.15))),
    _Poses(rotations, translations + moves[:, 3:]), faces[:, 0], directions, weights,
  )  # fmt: skip
  raw = _pose(problem, now, np.ones(count))  # what left the directions goes into the poses
  return now._replace(poses=_Poses(raw.rotations, raw.translations)), float(sure)


@functools.partial(jax.jit, static_argnames=("iterations",))
def _pose_steps(
  pixels: Float[Array, "f p 2"],
  faces: Float[Array, "f p 3"],
  weights: Float[Array, " p"],
  rotations: Float[Array, "f 3 3"],
  translations: Float[Array, "f 3"],
  focal: Float[Array, ""],
  noise: Float[Array, ""],
  iterations: int = 6,
):
  """Damped Gauss-Newton on every frame's pose alone; returns pose and information matrix."""

  def normal(rotation, translation, face, seen):
    turned = face @ rotation.T
    at = turned + translation[None, :]
    x, y, z = at[:, 0], at[:, 1], jnp.maximum(at[:, 2], 1e-2)
    residual = focal * jnp.stack([x / z, y / z], 1) - seen
    zero = jnp.zeros_like(z)
    d_pixel = (focal / z)[:, None, None] * jnp.stack(
      [jnp.stack([zero + 1, zero, -x / z], 1), jnp.stack([zero, zero + 1, -y / z], 1)], 1
    )
    cross = jnp.stack(  # d at / d omega = -[turned]x
      [
        jnp.stack([zero, turned[:, 2], -turned[:, 1]], 1),
        jnp.stack([-turned[:, 2], zero, turned[:, 0]], 1),
        jnp.stack([turned[:, 1], -turned[:, 0], zero], 1),
      ],
      1,
    )
    jacobian = jnp.concatenate([d_pixel @ cross, d_pixel], 2)  # p 2 6
    w = weights / (1 + (residual**2).sum(1) / (3 * noise) ** 2)  # Cauchy
    lhs = jnp.einsum("p,pia,pib->ab", w, jacobian, jacobian)
    rhs = jnp.einsum("p,pia,pi->a", w, jacobian, residual)
    return lhs, rhs

  def step(pose, _):
    rotation, translation = pose
    lhs, rhs = jax.vmap(normal)(rotation, translation, faces, pixels)
    damp = 1e-5 * jnp.einsum("faa->fa", lhs)[:, :, None] * jnp.eye(6)[None]
    delta = -jnp.linalg.solve(lhs + damp + 1e-9 * jnp.eye(6)[None], rhs[..., None])[..., 0]
    delta = jnp.clip(delta, -0.3, 0.3)
    rotation = jax.vmap(_expm)(delta[:, :3]) @ rotation
    return (rotation, translation + delta[:, 3:]), None

  (rotations, translations), _ = jax.lax.scan(
    step, (rotations, translations), None, length=iterations
  )
  lhs, _ = jax.vmap(normal)(rotations, translations, faces, pixels)
  return rotations, translations, lhs


def _pose(problem: _Problem, now: _Solution, mask: Float[np.ndarray, " p"]) -> _Raw:
  frames = len(problem.pixels)
  parts = []
  for begin in range(0, frames, POSE_BLOCK):  # long clips in blocks of one size, for the memory
    rows = np.minimum(np.arange(begin, begin + min(POSE_BLOCK, frames)), frames - 1)
    faces = _faces(now.shape, now.directions, problem.coefficients[rows])
    poses = (now.poses.rotations[rows], now.poses.translations[rows])
    known = (problem.pixels[rows], faces, now.weights * mask, *poses, now.focal_px, problem.noise)
    found = _pose_steps(*(jnp.asarray(x, jnp.float32) for x in known))
    parts.append([np.asarray(x, np.float64)[: frames - begin] for x in found])
  rotations, translations, information = (np.concatenate(x) for x in zip(*parts, strict=True))
  return _Raw(rotations, translations, information)


def _smooth(problem: _Problem, raw: _Raw) -> _Poses:
  """Ties poses in time: least squares of the poses' own information and of their acceleration.

  The penalty is measured in the clip's median information, so that one number, the frequency at
  which half of a motion passes, holds for turns and shifts alike. Frames without a face carry no
  information and follow their neighbours; over cuts nothing is tied.
  """
  frames = len(raw.rotations)
  if problem.cuts.all() or frames < 4:
    return _Poses(raw.rotations, raw.translations)
  known = problem.present
  middle = _nearest_rotation(raw.rotations[known].mean(0))
  turns = np.stack([_logm(r @ middle.T) for r in raw.rotations])
  values = np.concatenate([turns, raw.translations], 1)
  metric = np.median(raw.information[known], axis=0)
  metric = (metric + metric.T) / 2 + 1e-6 * np.trace(metric) * np.eye(6)
  strength = 1 / (2 * np.sin(np.pi * PASS_HZ / FPS)) ** 4
  bands = np.zeros((18, frames, 6))  # lower form: bands[i - j, j] = A[i, j], j split in two

  def add(at: np.ndarray, below: int, blocks: np.ndarray) -> None:
    """Adds blocks [n 6 6] at rows of frames `at + below`, columns of frames `at`."""
    for i in range(6):
      for j in range(6):
        if below * 6 + i >= j:
          np.add.at(bands[below * 6 + i - j, :, j], at, blocks[:, i, j])

  own = np.where(known[:, None, None], raw.information, 1e-6 * metric[None])
  own = (own + own.transpose(0, 2, 1)) / 2
  add(np.arange(frames), 0, own)
  target = np.where(known[:, None], values, values[known].mean(0)[None])
  rhs = np.einsum("fab,fb->fa", own, target)
  tied = 1 + np.flatnonzero(~problem.cuts[1:-1] & ~problem.cuts[2:])
  bend = {-1: 1.0, 0: -2.0, 1: 1.0}
  for row, x in bend.items():
    for column, y in bend.items():
      if row >= column:
        block = np.broadcast_to(strength * x * y * metric, (len(tied), 6, 6))
        add(tied + column, row - column, block)
  bands = bands.reshape(18, frames * 6)
  smooth = scipy.linalg.solveh_banded(bands, rhs.reshape(-1), lower=True).reshape(frames, 6)
  rotations = np.stack([_rotation(w) for w in smooth[:, :3]]) @ middle
  return _Poses(rotations, smooth[:, 3:])


@jax.jit
def _shape_normals(pixels, faces, rotations, translations, focal, noise, basis, present):
  """Normal equations of every landmark's shape and directions: [p 3q 3q], [p 3q]."""
  at = jnp.einsum("fab,fpb->fpa", rotations, faces) + translations[:, None, :]
  x, y, z = at[..., 0], at[..., 1], jnp.maximum(at[..., 2], 1e-2)
  residual = focal * jnp.stack([x / z, y / z], -1) - pixels
  row_x = rotations[:, None, 0, :] - (x / z)[..., None] * rotations[:, None, 2, :]
  row_y = rotations[:, None, 1, :] - (y / z)[..., None] * rotations[:, None, 2, :]
  jacobian = (focal / z)[..., None, None] * jnp.stack([row_x, row_y], 2)  # f p 2 3
  robust = present[:, None] / (1 + (residual**2).sum(-1) / (3 * noise) ** 2)
  w = robust / noise**2 / MEMORY_FRAMES
  square = jnp.einsum("fp,fpia,fpib->fpab", w, jacobian, jacobian)
  pull = -jnp.einsum("fp,fpia,fpi->fpa", w, jacobian, residual)
  lhs = jnp.einsum("fq,fr,fpab->pqarb", basis, basis, square)
  rhs = jnp.einsum("fq,fpa->pqa", basis, pull)
  return lhs, rhs


def _shape(problem: _Problem, now: _Solution, settle: bool = True):
  """Still shape and expression directions that fit best under the current poses.

  They are free of what turns or shifts the head, which poses should do, if they are to `settle`.
  """
  # A long clip is thinned out: its shape needs no more frames than these.
  some = slice(None, None, max(len(problem.pixels) // SHAPE_FRAMES, 1))
  coefficients = problem.coefficients[some]
  basis = np.concatenate([np.ones((len(coefficients), 1)), coefficients], 1)
  faces = _faces(now.shape, now.directions, coefficients)
  rotations, translations = now.poses
  known = (
    problem.pixels[some], faces, rotations[some], translations[some], now.focal_px, problem.noise,
    basis, problem.present[some],
  )  # fmt: skip
  lhs, rhs = _shape_normals(*(jnp.asarray(x, jnp.float32) for x in known))
  count, q = lhs.shape[0], lhs.shape[1]
  lhs = np.asarray(lhs, np.float64).reshape(count, q * 3, q * 3)
  rhs = np.asarray(rhs, np.float64)
  # Priors: the shape about the average face, the directions about nothing.
  spread = MOVING_SPREAD_M * np.clip(1 - problem.still, 0.1, 1.0)
  firm = np.empty((count, q, 3))
  firm[:, 0] = 1 / SHAPE_SPREAD_M**2
  firm[:, 1:] = 1 / spread[:, None, None] ** 2
  before = np.concatenate([now.shape[:, None], now.directions.transpose(1, 0, 2)], 1)
  target = np.zeros_like(before)
  target[:, 0] = problem.prior
  rhs = rhs + firm * (target - before)
  lhs = lhs + firm.reshape(count, -1)[:, :, None] * np.eye(q * 3)
  after = before + np.linalg.solve(lhs, rhs.reshape(count, -1, 1)).reshape(count, q, 3)
  shape, directions = after[:, 0], after[:, 1:].transpose(1, 0, 2)
  if not settle:
    return shape, directions
  # An expression must not turn or shift the head: take that out of its directions, and out of the
  # shape what turns or shifts it against the average face (scale stays where the prior holds it).
  rigid = _rigid_motions(shape)
  directions = _settle(directions, rigid, now.weights)
  solver = np.linalg.pinv(rigid * np.sqrt(now.weights).repeat(3)[:, None])
  root = np.sqrt(now.weights)[:, None]
  shape = shape - (rigid @ (solver @ ((shape - problem.prior) * root).reshape(-1))).reshape(-1, 3)
  return shape, directions


def _settle(
  directions: Float[np.ndarray, "k p 3"],
  rigid: Float[np.ndarray, "p*3 6"],
  weights: Float[np.ndarray, " p"],
) -> Float[np.ndarray, "k p 3"]:
  """Directions without what in them turns or shifts the head.

  What that is, those landmarks say that expression moves least: a raised brow takes the forehead
  along, not the nose. The sum of lengths, not of squares, is made least.
  """
  if not len(directions):
    return directions
  flat = directions.reshape(len(directions), -1).T  # p*3 k
  out = flat
  for _ in range(SETTLE_ROUNDS):
    length = np.sqrt((out.reshape(len(weights), -1) ** 2).sum(1))
    share = (weights / (length + STILL_M)).repeat(3)[:, None]
    out = flat - rigid @ np.linalg.solve(rigid.T @ (share * rigid), rigid.T @ (share * flat))
  return out.T.reshape(directions.shape)


def _reweigh(problem: _Problem, now: _Solution) -> Float[np.ndarray, " p"]:
  """Stillness of each landmark, lower where it moves against the fit."""
  residual = _residuals(problem, now)[problem.present]
  # A landmark's constant error is a bias of the network, not motion.
  spread = np.sqrt(np.median((residual - np.median(residual, 0)) ** 2, axis=0).sum(-1)) * 1.5
  return problem.still / (1 + (spread / problem.noise) ** 2)


def _residuals(problem: _Problem, now: _Solution) -> Float[np.ndarray, "f p 2"]:
  faces = _faces(now.shape, now.directions, problem.coefficients)
  return _project(faces, *now.poses, now.focal_px) - problem.pixels


def _rms(problem: _Problem, now: _Solution, weights: Float[np.ndarray, " p"]) -> float:
  square = (_residuals(problem, now)[problem.present] ** 2).sum(-1).mean(0)
  return float(np.sqrt((square * weights).sum() / weights.sum()))


def _shake(problem: _Problem, now: _Solution, poses: _Poses | _Raw) -> float:
  """Jitter of the still points in the longest stretch of frames with a face."""
  head = now.shape[now.weights > 0.5 * now.weights.max()]
  at = _project(head, poses.rotations, poses.translations, now.focal_px)
  return jitter(at[_longest_run(problem.present)])


def _project(points, rotations, translations, focal):
  """[p 3] or [f p 3] to pixels about the principal point, [f p 2]."""
  points = np.broadcast_to(points, (len(rotations), *points.shape[-2:]))
  at = np.einsum("fab,fpb->fpa", rotations, points) + translations[:, None, :]
  return focal * at[..., :2] / np.maximum(at[..., 2:], 1e-2)


def _faces(shape, directions, coefficients) -> Float[np.ndarray, "f p 3"]:
  return shape[None] + np.einsum("fk,kpc->fpc", coefficients, directions)


def _start_poses(pixels, present, shape, still, focal) -> _Poses:
  """Poses from the affine map of shape to pixels, the camera taken for far away."""
  centre = (shape * still[:, None]).sum(0) / still.sum()
  away = (shape - centre) * still[:, None]
  solver = np.linalg.solve(away.T @ (shape - centre), away.T)  # 3 p
  rotations, translations = np.empty((len(pixels), 3, 3)), np.empty((len(pixels), 3))
  last = (np.diag([1.0, -1.0, -1.0]), np.array([0.0, 0.0, 1.0]))
  for f in range(len(pixels)):
    if present[f]:
      middle = (pixels[f] * still[:, None]).sum(0) / still.sum()
      affine = (solver @ (pixels[f] - middle)).T  # 2 3
      scale = np.linalg.norm(affine, axis=1).mean()
      rows = affine / scale
      rotation = _nearest_rotation(np.stack([rows[0], rows[1], np.cross(rows[0], rows[1])]))
      depth = focal / scale
      at = np.array([*(middle * depth / focal), depth])
      last = (rotation, at - rotation @ centre)
    rotations[f], translations[f] = last
  first = int(np.argmax(present))
  rotations[:first], translations[:first] = rotations[first], translations[first]
  return _Poses(rotations, translations)


def _start_shape(points, seen, mesh: marks.Mesh) -> Float[np.ndarray, "p 3"]:
  """Average of the mesh and of the clip's own shape as the network sees it, on the mesh's scale."""
  base = mesh.vertices - CENTRE
  still = stillness(mesh)[:468]
  total = np.zeros((marks.LANDMARKS, 3))
  for f in seen:
    own = points[f] * np.array([1.0, -1.0, -1.0])
    total += _align(own, base, still)
  own = _align(total / len(seen), base, still)
  shape = own.copy()
  shape[:468] = (own[:468] + base) / 2
  for ring, iris in ((marks.RIGHT_EYE, slice(468, 473)), (marks.LEFT_EYE, slice(473, 478))):
    shape[iris] += (shape[ring] - own[ring]).mean(0)  # irises stay in their eyes
  return shape


def _align(points, base, weights) -> Float[np.ndarray, "p 3"]:
  """Points turned, scaled and shifted so that the first 468 lie nearest to `base`."""
  w = weights / weights.sum()
  mine, theirs = w @ points[:468], w @ base
  a, b = points[:468] - mine, base - theirs
  u, s, vt = np.linalg.svd((b * w[:, None]).T @ a)
  sign = np.array([1, 1, np.sign(np.linalg.det(u @ vt))])
  turn = u @ (sign[:, None] * vt)
  scale = (s * sign).sum() / (w @ (a**2).sum(1))
  return scale * (points - mine) @ turn.T + theirs


def stillness(mesh: marks.Mesh) -> Float[np.ndarray, " p"]:
  """How little expression moves each landmark, 0..1, from where it lies on the average face."""
  v = mesh.vertices
  still = np.ones(marks.LANDMARKS)
  below = v[2, 1] - v[:, 1]  # metres under the base of the nose: lips, chin, jaw
  still[:468] = np.clip(1 - below / 0.01, 0.03, 1.0)
  rings = v[marks.RIGHT_EYE + marks.LEFT_EYE]
  near = np.linalg.norm(v[:, None] - rings[None], axis=2).min(1)
  still[:468] *= np.clip(near / 0.015, 0.1, 1.0)
  brows = v[marks.IBUG[17:27]]
  near = np.linalg.norm(v[:, None] - brows[None], axis=2).min(1)
  still[:468] *= np.clip(near / 0.02, 0.3, 1.0)
  still[468:] = 0.01
  return still


def _compress(scores, present) -> Float[np.ndarray, "f k"]:
  """Principal parts of the blendshape scores, unit variance; zero where no face is."""
  used = scores[present][:, 1:]
  mean = used.mean(0)
  _, s, vt = np.linalg.svd(used - mean, full_matrices=False)
  keep = s > 1e-3 * max(s[0], 1e-6)
  keep &= np.arange(len(s)) < min(DIRECTIONS, max(len(used) // 20, 1))
  spread = s[keep] / np.sqrt(len(used))
  out = np.zeros((len(scores), int(keep.sum())))
  out[present] = (used - mean) @ vt[keep].T / np.maximum(spread, 1e-6)
  return np.clip(out, -6, 6)


def _longest_run(present) -> slice:
  edges = np.flatnonzero(np.diff(np.concatenate([[0], present.astype(int), [0]])))
  begins, ends = edges[::2], edges[1::2]
  longest = int(np.argmax(ends - begins))
  return slice(int(begins[longest]), int(ends[longest]))


def _face_size(pixels) -> float:
  return float(np.median(np.ptp(pixels[:, :468], axis=1).max(1)))


def _rigid_motions(points) -> Float[np.ndarray, "p*3 6"]:
  """Displacements of the points under small turns and shifts."""
  turns = np.cross(np.eye(3)[:, None], points[None])  # 3 p 3
  shifts = np.broadcast_to(np.eye(3)[:, None], turns.shape)
  return np.concatenate([turns, shifts]).reshape(6, -1).T


def _nearest_rotation(matrix) -> Float[np.ndarray, "3 3"]:
  u, _, vt = np.linalg.svd(matrix)
  return u @ np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))]) @ vt


def _rotation(turn) -> Float[np.ndarray, "3 3"]:
  angle = np.linalg.norm(turn)
  k = np.cross(np.eye(3), turn / max(angle, 1e-12))
  return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def _logm(rotation) -> Float[np.ndarray, "3"]:
  cosine = np.clip((np.trace(rotation) - 1) / 2, -1, 1)
  odd = rotation - rotation.T
  axis = np.array([odd[2, 1], odd[0, 2], odd[1, 0]])
  angle = np.arccos(cosine)
  return axis / 2 if angle < 1e-6 else axis * angle / (2 * np.sin(angle))


def _expm(turn: Float[Array, "3"]) -> Float[Array, "3 3"]:
  square = turn @ turn
  small = square < 1e-8
  angle = jnp.sqrt(jnp.where(small, 1.0, square))
  a = jnp.where(small, 1 - square / 6, jnp.sin(angle) / angle)
  b = jnp.where(small, 0.5 - square / 24, (1 - jnp.cos(angle)) / angle**2)
  zero = jnp.zeros(())
  k = jnp.stack([
    jnp.stack([zero, -turn[2], turn[1]]),
    jnp.stack([turn[2], zero, -turn[0]]),
    jnp.stack([-turn[1], turn[0], zero]),
  ])  # fmt: skip
  return jnp.eye(3) + a * k + b * k @ k
