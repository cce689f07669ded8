"""The protocol of closed-loop strengths, and what they see at each optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tikhon.penalties.base import Penalty
from tikhon.regularizer.targets import summed

Per = Literal["term", "layer", "group"]


@dataclass(frozen=True, eq=False)
class Reading:
    """One parameter at one step, as a controller sees it.

    Tensors are of the view that the penalty sees, and belong to the Regularizer: read only.

    Attributes:
        name: the parameter's name.
        penalty: the penalty with the strength in force at this step.
        how: "objective" or "decoupled".
        params: the parameters themselves (their `.grad` is what the user's backward left).
        weights: after this step; for a controller with `phase="before_prox"`, between the
            optimizer's move and the prox.
        before: before this step, if the controller has `needs_before`, otherwise None.
        gain: the factor between the strength and the move that the penalty makes: the optimizer's
            stationary gain (a number, or a tensor of the shape of `weights`) in objective mode,
            its lr in decoupled mode.
        rate: the scalar part of the gain: how far a unit move, scaled like the optimizer's
            update, goes (lr for Adam and its kin, lr / (1 - momentum) for SGD).
        arrange: puts tensors of the parameters' shapes (gradients) in the shape of `weights`.
    """

    name: str
    penalty: Penalty
    how: Literal["objective", "decoupled"]
    params: tuple[nn.Parameter, ...]
    weights: Tensor
    before: Tensor | None
    gain: float | Tensor
    rate: float | Tensor
    arrange: Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, eq=False)
class Observation:
    """What a controller is given: the readings that share one strength.

    Attributes:
        readings: one a parameter; all of the term's if `per="term"`, those in one parameter group
            if `per="group"`, one if `per="layer"`.
        model: the (unwrapped) model.
        memory: numbers and tensors that the controller keeps for this strength from step to
            step. The Regularizer owns it and puts it in its state_dict.
        shared: a dict that is empty at each step and common to all strengths of the controller,
            for work that is done once a step (such as a validation gradient).
    """

    readings: Sequence[Reading]
    model: nn.Module
    memory: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)


class Controller(ABC):
    """A strength that answers to the weights; a frozen value, its state is in `memory`.

    Class variables:
        phase: when `next` is called. "after_prox": after prox and constraints, the answer is the
            strength of the next step. "before_prox": between the optimizer's move and the prox,
            the answer is used by the prox of this same step.
        needs_before: whether readings hold the weights from before the step (a copy each step).
        reads_shards: whether `next` is right where a process holds a part of the weights (FSDP2).

    Attributes:
        start: the strength of the first step.
        per: "term" for one strength in all parameters of the term, "layer" for one each, "group"
            for one in each parameter group of the optimizer.
        every: `next` is called at every so manyth step.
    """

    phase: ClassVar[Literal["before_prox", "after_prox"]] = "after_prox"
    needs_before: ClassVar[bool] = False
    reads_shards: ClassVar[bool] = False
    start: float
    per: Per
    every: int = 1

    @abstractmethod
    def next(self, strength: float, observation: Observation, step: int) -> float:
        """The next strength, finite and >= 0; `step` counts optimizer steps from 1."""

    def check(self, model: nn.Module) -> None:
        """Raise `InputError` where it cannot serve a model; asked before the first step."""
        return

    def recorded(
        self, memory: Mapping[str, object], steps: int
    ) -> Controller | Callable[[int], float]:
        """The strength of another run of `steps` steps that follows what this one has found.

        Itself where nothing is found that another run would not find again.
        """
        return self


def summed_over_shards(reading: Reading, amount: float) -> float:
    """The sum of an amount over all processes that hold a part of the reading's weights."""
    param = reading.params[0]
    if not hasattr(param, "placements"):
        return amount
    sums = torch.tensor(amount, dtype=torch.float64, device=reading.weights.device)
    return summed(sums, param).item()
