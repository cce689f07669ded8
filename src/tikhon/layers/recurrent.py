"""Noise between layers, on states and on recurrent weights of LSTM, GRU and RNN."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from tikhon.errors import describe
from tikhon.layers import functional
from tikhon.layers.dropout import Dropout
from tikhon.layers.masks import is_batched
from tikhon.layers.noise import NoiseLayer

State = Tensor | tuple[Tensor, ...]  # for an LSTM hidden state and cells
Noise = Callable[[Tensor], Tensor]
Weights = Mapping[str, Tensor | None]
Result = tuple[Tensor | PackedSequence, State]  # output and last states, as in torch
KERNELS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


class _NoiseBetweenLayers(nn.RNNBase):
    """The forward of a recurrent stack whose dropout is the child `between_layers`."""

    between_layers: NoiseLayer

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> Any:
        """Output and last states, as in torch."""
        if not self.between_layers.training:
            return super().forward(input, hx)
        return _run_stack(self, self._parameters, input, hx)


class LSTM(_NoiseBetweenLayers, nn.LSTM):
    """`nn.LSTM` whose dropout is the child `between_layers`; made by `replace_dropout`."""


class GRU(_NoiseBetweenLayers, nn.GRU):
    """`nn.GRU` whose dropout is the child `between_layers`; made by `replace_dropout`."""


class RNN(_NoiseBetweenLayers, nn.RNN):
    """`nn.RNN` whose dropout is the child `between_layers`; made by `replace_dropout`."""


class _RecurrentNoise(NoiseLayer):
    """An LSTM, GRU or RNN with noise inside, which takes the place of the module.

    It adopts the module's parameters under their names; keeping the module would break every
    compiled graph, because `torch.compile` does not enter those classes.
    """

    rowwise: bool = False

    def __init__(self, module: nn.RNNBase, rate: float = 0.5) -> None:
        kind = type(self).__name__
        if not isinstance(module, nn.RNNBase):
            raise TypeError(f"{kind}: expected an LSTM, GRU or RNN, received {describe(module)}")
        if is_parametrized(module):
            raise TypeError(f"{kind}: parametrized weights cannot be adopted, received {module!r}")
        super().__init__(rate)
        self.mode: str = module.mode
        self.input_size: int = module.input_size
        self.hidden_size: int = module.hidden_size
        self.num_layers: int = module.num_layers
        self.proj_size: int = module.proj_size
        self.bias: bool = module.bias
        self.batch_first: bool = module.batch_first
        self.bidirectional: bool = module.bidirectional
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        between = module.num_layers > 1 and module.dropout > 0
        self.between_layers: Dropout | None = Dropout(module.dropout) if between else None

    @abstractmethod
    def forward(self, x: Tensor | PackedSequence, hx: State | None = None) -> Result:  # type: ignore[override]
        """Output and last states, as in torch."""

    def extra_repr(self) -> str:
        """The rate and the sizes."""
        return (
            f"{super().extra_repr()}, {self.mode}({self.input_size}, {self.hidden_size}), "
            f"num_layers={self.num_layers}"
        )


class WeightDrop(_RecurrentNoise):
    """DropConnect on the hidden-to-hidden weights of an LSTM, GRU or RNN, one mask for all steps.

    It replaces the module and adopts its parameters: `model.rnn = WeightDrop(model.rnn)` changes
    no name. Shapes: those of `module`. `rate` is in [0, 1]. Raises TypeError for another module.
    Reference: Merity et al. 2018, https://arxiv.org/abs/1708.02182

    >>> WeightDrop(nn.LSTM(3, 4), 0.5)(torch.ones(5, 1, 3))[0].shape
    torch.Size([5, 1, 4])
    """

    def forward(self, x: Tensor | PackedSequence, hx: State | None = None) -> Result:
        """Output and last states, as in torch."""
        weights: dict[str, Tensor | None] = dict(self._parameters)
        if self.training:
            for name, weight in list(weights.items()):
                if weight is not None and name.startswith("weight_hh"):
                    weights[name] = functional.dropout(weight, self.rate, generator=self.generator)
        return _run_stack(self, weights, x, hx)


class RecurrentDropout(_RecurrentNoise):
    """Dropout of the hidden state inside an LSTM or GRU, one mask per row for all steps.

    All gates of step t see mask * h(t-1) / (1 - rate), with one mask for each layer and direction
    (Keras draws one for each gate); memory cells and outputs are not changed. It replaces the
    module and adopts its parameters: `model.rnn = RecurrentDropout(model.rnn)` changes no name.
    Training steps through time in Python; evaluation is torch's fused code. Shapes: those of
    `module`, in training not packed. `rate` is in [0, 1]. Raises TypeError for another module or
    input. Reference: Gal and Ghahramani 2016, https://arxiv.org/abs/1512.05287

    >>> layer = RecurrentDropout(nn.GRU(3, 4, batch_first=True), 0.2)
    >>> layer(torch.ones(2, 5, 3))[0].shape
    torch.Size([2, 5, 4])
    """

    rowwise = True

    def __init__(self, module: nn.LSTM | nn.GRU, rate: float = 0.5) -> None:
        if not isinstance(module, (nn.LSTM, nn.GRU)):
            raise TypeError(
                f"RecurrentDropout: expected an LSTM or GRU, received {describe(module)}"
            )
        super().__init__(module, rate)

    def forward(self, x: Tensor | PackedSequence, hx: State | None = None) -> Result:
        """Output and last states, as in torch."""
        if not self.training:
            return _run_stack(self, self._parameters, x, hx)
        if isinstance(x, PackedSequence):
            raise TypeError(f"{self.label}: a packed sequence has no steps, pad it")
        return _run_stack(self, self._parameters, x, hx, state_noise=self._mask)

    def _mask(self, h: Tensor) -> Tensor:
        return functional.dropout(torch.ones_like(h), self.rate, generator=self.generator)


Layers = _NoiseBetweenLayers | _RecurrentNoise


def _run_stack(
    rnn: Layers,
    weights: Weights,
    input: Tensor | PackedSequence,
    hx: State | None,
    *,
    state_noise: Noise | None = None,
) -> Result:
    """Run a recurrent stack of these sizes and weights; `state_noise(h)` masks its states."""
    packed = input if isinstance(input, PackedSequence) else None
    x = input.data if isinstance(input, PackedSequence) else input
    sizes = None if packed is None else packed.batch_sizes
    if x.ndim not in ((2, 3) if packed is None else (2,)) or x.shape[-1] != rnn.input_size:
        where = rnn.label if isinstance(rnn, NoiseLayer) else type(rnn).__name__
        raise ValueError(
            f"{where}: expected (time, batch, {rnn.input_size}) or without a batch, "
            f"received shape {tuple(x.shape)}"
        )
    single = packed is None and x.ndim == 2
    if single:
        x = x.unsqueeze(1)
        hx = None if hx is None else _map_state(hx, lambda h: h.unsqueeze(1))
    elif packed is None and rnn.batch_first:
        x = x.transpose(0, 1)
    if packed is not None and packed.sorted_indices is not None and hx is not None:
        order = packed.sorted_indices
        hx = _map_state(hx, lambda h: h.index_select(1, order))
    if hx is None:
        hx = _zeros(rnn, x, x.shape[1] if sizes is None else int(sizes[0]))
    fused = state_noise is None and not _needs_unrolling(rnn, x, weights)
    states = []
    directions = 2 if rnn.bidirectional else 1
    for k in range(rnn.num_layers):
        if k > 0 and rnn.between_layers is not None:
            x = rnn.between_layers(x)
        rows = slice(k * directions, (k + 1) * directions)
        initial = _map_state(hx, lambda h, rows=rows: h[rows])
        suffixes = [f"_l{k}", f"_l{k}_reverse"][:directions]
        own = [_weights_of(weights, suffix) for suffix in suffixes]
        if fused or sizes is not None:
            x, last = _fused(rnn, own, x, initial, sizes)
        else:
            x, last = _unrolled(rnn, own, x, initial, state_noise)
        states.append(last)
    last = tuple(torch.cat(parts) for parts in zip(*states, strict=True))
    if packed is not None and packed.unsorted_indices is not None:
        back = packed.unsorted_indices
        last = tuple(h.index_select(1, back) for h in last)
    if single:
        x, last = x.squeeze(1), tuple(h.squeeze(1) for h in last)
    elif packed is None and rnn.batch_first:
        x = x.transpose(0, 1)
    output = x if packed is None else packed._replace(data=x)
    return output, last if rnn.mode == "LSTM" else last[0]


def _needs_unrolling(rnn: Layers, x: Tensor, weights: Weights) -> bool:
    """Return whether torch's fused kernel is unusable: under `vmap` or with symbolic sizes."""
    if torch.compiler.is_compiling():
        return isinstance(rnn, NoiseLayer)  # torch.compile does not enter the others
    return is_batched(x) or any(is_batched(w) for w in weights.values() if w is not None)


