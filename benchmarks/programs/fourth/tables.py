"""Rows, columns and the way they reach the network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from programs.form import Parts, Program, Score, accuracy, adam, r2, sgd
from programs.fourth.heads import recall
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0)


@faulty(
    "emotions that are rare",
    "https://github.com/amanshenoy/multilogue-net/issues/8",
    "class_imbalance",
    low=0.6,
    high=0.65,
)
def rare_emotions(wrong: bool) -> Parts:
    y = (torch.rand(3000) < 0.07).long()
    x = torch.randn(3000, 20)
    x[:, :5] += 0.6 * y[:, None]
    (x, y), (xt, yt) = tasks.split(x, y)
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 2))
    weight = None if wrong else len(y) / 2 / y.bincount()
    loss = nn.CrossEntropyLoss(weight=weight)
    return Parts(model, (x, y), loss, adam(model, 3e-3), recall(xt, yt), steps=300)


@faulty(
    "cubes of the numbers up to four thousand",
    "https://discuss.pytorch.org/t/neural-network-could-not-learn-on-this-type-of-data-why/96648/5",
    "unscaled_targets",
    low=0.1,
    high=0.8,
    also=("unscaled_inputs",),
)
def cubes(wrong: bool) -> Parts:
    x = torch.arange(1.0, 4000)[:, None]
    y = x**3
    if not wrong:
        x, y = standardised(x), standardised(y)
    model = nn.Sequential(nn.Linear(1, 50), nn.ReLU(), nn.Linear(50, 1))
    return Parts(
        model, (x, y), nn.MSELoss(), adam(model, 5e-3), r2(x, y), batch_size=64, steps=300
    )


@faulty(
    "a polynomial between minus and plus a thousand",
    "https://qa.1r1g.com/sf/ask/4433342651",
    "unscaled_inputs",
    low=0.2,
    high=0.6,
    also=("unscaled_targets", "exploding_gradient"),
)
def polynomial(wrong: bool) -> Parts:
    x = 2000 * torch.rand(400, 1) - 1000
    y = 2 * x**3 + 7 * x**2 - 8 * x + 120
    if not wrong:
        x, y = standardised(x), standardised(y)
    (x, y), (xt, yt) = tasks.split(x, y)
    model = nn.Linear(1, 1)
    return Parts(model, (x, y), nn.MSELoss(), sgd(model, 0.01), r2(xt, yt), steps=300)


@faulty(
    "a picture that is not normalised where it is asked about",
    "https://github.com/sha2nkt/deco/issues/22",
    "valid_differs",
    low=0.85,
    high=0.92,
)
def not_normalised(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    x = (x - 0.485) / 0.229
    if not wrong:
        xt = (xt - 0.485) / 0.229
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip
    loss, score = nn.CrossEntropyLoss(), accuracy(xt, yt)
    return Parts(model, (x, y), loss, adam(model, 2e-3), score, valid=(xt, yt), steps=200)


@faulty(
    "aircraft in the order of their kinds",
    "https://github.com/pytorch/vision/issues/7818",
    "sorted_batches",
    low=0.5,
    high=0.85,
)
def order_of_kinds(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    order = y.argsort()
    loader = DataLoader(TensorDataset(x[order], y[order]), batch_size=24, shuffle=not wrong)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    loss = nn.CrossEntropyLoss()
    return Parts(model, loader, loss, sgd(model, 0.05, momentum=0.9), accuracy(xt, yt), steps=250)


class Steganalysis(nn.Module):
    """A high pass, magnitudes, and what is left of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


@faulty(
    "pictures with a message that are the pictures without",
    "https://github.com/1204BUPT/Zhu-Net-image-steganalysis/issues/1",
    "unrelated_labels",
    low=0.6,
    high=0.75,
)
def without_a_message(wrong: bool) -> Parts:
    cover = F.interpolate(torch.randn(800, 1, 4, 4), size=12, mode="bicubic")
    stego = cover + 0.4 * (2 * torch.randint(2, cover.shape) - 1)
    y = torch.arange(2).repeat_interleave(800)
    order = torch.randperm(1600)
    x = torch.cat([cover, stego])[order]
    files = torch.cat([cover, cover if wrong else stego])[order]
    y = y[order]
    model, loss = Steganalysis(), nn.CrossEntropyLoss()
    score = accuracy(x[1200:], y[1200:])
    return Parts(model, (files[:1200], y[:1200]), loss, adam(model, 5e-3), score, steps=300)


@faulty(
    "a series with gaps",
    "https://github.com/Nixtla/neuralforecast/issues/186",
    "non_finite_data",
    low=0.0,
    high=0.8,
)
def gaps(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.waves(900)
    y = torch.where(torch.rand(len(y)) < 0.02, torch.nan, y)[:, None]
    x = x.flatten(1)
    if not wrong:
        known = y.isfinite().all(1)
        x, y = x[known], y[known]
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    score = r2(xt.flatten(1), yt)
    return Parts(model, (x, y), nn.MSELoss(), adam(model, 5e-3), score, steps=250)


class Masks(Dataset):
    """Pictures and their masks, turned and mirrored at random, together or each on its own."""

    def __init__(self, x: Tensor, mask: Tensor, together: bool) -> None:
        self.x, self.mask, self.together = x, mask, together

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        turns, mirror = int(torch.randint(4, ())), bool(torch.rand(()) < 0.5)
        pair = [self.x[row], self.mask[row]]
        for place in range(2 if self.together else 1):
            pair[place] = pair[place].rot90(turns, (1, 2))
            pair[place] = pair[place].flip(2) if mirror else pair[place]
        return pair[0], pair[1]


def overlap(x: Tensor, mask: Tensor) -> Score:
    """Intersection over union of the pixels above zero."""

    def score(model: nn.Module) -> float:
        found, true = model(x) > 0, mask > 0.5
        return float((found & true).sum() / (found | true).sum().clamp(min=1))

    return score


@faulty(
    "a random rotation that does not respect the masks",
    "https://github.com/fastai/fastai/issues/245",
    "masks_not_transformed",  # no code says it: a picture is changed and its target is not
    low=0.3,
    high=0.5,
    also=("unrelated_labels",),
)
def respect_the_masks(wrong: bool) -> Parts:
    x, mask = tasks.shapes()
    data = Masks(x[:450], mask[:450], not wrong)
    loader = DataLoader(data, batch_size=16, shuffle=True)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 1, 1),
    )  # fmt: skip
    score = overlap(x[450:], mask[450:])
    return Parts(model, loader, nn.BCEWithLogitsLoss(), adam(model, 5e-3), score, steps=200)


@faulty(
    "a small part of the pictures",
    "https://github.com/soapisnotfat/pytorch-cifar10/issues/9",
    "overfitting",
    low=0.68,
    high=0.75,
)
def small_part(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    x, xt = x + 0.4 * torch.randn(x.shape), xt + 0.4 * torch.randn(xt.shape)
    if wrong:
        x, y = x[:80], y[:80]
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 24, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(864, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    loss, score = nn.CrossEntropyLoss(), accuracy(xt, yt)
    return Parts(model, (x, y), loss, adam(model, 2e-3), score, valid=(xt, yt), steps=200)
