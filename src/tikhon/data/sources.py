"""Load data by name or path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tikhon.data import arrays, mnist
from tikhon.data.dataset import Dataset
from tikhon.data.reading import SUFFIXES, is_table, refuse_other_types
from tikhon.data.table import TableOptions, load_table
from tikhon.errors import DataError, InputError, unknown_name


def load(
    source: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
    table: TableOptions | None = None,
) -> Dataset:
    """Load a named data set (`digits`, `mnist`, ...), a table, or a file of arrays.

    A `.csv`, `.tsv`, `.jsonl`, `.xlsx`, `.feather` or `.parquet` file, gzipped or not, is a table:
    `table` names its target. Other files are an `.npz` with `X` and `y`; a folder holds `X.npy`
    and `y.npy`, one `.npz`, or the four IDX files of an MNIST-like set. MNIST and Fashion-MNIST
    are searched in `data_dir`, `$TIKHON_DATA` and the cache folder, then downloaded.

    Raises `DataError` for unusable files and `InputError` for an unknown name.

    >>> digits = load("digits")
    >>> digits.x.shape, digits.outputs
    (torch.Size([1797, 64]), 10)
    """
    name = os.fspath(source)
    if name == "-":
        raise InputError(
            "rows are not read from standard input, as a run names the file that it learned from; "
            "save them in a file, and give its name"
        )
    if table is not None and (name in NAMES or not is_table(Path(name))):
        if not name.endswith((".npz", ".npy")):
            refuse_other_types(find_path(name, data_dir))
        raise InputError(
            f"{table.target!r} names a column of a table (--target), and {name} is none: leave it "
            "out, or give a table (" + ", ".join(SUFFIXES) + ")"
        )
    if name in _BUNDLED:
        return _bundled(name)
    if name in mnist.SETS:
        return mnist.load(name, data_dir, download)
    path = find_path(name, data_dir)
    if path.is_file() and is_table(path):
        if table is None:
            raise InputError(
                f"{path} is a table: name the column to predict with --target COLUMN (in Python "
                "load(path, table=TableOptions(COLUMN)) of tikhon.data)"
            )
        return load_table(path, table)
    if path.is_dir():
        return arrays.read_folder(path)
    if path.is_file():
        return arrays.read_file(path)
    if path.suffix or os.sep in name:
        raise DataError(
            f"no file or folder {name!r}; give a path that exists or a name: {', '.join(NAMES)}"
        )
    raise InputError(unknown_name("data", name, NAMES) + "; or the path of a file")


def find_path(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the path as given, or inside `data_dir`; it need not exist."""
    path = Path(name).expanduser()
    if data_dir is None or path.is_absolute() or path.exists():
        return path
    there = (Path(data_dir) / name, Path(data_dir) / f"{name}.npz")
    return next((p for p in there if p.exists()), path)


def _bundled(name: str) -> Dataset:
    import sklearn.datasets

    data: Any = getattr(sklearn.datasets, f"load_{name}")()
    classes = tuple(str(c) for c in getattr(data, "target_names", ()))
    images = name == "digits"
    return Dataset(
        name,
        torch.from_numpy(np.asarray(data.data, np.float32)) / (16 if images else 1),
        torch.from_numpy(data.target.astype(np.int64 if classes else np.float32)),
        "classification" if classes else "regression",
        classes,
        tuple(map(str, data.feature_names)),
        scale=not images,
        origin={"source": "scikit-learn"},
    )


_BUNDLED = ("digits", "breast_cancer", "wine", "iris", "diabetes")

NAMES = (*_BUNDLED, *mnist.SETS)
