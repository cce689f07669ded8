"""Data that say nothing, say too much, or come in the wrong size or order."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from programs.form import Parts, Program, accuracy, adam, r2, sgd
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)
CE = nn.CrossEntropyLoss()


def convolution() -> nn.Sequential:
    """A small network for digits."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip


@faulty(
    "labels taken before the shuffle",
    "https://github.com/Borda/kaggle_image-classify/pull/12",
    "unrelated_labels",
    low=0.25,
    high=0.9,
)
def shuffled(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    if wrong:
        y = y[torch.randperm(len(y))]
    model = convolution()
    return Parts(model, (x, y), CE, adam(model, 5e-3), accuracy(xt, yt), steps=200)


@faulty(
    "house prices as they are in the file",
    "https://github.com/blackportal-ai/delta/issues/248",
    "unscaled_inputs",
    low=0.2,
    high=0.75,
    also=("unscaled_targets",),
)
def houses(wrong: bool) -> Parts:
    people = 300 + 3000 * torch.rand(1000)
    income, age = 15 * torch.rand(1000), 50 * torch.rand(1000)
    price = 50000 + 25000 * income - 1000 * age + 10 * people + 20000 * torch.randn(1000)
    x, y = torch.stack([income, age, people], 1), price[:, None]
    if not wrong:
        x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    (xs, ys), (xt, yt) = tasks.split(x, y)
    model = nn.Linear(3, 1)
    return Parts(model, (xs, ys), nn.MSELoss(), sgd(model, 1e-2), r2(xt, yt), steps=300)


@faulty(
    "targets that were not normalised",
    "https://github.com/DeepRank/deeprank/issues/16",
    "unscaled_targets",
    low=0.4,
    high=0.85,
)
def unscaled(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.surface()
    if wrong:
        y, yt = 4000 + 900 * y, 4000 + 900 * yt
    model = nn.Sequential(
        nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    return Parts(model, (x, y), nn.MSELoss(), adam(model, 3e-3), r2(xt, yt), steps=400)


@faulty(
    "normalised to train, not to test",
    "https://github.com/JeasunLok/ResNet-pytorch/issues/1",
    "valid_differs",
    low=0.87,
    high=0.94,
)
def not_to_test(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits(1.0)
    middle, spread = x.mean(0), x.std(0) + 0.1
    x = (x - middle) / spread
    xt = xt / 16 if wrong else (xt - middle) / spread
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    return Parts(model, (x, y), CE, adam(model, 3e-3), accuracy(xt, yt), valid=(xt, yt), steps=200)


@faulty(
    "the result among the columns",
    "https://github.com/pytorch-tabular/pytorch_tabular/issues/21",
    "target_among_inputs",
    low=0.5,
    high=0.75,
)
def result_column(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.surface(noise=0.2)
    if wrong:
        x = torch.cat([x, y], 1)
        xt = torch.cat([xt, torch.zeros_like(yt)], 1)  # nobody knows it when it is asked for
    model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 1))
    return Parts(model, (x, y), nn.MSELoss(), adam(model), r2(xt, yt), steps=400)


@faulty(
    "one answer for every picture",
    "https://github.com/collinzrj/Bugs/issues/18",
    "class_imbalance",
    low=0.65,
    high=0.72,
)
def rare(wrong: bool) -> Parts:
    y = (torch.rand(3000) < 0.03).long()
    x = torch.randn(3000, 10) + 0.6 * y[:, None]
    (xs, ys), (xt, yt) = tasks.split(x, y)
    model = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 2))
    weight = None if wrong else torch.tensor([0.52, 16.7])

    def score(m: nn.Module) -> float:  # mean of the two recalls
        right = (m(xt).argmax(1) == yt).float()
        return float(right[yt == 0].mean() + right[yt == 1].mean()) / 2

    loss = nn.CrossEntropyLoss(weight=weight)
    return Parts(model, (xs, ys), loss, adam(model, 1e-3), score, batch_size=64, steps=250)


@faulty(
    "a loader without shuffle",
    "https://github.com/Deci-AI/super-gradients/issues/416",
    "sorted_batches",
    low=0.5,
    high=0.85,
)
def sorted_rows(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    order = y.argsort()
    rows = TensorDataset(x[order], y[order])
    model = convolution()
    loader = DataLoader(rows, batch_size=32, shuffle=not wrong)
    engine = sgd(model, 0.05, momentum=0.9)
    return Parts(model, loader, CE, engine, accuracy(xt, yt), steps=190)


@faulty(
    "pixels divided as integers",
    "https://github.com/timsainb/Tensorflow-MultiGPU-VAE-GAN/issues/5",
    "constant_inputs",
    low=0.2,
    high=0.9,
)
def black(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits(1.0)
    if wrong:
        x, xt = (x.long() // 17).float(), (xt.long() // 17).float()
    else:
        x, xt = x / 16, xt / 16
    model = convolution()
    return Parts(model, (x, y), CE, adam(model, 5e-3), accuracy(xt, yt), steps=200)


@faulty(
    "a large network and few rows",
    "https://github.com/duggalrahul/AlexNet-Experiments-Keras/issues/4",
    "overfitting",
    low=0.75,
    high=0.78,
)
def few_rows(wrong: bool) -> Parts:
    x = torch.randn(1400, 30)
    y = (x[:, 0] + x[:, 1] + 0.7 * torch.randn(1400) > 0).long()
    rows, width = (60, 512) if wrong else (1000, 8)
    model = nn.Sequential(nn.Linear(30, width), nn.ReLU(), nn.Linear(width, 2))
    train, test = (x[:rows], y[:rows]), (x[1000:], y[1000:])
    return Parts(model, train, CE, adam(model, 3e-3), accuracy(*test), valid=test, steps=250)


class Windows(nn.Module):
    """A convolution over a series, as a denoiser of sound."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(1, 12, 5, padding=2), nn.Tanh(), nn.Conv1d(12, 1, 5, padding=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@faulty(
    "a delay of zero",
    "https://github.com/sdatkinson/neural-amp-modeler/pull/20",
    "constant_inputs",
    low=0.1,
    high=0.75,
)
def delay(wrong: bool) -> Parts:
    time = torch.arange(40)
    dry = torch.sin(time * (0.2 + 0.5 * torch.rand(500, 1, 1)) + 6 * torch.rand(500, 1, 1))
    wet = torch.tanh(2 * dry) - 0.4 * dry.roll(1, 2)
    (xs, ys), (xt, yt) = tasks.split(dry + 0.1 * torch.randn_like(dry), wet)
    if wrong:
        xs, xt = torch.zeros_like(xs), torch.zeros_like(xt)
    model = Windows()
    return Parts(model, (xs, ys), nn.MSELoss(), adam(model, 5e-3), r2(xt, yt), steps=250)
