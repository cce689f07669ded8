"""Edits of a model as lines of code: initialisation, module types, norms, residual branches.

Each function reads a model and a batch and returns the lines that change it, or [] if the edit
does not apply. Frozen layers keep their weights. Random draws come from torch's generator.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from tikhon.cures.called_modules import ACTIVATIONS, CalledModules
from tikhon.cures.patch import Line, address
from tikhon.data.nested import Batch
from tikhon.diagnosis.observe import NORMS, RECURRENT, WEIGHTED

GAINS: tuple[tuple[type[nn.Module], float], ...] = (
    (nn.ReLU, math.sqrt(2)),
    (nn.LeakyReLU, math.sqrt(2)),
    (nn.GELU, 1.5),
    (nn.SiLU, 1.7),
    (nn.Mish, 1.6),
    (nn.ELU, 1.2),
    (nn.SELU, 1.0),
    (nn.Softplus, 1.2),
    (nn.Tanh, 1.05),
)
Edit = Callable[[nn.Module, Batch], list[Line]]


class Residual(nn.Module):
    """x + layer(activation(norm(x))): the pre-activation branch of He et al., 2016."""

    def __init__(self, norm, activation, layer):
        super().__init__()
        self.norm, self.activation, self.layer = norm, activation, layer

    def forward(self, x):
        """Return the input plus its branch."""
        return x + self.layer(self.activation(self.norm(x)))


class Affine(nn.Module):
    """(x - shift) / scale with constants; an infinite scale masks a column."""

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the standardised input."""
        return (x - self.shift) / self.scale


class Logarithm(nn.Module):
    """log(x + least)."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        """Return the logarithm of the input."""
        return (x + self.least).log()


def edit_modules(
    kinds: tuple[type[nn.Module], ...], code: str, when: Callable[[Any], bool] = lambda m: True
) -> Edit:
    """Return an edit with one line of code about every module of these types for which `when`."""

    def edit(model: nn.Module, batch: Batch) -> list[Line]:
        found = [(path, m) for path, m in model.named_modules() if isinstance(m, kinds)]
        return [Line(address(model, path), code) for path, m in found if when(m)]

    return edit


# fresh weights


def _activation_gain(activation: nn.Module | None) -> float:
    return next((g for kind, g in GAINS if isinstance(activation, kind)), 1.0)


def _zero_bias(biased: bool) -> str:
    return "\nnn.init.zeros_({at}.bias)" if biased else ""


def _normal(fan_in: int, activation: nn.Module | None, biased: bool) -> str:
    deviation = _activation_gain(activation) / math.sqrt(fan_in)
    return f"nn.init.normal_({{at}}.weight, 0.0, {deviation:.4g}){_zero_bias(biased)}"


def reinit(model: nn.Module, batch: Batch) -> list[Line]:
    """Draw normal weights with the gain of the activation after (He, Xavier); zero the biases."""
    places = CalledModules(model, batch)
    heads = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    lines = [
        places.line(
            m,
            "nn.init.xavier_uniform_({at}.in_proj_weight)\n"
            "nn.init.xavier_uniform_({at}.out_proj.weight)",
        )
        for m in heads
        if m.in_proj_weight is not None and m.in_proj_weight.requires_grad
    ]
    for layer, activation in places.activations_after().items():
        if layer.weight.requires_grad:
            fan_in = layer.weight[0].numel()
            lines.append(places.line(layer, _normal(fan_in, activation, layer.bias is not None)))
    return lines


def lsuv(model: nn.Module, batch: Batch) -> list[Line]:
    """Draw orthogonal weights, scaled until each layer's output has deviation 1 (LSUV)."""
    places = CalledModules(model, batch)
    tuning = (
        "outputs = []\n"
        "handle = {at}.register_forward_hook(lambda module, args, out: outputs.append(out))\n"
        "with torch.no_grad():\n"
        "    for _ in range(4):  # x: a batch of inputs\n"
        "        model(x)\n"
        "        spread = float(outputs[-1].float().std())\n"
        "        if not math.isfinite(spread) or spread == 0 or abs(spread - 1) < 0.1:\n"
        "            break\n"
        "        {at}.weight /= spread\n"
        "handle.remove()"
    )
    return [
        places.line(
            layer,
            f"nn.init.orthogonal_({{at}}.weight, {_activation_gain(activation):.4g})"
            f"{_zero_bias(layer.bias is not None)}\n{tuning}",
        )
        for layer, activation in places.activations_after().items()
        if layer.weight.requires_grad and layer.weight.ndim > 1
    ]


