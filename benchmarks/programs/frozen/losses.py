"""Losses that do not fit the last layer or the targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.form import Parts, Program, accuracy, adam, r2, sgd
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


@faulty(
    "softmax twice",
    "https://github.com/Lightning-Universe/lightning-bolts/issues/654",
    "head_mismatch",
    low=0.7,
    high=0.9,
)
def softmax_twice(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    if wrong:
        model.append(nn.Softmax(dim=1))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(F.log_softmax(output, dim=1), target)

    return Parts(model, (x, y), loss, sgd(model, 0.3), accuracy(xt, yt), steps=300)


@faulty(
    "sigmoid twice in a recommender",
    "https://github.com/yudi-mars/daisyRec/pull/15",
    "head_mismatch",
    low=0.65,
    high=0.85,
)
def sigmoid_twice(wrong: bool) -> Parts:
    taste, item = torch.randn(60, 4), torch.randn(40, 4)
    pairs = torch.stack([torch.randint(60, (6000,)), torch.randint(40, (6000,))], 1)
    liked = (taste[pairs[:, 0]] * item[pairs[:, 1]]).sum(1) > 1.5
    (x, y), (xt, yt) = tasks.split(pairs, liked.float())
    model = Factors(wrong)

    def score(m: nn.Module) -> float:  # F1 of what is recommended
        chosen = m(xt) > (0.5 if wrong else 0.0)
        right = float((chosen & (yt > 0)).sum())
        return 2 * right / max(1.0, float(chosen.sum() + yt.sum()))

    loss = nn.BCEWithLogitsLoss()
    return Parts(model, (x, y), loss, adam(model), score, batch_size=128, steps=400)


class Factors(nn.Module):
    """Scores of pairs (user, item) by the product of their vectors."""

    def __init__(self, squashed: bool) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(60, 8), nn.Embedding(40, 8)
        nn.init.normal_(self.users.weight, std=0.3)
        nn.init.normal_(self.items.weight, std=0.3)
        self.bias = nn.Parameter(torch.zeros(1))
        self.squashed = squashed

    def forward(self, pairs: Tensor) -> Tensor:
        score = (self.users(pairs[:, 0]) * self.items(pairs[:, 1])).sum(1) + self.bias
        return torch.sigmoid(score) if self.squashed else score


class Texts(nn.Module):
    """Mean of word vectors, and an output that may lack the logarithm."""

    def __init__(self, log: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(120, 24)
        self.head = nn.Linear(24, 12)
        self.log = log

    def forward(self, tokens: Tensor) -> Tensor:
        scores = self.head(self.embed(tokens).mean(1))
        return F.log_softmax(scores, dim=1) if self.log else F.softmax(scores, dim=1)


@faulty(
    "likelihood without its logarithm",
    "https://github.com/AnubhavGupta3377/Text-Classification-Models-Pytorch/issues/9",
    "missing_log",
    low=0.8,
    high=0.95,
)
def likelihood(wrong: bool) -> Parts:
    topics = torch.randint(120, (12, 8))
    y = torch.randint(12, (1600,))
    tokens = torch.randint(120, (1600, 10))
    for word in range(5):
        tokens[:, word] = topics[y, torch.randint(8, (1600,))]
    (xs, ys), (xt, yt) = tasks.split(tokens, y)
    model = Texts(log=not wrong)
    return Parts(model, (xs, ys), nn.NLLLoss(), sgd(model, 0.7), accuracy(xt, yt), steps=500)


def unet() -> nn.Sequential:
    """A small segmentation network."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 1, 1),
    )  # fmt: skip


@faulty(
    "masks read from pictures",
    "https://github.com/MontaEllis/Pytorch-Medical-Segmentation/issues/8",
    "target_out_of_range",
    low=0.5,
    high=0.9,
    also=("unscaled_targets",),
)
def masks(wrong: bool) -> Parts:
    x, y = tasks.shapes()
    model = unet()
    target = 255 * y[:450] if wrong else y[:450]

    def score(m: nn.Module) -> float:  # Dice
        found = m(x[450:]) > 0
        right = float((found & (y[450:] > 0)).sum())
        return 2 * right / float(found.sum() + y[450:].sum())

    loss = nn.BCEWithLogitsLoss()
    return Parts(model, (x[:450], target), loss, adam(model), score, batch_size=16, steps=150)


