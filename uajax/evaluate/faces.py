"""What the face does in two films that should be alike: landmarks, action units, expression.

Both pictures of a pair are read through the same squares, those about the true face, so that what
the landmark network makes of a square is in both. Action units and expression are read as in
preprocessing, from both films together: what counts as a person's rest is that of all pictures,
and a smile that never ends is an error, not another rest.

The measures are the field's (method.md D.7), by our landmarks and our action units where papers
take face_alignment and OpenFace: compare figures made by the same tools only.

Axes: f frames, p landmarks (478), b blendshapes (52), v mesh vertices, d features.
"""

import collections
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from uajax import metrics
from uajax.preprocess import action_units, landmarks, track

UPPER = ("AU01", "AU02", "AU04", "AU05", "AU06", "AU07", "AU09", "AU45")  # method.md D.7
LOWER = tuple(name for name in action_units.NAMES if name not in UPPER)
E_FID_BY = "51 blendshape scores (MediaPipe)"
LEAST_SPREAD = 0.25  # of 0..5: units that move less have nothing to correlate with
_EYES = (slice(36, 42), slice(42, 48))  # of the 68


class Pair(NamedTuple):
  """A true face and its rendering; the truth comes first."""

  points: Float[np.ndarray, "2 p 3"]  # pixels
  scores: Float[np.ndarray, "2 b"]


class Reader:
  """Reads pairs of pictures, given in the order of the film."""

  def __init__(self, landmarker: landmarks.Landmarker):
    self._landmarker = landmarker
    self._given: collections.deque = collections.deque()
    self._seen = landmarks.follow(self._frames(), landmarker)

  def _frames(self) -> Iterator[tuple[np.ndarray, bool]]:
    while True:
      yield self._given.popleft(), False

  def read(
    self, truth: UInt8[np.ndarray, "h w 3"], render: UInt8[np.ndarray, "h w 3"]
  ) -> Pair | None:
    """The faces of a pair; None where either picture shows none."""
    self._given.append(truth)
    points = next(self._seen).points
    if points is None:
      return None
    roi = landmarks.roi_of_points(points)
    if self._landmarker.read(render, roi)[1] < landmarks.MIN_SCORE:
      return None
    faces = [landmarks.steady(image, roi, self._landmarker) for image in (truth, render)]
    return Pair(np.stack([p for p, _ in faces]), np.stack([s for _, s in faces]))


class Compared(NamedTuple):
  """Figures of a film, and what they are made of."""

  figures: dict[str, Any]  # name -> number, None where it cannot be told
  per_frame: dict[str, Float[np.ndarray, " f"]]  # NaN where there is no face
  units: dict[str, Float[np.ndarray, "f 2"]]  # by name: of the truth, of the render


def compare(
  pairs: Sequence[Pair | None], ids: Int[np.ndarray, " f"], mesh: landmarks.Mesh
) -> Compared:
  """All measures of a film's faces, of which at least one must be there.

  Args:
    pairs: in order; None where a face lacks.
    ids: frame numbers; motion is measured where they follow each other.
  """
  found = np.array([i for i, pair in enumerate(pairs) if pair is not None])
  kept = [pair for pair in pairs if pair is not None]
  points = np.stack([pair.points for pair in kept])  # f 2 p 3
  scores = np.stack([pair.scores for pair in kept])
  flat: Any = landmarks.to_ibug(points)[..., :2]  # NumPy, which metrics take like jax.Array
  whole, mouth = (
    np.asarray(metrics.lmd(flat[:, 0], flat[:, 1], part)) for part in (metrics.FACE, metrics.MOUTH)
  )
  both = points.swapaxes(0, 1).reshape(-1, *points.shape[2:])  # all of the truth, then the render
  measured = action_units.measure(to_head(both, mesh))
  table = action_units.estimate(
    scores.swapaxes(0, 1).reshape(len(both), -1), measured, np.ones(len(both), bool)
  )
  units = {name: values.reshape(2, -1).T for name, values in table.items()}
  gap = 1e3 * measured.gap.reshape(2, -1)
  errors = {name: float(np.mean((u[:, 0] - u[:, 1]) ** 2)) for name, u in units.items()}
  eyes = [flat[:, 0, part].mean(1) for part in _EYES]
  figures = {
    "frames": len(kept),
    "lmd_px": float(whole.mean()),
    "mouth_lmd_px": float(mouth.mean()),
    "mouth_opening_correlation": correlate(gap[1], gap[0]),
    "eye_distance_px": float(np.linalg.norm(eyes[0] - eyes[1], axis=-1).mean()),
    "jitter_px": jitter(flat[:, 1], ids[found]),
    "truth_jitter_px": jitter(flat[:, 0], ids[found]),
    "aue_upper": sum(errors[name] for name in UPPER),
    "aue_lower": sum(errors[name] for name in LOWER),
    "au_squared_errors": errors,
    "e_fid": frechet(scores[:, 1, 1:], scores[:, 0, 1:]) if len(kept) > 1 else None,
    "e_fid_by": E_FID_BY,
  }
  columns = {"lmd_px": whole, "mouth_lmd_px": mouth, "gap_mm": gap[1], "truth_gap_mm": gap[0]}

  def spread(values: np.ndarray) -> np.ndarray:
    out = np.full((len(pairs), *values.shape[1:]), np.nan)
    out[found] = values
    return out

  return Compared(
    figures,
    {name: spread(values) for name, values in columns.items()},
    {name: spread(values) for name, values in units.items()},
  )


