"""`python -m tikhon`: the command line."""

from __future__ import annotations

import sys

from tikhon.cli import main

if __name__ == "__main__":
    sys.exit(main())
