"""Films say what they are, and a changed film is found out."""

import numpy as np
import pytest

from uajax import cli, media, provenance
from uajax.errors import UserError

SAID = {"run": "me", "emotion": "happy"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("UAJAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.delenv("UAJAX_CERTIFICATE", raising=False)
  monkeypatch.delenv("UAJAX_KEY", raising=False)


@pytest.fixture
def film(tmp_path):
  path = tmp_path / "film.mp4"
  rng = np.random.default_rng(0)
  media.write_video(path, rng.integers(0, 256, (10, 32, 48, 3), dtype=np.uint8))
  return path


def test_a_signed_film_says_what_it_is_and_still_plays(film):
  before = np.stack(list(media.read_frames(film)))
  provenance.sign(film, SAID, provenance.credentials())
  verdict = provenance.verify(film)
  assert verdict.holds and not verdict.trusted and not verdict.faults
  assert verdict.maker.startswith("uajax ") and provenance.LOCAL in verdict.signer
  assert verdict.synthesis == SAID
  np.testing.assert_array_equal(np.stack(list(media.read_frames(film))), before)
  assert sorted(p.name for p in film.parent.iterdir()) == ["cache", "film.mp4"]


def test_a_changed_film_is_found_out(film, capsys):
  provenance.sign(film, SAID, provenance.credentials())
  content = bytearray(film.read_bytes())
  at = content.rindex(b"mdat") + 40
  content[at] ^= 1
  film.write_bytes(content)
  assert not provenance.verify(film).holds
  assert cli.main(["verify", str(film)]) == 1
  assert "was changed" in capsys.readouterr().err


def test_the_certificate_is_made_once_and_the_users_own_is_taken(film, tmp_path, monkeypatch):
  first = provenance.credentials()
  assert provenance.credentials() == first
  kept = tmp_path / "cache" / "provenance" / "local.pem"
  assert kept.stat().st_mode & 0o077 == 0, "nobody else may read the key"
  (tmp_path / "chain.pem").write_bytes(first.chain)
  (tmp_path / "key.pem").write_bytes(first.key)
  kept.unlink()
  monkeypatch.setenv("UAJAX_CERTIFICATE", str(tmp_path / "chain.pem"))
  with pytest.raises(UserError, match="belong together"):
    provenance.credentials()
  monkeypatch.setenv("UAJAX_KEY", str(tmp_path / "key.pem"))
  assert provenance.credentials() == first
  (tmp_path / "key.pem").write_text("no key")
  with pytest.raises(UserError, match="no PEM key"):
    provenance.credentials()


def test_without_a_writable_cache_films_are_signed_all_the_same(film, tmp_path, monkeypatch):
  (tmp_path / "cache").write_text("in the way")
  provenance.sign(film, SAID, provenance.credentials())
  assert provenance.verify(film).holds


def test_a_certificate_that_does_not_fit_leaves_the_film_as_it_was(film):
  before = film.read_bytes()
  good = provenance.credentials()
  with pytest.raises(UserError, match="could not be signed"):
    provenance.sign(film, SAID, good._replace(chain=b"no certificate"))
  assert film.read_bytes() == before


def test_films_without_a_manifest_are_said_to_have_none(film, tmp_path):
  with pytest.raises(UserError, match="carries no manifest"):
    provenance.verify(film)
  (tmp_path / "text.mp4").write_text("no film")
  with pytest.raises(UserError, match="text.mp4"):
    provenance.verify(tmp_path / "text.mp4")


def test_the_mark_is_seen_at_the_lower_left_and_nowhere_else():
  image = np.full((100, 200, 3), 90, np.uint8)
  marked = provenance.mark(image, "synthetic")
  changed = (marked != image).any(-1)
  assert marked[changed].max() > 200 and changed[85:].any()
  assert not changed[:80].any() and not changed[:, 120:].any()


def test_a_long_mark_is_broken_into_lines_and_never_cut_off():
  image = np.full((128, 128, 3), 90, np.uint8)
  rows = []
  for text in ("synthetic", "synthetic, by our own machines in our own cellar"):
    changed = (provenance.mark(image, text) != image).any(-1)
    rows.append(changed.any(1).sum())
    assert not changed[:, 126:].any(), "nothing runs over the edge"
  assert rows[1] > 1.5 * rows[0]
  for text in ("many words " * 20, "w" * 80, " "):
    with pytest.raises(UserError, match="does not fit"):
      provenance.mark(image, text)
