import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from tikhon import layers


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), layers.Dropout(0.5), nn.Linear(4, 2))


def test_a_checkpoint_without_rates_loads_under_strict():
    plain = dict(network().state_dict())  # no key for a rate, and no metadata
    assert set(plain) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    model = network()
    layers.set_rate(model, "1", 0.25)
    model.load_state_dict(plain, strict=True)
    assert model[1].rate == 0.25


@pytest.mark.parametrize("how", ["direct", "saved", "by key"])
def test_a_state_dict_brings_its_rates(how, tmp_path):
    model, other = network(), network()
    layers.set_rate(model, "*", 0.125)
    state = model.state_dict()
    if how == "saved":
        torch.save(state, tmp_path / "model.pt")
        state = torch.load(tmp_path / "model.pt", weights_only=True)
    if how == "by key":
        state = {**state, "1.rate": torch.tensor(0.125)}
    other.load_state_dict(state, strict=True)
    assert other[1].rate == 0.125


def test_fifty_rates_compile_once():
    compiled = CompileCounter()
    model = network()
    run = torch.compile(model, backend=compiled, fullgraph=True)
    for k in range(50):
        layers.set_rate(run, "1", k / 50)
        run(torch.ones(3, 4))
    assert compiled.frame_count == 1
