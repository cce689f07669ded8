"""The one writer of files: each appears whole and verified under its name, or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from tikhon.errors import InputError, StorageError

SCHEMA_VERSION = 1
CONFIG, HISTORY, RESULT = "config.json", "history.jsonl", "result.json"
MODEL, REPORT, CHECKPOINT, LOCK = "model.safetensors", "report.html", "checkpoint", ".lock"
COMPACT, ONNX = "compact.safetensors", "model.onnx"
_OURS = (CONFIG, HISTORY, RESULT, MODEL, COMPACT, ONNX, REPORT, CHECKPOINT, LOCK)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file at `path` in one step, so that a crash leaves the old or the new one.

    Temporary file in the same folder, fsync, read back, `os.replace`, fsync of the folder. The
    mode is that of the replaced file or what the umask allows. Raises `StorageError` that names
    the path, and the space needed and free on a full disk; the old file is then intact.
    """
    path = Path(os.path.realpath(path))  # a link stays a link: what it points to is replaced
    if path.exists() and not path.is_file():
        raise StorageError(f"{path} is not a regular file; choose another output")
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
        )
        with os.fdopen(handle, "w+b") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            if file.read() != content:
                raise StorageError(f"{path}: what was read back differs from what was written")
        os.chmod(temporary, _mode(path))
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        raise explain(error, path, len(content)) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document with its schema version; numbers that are not finite become null."""
    write_bytes(path, json_text({"schema_version": SCHEMA_VERSION, **document}).encode() + b"\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> bytes:
    """Write tensors as safetensors and return the bytes."""
    from safetensors.torch import save

    content = save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
    write_bytes(path, content)
    return content


def json_text(document: Any, *, indent: int | None = 2) -> str:
    """JSON of plain values; NaN and infinity, which JSON lacks, as null.

    >>> json_text({"a": float("nan"), "b": (1, 2)}, indent=None)
    '{"a": null, "b": [1, 2]}'
    """
    return json.dumps(plain(document), indent=indent, allow_nan=False, ensure_ascii=False)


def plain(value: Any) -> Any:
    """Dicts, lists, text, finite numbers, booleans and None alone."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if hasattr(value, "tolist"):  # tensors, arrays, numpy scalars
        return plain(value.tolist())
    return str(value)


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
        """Make the folder and prove that it can be written, before any training.

        Raises `InputError` when it is a file, already holds a run (unless `overwrite`) or holds
        files of another kind, and `StorageError` when it cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output {self.path} is a file; give a folder")
        if self.exists and not overwrite:
            raise InputError(
                f"output {self.path} already holds a run; continue it with --resume, replace it "
                "with --overwrite or choose another --output"
            )
        if self.path.is_dir() and not self.exists and (other := self._foreign()):
            raise InputError(
                f"output {self.path} holds files that are not a run's ({other}); "
                "choose a new folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise explain(error, self.path, 0) from error
        self.lock()
        self._probe()
        if overwrite:
            self._clear()

    def lock(self) -> None:
        """Hold the folder for this process; another one that tries gets an `InputError`."""
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return
        try:
            handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise explain(error, self.path / LOCK, 0) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(handle, 64).decode(errors="replace").strip()
            os.close(handle)
            raise InputError(
                f"output {self.path} is in use by process {owner or '?'}; wait for it or choose "
                "another --output"
            ) from error
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        self._lock = handle
        for litter in (*self.path.glob(".*.tmp"), *self.path.glob(f"{CHECKPOINT}/.*.tmp")):
            litter.unlink(missing_ok=True)  # left by a process that was killed while writing

    def unlock(self) -> None:
        """Give the folder free and remove what a killed process may have left."""
        if self._lock is not None:
            with suppress(OSError):
                os.unlink(self.path / LOCK)
            os.close(self._lock)
            self._lock = None

    def write(self, name: str, document: Mapping[str, Any]) -> None:
        """Write one of the run's JSON documents."""
        write_json(self.path / name, document)

    def read(self, name: str) -> dict[str, Any]:
        """One of the run's JSON documents."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{self.path} holds no {name}; give the folder of a run") from error
        except (OSError, ValueError) as error:
            raise StorageError(f"{self.path / name} cannot be read: {error}") from error

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one row to the history. It is durable with the next checkpoint."""
        try:
            with (self.path / HISTORY).open("a", encoding="utf-8") as file:
                file.write(json_text(row, indent=None) + "\n")
        except OSError as error:
            raise explain(error, self.path / HISTORY, 0) from error

    def history(self) -> list[dict[str, Any]]:
        """The complete rows of the history; a torn last line is left out."""
        with suppress(FileNotFoundError):
            return list(_rows((self.path / HISTORY).read_text(encoding="utf-8").splitlines()))
        return []

    def rewrite_history(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the history by these rows."""
        text = "".join(json_text(row, indent=None) + "\n" for row in rows)
        write_bytes(self.path / HISTORY, text.encode())

    def _foreign(self) -> str:
        names = sorted(p.name for p in self.path.iterdir() if p.name not in _OURS)
        names = [n for n in names if not (n.startswith(".") and n.endswith(".tmp"))]
        return ", ".join(names[:3])

    def _probe(self) -> None:
        """Write, replace and read a file: some folders fail only then."""
        probe = self.path / ".probe"
        write_bytes(probe, b"tikhon")
        probe.unlink()

    def _clear(self) -> None:
        for name in (RESULT, MODEL, COMPACT, ONNX, REPORT, HISTORY, CHECKPOINT, CONFIG):
            target = self.path / name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unlock()


def next_free(parent: Path, stem: str) -> Path:
    """The first of parent/stem-1, parent/stem-2, ... that is not there."""
    number = 1
    while (parent / f"{stem}-{number}").exists():
        number += 1
    return parent / f"{stem}-{number}"


def explain(error: OSError, path: Path, size: int) -> StorageError:
    """The same failure in words that name the path and what can be done."""
    if isinstance(error, StorageError):
        return error
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = "unknown"
        with suppress(OSError):
            free = f"{shutil.disk_usage(path.parent).free:,} bytes"
        return StorageError(
            f"no space to write {path}: {size:,} bytes are needed, {free} free "
            f"({os.strerror(error.errno)}); what was there before is intact"
        )
    reason = error.strerror or str(error)
    return StorageError(f"cannot write {path}: {reason}; choose another --output")


def _rows(lines: list[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return  # torn by a crash: what follows is not trusted either


def _mode(path: Path) -> int:
    """The mode of the file that is replaced, else 0666 without the umask."""
    with suppress(OSError):
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
