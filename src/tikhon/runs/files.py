"""Write files atomically and verified."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tikhon.errors import StorageError
from tikhon.runs.temporary import temporary_file

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a full disk


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file at `path` atomically, so that a crash leaves the old or the new one.

    Writes a temporary file in the same folder, with fsync, read back, `os.replace` and fsync of
    the folder. Keeps the mode of a replaced file, else follows the umask. Raises `StorageError`
    naming the path, and needed and free space on a full disk; the old file is then intact.
    """
    path = Path(os.path.realpath(path))  # replace the target of a link
    if path.exists() and not path.is_file():
        raise StorageError(f"{path} is not a regular file; choose another output")
    try:
        with temporary_file(path) as (handle, temporary):
            with os.fdopen(handle, "w+b") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                if file.read() != content:
                    raise StorageError(f"{path}: what was read back differs from what was written")
            os.chmod(temporary, _mode(path))
            os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path, len(content)) from error


def write_json(path: Path, document: Mapping[str, object]) -> None:
    """Write a JSON document with its schema version; non-finite numbers become null."""
    write_bytes(path, json_text({"schema_version": SCHEMA_VERSION, **document}).encode() + b"\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> bytes:
    """Write tensors as safetensors and return the bytes."""
    from safetensors.torch import save

    content = save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
    write_bytes(path, content)
    return content


def json_text(document: object, *, indent: int | None = 2, ascii: bool = False) -> str:
    """Dump plain values as JSON, with NaN and infinity as null.

    `ascii` escapes all other characters, for streams that cannot encode them.

    >>> json_text({"a": float("nan"), "b": (1, 2)}, indent=None)
    '{"a": null, "b": [1, 2]}'
    """
    return json.dumps(to_plain(document), indent=indent, allow_nan=False, ensure_ascii=ascii)


def to_plain(value: Any) -> Any:
    """Convert to dicts, lists, text, finite numbers, booleans and None."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if hasattr(value, "tolist"):  # tensors, arrays, numpy scalars
        return to_plain(value.tolist())
    return str(value)


def storage_error(error: OSError, path: Path, size: int) -> StorageError:
    """Explain the error with the path and a remedy."""
    if isinstance(error, StorageError):
        return error
    if error.errno in DISK_FULL_ERRORS:
        free = "unknown"
        with suppress(OSError):
            free = f"{shutil.disk_usage(path.parent).free:,} bytes"
        return StorageError(
            f"no space to write {path}: {size:,} bytes are needed, {free} free "
            f"({os.strerror(error.errno)}); what was there before is intact"
        )
    reason = error.strerror or str(error)
    return StorageError(f"cannot write {path}: {reason}; choose another --output")


def _mode(path: Path) -> int:
    """Return the mode of the replaced file, else 0666 without the umask."""
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
