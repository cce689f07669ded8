"""Closed-loop strengths: what they see at each optimizer step, and the protocol they follow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from tikhon.penalties.base import Penalty


@dataclass(frozen=True, eq=False)
class Reading:
    """One parameter at one step, as a controller sees it.

    Tensors are of the view that the penalty sees, and belong to the Regularizer: read only.

    Attributes:
        name: the parameter's name.
        penalty: the penalty with the strength in force at this step.
        how: "objective" or "decoupled".
        params: the parameters themselves (their `.grad` is what the user's backward left).
        weights: after this step; for a controller with `phase="moved"`, between the optimizer's
            move and the prox.
        before: before this step, if the controller has `needs_before`, otherwise None.
        gain: the factor between the strength and the move that the penalty makes: the optimizer's
            stationary gain (a number, or a tensor of the shape of `weights`) in objective mode,
            its lr in decoupled mode.
        rate: the scalar part of the gain: how far a unit move in the optimizer's own metric
            goes (lr for Adam and its kin, lr / (1 - momentum) for SGD).
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
        readings: one a parameter; all of the term's if `per="term"`, one if `per="layer"`.
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
        phase: when `next` is called. "settled": after prox and constraints, the answer is the
            strength of the next step. "moved": between the optimizer's move and the prox, the
            answer is used by the prox of this same step.
        needs_before: whether readings hold the weights from before the step (a copy each step).

    Attributes:
        start: the strength of the first step.
        per: "term" for one strength in all parameters of the term, "layer" for one each.
    """

    phase: ClassVar[Literal["moved", "settled"]] = "settled"
    needs_before: ClassVar[bool] = False
    start: float
    per: Literal["term", "layer"]

    @abstractmethod
    def next(self, strength: float, observation: Observation, step: int) -> float:
        """The next strength, finite and >= 0; `step` counts optimizer steps from 1."""
