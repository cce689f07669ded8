"""What a fact says of one program says nothing of another that shows the same number."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tikhon.diagnosis import diagnose
from tikhon.diagnosis.checks import data as data_checks, static
from tikhon.diagnosis.evidence import Evidence
from tikhon.diagnosis.record import Failure
from tikhon.diagnosis.static import _shared
from tikhon.diagnosis.wiring.dataset import _agreement_z


def network(outputs: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, outputs))


def asked(model: nn.Module, data: tuple[Tensor, Tensor], loss, steps: int = 20):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return diagnose(model, data, loss, optimizer=optimizer, steps=steps)


def test_swapped_arguments_of_a_binary_loss_are_named():
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    y = torch.rand(200, 2)
    loss = F.binary_cross_entropy_with_logits
    wrong = asked(network(), (x, y), lambda o, t: loss(t, o))
    assert wrong.findings[0].code == "target_out_of_range", str(wrong)
    assert wrong.findings[0].fix == "F.binary_cross_entropy_with_logits(output, target)"
    right = asked(network(), (x, y), loss)
    assert "target_out_of_range" not in right.labels


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_the_range_of_targets_is_that_of_the_columns_of_the_loss(low):
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    kind = torch.where(x[:, 1] > 0, 1.0, low)
    y = torch.stack([3 * x[:, 0], kind], 1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        number = F.mse_loss(output[:, 0], target[:, 0])
        return number + F.binary_cross_entropy_with_logits(output[:, 1], target[:, 1])

    assert ("target_out_of_range" in asked(network(), (x, y), loss).labels) == (low < 0)


class Masked(nn.Module):
    """Attention in which padding neither looks nor is looked at."""

    def __init__(self, hidden: float) -> None:
        super().__init__()
        self.words, self.head, self.hidden = nn.Embedding(9, 12), nn.Linear(12, 3), hidden

    def forward(self, tokens: Tensor) -> Tensor:
        h, there = self.words(tokens), tokens > 0
        seen = there[:, :, None] & there[:, None, :]
        scores = (h @ h.transpose(1, 2) / 12**0.5).masked_fill(~seen, self.hidden)
        found = torch.softmax(scores, -1) @ h * there[:, :, None]
        return self.head(found.sum(1) / there.sum(1, keepdim=True))


@pytest.mark.parametrize("hidden", [float("-inf"), -1e9])
def test_a_softmax_of_nothing_is_named_at_its_line(hidden):
    torch.manual_seed(0)
    tokens = torch.randint(1, 9, (200, 8)) * (torch.arange(8) < torch.randint(3, 8, (200, 1)))
    share = (tokens == 1).sum(1).clamp(max=2)
    found = asked(Masked(hidden), (tokens, share), nn.CrossEntropyLoss())
    if hidden == -1e9:
        assert "undefined_operation" not in found.labels
        return
    assert found.findings[0].code == "undefined_operation", str(found)
    assert "softmax" in found.findings[0].why
    assert "test_evidence.py:" in found.findings[0].why


class Started(nn.Module):
    """A recurrent network from a state drawn at random, or from zeros."""

    def __init__(self, make) -> None:
        super().__init__()
        self.core, self.head = nn.GRU(2, 16, batch_first=True), nn.Linear(16, 1)
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x, self.make(1, len(x), 16))[0][:, -1])


@pytest.mark.parametrize(("make", "named"), [(torch.randn, True), (torch.zeros, False)])
def test_a_state_drawn_at_random_does_not_mix_rows(make, named):
    torch.manual_seed(0)
    x = torch.randn(200, 4, 2)
    found = asked(Started(make), (x, x.sum((1, 2))[:, None]), nn.MSELoss())
    assert "rows_mixed" not in found.labels, str(found)
    assert ("random_in_eval" in found.labels) == named


def test_targets_that_hold_an_index_are_read_to_the_end():
    """Made-up targets are no indices: the loss refuses them, and the other questions go on."""
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    taken = torch.randint(3, (200,))
    y = torch.stack([taken, x.gather(1, taken[:, None])[:, 0]], 1)

    def loss(values: Tensor, record: Tensor) -> Tensor:
        return F.smooth_l1_loss(values.gather(1, record[:, :1].long()), record[:, 1])

    assert asked(network(3), (x, y), loss).findings[0].code == "broadcast_loss"


def test_dropout_whose_input_is_named_is_read_too():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.dropout(input=self.head(self.body(x).relu()), p=0.5, train=self.training)

    torch.manual_seed(0)
    x = torch.randn(200, 6)
    found = asked(Named(), (x, (x[:, 0] > 0).long()), F.cross_entropy)
    assert found.record.to_dict()["static"]["dropout_at_end"]


@functools.cache
def healthy():
    """The record of a program that learns, with validation rows."""
    torch.manual_seed(0)
    x = torch.randn(300, 6)
    data, valid = [(part, (part[:, 0] > 0).long()) for part in (x[:200], x[200:])]
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    loss = nn.CrossEntropyLoss()
    return diagnose(model, data, loss, optimizer=optimizer, valid=valid, steps=60).record


def ended(**scores):
    """The same record with other scores at its end."""
    record = healthy()
    end = dataclasses.replace(record.points[-1], **scores)
    return dataclasses.replace(record, points=(*record.points[:-1], end))


def test_what_is_learned_is_not_what_generalises():
    assert Evidence(healthy()).final_skill > 0.5
    lost = Evidence(ended(valid_metric=0.5, valid_loss=2.0))
    assert lost.validation_skill < 0.1 < lost.final_skill
    without = Evidence(ended(valid_metric=None, valid_loss=None))
    assert without.validation_skill == without.final_skill > 0.5
    failed = dataclasses.replace(healthy(), failure=Failure(3, "loss", "loss"))
    assert Evidence(failed).final_skill == Evidence(failed).validation_skill == 0.0


@pytest.mark.parametrize(("score", "named"), [(0.95, False), (0.52, True)])
def test_targets_that_validation_finds_again_are_related_to_the_inputs(score, named):
    record = ended(valid_metric=score)
    wiring = {**record.wiring, "relation": 0.0, "related_rows": 1000, "majority": 0.5}
    asked_again = dataclasses.replace(record, wiring=wiring, reference={})
    codes = {
        finding.code for check in data_checks.CHECKS for finding in check(Evidence(asked_again))
    }
    assert ("unrelated_labels" in codes) == named


@pytest.mark.parametrize(("size", "named"), [(9.0, False), (12.0, True)])
def test_the_size_from_which_targets_that_are_not_learned_are_unscaled(size, named):
    record = ended(eval_loss=9.0, metric=0.0, valid_loss=None, valid_metric=None)
    target = {"rms": size, "std": 1.0, "mean": size}
    given = dataclasses.replace(record, data={**record.data, "target": target})
    codes = {finding.code for check in static.CHECKS for finding in check(Evidence(given))}
    assert ("unscaled_targets" in codes) == named


def test_only_layers_with_weights_are_shared():
    layer, squash = nn.Linear(3, 3), nn.Tanh()
    assert _shared(nn.Sequential(layer, squash, nn.Linear(3, 3), squash)) == []
    assert _shared(nn.Sequential(layer, squash, layer, squash)) == ["0", "2"]


def test_the_noise_of_a_relation_is_that_of_all_orders_of_the_targets():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(9, 2, generator=generator).double()
    y = (scores + torch.randn(9, 2, generator=generator)).double()
    halves = torch.tensor([1, 3, 5, 7]), torch.tensor([0, 2, 4, 6, 8])
    sums = [
        [
            float((scores[half] * y[half[list(order)]]).sum())
            for order in itertools.permutations(range(len(half)))
        ]
        for half in halves
    ]
    every = torch.tensor([a + b for a, b in itertools.product(*sums)], dtype=torch.float64)
    wanted = (float((scores * y).sum()) - every.mean()) / every.std(correction=0)
    assert _agreement_z(scores, y, halves) == pytest.approx(float(wanted), rel=1e-9)


def test_a_clean_verdict_stands_beside_what_others_reach_on_the_same_rows():
    torch.manual_seed(0)
    x = torch.randn(300, 5)
    y = (x[:, 0] + torch.randn(300) > 0).long()
    found = asked(nn.Linear(5, 2), (x, y), F.cross_entropy, steps=60)
    assert found.ok, str(found)
    told = re.search(r" accuracy (\S+) \(constant prediction (\S+), .* (\S+)\)", str(found))
    assert told is not None, str(found)
    reached, constant, _ = map(float, told.groups())
    assert abs(constant - float(torch.bincount(y).max()) / 300) < 0.005
    assert reached > constant
    found = asked(nn.Linear(5, 1), (x, x[:, :1] + torch.randn(300, 1)), F.mse_loss, steps=60)
    assert " R2 0." in str(found), str(found)
    assert "accuracy" not in str(found)


def test_a_control_run_has_to_beat_the_last_third_of_the_run():
    record = ended(metric=0.5, eval_loss=healthy().points[0].loss)
    usual = sorted(p.metric for p in record.points if p.metric is not None)[-2]
    known = {"calmer_loss": record.points[-1].eval_loss, "calmer_metric": usual - 0.05}
    lucky = Evidence(dataclasses.replace(record, reference={**record.reference, **known}))
    assert lucky.control("calmer") > lucky.final_skill + 0.2
    assert lucky.skill_gain("calmer") < 0.05
