"""Parameters that are replaced, added, frozen or set free after attaching: identity decides."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn, optim
from torch.nn.utils import prune

import tikhon as tk
from regularizer.rules import Lion
from tikhon.regularizer.attachment import CHECK_STEPS
from tikhon.regularizer.controller import Controller


def push(model, optimizer, steps=1):
    """Steps with gradients of zero."""
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.zeros_like(param) if param.requires_grad else None
        optimizer.step()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def replace_in_group(optimizer, old, new):
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam])
def test_a_parameter_of_another_size_takes_the_place_of_one(kind):
    """Densification: every Gaussian is one row, and their number changes."""
    model = network()
    optimizer = kind(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, {"*": tk.L1(0.1), "0.weight": tk.L2(0.1)})
    push(model, optimizer)
    old = model[0].weight
    new = nn.Parameter(torch.cat([old.detach(), old.detach()[:2]]))
    model[0].weight, model[0].out_features = new, 6
    replace_in_group(optimizer, old, new)
    optimizer.state.pop(new, None)
    before, dead = new.detach().clone(), old.detach().clone()
    push(model, optimizer)
    assert new.norm() < 0.99 * before.norm()
    assert torch.equal(old, dead)
    new.data.zero_()
    assert reg.sparsity()["0.weight"] == 1.0
    assert reg.audit()["0.weight"].shape == (6, 3)


def test_the_order_of_replacing_does_not_matter():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, {"0.weight": tk.L2(1.0)})
    old, new = model[0].weight, nn.Parameter(torch.ones(4, 3))
    replace_in_group(optimizer, old, new)
    new.grad = torch.zeros_like(new)
    with pytest.warns(UserWarning, match="holds none of the regularized parameters any more"):
        optimizer.step()  # not the model's: nobody's yet
    assert (new == 1).all()
    model[0].weight = new
    push(model, optimizer)
    torch.testing.assert_close(new.detach(), torch.full((4, 3), 0.9))


def test_a_new_head_joins_its_pattern_when_the_optimizer_takes_it():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, tk.L2(tk.schedules.Linear(1.0, 2.0, 2)))
    push(model, optimizer, 2)
    model[1] = nn.Linear(4, 5)
    nn.init.ones_(model[1].weight)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    push(model, optimizer)
    torch.testing.assert_close(model[1].weight.detach(), torch.full((5, 4), 0.8))
    assert reg.strengths() == {"0.weight/L2": 2.0, "1.weight/L2": 2.0}
    assert list(reg.sparsity()) == ["0.weight", "1.weight"]


def test_a_layer_that_is_new_to_the_model_joins_in():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, tk.L1(1e3))
    model.append(nn.Linear(2, 2))
    assert "2.weight" in reg.sparsity()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    push(model, optimizer)
    assert reg.sparsity()["2.weight"] == 1.0


def test_weights_assigned_by_load_state_dict_are_read_and_their_optimizer_asked_for():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, {"0.weight": tk.L2(1.0)})
    push(model, optimizer)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    with pytest.warns(UserWarning, match=r"give the new ones to the optimizer"):
        assert reg.sparsity() == {"0.weight": 1.0}
    assert reg.value() == 0
    nn.init.ones_(model[0].weight)
    reg.attach(optim.SGD(model.parameters(), lr=0.1))
    push(model, reg.optimizer)
    torch.testing.assert_close(model[0].weight.detach(), torch.full((4, 3), 0.9))
    assert reg.steps == 2


def test_a_pattern_whose_layers_are_gone_is_dropped_with_a_word():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, {"0.weight": tk.L2(1.0), "1.weight": tk.L1(0.1)})
    model[1] = nn.Identity()
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.warns(UserWarning, match="no parameter matches: unknown pattern '1.weight'"):
        push(model, optimizer)
    assert list(reg.sparsity()) == ["0.weight"]


def test_a_weight_that_is_pruned_later_is_named():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, {"0.weight": tk.L2(1.0), "1.weight": tk.L2(1.0)})
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.warns(UserWarning, match=r"'0.weight' is pruned.*prune.remove"):
        push(model, optimizer)


def test_layers_that_unfreeze_later_are_told_of_and_join_in():
    model = network()
    model[0].requires_grad_(False)
    optimizer = optim.SGD(model[1].parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"0.\*/L2 acts on nothing.*0.weight.*frozen") as said:
        reg = tk.regularize(model, optimizer, {"0.*": tk.L2(1.0)})
    assert said[0].filename == __file__
    assert reg.audit()["0.weight"].note == "frozen, not in the optimizer: untouched"
    before = model[0].weight.detach().clone()
    push(model, optimizer)
    assert torch.equal(model[0].weight, before)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    push(model, optimizer)
    torch.testing.assert_close(model[0].weight.detach(), 0.9 * before)


def test_a_term_on_another_optimizers_parameters_says_so():
    model = network()
    optimizer = optim.SGD(model[1].parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"0.weight/L1 acts on nothing.*not in SGD.*as a list"):
        tk.regularize(model, optimizer, {"0.weight": tk.L1(1.0), "1.weight": tk.L1(1.0)})


def test_frozen_in_the_optimizer_is_told_by_its_gradient():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, {"0.weight": tk.L2(1.0)})
    push(model, optimizer)
    model[0].requires_grad_(False)
    assert "a gradient is left over" in reg.audit()["0.weight"].note
    before = model[0].weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), 0.9 * before)
    optimizer.zero_grad()
    assert reg.audit()["0.weight"].note == "frozen: untouched"
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_controllers_begin_anew_where_weights_have_another_shape():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    term = tk.Term(tk.L1(), strength=tk.TargetSparsity(0.5, steps=3))
    reg = tk.regularize(model, optimizer, {"0.weight": term})
    push(model, optimizer, 4)
    assert reg.sparsity()["0.weight"] >= 0.5
    old, new = model[0].weight, nn.Parameter(torch.randn(8, 3))
    model[0].weight = new
    replace_in_group(optimizer, old, new)
    push(model, optimizer, 4)
    assert reg.sparsity()["0.weight"] >= 0.5
    assert new.numel() == 24


def test_rounding_of_the_old_weights_is_no_loss_of_the_new():
    model = network().to(torch.bfloat16)
    optimizer = optim.SGD(model.parameters(), lr=1e-3)
    reg = tk.regularize(model, optimizer, {"0.weight": tk.L1(0.1)})
    push(model, optimizer, 5)
    old, new = model[0].weight, nn.Parameter(torch.ones(6, 3, dtype=torch.bfloat16))
    model[0].weight = new
    replace_in_group(optimizer, old, new)
    push(model, optimizer)
    lost = reg.state_dict()["rounding"]["0.weight"]
    torch.testing.assert_close(lost, torch.full((6, 3), -1e-4))


@pytest.mark.parametrize("alone", [False, True])
def test_a_copy_follows_the_copied_model(alone):
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, {"0.weight": tk.L2(1.0)})
    if alone:
        other = copy.deepcopy(reg)
    else:
        _, _, other = copy.deepcopy((model, optimizer, reg))
    twin = other.model
    new = nn.Parameter(torch.ones(4, 3))
    replace_in_group(other.optimizer, twin[0].weight, new)
    twin[0].weight = new
    push(twin, other.optimizer)
    torch.testing.assert_close(new.detach(), torch.full((4, 3), 0.9))
    assert (reg.steps, other.steps) == (0, 1)


def test_steps_of_an_unchanged_model_rebind_nothing(monkeypatch):
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, tk.L2(1.0))
    bound = reg._bound
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        push(model, optimizer, 3)
        reg.audit(), reg.trace()
    assert reg._bound is bound


COMPUTED = {
    "parametrised": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "pruned by": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("word", COMPUTED)
def test_one_weight_of_a_pattern_that_is_computed_from_then_on_is_told_of_once(word):
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, tk.L1(0.1))
    COMPUTED[word](model[0])
    with pytest.warns(UserWarning, match=f"0.weight/L1 acts no more: '0.weight' is {word}"):
        push(model, optimizer)
    push(model, optimizer)
    assert list(reg.strengths()) == ["1.weight/L1"]


def test_a_replaced_layer_that_no_optimizer_holds_is_told_of_once():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, tk.L1(0.1))
    model[1] = nn.Linear(4, 5)  # the old layer knows nothing of it: seen at the next look
    with pytest.warns(UserWarning, match="'1.weight' was replaced and no optimizer holds"):
        push(model, optimizer, max(CHECK_STEPS) + 1)
    push(model, optimizer)
    optimizer.add_param_group({"params": model[1].parameters()})
    before = model[1].weight.detach().clone()
    push(model, optimizer)
    assert model[1].weight.abs().sum() < before.abs().sum()


@dataclass(frozen=True)
class Remembering(Controller):
    """Adds the weights up, which fails where these change their shape."""

    start: float = 0.1
    per: str = "layer"
    every: int = 1

    def next(self, strength, observation, step):
        memory, (reading,) = observation.memory, observation.readings
        memory["sum"] = memory.get("sum", 0) + reading.weights.abs()
        memory["steps"] = memory.get("steps", 0) + 1
        return strength


@pytest.mark.parametrize(("rows", "remembered"), [(4, 5), (6, 3)])
def test_a_controller_starts_over_where_the_weights_have_another_shape(rows, remembered):
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, tk.L1(Remembering()))
    push(model, optimizer, 2)
    old, new = model[0].weight, nn.Parameter(torch.ones(rows, 3))
    model[0].weight = new
    replace_in_group(optimizer, old, new)
    push(model, optimizer, 3)
    memories = {live.name: live.memory for live in reg.live_strengths()}
    assert memories["0.weight/L1"]["steps"] == remembered
    assert memories["1.weight/L1"]["steps"] == 5


def test_what_a_replaced_weight_of_16_bits_loses_is_in_the_state():
    model = network().to(torch.bfloat16)
    optimizer = optim.SGD(model.parameters(), lr=1e-3)
    reg = tk.regularize(model, optimizer, tk.Term(tk.L2(1e-2), how="decoupled"))
    push(model, optimizer)
    before = set(reg.state_dict()["rounding"])
    old = model[0].weight
    model[0].weight = nn.Parameter(torch.ones(6, 3, dtype=torch.bfloat16))
    replace_in_group(optimizer, old, model[0].weight)
    push(model, optimizer)
    found = reg.state_dict()["rounding"]
    assert set(found) == before and before
    assert {tuple(lost.shape) for lost in found.values()} == {(6, 3), (2, 4)}


def test_a_step_that_raises_takes_back_its_own_decay_alone():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, tk.Term(tk.L2(0.5), how="decoupled"))
    push(model, optimizer, 3)
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        raise RuntimeError("no more data")

    with pytest.raises(RuntimeError, match="no more data"):
        optimizer.step(closure)
    for param, kept in zip(model.parameters(), before):
        torch.testing.assert_close(param.detach(), kept)


def test_a_weight_with_a_spectral_norm_is_not_called_pruned():
    model = network()
    nn.utils.spectral_norm(model[0])
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"0\.weight") as refusal:
        tk.regularize(model, optimizer, {"0.weight": tk.L1(0.1)})
    assert "prune" not in str(refusal.value)


def test_attach_takes_the_parameters_that_the_model_has_now():
    with torch.device("meta"):
        model = nn.Linear(3, 1, bias=False)
    reg = tk.regularize(model, optim.SGD(model.parameters(), lr=0.1), tk.L1(0.5))
    model.to_empty(device="cpu")
    nn.init.ones_(model.weight)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    reg.attach(optimizer)
    model.weight.grad = torch.zeros(1, 3)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), 0.95))


def test_weights_that_get_another_type_later_are_moved_as_weights_of_that_type():
    ends = []
    for later in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(64, 64, bias=False)
        if not later:
            model.bfloat16()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        tk.regularize(model, optimizer, tk.L2(0.1))
        model.bfloat16()
        before = model.weight.detach().float().norm()
        for _ in range(1000):
            model.weight.grad = torch.zeros_like(model.weight)
            optimizer.step()
        ends.append(float(model.weight.detach().float().norm() / before))
    assert ends == pytest.approx([(1 - 1e-3) ** 1000] * 2, rel=0.02)


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, Lion])
@pytest.mark.parametrize(
    "penalty",
    [tk.L1(0.1, weights=torch.tensor(2.0)), tk.GroupLasso(0.1), tk.MaxNorm(0.5)],
    ids=lambda penalty: type(penalty).__name__,
)
def test_data_of_another_shape_are_another_weight(kind, penalty):
    """As Gaussian splatting and pruning by `param.data` leave them; the handle starts anew."""
    ends = []
    for early in (True, False):
        model = nn.Linear(3, 2, dtype=torch.bfloat16 if kind is optim.SGD else None)
        optimizer = kind(model.parameters(), lr=0.01)
        if early:
            reg = tk.regularize(model, optimizer, penalty)
            push(model, optimizer)
            optimizer.state.clear()
        model.weight.data = torch.ones(4, 3, dtype=model.weight.dtype)
        if not early:
            reg = tk.regularize(model, optimizer, penalty)
        push(model, optimizer)
        push(model, optimizer)
        assert reg.audit()["weight"].shape == (4, 3)
        ends.append(model.weight.detach())
    assert torch.equal(*ends)
