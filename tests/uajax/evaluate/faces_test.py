"""Measures of faces: closed forms, SciPy's matrix root, and one real face."""

import numpy as np
import pytest
import scipy.linalg

from uajax import media
from uajax.evaluate import faces
from uajax.preprocess import action_units, landmarks


def test_frechet_distance_is_that_of_scipys_matrix_root():
  rng = np.random.default_rng(0)
  a = rng.normal(size=(60, 9)) @ rng.normal(size=(9, 9))
  b = rng.normal(size=(45, 9)) @ rng.normal(size=(9, 9)) + 1
  cov_a, cov_b = np.cov(a.T), np.cov(b.T)
  root = scipy.linalg.sqrtm(cov_a @ cov_b).real
  truth = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
  assert faces.frechet(a, b) == pytest.approx(truth, rel=1e-6)
  assert faces.frechet(a, a) == pytest.approx(0, abs=1e-6)
  # Gaussians of one dimension: the squares of how means and spreads differ.
  wide = 3 * a[:, :1] + 7
  spread = 2 * a[:, 0].std(ddof=1)
  assert faces.frechet(a[:, :1], wide) == pytest.approx(
    (wide.mean() - a[:, 0].mean()) ** 2 + spread**2
  )
  assert faces.frechet(a[:5], b[:4]) > 0  # fewer rows than columns


def test_jitter_is_none_of_even_motion_and_sees_no_motion_over_gaps():
  t = np.arange(8.0)
  even = np.stack([np.stack([3 * t, -t], -1)] * 4, 1)
  assert faces.jitter(even, np.arange(8)) == pytest.approx(0)
  shaken = even.copy()
  shaken[::2, :, 1] += 0.5  # up and down: second differences of 1
  assert faces.jitter(shaken, np.arange(8)) == pytest.approx(1.0)
  jump = even.copy()
  jump[4:] += 100
  ids = np.where(t < 4, t, t + 9).astype(int)
  assert faces.jitter(jump, ids) == pytest.approx(0)
  assert faces.jitter(even[:3], np.array([0, 1, 5])) is None


@pytest.fixture(scope="module")
def landmarker(shared):
  return landmarks.Landmarker(shared("models/face_landmarker.task"), threads=1)


def as_points(mesh, gap_m=0.0, size=1500.0):
  """The average face as the network would give it in a picture, its lips apart."""
  base = np.zeros((landmarks.LANDMARKS, 3))
  base[: len(mesh.vertices)] = mesh.vertices
  base[[14, 178, 402, 87, 317, 88, 318, 95, 324, 17], 1] -= gap_m
  return base * np.array([1, -1, -1]) * size + np.array([200.0, 150.0, 0.0])


def test_faces_are_laid_upon_the_average_one(landmarker):
  mesh = landmarker.mesh
  c, s = np.cos(0.4), np.sin(0.4)
  turn = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
  points = np.stack([as_points(mesh), as_points(mesh, size=700.0) @ turn])
  found = faces.to_head(points, mesh)
  for face in found:
    np.testing.assert_allclose(face[: len(mesh.vertices)], mesh.vertices, atol=1e-9)


def pair(mesh, gap_m=(0.0, 0.0), **scores):
  table = np.full((2, len(landmarks.BLENDSHAPES)), 0.1)
  for name, value in scores.items():
    table[1, landmarks.BLENDSHAPES.index(name)] = value
  return faces.Pair(np.stack([as_points(mesh, g) for g in gap_m]), table)


