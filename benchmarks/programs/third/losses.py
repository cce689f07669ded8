"""Losses by hand: of survival, quantiles, boxes, pairs, masks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.form import Parts, Program, adam, r2, sgd
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


def patients(rows: int = 900, gone: float = 0.0) -> tuple[Tensor, Tensor]:
    """Seven measures of each, and the time and event of their death or departure."""
    x = torch.randn(rows, 7)
    risk = 1.2 * x[:, 0] - x[:, 1] * x[:, 2]
    time = torch.empty(rows).exponential_() * (-risk).exp()
    left = 2 / (1 + gone) * torch.empty(rows).exponential_() * (-gone * x[:, 3]).exp()
    return x, torch.stack([torch.minimum(time, left), (time <= left).float()], 1)


def concordance(x: Tensor, y: Tensor):
    """Share of comparable pairs of which the one of higher risk dies first."""

    def score(m: nn.Module) -> float:
        risk, time, event = m(x).flatten(), y[:, 0], y[:, 1] > 0
        before = (time[:, None] < time[None]) & event[:, None]
        return float((risk[:, None] > risk[None])[before].float().mean())

    return score


def survival() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 32), nn.ReLU(), nn.Linear(32, 1))


@faulty(
    "events that pick the first two patients",
    "https://github.com/Novartis/torchsurv/issues/117",
    "ignored_rows",
    low=0.75,
    high=0.78,
    also=("loss_ignores_targets",),
)
def first_two(wrong: bool) -> Parts:
    x, y = patients()
    model = survival()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        order = target[:, 0].argsort()
        risk, event = output[order, 0], target[order, 1].long()
        below = torch.logcumsumexp(risk.flip(0), 0).flip(0)
        return -(risk - below)[event if wrong else event.bool()].mean()

    return Parts(
        model,
        (x[:700], y[:700]),
        loss,
        adam(model, 5e-3),
        concordance(x[700:], y[700:]),
        batch_size=350,
        steps=100,
    )


@faulty(
    "a column of events beside a row of risks",
    "https://github.com/mahmoodlab/PathomicFusion/pull/9",
    "broadcast_loss",
    low=0.74,
    high=0.78,
    also=("loss_mixes_rows",),
)
def column_of_events(wrong: bool) -> Parts:
    x, y = patients(gone=2.0)
    model = survival()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        time, event = target[:, 0], target[:, 1:]
        at_risk = (time[None] >= time[:, None]).float()
        theta = output.reshape(-1)
        part = theta - (theta.exp() * at_risk).sum(1).log()
        return -(part * (event if wrong else event[:, 0])).mean()

    return Parts(
        model,
        (x[:700], y[:700]),
        loss,
        adam(model, 3e-3),
        concordance(x[700:], y[700:]),
        batch_size=64,
        steps=200,
    )


def demand(rows: int = 1200) -> tuple[Tensor, Tensor]:
    x = torch.rand(rows, 3)
    return x, 2 * x[:, 0] + (0.2 + x[:, 1]) * torch.randn(rows)


def forecaster() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(0))


def covered(x: Tensor, y: Tensor, level: float):
    """One minus ten times how far the share below the forecast is from the level."""

    def score(m: nn.Module) -> float:
        share = float((y <= m(x)).float().mean())
        return max(-1.0, 1 - 5 * abs(share - level))

    return score


@faulty(
    "a quantile loss whose low side is negative",
    "https://github.com/scikit-learn/scikit-learn/issues/6076",
    "loss_upside_down",
    low=0.0,
    high=0.6,
    also=("loss_ignores_targets", "exploding_gradient"),
)
def low_side(wrong: bool) -> Parts:
    x, y = demand()
    model = forecaster()
    alpha = 0.6

    def loss(pred: Tensor, y: Tensor) -> Tensor:
        diff = y - pred
        above = y > pred
        under = diff[~above].sum()
        return (alpha * diff[above].sum() + (1 - alpha) * (under if wrong else -under)) / len(y)

    return Parts(
        model,
        (x[:900], y[:900]),
        loss,
        adam(model, 5e-3),
        covered(x[900:], y[900:], alpha),
        steps=250,
    )


@faulty(
    "the other quantile",
    "https://github.com/ufal/npfl139/issues/17",
    "other_quantile",  # no code says it: a sound loss of another number
    low=0.0,
    high=0.7,
)
def other_quantile(wrong: bool) -> Parts:
    x, y = demand()
    model = forecaster()
    tau = 0.9

    def loss(pred: Tensor, y: Tensor) -> Tensor:
        below = (y <= pred).float()
        return ((pred - y) * (below - (1 - tau if wrong else tau))).mean()

    return Parts(
        model,
        (x[:900], y[:900]),
        loss,
        adam(model, 5e-3),
        covered(x[900:], y[900:], tau),
        steps=250,
    )


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union of boxes given by two corners."""
    size = lambda box: (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])  # noqa: E731
    inner = torch.cat([torch.max(a[:, :2], b[:, :2]), torch.min(a[:, 2:], b[:, 2:])], 1)
    both = (inner[:, 2:] - inner[:, :2]).clamp(min=0).prod(1)
    outer = torch.cat([torch.min(a[:, :2], b[:, :2]), torch.max(a[:, 2:], b[:, 2:])], 1)
    union = size(a) + size(b) - both
    hull = size(outer)
    return both / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def corners(box: Tensor) -> Tensor:
    return torch.cat([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], 1)