@faulty(
    "cross-entropy of standardised pictures",
    "https://github.com/keras-team/keras/issues/2841",
    "target_out_of_range",
    low=0.3,
    high=0.5,
    also=("head_mismatch",),
)
def autoencoder(wrong: bool) -> Parts:
    (x, _), (xt, _) = tasks.digits()
    if wrong:
        middle, spread = x.mean(), x.std()
        x, xt = (x - middle) / spread, (xt - middle) / spread
    model = nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(),
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 64),
    )  # fmt: skip
    score = r2(xt, xt)
    return Parts(
        model, (x, x), nn.BCEWithLogitsLoss(), adam(model, 3e-3),
        lambda m: score(nn.Sequential(m, nn.Sigmoid())), batch_size=64, steps=400,
    )  # fmt: skip


@faulty(
    "several labels by one softmax",
    "https://github.com/open-mmlab/mmpretrain/issues/783",
    "multilabel_softmax",
    low=0.75,
    high=0.85,
)
def several_labels(wrong: bool) -> Parts:
    x = torch.randn(1200, 14)
    y = (x @ torch.randn(14, 6) / 14**0.5 + 0.1 * torch.randn(1200, 6) > 0.3).float()
    (xs, ys), (xt, yt) = tasks.split(x, y)
    model = nn.Sequential(nn.Linear(14, 48), nn.ReLU(), nn.Linear(48, 6))
    loss = nn.CrossEntropyLoss() if wrong else nn.BCEWithLogitsLoss()

    def score(m: nn.Module) -> float:  # share of rights labels at one half
        shown = m(xt).softmax(1) if wrong else m(xt).sigmoid()
        return float(((shown > 0.5) == (yt > 0)).float().mean())

    return Parts(model, (xs, ys), loss, adam(model, 5e-3), score, steps=300)


@faulty(
    "padding number that is a class",
    "https://github.com/nyu-mll/jiant/issues/925",
    "ignored_rows",
    low=0.75,
    high=0.9,
)
def tagger(wrong: bool) -> Parts:
    tokens = torch.randint(1, 30, (600, 9))
    tags = tokens % 3  # tag 0 is a real tag
    model = nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    ignored = 0 if wrong else -100

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.transpose(1, 2), target, ignore_index=ignored)

    def score(m: nn.Module) -> float:
        return float((m(tokens[450:]).argmax(2) == tags[450:]).float().mean())

    return Parts(model, (tokens[:450], tags[:450]), loss, adam(model), score, steps=200)


@faulty(
    "a sum over the batch",
    "https://github.com/jax-ml/jax/pull/3113",
    "loss_is_a_sum",
    low=0.5,
    high=0.88,
    also=("oscillating_loss", "exploding_gradient"),
)
def summed(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    loss = nn.CrossEntropyLoss(reduction="sum" if wrong else "mean")
    return Parts(model, (x, y), loss, sgd(model, 0.1), accuracy(xt, yt), batch_size=256, steps=250)


@faulty(
    "focal loss by hand",
    "https://github.com/mkocabas/focal-loss-keras/issues/17",
    "undefined_operation",
    low=0.6,
    high=0.9,
)
def focal(wrong: bool) -> Parts:
    y = torch.randint(2, (900, 1)).float()
    x = torch.randn(900, 24) + 0.9 * (2 * y - 1)
    (xs, ys), (xt, yt) = tasks.split(x, y)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid())

    def loss(p: Tensor, target: Tensor) -> Tensor:
        p = p if wrong else p.clamp(1e-6, 1 - 1e-6)
        hit = target * p + (1 - target) * (1 - p)
        return (-((1 - hit) ** 0.5) * torch.log(hit)).mean()

    def score(m: nn.Module) -> float:
        return float(((m(xt) > 0.5) == (yt > 0.5)).float().mean() * m(xt).isfinite().all())

    return Parts(model, (xs, ys), loss, adam(model, 2e-2), score, steps=300)


