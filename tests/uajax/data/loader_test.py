import itertools
import json

import jax
import numpy as np
import pytest

from tests.uajax.data import subject_folder as tiny
from uajax.data import folder, loader
from uajax.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "subject"
  tiny.make(path)
  return path


@pytest.mark.parametrize("source", ["auto", "folder", "tfds"])
def test_every_store_gives_the_same_clip(made, source):
  jax.tree.map(
    np.testing.assert_array_equal, loader.load(made, "val", source=source), folder.read(made, "val")
  )
  frames = loader.open_source(made, "val", source=source)
  jax.tree.map(np.testing.assert_array_equal, frames[1], folder.Source(made, "val")[1])


def test_auto_goes_without_records_where_they_cannot_be_written(made, tmp_path):
  path = tmp_path / "subject"
  tiny.make(path)
  (path / ".tfds").write_text("in the way")
  assert len(loader.load(path, "val").ids) == 2
  with pytest.raises(UserError, match="source=folder"):
    loader.load(path, "val", source="tfds")


def test_errors_of_the_folder_stay_its_own(tmp_path):
  with pytest.raises(UserError, match="uajax preprocess"):
    loader.load(tmp_path / "nobody", "val")


class Numbered:
  """Frames that are their own number."""

  def __len__(self):
    return 10

  def __getitem__(self, index):
    return {"id": np.asarray(index), "row": np.full((2,), index)}


def _take(count, **settings):
  batches = loader.Batches(Numbered(), 3, **settings)
  return [batch["id"].tolist() for batch in itertools.islice(batches, count)]


def test_batches_are_the_same_each_time_and_resume_anywhere():
  whole = _take(9, seed=5)
  assert whole == _take(9, seed=5) and whole != _take(9, seed=6)
  assert _take(4, seed=5, start_step=5) == whole[5:]


def test_an_epoch_shows_each_frame_once_in_an_order_of_its_own():
  epochs = [sum(_take(3, seed=1, start_step=start), []) for start in (0, 3, 6)]
  assert all(len(set(epoch)) == 9 for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2]
  assert next(loader.Batches(Numbered(), 4, 0))["row"].shape == (4, 2)


def _rows(batches, count):
  return [batch["id"].tolist() for batch in itertools.islice(batches, count)]


def test_hosts_share_the_batches_that_one_would_have():
  whole = _rows(loader.Batches(Numbered(), 4, 3), 6)
  for hosts in (2, 4):
    shares = [_rows(loader.Batches(Numbered(), 4, 3, host=h, hosts=hosts), 6) for h in range(hosts)]
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole


def test_a_host_reads_its_own_frames_only():
  read = []

  class Watched(Numbered):
    def __getitem__(self, index):
      read.append(index)
      return super().__getitem__(index)

  batches = loader.Batches(Watched(), 4, 3, host=1, hosts=2, workers=1)
  mine = sum(_rows(batches, 2), [])
  assert read[:4] == mine


def test_a_stream_goes_on_where_its_state_was_taken_on_any_number_of_hosts():
  whole = _rows(loader.Batches(Numbered(), 4, 3), 7)
  first = [loader.Batches(Numbered(), 4, 3, host=h, hosts=2) for h in range(2)]
  for batches in first:
    _rows(batches, 3)
  states = [json.loads(json.dumps(batches.state())) for batches in first]
  assert states[0] == states[1] and states[0]["step"] == 3
  for hosts in (1, 2, 4):
    shares = []
    for host in range(hosts):
      batches = loader.Batches(Numbered(), 4, 3, host=host, hosts=hosts)
      _rows(batches, 1)
      batches.restore(states[0])
      shares.append(_rows(batches, 4))
      assert batches.step == 7
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole[3:]
  for other in (dict(seed=4), dict(batch=2)):
    with pytest.raises(UserError, match="the same subject, batch and seed"):
      loader.Batches(Numbered(), **({"batch": 4, "seed": 3} | other)).restore(states[0])


def test_the_rows_of_a_batch_are_the_frames_of_the_subject(made):
  source = loader.open_source(made, "train")
  batch = next(loader.Batches(source, 4, 0))
  assert batch.image.shape == (4, 32, 40, 3) and batch.controls.audio.shape == (4, 8, 80, 16)
  ids = [next(i for i in range(10) if (source[i].image == row).all()) for row in batch.image]
  assert len(set(ids)) == 4


def test_a_batch_that_cannot_be_is_refused():
  with pytest.raises(ValueError, match=r"1\.\.10"):
    loader.Batches(Numbered(), 11, 0)
  with pytest.raises(ValueError, match="host 0 of 3"):
    loader.Batches(Numbered(), 4, 0, host=0, hosts=3)
