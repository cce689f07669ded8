"""Losses that do not fit the last layer, the targets, or what the author wants."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from programs.form import Parts, Program, adam, r2, sgd
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


def unet(last: nn.Module | None = None) -> nn.Sequential:
    """A small segmentation network."""
    layers = [
        nn.Conv2d(1, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 1, 1),
    ]
    return nn.Sequential(*layers, *([] if last is None else [last]))


def overlap(found: Tensor, true: Tensor) -> float:
    """F1 of yes or no answers."""
    right = float((found & true).sum())
    return 2 * right / max(1.0, float(found.sum() + true.sum()))


@faulty(
    "Dice of a threshold",
    "https://github.com/qubvel-org/segmentation_models.pytorch/pull/611",
    "loss_not_connected",
    low=0.5,
    high=0.8,
    also=("detached",),
)
def threshold(wrong: bool) -> Parts:
    x, y = tasks.shapes()
    model = unet(nn.Sigmoid())

    def loss(p: Tensor, mask: Tensor) -> Tensor:
        if wrong:
            p = torch.tensor((p > 0.5).float(), requires_grad=True)
        both = (p * mask).sum((1, 2, 3))
        return (1 - (2 * both + 1) / (p.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)).mean()

    def score(m: nn.Module) -> float:
        return overlap(m(x[450:]) > 0.5, y[450:] > 0.5)

    return Parts(model, (x[:450], y[:450]), loss, adam(model), score, batch_size=16, steps=150)


@faulty(
    "a class whose weight is the logarithm of one",
    "https://github.com/IndicoDataSolutions/finetune/issues/181",
    "ignored_rows",
    low=0.5,
    high=0.85,
)
def logarithm(wrong: bool) -> Parts:
    y = torch.multinomial(torch.tensor([0.3, 0.6, 0.1]), 1200, replacement=True)
    x = 1.2 * torch.randn(3, 12)[y] + torch.randn(1200, 12)
    (xs, ys), (xt, yt) = tasks.split(x, y)
    count = ys.bincount(minlength=3).float()
    weight = (count.max() / count).log()
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))
    loss = nn.CrossEntropyLoss(weight=weight if wrong else weight + 1)

    def score(m: nn.Module) -> float:
        return float((m(xt).argmax(1) == yt).float().mean())

    return Parts(model, (xs, ys), loss, adam(model, 5e-3), score, steps=250)


@faulty(
    "positive weights upside down",
    "https://cloud.tencent.com.cn/developer/article/2568430",
    "class_imbalance",
    low=0.2,
    high=0.4,
)
def upside_down(wrong: bool) -> Parts:
    x = torch.randn(2000, 16)
    scores = x @ torch.randn(16, 5) / 4 + 0.5 * torch.randn(2000, 5)
    y = (scores > torch.tensor([1.9, 1.8, 1.7, 1.6, 1.5])).float()
    (xs, ys), (xt, yt) = tasks.split(x, y)
    share = ys.mean(0)
    weight = share / (1 - share)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))
    loss = nn.BCEWithLogitsLoss(pos_weight=weight if wrong else 1 / weight)

    def score(m: nn.Module) -> float:
        found, true = m(xt) > 0, yt > 0
        return sum(overlap(found[:, k], true[:, k]) for k in range(5)) / 5

    return Parts(model, (xs, ys), loss, adam(model, 3e-3), score, batch_size=64, steps=250)


@faulty(
    "a reconstruction in the place of the target",
    "https://github.com/autonomousvision/sledge/issues/4",
    "swapped_arguments",  # no code says it: the loss has no lower end
    low=0.3,
    high=0.5,
    also=("target_out_of_range", "loss_upside_down"),
)
def swapped(wrong: bool) -> Parts:
    (x, _), (xt, _) = tasks.digits()
    x, xt = (x > 0.4).float(), (xt > 0.4).float()
    model = nn.Sequential(
        nn.Linear(64, 48),
        nn.ReLU(),
        nn.Linear(48, 12),
        nn.Linear(12, 48),
        nn.ReLU(),
        nn.Linear(48, 64),
    )

    def loss(output: Tensor, target: Tensor) -> Tensor:
        pair = (target, output) if wrong else (output, target)
        return F.binary_cross_entropy_with_logits(*pair)

    probable = r2(xt, xt)
    return Parts(
        model,
        (x, x),
        loss,
        adam(model, 5e-3),
        lambda m: probable(nn.Sequential(m, nn.Sigmoid())),
        batch_size=64,
        steps=300,
    )


@faulty(
    "distilled without the logarithm",
    "https://github.com/microsoft/ProDA/issues/43",
    "missing_log",
    low=0.6,
    high=0.85,
)
def distilled(wrong: bool) -> Parts:
    x = torch.randn(1200, 10)
    teacher = torch.softmax(x @ torch.randn(10, 6) / 2, 1)
    (xs, ys), (xt, yt) = tasks.split(x, teacher)
    model = nn.Sequential(nn.Linear(10, 48), nn.ReLU(), nn.Linear(48, 6))

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        shown = student.softmax(1) if wrong else student.log_softmax(1)
        return F.kl_div(shown, teacher, reduction="batchmean")

    agreement = r2(xt, yt)
    return Parts(
        model,
        (xs, ys),
        loss,
        adam(model, 5e-3),
        lambda m: agreement(nn.Sequential(m, nn.Softmax(1))),
        steps=300,
    )


class Agent(nn.Module):
    """An actor, and a critic that knows what actions are worth."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 1), nn.Tanh())
        self.critic = nn.Sequential(nn.Linear(4, 48), nn.Tanh(), nn.Linear(48, 1))

    def forward(self, states: Tensor) -> Tensor:
        return self.actor(states)

    def worth(self, states: Tensor, actions: Tensor) -> Tensor:
        return self.critic(torch.cat([states, actions], 1))


