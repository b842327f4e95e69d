"""Each control moves what it names: pixels change where and as the truth's do, elsewhere not.

An avatar is learnt from the procedural person, whose lines ask for action units beside what is
felt: what always goes together cannot be told apart by anybody. Then a few of its frames are
changed in one thing, in the film and in the avatar, and the changes of the pixels compared.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from uajax import config, demo, media, runs, synthesize
from uajax.data import folder, synthetic
from uajax.emotion import control
from uajax.priors import extract
from uajax.train import loop
from uajax.types import ACTION_UNITS, FPS, Clip, Controls

pytestmark = pytest.mark.slow

PERSON = synthetic.Person(seed=0, size_px=96)
SEED = 0
# Emotion, its strength, seconds, action units. What is felt is heard in windows of a second, which
# it must outlast. Units come alone, and as an emotion has them but without it: else they explain
# all that it does. What changes few pixels is shown for longer.
ACTS = (
  ("neutral", 1, 1.2, {}),
  ("happy", 1, 1.6, {}), ("neutral", 1, 0.8, {"AU01": 4}),
  ("angry", 1, 1.6, {}), ("neutral", 1, 2.0, {"AU05": 4}),
  ("sad", 1, 1.6, {}), ("neutral", 1, 2.0, {"AU06": 4}),
  ("surprised", 1, 1.6, {}), ("neutral", 1, 2.0, {"AU07": 4}),
  ("happy", 0.5, 1.6, {"AU05": 4}), ("neutral", 1, 0.8, {"AU04": 4}),
  ("angry", 0.5, 1.6, {"AU06": 4}), ("neutral", 1, 1.2, {"AU45": 2}),
  ("sad", 0.5, 1.6, {"AU45": 2}), ("neutral", 1, 1.2, {"AU01": 3.4, "AU05": 3.8}),
  ("surprised", 0.5, 1.6, {"AU06": 4}), ("neutral", 1, 1.2, {"AU04": 4.4, "AU07": 3.2}),
  ("neutral", 1, 1.2, {"AU01": 3.6, "AU04": 1.8}), ("happy", 1, 1.2, {}), ("neutral", 1, 1.2, {}),
)  # fmt: skip
SCRIPT = tuple(synthetic.Line("", 100 + i, emotion, intensity, seconds, tuple(units.items()))
               for i, (emotion, intensity, seconds, units) in enumerate(ACTS))
# What each emotion does that is no action unit of the network, which the distilled feature must
# bring, and the units that come with it. Only together are they ever seen.
FELT = {"happy": ({"AU12": 4.2}, {"AU06": 3.2, "AU07": 0.8}),
        "sad": ({"AU15": 3.8}, {"AU01": 3.6, "AU04": 1.8, "AU07": 0.6}),
        "angry": ({"AU23": 3.2}, {"AU04": 4.4, "AU05": 0.6, "AU07": 3.2}),
        "surprised": ({"AU02": 4.2}, {"AU01": 3.4, "AU05": 3.8})}
CALM: dict[str, float] = dict.fromkeys(ACTION_UNITS, 0.0)
NOTICED = 6  # of 255: what changes by less is not called changed
AROUND_PX = 3  # splats are no pixels


class Taught(NamedTuple):
  """An avatar, and what it learnt from."""

  run: runs.Run
  extractors: extract.Extractors
  played: synthetic.Performance
  clip: Clip
  rows: np.ndarray  # frames of the clip that are looked at


def teach(path) -> Taught:
  """Films the person, learns its priors and its avatar; what is there already stays."""
  subject = path / "subject"
  if not subject.exists():
    synthetic.make(subject, PERSON, seed=SEED, script=SCRIPT)

  extractors = extract.train(subject, demo.SPEECH, corpus=lambda: demo.corpus(PERSON, 2))
  run = loop.train(subject, path / "run", experiment())
  clip = folder.read(subject, "train")
  seconds = np.array([line.seconds for line in SCRIPT])
  middles = ((np.cumsum(seconds) - seconds / 2) * FPS).astype(int)
  rows = middles[[line.emotion == "neutral" for line in SCRIPT] & (middles < len(clip.ids))]
  return Taught(run, extractors, synthetic.perform(PERSON, SCRIPT, SEED), clip, rows)


def experiment() -> config.Experiment:
  """The demo's, in fewer steps."""
  small = config.demo()
  return dataclasses.replace(
    small, mouth=config.shorten(small.mouth, 200), face=config.shorten(small.face, 3_000),
    fuse=config.shorten(small.fuse, 50), picture_every=100_000, save_every=100_000)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
  return teach(tmp_path_factory.mktemp("taught"))


def filmed(taught: Taught, units: Mapping[str, float]) -> np.ndarray:
  """The truth at the frames looked at with other action units, float [f h w 3]."""
  ids = taught.clip.ids[taught.rows]
  au = taught.played.au[ids].copy()
  for name, value in units.items():
    au[:, synthetic.AU_NAMES.index(name)] = value
  changed = taught.played._replace(
    pose=taught.played.pose[ids], mouth=taught.played.mouth[ids], au=au)
  return synthetic.render_frames(PERSON, changed).image.astype(float)