def recurrent_init(model: nn.Module, batch: Batch) -> list[Line]:
    """Draw orthogonal recurrent and Xavier input weights; LSTM forget gates get bias 1."""
    places = CalledModules(model, batch)
    return [
        places.line(m, _recurrent(m.hidden_size, isinstance(m, nn.LSTM)))
        for m in model.modules()
        if isinstance(m, RECURRENT)
    ]


def _recurrent(hidden: int, gated: bool) -> str:
    opened = f'\n    if name.startswith("bias_ih"):\n        p.data[{hidden} : {2 * hidden}] = 1.0'
    return (
        "for name, p in {at}.named_parameters():\n"
        '    if name.startswith("weight_hh"):\n'
        f"        for gate in p.data.split({hidden}):\n"
        "            nn.init.orthogonal_(gate)\n"
        '    elif name.startswith("weight"):\n'
        "        nn.init.xavier_uniform_(p)\n"
        "    else:\n"
        "        nn.init.zeros_(p)" + (opened if gated else "")
    )


def chrono_init(model: nn.Module, batch: Batch, *, closed: bool = True) -> list[Line]:
    """Initialise gates to remember for the length of the sequences (chrono initialisation).

    Biases of the forget (LSTM) or update gates (GRU) are log(U(1, T)) for sequences of T steps.
    An LSTM's input gates get the opposite bias, unless `closed=False`.
    Reference: Tallec and Ollivier, 2018, https://arxiv.org/abs/1804.11188
    """
    gated = (nn.LSTM, nn.GRU) if closed else nn.LSTM
    found = [m for m in model.modules() if isinstance(m, gated) and m.bias]
    places = CalledModules(model, batch) if found else None
    if places is None or places.steps <= 2:
        return []
    lines = []
    for m in found:
        h = m.hidden_size
        code = (
            f"{_recurrent(h, False)}\n"
            'for name, p in {at}.named_parameters():\n    if name.startswith("bias_ih"):\n'
            f"        p.data[{h} : {2 * h}].uniform_(1, {places.steps - 1}).log_()"
        )
        if isinstance(m, nn.LSTM) and closed:
            code += f"\n        p.data[:{h}] = -p.data[{h} : {2 * h}]"
        lines.append(places.line(m, code))
    return lines


# swapped modules


def to_relu(model: nn.Module, batch: Batch, *, normed: bool = False) -> list[Line]:
    """Replace hidden activations by ReLU, with He initialisation and optionally norms."""
    places = CalledModules(model, batch)
    hidden_activations = places.hidden_activations()
    swaps = [
        places.line(m, "{at} = nn.ReLU()")
        for m in hidden_activations
        if not isinstance(m, nn.ReLU)
    ]
    if not swaps:
        return []
    after = {
        k: nn.ReLU() if v in hidden_activations else v
        for k, v in places.activations_after().items()
    }
    fresh = [
        places.line(layer, _normal(layer.weight[0].numel(), behind, layer.bias is not None))
        for layer, behind in after.items()
        if layer.weight.requires_grad
    ]
    return swaps + fresh + (normalise(model, batch) if normed else [])


