"""Every step is fed the frames that its number and the key decide, wherever pictures lie."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.uajax import tiny_run
from tests.uajax.data import subject_folder
from uajax import config
from uajax.data import folder, loader
from uajax.errors import UserError
from uajax.train import feed, sampling, step
from uajax.types import MOUTH

ROOT = pathlib.Path(__file__).resolve().parents[3]
KEY = jax.random.key(3)
EXPERIMENT = dataclasses.replace(tiny_run.EXPERIMENT, batch=2, log_every=10)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  path = tmp_path_factory.mktemp("subjects") / "tiny"
  subject_folder.make(path)
  return path


@pytest.fixture(scope="module")
def source(made):
  return loader.open_source(made, "train", source="folder")


def drawn(fed, stage, first, ends):
  """Frames [s b] of all steps and the pictures they bring."""
  frames, pictures = [], []
  for end, chunk in fed.chunks(stage, KEY, first, ends):
    count = end - int(chunk.first)
    frames.append(np.asarray(chunk.frames)[:count])
    pictures.append(jax.tree.map(lambda leaf, n=count: np.asarray(leaf)[:n], chunk.pictures))
  return np.concatenate(frames), jax.tree.map(lambda *parts: np.concatenate(parts), *pictures)


@pytest.mark.parametrize("place", ["resident", "streamed"])
def test_chunks_hold_the_pictures_that_are_drawn(source, place, monkeypatch):
  """However many steps they have, on whatever devices; read from disk in parts or one by one."""
  frame_bytes = feed.PIXEL_BYTES * source.height * source.width
  for mesh, size, steps in ((None, 100, 10), (step.mesh_of(EXPERIMENT), 6, 3)):
    monkeypatch.setattr(feed, "CHUNK_BYTES", size * frame_bytes)
    with feed.Feed(source, EXPERIMENT, mesh, place) as fed:
      assert fed.steps == steps and fed.streamed == (place == "streamed")
      share = np.stack([source.classes(i) for i in range(len(source))]) == MOUTH
      np.testing.assert_allclose(fed.material.mouth_share, share.mean((1, 2)), rtol=1e-6)
      frames, found = drawn(fed, config.FUSE, 5, [15, 18])
      for parts, frame in zip(zip(*found, strict=True), frames, strict=True):
        for part, i in zip(zip(*parts, strict=True), frame, strict=True):
          jax.tree.map(np.testing.assert_array_equal, part, tuple(source.pictures(i)))
      _, chunk = next(fed.chunks(config.FACE, KEY, 0, [3]))
      assert chunk.pictures.background is None, "only where it is looked at"
  held = [shard.data.shape[:2] for shard in chunk.pictures.image.addressable_shards]
  assert held == [(3, 1), (3, 1)], "a device holds the frames it trains on"


def test_a_batch_follows_the_schedule_of_its_steps(source):
  """Guided draws end with the step that the stage names, however many frames a step takes."""
  stage = dataclasses.replace(config.shorten(config.FACE, 60), guide_every=1)
  with feed.Feed(source, EXPERIMENT, None, "resident") as fed:
    guide, share = fed.material.guide, fed.material.mouth_share
    frames = np.asarray(step.draw(EXPERIMENT, stage, 60, guide, share, jnp.asarray(0), KEY))
  usual = dataclasses.replace(stage, guide_until=0)
  epochs = np.asarray([sampling.choose(usual, guide, share, n, KEY) for n in range(120)])
  same = (frames == epochs.reshape(60, 2)).all(1)
  assert not same[: stage.guide_until].all() and same[stage.guide_until :].all()
  assert not same[stage.guide_until // 2 : stage.guide_until].all()


@pytest.mark.parametrize(("free", "streamed"), [(10**9, False), (10**5, True), (None, False)])
def test_pictures_lie_on_the_device_where_its_memory_holds_them(
    source, free, streamed, monkeypatch, caplog):
  monkeypatch.setattr(feed.memory, "free_bytes", lambda: free)
  with feed.Feed(source, EXPERIMENT, None) as fed:
    assert fed.streamed == streamed
  assert ("stay on disk" if streamed else "lie on the device") in caplog.text


def test_a_picture_damaged_while_training_is_told_in_one_line(tmp_path):
  subject_folder.make(tmp_path / "tiny")
  source = loader.open_source(tmp_path / "tiny", "train", source="folder")
  with feed.Feed(source, EXPERIMENT, None, "streamed") as fed:
    for picture in (tmp_path / "tiny" / "gt_imgs").iterdir():
      picture.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"gt_imgs.*damaged picture"):
      next(fed.chunks(config.FUSE, KEY, 0, [3]))


def long_subject(path, count, monkeypatch):
  """`count` frames of 512 px: twelve of them again and again, as links."""
  monkeypatch.setattr(subject_folder, "HEIGHT", 512)
  monkeypatch.setattr(subject_folder, "WIDTH", 512)
  subject_folder.make(path)
  few = subject_folder.FRAMES
  for kind in ("ori_imgs", "gt_imgs", "torso_imgs", "parsing", "teeth_mask"):
    for file in list((path / kind).iterdir()):
      for number in range(int(file.stem) + few, count, few):
        os.link(file, path / kind / f"{number}{file.suffix}")
  repeated = np.arange(count) % few
  np.save(path / "aud_mel.npy", np.load(path / "aud_mel.npy")[repeated])
  head, *rows = (path / "au.csv").read_text().splitlines()
  (path / "au.csv").write_text("\n".join([head, *(rows[i] for i in repeated)]))
  document = json.loads((path / "transforms_train.json").read_text())
  poses = document["frames"]
  document["frames"] = [poses[i % len(poses)] | {"img_id": i} for i in range(count)]
  (path / "transforms_train.json").write_text(json.dumps(document))
  rows = {name: np.zeros((count, width)) for name, width in
          (("f_exp", 64), ("f_tone", 64), ("emotion", 128))}
  folder.write_features(path, "train", **rows)


@pytest.mark.slow
def test_six_thousand_frames_of_512_px_need_no_4_gib_of_the_host(tmp_path, monkeypatch):
  """The pictures alone are 10 GiB. What training itself takes comes on top."""
  long_subject(tmp_path / "long", 6000, monkeypatch)
  code = ("import dataclasses, resource, jax\n"
          "from uajax import config\n"
          "from uajax.data import loader\n"
          "from uajax.train import feed\n"
          f"source = loader.open_source({str(tmp_path / 'long')!r}, source='folder')\n"
          "with feed.Feed(source, config.paper(), None, 'streamed') as fed:\n"
          "  for _, chunk in fed.chunks(config.FUSE, jax.random.key(0), 0, range(100, 401, 100)):\n"
          "    jax.block_until_ready(chunk)\n"
          "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)\n")
  child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                         env=os.environ | {"PYTHONPATH": str(ROOT)})
  assert child.returncode == 0, child.stderr
  assert float(child.stdout) < 3, "GiB: training wants some of the four"
