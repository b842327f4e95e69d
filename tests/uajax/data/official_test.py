"""Folders of the official scripts are read unchanged and train; ours have all that theirs have."""

import dataclasses
import json
import shutil

import numpy as np
import PIL.Image
import pytest

from tests.uajax.data import official_folder as official
from tests.uajax.data import subject_folder
from uajax import config, torchfile, types
from uajax.data import folder
from uajax.errors import UserError
from uajax.train import loop


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
  path = tmp_path_factory.mktemp("official") / "me"
  official.make(path)
  return path


@pytest.fixture(scope="module")
def train(subject):
  return folder.read(subject, "train", audio="deepspeech")


def test_the_frame_that_outlasts_the_sound_goes(subject, train):
  folder.check(subject, audio="deepspeech")
  val = folder.read(subject, "val", audio="deepspeech")
  assert train.ids.tolist() == list(range(official.TRAIN))
  assert val.ids.tolist() == list(range(official.TRAIN, official.WINDOWS))
  windows = np.load(subject / "aud.npy")
  np.testing.assert_allclose(val.frames.controls.audio[-1, :5], windows[44:].swapaxes(1, 2), 1e-6)
  assert (val.frames.controls.audio[-1, 5:] == 0).all()


def test_colours_and_teeth(train):
  for i in (0, 3, 20):
    labels, teeth = official.labels(i), official.teeth(i)
    truth = np.full(labels.shape, types.FACE)
    for label, kind in (
      (0, types.BACKGROUND), (11, types.MOUTH), (14, types.NECK), (16, types.TORSO),
      (17, types.HAIR)):  # fmt: skip
      truth[labels == label] = kind
    truth[teeth] = types.MOUTH
    np.testing.assert_array_equal(train.frames.classes[i], truth)


def test_cameras_see_the_head_in_the_middle(train):
  head = np.array([0, 0, 0, 1.0])
  for viewmat, k in zip(train.frames.camera.viewmat, train.frames.camera.K, strict=True):
    seen = (viewmat @ head)[:3]
    np.testing.assert_allclose(seen, [0, 0, 0.7], atol=1e-6)  # in front, metres
    np.testing.assert_allclose((k @ seen)[:2] / seen[2], [24, 24], atol=1e-4)
  # The tracker's nod turns what is above the origin: X_c = R X + t, y up.
  up = train.frames.camera.viewmat[5] @ np.array([0, 0.1, 0, 1])
  angle = 0.03 * np.sin(1.5)
  np.testing.assert_allclose(
    up[:3], [0, -0.1 * np.cos(angle), 0.7 - 0.1 * np.sin(angle)], atol=1e-6
  )


def test_action_units_of_openface(subject, train):
  ours = train.frames.controls.action_units
  for i in (0, 4, 20):
    truth = [official.unit(n, i) * (i != 20) for n in (1, 4, 5, 6, 7, 45)]
    truth[5] = min(truth[5], 2)
    np.testing.assert_allclose(ours[i], truth, atol=1e-6)
  au25 = np.array([official.unit(25, i) * (i != 20) for i in range(official.FRAMES)])
  expected = np.minimum(au25, np.percentile(au25, 95))[: official.TRAIN]
  np.testing.assert_allclose(train.guide.au25, expected, atol=1e-6)
  np.testing.assert_allclose(
    train.guide.lip_height_px[:5], [official.opening(i) for i in range(5)], atol=1e-5
  )


def test_lips_that_leave_the_picture_keep_a_square_in_it(train):
  r0, r1, c0, c1 = train.frames.lips[7]
  assert 0 <= r0 < r1 <= official.SIZE and 0 <= c0 < c1 <= official.SIZE
  assert train.frames.lips[0].tolist() == [26, 34, 20, 28]


def test_priors_go_by_position_where_the_transforms_leave_frames_out(tmp_path):
  official.make(tmp_path, left_out=(3, 4, 46))
  train = folder.read(tmp_path, "train", audio="deepspeech")
  assert train.ids.tolist() == [i for i in range(official.TRAIN) if i not in (3, 4)]
  controls = train.frames.controls
  for name, width in (("f_exp", 64), ("f_tone", 64), ("emotion", 128)):
    truth = np.sin(train.ids[:, None] + np.arange(width))
    np.testing.assert_allclose(getattr(controls, name), truth, atol=1e-6)
  # Sound and action units go by the frame's number.
  windows = np.load(tmp_path / "aud.npy")
  np.testing.assert_allclose(controls.audio[3, 4], windows[5].T, 1e-6)
  np.testing.assert_allclose(controls.action_units[3, 0], official.unit(1, 5), atol=1e-6)


def test_a_table_of_openface_that_ends_early_costs_its_last_frames_only(subject, tmp_path):
  path = shutil.copytree(subject, tmp_path / "me")
  lines = (path / "au.csv").read_text().splitlines()
  (path / "au.csv").write_text("\n".join(lines[:-3]) + "\n")
  assert folder.read(path, "val", audio="deepspeech").ids.tolist() == [45, 46]
  (path / "au.csv").write_text("\n".join(lines[:40]) + "\n")
  with pytest.raises(UserError, match="au.csv has 39 rows, none for frame 44"):
    folder.read(path, "train", audio="deepspeech")


