"""Hand-written attention: entropy of its softmax with and without scaling, and its masks."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from tikhon.data.rows import tensors
from tikhon.diagnosis.functions import Function
from tikhon.diagnosis.modes import Args, Functions, Options, function_name, user_line
from tikhon.diagnosis.replica import undisturbed
from tikhon.diagnosis.wiring.padding import lengths
from tikhon.diagnosis.wiring.program import Subject
from tikhon.diagnosis.wiring.rows import spread as row_spread
from tikhon.diagnosis.wiring.torch_calls import DROPOUTS

PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "einsum", "baddbmm"}
SHAPES = set(
    "view reshape transpose permute contiguous flatten unflatten unsqueeze squeeze chunk "
    "split unbind __getitem__ movedim swapaxes".split()
)
SCALINGS = {"mul", "__mul__", "__rmul__", "div", "__truediv__", "true_divide", "normalize"}
DEEP = 4  # layers that are zeroed one by one
SAME_ROWS = 1e-6  # relative distance of equal rows
MASKED = -1e4  # scores below are masked
MASKS = {
    "multi_head_attention_forward": "key_padding_mask",
    "scaled_dot_product_attention": "attn_mask",
}
MOST = 0.9  # share of tokens masked and of padding visible: the mask is inverted


class AttentionScores(Functions):
    """Context that measures each softmax over products of queries and keys.

    `found` holds per line: the size of queries and keys, whether they were scaled, and the entropy
    relative to uniform attention, as it is and with scores divided by the root of that size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []
        self.queries = ""  # place where a mask hides queries instead of keys
        self.turned = ""  # place where a softmax over the queries weights the values
        self.blank: list[tuple[Tensor, str]] = []  # keys masked for all queries of a row, place
        self._over_queries: list[tuple[weakref.ref[Tensor], str]] = []
        self._kept: dict[int, weakref.ref[Tensor]] = {}
        self._notes: dict[int, tuple[int, bool]] = {}  # tensor: size of its products, divided

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Record the function's result and return it."""
        name = function_name(func)
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        notes = [self._note(t) for t in inputs]
        size = max((size for size, _ in notes), default=0)
        divided = any(divided for _, divided in notes)
        output = func(*args, **kwargs)
        if name in MASKS and isinstance(mask := kwargs.get(MASKS[name]), Tensor):
            allowed = mask.dtype == torch.bool and name == "scaled_dot_product_attention"
            self._blank(~mask if allowed else mask, user_line())
        if name == "softmax" and size and inputs[0].ndim > 2:
            self._turn(inputs[0], output, _axis(args, kwargs), user_line())
            self._measure(inputs[0], size, divided, (args, kwargs), user_line())
        elif name in PRODUCTS and len(inputs) > 1 and inputs[-1].ndim > 2:
            left = [place for seen, place in self._over_queries if seen() is inputs[0]]
            self.turned = self.turned or next(iter(left), "")
            sizes = {inputs[0].shape[-1], inputs[-1].shape[-2]}
            inner = sizes.pop() if len(sizes) == 1 else int(inputs[0].shape[-1])
            self._keep(output, inner, divided)
        elif name in DROPOUTS and any(seen() is inputs[0] for seen, _ in self._over_queries):
            self._turn(inputs[0], output, inputs[0].ndim - 2, user_line())
        elif name in SCALINGS:
            self._keep(output, size, divided or name == "normalize" or _scales(args))
        elif name in SHAPES or size:
            self._keep(output, size, divided)
        return output

    def _blank(self, mask: Tensor, place: str) -> None:
        """Record the keys that a mask (True, or far below 0) hides from all queries and heads."""
        with torch._C.DisableTorchFunction():
            blank = mask if mask.dtype == torch.bool else mask.detach() <= MASKED
            if blank.ndim > 1:
                keys = blank.flatten(1, -2).all(1) if blank.ndim > 2 else blank
                self.blank.append((keys.cpu(), place))

    def _turn(self, scores: Tensor, output: object, axis: object, place: str) -> None:
        """Record a softmax over the queries in self-attention."""
        square = scores.shape[-1] == scores.shape[-2] > 2
        if square and axis in (-2, scores.ndim - 2) and isinstance(output, Tensor):
            self._over_queries.append((weakref.ref(output), place))

    def _note(self, tensor: Tensor) -> tuple[int, bool]:
        known = self._kept.get(id(tensor))
        return self._notes[id(tensor)] if known is not None and known() is tensor else (0, False)

    def _keep(self, output: object, size: int, divided: bool) -> None:
        for part in output if isinstance(output, tuple | list) else (output,):
            if isinstance(part, Tensor) and (size or divided):
                self._kept[id(part)] = weakref.ref(part)
                self._notes[id(part)] = size, divided

    def _measure(
        self, scores: Tensor, size: int, divided: bool, call: tuple[Any, Any], place: str
    ) -> None:
        axis = _axis(*call)
        if axis not in (-1, scores.ndim - 1) or scores.shape[-1] < 3:
            return
        with torch._C.DisableTorchFunction():
            self._blank(scores, place)
            if _whole_rows(scores):
                self.queries = self.queries or place
            now = spread(scores.detach().double())
            then = spread(scores.detach().double() / math.sqrt(size))
        if now is not None and then is not None:
            entry = {"size": size, "divided": divided, "now": now, "then": then}
            self.found.append({**entry, "place": place})


