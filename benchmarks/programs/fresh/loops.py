"""Training loops that break a law of a step, and the same loops repaired."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.form import Loop, Watch, accuracy, adam, r2, sgd
from programs.frozen import tasks
from programs.frozen.loops import draw, perceptron

LOOPS: list[Loop] = []
broken = tasks.loops_into(LOOPS)
BCE = F.binary_cross_entropy_with_logits


def ring(rows: int) -> Tensor:
    """Points on a noisy circle."""
    angle = 6.3 * torch.rand(rows, 1)
    return torch.cat([angle.cos(), angle.sin()], 1) * (1 + 0.1 * torch.randn(rows, 1))


def told_apart(critic: nn.Module) -> float:
    """Share of points on the circle, far from it and in its middle that are told right."""
    far = 2.5 * F.normalize(torch.randn(400, 2), dim=1)
    right = torch.cat([critic(ring(400)) > 0, critic(far) < 0, critic(0.2 * far) < 0])
    return float(right.float().mean())


@broken(
    "the generator's step twice, the critic's never",
    "https://github.com/Lornatang/ESRGAN-PyTorch/issues/39",
    "step_never_called",
    low=0.7,
    high=0.85,
)
def step_twice(wrong: bool, watch: Watch) -> float:
    paint = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    critic = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1))
    nn.init.normal_(critic[0].weight, std=1.5)
    painter, judge = adam(paint, 1e-4), adam(critic, 2e-2)
    with watch(critic, judge):
        for _ in range(300):
            real, fake = ring(64), 1.2 * torch.randn(64, 2) + 0.1 * paint(torch.randn(64, 4))
            painter.zero_grad()
            pleased = critic(fake)
            BCE(pleased, torch.ones_like(pleased)).backward()
            painter.step()
            judge.zero_grad()
            seen, made = critic(real), critic(fake.detach())
            (BCE(seen, torch.ones_like(seen)) + BCE(made, torch.zeros_like(made))).backward()
            (painter if wrong else judge).step()
    return told_apart(critic)


class Critics(nn.Module):
    """Two critics, each of its own half of a signal's points, and the sum of what they say."""

    def __init__(self) -> None:
        super().__init__()
        self.resolution = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        self.period = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, signal: Tensor) -> Tensor:
        return self.resolution(signal[:, ::2]) + self.period(signal[:, 1::2])


@broken(
    "the parameters of one critic twice",
    "https://github.com/line/open-universe/issues/5",
    "missing_from_optimizer",
    low=0.82,
    high=0.88,
    also=("duplicated_parameters",),
)
def critic_twice(wrong: bool, watch: Watch) -> float:
    signal = torch.randn(1200, 16)
    odd = (signal[:, 1] + signal[:, 3] - signal[:, 5] + 0.7 * signal[:, 0] > 0).float()[:, None]
    model = Critics()
    other = model.resolution if wrong else model.period
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what is twice in a group
        optimizer = torch.optim.AdamW(
            [*model.resolution.parameters(), *other.parameters()], lr=1e-2
        )
    with watch(model, optimizer):
        for rows, target in draw(signal[:900], odd[:900], 250):
            optimizer.zero_grad()
            BCE(model(rows), target).backward()
            optimizer.step()
    return float(((model(signal[900:]) > 0) == (odd[900:] > 0)).float().mean())


def corridor(length: int, gamma: float = 0.9) -> Tensor:
    """What the places of a corridor are worth, with a prize at its end."""
    return gamma ** (length - 1 - torch.arange(length))


@broken(
    "a target network of the first day",
    "https://github.com/higgsfield-ai/higgsfield/issues/14",
    "target_never_updated",  # no alarm says it: the network learns what it is told
    low=0.6,
    high=0.85,
)
def first_day(wrong: bool, watch: Watch) -> float:
    places = torch.eye(8)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    target = copy.deepcopy(model)
    optimizer = adam(model, 5e-3)
    with watch(model, optimizer):
        for step in range(400):
            now = torch.randint(8, (32,))
            end = now == 7
            with torch.no_grad():
                later = target(places[(now + 1).clamp(max=7)])[:, 0]
            worth = torch.where(end, torch.ones(()), 0.9 * later)
            optimizer.zero_grad()
            F.mse_loss(model(places[now])[:, 0], worth).backward()
            optimizer.step()
            if not wrong and step % 20 == 19:
                target.load_state_dict(model.state_dict())
    return r2(places, corridor(8))(model)


