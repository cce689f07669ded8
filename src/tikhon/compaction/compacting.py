"""The verb `compact`, and what it reports."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm
from torch.utils.flop_counter import FlopCounterMode

from tikhon.copying import copy_with_model
from tikhon.data.nested import tensors
from tikhon.errors import describe
from tikhon.regularizer.audit import warn
from tikhon.wrappers import require_module

from .analysis import Analysis
from .own_class import in_own_class, without_cache
from .rewrite import Replaced, cut, smaller_parts
from .tracing import interpreter_of
from .transformer_layers import with_traceable_layers

TOLERANCE = 1e-5
Batches = list[tuple[tuple[object, ...], object]]  # arguments and expected outputs


@dataclass(frozen=True)
class Compaction:
    """What a compaction did; printed as a table."""

    parameters: tuple[int, int]  # before, after
    flops: tuple[int, int]  # of one forward pass of the example
    units: dict[str, tuple[int, int]]  # module -> units before, after
    stuck: dict[str, str]  # module -> how many dead units stay, and why
    difference: float  # largest output difference, relative to the largest output

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            _ratio("parameters", *self.parameters),
            _ratio("flops", *self.flops),
            *(f"{name:24} {a:>12,} -> {b:,}" for name, (a, b) in self.units.items() if a != b),
            *(f"{name:24} kept: {why}" for name, why in self.stuck.items()),
            f"largest output difference {self.difference:.1e}",
        ]
        return "\n".join(lines)


def _ratio(name: str, before: float, after: float) -> str:
    return f"{name:24} {before:>12,} -> {after:,}  ({before / max(after, 1):.2f}x smaller)"


def compact(model: nn.Module, example_input: Tensor | tuple[Tensor, ...]) -> nn.Module:
    """A smaller model with the same outputs: dead and unused rows, channels and heads removed.

    A unit is removed if no remaining unit reads it (its outgoing weights are exactly zero) or if
    it is a constant (its incoming weights are exactly zero): a constant moves into the biases of
    its readers wherever that is exact. The units pass through Linear, Conv, BatchNorm, LayerNorm,
    Embedding, attention, activations, residual sums, products, pooling, reshape and concatenation;
    the first linear layer reads only the input columns that it uses. An operation without a rule
    keeps everything that it touches and is named. The model itself is not changed.

    Args:
        model: any module that torch.fx or torch.export can trace; the outputs of its evaluation
            mode are kept.
        example_input: one batch (a tensor, or a tuple for several arguments).

    Returns:
        The compacted model, in the mode (train or eval) of `model`; `.compaction` holds the table.

    Raises:
        ValueError: the model cannot be traced, or its outputs on the example are not finite.
        RuntimeError: the outputs differ by more than 1e-5 of the largest output.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> with torch.no_grad():
    ...     model[0].weight[3:] = 0            # five dead units
    ...     model[0].bias[3:] = torch.rand(5)  # which are constants, not zeros
    >>> small = compact(model, torch.randn(5, 4))
    >>> small.get_submodule("0").out_features
    3
    >>> small.compaction.parameters
    (58, 23)
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    require_module(model)
    if not any(isinstance(one, Tensor) for one in tensors(list(inputs))):
        raise TypeError(
            f"example_input must be a tensor, or a tuple of the arguments of the model, received "
            f"{describe(example_input)}"
        )
    original = _with_plain_weights(copy_with_model(model, model)).eval()
    with torch.no_grad(), without_cache(original) as cached:
        expected = original(*inputs)
        if change := _difference(expected, original(*inputs)):
            why, what = (
                ("outputs that are not finite", "are its weights or the example NaN?")
                if change == math.inf
                else ("other outputs every time", "does it draw at random in evaluation?")
            )
            raise ValueError(
                f"{type(model).__name__} gives {why} on the example, so a smaller model cannot be "
                f"compared with it; {what}"
            )
        batches = [(inputs, expected), *((b, original(*b)) for b in _other_batches(inputs))]
        analysed = _Analysed.of(original, cached, inputs, free_sizes=False)
        small = in_own_class(analysed.model, analysed.parts)
        difference = math.inf if small is None else _difference_of_own_class(small, batches)
        if small is None or not difference <= TOLERANCE:
            if analysed.analysis.graph.meta.get("fixed sizes"):
                analysed = _Analysed.of(original, cached, inputs, free_sizes=True)
            small = cut(analysed.analysis, analysed.keep, analysed.parts)
            difference = _difference_of_graph(small, batches, type(model).__name__)
            _warn_of_losses(
                model, analysed.analysis.graph.meta.get("lost", ""), cached=bool(cached)
            )
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"compaction changed the outputs by {difference:.2g} of their largest value (allowed: "
            f"{TOLERANCE:g}); please report this model: {type(model).__name__}"
        )
    small.compaction = Compaction(  # type: ignore[assignment]
        parameters=(_parameters(original), _parameters(small)),
        flops=(_flops(original, inputs), _flops(small, inputs)),
        units={
            name: (last - first, int(analysed.keep[first:last].sum()))
            for first, last, name in analysed.analysis.origin
        },
        stuck=_blocked_units(analysed.analysis, analysed.keep),
        difference=difference,
    )
    return small.train(model.training)


