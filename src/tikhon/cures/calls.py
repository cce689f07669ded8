"""Treatments that change torch calls of the program by a `TorchFunctionMode`.

A `CallRule` reads the recorded calls of a pass and returns the lines of the mode. The patch wraps
`model.forward` or the loss in it, so that the program's source need not be edited.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, islice, permutations

from torch import Tensor

from tikhon.data.nested import Batch
from tikhon.diagnosis.modes import LOSS
from tikhon.diagnosis.replica import Replica, isolated, undisturbed
from tikhon.diagnosis.wiring.torch_calls import DROPOUTS, Call, CallTrace

VIEWS = ("view", "reshape")
SOFTMAXES = ("softmax", "log_softmax")
CLASS_LOSSES = ("cross_entropy", "nll_loss")
HEADS = (*SOFTMAXES, "sigmoid", "relu", "tanh", "normalize", "softplus", "logsigmoid")
STATISTICS = ("mean", "std", "var", "sum", "amax", "amin")
PASSING = {"squeeze", "unsqueeze", "view", "reshape", "flatten", "__getitem__", "transpose"}
COMPARED = ("gt", "ge", "__gt__", "__ge__")
WITH_LOGITS = ("binary_cross_entropy_with_logits", "cross_entropy")
PAIRED = tuple(
    "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy poisson_nll_loss "
    "binary_cross_entropy_with_logits gaussian_nll_loss sub __sub__ __rsub__ mul __mul__ div "
    "__truediv__ add __add__".split()
)
RuleLines = Callable[[list[Call]], list[str]]


@dataclass(frozen=True)
class CallRule:
    """A mode of the patch, and its lines for recorded calls; no lines where it does not apply."""

    name: str
    lines: RuleLines
    eval_only: bool = False  # the model's forward pass in evaluation mode
    counts_calls: bool = False  # the lines read `self.seen`, the number of calls so far
    both_sides: bool = False  # lines of the model or the loss apply to both
    needs_padding: bool = False  # the lines read `self.padding`, a mask of tokens that are 0
    model_only: bool = False  # not in the loss, where such calls are right

    def code(self, replica: Replica, batch: Batch) -> str:
        """Return the patch that wraps a program's forward pass, its loss, or both."""
        if self.needs_padding and not _has_padding(batch[0]):
            return ""
        model = replica.model
        with isolated(model, 0), undisturbed(model, training=True), CallTrace(model) as tape:
            replica.value(batch)
        inside = self.lines([c for c in tape.calls if c.module != LOSS])
        outside = (
            []
            if self.eval_only or self.needs_padding or self.model_only
            else self.lines([c for c in tape.calls if c.module == LOSS])
        )
        if not inside and not outside:
            return ""
        if self.both_sides:
            inside = outside = list(dict.fromkeys([*inside, *outside]))
        parts = [self._mode(list(dict.fromkeys([*inside, *outside])))]
        if inside:
            parts.append(self._around_forward())
        if outside:
            names = "model, batch" if replica.whole else "output, y"
            parts.append(
                f"def loss({names}, plain_loss=loss):\n    with {self.name}():\n"
                f"        return plain_loss({names})"
            )
        return "\n\n\n".join(parts)

    def _mode(self, lines: list[str]) -> str:
        counter = (
            "    def __init__(self):\n        super().__init__()\n        self.seen = 0\n\n"
            if self.counts_calls
            else ""
        )
        body = "\n".join(f"        {row}" for line in lines for row in line.splitlines())
        return (
            "from torch.overrides import TorchFunctionMode\n\n\n"
            f"class {self.name}(TorchFunctionMode):\n{counter}"
            "    def __torch_function__(self, function, types, args=(), kwargs=None):\n"
            '        name, kwargs = getattr(function, "__name__", ""), kwargs or {}\n'
            f"{body}\n        return function(*args, **kwargs)"
        )

    def _around_forward(self) -> str:
        padding_line = "            mode.padding = args[0] == 0\n"
        plain = "        if self.training:\n            return super().forward(*args, **kwargs)\n"
        return (
            f"class Mended{self.name}(type(model)):\n    def forward(self, *args, **kwargs):\n"
            f"{plain if self.eval_only else ''}"
            f"        with {self.name}(){' as mode' if self.needs_padding else ''}:\n"
            f"{padding_line if self.needs_padding else ''}"
            "            return super().forward(*args, **kwargs)\n"
            f"\n\nmodel.__class__ = Mended{self.name}"
        )