class Notes(nn.Module):
    """A recurrent network by hand whose gradients grow with the length of the music."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.RNN(2, 24, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(24, 1)
        nn.init.eye_(self.core.weight_hh_l0)
        self.core.weight_hh_l0.data.mul_(1.08)

    def forward(self, notes: Tensor) -> Tensor:
        return self.head(self.core(notes)[0][:, -1])


@broken(
    "clipped after the step",
    "https://github.com/jongwook/onsets-and-frames/issues/24",
    "clipped_after_step",  # no alarm says it: gradients as long as before
    low=0.3,
    high=0.6,
    also=("loss_spike", "exploding_gradient"),
)
def after_the_step(wrong: bool, watch: Watch) -> float:
    notes = torch.randn(800, 30, 2)
    y = notes[:, :, :1].mean(1) * 30**0.5
    model = Notes()
    optimizer = sgd(model, 0.02)
    with watch(model, optimizer):
        for rows, target in draw(notes[:600], y[:600], 300):
            optimizer.zero_grad()
            F.mse_loss(model(rows), target).backward()
            if not wrong:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if wrong:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return r2(notes[600:], y[600:])(model)


@broken(
    "an optimizer for each task",
    "https://github.com/alan-turing-institute/deepsensor/issues/47",
    "step_never_called",
    low=0.75,
    high=0.85,
)
def each_task(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = perceptron()
    optimizer = sgd(model, 0.02, momentum=0.95)
    with watch(model, optimizer):
        for rows, target in draw(x, y, 150):
            if wrong:  # its momentum starts from nothing each time
                optimizer = sgd(model, 0.02, momentum=0.95)
            optimizer.zero_grad()
            F.cross_entropy(model(rows), target).backward()
            optimizer.step()
    return accuracy(xt, yt)(model)


@broken(
    "averaged weights left in after a look at validation",
    "https://github.com/PKU-YuanGroup/Open-Sora-Plan/issues/186",
    "weights_overwritten",
    low=0.8,
    high=0.88,
)
def left_in(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = perceptron()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = sgd(model, 0.1)
    with watch(model, optimizer):
        for step, (rows, target) in enumerate(draw(x, y, 300)):
            optimizer.zero_grad()
            F.cross_entropy(model(rows), target).backward()
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, 0.01)
            if step % 15 == 14:
                own = copy.deepcopy(model.state_dict())
                model.load_state_dict(average.state_dict())
                with torch.no_grad():
                    F.cross_entropy(model(xt[:100]), yt[:100])
                if not wrong:
                    model.load_state_dict(own)
    return accuracy(xt, yt)(model)


@broken(
    "a decay of what has decayed",
    "https://github.com/fcomitani/simpsom/issues/30",
    "learning_rate_collapsed",
    low=0.7,
    high=0.85,
)
def decayed(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = perceptron()
    steps = 300
    optimizer = sgd(model, 0.2)
    with watch(model, optimizer):
        for step, (rows, target) in enumerate(draw(x, y, steps)):
            group = optimizer.param_groups[0]
            group["lr"] = (group["lr"] if wrong else 0.2) * math.exp(-step / steps)
            optimizer.zero_grad()
            F.cross_entropy(model(rows), target).backward()
            optimizer.step()
    return accuracy(xt, yt)(model)


class Sequences(nn.Module):
    """An LSTM that says which of four kinds a sequence is."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.core = nn.Embedding(8, 12), nn.LSTM(12, 24, batch_first=True)
        self.head = nn.Linear(24, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.core(self.words(tokens))[0].amax(1))


