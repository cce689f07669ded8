"""Pairs of programs that differ in one fault: the cause is named in one and not in the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faulty import mlp
from pairs import Listed, Parts, asked, into
from tikhon.diagnosis import diagnose
from tikhon.diagnosis.reference import lowest_loss

CE = nn.CrossEntropyLoss()


PAIRS: Listed = {}
pair = into(PAIRS)


class Speller(nn.Module):
    """A recurrent decoder that is given a sequence beside its source."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 12)
        self.reader = nn.GRU(12, 24, batch_first=True)
        self.writer = nn.GRU(12, 24, batch_first=True)
        self.head = nn.Linear(24, 9)

    def forward(self, source: Tensor, given: Tensor) -> Tensor:
        state = self.reader(self.words(source))[1]
        return self.head(self.writer(self.words(given), state)[0]).transpose(1, 2)


@pair("target_among_inputs")
def a_decoder_that_is_told_the_answer(wrong: bool) -> Parts:
    source = torch.randint(8, (200, 5))
    target = source.flip(1)
    begun = torch.cat([torch.full((200, 1), 8), target[:, :-1]], 1)
    return Parts(Speller(), ((source, target if wrong else begun), target), CE)


class Language(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.core = nn.Embedding(words, 12), nn.LSTM(12, 24, batch_first=True)
        self.head = nn.Linear(24, words)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.core(self.words(tokens))[0]).transpose(1, 2)


@pair("target_among_inputs")
def a_language_model_whose_target_is_not_shifted(wrong: bool) -> Parts:
    tokens = (torch.randint(12, (200, 1)) + torch.randint(1, 3, (200, 13)).cumsum(1)) % 12
    inputs = tokens[:, :-1]  # as many positions as words: no axis is known by its size
    return Parts(Language(12), (inputs, inputs if wrong else tokens[:, 1:]), CE)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kinds, self.body = nn.Embedding(5, 4), mlp(10, 16, 1)

    def forward(self, kind: Tensor, numbers: Tensor) -> Tensor:
        return self.body(torch.cat([self.kinds(kind), numbers], 1))


@pair("target_among_inputs")
def a_column_of_one_of_several_inputs(wrong: bool) -> Parts:
    kind, x = torch.randint(5, (200,)), torch.randn(200, 6)
    y = x[:, :1] * x[:, 1:2] + 0.3 * kind[:, None]
    x = torch.cat([x[:, :5], 2 * y + 1], 1) if wrong else x
    return Parts(Named(), ({"kind": kind, "numbers": x}, y), nn.MSELoss())


def turned(function: Callable[..., Tensor], wrong: bool) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda o, t: function(t, o) if wrong else function(o, t)


@pair("target_out_of_range")
def arguments_of_a_soft_cross_entropy_swapped(wrong: bool) -> Parts:
    x = torch.randn(200, 6)
    y = F.one_hot(x[:, :4].argmax(1)).float()
    return Parts(mlp(6, 16, 4), (x, y), turned(F.cross_entropy, wrong))


@pair("target_out_of_range")
def arguments_of_a_poisson_loss_swapped(wrong: bool) -> Parts:
    x = torch.randn(200, 6)
    y = torch.poisson(x[:, :1].exp())
    return Parts(mlp(6, 16, 1), (x, y), turned(F.poisson_nll_loss, wrong))


class Looking(nn.Module):
    """One layer of attention by hand, whose scores are divided by the root of the size or not."""

    def __init__(self, divided: bool, size: int = 64) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(10, size), nn.Parameter(torch.randn(12, size))
        self.mix, self.norm = nn.Linear(size, 3 * size), nn.LayerNorm(size)
        nn.init.normal_(self.mix.weight, std=size**-0.5)
        self.head = nn.Linear(size, 2)
        self.factor = size**-0.5 if divided else 1.0

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.mix(self.norm(self.words(tokens) + self.places)).chunk(3, -1)
        scores = query @ key.transpose(1, 2) * self.factor
        return self.head((torch.softmax(scores, -1) @ value).mean(1))


@pair("collapsed_attention")
def attention_whose_scores_nothing_divides(wrong: bool) -> Parts:
    tokens = torch.randint(10, (200, 12))
    y = (tokens.float().mean(1) > 4.5).long()
    return Parts(Looking(not wrong), (tokens, y), CE)


