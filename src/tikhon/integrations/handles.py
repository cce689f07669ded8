"""Fields and methods shared by the callbacks of Lightning and Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

from torch import nn, optim

from tikhon.integrations.readings import readings
from tikhon.regularizer.regularizer import Regularizer
from tikhon.regularizer.terms import How, Terms
from tikhon.sparsity import Sparsifier, Thinning
from tikhon.sparsity.thinning import ThinningLike


class Handle:
    """A callback that holds a handle and its readings."""

    @property
    def _handle(self) -> Regularizer | Sparsifier | None:
        """The handle attached at the start of training."""
        raise NotImplementedError

    def _readings(self) -> dict[str, float]:
        """Readings for the log."""
        raise NotImplementedError


@dataclass(eq=False)
class RegularizeHandle(Handle):
    """Arguments of `regularize`, and its handle."""

    terms: Terms
    _: KW_ONLY
    how: How = "objective"
    log: bool = True
    per_parameter: bool = False
    regularizer: Regularizer | None = field(default=None, init=False)

    @property
    def _handle(self) -> Regularizer | None:
        return self.regularizer

    def _readings(self) -> dict[str, float]:
        assert self.regularizer is not None
        return readings(self.regularizer, per_parameter=self.per_parameter)


@dataclass(eq=False)
class SparsifyHandle(Handle):
    """Arguments of `sparsify`, and its handle."""

    asked: ThinningLike
    _: KW_ONLY
    within: str = ""
    example: object = None
    steps: int | None = None
    log: bool = True
    sparsifier: Sparsifier | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.asked = self.thinning = Thinning.read(self.asked)

    @property
    def _handle(self) -> Sparsifier | None:
        return self.sparsifier

    def _readings(self) -> dict[str, float]:
        assert self.sparsifier is not None
        return {"sparsity/zeros": self.sparsifier.audit().share}

    def _attach(
        self, model: nn.Module, optimizer: optim.Optimizer | Sequence[optim.Optimizer], steps: int
    ) -> None:
        self.sparsifier = Sparsifier(
            model.get_submodule(self.within),
            optimizer,
            self.thinning,
            steps=steps,
            example=self.example,
        )

    def _apply(self, model: nn.Module) -> None:
        """Apply the zeros to the final weights."""
        if self.sparsifier is not None:
            self.sparsifier.apply(model.get_submodule(self.within))
