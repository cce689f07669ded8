"""What a run's page looks like now: read without a lock, rendered once for all who look."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

from tikhon.errors import DataError, InputError
from tikhon.report import build
from tikhon.report.html import render
from tikhon.report.page import Name, Page, say
from tikhon.report.saved import SavedRun, read

POINTS = 1000  # epochs that a page shows at most
FILES = ("config.json", "history.jsonl", "journal.jsonl", "result.json")
SERVED = ("/page.css", "/plotly.js", "/page.js", "/live.js")

Version = tuple[tuple[int, int], ...]


class Watched:
    """One run directory that may change at any time."""

    def __init__(self, path: str | Path, language: str | None = None) -> None:
        """Show a run; where none is there yet, a page that waits for it.

        Raises `InputError` for a folder that holds something else.
        """
        self.path, self.language = Path(path), language
        self._lock = threading.Lock()
        self._version: Version = ()
        self._page = self._render()

    def version(self) -> Version:
        """Size and time of the run's files: another value says that there is news."""
        found = []
        for name in FILES:
            try:
                status = (self.path / name).stat()
                found.append((status.st_size, status.st_mtime_ns))
            except OSError:
                found.append((-1, 0))
        return tuple(found)

    def age(self, version: Version | None = None) -> float:
        """Seconds since the run last wrote, by a version at hand; 0 where there is nothing yet."""
        newest = max(written for _, written in version or self.version()) / 1e9
        return max(0.0, time.time() - newest) if newest else 0.0

    @property
    def waits(self) -> bool:
        """Whether no run has begun in the folder, which may be empty or not yet there."""
        if self.path.is_dir():
            return all(file.name.startswith(".") for file in self.path.iterdir())
        return not self.path.exists()

    def page(self) -> str:
        """The page of the run as it is now; the last one while a file is being replaced."""
        with self._lock:
            if self.version() != self._version:
                try:
                    self._page = self._render()
                except (DataError, InputError, OSError):
                    pass  # between two states of the files
            return self._page

    def _render(self) -> str:
        version = self.version()
        if self.waits:
            built = waiting(self.path)
        else:
            running = not (self.path / "result.json").exists()
            built = replace(build(thinned(read(self.path))), running=running)
        page = render(built, self.language, served=SERVED)
        self._version = version
        return page


def waiting(path: Path) -> Page:
    """The page of a run that has not begun."""
    return Page(Name(path.name), "plain", say("waiting"), (say("waiting_for", path=str(path)),))


def thinned(run: SavedRun, points: int = POINTS) -> SavedRun:
    """The run with at most about `points` epochs, the last one and any divergence among them."""
    every = -(-len(run.history) // points)
    if every <= 1:
        return run
    last = len(run.history) - 1
    kept = [r for i, r in enumerate(run.history) if i % every == 0 or i == last or _broken(r)]
    return replace(run, history=tuple(kept[: 2 * points]))


def _broken(record: dict) -> bool:
    return "train/loss" in record and record["train/loss"] is None
