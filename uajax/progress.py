"""Progress of long work on stderr: how far, how fast, how long yet."""

import sys
import time


class Progress:
  """Counts `total` units of work and says where it stands, at most twice a second.

  On a terminal one line is redrawn; elsewhere (a log file, CI) a line is printed every
  `log_every_s` seconds, so that a log stays short. Where the first unit `compiles`, its time says
  nothing of the others' and does not count for what is left; that it may be long is said.
  """

  def __init__(self, label: str, total: int, done: int = 0, *, compiles: bool = False,
               log_every_s: float = 10.0):
    self.label, self.total, self.done = label, max(total, 1), done
    self._set_out_s, self._compiles = time.monotonic(), compiles
    self._terminal = sys.stderr.isatty()
    self._every_s = 0.5 if self._terminal else log_every_s
    self._begin(self._set_out_s)
    if compiles:
      self._write(f"{label}: getting ready (compiling may take a minute or more)")

  def advance(self, units: int = 1, note: str = "") -> None:
    self.done += units
    now = time.monotonic()
    if self._compiles:
      self._compiles = False
      self._begin(now)
    elif now - self._said_s >= self._every_s:
      self._said_s = now
      self._say(note)

  def close(self, note: str = "") -> None:
    took = time.monotonic() - self._set_out_s
    line = f"{self.label}: {self.done}/{self.total} in {duration(took)} {note}"
    self._write(line.rstrip(), end=True)

  def _begin(self, now: float) -> None:
    """Measures the rate from here on, and says it first two seconds later at the latest."""
    self._began_s, self._began_at = now, self.done
    self._said_s = now - self._every_s + min(2.0, self._every_s)

  def _say(self, note: str) -> None:
    rate = (self.done - self._began_at) / max(time.monotonic() - self._began_s, 1e-9)
    left = duration((self.total - self.done) / rate) if rate > 0 else "?"
    line = f"{self.label}: {self.done}/{self.total}, {rate:.1f}/s, {left} left {note}"
    self._write(line.rstrip())

  def _write(self, line: str, *, end: bool = False) -> None:
    if self._terminal:
      sys.stderr.write("\r\x1b[K" + line + ("\n" if end else ""))
    else:
      sys.stderr.write(line + "\n")
    sys.stderr.flush()


def duration(seconds: float) -> str:
  """`75.2` -> `1m15s`."""
  whole = round(max(seconds, 0))
  hours, minutes = whole // 3600, whole // 60 % 60
  if hours:
    return f"{hours}h{minutes:02d}m"
  return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