def drawn(taught: Taught, units: Mapping[str, float], emotion: np.ndarray | None = None
          ) -> np.ndarray:
  """The avatar at the same frames with other controls, float [f h w 3]."""
  frames: Any = taught.clip.frames  # NumPy leaves, as everything on the host

  def scenes():
    for i in taught.rows:
      controls = Controls(*(leaf[i] for leaf in frames.controls))
      au = np.array(controls.action_units)
      for name, value in units.items():
        au[ACTION_UNITS.index(name)] = value
      changed: Any = {"action_units": au}
      if emotion is not None:
        changed["emotion"] = np.asarray(emotion, np.float32)
      camera = jax.tree.map(lambda leaf, i=i: leaf[i], frames.camera)
      yield synthesize.Scene(controls._replace(**changed), camera, frames.background[i])

  pictures = synthesize.draw(taught.run.avatar(), scenes(), doubt=False)
  return np.stack([picture.image for picture in pictures]).astype(float)


class Response(NamedTuple):
  """How a change of the avatar compares with that of the truth."""

  share: float  # of the truth's change that is there: 1 all of it
  correlation: float  # over the pixels that change in either
  inside: float  # mean change where the truth's changes, of 255
  outside: float  # and elsewhere


def compare(change: np.ndarray, truth: np.ndarray) -> Response:
  where = np.abs(truth).max(-1) > NOTICED
  around = np.stack([np.asarray(binary_dilation(m, iterations=AROUND_PX), bool) for m in where])
  either = around | (np.abs(change).max(-1) > NOTICED)
  return Response(
    float((change * truth).sum() / (truth**2).sum()),
    float(np.corrcoef(change[either].ravel(), truth[either].ravel())[0, 1]),
    float(np.abs(change[where]).mean()), float(np.abs(change[~around]).mean()))


# Of the truth's change the avatar shows 0.05.
MISSED = pytest.mark.xfail(strict=True, reason="so short a training misses what changes few pixels")
# 0.13. In frames where the person is angry, more is there.
TIGHT = pytest.mark.xfail(
  strict=True, reason="tight lips change 66 pixels by 13 of 255, what the avatar is wrong by there")


@pytest.mark.parametrize("unit, value", [
  ("AU01", 4.0), ("AU04", 4.0), ("AU05", 4.0),
  pytest.param("AU06", 4.0, marks=MISSED), ("AU07", 4.0), ("AU45", 2.0)])
def test_an_action_unit_moves_what_it_names(taught, unit, value):
  found = compare(drawn(taught, CALM | {unit: value}) - drawn(taught, CALM),
                  filmed(taught, CALM | {unit: value}) - filmed(taught, CALM))
  print(unit, found)
  assert found.share > 0.5 and found.correlation > 0.5
  assert found.outside < 0.1 * found.inside


@pytest.mark.parametrize("unit, value", [("AU01", 4.0), ("AU45", 2.0)])
def test_half_of_an_action_unit_moves_less_than_all_of_it(taught, unit, value):
  truth = filmed(taught, CALM | {unit: value}) - filmed(taught, CALM)
  still = drawn(taught, CALM)
  shares = [compare(drawn(taught, CALM | {unit: x * value}) - still, truth).share
            for x in (0.25, 0.5, 0.75, 1)]
  print(unit, shares)
  assert (np.diff([0.0, *shares]) > 0).all()


@pytest.mark.parametrize("name", [
  "happy", "sad", pytest.param("angry", marks=TIGHT), "surprised"])
def test_a_named_emotion_shows_the_more_the_stronger_it_is(taught, name):
  brought, units = FELT[name]
  units = CALM | units
  truth = filmed(taught, units | brought) - filmed(taught, units)
  feel = lambda label, intensity: control.resolve(taught.extractors, label, intensity)
  neutral = drawn(taught, units, feel("neutral", 1.0))
  found = [compare(drawn(taught, units, feel(name, x)) - neutral, truth)
           for x in (0.25, 0.5, 0.75, 1)]
  print(name, found)
  assert (np.diff([0.0] + [one.share for one in found]) > 0).all(), "monotone"
  assert found[-1].share > 0.3 and found[-1].correlation > 0.3


def test_a_reference_recording_makes_the_avatar_feel_what_it_holds(taught, tmp_path):
  truth = filmed(taught, {"AU12": 4.2}) - filmed(taught, {"AU12": 0.0})
  neutral = drawn(taught, CALM, control.resolve(taught.extractors, "neutral", 1.0))
  smiles = {}
  for emotion in ("happy", "neutral", "sad"):
    line = synthetic.Line("", 900, emotion, 1.0, 3.0)
    path = tmp_path / f"{emotion}.wav"
    media.write_wav(path, synthetic.perform(PERSON, (line,), 900).wav)
    felt = synthesize._emotion(taught.extractors, None, 1.0, path)
    smiles[emotion] = compare(drawn(taught, CALM, felt) - neutral, truth).share
  print(smiles)
  assert smiles["happy"] > 0.3 and smiles["happy"] > 2 * max(smiles["neutral"], smiles["sad"])
