"""A search trains on the batches that the user's own loader draws."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from tikhon.data.stream import Stream
from tikhon.errors import DataError, InputError
from tikhon.tuning.draws import Draws, batch_size_of, read
from tikhon.tuning.space import Log, Space
from tikhon.tuning.tune import tune

ROWS = 60
X = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
DATA = TensorDataset(X, Y)


class Items(Dataset):
    """Rows as a tensor and a number of Python's."""

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        return X[i], int(Y[i])


class Even(Sampler):
    """A sampler of someone's own."""

    def __iter__(self):
        return iter(range(0, ROWS, 2))

    def __len__(self):
        return ROWS // 2


class Turned(Sampler):
    """Batches of someone's own, that change with the epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([[(k + self.epoch) % ROWS, (3 * k) % ROWS] for k in range(9)])

    def __len__(self):
        return 9


def doubled(batch):
    x, y = zip(*batch)
    return torch.stack(x) * 2, torch.tensor(y)


def generator():
    return torch.Generator().manual_seed(5)


WEIGHTS = torch.where(Y == 1, 20.0, 1.0)
LOADERS = {
    "weighted": lambda: DataLoader(Items(), 8, sampler=WeightedRandomSampler(WEIGHTS, ROWS)),
    "weighted, seeded": lambda: DataLoader(
        DATA, 8, sampler=WeightedRandomSampler(WEIGHTS, 30, generator=generator())
    ),
    "with replacement": lambda: DataLoader(
        Items(), 7, sampler=RandomSampler(Items(), replacement=True, num_samples=40)
    ),
    "a sampler of its own": lambda: DataLoader(Items(), 8, sampler=Even()),
    "batches of its own": lambda: DataLoader(Items(), batch_sampler=Turned()),
    "a batch sampler": lambda: DataLoader(
        Items(), batch_sampler=BatchSampler(RandomSampler(Items()), 9, drop_last=True)
    ),
    "a subset": lambda: DataLoader(Items(), 8, sampler=SubsetRandomSampler(range(20))),
    "in order": lambda: DataLoader(Items(), 8),
    "sequential batches": lambda: DataLoader(
        Items(), batch_sampler=BatchSampler(SequentialSampler(Items()), 16, drop_last=False)
    ),
    "drop_last": lambda: DataLoader(Items(), 16, shuffle=True, drop_last=True),
    "a generator": lambda: DataLoader(Items(), 16, shuffle=True, generator=generator()),
    "a collation": lambda: DataLoader(Items(), 8, sampler=Even(), collate_fn=doubled),
    "workers": lambda: DataLoader(Items(), 16, sampler=Even(), num_workers=1),
}


@pytest.mark.parametrize("name", LOADERS)
def test_batches_are_those_of_the_loader(name):
    given = LOADERS[name]()
    x, y, loader = read(given)
    drawn = Draws(len(y), batch_size_of(given) or 4, seed=3, loader=loader)
    theirs = Stream(LOADERS[name](), seed=3)
    assert drawn.batches == len(given)
    for epoch in (0, 1):
        batches = list(theirs.epoch(epoch))
        rows = drawn.epoch(epoch)
        assert len(rows) == len(batches)
        for index, (inputs, targets) in zip(rows, batches):
            assert torch.equal(x[index], inputs) and torch.equal(y[index], targets)


@pytest.mark.parametrize("data", [DataLoader(DATA, 16, shuffle=True), (X, Y), Items()])
def test_rows_that_are_only_shuffled_come_as_they_do_from_memory(data):
    x, y, loader = read(data)
    assert loader is None
    ours, plain = Draws(len(y), 16, 2), Stream((x, y), size=16, seed=2)
    for rows, (inputs, _) in zip(ours.epoch(1), plain.epoch(1), strict=True):
        assert torch.equal(x[rows], inputs)


@pytest.mark.parametrize("folds", [0, 3])
def test_a_search_learns_what_the_sampler_shows(folds):
    """Where one class is drawn 20 times as often, its probability rises; held-out rows do not."""
    given = {"space": Space(lr=Log(3e-2, 5e-2)), "budget": "2runs", "epochs": 12, "folds": folds}
    shares = []
    for data in (DataLoader(Items(), 8, shuffle=True), LOADERS["weighted"]()):
        found = tune(lambda: nn.Sequential(nn.Linear(5, 2)), data, **given)
        with torch.no_grad():
            shares.append(float(found.model(0 * X).softmax(1)[:, 1].mean()))
        assert found.settings["batch_size"] == 8
    assert shares[0] < 0.7 < shares[1]


def test_batches_that_a_fold_leaves_nothing_of_teach_nothing():
    found = tune(
        lambda: nn.Linear(5, 2), (X, Y), space=Space(lr=Log(1e-2, 2e-2)), budget="2runs",
        epochs=3, folds=3, batch_size=2,
    )  # fmt: skip
    assert not any(outcome.failed for outcome in found.history)


def test_rows_that_a_collation_multiplies_cannot_be_drawn_by_a_sampler():
    def twice(batch):
        x, y = doubled(batch)
        return torch.cat([x, x]), torch.cat([y, y])

    with pytest.raises(DataError, match=r"draws 60 rows by Even, but its collate_fn makes 120"):
        read(DataLoader(Items(), 8, sampler=Even(), collate_fn=twice))
    assert len(read(DataLoader(Items(), 8, shuffle=True, collate_fn=twice))[1]) == 2 * ROWS


def test_augmentation_that_is_read_once_is_told():
    class Noisy(Items):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + torch.randn(5), y

    with pytest.warns(UserWarning, match="those of Noisy differ each time"):
        read(Noisy())


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("adamm", "unknown optimizer 'adamm'; did you mean 'adam'"),
        (torch.optim.AdamW(nn.Linear(1, 1).parameters()), "each trial builds one of its own"),
        (3, "each trial builds one of its own"),
    ],
)
def test_optimizers_that_cannot_be_built_for_each_trial_are_refused(optimizer, message):
    with pytest.raises(InputError, match=message):
        tune(lambda: nn.Linear(5, 2), (X, Y), optimizer=optimizer, budget="2runs", epochs=2)


@pytest.mark.parametrize("labels", [2 * Y - 1, Y + 3])
def test_classes_that_are_not_numbered_by_the_outputs_are_named(labels):
    with pytest.raises(InputError, match="needs classes numbered 0 to 1, one for each output"):
        tune(lambda: nn.Linear(5, 2), (X, labels), budget="2runs", epochs=2)
