"""Tables, ratings and series of numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from programs.form import Parts, Program, accuracy, adam, r2, sgd
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


class CategoryEmbedding(nn.Module):
    """Continuous columns behind a norm, a category, and two layers."""

    def __init__(self, continuous: int, categories: int) -> None:
        super().__init__()
        self.normalizing_batch_norm = nn.BatchNorm1d(continuous)
        self.embedding = nn.Embedding(categories, 3)
        self.backbone = nn.Sequential(
            nn.Linear(continuous + 3, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()
        )
        self.head = nn.Linear(32, 1)

    def forward(self, continuous: Tensor, category: Tensor) -> Tensor:
        x = [self.normalizing_batch_norm(continuous), self.embedding(category)]
        return self.head(self.backbone(torch.cat(x, 1)))


@faulty(
    "continuous columns whose gaps are not filled",
    "https://github.com/pytorch-tabular/pytorch_tabular/issues/173",
    "non_finite_data",
    low=0.0,
    high=0.5,
)
def not_filled(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.surface(1200)
    kind, kt = torch.randint(4, (900,)), torch.randint(4, (300,))
    y, yt = y + kind[:, None], yt + kt[:, None]
    x[torch.rand(900) < 0.03, 4] = torch.nan
    if not wrong:
        x[:, 4] = torch.where(x[:, 4].isnan(), x[:, 4].nanmean(), x[:, 4])
    model = CategoryEmbedding(6, 4)
    loader = DataLoader(TensorDataset(x, kind, y), batch_size=64, shuffle=True)
    pairs = DataLoader(
        loader.dataset, 64, shuffle=True,
        collate_fn=lambda rows: (
            (torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])),
            torch.stack([r[2] for r in rows]),
        ),
    )  # fmt: skip
    return Parts(model, pairs, nn.MSELoss(), adam(model, 5e-3), r2((xt, kt), yt), steps=250)


@faulty(
    "targets that are missing and left out by a nanmean",
    "https://github.com/BLAST-AI-ML/synapse/pull/237",
    "undefined_operation",
    low=0.0,
    high=0.6,
    also=("non_finite_data",),
)
def left_out(wrong: bool) -> Parts:
    x = torch.randn(800, 4)
    y = torch.stack([torch.sin(x[:, 0]) + x[:, 1], x[:, 2] * x[:, 0], x[:, 3].abs()], 1)
    true = y[600:].clone()
    y[torch.rand(800, 3) < 0.1] = torch.nan
    model = nn.Sequential(
        nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)
    )

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if wrong:
            return torch.nanmean((output - target) ** 2)
        there = ~target.isnan()
        return F.mse_loss(output[there], target[there])

    loader = DataLoader(TensorDataset(x[:600], y[:600]), batch_size=32, shuffle=True)
    return Parts(model, loader, loss, adam(model, 5e-3), r2(x[600:], true), steps=300)


@faulty(
    "a property that is always worth one",
    "https://github.com/BrainJS/brain.js/issues/360",
    "unscaled_targets",
    low=0.0,
    high=0.6,
    also=("head_mismatch", "unscaled_inputs", "saturated_activation"),
)
def always_worth_one(wrong: bool) -> Parts:
    year = torch.randint(1900, 2018, (700, 1)).float()
    sqft = 500 + 6000 * torch.rand(700, 1)
    units = torch.randint(1, 12, (700, 1)).float()
    income = 9e3 * units + 4 * sqft + 4e3 * torch.randn(700, 1)
    price = 8 * income + 90 * sqft + 2e3 * (year - 1900)
    x = torch.cat([year, sqft, units, income], 1)
    if not wrong:
        low, high = x.min(0).values, x.max(0).values
        x, price = (x - low) / (high - low), (price - price.min()) / (price.max() - price.min())
    net = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 1), nn.Sigmoid())
    optimizer = sgd(net, 0.3, momentum=0.1)
    score = r2(x[500:], price[500:])
    return Parts(
        net, (x[:500], price[:500]), nn.MSELoss(), optimizer, score, batch_size=1, steps=2000
    )


@faulty(
    "small columns that are divided by the largest of all",
    "https://github.com/BrainJS/brain.js/issues/528",
    "unscaled_inputs",
    low=0.4,
    high=0.7,
    also=("slow_convergence", "underfitting"),
)
def largest_of_all(wrong: bool) -> Parts:
    x = torch.rand(900, 4)
    y = torch.sin(6 * x[:, 0]) + 2 * x[:, 1] * x[:, 2] + 0.2 * x[:, 3]
    x = x * torch.tensor([5.0, 5.0, 8.0, 2000.0])
    x = x / (x.max() if wrong else x.max(0).values)
    y = ((y - y.mean()) / y.std())[:, None]
    model = nn.Sequential(
        nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )
    loader = DataLoader(TensorDataset(x[:700], y[:700]), batch_size=32, shuffle=True)
    optimizer = sgd(model, 0.1, momentum=0.9)
    return Parts(model, loader, nn.MSELoss(), optimizer, r2(x[700:], y[700:]), steps=400)


class FM(nn.Module):
    """A factorization machine over fields of categories."""

    def __init__(self, field_dims: list[int], num_factors: int, squashed: bool) -> None:
        super().__init__()
        self.offsets = torch.tensor([0, *field_dims[:-1]]).cumsum(0)
        self.embedding = nn.Embedding(sum(field_dims), num_factors)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.fc, self.linear_layer = nn.Embedding(sum(field_dims), 1), nn.Linear(1, 1)
        self.squashed = squashed

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.offsets
        square_of_sum = self.embedding(x).sum(1) ** 2
        sum_of_square = (self.embedding(x) ** 2).sum(1)
        pairs = 0.5 * (square_of_sum - sum_of_square).sum(1, keepdim=True)
        out = self.linear_layer(self.fc(x).sum(1)) + pairs
        return torch.sigmoid(out) if self.squashed else out


@faulty(
    "a factorization machine that is squashed twice",
    "https://github.com/d2l-ai/d2l-en/issues/1360",
    "head_mismatch",
    low=0.65,
    high=0.75,
)
def squashed_twice(wrong: bool) -> Parts:
    fields = [12, 8, 15]
    x = torch.stack([torch.randint(n, (2000,)) for n in fields], 1)
    taste = torch.randn(12, 8) + 0.5 * torch.randn(12, 1)
    y = (taste[x[:, 0], x[:, 1]] + 0.3 * torch.randn(2000) > 0).float()[:, None]
    (x, y), (xt, yt) = tasks.split(x, y)
    net = FM(fields, 8, wrong)
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    loss = nn.BCEWithLogitsLoss()
    return Parts(net, loader, loss, adam(net, 2e-2), accuracy(xt, yt), steps=300)


class Caser(nn.Module):
    """How well items go with what a user bought last."""

    def __init__(self, items: int, dims: int) -> None:
        super().__init__()
        self.item_embeddings = nn.Embedding(items, dims)
        self.fc1 = nn.Linear(3 * dims, dims)
        self.W2, self.b2 = nn.Embedding(items, dims), nn.Embedding(items, 1)
        nn.init.normal_(self.W2.weight, std=1.0 / dims)
        nn.init.zeros_(self.b2.weight)

    def forward(self, sequence: Tensor, items: Tensor) -> Tensor:
        x = F.relu(self.fc1(self.item_embeddings(sequence).flatten(1)))
        return (self.W2(items) @ x[..., None])[..., 0] + self.b2(items)[..., 0]


@faulty(
    "a logarithm of one minus a certainty",
    "https://github.com/graytowne/caser_pytorch/issues/2",
    "undefined_operation",
    low=0.2,
    high=0.6,
    also=("non_finite_data", "exploding_gradient"),
)
def one_minus_a_certainty(wrong: bool) -> Parts:
    follows = torch.randperm(60)
    sequence = torch.randint(60, (1500, 3))
    bought = follows[sequence[:, 2]]
    model = Caser(60, 24)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        sequence, bought = batch
        sampled = torch.randint(60, (len(bought), 3))
        positive = model(sequence, bought[:, None])
        negative = model(sequence, sampled)
        if not wrong:
            positive, negative = positive.clamp(-10, 10), negative.clamp(-10, 10)
        return (
            -torch.log(torch.sigmoid(positive)).mean()
            - torch.log(1 - torch.sigmoid(negative)).mean()
        )

    def score(m: nn.Module) -> float:  # share of the purchases among the three best
        found = m(sequence[1200:], torch.arange(60).expand(300, 60)).topk(3).indices
        return float((found == bought[1200:, None]).any(1).float().mean())

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2, weight_decay=1e-6)
    return Parts(
        model, (sequence[:1200], bought[:1200]), loss, optimizer, score, batch_size=64, steps=400
    )


class Encoder(nn.Module):
    """A GRU over the steps of a series, and the next number."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(1, 24, batch_first=True)
        self.linear = nn.Linear(24, 1)

    def forward(self, series: Tensor) -> Tensor:
        return self.linear(self.gru(series)[1][0])


