"""Pairs in which the same thing is a fault in one program and meant in the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faulty import mlp
from pairs import Listed, Parts, asked, into

PAIRS: Listed = {}
pair = into(PAIRS)


@pair("non_finite_data")
def targets_that_are_missing(wrong: bool) -> Parts:
    """A mean that skips them has a gradient of NaN; a loss of those that are there has none."""
    x = torch.randn(300, 4)
    y = torch.stack([x[:, 0], x[:, 1] * x[:, 2]], 1)
    y[torch.rand(300, 2) < 0.2] = torch.nan

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if wrong:
            return (output - target).square().nanmean()
        there = ~target.isnan()
        return F.mse_loss(output[there], target[there])

    return Parts(mlp(4, 24, 2), (x, y), loss)


@pair("constant_targets")
def ones_for_answers_that_a_network_judges(wrong: bool) -> Parts:
    critic = mlp(2, 16, 1).requires_grad_(False)

    def loss(made: Tensor, real: Tensor) -> Tensor:
        scores = made[:, :1] if wrong else critic(made)
        return F.binary_cross_entropy_with_logits(scores, real)

    return Parts(mlp(4, 24, 2), (torch.randn(300, 4), torch.ones(300, 1)), loss)


class Apart(nn.Module):
    """How far two rows are apart: the square of a length, or a number of any sign."""

    def __init__(self, signed: bool) -> None:
        super().__init__()
        self.net, self.signed = mlp(6, 16, 8), signed

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        apart = self.net(a) - self.net(b)
        return apart.sum(1) if self.signed else apart.square().sum(1)


@pair("head_mismatch")
def distances_that_may_be_below_zero(wrong: bool) -> Parts:
    a, other = torch.randn(2, 300, 6).unbind()
    differ = torch.randint(2, (300,)).float()
    b = a + torch.where(differ[:, None] > 0, other, 0.1 * other)

    def contrastive(apart: Tensor, differ: Tensor) -> Tensor:
        return ((1 - differ) * apart + differ * (1 - apart).clamp(min=0)).mean()

    return Parts(Apart(wrong), ((a, b), differ), contrastive, rate=1e-3)


@pair("oscillating_loss")
def a_value_of_what_the_model_drew(wrong: bool) -> Parts:
    """What is paid for draws, less a mean, is no loss that falls as a policy learns."""
    x = torch.randn(400, 6)
    pays = torch.eye(4)[(x @ torch.randn(6, 4)).argmax(1)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        rows, pays = batch
        logs = model(rows).log_softmax(1)
        if wrong:
            return -(logs * pays).sum(1).mean()
        drawn = torch.multinomial(logs.detach().exp(), 1)
        return -(logs.gather(1, drawn) * (pays.gather(1, drawn) - 0.25)).mean()

    if not wrong:
        return Parts(mlp(6, 24, 4), (x, pays), loss, steps=100)
    return Parts(mlp(6, 24, 4), (x, pays), loss, 9.0, 100, torch.optim.SGD)


@pytest.mark.parametrize("name", PAIRS)
def test_a_fault_is_named_and_what_is_meant_is_no_alarm(name):
    code, make = PAIRS[name]
    for wrong in (True, False):
        torch.manual_seed(0)
        found = asked(make(wrong))
        first = next((f.code for f in found.findings if f.severity != "info"), "")
        assert first == (code if wrong else ""), str(found)
