import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from uajax import media
from uajax.data import folder
from uajax.errors import UserError
from uajax.preprocess import landmarks, masks, pipeline

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


@pytest.fixture(scope="module")
def subject(shared, video, tmp_path_factory):
  """The video preprocessed by a run that is interrupted and taken up again."""
  shared("models/face_landmarker.task")
  out = tmp_path_factory.mktemp("subject") / "person"
  settings = pipeline.Settings(size=160, looks=2, focal_px=320.0)
  with pytest.MonkeyPatch.context() as patch:
    classify, calls = masks.classify, itertools.count()

    def interrupt(*args):
      if next(calls) == 30:
        raise KeyboardInterrupt
      return classify(*args)

    patch.setattr(masks, "classify", interrupt)
    with pytest.raises(KeyboardInterrupt):
      pipeline.run(video, out, settings)
  assert not out.exists() and out.with_name("person.work").is_dir()
  with pytest.MonkeyPatch.context() as patch:

    def again(*_):
      raise AssertionError("landmarks were read again")

    patch.setattr(landmarks, "follow", again)
    patch.setattr(landmarks, "refine", again)
    report = pipeline.run(video, out, settings)
  assert not out.with_name("person.work").exists()
  return out, report


def test_the_folder_reads_as_a_subject(subject):
  out, report = subject
  folder.check(out, priors=False)
  train = folder.read(out, "train", allow_missing_priors=True)
  assert train.frames.image.shape[1:] == (160, 160, 3)
  assert report["frames"] == {"all": FRAMES, "used": FRAMES - len(GONE), "left_out": [[20, 25]]}
  # Left out by number: no other frame has moved.
  assert not set(GONE) & set(train.ids.tolist())
  assert train.ids.tolist() == [f for f in range(FRAMES * 10 // 11) if f not in GONE]
  assert not (out / "parsing" / "22.png").exists()
  assert (train.frames.camera.viewmat[:, 2, 3] > 0.3).all()
  assert folder.read_expression(out).shape == (FRAMES, 64)


def test_the_square_holds_the_head_and_layers_lie_where_they_should(subject):
  out, report = subject
  left, side = report["cut_out"]["left"], report["cut_out"]["side"]
  assert 100 < side <= 200 and abs(left + side / 2 - 164) < 20
  clip = folder.read(out, "train", allow_missing_priors=True)
  shares = report["layers"]["share_of_picture"]
  assert 0.15 < shares["face"] < 0.45 and 0.02 < shares["hair"] < 0.2 and shares["torso"] > 0.05
  for f in (0, 30):
    classes = clip.frames.classes[f]
    r0, r1, c0, c1 = clip.frames.lips[f]
    middle = classes[(r0 + r1) // 2, (c0 + c1) // 2]
    assert middle in (pipeline.FACE, pipeline.MOUTH)
    assert (classes[0] == pipeline.BACKGROUND).all()
    person = np.argwhere(classes == pipeline.HAIR)[:, 0].mean()
    assert person < r0  # hair above the lips
    # Where nobody is, the truth is the plate.
    bare = classes == pipeline.BACKGROUND
    gap = np.abs(clip.frames.image[f].astype(int) - clip.frames.background[f])[bare]
    assert gap.mean() < 4
  assert (out / "contact_sheet.png").exists()
  assert json.loads((out / "report.json").read_text())["warnings"] == report["warnings"]


def test_points_fixed_to_the_head_stay_on_it(subject):
  """The camera that the folder states puts the middle of the head onto the face, in every frame."""
  out, _ = subject
  clip = folder.read(out, "train", allow_missing_priors=True)
  for camera, classes in zip(
    clip.frames.camera.viewmat, clip.frames.classes, strict=True
  ):
    x, y, z = camera[:3, 3]
    column, row = 320 * x / z + 80, 320 * y / z + 80
    face = np.argwhere(np.isin(classes, (pipeline.FACE, pipeline.HAIR)))
    middle = (face.min(0) + face.max(0)) / 2
    assert np.abs(middle - [row, column]).max() < 0.08 * 160


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


def test_runs_of_missing_frames():
  assert pipeline._spans(np.array([0, 1, 1, 0, 1], bool)) == [[1, 2], [4, 4]]
  assert pipeline._spans(np.zeros(3, bool)) == []
