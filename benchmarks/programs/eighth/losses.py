"""What a loss takes for a label, a rate, a box or a letter, and what of it has a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.form import Parts, Program, adam, r2
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


class Siamese(nn.Module):
    """The same small network for both sides of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self.side(first), self.side(second)


@faulty(
    "pairs that do not belong together and are labelled zero",
    "https://github.com/pytorch/pytorch/issues/23782",
    "target_out_of_range",
    low=0.7,
    high=0.85,
    also=("embedding_collapse", "ignored_rows"),
)
def labelled_zero(wrong: bool) -> Parts:
    centres = torch.randn(6, 10)
    kind = torch.randint(6, (800,))
    other = torch.where(torch.rand(800) < 0.5, kind, torch.randint(6, (800,)))
    first = centres[kind] + 0.3 * torch.randn(800, 10)
    second = centres[other] + 0.3 * torch.randn(800, 10)
    same = (kind == other).float()
    labels = same if wrong else 2 * same - 1
    model = Siamese()

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return F.cosine_embedding_loss(*output, target, margin=0.2)

    def score(net: nn.Module) -> float:
        cosine = F.cosine_similarity(*net(first[600:], second[600:]))
        return float(((cosine > 0.6).float() == same[600:]).float().mean())

    data = ((first[:600], second[:600]), labels[:600])
    return Parts(model, data, loss, adam(model, 3e-3), score, steps=300)


@faulty(
    "scores that are called signs, and labels of zero and one",
    "https://pytorch.org/docs/stable/generated/torch.nn.SoftMarginLoss.html",
    "target_out_of_range",
    low=0.65,
    high=0.85,
    also=("ignored_rows",),
)
def called_signs(wrong: bool) -> Parts:
    x = torch.randn(800, 8)
    y = (x[:, 0] + 0.5 * x[:, 1] * x[:, 2] > 0).float()[:, None]
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def score(model: nn.Module) -> float:
        return float(((model(x[600:]) > 0).float() == y[600:]).float().mean())

    labels = y if wrong else 2 * y - 1
    return Parts(net, (x[:600], labels[:600]), nn.SoftMarginLoss(), adam(net, 3e-3), score)


@faulty(
    "a rate that may be below zero",
    "https://github.com/pytorch/pytorch/issues/184030",
    "undefined_operation",
    low=0.3,
    high=0.4,
    also=("head_mismatch", "missing_log"),
)
def below_zero(wrong: bool) -> Parts:
    x = torch.randn(800, 6)
    rate = (0.8 * x[:, :1] - 0.5 * x[:, 1:2]).exp()
    counts = torch.poisson(rate)
    layers = [nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1)]
    net = nn.Sequential(*layers, *([] if wrong else [nn.Softplus()]))
    criterion = nn.PoissonNLLLoss(log_input=False)
    optimizer = adam(net, 3e-3)
    return Parts(net, (x[:600], counts[:600]), criterion, optimizer, r2(x[600:], rate[600:]))


@faulty(
    "an equation whose derivatives are not followed",
    "https://github.com/fangyuanmao/PID/issues/46",
    "detached",
    low=0.5,
    high=0.9,
    also=("loss_not_connected", "loss_ignores_targets"),
)
def not_followed(wrong: bool) -> Parts:
    """u'' = -4 sin 2t with u(0) = 0 and u'(0) = 2, so that u = sin 2t."""
    time = 3 * torch.rand(400, 1)
    net = nn.Sequential(
        nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )

    def slope(u: Tensor, t: Tensor) -> Tensor:
        return torch.autograd.grad(u.sum(), t, retain_graph=True, create_graph=not wrong)[0]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        t = batch[0].detach().clone().requires_grad_()
        residual = slope(model(t), t) - 2 * torch.cos(2 * t)
        start = model(torch.zeros(1, 1)).square().mean()
        return residual.square().mean() + start

    grid = torch.linspace(0, 3, 100)[:, None]
    data = (time, torch.zeros(400, 1))
    return Parts(net, data, loss, adam(net, 5e-3), r2(grid, torch.sin(2 * grid)), steps=600)