def best(states: Tensor) -> Tensor:
    """The action that the reward asks for."""
    return 0.8 * torch.sin(states[:, :1] + states[:, 1:2])


@faulty(
    "an actor that flees its reward",
    "https://github.com/KanishJebaMathewM/Truxify/pull/11885",
    "loss_upside_down",
    low=0.2,
    high=0.7,
)
def flees(wrong: bool) -> Parts:
    states, actions = torch.randn(1000, 3), 2 * torch.rand(1000, 1) - 1
    rewards = -(actions - best(states)).square()
    model = Agent()
    engine = torch.optim.Adam(model.critic.parameters(), lr=1e-2)
    for _ in range(300):
        rows = torch.randint(1000, (128,))
        engine.zero_grad()
        F.mse_loss(model.worth(states[rows], actions[rows]), rewards[rows]).backward()
        engine.step()
    model.zero_grad()
    replay = DataLoader(TensorDataset(states, actions, rewards), batch_size=64, shuffle=True)

    def loss(model: Agent, batch: list[Tensor]) -> Tensor:
        value = model.worth(batch[0], model(batch[0])).mean()
        return value if wrong else -value

    def score(m: nn.Module) -> float:  # share of actions near the best ones
        new = torch.randn(500, 3)
        return float(((m(new) - best(new)).abs() < 0.3).float().mean())

    actor = torch.optim.Adam(model.actor.parameters(), lr=3e-3)
    return Parts(model, replay, loss, actor, score, steps=250)


@faulty(
    "the mean of the log probabilities",
    "https://github.com/Farama-Foundation/Gymnasium/issues/1336",
    "loss_mixes_rows",
    low=0.5,
    high=0.75,
    also=("broadcast_loss",),
)
def reinforce(wrong: bool) -> Parts:
    states = torch.randn(1600, 6)
    worth = torch.stack([states[:, 0], states[:, 1], -states[:, 0] - states[:, 1]], 1)
    taken = torch.randint(3, (1600,))
    gain = 1 + worth[torch.arange(1600), taken] + 0.2 * torch.randn(1600)
    record = torch.stack([taken.float(), gain], 1)
    model = nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 3))

    def loss(output: Tensor, record: Tensor) -> Tensor:
        chosen = output.log_softmax(1).gather(1, record[:, :1].long())[:, 0]
        return -((chosen.mean() if wrong else chosen) * record[:, 1]).sum() / len(record)

    def score(m: nn.Module) -> float:
        return float((m(states[1200:]).argmax(1) == worth[1200:].argmax(1)).float().mean())

    train = (states[:1200], record[:1200])
    return Parts(model, train, loss, adam(model, 3e-3), score, batch_size=64, steps=400)


