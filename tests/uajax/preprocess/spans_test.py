import numpy as np
import pytest
from PIL import Image

from uajax.preprocess import spans


def picture(seed, person=None):
  """A room of its own, 160 x 90, with a person in it (left, top of a box of 30 x 40)."""
  small = np.random.default_rng(seed).integers(0, 256, (9, 16, 3)).astype(np.uint8)
  image = np.asarray(Image.fromarray(small).resize((160, 90), Image.Resampling.BICUBIC)).copy()
  if person is not None:
    left, top = person
    image[top : top + 40, left : left + 30] = (200, 150, 120)
    image[top + 40 :, max(left - 15, 0) : left + 45] = (30, 30, 60)
  return image


def box(left, top):
  return [left / 160, top / 90, (left + 30) / 160, (top + 40) / 90]


NOBODY = [np.nan] * 4


def judge(shots, yaw=None):
  """Each shot: (room, box or None, frames, segment)."""
  watch, boxes, segments = spans.Shots(), [], []
  noise = np.random.default_rng(9)
  for room, place, frames, segment in shots:
    for f in range(frames):
      where = None if place is None else (place[0] + f % 3, place[1])
      image = picture(room, where)
      grain = noise.integers(-6, 7, image.shape)
      watch.watch(np.clip(image + grain, 0, 255).astype(np.uint8))
      boxes.append(NOBODY if where is None else box(*where))
      segments.append(segment)
  yaw = np.zeros(len(boxes)) if yaw is None else yaw
  why = spans.judge(watch.begins, watch.thumbs(), np.array(boxes), np.array(segments), yaw)
  return watch.begins, why


def test_cuts_are_found_and_motion_is_none():
  begins, why = judge([(1, (60, 20), 30, 0), (2, (60, 20), 30, 1), (1, (62, 20), 30, 2)])
  assert begins == [0, 30, 60]
  begins, why = judge([(1, (20 + 2 * k, 20), 1, 0) for k in range(40)])  # walks through the room
  assert begins == [0] and (why == spans.USED).all()


def test_the_scene_that_lasts_longest_is_used_and_numbers_stay():
  _, why = judge([(1, (60, 20), 30, 0), (2, (60, 20), 40, 1), (1, (62, 20), 30, 2)])
  assert spans.left_out(why) == [spans.Span(30, 69, "another scene")]


def test_another_face_in_the_scene_is_left_out():
  boxes = np.array([box(10, 20)] * 30 + [box(120, 20)] * 20 + [box(11, 20)] * 10)
  segments = np.array([0] * 30 + [1] * 20 + [2] * 10)
  why = spans.judge([0], [np.zeros((18, 32, 3))], boxes, segments, np.zeros(60))
  assert spans.left_out(why) == [spans.Span(30, 49, "another face")]


def test_profiles_gaps_and_chance_finds_are_left_out():
  yaw = np.zeros(100)
  yaw[10:20], yaw[20:30] = 75, 50
  clip = [(1, (60, 20), 60, 0), (1, None, 20, 0), (1, (60, 20), 3, 0), (1, None, 17, 0)]
  _, why = judge(clip, yaw)
  assert spans.left_out(why) == [
    spans.Span(10, 19, "turned to profile"), spans.Span(60, 79, "no face"),
    spans.Span(80, 82, "only a few frames"), spans.Span(83, 99, "no face"),
  ]  # fmt: skip


def test_nobody_at_all():
  _, why = judge([(1, None, 10, 0)])
  assert spans.left_out(why) == [spans.Span(0, 9, "no face")]


def test_runs_end_at_cuts():
  mask = np.array([0, 1, 1, 0, 1, 1, 1], bool)
  assert spans.runs(mask) == [(1, 3), (4, 7)]
  assert spans.runs(mask, [0, 2, 4, 6]) == [(1, 2), (2, 3), (4, 6), (6, 7)]
  assert spans.runs(np.zeros(3, bool)) == []


@pytest.mark.parametrize("motion, still", [(0.0, True), (0.02, True), (2.0, False)])
def test_a_photograph_does_not_move(motion, still):
  rng = np.random.default_rng(0)
  face = rng.uniform(0, 200, (478, 3))
  points = face + motion * np.sin(np.arange(50) / 2)[:, None, None]
  points[10:13] = np.nan
  assert spans.is_still(points) == still
