"""Edits of a model in place: fresh weights, swapped modules, norms and residual branches.

Each takes a model (a copy; never the user's) and a batch, and changes it. Layers that are frozen
keep their weights. Random draws come from torch's generator, so a seed pairs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.diagnosis.feed import Batch, call
from tikhon.diagnosis.observe import NORMS, RECURRENT, WEIGHTED

BOUNDED = (nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Softsign, nn.Hardsigmoid)
SQUASHING = (nn.Sigmoid, nn.Softmax, nn.Softsign, nn.Hardsigmoid, nn.Softplus, nn.LogSoftmax)
ACTIVATIONS = (
    *BOUNDED, *SQUASHING, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
)  # fmt: skip
GAINS: tuple[tuple[type[nn.Module], float], ...] = (
    (nn.ReLU, math.sqrt(2)), (nn.LeakyReLU, math.sqrt(2)), (nn.GELU, 1.5), (nn.SiLU, 1.7),
    (nn.Mish, 1.6), (nn.ELU, 1.2), (nn.SELU, 1.0), (nn.Softplus, 1.2), (nn.Tanh, 1.05),
)  # fmt: skip
Edit = Callable[[nn.Module, Batch], bool]


class Residual(nn.Module):
    """x + layer(activation(norm(x))): the pre-activation residual branch (He et al., 2016)."""

    def __init__(self, norm: nn.Module, activation: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation, self.layer = norm, activation, layer

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the input and its branch."""
        return x + self.layer(self.activation(self.norm(x)))


class Affine(nn.Module):
    """(x - shift) / scale with constants; in front of a model it standardises the inputs."""

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """The standardised input."""
        return (x - self.shift) / self.scale


def children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) of all modules, in the order of registration."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            yield parent, name, child


def in_order(model: nn.Module, batch: Batch) -> list[nn.Module]:
    """Layers and activations in the order in which a forward pass calls them."""
    seen: list[nn.Module] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if module not in seen:
            seen.append(module)

    kinds = (*WEIGHTED, *ACTIVATIONS, *NORMS, *RECURRENT)
    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            call(model, batch[0])
    finally:
        for handle in handles:
            handle.remove()
    return seen


def followers(model: nn.Module, batch: Batch) -> dict[nn.Module, nn.Module | None]:
    """The activation behind each layer with weights; None for the head."""
    found: dict[nn.Module, nn.Module | None] = {}
    last: nn.Module | None = None
    for module in in_order(model, batch):
        if isinstance(module, WEIGHTED):
            found[module] = None
            last = module
        elif isinstance(module, ACTIVATIONS) and last is not None:
            found[last] = found[last] or module
    return found


def place(model: nn.Module, old: nn.Module, new: nn.Module) -> bool:
    """Put `new` where `old` is; False for the model itself."""
    for parent, name, child in children(model):
        if child is old:
            setattr(parent, name, new)
            return True
    return False


# fresh weights


def _trainable(layers: Iterator[nn.Module] | list[nn.Module]) -> list[Any]:
    return [m for m in layers if m.weight.requires_grad]  # type: ignore[union-attr]


