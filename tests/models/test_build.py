import numpy as np
import pytest
import torch

from tikhon.errors import InputError
from tikhon.models import NAMES, Spline, build, restore

SHAPES = {"lenet5": (1, 28, 28), "convnet": (1, 8, 8)}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_answers_one_number_an_output(name):
    shape = SHAPES.get(name, (12,))
    model = build(name, shape, 3, rate=0.25, rows=torch.rand(40, *shape))
    assert model(torch.rand(5, *shape)).shape == (5, 3)
    model(torch.rand(5, *shape)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["lenet5", "convnet"])
def test_convolutions_take_flattened_square_images(name):
    assert build(name, (784,), 10)(torch.rand(2, 784)).shape == (2, 10)


def test_the_article_names_its_layers():
    names = [name for name, _ in build("mlp-784-128-10", (1, 28, 28), 10).named_parameters()]
    assert names == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("mpl", "did you mean 'mlp'"),
        ("mlp-784-128-10", "write mlp-12-128-3"),
        ("mlp:0", "a layer of 0 units"),
        ("lenet5", "28x28"),
        ("convnet", "images of 4x4"),
        ("spline:mlp", "give rows"),
    ],
)
def test_models_that_do_not_fit_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        build(name, (12,), 3)


def test_rate_out_of_range():
    with pytest.raises(InputError, match=r"in \[0, 1\), received 1.0"):
        build("mlp", (4,), 2, rate=1.0)


def test_a_network_of_every_name_is_restored_from_its_weights():
    for name in NAMES:
        shape = SHAPES.get(name, (12,))
        model = build(name, shape, 3, rows=torch.rand(40, *shape))
        again = restore(name, shape, 3, model.state_dict())
        x = torch.rand(5, *shape)
        assert torch.equal(again(x), model(x))


def test_weights_of_another_network_are_refused():
    with pytest.raises(RuntimeError, match="lacks spline"):
        restore("spline:mlp", (4,), 2, build("mlp", (4,), 2).state_dict())


@pytest.mark.parametrize("inner", ["convnet", "skip:mlp", "spline:mlp"])
def test_a_spline_goes_before_a_perceptron(inner):
    with pytest.raises(InputError, match="before a perceptron"):
        build(f"spline:{inner}", (16,), 2, rows=torch.rand(9, 16))


def test_a_linear_map_of_a_spline_is_every_piecewise_linear_function_of_its_knots():
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None]
    spline = Spline.of(x, knots=5)
    knots = torch.quantile(x[:, 0], torch.linspace(0, 1, 5, dtype=torch.float64)).numpy()
    target = torch.from_numpy(np.interp(x[:, 0].numpy(), knots, [0.0, 2.0, -1.0, 0.5, 0.5]))
    basis = torch.cat([spline.pieces(x), torch.ones_like(x)], dim=1)
    fitted = torch.linalg.lstsq(basis, target[:, None]).solution
    assert torch.allclose(basis @ fitted, target[:, None], atol=1e-9)
    assert spline.pieces(x).mean(0).abs().max() < 1e-12  # centred on the rows it was placed by


def test_a_spline_has_no_pieces_for_two_values_and_saturates_outside_of_its_rows():
    x = torch.stack([torch.arange(20.0), torch.arange(20.0) % 2, torch.full((20,), 7.0)], dim=1)
    spline = Spline.of(x, knots=9)
    assert spline.source.tolist() == [0] * 8
    far = torch.tensor([[1e9, 1.0, 0.0], [-1e9, 0.0, 0.0]])
    assert torch.equal(spline.pieces(far), spline.pieces(x[[-1, 0]]))
    assert spline(far)[:, 0].abs().max() <= 3.001


def test_a_network_too_large_for_its_file_is_refused_before_memory_is_taken():
    state = build("mlp:4", (3,), 2).state_dict()
    with pytest.raises(RuntimeError, match="the file holds"):
        restore("mlp:2000000,2000000", (3,), 2, state)  # 16 TB
