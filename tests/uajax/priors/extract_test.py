"""From a subject folder to features and back to speech never heard before."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from uajax import media, torchfile
from uajax.emotion import control
from uajax.errors import UserError
from uajax.priors import extract, heldout

FRAMES, TRAIN = 200, 180


def quick(settings: extract.ExtractConfig) -> extract.ExtractConfig:
  """The small networks, smaller and briefly trained."""

  def briefly(config, steps):
    fit = dataclasses.replace(config.fit, steps=steps, batch=16, block=steps // 2)
    return dataclasses.replace(config, fit=fit)

  return dataclasses.replace(
    settings,
    lip=dataclasses.replace(briefly(settings.lip, 300), width=4, residuals=(0, 0, 0, 0)),
    style=dataclasses.replace(briefly(settings.style, 10), hidden=8, chunk=32),
    distill=briefly(settings.distill, 40),
  )


def babble(seed: int, frames: int, bright: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Noise that swells and fades; the jaw opens with it. `bright` in 0..1 tells its colour."""
  rng = np.random.default_rng(seed)
  jaw = np.repeat(rng.uniform(0, 1, frames // 5 + 1), 5)[:frames]
  jaw = np.convolve(np.pad(jaw, 4, mode="edge"), np.full(9, 1 / 9), "valid")
  samples = (np.arange(frames * 640) + 0.5) / 640 - 0.5
  loud = np.interp(samples, np.arange(frames), 10 ** (2 * jaw - 3))
  noise = rng.normal(size=loud.size)
  dull = np.convolve(noise, np.full(12, 1 / 12), "same") * 2
  mixture = np.interp(samples, np.arange(frames), bright)
  wav = loud * (mixture * noise + (1 - mixture) * dull)
  expression = np.zeros((frames, 64), np.float32)
  expression[:, 0] = 3 * jaw - 1
  expression[:, 1] = -jaw
  return np.clip(wav, -1, 1).astype(np.float32), expression


def write_subject(path, *, emotion: bool = True):
  path.mkdir()
  bright = np.repeat(np.arange(10) % 2, 20).astype(np.float64)
  wav, expression = babble(0, FRAMES, bright)
  media.write_wav(path / "aud.wav", wav)
  np.save(path / "expression.npy", expression)
  if emotion:
    rows = [f"{i},{'joy' if b else 'neutral'},1.0" for i, b in enumerate(bright)]
    (path / "emotion.csv").write_text("\n".join(["frame,label,intensity", *rows]) + "\n")
  for split, ids in (("train", range(TRAIN)), ("val", range(TRAIN, FRAMES))):
    frames = [{"img_id": i, "aud_id": i, "transform_matrix": np.eye(4).tolist()} for i in ids]
    document = {"focal_len": 500.0, "cx": 64, "cy": 64, "frames": frames}
    (path / f"transforms_{split}.json").write_text(json.dumps(document))
  return path


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
  return write_subject(tmp_path_factory.mktemp("extract") / "subject")


@pytest.fixture(scope="module")
def extractors(subject):
  return extract.train(subject, quick(extract.SMALL))


def test_the_jaw_follows_speech_never_heard(extractors):
  wav, truth = babble(7, 100, np.zeros(100))
  speech = extract.hear(extractors, wav, 100)
  said = extract.expression(extractors, speech)
  assert np.corrcoef(said[:, 0], truth[:, 0])[0, 1] > 0.8
  assert np.corrcoef(said[:, 1], truth[:, 1])[0, 1] > 0.8
  assert speech.audio.shape == (100, 16, 80) and speech.emotion.shape == (100, 128)
  assert max(np.abs(x).max() for x in (speech.f_exp, speech.f_tone, speech.emotion)) <= 5


def test_feature_files_are_what_the_sound_alone_gives(subject, extractors):
  wav, _ = media.read_wav(subject / "aud.wav")
  speech = extract.hear(extractors, wav, FRAMES)
  for split, rows in (("train", slice(0, TRAIN)), ("val", slice(TRAIN, FRAMES))):
    for name, value in (
      (f"{split}_auds_exp", speech.f_exp),
      (f"{split}_audiostyle", speech.f_tone),
      (f"mser_emotion_{split}", speech.emotion),
    ):
      stored = np.load(subject / f"{name}.npz")["features"]
      assert stored.shape == (len(value[rows]), 1, value.shape[1]) and stored.dtype == np.float32
      np.testing.assert_allclose(stored[:, 0], value[rows], atol=1e-6)
  assert np.abs(speech.f_exp[:TRAIN].mean(0)).max() < 0.5


def test_kept_and_read_again_it_hears_the_same(subject, extractors):
  again = extract.load(subject / "extractors")
  assert again.config == extractors.config and again.labels == extractors.labels
  wav, _ = babble(9, 60, np.ones(60))
  for a, b in zip(extract.hear(again, wav), extract.hear(extractors, wav), strict=True):
    np.testing.assert_array_equal(a, b)


def test_extractors_from_before_a_setting_came_have_its_default(subject, extractors, tmp_path):
  folder = shutil.copytree(subject / "extractors", tmp_path / "extractors")
  record = json.loads((folder / "extractors.json").read_text())
  for later in ("conv_norm", "conv_bias", "stable"):
    del record["config"]["emotion"]["wav"][later]
  (folder / "extractors.json").write_text(json.dumps(record))
  assert extract.load(folder).config == extractors.config


def test_what_the_official_code_reads_is_written_too_but_never_over_what_others_made(
  subject, extractors, monkeypatch
):
  monkeypatch.setattr(extract, "_learn", lambda *_: pytest.fail("trained again"))
  npz, pth = (subject / f"val_auds_exp.{end}" for end in ("npz", "pth"))
  ours = np.load(npz)["features"]
  np.testing.assert_array_equal(torchfile.load(pth), ours)
  pth.unlink()
  extract.train(subject, quick(extract.SMALL))
  np.testing.assert_array_equal(torchfile.load(pth), ours)
  torchfile.save(pth, np.ones_like(ours))
  npz.unlink()
  extract.train(subject, quick(extract.SMALL))
  np.testing.assert_array_equal(np.load(npz)["features"], ours)
  assert (torchfile.load(pth) == 1).all()


def test_speech_held_out_is_judged_by_what_was_never_taught(subject, extractors, tmp_path, capsys):
  assert heldout.main([str(subject), "--out", str(tmp_path / "figures.json")]) == 0
  (figures,) = json.loads((tmp_path / "figures.json").read_text())["groups"].values()
  ours, ridge = figures["Lip Expert"]["correlation"], figures["ridge"]["correlation"]
  assert ours > 0.8 and ridge > 0.8 and figures["mean"]["correlation"] == 0
  assert f"{ours:.3f}" in capsys.readouterr().out
  # A subject whose held-out expression is another: these extractors are not its own.
  other = shutil.copytree(subject, tmp_path / "other")
  tracked = np.load(other / "expression.npy")
  tracked[TRAIN:] *= -1
  np.save(other / "expression.npy", tracked)
  assert heldout.main([str(other)]) == 1 and "extract` again" in capsys.readouterr().err
  shutil.rmtree(other / "extractors")
  assert heldout.main([str(other)]) == 1 and "no extractors" in capsys.readouterr().err


def test_unchanged_it_is_not_trained_again(subject, extractors, monkeypatch):
  monkeypatch.setattr(extract, "_learn", lambda *_: pytest.fail("trained again"))
  before = (subject / "mser_emotion_val.npz").stat().st_mtime_ns
  extract.train(subject, quick(extract.SMALL))
  assert (subject / "mser_emotion_val.npz").stat().st_mtime_ns == before
  (subject / "mser_emotion_val.npz").unlink()
  extract.train(subject, quick(extract.SMALL))
  assert (subject / "mser_emotion_val.npz").exists()


def test_emotion_by_name_goes_into_speech(extractors):
  assert control.names(extractors) == ("joy", "neutral")
  joy = control.resolve(extractors, "joy", 1.0)
  assert np.linalg.norm(joy - control.resolve(extractors, "joy", 0.0)) > 1.0
  wav, _ = babble(3, 50, np.zeros(50))
  speech = extract.hear(extractors, wav, 50, emotion=joy)
  np.testing.assert_array_equal(speech.emotion, np.repeat(joy[None], 50, axis=0))
  with pytest.raises(UserError, match=r"\[frames, 128\]"):
    extract.hear(extractors, wav, 50, emotion=np.zeros((49, 128)))


def test_heard_piece_by_piece_it_is_the_same(extractors):
  """Soft but for a second, so that peaks and level are those of the whole."""
  config = dataclasses.replace(extractors.config, emotion_stride=25)
  extractors = extractors._replace(config=config)
  wav = np.random.default_rng(0).normal(0, 0.02, 15 * 16_000 + 333).astype(np.float32)
  wav[16_000 * 2 : 16_000 * 3] *= 20
  pieces = list(extract.hear_in_pieces(extractors, wav, piece=125))
  assert [len(piece.audio) for piece in pieces] == [125, 125, 125, 1]
  (whole,) = extract.hear_in_pieces(extractors, wav, piece=400)
  for name, heard, parts in zip(whole._fields, whole, zip(*pieces, strict=True), strict=True):
    np.testing.assert_allclose(np.concatenate(parts), heard, atol=1e-4, err_msg=name)
    assert np.std(heard, axis=0).max() > 0.01


def test_heard_emotion_is_nearer_to_its_prototype(extractors):
  centres = {name: control.resolve(extractors, name, 1.0) for name in ("joy", "neutral")}
  for name, bright in (("joy", 1.0), ("neutral", 0.0)):
    wav, _ = babble(11, 75, np.full(75, bright))
    heard = extract.hear(extractors, wav, 75).emotion.mean(axis=0)
    near = min(centres, key=lambda k: float(np.linalg.norm(heard - centres[k])))
    assert near == name


def test_what_cannot_be_learnt_from_says_so(tmp_path, subject, extractors):
  path = write_subject(tmp_path / "bare", emotion=False)
  (path / "expression.npy").unlink()
  with pytest.raises(UserError, match="expression.npy is missing"):
    extract.train(path, quick(extract.SMALL))
  np.save(path / "expression.npy", np.zeros((10, 64), np.float32))
  with pytest.raises(UserError, match="10 rows"):
    extract.train(path, quick(extract.SMALL))
  (path / "aud.wav").unlink()
  with pytest.raises(UserError, match="aud.wav"):
    extract.train(path, quick(extract.SMALL))


def test_damaged_extractors_are_refused(tmp_path, extractors):
  with pytest.raises(UserError, match="uajax extract"):
    extract.load(tmp_path / "none")
  extract.save(tmp_path, extractors)
  record = json.loads((tmp_path / "extractors.json").read_text())
  for change, word in (
    ({"version": 99}, "another version"),
    ({"parameters": "0"}, "not the one"),
    ({"labels": ["neutral"]}, "damaged"),
    ({"config": {}}, "damaged"),
  ):
    (tmp_path / "extractors.json").write_text(json.dumps(record | change))
    with pytest.raises(UserError, match=word):
      extract.load(tmp_path)


def test_a_clip_without_labels_says_that_it_teaches_no_emotion(tmp_path):
  material = extract.read(write_subject(tmp_path / "plain", emotion=False))
  learn, judge = extract._split(material, 0.1)
  felt = extract._learn_emotion(material, [], [], learn, judge, quick(extract.SMALL))
  assert felt.prototypes == {} and felt.labels == ("neutral",)
  assert any("teaches no emotion" in note for note in felt.notes)
  assert all(np.isfinite(x).all() for x in felt.scale)


def test_held_out_frames_teach_nothing(subject):
  material = extract.read(subject)
  learn, judge = extract._split(material, 0.1)
  assert not (learn | judge)[TRAIN:].any() and (learn ^ judge)[:TRAIN].all()
  assert judge[TRAIN - 18 : TRAIN].all() and learn[: TRAIN - 18].all()
