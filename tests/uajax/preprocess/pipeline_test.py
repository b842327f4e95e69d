import dataclasses
import hashlib
import html
import itertools
import json
import re
import shutil
import xml.etree.ElementTree

import numpy as np
import pytest
from PIL import Image

from uajax import consent, media
from uajax.data import folder
from uajax.errors import UserError
from uajax.preprocess import landmarks, masks, pipeline, report, workers
from uajax.types import BACKGROUND, FACE, HAIR, MOUTH

FRAMES, GONE = 60, range(20, 26)


@pytest.fixture(scope="module")
def video(shared, tmp_path_factory):
  """60 frames of a real clip, wider than high, six of them black."""
  clip = shared("data/clips/obama_20s.mp4")
  frames = []
  for f, image in enumerate(itertools.islice(media.read_frames(clip), FRAMES)):
    small = np.asarray(Image.fromarray(image).resize((200, 200)))
    wide = np.pad(small, ((0, 0), (60, 60), (0, 0)), mode="edge")
    frames.append(wide * (f not in GONE))
  path = tmp_path_factory.mktemp("clip") / "clip.mp4"
  media.write_video(path, frames, audio=media.read_audio(clip)[: FRAMES * 640])
  return path


PIECE = 160 * 160 * 3 * 10  # bytes of ten frames
SETTINGS = pipeline.Settings(size=160, looks=2, focal_px=320.0)


class Interrupted:
  """Lets a function be called so often, then interrupts."""

  def __init__(self, function, calls):
    self.function, self.left = function, calls

  def __call__(self, *args, **named):
    self.left -= 1
    if self.left < 0:
      raise KeyboardInterrupt
    return self.function(*args, **named)


def forbid(patch, *names):
  """Makes steps of the pipeline fail if they are done again."""

  def again(*_, **__):
    raise AssertionError("a step was done again")

  for module, name in names:
    patch.setattr(module, name, again)


LOOK, STEADY = (landmarks, "follow"), (landmarks, "steady")
LAYERS, PICTURES = (masks, "classify"), (masks, "cut_torso")
TRACK = (pipeline.track, "fit")


@pytest.fixture(scope="module")
def subject(shared, video, tmp_path_factory):
  """The video preprocessed by a run that is interrupted in every step and taken up again."""
  shared("models/face_landmarker.task")
  out = tmp_path_factory.mktemp("subject") / "person"
  for calls, (module, name), done in (
    (0, TRACK, ()), (30, LAYERS, (LOOK, STEADY)), (30, PICTURES, (LOOK, STEADY, TRACK)),
  ):  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(workers, "PIECE_BYTES", PIECE)
      forbid(patch, *done)
      patch.setattr(module, name, Interrupted(getattr(module, name), calls))
      with pytest.raises(KeyboardInterrupt):
        pipeline.run(video, out, SETTINGS)
    assert not out.exists() and out.with_name("person.work").is_dir()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(workers, "PIECE_BYTES", PIECE)
    forbid(patch, LOOK, STEADY, TRACK, LAYERS)
    cut_torso, calls = masks.cut_torso, []
    patch.setattr(masks, "cut_torso", lambda *args: calls.append(0) or cut_torso(*args))
    report = pipeline.run(video, out, SETTINGS)
  assert len(calls) < 30  # whole pieces were kept
  assert not out.with_name("person.work").exists()
  return out, report


