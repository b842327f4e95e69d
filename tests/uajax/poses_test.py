"""Poses that go on for ever: walked, recut, or of a camera of one's own."""

import copy
import json
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from uajax import poses
from uajax.errors import UserError
from uajax.types import Camera

FRAMES = 400
K: Any = np.array([[250, 0, 64], [0, 250, 64], [0, 0, 1]], np.float32)


def clip(frames=FRAMES, seed=0):
  """Cameras of a head that nods and shakes in no regular way."""
  rng = np.random.default_rng(seed)
  wander = np.cumsum(rng.normal(size=(frames + 80, 3)), axis=0)
  wander = np.stack([np.convolve(x, np.hanning(41) / 20, "valid") for x in wander.T], 1)[:frames]
  wander = 0.08 * (wander - wander.mean(0)) / wander.std(0)
  made = []
  for turn in Rotation.from_rotvec(wander).as_matrix():
    view: Any = np.eye(4, dtype=np.float32)
    view[:3, :3], view[:3, 3] = turn @ np.diag([1, -1, -1]), [0, 0, 0.7]
    made.append(Camera(view, K))
  return made


def film(course, cameras):
  views = [poses.between(cameras[a], cameras[b], float(share))
           for a, b, share in zip(*course, strict=True)]
  return poses._seen(views, np.zeros(3))


def test_the_walk_goes_on_without_a_jump():
  at = poses.walk(100, np.arange(7))
  assert len(at) == 100 and set(at) == set(range(7))
  assert np.abs(np.diff(at)).max() == 1 and at[:14].tolist() == [*range(7), *range(5, -1, -1), 1]


def test_the_walk_stays_in_the_longest_whole_stretch():
  ids = np.r_[0:5, 40:60, 62:70, 500:510]  # one frame missing inside the second does not matter
  at = poses.walk(200, ids)
  assert ids[at].min() == 40 and ids[at].max() == 69
  assert poses.walk(3, np.array([4])).tolist() == [0, 0, 0]


def test_a_recut_moves_as_smoothly_as_the_clip_and_does_not_return():
  cameras, ids = clip(), np.arange(FRAMES)
  course = poses.recut(3000, ids, cameras, np.zeros(3), np.random.default_rng(0))
  assert all(len(part) == 3000 for part in course)
  assert course.main.min() >= 0 and max(course.main.max(), course.other.max()) < FRAMES
  own, made = poses._seen(cameras, np.zeros(3)), film(course, cameras)
  pace = lambda x: np.abs(np.diff(x, axis=0)).mean(1)
  assert pace(made).max() < 1.5 * pace(own).max()  # no jump
  assert own.min() - 0.1 <= made.min() and made.max() <= own.max() + 0.1  # nothing unseen
  # The walk is the same again after twice the clip; the recut is nowhere the same as before.
  walked = film(poses.steady(poses.walk(3000, ids)), cameras)
  again = lambda x, lag: np.abs(x[lag:] - x[:-lag]).mean()
  usual = np.abs(own - own.mean(0)).mean()
  lags = range(100, 1400, 2)
  assert min(again(walked, lag) for lag in lags) < 0.01 * usual
  assert min(again(made, lag) for lag in lags) > 0.5 * usual
  assert len(np.unique(course.main)) > 0.7 * FRAMES
  same = poses.recut(3000, ids, cameras, np.zeros(3), np.random.default_rng(0))
  other = poses.recut(3000, ids, cameras, np.zeros(3), np.random.default_rng(1))
  np.testing.assert_array_equal(course.main, same.main)
  assert (course.main != other.main).mean() > 0.5


def test_a_recut_never_crosses_what_was_left_out():
  ids = np.r_[0:200, 900:1100]
  course = poses.recut(2000, ids, clip(), np.zeros(3), np.random.default_rng(0))
  for part in (course.main, course.other):
    alone = (course.share[1:] == 0) & (course.share[:-1] == 0) & (np.abs(np.diff(part)) <= 1)
    assert not ((part[1:] >= 200) != (part[:-1] >= 200))[alone].any()
  assert {bool(i >= 200) for i in course.main} == {True, False}


