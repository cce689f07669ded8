"""The current page of a run: read without a lock, rendered once for all viewers."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

from tikhon.errors import DataError, InputError
from tikhon.report import build
from tikhon.report.html import render
from tikhon.report.page import Name, Page, label
from tikhon.report.saved import SavedRun, read

POINTS = 1000  # epochs shown at most
FILES = ("config.json", "history.jsonl", "journal.jsonl", "result.json")
SERVED = ("/page.css", "/plotly.js", "/page.js", "/live.js")

Version = tuple[tuple[int, int], ...]


class WatchedRun:
    """A run folder that may change at any time."""

    def __init__(self, path: str | Path, language: str | None = None) -> None:
        """Watch a run, or wait for one to begin.

        Raises `InputError` for a folder with other content.
        """
        self.path, self.language = Path(path), language
        self._lock = threading.Lock()
        self._version: Version = ()
        self._page = self._render()

    def version(self) -> Version:
        """Return sizes and times of the run's files, which change with any update."""
        found = []
        for name in FILES:
            try:
                status = (self.path / name).stat()
                found.append((status.st_size, status.st_mtime_ns))
            except OSError:
                found.append((-1, 0))
        return tuple(found)

    def age(self, version: Version | None = None) -> float:
        """Return the seconds since the run last wrote; 0 before it begins."""
        newest = max(written for _, written in version or self.version()) / 1e9
        return max(0.0, time.time() - newest) if newest else 0.0

    @property
    def waits(self) -> bool:
        """Whether no run has begun in the folder, which may be empty or missing."""
        if self.path.is_dir():
            return all(file.name.startswith(".") for file in self.path.iterdir())
        return not self.path.exists()

    def page(self) -> str:
        """Return the current page; the previous one while a file is being replaced."""
        with self._lock:
            if self.version() != self._version:
                try:
                    self._page = self._render()
                except (DataError, InputError, OSError):
                    pass  # files are inconsistent
            return self._page

    def _render(self) -> str:
        version = self.version()
        if self.waits:
            built = waiting_page(self.path)
        else:
            running = not (self.path / "result.json").exists()
            built = replace(build(thin_history(read(self.path))), running=running)
        page = render(built, self.language, served=SERVED)
        self._version = version
        return page


def waiting_page(path: Path) -> Page:
    """Return the page of a run that has not begun."""
    return Page(
        Name(path.name), "plain", label("waiting"), (label("waiting_for", path=str(path)),)
    )


def thin_history(run: SavedRun, points: int = POINTS) -> SavedRun:
    """Keep at most about `points` epochs, including the last one and any divergence."""
    every = -(-len(run.history) // points)
    if every <= 1:
        return run
    last = len(run.history) - 1
    kept = [
        record
        for index, record in enumerate(run.history)
        if index % every == 0 or index == last or record.get("train/loss", 0.0) is None  # diverged
    ]
    return replace(run, history=tuple(kept[: 2 * points]))
