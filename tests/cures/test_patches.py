"""A patch is the program: pasted into the user's own code it trains the treated model."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import tikhon as tk
from faulty import CE, classes, deep, he, numbers, sgd
from miswired import COVERED
from tikhon.cures import treatments as cures
from tikhon.cures.patch import Line, address, execute, script
from tikhon.cures.treatment import AFTER, BEFORE, SETUP
from tikhon.cures.trials import DoesNotApplyError, Trials, train
from tikhon.diagnosis.samples import samples
from tikhon.errors import InputError

STEPS = 2


class Block(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.act, self.last = layer(), nn.ReLU(), layer()

    def forward(self, x):
        return x + self.last(self.act(self.first(x)))


class Last(nn.Module):
    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, x):
        return self.core(x)[0][:, -1]


def restrained():
    head = nn.Sequential(nn.Linear(32, 4), nn.Softmax(-1))
    return he(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.7), head))


def squares(model):
    return 0.01 * sum(p.square().sum() for p in model.parameters())


def recurrent(core):
    return lambda: nn.Sequential(nn.Unflatten(1, (8, 2)), Last(core()), nn.Linear(8, 4))


PLAIN = sgd(0.05, weight_decay=1e-4)


@dataclass(frozen=True)
class Program:
    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], Any] = classes
    loss: Callable[..., Any] = CE
    penalty: Any = None
    optimizer: Any = PLAIN


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = deep(1, nn.ReLU).bfloat16()

    def forward(self, x):
        return self.layers(x.to(self.layers[0].weight.dtype)).float()


def frozen():
    model = deep(2, nn.ReLU)
    model[0].requires_grad_(False)
    return model


def straight():
    return nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 4))


class Listed(nn.Module):
    """Layers that the model does not know, and dropout behind the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.hidden, self.scale = [nn.Linear(16, 16)], torch.ones(16).requires_grad_()
        self.treatment_names = {"head": nn.Linear(16, 4)}
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        h = torch.relu(self.first(x))
        for layer in self.hidden:
            h = torch.relu(layer(h * self.scale))
        return self.drop(self.treatment_names["head"](h))


def first_layer_only(parameters):
    return torch.optim.SGD(list(parameters)[:2], lr=0.05)


PROGRAMS = [
    Program("chain", lambda: deep(5, nn.Sigmoid, 24)),
    Program("restrained", restrained, penalty=squares),
    Program("terms", lambda: deep(2, nn.ReLU), penalty={"*.weight": tk.L1(1e-3)}),
    Program("numbers", lambda: he(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))),
            numbers, nn.MSELoss()),
    Program("powers", lambda: deep(1, nn.ReLU), lambda: (classes()[0].exp() ** 3, classes()[1])),
    Program("linear blocks", lambda: nn.Sequential(
        nn.Linear(16, 8), *[Block(lambda: nn.Linear(8, 8)) for _ in range(3)], nn.Linear(8, 4))),
    Program("conv blocks", lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), Block(lambda: nn.Conv2d(4, 4, 3, padding=1)),
        nn.Flatten(), nn.Linear(64, 4))),
    Program("rnn", recurrent(lambda: nn.RNN(2, 8, batch_first=True))),
    Program("lstm", recurrent(lambda: nn.LSTM(2, 8, 2, batch_first=True))),
    Program("gru", recurrent(lambda: nn.GRU(2, 8, batch_first=True))),
    Program("rnn over the rows", recurrent(lambda: nn.RNN(2, 8))),
    Program("straight", straight),
    Program("half", Half),
    Program("frozen", frozen),
    Program("listed", Listed),
    Program("left out", lambda: deep(2, nn.ReLU), optimizer=first_layer_only),
    Program("attention", lambda: nn.Sequential(
        nn.Unflatten(1, (4, 4)), nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
        nn.Flatten(), nn.Linear(16, 4))),
]  # fmt: skip
TREATMENTS = {t.name: t for treatments in cures.TREATMENTS_BY_CODE.values() for t in treatments}
TREATMENTS |= {t.name: t for t in (*cures.RATES[:4], *cures.ADAMS)}
TREATMENTS |= {
    t.name: t for t in (cures.INIT & cures.adam(1e-3), cures.LAYERNORM & cures.rate(0.2))
}
OF_SETTINGS = {  # of the rows, the optimizer and the loss: the same code for every program
    t.name
    for t in TREATMENTS.values()
    if (t.setup or t.rows)
    and not (t.parts or t.edit or t.data_edit or t.rewrite or t.only_if_missing)
}
OF_LOSS = {cures.NO_IGNORED_CLASSES.name, cures.NO_PADDING_IN_LOSS.name, cures.CLASS_WEIGHTS.name}