def to_leaky(model: nn.Module, batch: Batch) -> list[Line]:
    """Replace every hidden ReLU by a leaky ReLU, whose units cannot die."""
    places = CalledModules(model, batch)
    found = [m for m in places.hidden_activations() if isinstance(m, nn.ReLU)]
    return [places.line(m, "{at} = nn.LeakyReLU(0.1)") for m in found]


def to_gru(model: nn.Module, batch: Batch) -> list[Line]:
    """Replace every plain RNN by a GRU of the same size."""
    places = CalledModules(model, batch)
    lines = []
    for m in model.modules():
        if isinstance(m, nn.RNN):
            plain = {
                "num_layers": 1,
                "bias": True,
                "batch_first": False,
                "dropout": 0.0,
                "bidirectional": False,
            }
            options = "".join(
                f", {k}={getattr(m, k)!r}" for k, v in plain.items() if getattr(m, k) != v
            )
            code = f"{{at}} = nn.GRU({m.input_size}, {m.hidden_size}{options})\n"
            lines.append(places.line(m, code + _recurrent(m.hidden_size, False)))
    return lines


def remove_head_activation(model: nn.Module, batch: Batch) -> list[Line]:
    """Remove the activation after the last layer; a softmax over one unit becomes a sigmoid."""
    places = CalledModules(model, batch)
    order = places.order
    last = max((i for i, m in enumerate(order) if isinstance(m, WEIGHTED)), default=len(order))
    head = [m for m in order[last + 1 :] if isinstance(m, ACTIVATIONS)]
    if not head:
        return []
    units = order[last].weight.shape[0]  # type: ignore[union-attr]
    single = isinstance(head[0], nn.Softmax) and units == 1
    return [places.line(head[0], f"{{at}} = nn.{'Sigmoid' if single else 'Identity'}()")]


# norms and residual branches


def normalise(model: nn.Module, batch: Batch, *, batchnorm: bool = True) -> list[Line]:
    """Add a norm after every hidden layer that has none."""
    places = CalledModules(model, batch)
    order = places.order
    lines = []
    for layer in [m for m in order if isinstance(m, WEIGHTED)][:-1]:
        behind = order[order.index(layer) + 1 :]
        norm = _norm_for(layer, batchnorm)
        if norm and layer not in places.fused_parts and not isinstance([*behind, None][0], NORMS):
            lines.append(places.line(layer, f"{{at}} = nn.Sequential({{at}}, {norm})"))
    return sorted(lines, key=lambda line: "".join(c for c in line.at if not c.isdigit()))


def _norm_for(layer: Any, batchnorm: bool) -> str:
    width = layer.weight.shape[0]
    if isinstance(layer, nn.Linear):
        return f"nn.BatchNorm1d({width})" if batchnorm else f"nn.LayerNorm({width})"
    if type(layer) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return ""
    return (
        f"nn.BatchNorm{layer.weight.ndim - 2}d({width})"
        if batchnorm
        else (f"nn.GroupNorm(1, {width})")
    )


def residual(model: nn.Module, batch: Batch) -> list[Line]:
    """Wrap square layers in pre-activation residual branches, and add a norm before the head.

    Activations move into the branches; a hidden softmax becomes GELU.
    """
    places = CalledModules(model, batch)
    after = places.activations_after()
    layers = list(after)
    moved, branches = [], []
    for layer in layers[1:-1] if len(layers) > 2 else []:
        activation = after[layer]
        if isinstance(activation, nn.Softmax):
            inner = "nn.GELU()"
        else:
            inner = f"nn.{activation!r}"
        square = layer.weight.ndim > 1 and layer.weight.shape[0] == layer.weight.shape[1]
        conv = isinstance(layer, nn.modules.conv._ConvNd)
        norm = _norm_for(layer, conv)
        if (
            activation is None
            or layer in places.fused_parts
            or not norm
            or not square
            or (conv and not _same_size(layer))
        ):
            continue
        moved.append(places.line(activation, "{at} = nn.Identity()"))
        branches.append(places.line(layer, f"{{at}} = Residual({norm}, {inner}, {{at}})"))
    if not branches:
        return []
    head = layers[-1]
    closing = []
    if isinstance(head, nn.Linear):
        closing = [
            places.line(head, f"{{at}} = nn.Sequential(nn.LayerNorm({head.in_features}), {{at}})")
        ]
    return [Line("", inspect.getsource(Residual)), *dict.fromkeys(moved), *branches, *closing]


