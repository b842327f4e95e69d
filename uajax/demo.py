"""From nothing to a talking video: the whole path on a procedural person, on any CPU.

The person is made (`data.synthetic`), the priors are learnt from its voice, the avatar from its
pictures; then it says a sentence of new words, in an emotional setting (label and intensity) that
is asked for and that no training picture showed. Since
the person's true answer to that sentence is known, the report can say how near the avatar came,
in pixels: how alike the pictures are, and whether the mouth opens when it should.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Iterator
from typing import Any, cast

import jax
import numpy as np

from uajax import config, contact, metrics, saving, synthesize
from uajax.avatar import Avatar
from uajax.data import folder, synthetic
from uajax.emotion import control
from uajax.errors import UserError
from uajax.priors import extract
from uajax.train import loop
from uajax.types import Clip, Controls, Speech

SECONDS = 12
SIZE_PX = 128
CORPUS, CORPUS_S = 100, 1.8  # utterances of the same voice, sound only, for the speech networks
# An avatar that shows what it feels shows what is heard amiss, too: in 30 new utterances 0.80 of
# the windows are heard right; after half of these steps, on 60 utterances, 0.59.
SPEECH = dataclasses.replace(extract.SMALL, distill=dataclasses.replace(
  extract.SMALL.distill, fit=dataclasses.replace(extract.SMALL.distill.fit, steps=400)))
SHEET = 6  # frames on the contact sheet
_log = logging.getLogger("uajax")


def run(out, *, seed: int = 0) -> dict:
  """Makes the demo in the folder `out`; an interrupted one goes on where it stood.

  Writes out/talk.mp4, contact_sheet.png, training_curve.png and report.json, beside the subject
  and the run they came from. Returns the report.

  Raises:
    UserError: `out` holds something that is no demo; disk full.
  """
  out = pathlib.Path(out)
  if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "subject").exists()
                                            and not list(out.glob("*.partial*")))):
    raise UserError(f"{out} exists and is no demo: choose another --out")
  out.mkdir(parents=True, exist_ok=True)
  watch = _Watch()
  person = synthetic.Person(seed=seed, size_px=SIZE_PX)
  subject, held_out, run_path = out / "subject", out / "held_out", out / "run"
  with watch.step("person"):
    if not subject.exists():
      synthetic.make(subject, person, seconds=SECONDS, seed=seed)
    if not held_out.exists():
      synthetic.make(held_out, person, script=synthetic.held_out_script(seed), seed=seed + 1)
  with watch.step("speech"):
    extractors = extract.train(subject, SPEECH, corpus=lambda: corpus(person, seed + 2))
  with watch.step("avatar"):
    trained = loop.train(subject, run_path, config.demo())
  avatar = trained.avatar()
  emotion, intensity = synthetic.HELD_OUT_EMOTION
  with watch.step("film"):
    film = synthesize.synthesize(
      run_path, held_out / "aud.wav", out / "talk.mp4", emotion=emotion, intensity=intensity)
  with watch.step("judgement"):
    seen = _judge(avatar, folder.read(subject, "val"))
    heard = _hear(held_out, extractors)
    asked = _feel(heard, control.resolve(extractors, emotion, intensity))
    unseen = _judge(avatar, asked)
    by_ear = _judge(avatar, heard)
    _sheet(out / "contact_sheet.png", unseen)
    _curve(out / "training_curve.png", run_path / "metrics.jsonl")
  report = {
    "held_out_frames": _figures(seen),
    "held_out_sentence": _figures(unseen) | {
      "emotion": emotion, "intensity": intensity,
      "mouth_opening_correlation": _mouth_correlation(unseen, asked)},
    "held_out_sentence_emotion_by_ear": _figures(by_ear) | {
      "mouth_opening_correlation": _mouth_correlation(by_ear, heard)},
    "film": {"frames": film.frames, "seconds": film.duration_s},
    "splats": {name: int(getattr(avatar, name).alive.sum()) for name in ("face", "mouth")},
    "size_px": SIZE_PX, "training_seconds_of_video": SECONDS,
    "took_s": watch.took, "device": jax.devices()[0].device_kind, "jax": jax.__version__,
  }
  with saving.aside(out / "report.json") as partial:
    partial.write_text(json.dumps(report, indent=2) + "\n")
  return report


def summarize(out, report: dict) -> str:
  """What the demo made and how near it came, for the terminal."""
  out = pathlib.Path(out)
  sentence = report["held_out_sentence"]
  return "\n".join([
    f"film           {out / 'talk.mp4'} ({report['film']['seconds']:.2f} s)",
    f"contact sheet  {out / 'contact_sheet.png'}",
    f"training curve {out / 'training_curve.png'}",
    f"report         {out / 'report.json'}",
    f"held-out frames    PSNR {report['held_out_frames']['psnr_db']:.2f} dB, "
    f"SSIM {report['held_out_frames']['ssim']:.3f}",
    f"held-out sentence  PSNR {sentence['psnr_db']:.2f} dB, SSIM {sentence['ssim']:.3f}, "
    f"mouth opening follows the truth with correlation "
    f"{sentence['mouth_opening_correlation']:.2f} (asked to be {sentence['emotion']} at "
    f"{sentence['intensity']}; with the emotion by ear "
    f"{report['held_out_sentence_emotion_by_ear']['mouth_opening_correlation']:.2f})",
  ])


def corpus(person: synthetic.Person, seed: int) -> Iterator[extract.CorpusItem]:
  """More speech of the same voice, with what the face does to it; no pictures."""
  for wav, label, intensity, expression in synthetic.corpus(seed, CORPUS, CORPUS_S, person=person):
    yield wav, expression, synthetic.EMOTIONS[label], intensity


def _hear(path: pathlib.Path, extractors) -> Clip:
  """The held-out sentence as frames: what is heard from its sound alone, the rest from truth."""
  from uajax import media

  parts = [folder.read(path, split, allow_missing_priors=True) for split in ("train", "val")]
  whole: Clip = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
  sound = media.read_audio(path / "aud.wav")
  speech: Speech = extract.hear(extractors, sound, len(whole.ids))
  controls = whole.frames.controls._replace(
    f_exp=speech.f_exp, f_tone=speech.f_tone, emotion=speech.emotion)
  return whole._replace(frames=whole.frames._replace(controls=controls))


def _feel(clip: Clip, emotion: np.ndarray) -> Clip:
  """The same frames with one emotion [128] throughout."""
  controls = clip.frames.controls
  wanted = np.broadcast_to(np.asarray(emotion, np.float32), controls.emotion.shape)
  return clip._replace(frames=clip.frames._replace(controls=controls._replace(emotion=wanted)))


def _judge(avatar: Avatar, clip: Clip) -> dict[str, np.ndarray]:
  """Renders of a clip's frames beside the truth, uint8 [f h w 3] each."""
  frame = cast(Any, clip.frames)  # NumPy leaves, as everything on the host

  def scenes():
    for i in range(len(clip.ids)):
      controls = Controls(*(leaf[i] for leaf in frame.controls))
      camera = jax.tree.map(lambda leaf, i=i: leaf[i], frame.camera)
      yield synthesize.Scene(controls, camera, frame.background[i])

  drawn = [image.image for image in synthesize.draw(avatar, scenes(), doubt=False)]
  return {"truth": frame.image, "render": np.stack(drawn)}


