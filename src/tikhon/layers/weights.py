"""Noise on the weights of a module."""

from __future__ import annotations

from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from tikhon.errors import describe, unknown_name
from tikhon.layers import functional
from tikhon.layers.noise import NoiseLayer


class _WeightNoise(NoiseLayer):
    """Call `module` with noisy weights, leaving its own unchanged."""

    module: nn.Module
    weights: tuple[str, ...]

    rowwise = False  # one draw for the whole batch

    def __init__(self, module: nn.Module, rate: float, weights: str) -> None:
        super().__init__(rate)
        self.module = module
        if not isinstance(module, nn.Module):
            raise TypeError(f"{self.label}: expected a module, received {describe(module)}")
        names = [name for name, _ in module.named_parameters()]
        if not isinstance(weights, str):
            raise TypeError(
                f"{self.label}: weights is a glob on names of parameters, received "
                f"{describe(weights)}"
            )
        self.weights = tuple(name for name in names if fnmatchcase(name, weights))
        if not self.weights:
            raise ValueError(f"{self.label}: {unknown_name('weight', weights, names)}")

    def noisy(self, name: str, weight: Tensor) -> Tensor:
        """Return the noisy value of a weight, in training mode."""
        raise NotImplementedError

    def forward(self, *args: object, **kwargs: object) -> Any:
        """Return the module's output, with noisy weights in training mode."""
        if not self.training:
            return self.module(*args, **kwargs)
        weights = {n: self.noisy(n, attrgetter(n)(self.module)) for n in self.weights}
        return functional_call(self.module, weights, args, kwargs)


class DropConnect(_WeightNoise):
    """Dropout on the weights of any module, one mask per forward pass.

    Shapes: those of `module`. `rate` is in [0, 1]; `weights` is a glob on the module's parameter
    names. Evaluation uses the weights as they are. Raises ValueError for a pattern that matches no
    weight. Reference: Wan et al. 2013, https://proceedings.mlr.press/v28/wan13.html

    >>> DropConnect(nn.Linear(3, 2), 0.5)(torch.ones(1, 3)).shape
    torch.Size([1, 2])
    """

    def __init__(self, module: nn.Module, rate: float = 0.5, *, weights: str = "weight") -> None:
        super().__init__(module, rate, weights)

    def noisy(self, name: str, weight: Tensor) -> Tensor:
        """Return dropout of the weight."""
        return functional.dropout(weight, self.rate, generator=self.generator)


class EmbeddingDropout(_WeightNoise):
    """Zero whole words of an embedding with probability `rate`, the same words for the batch.

    Shapes: those of `module`, an `nn.Embedding`. `rate` is in [0, 1]. Raises ValueError for a rate
    out of range. Reference: Gal and Ghahramani 2016, https://arxiv.org/abs/1512.05287

    >>> EmbeddingDropout(nn.Embedding(9, 2), 0.1)(torch.tensor([[1, 2]])).shape
    torch.Size([1, 2, 2])
    """

    def __init__(self, module: nn.Module, rate: float = 0.1) -> None:
        super().__init__(module, rate, "weight")

    def noisy(self, name: str, weight: Tensor) -> Tensor:
        """Return dropout of whole rows."""
        return functional.dropout(weight, self.rate, tied=(1,), generator=self.generator)


class Mixout(_WeightNoise):
    """Weights fall back to their pre-trained values with probability `rate`; the mean is kept.

    Shapes: those of `module`. The target is `module`'s weights when this layer is created, kept in
    buffers. `rate` is in [0, 1]. Raises ValueError for a rate out of range or a pattern that
    matches no weight. Reference: Lee et al. 2020, https://arxiv.org/abs/1909.11299

    >>> Mixout(nn.Linear(3, 2), 0.9)(torch.ones(1, 3)).shape
    torch.Size([1, 2])
    """

    def __init__(self, module: nn.Module, rate: float = 0.9, *, weights: str = "*") -> None:
        super().__init__(module, rate, weights)
        for name in self.weights:
            target = module.get_parameter(name).detach().clone()
            self.register_buffer(self._target(name), target)

    @staticmethod
    def _target(name: str) -> str:
        return "target_" + name.replace(".", "_")

    def noisy(self, name: str, weight: Tensor) -> Tensor:
        """Return the mixture of the weight and its target."""
        target = getattr(self, self._target(name))
        return functional.mixout(weight, target, self.rate, generator=self.generator)