@dataclass(frozen=True)
class _Analysed:
    """A copy of a model, its units, those that stay, and the smaller parts that hold them."""

    model: nn.Module
    analysis: Analysis
    keep: Tensor
    parts: Replaced

    @classmethod
    def of(
        cls,
        original: nn.Module,
        shared: dict[int, Any],
        inputs: tuple[object, ...],
        *,
        free_sizes: bool,
    ) -> _Analysed:
        model = with_traceable_layers(copy.deepcopy(original, dict(shared)))
        interpreter = interpreter_of(model, inputs, free_sizes=free_sizes)
        interpreter.run(*inputs)
        analysis = interpreter.analysis
        keep = analysis.solve()
        return cls(model, analysis, keep, smaller_parts(analysis, keep))


def _with_plain_weights(model: nn.Module) -> nn.Module:
    """Weights that a hook computes before each pass (pruned, weight_norm) become parameters."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
            elif isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
    return model


def _other_batches(inputs: tuple[object, ...]) -> list[tuple[object, ...]]:
    """A second batch that has nothing in common with the example: equality is no accident."""
    generator = torch.Generator().manual_seed(0)

    def other(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point():
            return x.flip(0)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return (3 * noise).to(x)

    return [tuple(other(x) for x in inputs)]


def _difference_of_own_class(small: nn.Module, batches: Batches) -> float:
    """The largest difference; infinite where the forward depends on sizes that have changed."""
    try:
        return _largest_difference(small, batches)
    except Exception:  # of the user's code
        return math.inf


def _difference_of_graph(small: nn.Module, batches: Batches, name: str) -> float:
    try:
        return _largest_difference(small, batches)
    except RuntimeError as error:
        raise RuntimeError(
            f"compaction left a model that does not run ({error}); please report this model: "
            f"{name}"
        ) from error


def _largest_difference(small: nn.Module, batches: Batches) -> float:
    small.eval()
    return max(_difference(expected, small(*inputs)) for inputs, expected in batches)


def _warn_of_losses(model: nn.Module, dropout: str, *, cached: bool) -> None:
    """Say what the graph of a model has not."""
    if dropout:
        warn(
            f"the small {type(model).__name__} has no {dropout}: the model changes tensors in "
            f"place, and only its evaluation mode could be followed; do not train it on"
        )
    if cached:
        warn(
            f"the small {type(model).__name__} returns no cache of keys and values "
            f"(use_cache=False)"
        )


def _difference(expected: object, received: object) -> float:
    pairs = zip(tensors(expected), tensors(received), strict=True)
    return max((_relative(a.double(), b.double()) for a, b in pairs if a.numel()), default=0.0)


def _relative(expected: Tensor, received: Tensor) -> float:
    scale = max(float(expected.abs().max()), 1e-6)
    found = float((expected - received).abs().max()) / scale
    return math.inf if math.isnan(found) else found  # `max` would pass NaN over


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _flops(model: nn.Module, inputs: tuple[object, ...]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


def _blocked_units(analysis: Analysis, keep: Tensor) -> dict[str, str]:
    """Units that the weights alone would let go, with the operation that holds them."""
    free = analysis.solve(pins=False)
    roots = analysis.registry.roots()
    why = {int(roots[unit]): reason for unit, reason in analysis.registry.pinned.items()}
    found: dict[str, list[str]] = defaultdict(list)
    for first, last, name in analysis.origin:
        held = (keep[first:last] & ~free[first:last]).nonzero().flatten().tolist()
        found[name] += [why.get(int(roots[first + u]), "the shape of a tensor") for u in held]
    for node, reason in analysis.refused.items():
        if node.op == "call_module":
            name = str(node.target)
            found[name] = [reason] * _zero_rows(analysis.graph.get_submodule(name))
    return {
        name: f"{len(reasons)} units ({', '.join(sorted(set(reasons)))})"
        for name, reasons in found.items()
        if reasons
    }


def _zero_rows(module: nn.Module) -> int:
    if isinstance(module, nn.MultiheadAttention):  # a head that nothing reads
        read = module.out_proj.weight.T.reshape(module.num_heads, -1)
        return int((~read.any(1)).sum())
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        return 0
    return int((~weight.flatten(1).any(1)).sum())
