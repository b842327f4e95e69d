"""Whether the uncertainty means something: `python -m uajax.doubt RUN`.

Two questions, answered with figures as they come out. Is the avatar wrong where it says that it
is unsure? On the frames of a split the uncertainty map is held against the error that the truth
shows, pixel by pixel and frame by frame. And does a modality say so when its input is bad? Noise
is added to the subject's own speech, and each modality's doubt of the face's motion (the trace of
its Gaussian's covariance, method.md C.5) measured before it is fused with the others'. Beside it,
if asked, the doubt about other speech without noise.

Axes: f frames, h w pixels, n splats.
"""

import argparse
import functools
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from scipy.stats import rankdata

from kernels.fusion import fuse_answers
from uajax import metrics, synthesize
from uajax.avatar import Avatar, know
from uajax.errors import UserError
from uajax.figures import tell
from uajax.models.fusion import Ensembles
from uajax.models.motion import FACE_MODALITIES, FaceMotion, Places
from uajax.progress import Progress
from uajax.types import ACTION_UNITS, FACE, HAIR, MOUTH, SAMPLE_RATE_HZ, Controls

SNRS_DB = (30.0, 20.0, 10.0, 0.0)
MOST_DB = 100.0  # either way
FRAMES = 64  # of the noisy speech, evenly spread
TENTH = 10  # the share of pixels that counts as the most uncertain: one in so many
MAINS_HZ, HARMONICS = 50, 10  # of a hum


def measure(
  run_path: str | os.PathLike,
  split: str = "val",
  *,
  snrs_db: Sequence[float] = SNRS_DB,
  noises: Sequence[str | os.PathLike] = ("white",),
  others: Sequence[str | os.PathLike] = (),
  subject: str | os.PathLike | None = None,
  seed: int = 0,
) -> dict:
  """Both answers for the newest avatar of a run.

  Args:
    run_path: a run folder.
    split: whose frames the map is judged on.
    snrs_db: of the speech with noise; its power is that of the whole speech.
    noises: "white", "hum" (of the mains), or a recording, repeated as long as the speech lasts.
    others: recordings of other speech, heard as they are.
    subject: the subject folder, if it is no longer where it was when training.
    seed: of the noise.

  Raises:
    UserError: the run or its subject cannot be read, or it was trained without uncertainty; a
      ratio is out of reach; a recording cannot be read, or a noise is silent.
  """
  from uajax import runs

  for snr_db in snrs_db:
    if not abs(snr_db) <= MOST_DB:
      raise UserError(f"a signal-to-noise ratio of {snr_db} dB: give -{MOST_DB:g} to {MOST_DB:g}")
  run = runs.open_run(run_path)
  avatar = run.avatar()
  if not avatar.config.uncertainty:
    raise UserError(f"{run.path} was trained without uncertainty: train with "
                    "--model.motion.uncertainty")
  return {
    "run": str(run.path), "trained": run.progress(), "calibrated": avatar.config.calibrates,
    "split": split,
    "noise": listen(run, avatar, snrs_db, noises, others, subject, seed),
    "map": judge_map(run, avatar, split, subject),
  }


def judge_map(run, avatar: Avatar, split, subject=None) -> dict[str, float]:
  """How the map of uncertainty goes with the error, on the pixels that are head in the truth.

  Returns:
    pixel_rank_correlation: Spearman's, the mean over frames; frame_correlation: Pearson's, of the
    frames' mean uncertainty and error; error_ratio: the error where the map is in its highest
    tenth, over the error everywhere.
  """
  source = synthesize.open_source(run, split, subject)
  truths = []

  def scenes() -> Iterator[synthesize.Scene]:
    for frame in synthesize.ahead(source.__getitem__, range(len(source))):
      truths.append((frame.image, np.isin(frame.classes, (FACE, HAIR, MOUTH))))
      yield synthesize.Scene(frame.controls, frame.camera, frame.background)

  ranks, ratios, means = [], [], []
  progress = Progress(f"doubt {split}", len(source))
  for i, drawn in enumerate(synthesize.draw(avatar, scenes())):
    truth, head = truths[i]
    truths[i] = None
    found = compare(drawn.uncertainty, drawn.image, truth, head)
    ranks.append(found["rank_correlation"])
    ratios.append(found["error_ratio"])
    means.append((found["uncertainty"], found["error"]))
    progress.advance()
  progress.close()
  doubts, errors = np.array(means, np.float64).T
  return {
    "frames": len(ranks),
    "pixel_rank_correlation": float(np.mean(ranks)),
    "frame_correlation": float(metrics.correlation(jnp.asarray(doubts), jnp.asarray(errors))),
    "error_ratio": float(np.mean(ratios)),
  }


