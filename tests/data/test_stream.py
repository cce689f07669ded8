"""One stream of batches for every form of data: numbered, the same from wherever it is read."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import tikhon as tk
from tikhon.data.batches import pair
from tikhon.data.nested import tensors
from tikhon.data.stream import Stream
from tikhon.errors import DataError, InputError

X, Y = torch.arange(18.0).view(9, 2), torch.arange(9) % 3


class Items(Dataset):
    """Rows one by one, with noise of their own where `std` is given."""

    def __init__(self, std: float = 0.0) -> None:
        self.std = std

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + self.std * torch.randn(2), Y[i]


class Read(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y))


def named(batch):
    return {"x": torch.stack([x for x, _ in batch]), "labels": torch.stack([y for _, y in batch])}


IN_MEMORY = {
    "tensors": (X, Y),
    "arrays": (X.numpy(), Y.numpy()),
    "frame": (pd.DataFrame(X.numpy(), columns=["a", "b"]), pd.Series(Y.numpy())),
    "lists": (X.tolist(), Y.tolist()),
    "names": {"x": X, "labels": Y},
    "tensor data set": TensorDataset(X, Y),
    "data set": Items(),
    "rows in a list": [(x, int(y)) for x, y in zip(X, Y)],
    "named rows in a list": [{"x": x, "labels": y} for x, y in zip(X, Y)],
}
LOADERS = {
    "in order": DataLoader(TensorDataset(X, Y), 4),
    "shuffled": DataLoader(TensorDataset(X, Y), 4, shuffle=True),
    "items": DataLoader(Items(), 4, shuffle=True),
    "noise": DataLoader(Items(1.0), 4, shuffle=True),
    "names": DataLoader(Items(), 4, shuffle=True, collate_fn=named),
    "weights": DataLoader(Items(), 4, sampler=WeightedRandomSampler(Y + 1.0, 9)),
    "last dropped": DataLoader(Items(1.0), 4, drop_last=True),
    "generator": DataLoader(Items(), 4, shuffle=True, generator=torch.Generator()),
}


def batches(data, count, **settings):
    stream = Stream(data, size=4, seed=1, **settings)
    return [stream.batch(k) for k in range(count)]


def same(found, wanted):
    pairs = zip(tensors(found), tensors(wanted), strict=True)
    return all(torch.equal(a.float(), b.float()) for a, b in pairs)


@pytest.mark.parametrize("form", IN_MEMORY)
def test_nine_rows_in_fours_make_the_same_batches_in_every_form(form):
    found, wanted = batches(IN_MEMORY[form], 4), batches((X, Y), 4)
    assert [len(y) for _, y in found] == [4, 5, 4, 5]
    assert same(found, wanted)
    assert same(pair(IN_MEMORY[form]), (X, Y))


@pytest.mark.parametrize("form", LOADERS)
def test_a_loader_is_read_as_it_is_and_by_number(form):
    data = LOADERS[form]
    stream = Stream(data, size=64, seed=1)
    count = 3 * len(data)
    found = batches(data, count)
    assert stream.batches == len(data)
    assert [len(y) for _, y in found] == ([4, 4] if form == "last dropped" else [4, 4, 1]) * 3
    assert same([stream.batch(k) for k in reversed(range(count))][::-1], found)
    assert same(list(stream.epoch(1, 1)), found[len(data) + 1 : 2 * len(data)])
    if form != "in order":
        epochs = found[: len(data)], found[len(data) : 2 * len(data)]
        assert not same(*epochs), "another order or other noise in every epoch"


def test_the_loader_leaves_the_random_numbers_of_training_alone():
    stream, state = Stream(LOADERS["noise"], seed=1), torch.get_rng_state()
    stream.batch(0), stream.batch(4)
    assert torch.equal(state, torch.get_rng_state())


def test_what_has_no_length_is_read_onwards_again_and_again():
    stream = Stream(DataLoader(Read(), 4))
    assert stream.batches is None
    assert [len(stream.batch(k)[1]) for k in range(6)] == [4, 4, 1] * 2
    assert same(pair(DataLoader(Read(), 4)), (X, Y))


@pytest.mark.parametrize("form", ["in order", "shuffled", "items", "names", "last dropped"])
def test_a_loader_read_whole_gives_every_row_once_in_order(form):
    _, y = pair(LOADERS[form])
    assert len(y) == 9
    assert torch.equal(y, Y)


def test_rows_that_are_not_drawn_once_are_refused_by_the_sampler_s_name():
    with pytest.raises(DataError, match="train: the loader draws its rows by WeightedRandomS"):
        pair(LOADERS["weights"], name="train")
    subset = DataLoader(Items(), 2, sampler=SubsetRandomSampler([5, 1, 3]))
    assert torch.equal(pair(subset)[1], Y[[1, 3, 5]])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pd.DataFrame({"a": [1.0]}), "received DataFrame"),
        ((pd.DataFrame({"a": ["u", "v"]}), [0, 1]), "x must be numeric"),
        ((X, np.array(list("abcabcabc"))), "y must be numeric"),
        ((X,), "received inputs alone"),
        ({"x": X}, "received the names x"),
        (((X, X[:5]), Y), "different numbers of rows"),
        (iter([]), "no batch"),
    ],
)
def test_data_that_cannot_be_read_are_refused_in_a_sentence(data, said):
    with pytest.raises(DataError, match=f"train.*{said}"):
        pair(data, name="train")


class One(nn.Sequential):
    def forward(self, x):
        return super().forward(x)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, a, b):
        return self.out(torch.cat([a, b], 1))


def test_rows_and_batches_that_come_one_after_another_are_all_read():
    batches = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    for rows in (Read(), iter(batches), (batch for batch in batches)):
        x, y = pair(rows)
        assert torch.equal(x, X) and torch.equal(y, Y)
    for _ in range(2):  # an iterator has a start but once: its rows are kept
        stream = Stream(iter(batches), size=4)
        assert sorted(torch.cat([stream.batch(k)[1] for k in range(3)])) == sorted(Y)
        assert len(stream.batch(7)[1]) > 0
    assert len(Stream(Read(), size=4).batch(3)[1]) == 9


def test_labels_that_are_words_are_named_as_such():
    with pytest.raises(DataError, match="train y must be numeric, received an array of <U1") as e:
        pair((X, np.array(["a", "b", "c"])[Y]), name="train")
    assert "pad" not in str(e.value)


INPUTS = {
    "tuple": ((X, X / 2), Y),
    "three": (X, X / 2, Y),
    "names": {"a": X, "b": X / 2, "labels": Y},
    "pair of names": ({"a": X, "b": X / 2}, Y),
    "loader": DataLoader(TensorDataset(X, X / 2, Y), 9),
    "data set": TensorDataset(X, X / 2, Y),
}


@pytest.mark.parametrize("form", INPUTS)
def test_models_of_several_inputs_train_on_every_form(form):
    def run(data):
        torch.manual_seed(0)
        return tk.fit(Two(), data, valid=data, epochs=3, batch_size=9, lr=0.1)

    found, wanted = run(INPUTS[form]).metrics, run(INPUTS["tuple"]).metrics
    assert found["valid/loss"] == pytest.approx(wanted["valid/loss"], rel=1e-5)
    with pytest.raises(InputError, match="mixup changes one tensor"):
        tk.fit(Two(), INPUTS[form], tk.Recipe(mixup=0.2), epochs=1)


@pytest.mark.parametrize("form", LOADERS)
def test_a_run_on_a_loader_resumes_bit_for_bit(form, tmp_path):
    def run(folder, stop_at, **more):
        torch.manual_seed(0)
        model = One(nn.Linear(2, 8), nn.Dropout(0.3), nn.Linear(8, 3))
        calls = iter(range(10**6))
        return tk.fit(
            model, LOADERS[form], epochs=3, seed=2, output=folder, schedule="cosine",
            stop=lambda: next(calls) + 1 == stop_at, **more,
        )  # fmt: skip

    whole = run(tmp_path / "whole", -1)
    assert run(tmp_path / "cut", 3).ended == "stopped"
    again = run(tmp_path / "cut", -1, resume=True)
    for a, b in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["batches", "onwards"])
def test_a_loader_without_a_batch_size_has_batches_as_items(kind):
    x, y = torch.randn(12, 3), torch.arange(12)
    parts = [(x[:5], y[:5]), (x[5:], y[5:])]

    class Onwards(IterableDataset):
        def __iter__(self):
            return iter(parts)

    loader = DataLoader(parts if kind == "batches" else Onwards(), batch_size=None)
    stream = Stream(loader)
    assert [len(stream.batch(k)[1]) for k in range(3)] == [5, 7, 5]
    assert all(torch.equal(*both) for both in zip(pair(loader), (x, y)))


@pytest.mark.parametrize("read", [Stream, pair])
def test_a_loader_of_single_rows_is_refused(read):
    rows = TensorDataset(torch.randn(12, 3), torch.arange(12))
    with pytest.raises(DataError, match=r"single rows .*batch_size"):
        read(DataLoader(rows, batch_size=None))