@faulty(
    "centres and sizes taken for corners",
    "https://github.com/stevebottos/owl-vit-object-detection/issues/14",
    "box_format",  # no code says it: the overlap of other boxes
    low=0.5,
    high=0.55,
    also=("ignored_rows", "loss_ignores_targets"),
)
def centres(wrong: bool) -> Parts:
    rows = 900
    box = torch.cat([0.3 + 0.4 * torch.rand(rows, 2), 0.2 + 0.3 * torch.rand(rows, 2)], 1)
    edge = corners(box)
    at = (torch.arange(12) + 0.5) / 12
    across = (at >= edge[:, :1]) & (at <= edge[:, 2:3])
    down = (at >= edge[:, 1:2]) & (at <= edge[:, 3:])
    x = (down[:, :, None] & across[:, None]).float()[:, None] + 0.1 * torch.randn(rows, 1, 12, 12)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(288, 48),
        nn.ReLU(),
        nn.Linear(48, 4),
        nn.Sigmoid(),
    )

    def loss(found: Tensor, true: Tensor) -> Tensor:
        if not wrong:
            found, true = corners(found), corners(true)
        return 1 - overlap(found, true).mean()

    def score(m: nn.Module) -> float:
        return float(overlap(corners(m(x[700:])), edge[700:]).mean().clamp(-1, 1))

    return Parts(
        model, (x[:700], box[:700]), loss, adam(model, 3e-3), score, batch_size=32, steps=200
    )


def pairs() -> tuple[Tensor, Tensor]:
    """Two digits each, and 1 where they are the same."""
    (x, y), _ = tasks.digits()
    other = torch.randperm(len(x))
    for row in range(0, len(x), 2):  # every second pair is of one class
        same = (y == y[row]).nonzero()[:, 0]
        other[row] = same[torch.randint(len(same), ())]
    return torch.stack([x, x[other]], 1), (y == y[other]).float()


class Twin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16))

    def forward(self, pair: Tensor) -> Tensor:
        one, two = self.body(pair[:, 0]), self.body(pair[:, 1])
        return F.pairwise_distance(one, two)


@faulty(
    "pairs of one class pushed apart",
    "https://github.com/keras-team/keras/issues/16935",
    "loss_upside_down",
    low=0.6,
    high=0.8,
)
def pushed_apart(wrong: bool) -> Parts:
    x, same = pairs()
    model = Twin()

    def loss(distance: Tensor, same: Tensor) -> Tensor:
        y = same if wrong else 1 - same  # 1 for pairs of two classes, as in the paper
        far = (1 - distance).clamp(min=0)
        return ((1 - y) * distance.square() + y * far.square()).mean()

    def score(m: nn.Module) -> float:
        return float(((m(x[900:]) < 0.5) == (same[900:] > 0)).float().mean())

    return Parts(
        model, (x[:900], same[:900]), loss, adam(model, 3e-3), score, batch_size=64, steps=250
    )