def _has_padding(inputs: object) -> bool:
    """Return whether the inputs are integer tokens (rows, positions), some of which are 0."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 2 or inputs.is_floating_point():
        return False
    return bool((inputs == 0).any())


def calls_to(calls: list[Call], *names: str) -> Iterator[Call]:
    """Yield the calls of functions with these names."""
    return (call for call in calls if call.name in names)


def line_if_any(found: Iterable[object], line: str) -> list[str]:
    """Return the line if `found` is not empty."""
    return [line for _ in islice(found, 1)]


# axes


def keep_axes_order(calls: list[Call]) -> list[str]:
    """Permute the input of a view that mixes axes, so that it joins whole ones."""
    found: dict[tuple[int, int], tuple[int, ...]] = {}
    for call in calls_to(calls, *VIEWS):
        if call.shapes and call.output is not None:
            order = axes_order(call.shapes[0], call.output)
            if order is not None:
                found.setdefault((len(call.shapes[0]), len(call.output)), order)
    return [
        f"if name in {VIEWS} and args[0].ndim == {before}:\n"
        "    found = function(*args, **kwargs)\n"
        f"    if found.ndim == {after}:\n"
        f"        return args[0].permute({', '.join(map(str, order))}).reshape(found.shape)\n"
        "    return found"
        for (before, after), order in found.items()
    ]


def axes_order(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the permutation after which a view joins whole axes; None if none is needed or valid.

    >>> axes_order((2, 13, 16), (13, 32)), axes_order((13, 48), (13, 3, 16))
    ((1, 0, 2), None)
    """
    if math.prod(before) != math.prod(after) or len(before) > 5 or not mixes_axes(before, after):
        return None
    ends = _axis_ends(after) - {1}
    orders = [
        order
        for order in permutations(range(len(before)))
        if ends <= _axis_ends(tuple(before[k] for k in order))
    ]
    return min(
        orders, key=lambda order: sum(a > b for a, b in combinations(order, 2)), default=None
    )


