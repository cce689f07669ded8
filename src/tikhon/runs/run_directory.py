"""A run folder, locked by one process at a time."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tikhon.errors import DataError, InputError
from tikhon.runs import temporary
from tikhon.runs.files import (
    SCHEMA_VERSION,
    json_text,
    storage_error,
    to_plain,
    write_bytes,
    write_json,
)
from tikhon.runs.manifest import MANIFEST, has_manifest, verify, write_manifest

CONFIG, HISTORY, RESULT = "config.json", "history.jsonl", "result.json"
MODEL, REPORT, CHECKPOINT, LOCK = "model.safetensors", "report.html", "checkpoint", ".lock"
COMPACT, ONNX, AVERAGE = "compact.safetensors", "model.onnx", "average.safetensors"
JOURNAL, TORN, STATES = "journal.jsonl", "journal.jsonl.torn", "states"
_PROBE = ".probe"
NEWEST_VERSIONS = {"diagnosis": 2}  # kinds of documents with their own version
_RUN_FILES = (
    *(MANIFEST, RESULT, MODEL, COMPACT, ONNX, AVERAGE, REPORT, HISTORY, CHECKPOINT),
    *(JOURNAL, TORN, STATES, CONFIG),
)
_KNOWN_FILES = (*_RUN_FILES, LOCK, _PROBE)


class RunDirectory:
    """A folder that holds one run: its configuration, history, result, model and report."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: int | None = None

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return (self.path / CONFIG).is_file()

    def create(self, *, overwrite: bool = False) -> None:
        """Create the folder and check that it is writable, before any training.

        Raises as `check`, and `StorageError` if it is not writable.
        """
        self.check(overwrite=overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, self.path, 0) from error
        self.lock()
        self._probe()
        if overwrite:
            self._clear()

    def check(self, *, resume: bool = False, overwrite: bool = False) -> None:
        """Raise `InputError` unless a run can begin, or resume, in this folder.

        To begin, it must not be a file, hold a run (unless `overwrite`) or other files; to
        `resume`, it must hold an unfinished run. Nothing is written.
        """
        if resume:
            if not self.exists:
                raise InputError(f"nothing to resume: {self.path} holds no run")
            if self.is_finished:
                self.refuse_finished()
            return
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output {self.path} is a file; give a folder")
        if self.exists and not overwrite:
            going_on = "" if self.is_finished else "continue it with --resume, "
            raise InputError(
                f"output {self.path} already holds a run; {going_on}replace it with --overwrite "
                "or choose another --output"
            )
        if self.path.is_dir() and not self.exists and (other := self._foreign()):
            raise InputError(
                f"output {self.path} holds files that are not a run's ({other}); "
                "choose a new folder"
            )

    def take(
        self,
        config: Mapping[str, object],
        *,
        resume: bool = False,
        overwrite: bool = False,
        results: tuple[str, ...] = (),
    ) -> None:
        """Lock a new folder with its configuration, or the unfinished run in it.

        `results` are the entries of the configuration that the run itself writes just before its
        end; they may differ. Raises as `create`, and `InputError` for nothing to resume or another
        configuration.
        """
        if not resume:
            self.create(overwrite=overwrite)
            self.write(CONFIG, config)
            return
        self.check(resume=True)
        wanted = to_plain(config)  # as it would be read back
        check_same_configuration(self.read(CONFIG), wanted, apart=(*_PLACES, *results))
        self.lock()

    def refuse_finished(self) -> NoReturn:
        """Raise `InputError`: a finished run cannot be resumed."""
        raise InputError(f"the run in {self.path} is finished; replace it with --overwrite")

    def lock(self) -> None:
        """Lock the folder for this process; raise `InputError` if another process holds it."""
        if not temporary.can_lock():
            return
        name = self.path / LOCK
        while True:
            try:
                handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise storage_error(error, name, 0) from error
            if not _try_lock(handle, self.path):
                owner = os.read(handle, 64).decode(errors="replace").strip()
                os.close(handle)
                raise InputError(
                    f"output {self.path} is in use by process {owner or '?'}; wait for it or "
                    "choose another --output"
                )
            if temporary.is_open_under(handle, name):
                break
            os.close(handle)  # the last holder deleted it between our open and lock
        self._lock = handle
        process = str(os.getpid()).encode()
        try:
            os.ftruncate(handle, 0)
            os.write(handle, process)
        except OSError as error:
            self.unlock()
            raise storage_error(error, name, len(process)) from error
        for folder in (self.path, *(p for p in self.path.rglob("*") if p.is_dir())):
            temporary.remove_leftovers(folder)  # left by processes killed while writing
        (self.path / _PROBE).unlink(missing_ok=True)

    def unlock(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            with suppress(OSError):
                os.unlink(self.path / LOCK)
            os.close(self._lock)
            self._lock = None

    def write(self, name: str, document: Mapping[str, object]) -> None:
        """Write a JSON document of the run, which marks it unfinished."""
        (self.path / MANIFEST).unlink(missing_ok=True)
        write_json(self.path / name, document)

    def read(self, name: str) -> dict[str, Any]:
        """Read a JSON document of the run; raises as `read_document`, and for a damaged file."""
        if not self.path.is_dir():
            raise InputError(f"no run directory at {self.path}; give the folder of a run")
        if not (self.path / name).exists():
            raise InputError(f"{self.path} holds no {name}; give the folder of a run")
        verify(self.path, name)
        return read_document(self.path / name)

    def finish(self) -> None:
        """Write the manifest, which marks the run finished.

        Checkpoints are deleted first: if killed in between, the run has its result and `--resume`
        finishes it.
        """
        shutil.rmtree(self.path / CHECKPOINT, ignore_errors=True)
        write_manifest(self.path)

    @property
    def is_finished(self) -> bool:
        """Whether the run is complete."""
        return has_manifest(self.path)

    def append(self, row: Mapping[str, object]) -> None:
        """Append a row to the history; it is durable only from the next checkpoint."""
        try:
            with (self.path / HISTORY).open("a", encoding="utf-8") as file:
                file.write(json_text(row, indent=None) + "\n")
        except OSError as error:
            raise storage_error(error, self.path / HISTORY, 0) from error

    def rewrite_history(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Replace the history."""
        text = "".join(json_text(row, indent=None) + "\n" for row in rows)
        write_bytes(self.path / HISTORY, text.encode())

    def _foreign(self) -> str:
        names = sorted(p.name for p in self.path.iterdir() if p.name not in _KNOWN_FILES)
        names = [n for n in names if not (n.startswith(".") and n.endswith(".tmp"))]
        return ", ".join(names[:3])

    def _probe(self) -> None:
        """Write, replace and read a test file, as some folders fail only then."""
        probe = self.path / _PROBE
        try:
            write_bytes(probe, b"tikhon")
        finally:  # it may fail after the rename
            probe.unlink(missing_ok=True)

    def _clear(self) -> None:
        for target in (self.path / name for name in _RUN_FILES):
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unlock()


def next_free_folder(parent: Path, stem: str) -> Path:
    """Return the first of parent/stem-1, parent/stem-2, ... that does not exist."""
    number = 1
    while (parent / f"{stem}-{number}").exists():
        number += 1
    return parent / f"{stem}-{number}"


def read_document(path: Path) -> dict[str, object]:
    """Read a JSON object; raise `DataError` for any other content."""
    try:
        document = json.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = type(error).__name__ if isinstance(error, RecursionError) else error
        raise DataError(
            f"{path} cannot be read: {reason}; restore it from a copy, or run again with "
            "--overwrite"
        ) from error
    if not isinstance(document, dict):
        raise DataError(
            f"{path} holds {type(document).__name__}, a JSON object is needed; is it a run's file?"
        )
    newest = NEWEST_VERSIONS.get(str(document.get("kind")), SCHEMA_VERSION)
    version = document.get("schema_version", SCHEMA_VERSION)
    if version not in range(1, newest + 1):
        raise DataError(
            f"{path} has schema_version {version!r}, this version of tikhon reads up to "
            f"{newest}; use the version that wrote it"
        )
    return document


_PLACES = ("data.origin.source", "data.origin.modified")  # the same data may be moved or touched
_DERIVED = ("data.preprocessing.", "data.table.", "data.scaling.")  # of the data, by a fingerprint


def _is_within(name: str, entry: str) -> bool:
    return name == entry or name.startswith((f"{entry}.", f"{entry}["))


def check_same_configuration(
    stored: Mapping[str, object], wanted: Mapping[str, object], *, apart: tuple[str, ...] = ()
) -> None:
    """Raise `InputError` with a table of differences that would change the run.

    The entries `apart` may differ, with all that they hold.
    """
    rows = []
    for key in ("data", "model", "optimizer", "recipe", "seed", "device"):
        before, after = _flatten(stored.get(key), key), _flatten(wanted.get(key), key)
        rows += [
            (name, before.get(name, "-"), after.get(name, "-"))
            for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name)
        ]
    rows = [row for row in rows if not any(_is_within(row[0], name) for name in apart)]
    if any(name == "data.fingerprint" for name, *_ in rows):
        rows = [row for row in rows if not row[0].startswith(_DERIVED)]
    if rows:
        lines = [f"  {name:<28} {before!s:<24} {after}" for name, before, after in rows]
        head = f"  {'':<28} {'the run':<24} now"
        raise InputError(
            "the configuration changed, so this would not continue the run:\n"
            + "\n".join([head, *lines])
            + "\ngive the same settings, or start over with --overwrite"
        )


def _flatten(value: object, prefix: str) -> dict[str, object]:
    if isinstance(value, Mapping):
        parts = [_flatten(item, f"{prefix}.{key}") for key, item in value.items()]
    elif isinstance(value, list):
        parts = [_flatten(item, f"{prefix}[{i}]") for i, item in enumerate(value)]
    else:
        return {prefix: value}
    return {name: leaf for part in parts for name, leaf in part.items()}


def _try_lock(handle: int, folder: Path) -> bool:
    """Lock the file; return True, with a warning, if the file system has no locks."""
    try:
        return temporary.try_lock(handle)
    except OSError as error:
        warnings.warn(
            f"the file system of {folder} has no locks ({error.strerror}): see to it that no "
            "other process writes there",
            stacklevel=4,
        )
        return True
