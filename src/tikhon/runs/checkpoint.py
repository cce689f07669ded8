"""Store training states: tensors as safetensors, the rest as JSON, with checksums.

A generation is two files, `N.safetensors` and `N.json`; the latter is written last, with the
SHA-256 of the former. Two generations are kept, so a damaged one costs a single interval.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from tikhon.errors import DataError
from tikhon.runs.files import SCHEMA_VERSION, storage_error, write_bytes, write_tensors
from tikhon.runs.interrupt import Stopped
from tikhon.runs.journal import compare_headers

KEPT_GENERATIONS = 2


def save(folder: Path, state: Mapping[str, object]) -> None:
    """Write a new generation; delete older ones only once it is verified on disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder, 0) from error
    number = max(_generations(folder), default=0) + 1
    tensors: dict[str, Tensor] = {}
    document = flatten(state, tensors)
    content = write_tensors(folder / f"{number}.safetensors", tensors)
    text = json.dumps(document, allow_nan=False)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "sha256": hashlib.sha256(content).hexdigest(),
        "sha256_state": hashlib.sha256(text.encode()).hexdigest(),
        "state": text,
    }
    write_bytes(folder / f"{number}.json", json.dumps(manifest).encode())
    for old in sorted(_generations(folder))[:-KEPT_GENERATIONS]:
        for suffix in ("json", "safetensors"):  # manifest first: without it there is no generation
            with suppress(OSError):
                (folder / f"{old}.{suffix}").unlink()


def load(folder: Path, *, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Load the newest intact generation; report damaged newer ones to `say`.

    Raises `DataError` if there is none.
    """
    from safetensors import SafetensorError

    damaged = (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError)
    reasons = []
    for number in sorted(_generations(folder), reverse=True):
        try:
            found = _read(folder, number)
        except damaged as error:
            reasons.append(f"{folder / str(number)}.json: {error}")
            continue
        if reasons:
            say(f"{'; '.join(reasons)}; going on from the one before it")
        return found
    raise DataError(
        f"{folder} holds no usable checkpoint ({'; '.join(reasons) or 'it is empty'}); "
        "start again with --overwrite"
    )


def exists(folder: Path) -> bool:
    """Return whether a generation was completed."""
    return bool(_generations(folder))


def flatten(value: object, tensors: dict[str, Tensor]) -> Any:
    """Convert `value` to JSON exactly, moving its tensors to `tensors`."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value
        return {"$tensor": key}
    if isinstance(value, Mapping):
        return {"$items": [[flatten(k, tensors), flatten(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"$tuple": [flatten(item, tensors) for item in value]}
    if isinstance(value, list):
        return [flatten(item, tensors) for item in value]
    if isinstance(value, float):
        return {"$float": value.hex()}
    if value is None or isinstance(value, str | bool | int):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}: {value!r}")


def restore(value: object, tensors: Mapping[str, Tensor]) -> Any:
    """Invert `flatten`."""
    if isinstance(value, list):
        return [restore(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "$tensor":
        return tensors[content]
    if kind == "$float":
        return float.fromhex(content)
    if kind == "$tuple":
        return tuple(restore(item, tensors) for item in content)
    return {restore(k, tensors): restore(v, tensors) for k, v in content}


def _read(folder: Path, number: int) -> dict[str, object]:
    from safetensors.torch import load as parse

    manifest = json.loads((folder / f"{number}.json").read_text(encoding="utf-8"))
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema version {manifest['schema_version']} is not known here")
    content = (folder / f"{number}.safetensors").read_bytes()
    text = manifest["state"]
    for name, found in (("sha256", content), ("sha256_state", text.encode())):
        if hashlib.sha256(found).hexdigest() != manifest[name]:
            raise ValueError("its checksum is wrong: the file is damaged")
    return restore(json.loads(text), parse(content))


def _generations(folder: Path) -> list[int]:
    return [int(p.stem) for p in folder.glob("*.json") if p.stem.isdecimal()]


class PeriodicCheckpoint:
    """Save a growing state periodically; `found` is what an earlier process saved.

    Without a folder nothing is saved. The header identifies task and data: a state saved under
    another header raises `InputError`. A damaged checkpoint that is skipped is reported to `say`,
    by default as a warning.
    """

    def __init__(
        self,
        folder: Path | None = None,
        header: Mapping[str, object] | None = None,
        *,
        resume: bool = False,
        stop: Callable[[], bool] = lambda: False,
        every: float = 10.0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._folder, self._header, self._stop = folder, dict(header or {}), stop
        self._every, self._saved = every, time.monotonic()
        self.found: dict[str, object] = {}
        if folder is not None and not resume:
            shutil.rmtree(folder, ignore_errors=True)  # from another run
        if folder is not None and exists(folder):
            stored = load(folder, say=say or (lambda text: warnings.warn(text, stacklevel=6)))
            compare_headers(stored.get("header", {}), self._header, folder)
            self.found = stored["state"]

    def save_if_due(self, state: Callable[[], Mapping[str, object]]) -> None:
        """Save the state when due; on a stop request save it and raise `Stopped`."""
        stop = self._stop()
        if self._folder is not None and (stop or time.monotonic() - self._saved >= self._every):
            save(self._folder, {"header": self._header, "state": state()})
            self._saved = time.monotonic()
        if stop:
            raise Stopped