@torch.no_grad()
def reinit(model: nn.Module, batch: Batch) -> bool:
    """Normal weights with the gain of the activation behind (He, Xavier), biases zero."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            nn.init.xavier_uniform_(module.in_proj_weight)
            nn.init.xavier_uniform_(module.out_proj.weight)
    after = followers(model, batch)
    for layer in _trainable(list(after)):
        gain = next((g for kind, g in GAINS if isinstance(after[layer], kind)), 1.0)
        nn.init.normal_(layer.weight, 0.0, gain / math.sqrt(layer.weight[0].numel()))
        if layer.bias is not None:
            layer.bias.zero_()
    return bool(after)


@torch.no_grad()
def orthogonal(model: nn.Module, batch: Batch) -> bool:
    """Orthogonal weights with the gain of the activation behind, biases zero."""
    after = followers(model, batch)
    for layer in _trainable(list(after)):
        gain = next((g for kind, g in GAINS if isinstance(after[layer], kind)), 1.0)
        nn.init.orthogonal_(layer.weight, gain)
        if layer.bias is not None:
            layer.bias.zero_()
    return bool(after)


@torch.no_grad()
def lsuv(model: nn.Module, batch: Batch) -> bool:
    """Orthogonal weights, then each layer scaled until its output has deviation 1."""
    if not orthogonal(model, batch):
        return False
    for layer in _trainable(list(followers(model, batch))):
        for _ in range(4):
            outputs: list[Tensor] = []
            handle = layer.register_forward_hook(lambda m, a, o, into=outputs: into.append(o))
            call(model, batch[0])
            handle.remove()
            spread = float(outputs[0].float().std())
            if not math.isfinite(spread) or spread == 0 or abs(spread - 1) < 0.1:
                break
            layer.weight /= spread
    return True


@torch.no_grad()
def recurrent_init(model: nn.Module, batch: Batch) -> bool:
    """Orthogonal recurrent weights, Xavier inputs, LSTM forget gates open (bias 1)."""
    found = False
    for module in model.modules():
        if not isinstance(module, RECURRENT):
            continue
        found = True
        hidden = module.hidden_size
        for name, parameter in module.named_parameters():
            if name.startswith("weight_hh"):
                for gate in parameter.split(hidden):
                    nn.init.orthogonal_(gate)
            elif name.startswith("weight_ih"):
                nn.init.xavier_uniform_(parameter)
            else:
                parameter.zero_()
                if isinstance(module, nn.LSTM) and name.startswith("bias_ih"):
                    parameter[hidden : 2 * hidden] = 1.0
    return found


# swapped modules


def to_relu(model: nn.Module, batch: Batch) -> bool:
    """ReLU for every hidden activation, with weights to match; the head stays."""
    hidden = _hidden_activations(model, batch)
    swapped = [place(model, old, nn.ReLU()) for old in hidden if not isinstance(old, nn.ReLU)]
    return any(swapped) and reinit(model, batch)


def to_leaky(model: nn.Module, batch: Batch) -> bool:
    """Leaky ReLU for every ReLU: units cannot die."""
    hidden = [m for m in _hidden_activations(model, batch) if isinstance(m, nn.ReLU)]
    return any([place(model, old, nn.LeakyReLU(0.1)) for old in hidden])


def _hidden_activations(model: nn.Module, batch: Batch) -> list[nn.Module]:
    order = in_order(model, batch)
    last = max((i for i, m in enumerate(order) if isinstance(m, WEIGHTED)), default=-1)
    return [m for m in order[:last] if isinstance(m, ACTIVATIONS)]


def to_gru(model: nn.Module, batch: Batch) -> bool:
    """A GRU of the same size for every plain RNN: gates keep gradients alive over time."""
    swapped = False
    for module in list(model.modules()):
        if isinstance(module, nn.RNN):
            options = (module.num_layers, module.bias, module.batch_first, module.dropout)
            new = nn.GRU(module.input_size, module.hidden_size, *options,
                         bidirectional=module.bidirectional)  # fmt: skip
            swapped = place(model, module, new) or swapped
    return swapped and recurrent_init(model, batch)


def open_head(model: nn.Module, batch: Batch) -> bool:
    """Without the activation behind the last layer; a softmax over one unit becomes a sigmoid."""
    order = in_order(model, batch)
    last = max((i for i, m in enumerate(order) if isinstance(m, WEIGHTED)), default=len(order))
    head = [m for m in order[last + 1 :] if isinstance(m, ACTIVATIONS)]
    if not head:
        return False
    units = order[last].weight.shape[0]  # type: ignore[union-attr]
    single = isinstance(head[0], nn.Softmax) and units == 1
    return place(model, head[0], nn.Sigmoid() if single else nn.Identity())


# norms and residual branches


def normalise(model: nn.Module, batch: Batch, *, batchnorm: bool = True) -> bool:
    """A norm behind every hidden layer that has none."""
    order = in_order(model, batch)
    layers = [m for m in order if isinstance(m, WEIGHTED)][:-1]
    added = False
    for layer in layers:
        behind = order[order.index(layer) + 1] if order.index(layer) + 1 < len(order) else None
        if isinstance(behind, NORMS):
            continue
        norm = _norm_for(layer, batchnorm)
        if norm is not None:
            added = place(model, layer, nn.Sequential(layer, norm)) or added
    return added


def _norm_for(layer: Any, batchnorm: bool) -> nn.Module | None:
    width = layer.weight.shape[0]
    if isinstance(layer, nn.Linear):
        return nn.BatchNorm1d(width) if batchnorm else nn.LayerNorm(width)
    kinds = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
    kind = kinds.get(type(layer))
    if kind is None:
        return None
    return kind(width) if batchnorm else nn.GroupNorm(1, width)


def residual(model: nn.Module, batch: Batch) -> bool:
    """Pre-activation residual branches around square layers, and a norm before the head.

    Bounded and squashing activations become GELU inside the branches of vanishing stacks only
    where they are softmax; others are kept.
    """
    after = followers(model, batch)
    layers = list(after)
    added = False
    for layer in layers[1:-1] if len(layers) > 2 else []:
        activation = after[layer]
        square = layer.weight.shape[0] == layer.weight.shape[1]  # type: ignore[union-attr,index]
        keeps = not isinstance(layer, nn.modules.conv._ConvNd) or _same_size(layer)
        norm = _norm_for(layer, isinstance(layer, nn.modules.conv._ConvNd))
        if activation is None or norm is None or not square or not keeps:
            continue
        inner: nn.Module = nn.GELU() if isinstance(activation, nn.Softmax) else activation
        if place(model, activation, nn.Identity()):
            added = place(model, layer, Residual(norm, inner, layer)) or added
    head: Any = layers[-1] if layers else None
    if added and isinstance(head, nn.Linear):
        place(model, head, nn.Sequential(nn.LayerNorm(head.in_features), head))
    return added


def _same_size(layer: Any) -> bool:
    same = layer.padding == "same" or all(
        2 * p == d * (k - 1) for p, d, k in zip(layer.padding, layer.dilation, layer.kernel_size)
    )
    return same and all(s == 1 for s in layer.stride)


def norm_blocks(model: nn.Module, batch: Batch) -> bool:
    """A LayerNorm for every `Identity` that stands where a block's norm would, and a zero branch.

    Residual blocks without norms grow with depth: each block starts as the identity instead.
    """
    found = False
    for parent in model.modules():
        layers = [m for m in parent.children() if isinstance(m, nn.Linear)]
        idle = [(n, m) for n, m in parent.named_children() if isinstance(m, nn.Identity)]
        if isinstance(parent, nn.Sequential) or len(layers) < 2:
            continue
        square = layers[0].in_features == layers[-1].out_features
        if not square:
            continue
        found = True
        with torch.no_grad():
            layers[-1].weight.zero_()
            if layers[-1].bias is not None:
                layers[-1].bias.zero_()
        for name, _ in idle[:1]:
            setattr(parent, name, nn.LayerNorm(layers[0].in_features))
    return found


# sizes, dropout, scales


def widen(model: nn.Module, batch: Batch, *, width: int | None = None) -> bool:
    """Hidden widths of a chain of linear layers raised to `width`, with fresh weights."""
    if not isinstance(model, nn.Sequential):
        return False
    linear = [m for m in model if isinstance(m, nn.Linear)]
    other = [m for m in model.modules() if isinstance(m, (*NORMS, *RECURRENT))]
    if len(linear) < 2 or other or any(a.out_features != b.in_features
                                       for a, b in pairwise(linear)):  # fmt: skip
        return False
    size = width or max(64, 2 * max(m.out_features for m in linear[:-1]))
    for index, layer in enumerate(linear):
        inputs = layer.in_features if index == 0 else size
        outputs = layer.out_features if index == len(linear) - 1 else size
        new = nn.Linear(inputs, outputs, layer.bias is not None)
        place(model, layer, new.to(layer.weight))
    return reinit(model, batch)


def narrow(model: nn.Module, batch: Batch) -> bool:
    """Hidden widths of a chain of linear layers at an eighth, at least 8."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if len(linear) < 2:
        return False
    widest = max(m.out_features for m in linear[:-1])
    return widest > 16 and widen(model, batch, width=max(8, widest // 8))


def add_dropout(model: nn.Module, batch: Batch, *, rate: float = 0.5) -> bool:
    """Dropout behind every hidden activation."""
    hidden = _hidden_activations(model, batch)
    return any([place(model, m, nn.Sequential(m, nn.Dropout(rate))) for m in hidden])


def ease_dropout(model: nn.Module, batch: Batch, *, rate: float = 0.2) -> bool:
    """All dropout rates at most `rate`."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    eased = [m for m in layers if m.p > rate]
    for layer in eased:
        layer.p = rate
    return bool(eased)
