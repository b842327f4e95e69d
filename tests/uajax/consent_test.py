"""A subject's consent note: asked for once, kept, told of in films; machines go on without."""

import io
import json

import numpy as np
import pytest

from uajax import cli, config, consent, media, provenance
from uajax.errors import UserError
from uajax.train import loop

WORDS = "Jane Doe agreed on 3 May, for our course"


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def subject(tmp_path):
  path = tmp_path / "me"
  path.mkdir()
  return path


@pytest.fixture
def train(subject, monkeypatch, capsys):
  """`uajax train` up to where it would open the subject; with what is typed at a terminal."""
  monkeypatch.setattr(loop, "train", lambda *_, **__: None)

  def run(*words, typed=None):
    err = io.StringIO() if typed is None else Terminal()
    monkeypatch.setattr("sys.stdin", io.StringIO() if typed is None else Terminal(typed))
    monkeypatch.setattr("sys.stderr", err)
    status = cli.main(["train", str(subject), "--workdir", str(subject / "run"), *words])
    return status, err.getvalue()

  return run


def test_at_a_terminal_it_is_asked_for_once(subject, train):
  status, said = train(typed=f"  {WORDS} \n")
  assert status == 0 and said.count("?") == 1 and str(subject) in said
  note = json.loads((subject / "consent.json").read_text())
  assert note["statement"] == WORDS and note["noted_at"].startswith("20")
  assert "Who is" not in train(typed="somebody else\n")[1]
  assert consent.read(subject).statement == WORDS


@pytest.mark.parametrize("typed", ["\n", ""])  # Enter, and the end of input
def test_left_open_it_is_not_asked_again_but_said(subject, train, typed, caplog):
  assert train(typed=typed)[0] == 0
  assert "Who is" not in train(typed=WORDS)[1]
  assert consent.read(subject).statement is None
  assert caplog.text.count("holds no consent note") == 2
  assert consent.summarize(subject).startswith("no note")


def test_where_nobody_is_there_training_goes_on_and_says_what_to_do(subject, train, caplog):
  status, said = train()
  assert status == 0 and "Who is" not in said and not (subject / "consent.json").exists()
  assert "--consent" in caplog.text and len(caplog.records) == 1
  assert train("--consent", WORDS)[0] == 0 and len(caplog.records) == 1
  assert consent.read(subject).statement == WORDS
  status, said = train("--consent", " ")
  assert status == 1 and "--consent is empty" in said
  assert consent.read(subject).statement == WORDS, "an earlier note stays"


def test_a_damaged_note_is_said_before_anything_is_trained(subject, train):
  for content in (b"{", b"\xff", b"[]", b'{"version": 1, "statement": 3, "noted_at": null}'):
    (subject / "consent.json").write_bytes(content)
    status, said = train()
    assert status == 1 and "consent.json is damaged" in said and said.count("\n") == 1


def test_a_film_tells_of_the_note_but_not_its_words(subject, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("UAJAX_CACHE", str(tmp_path / "cache"))
  run = tmp_path / "run"
  loop._open(run, subject, config.demo())
  assert consent.summarize(run) == "no note that the person agreed"
  consent.see_to(subject, WORDS)
  loop._open(run, subject, config.demo())  # training goes on, or is run again only for this
  film = tmp_path / "film.mp4"
  media.write_video(film, np.zeros((3, 32, 48, 3), np.uint8))
  provenance.sign(film, {"consent": consent.summarize(run)}, provenance.credentials())
  assert cli.main(["verify", str(film)]) == 0
  told = capsys.readouterr().out
  assert f"SHA-256 {provenance.digest(subject / 'consent.json')}" in told
  assert consent.read(subject).noted_at[:10] in told and "Jane" not in told


def test_a_procedural_person_needs_no_consent(subject, train, caplog):
  consent.write(subject, consent.NOBODY)
  assert "Who is" not in train(typed=WORDS)[1] and not caplog.records
  assert consent.summarize(subject) == consent.NOBODY


def test_a_note_too_long_is_refused(subject):
  with pytest.raises(UserError, match="1001 characters"):
    consent.see_to(subject, "x" * 1001)
  assert not list(subject.iterdir())
