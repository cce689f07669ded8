"""Penalties of the product of two factors, as LoRA's pairs."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

import tikhon as tk
from regularizer.problems import train


class LoRA(nn.Module):
    """Names as peft gives them."""

    def __init__(self, rows=4, columns=5, rank=2):
        super().__init__()
        torch.manual_seed(0)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(columns, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, rows, bias=False)})
        self.double()

    @property
    def product(self):
        return self.lora_B["default"].weight @ self.lora_A["default"].weight

    def forward(self, x):
        return x @ self.product.T


def one_step(terms, model):
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, terms)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return reg


CENTER = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "penalty",
    [tk.L2(0.3), tk.L2(0.3, center=CENTER), tk.Huber(0.5, delta=0.1), tk.Orthogonal(0.2)],
    ids=repr,
)
def test_both_factors_get_the_gradient_of_the_penalty_of_the_product(penalty, dtype):
    ours, plain = LoRA().to(dtype), LoRA().to(dtype)
    reg = one_step({"*lora*": tk.Term(penalty, rows="product")}, ours)
    value = penalty.value(plain.product)
    value.backward()
    with torch.no_grad():
        for p in plain.parameters():
            p.sub_(0.1 * p.grad)
    for mine, theirs in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(reg.value(), penalty.value(ours.product).detach())
    assert 0 < reg.trace()[0].share <= 1


def test_every_pair_of_a_model_is_found_and_two_matrices_are_one():
    model = nn.ModuleDict({"q": LoRA(), "v": LoRA(3, 6)})
    found = tk.select(model, "*lora*", rows="product")
    assert [target.read().shape for target in found] == [(4, 5), (3, 6)]
    bare = nn.ParameterDict({"down": torch.ones(2, 6), "up": torch.ones(3, 2)})
    (target,) = tk.select(bare, ("down", "up"), rows="product")
    assert target.name == "up+down" and target.read().shape == (3, 6)


def test_what_is_no_pair_is_named():
    model = nn.ModuleDict({"q": LoRA(), "head": nn.Linear(4, 3)})
    with pytest.raises(ValueError, match=r"pairs of matrices.*'head.weight': \(3, 4\)"):
        tk.select(model, ("*lora*", "head.weight"), rows="product")
    with pytest.raises(ValueError, match="pairs of matrices"):
        tk.select(model, "q.lora_A*", rows="product")


@pytest.mark.parametrize(
    "term",
    [
        tk.Term(tk.L1(0.1), rows="product"),
        tk.Term(tk.NuclearNorm(0.1), rows="product"),
        tk.Term(tk.L2(0.1), rows="product", how="decoupled"),
        tk.Term(tk.MaxNorm(1.0), rows="product"),
        tk.Term(tk.L2(tk.NormBound(0.1)), rows="product"),
    ],
    ids=lambda term: type(term.penalty).__name__,
)
def test_what_has_no_gradient_of_a_product_is_refused_by_name(term):
    model = LoRA()
    with pytest.raises(TypeError, match=r"product.*smooth.*nuclear norm of a product is L2"):
        tk.regularize(model, optim.SGD(model.parameters(), lr=0.1), {"*lora*": term})


def test_l2_on_both_factors_is_the_nuclear_norm_of_the_product():
    target = torch.diag(torch.tensor([3.0, 2.0, 0.3])).double()
    model = LoRA(3, 3, rank=3)
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    tk.regularize(model, optimizer, {"*lora*": tk.L2(0.5)})
    train(model, optimizer, 600, lambda m: (m.product - target).square().sum() / 2)
    least = tk.NuclearNorm(0.5).prox(target, 1.0)
    torch.testing.assert_close(model.product.detach(), least, rtol=0, atol=1e-4)


def test_l2_acts_on_every_parameter_of_a_shared_row():
    model = nn.ModuleDict({"skip": nn.Linear(4, 1), "fc": nn.Linear(4, 3)}).double()
    before = [m.weight.detach().clone() for m in model.values()]
    terms = {("skip.weight", "fc.weight"): tk.Term(tk.L2(1.0), rows="feature")}
    one_step(terms, model)
    for module, start in zip(model.values(), before):
        torch.testing.assert_close(module.weight.detach(), 0.9 * start)
