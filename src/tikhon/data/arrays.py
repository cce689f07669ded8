"""Read user arrays: .npz files, folders of .npy, arrays in memory."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tikhon.arguments import MAX_FLOAT32
from tikhon.data import mnist
from tikhon.data.dataset import Dataset, Task
from tikhon.errors import DataError
from tikhon.languages import sentence


def read_folder(path: Path) -> Dataset:
    """Read a folder with X.npy and y.npy, with one .npz, or with four IDX files."""
    if parts := mnist.files(path):
        return mnist.assemble(path.resolve().name, parts, (), (None,) * 4)
    if (path / "X.npy").is_file() and (path / "y.npy").is_file():
        arrays = {key: _array(path / f"{key}.npy", key) for key in ("X", "y")}
        return from_arrays(
            arrays["X"], arrays["y"], name=path.resolve().name, origin={"source": str(path)}
        )
    files = sorted(path.glob("*.npz"))
    if len(files) == 1:
        return read_file(files[0])
    raise DataError(
        f"folder {path} holds {len(files)} .npz files; needed: exactly one, or X.npy and y.npy, "
        f"or the IDX files {', '.join(mnist.PARTS)}"
    )


def read_file(path: Path) -> Dataset:
    """Read an .npz file with `X` and `y`, and optionally `feature_names` and `classes`.

    `x_test` and `y_test` beside `x_train` and `y_train` become the test part.
    """
    if path.suffix.lower() != ".npz":
        raise DataError(
            f"{path}: a file of type {path.suffix or '(none)'!r} cannot be read; give a table "
            "(CSV, TSV, JSON, Excel, Feather, Parquet; gzipped too), or an .npz with X and "
            "y; archives are to be unpacked first"
        )
    arrays = _npz(path)
    tests = [arrays[name] for name in ("X_test", "y_test") if name in arrays]
    parts = [[arrays[name]] for name in ("X", "y")]
    if len(tests) == 2:
        parts = [[train, test] for (train,), test in zip(parts, tests)]
        for (train, test), name in zip(parts, ("X", "y")):
            if train.shape[1:] != test.shape[1:]:
                raise DataError(
                    f"{path}: rows of {name} have shape {train.shape[1:]}, those to test "
                    f"{test.shape[1:]}"
                )
    whole = from_arrays(
        *map(np.concatenate, parts),
        name=path.stem,
        feature_names=arrays.get("feature_names"),
        classes=arrays.get("classes"),
        origin={"source": str(path)},
    )
    if len(tests) < 2:
        return whole
    train, test = torch.arange(len(whole.x)).split([len(arrays["X"]), len(tests[0])])
    return replace(whole.take(train), test=whole.take(test))


# common array names: our own, those of Keras and of MedMNIST
_WANTED = {
    "X": ("x", "x_train", "train_images"),
    "y": ("y", "y_train", "train_labels"),
    "X_test": ("x_test", "test_images"),
    "y_test": ("y_test", "test_labels"),
    "feature_names": ("feature_names",),
    "classes": ("classes",),
}
_SHOWN = 8  # keys listed in a message at most
_LIMIT = 1 << 34  # bytes an .npz may unpack to: a small zip can exceed memory


def _npz(path: Path) -> dict[str, np.ndarray]:
    """Load the wanted arrays of an .npz, unpickled and within the size limit."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {
                info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()
            }
        wanted = _match_keys(path, list(sizes))
        if (size := sum(sizes[key] for key in wanted.values())) > _LIMIT:
            raise DataError(f"{path} unpacks to {size:,} bytes; the limit is {_LIMIT:,}")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[key] for name, key in wanted.items()}
    except DataError:
        raise
    except (zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path} is not a complete .npz file ({error}); copy it again") from error
    except (ValueError, MemoryError) as error:
        raise DataError(_not_numbers(path, error)) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _match_keys(path: Path, keys: list[str]) -> dict[str, str]:
    """Return the key of each wanted array in the file, ignoring case.

    Raises `DataError` where one is missing or matches several keys.
    """
    found = {
        name: [key for key in keys if key.lower() in called] for name, called in _WANTED.items()
    }
    if twice := next((these for these in found.values() if len(these) > 1), None):
        raise DataError(f"{path} holds {' and '.join(sorted(twice))}: leave one of them out")
    missing = [name for name in ("X", "y") if not found[name]]
    if missing:
        held = ", ".join(sorted(keys)[:_SHOWN]) or "nothing"
        raise DataError(
            f"{path} lacks {' and '.join(missing)}; it holds {held}. Save it with "
            "numpy.savez(path, X=X, y=y)"
        )
    return {name: these[0] for name, these in found.items() if these}


