"""`python -m tikhon`: the command line."""

from __future__ import annotations

import sys

from tikhon.cli import main

if __name__ == "__main__":
    sys.argv[0] = "tikhon"  # as a run's folder tells the command that made it
    sys.exit(main())
