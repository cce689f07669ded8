import pytest
import torch

from tikhon.errors import InputError
from tikhon.models import NAMES, build

SHAPES = {"lenet5": (1, 28, 28), "convnet": (1, 8, 8)}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_answers_one_number_an_output(name):
    shape = SHAPES.get(name, (12,))
    model = build(name, shape, 3, rate=0.25)
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
    ],
)
def test_models_that_do_not_fit_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        build(name, (12,), 3)


def test_rate_out_of_range():
    with pytest.raises(InputError, match=r"in \[0, 1\), received 1.0"):
        build("mlp", (4,), 2, rate=1.0)
