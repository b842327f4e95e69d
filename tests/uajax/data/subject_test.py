import os
import shutil
import socket
import sys

import jax
import numpy as np
import pytest

from tests.uajax.data import subject_folder as tiny
from tests.uajax.speech import tiny_model
from uajax.data import folder
from uajax.errors import UserError

subject = pytest.importorskip("uajax.data.subject")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError("something asked the network")

  monkeypatch.setattr(socket.socket, "connect", refuse)
  monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "subject"
  tiny.make(path)
  return path


@pytest.fixture
def copy(made, tmp_path):
  return shutil.copytree(made, tmp_path / "copy", ignore=shutil.ignore_patterns(".tfds"))


def assert_equal(a, b):
  def same(x, y):
    assert np.asarray(x).dtype == np.asarray(y).dtype
    np.testing.assert_array_equal(x, y)

  jax.tree.map(same, a, b)


def configs(path):
  return sorted(p.name for p in (path / ".tfds" / "subject").glob("[!.]*"))


@pytest.mark.parametrize("split", folder.SPLITS)
def test_records_equal_the_folder_bit_for_bit(made, split):
  assert_equal(subject.read(made, split), folder.read(made, split))
  assert "tensorflow" not in sys.modules


def test_without_torso_teeth_or_priors(copy):
  for name in ("torso_imgs", "teeth_mask"):
    shutil.rmtree(copy / name)
  (copy / "val_auds_exp.npz").unlink()
  settings = {"allow_missing_priors": True}
  assert_equal(subject.read(copy, "val", **settings), folder.read(copy, "val", **settings))
  with pytest.raises(UserError, match="uajax extract"):
    subject.read(copy, "val")


def test_records_are_made_once_and_again_when_the_folder_changes(copy, capsys):
  subject.read(copy, "val")
  first = configs(copy)
  written = {p: p.stat().st_mtime_ns for p in (copy / ".tfds").rglob("*record*")}
  (copy / "points3d.ply").write_text("not ours")  # read by nobody
  subject.read(copy, "train")
  assert configs(copy) == first
  assert {p: p.stat().st_mtime_ns for p in (copy / ".tfds").rglob("*record*")} == written
  rows = {"f_exp": np.ones((2, 64)), "f_tone": np.ones((2, 64)), "emotion": np.ones((2, 128))}
  folder.write_features(copy, "val", **rows)
  assert (subject.read(copy, "val").frames.controls.f_exp == 1).all()
  assert configs(copy) != first and len(configs(copy)) == 1  # the old ones are gone
  assert capsys.readouterr().out == ""


def test_random_access_to_single_frames(made):
  source, truth = subject.Source(made, "train"), folder.Source(made, "train")
  assert len(source) == len(truth) == 10
  assert_equal(source[7], truth[7])
  assert_equal(source.guide, truth.guide)


def test_a_damaged_folder_leaves_no_records(copy):
  (copy / "gt_imgs" / "5.jpg").write_bytes(b"\xff\xd8torn")
  with pytest.raises(UserError, match="gt_imgs/5.jpg is a damaged picture"):
    subject.prepare(copy)
  assert not [p for p in copy.rglob("*") if "record" in p.name]


def test_several_kinds_of_audio_lie_side_by_side(copy):
  np.save(copy / "aud_ds.npy", np.ones((12, 16, 29), np.float32))
  assert subject.read(copy, "val", audio="deepspeech").frames.controls.audio.shape[2:] == (29, 16)
  assert subject.read(copy, "val", audio="mel").frames.controls.audio.shape[2:] == (80, 16)
  assert [name.partition("_")[0] for name in configs(copy)] == ["deepspeech", "mel"]


def test_a_place_that_takes_no_records(copy):
  (copy / "cache").write_text("a file where a folder is wanted")
  with pytest.raises(UserError, match="source=folder"):
    subject.prepare(copy, copy / "cache")
  assert os.path.isfile(copy / "cache")


def test_other_programs_have_the_records_by_the_tools_of_tfds(copy, tmp_path):
  """What `tfds build` does, and `tfds.load`, here without TensorFlow."""
  import tensorflow_datasets as tfds

  tiny_model.write(tmp_path / "weights")
  folder.make_windows(copy, "hubert", tmp_path / "weights")
  for config, channels in (("mel", 80), ("hubert", tiny_model.HIDDEN)):
    builder = tfds.builder(f"subject/{config}", data_dir=tmp_path / "records")
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(manual_dir=copy, try_download_gcs=False)
    )
    frames = tfds.load(f"subject/{config}", data_dir=tmp_path / "records", split="train")
    assert len(frames) == 10 and frames[3]["audio"].shape[:2] == (8, channels)
    truth = folder.Source(copy, "train", audio=config)[3]
    np.testing.assert_array_equal(frames[3]["audio"], truth.controls.audio)
    assert frames[3]["image"] == (copy / "gt_imgs" / "3.jpg").read_bytes()
  names = {p.name for p in (tmp_path / "records").rglob("*record*")}
  assert "subject-train.array_record-00000-of-00001" in names
