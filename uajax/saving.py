"""Writing aside: a file or folder appears under its name only when it is whole.

What fails half way (an exception, a full disk) leaves neither a torn file nor a changed
earlier one. A killed process leaves at most a name ending in `.partial*`, never read.
"""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

from uajax.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def aside(path: str | os.PathLike, *, folder: bool = False) -> Iterator[pathlib.Path]:
  """Yields the path to write to; it takes the name `path` when the block ends well.

  An earlier file of that name is replaced; an earlier folder must be empty.

  Raises:
    UserError: the disk is full, the place is not writable or a folder there holds something.
  """
  path = pathlib.Path(path)
  # The suffix stays last: some writers choose the format by it, or append it.
  name = f"{path.name}.partial" if folder else f".{path.stem}.partial{os.getpid()}{path.suffix}"
  partial = path.with_name(name)
  try:
    _require_free(path, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    if folder:
      partial.mkdir()
    yield partial
    if not folder:
      with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
  except BaseException as error:
    _remove(partial)
    number = getattr(error, "errno", None)
    if number in _FULL:
      raise UserError(
        f"the disk is full: {path} was not written: free some space and run again"
      ) from error
    # Only failures of the place itself: a missing input keeps its own error.
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
      reason = os.strerror(number).lower()
      raise UserError(f"{path} cannot be written ({reason}): choose another place") from error
    raise


def _require_free(path: pathlib.Path, folder: bool) -> None:
  if folder and path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f"{path} already holds something: remove it or choose another place")
  if not folder and path.is_dir():
    raise UserError(f"{path} is a folder: give the name of a file")


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)