def _map_state(hx: State, function: Noise) -> State:
    return tuple(map(function, hx)) if isinstance(hx, tuple) else function(hx)


def _zeros(rnn: Layers, x: Tensor, batch: int) -> State:
    count = rnn.num_layers * (2 if rnn.bidirectional else 1)
    h = x.new_zeros(count, batch, rnn.proj_size or rnn.hidden_size)
    return (h, x.new_zeros(count, batch, rnn.hidden_size)) if rnn.mode == "LSTM" else h


def _weights_of(weights: Weights, suffix: str) -> list[Tensor]:
    """Return weights and biases of one layer and direction, in the order of torch's kernels."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    found = (weights.get(kind + suffix) for kind in kinds)
    return [weight for weight in found if weight is not None]


def _fused(
    rnn: Layers,
    own: Sequence[Sequence[Tensor]],
    x: Tensor,
    initial: State | None,
    sizes: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    flat = [weight for weights in own for weight in weights]
    options = (flat, rnn.bias, 1, 0.0, rnn.training, rnn.bidirectional)
    kernel = KERNELS[rnn.mode]
    if sizes is None:
        output, *last = kernel(x, initial, *options, False)
    else:
        output, *last = kernel(x, sizes, initial, *options)
    return output, tuple(last)


def _unrolled(
    rnn: Layers, own: Sequence[Sequence[Tensor]], x: Tensor, initial: State, noise: Noise | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run step by step: for masks on states, and for `vmap`, which has no fused rule."""
    initial = initial if isinstance(initial, tuple) else (initial,)
    outputs, lasts = [], []
    for direction, weights in enumerate(own):
        state = tuple(h[direction] for h in initial)
        mask = None if noise is None else noise(state[0])
        output, last = _run_direction(rnn, weights, x.flip(0) if direction else x, state, mask)
        outputs.append(output.flip(0) if direction else output)
        lasts.append(last)
    return torch.cat(outputs, -1), tuple(torch.stack(parts) for parts in zip(*lasts, strict=True))


