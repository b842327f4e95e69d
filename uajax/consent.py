"""The consent note of a subject folder: who is to be seen there, and that this person agreed.

    consent.json    {"version": 1, "statement": text or null, "noted_at": time or null}

`uajax train` asks for it once and keeps a copy in the run, so that films can say whether there was
one. The statement is the user's own words, which nobody checks; it stays in these folders. A film
carries the day and the note's SHA-256 only, by which whoever holds the note can show that it was
this one.
"""

import datetime
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple

from uajax import saving
from uajax.errors import UserError

FILE = "consent.json"
NOBODY = "a procedural person: nobody is depicted"
LONGEST = 1000  # characters of a statement
_VERSION = 1
_log = logging.getLogger("uajax")


class Note(NamedTuple):
  """What is known of the consent to a subject folder."""

  statement: str | None  # None: it was asked for and left open
  noted_at: str | None  # ISO 8601, UTC; None for procedural persons
  sha256: str  # of the file


def read(folder: str | os.PathLike) -> Note | None:
  """The note in a subject or run folder, None where there is none.

  Raises:
    UserError: it is damaged.
  """
  path = pathlib.Path(folder) / FILE
  try:
    content = path.read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    return None
  try:
    found = json.loads(content)
    note = Note(found["statement"], found["noted_at"], hashlib.sha256(content).hexdigest())
    fits = found["version"] == _VERSION and all(
      text is None or (isinstance(text, str) and len(text) <= LONGEST) for text in note)
  except (ValueError, KeyError, TypeError):
    fits = False
  if not fits:
    raise UserError(f"{path} is damaged: remove it, and `uajax train` asks again")
  return note


def write(folder: str | os.PathLike, statement: str | None, noted_at: str | None = None) -> None:
  """Notes a statement, in place of an earlier one.

  Args:
    noted_at: a time in ISO 8601; None: nobody noted it at any time (procedural persons).

  Raises:
    UserError: it cannot be written.
  """
  with saving.aside(pathlib.Path(folder) / FILE) as partial:
    note = {"version": _VERSION, "statement": statement, "noted_at": noted_at}
    partial.write_text(json.dumps(note, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def see_to(
  subject: str | os.PathLike, statement: str | None = None,
  ask: Callable[[str], str] | None = None,
) -> None:
  """Leaves a note in a subject folder: `statement`, or else the answer to a question, asked once.

  Where there is none afterwards, training goes on and a warning says what follows.

  Args:
    ask: puts a question to the user and returns the answer; None: nobody is there to answer.

  Raises:
    UserError: the statement is empty or too long, or the note is damaged or cannot be written.
  """
  subject = pathlib.Path(subject)
  if not subject.is_dir():
    return  # training says so
  if statement is not None:
    statement = " ".join(statement.split())
    if not statement:
      raise UserError("--consent is empty: say who is in the video and that this person agreed")
    if len(statement) > LONGEST:
      raise UserError(f"--consent has {len(statement)} characters: say it in {LONGEST}")
    write(subject, statement, _now())
  elif read(subject) is None and ask is not None:
    answer = ask(
      f"Who is in the video of {subject}, and has this person agreed to an avatar of them?\n"
      f"(One line, kept in {subject / FILE}: \"Jane Doe agreed on 3 May, for our course\". "
      "Enter: none, and films say so.)\n> ")
    answer = " ".join(answer.split())[:LONGEST]
    try:
      write(subject, answer or None, _now())
    except UserError as error:  # a folder for reading only trains as well
      _log.warning("%s", error)
  note = read(subject)
  if note is None or note.statement is None:
    _log.warning("%s holds no consent note, and films of it will say so: give one with --consent "
                 "\"Jane Doe agreed on ...\"", subject)


def keep(subject: str | os.PathLike, run: str | os.PathLike) -> None:
  """Copies the note into a run folder, if there is one."""
  if read(subject) is not None:
    with saving.aside(pathlib.Path(run) / FILE) as partial:
      shutil.copyfile(pathlib.Path(subject) / FILE, partial)


def summarize(run: str | os.PathLike) -> str:
  """What a film says of it: whether there is a note, not what it says."""
  note = read(run)
  if note is None or note.statement is None:
    return "no note that the person agreed"
  if note.noted_at is None and note.statement == NOBODY:
    return NOBODY
  return f"a note of {(note.noted_at or 'no date')[:10]}, SHA-256 {note.sha256}"


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
