"""What goes wrong through no fault of the program: said in one line, with the remedy."""


class UserError(Exception):
  """A failure the user can mend.

  The message is one line: what was wrong, where, and what to do about it.
  The command line prints it to stderr and exits 1; a traceback only with `--debug`.
  """


class Stopped(Exception):
  """Work that a signal ended where the same command can go on; the message is one line."""

  def __init__(self, line: str, signal: int):
    super().__init__(line)
    self.signal = signal
