"""Verified, resumable downloads from several mirrors."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tikhon.errors import DataError, StorageError

_BLOCK = 1 << 16


def fetch(name: str, mirrors: Sequence[str], *, sha256: str, folder: Path) -> Path:
    """Return the file `name` in `folder`, downloading it from the first mirror with intact
    content.

    The file is renamed into place once complete and verified; a partial download stays as
    `NAME.part` and is resumed. Raises `DataError` with the error of every mirror.
    """
    pooch = _pooch()
    target = folder / name
    if target.is_file() and pooch.file_hash(str(target), alg="sha256") == sha256:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create {folder}: {error.strerror}") from error
    reasons = []
    for mirror in mirrors:
        url = mirror.rstrip("/") + "/" + name
        try:
            part = _resume(url, folder / f"{name}.part")
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
            reasons.append(f"{url}: {getattr(error, 'reason', error)}")
            continue
        except OSError as error:
            if isinstance(error, ConnectionError):
                reasons.append(f"{url}: {error}")
                continue
            raise StorageError(f"cannot write {folder / name}.part: {error}") from error
        if (found := pooch.file_hash(str(part), alg="sha256")) == sha256:
            os.replace(part, target)
            return target
        part.unlink()
        reasons.append(f"{url}: wrong checksum (SHA-256 {found[:12]}..., not {sha256[:12]}...)")
    raise DataError(f"{name} could not be downloaded:\n  " + "\n  ".join(reasons))


def _resume(url: str, part: Path) -> Path:
    """Append the missing bytes of `url` to `part` (all of them if the server ignores ranges)."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30.0)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        return part  # already complete; the checksum is verified later
    with response:
        partial = response.status == http.client.PARTIAL_CONTENT
        have = have if partial else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with part.open("ab" if partial else "wb") as out:
            while block := response.read(_BLOCK):
                out.write(block)
                have += len(block)
    if total is not None and have < total:
        raise http.client.IncompleteRead(b"", total - have)
    return part


def _pooch():
    try:
        import pooch
    except ImportError as error:
        raise DataError("downloads need pooch: pip install 'tikhon[data]'") from error
    return pooch