def mixes_axes(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Return whether a view splits axes and joins parts of different ones."""
    first, second = _axis_ends(before), _axis_ends(after)
    both = sorted(first & second)
    for low, high in zip([1, *both], both):
        cuts = [{e for e in ends if low < e < high} for ends in (first, second)]
        if all(cuts):
            return True
    return False


def _axis_ends(shape: tuple[int, ...]) -> set[int]:
    """Return the cumulative products of sizes: the strides at which axes end."""
    return {math.prod(shape[: i + 1]) for i in range(len(shape))}


def softmax_over(axis: int, calls: list[Call]) -> list[str]:
    """Move a softmax over axis 0, the rows, to another axis."""
    lines = []
    for ndim in sorted({len(c.shapes[0]) for c in calls_to(calls, *SOFTMAXES) if c.dim == 0}):
        if ndim > 1 and (axis > 0 or ndim > 2):
            lines.append(
                f"if name in {SOFTMAXES} and args[0].ndim == {ndim}:\n"
                '    if ({**dict(zip(("input", "dim"), args)), **kwargs}.get("dim") or 0) % '
                f"{ndim} == 0:\n"
                '        kind = torch.log_softmax if name.startswith("log") else torch.softmax\n'
                f"        return kind(args[0], {axis})"
            )
    return lines


def per_row_statistics(calls: list[Call]) -> list[str]:
    """Compute statistics over the batch per row instead."""
    found = [c for c in calls_to(calls, *STATISTICS) if c.shapes and len(c.shapes[0]) > 1]
    return [
        *line_if_any(
            [c for c in found if c.output in ((), c.shapes[0][1:], (1, *c.shapes[0][1:]))],
            f"if name in {STATISTICS} and args[0].ndim > 1:\n"
            '    axes = kwargs.get("dim", args[1] if len(args) > 1 else None)\n'
            "    if axes in (None, 0, (0,), [0]):\n"
            "        axes = tuple(range(1, args[0].ndim)) if axes is None else (-1,)\n"
            "        return function(args[0], dim=axes, keepdim=True)",
        ),
        *line_if_any(
            calls_to(calls, "normalize"),
            'if name == "normalize" and kwargs.get("dim") == 0:\n    kwargs["dim"] = -1',
        ),
    ]


def coordinates_times_pi(calls: list[Call]) -> list[str]:
    """Multiply coordinates in sines and cosines by pi: frequencies 2^k are then octaves."""
    return line_if_any(
        (c for c in calls_to(calls, "sin", "cos") if not c.attached),
        'if name in ("sin", "cos") and not args[0].requires_grad:\n'
        "    args = (math.pi * args[0], *args[1:])",
    )


# the graph


def detach_goals(calls: list[Call]) -> list[str]:
    """Detach targets that are sums of data and model outputs (bootstrapping)."""
    names = ("add", "__add__", "__radd__")
    return line_if_any(
        (c for c in calls_to(calls, *names) if c.attached and len(c.shapes) == 2),
        f"if name in {names} and all(isinstance(a, torch.Tensor) for a in args[:2]):\n"
        "    if args[0].requires_grad != args[1].requires_grad:\n"
        "        return function(*args, **kwargs).detach()",
    )


def keep_attached(calls: list[Call]) -> list[str]:
    """Keep gradients through calls that detach, or that run without them."""
    cut = [c for c in calls if c.cut]
    drawn = [c for c in calls_to(calls, "normal") if c.silent]  # the sample is compared
    compared = list(calls_to(calls, *COMPARED))
    return [
        *line_if_any(
            calls_to(cut, "detach", "data"),
            'if name in ("detach", "detach_") or (\n'
            '    name == "__get__" and function.__self__ is torch.Tensor.data\n'
            "):\n    return args[0]",
        ),
        *line_if_any(
            calls_to(cut, "round"),
            'if name == "round" and args[0].requires_grad:\n    return args[0]',
        ),
        *line_if_any(
            [c for c in compared if c.parts and not drawn],
            f"if name in {COMPARED} and args[0].requires_grad:\n    return args[0]",
        ),
        *line_if_any(
            [*calls_to(cut, "tensor"), *compared],
            'if name == "tensor" and isinstance(args[0], torch.Tensor):\n    return args[0]',
        ),
        *line_if_any(
            drawn,
            'if name == "normal" and isinstance(args[-1], torch.Tensor):\n'
            "    with torch.enable_grad():\n"
            "        return args[0] + args[1] * torch.randn_like(args[0])",
        ),
        *line_if_any(
            (c for c in calls if c.silent),
            'if name == "__set__" and function.__self__ is torch.Tensor.requires_grad:\n'
            "    return None\n"
            "with torch.enable_grad():\n    return function(*args, **kwargs)",
        ),
    ]


def disable_noise(calls: list[Call]) -> list[str]:
    """Replace dropout by the identity and random draws by their mean."""
    names = tuple(sorted({c.name for c in calls_to(calls, *DROPOUTS)}))
    return [
        *line_if_any(names, f"if name in {names!r}:\n    return args[0]"),
        *line_if_any(
            calls_to(calls, "randn", "randn_like", "normal"),
            'if name in ("randn", "randn_like"):\n    return 0 * function(*args, **kwargs)',
        ),
        *line_if_any(
            calls_to(calls, "rand", "rand_like"),
            'if name in ("rand", "rand_like"):\n    return 0.5 + 0 * function(*args, **kwargs)',
        ),
    ]


def remove_head_function(calls: list[Call]) -> list[str]:
    """Return the input of the last activation, softmax or normalisation."""
    own = [c for c in calls if c.name not in PASSING and not c.name.startswith("__get")]
    if any(calls_to(calls, *WITH_LOGITS)):  # of a loss
        own = [c for c in own if c.name in HEADS]
    if not own or own[-1].name not in HEADS or not own[-1].shapes:
        return []
    last = own[-1].name
    count = sum(c.name == last for c in calls)
    return [
        f'if name == "{last}":\n    self.seen += 1\n    if self.seen == {count}:\n'
        "        return args[0]"
    ]


def sigmoid_for_one_unit(calls: list[Call]) -> list[str]:
    """Replace a softmax over one unit, which is always 1, by a sigmoid."""
    found = [c for c in calls_to(calls, *SOFTMAXES) if c.dim is not None]
    return line_if_any(
        (c for c in found if c.shapes[0][c.dim or 0] == 1),
        f"if name in {SOFTMAXES} and args[0].shape[-1] == 1:\n"
        '    kind = nn.functional.logsigmoid if name.startswith("log") else torch.sigmoid\n'
        "    return kind(args[0])",
    )


# the loss


def set_options(options: str, calls: list[Call]) -> list[str]:
    """Compute class losses with other options, such as `ignore_index` and class weights."""
    return line_if_any(
        calls_to(calls, *CLASS_LOSSES),
        f"if name in {CLASS_LOSSES}:\n    return function(*args[:2], **{{**kwargs, {options}}})",
    )


def weigh_positives(calls: list[Call]) -> list[str]:
    """Set `pos_weight` so that positive and negative rows have equal weight, per class."""
    name = "binary_cross_entropy_with_logits"
    return line_if_any(
        calls_to(calls, name),
        f'if name == "{name}":\n'
        "    axes = [k for k in range(args[1].ndim) if k != 1]\n"
        "    share = args[1].mean(axes, keepdim=True).clamp(0.02, 0.98)\n"
        '    return function(*args[:2], **{**kwargs, "pos_weight": (1 - share) / share})',
    )


def balance_classes(calls: list[Call]) -> list[str]:
    """Weight the classes of a batch inversely to their frequency, also with several per row."""
    name = "cross_entropy"
    return line_if_any(
        (c for c in calls_to(calls, name) if len(c.shapes[0]) > 1),
        f'if name == "{name}" and not args[1].is_floating_point():\n'
        "    known = args[1][args[1] >= 0].flatten()\n"
        "    counts = known.bincount(minlength=args[0].shape[1]).clamp_min(1).to(args[0])\n"
        "    weights = (len(known) / (args[0].shape[1] * counts)).clamp_max(50.0)\n"
        '    return function(*args[:2], **{**kwargs, "weight": weights})',
    )


def swap_arguments(calls: list[Call]) -> list[str]:
    """Swap prediction and target of a loss called in the wrong order."""
    names = tuple(sorted({c.name for c in calls if c.swapped}))
    return line_if_any(
        names,
        f"if name in {names!r} and not args[0].requires_grad:\n"
        "    args = (args[1], args[0], *args[2:])",
    )


def log_inside_loss(calls: list[Call]) -> list[str]:
    """Pass log-probabilities to losses that expect them, from probabilities or logits."""
    return [
        f'if name == "{name}":\n'
        f"    shares = args[0].sum({axis})\n"
        "    if (args[0] >= 0).all() and torch.allclose(shares, torch.ones_like(shares), 1e-3):\n"
        "        args = (args[0].clamp_min(1e-8).log(), *args[1:])\n"
        "    else:\n"
        f"        args = (args[0].log_softmax({axis}), *args[1:])"
        for name, axis in (("kl_div", 1), ("ctc_loss", -1), ("nll_loss", 1))
        if any(calls_to(calls, name))
    ]


def weights_before_mean(calls: list[Call]) -> list[str]:
    """Skip the first mean over rows, so that row weights are applied before it."""
    return line_if_any(
        (c for c in calls_to(calls, "mean") if len(c.shapes[0]) == 1 and c.output == ()),
        'if name == "mean" and args[0].ndim == 1 and not self.seen:\n'
        "    self.seen = 1\n    return args[0]",
    )


def sum_over_entries(calls: list[Call]) -> list[str]:
    """Replace means over the entries of a row by sums."""
    return line_if_any(
        (c for c in calls_to(calls, "mean") if c.output),
        'if name == "mean" and args[0].ndim > 1 and (args[1:] or "dim" in kwargs):\n'
        "    return torch.sum(*args, **kwargs)",
    )


def match_shapes(calls: list[Call]) -> list[str]:
    """Reshape two operands of as many entries to one shape."""
    names = tuple(sorted({c.name for c in calls_to(calls, *PAIRED) if _shapes_differ(c)}))
    return line_if_any(
        names,
        f"if name in {names!r} and all(isinstance(a, torch.Tensor) for a in args[:2]):\n"
        "    first, second = args[:2]\n"
        "    if first.ndim != second.ndim and first.numel() == second.numel():\n"
        "        small = min(first.ndim, second.ndim)\n"
        "        shape = (first if first.ndim == small else second).shape\n"
        "        args = (first.reshape(shape), second.reshape(shape), *args[2:])",
    )


def _shapes_differ(call: Call) -> bool:
    if len(call.shapes) < 2:
        return False
    first, second = call.shapes[:2]
    return len(first) != len(second) and math.prod(first) == math.prod(second) > 1


CLAMPS = {
    "log": 'if name == "log":\n    return args[0].clamp_min(1e-8).log()',
    "sqrt": 'if name == "sqrt":\n    return args[0].clamp_min(1e-8).sqrt()',
    "pow": 'if name in ("pow", "__pow__") and isinstance(args[1], float) and args[1] < 1:\n'
    "    return args[0].clamp_min(1e-8) ** args[1]",
    "std": 'if name == "std":\n    return torch.var(*args, **kwargs).clamp_min(1e-8).sqrt()',
    "div": 'if name in ("div", "__truediv__") and isinstance(args[1], torch.Tensor):\n'
    "    args = (args[0], torch.where(args[1].abs() < 1e-8, 1e-8, args[1]))",
    "exp": 'if name == "exp":\n    return args[0].clamp_max(20).exp()',
    "acos": 'if name == "acos":\n    return args[0].clamp(-1 + 1e-6, 1 - 1e-6).acos()',
    "softmax": 'if name in ("softmax", "log_softmax"):\n'
    "    args = (args[0].clamp_min(-1e4), *args[1:])",
}
_ALIASES = {"__pow__": "pow", "__truediv__": "div", "log_softmax": "softmax"}


def clamp_functions(calls: list[Call]) -> list[str]:
    """Clamp arguments where the value or the gradient of a function is not finite."""
    used = {_ALIASES.get(c.name, c.name) for c in calls if c.attached}
    return [CLAMPS[name] for name in CLAMPS if name in used]
