"""What goes wrong through no fault of the program: said in one line, with the remedy."""


class UserError(Exception):
  """A failure the user can mend.

  The message is one line: what was wrong, where, and what to do about it.
  The command line prints it to stderr and exits 1; a traceback only with `--debug`.
  """
