"""Load a saved run for prediction, with its preprocessing and labels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from tikhon.data import load
from tikhon.data.encoding import encode_columns
from tikhon.data.large_tables import read_source
from tikhon.data.preprocessing import Preprocessing
from tikhon.data.reading import SUFFIXES, is_table
from tikhon.data.source import Format
from tikhon.data.sources import find_path
from tikhon.errors import DataError, InputError, unknown_name
from tikhon.models import Average, restore
from tikhon.runs.manifest import verify
from tikhon.runs.run_directory import AVERAGE, CONFIG, MODEL, RunDirectory
from tikhon.training import measures

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class NewRows:
    """New rows: the model's inputs, remarks on values unseen in training, and the columns to keep
    beside the predictions."""

    x: torch.Tensor
    remarks: tuple[str, ...] = ()
    kept: pd.DataFrame | None = None

    def prepend_kept(self, predictions: pd.DataFrame) -> pd.DataFrame:
        """Prepend the kept columns to the predictions."""
        if self.kept is None:
            return predictions
        if repeated := [name for name in self.kept if name in predictions]:
            raise InputError(f"--keep {repeated[0]}: the predictions have a column of this name")
        import pandas as pd

        return pd.concat([self.kept, predictions], axis=1)


@dataclass(frozen=True, eq=False)
class SavedModel:
    """A saved run, ready to predict."""

    model: nn.Module
    data: dict[str, Any]  # the data section of the configuration
    preprocessing: Preprocessing | None

    @classmethod
    def load(cls, path: Path, *, single: bool = False) -> SavedModel:
        """Load the model of a finished run; for a search the average, unless `single`.

        Raises `InputError` for a folder without a model, `DataError` for damaged files.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = RunDirectory(path).read(CONFIG)
        name, shape, outputs = _named_model(path, config)
        members = [] if single else _members(path, config)
        file = AVERAGE if members else MODEL
        if not (path / file).is_file():
            raise InputError(f"{path} holds no {file}: is the run finished?")
        verify(path, file)
        try:
            state = load_file(path / file)
            if members:
                nets = [
                    restore(name, shape, outputs, _without_prefix(state, f"members.{k}."))
                    for k, name in enumerate(members)
                ]
                model: nn.Module = Average(nets, probabilities=bool(config["data"].get("classes")))
            else:
                model = restore(name, shape, outputs, state)
        except (SafetensorError, RuntimeError, OSError) as error:
            raise DataError(f"{path / file} cannot be used: {error}") from error
        stored = config["data"].get("preprocessing")
        fitted = None if stored is None else Preprocessing.from_dict(stored)
        if fitted is not None and (count := len(fitted.feature_names)) != shape[0]:
            raise DataError(
                f"{path / CONFIG}: its preprocessing makes {count} inputs, its model takes "
                f"{shape[0]}"
            )
        return cls(model.eval(), config["data"], fitted)

    def format(self, encoding: str | None = None) -> Format:
        """Return the format of new tables: that of the fit, with `encoding` if given."""
        try:
            format = Format(**(self.data.get("format") or {}))
            return replace(format, encoding=encoding or format.encoding)
        except (TypeError, InputError) as error:
            raise DataError(f"the format of the run's table cannot be used: {error}") from error

    def read(self, data: str | Path, **options: Any) -> torch.Tensor:
        """Read rows of a file as model inputs; table columns are matched by name."""
        return self.read_rows(data, **options).x

    def read_rows(self, data: str | Path, *, keep: Sequence[str] = (), **options: Any) -> NewRows:
        """Read the rows of a file; for a table also the columns to `keep`.

        Raises `InputError` for a column to keep that does not exist.
        """
        path = find_path(os.fspath(data), options.get("data_dir"))
        if is_table(path) and not path.is_file():
            raise DataError(f"no file {path}")
        if self.preprocessing is not None:
            return self._read_table(path, self.preprocessing, options.get("encoding"), keep)
        if keep:
            raise InputError(
                f"--keep {keep[0]}: the run's data are not a table and have no columns"
            )
        options.pop("encoding", None)
        if is_table(path):
            raise DataError(
                f"{data} is a table; the model was trained on {self.data.get('name')}, which is "
                "not a table: give data of the same kind"
            )
        loaded = load(data, **options)
        x = loaded.x if loaded.test is None else loaded.test.x
        if "mean" in self.data.get("scaling", {}):
            mean, scale = (np.array(self.data["scaling"][key]) for key in ("mean", "scale"))
            if x.shape[1:] != mean.shape:
                raise DataError(
                    f"{data}: rows have shape {tuple(x.shape[1:])}, the model was trained on "
                    f"{mean.shape}"
                )
            x = torch.from_numpy((x.double().numpy() - mean) / scale).float()
        return NewRows(x)

    def _read_table(
        self, path: Path, fitted: Preprocessing, encoding: str | None, keep: Sequence[str]
    ) -> NewRows:
        if not is_table(path):
            raise DataError(
                f"{path}: the model was trained on a table; give {', '.join(SUFFIXES)}"
            )
        source = read_source(path, self.format(encoding))
        if absent := [name for name in keep if name not in source.frame]:
            raise InputError(unknown_name("column to --keep", absent[0], map(str, source.frame)))
        values = encode_columns(source, fitted.columns)
        remarks = [*source.notices, *fitted.remarks(source, values, apart=keep)]
        kept = source.frame.filter(items=list(dict.fromkeys(keep))) if keep else None
        return NewRows(torch.from_numpy(fitted.apply(values)), tuple(map(str, remarks)), kept)

    def predict(self, x: torch.Tensor) -> pd.DataFrame:
        """Return `prediction` and, for classes, `probability_<class>` of each input row."""
        import pandas as pd

        output = measures.predict(self.model, x).double()
        classes = self.data.get("classes") or []
        if not classes:
            scaling = self.data.get("scaling", {})
            mean, scale = (
                np.array(scaling.get(key, default))
                for key, default in (("target_mean", 0.0), ("target_scale", 1.0))
            )
            values = output.numpy() * scale + mean
            if values.shape[1] == 1:
                return pd.DataFrame({"prediction": values[:, 0]})
            names = [f"prediction_{i}" for i in range(values.shape[1])]
            return pd.DataFrame(values, columns=names)
        probabilities = output.softmax(1).numpy()
        frame = pd.DataFrame(probabilities, columns=[f"probability_{name}" for name in classes])
        labels = np.array(classes, object)[probabilities.argmax(1)]
        frame.insert(0, "prediction", labels)
        return frame


