"""Treatments of what the program's own code calls: a copy answers such calls otherwise.

A `CallRule` reads the calls of a pass and gives lines of a `TorchFunctionMode`, which stand
between the program and torch. The patch puts that mode around `model.forward` or around the loss,
so that a program is treated whose source nobody edits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, permutations

from torch import Tensor

from tikhon.data.rows import Batch
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
PAIRED = (
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "sub",
    "__sub__",
    "__rsub__",
    "mul",
    "__mul__",
    "poisson_nll_loss",
    "gaussian_nll_loss",
    "div",
    "__truediv__",
    "add",
    "__add__",
)
Lines = Callable[[list[Call]], list[str]]


@dataclass(frozen=True)
class CallRule:
    """A class of the patch, and the lines of it that these calls need; none where they need none.

    `evaluated` rules hold in evaluation mode alone.
    """

    name: str
    lines: Lines
    evaluated: bool = False
    counted: bool = False  # the lines read `self.seen`, the calls so far
    everywhere: bool = False  # what either side needs holds for both
    padded: bool = False  # the lines read `self.padding`, where the tokens of the inputs are 0
    inner: bool = False  # of the model alone: a loss may well do the same

    def code(self, replica: Replica, batch: Batch) -> str:
        """The patch for a program: around its forward pass, its loss, or both."""
        if self.padded and not _has_padding(batch[0]):
            return ""
        model = replica.model
        with isolated(model, 0), undisturbed(model, training=True), CallTrace(model) as tape:
            replica.value(batch)
        inside = self.lines([c for c in tape.calls if c.module != LOSS])
        outside = (
            []
            if self.evaluated or self.padded or self.inner
            else self.lines([c for c in tape.calls if c.module == LOSS])
        )
        if not inside and not outside:
            return ""
        if self.everywhere:
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
            if self.counted
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
        told = "            mode.padding = args[0] == 0\n"
        plain = "        if self.training:\n            return super().forward(*args, **kwargs)\n"
        return (
            f"class Mended{self.name}(type(model)):\n    def forward(self, *args, **kwargs):\n"
            f"{plain if self.evaluated else ''}"
            f"        with {self.name}(){' as mode' if self.padded else ''}:\n"
            f"{told if self.padded else ''}"
            "            return super().forward(*args, **kwargs)\n"
            f"\n\nmodel.__class__ = Mended{self.name}"
        )


def _has_padding(inputs: object) -> bool:
    """Whether the inputs are sentences of tokens, some of which are 0."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 2 or inputs.is_floating_point():
        return False
    return bool((inputs == 0).any())


def called(calls: list[Call], *names: str) -> Iterator[Call]:
    """The calls of functions with these names."""
    return (call for call in calls if call.name in names)


def once(found: Iterable[object], line: str) -> list[str]:
    """The line where anything was found; no line otherwise."""
    return [line for _ in islice(found, 1)]


# axes


def kept_axes(calls: list[Call]) -> list[str]:
    """A view that tears axes apart, with the axes in an order in which it joins whole ones."""
    found: dict[tuple[int, int], tuple[int, ...]] = {}
    for call in called(calls, *VIEWS):
        if call.shapes and call.output is not None:
            order = untorn(call.shapes[0], call.output)
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


def untorn(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...] | None:
    """The order of axes that a view needs, to join whole ones; None where it tears none.

    >>> untorn((2, 13, 16), (13, 32)), untorn((13, 48), (13, 3, 16))
    ((1, 0, 2), None)
    """
    if math.prod(before) != math.prod(after) or len(before) > 5 or not torn(before, after):
        return None
    orders = [p for p in permutations(range(len(before))) if _joins(before, p, after)]
    return min(orders, key=_moved, default=None)


