import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tikhon import layers


def test_without_data_the_entropy_pulls_the_rate_to_one_half():
    layer = layers.ConcreteDropout(0.1)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        layer.penalty(torch.zeros(2, 3), rows=1).backward()
        optimizer.step()
    assert abs(layer.rate.item() - 0.5) < 0.01


def learned_rate(rows):
    torch.manual_seed(0)
    x = torch.randn(rows, 8)
    y = x @ torch.ones(8, 1)
    layer, linear = layers.ConcreteDropout(0.3), nn.Linear(8, 1)
    parameters = [*layer.parameters(), *linear.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.02)
    for _ in range(400):
        optimizer.zero_grad()
        loss = F.mse_loss(linear(layer(x)), y) + layer.penalty(linear.weight, rows=rows)
        loss.backward()
        optimizer.step()
    return layer.rate.item()


def test_more_data_learn_a_smaller_rate():
    assert learned_rate(2000) < 0.5 * learned_rate(20)


def test_divergence_is_the_integral_it_approximates():
    layer = layers.VariationalDropout(nn.Linear(1, 1, bias=False), 0.5)
    grid = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    density = torch.exp(-(grid**2) / 2) / (2 * torch.pi) ** 0.5

    def exact(log_alpha):  # up to a constant: E log|1 + sqrt(alpha) e| - log(alpha) / 2
        size = (1 + torch.exp(torch.tensor(log_alpha / 2)).double() * grid).abs().clamp_min(1e-12)
        return torch.trapezoid(density * size.log(), grid) - log_alpha / 2

    def fitted(log_alpha):
        layer.log_variance.data = log_alpha + layer.module.weight.detach().square().log()
        return layer.divergence().double()

    reference = exact(8.0) - fitted(8.0)
    for log_alpha in (-6.0, -2.0, 0.0, 1.0, 3.0, 5.0):
        assert abs(exact(log_alpha) - reference - fitted(log_alpha)) < 0.02


def test_weights_that_carry_nothing_become_zero():
    torch.manual_seed(0)
    x = torch.randn(200, 10)
    y = 2 * x[:, :1] - x[:, 1:2]
    layer = layers.VariationalDropout(nn.Linear(10, 1), 0.05)
    optimizer = torch.optim.Adam(layer.parameters(), 0.03)
    for step in range(1500):
        optimizer.zero_grad()
        warm = min(1.0, step / 500)
        (F.mse_loss(layer(x), y) * 50 + warm * layer.divergence() / len(x)).backward()
        optimizer.step()
    zeros = layer.zeros()[0]
    assert zeros[2:].sum() >= 6 and not zeros[:2].any()  # of 8; which ones is chance
    layer.eval()
    assert F.mse_loss(layer(x), y) < 0.02
    assert "zero" not in repr(layer) and layer.rate.shape == (1, 10)


def test_variational_noise_has_the_variance_of_its_weights():
    torch.manual_seed(0)
    layer = layers.VariationalDropout(nn.Conv1d(1, 1, 2, bias=False), 0.2)
    x = torch.ones(1, 1, 2)
    outputs = torch.stack([layer(x).flatten() for _ in range(4000)]).flatten()
    alpha = 0.2 / 0.8
    expected = alpha * layer.module.weight.square().sum()
    assert abs(outputs.var() / expected - 1) < 0.12


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="expected a Linear or Conv module, received Embedding"):
        layers.VariationalDropout(nn.Embedding(3, 2))
    with pytest.raises(ValueError, match="temperature must be > 0, received 0"):
        layers.ConcreteDropout(0.1, temperature=0)
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), received 1"):
        layers.ConcreteDropout(0.1).set_rate(1)
