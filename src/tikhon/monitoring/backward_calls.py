"""Losses that go backward, and gradients that are clipped, in a sampled step."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.optim import Optimizer

from tikhon.monitoring.history import LossReading
from tikhon.monitoring.hooks import CallHook
from tikhon.monitoring.loss_graph import LossGraph, read_loss_graph

FLAGGED = ("missing_log", "target_out_of_range")  # faults that numbers in a graph show

# `Tensor.backward` and everything built on it, and `clip_grad_norm_`, call the first two
_HOOKS = (
    CallHook(torch.autograd, "backward", "record"),
    CallHook(clip_grad, "_clip_grads_with_norm_", "record_clip"),
    CallHook(torch, "manual_seed", "record_seed"),
    CallHook(torch.autograd, "grad", "record_slope"),
)


class BackwardCalls:
    """The losses that went backward, what their graphs show, and calls of `clip_grad_norm_`."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.graphs: list[LossGraph] = []
        self.early_clips: list[Tensor] = []  # norms that were clipped before a backward pass
        self.has_late_clip = False
        self.seed: int | None = None  # the last that torch was given
        self.is_repeated = False  # one loss went backward twice
        self.has_lost_slope = (
            False  # a derivative by something untrained was taken without a graph
        )
        self._roots: list[weakref.ref[Tensor]] = []
        self._optimized: set[int] = set()
        self._maximizes: set[bool] = set()

    def start(self, optimizer: Optimizer) -> None:
        """Record, from here to `stop`."""
        self.__init__()
        self._maximizes = {bool(g.get("maximize")) for g in optimizer.param_groups}
        self._optimized = {id(p) for g in optimizer.param_groups for p in g["params"]}
        for hook in _HOOKS:
            hook.add(self)

    def stop(self) -> None:
        """Record no more."""
        for hook in _HOOKS:
            hook.remove(self)

    @property
    def has_equal_losses(self) -> bool:
        """Whether they are losses of one kind, none of them a share."""
        is_share = any(graph.share < 1 for graph in self.graphs)
        return len({graph.operation for graph in self.graphs}) == 1 and not is_share

    def tensors_to_read(self) -> dict[str, list[Tensor]]:
        """Numbers of all losses by name, and the norms that were clipped early."""
        names = (*FLAGGED, "gain", "first_class", "last_class")
        read = {n: [t for graph in self.graphs for t in graph.readings.get(n, ())] for n in names}
        factors = [g.factor for g in self.graphs[-1:] if g.factor is not None]
        return {**read, "factor": factors, "early_clips": self.early_clips}

    def reading(
        self, values: Mapping[str, Sequence[float]], backwards: int, *, judges_sign: bool
    ) -> LossReading:
        """What is known of the losses once `tensors_to_read` are read."""
        graphs, gains = self.graphs, [v for v in values["gain"] if math.isfinite(v)]
        has_other_parts = any(graph.has_other_parts for graph in graphs)
        faults = {code for graph in graphs for code in graph.faults}
        faults |= {code for code in FLAGGED if any(values[code])}
        is_added = self.has_lost_slope and any(graph.has_constant for graph in graphs)
        faults |= {"slope_without_graph"} if is_added else set()
        faults |= {"loss_upside_down"} if judges_sign and self._is_upside_down() else set()
        shapes = next((g.shapes for g in graphs if g.shapes), ("", ""))
        clips = values["early_clips"]
        return LossReading(
            factor=next(iter(values["factor"]), 1.0),
            share=graphs[-1].share if graphs else 1.0,
            are_of_one_kind=self.has_equal_losses and len(self.losses) == backwards,
            faults=frozenset(faults),
            output_shape=shapes[0],
            broadcast_shape=shapes[1],
            is_repeated=self.is_repeated,
            gain=max(gains) if gains and not has_other_parts else None,
            first_class=min(values["first_class"], default=math.nan),
            last_class=max(values["last_class"], default=math.nan),
            clipped_early=bool(clips) and not any(clips) and not self.has_late_clip,
        )

    def _is_upside_down(self) -> bool:
        """Whether the steps go up every criterion."""
        graphs = [graph for graph in self.graphs if graph.signs]
        rises = bool(graphs) and all(g.signs and max(g.signs) < 0 for g in graphs)
        falls = bool(graphs) and all(graph.is_positive for graph in graphs)
        return (rises and self._maximizes == {False}) or (falls and self._maximizes == {True})

    def record(self, tensors: Tensor | Sequence[Tensor], *rest: object, **options: object) -> None:
        """The tensors of one backward pass."""
        for root in [tensors] if isinstance(tensors, Tensor) else tensors:
            if isinstance(root, Tensor) and root.numel() == 1 and root.is_floating_point():
                self.is_repeated = self.is_repeated or any(ref() is root for ref in self._roots)
                self._roots.append(weakref.ref(root))
                self.losses.append(root.detach().reshape(()))
                self.graphs.append(read_loss_graph(root))

    def record_clip(
        self,
        parameters: Tensor | Iterable[Tensor],
        limit: float,
        norm: Tensor,
        *rest: object,
        **options: object,
    ) -> None:
        """A call of `clip_grad_norm_` on tensors of the optimizer."""
        clipped = [parameters] if isinstance(parameters, Tensor) else parameters
        if math.isfinite(limit) and any(id(p) in self._optimized for p in clipped):
            if self.losses:
                self.has_late_clip = True
            else:
                self.early_clips.append(norm.detach())

    def record_slope(
        self, outputs: object, inputs: object, *rest: object, **options: object
    ) -> None:
        """A derivative that the loop takes: by its inputs, it may be a part of the loss."""
        has_graph = options.get("create_graph", rest[2] if len(rest) > 2 else False)
        given = [inputs] if isinstance(inputs, Tensor) else list(inputs)  # type: ignore[call-overload]
        is_trained = any(isinstance(t, nn.Parameter) or id(t) in self._optimized for t in given)
        if torch.is_grad_enabled() and not has_graph and not is_trained:
            self.has_lost_slope = True

    def record_seed(self, seed: int, *rest: object) -> None:
        """The random numbers of torch begin again."""
        self.seed = int(seed)

    @property
    def used_seed(self) -> int | None:
        """The seed of this step, if random numbers were drawn from it."""
        if self.seed is None:
            return None
        unused = torch.Generator().manual_seed(self.seed).get_state()
        return None if torch.equal(unused, torch.get_rng_state()) else self.seed
