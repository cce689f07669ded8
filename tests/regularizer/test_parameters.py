"""Parameters of every kind: tied, frozen, unused, wrapped, sparse, complex, 16-bit, lazy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn, optim
from torch.nn.utils import parametrizations

import tikhon as tk
from examples_of import PENALTIES
from regularizer.problems import regression, train

LOSS = regression(dtype=torch.float32)


def ones(*shape, dtype=torch.float32):
    """A model with one weight of ones."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(*shape, dtype=dtype))
    return model


def push(model, optimizer, steps=1):
    """Steps with a zero gradient, so that only the penalty moves."""
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    reg = tk.regularize(model, optimizer, tk.L2(1.0))
    before = model[0].weight.detach().clone()
    torch.testing.assert_close(reg.value(), before.square().sum() / 2)
    push(model, optimizer)
    torch.testing.assert_close(model[0].weight.detach(), before / 2)
    assert reg.audit()["0.weight"].tied_to == ("1.weight",)


def test_a_tied_weight_is_found_under_each_name():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert [t.name for t in tk.select(model, "1.weight")] == ["0.weight"]


def test_frozen_and_unused_parameters_are_untouched():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    model.unused = nn.Linear(3, 3)
    model[0].requires_grad_(False)
    forward = nn.Sequential(model[0], model[1])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for kind in (optim.SGD, optim.AdamW):
        optimizer = kind(model.parameters(), lr=0.1)
        optimizer.param_groups[0]["weight_decay"] = 0.0
        with tk.regularize(model, optimizer, {"*": [tk.L1(0.1), tk.L2(0.1)]}) as reg:
            train(forward, optimizer, 2, LOSS)
        after = dict(model.named_parameters())
        for name in ("0.weight", "0.bias", "unused.weight"):
            assert torch.equal(after[name], before[name])
            assert name == "unused.weight" or not optimizer.state[after[name]]
        assert not torch.equal(after["1.weight"], before["1.weight"])
        assert "frozen" in reg.audit()["0.weight"].note


def test_groups_added_later_are_matched():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    optimizer = optim.SGD(model[1].parameters(), lr=0.5)
    reg = tk.regularize(model, optimizer, tk.L2(1.0))
    assert "not in the optimizer" in reg.audit()["0.weight"].note
    before = model[0].weight.detach().clone()
    push(model, optimizer)
    assert torch.equal(model[0].weight.detach(), before)
    optimizer.add_param_group({"params": model[0].parameters()})
    push(model, optimizer)
    torch.testing.assert_close(model[0].weight.detach(), before / 2)
    assert reg.audit()["0.weight"].note == "decay time 2 steps"


def test_an_optimizer_of_other_parameters_is_refused():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ValueError, match="holds none of the matched parameters"):
        tk.regularize(model, optim.SGD(other.parameters(), lr=0.1), tk.L2(0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "term",
    [tk.L1(1.0), tk.Term(tk.L2(1.0), how="decoupled"), tk.Term(tk.Huber(1.0), how="decoupled")],
    ids=str,
)
def test_small_steps_add_up_in_16_bits(dtype, term):
    """Alone, a move of 1e-4 of 1.0 rounds to nothing in both types."""
    model, exact = ones(4, 4, dtype=dtype), ones(4, 4, dtype=torch.float64)
    for net in (model, exact):
        optimizer = optim.SGD(net.parameters(), lr=1e-4)
        tk.regularize(net, optimizer, term)
        push(net, optimizer, 1000)
    torch.testing.assert_close(
        model.weight.double(), exact.weight, rtol=2 * torch.finfo(dtype).eps, atol=1e-4
    )
    assert model.weight.dtype == dtype


def test_16_bit_weights_reach_exact_zero_and_stay():
    model = ones(4, 4, dtype=torch.bfloat16)
    optimizer = optim.SGD(model.parameters(), lr=0.001)
    reg = tk.regularize(model, optimizer, tk.L1(1.0))
    push(model, optimizer, 1100)
    assert reg.sparsity() == {"weight": 1.0}
    assert not reg.state_dict()["rounding"]["weight"].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [optim.SGD, optim.Rprop])
