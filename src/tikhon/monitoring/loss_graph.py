"""Faults of a loss that its autograd graph shows, without a forward pass and without a read."""

from __future__ import annotations

import math
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

MAX_NODES = 64  # of a graph, that are looked at
SQUARED = ("MseLoss", "SmoothL1Loss", "HuberLoss")  # of outputs and targets of one shape
LOGITS = ("BinaryCrossEntropyWithLogits",)
CLASSES = ("NllLoss", "NllLoss2D")  # their input is a LogSoftmax in cross_entropy
CRITERIA = (*SQUARED, *LOGITS, *CLASSES, "BinaryCrossEntropy")
RECOMPUTED = {
    "MseLoss": functional.mse_loss,
    **dict.fromkeys(LOGITS, functional.binary_cross_entropy_with_logits),
    **dict.fromkeys(CLASSES, functional.nll_loss),
}
# operations that keep the sign of what they are given
KEEPING = (
    *("Mean", "Sum", "View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Clone", "ToCopy"),
    *("Select", "Stack", "Alias"),
)
RESHAPING = ("View", "UnsafeView", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Select")


@dataclass
class LossGraph:
    """What the graph of one loss shows: the signs of its criteria, and faults by code."""

    operation: str = ""  # the last one
    share: float = 1.0  # the numbers that divide it at its end, as a factor
    factor: Tensor | None = None  # the number that multiplies it at its end
    signs: list[int] = field(default_factory=list)  # 1, -1, or 0 where it is not known
    faults: set[str] = field(default_factory=set)
    shapes: tuple[str, str] | None = None  # of outputs, and what they are broadcast to
    # numbers of its criteria by name: above zero where it is a fault, or what `Sample` describes
    readings: dict[str, list[Tensor]] = field(default_factory=dict)
    has_other_parts: bool = False  # something in it is no criterion
    has_constant: bool = False  # something without a graph is added to it

    @property
    def is_positive(self) -> bool:
        """Whether every criterion in the loss is multiplied by a positive number."""
        return bool(self.signs) and all(sign > 0 for sign in self.signs)

    def add_reading(self, name: str, value: Tensor) -> None:
        """Keep a number to be read with the sampled step."""
        self.readings.setdefault(name, []).append(value.detach().float().reshape(()))


def read_loss_graph(loss: Tensor) -> LossGraph:
    """Follow the sums, products and means that a loss is made of down to its criteria."""
    graph, count = LossGraph(_kind(loss.grad_fn)), 0
    _add_factors(graph, loss.grad_fn)
    pending: deque[tuple[Any, int | None]] = deque([(loss.grad_fn, 1)])  # sign None: not followed
    while pending and count < MAX_NODES:
        node, sign = pending.popleft()
        count += 1
        kind = _kind(node)
        if kind in CRITERIA and sign is not None:
            graph.signs.append(sign)
            _add_criterion(graph, node, kind, is_weighted=sign == 0)
        elif sign is not None and kind in ("Pow", "Abs") and _is_error(node):
            graph.signs.append(sign)
            _add_shapes(graph, _inputs(node)[0])
        elif sign is not None and kind in (*KEEPING, "Add", "Sub", "Neg", "Mul", "Div"):
            _add_shapes(graph, node)
            parts = enumerate(part for part, _ in node.next_functions)
            graph.has_constant |= kind in ("Add", "Sub") and len(_inputs(node)) == 1
            signs = [(part, sign * _sign(graph, node, kind, k)) for k, part in parts if part]
            pending.extend(signs)
        elif kind not in CRITERIA:
            _add_shapes(graph, node)
            graph.has_other_parts = True
            pending.extend((part, None) for part in _inputs(node))
    return graph


def _is_error(node: Any) -> bool:
    """Whether it is the square or the size of a difference to something without a graph."""
    inner = _inputs(node)[0]
    is_square = getattr(node, "_saved_exponent", 2) == 2
    return _kind(inner) == "Sub" and len(_inputs(inner)) == 1 and is_square


def _add_factors(graph: LossGraph, node: Any) -> None:
    """The numbers that a loss is multiplied and divided by at its end."""
    factors: list[Tensor] = []
    while _kind(node) in ("Div", "Mul", "ToCopy"):
        other = getattr(node, "_saved_other", None)
        if isinstance(other, Tensor) and other.numel() == 1:
            factors += [other.detach().reshape(()).float()] if _kind(node) == "Mul" else []
            size = abs(other.detach().item()) if other.is_cpu else 0.0
            if size:
                graph.share *= min(1.0, size if _kind(node) == "Mul" else 1 / size)
        node = next(iter(_inputs(node)), None)
    graph.factor = next(iter(factors), None)


def _add_criterion(graph: LossGraph, node: Any, kind: str, *, is_weighted: bool) -> None:
    """Faults of outputs and targets that a criterion of torch is given."""
    inputs = _inputs(node)
    while inputs and _kind(inputs[0]) in RESHAPING:
        inputs = _inputs(inputs[0])
    given = _kind(inputs[0]) if inputs else ""
    if kind in SQUARED:
        _add_shapes(graph, _inputs(node)[0] if _inputs(node) else None)
    elif kind in CLASSES and given == "LogSoftmax":
        scores = _inputs(inputs[0])
        while scores and _kind(scores[0]) in RESHAPING:
            scores = _inputs(scores[0])
        if scores and _kind(scores[0]) in ("Softmax", "Sigmoid"):
            graph.faults.add("head_mismatch")
    elif kind in CLASSES and given != "Log":
        with suppress(RuntimeError):  # what was saved may be gone
            graph.add_reading("missing_log", (node._saved_self.detach() > 1e-4).any())
    elif kind in LOGITS and given in ("Softmax", "Sigmoid"):
        graph.faults.add("head_mismatch")
    if kind in LOGITS and not is_weighted and node._saved_weight is None:
        with suppress(RuntimeError):
            target = node._saved_target.detach()
            graph.add_reading("target_out_of_range", ((target < 0) | (target > 1)).any())
    with suppress(RuntimeError, ValueError, IndexError):
        _add_targets(graph, node, kind)


@torch.no_grad()
def _add_targets(graph: LossGraph, node: Any, kind: str) -> None:
    """The first and last class of a batch, and what the targets of other rows would cost."""
    compute = RECOMPUTED.get(kind)
    outputs, target = getattr(node, "_saved_self", None), getattr(node, "_saved_target", None)
    if compute is None or outputs is None or target is None or not target.ndim:
        return
    if kind in CLASSES:
        known = torch.where(target == node._saved_ignore_index, target.max(), target)
        graph.add_reading("first_class", known.amin())
        graph.add_reading("last_class", known.amax())
    moved = target.roll(1, 0)
    here, elsewhere = compute(outputs, target), compute(outputs, moved)
    gain = (elsewhere - here) / elsewhere.abs().clamp(min=1e-12)
    graph.add_reading("gain", torch.where((moved == target).all(), math.nan, gain))


def _add_shapes(graph: LossGraph, node: Any) -> None:
    """A difference of each output of n rows to n targets, which have no graph."""
    if _kind(node) not in ("Sub", "Rsub", "Expand") or len(_inputs(node)) != 1:
        return
    shape, given = _shape(node), _shape(_inputs(node)[0])
    if _kind(node) != "Expand" and _kind(_inputs(node)[0]) == "Expand":
        given = _shape(_inputs(_inputs(node)[0])[0])
    n = given[0] if given else 0
    is_plane = len(given) < 3 or (len(given) > 3 and given[1] == 1)  # three: pairs of vectors
    if n > 1 and is_plane and shape[:2] == (n, n) and math.prod(shape) == n * math.prod(given):
        graph.faults.add("broadcast_loss")
        graph.shapes = (str(given), str(shape))


def _sign(graph: LossGraph, node: Any, kind: str, branch: int) -> int:
    """The sign of what an operation multiplies a branch by; 0 for weights of several signs."""
    if kind == "Neg" or (kind == "Sub" and branch):
        return -1
    saved = "_saved_self" if branch else "_saved_other"
    other = getattr(node, saved, None) if kind in ("Mul", "Div") else None
    if isinstance(other, Tensor):
        if other.numel() != 1:
            return 0
        other = other.detach().item() if other.is_cpu else 1.0
        if other < 0 and _is_weight(node.next_functions[1 - branch][0]):
            graph.faults.add("negative_weight")
    return -1 if isinstance(other, int | float) and other < 0 else 1


def _is_weight(node: Any) -> bool:
    """Whether it is an entry of a small trained tensor, such as the weights of several losses."""
    while _kind(node) in KEEPING and len(_inputs(node)) == 1:
        node = _inputs(node)[0]
    variable = getattr(node, "variable", None)
    return isinstance(variable, Tensor) and variable.numel() <= MAX_NODES


def _kind(node: Any) -> str:
    """The operation of a node: `MseLoss` of `MseLossBackward0`."""
    return type(node).__name__.partition("Backward")[0]


def _inputs(node: Any) -> list[Any]:
    return [part for part, _ in getattr(node, "next_functions", ()) if part is not None]


def _shape(node: Any) -> tuple[int, ...]:
    metadata = getattr(node, "_input_metadata", ())
    return tuple(metadata[0].shape) if metadata else ()
