"""No module makes `diagnose` fail: outputs that miss the loss, cut graphs, odd containers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from faulty import CE, adam
from tikhon.diagnosis import Record, diagnose, judge

SIZE = 8
# what torch says of a reentrant checkpoint as the first layer
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


@dataclass
class Answer:
    logits: Tensor
    extra: Any = None


class LastState(nn.Module):
    """Reads the last hidden state of a recurrent layer and nothing else of it."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.core = kind(2, SIZE, batch_first=True)

    def forward(self, x):
        state = self.core(x.reshape(-1, 4, 2))[1]
        return (state[0] if isinstance(state, tuple) else state)[-1]


class Beside(nn.Module):
    """A layer whose output nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 3)

    def forward(self, x):
        self.spare(x)
        return torch.tanh(self.used(x))


class Cut(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(SIZE, SIZE), how

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                return self.layer(x)
        if self.how == "inference":
            with torch.inference_mode():
                value = self.layer(x)
            return value.clone()
        return self.layer(x).detach()


class Listed(nn.Module):
    """Layers that the module does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)]

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(SIZE, SIZE), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.layer(self.act(self.layer(x))))


class Recomputed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE))
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


class Branches(nn.Module):
    """Parts whose outputs leave in containers, with None among them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(SIZE, SIZE), nn.GRU(SIZE, SIZE, batch_first=True)

    def forward(self, x):
        rows, state = self.b(x[:, None])
        found = {"main": self.a(x), "side": (rows, None), "state": Answer(state)}
        return found["main"] + found["state"].logits[-1]


PARTS = {
    "linear": lambda: nn.Linear(SIZE, SIZE),
    "rnn": lambda: LastState(nn.RNN),
    "lstm": lambda: LastState(nn.LSTM),
    "gru": lambda: LastState(nn.GRU),
    "beside": Beside,
    "detach": lambda: Cut("detach"),
    "no_grad": lambda: Cut("no_grad"),
    "inference": lambda: Cut("inference"),
    "listed": Listed,
    "twice": Twice,
    "checkpoint": lambda: Recomputed(False),
    "reentrant": lambda: Recomputed(True),
    "branches": Branches,
    "batchnorm": lambda: nn.BatchNorm1d(SIZE),
    "identity": nn.Identity,
    "empty": lambda: nn.Sequential(),
    "softmax": lambda: nn.Softmax(-1),
    "dropout": lambda: nn.Dropout(0.5),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, SIZE)),
        nn.Conv1d(1, 2, 3, padding=1),
        nn.Flatten(),
        nn.Linear(2 * SIZE, SIZE),
    ),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(SIZE, SIZE)),
    "frozen": lambda: nn.Linear(SIZE, SIZE).requires_grad_(False),
    "lazy bias": lambda: nn.Linear(SIZE, SIZE, bias=False),
    "no columns": lambda: nn.Sequential(nn.Unflatten(1, (SIZE, 1)), nn.Flatten()),
}
OUTPUTS = ("tensor", "tuple", "dict", "dataclass")


class Drawn(nn.Module):
    def __init__(self, parts: list[str], form: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList(PARTS[name]() for name in parts)
        self.head = nn.Linear(SIZE, 3)
        self.side = nn.Linear(SIZE, 2)  # an auxiliary head outside of the loss
        self.form = form

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        logits, side = self.head(x), self.side(x)
        forms: dict[str, Any] = {
            "tensor": logits,
            "tuple": (logits, None, side),
            "dict": {"logits": logits, "side": side, "none": None},
            "dataclass": Answer(logits, (side, None)),
        }
        return forms[self.form]


def loss(output, target):
    if isinstance(output, tuple):
        output = output[0]
    if isinstance(output, dict):
        output = output["logits"]
    return CE(output if isinstance(output, Tensor) else output.logits, target)


def data(rows: int = 40):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, SIZE, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


@given(
    parts=st.lists(st.sampled_from(sorted(PARTS)), max_size=4),
    form=st.sampled_from(OUTPUTS),
    trained=st.booleans(),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_module_makes_it_fail(parts, form, trained):
    torch.manual_seed(0)
    found = diagnose(
        Drawn(parts, form),
        data(),
        loss,
        optimizer=adam(0.01) if trained else None,
        valid=data(20),
        steps=4,
        batch_size=16,
    )
    assert str(found)
    again = judge(Record.from_dict(found.to_dict()["record"]))
    assert [f.code for f in again.findings] == [f.code for f in found.findings]


@pytest.mark.parametrize("part", sorted(PARTS))
def test_no_part_alone_makes_it_fail(part):
    torch.manual_seed(0)
    assert str(diagnose(Drawn([part], "tensor"), data(), loss, optimizer=adam(0.01), steps=6))


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_recurrent_layer_read_by_its_last_state_has_a_signal(kind):
    torch.manual_seed(0)
    found = diagnose(nn.Sequential(LastState(kind), nn.Linear(SIZE, 3)), data(), CE)
    place = next(i for i, s in enumerate(found.record.sites) if s.name == "0.core")
    assert (found.record.probes[0].readings[place].signal or 0) > 0