class Twins(nn.Module):
    """The same network for both rows of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, pair: Tensor) -> Tensor:
        return self.body(pair[:, 0]) - self.body(pair[:, 1])


@faulty(
    "distance of equal samples",
    "https://github.com/adambielski/siamese-triplet/issues/18",
    "undefined_operation",
    low=0.6,
    high=0.85,
)
def siamese(wrong: bool) -> Parts:
    centres = 1.5 * torch.randn(4, 10)
    kinds = torch.randint(4, (1000, 2))
    kinds[::2, 1] = kinds[::2, 0]
    pairs = centres[kinds] + torch.randn(1000, 2, 10)
    pairs[::20, 1] = pairs[::20, 0]  # a sample beside itself
    same = (kinds[:, 0] == kinds[:, 1]).float()
    (xs, ys), (xt, yt) = tasks.split(pairs, same)
    tiny = 0.0 if wrong else 1e-6

    def loss(difference: Tensor, same: Tensor) -> Tensor:
        distance = torch.sqrt(difference.square().sum(1) + tiny)
        return (same * distance.square() + (1 - same) * F.relu(2 - distance).square()).mean()

    def score(m: nn.Module) -> float:
        near = m(xt).norm(dim=1) < 1
        return float((near == (yt > 0)).float().mean() * m(xt).isfinite().all())

    model = Twins()
    return Parts(model, (xs, ys), loss, adam(model, 3e-3), score, steps=300)


@faulty(
    "softmax of one unit",
    "https://github.com/marian-nmt/marian-dev/issues/21",
    "head_mismatch",
    low=0.65,
    high=0.9,
)
def one_unit(wrong: bool) -> Parts:
    x = torch.randn(800, 2)
    y = (x[:, :1] * x[:, 1:] > 0).float()
    (xs, ys), (xt, yt) = tasks.split(x, y)
    last = nn.Softmax(dim=1) if wrong else nn.Sigmoid()
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1), last)

    def score(m: nn.Module) -> float:
        return float(((m(xt) > 0.5) == (yt > 0.5)).float().mean())

    return Parts(model, (xs, ys), nn.BCELoss(), adam(model, 2e-2), score, steps=300)


class Peptide(nn.Module):
    """An LSTM over letters whose answer passes one more ReLU."""

    def __init__(self, clipped: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 12)
        self.core = nn.LSTM(12, 24, batch_first=True)
        self.head = nn.Linear(24, 1)
        self.clipped = clipped

    def forward(self, letters: Tensor) -> Tensor:
        answer = self.head(self.core(self.embed(letters))[0].mean(1))
        return torch.relu(answer) if self.clipped else answer


@faulty(
    "ReLU behind a regression",
    "https://github.com/ProteomicsML/ProteomicsML/pull/203",
    "head_mismatch",
    low=0.75,
    high=0.9,
    also=("dying_relu",),
)
def peptide(wrong: bool) -> Parts:
    letters = torch.randint(12, (900, 10))
    size = torch.randn(12)
    total = size[letters].sum(1)
    y = ((total - total.mean()) / total.std())[:, None]
    (xs, ys), (xt, yt) = tasks.split(letters, y)
    model = Peptide(wrong)
    return Parts(model, (xs, ys), nn.MSELoss(), adam(model), r2(xt, yt), steps=300)


@faulty(
    "a loss that is told to require a gradient",
    "https://github.com/ronghuaiyang/arcface-pytorch/issues/56",
    "loss_not_connected",
    low=0.4,
    high=0.9,
)
def told(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    x, xt = x.view(-1, 1, 8, 8), xt.view(-1, 1, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if wrong:
            with torch.no_grad():
                value = F.cross_entropy(output, target)
            value.requires_grad = True
            return value
        return F.cross_entropy(output, target)

    return Parts(model, (x, y), loss, adam(model), accuracy(xt, yt), steps=200)


class Painter(nn.Module):
    """A generator, and a critic that has seen what real points look like."""

    def __init__(self) -> None:
        super().__init__()
        self.paint = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        self.critic = nn.Sequential(nn.Linear(2, 48), nn.Tanh(), nn.Linear(48, 1))

    def forward(self, noise: Tensor) -> Tensor:
        return self.paint(noise)


def _taught(model: Painter) -> Painter:
    """Teach the critic to tell points near (2, -1) from scattered ones."""
    engine = torch.optim.Adam(model.critic.parameters(), lr=1e-2)
    for _ in range(200):
        points = 4 * torch.randn(128, 2)
        near = torch.exp(-(points - torch.tensor([2.0, -1.0])).square().sum(1, True) / 8)
        engine.zero_grad()
        F.mse_loss(model.critic(points), near).backward()
        engine.step()
    model.zero_grad()
    return model


@faulty(
    "generator behind a detach",
    "https://github.com/nikhilsinghmus/image2reverb/issues/37",
    "detached",
    low=0.3,
    high=0.7,
    also=("loss_not_connected",),
)
def generator(wrong: bool) -> Parts:
    model = _taught(Painter())
    noise, real = torch.randn(800, 4), torch.ones(800, 1)

    def loss(model: Painter, batch: tuple[Tensor, Tensor]) -> Tensor:
        fake = model(batch[0])
        return F.mse_loss(model.critic(fake.detach() if wrong else fake), batch[1])

    def score(m: nn.Module) -> float:  # share of painted points near the real ones
        apart = (m(noise[600:]) - torch.tensor([2.0, -1.0])).norm(dim=1)
        return float((apart < 1.0).float().mean())

    engine = torch.optim.Adam(model.paint.parameters(), lr=3e-3)
    return Parts(model, (noise[:600], real[:600]), loss, engine, score, steps=300)
