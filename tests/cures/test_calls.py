"""A program that is treated equals the same program written right: answers, loss and slopes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from faulty import classes
from miswired import CE, TWINS, amounts, by_place, mlp, reader, tokens
from tikhon.cures import treatments as cures
from tikhon.cures.calls import axes_order, mixes_axes
from tikhon.data.forward import loss_takes_model
from tikhon.diagnosis.replica import replicate
from tikhon.diagnosis.samples import samples
from wired import Fn


def outcome(model, loss, data):
    """Answers after a pass in training mode, the loss, and its slopes."""
    x, y = data
    whole = loss_takes_model(loss)
    torch.manual_seed(5)
    model.train()
    value = loss(model, data) if whole else loss(model(x), y)
    weights = list(model.parameters())
    grads = torch.autograd.grad(value, weights, allow_unused=True)
    with torch.no_grad():
        answer = model.eval()(x)
    return answer, value.detach(), [g if g is not None else torch.zeros(()) for g in grads]


def drawn(build):
    torch.manual_seed(1)
    return build()


def treated(twins, build, loss):
    """The replica; None where the treatment does not apply."""
    model = drawn(build)
    engine = torch.optim.SGD(model.parameters(), lr=0.1)
    found = replicate(model, loss, engine)
    applies = twins.treatment.apply(found, samples(twins.data(), rows=1000))
    return found if applies else None


@pytest.mark.parametrize("twins", TWINS, ids=lambda t: t.name)
def test_a_treated_program_is_the_right_one(twins):
    right = outcome(drawn(twins.right), twins.right_loss or twins.loss, twins.data())
    found = treated(twins, twins.wrong, twins.loss)
    assert found is not None
    torch.testing.assert_close(outcome(found.model, found.loss, twins.data()), right)
    before = outcome(drawn(twins.wrong), twins.loss, twins.data()) if twins.name not in (
        "told to require", "logarithm of 0") else None  # fmt: skip
    if before is not None:
        same = all(
            torch.allclose(a, b, equal_nan=True)
            for a, b in zip((*before[:2], *before[2]), (*right[:2], *right[2]), strict=True)
        )
        assert not same, "the twins do not differ"


@pytest.mark.parametrize("twins", TWINS, ids=lambda t: t.name)
def test_a_patch_of_calls_runs_when_pasted(twins):
    found = treated(twins, twins.wrong, twins.loss)
    model = drawn(twins.wrong)
    names = {"model": model, "loss": twins.loss}
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    exec(compile(found.patch, "<patch>", "exec"), names)
    pasted = outcome(names["model"], names["loss"], twins.data())
    torch.testing.assert_close(pasted, outcome(found.model, found.loss, twins.data()))
    again = copy.deepcopy(found.model)
    torch.testing.assert_close(again(twins.data()[0]), found.model(twins.data()[0]))


@pytest.mark.parametrize("twins", [t for t in TWINS if t.harmless], ids=lambda t: t.name)
def test_a_treatment_that_is_not_needed_changes_no_answer(twins):
    """What does not change is not better, and nothing that is not better is confirmed."""
    loss = twins.right_loss or twins.loss
    found = treated(twins, twins.right, loss)
    if found is not None and not loss_takes_model(loss):
        given = outcome(found.model, loss, twins.data())
        torch.testing.assert_close(given, outcome(drawn(twins.right), loss, twins.data()))


@pytest.mark.parametrize(
    ("before", "after", "order"),
    [
        ((2, 13, 16), (13, 32), (1, 0, 2)),
        ((13, 8, 12, 6), (13, 12, 48), (0, 2, 1, 3)),
        ((13, 5, 5, 3), (13, 3, 5, 5), (0, 3, 1, 2)),
        ((13, 48), (13, 3, 16), None),
        ((13, 12, 2, 8), (13, 12, 16), None),
        ((13, 3, 4), (39, 4), None),
        ((13, 6), (1, 13, 6), None),
    ],
)
def test_views_that_tear_axes_are_told_from_those_that_join(before, after, order):
    assert axes_order(before, after) == order
    assert mixes_axes(before, after) == (order is not None)
    values = torch.arange(math.prod(before)).reshape(before)
    if order is not None:  # a whole axis moves as one: neighbours keep their distance
        assert values.permute(order).reshape(after).shape == after


def test_positions_tell_tokens_in_another_order_apart():
    torch.manual_seed(0)
    x, _ = tokens()
    model = Fn(
        lambda m, x: m.head(m.mix(m.words(x)).mean(1)), words=nn.Embedding(6, 8),
        mix=nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), head=nn.Linear(8, 3),
    )  # fmt: skip
    found = replicate(model, CE, torch.optim.SGD(model.parameters(), lr=0.1))
    assert cures.POSITIONAL_ENCODING.apply(found, samples((x, x[:, 0] % 3)))
    for one, apart in ((model.eval(), False), (found.model.eval(), True)):
        moved = (one(x) - one(x.roll(1, 1))).abs().max()
        assert bool(moved > 1e-3) == apart


def repaired(treatment, data, model=None, loss=CE):
    model = nn.Linear(data[0].shape[1], 3) if model is None else model
    found = replicate(model, loss, torch.optim.SGD(model.parameters(), lr=0.1))
    return found if treatment.apply(found, samples(data)) else None


def test_columns_that_hold_the_target_are_set_to_0():
    x, y = amounts()
    leaky = torch.cat([x, 2 * y[:, None] + 1], 1)
    model = nn.Linear(17, 1)
    found = repaired(cures.NO_TARGET_COLUMNS, (leaky, y[:, None]), model, F.mse_loss)
    clean = torch.cat([x, torch.zeros(len(x), 1)], 1)
    torch.testing.assert_close(found.model(leaky), model(clean))
    names = {"x_train": leaky.clone()}
    exec(compile(found.patch, "<patch>", "exec"), names)
    assert torch.equal(names["x_train"], clean)
    assert repaired(cures.NO_TARGET_COLUMNS, (x, y[:, None]), nn.Linear(16, 1), F.mse_loss) is None


def test_numbers_that_are_not_finite_are_filled_or_left_out():
    x, y = classes()
    x, y = x[:60].clone(), y[:60] % 3
    assert repaired(cures.FILLED_GAPS, (x, y)) is None
    assert repaired(cures.FINITE_ROWS, (x, y)) is None
    x[7, 2] = torch.inf
    x[9] = torch.nan
    kept = torch.tensor([k for k in range(60) if k not in (7, 9)])
    found = repaired(cures.FINITE_ROWS, (x, y))
    assert torch.equal(found.source.source[0], x[kept])
    assert torch.equal(found.source.source[1], y[kept])
    filled = repaired(cures.FILLED_GAPS, (x, y)).model(x)
    assert bool(filled.isfinite().all())
    torch.testing.assert_close(
        filled[kept], repaired(cures.FINITE_ROWS, (x, y)).model(x[kept]) * 0 + filled[kept]
    )


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.words = nn.Linear(16, 4), nn.Embedding(5, 4)

    def forward(self, x, kind):
        return self.head(x) + self.words(kind)


def test_gaps_of_one_of_several_inputs_are_filled():
    x, y = classes()
    x, kind = x[:60].clone(), torch.arange(60) % 5
    model = Several()
    data = ((x, kind), y[:60])
    assert repaired(cures.FILLED_GAPS, data, model) is None
    wanted = model(x.index_fill(0, torch.tensor([9]), 0.0), kind)
    x[9] = torch.nan
    found = repaired(cures.FILLED_GAPS, data, model)
    torch.testing.assert_close(found.model(x, kind), wanted)
    torch.testing.assert_close(found.model(x=x, kind=kind), wanted)


class Maker(nn.Module):
    def forward(self, x):
        return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))(x)


def test_layers_made_in_forward_are_made_once_and_learn():
    x, y = classes()
    model = Fn(lambda m, x: m.inner(x) + m.head(x), inner=Maker(), head=nn.Linear(16, 4))
    assert not torch.equal(model(x), model(x))
    found = repaired(cures.LAYERS_IN_INIT, (x, y), model)
    assert torch.equal(found.model(x), found.model(x))
    held = {id(p) for group in found.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in found.model.parameters()} == held
    assert len(held) == 6
    before = CE(found.model(x), y)
    for _ in range(3):
        found.optimizer.zero_grad()
        CE(found.model(x), y).backward()
        assert all(p.grad is not None for p in found.model.parameters())
        found.optimizer.step()
    assert CE(found.model(x), y) < before
    again = copy.deepcopy(found.model)
    assert torch.equal(again(x), found.model(x))
    assert repaired(cures.LAYERS_IN_INIT, (x, y), mlp()) is None


def test_a_decoder_is_given_the_word_before():
    words, _ = tokens()
    model = Fn(lambda m, x, y: m.head(m.words(y)), words=nn.Embedding(7, 8), head=nn.Linear(8, 6))
    engine = torch.optim.SGD(model.parameters(), lr=0.1)
    data = ((words.flip(1), words), words)
    found = replicate(model, by_place, engine)
    assert cures.SHIFTED_DECODER_INPUT.apply(found, samples(data))
    (asked, begun), said = found.source.source
    assert torch.equal(asked, words.flip(1))
    assert torch.equal(said, words)
    assert torch.equal(begun[:, 1:], words[:, :-1])
    assert bool((begun[:, 0] == 6).all())  # the one word that no text holds
    names = {"x_train": data[0], "y_train": words}
    exec(compile(found.patch, "<patch>", "exec"), names)
    assert torch.equal(names["x_train"][1], begun)
    right = replicate(model, by_place, engine)
    assert not cures.SHIFTED_DECODER_INPUT.apply(right, samples(((words.flip(1), begun), words)))


@pytest.mark.parametrize("shape", [(60, 5), (60, 9, 5), (60, 5, 4, 4)])
def test_inputs_are_scaled_by_feature_or_channel(shape):
    torch.manual_seed(0)
    axis = 1 if len(shape) == 4 else len(shape) - 1
    unit = torch.logspace(0, 2, 5).reshape([5 if k == axis else 1 for k in range(len(shape))])
    x = torch.randn(shape) * unit + 7 * unit
    model = Fn(lambda m, x: x)
    model.head = nn.Linear(1, 1)
    scaled = repaired(cures.SCALED_INPUTS, (x, torch.zeros(60)), model).model(x)
    rest = [k for k in range(len(shape)) if k != axis]
    torch.testing.assert_close(scaled.mean(rest), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std(rest), torch.ones(5), atol=1e-3, rtol=0)


def test_a_loader_is_shuffled():
    x, y = classes()
    rows = torch.utils.data.TensorDataset(x, y)
    model = mlp()
    found = replicate(model, CE, torch.optim.SGD(model.parameters(), lr=0.1))
    loader = torch.utils.data.DataLoader(rows, batch_size=20)
    assert cures.SHUFFLE.apply(found, samples(loader))
    torch.manual_seed(0)
    batches = [b for _, b in zip(range(len(loader)), found.source.stream(20, 0))]
    assert not torch.equal(torch.cat([b[1] for b in batches]), y)
    assert torch.equal(torch.cat([b[1] for b in batches]).sort().values, y.sort().values)
    assert repaired(cures.SHUFFLE, (x, y % 3)) is None


def test_a_sequence_that_is_its_own_target_is_moved_by_one():
    x, _ = tokens()
    model = reader()
    found = replicate(model, by_place, torch.optim.SGD(model.parameters(), lr=0.1))
    assert cures.NEXT_POSITION_TARGETS.apply(found, samples((x, x)))
    assert torch.equal(found.source.source[0], x[:, :-1])
    assert torch.equal(found.source.source[1], x[:, 1:])
    assert not cures.NEXT_POSITION_TARGETS.apply(found, samples((x[:, :-1], x[:, 1:])))


def test_a_reentrant_checkpoint_passes_gradients_on():
    def run(m, x):
        return m.head(checkpoint(m.body, x, use_reentrant=True))

    x, y = classes()
    model = Fn(run, body=nn.Linear(16, 8), head=nn.Linear(8, 4))
    found = replicate(model, CE, torch.optim.SGD(model.parameters(), lr=0.1))
    assert cures.INPUTS_REQUIRING_GRAD.apply(found, samples((x, y)))
    CE(found.model(x), y).backward()
    assert bool(found.model.body.weight.grad.any())


def test_two_treatments_of_one_loss_are_both_in_the_patch():
    x, y = classes()
    torch.manual_seed(1)
    model = mlp()
    loss = nn.CrossEntropyLoss(ignore_index=0)
    found = repaired(
        cures.NEGATED_LOSS & cures.NO_IGNORED_CLASSES & cures.rate(0.1), (x, y), model, loss
    )
    wanted = -CE(model(x), y)
    torch.testing.assert_close(found.loss(found.model(x), y), wanted)
    names = {"model": model, "loss": loss}
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    exec(compile(found.patch, "<patch>", "exec"), names)
    torch.testing.assert_close(names["loss"](model(x), y), wanted)
    assert names["optimizer"].param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_loss_of_the_model_itself_may_be_turned_round():
    x, y = classes()
    model = mlp()

    def loss(model, batch):
        return CE(model(batch[0]), batch[1])

    found = repaired(cures.NEGATED_LOSS, (x, y), model, loss)
    assert loss_takes_model(found.loss)
    torch.testing.assert_close(found.loss(found.model, (x, y)), -loss(model, (x, y)))
