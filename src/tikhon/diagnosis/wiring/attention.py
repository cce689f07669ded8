"""Hand-written attention: entropy of its softmax with and without scaling, and its masks."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from tikhon.data.nested import tensors
from tikhon.diagnosis.functions import Function
from tikhon.diagnosis.modes import Args, Functions, Options, function_name, user_line
from tikhon.diagnosis.replica import undisturbed
from tikhon.diagnosis.wiring.padding import lengths
from tikhon.diagnosis.wiring.program import Facts, Program
from tikhon.diagnosis.wiring.rows import relative_spread as row_spread
from tikhon.diagnosis.wiring.torch_calls import DROPOUTS

PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "einsum", "baddbmm"}
SHAPES = set(
    "view reshape transpose permute contiguous flatten unflatten unsqueeze squeeze chunk "
    "split unbind __getitem__ movedim swapaxes".split()
)
SCALINGS = {"mul", "__mul__", "__rmul__", "div", "__truediv__", "true_divide", "normalize"}
MAX_LAYERS = 4  # layers that are zeroed one by one
SAME_ROWS = 1e-6  # relative distance of equal rows
MASKED = -1e4  # scores below are masked
MASKS = {
    "multi_head_attention_forward": "key_padding_mask",
    "scaled_dot_product_attention": "attn_mask",
}
INVERTED = 0.9  # share of tokens masked and of padding visible: the mask is inverted


class AttentionScores(Functions):
    """Context that measures each softmax over products of queries and keys.

    `found` holds per line: the size of queries and keys, whether they were scaled, and the entropy
    relative to uniform attention, as it is and with scores divided by the root of that size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []
        self.query_mask = ""  # place where a mask hides queries instead of keys
        self.query_softmax = ""  # place where a softmax over the queries weights the values
        self.masked_keys: list[tuple[Tensor, str]] = []  # hidden from all queries, and place
        self._over_queries: list[tuple[weakref.ref[Tensor], str]] = []
        self._known_tensors: dict[int, weakref.ref[Tensor]] = {}
        self._scalings: dict[int, tuple[int, bool]] = {}  # tensor: size of its products, divided

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Record the function's result and return it."""
        name = function_name(func)
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        notes = [self._scaling(t) for t in inputs]
        size = max((size for size, _ in notes), default=0)
        divided = any(divided for _, divided in notes)
        output = func(*args, **kwargs)
        if name in MASKS and isinstance(mask := kwargs.get(MASKS[name]), Tensor):
            allowed = mask.dtype == torch.bool and name == "scaled_dot_product_attention"
            self._record_masked_keys(~mask if allowed else mask, user_line())
        if name == "softmax" and size and inputs[0].ndim > 2:
            self._record_query_softmax(inputs[0], output, _axis(args, kwargs), user_line())
            self._measure_entropy(inputs[0], size, divided, (args, kwargs), user_line())
        elif name in PRODUCTS and len(inputs) > 1 and inputs[-1].ndim > 2:
            left = [place for seen, place in self._over_queries if seen() is inputs[0]]
            self.query_softmax = self.query_softmax or next(iter(left), "")
            sizes = {inputs[0].shape[-1], inputs[-1].shape[-2]}
            inner = sizes.pop() if len(sizes) == 1 else int(inputs[0].shape[-1])
            self._set_scaling(output, inner, divided)
        elif name in DROPOUTS and any(seen() is inputs[0] for seen, _ in self._over_queries):
            self._record_query_softmax(inputs[0], output, inputs[0].ndim - 2, user_line())
        elif name in SCALINGS:
            self._set_scaling(output, size, divided or name == "normalize" or _scales(args))
        elif name in SHAPES or size:
            self._set_scaling(output, size, divided)
        return output

    def _record_masked_keys(self, mask: Tensor, place: str) -> None:
        """Record the keys that a mask (True, or far below 0) hides from all queries and heads."""
        with torch._C.DisableTorchFunction():
            masked_keys = mask if mask.dtype == torch.bool else mask.detach() <= MASKED
            if masked_keys.ndim > 1:
                keys = masked_keys.flatten(1, -2).all(1) if masked_keys.ndim > 2 else masked_keys
                self.masked_keys.append((keys.cpu(), place))

    def _record_query_softmax(self, scores: Tensor, output: object, axis: object, at: str) -> None:
        """Record a softmax over the queries in self-attention."""
        square = scores.shape[-1] == scores.shape[-2] > 2
        if square and axis in (-2, scores.ndim - 2) and isinstance(output, Tensor):
            self._over_queries.append((weakref.ref(output), at))

    def _scaling(self, tensor: Tensor) -> tuple[int, bool]:
        known = self._known_tensors.get(id(tensor))
        same = known is not None and known() is tensor
        return self._scalings[id(tensor)] if same else (0, False)

    def _set_scaling(self, output: object, size: int, divided: bool) -> None:
        for part in output if isinstance(output, tuple | list) else (output,):
            if isinstance(part, Tensor) and (size or divided):
                self._known_tensors[id(part)] = weakref.ref(part)
                self._scalings[id(part)] = size, divided

    def _measure_entropy(
        self, scores: Tensor, size: int, divided: bool, call: tuple[Any, Any], place: str
    ) -> None:
        axis = _axis(*call)
        if axis not in (-1, scores.ndim - 1) or scores.shape[-1] < 3:
            return
        with torch._C.DisableTorchFunction():
            self._record_masked_keys(scores, place)
            if _masks_whole_queries(scores):
                self.query_mask = self.query_mask or place
            entropy_now = relative_entropy(scores.detach().double())
            entropy_scaled = relative_entropy(scores.detach().double() / math.sqrt(size))
        if entropy_now is not None and entropy_scaled is not None:
            entropies = {"now": entropy_now, "then": entropy_scaled}
            self.found.append({"size": size, "divided": divided, **entropies, "place": place})


