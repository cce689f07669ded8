"""A running fit or search in the browser: read-only, on this machine alone."""

from __future__ import annotations

from tikhon.live.application import Access, application
from tikhon.live.server import serve

__all__ = ["Access", "application", "serve"]
