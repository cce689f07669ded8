"""Treatments of calls over time: attention masks, padding, causal convolutions."""

from __future__ import annotations

from tikhon.cures.calls import SOFTMAXES, calls_to, line_if_any
from tikhon.diagnosis.wiring.torch_calls import Call


def causal_mask(calls: list[Call]) -> list[str]:
    """Mask later positions in attention; pad convolutions on the left."""
    square = [
        c
        for c in calls_to(calls, *SOFTMAXES)
        if len(c.shapes[0]) > 2 and c.shapes[0][-1] == c.shapes[0][-2]
    ]
    return [
        *line_if_any(
            calls_to(calls, "multi_head_attention_forward"),
            'if name == "multi_head_attention_forward" and len(args[0]) == len(args[1]):\n'
            "    late = torch.ones(len(args[0]), len(args[0]), dtype=torch.bool).triu(1)\n"
            '    kwargs = {**kwargs, "attn_mask": late.to(args[0].device), "is_causal": False}',
        ),
        *line_if_any(
            calls_to(calls, "scaled_dot_product_attention"),
            'if name == "scaled_dot_product_attention":\n'
            '    return function(*args[:3], **{**kwargs, "attn_mask": None, "is_causal": True})',
        ),
        *line_if_any(
            square,
            f"if name in {SOFTMAXES} and args[0].ndim > 2 and (\n"
            "    args[0].shape[-1] == args[0].shape[-2]\n):\n"
            "    late = torch.ones_like(args[0], dtype=torch.bool).triu(1)\n"
            '    args = (args[0].masked_fill(late, float("-inf")), *args[1:])',
        ),
        *line_if_any(
            calls_to(calls, "conv1d"),
            'if name == "conv1d":\n'
            '    words = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")\n'
            "    given = {**dict(zip(words, args)), **kwargs}\n"
            '    apart = given.get("dilation", 1)\n'
            "    apart = apart if isinstance(apart, int) else apart[0]\n"
            '    if given.get("padding", 0) not in (0, (0,)):\n'
            '        front = apart * (given["weight"].shape[2] - 1)\n'
            '        given["input"] = nn.functional.pad(given["input"], (front, 0))\n'
            '        return function(**{**given, "padding": 0})',
        ),
    ]


def invert_masks(calls: list[Call]) -> list[str]:
    """Invert attention masks."""
    return [
        *line_if_any(
            calls_to(calls, "multi_head_attention_forward"),
            'if name == "multi_head_attention_forward":\n'
            '    mask = kwargs.get("key_padding_mask")\n'
            "    if mask is not None:\n"
            '        shown = ~mask if mask.dtype == torch.bool else mask > float("-inf")\n'
            '        kwargs = {**kwargs, "key_padding_mask": shown}',
        ),
        *line_if_any(
            calls_to(calls, "scaled_dot_product_attention"),
            'if name == "scaled_dot_product_attention":\n'
            '    mask = kwargs.get("attn_mask", (*args, None)[3] if len(args) > 3 else None)\n'
            "    if mask is not None and mask.dtype == torch.bool:\n"
            '        return function(*args[:3], **{**kwargs, "attn_mask": ~mask})',
        ),
        *line_if_any(
            calls_to(calls, "masked_fill"),
            'if name == "masked_fill":\n    args = (args[0], ~args[1], *args[2:])',
        ),
    ]


def key_masks(calls: list[Call]) -> list[str]:
    """Apply attention masks to the keys, the last axis, instead of the queries."""
    found = [
        c
        for c in calls_to(calls, "masked_fill")
        if len(c.shapes) > 1 and len(c.shapes[1]) > 2 and c.shapes[1][-1] == 1 != c.shapes[1][-2]
    ]
    return line_if_any(
        found,
        'if name == "masked_fill" and args[1].ndim > 2 and args[1].shape[-1] == 1:\n'
        "    args = (args[0], args[1].transpose(-1, -2), *args[2:])",
    )


RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
# inputs, state, weights, biases, layers, dropout, training, both directions, rows first
PACKED = f"""\
if name in {RECURRENT} and len(args) == 9 and (
    args[0].shape[:2] == (self.padding.shape if args[8] else self.padding.T.shape)
):
    ends = (~self.padding).sum(1).clamp_min(1).cpu()
    rows = nn.utils.rnn.pack_padded_sequence(args[0], ends, args[8], enforce_sorted=False)
    order, back = rows.sorted_indices, rows.unsorted_indices
    many = isinstance(args[1], tuple)
    state = tuple(h[:, order] for h in args[1]) if many else args[1][:, order]
    answer, *state = function(rows.data, rows.batch_sizes, state, *args[2:8])
    answer = nn.utils.rnn.PackedSequence(answer, rows.batch_sizes, order, back)
    answer, _ = nn.utils.rnn.pad_packed_sequence(
        answer, args[8], total_length=self.padding.shape[1]
    )
    return (answer, *(h[:, back] for h in state))"""


def skip_padding(calls: list[Call]) -> list[str]:
    """Exclude padding from means, maxima, last steps, attention and recurrent layers."""
    names = {c.name for c in calls}
    over_time = "(*args, *kwargs.values())[1:2] in ((1,), ((1,),), ([1],))"
    there = "    there = ~self.padding.reshape(*self.padding.shape, *[1] * (args[0].ndim - 2))\n"
    lines = {
        ("mean",): f'if name == "mean" and args[0].shape[:2] == self.padding.shape and (\n'
        f"    {over_time}\n):\n{there}"
        "    return (args[0] * there).sum(1) / there.sum(1).clamp_min(1)",
        ("max", "amax"): 'if name in ("max", "amax") and ('
        "\n    args[0].shape[:2] == self.padding.shape\n) and (\n"
        f"    {over_time}\n):\n{there}"
        "    args = (args[0].masked_fill(~there, -1e9), *args[1:])",
        ("__getitem__",): 'if name == "__getitem__" and isinstance(args[1], tuple) and (\n'
        "    args[0].shape[:2] == self.padding.shape and args[1] == (slice(None), -1)\n):\n"
        "    last = ((~self.padding).sum(1) - 1).clamp_min(0)\n"
        "    return args[0][torch.arange(len(last)), last]",
        ("multi_head_attention_forward",): 'if name == "multi_head_attention_forward":\n'
        '    kwargs = {**kwargs, "key_padding_mask": self.padding}',
        ("softmax",): 'if name == "softmax" and args[0].ndim > 1 and (\n'
        "    (len(args[0]), args[0].shape[-1]) == self.padding.shape\n):\n"
        "    hidden = self.padding.reshape(len(args[0]), *[1] * (args[0].ndim - 2), -1)\n"
        "    args = (args[0].masked_fill(hidden, -1e9), *args[1:])",
        RECURRENT: PACKED,
    }
    return [line for known, line in lines.items() if names & set(known)]
