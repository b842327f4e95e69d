"""The user's cache: where fetched files and compiled programs are kept for the next start.

JAX itself stores a program under a key of its code, the compiler and its settings, the kind of
device and, on a CPU, the instruction set: machines that share a home folder do not run each
other's. What is done here is to choose the folder, to bound it (JAX's own bound needs a further
package and a lock at every read), and to say at most once that it cannot be used.
"""

import contextlib
import importlib
import logging
import os
import pathlib
import warnings
import zlib

LIMIT_BYTES = 2 * 2**30
ZSTD = b"\x28\xb5\x2f\xfd"  # how its frames begin
_log = logging.getLogger("uajax")


def root() -> pathlib.Path:
  """`$UAJAX_CACHE`, or the folder `uajax` among the user's caches.

  Raises:
    RuntimeError: there is no home folder.
  """
  caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
  return pathlib.Path(os.environ.get("UAJAX_CACHE") or caches / "uajax").expanduser()


def compiled() -> pathlib.Path:
  """Where compiled programs lie: in `$JAX_COMPILATION_CACHE_DIR`, or in the user's cache."""
  return pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or root() / "compiled")


def keep_compiled() -> None:
  """Has JAX keep what it compiles. To be called before JAX is imported, when it reads this.

  A folder that the user chose for JAX stays as it is, with all its settings.
  """
  if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return
  try:
    folder = compiled()
    if not writable(folder):
      raise OSError(f"{folder} is not writable")
    _tidy(folder)
  except (OSError, RuntimeError) as error:
    _log.warning("compiled programs are not kept for the next start (%s): set UAJAX_CACHE to a "
                 "folder that you may write to", error)
    return
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
  # Small programs too: a hundred of them take as long as a large one.
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  # Should the disk fill up, JAX compiles as ever, and would say so for every single program.
  warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def writable(folder: pathlib.Path) -> bool:
  """Whether files can be made in a folder, which itself need not exist yet."""
  nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
  return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def size_bytes(folder: pathlib.Path) -> int:
  """Of all files in a folder; 0 where there is none."""
  return sum(size for _, size, _ in _files(folder))


def _tidy(folder: pathlib.Path) -> None:
  """Removes programs that a kill cut short in writing, and the oldest where all take too much."""
  files = sorted(_files(folder), reverse=True)
  left = LIMIT_BYTES
  for i, (_, size, path) in enumerate(files):
    left -= size
    if left < 0 or (i < 8 and _is_torn(path)):  # only what was written last can be torn
      path.unlink(missing_ok=True)


def _files(folder: pathlib.Path) -> list[tuple[float, int, pathlib.Path]]:
  """When each file was written, its bytes, its path."""
  found = []
  for path in folder.glob("*"):
    try:
      state = path.stat()
    except FileNotFoundError:  # another start has just removed it
      continue
    if path.is_file():
      found.append((state.st_mtime, state.st_size, path))
  return found


def _is_torn(path: pathlib.Path) -> bool:
  """Whether a compressed program ends too early. JAX would stumble over it at every start."""
  content = path.read_bytes()
  if content[:4] == ZSTD:
    return _is_torn_zstd(content)
  if content[:1] not in (b"", b"\x78"):  # not by zlib either
    return False
  try:
    zlib.decompress(content)
  except zlib.error:
    return True
  return False


def _is_torn_zstd(content: bytes) -> bool:
  """The same of what JAX packs where it finds zstandard, or in Python from 3.14 on."""
  for name in ("compression.zstd", "zstandard"):
    with contextlib.suppress(ImportError):
      packer = importlib.import_module(name)
      try:
        packer.decompress(content)
      except packer.ZstdError:
        return True
      return False
  return False  # nor can JAX read it
