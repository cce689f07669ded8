"""A cause is claimed where a run without it, or with its rows in another order, has shown it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faulty import CE, mlp
from tikhon.diagnosis import Diagnosis, diagnose

MSE = nn.MSELoss()


def codes(found: Diagnosis) -> list[str]:
    return [f.code for f in found.findings if f.severity != "info"]


def kinds(rows: int = 600) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(rows, 8)
    return x, (x[:, :4] + 0.3 * torch.randn(rows, 4)).argmax(1)


def asked(model: nn.Module, data: Any, loss: Any, lr: float = 1e-2, **options: Any) -> Diagnosis:
    engine = options.pop("optimizer", None) or torch.optim.Adam(model.parameters(), lr=lr)
    return diagnose(model, data, loss, optimizer=engine, steps=60, batch_size=32, **options)


@pytest.mark.parametrize("bound", [1e-4, 10.0])
def test_hooks_on_gradients_are_kept_on_the_copy_and_left_out_in_a_control_run(bound: float):
    torch.manual_seed(0)
    model, calls = mlp(8, 32, 4, act=nn.ReLU), []

    def hook(grad: Tensor) -> Tensor:
        calls.append(grad)
        return grad.clamp(-bound, bound)

    for p in model.parameters():
        p.register_hook(hook)
    engine = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = asked(model, kinds(), CE, optimizer=engine)
    assert calls
    assert codes(found) == (["slow_convergence"] if bound < 1 else []), str(found)
    if bound < 1:
        assert found.findings[0].evidence["unhooked"] > found.findings[0].evidence["learned"] + 0.3


@pytest.mark.parametrize("norm", [nn.LayerNorm(6, elementwise_affine=False), nn.Identity()])
def test_a_norm_behind_the_last_layer_is_a_head_that_cannot_say_the_targets(norm: nn.Module):
    torch.manual_seed(0)
    x = torch.randn(600, 8)
    y = 2 * x[:, :1] + 0.1 * torch.tanh(x[:, 1:7])  # of a level of its own in each row
    found = asked(nn.Sequential(mlp(8, 32, 6, act=nn.ReLU), norm), (x, y), MSE)
    named = isinstance(norm, nn.LayerNorm)
    assert codes(found)[:1] == (["head_mismatch"] if named else []), str(found)


def test_scores_that_are_normalised_on_purpose_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(mlp(8, 32, 4, act=nn.ReLU), nn.BatchNorm1d(4))
    assert codes(asked(model, kinds(), CE)) == []


class Tagger(nn.Module):
    """Layers of attention, with or without a way past them."""

    def __init__(self, past: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.places = nn.Parameter(torch.randn(6, 16))
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(5)
        )
        self.head, self.past = nn.Linear(16, 4), past

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens) + self.places
        for layer in self.layers:
            h = layer(h, h, h)[0] + (h if self.past else 0)
        return self.head(h).transpose(1, 2)


@pytest.mark.parametrize("past", [False, True])
def test_attention_that_nothing_goes_past_is_named_where_a_way_past_it_helps(past: bool):
    torch.manual_seed(0)
    tokens = torch.randint(12, (500, 6))
    target = 2 * torch.randint(2, (12,))[tokens] + torch.randint(2, (12,))[tokens.roll(1, 1)]
    found = asked(Tagger(past), (tokens, target), CE, lr=3e-3)
    assert ("residual_missing" in codes(found)) is not past, str(found)


def test_units_that_died_are_no_cause_where_a_leak_does_not_help():
    """Labels that say nothing of the inputs: what is learned is the same with leaky units."""
    torch.manual_seed(0)
    x, y = torch.rand(600, 8), torch.randint(4, (600,))
    model = mlp(8, 64, 64, 4, act=nn.ReLU)
    found = asked(model, (x, y), CE, lr=0.3)
    dead = [f for f in found.findings if f.code == "dying_relu"]
    assert all(f.severity == "info" for f in dead if f.evidence.get("leaky", 1.0) < 0.1)
    torch.manual_seed(0)
    model = mlp(8, 32, 32, 32, 4, act=nn.ReLU)
    data = kinds()
    dying = asked(model, data, CE, optimizer=torch.optim.SGD(model.parameters(), lr=1.5))
    told = [f for f in dying.findings if f.code == "dying_relu"]
    assert all("leaky" in f.evidence or f.evidence["dead_at_start"] > 0.5 for f in told)


def test_a_control_run_that_the_loss_refuses_compares_nothing():
    """A leaky sigmoid gives no probabilities, which `BCELoss` refuses."""
    torch.manual_seed(0)
    x = torch.randn(600, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid())
    engine = torch.optim.SGD(model.parameters(), lr=30.0)
    found = asked(model, (x, torch.randint(2, (600, 1)).float()), nn.BCELoss(), optimizer=engine)
    assert "saturated_activation" in codes(found), str(found)
    assert "leaky_loss" not in found.record.reference


# parts of a loss


def taught(shuffled: bool) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = kinds()
    answers = x @ torch.randn(8, 6)
    if shuffled:
        answers = answers[torch.randperm(len(x))]
    return x, torch.cat([y[:, None].float(), answers], 1)


def distilled(output: Tensor, target: Tensor) -> Tensor:
    soft = F.mse_loss(output[:, 4:], target[:, 1:])
    return F.cross_entropy(output[:, :4], target[:, 0].long()) + 0.1 * soft


@pytest.mark.parametrize("shuffled", [True, False])
def test_targets_of_one_part_of_a_loss_may_be_those_of_other_rows(shuffled: bool):
    found = asked(mlp(8, 32, 10, act=nn.ReLU), taught(shuffled), distilled)
    named = [f for f in found.findings if f.code == "unrelated_labels"]
    assert bool(named) is shuffled, str(found)
    if shuffled:
        assert "F.mse_loss" in named[0].where[0]


def test_noise_and_places_of_partners_are_no_targets_of_other_rows():
    torch.manual_seed(0)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        noise = torch.randn_like(x)
        answers = model(x + noise)
        pairs = F.cross_entropy(answers[:, 4:] @ answers[:, 4:].T / 9, torch.arange(len(x)))
        told = F.cross_entropy(answers[:, :4], y)
        return told + 0.01 * F.mse_loss(answers[:, 4:], noise) + 0.001 * pairs

    found = asked(mlp(8, 32, 12, act=nn.ReLU), kinds(), loss)
    assert "unrelated_labels" not in codes(found), str(found)


class Teacher(nn.Module):
    """Compares its answers with a teacher's, or the teacher's with themselves."""

    def __init__(self, itself: bool) -> None:
        super().__init__()
        self.teacher, self.itself = nn.Linear(8, 4).requires_grad_(False), itself

    def forward(self, output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        x, y = target
        soft = self.teacher(x)
        own = soft if self.itself else output
        near = F.kl_div((own / 2).log_softmax(1), (soft / 2).softmax(1), reduction="batchmean")
        return 4 * near + F.cross_entropy(output, y)


@pytest.mark.parametrize("itself", [True, False])
def test_a_part_of_a_loss_that_nothing_trained_has_a_part_in(itself: bool):
    torch.manual_seed(0)
    x, y = kinds()
    found = asked(mlp(8, 32, 4, act=nn.ReLU), (x, (x, y)), Teacher(itself))
    assert ("loss_not_connected" in codes(found)) is itself, str(found)


def test_a_metric_beside_the_loss_is_no_part_of_it():
    def loss(output: Tensor, target: Tensor) -> Tensor:
        off = F.l1_loss(output.detach(), target)
        assert off >= 0
        return F.mse_loss(output, target)

    x = torch.randn(200, 8)
    found = asked(mlp(8, 32, 1, act=nn.ReLU), (x, x[:, :1]), loss)
    assert "loss_not_connected" not in codes(found), str(found)


@pytest.mark.parametrize("swapped", [True, False])
def test_a_cross_entropy_by_hand_that_is_given_its_arguments_the_other_way_round(swapped: bool):
    def by_hand(scores: Tensor, shares: Tensor) -> Tensor:
        return -(shares * scores.log_softmax(1)).sum(1).mean()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        scores, shares = model(batch[0]), F.one_hot(batch[1], 4).float()
        return by_hand(shares, scores) if swapped else by_hand(scores, shares)

    found = asked(mlp(8, 32, 4, act=nn.ReLU), kinds(), loss)
    assert (codes(found)[:1] == ["target_out_of_range"]) is swapped, str(found)


def test_a_divergence_with_shares_in_front_is_not_turned_round():
    torch.manual_seed(0)
    teacher = nn.Linear(8, 4).requires_grad_(False)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        own, other = model(batch[0]).softmax(1), teacher(batch[0]).log_softmax(1)
        return (own * own.log() - own * other).sum(1).mean()

    found = asked(mlp(8, 32, 4, act=nn.ReLU), kinds(), loss)
    assert "target_out_of_range" not in codes(found), str(found)


# rows and texts


@pytest.mark.parametrize(("apart", "named"), [(20, True), (0, False)])
def test_rows_that_come_again_in_one_order(apart: int, named: bool):
    torch.manual_seed(0)
    x = torch.randn(apart or 600, 5)
    x = x.repeat(600 // len(x), 1)
    found = asked(mlp(5, 16, 1, act=nn.ReLU), (x, x[:, :1].abs()), MSE)
    assert ("rows_in_both" in codes(found)) is named, str(found)


def test_a_table_of_all_cases_may_come_again():
    cases = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).repeat(20, 1)
    found = asked(mlp(4, 32, 1, act=nn.Tanh), (cases, cases.prod(1, keepdim=True)), MSE, lr=3e-2)
    assert "rows_in_both" not in codes(found), str(found)


class Writer(nn.Module):
    """A recurrent model of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(20, 12), nn.GRU(12, 24, batch_first=True)
        self.head = nn.Linear(24, 20)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        scores = self.head(self.rnn(self.embed(tokens))[0])
        return F.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("pad", [1, 0])
def test_an_end_of_text_that_fills_up_is_never_asked(pad: int):
    torch.manual_seed(0)
    long = torch.randint(3, 8, (300,))
    at = torch.arange(8)
    tokens = (torch.randint(2, 20, (300, 1)) + at) % 18 + 2
    tokens = torch.where(at < long[:, None], tokens, torch.where(at == long[:, None], 1, pad))
    rows = [
        {"tokens": t, "labels": t.masked_fill(t == pad, -100)}
        for t in torch.cat([tokens, torch.full((300, 1), pad)], 1)
    ]
    loader = torch.utils.data.DataLoader(rows, batch_size=30)  # type: ignore[arg-type]
    found = asked(Writer(), loader, lambda model, batch: model(**batch))
    assert ("ignored_rows" in codes(found)) is (pad == 1), str(found)
