"""One self-contained HTML page from a run directory: `tikhon.report.write`."""

from __future__ import annotations

from tikhon.report.document import build, write

__all__ = ["build", "write"]
