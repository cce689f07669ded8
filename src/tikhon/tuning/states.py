"""Weights and optimizer states of trials: few in memory, the others in checksummed files."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from tikhon.errors import DataError
from tikhon.runs.files import storage_error, write_tensors

State = dict[str, Tensor]
MEMORY = 16 * 2**20  # bytes of unwritten states (writing takes four times as much memory)


class States(MutableMapping[int, State]):
    """States by trial, about `memory` bytes of them in memory and the rest in files.

    In a search's folder they allow resuming: `seal` writes new states and returns the SHA-256 of
    new files for the journal. Without a folder the files are temporary. A file is deleted once
    none of its trials is needed.

    Raises `StorageError` for a file that cannot be written, `DataError` for an unreadable one.
    """

    def __init__(self, folder: Path | None = None, *, memory: int = MEMORY) -> None:
        self._folder, self._limit = folder, memory
        self._temporary: Path | None = None
        self._in_memory: dict[int, State] = {}
        self._size = 0
        self._files: dict[int, Path] = {}
        self._new: dict[str, str] = {}
        self._number = 0

    def __getitem__(self, id: int) -> State:
        if id in self._in_memory:
            return self._in_memory[id]
        from safetensors import SafetensorError, safe_open

        path, start = self._files[id], f"{id}/"
        try:
            with safe_open(path, framework="pt") as file:
                keys = [key for key in file.keys() if key.startswith(start)]
                return {key.removeprefix(start): file.get_tensor(key) for key in keys}
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); continue the search with --resume, which "
                "trains its trials again"
            ) from error

    def __setitem__(self, id: int, state: State) -> None:
        self.pop(id, None)
        self._in_memory[id] = state
        self._size += _byte_count(state)
        if self._size > self._limit:
            self._write()

    def __delitem__(self, id: int) -> None:
        if id in self._in_memory:
            self._size -= _byte_count(self._in_memory.pop(id))
            return
        path = self._files.pop(id)
        if path not in self._files.values():
            self._new.pop(path.name, None)
            with suppress(OSError):
                path.unlink()

    def __iter__(self) -> Iterator[int]:
        return iter([*self._files, *self._in_memory])

    def __len__(self) -> int:
        return len(self._files) + len(self._in_memory)

    def __contains__(self, id: object) -> bool:
        return id in self._in_memory or id in self._files

    def seal(self) -> dict[str, str]:
        """Write states in memory if they must persist; return the SHA-256 of each new file."""
        if self._folder is None:
            return {}
        self._write()
        new, self._new = self._new, {}
        return new

    def load_sealed(self, seals: Mapping[str, str]) -> list[Path]:
        """Take over the files of an earlier process; return those with a wrong checksum.

        Files without a checksum, left by a crash, are deleted.
        """
        if self._folder is None or not self._folder.is_dir():
            return []
        from safetensors import safe_open

        damaged = []
        for path in sorted(self._folder.glob("*.safetensors")):
            if path.name not in seals:
                with suppress(OSError):
                    path.unlink()
            elif not _is_intact(path, seals[path.name]):
                damaged.append(path)
            else:
                with safe_open(path, framework="pt") as file:
                    ids = {int(key.partition("/")[0]) for key in file.keys()}
                self._files |= dict.fromkeys(ids, path)
        self._number = max((int(n.partition(".")[0]) for n in seals), default=0)
        return damaged

    def _write(self) -> None:
        if not self._in_memory:
            return
        folder = self._make_folder()
        self._number += 1
        path = folder / f"{self._number}.safetensors"
        tensors = {
            f"{id}/{n}": t for id, state in self._in_memory.items() for n, t in state.items()
        }
        self._new[path.name] = hashlib.sha256(write_tensors(path, tensors)).hexdigest()
        self._files |= dict.fromkeys(self._in_memory, path)
        self._in_memory, self._size = {}, 0

    def _make_folder(self) -> Path:
        try:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
                return self._folder
            if self._temporary is None:
                self._temporary = Path(tempfile.mkdtemp(prefix="tikhon-states-"))
                weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
            return self._temporary
        except OSError as error:
            raise storage_error(error, self._folder or Path(tempfile.gettempdir()), 0) from error


def _byte_count(state: State) -> int:
    return sum(t.numel() * t.element_size() for t in state.values())


def _is_intact(path: Path, seal: str) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == seal
    except OSError:
        return False