def test_the_folder_reads_as_a_subject(subject):
  out, report = subject
  folder.check(out, priors=False)
  train = folder.read(out, "train", allow_missing_priors=True)
  assert train.frames.image.shape[1:] == (160, 160, 3)
  assert report["frames"] == {"all": FRAMES, "used": FRAMES - len(GONE), "left_out": [[20, 25]]}
  (span,) = report["spans"]["left_out"]
  assert span["reason"] == "no face" and (span["from_s"], span["to_s"]) == (0.8, 1.04)
  assert any("6 frames are left out, no face: 0.8-1.0 s" in line for line in report["warnings"])
  # Left out by number: no other frame has moved.
  assert not set(GONE) & set(train.ids.tolist())
  used = [f for f in range(FRAMES) if f not in GONE]
  assert train.ids.tolist() == used[: len(used) * 10 // 11]
  assert not (out / "parsing" / "22.png").exists()
  assert (train.frames.camera.viewmat[:, 2, 3] > 0.3).all()
  assert folder.read_expression(out).shape == (FRAMES, 64)
  assert report["face"]["frames_lips_shut"]  # as they are in two seconds of speech
  gaze = np.loadtxt(out / "gaze.csv", delimiter=",", skiprows=1)
  assert gaze[:, 0].tolist() == list(range(FRAMES)) and 1 < np.abs(gaze[:, 1:]).max() < 30


def test_the_square_holds_the_head_and_layers_lie_where_they_should(subject):
  out, report = subject
  left, side = report["cut_out"]["left"], report["cut_out"]["side"]
  assert 100 < side <= 200 and abs(left + side / 2 - 164) < 20
  clip = folder.read(out, "train", allow_missing_priors=True)
  shares = report["layers"]["share_of_picture"]
  layers = report["layers"]
  assert set(layers["steadiness"]) == {"face", "hair", "neck", "torso"}
  assert min(layers["steadiness"].values()) > 0.9 and layers["face_ends_at_jaw"] > 0.7
  assert {n for n, count in layers["frames_without"].items() if count} <= {"mouth"}
  assert not any("flickers" in line or "jaw" in line for line in report["warnings"])
  assert 0.15 < shares["face"] < 0.45 and 0.02 < shares["hair"] < 0.2 and shares["torso"] > 0.05
  for f in (0, 30):
    classes = clip.frames.classes[f]
    r0, r1, c0, c1 = clip.frames.lips[f]
    middle = classes[(r0 + r1) // 2, (c0 + c1) // 2]
    assert middle in (FACE, MOUTH)
    assert (classes[0] == BACKGROUND).all()
    person = np.argwhere(classes == HAIR)[:, 0].mean()
    assert person < r0  # hair above the lips
    # Where nobody is, the truth is the plate.
    bare = classes == BACKGROUND
    gap = np.abs(clip.frames.image[f].astype(int) - clip.frames.background[f])[bare]
    assert gap.mean() < 4
  assert (out / "contact_sheet.png").exists()
  assert json.loads((out / "report.json").read_text())["warnings"] == report["warnings"]


def test_weak_layers_are_told_with_how_they_will_show(subject):
  layers = subject[1]["layers"]
  used = subject[1]["frames"]["used"]
  missing = {"face": 0, "hair": used, "mouth": 0, "neck": 12, "torso": 0}
  steadiness = {"face": 0.97, "hair": None, "neck": 0.95, "torso": 0.82}
  weak = layers | {"frames_without": missing, "steadiness": steadiness, "face_ends_at_jaw": 0.4}
  lines = report.warn_of_layers(weak, used)
  for line, words in zip(
    lines,
    ("no hair was found", "the neck was not found in 12 of 54 frames",
     "the torso's mask flickers (18 % of it changes", "leaves the jaw in 60 %"),
    strict=True,
  ):  # fmt: skip
    assert words in line and ": " in line
  assert report.warn_of_layers(layers, used) == []


def test_points_fixed_to_the_head_stay_on_it(subject):
  """The camera that the folder states puts the middle of the head onto the face, in every frame."""
  out, _ = subject
  clip = folder.read(out, "train", allow_missing_priors=True)
  for camera, classes in zip(
    clip.frames.camera.viewmat, clip.frames.classes, strict=True
  ):
    x, y, z = camera[:3, 3]
    column, row = 320 * x / z + 80, 320 * y / z + 80
    face = np.argwhere(np.isin(classes, (FACE, HAIR)))
    middle = (face.min(0) + face.max(0)) / 2
    assert np.abs(middle - [row, column]).max() < 0.08 * 160


def files(path):
  """Digests of a folder's files by name; without the report, whose seconds differ."""
  return {
    str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
    for p in sorted(path.rglob("*"))
    if p.is_file() and not p.name.startswith(("report.", "record."))
  }


def test_a_finished_subject_is_left_alone(subject, video, capsys):
  out, report = subject
  times = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
  with pytest.MonkeyPatch.context() as patch:
    forbid(patch, LOOK, STEADY, TRACK, LAYERS, PICTURES)
    assert pipeline.run(video, out, SETTINGS) == report
  assert "nothing to do" in capsys.readouterr().err
  assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == times


def test_other_settings_redo_only_what_hangs_on_them(subject, video, tmp_path, capsys):
  out = tmp_path / "person"
  shutil.copytree(subject[0], out)
  before = files(out)
  with pytest.MonkeyPatch.context() as patch:
    forbid(patch, LOOK, STEADY, TRACK, LAYERS, PICTURES)
    report = pipeline.run(video, out, dataclasses.replace(SETTINGS, av_offset=3))
  assert report["sound"]["moved_earlier_by_frames"] == 3
  assert "to do again: tables" in capsys.readouterr().err
  after = files(out)
  changed = {name for name in before | after if before.get(name) != after.get(name)}
  assert {"aud.wav", "aud_mel.npy"} <= changed <= {"aud.wav", "aud_mel.npy", "contact_sheet.png"}
  with pytest.MonkeyPatch.context() as patch:
    forbid(patch, LOOK, STEADY, LAYERS, PICTURES)
    pipeline.run(video, out, dataclasses.replace(SETTINGS, av_offset=3, focal_px=400.0))
  assert json.loads((out / "transforms_train.json").read_text())["focal_len"] == 400.0
  folder.check(out, priors=False)
  assert not out.with_name("person.work").exists()


def test_what_others_put_into_a_subject_is_not_lost(subject, video, tmp_path):
  out = tmp_path / "person"
  shutil.copytree(subject[0], out)
  other = dataclasses.replace(SETTINGS, av_offset=3)
  (out / "au.csv").write_text((out / "au.csv").read_text() + "\n")
  with pytest.raises(UserError, match="au.csv in it was changed since"):
    pipeline.run(video, out, other)
  shutil.copy(subject[0] / "au.csv", out / "au.csv")
  (out / "emotion.csv").write_text("frame,label,intensity\n")
  with pytest.raises(UserError, match="emotion.csv in it is not of its making"):
    pipeline.run(video, out, other)
  (out / "emotion.csv").unlink()
  (out / "train_auds_exp.npz").write_bytes(b"")  # of `uajax extract`: stale, and goes
  consent.write(out, "she agreed")
  pipeline.run(video, out, other)
  assert not (out / "train_auds_exp.npz").exists()
  assert consent.read(out).statement == "she agreed"
  with pytest.raises(UserError, match="consent.json in it is not of its making"):
    pipeline._require_untouched(out, pipeline._record(out), {"look": "of another video"})


def test_an_exchange_that_was_cut_short_is_ended(subject, video, tmp_path):
  for begun in ("before", "between"):
    out = tmp_path / begun / "person"
    work = out.with_name("person.work")
    shutil.copytree(subject[0], work / "subject")
    shutil.copytree(subject[0], work / "replaced" if begun == "between" else out)
    with pytest.MonkeyPatch.context() as patch:
      forbid(patch, LOOK, STEADY, TRACK, LAYERS, PICTURES)
      pipeline.run(video, out, SETTINGS)
    folder.check(out, priors=False)
    assert not work.exists()


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_processes(subject, video, tmp_path):
  out = tmp_path / "person"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(workers, "PIECE_BYTES", PIECE)
    pipeline.run(video, out, dataclasses.replace(SETTINGS, jobs=2))
  assert files(out) == files(subject[0])


def test_the_page_is_whole_in_itself_and_escapes_names(subject):
  text = (subject[0] / "report.html").read_text()
  assert text.count("<svg") == 5 and "data:image/jpeg;base64," in text
  assert not re.search(r"(src|href)=\"(?!data:)|https?:|<script|@import|url\(", text)
  for line in subject[1]["warnings"]:
    assert html.escape(line) in text
  parsed = xml.etree.ElementTree.fromstring(  # well-formed but for the head's void elements
    re.sub(r"<(meta|img)([^>]*)>", r"<\1\2/>", text.split("\n", 1)[1])
  )
  assert parsed.tag == "html"


def test_a_name_with_markup_is_shown_as_it_is(subject, video, tmp_path):
  named = tmp_path / "<script>alert(1)</script>&.mp4".replace("/", "_")
  shutil.copy(video, named)
  out = tmp_path / "person"
  shutil.copytree(subject[0], out)
  pipeline.run(named, out, SETTINGS)
  text = (out / "report.html").read_text()
  assert "<script" not in text and "&lt;script&gt;" in text


def make_video(path, seconds, audio=True):
  frames = [np.full((96, 96, 3), 40 + f, np.uint8) for f in range(round(seconds * 25))]
  sound = 0.2 * np.sin(np.arange(round(seconds * 16000)) / 5).astype(np.float32)
  media.write_video(path, frames, audio=sound if audio else None)
  return path


def test_what_cannot_be_used_is_refused_in_one_line(shared, tmp_path):
  shared("models/face_landmarker.task")
  text = tmp_path / "text.mp4"
  text.write_text("this is no video")
  whole = make_video(tmp_path / "whole.mp4", 3)
  cut = tmp_path / "cut.mp4"
  cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
  cases = {
    tmp_path / "none.mp4": "does not exist",
    text: "not a sound or video file",
    make_video(tmp_path / "mute.mp4", 3, audio=False): "holds no sound",
    make_video(tmp_path / "short.mp4", 1): "at least 2 s",
    whole: "no face was found",
    cut: "cut",
  }
  out = tmp_path / "out"
  for path, words in cases.items():
    with pytest.raises(UserError, match=words) as caught:
      pipeline.run(path, out)
    assert "\n" not in str(caught.value)
    assert not out.exists() and not out.with_name("out.work").exists(), path
  with pytest.raises(UserError, match="--size"):
    pipeline.run(whole, out, pipeline.Settings(size=7))
  out.mkdir()
  (out / "mine.txt").write_text("keep")
  with pytest.raises(UserError, match="already holds something"):
    pipeline.run(whole, out)
  assert (out / "mine.txt").read_text() == "keep"
  shutil.rmtree(out)


def test_square_follows_the_face():
  still = np.tile([[800.0, 300, 1000, 500]], (5, 1))
  left, top, side = pipeline.choose_square(still, 1920, 1080)
  assert side == 440 and left + side / 2 == 900 and top + side / 2 == 400
  tiny = pipeline.choose_square(still / 2, 640, 640)  # in a square picture
  assert tiny == (450 - 110, 200 - 110, 220)
  assert pipeline.choose_square(np.array([[100.0, 100, 300, 300]]), 450, 450) == (0, 0, 450)
  edge = pipeline.choose_square(np.array([[0.0, 0, 400, 400]]), 1000, 600)
  assert edge == (0, 0, 600)
