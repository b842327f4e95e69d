"""A head of known shape, drawn by casting rays onto a painted ellipsoid."""

from typing import NamedTuple

import numpy as np
import pytest
import scipy.ndimage
from scipy.spatial.transform import Rotation

from uajax.preprocess import landmarks, refine, track

SIZE, FOCAL, AWAY, FRAMES = 200, 360.0, 0.42, 20


class Scene(NamedTuple):
  pictures: list[np.ndarray]
  truth: np.ndarray  # viewmats
  guess: np.ndarray  # by landmarks that nod with the brows
  found: track.Track
  brows: np.ndarray  # how far they are raised, metres


def draw(viewmat, paint, raised):
  """Paint on the ellipsoid, under a light that does not turn with it; the brows slide up."""
  rays = (np.stack(np.meshgrid(*[np.arange(SIZE) + 0.5] * 2), -1) - SIZE / 2) / FOCAL
  rays = np.concatenate([rays, np.ones((SIZE, SIZE, 1))], -1) @ viewmat[:3, :3]
  eye = -viewmat[:3, :3].T @ viewmat[:3, 3]
  start, along = (eye - refine.MIDDLE) / refine.SEMI_AXES, rays / refine.SEMI_AXES
  a, b, c = (along**2).sum(-1), along @ start, start @ start - 1
  root = b**2 - a * c
  far = (-b - np.sqrt(np.maximum(root, 0))) / a
  at = eye + far[..., None] * rays
  x, y = at[..., 0], at[..., 1]
  brow = np.exp(-(((y - 0.03) / 0.012) ** 2) - ((np.abs(x) - 0.03) / 0.03) ** 2)
  where = np.stack([(0.15 - (y - raised * brow)) / 0.3, (x + 0.1) / 0.2])
  grey = scipy.ndimage.map_coordinates(paint, where * 400, order=1, mode="nearest")
  light = ((at - refine.MIDDLE) / refine.SEMI_AXES) @ viewmat[:3, :3].T @ [-0.3, -0.3, -0.9]
  return np.where(root > 0, grey * (0.6 + 0.4 * light), 90).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def scene():
  rng = np.random.default_rng(0)
  paint = 130 + 60 * scipy.ndimage.gaussian_filter(rng.normal(size=(400, 400)), 4) * 12
  t = np.arange(FRAMES) / 16
  brows = 0.004 * np.sin(9 * t) ** 2
  turns = np.stack([0.07 * np.sin(5 * t), 0.11 * np.sin(4 * t + 1), 0.03 * np.sin(6 * t)], 1)
  truth = np.tile(np.eye(4), (FRAMES, 1, 1))
  truth[:, :3, :3] = np.diag([1.0, -1.0, -1.0]) @ Rotation.from_rotvec(turns).as_matrix()
  truth[:, :3, 3] = np.stack([0.004 * np.sin(3 * t), 0.003 * np.cos(4 * t), AWAY + 0 * t], 1)
  guess = truth.copy()
  nods = np.stack([8 * brows, 0 * t, 0 * t], 1)  # of 2 degrees
  guess[:, :3, :3] = Rotation.from_rotvec(nods).as_matrix() @ guess[:, :3, :3]
  points = np.zeros((478, 3))
  points[:, 0], points[:, 1] = rng.uniform(-0.05, 0.05, 478), rng.uniform(-0.07, 0.06, 478)
  square = ((points - refine.MIDDLE) / refine.SEMI_AXES)[:, :2] ** 2
  points[:, 2] = refine.MIDDLE[2] + refine.SEMI_AXES[2] * np.sqrt(np.clip(1 - square.sum(1), 0, 1))
  found = track.Track(
    FOCAL, guess, points, np.zeros((1, 478, 3)), brows[:, None] / 0.004, np.ones(478), 0, 0, 0, 0
  )
  pictures = [draw(v, paint, up) for v, up in zip(truth, brows, strict=True)]
  return Scene(pictures, truth, guess, found, brows)


def turned_deg(found, truth):
  """Errors of rotations but for how the head's own axes are turned."""
  each = Rotation.from_matrix(found[:, :3, :3]).inv() * Rotation.from_matrix(truth[:, :3, :3])
  return np.degrees((each * each.mean().inv()).magnitude())


def test_pictures_tell_nods_from_raised_brows(scene):
  chosen = refine.choose_frames(scene.found, np.ones(FRAMES, bool))
  assert sorted(chosen) == list(range(FRAMES))
  calls = []
  anchors = refine.learn(
    [scene.pictures[f] for f in chosen], scene.guess[chosen], scene.found, np.ones(478),
    lambda: calls.append(1),
  )  # fmt: skip
  assert anchors is not None and len(calls) == len(refine.LEVELS)
  poses = [refine.follow(p, v, anchors)
           for p, v in zip(scene.pictures, scene.guess, strict=True)]  # fmt: skip
  before = turned_deg(scene.guess, scene.truth)
  after = turned_deg(np.stack([viewmat for viewmat, _ in poses]), scene.truth)
  print(before.mean(), after.mean(), after.max())
  assert before.mean() > 0.5 and after.mean() < 0.2 and after.max() < 0.5
  for _, information in poses:
    assert np.linalg.eigvalsh(information).min() > 0
  x, y = np.abs(anchors.points[:, 0]), anchors.points[:, 1]
  brows = (np.abs(y - 0.03) < 0.01) & (x > 0.01) & (x < 0.05)
  below = y < -0.01
  assert np.median(anchors.wander[brows]) > 2 * np.median(anchors.wander[below])


def test_a_head_without_texture_keeps_its_poses(scene):
  blank = [np.full((SIZE, SIZE), 128, np.uint8)] * 4
  assert refine.learn(blank, scene.guess[:4], scene.found, np.ones(478)) is None


def test_pictures_tell_the_focal_length(scene):
  wrong = refine.refocus(scene.found, 0.8 * FOCAL, 0.3)
  scores = np.zeros((FRAMES, 52))
  scores[:, landmarks.BLENDSHAPES.index("browInnerUp")] = scene.brows / scene.brows.max()
  calm = refine.choose_calm_frames(np.ones(FRAMES, bool), scores)
  assert sorted(calm) == list(range(FRAMES))
  pictures = [scene.pictures[f] for f in calm]
  focal_px, spread = refine.find_focal(pictures, wrong.viewmats[calm], wrong, np.ones(478))
  print(focal_px, spread)
  assert focal_px == pytest.approx(FOCAL, rel=0.05) and 0 < spread < 0.1
  blank = [np.full((SIZE, SIZE), 128, np.uint8)] * 4
  assert refine.find_focal(blank, wrong.viewmats[:4], wrong, np.ones(478)) == (0.8 * FOCAL, 0.3)


def test_calm_frames_are_those_of_least_expression():
  scores = np.zeros((400, 52))
  scores[200:, landmarks.BLENDSHAPES.index("browDownLeft")] = np.linspace(0.1, 0.9, 200)
  scores[:, landmarks.BLENDSHAPES.index("jawOpen")] = np.arange(400) % 2
  present = np.ones(400, bool)
  present[:100] = False
  calm = refine.choose_calm_frames(present, scores)
  assert len(calm) == refine.SAMPLES == len(set(calm))
  assert min(calm) >= 100 and max(calm) < 320
