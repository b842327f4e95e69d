"""How well expression is heard in speech held out: `python -m uajax.priors.heldout SUBJECT`.

The Lip Expert that `uajax extract` trained is judged on the subject's validation frames, which
taught nobody. Beside it, on the same frames, ridge regression from the same mel windows, whose
penalty blocks of the training frames choose, and the mean of the training frames. Prints, for
each group of coefficients, the mean correlation with tracked expression and the root mean square
error in deviations of the training frames; `--out` writes them as JSON.

Axes: f frames, d numbers of a window, k coefficients.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from uajax.errors import UserError
from uajax.figures import tell
from uajax.priors import extract
from uajax.speech import features
from uajax.types import EMOTION, EXPRESSION

BLOCKS = 5  # of consecutive training frames, left out in turn to choose the penalty
PENALTIES = tuple(10.0 ** (k / 2) for k in range(-4, 5))  # against standardised windows
STILL = 1e-3  # deviation below which a coefficient says nothing
MOUTH = {  # columns of `preprocess.action_units.express`
  "jaw and lips (blendshapes)": range(22, 49),
  "gap of the lips": range(51, 52),
  "height of the lips": range(52, 53),
  "width of the mouth": range(53, 54),
  "motion of lips and chin": range(54, 64),
  "all of jaw and lips": (*range(22, 49), *range(51, 64)),
}
PREDICTORS = ("Lip Expert", "ridge", "mean")


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description="Hears expression in speech held out.")
  parser.add_argument("subject", type=pathlib.Path, help="subject folder, features extracted")
  parser.add_argument("--out", type=pathlib.Path, help="JSON file for the figures")
  args = parser.parse_args(argv)
  return tell(lambda: run(args.subject), describe, args.out)


def run(subject: str | pathlib.Path) -> dict:
  """The figures as plain values.

  Raises:
    UserError: the subject is damaged or has no held-out frames; its extractors are missing, or
      learnt from other frames than those that now are for training.
  """
  path = pathlib.Path(subject)
  material = extract.read(path)
  extractors = extract.load(path / extract.FOLDER)
  if extractors.provenance.get("digests") != material.digests:
    raise UserError(
      f"{path / extract.FOLDER} learnt from other files than {path} now holds: run `uajax extract`"
      " again"
    )
  train, val = material.ids["train"], material.ids["val"]
  if len(val) < 2:
    raise UserError(f"{path} holds out {len(val)} frames: give one with at least 2 to judge by")
  frames = len(material.expression)
  # The emotion is given, whatever it is: hearing it takes long and has no say in f_exp.
  speech = extract.hear(extractors, material.wav, frames, emotion=np.zeros(EMOTION, np.float32))
  windows = features.lip_windows(material.wav, frames, lead=extractors.config.lip.lead)
  rows = windows.reshape(frames, -1)
  deviation = material.expression[train].std(axis=0)
  varies = deviation > STILL
  unit = np.where(varies, deviation, 1.0)[None, :]
  truth = material.expression / unit
  said = {
    "Lip Expert": extract.expression(extractors, speech) / unit,
    "ridge": ridge(rows[train], truth[train], rows),
    "mean": np.broadcast_to(truth[train].mean(axis=0), truth.shape),
  }
  groups: Mapping[str, Sequence[int]] = {"all 64": range(EXPRESSION)}
  if (path / "report.json").exists() and (path / "expression.npy").exists():
    groups = {**MOUTH, **groups}  # made by `uajax preprocess`: what each column is, is known
  table = {}
  for name, columns in groups.items():
    chosen = np.array([c for c in columns if varies[c]], int)
    if len(chosen):
      table[name] = {
        who: _figures(x[val][:, chosen], truth[val][:, chosen]) for who, x in said.items()
      } | {"taught": _figures(said["Lip Expert"][train][:, chosen], truth[train][:, chosen])}
  return {
    "subject": str(path),
    "training_frames": len(train),
    "held_out_frames": len(val),
    "groups": table,
  }


def describe(report: dict) -> str:
  """The figures as text."""
  width = max(map(len, report["groups"])) + 2
  lines = [
    f"{report['held_out_frames']} frames held out, {report['training_frames']} for training;"
    " correlation (error in deviations)",
    " " * width + "".join(f"{who:>16}" for who in PREDICTORS) + f"{'where taught':>16}",
  ]
  for name, figures in report["groups"].items():
    cells = [figures[who] for who in (*PREDICTORS, "taught")]
    texts = [f"{c['correlation']:.3f} ({c['error']:.3f})" for c in cells]
    lines.append(f"{name:<{width}}" + "".join(f"{text:>16}" for text in texts))
  return "\n".join(lines)


def ridge(
  x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n k"], wanted: Float[np.ndarray, "f d"]
) -> Float[np.ndarray, "f k"]:
  """Predicts `wanted` by ridge regression from x to y.

  Blocks of consecutive rows, left out in turn, choose each column's penalty of `PENALTIES`.
  """
  blocks = np.array_split(np.arange(len(x)), min(BLOCKS, len(x)))
  errors = np.zeros((len(PENALTIES), y.shape[1]))
  for block in blocks if len(blocks) > 1 else []:
    rest = np.setdiff1d(np.arange(len(x)), block)
    for i, said in enumerate(_ridges(x[rest], y[rest], x[block])):
      errors[i] += np.square(said - y[block]).sum(axis=0)
  best = errors.argmin(axis=0)
  answers = np.stack(_ridges(x, y, wanted))
  return np.take_along_axis(answers, best[None, None, :], axis=0)[0]


def _ridges(x, y, wanted) -> list[np.ndarray]:
  """What ridge regression under each of `PENALTIES` says, by the rows' products."""
  mean, deviation = x.mean(axis=0), x.std(axis=0) + 0.1
  known, asked = (x - mean) / deviation, (wanted - mean) / deviation
  values, vectors = np.linalg.eigh((known @ known.T / x.shape[1]).astype(np.float64))
  near = asked @ known.T / x.shape[1] @ vectors
  told = vectors.T @ (y - y.mean(axis=0))
  return [near @ (told / (values[:, None] + p)) + y.mean(axis=0) for p in PENALTIES]


def correlation(
  a: Float[np.ndarray, "f k"], b: Float[np.ndarray, "f k"]
) -> Float[np.ndarray, " k"]:
  """Pearson's, of each column; 0 where one of the two does not move."""
  moves = (np.ptp(a, axis=0) > 1e-6) & (np.ptp(b, axis=0) > 1e-6)
  a, b = a - a.mean(axis=0), b - b.mean(axis=0)
  scale = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
  return np.where(moves, (a * b).sum(axis=0) / np.where(moves, scale, 1.0), 0.0)


def _figures(said: Float[np.ndarray, "f k"], truth: Float[np.ndarray, "f k"]) -> dict[str, float]:
  return {
    "correlation": float(correlation(said, truth).mean()),
    "error": float(np.sqrt(np.square(said - truth).mean())),
  }


if __name__ == "__main__":
  sys.exit(main())