@faulty(
    "series that go into a recurrence as they are",
    "https://github.com/mindsdb/lightwood/issues/170",
    "unscaled_inputs",
    low=0.3,
    high=0.7,
    also=("unscaled_targets", "saturated_activation"),
)
def as_they_are(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.waves(800)
    level = 4000.0, 900.0
    x, y, xt, yt = (level[1] * v + level[0] for v in (x, y, xt, yt))
    if not wrong:
        x, y, xt, yt = ((v - level[0]) / level[1] for v in (x, y, xt, yt))
    model = Encoder()
    loader = DataLoader(TensorDataset(x, y[:, None]), batch_size=32, shuffle=True)
    return Parts(model, loader, nn.MSELoss(), adam(model, 5e-3), r2(xt, yt[:, None]), steps=250)


class Multilayer(nn.Module):
    """Two hidden layers by hand."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.h1, self.h2 = nn.Linear(2, 32), nn.Linear(32, 32)
        self.out = nn.Linear(32, 3)
        self.activation = F.relu if relu else (lambda h: h)

    def forward(self, x: Tensor) -> Tensor:
        layer_1 = self.activation(self.h1(x))
        layer_2 = self.activation(self.h2(layer_1))
        return self.out(layer_2)


@faulty(
    "a perceptron of many layers and no activation",
    "https://github.com/aymericdamien/TensorFlow-Examples/issues/209",
    "no_nonlinearity",
    low=0.65,
    high=0.85,
)
def no_activation(wrong: bool) -> Parts:
    y = torch.randint(3, (1600,))
    radius = y + 1 + 0.15 * torch.randn(1600)
    angle = 6.28 * torch.rand(1600)
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    (x, y), (xt, yt) = tasks.split(x, y)
    model = Multilayer(not wrong)
    return Parts(
        model, (x, y), nn.CrossEntropyLoss(), adam(model, 1e-2), accuracy(xt, yt), steps=250
    )


@faulty(
    "a bound on the gradient that every batch meets",
    "https://github.com/wandb/senpai/pull/978",
    "slow_convergence",
    low=0.4,
    high=0.7,
)
def every_batch_meets(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.surface(1200)
    y, yt = 20 * y, 20 * yt
    model = nn.Sequential(
        nn.Linear(6, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1)
    )
    optimizer = sgd(model, 1e-3, momentum=0.9)
    return Parts(
        model, (x, y), nn.MSELoss(), optimizer, r2(xt, yt), steps=400, clip=1.0 if wrong else 200.0
    )


class Reader(nn.Module):
    """A recurrence over a sequence; the last state tells the class."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.rnn = (nn.LSTM if gated else nn.RNN)(3, 32, batch_first=True)
        if gated:
            self.rnn.bias_hh_l0.data[32:64] = 4.0  # the gate that forgets is open
        self.linear = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0][:, -1])