def _array(path: Path, name: str) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise DataError(_not_numbers(path, error)) from error


def _not_numbers(path: Path, error: Exception) -> str:
    return (
        f"{path} cannot be read as arrays of numbers ({error}); objects are never unpickled: "
        "convert them to numbers and save them again"
    )


def from_arrays(
    x: np.ndarray,
    y: np.ndarray,
    *,
    name: str = "arrays",
    feature_names: Any = None,
    classes: object = None,
    origin: Mapping[str, object] | None = None,
) -> Dataset:
    """Build a data set from two arrays: text, booleans and few distinct integers are classes.

    `x` (rows, features) is standardised later with statistics of the training part; uint8 arrays
    with more than two axes are images, scaled to [0, 1].

    >>> from_arrays(np.eye(4), np.array(["a", "b", "a", "b"])).classes
    ('a', 'b')
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim < 2:
        raise DataError(f"{name}: X must have rows and columns, received shape {x.shape}")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if len(x) != len(y):
        raise DataError(f"{name}: X has {len(x)} rows but y has {len(y)}; give one target per row")
    if len(x) == 0:
        raise DataError(f"{name} has no rows")
    if x.dtype.kind not in "biuf":
        raise DataError(f"{name}: X must be numeric, received {x.dtype}")
    names = tuple(str(n) for n in feature_names) if feature_names is not None else ()
    _refuse_unusable(x, "X", name, names)
    image = x.dtype == np.uint8 and (x.ndim > 2 or x.max(initial=0) > 127)
    inputs = torch.from_numpy(np.array(x, np.float32))
    if image:
        inputs.div_(255)
    target, task, labels = _target(y, name, classes)
    return Dataset(
        name,
        inputs,
        target,
        task,
        labels,
        names,
        scale=not image and x.ndim == 2,
        origin=origin or {},
    )


def _target(y: np.ndarray, name: str, classes: Any) -> tuple[Tensor, Task, tuple[str, ...]]:
    _refuse_unusable(y, "y", name, ())
    whole = y.dtype.kind in "biuUS" or (classes is not None and bool(np.all(y == np.floor(y))))
    if (
        y.ndim > 1
        or not whole
        or (
            y.dtype.kind in "iu" and classes is None and len(np.unique(y)) > max(20, 0.05 * len(y))
        )
    ):
        if y.dtype.kind not in "biuf":
            raise DataError(f"{name}: y must be numbers or labels, received {y.dtype}")
        return torch.from_numpy(np.array(y, np.float32)), "regression", ()
    found, codes = np.unique(y, return_inverse=True)
    if len(found) < 2:
        raise DataError(
            f"{name}: y holds one class only ({found.tolist()[0]!r}, {len(y)} rows); two or more "
            "are needed"
        )
    labels = [str(c) for c in found]
    if classes is not None and y.dtype.kind in "iuf" and len(classes) > int(found.max()):
        labels = [str(classes[int(c)]) for c in found]
    return torch.from_numpy(codes.reshape(-1).astype(np.int64)), "classification", tuple(labels)


def _refuse_unusable(values: np.ndarray, what: str, name: str, columns: tuple[str, ...]) -> None:
    """Raise for numbers that are not finite, or too large for float32, naming the first one."""
    if values.dtype.kind not in "iuf":
        return
    bad, why = ~np.isfinite(values), "that are NaN or infinite, {}; remove or fill them"
    if not bad.any():
        bad = np.abs(values.astype(float)) > MAX_FLOAT32
        why = f"beyond {MAX_FLOAT32:g}, {{}}; correct or rescale them"
    if not bad.any():
        return
    row, where = int(np.argwhere(bad)[0][0]), ""
    if bad.ndim == 2:
        column = int(np.argwhere(bad[row])[0][0])
        where = f" column {columns[column]!r}" if column < len(columns) else f" column {column}"
        bad = bad[:, column]
    found = sentence("told_values", count=int(bad.sum()))
    first = why.format(f"first in row {row}")
    raise DataError(f"{name}: {what}{where} has {found} {first} before training")