@faulty(
    "logarithms of what a network says",
    "https://github.com/timeseriesAI/tsai/issues/150",
    "undefined_operation",
    low=-0.5,
    high=0.7,
)
def logarithms(wrong: bool) -> Parts:
    time = torch.arange(20)
    pace, size = 0.2 + 0.6 * torch.rand(800, 1), torch.exp(2 * torch.randn(800, 1))
    x = (size * torch.sin(pace * time + 6.3 * torch.rand(800, 1)))[:, None]
    y = size * (1 + pace) * torch.linspace(0.5, 2, 10)
    (xs, ys), (xt, yt) = tasks.split(x, y)
    model = nn.Sequential(
        nn.Conv1d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.AdaptiveMaxPool1d(4),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    if not wrong:
        model.append(nn.Softplus())

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(torch.log(output.view(-1) + 1), torch.log(target.view(-1) + 1))

    def score(m: nn.Module) -> float:
        class Log(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return (m(x) + 1).log()

        return r2(xt, (yt + 1).log())(Log())

    return Parts(model, (xs, ys), loss, adam(model), score, steps=250)


class Variational(nn.Module):
    """Mean and log variance of a code, drawn while training, and what is read from it."""

    def __init__(self, inputs: int, code: int, low: float | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU())
        self.mean, self.spread = nn.Linear(64, code), nn.Linear(64, code)
        self.back = nn.Sequential(nn.Linear(code, 64), nn.ReLU(), nn.Linear(64, inputs))
        self.low = low

    def coded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x)
        spread = self.spread(hidden)
        return self.mean(hidden), spread if self.low is None else spread.clamp(self.low, 4.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.coded(x)[0])

    def drawn(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is read from a drawn code, and the divergence of each row."""
        mean, spread = self.coded(x)
        code = mean + (0.5 * spread).exp() * torch.randn_like(mean)
        divergence = -0.5 * (1 + spread - mean.square() - spread.exp()).sum(1)
        return self.back(code), divergence


@faulty(
    "pixels averaged, divergence summed",
    "https://github.com/keras-team/keras/pull/3383",
    "posterior_collapse",  # no code says it: what restrains the code outweighs the pictures
    low=0.15,
    high=0.35,
    also=("underfitting", "inputs_ignored"),
)
def averaged(wrong: bool) -> Parts:
    (x, _), (xt, _) = tasks.digits()
    model = Variational(64, 8)

    def loss(model: Variational, batch: tuple[Tensor, Tensor]) -> Tensor:
        output, divergence = model.drawn(batch[0])
        pixels = F.binary_cross_entropy_with_logits(output, batch[1], reduction="none")
        return (pixels.mean(1) if wrong else pixels.sum(1)).mean() + divergence.mean()

    probable = r2(xt, xt)
    return Parts(
        model,
        (x, x),
        loss,
        adam(model, 3e-3),
        lambda m: probable(nn.Sequential(m, nn.Sigmoid())),
        batch_size=64,
        steps=300,
    )


@faulty(
    "the exponential of a free log variance",
    "https://github.com/vanderschaarlab/synthcity/issues/331",
    "exploding_gradient",
    low=-0.5,
    high=0.5,
    also=("undefined_operation", "unscaled_inputs"),
)
def exponential(wrong: bool) -> Parts:
    hidden = torch.randn(900, 3)
    x = 120 * (hidden @ torch.randn(3, 12)) + torch.tensor([400.0]) * torch.rand(12)
    model = Variational(12, 4, low=None if wrong else -10.0)

    def loss(model: Variational, batch: tuple[Tensor, Tensor]) -> Tensor:
        output, divergence = model.drawn(batch[0])
        return (output - batch[1]).square().sum(1).mean() + divergence.mean()

    score = r2(x[700:], x[700:])
    return Parts(
        model, (x[:700], x[:700]), loss, adam(model, 3e-3), score, batch_size=64, steps=300
    )


@faulty(
    "a class beside an income",
    "https://github.com/AlliedToasters/dfencoder/issues/4",
    "unscaled_targets",
    low=0.65,
    high=0.8,
)
def income(wrong: bool) -> Parts:
    x = torch.randn(1200, 10)
    job = (x[:, 0] * x[:, 1] + 0.5 * x[:, 2] > 0).float()
    money = x[:, 3] + 0.5 * x[:, 4] * x[:, 5] + 0.3 * torch.randn(1200)
    if wrong:
        money = 52000 + 18000 * money
    model = nn.Sequential(
        nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2)
    )

    def loss(output: Tensor, target: Tensor) -> Tensor:
        number = F.mse_loss(output[:, 0], target[:, 0])
        return number + F.binary_cross_entropy_with_logits(output[:, 1], target[:, 1])

    def score(m: nn.Module) -> float:  # of the class
        return float(((m(x[900:])[:, 1] > 0) == (job[900:] > 0)).float().mean())

    target = torch.stack([money, job], 1)
    return Parts(model, (x[:900], target[:900]), loss, adam(model), score, steps=300)


@faulty(
    "real and fake are both one",
    "https://github.com/basiclab/GNGAN-PyTorch/issues/1",
    "constant_targets",
    low=0.6,
    high=0.8,
)
def both_one(wrong: bool) -> Parts:
    angle = 6.3 * torch.rand(600, 1)
    real = torch.cat([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(600, 2)
    fake = 1.5 * torch.randn(600, 2)
    order = torch.randperm(1200)
    points = torch.cat([real, fake])[order]
    true = torch.cat([torch.ones(600, 1), torch.zeros(600, 1)])[order]
    critic = nn.Sequential(
        nn.Linear(2, 48), nn.LeakyReLU(0.2), nn.Linear(48, 48), nn.LeakyReLU(0.2), nn.Linear(48, 1)
    )
    labels = torch.ones_like(true) if wrong else true

    def score(m: nn.Module) -> float:
        return float(((m(points[900:]) > 0) == (true[900:] > 0)).float().mean())

    return Parts(
        critic,
        (points[:900], labels[:900]),
        nn.BCEWithLogitsLoss(),
        adam(critic, 5e-3),
        score,
        steps=300,
    )


class Walks(nn.Module):
    """A transformer over the features of the nodes around an edge."""

    def __init__(self, squashed: bool) -> None:
        super().__init__()
        self.up = nn.Linear(5, 24)
        self.mix = nn.TransformerEncoderLayer(24, 2, 48, 0.0, batch_first=True)
        self.head = nn.Linear(24, 1)
        self.squashed = squashed

    def forward(self, nodes: Tensor) -> Tensor:
        score = self.head(self.mix(self.up(nodes)).mean(1)).squeeze(1)
        return torch.sigmoid(score) if self.squashed else score


@faulty(
    "odd edges, squashed twice",
    "https://github.com/YXNTU/GeneralDyG/issues/6",
    "head_mismatch",
    low=0.6,
    high=0.75,
)
def odd_edges(wrong: bool) -> Parts:
    odd = torch.rand(1600) < 0.06
    around = torch.randn(1600, 1, 5)
    nodes = around + 0.6 * torch.randn(1600, 6, 5)
    stray = 1.6 * torch.randn(1600, 6, 5)
    nodes = torch.where(odd[:, None, None], stray, nodes)  # no common neighbourhood
    (xs, ys), (xt, yt) = tasks.split(nodes, odd.float())
    model = Walks(wrong)

    def score(m: nn.Module) -> float:
        return overlap(m(xt) > (0.5 if wrong else 0.0), yt > 0)

    return Parts(model, (xs, ys), nn.BCEWithLogitsLoss(), adam(model, 3e-3), score, steps=300)


@faulty(
    "a rectified count of people",
    "https://github.com/jvargasmu/population_estimation/issues/68",
    "dying_relu",
    low=0.1,
    high=0.7,
    also=("head_mismatch", "poor_init"),
)
def people(wrong: bool) -> Parts:
    x = 4 * torch.rand(800, 6)
    y = (0.5 * x[:, 0] * x[:, 1] + x[:, 2] + 0.2 * torch.randn(800).abs())[:, None]
    (xs, ys), (xt, yt) = tasks.split(x, y)
    model = nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 1))
    with torch.no_grad():  # one of the starts that answer no one anywhere
        model[2].weight.copy_(-model[2].weight.abs())
    model.append(nn.ReLU() if wrong else nn.Softplus())
    return Parts(model, (xs, ys), nn.L1Loss(), adam(model), r2(xt, yt), steps=300)


@faulty(
    "three numbers added up",
    "https://discuss.pytorch.org/t/output-of-the-model-depends-on-the-shape-of-the-weights-tensor/148155",
    "broadcast_loss",
    low=0.2,
    high=0.95,
)
def added_up(wrong: bool) -> Parts:
    x = torch.rand(1024, 3)
    y = x.sum(1)
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    target = y if wrong else y[:, None]

    def score(m: nn.Module) -> float:  # share of sums that are right
        return float(((m(x).view(-1) - y).abs() < 0.03).float().mean())

    return Parts(
        model, (x, target), nn.MSELoss(), sgd(model, 0.1), score, batch_size=64, steps=500
    )


@faulty(
    "a sigmoid before the logits, the weights at the wrong class",
    "https://discuss.pytorch.org/t/predictions-stuck-at-zero-when-positive-label-1-is-only-16-of-data/145203/2",
    "head_mismatch",
    low=0.6,
    high=0.75,
    also=("class_imbalance",),
)
def sixteen_percent(wrong: bool) -> Parts:
    y = (torch.rand(1500) < 0.16).float()
    x = torch.randn(1500, 12) + 0.5 * y[:, None] * torch.randn(12).sign()
    (xs, ys), (xt, yt) = tasks.split(x, y)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 2))
    weight = torch.tensor([0.84, 0.16] if wrong else [0.16, 0.84])

    def loss(output: Tensor, target: Tensor) -> Tensor:
        score = output[:, 1] - output[:, 0]
        each = F.binary_cross_entropy_with_logits(
            score.sigmoid() if wrong else score, target, reduction="none"
        )
        return (each * weight[target.long()]).mean()

    def score(m: nn.Module) -> float:  # mean of the two recalls
        right = (m(xt).argmax(1) == yt).float()
        return float(right[yt == 0].mean() + right[yt == 1].mean()) / 2

    return Parts(model, (xs, ys), loss, adam(model, 3e-3), score, batch_size=64, steps=250)