def test_the_tracker_of_the_official_scripts_teaches_the_lip_expert(subject):
  tracked = folder.read_expression(subject)
  assert tracked is not None and tracked.shape == (official.FRAMES, 64)
  np.testing.assert_allclose(tracked[:, 0], [official.opening(i) - 1.5 for i in range(50)], 1e-5)
  # Without DeepSpeech's windows the sound itself is heard.
  assert folder.read(subject, "val").frames.controls.audio.shape[1:] == (8, 80, 16)


def test_the_folder_is_left_as_it_was(subject):
  names = {p.name for p in subject.iterdir()}
  assert names == {
    "aud.wav", "aud.npy", "au.csv", "bc.jpg", "track_params.pt", "points3d.ply",
    "transforms_train.json", "transforms_val.json", "ori_imgs", "gt_imgs", "torso_imgs", "parsing",
    "teeth_mask", *(f"{s}_{n}.pth" for s in folder.SPLITS for n in ("auds_exp", "audiostyle")),
    *(f"mser_emotion_{s}.pth" for s in folder.SPLITS),
  }  # fmt: skip


@pytest.mark.slow
def test_it_trains(subject, tmp_path):
  planes = config.Planes(features=2, resolution=4, multiples=(1,))
  motion = config.Motion(
    planes=planes, emotion_planes=planes, members=2, hidden=4, latent=4, features=4)  # fmt: skip

  def small(stage, steps, **changes):
    densify = dataclasses.replace(stage.densify, slots=64, max_slots=64, until=0)
    stage = config.shorten(stage, steps, splats=48)
    return dataclasses.replace(stage, densify=densify, lpips_from=steps, **changes)

  experiment = config.Experiment(
    model=config.Model(motion=motion, audio="deepspeech"),
    mouth=small(config.MOUTH, 4, warm_steps=0, ensemble_from=0, guide_until=4, guide_every=2),
    face=small(config.FACE, 24, warm_steps=0, ensemble_from=0, guide_until=24),
    fuse=small(config.FUSE, 2), log_every=2, picture_every=30, save_every=30)  # fmt: skip
  run = loop.train(subject, tmp_path / "run", experiment)
  assert run.progress().startswith("complete")
  rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
  assert all(np.isfinite(row["loss"]) and row["skipped"] == 0 for row in rows)
  face = [row["loss"] for row in rows if row["stage"] == "face"]
  assert np.mean(face[-3:]) < np.mean(face[:3])
  assert run.experiment.model.motion.audio_channels == 29


def test_what_we_write_has_every_file_that_the_official_code_reads(tmp_path):
  """File by file, as method.md D.1 lists them; all but aud_ds.npy, which only its network gives."""
  path = tmp_path / "ours"
  values = subject_folder.make(path)
  count, size = subject_folder.FRAMES, (subject_folder.WIDTH, subject_folder.HEIGHT)
  for split in folder.SPLITS:
    rows = values["priors"][split]
    folder.write_features(path, split, **rows, pth=True)
    document = json.loads((path / f"transforms_{split}.json").read_text())
    assert {"focal_len", "cx", "cy", "frames"} <= set(document)
    for row in document["frames"]:
      assert row["img_id"] == row["aud_id"] and np.shape(row["transform_matrix"]) == (4, 4)
      seen = np.linalg.inv(row["transform_matrix"]) @ [0, 0, 0, 1]
      assert seen[2] < 0  # a camera of OpenGL looks down -z
    widths = {f"{split}_auds_exp": 64, f"{split}_audiostyle": 64, f"mser_emotion_{split}": 128}
    for stem, width in widths.items():
      table = torchfile.load(path / f"{stem}.pth")
      assert table.shape == (len(document["frames"]), 1, width) and table.dtype == np.float32
  header = (path / "au.csv").read_text().splitlines()[0].split(",")
  assert {f" {u}_r" for u in (*types.ACTION_UNITS, "AU25")} <= set(header)  # with the space
  assert len((path / "au.csv").read_text().splitlines()) == count + 1
  with PIL.Image.open(path / "bc.jpg") as image:
    assert image.size == size and image.format == "JPEG"
  allowed = {tuple(colour) for colour in folder.COLOURS.values()}
  for i in range(count):
    for kind in ("ori_imgs", "gt_imgs"):
      with PIL.Image.open(path / kind / f"{i}.jpg") as image:
        assert image.size == size and image.format == "JPEG" and image.mode == "RGB"
    with PIL.Image.open(path / "torso_imgs" / f"{i}.png") as image:
      assert image.size == size and image.mode == "RGBA"
    with PIL.Image.open(path / "parsing" / f"{i}.png") as image:
      assert image.size == size and image.mode == "RGB"
      assert {tuple(c) for c in np.asarray(image).reshape(-1, 3).tolist()} <= allowed
    teeth = np.load(path / "teeth_mask" / f"{i}.npy")
    assert teeth.shape == size[::-1] and teeth.dtype == bool
    assert np.loadtxt(path / "ori_imgs" / f"{i}.lms").shape == (68, 2)
