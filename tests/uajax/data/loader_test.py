import itertools

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
  batches = loader.batches(Numbered(), 3, **settings)
  return [batch["id"].tolist() for batch in itertools.islice(batches, count)]


def test_batches_are_the_same_each_time_and_resume_anywhere():
  whole = _take(9, seed=5)
  assert whole == _take(9, seed=5) and whole != _take(9, seed=6)
  assert _take(4, seed=5, start_step=5) == whole[5:]


def test_an_epoch_shows_each_frame_once_in_an_order_of_its_own():
  epochs = [sum(_take(3, seed=1, start_step=start), []) for start in (0, 3, 6)]
  assert all(len(set(epoch)) == 9 for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2]
  assert next(loader.batches(Numbered(), 4, 0))["row"].shape == (4, 2)


def test_a_batch_larger_than_the_subject_is_refused():
  with pytest.raises(ValueError, match=r"1\.\.10"):
    loader.batches(Numbered(), 11, 0)
