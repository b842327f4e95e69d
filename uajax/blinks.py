"""Eyes that blink in their own time, as the person does: how often, how fast, how far.

Habits are read from the training frames' AU45 (0 open .. 2 shut). A clip that shows too few
blinks leaves what it does not show to what people do on average.

Axes: n training frames, f frames of the film, b blinks, t frames of a blink.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from uajax.types import ACTION_UNITS, FPS

EYES = ACTION_UNITS.index("AU45")
SHAPE = (0.5, 0.9, 1.0, 0.9, 0.5)  # of a full blink, a value a frame: 0.2 s
GAPS_S = (2.0, 5.5)  # between blinks: about 16 a minute, as people do
ENOUGH = 4  # blinks that tell a habit
LONGEST_S = 0.8  # eyes shut for longer are no blink
SHORTEST_GAP_S = 0.3


class Habit(NamedTuple):
  """How someone blinks."""

  rest: float  # AU45 between blinks
  strength: float  # AU45 of a full blink
  shapes: tuple[Float[np.ndarray, " t"], ...]  # 0 open .. 1 as shut as `strength`
  gaps_s: Float[np.ndarray, " b"]  # from the end of one to the beginning of the next, rising


def habit(action_units: Float[np.ndarray, "n 6"], ids: Int[np.ndarray, " n"]) -> Habit:
  """How the person of the training frames blinks.

  A blink rises above half way between rest (the median) and the strong ones (99th percentile),
  and lasts until AU45 is back within a fifth of that way.

  Args:
    ids: frame numbers in the source video, rising.
  """
  shut = np.clip(action_units[:, EYES], 0, 2).astype(np.float64)
  rest, strength = float(np.median(shut)), float(np.percentile(shut, 99))
  usual = Habit(rest, strength, (np.array(SHAPE),), np.linspace(*GAPS_S, 36))
  if strength - rest < 0.25:  # eyes that hardly move: what looks like blinks would be noise
    return usual
  closed = (shut - rest) / (strength - rest)
  # Frames that were left out part one stretch from the next: no blink reaches over.
  spans: list[tuple[int, int]] = []
  gaps: list[float] = []
  for stretch in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(ids) > 1) + 1):
    before = None
    for begin, end in _blinks(closed[stretch]):
      spans.append((stretch[0] + begin, stretch[0] + end))
      if before is not None:
        gaps.append((begin - before) / FPS)
      before = end
  shapes = tuple(np.clip(closed[begin:end], 0, 1) for begin, end in spans)
  if len(shapes) < ENOUGH:
    return usual
  # Short clips show few gaps: what lies between them is as likely as they are.
  gaps_s = np.quantile(gaps, np.linspace(0, 1, 36)) if len(gaps) >= ENOUGH - 1 else usual.gaps_s
  return usual._replace(shapes=shapes, gaps_s=np.maximum(gaps_s, SHORTEST_GAP_S))


def _blinks(closed: Float[np.ndarray, " n"]) -> list[tuple[int, int]]:
  """Begin and end of every whole blink of a stretch, 0 open .. 1 shut."""
  low = np.concatenate([[False], closed > 0.2, [False]])
  edges = np.flatnonzero(np.diff(low.astype(np.int8)))
  found = []
  for begin, end in zip(edges[::2], edges[1::2], strict=True):
    whole = begin > 0 and end < len(closed)
    if whole and closed[begin:end].max() > 0.5 and end - begin <= LONGEST_S * FPS:
      found.append((int(begin), int(end)))
  return found


def track(habit: Habit, frames: int, rng: np.random.Generator) -> Float[np.ndarray, " f"]:
  """AU45 of a film in which the person blinks at random, but as is their habit.

  A shape lasts up to a fifth longer or shorter than it was seen, so that none returns exactly.
  """
  closed = np.zeros(frames)
  at_s = 0.0
  while True:
    at_s += np.quantile(habit.gaps_s, rng.uniform())
    begin = round(at_s * FPS)
    if begin >= frames:
      return (habit.rest + (habit.strength - habit.rest) * closed).astype(np.float32)
    shape = habit.shapes[rng.integers(len(habit.shapes))]
    length = max(round(len(shape) * rng.uniform(0.8, 1.2)), 2)
    # Open just before and after it, where the shape ends.
    times = np.linspace(0, len(shape) + 1, length + 2)[1:-1]
    pulse = np.interp(times, np.arange(len(shape) + 2), np.pad(shape, 1))
    if shape.max() > 0.5 and pulse.max() < shape.max():  # the peak fell between two frames
      pulse *= shape.max() / pulse.max()
    end = min(begin + length, frames)
    closed[begin:end] = pulse[: end - begin]
    at_s += length / FPS
