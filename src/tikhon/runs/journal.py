"""An append-only log on disk: a header and events, one JSON line each with a checksum."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tikhon.errors import DataError, InputError
from tikhon.runs.files import SCHEMA_VERSION, storage_error, write_bytes


class Journal:
    """A header that identifies task and data, followed by events.

    Each line ends in a checksum. On opening, a torn or damaged line is cut off with all that
    follows; the removed part is kept as `NAME.torn`, which `torn` names.

    Raises `InputError` for an existing journal without `resume`, a missing one with it, or another
    header, `DataError` for a file that is not a journal, and `StorageError` if it cannot be
    written.
    """

    def __init__(self, path: str | Path, header: Mapping[str, object], *, resume: bool) -> None:
        self.path = Path(path)
        self.torn: str | None = None
        if resume and not self.path.exists():
            raise InputError(f"nothing to resume: {self.path} does not exist")
        lines = self._repaired() if self.path.exists() else []
        if lines and not resume:
            raise InputError(
                f"{self.path} is there already: continue it with resume, or give another output "
                "folder"
            )
        header = {"schema_version": SCHEMA_VERSION, **_plain(header)}
        if lines:
            compare_headers(lines[0], header, self.path)
        else:
            self._make_folder()
            self.append(header)
        self.events: list[dict[str, Any]] = lines[1:]

    def append(self, event: Mapping[str, object]) -> None:
        """Append one event durably before returning."""
        line = f"{_line(event)}\n".encode()
        try:
            size = self.path.stat().st_size if self.path.exists() else 0
            try:
                with self.path.open("ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    os.truncate(self.path, size)  # a partial line would spoil the next
                raise
        except OSError as error:
            raise storage_error(error, self.path, len(line)) from error

    def malformed(self, error: Exception) -> DataError:
        """Return the error for events that no version of tikhon could have written."""
        return DataError(
            f"{self.path} is no journal of this kind ({type(error).__name__}: {error}); restore "
            "it from a copy, or run again with --overwrite"
        )

    def _make_folder(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, self.path.parent, 0) from error

    def _repaired(self) -> list[dict[str, object]]:
        data = self.path.read_bytes()
        lines, good = [], 0
        for event, size in _events(data):
            lines.append(event)
            good += size
        if good == 0 and b"\n" in data:
            raise DataError(
                f"{self.path} is damaged in its first line, or no journal; restore it from a "
                "copy, or run again with --overwrite"
            )
        if good < len(data):
            self.torn = f"{self.path}.torn"
            write_bytes(Path(self.torn), data[good:])
            write_bytes(self.path, data[:good])
        return lines


def compare_headers(stored: Mapping[str, object], asked: Mapping[str, object], path: Path) -> None:
    """Raise `InputError` listing the differences between stored and requested headers."""
    differing = [name for name in {**stored, **asked} if stored.get(name) != asked.get(name)]
    if differing:
        lines = [f"  {n}: {stored.get(n)!r} there, now {asked.get(n)!r}" for n in differing]
        raise InputError(
            f"cannot resume {path}: it was started with different {', '.join(differing)}\n"
            + "\n".join(lines)
            + "\nrepeat the first command's settings, or start a new output folder"
        )


def events_in(path: Path) -> list[dict[str, Any]]:
    """Read the header and all events; another process may be writing."""
    return [event for event, _ in _events(path.read_bytes())]


def _events(data: bytes) -> Iterator[tuple[dict[str, object], int]]:
    """Yield intact events with their length in bytes, up to the first torn or damaged line."""
    for raw in data.splitlines(keepends=True):
        text, tab, checksum = raw.rpartition(b"\t")
        if not tab or checksum != f"{zlib.crc32(text):08x}\n".encode():
            return
        try:
            event = json.loads(text)
        except (ValueError, RecursionError):
            return
        if not isinstance(event, dict):
            return
        yield event, len(raw)


def _line(event: Mapping[str, object]) -> str:
    text = json.dumps(event, ensure_ascii=False, allow_nan=False, sort_keys=True)
    return f"{text}\t{zlib.crc32(text.encode()):08x}"


def _plain(value: Mapping[str, object]) -> dict[str, object]:
    return json.loads(json.dumps(value, allow_nan=False))
