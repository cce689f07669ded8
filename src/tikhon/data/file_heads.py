"""Cut the first rows of a large file, to estimate the cost of reading all of it."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path

_LENGTHS = (1 << 20, 4 << 20)  # bytes

Head = tuple[bytes, float]  # file content of the first rows, and their share of the whole


def read_heads(path: Path) -> list[Head]:
    """Return a short and a longer head of a CSV, JSON lines or Parquet file, gzipped or not.

    Raises `ValueError` for a file that cannot be cut by rows.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTHS[1])
    if start.startswith(b"PAR1"):
        return _read_parquet_heads(path, size)
    if start.startswith(b"\x1f\x8b"):
        start, size = _read_unzipped_head(path, size)
    if b"\0" in start or b"\n" not in start[: _LENGTHS[0]]:
        raise ValueError(f"{path} has no lines")
    texts = [start[:length] for length in _LENGTHS]
    texts = [text[: text.rindex(b"\n") + 1] for text in texts]
    return [(text, len(text) / size) for text in texts]


def _read_unzipped_head(path: Path, size: int) -> tuple[bytes, float]:
    """Return the first bytes unpacked from a gzip file, and the estimated unpacked size."""
    with path.open("rb") as packed, gzip.GzipFile(fileobj=packed) as file:
        try:
            start = file.read(_LENGTHS[1])
        except (EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged") from error
        return start, len(start) * size / packed.tell()


def _read_parquet_heads(path: Path, size: int) -> list[Head]:
    import pyarrow as pa
    from pyarrow import parquet

    file: object = parquet.ParquetFile(path)
    rows = file.metadata.num_rows
    wanted = [max(500, rows * length // size) for length in _LENGTHS]
    table = pa.Table.from_batches([next(file.iter_batches(batch_size=wanted[1]))])
    found = []
    for count in wanted:
        out = io.BytesIO()
        parquet.write_table(table.slice(0, count), out)
        found.append((out.getvalue(), min(count, len(table)) / rows))
    if found[0][1] == found[1][1]:
        raise ValueError(f"{path} begins with too few rows")
    return found