def _figures(seen: dict[str, np.ndarray]) -> dict:
  pairs = [(a.astype(np.float32) / 255, b.astype(np.float32) / 255)
           for a, b in zip(seen["render"], seen["truth"], strict=True)]
  return {"frames": len(pairs),
          "psnr_db": float(np.mean([metrics.psnr(a, b) for a, b in pairs])),
          "ssim": float(np.mean([metrics.ssim(a, b) for a, b in pairs]))}


def _mouth_correlation(seen: dict[str, np.ndarray], clip: Clip) -> float:
  """Of the mouth's opening in the renders with that in the true pictures, both from pixels."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    opening: dict[str, Any] = {  # NumPy, which metrics take like jax.Array
      name: np.array(list(pool.map(synthetic.mouth_opening, images, clip.frames.lips)))
      for name, images in seen.items()}
  return float(metrics.correlation(opening["render"], opening["truth"]))


def _sheet(path: pathlib.Path, seen: dict[str, np.ndarray]) -> None:
  at = np.linspace(0, len(seen["truth"]) - 1, SHEET).round().astype(int)
  truth, render = seen["truth"][at], seen["render"][at]
  labels = [f"{i / 25:.2f} s" for i in at]
  columns = {"truth": truth, "avatar": render,
             "difference x4": [contact.compare(a, b) for a, b in zip(truth, render, strict=True)]}
  contact.write_sheet(path, columns, labels)


def _curve(path: pathlib.Path, lines: pathlib.Path) -> None:
  rows = [json.loads(line) for line in lines.read_text().splitlines()]
  series = {}
  for stage in ("mouth", "face", "fuse"):
    chosen = [row for row in rows if row["stage"] == stage]
    series[stage] = [row["total"] for row in chosen], [row["psnr"] for row in chosen]
  contact.write_curves(path, series, title="training", y_label="PSNR of the layer, dB")


class _Watch:
  """How long each step took, in seconds."""

  def __init__(self):
    self.took: dict[str, float] = {}

  @contextlib.contextmanager
  def step(self, name: str):
    began = time.monotonic()
    yield
    self.took[name] = round(time.monotonic() - began, 1)
    _log.info("%s: %.1f s", name, self.took[name])
