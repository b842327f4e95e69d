"""Emotion by name and strength: prototypes of the distilled space.

A prototype is what the emotion network heard, on average, in speech of one label at a few
intensities. Between them a named emotion is interpolated, from neutral at 0 upwards; beyond the
strongest that was heard it is extrapolated a little, never far.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from uajax.emotion.distill import NEUTRAL
from uajax.errors import UserError

if TYPE_CHECKING:
  from uajax.priors.extract import Extractors

BEYOND = 1.5  # times the strongest intensity heard: no feature goes further than that


class Prototype(NamedTuple):
  levels: Float[np.ndarray, " k"]  # intensities, rising from 0 (neutral)
  vectors: Float[np.ndarray, "k 128"]


def prototypes(
  rows: Float[np.ndarray, "m 128"], labels: Sequence[str], intensities: Float[np.ndarray, " m"]
) -> dict[str, Prototype]:
  """The prototypes of all labels heard, neutral among them if it was.

  Intensities are grouped in quarters. Without any neutral speech the mean of all stands for it.
  """
  said = np.asarray(labels)
  strength = np.asarray(intensities, np.float32)
  rest = (said == NEUTRAL) | (strength < 0.05)
  zero = rows[rest if rest.any() else slice(None)].mean(axis=0)
  found = {}
  if rest.any():
    found[NEUTRAL] = Prototype(np.zeros(1, np.float32), zero[None])
  for label in sorted(set(said[~rest])):
    mine = (said == label) & ~rest
    quarters = np.maximum(1, np.round(4 * strength)).astype(int)
    levels, vectors = [np.float32(0)], [zero]
    for quarter in np.unique(quarters[mine]):
      these = mine & (quarters == quarter)
      levels.append(strength[these].mean())
      vectors.append(rows[these].mean(axis=0))
    found[str(label)] = Prototype(np.array(levels, np.float32), np.array(vectors, np.float32))
  return found


def names(extractors: "Extractors") -> tuple[str, ...]:
  """The emotions that can be asked for by name."""
  return tuple(sorted(extractors.prototypes))


def resolve(
  extractors: "Extractors", name: str, intensity: float = 1.0
) -> Float[np.ndarray, " 128"]:
  """The standardised emotion feature of `name` at `intensity` (0 neutral, 1 full).

  Raises:
    UserError: no such emotion, or the intensity is negative, not finite or far beyond what was
      heard.
  """
  return interpolate(extractors.prototypes, name, intensity)


def interpolate(
  known: Mapping[str, Prototype], name: str, intensity: float
) -> Float[np.ndarray, " 128"]:
  """`resolve` on prototypes alone."""
  if not known:
    raise UserError(
      f"emotion {name!r} cannot be named: the speech these extractors learnt from had no emotion"
      " labels; give a reference recording, or extract from a subject with emotion.csv"
    )
  name = name.strip().lower()
  if name not in known:
    raise UserError(f"emotion {name!r} is not known: choose one of {', '.join(sorted(known))}")
  if not (np.isfinite(intensity) and 0.0 <= intensity <= 2.0):
    raise UserError(f"intensity {intensity} is outside 0 to 2: 0 is neutral, 1 is full")
  levels, vectors = known[name]
  if len(levels) == 1:
    return vectors[0]
  top = levels[-1]
  if intensity > top:  # on along the whole way from neutral, to the guard
    share = min(intensity / top, BEYOND)
    return (vectors[0] + share * (vectors[-1] - vectors[0])).astype(np.float32)
  right = max(1, int(np.searchsorted(levels, intensity)))
  share = (intensity - levels[right - 1]) / (levels[right] - levels[right - 1])
  return ((1 - share) * vectors[right - 1] + share * vectors[right]).astype(np.float32)
