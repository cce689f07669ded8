"""Laws of `diagnose`: faults are found and placed, healthy runs left alone, nothing moves."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from faulty import (
    CE,
    FAULTY,
    HEALTHY,
    Faulty,
    classes,
    deep,
    fingerprint,
    he,
    mlp,
    same,
    sgd,
)
from tikhon.data.batches import order
from tikhon.diagnosis import LABELS, Record, diagnose, judge
from tikhon.diagnosis.codes import CODES
from tikhon.diagnosis.replica import isolated, undisturbed
from tikhon.errors import DataError, InputError


@cache
def run(case: Faulty, steps: int = 80, seed: int = 0):
    """The diagnosis of a program, a value that several tests read."""
    torch.manual_seed(seed)
    model = case.build()
    options = dict(case.options)
    if "valid" in options:
        options["valid"] = options["valid"]()
    return diagnose(
        model,
        case.data(),
        case.loss,
        optimizer=case.optimizer(model.parameters()),
        steps=steps,
        seed=seed,
        **options,
    )


@pytest.mark.parametrize("case", FAULTY, ids=lambda c: c.name)
def test_each_fault_is_found_and_placed(case):
    found = run(case)
    assert found.labels & set(case.codes), str(found)
    named = {w for f in found.findings if f.code in case.codes for w in f.where}
    assert not case.where or named & set(case.where), (named, str(found))
    assert not found.ok


@pytest.mark.parametrize("case", HEALTHY, ids=lambda c: c.name)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_healthy_programs_raise_no_alarm(case, seed):
    found = run(case, seed=seed)
    assert not found.labels & set(LABELS), str(found)


@pytest.mark.parametrize("case", [*FAULTY[:3], *HEALTHY[3:5]], ids=lambda c: c.name)
def test_everything_of_the_user_is_bit_identical_afterwards(case):
    torch.manual_seed(0)
    model = case.build()
    model.eval()
    list(model.modules())[-1].train()
    model.register_forward_hook(lambda *a: None)
    optimizer = case.optimizer(model.parameters())
    x, y = case.data()
    case.loss(model(x[:64]), y[:64]).backward()
    np.random.normal()  # the second of a pair of draws is kept for later
    before = fingerprint(model, optimizer)
    found = diagnose(model, (x, y), case.loss, optimizer=optimizer, steps=15)
    found.to_json()
    assert same(before, fingerprint(model, optimizer))


@pytest.mark.parametrize("training", [True, False])
def test_a_look_at_a_model_leaves_it_as_it_was(training):
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    model[2].eval()
    engine = sgd(0.1)(model.parameters())
    before = fingerprint(model, engine)
    with isolated(model, 0), undisturbed(model, training=training):
        assert all(m.training is training for m in model.modules())
        model(classes()[0])
    assert same(before, fingerprint(model, engine))


def test_the_dry_run_is_the_plain_loop():
    torch.manual_seed(0)
    model = he(deep(2, nn.ReLU))
    twin = copy.deepcopy(model)
    x, y = classes()
    found = diagnose(model, (x, y), CE, optimizer=sgd(0.1)(model.parameters()), steps=20, seed=3)
    engine = sgd(0.1)(twin.parameters())
    losses = []
    for epoch in range(10):
        for rows in order(len(x), seed=3, epoch=epoch).split(64):
            engine.zero_grad()
            loss = CE(twin(x[rows]), y[rows])
            loss.backward()
            engine.step()
            losses.append(float(loss.detach()))
    assert list(found.record.losses) == losses[:20]


def test_a_saved_record_is_judged_alike(tmp_path):
    found = run(FAULTY[0], steps=10)
    found.save(tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    again = judge(Record.from_dict(saved["record"]))
    assert again.labels == found.labels
    assert [f.where for f in again.findings] == [f.where for f in found.findings]


def test_json_has_no_nan_and_the_letter_fits_a_screen():
    for case, steps in ((FAULTY[1], 10), (FAULTY[3], 80), (HEALTHY[0], 80)):
        found = run(case, steps)
        json.loads(found.to_json(), parse_constant=lambda c: pytest.fail(c))
        lines = str(found).splitlines()
        assert len(lines) <= 25
        assert max(map(len, lines)) <= 99
        assert "<script" not in found._repr_html_()


def test_why_factors_the_gain_into_weights_and_slope():
    found = run(FAULTY[1], steps=10)
    finding = next(f for f in found.findings if f.code == "vanishing_gradient")
    assert "weights 0.5" in finding.why
    assert "tanh slope 0.9" in finding.why or "tanh slope 1.0" in finding.why
    sigmoid = run(FAULTY[0], steps=10)
    assert "sigmoid is at fault" in str([f.why for f in sigmoid.findings])


def test_weights_that_are_too_large_are_the_cause_with_their_gain():
    found = run(next(case for case in FAULTY if case.name == "large weights"), steps=1)
    finding = next(f for f in found.findings if f.code == "poor_init")
    drawn = 1.5 * 16**0.5  # standard deviation 1.5, 16 inputs
    assert finding.evidence["weight_factor"] == pytest.approx(drawn, rel=0.3)
    assert finding.evidence["initial_loss"] > 100 and "gain" in finding.why


def test_consequences_are_folded_but_stay_in_labels():
    found = run(FAULTY[1])
    folded = next(f for f in found.findings if f.code == "vanishing_gradient")
    assert folded.cause == "poor_init"
    assert {"vanishing_gradient", "poor_init"} <= found.labels


def test_every_code_has_words():
    from tikhon.diagnosis import checks

    for path in Path(checks.__file__).parent.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        for code in CODES:
            source = source.replace(f'"{code}"', "")
        assert 'Finding("' not in source, path
    assert set(LABELS) <= set(CODES)


def test_without_an_optimizer_only_step_zero_runs():
    found = diagnose(deep(25, nn.Tanh), classes(), CE)
    assert found.record.steps == 0
    assert "vanishing_gradient" in found.labels
    zero = HEALTHY[3].build()
    assert diagnose(zero, classes(), CE).ok
    with_optimizer = diagnose(
        deep(2, nn.ReLU), classes(), CE, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), steps=0
    )
    assert with_optimizer.record.losses == ()


def test_a_factory_is_drawn_again():
    found = diagnose(lambda: deep(25, nn.Tanh), classes(), CE)
    assert "5 of 5 initialisations" in str([f.why for f in found.findings])


STATIC = [
    ("frozen_parameters", lambda m: m[0].requires_grad_(False), "info"),
    ("nothing_to_train", lambda m: m.requires_grad_(False), "critical"),
]


@pytest.mark.parametrize(("code", "change", "severity"), STATIC, ids=lambda v: str(v)[:20])
def test_parameters_out_of_play(code, change, severity):
    model = deep(2, nn.ReLU)
    change(model)
    found = diagnose(model, classes(), CE, optimizer=sgd(0.1), steps=3)
    assert {f.code: f.severity for f in found.findings}[code] == severity


def test_static_findings_on_data_and_loss():
    x, y = classes()
    bad = x.clone()
    bad[3, 2] = torch.nan
    assert diagnose(deep(1, nn.ReLU), (bad, y), CE).labels == {"non_finite_data"}
    summed = nn.CrossEntropyLoss(reduction="sum")
    assert "loss_is_a_sum" in diagnose(deep(1, nn.ReLU), (x, y), summed).labels
    targets = (numbers := torch.randn(200, 6)), 1000 + 300 * numbers[:, :1]
    assert "unscaled_targets" in diagnose(mlp(6, 8, 1), targets, nn.MSELoss()).labels
    assert "unscaled_inputs" in diagnose(deep(1, nn.ReLU), (300 * x, y), CE).labels
    dropout = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.95), nn.BatchNorm1d(8), nn.Linear(8, 4))
    found = diagnose(dropout, (x, y), CE)
    assert {"excessive_dropout", "dropout_before_norm"} <= {f.code for f in found.findings}
    assert "batchnorm_batch_of_one" in diagnose(dropout, (x, y), CE, batch_size=1).labels


class Leftover(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.left = nn.Linear(16, 4), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)


class Restless(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x):
        with torch.no_grad():
            self.layer.weight.mul_(0.99)
        return self.layer(x)


def test_parameters_that_nothing_reaches():
    model = Leftover()
    found = diagnose(
        model, classes(), CE, optimizer=torch.optim.SGD([model.left.weight], lr=0.1), steps=2
    )
    assert {"unused_parameters", "missing_from_optimizer"} <= found.labels
    assert "changes_in_forward" in diagnose(Restless(), classes(), CE).labels


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, first, second):
        return self.a(first) + self.b(second)


def test_inputs_come_in_any_shape():
    x, y = classes()
    assert diagnose(Two(), ((x, x), y), CE).ok
    assert diagnose(Two(), ({"first": x, "second": x}, y), CE).ok
    assert diagnose(Two(), {"first": x, "second": x, "labels": y}, CE).ok
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x, y), batch_size=50)
    engine = lambda p: torch.optim.Adam(p, lr=0.01)  # noqa: E731
    assert diagnose(Two(), loader, CE, optimizer=engine, steps=40).ok
    assert diagnose(deep(1, nn.ReLU), (x.numpy(), y.numpy()), CE).ok


BAD = [
    (dict(loss=nn.CrossEntropyLoss(reduction="none")), InputError, "reduction='mean'"),
    (dict(data=(torch.randn(64, 16), torch.randn(64, 4).int())), InputError, "targets"),
    (dict(data=(torch.randn(64, 16), torch.zeros(63).long())), DataError, "one target per row"),
    (dict(data=(torch.randn(0, 16), torch.zeros(0).long())), DataError, "no rows"),
    (dict(data=(torch.randn(64, 5), torch.zeros(64).long())), InputError, "failed on a batch"),
    (dict(data=(torch.randn(64, 16), 9 + torch.zeros(64).long())), InputError, "classes go from"),
    (dict(data=(torch.randn(64, 16).half(), torch.zeros(64).long())), InputError, "dtype of the"),
    (dict(steps=-1), InputError, "steps"),
    (dict(clip=-1.0), InputError, "clip"),
    (dict(optimizer="adam"), InputError, "optimizer"),
    (dict(loss="msee"), InputError, "mse"),
    (
        dict(data=((torch.randn(64, 16), torch.randn(64, 16)), torch.zeros(64).long())),
        InputError,
        "argument",
    ),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD, ids=[b[2] for b in BAD])
def test_bad_input_is_an_error_that_says_what_to_do(change, error, words):
    values = {"data": classes(), "loss": CE, **change}
    with pytest.raises(error, match=words):
        diagnose(deep(1, nn.ReLU), values.pop("data"), values.pop("loss"), **values)


def test_an_optimizer_of_another_model_is_named():
    other = torch.optim.SGD(deep(1, nn.ReLU).parameters(), lr=0.1)
    found = diagnose(deep(1, nn.ReLU), classes(), CE, optimizer=other)
    assert found.findings[0].code == "missing_from_optimizer"
    assert found.findings[0].severity == "critical"
    assert "built for another" in str(found)


def test_data_on_another_device_is_refused():
    model = deep(1, nn.ReLU).to("meta")
    with pytest.raises(InputError, match="move one of them"):
        diagnose(model, classes(), CE)


def test_the_layers_of_an_encoder_are_measured():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
    model = nn.Sequential(nn.Unflatten(1, (4, 4)), encoder, nn.Flatten(), nn.Linear(16, 4))
    engine = lambda p: torch.optim.Adam(p, 0.01)  # noqa: E731
    found = diagnose(model, classes(), CE, optimizer=engine, steps=60)
    assert found.ok, str(found)
    assert len(found.record.sites) >= 5
    assert any(r.signal for r in found.record.probes[0].readings)
    assert any(r.entropy for r in found.record.probes[0].readings)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.core = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.core(self.embed(tokens))[0]).transpose(1, 2)


def test_tied_weights_and_recurrent_layers():
    torch.manual_seed(0)
    tokens = torch.arange(200)[:, None].add(torch.arange(10)) % 12
    found = diagnose(
        Tied(),
        (tokens, (tokens + 1) % 12),
        CE,
        steps=60,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
    )
    assert found.ok, str(found)
    core = next(i for i, s in enumerate(found.record.sites) if s.name == "core")
    assert found.record.probes[0].readings[core].time_ratio is not None


PARTS = ("Symptom", "Why", "Evidence", "Cure", "Reference")


def test_a_loss_that_blows_up_names_the_first_bad_tensor():
    found = run(FAULTY[3])
    assert found.record.failure is not None
    assert found.record.failure.what in ("activation", "loss", "gradient", "weight")


def test_the_checks_import_no_torch():
    code = (
        "import sys, types\n"
        "package = types.ModuleType('tikhon.diagnosis')\n"
        "import tikhon, pathlib\n"
        "package.__path__ = [str(pathlib.Path(tikhon.__file__).parent / 'diagnosis')]\n"
        "sys.modules['tikhon.diagnosis'] = package\n"
        "from tikhon.diagnosis.checks import data, initial, loss, operations, static, symptoms\n"
        "from tikhon.diagnosis.checks import wiring\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("code", CODES)
def test_the_guide_has_a_whole_section_for_every_code(code):
    guide = (Path(__file__).parents[2] / "docs" / "diagnosis.md").read_text(encoding="utf-8")
    section = guide.split(f"\n## {code}\n")[1].split("\n## ")[0]
    missing = [part for part in PARTS if f"**{part}.**" not in section]
    assert not missing
    evidence = section.split("**Evidence.**")[1].split("**Cure.**")[0]
    assert "healthy" in evidence or any(digit.isdigit() for digit in evidence)
