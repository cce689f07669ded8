"""The record of a search on disk: one checked JSON line an event, only ever appended to."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tikhon.errors import InputError, StorageError
from tikhon.tuning.trials import History, Outcome

SCHEMA_VERSION = 1


class Journal:
    """An append-only file: a header (what is searched, on which data), the plan, the outcomes.

    Every line ends in a checksum of its text, so a line torn by a crash is recognised: it is cut
    off when the journal is opened again and kept beside it as `NAME.torn`.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any], *, resume: bool) -> None:
        self.path = Path(path)
        self.torn: str | None = None
        lines = list(self._repair()) if self.path.exists() else []
        if lines and not resume:
            raise InputError(
                f"{self.path} holds a search already: continue it with resume, "
                "or give another output folder"
            )
        if resume and not lines:
            raise InputError(f"nothing to resume: {self.path} does not exist or is empty")
        header = {"schema_version": SCHEMA_VERSION, **_plain(header)}
        if lines:
            _compare(lines[0], header, self.path)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append([header])
            lines = [header]
        self.plan: dict[str, Any] | None = next(
            (x["plan"] for x in lines[1:] if "plan" in x), None
        )
        rows = (row for line in lines[1:] for row in line.get("outcomes", ()))
        self.history = History(Outcome.from_dict(row) for row in rows)

    def record_plan(self, plan: Mapping[str, Any]) -> None:
        """Write what was decided by measuring, so that a resumed run decides the same."""
        self.plan = _plain(plan)
        self._append([{"plan": self.plan}])

    def extend(self, outcomes: Iterable[Outcome]) -> None:
        """Append a batch of outcomes and see it safely on disk before returning.

        A batch is one line: after a crash it is there as a whole, or trained again as a whole.
        """
        outcomes = list(outcomes)
        self._append([{"outcomes": [outcome.to_dict() for outcome in outcomes]}])
        self.history = self.history.extended(outcomes)

    def _append(self, events: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(f"{_line(event)}\n" for event in events)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}") from error

    def _repair(self) -> Iterator[dict[str, Any]]:
        data = self.path.read_bytes()
        good = 0
        for raw in data.splitlines(keepends=True):
            event = _parse(raw)
            if event is None:
                break
            good += len(raw)
            yield event
        if good < len(data):
            self.torn = f"{self.path}.torn"
            Path(self.torn).write_bytes(data[good:])
            with self.path.open("r+b") as file:
                file.truncate(good)
                os.fsync(file.fileno())


def _line(event: Mapping[str, Any]) -> str:
    text = json.dumps(event, ensure_ascii=False, allow_nan=False, sort_keys=True)
    return f"{text}\t{zlib.crc32(text.encode()):08x}"


def _parse(raw: bytes) -> dict[str, Any] | None:
    text, tab, checksum = raw.rpartition(b"\t")
    if not tab or checksum != f"{zlib.crc32(text):08x}\n".encode():
        return None
    return json.loads(text)


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value, allow_nan=False))


def _compare(stored: Mapping[str, Any], asked: Mapping[str, Any], path: Path) -> None:
    differing = [name for name in {**stored, **asked} if stored.get(name) != asked.get(name)]
    if differing:
        lines = [
            f"  {n}: {stored.get(n)!r} in the journal, now {asked.get(n)!r}" for n in differing
        ]
        raise InputError(
            f"cannot resume {path}: it was started with different {', '.join(differing)}\n"
            + "\n".join(lines)
            + "\nrepeat the first command's settings, or start a new output folder"
        )
