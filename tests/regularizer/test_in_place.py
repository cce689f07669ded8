"""Steps whose proxes work in place end where the general proxes end."""

from __future__ import annotations

from itertools import cycle, product

import pytest
import torch
from torch import nn

import tikhon as tk
from tikhon.penalties import kernels, native

TERMS = {
    "L1": tk.L1(0.02),
    "ElasticNet": tk.ElasticNet(0.02, l1_ratio=0.4),
    "GroupLasso": tk.GroupLasso(0.02),
    "SparseGroupLasso": tk.SparseGroupLasso(0.02),
    "MaxNorm": tk.MaxNorm(0.5),
    "LInf": tk.LInf(0.02),
    "MCP": tk.MCP(0.05),
    "MCP, one step across": tk.MCP(0.05, gamma=1e-3),
    "SCAD": tk.SCAD(0.05),
    "SCAD, one step across": tk.SCAD(0.05, a=2.0005),
    "LogSum": tk.LogSum(0.002),
    "LogSum, two minima": tk.LogSum(0.02, epsilon=1e-3),
    "Box": tk.Box(-0.05, 0.1),
    "NonNegative": tk.NonNegative(),
    "Huber": tk.Huber(0.05, delta=0.1),
    "scheduled": tk.MCP(lambda step: 0.002 * step),
}
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
}


def trained(term: tk.Penalty, optimizer: str, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(64, 12, dtype=dtype), torch.randint(0, 3, (64,))
    x[:, 3:6] = 0  # weights without gradients: there an adaptive step has no bound of its own
    chosen = OPTIMIZERS[optimizer](model.parameters())
    tk.regularize(model, chosen, {"*.weight": term})
    for _ in range(15):
        chosen.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        chosen.step()
    return torch.cat([param.detach().ravel() for param in model.parameters()])


# gains are one number with SGD and one for each weight with the others, by three rules in turn
CELLS = [*product(TERMS, ("SGD",)), *zip(TERMS, cycle(("Adam", "RMSprop", "Adagrad")))]


@pytest.mark.parametrize(("name", "optimizer"), CELLS)
def test_training_in_place_is_training(name, optimizer, monkeypatch):
    if native.library(torch.float64) is None:
        pytest.skip("no C compiler here")
    before = kernels.compile_from(1)
    try:
        found = trained(TERMS[name], optimizer, torch.float64)
    finally:
        kernels.compile_from(before)
    monkeypatch.setattr(kernels, "has_kernel", lambda penalty: False)
    monkeypatch.setattr(kernels, "add_gradient_", lambda *numbers: False)
    monkeypatch.setattr(kernels, "prox_in_blocks_", lambda *numbers: False)
    expected = trained(TERMS[name], optimizer, torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert torch.equal(found == 0, expected == 0)
