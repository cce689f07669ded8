"""Build networks by name for given data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tikhon.errors import InputError, unknown_name
from tikhon.models.convnet import ConvNet
from tikhon.models.lenet import LeNet5
from tikhon.models.mlp import MLP
from tikhon.models.skip import SkipNetwork
from tikhon.models.spline import Spline, SplineNetwork

# name -> description; `mlp-A-B-C` gives all widths, `mlp:B` the hidden ones
NAMES = {
    "linear": "one linear layer",
    "mlp": "one hidden layer of 128 units; mlp:300,100 for other widths, mlp-784-128-10 for all",
    "lenet-300-100": "a perceptron with hidden layers of 300 and 100 units",
    "lenet5": "LeNet-5, for images of 28x28 or 32x32",
    "convnet": "two small convolutions, for images",
    "skip:mlp": "a network (any of these) beside a linear map of its inputs",
    "spline:mlp": "a perceptron (any of these) of piecewise linear functions of each input",
}


_HIDDEN = re.compile(r"mlp:(\d+(?:,\d+)*)")
_WIDTHS = re.compile(r"mlp-(\d+(?:-\d+)+)")


def is_name(name: str) -> bool:
    """Return whether `build` has a network of that name.

    >>> is_name("mlp:64,32"), is_name("train.py:mlp")
    (True, False)
    """
    inner = re.sub(r"^(?:skip:|spline:)+", "", name)
    return inner in NAMES or bool(_HIDDEN.fullmatch(inner) or _WIDTHS.fullmatch(inner))


def build(
    name: str,
    shape: Sequence[int],
    outputs: int,
    *,
    rate: float = 0.0,
    rows: Tensor | None = None,
) -> nn.Module:
    """Build the network of that name for rows of `shape` and the number of outputs.

    `rate` in [0, 1) is the dropout rate; `rows`, (rows, *shape), are the training inputs, whose
    quantiles are the knots of a spline. Raises `InputError` for an unknown name and for widths
    that do not match the data.

    >>> build("mlp-64-32-10", (64,), 10).sizes
    (64, 32, 10)
    """
    if not 0 <= rate < 1:
        raise InputError(f"dropout must be in [0, 1), received {rate}")
    features = math.prod(shape)
    if name.startswith("skip:"):
        inner = build(name.removeprefix("skip:"), shape, outputs, rate=rate, rows=rows)
        return SkipNetwork(inner, features, outputs)
    if name.startswith("spline:"):
        if rows is None:
            raise InputError(f"model {name!r} has its knots at quantiles: give rows to build it")
        return _behind(Spline.of(rows), name, features, outputs, rate)
    if name == "linear":
        return MLP([features, outputs])
    if name in ("lenet5", "convnet"):
        return _convolutional(name, tuple(shape), outputs, rate)
    if name == "lenet-300-100":
        return MLP([features, 300, 100, outputs], rate=rate)
    if name == "mlp":
        return MLP([features, 128, outputs], rate=rate)
    if hidden := _HIDDEN.fullmatch(name):
        return MLP([features, *_widths(name, hidden[1], ","), outputs], rate=rate)
    if widths := _WIDTHS.fullmatch(name):
        sizes = _widths(name, widths[1], "-")
        if (sizes[0], sizes[-1]) != (features, outputs):
            fitting = "-".join(map(str, [features, *sizes[1:-1], outputs]))
            raise InputError(
                f"model {name!r} does not fit the data: {features} inputs and {outputs} outputs "
                f"are needed; write mlp-{fitting}"
            )
        return MLP(sizes, rate=rate)
    raise InputError(unknown_name("model", name, NAMES))


def restore(
    name: str, shape: Sequence[int], outputs: int, state: Mapping[str, Tensor]
) -> nn.Module:
    """Build the network of that name with the weights in `state`.

    Raises RuntimeError, as torch does, for the state of another network; shapes are compared
    before memory is allocated.
    """

    def empty() -> nn.Module:
        if name.startswith("spline:"):
            return _behind(Spline.restored(state), name, math.prod(shape), outputs, 0.0)
        return build(name, shape, outputs)

    with torch.device("meta"):
        needed = {key: tuple(tensor.shape) for key, tensor in empty().state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in state.items()}
    for key in sorted(needed.keys() | given.keys()):
        if needed.get(key) != given.get(key):
            raise RuntimeError(
                f"model {name!r} needs {key!r} of shape {needed.get(key, 'none')}, "
                f"the file holds {given.get(key, 'none')}"
            )
    model = empty()
    model.load_state_dict(state)
    return model


def _behind(spline: Spline, name: str, features: int, outputs: int, rate: float) -> nn.Module:
    inner = name.removeprefix("spline:")
    if inner.split(":")[0] in ("lenet5", "convnet", "skip", "spline"):
        raise InputError(f"model {name!r}: a spline goes before a perceptron, such as spline:mlp")
    net = build(inner, (features + len(spline.left),), outputs, rate=rate)
    return SplineNetwork(spline, net)


def _widths(name: str, text: str, separator: str) -> list[int]:
    sizes = [int(part) for part in text.split(separator)]
    if 0 in sizes:
        raise InputError(f"model {name!r}: a layer of 0 units; every width must be 1 or more")
    return sizes


def _convolutional(name: str, shape: tuple[int, ...], outputs: int, rate: float) -> nn.Module:
    if len(shape) == 1 and math.isqrt(shape[0]) ** 2 == shape[0]:  # flattened square images
        side = math.isqrt(shape[0])
        return nn.Sequential(
            nn.Unflatten(1, (1, side, side)), _convolutional(name, (1, side, side), outputs, rate)
        )
    if name == "lenet5" and shape[1:] not in ((28, 28), (32, 32)):
        raise InputError(f"model 'lenet5' needs images of 28x28 or 32x32, the rows are {shape}")
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise InputError(f"model {name!r} needs images of 4x4 or more, the rows are {shape}")
    if name == "convnet":
        return ConvNet(shape[0], outputs, rate=rate)
    return LeNet5(shape[0], outputs, side=shape[1], rate=rate)
