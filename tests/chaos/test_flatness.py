"""Memory stays flat over 2,000 steps: no object and no byte more than after the first ones."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import tikhon as tk

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]
STEPS, FIRST = 2_000, 400


def objects() -> tuple[int, int]:
    """How many objects there are, and how many bytes their tensors hold."""
    gc.collect()
    there = gc.get_objects()
    tensors = [x for x in there if issubclass(type(x), torch.Tensor)]
    return len(there), sum(x.numel() * x.element_size() for x in tensors)


def regularized(model, optimizer):
    terms = {
        "0.weight": tk.GroupLasso(tk.TargetSparsity(0.3, steps=STEPS)),
        "2.weight": [tk.L1(1e-4), tk.L2(tk.NormBound(5.0))],
    }
    return tk.regularize(model, optimizer, terms)


def adapted(model, optimizer):
    valid = torch.randn(32, 8), torch.randint(0, 2, (32,))
    strength = tk.Hypergradient(valid, nn.functional.cross_entropy, steps=STEPS)
    return tk.regularize(model, optimizer, tk.L2(strength))


def constrained(model, optimizer):
    return tk.regularize(model, optimizer, {"*": [tk.L1(1e-4), tk.MaxNorm(2.0)]})


@pytest.mark.parametrize("attach", [regularized, adapted, constrained])
def test_a_loop_of_ones_own(attach):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = attach(model, optimizer)
    x, y = torch.randn(16, 8), torch.randint(0, 2, (16,))
    begun = 0, 0
    for step in range(STEPS):
        if step == FIRST:
            begun = objects()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step % 100 == 0:
            handle.value(), handle.sparsity(), handle.trace()
    count, held = objects()
    assert count <= begun[0] + 50
    assert held <= begun[1] + 1_000


def test_a_training(tmp_path):
    """What an epoch leaves is its row, in memory and in the history, and no tensor."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    data = x, (x[:, 0] > 0).long()
    seen = []

    def on_epoch(row):
        if row["epoch"] in (100, 500):
            seen.append(objects())

    recipe = tk.Recipe.from_dict({"penalties": [{"penalty": "l1", "strength": 1e-4}]})
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    tk.fit(model, data, recipe, epochs=500, batch_size=16, output=tmp_path / "run", linear=False,
           checkpoint_every=0.5, on_epoch=on_epoch)  # fmt: skip
    (early, held), (late, still) = seen
    assert late - early < 400 * 10  # an epoch is a row of numbers
    assert still <= held + 1_000
