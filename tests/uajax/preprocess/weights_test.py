import hashlib
import http.server
import threading
import zipfile

import pytest

from uajax import pretrained
from uajax.errors import UserError
from uajax.preprocess import weights

BODY = b"a pretrained network" * 1000


@pytest.fixture
def places(tmp_path, monkeypatch):
  """Two model folders and a cache, all empty."""
  first, second = tmp_path / "first", tmp_path / "second"
  first.mkdir(), second.mkdir()
  monkeypatch.setenv("UAJAX_MODELS", f"{first}:{second}")
  monkeypatch.setenv("UAJAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.delenv("UAJAX_OFFLINE", raising=False)
  return first, second


@pytest.fixture
def upstream(tmp_path, monkeypatch):
  """Serves a folder on this machine; `known(name, **fields)` makes a file of it known."""
  root = tmp_path / "upstream"
  root.mkdir()

  class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args):
      super().__init__(*args, directory=str(root))

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()

  def known(name, **fields):
    url = f"http://127.0.0.1:{server.server_port}/{fields.pop('file', name)}"
    sha256 = fields.pop("sha256", hashlib.sha256(BODY).hexdigest())
    entry = weights.Known(name, "a test", "none", url, sha256, **fields)
    monkeypatch.setitem(weights._BY_NAME, name, entry)
    return root

  yield known
  server.shutdown()
  server.server_close()


def test_a_file_is_known_by_its_hash_and_the_first_folder_wins(places, upstream):
  first, second = places
  upstream("net.tflite")
  (first / "net.tflite").write_bytes(b"another version")
  (second / "net.tflite").write_bytes(BODY)
  assert weights.find("net.tflite") == second / "net.tflite"
  (first / "net.tflite").write_bytes(BODY)
  assert weights.find("net.tflite") == first / "net.tflite"


def test_what_is_not_at_hand_is_fetched_once_into_the_cache(places, upstream):
  root = upstream("net.tflite")
  (root / "net.tflite").write_bytes(BODY)
  path = weights.find("net.tflite")
  assert path == pretrained.cache() / "net.tflite" and path.read_bytes() == BODY
  (root / "net.tflite").unlink()
  assert weights.find("net.tflite") == path


def test_a_member_of_an_archive(places, upstream):
  with zipfile.ZipFile(places[0] / "packed.whl", "w") as file:
    file.writestr("deep/net.bin", BODY)
  archive = hashlib.sha256((places[0] / "packed.whl").read_bytes()).hexdigest()
  upstream("net.tflite", file="packed.whl", archive_sha256=archive, member="deep/net.bin")
  assert weights.find("net.tflite").read_bytes() == BODY


def test_another_file_at_the_address_is_refused_and_not_kept(places, upstream):
  root = upstream("net.tflite")
  (root / "net.tflite").write_bytes(b"tampered")
  with pytest.raises(UserError, match="is not the net.tflite that is known.*UAJAX_MODELS"):
    weights.find("net.tflite")
  assert not list(pretrained.cache().iterdir())


def test_no_answer_says_what_to_do(places, upstream, monkeypatch):
  upstream("net.tflite")
  with pytest.raises(UserError, match="could not be fetched.*put the file with SHA-256") as caught:
    weights.find("net.tflite")
  assert "\n" not in str(caught.value)
  monkeypatch.setenv("UAJAX_OFFLINE", "1")
  with pytest.raises(UserError, match="UAJAX_OFFLINE"):
    weights.find("net.tflite")


def test_inventory_names_every_file_and_downloads_nothing(places):
  rows = list(weights.inventory())
  assert [row[1] for row in rows] == [known.name for known in weights.KNOWN]
  assert {row[0] for row in rows} == {"warn"}


def test_the_models_at_hand_are_the_known_ones(shared):
  for known in weights.KNOWN:
    if known.sha256 is not None:
      assert pretrained.digest(shared(f"models/{known.name}")) == known.sha256, known.name
