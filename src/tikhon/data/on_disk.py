"""Data frames whose columns are in files mapped into memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tikhon.data.memory import move_to_file, temporary_file

if TYPE_CHECKING:
    import pandas as pd


def has_mapped_strings() -> bool:
    """Return whether pandas can hold strings in a mapped file: from version 3, with pyarrow."""
    import pandas as pd

    dtype: Any = pd.Series(["a"]).dtype
    return getattr(dtype, "storage", "") == "pyarrow"


def gather_texts(pieces: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Join frames of text columns, holding one at a time."""
    import pyarrow as pa
    from pyarrow import ipc

    pieces = iter(pieces)
    first = next(pieces)
    text, dtype = pa.large_string(), first.dtypes.iloc[0]
    schema = pa.schema([(name, text) for name in first.columns])
    with temporary_file() as file:
        with ipc.new_file(file, schema) as writer:
            for piece in chain([first], pieces):
                writer.write_table(pa.Table.from_pandas(piece, schema, preserve_index=False))
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    table = ipc.open_file(pa.py_buffer(mapped)).read_all()
    return cast("pd.DataFrame", table.to_pandas(types_mapper={text: dtype}.get))


def gather_columns(columns: Iterable[tuple[str, pd.Series]]) -> pd.DataFrame:
    """Join columns to a frame, holding one at a time; those of Python objects stay in memory."""
    import pandas as pd

    return pd.DataFrame({name: _map_column(column) for name, column in columns}, copy=False)


def _map_column(column: pd.Series) -> pd.Series:
    import pandas as pd

    if getattr(column.dtype, "storage", "") == "pyarrow":
        return cast("pd.Series", gather_texts([column.to_frame("")])[""])
    if not isinstance(column.dtype, np.dtype) or column.dtype.hasobject:
        return column
    return pd.Series(move_to_file(column.to_numpy()), copy=False)
