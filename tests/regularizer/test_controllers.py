"""What a controller that raises leaves behind: the rest of the step, and a state to go on from.

A slow reference in plain numbers knows the weights and the strengths after every action.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import nn, optim

import tikhon as tk
from tikhon.regularizer.controller import Controller

LR = 0.1
NAMES = ("0.weight", "1.weight")


@dataclass(frozen=True, eq=False)
class Counting(Controller):
    """Its strength is a tenth of the times it was asked; it fails after it has counted."""

    failing: ClassVar[set[str]] = set()
    start: float = 0.1
    per: str = "layer"

    def next(self, strength, observation, step):
        memory = observation.memory
        memory["asked"] = memory.get("asked", 1) + 1
        if observation.readings[0].name in self.failing:
            raise RuntimeError("no memory for the look")
        return memory["asked"] / 10


class CountingFirst(Counting):
    """The same, asked before the prox that it serves."""

    phase = "before_prox"


class Loops(RuleBasedStateMachine):
    """A plain loop over two layers whose L1 answers to a controller of its own each."""

    @initialize(kind=st.sampled_from([Counting, CountingFirst]))
    def attach(self, kind):
        torch.manual_seed(0)
        Counting.failing.clear()
        self.first = kind is CountingFirst
        self.model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
        self.optimizer = optim.SGD(self.model.parameters(), lr=LR)
        self.handle = tk.regularize(self.model, self.optimizer, tk.Term(tk.L1(), strength=kind()))
        self.weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.asked, self.steps = dict.fromkeys(NAMES, 1), 0

    @rule(failing=st.sets(st.sampled_from(NAMES)))
    def step(self, failing):
        for param in self.model.parameters():
            param.grad = torch.randn_like(param)
        Counting.failing.update(failing)
        try:
            if failing:
                with pytest.raises(RuntimeError, match="no memory for the look"):
                    self.optimizer.step()
            else:
                self.optimizer.step()
        finally:
            Counting.failing.clear()
        for name, param in self.model.named_parameters():
            after = self.asked[name] + (name not in failing)
            strength = (after if self.first else self.asked[name]) / 10
            moved = self.weights[name] - LR * param.grad
            self.weights[name] = moved.sign() * (moved.abs() - LR * strength).clamp_min(0)
            self.asked[name] = after
        self.steps += 1

    @rule()
    def copy_all(self):
        self.model, self.optimizer, self.handle = copy.deepcopy(
            (self.model, self.optimizer, self.handle)
        )

    @rule()
    def load_its_own_state(self):
        self.handle.load_state_dict(self.handle.state_dict())

    @invariant()
    def all_is_as_the_reference_has_it(self):
        for name, param in self.model.named_parameters():
            torch.testing.assert_close(param.detach(), self.weights[name])
        state = self.handle.state_dict()
        strengths = {f"{name}/L1": n / 10 for name, n in self.asked.items()}
        assert state["strengths"] == pytest.approx(strengths)
        kept = {name: memory.get("asked", 1) for name, memory in state["memory"].items()}
        assert kept == {f"{name}/L1": n for name, n in self.asked.items()}
        assert state["steps"] == self.steps


Loops.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestLoops = Loops.TestCase


def test_a_strength_for_each_group_counts_apart():
    """The second group has no gradients in the first step, so its controller is not asked."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    groups = [{"params": [layer.weight]} for layer in model]
    optimizer = optim.SGD(groups, lr=LR)
    reg = tk.regularize(model, optimizer, tk.Term(tk.L1(), strength=Counting(per="group")))
    for layers in ([0], [0, 1]):
        for number in layers:
            model[number].weight.grad = torch.zeros_like(model[number].weight)
        optimizer.step()
    assert list(reg.strengths().values()) == [0.3, 0.2]
    assert len(reg.live_strengths()) == 2