def test_equal_faces_have_no_error_and_what_differs_is_named(landmarker):
  mesh = landmarker.mesh
  same = [pair(mesh) for _ in range(6)]
  found = faces.compare([*same, None], np.arange(7), mesh)
  zeros = ("lmd_px", "mouth_lmd_px", "aue_upper", "aue_lower", "e_fid", "jitter_px")
  assert all(found.figures[name] == pytest.approx(0, abs=1e-4) for name in zeros)
  assert found.figures["frames"] == 6 and np.isnan(found.per_frame["lmd_px"][6])

  smiles = [pair(mesh, mouthSmileLeft=0.9, mouthSmileRight=0.9) for _ in range(6)]
  figures = faces.compare(smiles, np.arange(6), mesh).figures
  errors = figures["au_squared_errors"]
  # From a rest of 0.1 to 0.9: 5 * 0.8 / 0.9, though the render smiles all the time.
  assert errors["AU12"] == pytest.approx((5 * 0.8 / 0.9) ** 2, rel=1e-6)
  assert figures["aue_upper"] == pytest.approx(errors["AU06"]) == pytest.approx(
    0.36 * errors["AU12"]
  )
  assert figures["aue_lower"] == pytest.approx(errors["AU12"])
  assert figures["e_fid"] == pytest.approx(2 * 0.8**2)  # means 0.8 apart in two scores

  opened = faces.compare([pair(mesh, gap_m=(0, 0.01))] * 3, np.arange(3), mesh)
  # Those landmarks of the 68 that were lowered: 3 of the inner lips, 3 of the outer.
  lowered = np.isin(landmarks.IBUG[48:], [14, 178, 402, 87, 317, 88, 318, 95, 324, 17]).mean()
  expected = 0.01 * 1500 * 2 * lowered * (1 - lowered)  # each set is centred
  assert opened.figures["mouth_lmd_px"] == pytest.approx(expected, rel=1e-4)
  widened = opened.per_frame["gap_mm"] - opened.per_frame["truth_gap_mm"]
  np.testing.assert_allclose(widened, 10, rtol=0.05)
  assert opened.figures["au_squared_errors"]["AU25"] == pytest.approx(4, rel=0.1)  # 10 of 25 mm
  assert opened.figures["mouth_opening_correlation"] is None, "neither of them moves"
  talks = [pair(mesh, gap_m=(gap, 0.5 * gap)) for gap in (0.0, 0.002, 0.01)]
  figures = faces.compare(talks, np.arange(3), mesh).figures
  assert figures["mouth_opening_correlation"] == pytest.approx(1, abs=0.01)


def test_the_halves_of_the_face_are_those_of_the_method():
  assert set(faces.LOWER) == {f"AU{n}" for n in (10, 12, 14, 15, 17, 20, 23, 25, 26)}
  assert len(faces.UPPER) == 8 and set(faces.UPPER + faces.LOWER) == set(action_units.NAMES)


def test_a_real_face_that_was_only_moved_has_no_landmark_distance(landmarker, shared):
  image = next(iter(media.read_frames(shared("data/clips/obama_20s.mp4"))))
  reader = faces.Reader(landmarker)
  moved = reader.read(image, np.roll(image, 3, 1))
  figures = faces.compare([moved], np.array([0]), landmarker.mesh).figures
  assert figures["lmd_px"] < 0.02 * figures["eye_distance_px"]
  narrow = reader.read(image, squeeze(image))
  assert faces.compare([narrow], np.array([0]), landmarker.mesh).figures["lmd_px"] > 3 * (
    figures["lmd_px"]
  )
  assert reader.read(image, np.zeros_like(image)) is None
  assert reader.read(np.zeros_like(image), image) is None


def squeeze(image):
  """A tenth lower, about the middle."""
  height = len(image)
  rows = np.clip(np.round((np.arange(height) - height / 2) / 0.9 + height / 2), 0, height - 1)
  return image[rows.astype(int)]


def test_units_are_held_against_what_is_known():
  truth = np.sin(np.arange(20.0))
  read = np.stack([truth, -truth], 1)
  read[3] = np.nan
  found = faces.judge({"AU12": read}, {"AU12": truth, "AU45": truth, "AU99": truth})
  assert found == {"AU12": {"true_picture": pytest.approx(1), "render": pytest.approx(-1)}}
  assert faces.judge({"AU12": read}, {"AU12": 0.01 * truth}) == {}
  assert faces.correlate(truth, np.ones(20)) is None
