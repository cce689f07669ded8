"""GradScaler: scaled gradients, skipped steps, fused and not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn, optim

import tikhon as tk
import tikhon.regularizer.attachment as attachment_module
from regularizer.problems import equal, regression
from tikhon.regularizer.controller import Controller

LOSS = regression(dtype=torch.float32)
KINDS = {
    "SGD": (optim.SGD, {"lr": 0.1}),
    "SGD fused": (optim.SGD, {"lr": 0.1, "fused": True}),
    "AdamW": (optim.AdamW, {"lr": 0.02, "weight_decay": 0.0}),
    "AdamW fused": (optim.AdamW, {"lr": 0.02, "weight_decay": 0.0, "fused": True}),
}
TERMS = {
    "L2": tk.L2(0.3),
    "L2 decoupled": tk.Term(tk.L2(0.3), how="decoupled"),
    "Huber": tk.Huber(0.3),
    "L1": tk.L1(0.02),
    "MaxNorm": tk.MaxNorm(0.5),
}


def build(kind, term, extra=()):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = KINDS[kind][0](model.parameters(), **KINDS[kind][1])
    reg = tk.regularize(model, optimizer, {"0.weight": [term, *extra]})
    return model, optimizer, reg


def steps(model, optimizer, scaler, count=4, unscale=False):
    for _ in range(count):
        optimizer.zero_grad()
        scaler.scale(LOSS(model)).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("kind", KINDS)
def test_scaled_training_is_plain_training(kind, term, unscale):
    plain, scaled = build(kind, TERMS[term]), build(kind, TERMS[term])
    steps(*plain[:2], torch.amp.GradScaler("cpu", enabled=False))
    steps(*scaled[:2], torch.amp.GradScaler("cpu", init_scale=1024.0), unscale=unscale)
    for one, other in zip(plain[0].parameters(), scaled[0].parameters()):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_happens_on_a_skipped_step(kind, term):
    schedule = tk.Term(tk.L2(), strength=tk.schedules.Linear(0.5, 1.0, steps=10))
    model, optimizer, reg = build(kind, TERMS[term], [schedule] if term != "L2" else [])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    steps(model, optimizer, scaler, 1)
    before = [p.detach().clone() for p in model.parameters()]
    state, seen = reg.state_dict(), reg.steps
    optimizer.zero_grad()
    scaler.scale(LOSS(model) * torch.tensor(float("inf"))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p.detach(), b) for p, b in zip(model.parameters(), before))
    assert (reg.steps, reg.state_dict()["strengths"]) == (seen, state["strengths"])
    steps(model, optimizer, scaler, 1)
    assert reg.steps == seen + 1


def test_autocast_run_reaches_exact_zeros():
    model, optimizer, reg = build("AdamW fused", tk.L1(0.2))
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(120):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = LOSS(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert reg.sparsity()["0.weight"] > 0.5


class OnDevice(torch.Tensor):
    """Stands for a tensor on a device: its value, and that of all computed from it, is not read.

    A copy to the host that does not wait may be read once the event that follows it has come.
    """

    @property
    def device(self):
        return torch.device("cuda")

    @classmethod
    def __torch_function__(cls, kind, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = kind.__name__
        if name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
            raise AssertionError(f"host sync by {name}")
        if name == "to" and args[1:] == ("cpu",):
            assert kwargs.get("non_blocking"), "host sync by to('cpu')"
            return args[0].as_subclass(torch.Tensor).clone()
        return super().__torch_function__(kind, types, args, kwargs)


MOVING = {
    "constant": {},
    "schedule": {"strength": tk.schedules.Linear(0.1, 0.9, steps=4)},
    "any callable": {"strength": lambda step: 0.1 * (1 + step)},
}


@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize("penalty", [tk.L1(0.2), tk.L2(0.3), tk.MaxNorm(0.5)], ids=repr)
@pytest.mark.parametrize("kind", ["SGD fused", "AdamW fused"])
def test_a_step_on_a_device_is_not_waited_for(kind, penalty, moving, monkeypatch):
    """The skip enters by arithmetic, and the count of steps a step later."""
    events = []

    class Event:
        def __init__(self, device):
            assert device == torch.device("cuda")

        def record(self):
            events.append("record")

        def synchronize(self):
            events.append("synchronize")

    monkeypatch.setattr(torch, "Event", Event)
    term = tk.Term(penalty, **MOVING[moving]) if not penalty.constraint else penalty
    (model, optimizer, reg), (twin, plain, other) = build(kind, term), build(kind, term)
    for skipped in (0.0, 1.0, 0.0, 1.0, 1.0, 0.0):
        for network, owner, place in ((model, optimizer, OnDevice), (twin, plain, torch.Tensor)):
            owner.zero_grad()
            (4 * LOSS(network)).backward()
            owner.grad_scale = torch.tensor(4.0).as_subclass(place)
            owner.found_inf = torch.tensor(skipped).as_subclass(place)
            owner.step()
    assert equal(model, twin)
    assert reg.strengths() == other.strengths()
    if moving != "constant" and not penalty.constraint:
        assert reg.steps == other.steps == 3
        assert events == ["record", "synchronize"] * 6  # never two in flight
    else:
        assert not events


@dataclass(frozen=True, eq=False)
class EverySecond(Controller):
    """Doubles the strength at every second step."""

    start: float = 0.1
    every: int = 2
    per: str = "term"

    def next(self, strength, observation, step):
        return 2 * strength


def test_a_step_at_which_a_controller_looks_is_read_at_once(monkeypatch):
    """A controller reads weights there in any case, and must not on a skipped step."""
    model, optimizer, reg = build("SGD fused", tk.Term(tk.L1(), strength=EverySecond()))
    monkeypatch.setattr(attachment_module, "DeferredFlag", lambda flag: False)
    for expected in (0.1, None):
        LOSS(model).backward()
        optimizer.found_inf = torch.zeros(()).as_subclass(OnDevice)
        if expected is None:
            with pytest.raises(AssertionError, match="host sync by __bool__"):
                optimizer.step()
        else:
            optimizer.step()
            assert set(reg.strengths().values()) == {expected}
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert set(reg.strengths().values()) == {0.1}
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert set(reg.strengths().values()) == {0.2}