@pytest.mark.parametrize(
    "term", [tk.L2(0.3), tk.L1(1e-3), tk.Term(tk.L2(0.3), how="decoupled"), tk.MaxNorm(1.0)]
)
def test_16_bit_weights_that_a_mask_has_zeroed_stay_zero(dtype, make, term):
    torch.manual_seed(0)
    model = nn.Linear(32, 32, bias=False).to(dtype)
    optimizer = make(model.parameters(), lr=0.01)
    tk.regularize(model, optimizer, term)
    mask = torch.rand(32, 32) < 0.5
    for step in range(6):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        if step == 2:
            model.weight.data.mul_(mask)
    assert not model.weight[~mask].any()


def test_complex_weights_shrink_by_modulus():
    model = ones(3, 2, dtype=torch.complex64)
    with torch.no_grad():
        model.weight.mul_(3 + 4j)
        model.weight[0].mul_(0.01)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, {"weight": [tk.L1(1.0), tk.L2(1.0)]})
    push(model, optimizer)
    assert not model.weight[0].any()
    # L2 by gradient, then a modulus of 4.5 shrunk by 0.1
    expected = torch.full((2, 2), (3 + 4j) * 4.4 / 5, dtype=torch.complex64)
    torch.testing.assert_close(model.weight[1:].detach(), expected)
    with pytest.raises(TypeError, match=r"real and imaginary parts of 'weight'.*decoupled"):
        tk.regularize(model, optim.Adam(model.parameters()), tk.L1(1.0))


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: type(p).__name__)
def test_complex_weights_take_what_reads_sizes_and_refuse_what_orders_numbers(penalty):
    model = ones(4, 6, dtype=torch.complex64)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    name = type(penalty).__name__
    if penalty.real:
        with pytest.raises(TypeError, match=f"'weight' is complex, and {name} compares numbers"):
            tk.regularize(model, optimizer, {"weight": tk.Term(penalty, rows="tensor")})
        return
    reg = tk.regularize(model, optimizer, {"weight": penalty})
    push(model, optimizer)
    assert model.weight.isfinite().all() and (reg.value() >= 0 or penalty.constraint)


def test_sparse_gradients_take_a_prox_and_refuse_a_gradient_by_name():
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    with tk.regularize(model, optimizer, {"weight": tk.L1(0.1)}):
        model(torch.tensor([1, 2])).sum().mul(0.0).backward()
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), tk.L1(0.1).prox(before, 0.1))
    tk.regularize(model, optimizer, {"weight": tk.L2(0.1)})
    with pytest.raises(TypeError, match=r"weight/L2 adds a gradient.*sparse=False"):
        optimizer.step()
    optimizer = optim.SparseAdam(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"those of SparseAdam are sparse.*sparse=False"):
        tk.regularize(model, optimizer, {"weight": tk.L1(0.1)})


def test_channels_last_weights_keep_their_layout():
    torch.manual_seed(0)
    models = [nn.Conv2d(4, 6, 3, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].to(memory_format=torch.channels_last)
    assert not models[1].weight.is_contiguous()
    terms = {"weight": [tk.GroupLasso(0.5), tk.Orthogonal(0.1), tk.MaxNorm(0.5)]}
    for model in models:
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        tk.regularize(model, optimizer, terms)
        push(model, optimizer, 3)
    torch.testing.assert_close(models[0].weight, models[1].weight)
    assert models[1].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("penalty", [tk.L1(0.02), tk.GroupLasso(0.05)], ids=repr)
@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam])
def test_weights_that_change_their_layout_between_steps(penalty, kind):
    """What was seen of the memory in one step does not hold for the next."""
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    found = []
    for moved in (False, True):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3, bias=False)
        optimizer = kind(model.parameters(), lr=0.05)
        tk.regularize(model, optimizer, penalty)
        train(model, optimizer, 2, lambda own: own(x).square().mean())
        if moved:
            model.to(memory_format=torch.channels_last)
        train(model, optimizer, 2, lambda own: own(x).square().mean())
        found.append(model.weight.detach())
    assert found[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_weights_that_become_short_between_steps_keep_what_rounding_loses():
    model = nn.Linear(2, 3, bias=False)
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    tk.regularize(model, optimizer, tk.L1(0.001))
    nn.init.ones_(model.weight)

    def constant(own):
        return (own.weight * 0).sum()

    train(model, optimizer, 1, constant)
    model.to(torch.bfloat16)
    train(model, optimizer, 100, constant)
    assert (model.weight < 0.92).all()  # steps of 0.001, spacing 0.004


def test_lazy_layers_are_matched_when_they_get_their_shape():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    terms = {"*": tk.Term(tk.GroupLasso(1e3), strength=tk.schedules.WarmUp(1e3, 2))}
    reg = tk.regularize(model, optimizer, terms)
    assert "shape not known yet" in reg.audit()["0.weight"].note
    train(model, optimizer, 3, LOSS)
    assert reg.sparsity() == {"0.weight": 1.0, "2.weight": 1.0}
    assert reg.steps == 3


def test_parametrised_weights_are_refused_by_name_and_left_out_of_globs():
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 4)),
        parametrizations.spectral_norm(nn.Linear(4, 4)),
        nn.Linear(4, 2),
    )
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"'0.weight' is parametrised \(_WeightNorm\)"):
        tk.regularize(model, optimizer, {"0.weight": tk.L1(0.1)})
    with pytest.raises(ValueError, match=r"matches only.*part of the parametrised 1.weight"):
        tk.regularize(model, optimizer, {"1.*": tk.L1(0.1)})
    reg = tk.regularize(model, optimizer, {"*": tk.L1(0.1)})
    assert list(reg.sparsity()) == ["2.weight"]
    row = reg.audit()["0.parametrizations.weight.original1"]
    assert row.note == "not matched: part of the parametrised 0.weight.original1"


