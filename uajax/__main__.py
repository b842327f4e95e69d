"""`python -m uajax` is the command `uajax`."""

import sys

from uajax.cli import main

if __name__ == "__main__":
  sys.exit(main())
