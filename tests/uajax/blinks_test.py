"""Blinks: the person's own rate, length and depth, or people's where a clip shows too few."""

import numpy as np

from uajax import blinks

IDS = np.arange(1500)


def units(begins, length, rest=0.1, strength=1.6, frames=1500):
  table = np.zeros((frames, 6), np.float32)
  table[:, blinks.EYES] = rest
  for begin in begins:
    table[begin : begin + length, blinks.EYES] = strength
  return table


def runs(track, above):
  edges = np.flatnonzero(np.diff(np.r_[False, track > above, False].astype(int)))
  return edges[::2], edges[1::2]


def test_a_film_blinks_as_often_as_long_and_as_strongly_as_the_clip():
  clip = units(range(30, 1500, 50), 8)  # twice as often as people do, and slowly
  habit = blinks.habit(clip, IDS)
  np.testing.assert_allclose([habit.rest, habit.strength], [0.1, 1.6], atol=1e-6)
  track = blinks.track(habit, 25 * 600, np.random.default_rng(0))
  begins, ends = runs(track, 0.5)
  assert abs(len(begins) - 300) < 20 and abs((ends - begins).mean() - 8) < 1
  assert track.min() == np.float32(0.1) and track.max() <= np.float32(1.6)
  assert len(set(np.diff(begins))) > 1  # no clockwork
  other = blinks.track(habit, 25 * 600, np.random.default_rng(1))
  assert (track != other).any()
  np.testing.assert_array_equal(track, blinks.track(habit, 25 * 600, np.random.default_rng(0)))


def test_eyes_shut_for_long_and_blinks_cut_by_a_gap_are_none():
  clip = units([100, 300, 500, 700, 900], 5)
  clip[1100:1160, blinks.EYES] = 1.6
  ids = IDS.copy()
  ids[502:] += 100  # frames are missing in the midst of the third
  assert len(blinks.habit(clip, ids).shapes) == 4


def test_where_a_clip_shows_too_few_people_s_habit_is_taken():
  few = blinks.habit(units([200, 600, 1000], 8), IDS)
  flat = blinks.habit(units([], 0) + np.random.default_rng(0).uniform(0, 0.1, (1500, 6)), IDS)
  for habit in (few, flat):
    begins, _ = runs(blinks.track(habit, 25 * 60, np.random.default_rng(0)),
                     (habit.rest + habit.strength) / 2 - 1e-6)
    assert 10 <= len(begins) <= 30  # a minute
  assert flat.strength < 0.2  # never more than was seen
