"""Control runs: too short steps and too much dropout are said where another run has shown it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from faulty import CE, adam, mlp
from tikhon.diagnosis import Diagnosis, diagnose
from tikhon.diagnosis.measure import FEW_ROWS
from tikhon.diagnosis.thresholds import RELATED


def kinds(rows: int = 800, size: int = 10) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(rows, size)
    return x, (x[:, :4] + 0.3 * torch.randn(rows, 4)).argmax(1)


def asked(
    model: nn.Module, optimizer: Any, data: Any = None, loss: Any = CE, steps: int = 60
) -> Diagnosis:
    data = kinds() if data is None else data
    return diagnose(model, data, loss, optimizer=optimizer, steps=steps, batch_size=32)


def words() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    tokens = torch.randint(30, (800, 6))
    model = nn.Sequential(nn.EmbeddingBag(30, 16), nn.Linear(16, 2))
    return model, (tokens, (tokens < 12).sum(1).gt(2).long())


def test_steps_are_called_too_short_where_longer_ones_were_tried():
    torch.manual_seed(1)
    body, head = mlp(10, 32, 16, act=nn.ReLU), nn.Linear(16, 4)
    groups = [
        {"params": body.parameters(), "lr": 2e-4},
        {"params": head.parameters(), "lr": 1e-4},
    ]
    model, data = words()
    for found in (
        asked(nn.Sequential(body, head), torch.optim.AdamW(groups)),
        asked(mlp(10, 64, 4), lambda p: torch.optim.SGD(p, lr=3e-3)),
        asked(model, lambda p: torch.optim.Adam(p, lr=1e-4), data, steps=120),
    ):
        slow = [f for f in found.findings if f.code == "slow_convergence"]
        assert slow, str(found)
        assert "ten times" in slow[0].why, str(found)


def test_decay_that_keeps_the_loss_at_chance_is_named_though_the_accuracy_is_fair():
    torch.manual_seed(1)
    x, y = kinds()
    data = x, (y > 1).long()
    found = asked(mlp(10, 32, 2), lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=50.0), data)
    finding = next(f for f in found.findings if f.code == "underfitting")
    assert finding.severity == "critical" and "weight decay" in finding.why, str(found)
    assert finding.evidence["undecayed"] < finding.evidence["loss"] - 0.3, str(found)


def test_decay_that_keeps_noisy_labels_from_being_memorised_is_no_fault():
    torch.manual_seed(1)
    x, y = kinds(400)
    y = torch.where(torch.rand(400) < 0.7, torch.randint(2, (400,)), (y > 1).long())
    engine = lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=20.0)  # noqa: E731
    found = diagnose(mlp(10, 128, 2), (x, y), CE, optimizer=engine, steps=250, batch_size=32)
    severe = {f.code for f in found.findings if f.severity == "critical"}
    assert "underfitting" not in severe, str(found)


@pytest.mark.parametrize("steps", [20, 60])
def test_a_short_run_that_falls_with_steps_of_usual_size_is_no_fault(steps: int) -> None:
    torch.manual_seed(1)
    x, y = kinds()
    deep = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(10, 10), nn.ReLU())])
    for model, data, loss in (
        (nn.Sequential(deep, nn.Linear(10, 4)), (x, y), CE),
        (mlp(10, 32, 1), (x, x[:, :1] * x[:, 1:2]), nn.MSELoss()),
        (mlp(10, 8, 10), (x, x), nn.MSELoss()),
    ):
        found = diagnose(
            model, data, loss, optimizer=lambda p: torch.optim.Adam(p, lr=2e-3), steps=steps
        )
        assert "slow_convergence" not in found.labels, str(found)


def dropped(rate: float, *, convolution: bool = False, layers: int = 3) -> nn.Module:
    torch.manual_seed(1)
    if convolution:
        one = [
            nn.Unflatten(1, (1, 10)),
            nn.Conv1d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Dropout1d(rate),
        ]
        two = [nn.Conv1d(8, 8, 3, padding=1), nn.ReLU(), nn.Dropout1d(rate), nn.Flatten()]
        return nn.Sequential(*one, *two, nn.Linear(80, 4))
    body = [
        m
        for k in range(layers)
        for m in (nn.Linear(32 if k else 10, 32), nn.ReLU(), nn.Dropout(rate))
    ]
    return nn.Sequential(*body, nn.Linear(32, 4))


class Voices(nn.Module):
    """Rows read as sequences, with dropout of what is read."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop, self.core = nn.Dropout(rate), nn.GRU(1, 24, batch_first=True)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.core(self.drop(x)[:, :, None])[0][:, -1]))