def torn(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether numbers of several places of an axis end in one place, beside others of it."""
    first, second = _ends(before), _ends(after)
    both = sorted(first & second)
    for low, high in zip([1, *both], both):
        cuts = [{e for e in ends if low < e < high} for ends in (first, second)]
        if all(cuts):
            return True
    return False


def _ends(shape: tuple[int, ...]) -> set[int]:
    """Products of the first sizes, where one axis ends."""
    return {math.prod(shape[: i + 1]) for i in range(len(shape))}


def _joins(before: tuple[int, ...], order: tuple[int, ...], after: tuple[int, ...]) -> bool:
    sizes = tuple(before[k] for k in order)
    return _ends(after) <= _ends(sizes) | {1}


def _moved(order: tuple[int, ...]) -> int:
    """Pairs that changed places."""
    pairs = ((a, b) for i, a in enumerate(order) for b in order[i + 1 :])
    return sum(a > b for a, b in pairs)


def softmax_over(axis: int, calls: list[Call]) -> list[str]:
    """A softmax over the first axis, the rows, over another one."""
    lines = []
    for ndim in sorted({len(c.shapes[0]) for c in called(calls, *SOFTMAXES) if c.dim == 0}):
        if ndim > 1 and (axis > 0 or ndim > 2):
            lines.append(
                f"if name in {SOFTMAXES} and args[0].ndim == {ndim}:\n"
                '    if ({**dict(zip(("input", "dim"), args)), **kwargs}.get("dim") or 0) % '
                f"{ndim} == 0:\n"
                '        kind = torch.log_softmax if name.startswith("log") else torch.softmax\n'
                f"        return kind(args[0], {axis})"
            )
    return lines


def of_each_row(calls: list[Call]) -> list[str]:
    """Statistics over the rows of a batch, as those of each row."""
    found = [c for c in called(calls, *STATISTICS) if c.shapes and len(c.shapes[0]) > 1]
    return [
        *once(
            [c for c in found if c.output in ((), c.shapes[0][1:], (1, *c.shapes[0][1:]))],
            f"if name in {STATISTICS} and args[0].ndim > 1:\n"
            '    axes = kwargs.get("dim", args[1] if len(args) > 1 else None)\n'
            "    if axes in (None, 0, (0,), [0]):\n"
            "        axes = tuple(range(1, args[0].ndim)) if axes is None else (-1,)\n"
            "        return function(args[0], dim=axes, keepdim=True)",
        ),
        *once(
            called(calls, "normalize"),
            'if name == "normalize" and kwargs.get("dim") == 0:\n    kwargs["dim"] = -1',
        ),
    ]


def in_half_turns(calls: list[Call]) -> list[str]:
    """Sines of coordinates, as those of half turns: an octave is a period then."""
    return once(
        (c for c in called(calls, "sin", "cos") if not c.attached),
        'if name in ("sin", "cos") and not args[0].requires_grad:\n'
        "    args = (math.pi * args[0], *args[1:])",
    )


# the graph


def given_goals(calls: list[Call]) -> list[str]:
    """What is aimed at, a sum of data and an answer, without the gradient of the answer."""
    names = ("add", "__add__", "__radd__")
    return once(
        (c for c in called(calls, *names) if c.attached and len(c.shapes) == 2),
        f"if name in {names} and all(isinstance(a, torch.Tensor) for a in args[:2]):\n"
        "    if args[0].requires_grad != args[1].requires_grad:\n"
        "        return function(*args, **kwargs).detach()",
    )


def joined(calls: list[Call]) -> list[str]:
    """What is detached, or computed without gradients, with them."""
    cut = [c for c in calls if c.cut]
    drawn = [c for c in called(calls, "normal") if c.silent]  # it compares what it is given
    compared = list(called(calls, *COMPARED))
    return [
        *once(
            called(cut, "detach", "data"),
            'if name in ("detach", "detach_") or (\n'
            '    name == "__get__" and function.__self__ is torch.Tensor.data\n'
            "):\n    return args[0]",
        ),
        *once(
            called(cut, "round"),
            'if name == "round" and args[0].requires_grad:\n    return args[0]',
        ),
        *once(
            [c for c in compared if c.parts and not drawn],
            f"if name in {COMPARED} and args[0].requires_grad:\n    return args[0]",
        ),
        *once(
            [*called(cut, "tensor"), *compared],
            'if name == "tensor" and isinstance(args[0], torch.Tensor):\n    return args[0]',
        ),
        *once(
            drawn,
            'if name == "normal" and isinstance(args[-1], torch.Tensor):\n'
            "    with torch.enable_grad():\n"
            "        return args[0] + args[1] * torch.randn_like(args[0])",
        ),
        *once(
            (c for c in calls if c.silent),
            'if name == "__set__" and function.__self__ is torch.Tensor.requires_grad:\n'
            "    return None\n"
            "with torch.enable_grad():\n    return function(*args, **kwargs)",
        ),
    ]


def steady(calls: list[Call]) -> list[str]:
    """Dropout that follows the mode, and draws of their mean."""
    names = tuple(sorted({c.name for c in called(calls, *DROPOUTS)}))
    return [
        *once(names, f"if name in {names!r}:\n    return args[0]"),
        *once(
            called(calls, "randn", "randn_like", "normal"),
            'if name in ("randn", "randn_like"):\n    return 0 * function(*args, **kwargs)',
        ),
        *once(
            called(calls, "rand", "rand_like"),
            'if name in ("rand", "rand_like"):\n    return 0.5 + 0 * function(*args, **kwargs)',
        ),
    ]


def bare_head(calls: list[Call]) -> list[str]:
    """The answer without the function that squashes it last."""
    own = [c for c in calls if c.name not in PASSING and not c.name.startswith("__get")]
    if any(called(calls, *WITH_LOGITS)):  # of a loss
        own = [c for c in own if c.name in HEADS]
    if not own or own[-1].name not in HEADS or not own[-1].shapes:
        return []
    last = own[-1].name
    count = sum(c.name == last for c in calls)
    return [
        f'if name == "{last}":\n    self.seen += 1\n    if self.seen == {count}:\n'
        "        return args[0]"
    ]


def one_unit(calls: list[Call]) -> list[str]:
    """A softmax of one number, which is 1, as a sigmoid."""
    found = [c for c in called(calls, *SOFTMAXES) if c.dim is not None]
    return once(
        (c for c in found if c.shapes[0][c.dim or 0] == 1),
        f"if name in {SOFTMAXES} and args[0].shape[-1] == 1:\n"
        '    kind = nn.functional.logsigmoid if name.startswith("log") else torch.sigmoid\n'
        "    return kind(args[0])",
    )


# the loss


def heard(calls: list[Call]) -> list[str]:
    """Losses of classes that leave none of them out."""
    return once(
        called(calls, *CLASS_LOSSES),
        f"if name in {CLASS_LOSSES}:\n"
        '    kwargs = {**kwargs, "ignore_index": -100, "weight": None}\n'
        "    return function(*args[:2], **kwargs)",
    )


def yes_and_no(calls: list[Call]) -> list[str]:
    """Binary losses in which the rows of yes and of no count alike, by class."""
    name = "binary_cross_entropy_with_logits"
    return once(
        called(calls, name),
        f'if name == "{name}":\n'
        "    axes = [k for k in range(args[1].ndim) if k != 1]\n"
        "    share = args[1].mean(axes, keepdim=True).clamp(0.02, 0.98)\n"
        '    return function(*args[:2], **{**kwargs, "pos_weight": (1 - share) / share})',
    )


def classes_alike(calls: list[Call]) -> list[str]:
    """Losses of classes, each of which counts alike in a batch, also where rows have many."""
    name = "cross_entropy"
    return once(
        (c for c in called(calls, name) if len(c.shapes[0]) > 1),
        f'if name == "{name}" and not args[1].is_floating_point():\n'
        "    known = args[1][args[1] >= 0].flatten()\n"
        "    counts = known.bincount(minlength=args[0].shape[1]).clamp_min(1).to(args[0])\n"
        "    weights = (len(known) / (args[0].shape[1] * counts)).clamp_max(50.0)\n"
        '    return function(*args[:2], **{**kwargs, "weight": weights})',
    )


def exchanged(calls: list[Call]) -> list[str]:
    """A loss whose answer stands in the place of the target, with both where they belong."""
    names = tuple(sorted({c.name for c in calls if c.swapped}))
    return once(
        names,
        f"if name in {names!r} and not args[0].requires_grad:\n"
        "    args = (args[1], args[0], *args[2:])",
    )


def logged(calls: list[Call]) -> list[str]:
    """Losses of log-probabilities that get these: of probabilities, or of scores."""
    return [
        f'if name == "{name}":\n'
        f"    shares = args[0].sum({axis})\n"
        "    if (args[0] >= 0).all() and torch.allclose(shares, torch.ones_like(shares), 1e-3):\n"
        "        args = (args[0].clamp_min(1e-8).log(), *args[1:])\n"
        "    else:\n"
        f"        args = (args[0].log_softmax({axis}), *args[1:])"
        for name, axis in (("kl_div", 1), ("ctc_loss", -1), ("nll_loss", 1))
        if any(called(calls, name))
    ]


def weighed_late(calls: list[Call]) -> list[str]:
    """The first mean over the rows left out: the weights of the rows come first."""
    return once(
        (c for c in called(calls, "mean") if len(c.shapes[0]) == 1 and c.output == ()),
        'if name == "mean" and args[0].ndim == 1 and not self.seen:\n'
        "    self.seen = 1\n    return args[0]",
    )


def summed(calls: list[Call]) -> list[str]:
    """Means over the entries of a row as sums."""
    return once(
        (c for c in called(calls, "mean") if c.output),
        'if name == "mean" and args[0].ndim > 1 and (args[1:] or "dim" in kwargs):\n'
        "    return torch.sum(*args, **kwargs)",
    )


def padding_left_out(calls: list[Call]) -> list[str]:
    """Losses of classes that leave 0 out, the padding."""
    return once(
        called(calls, *CLASS_LOSSES),
        f"if name in {CLASS_LOSSES}:\n"
        '    return function(*args[:2], **{**kwargs, "ignore_index": 0})',
    )


def one_shape(calls: list[Call]) -> list[str]:
    """Pairs of as many numbers in one shape, before they meet."""
    names = tuple(sorted({c.name for c in called(calls, *PAIRED) if _unlike(c)}))
    return once(
        names,
        f"if name in {names!r} and all(isinstance(a, torch.Tensor) for a in args[:2]):\n"
        "    first, second = args[:2]\n"
        "    if first.ndim != second.ndim and first.numel() == second.numel():\n"
        "        small = min(first.ndim, second.ndim)\n"
        "        shape = (first if first.ndim == small else second).shape\n"
        "        args = (first.reshape(shape), second.reshape(shape), *args[2:])",
    )


def _unlike(call: Call) -> bool:
    if len(call.shapes) < 2:
        return False
    first, second = call.shapes[:2]
    return len(first) != len(second) and math.prod(first) == math.prod(second) > 1


EDGES = {
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
_OTHER_WORDS = {"__pow__": "pow", "__truediv__": "div", "log_softmax": "softmax"}


def safe(calls: list[Call]) -> list[str]:
    """Functions whose value or slope is not finite at an edge, kept away from it."""
    used = {_OTHER_WORDS.get(c.name, c.name) for c in calls if c.attached}
    return [EDGES[name] for name in EDGES if name in used]
