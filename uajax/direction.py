"""Stage directions: what the face does when, where the user says so instead of the recording.

A file of spans, JSON or CSV, each with a beginning and an end in seconds and what holds between:

    [{"from": 0, "to": 2.5, "emotion": "happy", "intensity": 0.7},
     {"from": 2, "to": 4, "AU04": 3, "AU45": 0}]

    from,to,emotion,intensity,AU04
    0,2.5,happy,0.7,
    2,,,,3

An end left out is the film's. What a span leaves out stays as it was; where spans overlap the
later one in the file counts. Every span eases in and out. Units are those of the network, in
OpenFace's scale: AU01 and AU04 (brows up, drawn down), AU05 and AU07 (upper lid up, lids tight),
AU06 (cheeks), AU45 (eyes closed).

Axes: f frames.
"""

import csv
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from uajax.errors import UserError
from uajax.types import ACTION_UNITS, FPS

EASE_S = 0.24  # that a span takes to begin and to end
STRONGEST = dict.fromkeys(ACTION_UNITS, 5.0) | {"AU45": 2.0}  # as the network is trained with
MOST_BYTES, MOST_SPANS = 2**20, 10_000  # of a file


class Span(NamedTuple):
  """What holds from `begin_s` until `end_s`."""

  begin_s: float
  end_s: float  # infinity: the film's end
  emotion: str | None
  intensity: float
  units: Mapping[str, float]


def read(path: str | os.PathLike) -> list[Span]:
  """The spans of a JSON or CSV file.

  Raises:
    UserError: no such file, too large, neither form, or a span that says what cannot be.
  """
  path = pathlib.Path(path)
  try:
    if path.stat().st_size > MOST_BYTES:
      raise UserError(f"{path} is larger than {MOST_BYTES >> 20} MiB: it is no file of spans")
    text = path.read_text(encoding="utf-8-sig")
    rows = json.loads(text) if path.suffix.lower() == ".json" else _table(text)
  except (UnicodeDecodeError, ValueError, csv.Error, RecursionError) as error:
    raise UserError(f"{path} is neither JSON nor CSV ({str(error)[:100]}): see "
                    "`uajax synthesize --help` for how spans are written") from None
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}): give a file of spans") from None
  if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
    raise UserError(f"{path} holds no list of spans: write [{{\"from\": 0, \"to\": 2, ...}}, ...]")
  if not 0 < len(rows) <= MOST_SPANS:
    raise UserError(f"{path} holds {len(rows)} spans: give 1 to {MOST_SPANS}")
  return [_span(row, f"{path}, span {i + 1}") for i, row in enumerate(rows)]


def units_of(words: Iterable[str]) -> dict[str, float]:
  """Action units from words like "AU04=2". Raises UserError for what is none."""
  found = {}
  for word in words:
    name, _, value = word.partition("=")
    found |= _units({name: value}, f"--au {word}")
  return found


def whole_film(units: Mapping[str, float]) -> Span:
  """A span that holds from the first frame to the last."""
  return Span(-EASE_S, math.inf, None, 1.0, units)


def feel(
  spans: Sequence[Span], emotion: Float[np.ndarray, "f 128"],
  resolve: Callable[[str, float], Float[np.ndarray, " 128"]], begin: int = 0,
) -> Float[np.ndarray, "f 128"]:
  """The emotion of every frame, eased from what it was to what spans ask for.

  Args:
    resolve: the feature of an emotion by name and intensity (`emotion.control.resolve`).
    begin: the film's frame at which `emotion` begins.
  """
  emotion = np.array(emotion, np.float32)
  for span in spans:
    if span.emotion is not None:
      share = weight(span, len(emotion), begin)[:, None]
      emotion += share * (resolve(span.emotion, span.intensity)[None] - emotion)
  return emotion


def act(spans: Sequence[Span], units: Float[np.ndarray, "f 6"], begin: int = 0
        ) -> Float[np.ndarray, "f 6"]:
  """The action units of every frame, `begin` the first, eased likewise."""
  units = np.array(units, np.float32)
  for span in spans:
    share = weight(span, len(units), begin)
    for name, value in span.units.items():
      column = ACTION_UNITS.index(name)
      units[:, column] += share * (value - units[:, column])
  return units


def weight(span: Span, frames: int, begin: int = 0) -> Float[np.ndarray, " f"]:
  """How much a span counts from frame `begin` on: 0 to 1 and back, smoothly, inside of it."""
  time = (begin + np.arange(frames) + 0.5) / FPS
  ease = min(EASE_S, (span.end_s - span.begin_s) / 2)
  inside = np.clip(np.minimum(time - span.begin_s, span.end_s - time) / ease, 0, 1)
  return (inside**2 * (3 - 2 * inside)).astype(np.float32)


def _table(text: str) -> list[dict[str, Any]]:
  reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
  if not {"from", "to"} & {name.strip() for name in reader.fieldnames or ()}:
    raise ValueError("its first line names no column from or to")
  rows = []
  for row in reader:
    if None in row or None in row.values():
      raise ValueError(f"line {reader.line_num} has not as many cells as the first")
    rows.append({key.strip(): value.strip() for key, value in row.items() if value.strip()})
  return rows


def _span(row: Mapping[str, Any], where: str) -> Span:
  known = {"from", "to", "emotion", "intensity"}
  begin_s = _number(row.get("from", 0), f"{where}: from")
  end_s = math.inf if row.get("to") is None else _number(row["to"], f"{where}: to")
  if not 0 <= begin_s < end_s:
    raise UserError(f"{where}: it lasts from {begin_s:g} to {end_s:g} s: begin at 0 or later, end "
                    "after that")
  emotion = row.get("emotion")
  if emotion is not None and not isinstance(emotion, str):
    raise UserError(f"{where}: emotion {emotion!r} is no name")
  if emotion is None and "intensity" in row:
    raise UserError(f"{where}: an intensity of no emotion: name one")
  intensity = _number(row.get("intensity", 1), f"{where}: intensity")
  units = _units({key: row[key] for key in row if key not in known}, where)
  if emotion is None and not units:
    raise UserError(f"{where}: it asks for nothing: give an emotion or an action unit")
  return Span(begin_s, end_s, emotion, intensity, units)


def _units(said: Mapping[str, Any], where: str) -> dict[str, float]:
  found = {}
  for name, value in said.items():
    unit = str(name).strip().upper()
    if unit not in ACTION_UNITS:
      raise UserError(f"{where}: {name!r} is nothing that the face is driven by: known are "
                      f"{', '.join(ACTION_UNITS)}")
    found[unit] = _number(value, f"{where}: {unit}")
    if not 0 <= found[unit] <= STRONGEST[unit]:
      raise UserError(f"{where}: {unit} of {found[unit]:g} is outside 0 to {STRONGEST[unit]:g}")
  return found


def _number(value: Any, where: str) -> float:
  try:
    number = float(value) if not isinstance(value, bool) else math.nan
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  if not math.isfinite(number):
    raise UserError(f"{where}: {value!r} is no number")
  return number
