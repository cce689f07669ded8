"""What targets say: candidates, padding, positions, rectified scores, masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from faulty import CE, adam, mlp
from tikhon.diagnosis import Diagnosis, diagnose

BCE = nn.BCEWithLogitsLoss()


def labels(model: nn.Module, data: Any, loss: Any, steps: int = 0) -> set[str]:
    optimizer = adam(5e-3) if steps else None
    return diagnose(model, data, loss, optimizer=optimizer, steps=steps, batch_size=32).labels


class Neighbours(nn.Module):
    """Scores of several words beside one."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.word = nn.Embedding(20, 8), nn.Embedding(20, 8)

    def forward(self, word: Tensor, others: Tensor) -> Tensor:
        return (self.near(others) @ self.word(word)[:, :, None])[..., 0]


class Items(nn.Module):
    """One score for each candidate of a row, by one network for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.score = mlp(5, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x)[..., 0]


class Better(nn.Module):
    """By how much the first row is better than the second one; or both scores."""

    def __init__(self, both: bool = False) -> None:
        super().__init__()
        self.score, self.both = mlp(5, 16, 1), both

    def forward(self, one: Tensor, other: Tensor) -> Any:
        a, b = self.score(one)[:, 0], self.score(other)[:, 0]
        return (a, b) if self.both else a - b


def first_of(rows: int, size: int) -> Tensor:
    target = torch.zeros(rows, size)
    target[:, 0] = 1
    return target


def margin(scores: tuple[Tensor, Tensor], sign: Tensor) -> Tensor:
    return F.margin_ranking_loss(*scores, sign, margin=0.5)


def choices() -> dict[str, tuple[nn.Module, Any, Any]]:
    torch.manual_seed(0)
    word, others = torch.randint(20, (120,)), torch.randint(20, (120, 5))
    items, pair = torch.randn(120, 4, 5), tuple(torch.randn(2, 120, 5))
    items[:, 0, 0] += 2
    return {
        "word and samples": (Neighbours(), ((word, others), first_of(120, 5)), BCE),
        "list of items": (Items(), (items, torch.zeros(120).long()), CE),
        "pairs of which the first is better": (Better(), (pair, torch.ones(120)), BCE),
        "two scores and a margin": (Better(both=True), (pair, torch.ones(120)), margin),
    }


def stuck() -> dict[str, tuple[nn.Module, Any, Any]]:
    torch.manual_seed(0)
    x, tokens = torch.randn(120, 4), torch.randint(20, (120, 5))
    words = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(40, 5))
    return {
        "one class of several": (mlp(4, 16, 4), (x, first_of(120, 4)), BCE),
        "a class that a cast made 0": (mlp(4, 16, 3), (x, torch.rand(120).long()), CE),
        "tokens of one class": (words, (tokens, torch.zeros(120).long()), CE),
        "amounts that are all alike": (mlp(4, 16, 1), (x, torch.ones(120, 1)), nn.MSELoss()),
    }


@pytest.mark.parametrize("name", choices())
def test_a_choice_among_candidates_may_have_one_target(name: str) -> None:
    found = labels(*choices()[name], steps=20)
    assert not found & {"constant_targets", "class_imbalance"}, found


@pytest.mark.parametrize("name", stuck())
def test_targets_that_are_all_the_same_are_named(name: str) -> None:
    assert "constant_targets" in labels(*stuck()[name])


class Speller(nn.Module):
    """Answers at each position of a sequence of tokens, from those before it."""

    def __init__(self, tokens: int, *, own_loss: Any = None, ahead: int = 1) -> None:
        super().__init__()
        self.words, self.core = nn.Embedding(tokens, 12), nn.GRU(12, 16, batch_first=True)
        self.heads = nn.ModuleList(nn.Linear(16, tokens) for _ in range(ahead))
        self.own_loss = own_loss

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Any:
        state = self.core(self.words(tokens))[0]
        logits = [head(state) for head in self.heads]
        if self.own_loss is not None:
            return {"loss": self.own_loss(logits[0], labels), "logits": logits[0]}
        return logits[0] if len(logits) == 1 else tuple(logits)


def sentences(size: int = 9) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(15, (120, size))


def each(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=-100)


def moved(places: int) -> Any:
    return lambda output, target: each(output[:, :-places], target[:, places:])


def hidden_words(tokens: Tensor) -> tuple[Tensor, Tensor]:
    drawn = torch.rand(tokens.shape) < 0.3
    return tokens.masked_fill(drawn, 14), tokens.masked_fill(~drawn, -100)


def two_ahead(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return moved(1)(output[0], target) + moved(2)(output[1], target)


def test_labels_that_are_moved_twice_are_named():
    t = sentences()
    beside = {"tokens": t[:, :-1], "labels": t[:, 1:]}
    for model, data, loss in (
        (Speller(15), (t, t), moved(2)),
        (Speller(15), (t[:, :-1], t[:, 1:]), moved(1)),
        (Speller(15, own_loss=moved(1)), beside, None),
    ):
        assert "shifted_twice" in labels(model, data, loss)


def test_labels_that_are_moved_once_or_stand_for_something_else_are_not():
    t = sentences()
    for model, data, loss in (
        (Speller(15), (t, t), moved(1)),
        (Speller(15), (t[:, :-1], t[:, 1:]), each),
        (Speller(15, own_loss=moved(1)), {"tokens": t, "labels": t}, None),
        (Speller(15, ahead=2), (t, t), two_ahead),
        (Speller(15), hidden_words(t), each),
        (Speller(15), (t, (t + 3) % 15), moved(2)),
    ):
        assert "shifted_twice" not in labels(model, data, loss)


def short(size: int, filled: int, number: int = 0) -> Tensor:
    return F.pad(1 + sentences(size) % 14, (0, filled), value=number)


def counted(ignored: int) -> Any:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=ignored)

    return loss


def test_padding_that_starts_at_one_place_in_all_rows_is_seen_in_the_loss():
    for words, filled, number in ((5, 10, 0), (4, 6, 15), (8, 5, 0)):
        t = short(words, filled, number)
        said = F.pad(t[:, :-1], (1, 0), value=number)
        assert "padding_in_loss" in labels(Speller(16), (said, t), counted(-100))
        assert "padding_in_loss" not in labels(Speller(16), (said, t), counted(number))


def test_what_is_answered_where_the_inputs_are_blank_is_no_padding():
    """To repeat a word after a pause, to sum up at the end, and sentences of one length."""
    t = short(5, 5)
    later = torch.cat([torch.zeros(120, 5).long(), t[:, :5]], 1)
    marks = torch.cat([torch.zeros(120, 9).long(), t.sum(1, keepdim=True) % 15], 1)
    for data in ((t, later), (t, marks), (sentences(10), sentences(10).flip(1))):
        assert "padding_in_loss" not in labels(Speller(16), data, counted(-100))


def scores_of(head: list[nn.Module], inner: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), inner(), nn.Linear(32, 8), *head)


def kinds() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(600, 8)
    return x, (x + 0.2 * torch.randn(600, 8)).argmax(1)


@pytest.mark.parametrize(
    ("head", "loss"),
    [
        ([nn.ReLU(), nn.LogSoftmax(1)], nn.NLLLoss()),
        ([nn.ReLU()], CE),
        ([nn.ReLU6()], CE),
    ],
    ids=["log_softmax", "own softmax", "relu6"],
)
def test_rectified_scores_of_classes_are_named_where_rows_are_lost(head: Any, loss: Any) -> None:
    torch.manual_seed(1)
    model = scores_of(head)
    nn.init.constant_(model[2].bias, -0.6)
    found = ended(model, loss)
    assert found.findings[0].code == "head_mismatch", str(found)
    assert "rectified" in found.findings[0].why


@pytest.mark.parametrize(
    ("head", "loss"),
    [
        ([nn.LogSoftmax(1)], nn.NLLLoss()),
        ([], CE),
        ([nn.LeakyReLU()], CE),
        ([nn.Softplus()], CE),
        ([nn.ReLU(), nn.Linear(8, 8)], CE),
    ],
    ids=["log_softmax", "scores", "leaky", "softplus", "within"],
)
def test_other_heads_and_rectifiers_within_are_not(head: Any, loss: Any) -> None:
    torch.manual_seed(1)
    assert "rectified" not in str(ended(scores_of(head), loss))


def ended(model: nn.Module, loss: Any) -> Diagnosis:
    return diagnose(model, kinds(), loss, optimizer=adam(1e-2), steps=30, batch_size=32)


class Drawn(Dataset):
    """Pictures and maps of targets that `change` alters at each draw."""

    def __init__(self, change: Any, size: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(60, 1, size, size, generator=generator)
        self.y, self.change = (self.x > 0.5).float(), change

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.change(self.x[row], self.y[row])


def quarter(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.rot90(int(torch.randint(4, ())), (1, 2)), y


def mirror_of_classes(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (x.flip(2) if torch.rand(()) < 0.5 else x), y[0].long()


def jitter(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.roll(tuple(torch.randint(-3, 4, (2,)).tolist()), (1, 2)), y


def jitter_both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    places = tuple(torch.randint(-3, 4, (2,)).tolist())
    return x.roll(places, (1, 2)), y.roll(places, (1, 2))


def noise(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x * (0.5 + torch.rand(())) + 0.3 * torch.randn(x.shape), y


def shares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.rot90(int(torch.randint(4, ())), (1, 2)), y.mean().expand_as(y)


def classes(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.flip(1) if torch.rand(()) < 0.5 else x, (y.mean() > 0.3).long()


def apart(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    seen = x.clone()
    seen[:, torch.rand(x.shape[1:]) < 0.3] = 0
    return seen, y


def drawn(change: Any) -> set[str]:
    kind = change(torch.zeros(1, 8, 8), torch.zeros(1, 8, 8))[1]
    of_rows, of_classes = kind.ndim == 0, kind.ndim == 2
    layers = [nn.Flatten(), nn.Linear(64, 2)] if of_rows else []
    model = nn.Sequential(*layers) if layers else nn.Conv2d(1, 2 if of_classes else 1, 3, 1, 1)
    loss = CE if of_rows or of_classes else BCE
    return labels(model, DataLoader(Drawn(change), batch_size=16, shuffle=True), loss)


@pytest.mark.parametrize("change", [quarter, mirror_of_classes, jitter])
def test_pictures_that_move_without_their_masks_are_named(change: Any) -> None:
    assert "masks_not_transformed" in drawn(change)


@pytest.mark.parametrize("change", [jitter_both, noise, shares, classes, apart])
def test_pictures_that_move_with_their_masks_or_not_at_all_are_not(change: Any) -> None:
    assert "masks_not_transformed" not in drawn(change)
