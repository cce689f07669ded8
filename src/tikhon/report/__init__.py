"""Render run folders as one self-contained HTML page: `tikhon.report.write`."""

from __future__ import annotations

from tikhon.report.document import build, write

__all__ = ["build", "write"]
