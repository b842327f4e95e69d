"""How well emotion is heard in speakers never met: `python -m uajax.emotion.crossvalidate --help`.

Every speaker (or group of speakers) of a corpus is held out in turn; the emotion network is trained
on all the others from scratch and judged on them. An utterance's label is the one of the largest
mean log probability over its windows (method.md B.2). Beside it, in the same run and on the same
speakers, a linear model on the mean and deviation of each utterance's 40 MFCC: multinomial
logistic, classes balanced, L2. Prints unweighted average recall (the mean of the labels' recalls),
confusion matrices and seconds; `--out` writes them as JSON.

The settings (`CORPUS`) were chosen by means over speakers and seeds, never by one speaker.

Axes: n utterances, l labels, d features.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from uajax.emotion import corpora, distill
from uajax.emotion.corpora import Utterance
from uajax.emotion.distill import NEUTRAL, DistillConfig, Recording
from uajax.emotion.network import EmotionConfig
from uajax.errors import UserError
from uajax.figures import tell
from uajax.priors.fit import FitConfig
from uajax.progress import Progress
from uajax.speech import features
from uajax.speech.features import Views
from uajax.speech.wav2vec2 import Wav2Vec2Config
from uajax.types import FPS, SAMPLE_RATE_HZ

LABELS = ("angry", "happy", NEUTRAL, "sad")  # method.md B.2
SPEEDS = (0.9, 0.95, 1.05, 1.1)  # tempo and pitch of the copies that teach besides
PENALTY = 1e-2  # of the linear model's squared weights
LONGEST_S = 30.0  # of an utterance


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
  """Settings for some hundred utterances, minutes on two cores."""

  emotion: EmotionConfig
  distill: DistillConfig
  speeds: tuple[float, ...] = SPEEDS


CORPUS = CorpusConfig(
  emotion=EmotionConfig(
    window_s=3.0,
    image=(80, 150),
    channels=1,
    convolutions=(8, 16, 24, 24, 24),
    look_pool="statistics",
    lstm=32,
    lstm_layers=1,
    lstm_pool="statistics",
    lstm_stride=3,
    cepstra="standard",
    deltas=True,
    standardise=True,
    skip_silence=True,
    dropout=0.5,
    tap="F2",
    wav_pool="statistics",
    wav=Wav2Vec2Config(
      conv_channels=16,
      conv_kernels=(160, 8),
      conv_strides=(80, 8),
      hidden=32,
      layers=1,
      heads=4,
      feed_forward=64,
      position_kernel=16,
      position_groups=4,
    ),
  ),
  distill=DistillConfig(
    stride=5,
    smoothing=0.1,
    tilt_db=3.0,
    mask_steps=50,
    fit=FitConfig(steps=800, batch=16, rate=2e-3, block=100, averaging=0.98, weight_decay=0.05),
  ),
)


class Heard(NamedTuple):
  """An utterance, decoded once for all folds."""

  utterance: Utterance
  whole: Views
  copies: tuple[Views, ...]  # at other speeds
  summary: Float[np.ndarray, " 80"]  # mean and deviation of the cepstra


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description="Hears emotion in speakers never met.")
  parser.add_argument("corpus", help=f"folder of {corpora.KNOWN}, or a CSV path,label,speaker")
  parser.add_argument("--labels", nargs="+", default=list(LABELS))
  parser.add_argument("--groups", type=int, help="of speakers, held out together; else each alone")
  parser.add_argument("--seeds", type=int, nargs="+", default=[0])
  parser.add_argument("--steps", type=int, default=CORPUS.distill.fit.steps, help="of a training")
  parser.add_argument("--out", type=pathlib.Path, help="JSON file for the figures")
  args = parser.parse_args(argv)
  fit = dataclasses.replace(CORPUS.distill.fit, steps=args.steps)
  config = dataclasses.replace(CORPUS, distill=dataclasses.replace(CORPUS.distill, fit=fit))
  return tell(
    lambda: run(args.corpus, args.labels, config, groups=args.groups, seeds=args.seeds), describe,
    args.out)


def run(
  source: str | pathlib.Path,
  labels: Sequence[str],
  config: CorpusConfig = CORPUS,
  *,
  groups: int | None = None,
  seeds: Sequence[int] = (0,),
) -> dict:
  """All folds for all seeds; the figures as plain values.

  Raises:
    UserError: see `corpora.read` and `corpora.splits`; or a label is not in the corpus.
  """
  labels = list(dict.fromkeys(labels))
  found = corpora.read(source)
  known = sorted({u.label for u in found})
  missing = [label for label in labels if label not in known]
  if missing or len(labels) < 2:
    raise UserError(
      f"labels {', '.join(labels)}: choose at least two of those in {source}: {', '.join(known)}"
    )
  chosen = [u for u in found if u.label in labels]
  folds = corpora.splits(chosen, groups, judge=False)
  began, began_cpu = time.monotonic(), time.process_time()
  heard = decode(chosen, config.speeds)
  decoded_s = time.monotonic() - began
  truth = np.array([labels.index(u.label) for u in chosen])
  names = [NEUTRAL, *(label for label in labels if label != NEUTRAL)]  # as `distill.shares` has it
  order = [names.index(label) for label in labels]
  linear = np.zeros(len(chosen), int)
  network = np.zeros((len(seeds), len(chosen), len(labels)))
  for fold in folds:
    summaries = np.stack([h.summary for h in heard])
    weights = logistic(summaries[fold.learn], truth[fold.learn], len(labels))
    linear[fold.test] = weights.predict(summaries[fold.test]).argmax(axis=1)
  for s, seed in enumerate(seeds):
    for fold in folds:
      print(f"seed {seed}, held out: {', '.join(fold.held_out)}", file=sys.stderr, flush=True)
      odds = learn(
        [heard[i] for i in fold.learn], [heard[i] for i in fold.test], names, config, seed
      )
      network[s, fold.test] = odds[:, order]
  confusions = [confusion(truth, rows.argmax(axis=1), len(labels)) for rows in network]
  together = confusion(truth, network.mean(axis=0).argmax(axis=1), len(labels))
  baseline = confusion(truth, linear, len(labels))
  return {
    "corpus": str(source),
    "labels": labels,
    "utterances": len(chosen),
    "held_out": [list(fold.held_out) for fold in folds],
    "seeds": list(seeds),
    "settings": dataclasses.asdict(config),
    "network": [_figures(c) for c in confusions],
    "network_mean_recall": float(np.mean([recall(c) for c in confusions])),
    "network_all_seeds": _figures(together),
    "linear": _figures(baseline),
    "decoding_s": decoded_s,
    "training_s": (time.monotonic() - began - decoded_s) / len(seeds),  # all folds of one seed
    "cpu_s": time.process_time() - began_cpu,
  }


def describe(report: dict) -> str:
  """The figures as text."""
  labels = report["labels"]

  def table(title: str, figures: dict) -> list[str]:
    width = max(len(label) for label in labels) + 1
    head = "".join(f"{label:>{width}}" for label in labels)
    rows = [
      f"{label:>{width}}" + "".join(f"{n:>{width}}" for n in row)
      for label, row in zip(labels, figures["confusion"], strict=True)
    ]
    return [f"{title}: recall {figures['recall']:.3f} (rows: said, columns: heard)",
            " " * width + head, *rows]  # fmt: skip

  lines = []
  for seed, figures in zip(report["seeds"], report["network"], strict=True):
    lines += table(f"emotion network, seed {seed}", figures)
  if len(report["seeds"]) > 1:
    lines.append(
      f"emotion network, mean over the seeds: recall {report['network_mean_recall']:.3f}"
    )
    lines += table("emotion network, log probabilities averaged over the seeds",
                   report["network_all_seeds"])  # fmt: skip
  lines += table("linear model on MFCC statistics", report["linear"])
  lines.append(
    f"{report['utterances']} utterances, {len(report['held_out'])} folds; decoding"
    f" {report['decoding_s']:.0f} s, training {report['training_s']:.0f} s a seed,"
    f" {report['cpu_s']:.0f} s of processor time in all; the waveform's branch starts from scratch"
  )
  return "\n".join(lines)


def decode(utterances: Sequence[Utterance], speeds: Sequence[float]) -> list[Heard]:
  """Reads every utterance and makes its views, and those of its copies at other speeds."""
  import librosa

  from uajax import media

  heard = []
  progress = Progress("utterances decoded", len(utterances))
  for utterance in utterances:
    wav = media.read_audio(utterance.path, limit_s=LONGEST_S)
    try:
      wav = features.checked(wav)
    except UserError as error:
      raise UserError(f"{utterance.path}: {error}") from error
    cepstra = features.mfcc(wav)
    copies = tuple(
      features.views(librosa.resample(
        wav, orig_sr=SAMPLE_RATE_HZ * speed, target_sr=SAMPLE_RATE_HZ, res_type="soxr_mq"))
      for speed in speeds
    )  # fmt: skip
    summary = np.concatenate([cepstra.mean(axis=0), cepstra.std(axis=0)])
    heard.append(Heard(utterance, features.views(wav), copies, summary))
    progress.advance()
  progress.close()
  return heard


def learn(
  taught: Sequence[Heard],
  tested: Sequence[Heard],
  names: Sequence[str],
  config: CorpusConfig,
  seed: int,
) -> Float[np.ndarray, "n l"]:
  """Trains on some utterances; the log probabilities of others' labels."""
  recordings = [
    recording(views, h.utterance.label, names, config.emotion.window_s)
    for h in taught
    for views in (h.whole, *h.copies)
  ]
  spread = distill.ranges(recordings)
  fitted = distill.train(recordings, spread, len(names), config.emotion, config.distill, seed=seed)
  rows = []
  for h in tested:
    at = middles(h.whole, config.emotion.window_s)[:: config.distill.stride]
    _, odds = distill.feel(fitted.params["trunk"], h.whole, at, spread, len(names), config.emotion)
    rows.append(np.log(np.maximum(odds, 1e-12)).mean(axis=0))
  return np.stack(rows)


