"""Corpora of acted speech, read by their own conventions, and split by speaker.

| corpus  | a file                               | intensity                                  |
| ------- | ------------------------------------ | ------------------------------------------ |
| EmoDB   | 03a01Fa.wav                          | 1                                          |
| RAVDESS | 03-01-06-01-02-01-12.wav             | normal 2/3, strong 1; songs are left out   |
| CREMA-D | 1001_DFA_ANG_XX.wav                  | LO 1/3, MD 2/3, HI 1, unspecified (XX) 1   |
| MEAD    | M003/audio/angry/level_1/001.m4a     | level / 3; of the videos the frontal ones  |
|         | M003/video/front/angry/level_1/...   | serve where there is no sound file         |
| any     | a CSV: path,label[,speaker,intensity] | as given, else 1                          |

Neutral has intensity 0 everywhere. Labels are MEAD's (method.md B.3), with calm and bored besides.
"""

import csv
import math
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from uajax.emotion.distill import NEUTRAL
from uajax.errors import UserError

LABELS = (
  NEUTRAL, "angry", "contempt", "disgusted", "fear", "happy", "sad", "surprised", "calm", "bored",
)  # fmt: skip
KNOWN = "EmoDB, RAVDESS, CREMA-D and MEAD"
_SOUND = (".wav", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".aac")  # liked best first
_FILMS = (".mp4", ".mov", ".mkv", ".avi", ".flv", ".webm")

_EMODB = {
  "W": "angry", "L": "bored", "E": "disgusted", "A": "fear", "F": "happy", "T": "sad",
  "N": NEUTRAL,
}  # fmt: skip
_RAVDESS = (NEUTRAL, "calm", "happy", "sad", "angry", "fear", "disgusted", "surprised")  # from 01
_CREMA = {
  "ANG": "angry", "DIS": "disgusted", "FEA": "fear", "HAP": "happy", "NEU": NEUTRAL, "SAD": "sad",
}  # fmt: skip
_CREMA_LEVELS = {"LO": 1 / 3, "MD": 2 / 3, "HI": 1.0, "XX": 1.0, "X": 1.0}  # X: a slip in one name
_OTHER_NAMES = {
  "anger": "angry", "disgust": "disgusted", "fearful": "fear", "happiness": "happy", "joy": "happy",
  "sadness": "sad", "surprise": "surprised", "boredom": "bored", "calmness": "calm",
}  # fmt: skip


class Utterance(NamedTuple):
  path: pathlib.Path  # sound, or a video with sound
  speaker: str  # "" where a CSV does not say
  label: str
  intensity: float  # 0 (neutral) to 1 (full)
  text: str  # what is said, as the corpus numbers it, or ""


class Split(NamedTuple):
  """Rows of utterances; no speaker is in two of them (Q52)."""

  held_out: tuple[str, ...]  # the speakers to test on
  learn: Int[np.ndarray, " n"]
  judge: Int[np.ndarray, " j"]  # says when to stop; empty if that was not asked for
  test: Int[np.ndarray, " t"]


def read(source: str | os.PathLike) -> list[Utterance]:
  """The utterances of a corpus folder, however deep they lie, or of a CSV; in order of path.

  Files that do not bear a name of the corpus are passed over. Nothing is decoded yet.

  Raises:
    UserError: nothing there, of no known convention, or a CSV with wrong columns or values.
  """
  path = pathlib.Path(source)
  if not path.exists():
    raise UserError(f"{path} does not exist: give the folder of a speech corpus, or a CSV")
  if path.is_file():
    if path.suffix.lower() != ".csv":
      raise UserError(f"{path} is neither a folder nor a .csv: give a speech corpus as one of them")
    return _read_csv(path)
  files = sorted(
    f
    for f in path.rglob("*")
    if f.suffix.lower() in _SOUND + _FILMS and not f.name.startswith(".") and f.is_file()
  )
  if not files:
    raise UserError(f"{path} holds no recordings: give the folder of {KNOWN}, or a CSV")
  readings = [_named(files, path, convention) for convention in _CONVENTIONS]
  found = max(readings, key=len)
  if not found:
    raise UserError(
      f"{path}: no file is named as in {KNOWN} (the first is {files[0].name}): give such a folder,"
      " or a CSV with columns path,label,speaker,intensity"
    )
  return found


def splits(
  utterances: Sequence[Utterance], groups: int | None = None, *, judge: bool = True
) -> list[Split]:
  """Every speaker, or every one of `groups` groups of speakers, held out once.

  Groups hold about as many utterances each. With `judge` the group after the one held out (the
  first after the last) says when to stop, and does not teach.

  Raises:
    UserError: too few speakers, or speakers are not known.
  """
  who = np.array([u.speaker for u in utterances])
  if "" in who:
    raise UserError(
      f"{utterances[int(np.argmax(who == ''))].path}: its speaker is not known, so none can be held"
      " out: fill in the column speaker of the CSV"
    )
  names, counts = np.unique(who, return_counts=True)
  groups = len(names) if groups is None else groups
  least = 3 if judge else 2
  if not least <= groups <= len(names):
    raise UserError(
      f"{len(names)} speakers cannot be held out in {groups} groups: it takes at least {least}"
      " groups, and a speaker for each"
    )
  parts: list[list[str]] = [[] for _ in range(groups)]
  sizes = np.zeros(groups, int)
  for i in np.argsort(-counts, kind="stable"):  # the largest first, each to the smallest group
    into = int(sizes.argmin())
    parts[into].append(str(names[i]))
    sizes[into] += counts[i]
  parts.sort()
  made = []
  for g, part in enumerate(parts):
    test = np.isin(who, part)
    judged = np.isin(who, parts[(g + 1) % groups]) if judge else np.zeros(len(who), bool)
    rows = (np.flatnonzero(x) for x in (~test & ~judged, judged, test))
    made.append(Split(tuple(sorted(part)), *rows))
  return made