def trials(program):
    data = program.data()
    valid_batch = tuple(t[:50] for t in data)
    return Trials(
        model=program.build, loss=program.loss, optimizer=program.optimizer,
        penalty=program.penalty, clip=None, source=samples(data), valid_batch=valid_batch,
        batch_size=64,
        seeds=[0], codes=set(),
    )  # fmt: skip


def paste(program, patch, treated, valid_batch):
    """The program as a user writes it, with the patch pasted where its comments say."""
    x, y = program.data()
    torch.manual_seed(0)
    names = {  # what a user's program has, and no module: a patch imports what it needs
        "model": program.build(), "x_train": x, "y_train": y, "loss": program.loss,
        "penalty": program.penalty, "x_valid": valid_batch[0], "y_valid": valid_batch[1],
        "batch_size": 64,
        "x": samples((x, y)).probe[0],
    }  # fmt: skip
    sections = dict.fromkeys((BEFORE, SETUP, AFTER), "")
    parts = re.split(rf"^({'|'.join(map(re.escape, sections))})$", patch, flags=re.MULTILINE)
    sections |= dict(zip(parts[1::2], parts[2::2]))
    torch.manual_seed(1)
    exec(parts[0], names)  # its imports
    exec(sections[BEFORE], names)
    model = names["model"]
    names["optimizer"] = program.optimizer(model.parameters())
    exec(sections[SETUP], names)
    optimizer, added = names["optimizer"], names["penalty"]
    if isinstance(added, dict):
        tk.regularize(model, optimizer, added)
    torch.manual_seed(9)
    batches = samples((names["x_train"], names["y_train"])).stream(names["batch_size"], 0)
    for _ in range(STEPS):
        model.train()
        rows, target = next(batches)
        optimizer.zero_grad()
        value = names["loss"](model(rows), target)
        (value + added(model) if callable(added) else value).backward()
        optimizer.step()
    exec(sections[AFTER], names)
    return names


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_the_pasted_patch_trains_the_treated_model(program):
    found = trials(program)
    applied = 0
    own = program.name in ("chain", "terms", "numbers", "left out")
    for treatment in TREATMENTS.values():
        if treatment.name in OF_SETTINGS | OF_LOSS and not own:
            continue
        edits = any(part.edit for part in treatment.parts or (treatment,))
        if program.optimizer is first_layer_only and edits:
            continue  # an optimizer by position takes new layers in one of the two only
        try:
            replica = found.build(treatment, 0)
        except (DoesNotApplyError, NotImplementedError):  # torch lacks some of it for 16 bits
            continue
        torch.manual_seed(9)
        size = treatment.batch or 64
        try:
            train(replica, found.source, found.valid_batch, STEPS, size, 0, loss=program.loss)
        except InputError:  # the shapes do not fit: the search leaves the treatment out
            continue
        applied += 1
        names = paste(program, replica.patch, replica, found.valid_batch)
        x, y = program.data()
        replica.model.eval()
        user = names["model"].eval()
        with torch.no_grad():
            rows = names["x_train"] if len(names["x_train"]) == len(x) else x
            wanted, given = replica.model(x), user(rows)
            if treatment is cures.SCALED_TARGETS:
                given = given * names["scale"] + names["shift"]
                assert float(wanted.std()) == pytest.approx(float(y.std()), rel=0.9)
        if bool((wanted.abs() < 1e4).all()):  # else it diverges, which multiplies every rounding
            torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5, msg=treatment.name)
    assert applied >= 10 or not own
    assert applied


def test_every_treatment_applies_somewhere_and_is_code():
    left = set(TREATMENTS) - COVERED
    for program in PROGRAMS:
        found = trials(program)
        for treatment in [t for t in TREATMENTS.values() if t.name in left]:
            try:
                patch = found.build(treatment, 0).patch
            except (DoesNotApplyError, NotImplementedError):
                continue
            left -= {treatment.name}
            assert ast.parse(patch).body, (treatment.name, "only comments")
    assert not left


def test_lines_become_loops_where_they_count_up():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(4)])
    lines = [Line(address(model, f"{i}.1"), "{at} = nn.Tanh()") for i in range(4)]
    assert script(lines) == "for i in range(4):\n    model[i][1] = nn.Tanh()"
    assert script(lines[:2]) == "model[0][1] = nn.Tanh()\nmodel[1][1] = nn.Tanh()"
    assert script(lines[::2] + lines[3:]).count("\n") == 2
    treatment_names = nn.ModuleDict({"a b": nn.ReLU()})
    assert address(treatment_names, "a b") == "model['a b']"


def test_places_that_do_not_count_up_become_one_loop_over_a_list():
    model = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
                          for _ in range(2))  # fmt: skip
    places = [f"model[{i}][{part!r}]" for i in range(2) for part in "ab"]
    code = script([Line(at, "w = 3.0\nnn.init.constant_({at}.weight, w)") for at in places])
    assert code.count("constant_") == 1
    execute(code, model=model)
    assert all(float(layer.weight.detach()) == 3 for block in model for layer in block.values())
