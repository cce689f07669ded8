"""The manifest of a finished folder: SHA-256 of every file, written last.

A folder with a `manifest.json` is finished, and damage to any file can be detected; the manifest
also has a digest of itself. A folder without one is unfinished, or from a version without
manifests: its files are read unverified.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tikhon.errors import DataError
from tikhon.runs.files import SCHEMA_VERSION, json_text, write_json

MANIFEST = "manifest.json"
_BLOCK = 1 << 20
_UNLISTED = (MANIFEST, ".lock")  # also excluded: hidden files and checkpoints


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files in the folder."""
    files = {
        path.relative_to(folder).as_posix(): _entry(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and _is_listed(path.relative_to(folder))
    }
    write_json(folder / MANIFEST, {"files": files, "sha256": _digest(files)})


def update_manifest(folder: Path, *names: str) -> None:
    """Update the manifest for rewritten files, if there is one."""
    files = _read_manifest(folder)
    if files is None:
        return
    files |= {name: _entry(folder / name) for name in names if (folder / name).is_file()}
    write_json(folder / MANIFEST, {"files": files, "sha256": _digest(files)})


def has_manifest(folder: Path) -> bool:
    """Return whether the folder is finished."""
    return (folder / MANIFEST).is_file()


def verify(folder: Path, *names: str) -> None:
    """Compare files with the manifest, if there is one.

    Raises `DataError` naming the first missing or changed file, and what remains usable.
    """
    files = _read_manifest(folder)
    if files is None:
        return
    for name in names:
        wanted, path = files.get(name), folder / name
        if wanted is None:
            continue
        if not path.is_file():
            raise DataError(f"{path} is missing, though the run had finished; {_advice(name)}")
        found = _entry(path)
        if found != wanted:
            raise DataError(
                f"{path} is damaged: {found['bytes']:,} bytes with SHA-256 "
                f"{found['sha256'][:12]}..., the run wrote {wanted['bytes']:,} with "
                f"{wanted['sha256'][:12]}...; {_advice(name)}"
            )


def _advice(name: str) -> str:
    others = "the other files can still be read"
    if name.endswith(".safetensors"):
        return f"restore it from a copy, or train again with --overwrite; {others}"
    return f"restore it from a copy, or run again with --overwrite; {others}"


def _is_listed(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.name not in _UNLISTED and path.parts[0] != "checkpoint"


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        return None
    except (OSError, ValueError):  # a folder of that name, a failing disk, not text
        text = ""
    try:
        document = json.loads(text)
        files = document["files"]
        known = isinstance(files, dict) and document["schema_version"] == SCHEMA_VERSION
        if known and document["sha256"] == _digest(files):
            return files
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise DataError(
        f"{path} is damaged, so the files beside it cannot be verified; restore it from a copy, "
        "or run again with --overwrite (deleting it reads them unverified)"
    )


def _entry(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"sha256": digest.hexdigest(), "bytes": size}


def _digest(files: Mapping[str, object]) -> str:
    text = json_text(dict(sorted(files.items())), indent=None)
    return hashlib.sha256(text.encode()).hexdigest()
