from typing import NamedTuple

import numpy as np
import pytest

from uajax.preprocess import landmarks, track

SIZE = 256


@pytest.fixture(scope="module")
def mesh(shared):
  return landmarks.Landmarker(shared("models/face_landmarker.task"), threads=1).mesh


def make_clip(mesh, focal, frames=75, noise_px=0.2, seed=0):
  """A head that turns and nods and speaks, and its landmarks with noise."""
  rng = np.random.default_rng(seed)
  shape = np.zeros((landmarks.LANDMARKS, 3))
  shape[:468] = mesh.vertices - track.CENTRE + rng.normal(0, 0.001, (468, 3))
  shape[468:473] = shape[landmarks.RIGHT_EYE].mean(0)
  shape[473:] = shape[landmarks.LEFT_EYE].mean(0)
  t = np.arange(frames) / 25
  turns = np.stack([
    0.12 * np.sin(2 * np.pi * 0.6 * t), 0.2 * np.sin(2 * np.pi * 0.4 * t + 1), 0.06 * np.sin(5 * t)
  ], 1)  # fmt: skip
  viewmats = np.tile(np.eye(4), (frames, 1, 1))
  for f, turn in enumerate(turns):
    viewmats[f, :3, :3] = np.diag([1.0, -1.0, -1.0]) @ track._rotation(turn)
  distance = focal / SIZE * 0.35
  viewmats[:, :3, 3] = np.stack(
    [0.01 * np.sin(2 * t), 0.01 * np.cos(3 * t), distance + 0.02 * np.sin(t)], 1
  )
  jaw = np.abs(np.sin(2 * np.pi * 2.3 * t))
  scores = np.tile(rng.uniform(0, 0.02, (1, 52)), (frames, 1))
  scores[:, landmarks.BLENDSHAPES.index("jawOpen")] = jaw
  lower = np.zeros(landmarks.LANDMARKS)
  lower[[17, 84, 314, 14, 87, 317, 152, 148, 377, 175]] = 0.02
  faces = shape[None] - jaw[:, None, None] * lower[None, :, None] * [0.0, 1.0, 0.3]
  at = np.einsum("fab,fpb->fpa", viewmats[:, :3, :3], faces) + viewmats[:, None, :3, 3]
  points = focal * at / at[:, :, 2:]
  points[..., 2] = focal * (at[..., 2] - at[..., 2].mean(1, keepdims=True)) / distance
  points[..., :2] += SIZE / 2 + rng.normal(0, noise_px, points[..., :2].shape)
  return points, scores, viewmats


def turn_error_deg(a, b):
  each = np.einsum("fab,fac->fbc", a[:, :3, :3], b[:, :3, :3])
  return np.degrees([np.linalg.norm(track._logm(r)) for r in each])


class Fitted(NamedTuple):
  found: track.Track
  truth: np.ndarray  # viewmats
  present: np.ndarray
  calls: int


@pytest.fixture(scope="module")
def fitted(mesh):
  """What is found of three seconds in which the face is gone for a moment."""
  points, scores, truth = make_clip(mesh, focal=500.0)
  present = np.ones(len(points), bool)
  present[30:34] = False  # no face there: the pose goes on smoothly
  points[30:34] = np.nan
  calls = []
  found = track.fit(
    points, scores, present, mesh, SIZE, SIZE, focal_px=500.0, advance=lambda: calls.append(1)
  )
  return Fitted(found, truth, present, len(calls))


def test_recovers_known_poses_and_leaves_speech_out_of_them(fitted):
  found, truth, present, calls = fitted
  assert calls == track.steps(500.0)
  assert turn_error_deg(found.viewmats, truth)[present].max() < 0.5
  assert turn_error_deg(found.viewmats, truth)[~present].max() < 1.0
  distance = found.viewmats[:, 2, 3] / truth[:, 2, 3]
  assert np.abs(distance - 1)[present].max() < 0.01
  assert found.reprojection_px < 0.5 and found.held_out_px < 0.5
  assert found.jitter_px < 0.1 <= found.raw_jitter_px * 10
  assert np.linalg.norm(found.directions[:, 152], axis=1).max() > 0.002  # the chin moves
  assert found.weights[168] > 5 * found.weights[14]  # the nose bridge holds the head, not lips


def test_finds_the_focal_length(mesh):
  points, scores, _ = make_clip(mesh, focal=420.0, noise_px=0.05)
  found = track.fit(points, scores, np.ones(len(points), bool), mesh, SIZE, SIZE, rounds=1)
  assert found.focal_px == pytest.approx(420, rel=0.1) and 0 < found.focal_spread < 0.3


def test_unproject_undoes_project(fitted):
  found = fitted.found
  pixels = track.project(found.shape, found.viewmats, found.focal_px, SIZE, SIZE)
  back = track.unproject(pixels, found, SIZE, SIZE)
  np.testing.assert_allclose(back, np.broadcast_to(found.shape[None], back.shape), atol=1e-9)


def test_jitter_counts_fast_motion_only():
  t = np.arange(100)[:, None, None] / 25
  slow, fast = np.sin(2 * np.pi * 1.0 * t), np.sin(2 * np.pi * 9.0 * t)
  at = np.concatenate([20 * slow, 0 * slow], 2)
  assert track.jitter(at) < 0.2
  shaking = at + np.concatenate([fast, 0 * fast], 2)
  assert track.jitter(shaking) == pytest.approx(np.sqrt(0.5), rel=0.15)


def test_a_jump_of_the_face_is_a_cut(mesh):
  points, _, _ = make_clip(mesh, focal=500.0, frames=20)
  points[10:, :, 0] += 80
  assert np.flatnonzero(track.breaks(points, np.ones(20, bool))).tolist() == [10]


def test_poses_found_otherwise_are_tied_and_the_face_follows(mesh, fitted):
  points, _, _ = make_clip(mesh, focal=500.0)
  shaking = fitted.truth.copy()
  shaking[::2, 0, 3] += 0.001
  firm = np.tile(np.diag([1e6] * 3 + [1e8] * 3), (len(points), 1, 1))
  found = track.repose(fitted.found, shaking, firm, points, fitted.present, SIZE, SIZE)
  assert turn_error_deg(found.viewmats, fitted.truth)[fitted.present].max() < 0.05
  assert found.jitter_px < 0.5 * found.raw_jitter_px
  assert found.reprojection_px < 0.6 and found.held_out_px == found.reprojection_px
