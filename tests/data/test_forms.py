"""Forms of data that people have and the generated ones lack: read, or refused by name."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import tikhon as tk
from tikhon.data.column import Column
from tikhon.data.quality_checks import find_leaks
from tikhon.errors import DataError, InputError

X = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)
FRAME = pd.DataFrame(X, columns=list("abcdef"))


class Named(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, row):
        return {"features": X[row], "label": Y[row]}


class Stream(IterableDataset):
    """Has no length, nor has a loader of it."""

    def __iter__(self):
        return iter(list(zip(torch.from_numpy(X), torch.from_numpy(Y), strict=True)))


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


TAKEN = {
    "big-endian": (X.astype(">f4"), Y.astype(">i8")),
    "objects": (X.astype(object), Y.astype(object)),
    "a frame of objects": (FRAME.astype(object), pd.Series(Y.tolist(), dtype=object)),
    "whole numbers that may be missing": (FRAME.round().astype("Int64"), Y),
    "one input by name": {"x": X, "y": Y},
    "a data set of names": Named(),
    "a stream": Stream(),
    "batches of a stream": DataLoader(Stream(), batch_size=16),
    "one class a row in three axes": (X, Y[:, None, None]),
    "one-hot whole numbers": (X, np.eye(2, dtype=np.int64)[Y]),
}


@pytest.mark.parametrize("form", TAKEN)
def test_taken(form):
    assert 0 <= tk.fit(network(), TAKEN[form], epochs=1).metrics["train/accuracy"] <= 1
    assert tk.tune(network, TAKEN[form], epochs=2, budget="1runs").config


REFUSED = {
    "is a sparse matrix of scipy.*toarray": (sp.csr_matrix(X), Y),
    "is a sparse matrix of scipy.*toarray()": (sp.csr_array(X), Y),
    "y must be numeric.*number the classes": (X, np.array(["no", "yes"])[Y]),
    "same index in another order.*x.index": (FRAME, pd.Series(Y, index=range(64)[::-1])),
    "no arguments of Sequential.forward.*received 2": (X[:, :3], X[:, 3:], Y),
    "no arguments of Sequential.forward.*named a, b": {"a": X, "b": X, "y": Y},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(message):
    for verb in (tk.fit, lambda model, data, **given: tk.tune(network, data, budget="1runs")):
        with pytest.raises((DataError, InputError), match=message):
            verb(network(), REFUSED[message], epochs=1)


def test_a_model_that_takes_the_name_is_called_by_it():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, *, features):
            return self.layer(features)

    assert tk.fit(Asking(), Named(), epochs=1).metrics


def test_folds_of_targets_in_several_columns_hold_each_row_once():
    from tikhon.paths.targets import fold_rows

    y = torch.from_numpy(np.eye(2, dtype=np.int64)[Y])
    held = torch.cat([rows for _, rows in fold_rows(y, 4, 0)])
    assert sorted(held.tolist()) == list(range(64))


def test_a_column_of_as_many_values_as_rows_is_no_leak_of_many_classes():
    y = np.arange(60) % 30
    cells = np.random.default_rng(0).normal(size=(60, 1))
    assert find_leaks(cells, [Column("a", "number")], y, "classification") == []
    assert find_leaks(y[:, None] * 2.0, [Column("a", "number")], y, "classification")


def test_a_generator_is_of_batches():
    with pytest.raises(DataError, match="batches are needed, and a single row"):
        tk.fit(network(), iter(Stream()), epochs=1)
    batches = ((X[i : i + 16], Y[i : i + 16]) for i in range(0, 64, 16))
    assert tk.fit(network(), batches, epochs=2).metrics


@pytest.mark.parametrize("form", ["a stream", "batches of a stream"])
def test_a_stream_is_measured(form):
    found = tk.diagnose(
        network(), TAKEN[form], nn.functional.cross_entropy, optimizer=torch.optim.Adam
    )
    assert found.labels <= {"slow_convergence", "underfitting"}


def test_one_row_does_not_show_that_units_are_dead():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 2))
    for step in (None, torch.optim.Adam):
        found = tk.diagnose(model, (X[:1], Y[:1]), nn.functional.cross_entropy, optimizer=step)
        assert "dying_relu" not in found.labels
