"""Kinds of faults that reports describe: named in one program, silent in its twin."""

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


@pair("detached")
def a_slope_that_the_loss_adds_without_its_graph(wrong: bool) -> Parts:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        t = batch[0].detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(t).sum(), t, create_graph=not wrong)
        return (slope - t.cos()).square().mean() + model(torch.zeros(1, 1)).square().mean()

    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    return Parts(net, (3 * torch.rand(60, 1), torch.zeros(60, 1)), loss)


@pair("undefined_operation")
def a_rate_that_may_be_negative(wrong: bool) -> Parts:
    x = torch.randn(120, 6)
    net = nn.Sequential(mlp(6, 16, 1), nn.Identity() if wrong else nn.Softplus())
    counts = torch.poisson(x[:, :1].exp())
    return Parts(net, (x, counts), nn.PoissonNLLLoss(log_input=False))


@pair("categories_as_numbers")
def shops_by_their_number(wrong: bool) -> Parts:
    shop = torch.randint(20, (600,))
    sold = 2 * torch.randn(20)[shop] + 0.1 * torch.randn(600)
    column = (shop[:, None] - 9.5) / 6 if wrong else F.one_hot(shop, 20).float()
    x = torch.cat([column, torch.randn(600, 2)], 1)
    return Parts(mlp(x.shape[1], 16, 1), (x, sold[:, None]), nn.MSELoss(), steps=40)


@pair("unscaled_targets")
def no_bias_for_amounts_far_from_zero(wrong: bool) -> Parts:
    x = torch.randn(200, 5)
    model = nn.Linear(5, 1, bias=not wrong)
    nn.init.constant_(model.bias, 4.0) if not wrong else None
    return Parts(model, (x, 4 + x[:, :1] - x[:, 1:2]), nn.MSELoss(), rate=3e-2, steps=60)


class BothWays(nn.Module):
    """A recurrence in both directions, read at one end or at both."""

    def __init__(self, at_one_end: bool) -> None:
        super().__init__()
        self.at_one_end = at_one_end
        self.memory = nn.GRU(3, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        steps, last = self.memory(x)
        return self.head(steps[:, -1] if self.at_one_end else torch.cat([*last], 1))


@pair("inputs_ignored")
def a_way_back_that_is_read_at_its_first_step(wrong: bool) -> Parts:
    x = torch.randn(120, 12, 3)
    return Parts(BothWays(wrong), (x, x[:, 0].sum(1, keepdim=True)), nn.MSELoss())


@pair("loss_upside_down")
def stacked_triplets_in_another_order(wrong: bool) -> Parts:
    anchor, other = torch.randn(2, 200, 6)
    near = anchor + 0.3 * torch.randn(200, 6)
    rows = torch.stack([anchor, other, near] if wrong else [anchor, near, other], 1)

    def loss(embeddings: Tensor, target: Tensor) -> Tensor:
        return F.triplet_margin_loss(*F.normalize(embeddings, dim=2).unbind(1))

    return Parts(mlp(6, 16, 4), (rows, torch.zeros(200)), loss)


class ActorCritic(nn.Module):
    """Scores of three deeds, and what the state is worth."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = mlp(4, 8, 3), mlp(4, 8, 1)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(state), self.critic(state)[:, 0]


@pair("target_not_detached")
def an_advantage_that_pulls_the_critic(wrong: bool) -> Parts:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        (state, deed), paid = batch
        scores, value = model(state)
        advantage = paid - value
        log_prob = torch.distributions.Categorical(logits=scores).log_prob(deed)
        policy = -(log_prob * (advantage if wrong else advantage.detach())).mean()
        return policy + advantage.square().mean()

    state, deed = torch.randn(120, 4), torch.randint(3, (120,))
    return Parts(ActorCritic(), ((state, deed), state[:, 0]), loss)


def overlap(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and what of the hull is empty; sizes go through a softplus."""
    low, high = output[:, :2], output[:, :2] + F.softplus(output[:, 2:])
    inner = (torch.min(high, target[:, 2:]) - torch.max(low, target[:, :2])).clamp(min=0).prod(1)
    hull = (torch.max(high, target[:, 2:]) - torch.min(low, target[:, :2])).prod(1)
    union = (high - low).prod(1) + (target[:, 2:] - target[:, :2]).prod(1) - inner
    return inner / union, (hull - union) / hull


@pair("loss_not_connected")
def boxes_that_do_not_meet(wrong: bool) -> Parts:
    x = torch.randn(200, 6)
    corner = 8 + x[:, :2].tanh()
    boxes = torch.cat([corner, corner + 2 + x[:, 2:4].sigmoid()], 1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        share, empty = overlap(output, target)
        return (1 - share + (0 if wrong else 1) * empty).mean()

    return Parts(mlp(6, 16, 4), (x, boxes), loss)


@pytest.mark.parametrize("name", PAIRS)
def test_the_fault_is_named_first_and_its_twin_is_silent(name):
    code, make = PAIRS[name]
    torch.manual_seed(0)
    found = asked(make(True))
    assert found.findings[0].code == code, str(found)
    torch.manual_seed(0)
    twin = asked(make(False))
    assert code not in twin.labels, str(twin)
    if name == "boxes_that_do_not_meet":  # outputs in a format of their own
        assert not twin.labels & {"loss_ignores_targets", "loss_upside_down"}, str(twin)


def test_categories_that_the_model_embeds_are_no_numbers():
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shops, self.head = nn.Embedding(20, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.shops(x[:, 0].long()))

    torch.manual_seed(0)
    shop = torch.randint(20, (600,))
    data = torch.stack([shop.float(), torch.randn(600)], 1), 2 * torch.randn(20)[shop][:, None]
    found = asked(Parts(Embedded(), data, nn.MSELoss()))
    assert "categories_as_numbers" not in found.labels, str(found)


def test_a_slope_that_weights_a_part_of_the_loss_has_no_graph_on_purpose():
    def loss(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].detach().clone().requires_grad_()
        output = model(x)
        (slope,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
        return ((1 + slope.norm(dim=1)) * (output - batch[1]).square()[:, 0]).mean()

    torch.manual_seed(0)
    x = torch.randn(120, 4)
    assert "detached" not in asked(Parts(mlp(4, 16, 1), (x, x[:, :1]), loss)).labels


def test_labels_out_of_range_are_told_once_and_explain_a_collapse():
    torch.manual_seed(0)
    x = torch.randn(200, 8)
    y = (x[:, :1] > 0).float()
    found = asked(Parts(mlp(8, 16, 1), (x, y), nn.SoftMarginLoss()))
    assert [f.code for f in found.findings].count("target_out_of_range") == 1
