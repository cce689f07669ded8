"""Noise whose rate is learned by gradient."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tikhon.arguments import check_number, is_positive
from tikhon.layers import functional
from tikhon.layers.masks import draw_normal
from tikhon.layers.noise import NoiseLayer


class ConcreteDropout(NoiseLayer):
    """Dropout with a learned rate, through a mask that is differentiable in it.

    Shapes: any. `rate` in (0, 1) is where learning starts; `temperature` > 0 is the sharpness of
    the mask. Add `penalty(...)` to the loss: without it the data loss drives the rate to 0.
    Reference: Gal et al. 2017, https://arxiv.org/abs/1705.07832

    >>> layer = ConcreteDropout(0.1)
    >>> round(layer.rate.item(), 3), layer.logit.requires_grad
    (0.1, True)
    """

    _function = functional.concrete_dropout
    _options = ("temperature",)
    logit: nn.Parameter

    closed = False  # the rate is the sigmoid of a finite logit

    def __init__(self, rate: float = 0.1, *, temperature: float = 0.1) -> None:
        super().__init__(rate)
        self.temperature: float = check_number(
            self.label, "temperature", temperature, "> 0", is_positive
        )

    def _hold(self, rate: float) -> None:
        self.logit = nn.Parameter(torch.logit(torch.tensor(rate), eps=1e-6))

    @property
    def rate(self) -> Tensor:  # type: ignore[override]
        """The current rate, differentiable."""
        return self.logit.sigmoid()

    def set_rate(self, rate: float | Tensor) -> None:
        """Set the logit from a rate."""
        with torch.no_grad():
            self.logit.copy_(torch.logit(torch.tensor(self.check(rate)), eps=1e-6))

    def penalty(self, weight: Tensor, *, length_scale: float = 1e-2, rows: int) -> Tensor:
        """Return the term for the loss: weight decay that grows with the rate, minus the mask's
        entropy.

        length_scale^2 (1 - rate) |weight|^2 / rows - 2 entropy(rate) features / rows, where
        `weight` (out, features) reads this layer's output and `rows` is the size of the training
        set; the loss is a mean over rows in units where the noise variance is 1.
        """
        p = self.rate
        entropy = -(p * p.log() + (1 - p) * torch.log1p(-p))
        decay = length_scale**2 * weight.square().sum() * (1 - p)
        return (decay - 2 * weight.shape[1] * entropy) / rows


class VariationalDropout(NoiseLayer):
    """A linear or convolutional module with normal noise on every weight, of learned variance.

    Each weight w is N(w, alpha w^2) in training, drawn through the outputs (local
    reparametrisation); its dropout rate is alpha / (1 + alpha). Add `divergence() / rows` to the
    mean loss; weights whose log alpha passes `threshold` are zero in evaluation. Shapes: those of
    `module` (Linear, Conv). `rate` in (0, 1) is where learning starts. Raises TypeError for
    another module. Reference: Molchanov et al. 2017, https://arxiv.org/abs/1701.05369

    >>> layer = VariationalDropout(nn.Linear(3, 2), 0.1)
    >>> layer(torch.ones(5, 3)).shape, round(layer.rate.mean().item(), 3)
    (torch.Size([5, 2]), 0.1)
    """

    module: nn.Linear | nn.modules.conv._ConvNd
    threshold: float
    log_variance: nn.Parameter

    closed = False  # at rate 1 the variance is infinite

    def __init__(self, module: nn.Module, rate: float = 0.05, *, threshold: float = 3.0) -> None:
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            raise TypeError(
                "VariationalDropout: expected a Linear or Conv module, received "
                f"{type(module).__name__}"
            )
        super().__init__(rate)
        self.module = module
        self.threshold: float = check_number(
            self.label, "threshold", threshold, "a number", math.isfinite
        )
        self.log_variance = nn.Parameter(torch.empty_like(module.weight))
        self.set_rate(rate)

    def _hold(self, rate: float) -> None:
        pass  # the rates are in `log_variance`, once the module is known

    @property
    def log_alpha(self) -> Tensor:
        """log of variance over squared mean, one number per weight."""
        weight = self.module.weight
        return (self.log_variance - torch.log(weight.square() + 1e-16)).clamp(-8, 8)

    @property
    def rate(self) -> Tensor:  # type: ignore[override]
        """alpha / (1 + alpha), one number per weight."""
        return self.log_alpha.sigmoid()

    def set_rate(self, rate: float | Tensor) -> None:
        """Set the variance of every weight from a rate."""
        log_alpha = torch.logit(torch.tensor(self.check(rate)), eps=1e-6)
        with torch.no_grad():
            weight = self.module.weight
            self.log_variance.copy_(log_alpha + torch.log(weight.square() + 1e-16))

    def forward(self, x: Tensor) -> Tensor:
        """Return the noisy output in training mode, else that of the surviving weights."""
        if not self.training:
            kept = self.module.weight * (self.log_alpha < self.threshold)
            return functional_call(self.module, {"weight": kept}, (x,))
        mean = self.module(x)
        state = {"weight": self.log_variance.exp()}
        if self.module.bias is not None:
            state["bias"] = torch.zeros_like(self.module.bias)
        variance = functional_call(self.module, state, (x.square(),))
        return mean + (variance + 1e-8).sqrt() * draw_normal(mean, {"generator": self.generator})

    def divergence(self) -> Tensor:
        """Kullback-Leibler divergence to the log-uniform prior, summed over weights (a fit)."""
        log_alpha = self.log_alpha
        gain = 0.63576 * torch.sigmoid(1.87320 + 1.48695 * log_alpha)
        return (0.63576 - gain + 0.5 * F.softplus(-log_alpha)).sum()

    def zeros(self) -> Tensor:
        """Bool mask of the weights that evaluation sets to zero."""
        return self.log_alpha >= self.threshold
