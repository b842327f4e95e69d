"""Cross-validation over speakers: the figures it gives, and that the network learns from little."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from uajax import media
from uajax.emotion import crossvalidate, distill, network
from uajax.speech import features

RATE = 16_000


def speech(rng, angry: bool, speaker_hz: float) -> np.ndarray:
  """Half a second to one of a made-up voice: anger is bright and quick, sadness dull and slow."""
  t = np.arange(int(RATE * rng.uniform(0.5, 1.0))) / RATE
  hz = speaker_hz * rng.uniform(0.9, 1.1)
  fall = 0.5 if angry else 1.5
  tone = sum(np.sin(2 * np.pi * hz * k * t) / k**fall for k in range(1, 12))
  beat = 1 + np.sin(2 * np.pi * (9 if angry else 3) * t + rng.uniform(0, 6))
  return (0.02 * tone * beat + 0.002 * rng.standard_normal(t.size)).astype(np.float32)


SMALL = crossvalidate.CORPUS.emotion
TINY = crossvalidate.CorpusConfig(
  emotion=dataclasses.replace(
    SMALL, window_s=1.0, image=(64, 64), convolutions=(4, 4, 4, 4, 4), lstm=8, dropout=0.2,
    wav=dataclasses.replace(SMALL.wav, conv_channels=4, hidden=8, heads=2, feed_forward=16),
  ),
  distill=dataclasses.replace(
    crossvalidate.CORPUS.distill,
    fit=dataclasses.replace(crossvalidate.CORPUS.distill.fit, steps=60, block=30, batch=8),
  ),
  speeds=(1.1,),
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """Three speakers, eight utterances each, named as EmoDB names them."""
  folder, rng = tmp_path_factory.mktemp("emodb"), np.random.default_rng(0)
  for s, hz in enumerate((110.0, 160.0, 220.0)):
    for i in range(8):
      wav = speech(rng, i % 2 == 0, hz)
      media.write_wav(folder / f"{s + 3:02d}a{i:02d}{'WT'[i % 2]}a.wav", wav)
  return folder


@pytest.mark.slow
def test_speakers_never_met_are_understood(corpus, tmp_path):
  report = crossvalidate.run(corpus, ["angry", "sad"], TINY)
  assert report["held_out"] == [["03"], ["04"], ["05"]] and report["utterances"] == 24
  (figures,) = report["network"]
  counts = np.array(figures["confusion"])
  assert counts.sum(axis=1).tolist() == [12, 12]  # each utterance judged once
  assert figures["recall"] == report["network_mean_recall"] >= 0.8
  assert np.sum(report["linear"]["confusion"]) == 24
  text = crossvalidate.describe(json.loads(json.dumps(report)))
  assert "seed 0" in text and "linear model" in text and "24 utterances, 3 folds" in text


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--labels", "angry", "smug"], "angry, smug.*choose at least two.*angry, sad"),
    (["--labels", "angry"], "choose at least two"),
    (["--labels", "angry", "sad", "--groups", "4"], "3 speakers cannot be held out in 4 groups"),
  ],
)
def test_wrong_use_is_one_line(corpus, capsys, words, message):
  assert crossvalidate.main([str(corpus), *words]) == 1
  said = capsys.readouterr().err
  assert said.count("\n") == 1
  assert re.search(message, said)


def test_recall_is_the_mean_of_the_labels_recalls():
  counts = crossvalidate.confusion(np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 1, 1]), 2)
  assert counts.tolist() == [[3, 1], [0, 1]]
  assert crossvalidate.recall(counts) == pytest.approx(0.875)


def test_the_linear_model_weighs_classes_alike():
  rng = np.random.default_rng(1)
  truth = np.repeat([0, 1], [90, 10])
  x = rng.standard_normal((100, 3)) + 1.5 * truth[:, None] * np.array([[1.0, 0.0, 0.0]])
  heard = crossvalidate.logistic(x, truth, 2).predict(x).argmax(axis=1)
  recalls = np.diag(crossvalidate.confusion(truth, heard, 2)) / [90, 10]
  assert min(recalls) > 0.6  # by numbers alone the rare class would hardly ever be named


def test_windows_lie_inside_the_utterance():
  rng = np.random.default_rng(2)
  short = features.views(speech(rng, True, 100.0))
  assert len(crossvalidate.middles(short, 3.0)) == 1
  wav = np.tile(speech(rng, True, 100.0), 10)
  whole = features.views(wav)
  at = crossvalidate.middles(whole, 3.0)
  cut = features.centred(whole, at[[0, -1]], 3.0)
  assert (cut.spectrogram.max(axis=1) > features.SILENT_DB).all() and len(at) > 25


def test_padding_does_not_count():
  rng = np.random.default_rng(3)
  x = jnp.asarray(rng.standard_normal((1, 60, 4)))
  weight = jnp.repeat(jnp.array([[1.0, 0.0]]), jnp.array([40, 20]), axis=1)
  np.testing.assert_allclose(
    network.statistics(x, weight), network.statistics(x[:, :40], weight[:, :40]), atol=1e-5
  )


def test_branches_are_standardised_before_training():
  rng, names = np.random.default_rng(4), ("neutral", "sad")
  recordings = [
    crossvalidate.recording(features.views(speech(rng, bool(i % 2), 150.0)), names[i % 2], names, 1)
    for i in range(6)
  ]
  spread, config = distill.ranges(recordings), TINY.emotion
  cuts = [features.centred(r.whole, np.flatnonzero(r.learn)[:1], 1.0) for r in recordings]
  views = features.Views(*(np.concatenate(x) for x in zip(*cuts, strict=True)))
  batch = distill._Batch(views, np.eye(2)[[0, 1] * 3], np.zeros((6, 1)), spread)
  trunk = network.initialise(config, 2, 0)
  standard = distill._standardise(trunk, lambda _: batch, 2, config, seed=0)
  for name, rows in distill._raw(trunk, views, spread, 2, config).items():
    scaled = np.asarray(rows) * standard[name]["scale"] + standard[name]["offset"]
    np.testing.assert_allclose(scaled.mean(axis=0), 0.0, atol=2e-3)
    deviation = scaled.std(axis=0)  # one that hardly varies stays below 1
    assert deviation.max() < 1.01 and np.median(deviation) > 0.9, name
  others = set(trunk) - set(distill._raw(trunk, views, spread, 2, config))
  assert all(standard[name] is trunk[name] for name in others)
