"""The budget of `cure` is kept, on a clock that only the program's own passes move."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from faulty import CE, classes, deep, numbers, sgd
from miswired import attention
from tikhon.cures import cure
from wired import Fn


class Slow(nn.Module):
    """A network each pass of which takes a second of a clock that nothing else moves."""

    def __init__(self, core: nn.Module, clock: list[float], seconds: float) -> None:
        super().__init__()
        self.core, self.seconds = core, seconds
        self.tick = lambda: clock.append(clock[-1] + self.seconds)

    def forward(self, x):
        self.tick()
        return self.core(x)


def mixed():
    return Fn(lambda m, x: m.head(x * m.rate(x).softmax(0)), rate=nn.Linear(16, 1),
              head=nn.Linear(16, 4))  # fmt: skip


def sentences():
    torch.manual_seed(0)
    x = torch.randint(6, (200, 7))
    return x, x.roll(-1, 1)


PROGRAMS = {
    "deep": (lambda: deep(10, nn.Tanh), classes, CE),
    "shallow": (lambda: deep(1, nn.ReLU), classes, CE),
    "rows mixed": (mixed, classes, CE),
    "broadcast": (lambda: nn.Linear(6, 1), lambda: (numbers()[0], numbers()[1].flatten()),
                  nn.functional.mse_loss),
    "the future": (attention("by hand", False), sentences,
                   lambda o, y: CE(o.reshape(-1, o.shape[-1]), y.reshape(-1))),
}  # fmt: skip


@pytest.mark.parametrize(("name", "budget"), [*((name, 60) for name in PROGRAMS), ("deep", 600)])
def test_a_budget_of_wall_time_is_kept_within_a_tenth(name, budget, monkeypatch):
    torch.manual_seed(0)
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[-1])
    build, data, loss = PROGRAMS[name]
    model = Slow(build(), clock, 1.0)
    told = []
    found = cure(
        model, data(), loss, optimizer=sgd(0.05)(model.parameters()), valid=data(), seeds=2,
        budget=f"{budget}s", on_progress=lambda text, done, total: told.append((done, total)),
    )  # fmt: skip
    assert found.seconds == clock[-1] <= 1.1 * budget
    assert told == sorted(told)
    assert {total for _, total in told} == {budget}