def _run_direction(
    rnn: Layers,
    weights: Sequence[Tensor],
    x: Tensor,
    state: tuple[Tensor, ...],
    mask: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one layer in one direction over x (T, N, in)."""
    w_in, w_state, *others = weights
    b_in, b_state = others[:2] if rnn.bias else (None, None)
    step, outputs = STEPS[rnn.mode], []
    for gate in F.linear(x, w_in, b_in).unbind():
        h = state[0] if mask is None else state[0] * mask
        state = step(gate, F.linear(h, w_state, b_state), *state)
        if rnn.proj_size:
            state = (F.linear(state[0], others[-1]), state[1])
        outputs.append(state[0])
    return torch.stack(outputs), state


def _lstm(gates: Tensor, recurrent: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    i, f, g, o = (gates + recurrent).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(gates: Tensor, recurrent: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    (r, z, n), (hr, hz, hn) = gates.chunk(3, -1), recurrent.chunk(3, -1)
    z = (z + hz).sigmoid()
    n = (n + (r + hr).sigmoid() * hn).tanh()
    return ((1 - z) * n + z * h,)


STEPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": lambda gates, recurrent, h: ((gates + recurrent).tanh(),),
    "RNN_RELU": lambda gates, recurrent, h: ((gates + recurrent).relu(),),
}