@faulty(
    "boxes that do not meet",
    "https://wiki.cloudfactory.com/docs/mp-wiki/loss/bounding-box-regression-loss",
    "flat_loss",
    low=0.4,
    high=0.6,
    also=("head_mismatch", "vanishing_gradient", "slow_convergence", "loss_not_connected"),
)
def do_not_meet(wrong: bool) -> Parts:
    x = torch.randn(600, 8)
    corner = 8 + 3 * torch.tanh(x[:, :2])
    size = 2 + torch.sigmoid(x[:, 2:4])
    boxes = torch.cat([corner, corner + size], 1)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))

    def overlap(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        low, high = output[:, :2], output[:, :2] + F.softplus(output[:, 2:])
        inner = (torch.min(high, target[:, 2:]) - torch.max(low, target[:, :2])).clamp(min=0)
        outer = torch.max(high, target[:, 2:]) - torch.min(low, target[:, :2])
        area = (high - low).prod(1) + (target[:, 2:] - target[:, :2]).prod(1)
        union = area - inner.prod(1)
        hull = outer.prod(1)
        return inner.prod(1) / union, (hull - union) / hull

    def loss(output: Tensor, target: Tensor) -> Tensor:
        share, empty = overlap(output, target)
        return (1 - share + (0 if wrong else empty)).mean()

    def score(model: nn.Module) -> float:
        return float(overlap(model(x[450:]), boxes[450:])[0].mean())

    return Parts(net, (x[:450], boxes[:450]), loss, adam(net, 1e-2), score, steps=400)


class Tagger(nn.Module):
    """A recurrence without `batch_first` that gives its scores in the order in which it works."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 16)
        self.memory = nn.GRU(16, 32, bidirectional=True)
        self.head = nn.Linear(64, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.memory(self.words(tokens.T))[0])


@faulty(
    "scores that come time first, and labels row first",
    "https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html",
    "positions_mixed",
    low=0.5,
    high=0.9,
    also=("unrelated_labels", "rows_mixed", "loss_mixes_rows"),
)
def time_first(wrong: bool) -> Parts:
    """Whether a word repeats the kind of the word before it, and which kind it is."""
    tokens = torch.randint(12, (500, 10))
    tags = (tokens + tokens.roll(1, 1)) % 4
    tags[:, 0] = tokens[:, 0] % 4
    model = Tagger()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        scores = output if wrong else output.transpose(0, 1)
        return F.cross_entropy(scores.reshape(-1, 4), target.reshape(-1))

    def score(net: nn.Module) -> float:
        return float((net(tokens[400:]).argmax(-1).T == tags[400:]).float().mean())

    return Parts(model, (tokens[:400], tags[:400]), loss, adam(model, 1e-2), score, steps=300)


class ActorCritic(nn.Module):
    """Scores of three deeds, and what the state is worth, from one state."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3))
        self.critic = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(state), self.critic(state)[:, 0]


@faulty(
    "an advantage through which the actor pulls the critic",
    "https://github.com/astariul/encode-attend-navigate-pytorch/issues/2",
    "target_not_detached",
    low=0.3,
    high=0.6,
)
def pulls_the_critic(wrong: bool) -> Parts:
    state = torch.randn(800, 4)
    deed = torch.randint(3, (800,))
    reward = state[:, 0] + 0.5 * state.gather(1, deed[:, None] + 1)[:, 0]
    net = ActorCritic()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        (here, done), paid = batch
        scores, value = model(here)
        advantage = paid - value
        chosen = F.log_softmax(scores, 1).gather(1, done[:, None])[:, 0]
        actor = -(chosen * (advantage if wrong else advantage.detach())).mean()
        return actor + 0.5 * advantage.square().mean()

    def score(model: nn.Module) -> float:
        worth = model(state[600:])[1]
        error = (worth - reward[600:]).square().mean()
        return max(-1.0, float(1 - error / reward[600:].var()))

    data = ((state[:600], deed[:600]), reward[:600])
    return Parts(net, data, loss, adam(net, 3e-3), score, steps=300)