def _axis(args: Args, kwargs: Options) -> object:
    return kwargs.get("dim", args[1] if len(args) > 1 else None)


def _scales(factors: tuple[Any, ...]) -> bool:
    """Whether one of the factors is a single number other than 1."""
    single = [f for f in factors if not isinstance(f, Tensor) or f.numel() == 1]
    return any(isinstance(f, int | float | Tensor) and float(f) != 1 for f in single)


def _whole_rows(scores: Tensor) -> bool:
    """Whether a mask hides all keys from some queries and none from the others."""
    seen = scores.detach() > MASKED
    blank, free = ~seen.any(-1), seen.all(-1)
    return bool(blank.any()) and bool(free.any()) and bool((blank | free).all())


def spread(scores: Tensor) -> float | None:
    """Return the mean entropy of a softmax over unmasked scores, 1 = uniform."""
    seen = scores > MASKED
    count = seen.sum(-1)
    share = scores.masked_fill(~seen, -math.inf).softmax(-1)
    entropy = -(share * share.clamp_min(1e-30).log()).sum(-1)
    rows = count > 1
    if not bool(rows.any()):
        return None
    return float((entropy[rows] / count[rows].double().log()).mean())


def _upside_down(subject: Subject, tape: AttentionScores) -> str:
    """Return the place where a mask hides the tokens and leaves the padding; else ""."""
    for part in tensors(subject.batch[0]):
        ends = lengths(part)
        if ends is None:
            continue
        padded = torch.arange(part.shape[1]) >= ends[:, None]
        for keys, place in tape.blank:
            if keys.shape == padded.shape and padded.any():
                words, filler = keys[~padded].double().mean(), keys[padded].double().mean()
                if words >= MOST and filler <= 1 - MOST:
                    return place
    return ""


def past_facts(subject: Subject) -> dict[str, object]:
    """Return `nothing_past`: two or more attention layers without a residual connection.

    With the output of any one of them zeroed, all rows get the same output.
    """
    layers = [
        (n, m)
        for n, m in subject.model.named_modules()
        if isinstance(m, torch.nn.MultiheadAttention)
    ]
    for _, module in layers[:DEEP]:
        handle = module.register_forward_hook(_nothing)
        try:
            answers = subject.outputs(subject.batch)
        finally:
            handle.remove()
        if not answers or max(map(row_spread, answers)) > SAME_ROWS:
            return {}
    return {"nothing_past": [n for n, _ in layers]} if len(layers) > 1 else {}


def _nothing(module: torch.nn.Module, args: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:])


def attention_facts(subject: Subject) -> dict[str, Any]:
    """Return the unscaled attention of the lowest entropy, if any, and misplaced masks."""
    with torch.no_grad(), undisturbed(subject.model, training=False), AttentionScores() as tape:
        subject.answer(subject.batch)
    plain = [s for s in tape.found if not s["divided"]]
    facts: dict[str, Any] = {"masked_queries": tape.queries} if tape.queries else {}
    facts |= {"over_queries": tape.turned} if tape.turned else {}
    facts |= {"masked_words": place} if (place := _upside_down(subject, tape)) else {}
    return facts | ({"undivided": min(plain, key=lambda s: s["now"])} if plain else {})