def compare(
  uncertainty: Float[np.ndarray, "h w"],
  image: UInt8[np.ndarray, "h w 3"],
  truth: UInt8[np.ndarray, "h w 3"],
  head: np.ndarray,
) -> dict[str, float]:
  """One frame's figures over the pixels of the mask `head`; errors are mean absolute, of 255."""
  if not head.any():
    return dict(rank_correlation=0.0, error_ratio=1.0, uncertainty=0.0, error=0.0)
  error = np.abs(image.astype(np.float32) - truth).mean(-1)[head]
  doubt = np.asarray(uncertainty, np.float32)[head]
  most = np.argsort(-doubt, kind="stable")[: max(1, len(doubt) // TENTH)]
  ranks = [jnp.asarray(rankdata(x), jnp.float32) for x in (doubt, error)]
  return {
    "rank_correlation": float(metrics.correlation(*ranks)),
    "error_ratio": float(error[most].mean() / max(float(error.mean()), 1e-6)),
    "uncertainty": float(doubt.mean()),
    "error": float(error.mean()),
  }


def listen(
  run, avatar: Avatar, snrs_db: Sequence[float], noises: Sequence[str | os.PathLike] = ("white",),
  others: Sequence[str | os.PathLike] = (), subject=None, seed: int = 0,
) -> list[dict[str, Any]]:
  """Each modality's doubt, the mean over splats and frames, for clean, noisy and other speech.

  Returns:
    a row for the clean speech, for every noise and ratio, and for all other speech: what is heard
    (None, the noise or the file), snr_db (None without noise), and a value for each of
    models.motion.FACE_MODALITIES that the avatar has.
  """
  from uajax import media
  from uajax.priors import extract
  from uajax.speech import features

  path = pathlib.Path(subject) if subject is not None else run.subject
  extractors = extract.load(run.extractors)
  clean = media.read_audio(path / "aud.wav")
  heard_by = synthesize.listener(run, None, None)
  rng = np.random.default_rng(seed)
  sounds = [(None, None, clean)]
  for name in noises:
    noise = make_noise(name, len(clean), rng)
    sounds += [(str(name), snr_db, with_noise(clean, noise, snr_db)) for snr_db in snrs_db]
  sounds += [(str(name), None, media.read_audio(name)) for name in others]
  still = np.zeros(len(ACTION_UNITS), np.float32)
  places = know(avatar).face
  rows = []
  progress = Progress("doubt of sounds", len(sounds), compiles=True)
  for name, snr_db, sound in sounds:
    count = features.frame_count(len(sound))
    speech = extract.hear(extractors, sound, count, listen=heard_by)
    windows = np.asarray(speech.audio)
    doubts = []
    for i in np.linspace(0, count - 1, min(FRAMES, count)).round().astype(int):
      controls = Controls(*map(jnp.asarray, (
        features.neighbouring(windows, int(i)), still, speech.f_exp[i], speech.f_tone[i],
        speech.emotion[i])))
      doubts.append(doubt(avatar, places, controls))
    rows.append({"heard": name, "snr_db": snr_db} | {
      each: float(np.mean([found[each] for found in doubts])) for each in doubts[0]})
    progress.advance(note=describe_sound(rows[-1]))
  progress.close()
  return rows


def make_noise(name: str | os.PathLike, samples: int, rng: np.random.Generator
               ) -> Float[np.ndarray, " s"]:
  """White noise, the hum of the mains, or a recording as often as it fits; of any power.

  Raises:
    UserError: there is no such recording, or it cannot be read or is silent.
  """
  from uajax import media

  if name == "white":
    return rng.standard_normal(samples)
  if name == "hum":
    turns = np.arange(samples)[:, None] * (MAINS_HZ * np.arange(1, HARMONICS + 1)) / SAMPLE_RATE_HZ
    phases = rng.uniform(size=HARMONICS)[None]
    return (np.sin(2 * np.pi * (turns + phases)) / np.arange(1, HARMONICS + 1)[None]).sum(1)
  noise = np.resize(media.read_audio(name), samples)
  if not noise.any():
    raise UserError(f"{name} is silent for as long as the speech lasts: give a noise that can be "
                    "heard, or white or hum")
  return noise


def with_noise(wav: Float[np.ndarray, " s"], noise: Float[np.ndarray, " s"], snr_db: float
               ) -> Float[np.ndarray, " s"]:
  """Speech with noise of so much less power, scaled down where it would clip."""
  speech, loud = (float(np.mean(np.square(x, dtype=np.float64))) for x in (wav, noise))
  mixed = wav + noise * math.sqrt(speech / loud / 10 ** (snr_db / 10))
  return (mixed / max(1.0, float(np.abs(mixed).max()))).astype(np.float32)


@jax.jit
def doubt(avatar: Avatar, places: Places, controls: Controls) -> dict[str, Float[Array, ""]]:
  """The trace of each modality's covariance, aleatoric and epistemic, over the living splats."""
  take, layer = avatar.config, avatar.face
  ask = functools.partial(FaceMotion(take).apply, {"params": layer.motion})
  heard = ask(controls, method="code")
  inputs: Any = ask(places, controls, heard, method="modalities")
  strange: Any = ask(heard, method="strangeness")
  answers: Any = Ensembles(take).apply(
    {"params": layer.motion["fusion"]["ensembles"]}, inputs, None)
  found = {}
  for name, answer in zip(inputs, answers, strict=True):
    alone = fuse_answers([answer], limit=take.log_var_limit, ddof=take.ddof, implementation="xla")
    trace = strange * (alone.aleatoric + alone.epistemic)
    found[name] = jnp.sum(jnp.where(layer.alive, trace, 0)) / jnp.maximum(layer.alive.sum(), 1)
  return found


def describe(report: Mapping) -> str:
  """The figures as text."""
  found = report["map"]
  lines = [
    f"{report['split']} split, {found['frames']} frames: uncertainty and error of a pixel "
    f"correlate with {found['pixel_rank_correlation']:.2f} (ranks), of a frame with "
    f"{found['frame_correlation']:.2f}; in the most uncertain tenth the error is "
    f"{found['error_ratio']:.2f} times the mean",
  ]
  if not report["calibrated"]:
    lines.append("the uncertainty is not calibrated (no `model.motion.calibrated` in training, or "
                 "an imported avatar): nothing ties it to errors or to noise")
  rows = report["noise"]
  names = [name for name in FACE_MODALITIES if name in rows[0]]
  lines.append("doubt of each modality, clean speech 1:")
  heard = list(map(describe_sound, rows))
  width = max(map(len, heard))
  lines.append(" " * width + "".join(f"{name:>10}" for name in names))
  for row, label in zip(rows, heard, strict=True):
    ratios = (row[name] / max(rows[0][name], 1e-30) for name in names)
    lines.append(f"{label:<{width}}" + "".join(f"{ratio:10.3f}" for ratio in ratios))
  return "\n".join(lines)


def describe_sound(row: Mapping) -> str:
  """What was heard in a row of `listen`."""
  if row["heard"] is None:
    return "clean"
  ratio = "" if row["snr_db"] is None else f" {row['snr_db']:g} dB"
  return pathlib.Path(row["heard"]).name + ratio


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description="Whether the uncertainty means something.")
  parser.add_argument("run", help="run folder")
  parser.add_argument("--split", choices=("train", "val"), default="val")
  parser.add_argument("--snr", type=float, nargs="+", default=list(SNRS_DB), help="dB")
  parser.add_argument("--noise", nargs="*", default=["white"],
                      help="white, hum, or recordings (of babble, say)")
  parser.add_argument("--speech", nargs="*", default=[], help="recordings of other speech")
  parser.add_argument("--subject", help="the subject folder's new place, if it was moved")
  parser.add_argument("--out", type=pathlib.Path, help="JSON file for the figures")
  args = parser.parse_args(argv)
  return tell(
    lambda: measure(args.run, args.split, snrs_db=args.snr, noises=args.noise, others=args.speech,
                    subject=args.subject), describe, args.out)


if __name__ == "__main__":
  sys.exit(main())
