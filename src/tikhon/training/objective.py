"""The training objective of one batch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tikhon.data.forward import LossFunction, call_model
from tikhon.errors import InputError
from tikhon.layers.functional import gaussian_noise
from tikhon.regularizer.audit import warn
from tikhon.training.losses import loss_of
from tikhon.training.mixing import Mixed, cutmix, mixup
from tikhon.training.recipe import Recipe

_OF_OUTPUTS = ("mixup", "cutmix", "r_drop", "confidence_penalty")


class Objective:
    """The data loss, with the recipe's changes to inputs, targets and outputs."""

    def __init__(self, recipe: Recipe, loss: LossFunction, x: Any, y: Tensor) -> None:
        self.recipe, self.loss = recipe, loss_of(loss)
        self._checked_noise = False
        for name in ("label_smoothing", "confidence_penalty", "r_drop"):
            if getattr(recipe, name) and y.is_floating_point():
                raise InputError(f"{name} is for classes; the targets are numbers")
            if getattr(recipe, name) and self.loss.kind == "binary":
                raise InputError(
                    f"{name} needs one logit for each class, and {self.loss.name} has one of two: "
                    "give the model two outputs and loss='cross_entropy'"
                )
        if recipe.label_smoothing:
            if self.loss.name != "cross_entropy":
                raise InputError("label_smoothing needs the loss cross_entropy")
            smoothed = partial(F.cross_entropy, label_smoothing=recipe.label_smoothing)
            self.loss = replace(self.loss, function=smoothed, entries=None)
        for name in ("mixup", "cutmix", "input_noise"):
            if getattr(recipe, name) and not isinstance(x, Tensor):
                raise InputError(f"{name} changes one tensor of inputs; this model takes several")
        if recipe.cutmix and x.ndim != 4:
            raise InputError(
                f"cutmix needs images (channels, height, width), the rows are {tuple(x.shape[1:])}"
            )
        requested = [name for name in _OF_OUTPUTS if getattr(recipe, name)]
        self.plain = not requested
        if requested and self.loss.kind == "whole":
            raise InputError(
                f"{requested[0]} works on the outputs, and {self.loss.name}(model, batch) calls "
                "the model itself: write it there, or give a loss of (output, target)"
            )

    def __call__(self, model: nn.Module, x: Any, y: Tensor) -> Tensor:
        """Return the loss of one batch, 0-d."""
        recipe = self.recipe
        if recipe.input_noise:
            x = gaussian_noise(x, recipe.input_noise)
        if self.plain:
            return self.loss.on(model, (x, y))
        mixed = None
        if recipe.mixup:
            mixed = mixup(x, y, recipe.mixup)
        elif recipe.cutmix:
            mixed = cutmix(x, y, recipe.cutmix)
        x = x if mixed is None else mixed.x
        output = call_model(model, x)
        loss = self._data_loss(output, y, mixed)
        if recipe.r_drop:
            second_output = call_model(model, x)  # same rows, new dropout masks
            if not self._checked_noise and torch.equal(output, second_output):
                warn("r_drop does nothing: two passes of the model agree, it has no dropout")
            self._checked_noise = True  # check once
            loss = (loss + self._data_loss(second_output, y, mixed)) / 2
            loss = loss + recipe.r_drop * r_drop(output, second_output)
        if recipe.confidence_penalty:
            loss = loss + recipe.confidence_penalty * confidence_penalty(output)
        return loss

    def _data_loss(self, output: Tensor, y: Tensor, mixed: Mixed | None) -> Tensor:
        return self.loss(output, y) if mixed is None else mixed.loss(self.loss, output)


def confidence_penalty(logits: Tensor) -> Tensor:
    """Negative entropy of the predictions in nats, averaged over rows; largest where confident.

    `logits` (N, classes). Reference: Pereyra et al. 2017, https://arxiv.org/abs/1701.06548

    >>> round(confidence_penalty(torch.zeros(1, 2)).item(), 4)
    -0.6931
    """
    logarithm = logits.log_softmax(-1)
    return (logarithm.exp() * logarithm).sum(-1).mean()


def r_drop(first: Tensor, second: Tensor) -> Tensor:
    """Symmetric divergence (KL(p|q) + KL(q|p)) / 2 of two noisy passes, averaged over rows.

    `first` and `second` are logits (N, classes) of the same rows under different noise. The full
    objective is the mean of both data losses plus this, weighted by 1 to 5 in the paper.
    Reference: Liang et al. 2021, https://arxiv.org/abs/2106.14448

    >>> r_drop(torch.zeros(3, 2), torch.zeros(3, 2))
    tensor(0.)
    """
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2