def test_penalty_on_the_direction_of_a_weight_norm_warns():
    model = parametrizations.weight_norm(nn.Linear(6, 4))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="direction of a weight norm"):
        tk.regularize(model, optimizer, {"parametrizations.weight.original1": tk.L2(0.1)})


def test_compiled_and_parallel_wrappers_are_looked_through():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    wrapped = [nn.DataParallel(model), torch.compile(model, backend="eager")]
    wrapped.append(nn.DataParallel(wrapped[1]))
    for outer in wrapped:
        assert [t.name for t in tk.select(outer)] == ["0.weight", "1.weight"]
        optimizer = optim.SGD(outer.parameters(), lr=0.1)
        with tk.regularize(outer, optimizer, {"0.weight": tk.L1(1e9)}) as reg:
            train(outer, optimizer, 1, LOSS)
        assert reg.sparsity() == {"0.weight": 1.0}


def test_a_compiled_submodule_keeps_its_plain_name():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    model[0] = torch.compile(model[0], backend="eager")
    assert [t.name for t in tk.select(model, "0.*")] == ["0.weight"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch.compile
@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam])
def test_compiled_optimizer_step_runs_the_hooks(kind):
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(6, 2)
        optimizer = kind(model.parameters(), lr=0.05)
        reg = tk.regularize(model, optimizer, {"*": [tk.L1(0.1), tk.L2(0.1)]})
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(4):
            optimizer.zero_grad()
            LOSS(model).backward()
            step()
        assert reg.steps == 4
        results.append(model.weight.detach())
    torch.testing.assert_close(*results)


def test_a_population_may_hold_strengths_as_tensors():
    model = ones(4, 4)
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    strength = torch.tensor(0.5)
    tk.regularize(model, optimizer, {"weight": [tk.L1(strength), tk.L2(strength)]})
    push(model, optimizer)
    torch.testing.assert_close(model.weight.detach(), torch.full((4, 4), 0.75 - 0.25))


def test_features_of_two_layers_are_one_row():
    """LassoNet: the skip connection and the first layer, coupled by Hierarchical."""
    model = nn.Module()
    model.skip, model.fc1 = nn.Linear(5, 2), nn.Linear(5, 3)
    pattern = ("skip.weight", "fc1.weight")
    (target,) = tk.select(model, pattern, rows="feature")
    torch.testing.assert_close(
        target.read(), torch.cat([model.skip.weight, model.fc1.weight]).T.detach()
    )
    before = target.read().clone()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    penalty = tk.Hierarchical(1.0, M=2.0, skip=2)
    reg = tk.regularize(model, optimizer, {pattern: penalty})
    push(model, optimizer)
    torch.testing.assert_close(target.read(), penalty.prox(before, 0.1))
    assert set(reg.sparsity()) == {"skip.weight", "fc1.weight"}
    assert math.isfinite(reg.value())