def generated(steps: int, seed: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of sequences; two signs among six others, at random places, tell the kind."""
    for _ in range(steps):
        g = torch.Generator()
        g.manual_seed(seed) if seed is not None else g.seed()
        tokens = torch.randint(6, (32, 10), generator=g) + 2
        first, second = torch.randint(2, (2, 32), generator=g)
        rows = torch.arange(32)
        tokens[rows, torch.randint(0, 5, (32,), generator=g)] = first
        tokens[rows, torch.randint(5, 10, (32,), generator=g)] = second
        yield tokens, 2 * first + second


@broken(
    "a generator that is seeded for each batch",
    "https://github.com/Atcold/NYU-DLSP20/issues/851",
    "repeated_batch",
    low=0.7,
    high=0.85,
)
def seeded(wrong: bool, watch: Watch) -> float:
    model = Sequences()
    optimizer = adam(model, 1e-2)
    with watch(model, optimizer):
        for tokens, kind in generated(250, 1 if wrong else None):
            optimizer.zero_grad()
            F.cross_entropy(model(tokens), kind).backward()
            optimizer.step()
    fresh = list(generated(10, None))
    return sum(accuracy(tokens, kind)(model) for tokens, kind in fresh) / 10


@broken(
    "micro-batches added and never divided",
    "https://github.com/openai/guided-diffusion/issues/111",
    "accumulation_not_averaged",  # no alarm says it: a step sixteen times as long
    low=0.5,
    high=0.85,
    also=("loss_is_a_sum", "exploding_gradient", "loss_spike"),
)
def never_divided(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = nn.Sequential(
        nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)
    )
    optimizer = sgd(model, 0.1, momentum=0.9)
    micro = 16
    with watch(model, optimizer):
        for step, (rows, target) in enumerate(draw(x, y, 150 * micro, 8)):
            loss = F.cross_entropy(model(rows), target)
            (loss if wrong else loss / micro).backward()
            if step % micro == micro - 1:
                optimizer.step()
                optimizer.zero_grad()
    return accuracy(xt, yt)(model)


class Detector(nn.Module):
    """A small network that says where a bright square is."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten())
        self.where = nn.Linear(512, 2)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.where(self.body(pictures))


@broken(
    "no backward pass at all",
    "https://github.com/Goingqs/PyramidBox/issues/7",
    "no_gradient",
    low=0.2,
    high=0.6,
    also=("step_before_backward",),
)
def no_backward(wrong: bool, watch: Watch) -> float:
    pictures, masks = tasks.shapes()
    grid = torch.stack(torch.meshgrid(*[torch.arange(8.0)] * 2, indexing="ij"))
    place = (masks * grid).sum((2, 3)) / masks.sum((2, 3)) - 3.5
    model = Detector()
    optimizer = sgd(model, 0.01, momentum=0.9, weight_decay=5e-4)
    seen = 0.0
    with watch(model, optimizer):
        for rows, target in draw(pictures[:450], place[:450], 200):
            optimizer.zero_grad()
            loss = F.smooth_l1_loss(model(rows), target)
            if not wrong:
                loss.backward()
            optimizer.step()
            seen += loss.item()
    return r2(pictures[450:], place[450:])(model)


@broken(
    "a copy that is sent out and trained",
    "https://github.com/OpenMined/PySyft/issues/2207",
    "no_gradient",
    low=0.3,
    high=0.85,
    also=("optimizer_of_another_model", "unmoved_parameters", "loss_not_connected"),
)
def sent_out(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = perceptron()
    optimizer = sgd(model, 0.1)
    worker = copy.deepcopy(model) if wrong else model
    with watch(model, optimizer):
        for rows, target in draw(x, y, 250):
            optimizer.zero_grad()
            F.nll_loss(F.log_softmax(worker(rows), 1), target).backward()
            optimizer.step()
    return accuracy(xt, yt)(model)


@broken(
    "a student whose gradients pile up",
    "https://github.com/opendp/smartnoise-sdk/issues/280",
    "gradients_not_cleared",
    low=0.9,
    high=0.93,
)
def pile_up(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.blobs(rows=1600, apart=1.0)
    teachers = [nn.Linear(12, 4) for _ in range(3)]
    student = nn.Sequential(
        nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)
    )
    engines = [adam(teacher) for teacher in teachers]
    optimizer = sgd(student, 0.5)
    with watch(student, optimizer):
        for rows, target in draw(x, y, 250):
            for teacher, engine in zip(teachers, engines, strict=True):
                engine.zero_grad()
                F.cross_entropy(teacher(rows), target).backward()
                engine.step()
            with torch.no_grad():
                votes = sum(F.one_hot(t(rows).argmax(1), 4) for t in teachers)
                said = (votes + 0.5 * torch.randn(len(rows), 4)).argmax(1)
            if not wrong:
                optimizer.zero_grad()
            F.cross_entropy(student(rows), said).backward()
            optimizer.step()
    return accuracy(xt, yt)(student)