def _named(
  files: Sequence[pathlib.Path],
  root: pathlib.Path,
  convention: Callable[[tuple[str, ...]], tuple[tuple[str, ...], Utterance] | None],
) -> list[Utterance]:
  """What `convention` makes of the files: the best liked file of each utterance."""
  best: dict[tuple[str, ...], tuple[int, Utterance]] = {}
  for file in files:
    # The folder given may itself be that of a speaker, so its own name counts too.
    parts = file.resolve().relative_to(root.resolve().parent).with_suffix("").parts
    made = convention(parts)
    if made is None:
      continue
    key, utterance = made
    rank = (*_SOUND, *_FILMS).index(file.suffix.lower())
    if key not in best or rank < best[key][0]:
      best[key] = rank, utterance._replace(path=file)
  return [utterance for _, utterance in sorted(best.values(), key=lambda x: x[1].path)]


def _utterance(speaker: str, label: str, intensity: float, text: str) -> Utterance:
  return Utterance(pathlib.Path(), speaker, label, 0.0 if label == NEUTRAL else intensity, text)


def _emodb(parts: tuple[str, ...]):
  match = re.fullmatch(r"(\d\d)([a-z]\d\d)([WLEAFTN])([a-z]?)", parts[-1])
  if match is None:
    return None
  speaker, text, letter, _ = match.groups()
  return (parts[-1],), _utterance(speaker, _EMODB[letter], 1.0, text)


def _ravdess(parts: tuple[str, ...]):
  match = re.fullmatch(r"(0[13])-01-(0[1-8])-(0[12])-(\d\d)-(\d\d)-(\d\d)", parts[-1])
  if match is None:  # pictures alone (02-...) and songs (..-02-...) among them
    return None
  _, emotion, strength, text, _, actor = match.groups()
  label = _RAVDESS[int(emotion) - 1]
  intensity = {"01": 2 / 3, "02": 1.0}[strength]
  return (parts[-1][2:],), _utterance(actor, label, intensity, text)


def _crema(parts: tuple[str, ...]):
  match = re.fullmatch(r"(\d{4})_([A-Z]{3})_([A-Z]{3})_(LO|MD|HI|XX?)", parts[-1])
  if match is None or match[3] not in _CREMA:
    return None
  speaker, text, emotion, level = match.groups()
  return (parts[-1],), _utterance(speaker, _CREMA[emotion], _CREMA_LEVELS[level], text)


def _mead(parts: tuple[str, ...]):
  match = re.search(
    r"(?:^|/)([MW]\d{3})/(?:audio|video/front)/([a-z]+)/level_([123])/([^/]+)$", "/".join(parts)
  )
  if match is None or match[2] not in LABELS:
    return None
  speaker, label, level, text = match.groups()
  return (speaker, label, level, text), _utterance(speaker, label, int(level) / 3, text)


_CONVENTIONS = (_emodb, _ravdess, _crema, _mead)


def _read_csv(path: pathlib.Path) -> list[Utterance]:
  needed, allowed = {"path", "label"}, {"path", "label", "speaker", "intensity"}
  try:
    with open(path, newline="", encoding="utf-8-sig") as file:
      lines = [[v.strip() for v in row] for row in csv.reader(file)]
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise UserError(f"{path} cannot be read as a CSV ({error}): save it as UTF-8 text") from error
  columns = [c.lower() for c in lines[0]] if lines else []
  rows = [(line, row) for line, row in enumerate(lines[1:], start=2) if any(row)]
  if not needed <= set(columns) <= allowed or len(set(columns)) != len(columns):
    raise UserError(
      f"{path} has the columns {', '.join(columns) or 'none'}: give path,label and, if known,"
      " speaker,intensity"
    )
  if not rows:
    raise UserError(f"{path} names no recordings: give a row for each")
  return [_row(path, line, columns, row) for line, row in rows]


def _row(path: pathlib.Path, line: int, columns: Sequence[str], row: Sequence[str]) -> Utterance:
  where = f"{path}, row {line}"
  if len(row) != len(columns):
    raise UserError(f"{where} has {len(row)} values for {len(columns)} columns: correct it")
  values = dict(zip(columns, row, strict=True))
  label = values["label"].lower()
  label = _OTHER_NAMES.get(label, label)
  if not label:
    raise UserError(f"{where}: the label is empty: name the emotion, for instance {LABELS[1]}")
  # A separator or a control character in a label would break the files that name it later.
  if not re.fullmatch(r"[\w -]+", label):
    raise UserError(f"{where}: label {label!r}: use letters, digits and spaces")
  file = path.parent / values["path"]
  if not values["path"] or not file.is_file():
    raise UserError(f"{where}: {file} is not there: give paths relative to the CSV")
  intensity = 1.0
  if values.get("intensity"):
    try:
      intensity = float(values["intensity"])
    except ValueError:
      intensity = math.nan
    if not 0.0 <= intensity <= 1.0:
      raise UserError(f"{where}: intensity {values['intensity']!r}: give a number from 0 to 1")
  return _utterance(values.get("speaker", ""), label, intensity, "")._replace(path=file)