@faulty(
    "a sequence that is longer than a plain recurrence remembers",
    "https://github.com/Atcold/NYU-DLSP20/pull/93",
    "vanishing_gradient",
    low=0.6,
    high=0.8,
)
def longer_than_it_remembers(wrong: bool) -> Parts:
    y = torch.randint(3, (900,))
    x = 0.5 * torch.randn(900, 100, 3)
    x[:, :8] += F.one_hot(y, 3)[:, None] * 1.5
    (x, y), (xt, yt) = tasks.split(x, y)
    model = Reader(not wrong)
    return Parts(
        model, (x, y), nn.CrossEntropyLoss(), adam(model, 1e-2), accuracy(xt, yt), steps=150
    )


class Speakers(nn.Module):
    """Convolutions over frames, and mean and deviation of what they give."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.tdnn = nn.Sequential(nn.Conv1d(6, 24, 3), nn.ReLU(), nn.Conv1d(24, 16, 3))
        self.segment = nn.Linear(32, 4)
        self.eps = eps

    def forward(self, frames: Tensor) -> Tensor:
        h = self.tdnn(frames)
        std = (h.var(dim=2) + self.eps).sqrt()
        return self.segment(torch.cat([h.mean(dim=2), std], 1))


@faulty(
    "a deviation over the frames of silence",
    "https://github.com/keras-team/keras/issues/2960",
    "undefined_operation",
    low=0.4,
    high=0.8,
    also=("non_finite_data",),
)
def silence(wrong: bool) -> Parts:
    y = torch.randint(4, (1000,))
    voices = torch.tensor([0.3, 0.7, 1.2, 2.0])
    frames = voices[y, None, None] * torch.randn(1000, 6, 30)
    frames[torch.randperm(1000)[:12]] = 0.0
    (x, y), (xt, yt) = tasks.split(frames, y)
    model = Speakers(0.0 if wrong else 1e-5)
    return Parts(
        model, (x, y), nn.CrossEntropyLoss(), adam(model, 5e-3), accuracy(xt, yt), steps=200
    )