def _named_model(path: Path, config: dict[str, Any]) -> tuple[str, tuple[int, ...], int]:
    """Return name, input shape and output count of the model in a run's configuration."""
    model, data = config.get("model", {}), config.get("data", {})
    if isinstance(model, dict) and not {"name", "shape", "outputs"} <= model.keys():
        raise InputError(f"{path} holds no model that was made by name; predict in Python")
    if isinstance(model, dict) and isinstance(data, dict) and isinstance(model["name"], str):
        shape, outputs = model["shape"], model["outputs"]
        is_shape = isinstance(shape, list) and len(shape) > 0
        if is_shape and all(type(size) is int and size > 0 for size in [*shape, outputs]):
            return model["name"], tuple(shape), outputs
    raise DataError(
        f"{path / CONFIG} is not a valid configuration of a run: its model or data are malformed"
    )


def _members(path: Path, config: dict[str, Any]) -> list[str]:
    """Return the names of the networks averaged by a search; empty for other runs."""
    names = config["model"].get("members", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"{path / CONFIG} is not a valid configuration of a run: its members are malformed"
        )
    return names


def _without_prefix(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def escape_formulas(frame: pd.DataFrame) -> pd.DataFrame:
    """Prefix texts that a spreadsheet would run as formulas with `'`.

    Excel and LibreOffice treat text starting with `=`, `+`, `-`, `@`, a tab or a line end as a
    formula (OWASP, "CSV Injection"); numbers are unchanged.
    """
    from pandas.api import types

    def escape(cell: object) -> object:
        if not isinstance(cell, str) or not cell.startswith(
            ("=", "+", "-", "@", "\t", "\r", "\n")
        ):
            return cell
        is_number = cell.lstrip("+-").replace(".", "", 1).isdecimal()
        return cell if is_number else f"'{cell}"

    safe = frame.set_axis([escape(name) for name in frame], axis=1)
    texts = [name for name in safe if not types.is_numeric_dtype(safe[name])]
    return safe.assign(**{str(name): safe[name].map(escape) for name in texts})
