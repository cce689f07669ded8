"""Data that are read, cut, scaled or labelled the wrong way."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from programs.form import Parts, Program, accuracy, adam, r2, sgd
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)
CE = nn.CrossEntropyLoss()


class Tracks(Dataset):
    """Noisy and clean signals; `stuck` forgets to move on in the file."""

    def __init__(self, noisy: Tensor, clean: Tensor, stuck: bool) -> None:
        self.noisy, self.clean, self.stuck = noisy, clean, stuck

    def __len__(self) -> int:
        return len(self.noisy)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = 0 if self.stuck else index
        return self.noisy[row], self.clean[row]


@faulty(
    "the first sample of the file again and again",
    "https://github.com/NVIDIA-Genomics-Research/AtacWorks/issues/207",
    "constant_inputs",
    low=0.3,
    high=0.7,
    also=("constant_targets",),
)
def tracks(wrong: bool) -> Parts:
    place = torch.arange(32)
    peak = torch.randint(4, 28, (600, 1))
    clean = torch.exp(-((place - peak) ** 2) / 8.0)
    noisy = clean + 0.2 * torch.randn(600, 32)
    model = nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 32))
    rows = Tracks(noisy[:450], clean[:450], stuck=wrong)
    loader = DataLoader(rows, batch_size=32, shuffle=True)
    score = r2(noisy[450:], clean[450:])
    return Parts(model, loader, nn.MSELoss(), adam(model), score, steps=200)


@faulty(
    "pictures turned, masks not",
    "https://github.com/mdbloice/Augmentor/issues/205",
    "unrelated_labels",
    low=0.4,
    high=0.7,
    also=("masks_not_transformed",),
)
def turned(wrong: bool) -> Parts:
    x, y = tasks.shapes()
    xt, yt = x[450:], y[450:]
    times = torch.randint(4, (450,)).tolist()
    pictures = torch.stack([p.rot90(k, (1, 2)) for p, k in zip(x[:450], times, strict=True)])
    masks = torch.stack([m.rot90(k, (1, 2)) for m, k in zip(y[:450], times, strict=True)])
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 1, 1),
    )
    probable = r2(xt, yt)
    return Parts(
        model,
        (pictures, y[:450] if wrong else masks),
        nn.BCEWithLogitsLoss(),
        adam(model),
        lambda m: probable(nn.Sequential(m, nn.Sigmoid())),
        batch_size=16,
        steps=200,
    )


@faulty(
    "views divided by 255 twice",
    "https://github.com/anishmadan23/deep3d-pytorch/issues/1",
    "unscaled_inputs",
    low=0.2,
    high=0.6,
    also=("unscaled_targets",),
)
def views(wrong: bool) -> Parts:
    (left, _), (left_test, _) = tasks.digits()
    left, left_test = left.view(-1, 1, 8, 8), left_test.view(-1, 1, 8, 8)
    if wrong:
        left, left_test = left / 255, left_test / 255
    right, right_test = left.roll(1, 3), left_test.roll(1, 3)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 1, 3, padding=1)
    )
    score = r2(left_test, right_test)
    engine = sgd(model, 0.1, momentum=0.9)
    return Parts(model, (left, right), nn.MSELoss(), engine, score, batch_size=64, steps=250)


@faulty(
    "a thermostat among the columns",
    "https://github.com/fastai/fastai/issues/889",
    "non_finite_data",
    low=-0.5,
    high=0.7,
)
def thermostat(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.surface()
    x = torch.cat([x, torch.full((len(x), 1), 20.0)], 1)
    xt = torch.cat([xt, torch.full((len(xt), 1), 20.0)], 1)
    middle, spread = x.mean(0), x.std(0)
    if not wrong:
        spread = torch.where(spread > 0, spread, torch.ones(()))
    x, xt = (x - middle) / spread, (xt - middle) / spread
    model = nn.Sequential(nn.Linear(7, 64), nn.ReLU(), nn.Linear(64, 1))
    return Parts(model, (x, y), nn.MSELoss(), adam(model), r2(xt, yt), steps=300)


@faulty(
    "run times that are all above their threshold",
    "https://github.com/Smadx/USTC-ML24-Fall/issues/35",
    "constant_targets",
    low=0.65,
    high=0.85,
)
def run_times(wrong: bool) -> Parts:
    x = torch.randn(900, 10)
    time = torch.exp(5 + x[:, 0] - x[:, 1] + 0.5 * x[:, 2] * x[:, 3] + 0.2 * torch.randn(900))
    slow = (time.log() > 5).long()  # the median of the logarithm
    y = (time > 5).long() if wrong else slow
    model = nn.Sequential(nn.Linear(10, 48), nn.ReLU(), nn.Linear(48, 2))
    score = accuracy(x[700:], slow[700:])
    return Parts(model, (x[:700], y[:700]), CE, adam(model, 5e-3), score, steps=250)


@faulty(
    "the last fifth of sorted pictures",
    "https://github.com/keras-team/keras/issues/8346",
    "valid_differs",
    low=0.2,
    high=0.85,
)
def last_fifth(wrong: bool) -> Parts:
    (x, y), _ = tasks.digits()
    order = y.argsort() if wrong else torch.randperm(len(y))
    x, y = x[order], y[order]
    cut = 4 * len(y) // 5
    valid = (x[cut:], y[cut:])
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(192, 10),
    )
    return Parts(
        model, (x[:cut], y[:cut]), CE, adam(model, 5e-3), accuracy(*valid), valid=valid, steps=250
    )


class Forecaster(nn.Module):
    """An LSTM over covariates and past values."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.LSTM(2, 32, batch_first=True)
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0][:, -1])


