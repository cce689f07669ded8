"""Programs in all their forms: losses that call the model, models with a loss, batches by name."""

from __future__ import annotations

import random
import warnings
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from faulty import CE, adam, classes, deep, fingerprint, he, same
from tikhon.data.nested import (
    concatenate,
    join_batch,
    map_tensors,
    split_batch,
    take_rows,
    tensors,
)
from tikhon.diagnosis import diagnose
from tikhon.diagnosis.samples import samples
from tikhon.errors import DataError, InputError


def by_name():
    x, y = classes()
    return {"features": x, "labels": y}


class Pretrained(nn.Module):
    """Takes its labels and returns its loss, as the models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = he(deep(2, nn.ReLU, 32))

    def forward(self, features, labels=None):
        logits = self.body(features)
        loss = CE(logits, labels) if labels is not None else None
        return SimpleNamespace(loss=loss, logits=logits)


class Lightning(nn.Module):
    """Computes its loss in `training_step`, as Lightning modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = he(deep(2, nn.ReLU, 32))

    def forward(self, x):
        return self.body(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return {"loss": CE(self(x), y)}


def closure(model, batch):
    x, y = batch
    return CE(model(x), y) + 1e-4 * model[0].weight.square().sum()


def halves(data):
    """Two thirds to train, one third to judge."""
    batch = split_batch(data)
    return join_batch(take_rows(batch, torch.arange(270))), join_batch(
        take_rows(batch, torch.arange(270, 400))
    )


class Force(nn.Module):
    """The slope of an energy, which it takes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1, bias=False))

    def forward(self, at):
        at = at.clone().requires_grad_()
        return -torch.autograd.grad(self.energy(at).sum(), at, create_graph=True)[0]


def places(size=2):
    return torch.randn(400, size, generator=torch.Generator().manual_seed(0))


def equation(model, batch):
    """The residual of u'' = -u where u is 0 at 0 and has the slope 1."""
    at = batch[0].clone().requires_grad_()
    value = model(at)
    slope = torch.autograd.grad(value.sum(), at, create_graph=True)[0]
    bend = torch.autograd.grad(slope.sum(), at, create_graph=True)[0]
    start = torch.zeros(1, 1, requires_grad=True)
    (first,) = torch.autograd.grad(model(start).sum(), start, create_graph=True)
    return (
        (bend + value).square().mean() + model(start).square().sum() + (first - 1).square().sum()
    )


FORMS = {
    "closure": (lambda: he(deep(2, nn.ReLU, 32)), classes, closure),
    "own loss": (Pretrained, by_name, None),
    "training_step": (Lightning, classes, None),
    "unsupervised": (
        lambda: nn.Linear(16, 16),
        lambda: classes()[0],
        lambda model, batch: (model(batch) - batch).square().mean(),
    ),
    "one tensor a batch": (
        lambda: nn.Linear(16, 16),
        lambda: (classes()[0],),
        lambda model, batch: (model(batch[0]) - batch[0]).square().mean(),
    ),
    "force": (Force, lambda: (places(), -places()), nn.functional.mse_loss),
    "equation": (
        lambda: nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)),
        lambda: (places(1), torch.zeros(400, 1)),
        equation,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_healthy_program_of_any_form_is_trained_and_left_alone(name):
    build, data, loss = FORMS[name]
    torch.manual_seed(0)
    model = build()
    engine = adam(0.01)(model.parameters())
    before = fingerprint(model, engine)
    train, valid = halves(data())
    found = diagnose(model, train, loss, optimizer=engine, valid=valid, steps=50)
    assert same(before, fingerprint(model, engine))
    assert found.ok, str(found)
    losses = found.record.losses
    assert losses[-1] < 0.5 * losses[0]
    assert found.record.points[-1].valid_loss is not None


def schedule(engine):
    return torch.optim.lr_scheduler.StepLR(engine, 1000)


CONFIGURED = {
    "an optimizer": lambda engine: engine,
    "a list": lambda engine: [engine],
    "with a schedule": lambda engine: ([engine], [schedule(engine)]),
    "a dictionary": lambda engine: {"optimizer": engine, "lr_scheduler": schedule(engine)},
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_lightning_module_is_trained_by_the_optimizer_that_it_configures(name):
    torch.manual_seed(0)
    model = Lightning()
    model.configure_optimizers = lambda: CONFIGURED[name](adam(0.01)(model.parameters()))
    found = diagnose(model, classes(), None, steps=50)
    given = diagnose(model, classes(), None, optimizer=adam(0.01), steps=50)
    assert found.record.losses == given.record.losses
    assert len(found.record.losses) == 50
    assert "AdamW lr 0.01, 50 steps" in str(found)
    assert found.record.wiring["unmeasured"] == {}, "the module is held by what it holds"


def two(model):
    return [adam(0.01)(model.body.parameters()), adam(0.01)(model.body.parameters())]


@pytest.mark.parametrize(
    "configure", [two, lambda model: model.trainer, lambda model, decay: None]
)
def test_an_optimizer_that_cannot_be_taken_leaves_the_first_step_alone(configure):
    model = Lightning()
    model.configure_optimizers = MethodType(configure, model)
    assert "no optimizer: step 0 only" in str(diagnose(model, classes(), None, steps=50))


@pytest.mark.parametrize("rows", [16, 100])
def test_the_batch_is_that_of_the_loader(rows):
    loader = DataLoader(TensorDataset(*classes()), batch_size=rows)
    found = diagnose(he(deep(2, nn.ReLU, 32)), loader, CE, optimizer=adam(0.01), steps=20)
    assert found.record.batch_size == rows
    assert f"batch {rows}," in str(found)


@pytest.mark.parametrize("name", FORMS)
def test_a_sick_program_of_any_form_is_found(name):
    build, data, loss = FORMS[name]
    torch.manual_seed(0)
    found = diagnose(build(), data(), loss, optimizer=adam(1e-7), steps=30)
    assert "slow_convergence" in found.labels, str(found)


def test_a_model_without_a_loss_of_its_own_is_refused():
    with pytest.raises(
        InputError, match=r"gives no loss of its own .*pass loss\(output, target\)"
    ):
        diagnose(deep(1, nn.ReLU), classes(), None)


def test_data_without_a_target_need_a_loss_that_calls_the_model():
    with pytest.raises(DataError, match=r"loss\(model, batch\)"):
        diagnose(deep(1, nn.ReLU), classes()[0], CE)
    with pytest.raises(DataError, match="received names features"):
        diagnose(Pretrained(), {"features": classes()[0]}, CE)


class Ragged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.GRU(2, 16, batch_first=True), nn.Linear(16, 2)

    def forward(self, rows):
        return self.head(self.core(rows)[1][-1])


def sequences():
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.arange(160) % 5 + 2).tolist()
    rows = [torch.randn(length, 2, generator=generator) for length in lengths]
    return rows, torch.stack([(row[0, 0] > 0).long() for row in rows])


def test_packed_sequences_are_inputs():
    rows, y = sequences()
    torch.manual_seed(0)
    packed = pack_sequence(rows, enforce_sorted=False)
    found = diagnose(Ragged(), (packed, y), CE, optimizer=adam(0.02), steps=50)
    assert found.record.losses[-1] < 0.5 * found.record.losses[0], str(found)


def test_a_loader_may_pad_each_batch_to_a_length_of_its_own():
    rows, y = sequences()
    pad = nn.utils.rnn.pad_sequence
    batches = [(pad(rows[k : k + 16], batch_first=True), y[k : k + 16]) for k in range(0, 160, 16)]
    torch.manual_seed(0)
    found = diagnose(Ragged(), batches, CE, optimizer=adam(0.02), steps=40)
    assert found.record.losses[-1] < found.record.losses[0]


def test_rows_of_unequal_length_are_refused_with_the_way_out():
    with pytest.raises(DataError, match="pad_sequence"):
        diagnose(Ragged(), ([[1.0, 2.0], [1.0]], [0, 1]), CE)


def test_a_data_set_is_the_pair_of_its_tensors():
    pair, model = classes(), deep(1, nn.ReLU)
    found = [diagnose(model, d, CE) for d in (pair, torch.utils.data.TensorDataset(*pair))]
    assert found[0].to_dict() == found[1].to_dict()


BATCHES = [
    (torch.zeros(3, 2),),
    (torch.zeros(3, 2), torch.zeros(3)),
    (torch.zeros(3, 2), torch.ones(3), torch.zeros(3)),
    ((torch.zeros(3, 2), torch.ones(3)), torch.zeros(3)),
    ((torch.zeros(3, 2),), torch.zeros(3)),
    (torch.zeros(3, 2), (torch.ones(3), torch.zeros(3))),
    {"a": torch.zeros(3), "target": torch.ones(3)},
    {"a": torch.zeros(3), "b": torch.ones(3)},
]
KINDS = ["one", "pair", "three", "two in one", "one in one", "two targets", "names", "no target"]


@pytest.mark.parametrize("batch", BATCHES, ids=KINDS)
def test_a_batch_is_given_back_as_it_came(batch):
    rows = torch.arange(3)
    parts = concatenate([take_rows(split_batch(batch), part) for part in rows.split(2)])
    for again in (
        join_batch(take_rows(split_batch(batch), rows)),
        join_batch(map_tensors(parts, torch.clone)),
    ):
        assert type(again) is type(batch)
        assert outline(again) == outline(batch)
        assert all(torch.equal(a, b) for a, b in zip(tensors(batch), tensors(again), strict=True))
    assert samples(batch).rows == 3


def outline(value):
    """What is nested in what, without the values."""
    if isinstance(value, dict):
        return {name: outline(part) for name, part in value.items()}
    return [outline(part) for part in value] if isinstance(value, tuple) else value.shape


class Raises(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(16, 4), error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("shape"),
        AttributeError("no w"),
        ZeroDivisionError("by zero"),
        NotImplementedError("later"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_whatever_the_model_raises_is_explained(error):
    with pytest.raises(InputError, match=r"Raises or its loss failed on a batch with inputs"):
        diagnose(Raises(error), classes(), CE)


HINTS = [
    (nn.BCEWithLogitsLoss(), lambda y: (y > 1).float(), 1, "view_as"),
    (CE, lambda y: nn.functional.one_hot(y), 4, "argmax"),
    (nn.BCELoss(), lambda y: (y[:, None] > 1).float(), 1, "with_logits"),
    (nn.BCELoss(), lambda y: (y[:, None] > 1).float() + 1, 1, "from 1 to 2: give 0 and 1"),
]


@pytest.mark.parametrize(("loss", "change", "outputs", "words"), HINTS, ids=[h[3] for h in HINTS])
def test_the_usual_errors_of_losses_say_what_to_write(loss, change, outputs, words):
    x, y = classes()
    with pytest.raises(InputError, match=words):
        diagnose(nn.Linear(16, outputs), (5 * x, change(y)), loss, optimizer=adam(0.01), steps=2)


def test_a_backward_pass_that_fails_is_explained():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x):
            y = torch.sigmoid(self.layer(x))
            y += 1
            return y

    with pytest.raises(InputError, match=r"backward pass of InPlace failed.*x = x \+ y"):
        diagnose(InPlace(), classes(), CE, optimizer=adam(0.01), steps=2)


def test_lazy_layers_are_refused():
    with pytest.raises(InputError, match="call the model once"):
        diagnose(nn.LazyLinear(4), classes(), CE)


def test_answers_of_another_number_than_the_targets_are_told_as_that():
    def last_row(x):
        return x.transpose(0, 1).contiguous()

    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(last_row(x)[:, 0])

    x = torch.randn(64, 5, 3)
    for loss in (nn.MSELoss(), nn.BCEWithLogitsLoss()):
        with pytest.raises(InputError, match="out\\[-1\\] is the last row of the batch"):
            diagnose(Flipped(), (x, torch.zeros(64, 2)), loss)


def test_a_network_of_a_whole_graph_is_trained_on_all_rows_at_once():
    g = torch.Generator().manual_seed(0)
    edges = torch.eye(300).roll(1, 0) / 2 + torch.eye(300) / 2
    x = torch.randn(300, 6, generator=g)
    y = (edges @ x)[:, :3].argmax(1)

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return edges @ self.layer(x)

    found = diagnose(Graph(), (x, y), CE, optimizer=adam(0.1), steps=30)
    assert found.ok
    assert found.record.batch_size == 300


@pytest.mark.parametrize(
    ("first", "words"),
    [(False, r"nn.LSTM\(..., batch_first=True\)"), (True, r"the last step is out\[:, -1\]")],
)
def test_an_answer_for_each_step_in_place_of_each_row_is_explained(first, words):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.core, self.head = nn.LSTM(3, 8, batch_first=first), nn.Linear(8, 2)

        def forward(self, x):
            out = self.core(x)[0]
            return self.head(out[-1])

    x, y = torch.randn(64, 5, 3), torch.arange(64) % 2
    with pytest.raises(InputError, match=words):
        diagnose(Reader(), (x, y), CE)


@pytest.mark.parametrize("draw", ["python", "numpy", "slopes"])
def test_what_is_drawn_at_random_is_not_said_to_come_from_the_neighbours(draw):
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 4)

        def forward(self, x):
            h = self.a(x)
            if draw == "python":
                return self.b(torch.relu(h if random.random() > 0.5 else -h))
            if draw == "numpy":
                return self.b(torch.relu(h) * (1 + np.random.rand()))
            return self.b(nn.functional.rrelu(h, training=True))

    found = diagnose(Drawing(), classes(), CE, optimizer=adam(0.01), steps=20)
    assert "random_in_eval" in found.labels and "rows_mixed" not in found.labels


def test_a_loss_of_nothing_and_rows_of_another_width_are_told_as_that():
    with pytest.raises(InputError, match="returned None"):
        diagnose(nn.Linear(16, 4), classes(), lambda output, target: None)
    with pytest.raises(InputError, match="rows of another width"):
        diagnose(nn.Linear(15, 4), classes(), CE)


def test_a_scripted_module_is_refused_as_one():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(16, 4))
    with pytest.raises(InputError, match="a scripted one has no copy that trains"):
        diagnose(scripted, classes(), CE)
