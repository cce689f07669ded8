"""Wrappers are known by their types: a user's own names mean nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tikhon.wrappers import named_modules, unwrap


class Holder(nn.Module):
    """A user's own model with one child, under any name."""

    def __init__(self, name):
        super().__init__()
        self.add_module(name, nn.Linear(4, 1))


@pytest.mark.parametrize("name", ["module", "_orig_mod", "_fsdp_wrapped_module", "model"])
def test_a_users_own_child_is_not_stripped(name):
    model = Holder(name)
    assert unwrap(model) is model
    assert [path for path, _ in named_modules(model)] == ["", name]


def compiled(model):
    return torch.compile(model, backend="eager")


def wrappers():
    yield nn.DataParallel
    yield compiled
    yield AveragedModel
    try:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    except ImportError:
        return
    yield checkpoint_wrapper


@pytest.mark.parametrize("outer", list(wrappers()))
@pytest.mark.parametrize("inner", list(wrappers()))
def test_wrappers_are_looked_through_wherever_they_are(outer, inner):
    if outer is inner is compiled:
        pytest.skip("torch.compile of a compiled module gives a function")
    model = nn.Sequential(nn.Linear(3, 3), Holder("module"))
    whole = outer(inner(model))
    expected = [path for path, _ in model.named_modules()]
    assert type(unwrap(whole)) is nn.Sequential
    assert list(dict.fromkeys(path for path, _ in named_modules(whole))) == expected
    model[1] = outer(inner(model[1]))
    assert list(dict.fromkeys(path for path, _ in named_modules(model))) == expected


def test_a_subclass_of_a_wrapper_is_one():
    class Mine(nn.DataParallel):
        pass

    model = nn.Linear(2, 2)
    assert unwrap(Mine(model)) is model


def test_what_is_no_module_is_named():
    with pytest.raises(TypeError, match="model must be a torch module, received int"):
        unwrap(3)