class Drawn(nn.Module):
    """A variational autoencoder: what is given back, mean and log variance of the code."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.ends = nn.Sequential(nn.Linear(10, 32), nn.ReLU()), nn.Linear(32, 6)
        self.back = mlp(3, 32, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, spread = self.ends(self.body(x)).chunk(2, 1)
        code = mean + (0.5 * spread).exp() * torch.randn_like(mean)
        return self.back(code), mean, spread


@pair("posterior_collapse")
def a_divergence_that_outweighs_what_is_given_back(wrong: bool) -> Parts:
    x = torch.randn(300, 3) @ torch.randn(3, 10) + 0.1 * torch.randn(300, 10)

    def loss(answer: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        output, mean, spread = answer
        divergence = -0.5 * (1 + spread - mean.square() - spread.exp()).sum(1).mean()
        return F.mse_loss(output, target) + (5.0 if wrong else 0.01) * divergence

    return Parts(Drawn(), (x, x), loss, rate=1e-2, steps=150)


def of_pairs(hardest: bool) -> Any:
    """A loss of the distances in a batch: the hardest triplets, or all pairs up to a margin."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        z, same = model(batch[0]), batch[1][:, None] == batch[1][None]
        apart = ((z[:, None] - z[None]).square().sum(2) + 1e-12).sqrt()
        if hardest:
            near, far = (apart * same).amax(1), apart.masked_fill(same, 1e9).amin(1)
            return F.relu(near - far + 0.3).mean()
        return torch.where(same, apart.square(), F.relu(2 - apart).square()).mean()

    return loss


@pair("embedding_collapse")
def the_hardest_triplets_of_noisy_classes(wrong: bool) -> Parts:
    y = torch.randint(4, (96,))
    x = torch.randn(4, 8)[y] + 4.0 * torch.randn(96, 8)
    return Parts(mlp(8, 32, 4), (x, y), of_pairs(wrong), rate=2e-2, steps=60)


class TwoViews(nn.Module):
    """Gives the embedding of a view, and what a predictor makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.predictor = mlp(8, 32, 8), mlp(8, 16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (z := self.body(x)), self.predictor(z)


@pair("embedding_collapse")
def views_that_are_pulled_together_alone(wrong: bool) -> Parts:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        (z, p), (other, q) = map(model, batch)
        pulled = F.cosine_similarity(p, other if wrong else other.detach()).mean()
        pushed = 0.0 if wrong else (F.normalize(z) @ F.normalize(other).T).square().mean()
        return pushed - pulled - F.cosine_similarity(q, z if wrong else z.detach()).mean()

    x = torch.randn(96, 8)
    return Parts(TwoViews(), (x, x + 0.2 * torch.randn(96, 8)), loss, rate=2e-2, steps=60)


@pair("inputs_ignored")
def a_norm_of_each_picture_in_front_of_its_mean(wrong: bool) -> Parts:
    y = torch.randint(3, (120,))
    x = torch.rand(120, 1, 6, 6) + 0.6 * y[:, None, None, None]
    norm = nn.InstanceNorm2d(4, affine=True) if wrong else nn.BatchNorm2d(4)
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return Parts(nn.Sequential(nn.Conv2d(1, 4, 3), norm, *pooled), (x, y), CE, steps=40)


@pair("rows_mixed")
def the_best_of_all_next_values(wrong: bool) -> Parts:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        (state, action, later), gained = batch
        with torch.no_grad():
            best = model(later).max() if wrong else model(later).max(1).values
        value = model(state).gather(1, action[:, None])[:, 0]
        return F.mse_loss(value, gained + 0.5 * best)

    state, later, action = torch.randn(200, 4), torch.randn(200, 4), torch.randint(3, (200,))
    gained = state[:, :3].gather(1, action[:, None])[:, 0]
    return Parts(mlp(4, 16, 3), ((state, action, later), gained), loss, steps=40)


@pair("target_out_of_range")
def a_column_for_each_label_where_indices_are_read(wrong: bool) -> Parts:
    x = torch.randn(200, 6)
    shown = x @ torch.randn(6, 5) > 1.0
    index = torch.where(shown, torch.arange(5), 9).sort(1).values
    y = shown.long() if wrong else torch.where(index < 9, index, -1)
    return Parts(mlp(6, 32, 5), (x, y), nn.MultiLabelMarginLoss(), rate=1e-2, steps=60)


class Clamped(nn.Sequential):
    """Probabilities, away from 0 and 1."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(1e-4, 1 - 1e-4)


