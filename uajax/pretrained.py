"""Where pretrained files lie: the folders of `$UAJAX_MODELS`, then the user's cache.

Nothing is downloaded here; `preprocess.weights` knows where each file comes from.
"""

import functools
import hashlib
import os
import pathlib

from uajax.cache import root


def folders() -> tuple[pathlib.Path, ...]:
  """Where files are looked for, in order. `$UAJAX_MODELS` may name several, as `$PATH` does."""
  named = os.environ.get("UAJAX_MODELS", "").split(os.pathsep)
  return (*(pathlib.Path(name).expanduser() for name in named if name), cache())


def cache() -> pathlib.Path:
  """The folder that fetched files are kept in."""
  return root() / "models"


def find(name: str, sha256: str | None = None) -> pathlib.Path | None:
  """The first file of that name, and of that hash where one is given; else None."""
  for folder in folders():
    path = folder / name
    if path.is_file() and (sha256 is None or digest(path) == sha256):
      return path
  return None


def digest(path: pathlib.Path) -> str:
  """SHA-256 of a file, in hexadecimal."""
  state = path.stat()
  return _digest(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)  # keyed by size and time: a file is read once while unchanged
def _digest(path: pathlib.Path, size: int, time_ns: int) -> str:
  del size, time_ns
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
