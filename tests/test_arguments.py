"""Hostile arguments: every public value takes a number of any kind, or says what is wrong."""

from __future__ import annotations

import dataclasses
import inspect
import linecache
import traceback
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import tikhon as tk
from examples_of import PENALTIES
from tikhon import arguments, layers, schedules

HOSTILE = {
    "text": "x", "number in text": "0.5", "true": True,
    "nan": float("nan"), "infinite": float("inf"),
    "negative": -3, "beyond float32": 1e308, "beyond float64": 10**400, "subnormal": 1e-320,
    "numpy bool": np.bool_(True), "numpy nan": np.float32("nan"), "array": np.ones(3),
    "vector": torch.ones(3), "matrix": torch.ones(2, 2), "empty": torch.ones(0),
    "learned": torch.tensor(0.5, requires_grad=True), "complex tensor": torch.tensor(1j),
    "complex": 1j, "none": None, "list": [0.5], "nothing": [], "tuple": (1, 2), "dict": {"a": 1},
    "set": {1}, "class": int, "object": object(), "bytes": b"x",
}  # fmt: skip
DATA = (torch.zeros(4, 2), torch.zeros(4, 1))
FLEXIBLE = {  # what takes more than numbers
    "strength", "weights", "center", "per", "at", "strengths", "valid", "loss", "range", "mode",
    "tied", "unknown", "protect", "bound",
}  # fmt: skip

MAKERS = [(type(p), {}) for p in {type(p): p for p in PENALTIES}.values()]
MAKERS += [
    (schedules.Linear, {"start": 0.0, "end": 1.0, "steps": 4}),
    (schedules.Cosine, {"start": 1.0, "end": 0.0, "steps": 4}),
    (schedules.WarmUp, {"strength": 1.0, "steps": 4, "delay": 1}),
    (schedules.Cyclic, {"low": 0.0, "high": 1.0, "period": 4}),
    (schedules.Recorded, {"strengths": (0.1, 0.2), "steps": 4}),
    (tk.TargetSparsity, {"target": 0.5}),
    (tk.NormBound, {"bound": 0.5}),
    (tk.Hypergradient, {"valid": DATA, "loss": nn.functional.mse_loss, "steps": 200}),
    (layers.Curriculum, {"rate": 0.5, "steps": 10}),
    (layers.Early, {"rate": 0.5, "until": 3}),
    (layers.Late, {"rate": 0.5, "after": 3}),
    (layers.ConcreteDropout, {}),
    (layers.DropBlock2d, {}),
    (layers.DropPath, {}),
    (layers.Dropout, {}),
    (layers.GaussianNoise, {}),
    (layers.LockedDropout, {}),
    (layers.PatchDropout, {}),
    (layers.ShakeDrop, {}),
    (layers.TemperatureScaled, {"model": nn.Identity()}),
    (layers.WordDropout, {"unknown": 1}),
]
ARGUMENTS = [
    (kind, usual, name) for kind, usual in MAKERS for name in inspect.signature(kind).parameters
    if name != "valid"
]  # fmt: skip


def told_by_tikhon(error):
    """Whether a `raise` of the package has made the error, not an operation that went wrong."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    lines = [
        linecache.getline(last.filename, n).strip()
        for n in range(last.lineno - 1, last.lineno + 1)
    ]
    return "/tikhon/" in last.filename and any(line.startswith("raise") for line in lines)


def usable(value, name):
    """A value that was made holds what a step can compute with."""
    if isinstance(value, tk.Penalty) and not callable(value.strength):
        w = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.0, -0.1]])
        made = value.prox(w, 0.1) if isinstance(value, tk.Proximable) else value.grad(w)
        assert made.isfinite().all() and not value.value(w).isnan()
    elif callable(value) and not isinstance(value, nn.Module):
        for step in (0, 3, 100):
            assert type(value(step)) in (int, float) and 0 <= value(step) < float("inf")
    if dataclasses.is_dataclass(value) and name not in FLEXIBLE:
        assert type(getattr(value, name)) in (int, float, bool)


@pytest.mark.parametrize(
    ("kind", "usual", "name"), ARGUMENTS, ids=[f"{k.__name__}.{n}" for k, _, n in ARGUMENTS]
)
def test_a_hostile_argument_is_right_or_refused_by_name(kind, usual, name):
    for what, hostile in HOSTILE.items():
        if name == "weights" and isinstance(hostile, dict | torch.Tensor):
            continue  # factors, whose shape the weights must fit
        try:
            made = kind(**{**usual, name: hostile})
        except (TypeError, ValueError) as error:
            assert told_by_tikhon(error), (what, error)
            assert kind.__name__ in str(error) or name in str(error), (what, error)
            assert len(str(error)) < 400, what
        else:
            if not (name == "center" and hostile is not None):
                usable(made, name)


@pytest.mark.parametrize("number", [np.float32(2), np.int64(2), Fraction(2), torch.tensor(2)])
def test_a_number_of_any_kind_is_one(number):
    assert tk.MCP(0.1, gamma=number).gamma == 2 and type(tk.MCP(0.1, gamma=number).gamma) in (
        int,
        float,
    )
    assert tk.TargetSparsity(0.5, steps=number).steps == 2
    assert layers.DropBlock2d(0.1, 3 * number / number).block_size == 3
    assert arguments.as_number(number) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tk.TargetSparsity("x"), "TargetSparsity: target must be a number, in .*'x'"),
        (lambda: tk.NormBound("x"), "NormBound: bound must be a number, > 0 or None.*'x'"),
        (lambda: tk.TargetSparsity(0.5, steps=2.5), "steps must be a whole number.*received 2.5"),
        (lambda: tk.GroupLasso(0.1, scale_by_size="no"), "scale_by_size must be True or False"),
        (lambda: tk.L2(0.1, center=np.ones(2)), "center must be a tensor or a mapping"),
        (lambda: layers.Early("x", 3), "Early: rate must be a number"),
    ],
)
def test_the_message_says_what_is_wrong(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize("strength", [1e30, torch.tensor(1e30), lambda step: 1e30])
def test_a_strength_that_float32_cannot_square_is_refused_where_it_is_used(strength):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match=r"strength must be at most 1e\+18.*received 1\S*e\+30"):
        tk.regularize(model, optimizer, tk.L1(strength))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_steep_penalty_does_not_overflow_moments_of_16_bits(dtype):
    w = nn.Parameter(torch.ones(3, dtype=dtype))
    model = nn.ParameterDict({"w": w})
    optimizer = torch.optim.Adam([w], lr=0.1, eps=1e-3)
    tk.regularize(model, optimizer, {"w": tk.L1(1e3 if dtype == torch.float16 else 1e18)})
    for _ in range(40):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    assert (w == 0).all()
