"""The protocol of closed-loop strengths, and their input at each optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tikhon.penalties.base import Penalty
from tikhon.regularizer.targets import all_reduce_sum

Per = Literal["term", "layer", "group"]


@dataclass(frozen=True, eq=False)
class Reading:
    """One parameter at one step, as seen by a controller.

    Tensors have the penalty's view of the weights, and must not be modified.

    Attributes:
        name: the parameter's name.
        penalty: the penalty with its current strength.
        how: "objective" or "decoupled".
        params: the parameters themselves (`.grad` is that of the user's backward).
        weights: after this step; for a controller with `phase="before_prox"`, between the
            optimizer's move and the prox.
        before: before this step if the controller has `needs_before`, else None.
        gain: ratio of the penalty's move to its strength: the optimizer's stationary gain (a
            number, or a tensor of the shape of `weights`) in objective mode, lr in decoupled mode.
        rate: the scalar part of the gain: the length of a unit move, scaled like the optimizer's
            update (lr for Adam and its variants, lr / (1 - momentum) for SGD).
        arrange: converts tensors of the parameters' shapes (gradients) to the shape of `weights`.
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
    """Input of a controller: the readings that share one strength.

    Attributes:
        readings: one for each parameter; all of the term's if `per="term"`, those in one parameter
            group if `per="group"`, one if `per="layer"`.
        model: the (unwrapped) model.
        memory: numbers and tensors kept by the controller for this strength between steps, stored
            in the Regularizer's state_dict.
        shared: a dict, empty at each step, shared by all strengths of the controller, for work
            done once per step (such as a validation gradient).
    """

    readings: Sequence[Reading]
    model: nn.Module
    memory: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)


class Controller(ABC):
    """A strength computed from the weights; a frozen value, its state is in `memory`.

    Class variables:
        phase: when `next` is called. "after_prox": after prox and constraints, setting the
            strength of the next step. "before_prox": between the optimizer's move and the prox,
            setting the strength of this step's prox.
        needs_before: whether readings hold the weights before the step (copied each step).
        reads_shards: whether `next` is correct if a process holds part of the weights (FSDP2).

    Attributes:
        start: the strength of the first step.
        per: "term" for one strength for all parameters of the term, "layer" for one each, "group"
            for one in each parameter group of the optimizer.
        every: steps between calls of `next`.
    """

    phase: ClassVar[Literal["before_prox", "after_prox"]] = "after_prox"
    needs_before: ClassVar[bool] = False
    reads_shards: ClassVar[bool] = False
    start: float
    per: Per
    every: int = 1

    @abstractmethod
    def next(self, strength: float, observation: Observation, step: int) -> float:
        """Return the next strength, finite and >= 0; `step` counts optimizer steps from 1."""

    def check(self, model: nn.Module) -> None:
        """Raise `InputError` for an unsuitable model; called before the first step."""
        return

    def recorded(
        self, memory: Mapping[str, object], steps: int
    ) -> Controller | Callable[[int], float]:
        """Return the strength for another run of `steps` steps that replays this one.

        Itself if there is nothing recorded that another run would not find again.
        """
        return self


def summed_over_shards(reading: Reading, amount: float) -> float:
    """Sum an amount over all processes that hold part of the reading's weights."""
    param = reading.params[0]
    if not hasattr(param, "placements"):
        return amount
    sums = torch.tensor(amount, dtype=torch.float64, device=reading.weights.device)
    return all_reduce_sum(sums, param).item()