def middles(whole: Views, window_s: float) -> Int[np.ndarray, " m"]:
  """The frames whose windows lie inside the recording; its middle one where none does."""
  frames = features.frame_count(whole.waveform.size)
  half = round(window_s * FPS / 2)
  return np.arange(half, frames - half) if frames > 2 * half else np.array([frames // 2])


def recording(whole: Views, label: str, names: Sequence[str], window_s: float) -> Recording:
  """An utterance as `distill.train` takes it; its label at full intensity (B.3: one-hot)."""
  frames = features.frame_count(whole.waveform.size)
  teaching = distill.shares([label] * frames, np.ones(frames, np.float32), names)
  used = np.zeros(frames, bool)
  used[middles(whole, window_s)] = True
  return Recording(whole, teaching, used, np.zeros(frames, bool))


class Logistic(NamedTuple):
  mean: Float[np.ndarray, " d"]
  deviation: Float[np.ndarray, " d"]
  weights: Float[np.ndarray, "d l"]
  bias: Float[np.ndarray, " l"]

  def predict(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n l"]:
    return (x - self.mean) / self.deviation @ self.weights + self.bias


def logistic(
  x: Float[np.ndarray, "n d"], truth: Int[np.ndarray, " n"], labels: int, penalty: float = PENALTY
) -> Logistic:
  """Multinomial logistic regression, every class of equal weight, `penalty` |weights|^2."""
  from scipy import optimize

  mean, deviation = x.mean(axis=0), x.std(axis=0) + 1e-6
  rows = (x - mean) / deviation
  share = 1 / np.maximum(np.bincount(truth, minlength=labels), 1)[truth]
  share /= share.sum()
  said = np.eye(labels)[truth]

  def loss(flat):
    weights = flat.reshape(x.shape[1] + 1, labels)
    logits = rows @ weights[:-1] + weights[-1]
    logits -= logits.max(axis=1, keepdims=True)
    log_odds = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    value = -(share * (said * log_odds).sum(axis=1)).sum() + penalty * (weights[:-1] ** 2).sum()
    d_logits = share[:, None] * (np.exp(log_odds) - said)
    d_weights = rows.T @ d_logits + 2 * penalty * weights[:-1]
    return value, np.concatenate([d_weights, d_logits.sum(axis=0)[None]]).ravel()

  start = np.zeros((x.shape[1] + 1) * labels)
  found: Any = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
  weights = found.x.reshape(x.shape[1] + 1, labels)
  return Logistic(mean, deviation, weights[:-1], weights[-1])


def confusion(
  truth: Int[np.ndarray, " n"], heard: Int[np.ndarray, " n"], labels: int
) -> Int[np.ndarray, "l l"]:
  """Counts; a row for each label said, a column for each heard."""
  counts = np.zeros((labels, labels), int)
  np.add.at(counts, (truth, heard), 1)
  return counts


def recall(counts: Int[np.ndarray, "l l"]) -> float:
  """Unweighted average recall."""
  return float((np.diag(counts) / np.maximum(counts.sum(axis=1), 1)).mean())


def _figures(counts: Int[np.ndarray, "l l"]) -> dict:
  return {"recall": recall(counts), "confusion": counts.tolist()}


if __name__ == "__main__":
  sys.exit(main())