def _same_size(layer: Any) -> bool:
    same = layer.padding == "same" or all(
        2 * p == d * (k - 1) for p, d, k in zip(layer.padding, layer.dilation, layer.kernel_size)
    )
    return same and all(s == 1 for s in layer.stride)


def norm_blocks(model: nn.Module, batch: Batch) -> list[Line]:
    """Add a norm before residual blocks and zero the last layer of their branch.

    For blocks of two or more layers of equal width without a norm, whose outputs grow with depth.
    Reference: Zhang et al., Fixup, 2019, https://arxiv.org/abs/1901.09321
    """
    places = CalledModules(model, batch)
    fronts, ends = [], []
    for parent in model.modules():
        layers: list[Any] = [m for m in parent.children() if isinstance(m, WEIGHTED)]
        normed = parent in places.fused_parts or any(
            isinstance(m, NORMS) for m in parent.children()
        )
        if isinstance(parent, nn.Sequential) or len(layers) < 2 or normed:
            continue
        first, last = layers[0], layers[-1]
        width = first.weight.shape[1]
        if width != last.weight.shape[0]:
            continue
        norm = (
            f"nn.LayerNorm({width})"
            if isinstance(first, nn.Linear)
            else (f"nn.GroupNorm(1, {width})")
        )
        ends.append(
            places.line(last, f"nn.init.zeros_({{at}}.weight){_zero_bias(last.bias is not None)}")
        )
        fronts.append(places.line(first, f"{{at}} = nn.Sequential({norm}, {{at}})"))
    return ends + fronts


# sizes, dropout


def widen(model: nn.Module, batch: Batch, *, width: int | None = None) -> list[Line]:
    """Set the hidden widths of a chain of linear layers to `width`, and reinitialise it."""
    if not isinstance(model, nn.Sequential):
        return []
    linear = [m for m in model if isinstance(m, nn.Linear)]
    other = [m for m in model.modules() if isinstance(m, (*NORMS, *RECURRENT))]
    if (
        len(linear) < 2
        or other
        or any(a.out_features != b.in_features for a, b in pairwise(linear))
    ):
        return []
    size = width or max(64, 2 * max(m.out_features for m in linear[:-1]))
    places = CalledModules(model, batch)
    after = places.activations_after()
    new, fresh = [], []
    for index, layer in enumerate(linear):
        inputs = layer.in_features if index == 0 else size
        outputs = layer.out_features if index == len(linear) - 1 else size
        biased = layer.bias is not None
        bias = "" if biased else ", bias=False"
        new.append(places.line(layer, f"{{at}} = nn.Linear({inputs}, {outputs}{bias})"))
        fresh.append(places.line(layer, _normal(inputs, after.get(layer), biased)))
    return new + fresh


def narrow(model: nn.Module, batch: Batch) -> list[Line]:
    """Reduce the hidden widths of a chain of linear layers to an eighth, at least 8."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    widest = max((m.out_features for m in linear[:-1]), default=0)
    return widen(model, batch, width=max(8, widest // 8)) if widest > 16 else []


def add_dropout(model: nn.Module, batch: Batch, *, rate: float = 0.5) -> list[Line]:
    """Add dropout after every hidden activation."""
    places = CalledModules(model, batch)
    code = f"{{at}} = nn.Sequential({{at}}, nn.Dropout({rate:g}))"
    return [places.line(m, code) for m in places.hidden_activations()]