def test_a_clip_too_short_to_be_cut_is_walked():
  short = poses.recut(300, np.arange(40), clip(40), np.zeros(3), np.random.default_rng(0))
  np.testing.assert_array_equal(short.main, poses.walk(300, np.arange(40)))
  assert not short.share.any()


def test_loudness_is_followed_only_where_the_clip_does():
  rng = np.random.default_rng(0)
  moving = np.convolve(rng.normal(size=2000), np.ones(50) / 50, "same")
  assert poses.follows(moving + 0.1 * moving.std() * rng.normal(size=2000), moving) > 0.9
  assert poses.follows(np.convolve(rng.normal(size=2000), np.ones(50) / 50, "same"), moving) == 0
  assert poses.follows(np.zeros(2000), moving) == 0


def test_the_orbit_goes_about_the_head_and_back():
  camera, centre = clip(2)[0], np.array([0.01, 0.02, 0.0])
  for time_s, side in ((0.0, 0), (2.0, 1), (4.0, 0), (6.0, -1), (8.0, 0)):
    seen = poses.orbit(camera, 30.0, time_s, centre)
    point = np.r_[centre, 1]
    np.testing.assert_allclose(seen.viewmat @ point, camera.viewmat @ point, atol=1e-6)
    turn = Rotation.from_matrix(camera.viewmat[:3, :3].T @ seen.viewmat[:3, :3])
    np.testing.assert_allclose(turn.as_rotvec(degrees=True), [0, 30 * side, 0], atol=1e-3)


def keys(**changes):
  frame = {"viewmat": clip(2)[0].viewmat.tolist(), "K": K.tolist()}
  frames = [copy.deepcopy(frame) | {"time_s": time_s} for time_s in (0, 2)]
  return {"width": 128, "height": 128, "frames": frames} | changes


def test_a_camera_path_is_read_scaled_and_filled_in(tmp_path):
  said = keys()
  said["frames"][1]["viewmat"][2][3] = 1.7
  (tmp_path / "p.json").write_text(json.dumps(said))
  path = poses.read_path(tmp_path / "p.json", 256, 256, K)
  np.testing.assert_allclose(path.at(0.5).K, [[500, 0, 128], [0, 500, 128], [0, 0, 1]])
  assert [round(float(path.at(t).viewmat[2, 3]), 4) for t in (-1, 0, 1, 2, 9)] == [
    0.7, 0.7, 1.2, 1.7, 1.7]


@pytest.mark.parametrize(("spoil", "words"), [
  (lambda said: said.update(frames=[]), 'no list "frames"'),
  (lambda said: said["frames"][1].pop("viewmat"), 'frame 1 has no "viewmat"'),
  (lambda said: said["frames"][0].update(viewmat=[[1, 2], [3, 4]]), "frame 0, viewmat must be"),
  (lambda said: said["frames"][0]["viewmat"][0].__setitem__(0, float("nan")), "finite"),
  (lambda said: said["frames"][0]["viewmat"][0].__setitem__(0, 9), "no rotation"),
  (lambda said: said["frames"][0]["K"][0].__setitem__(0, -1), "positive focal"),
  (lambda said: said["frames"][1].update(time_s=0), "frame 1: time_s must rise"),
  (lambda said: said["frames"][1].update(time_s="late"), "frame 1, time_s must be"),
  (lambda said: said.update(width=0), "positive numbers of pixels"),
])  # fmt: skip
def test_a_path_that_cannot_be_is_refused_in_one_line(tmp_path, spoil, words):
  said = keys()
  spoil(said)
  (tmp_path / "p.json").write_text(json.dumps(said))
  with pytest.raises(UserError, match=words) as caught:
    poses.read_path(tmp_path / "p.json", 128, 128, K)
  assert "\n" not in str(caught.value)


def test_no_file_and_no_json_are_told(tmp_path):
  with pytest.raises(UserError, match="cannot be read"):
    poses.read_path(tmp_path / "none.json", 128, 128, K)
  (tmp_path / "p.json").write_text("{")
  with pytest.raises(UserError, match="is no JSON"):
    poses.read_path(tmp_path / "p.json", 128, 128, K)
