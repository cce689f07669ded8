"""Every kind of model is measured, judged and cured: layers, inputs, wrappers, shared weights."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

import tikhon as tk
from faulty import CE, adam, classes, deep, fingerprint, he, numbers, same, sgd


class Last(nn.Module):
    def __init__(self, core):
        super().__init__()
        self.core, self.head = core, nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.core(x.reshape(-1, 8, 2))[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.mix = nn.Linear(4, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        h = self.up(x.reshape(-1, 4, 4))
        return self.head((h + self.mix(h, h, h, need_weights=False)[0]).mean(1))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 16)
        self.hidden, self.act = nn.Linear(16, 16), nn.Tanh()
        self.head = nn.Linear(16, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.act(self.hidden(self.embed(tokens).mean(1))))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(16, 32)
        self.act, self.head = nn.ReLU(), nn.Linear(32, 4)

    def forward(self, first, second):
        return self.head(self.act(self.a(first) + self.b(second)))


def tokens():
    x = torch.arange(240)[:, None].repeat(1, 3) % 8
    return x, x[:, 0]


def conv(kind, shape):
    first = kind(1, 8, 3, padding=1)
    act = nn.ReLU(inplace=kind is nn.Conv1d)
    return nn.Sequential(nn.Unflatten(1, (1, *shape)), first, act, nn.Flatten(), nn.Linear(128, 4))


KINDS = {
    "Conv1d": (lambda: conv(nn.Conv1d, (16,)), classes, "1"),
    "Conv2d": (lambda: conv(nn.Conv2d, (4, 4)), classes, "1"),
    "Conv3d": (lambda: conv(nn.Conv3d, (2, 2, 4)), classes, "1"),
    "RNN": (lambda: Last(nn.RNN(2, 16, batch_first=True)), classes, "core"),
    "LSTM": (lambda: Last(nn.LSTM(2, 16, batch_first=True)), classes, "core"),
    "GRU": (lambda: Last(nn.GRU(2, 16, batch_first=True)), classes, "core"),
    "MultiheadAttention": (Attention, classes, "mix.attention"),
    "tied embedding": (Words, tokens, "embed"),
    "frozen": (lambda: frozen(deep(2, nn.ReLU, 64)), classes, "0"),
    "a tuple": (Two, lambda: ((classes()[0], classes()[0]), classes()[1]), "a"),
    "names": (Two, lambda: ({"first": classes()[0], "second": classes()[0]}, classes()[1]), "b"),
}


def frozen(model):
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("name", KINDS)
def test_a_healthy_one_is_measured_and_left_alone(name):
    build, data, site = KINDS[name]
    torch.manual_seed(0)
    model = build()
    engine = adam(0.01)(model.parameters())
    before = fingerprint(model, engine)
    found = tk.diagnose(model, data(), CE, optimizer=engine, steps=40)
    assert same(before, fingerprint(model, engine))
    assert found.ok, str(found)
    place = next(i for i, s in enumerate(found.record.sites) if s.name == site)
    first = found.record.probes[0].readings[place]
    assert first.entropy is not None if site == "mix.attention" else first.rms is not None
    chain = [s.name for s in found.record.sites if s.role in ("weight", "recurrent")]
    assert len(chain) >= 2
    assert any(reading.signal for reading in found.record.probes[0].readings)


CURED = (  # the others are cured as these are
    "Conv2d",
    *(pytest.param(k, marks=pytest.mark.slow) for k in ("MultiheadAttention", "GRU", "names")),
)


@pytest.mark.parametrize("name", CURED)
def test_a_sick_one_is_found_and_cured(name):
    build, data, _ = KINDS[name]
    torch.manual_seed(0)
    model = build()
    engine = sgd(1e-6)(model.parameters())
    found = tk.cure(model, data(), CE, optimizer=engine, steps=40, seeds=2, budget="60s")
    assert "slow_convergence" in found.diagnosis.labels, str(found.diagnosis)
    assert found.confirmed, str(found)
    assert found.best.effect > 0.05


@cache
def without_wrapper():
    torch.manual_seed(0)
    return tk.diagnose(deep(25, nn.Tanh), classes(), CE)


@pytest.mark.parametrize("wrap", ["compile", "DataParallel", "DDP"])
def test_wrappers_are_looked_through(wrap, tmp_path):
    torch.manual_seed(0)
    model, plain = deep(25, nn.Tanh), without_wrapper()
    if wrap == "compile":
        wrapped = torch.compile(model, backend="eager")
    elif wrap == "DataParallel":
        wrapped = nn.DataParallel(model)
    else:
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        wrapped = nn.parallel.DistributedDataParallel(model)
    try:
        found = tk.diagnose(wrapped, classes(), CE)
    finally:
        if wrap == "DDP":
            torch.distributed.destroy_process_group()
    assert found.labels == plain.labels
    assert [s.name for s in found.record.sites] == [s.name for s in plain.record.sites]


def test_scaled_targets_are_cured_and_scored_in_the_users_units():
    x, y = numbers()
    y = 2000 + 300 * y
    torch.manual_seed(0)
    model = he(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1)))
    engine = sgd(0.05)(model.parameters())
    found = tk.cure(model, (x, y), nn.MSELoss(), optimizer=engine, steps=50, seeds=2, budget="60s")
    assert found.treatment.name.startswith("scaled targets"), str(found)
    assert "y_train = (y_train - shift) / scale" in found.patch
    trained, end = found.train(50)
    trained.eval()
    with torch.no_grad():
        assert float(trained(x).mean()) == pytest.approx(float(y.mean()), rel=0.1)
        loss = float(nn.functional.mse_loss(trained(x), y))
    assert end.eval_loss == pytest.approx(loss, rel=0.3)
    assert 100 < end.eval_loss < float(y.var())  # squares of the user's units, not of deviations


class Beside(nn.Module):
    """Two straight layers: side by side, as trend and season of a series, or one after another."""

    def __init__(self, stacked):
        super().__init__()
        self.stacked, self.one, self.two = stacked, nn.Linear(16, 16), nn.Linear(16, 4)
        self.short = nn.Linear(16, 4)

    def forward(self, x):
        if self.stacked:
            return self.two(self.one(x))
        mean = x.mean(1, keepdim=True)
        return self.short(x - mean) + self.two(mean.expand_as(x))


@pytest.mark.parametrize("stacked", [True, False])
def test_layers_side_by_side_are_no_line_of_layers(stacked):
    torch.manual_seed(0)
    x = torch.rand(600, 16) * 2 - 1
    y = ((x[:, :4].square() * 3).sum(1) * 4 / 10).long().clamp(0, 3)
    model = Beside(stacked)
    found = tk.diagnose(model, (x, y), CE, optimizer=adam(1e-2), steps=30)
    assert ("no_nonlinearity" in {f.code for f in found.findings}) == stacked, str(found)


class Discarding(nn.Module):
    """Activations whose results are thrown away, or multiplied by a factor that starts at zero."""

    def __init__(self, gated):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(10, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.gate = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(self, x):
        for layer in (self.one, self.two):
            x = layer(x)
            bent = torch.relu(x)
            x = x if self.gate is None else x + self.gate * bent
        return self.out(x)


@pytest.mark.parametrize("gated", [True, False])
def test_discarded_activations_are_named_where_a_linear_model_fits_too(gated):
    torch.manual_seed(0)
    x = torch.randn(400, 10)
    data = x, x[:, :4].argmax(1)
    found = tk.diagnose(Discarding(gated), data, CE, optimizer=adam(1e-2), steps=60)
    assert ("no_nonlinearity" in {f.code for f in found.findings}) != gated, str(found)


class Asking(nn.Module):
    """The inputs ask for slopes, so that a first segment can be recomputed."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x):
        seen = x[:, None]
        if self.training:
            seen.requires_grad_()
        return self.body(seen)[:, 0]


def test_inputs_that_ask_for_slopes_are_no_layers_made_in_forward():
    torch.manual_seed(0)
    found = tk.diagnose(Asking(), classes(), CE, optimizer=adam(1e-2), steps=20)
    assert found.ok, str(found)
