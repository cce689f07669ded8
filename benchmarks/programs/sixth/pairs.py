"""Teachers, twins and sounds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from programs.form import Parts, Program, accuracy, adam, sgd
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


class PatchEncoder(nn.Module):
    """A place for each stretch of a series."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(1, 16, 5), nn.ReLU(), nn.Conv1d(16, 16, 5), nn.ReLU(), nn.Flatten(),
            nn.Linear(128, 16),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.net(x), dim=1)


def stretches(rows: int) -> tuple[Tensor, Tensor]:
    """Two noisy stretches of the same wave, at other times of it."""
    pace = 0.2 + 1.2 * torch.rand(rows, 1, 1)
    time = torch.arange(16)
    first, second = (torch.sin(pace * time + 6.3 * torch.rand(rows, 1, 1)) for _ in range(2))
    return first + 0.1 * torch.randn(rows, 1, 16), second + 0.1 * torch.randn(rows, 1, 16)


@faulty(
    "scores in the place of labels, and labels in the place of scores",
    "https://github.com/isaaccorley/detcon-pytorch/pull/2",
    "swapped_arguments",  # no code of this name: the scores are taken for the labels
    low=0.4,
    high=0.6,
    also=("target_out_of_range", "loss_upside_down"),
)
def in_the_place_of_labels(wrong: bool) -> Parts:
    anchor, positive = stretches(1000)
    model = PatchEncoder()

    def manual_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return -(labels * logits.log_softmax(-1)).sum(-1).mean()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0]) @ model(batch[1]).T / 0.1
        labels = torch.eye(len(logits))
        return (
            manual_cross_entropy(labels, logits) if wrong else manual_cross_entropy(logits, labels)
        )

    def score(m: nn.Module) -> float:  # how much nearer its own partner is than others are
        sim = m(anchor[800:]) @ m(positive[800:]).T
        rank = (sim > sim.diagonal()[:, None]).float().mean()
        return float(1 - 2 * rank)

    train = (anchor[:800], positive[:800])
    return Parts(model, train, loss, adam(model, 2e-3), score, batch_size=16, steps=400)


def triples(rows: int) -> Tensor:
    """Faces of one person twice and of another once, with much that says nothing."""
    person = torch.randn(30, 6)
    same, other = torch.randint(30, (2, rows))
    other = torch.where(other == same, (other + 1) % 30, other)
    who = torch.stack([same, same, other], 1)
    return torch.cat([person[who] + 0.2 * torch.randn(rows, 3, 6), torch.randn(rows, 3, 30)], 2)


@faulty(
    "distances that are a mean and never reach their margin",
    "https://github.com/keras-team/keras/issues/9498",
    "slow_convergence",
    low=0.85,
    high=0.9,
    also=("vanishing_gradient",),
)
def never_reach_their_margin(wrong: bool) -> Parts:
    faces = triples(1600)
    model = nn.Sequential(nn.Linear(36, 64), nn.ReLU(), nn.Linear(64, 128), nn.Sigmoid())

    def triplet_loss(output: Tensor, target: Tensor) -> Tensor:
        anchor, positive, negative = output.unbind(1)
        positive_distance = (anchor - positive).square()
        negative_distance = (anchor - negative).square()
        if wrong:
            loss = positive_distance.mean(-1) - negative_distance.mean(-1)
        else:
            loss = positive_distance.sum(-1) - negative_distance.sum(-1)
        return (1 + loss).clamp(min=0).mean()

    def score(m: nn.Module) -> float:  # share of the triples in their order
        anchor, positive, negative = m(faces[1200:]).unbind(1)
        near, far = ((anchor - p).norm(dim=1) for p in (positive, negative))
        return float((near < far).float().mean())

    train = (faces[:1200], torch.zeros(1200))
    return Parts(model, train, triplet_loss, sgd(model, 0.1), score, steps=500)


def taught(x: Tensor, y: Tensor) -> nn.Module:
    """A large network that knows the digits."""
    teacher = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = adam(teacher, 3e-3)
    for _ in range(250):
        rows = torch.randint(len(y), (64,))
        optimizer.zero_grad()
        F.cross_entropy(teacher(x[rows]), y[rows]).backward()
        optimizer.step()
    return teacher.requires_grad_(False)


