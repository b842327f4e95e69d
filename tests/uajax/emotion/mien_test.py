"""A face that feels something: brows go with the film's emotion, not with the clip's."""

import numpy as np
import pytest

from uajax.blinks import EYES
from uajax.emotion import mien
from uajax.emotion.control import Prototype
from uajax.types import ACTION_UNITS

FROWN, CHEEKS = ACTION_UNITS.index("AU04"), ACTION_UNITS.index("AU06")
LEVELS = np.array([0.0, 1.0], np.float32)


@pytest.fixture(scope="module")
def clip():
  """Feelings that come and go, what they do, and brows that move besides: 400 frames."""
  rng = np.random.default_rng(0)
  neutral, happy, angry = rng.normal(size=(3, 128))
  how_far = np.zeros((400, 2))
  how_far[50:150, 0], how_far[250:350, 1] = 1, 0.6
  ways = np.stack([happy - neutral, angry - neutral])
  emotion = neutral + how_far @ ways + 0.1 * rng.normal(size=(400, 128))
  units = np.zeros((400, 6))
  units[:, CHEEKS], units[:, FROWN] = 3 * how_far[:, 0], 4 * how_far[:, 1]
  units[:, 0] = np.linspace(0, 2, 400)
  units[::40, EYES] = 2
  known = {"neutral": Prototype(LEVELS[:1], neutral[None]),
           "happy": Prototype(LEVELS, np.stack([neutral, happy])),
           "angry": Prototype(LEVELS, np.stack([neutral, angry]))}
  return known, emotion, units


def test_the_clips_frown_is_no_part_of_a_happy_film(clip):
  known, emotion, units = clip
  learnt = mien.learn(known, emotion, units)
  frowning, happy = slice(260, 340), known["happy"].vectors[1]
  film = learnt.put_on(learnt.without(units, emotion)[frowning], happy)
  assert units[frowning, FROWN].min() > 2 and film[:, FROWN].max() < 0.6
  assert film[:, CHEEKS].min() > 2.3  # 3 would be all of it
  half = learnt.put_on(learnt.without(units, emotion)[frowning],
                       (happy + known["neutral"].vectors[0]) / 2)
  assert (half[:, CHEEKS] < 0.7 * film[:, CHEEKS]).all()


def test_what_the_clips_own_feelings_ask_for_is_what_it_shows(clip):
  known, emotion, units = clip
  learnt = mien.learn(known, emotion, units)
  again = learnt.put_on(learnt.without(units, emotion), emotion)
  np.testing.assert_allclose(again, units, atol=1e-5)
  np.testing.assert_array_equal(learnt.without(units, emotion)[:, EYES], units[:, EYES])


@pytest.mark.parametrize("lacks", ["names", "features"])
def test_where_nothing_is_known_of_feelings_brows_stay_the_clips(clip, lacks):
  known, emotion, units = clip
  learnt = mien.learn({} if lacks == "names" else known,
                      0 * emotion if lacks == "features" else emotion, units)
  np.testing.assert_array_equal(learnt.without(units, emotion), units)
  np.testing.assert_allclose(learnt.put_on(units, emotion[::-1]), units, atol=1e-6)
