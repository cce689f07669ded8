"""Inputs of another type than the weights are told of, numbers that no float32 holds refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from tikhon.data.batches import pair
from tikhon.data.forward import call_model
from tikhon.data.nested import as_tensors
from tikhon.errors import DataError, InputError

FAILING = {
    "linear": (nn.Linear(4, 2), torch.zeros(3, 4, dtype=torch.float64)),
    "bytes": (nn.Linear(4, 2), torch.zeros(3, 4, dtype=torch.uint8)),
    "convolution": (nn.Conv1d(1, 2, 2), torch.zeros(3, 1, 4, dtype=torch.float64)),
    "norm": (nn.LayerNorm(4), torch.zeros(3, 4, dtype=torch.float64)),
    "half weights": (nn.Linear(4, 2).bfloat16(), torch.zeros(3, 4)),
}


@pytest.mark.parametrize("name", FAILING)
def test_inputs_of_another_type_are_named_with_what_to_do(name):
    model, x = FAILING[name]
    wanted = next(model.parameters()).dtype
    with pytest.raises(InputError, match=rf"the inputs are .*x.to\({wanted}\)"):
        call_model(model, x)
    call_model(model, x.to(wanted))


def test_other_failures_are_the_models_own():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call_model(nn.Linear(4, 2), torch.zeros(3, 5))
    assert call_model(nn.Embedding(4, 2), torch.tensor([1, 2])).shape == (2, 2)


class Force(nn.Module):
    def __init__(self):
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor(3.0))

    def forward(self, at):
        at = at.clone().requires_grad_()
        energy = (self.stiffness * at.square() / 2).sum()
        return -torch.autograd.grad(energy, at, create_graph=True)[0]


def test_a_model_that_takes_slopes_itself_answers_without_gradients_too():
    model, at = Force(), torch.tensor([[1.0], [2.0]])
    assert call_model(model, at).requires_grad
    with torch.no_grad():
        found = call_model(model, at)
        with pytest.raises(RuntimeError, match="batch dimensions do not match"):
            call_model(nn.Bilinear(2, 2, 1), (torch.zeros(2, 2), torch.zeros(3, 2)))
    assert not found.requires_grad and found.tolist() == [[-3.0], [-6.0]]


@pytest.mark.parametrize("where", ["x", "y"])
def test_a_number_that_the_float_type_cannot_hold_is_named_as_it_is(where):
    parts = {"x": np.ones((3, 2)), "y": np.ones(3)}
    parts[where][1] = -1e300
    with pytest.raises(DataError, match=rf"train {where} holds -1e\+300, which float32 cannot"):
        pair((parts["x"], parts["y"]), name="train")
    parts[where][1] = np.inf
    with pytest.raises(DataError, match=rf"train {where} has \d values? not finite"):
        pair((parts["x"], parts["y"]), name="train")


FRAME = pd.DataFrame({"a": [0.5, 1.5, 2.5], "b": [True, False, True], "c": [1, 2, 3]})


@pytest.mark.parametrize("frame", [
    FRAME,
    FRAME.convert_dtypes(),
    FRAME.astype({"a": "Float32", "b": "boolean", "c": "Int8"}),
    FRAME.astype({"b": "boolean"}),
    pd.get_dummies(pd.DataFrame({"a": [0.5, 1.5, 2.5], "b": ["u", "v", "u"]})),
])  # fmt: skip
def test_frames_of_numbers_and_truth_values_are_numbers(frame):
    found = as_tensors(frame)
    assert found.dtype == torch.float32
    assert found.tolist() == frame.astype("float64").to_numpy().tolist()
    for name in frame.columns:
        assert as_tensors(frame[name]).tolist() == frame[name].astype("float64").tolist()


def test_columns_that_are_no_numbers_are_named():
    with pytest.raises(DataError, match="object; columns that are no numbers: 'd'"):
        as_tensors(FRAME.assign(d=["u", "v", "w"]))
    missing = FRAME.convert_dtypes().mask(FRAME["a"] > 2)
    assert as_tensors(missing).isnan().any(1).tolist() == [False, False, True]
