"""The IDX format of MNIST and its relatives, gzipped or raw."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from tikhon.errors import DataError

# third byte of the magic number -> big-endian element type
_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_DIMENSIONS = 32
_LIMIT = 1 << 32  # bytes read at most: a small gzip may claim terabytes


def read(path: Path, *, sha256: str | None = None) -> np.ndarray:
    """Read the array of an IDX file; gzip is recognised by content.

    `sha256` is the checksum of the uncompressed content. Raises `DataError` for a wrong magic
    number, a truncated file, trailing data, a damaged gzip stream and a wrong checksum.

    Reference: LeCun, Cortes, Burges, "The MNIST database of handwritten digits" (1998).
    """
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if compressed else raw
            return _parse(stream, path, sha256)
    except EOFError as error:
        raise DataError(
            f"{path} is truncated: its gzip stream ends early; copy it again"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); copy or download it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def read_labelled(
    images: Path, labels: Path, *, sha256: tuple[str | None, str | None] = (None, None)
) -> tuple[np.ndarray, np.ndarray]:
    """Read images (rows, height, width) and their labels (rows,)."""
    x, y = read(images, sha256=sha256[0]), read(labels, sha256=sha256[1])
    if x.ndim != 3 or y.ndim != 1:
        raise DataError(
            f"{images.name} holds {x.ndim} dimensions and {labels.name} {y.ndim}; "
            "images need 3 and labels 1: are the two files swapped?"
        )
    if len(x) != len(y):
        raise DataError(
            f"{images.name} holds {len(x)} images but {labels.name} {len(y)} labels; "
            "the two files do not belong together"
        )
    return x, y


def _parse(stream: BinaryIO, path: Path, sha256: str | None) -> np.ndarray:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES or not magic[3]:
        raise DataError(
            f"{path} is not an IDX file: its magic number is 0x{magic.hex() or '(empty file)'}, "
            "an image file starts with 0x00000803, a label file with 0x00000801"
        )
    header = stream.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise DataError(f"{path} is truncated in its header; copy it again")
    shape = struct.unpack(f">{magic[3]}I", header)
    dtype = np.dtype(_TYPES[magic[2]])
    size = math.prod(shape) * dtype.itemsize
    claimed = math.prod(max(length, 1) for length in shape) * dtype.itemsize  # 0 as 1
    if claimed > _LIMIT or len(shape) > _DIMENSIONS:
        raise DataError(
            f"{path} claims {len(shape)} dimensions of {claimed:,} bytes; the limits are "
            f"{_DIMENSIONS} and {_LIMIT:,}"
        )
    content = stream.read(size)
    if len(content) < size:
        raise DataError(
            f"{path} is truncated: its header promises {size:,} bytes ({shape}), "
            f"{len(content):,} are there; copy it again"
        )
    if stream.read(1):
        raise DataError(f"{path} holds more than its header promises ({shape}); copy it again")
    if sha256 is not None:
        found = hashlib.sha256(magic + header + content).hexdigest()
        if found != sha256:
            raise DataError(
                f"{path} has the wrong checksum: SHA-256 {found[:12]}... instead of "
                f"{sha256[:12]}...; it is a different or damaged file: download it again"
            )
    return np.frombuffer(content, dtype).reshape(shape)
