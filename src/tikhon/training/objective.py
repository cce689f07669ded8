"""The training objective of one batch, and the clipping of its gradient."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from tikhon.errors import InputError
from tikhon.recipe import Recipe
from tikhon.training.settings import Loss


class Objective:
    """The data loss with what the recipe does to inputs, targets and gradients."""

    def __init__(self, recipe: Recipe, loss: Loss, y: Tensor) -> None:
        self.recipe, self.loss = recipe, loss
        self.clips = any((recipe.clip_norm, recipe.clip_value, recipe.clip_adaptive))
        classification = not y.is_floating_point()
        for name in ("label_smoothing", "confidence_penalty"):
            if getattr(recipe, name) and not classification:
                raise InputError(f"{name} is for classes; the targets are numbers")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The loss of one batch, 0-d."""
        return self.loss(model(x), y)

    def clip_(self, model: nn.Module) -> None:
        """Clip the gradients in place."""
        params = list(model.parameters())
        if self.recipe.clip_value is not None:
            clip_grad_value_(params, self.recipe.clip_value)
        if self.recipe.clip_norm is not None:
            clip_grad_norm_(params, self.recipe.clip_norm)
