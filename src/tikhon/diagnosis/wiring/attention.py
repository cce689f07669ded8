"""Attention written by hand: how far its softmax looks around, and what dividing would change."""

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
from tikhon.diagnosis.wiring.calls import DROPOUTS
from tikhon.diagnosis.wiring.padding import lengths
from tikhon.diagnosis.wiring.rows import spread as row_spread
from tikhon.diagnosis.wiring.subject import Subject

PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "einsum", "baddbmm"}
SHAPES = set(
    "view reshape transpose permute contiguous flatten unflatten unsqueeze squeeze chunk "
    "split unbind __getitem__ movedim swapaxes".split()
)
SCALINGS = {"mul", "__mul__", "__rmul__", "div", "__truediv__", "true_divide", "normalize"}
DEEP = 4  # layers that are left out one by one
SAME_ROWS = 1e-6  # distance of rows that are alike, of their size
MASKED = -1e4  # scores below it are a mask
MASKS = {
    "multi_head_attention_forward": "key_padding_mask",
    "scaled_dot_product_attention": "attn_mask",
}
MOST = 0.9  # of the words blanked and of the padding seen: the mask is upside down


class AttentionScores(Functions):
    """Context that measures each softmax over products of queries and keys.

    `found` has, by line: the size of queries and keys, whether anything divided them, and the
    share of uniform attention, as it is and with the scores divided by the root of that size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []
        self.queries = ""  # where a mask blanks whole rows of the scores and no keys
        self.turned = ""  # where a softmax over the queries weighs what the keys hold
        self.blank: list[tuple[Tensor, str]] = []  # keys that no query of a row may see, by place
        self._over_queries: list[tuple[weakref.ref[Tensor], str]] = []
        self._kept: dict[int, weakref.ref[Tensor]] = {}
        self._notes: dict[int, tuple[int, bool]] = {}  # tensor: size of its products, divided

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Note what the function makes, and answer as it does."""
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
        """Keep the keys that a mask blanks: true, or far below 0, for all queries and heads."""
        with torch._C.DisableTorchFunction():
            blank = mask if mask.dtype == torch.bool else mask.detach() <= MASKED
            if blank.ndim > 1:
                keys = blank.flatten(1, -2).all(1) if blank.ndim > 2 else blank
                self.blank.append((keys.cpu(), place))

    def _turn(self, scores: Tensor, output: object, axis: object, place: str) -> None:
        """Keep a softmax over the queries of positions that look at each other."""
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
    """Whether a mask blanks all that some queries could see, and nothing of what others see."""
    seen = scores.detach() > MASKED
    blank, free = ~seen.any(-1), seen.all(-1)
    return bool(blank.any()) and bool(free.any()) and bool((blank | free).all())


def spread(scores: Tensor) -> float | None:
    """Mean entropy of a softmax over what is not masked, 1 where all is looked at alike."""
    seen = scores > MASKED
    count = seen.sum(-1)
    share = scores.masked_fill(~seen, -math.inf).softmax(-1)
    entropy = -(share * share.clamp_min(1e-30).log()).sum(-1)
    rows = count > 1
    if not bool(rows.any()):
        return None
    return float((entropy[rows] / count[rows].double().log()).mean())


def _upside_down(subject: Subject, tape: AttentionScores) -> str:
    """Where a mask blanks the words of all rows and leaves their padding; empty otherwise."""
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
    """`nothing_past`: layers of attention without each of which rows are alike, two or more."""
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
    """The softmax of undivided products that looks around least; empty without such attention."""
    with torch.no_grad(), undisturbed(subject.model, training=False), AttentionScores() as tape:
        subject.answer(subject.batch)
    plain = [s for s in tape.found if not s["divided"]]
    facts: dict[str, Any] = {"masked_queries": tape.queries} if tape.queries else {}
    facts |= {"over_queries": tape.turned} if tape.turned else {}
    facts |= {"masked_words": place} if (place := _upside_down(subject, tape)) else {}
    return facts | ({"undivided": min(plain, key=lambda s: s["now"])} if plain else {})
