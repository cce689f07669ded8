"""Faults of a loss that its autograd graph shows, without a forward pass and without a read."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

MAX_NODES = 64  # of a graph, that are looked at
SQUARED = ("MseLoss", "SmoothL1Loss", "HuberLoss")  # of outputs and targets of one shape
LOGITS = ("BinaryCrossEntropyWithLogits",)
CLASSES = ("NllLoss", "NllLoss2D")  # their input is a LogSoftmax in cross_entropy
CRITERIA = (*SQUARED, *LOGITS, *CLASSES, "BinaryCrossEntropy")
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
    flags: dict[str, Tensor] = field(default_factory=dict)  # above zero where it is a fault

    @property
    def is_positive(self) -> bool:
        """Whether every criterion in the loss is multiplied by a positive number."""
        return bool(self.signs) and all(sign > 0 for sign in self.signs)

    @property
    def is_negative(self) -> bool:
        """Whether every criterion in the loss is multiplied by a negative number."""
        return bool(self.signs) and all(sign < 0 for sign in self.signs)


def read_loss_graph(loss: Tensor) -> LossGraph:
    """Follow the sums, products and means that a loss is made of down to its criteria."""
    graph, count = LossGraph(_kind(loss.grad_fn)), 0
    _add_factors(graph, loss.grad_fn)
    pending: list[tuple[Any, int]] = [(loss.grad_fn, 1)]
    while pending and count < MAX_NODES:
        node, sign = pending.pop()
        count += 1
        kind = _kind(node)
        if kind in CRITERIA:
            graph.signs.append(sign)
            _add_criterion(graph, node, kind, is_weighted=sign == 0)
        elif kind in ("Pow", "Abs") and _kind(inner := _inputs(node)[0]) == "Sub":
            if len(_inputs(inner)) == 1 and getattr(node, "_saved_exponent", 2) == 2:
                graph.signs.append(sign)
                _add_shapes(graph, inner)
        elif kind == "Sub":
            first, second = (*node.next_functions, (None, 0))[:2]
            pending += [(part, s) for part, s in ((first[0], sign), (second[0], -sign)) if part]
        elif kind in KEEPING or kind in ("Add", "Neg", "Mul", "Div"):
            sign *= _sign(node, kind)
            pending += [(part, sign) for part in _inputs(node)]
    return graph


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
            graph.flags["missing_log"] = (node._saved_self.detach() > 1e-4).any().float()
    elif kind in LOGITS and given in ("Softmax", "Sigmoid"):
        graph.faults.add("head_mismatch")
    if kind in LOGITS and not is_weighted and node._saved_weight is None:
        with suppress(RuntimeError):
            target = node._saved_target.detach()
            graph.flags["target_out_of_range"] = ((target < 0) | (target > 1)).any().float()


def _add_shapes(graph: LossGraph, node: Any) -> None:
    """A difference of (n, n) numbers, of outputs of n numbers and something without a graph."""
    if _kind(node) not in ("Sub", "Expand") or len(_inputs(node)) != 1:
        return
    shape, given = _shape(node), _shape(_inputs(node)[0])
    if _kind(node) == "Sub" and _kind(_inputs(node)[0]) == "Expand":
        given = _shape(_inputs(_inputs(node)[0])[0])
    n = shape[0] if shape else 0
    if n > 1 and shape == (n, n) and given in ((n,), (n, 1)):
        graph.faults.add("broadcast_loss")
        graph.shapes = (str(given), str(shape))


def _sign(node: Any, kind: str) -> int:
    """The sign of what an operation multiplies by; 0 for weights that may have several."""
    if kind == "Neg":
        return -1
    other = getattr(node, "_saved_other", None) if kind in ("Mul", "Div") else None
    if isinstance(other, Tensor):
        if other.numel() != 1:
            return 0
        other = other.detach().item() if other.is_cpu else 1.0
    return -1 if isinstance(other, int | float) and other < 0 else 1


def _kind(node: Any) -> str:
    """The operation of a node: `MseLoss` of `MseLossBackward0`."""
    return type(node).__name__.partition("Backward")[0]


def _inputs(node: Any) -> list[Any]:
    return [part for part, _ in getattr(node, "next_functions", ()) if part is not None]


def _shape(node: Any) -> tuple[int, ...]:
    metadata = getattr(node, "_input_metadata", ())
    return tuple(metadata[0].shape) if metadata else ()