def _axis(args: Args, kwargs: Options) -> object:
    return kwargs.get("dim", args[1] if len(args) > 1 else None)


def _scales(factors: tuple[Any, ...]) -> bool:
    """Whether one of the factors is a single number other than 1."""
    single = [f for f in factors if not isinstance(f, Tensor) or f.numel() == 1]
    return any(isinstance(f, int | float | Tensor) and float(f) != 1 for f in single)


def _masks_whole_queries(scores: Tensor) -> bool:
    """Whether a mask hides all keys from some queries and none from the others."""
    seen = scores.detach() > MASKED
    masked_keys, free = ~seen.any(-1), seen.all(-1)
    return bool(masked_keys.any()) and bool(free.any()) and bool((masked_keys | free).all())


def relative_entropy(scores: Tensor) -> float | None:
    """Return the mean entropy of a softmax over unmasked scores, 1 = uniform."""
    seen = scores > MASKED
    count = seen.sum(-1)
    share = scores.masked_fill(~seen, -math.inf).softmax(-1)
    entropy = -(share * share.clamp_min(1e-30).log()).sum(-1)
    rows = count > 1
    if not bool(rows.any()):
        return None
    return float((entropy[rows] / count[rows].double().log()).mean())


def _find_inverted_mask(program: Program, trace: AttentionScores) -> str:
    """Return the place where a mask hides the tokens and leaves the padding; else ""."""
    for part in tensors(program.batch[0]):
        ends = lengths(part)
        if ends is None:
            continue
        padded = torch.arange(part.shape[1]) >= ends[:, None]
        for keys, place in trace.masked_keys:
            if keys.shape == padded.shape and padded.any():
                on_tokens, on_padding = (keys[m].double().mean() for m in (~padded, padded))
                if on_tokens >= INVERTED and on_padding <= 1 - INVERTED:
                    return place
    return ""


def residual_facts(program: Program) -> Facts:
    """Return `nothing_past`: two or more attention layers without a residual connection.

    With the output of any one of them zeroed, all rows get the same output.
    """
    named = program.model.named_modules()
    layers = [(n, m) for n, m in named if isinstance(m, torch.nn.MultiheadAttention)]
    for _, module in layers[:MAX_LAYERS]:
        with module.register_forward_hook(lambda m, a, out: (torch.zeros_like(out[0]), *out[1:])):
            answers = program.outputs(program.batch)
        if not answers or max(map(row_spread, answers)) > SAME_ROWS:
            return {}
    return {"nothing_past": [n for n, _ in layers]} if len(layers) > 1 else {}


def attention_facts(program: Program) -> dict[str, Any]:
    """Return the unscaled attention of the lowest entropy, if any, and misplaced masks."""
    with torch.no_grad(), undisturbed(program.model, training=False), AttentionScores() as trace:
        program.forward(program.batch)
    plain = [s for s in trace.found if not s["divided"]]
    facts: dict[str, Any] = {"masked_queries": trace.query_mask} if trace.query_mask else {}
    facts |= {"over_queries": trace.query_softmax} if trace.query_softmax else {}
    facts |= {"masked_words": place} if (place := _find_inverted_mask(program, trace)) else {}
    return facts | ({"undivided": min(plain, key=lambda s: s["now"])} if plain else {})
