import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from tikhon import layers


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), layers.Dropout(0.5), nn.Linear(4, 2))


def test_a_checkpoint_without_rates_loads_under_strict():
    plain = {k: v for k, v in network().state_dict().items() if not k.endswith("rate")}
    model = network()
    layers.set_rate(model, "1", 0.25)
    model.load_state_dict(plain, strict=True)
    assert model[1].rate == 0.25
    assert "1.rate" not in plain


def test_rates_are_part_of_the_state():
    model, other = network(), network()
    layers.set_rate(model, "*", 0.125)
    other.load_state_dict(model.state_dict())
    assert other[1].rate == 0.125


def test_fifty_rates_compile_once():
    compiled = CompileCounter()
    model = network()
    run = torch.compile(model, backend=compiled, fullgraph=True)
    for k in range(50):
        layers.set_rate(run, "1", k / 50)
        run(torch.ones(3, 4))
    assert compiled.frame_count == 1