def to_head(
  points: Float[np.ndarray, "f p 3"], mesh: landmarks.Mesh
) -> Float[np.ndarray, "f p 3"]:
  """Landmarks in pixels -> in the average head's axes, metres: turned, moved and scaled on it.

  Each face is laid upon the mesh by those of its points that no expression moves.
  """
  base, count = mesh.vertices, len(mesh.vertices)
  weights = track.stillness(mesh)[:count]
  weights = weights / weights.sum()
  seen = points * np.array([1.0, -1.0, -1.0])  # the mesh's axes: y up, z to the viewer
  still = seen[:, :count]
  middle = np.einsum("v,fva->fa", weights, still)
  centre = weights @ base
  moved, home = still - middle[:, None], base - centre
  u, s, vt = np.linalg.svd(np.einsum("v,fva,vb->fab", weights, moved, home))
  signs = np.ones_like(s)
  signs[:, 2] = np.sign(np.linalg.det(u @ vt))
  scale = (s * signs).sum(1) / np.einsum("v,fva,fva->f", weights, moved, moved)
  turn = (u * signs[:, None]) @ vt
  return scale[:, None, None] * ((seen - middle[:, None]) @ turn) + centre


def jitter(points: Float[np.ndarray, "f q 2"], ids: Int[np.ndarray, " f"]) -> float | None:
  """How points tremble: mean length of their second difference over time, pixels.

  It is 0 for even motion. None where no three frames follow each other.
  """
  middle = np.flatnonzero((np.diff(ids[1:]) == 1) & (np.diff(ids[:-1]) == 1)) + 1
  if not len(middle):
    return None
  bend = points[middle - 1] - 2 * points[middle] + points[middle + 1]
  return float(np.linalg.norm(bend, axis=-1).mean())


def frechet(a: Float[np.ndarray, "f d"], b: Float[np.ndarray, "g d"]) -> float:
  """Fréchet distance of the Gaussians with the means and covariances of two sets of features.

  |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), covariances with n - 1; each set has two rows or more.
  """
  cov_a, cov_b = (np.atleast_2d(np.cov(x.astype(np.float64), rowvar=False)) for x in (a, b))
  values, axes = np.linalg.eigh(cov_a)
  root = (axes * np.sqrt(np.clip(values, 0, None))) @ axes.T
  # The trace of (A B)^(1/2) is that of (R B R)^(1/2) for R = A^(1/2), which is symmetric.
  cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
  apart = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
  return max(float(apart @ apart + np.trace(cov_a) + np.trace(cov_b) - 2 * cross), 0.0)


def judge(
  units: dict[str, Float[np.ndarray, "f 2"]], known: dict[str, Float[np.ndarray, " f"]]
) -> dict[str, dict[str, float | None]]:
  """Action units as read in the render, and in the true pictures, against what they truly were.

  Returns:
    name -> correlation of the render's and of the true pictures' with what is known, None where
    they are still; for units that move by LEAST_SPREAD or more in truth.
  """
  out = {}
  for name, truth in known.items():
    if name not in units:
      continue
    here = np.isfinite(units[name]).all(1) & np.isfinite(truth)
    read, true = units[name][here], truth[here]
    if len(true) and np.ptp(true) >= LEAST_SPREAD:
      both = (correlate(column, true) for column in read.T)
      out[name] = dict(zip(("true_picture", "render"), both, strict=True))
  return out


def correlate(a: Float[np.ndarray, " f"], b: Float[np.ndarray, " f"]) -> float | None:
  """Pearson's coefficient; None where either does not vary."""
  if len(a) < 2 or min(np.ptp(a), np.ptp(b)) < 1e-9:
    return None
  value = float(np.corrcoef(a, b)[0, 1])
  return value if math.isfinite(value) else None
