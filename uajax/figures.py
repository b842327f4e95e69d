"""What a command that measures does with its figures: prints them, and writes them if asked."""

import json
import pathlib
import sys
from collections.abc import Callable

from uajax.errors import UserError
from uajax.saving import aside


def tell(measure: Callable[[], dict], describe: Callable[[dict], str], out: pathlib.Path | None
         ) -> int:
  """Measures, and prints the figures or the one line of what went wrong; returns the exit status.

  Args:
    measure: returns the figures as plain values; its UserError is the line.
    describe: the figures in words.
    out: JSON file to write them to.
  """
  try:
    report = measure()
    if out is not None:
      with aside(out) as partial:
        partial.write_text(json.dumps(report, indent=1) + "\n")
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(describe(report))
  return 0