def test_dropout_is_called_too_much_where_a_run_without_it_learns():
    for model in (dropped(0.8), dropped(0.7, layers=5), dropped(0.9, layers=2)):
        found = asked(model, lambda p: torch.optim.Adam(p, lr=1e-2))
        assert found.findings[0].code == "excessive_dropout", str(found)
        assert "without dropout" in found.findings[0].why


def test_usual_dropout_is_not_and_neither_is_dropout_beside_another_cause():
    models = (dropped(0.2), dropped(0.5, layers=1), dropped(0.1, convolution=True))
    for model in models:
        found = asked(model, lambda p: torch.optim.Adam(p, lr=1e-2))
        assert "excessive_dropout" not in found.labels, str(found)
    still = asked(dropped(0.5), lambda p: torch.optim.SGD(p, lr=1e-6))
    assert "excessive_dropout" not in still.labels, str(still)


@pytest.mark.parametrize("rate", [0.92, 0.97])
def test_one_layer_that_drops_nearly_all_is_named_once(rate: float) -> None:
    torch.manual_seed(0)
    layers = nn.Linear(10, 64), nn.ReLU(), nn.Dropout(rate), nn.Linear(64, 4)
    found = asked(nn.Sequential(*layers), lambda p: torch.optim.Adam(p, lr=1e-2))
    codes = [f.code for f in found.findings]
    assert codes.count("excessive_dropout") == 1, str(found)


@pytest.mark.parametrize(
    "make",
    [
        lambda p, decay: torch.optim.AdamW(p, lr=5e-3, weight_decay=100 * decay),
        lambda p, decay: torch.optim.Adam(p, lr=5e-3, weight_decay=decay),
        lambda p, decay: torch.optim.SGD(p, lr=0.1, weight_decay=decay),
    ],
)
def test_decay_is_blamed_where_the_same_run_without_it_learns(make: Any) -> None:
    for decay, blamed in ((1.0, True), (1e-3, False)):
        torch.manual_seed(0)
        found = asked(mlp(10, 32, 4, act=nn.ReLU), lambda p, decay=decay: make(p, decay))
        assert (found.labels == {"underfitting"}) == blamed, str(found)
        assert blamed or found.ok, str(found)
        assert not blamed or "decay" in found.findings[0].why, str(found)


def test_a_code_that_says_something_later_has_not_collapsed() -> None:
    torch.manual_seed(0)
    x = torch.as_tensor(load_digits().data).float() / 16

    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.back = mlp(64, 64, 16), mlp(8, 64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean, spread = self.into(x).chunk(2, 1)
            code = mean + torch.randn_like(mean) * (spread / 2).exp()
            return self.back(code), mean, spread

    def loss(answer: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        output, mean, spread = answer
        divergence = -0.5 * (1 + spread - mean.square() - spread.exp()).sum(1).mean()
        kept = nn.functional.binary_cross_entropy_with_logits(output, target, reduction="none")
        return kept.sum(1).mean() + divergence

    found = asked(Drawing(), lambda p: torch.optim.Adam(p, lr=1e-3), (x, x), loss)
    assert found.record.wiring["given_back"] < 0.2, found.record.wiring
    assert "posterior_collapse" not in found.labels, str(found)


class Sums(nn.Module):
    """Judges pairs of names by the sum of their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names = nn.Embedding(30, 16)
        self.judge = mlp(32, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.judge(self.names(x).flatten(1)).squeeze(1)


@pytest.mark.parametrize("related", [True, False])
def test_labels_of_a_loader_that_only_the_network_finds_are_not_unrelated(related: bool) -> None:
    torch.manual_seed(0)
    x = torch.randint(30, (400, 2))
    y = (x.sum(1) % 3 == 0).float()
    loader = DataLoader(TensorDataset(x, y if related else y[torch.randperm(400)]), 32)
    found = asked(Sums(), adam(1e-2), loader, nn.BCEWithLogitsLoss(), steps=120)
    assert found.record.wiring["relation"] < RELATED
    assert ("unrelated_labels" in found.labels) is not related


def test_a_loss_of_all_triplets_is_measured_on_few_rows() -> None:
    seen = []

    def loss(z: Tensor, y: Tensor) -> Tensor:
        seen.append(len(z))
        apart, alike = torch.cdist(z, z), y[:, None] == y
        excess = (apart[:, :, None] - apart[:, None] + 0.2).relu()
        return excess[alike[:, :, None] & ~alike[:, None]].mean()

    x = torch.randn(400, 6)
    diagnose(mlp(6, 16, 4), (x, (x[:, 0] > 0).long()), loss, optimizer=adam(1e-2), steps=2)
    assert max(seen) <= 4 * FEW_ROWS  # repeated four times, to see whether it is a sum
