"""A training state on disk: safetensors for tensors, JSON for the rest, a checksum for both.

A generation is two files, `N.safetensors` and `N.json`; the second is written last and names the
SHA-256 of the first. Two generations are kept, so a damaged newest one costs one interval.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from tikhon.errors import StorageError
from tikhon.runs.files import SCHEMA_VERSION, explain, write_bytes, write_tensors

KEPT = 2


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a new generation; older ones go only after it is on disk and verified."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise explain(error, folder, 0) from error
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
    for old in sorted(_generations(folder))[:-KEPT]:
        for suffix in ("json", "safetensors"):  # the manifest first: no manifest, no generation
            with suppress(OSError):
                (folder / f"{old}.{suffix}").unlink()


def load(folder: Path) -> dict[str, Any]:
    """The newest generation that is intact. Raises `StorageError` when there is none."""
    reasons = []
    for number in sorted(_generations(folder), reverse=True):
        try:
            return _read(folder, number)
        except (OSError, ValueError, KeyError) as error:
            reasons.append(f"generation {number}: {error}")
    raise StorageError(
        f"{folder} holds no usable checkpoint ({'; '.join(reasons) or 'it is empty'}); "
        "start again with --overwrite"
    )


def exists(folder: Path) -> bool:
    """Whether any generation was completed here."""
    return bool(_generations(folder))


def flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors moved to `tensors`; floats keep every bit."""
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


def restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
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


def _read(folder: Path, number: int) -> dict[str, Any]:
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


def remove(folder: Path) -> None:
    """Delete the checkpoints of a run that is finished."""
    shutil.rmtree(folder, ignore_errors=True)
