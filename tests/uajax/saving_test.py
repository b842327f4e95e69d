import errno

import pytest

from uajax import saving
from uajax.errors import UserError


def test_a_file_appears_whole_and_replaces_the_earlier_one(tmp_path):
  path = tmp_path / "new" / "table.npz"
  for text in ("one", "two"):
    with saving.aside(path) as partial:
      assert partial.suffix == ".npz" and not (path.exists() and path.read_text() == text)
      partial.write_text(text)
    assert path.read_text() == text
  assert [p.name for p in path.parent.iterdir()] == ["table.npz"]


@pytest.mark.parametrize("number, words", [
  (errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only.*another place"),
])  # fmt: skip
def test_failures_of_the_place_are_said_and_change_nothing(tmp_path, number, words):
  path = tmp_path / "a.txt"
  path.write_text("earlier")
  with pytest.raises(UserError, match=words), saving.aside(path) as partial:
    partial.write_text("half")
    raise OSError(number, "as the system says it")
  assert path.read_text() == "earlier" and len(list(tmp_path.iterdir())) == 1


def test_other_errors_stay_themselves(tmp_path):
  with pytest.raises(FileNotFoundError), saving.aside(tmp_path / "a") as partial:
    partial.write_text("half")
    (tmp_path / "input").read_text()
  with pytest.raises(KeyboardInterrupt), saving.aside(tmp_path / "b", folder=True) as partial:
    (partial / "x").write_text("half")
    raise KeyboardInterrupt
  assert not list(tmp_path.iterdir())


def test_folders_are_never_overwritten(tmp_path):
  path = tmp_path / "subject"
  path.mkdir()
  with saving.aside(path, folder=True) as partial:  # empty: free to take
    (partial / "x").write_text("whole")
  with pytest.raises(UserError, match="already holds something"), saving.aside(path, folder=True):
    pass
  with pytest.raises(UserError, match="is a folder"), saving.aside(path):
    pass
  assert (path / "x").read_text() == "whole"
