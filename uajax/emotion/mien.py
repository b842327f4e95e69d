"""Brows and lids that go with what is felt, as they did in the training clip.

A film's action units are borrowed from the clip, whose person felt something of its own there. What
of them goes with a feeling is taken out and given back as the film's feeling asks: a clip's frown
is no part of a happy film. What is left, accents and habits, stays. Where the clip's emotions have
no names (no emotion.csv) nothing is known of that, and nothing changes.

Axes: n training frames, k emotions besides neutral.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from uajax.blinks import EYES
from uajax.emotion.control import BEYOND, Prototype
from uajax.types import ACTION_UNITS

HIGHEST = 5.0  # of an action unit
DOUBT = 0.02  # share of the frames by which a feeling must stand out to count


class Mien(NamedTuple):
  """What each feeling does to the face, linear in how far it goes."""

  neutral: Float[np.ndarray, " 128"]
  ways: Float[np.ndarray, "128 k"]  # from neutral to how far each emotion goes: 1 in full
  units: Float[np.ndarray, "k 6"]  # ACTION_UNITS in full; none of lids that shut

  def felt(self, emotion: Float[np.ndarray, "*f 128"]) -> Float[np.ndarray, "*f k"]:
    """How far each emotion goes in distilled features: 0 to BEYOND."""
    return np.clip((np.asarray(emotion) - self.neutral) @ self.ways, 0, BEYOND)

  def without(self, units: Float[np.ndarray, "*f 6"], emotion: Float[np.ndarray, "*f 128"]
              ) -> Float[np.ndarray, "*f 6"]:
    """Action units less what was felt; values below zero are what a feeling held down."""
    return units - self.felt(emotion) @ self.units

  def put_on(self, units: Float[np.ndarray, "*f 6"], emotion: Float[np.ndarray, "*f 128"]
             ) -> Float[np.ndarray, "*f 6"]:
    """The reverse, within 0..5."""
    return np.clip(units + self.felt(emotion) @ self.units, 0, HIGHEST).astype(np.float32)


def learn(prototypes: Mapping[str, Prototype], emotion: Float[np.ndarray, "n 128"],
          units: Float[np.ndarray, "n 6"]) -> Mien:
  """What goes with what in the training frames: ridge regression of action units on feelings.

  Args:
    prototypes: of named emotions, see `emotion.control`; without any the mien is empty.
    emotion: distilled features of the frames; zeros where they are not at hand.
    units: ACTION_UNITS of the frames, 0..5.
  """
  named = [each for each in prototypes.values() if len(each.levels) > 1]
  if not named or not np.any(emotion):
    return Mien(np.zeros(emotion.shape[1]), np.zeros((emotion.shape[1], 0)),
                np.zeros((0, len(ACTION_UNITS))))
  far = np.stack([each.vectors[-1] - each.vectors[0] for each in named]).astype(np.float64)
  alike = far @ far.T
  # Emotions that sound much alike share what cannot be told apart.
  ways = np.linalg.solve(alike + DOUBT * np.trace(alike) / len(alike) * np.eye(len(alike)), far).T
  mien = Mien(named[0].vectors[0].astype(np.float64), ways, np.zeros((len(named), units.shape[1])))
  felt = mien.felt(emotion)
  centred = felt - felt.mean(0)
  shown = np.linalg.solve(centred.T @ centred + DOUBT * len(felt) * np.eye(len(named)),
                          centred.T @ (units - units.mean(0)))
  shown[:, EYES] = 0
  return mien._replace(units=shown)
