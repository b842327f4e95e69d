"""What every test stands on: two host devices, no silent broadcasts, and the reference data.

Golden values, clips and pretrained models lie beside the checkout where the project is
developed. Elsewhere the tests that need them skip and say so; in CI a missing file is an error.
"""

import atexit
import os
import pathlib
import shutil
import tempfile

# Programs compiled in one test serve the others, and the processes that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _compiled = tempfile.mkdtemp(prefix="uajax-tests-")
  atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # small ones too: they are many
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["UAJAX_OFFLINE"] = "1"  # no test fetches anything

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"
if (SHARED / "models").is_dir():
  os.environ.setdefault("UAJAX_MODELS", str(SHARED / "models"))

import pytest  # noqa: E402

# `make test` gives whole files to processes: with the longest first, all end at about one time.
LONGEST = ("loop_test.py", "api_test.py", "extract_test.py", "pipeline_test.py", "export_test.py",
           "synthesize_test.py", "mesh_test.py", "fuzz_test.py", "evaluate_test.py",
           "fusion_test.py", "scale_test.py", "view_test.py", "synthetic_test.py")


def pytest_collection_modifyitems(items):
  rank = {name: number for number, name in enumerate(LONGEST)}
  items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def shared():
  """`shared("golden/scene.py")` is that file's path; skips where the folder is not at hand."""

  def find(name: str) -> pathlib.Path:
    path = SHARED / name
    if not path.exists():
      if os.environ.get("CI"):
        pytest.fail(f"{path} is missing: CI must hold the reference data")
      pytest.skip(f"reference data {name} is not at hand")
    return path

  return find