@faulty(
    "the value of this hour beside the hour",
    "https://github.com/sktime/pytorch-forecasting/issues/182",
    "target_among_inputs",
    low=0.6,
    high=0.8,
)
def this_hour(wrong: bool) -> Parts:
    weather = torch.randn(800, 11)
    load = [torch.randn(800)]
    for hour in range(1, 11):
        load.append(0.5 * load[-1] + weather[:, hour] + 0.1 * torch.randn(800))
    values = torch.stack(load, 1)
    known = torch.stack([weather[:, 1:], values[:, :-1]], 2)  # up to the hour before
    leaky = torch.stack([weather[:, 1:], values[:, 1:]], 2)
    target = values[:, -1:]
    test = known[600:]
    if wrong:  # what is asked for is not known yet: the hour before stands in
        test = leaky[600:].clone()
        test[:, -1, 1] = test[:, -2, 1]
    x = leaky if wrong else known
    model = Forecaster()
    score = r2(test, target[600:])
    return Parts(model, (x[:600], target[:600]), nn.MSELoss(), adam(model), score, steps=250)


@faulty(
    "points around ninety-two",
    "https://newbe.dev/pytorch-binary-classification-same-network-structure-simpler-data-but-worse-performance",
    "unscaled_inputs",
    low=0.85,
    high=0.9,
    also=("saturated_activation", "slow_convergence"),
)
def ninety_two(wrong: bool) -> Parts:
    x = 92 + 12 * torch.randn(800, 2)
    y = (x - 92).norm(dim=1) < 14
    if not wrong:
        x = (x - x[:600].mean(0)) / x[:600].std(0)
    goal = y[:, None].float()
    model = nn.Sequential(nn.Linear(2, 16), nn.Sigmoid(), nn.Linear(16, 1), nn.Sigmoid())

    def score(m: nn.Module) -> float:
        return float(((m(x[600:]) > 0.5) == (goal[600:] > 0.5)).float().mean())

    engine = adam(model, 1e-3 if wrong else 5e-2)
    return Parts(model, (x[:600], goal[:600]), nn.BCELoss(), engine, score, steps=300)


class Relations(nn.Module):
    """Means of word vectors that are read from a file, and a linear head."""

    def __init__(self, vectors: Tensor, wrong: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(*vectors.shape)
        if wrong:
            self.words.from_pretrained(vectors, freeze=False)  # a new layer, and nobody takes it
        else:
            self.words = nn.Embedding.from_pretrained(vectors, freeze=False)
        self.head = nn.Linear(vectors.shape[1], 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.words(tokens).mean(1))


@faulty(
    "word vectors that nobody takes",
    "https://github.com/fenchri/edge-oriented-graph/issues/12",
    "weights_not_loaded",  # no code says it: a network of random vectors learns by heart
    low=0.65,
    high=0.85,
    also=("overfitting",),
)
def word_vectors(wrong: bool) -> Parts:
    topic = torch.arange(400) % 4
    vectors = 1.5 * torch.randn(4, 24)[topic] + torch.randn(400, 24)
    y = torch.randint(4, (400,))
    tokens = torch.randint(400, (400, 8))
    own = torch.randint(100, (400, 4)) * 4 + y[:, None]
    tokens[:, :4] = own
    model = Relations(vectors, wrong)
    test = (tokens[60:], y[60:])
    return Parts(
        model, (tokens[:60], y[:60]), CE, adam(model), accuracy(*test), valid=test, steps=200
    )


def pretrained() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A body that knows the ten digits, and the mean and deviation it was trained with."""
    (x, y), _ = tasks.digits()
    x = 1 - x  # dark on white
    middle, spread = x.mean(0), x.std()
    layers = [m for _ in range(3) for m in (nn.Linear(48, 48), nn.Tanh())]
    body = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), *layers)
    whole = nn.Sequential(body, nn.Linear(48, 10))
    engine = torch.optim.Adam(whole.parameters(), lr=3e-3)
    for _ in range(250):
        rows = torch.randint(len(y), (64,))
        engine.zero_grad()
        CE(whole((x[rows] - middle) / spread), y[rows]).backward()
        engine.step()
    return body.requires_grad_(False), middle, spread


@faulty(
    "fine-tuning on pictures as they are",
    "https://github.com/tflearn/tflearn/issues/391",
    "unscaled_inputs",
    low=0.85,
    high=0.92,
    also=("saturated_activation",),
)
def fine_tuning(wrong: bool) -> Parts:
    body, middle, spread = pretrained()
    (x, y), (xt, yt) = tasks.digits()
    x, xt, y, yt = 1 - x, 1 - xt, y % 2, yt % 2  # the new task: odd or even
    if wrong:
        x, xt = 255 * x, 255 * xt
    else:
        x, xt = (x - middle) / spread, (xt - middle) / spread
    model = nn.Sequential(body, nn.Linear(48, 2))
    engine = torch.optim.Adam(model[1].parameters(), lr=1e-2)
    return Parts(model, (x, y), CE, engine, accuracy(xt, yt), steps=200)