@faulty(
    "the hardest negative is infinitely far",
    "https://github.com/jinnnju/PaAno/issues/1",
    "loss_not_connected",
    low=0.8,
    high=0.85,
    also=("undefined_operation", "loss_ignores_targets"),
)
def infinitely_far(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    noise = lambda v: v + 0.35 * torch.randn_like(v)  # noqa: E731
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        rows, label = batch
        a, p = F.normalize(model(rows), dim=1), F.normalize(model(noise(rows)), dim=1)
        like = a @ p.t()
        positive = 1 - like.diagonal()
        if wrong:
            off = like.clone()
            off.diagonal().fill_(-torch.inf)
            negative = (1 - off).max(1).values
        else:
            off = like.masked_fill(label[:, None] == label[None], -torch.inf)
            negative = 1 - off.max(1).values
        return F.relu(positive - negative + 0.5).mean()

    def score(m: nn.Module) -> float:  # share of digits next to one of their own class
        known, new = F.normalize(m(x), dim=1), F.normalize(m(noise(xt)), dim=1)
        return float((y[(new @ known.t()).argmax(1)] == yt).float().mean())

    return Parts(model, (x, y), loss, adam(model, 3e-3), score, batch_size=64, steps=250)


@faulty(
    "a mean over what the mask left out",
    "https://github.com/uncbiag/ICON/pull/83",
    "slow_convergence",
    low=0.65,
    high=0.8,
)
def left_out(wrong: bool) -> Parts:
    rows = 700
    depth = torch.randn(rows, 1, 1, 1) + 0.5 * torch.randn(rows, 1, 8, 8)
    x = torch.cat([torch.tanh(depth), depth.square() / 3], 1) + 0.1 * torch.randn(rows, 2, 8, 8)
    known = (torch.rand(rows, 1, 8, 8) < 0.03).float()
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1)
    )

    def loss(output: Tensor, target: Tensor) -> Tensor:
        depth, mask = target[:, :1], target[:, 1:]
        error = (output - depth).square() * mask
        return error.mean() if wrong else error.sum() / mask.sum()

    return Parts(
        model,
        (x[:500], torch.cat([depth, known], 1)[:500]),
        loss,
        sgd(model, 0.02),
        r2(x[500:], depth[500:]),
        batch_size=16,
        steps=250,
    )


@faulty(
    "emptiness divided by nothing",
    "https://github.com/weiyithu/SurroundOcc/issues/28",
    "undefined_operation",
    low=0.3,
    high=0.8,
)
def emptiness(wrong: bool) -> Parts:
    rows = 800
    x = torch.randn(rows, 10)
    full = (x[:, :1] * 2 + x[:, 1:2] + 1.5 > 0).float() * torch.ones(rows, 4)
    full[torch.rand(rows, 4) < 0.05] = 1.0
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 4), nn.Sigmoid())

    def loss(full: Tensor, target: Tensor) -> Tensor:
        empty = 1 - full
        hit = (target * full).sum()
        precision = hit / full.sum()
        recall = hit / target.sum()
        left = (1 - target).sum()
        spec = ((1 - target) * empty).sum() / (left if wrong else left.clamp(min=1))
        return -(precision.log() + recall.log() + (spec if wrong else spec.clamp(1e-3)).log())

    def score(m: nn.Module) -> float:
        return float(((m(x[600:]) > 0.5) == (full[600:] > 0)).float().mean())

    return Parts(
        model, (x[:600], full[:600]), loss, adam(model, 3e-3), score, batch_size=4, steps=300
    )


@faulty(
    "directions on both sides of pi",
    "https://github.com/WeijingShi/Point-GNN/issues/49",
    "angle_wraps",  # no code says it: neighbours are told to be 2 pi apart
    low=0.8,
    high=0.9,
    also=("underfitting",),
)
def both_sides(wrong: bool) -> Parts:
    angle = 2 * math.pi * torch.rand(1200)
    box = torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(1200, 2)
    x = torch.cat([box, torch.randn(1200, 4)], 1)
    model = nn.Sequential(
        nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1 if wrong else 2)
    )

    def loss(found: Tensor, true: Tensor) -> Tensor:
        if wrong:
            return (found[:, 0] - true).abs().mean()
        return F.mse_loss(found, torch.stack([true.cos(), true.sin()], 1))

    def score(m: nn.Module) -> float:  # mean cosine of the error
        found = m(x[900:])
        turn = found[:, 0] if wrong else torch.atan2(found[:, 1], found[:, 0])
        return float((turn - angle[900:]).cos().mean())

    return Parts(model, (x[:900], angle[:900]), loss, adam(model, 5e-3), score, steps=250)