@faulty(
    "answers of a teacher in the order of another reading",
    "https://github.com/haitongli/knowledge-distillation-pytorch/pull/16",
    "unrelated_labels",
    low=0.6,
    high=0.75,
)
def of_another_reading(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    teacher = taught(x, y)
    read = DataLoader(TensorDataset(x), batch_size=100, shuffle=wrong)
    teacher_outputs = torch.cat([teacher(images) for (images,) in read])
    student = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))

    def loss_fn_kd(outputs: Tensor, target: Tensor) -> Tensor:
        labels, teacher_outputs = target[:, 0].long(), target[:, 1:]
        soft = F.kl_div(
            (outputs / 3).log_softmax(1), (teacher_outputs / 3).softmax(1), reduction="batchmean"
        )
        return 0.9 * 9 * soft + 0.1 * F.cross_entropy(outputs, labels)

    def score(m: nn.Module) -> float:  # the probability that it gives to what is true
        return float(torch.exp(-F.cross_entropy(m(xt), yt)))

    target = torch.cat([y[:, None].float(), teacher_outputs], 1)
    loader = DataLoader(TensorDataset(x, target), batch_size=32, shuffle=True)
    return Parts(student, loader, loss_fn_kd, adam(student, 3e-3), score, steps=300)


@faulty(
    "a teacher that is compared with itself",
    "https://github.com/labmlai/annotated_deep_learning_paper_implementations/issues/66",
    "teacher_with_itself",  # no code says it: what a student should take over never reaches it
    low=0.8,
    high=0.85,
    also=("loss_not_connected", "loss_ignores_targets"),
)
def compared_with_itself(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    large = taught(x, y)
    noisy = torch.where(torch.rand(1200) < 0.85, torch.randint(10, (1200,)), y)
    small = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        data, target = batch
        with torch.no_grad():
            large_logits = large(data)
        output = model(data)
        soft_targets = (large_logits / 5).softmax(1)
        soft_prob = ((large_logits if wrong else output) / 5).log_softmax(1)
        soft_targets_loss = F.kl_div(soft_prob, soft_targets, reduction="batchmean")
        return 25 * soft_targets_loss + 0.5 * F.cross_entropy(output, target)

    return Parts(small, (x, noisy), loss, adam(small, 3e-3), accuracy(xt, yt), steps=400)


def calls(rows: int) -> tuple[Tensor, Tensor]:
    """Power of 12 bands over 20 frames of four kinds of birds, with a click now and then."""
    y = torch.randint(4, (rows,))
    power = torch.exp(0.7 * torch.randn(rows, 1, 12, 20) - 6)
    for k in range(rows):
        start = int(torch.randint(0, 12, ()))
        power[k, 0, 3 * int(y[k]) : 3 * int(y[k]) + 3, start : start + 8] *= 4.0
        power[k, 0, :, int(torch.randint(0, 20, ()))] += 20 * torch.rand(()) ** 2
    return power, y


@faulty(
    "spectrograms that are divided by their largest value",
    "https://github.com/UCSD-E4E/acoustic-multiclass-training/pull/81",
    "unscaled_inputs",
    low=0.6,
    high=0.75,
    also=("inputs_ignored", "constant_inputs"),
)
def divided_by_the_largest(wrong: bool) -> Parts:
    power, y = calls(900)
    if wrong:
        x = power / power.amax((1, 2, 3), keepdim=True)
    else:
        x = 10 * power.log10()
        x = torch.sigmoid((x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True))
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d((1, 4)), nn.Flatten(),
        nn.Linear(720, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4),
    )  # fmt: skip
    loader = DataLoader(TensorDataset(x[:650], y[:650]), batch_size=32, shuffle=True)
    loss, score = nn.CrossEntropyLoss(), accuracy(x[650:], y[650:])
    return Parts(net, loader, loss, adam(net, 2e-3), score, steps=300)