@pair("saturated_activation")
def probabilities_that_all_reach_their_clamp(wrong: bool) -> Parts:
    x = torch.randn(200, 6)
    model = Clamped(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1), nn.Sigmoid())
    y = (x[:, :1] > 0.9).float()
    return Parts(model, (x, y), nn.BCELoss(), rate=3.0 if wrong else 5e-2, steps=60)


@pair("loss_ignores_targets")
def a_score_beside_a_position(wrong: bool) -> Parts:
    x = torch.randn(300, 6)
    y = torch.cat([(x[:, :1] > 0).float(), x[:, 1:3].tanh()], 1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        score = F.binary_cross_entropy_with_logits(output[:, 0], target[:, 0])
        return score if wrong else score + F.l1_loss(output[:, 1:], target[:, 1:])

    return Parts(mlp(6, 32, 3), (x, y), loss, rate=3e-2, steps=150)


class Pooled(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis, self.body = axis, mlp(6, 16, 16)
        self.head = nn.Linear(16 if axis == 1 else 10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu().mean(self.axis))


@pair("positions_mixed")
def a_mean_over_the_features_of_each_step(wrong: bool) -> Parts:
    y = torch.randint(4, (300,))
    x = 0.6 * torch.randn(4, 6)[y][:, None] + torch.randn(300, 10, 6)
    return Parts(Pooled(2 if wrong else 1), (x, y), CE, steps=20)


@pair("class_imbalance")
def a_class_of_which_few_rows_are_known(wrong: bool) -> Parts:
    y = (torch.rand(400) < (0.03 if wrong else 0.4)).long()
    x = torch.randn(400, 10)
    x[:, 0] += 0.8 * y
    return Parts(mlp(10, 32, 2), (x, y), CE, rate=1e-3, steps=40)


@pair("oscillating_loss")
def a_momentum_of_0_99(wrong: bool) -> Parts:
    x = torch.randn(400, 6)
    y = torch.sin(2 * x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:3]
    momentum = (("momentum", 0.99 if wrong else 0.9),)
    return Parts(
        mlp(6, 48, 1, act=nn.Tanh),
        (x, y),
        nn.MSELoss(),
        rate=0.1,
        steps=120,
        optimizer=torch.optim.SGD,
        options=momentum,
    )


@pair("class_imbalance")
def weights_of_yes_upside_down(wrong: bool) -> Parts:
    x = torch.randn(400, 8)
    y = (x[:, :3] > 1.2).float()
    weight = y.mean(0) / (1 - y.mean(0))
    loss = nn.BCEWithLogitsLoss(pos_weight=weight if wrong else 1 / weight)
    return Parts(mlp(8, 16, 3), (x, y), loss, rate=3e-3, steps=20)


@pair("class_imbalance")
def weights_of_classes_upside_down(wrong: bool) -> Parts:
    y = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 400, replacement=True)
    x = 2 * torch.randn(3, 8)[y] + torch.randn(400, 8)
    share = y.bincount() / len(y)
    return Parts(mlp(8, 16, 3), (x, y), nn.CrossEntropyLoss(weight=share if wrong else 1 / share))


class Told(nn.Module):
    """A recurrent network of which one step is read."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.core, self.head, self.step = nn.LSTM(2, 16, batch_first=True), nn.Linear(16, 1), step

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0][:, self.step])


@pair("inputs_ignored")
def the_first_step_of_a_recurrent_layer(wrong: bool) -> Parts:
    x = torch.randn(300, 6, 2)
    return Parts(Told(0 if wrong else -1), (x, x[:, :, :1].sum(1)), nn.MSELoss(), steps=30)


@pair("head_mismatch")
def rectified_scores_of_classes(wrong: bool) -> Parts:
    y = torch.randint(10, (600,))
    x = torch.rand(10, 64)[y] + 0.3 * torch.rand(600, 64)
    model = mlp(64, 48, 10)
    if wrong:
        model.append(nn.ReLU())
    return Parts(model, (x, y), CE, rate=0.3, steps=100, optimizer=torch.optim.SGD)


@pair("underfitting")
def one_unit_for_all_classes(wrong: bool) -> Parts:
    y = torch.randint(8, (400,))
    x = 2 * torch.randn(8, 12)[y] + torch.randn(400, 12)
    return Parts(mlp(12, 1 if wrong else 24, 8), (x, y), CE, rate=2e-2, steps=75)


class Bag(nn.Module):
    """Attention over tokens with or without their places."""

    def __init__(self, placed: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 16)
        self.places = nn.Parameter(torch.randn(8, 16)) if placed else 0.0
        self.mix = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.words(tokens) + self.places
        return self.head((h + self.mix(h, h, h, need_weights=False)[0]).mean(1))


@pair("no_positions")
def a_question_of_order_without_positions(wrong: bool) -> Parts:
    tokens = torch.randint(6, (400, 8))
    y = (tokens[:, :4].sum(1) > tokens[:, 4:].sum(1)).long()
    return Parts(Bag(not wrong), (tokens, y), CE, steps=50)


@pair("vanishing_gradient")
def twelve_sigmoids(wrong: bool) -> Parts:
    y = torch.randint(4, (300,))
    x = 2 * torch.randn(4, 12)[y] + torch.randn(300, 12)
    sizes = [12, *[16] * 12, 4]
    model = mlp(*sizes, act=nn.Sigmoid if wrong else nn.ReLU)
    if not wrong:
        for layer in model[::2]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return Parts(model, (x, y), CE, rate=3e-3, steps=50)


@pair("frozen_parameters")
def a_body_that_is_frozen_and_drawn_at_random(wrong: bool) -> Parts:
    x = torch.randn(400, 2)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = nn.Sequential(
        nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)
    )
    model[:3].requires_grad_(not wrong)
    return Parts(model, (x, y), CE, rate=2e-2, steps=100)


@pytest.mark.parametrize("name", PAIRS)
def test_the_cause_comes_first_and_the_twin_is_silent(name):
    code, make = PAIRS[name]
    torch.manual_seed(0)
    wrong = asked(make(True))
    assert wrong.findings[0].code == code, str(wrong)
    assert wrong.findings[0].severity != "info", str(wrong)
    torch.manual_seed(0)
    right = asked(make(False))
    assert code not in right.labels, str(right)


def test_attention_of_small_states_needs_no_root():
    """Dot products of recurrent states are small: undivided, they look everywhere."""

    class Summary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.core = nn.Embedding(10, 8), nn.LSTM(8, 64, batch_first=True)
            self.head = nn.Linear(64, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            states, (last, _) = self.core(self.words(tokens))
            scores = torch.bmm(last[-1][:, None], states.transpose(1, 2))
            return self.head((scores.softmax(-1) @ states)[:, 0])

    torch.manual_seed(0)
    tokens = torch.randint(10, (100, 12))
    found = asked(Parts(Summary(), (tokens, tokens[:, 0] % 2), CE, steps=5))
    scores = found.record.wiring["undivided"]
    assert scores["size"] == 64
    assert scores["now"] > 0.9
    assert "collapsed_attention" not in found.labels


class Pairs(nn.Module):
    """The distance of two rows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(8, 16, 4)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return (self.body(first) - self.body(second)).square().sum(1).add(1e-6).sqrt()


def test_a_distance_that_falls_where_two_are_alike_is_not_upside_down():
    torch.manual_seed(0)
    kind, other = torch.randint(5, (2, 300))
    alike = (kind == other).float()
    centres = 2 * torch.randn(5, 8)
    x = tuple(centres[k] + 0.5 * torch.randn(300, 8) for k in (kind, other))

    def loss(distance: Tensor, y: Tensor) -> Tensor:
        return (y * distance**2 + (1 - y) * F.relu(1 - distance) ** 2).mean()

    assert "loss_upside_down" not in asked(Parts(Pairs(), (x, alike), loss)).labels


def test_absolute_errors_far_from_the_targets_still_hear_them():
    torch.manual_seed(0)
    x = torch.randn(300, 6)
    found = asked(Parts(mlp(6, 16, 2), (x, 300 + 50 * x[:, :2]), nn.SmoothL1Loss(), steps=5))
    assert "loss_ignores_targets" not in {f.code for f in found.findings}, str(found)


def test_a_loss_without_a_yardstick_that_jumps_is_information():
    torch.manual_seed(0)
    centres, kind = 1.2 * torch.randn(5, 8), torch.randint(5, (300,))
    far = (kind + torch.randint(1, 5, (300,))) % 5
    rows = tuple(centres[k] + torch.randn(300, 8) for k in (kind, kind, far))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.triplet_margin_loss(*(model(part) for part in batch[0]))

    found = asked(Parts(mlp(8, 16, 4), (rows, kind), loss, rate=3e-3, steps=100))
    assert "oscillating_loss" not in found.labels, str(found)


def test_a_focal_loss_counts_what_is_not_sure_and_is_not_upside_down():
    def focal(output: Tensor, target: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(output, target, reduction="none")
        weight = 0.25 * target + 0.75 * (1 - target)
        return (weight * (1 - (-loss).exp()).square() * loss).mean()

    torch.manual_seed(0)
    x = torch.randn(300, 6)
    y = (x[:, :1] > 1.0).float()
    found = asked(Parts(mlp(6, 16, 1), (x, y), focal, steps=5))
    assert "positive_weights" not in found.record.wiring
    assert all("counted_less" not in f.evidence for f in found.findings)


@pytest.mark.parametrize("scores", [torch.zeros(2, 3, 5), torch.randn(2, 3, 5)])
def test_the_spread_of_attention_is_the_entropy_of_its_shares(scores):
    from tikhon.diagnosis.wiring.attention import relative_entropy

    masked = torch.cat([scores, torch.full((2, 3, 2), -math.inf)], 2)
    expected = torch.distributions.Categorical(logits=scores).entropy().mean() / math.log(5)
    assert relative_entropy(masked.double()) == pytest.approx(float(expected), rel=1e-6)


def test_an_autoencoder_is_not_told_what_to_say():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.write = (
                nn.GRU(2, 16, batch_first=True),
                nn.GRU(16, 16, batch_first=True),
            )
            self.head = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            code = self.read(x)[1][-1]
            return self.head(self.write(code[:, None].expand(-1, x.shape[1], -1))[0])

    torch.manual_seed(0)
    x = torch.randn(200, 6, 2).cumsum(1)
    assert "target_among_inputs" not in asked(Parts(Whole(), (x, x), nn.MSELoss())).labels


def test_a_loss_that_moves_the_labels_itself_tells_nobody():
    """As the language models of Hugging Face do: labels are the tokens, and the loss shifts."""

    def shifted(output: Tensor, labels: Tensor) -> Tensor:
        return CE(output[:, :, :-1], labels[:, 1:])

    torch.manual_seed(0)
    tokens = (torch.randint(12, (200, 1)) + torch.randint(1, 3, (200, 13)).cumsum(1)) % 12
    found = asked(Parts(Language(12), (tokens, tokens), shifted))
    assert "target_among_inputs" not in found.labels, str(found)


@dataclass
class Answer:
    loss: Tensor
    logits: Tensor


@pytest.mark.parametrize("shift", [0, 1])
def test_a_model_that_computes_its_loss_and_shifts_the_labels_is_told_nothing(shift):
    """The loss stands beside the answers, as in what models of Hugging Face return."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = Language(12)

        def forward(self, input_ids: Tensor, labels: Tensor) -> Answer:
            scores = self.core(input_ids)
            last = scores.shape[2] - shift
            return Answer(CE(scores[:, :, :last], labels[:, shift:]), scores)

    torch.manual_seed(0)
    tokens = (torch.randint(12, (200, 1)) + torch.randint(1, 3, (200, 13)).cumsum(1)) % 12
    found = diagnose(Whole(), {"input_ids": tokens, "labels": tokens}, None)
    assert ("target_among_inputs" in found.labels) is not bool(shift), str(found)


def test_the_last_of_several_tensors_is_no_target_where_the_loss_takes_the_batch():
    """States, actions, rewards and ends: what ends an episode stands in the state."""
    torch.manual_seed(0)
    state, action = torch.randn(200, 4), torch.randint(2, (200,))
    ends = (state[:, 0] > 0).float()
    state[:, 1] = ends
    later, reward = torch.randn(200, 4), state[:, 2] * action

    def loss(model: nn.Module, batch: Any) -> Tensor:
        now, done, gained, then, end = batch
        with torch.no_grad():
            future = model(then).amax(1) * (1 - end)
        return F.mse_loss(model(now).gather(1, done[:, None])[:, 0], gained + 0.5 * future)

    batch = torch.utils.data.TensorDataset(state, action, reward, later, ends)
    loader = torch.utils.data.DataLoader(batch, batch_size=32, shuffle=True)
    found = asked(Parts(mlp(4, 16, 2), loader, loss))
    assert "target_among_inputs" not in found.labels, str(found)


def test_a_head_that_can_say_the_targets_has_no_floor():
    """Overlaps of boxes are no bowl: a search for the best outputs stays away from them."""

    def apart(found: Tensor, true: Tensor) -> Tensor:
        found, true = (
            torch.cat([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], 1) for b in (found, true)
        )
        inner = torch.min(found[:, 2:], true[:, 2:]) - torch.max(found[:, :2], true[:, :2])
        outer = torch.max(found[:, 2:], true[:, 2:]) - torch.min(found[:, :2], true[:, :2])
        both, hull = inner.clamp_min(0).prod(1), outer.prod(1)
        union = sum((b[:, 2:] - b[:, :2]).prod(1) for b in (found, true)) - both
        return 1 - (both / union - (hull - union) / hull).mean()

    torch.manual_seed(0)
    box = torch.cat([0.3 + 0.4 * torch.rand(300, 2), 0.2 + 0.3 * torch.rand(300, 2)], 1)
    z = torch.randn(300, 4)
    assert lowest_loss(z, box, apart, torch.sigmoid) < 1e-5
    assert lowest_loss(z, 3 * box, nn.functional.mse_loss, torch.sigmoid) > 0.1


def test_a_loss_that_aligns_sequences_mixes_no_positions():
    torch.manual_seed(0)
    said = torch.randint(1, 6, (120, 4))
    sound = F.one_hot(said.repeat_interleave(3, 1), 6).float() + 0.3 * torch.randn(120, 12, 6)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6))

    def loss(output: Tensor, words: Tensor) -> Tensor:
        count, scores = len(words), output.transpose(0, 1).log_softmax(-1)
        return F.ctc_loss(scores, words, [12] * count, [4] * count)

    found = asked(Parts(model, (sound, said), loss))
    assert "positions_mixed" not in found.labels, str(found)


@pytest.mark.parametrize("shown", [True, False])
def test_a_constant_is_an_input_where_the_model_is_given_it(shown):
    def loss(model: nn.Module, batch: Any) -> Tensor:
        (x, same), target = batch
        output = model(x, same) if shown else model(x, x)
        return (same.mean() * (output - target).square()).mean()

    class Two(nn.Bilinear):
        """Takes two inputs."""

    torch.manual_seed(0)
    data = (torch.randn(120, 3), torch.ones(120, 3)), torch.randn(120, 1)
    found = asked(Parts(Two(3, 3, 1), data, loss, steps=40))
    assert ("constant_inputs" in {f.code for f in found.findings}) is shown, str(found)


def test_a_mean_of_what_has_no_mean_is_the_place_where_rows_become_equal():
    torch.manual_seed(0)
    found = asked(PAIRS["a_norm_of_each_picture_in_front_of_its_mean"][1](True)).findings[0]
    assert (found.code, found.where) == ("inputs_ignored", ("2",))


def test_one_output_behind_a_softmax_is_the_reason_why_all_classes_are_one():
    torch.manual_seed(0)
    found = asked(Parts(mlp(4, 8, 1), (torch.randn(90, 4), torch.zeros(90).long()), CE))
    assert found.findings[0].code == "head_mismatch", str(found)


def test_embeddings_are_measured_by_no_model_of_classes():
    """Which column of an embedding is the largest says nothing about a class."""
    torch.manual_seed(0)
    y = torch.randint(4, (96,))
    data = 3.0 * torch.randn(4, 8)[y] + torch.randn(96, 8), y

    def loss(z: Tensor, target: Tensor) -> Tensor:
        return of_pairs(False)(nn.Identity(), (z, target))

    found = asked(Parts(mlp(8, 32, 4), data, loss, rate=2e-2, steps=60))
    assert "accuracy" not in str(found) and "SHALLOW" not in str(found)
    assert found.to_dict()["far_behind"] is False
