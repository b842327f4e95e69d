"""Compiled programs are kept for the next start, and no cache is worth a failure."""

import logging
import os
import subprocess
import sys
import zlib

import pytest

from uajax import cache


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
  monkeypatch.setenv("UAJAX_CACHE", str(tmp_path / "cache"))
  for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
    monkeypatch.setenv(name, "")  # so that it is put back afterwards
    monkeypatch.delenv(name)


def test_the_folder_is_that_of_the_system_unless_one_is_named(monkeypatch, tmp_path):
  assert cache.compiled() == tmp_path / "cache" / "compiled"
  monkeypatch.delenv("UAJAX_CACHE")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  assert cache.compiled() == tmp_path / "xdg" / "uajax" / "compiled"
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
  cache.keep_compiled()
  assert cache.compiled() == tmp_path / "mine"
  assert "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ


PROGRAM = """
import sys
from uajax import cache
cache.keep_compiled()
import jax
jax.monitoring.register_event_listener(lambda event, **_: print(event.split("/")[-1]))
sort = jax.jit(lambda x: jax.numpy.sort(jax.numpy.sin(x) * x)[::3] @ jax.numpy.cos(x)[::3])
print(sort(jax.numpy.arange(1000.0)))
"""


def start() -> subprocess.CompletedProcess:
  """A process that compiles a few small programs and says what JAX did."""
  return subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)


def test_the_second_start_compiles_nothing(tmp_path):
  first, folder = start(), cache.compiled()
  assert "cache_misses" in first.stdout and cache.size_bytes(folder) > 0
  for path in folder.iterdir():  # as a kill while it was written would leave it
    path.write_bytes(path.read_bytes()[:-20])
  mended, second = start(), start()
  assert "cache_misses" in mended.stdout and "cache_hits" not in mended.stdout
  assert "cache_hits" in second.stdout and "cache_misses" not in second.stdout
  result = lambda done: done.stdout.splitlines()[-1]
  assert result(first) == result(mended) == result(second)
  assert not first.stderr + mended.stderr + second.stderr


def test_the_oldest_make_room(monkeypatch):
  folder = cache.compiled()
  folder.mkdir(parents=True)
  for i in range(5):
    path = folder / f"{4 - i}-cache"
    path.write_bytes(zlib.compress(os.urandom(1000)))
    os.utime(path, (0, i))
  monkeypatch.setattr(cache, "LIMIT_BYTES", 3100)
  cache.keep_compiled()
  assert sorted(path.name for path in folder.iterdir()) == ["0-cache", "1-cache", "2-cache"]


@pytest.mark.parametrize("where", ("under a file", "no home"))
def test_a_cache_that_cannot_be_written_costs_one_warning(monkeypatch, tmp_path, caplog, where):
  if where == "no home":
    monkeypatch.delenv("UAJAX_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
  else:
    (tmp_path / "cache").touch()
  with caplog.at_level(logging.WARNING):
    cache.keep_compiled()
  (record,) = caplog.records
  assert "UAJAX_CACHE" in record.message and "\n" not in record.message
  assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
