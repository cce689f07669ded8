"""Show a running fit or search in the browser, read-only and local."""

from __future__ import annotations

from tikhon.live.application import Access, application
from tikhon.live.server import serve

__all__ = ["Access", "application", "serve"]
