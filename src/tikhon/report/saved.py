"""Read a run folder, finished or not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tikhon.errors import DataError, InputError
from tikhon.runs.documents import Epoch, Number
from tikhon.runs.journal import events_in
from tikhon.runs.manifest import verify
from tikhon.runs.run_directory import read_document


@dataclass(frozen=True)
class SavedRun:
    """The content of a run folder; `result` is empty until the run finishes."""

    path: Path
    config: dict[str, Any]
    history: tuple[Epoch, ...]
    result: dict[str, Any]

    @property
    def kind(self) -> str:
        """The command that made it: fit, demo, tune, path, compare, diagnosis."""
        return str(self.result.get("kind") or self.config.get("kind") or "fit")

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.resolve().name

    @property
    def next_commands(self) -> tuple[str, ...]:
        """The commands that the run suggested to run next."""
        return tuple(map(str, self.result.get("next") or ()))

    def series(self, key: str) -> list[Number]:
        """Return one value of each epoch's record, `None` where missing."""
        return [record.get(key) for record in self.history]


def read(run_dir: str | Path) -> SavedRun:
    """Read the run in `run_dir`, ignoring a last history line that was cut off.

    Raises `InputError` for a folder that is not a run, `DataError` for an unreadable one.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise InputError(f"no run directory at {path}; give the folder that `--output` named")
    config, result = (_document(path, name) for name in ("config.json", "result.json"))
    if config is None and result is None:
        raise InputError(
            f"{path} is not a run directory: it holds neither config.json nor result.json"
        )
    verify(path, "history.jsonl")
    if result is None and (path / "journal.jsonl").exists():
        events = list(events_in(path / "journal.jsonl"))  # of a running search
        result = {"trials": [trial for event in events for trial in event.get("outcomes", ())]}
        result |= {"metric": events[0].get("metric")} if events else {}
    return SavedRun(path, config or {}, _history(path / "history.jsonl"), result or {})


def _document(folder: Path, name: str) -> dict[str, object] | None:
    verify(folder, name)
    return read_document(folder / name) if (folder / name).exists() else None


def _history(file: Path) -> tuple[Epoch, ...]:
    if not file.exists():
        return ()
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for position, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if position == len(lines) - 1:
                break  # interrupted while writing the last line
            raise DataError(f"{file}:{position + 1} is not JSON ({error})") from error
        if not isinstance(record, dict):
            raise DataError(f"{file}:{position + 1} holds {type(record).__name__}, not an object")
        records.append(record)
    return tuple(records)
