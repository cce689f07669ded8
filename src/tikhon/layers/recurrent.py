"""Noise between the layers and on the recurrent state of LSTM, GRU and RNN."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

from tikhon.layers import functional
from tikhon.layers.noise import NoiseLayer


class _LayerByLayer(nn.RNNBase):
    """The forward of a recurrent stack whose dropout is the child `between_layers`."""

    between_layers: NoiseLayer

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Output and last states, as in torch."""
        if not self.between_layers.training:
            return super().forward(input, hx)
        directions = 2 if self.bidirectional else 1
        states = []
        for k in range(self.num_layers):
            rows = slice(k * directions, (k + 1) * directions)
            initial = None if hx is None else _each(hx, lambda h, rows=rows: h[rows])
            if k > 0:
                input = _noisy(self.between_layers, input)
            input, last = functional_call(self._one(k), self._weights(k), (input, initial))
            states.append(last)
        if isinstance(states[0], tuple):
            return input, tuple(torch.cat(parts) for parts in zip(*states, strict=True))
        return input, torch.cat(states)

    def _weights(self, k: int) -> dict[str, Tensor]:
        names = [name for name, _ in self.named_parameters(recurse=False)]
        names = [n for n in names if n.removesuffix("_reverse").endswith(f"_l{k}")]
        return {n.replace(f"_l{k}", "_l0"): attrgetter(n)(self) for n in names}

    def _one(self, k: int) -> nn.RNNBase:
        """A one-layer module without weights of its own, for layer k."""
        directions = 2 if self.bidirectional else 1
        width = (self.proj_size or self.hidden_size) * directions
        size = self.input_size if k == 0 else width
        arguments = {
            "bias": self.bias,
            "batch_first": self.batch_first,
            "bidirectional": self.bidirectional,
            "device": "meta",
        }
        if isinstance(self, nn.LSTM):
            return nn.LSTM(size, self.hidden_size, proj_size=self.proj_size, **arguments)
        if isinstance(self, nn.GRU):
            return nn.GRU(size, self.hidden_size, **arguments)
        kind = self.mode.removeprefix("RNN_").lower()
        return nn.RNN(size, self.hidden_size, nonlinearity=kind, **arguments)


class LSTM(_LayerByLayer, nn.LSTM):
    """`nn.LSTM` whose dropout is the child `between_layers`; made by `replace_dropout`."""


class GRU(_LayerByLayer, nn.GRU):
    """`nn.GRU` whose dropout is the child `between_layers`; made by `replace_dropout`."""


class RNN(_LayerByLayer, nn.RNN):
    """`nn.RNN` whose dropout is the child `between_layers`; made by `replace_dropout`."""


def _each(hx, function):
    return tuple(map(function, hx)) if isinstance(hx, tuple) else function(hx)


def _noisy(layer: NoiseLayer, x):
    return x._replace(data=layer(x.data)) if isinstance(x, PackedSequence) else layer(x)


class RecurrentDropout(NoiseLayer):
    """Dropout of the hidden state inside an LSTM or GRU, one mask a row for all steps.

    All gates of step t see mask * h(t-1) / (1 - rate), with one mask for each layer and direction
    (Keras draws one for each gate); memory cells and outputs are not touched. Training steps
    through time in Python; evaluation is torch's fused code. Shapes: those of `module`, batched
    and not packed, without projections. `rate` is in [0, 1). Raises ValueError for a rate out of
    range, TypeError for another module or input. Reference: Gal and Ghahramani 2016,
    https://arxiv.org/abs/1512.05287

    >>> layer = RecurrentDropout(nn.GRU(3, 4, batch_first=True), 0.2)
    >>> layer(torch.ones(2, 5, 3))[0].shape
    torch.Size([2, 5, 4])
    """

    def __init__(self, module: nn.LSTM | nn.GRU, rate: float = 0.5) -> None:
        if not isinstance(module, (nn.LSTM, nn.GRU)) or module.proj_size:
            raise TypeError(
                "RecurrentDropout: expected an LSTM or GRU without projections, received "
                f"{module!r}"
            )
        super().__init__(rate)
        self.module = module

    def forward(self, x: Any, hx: Any = None) -> Any:
        """Output and last states, as in torch."""
        if not self.training:
            return self.module(x, hx)
        if isinstance(x, PackedSequence) or x.ndim != 3:
            raise TypeError(f"{self.label}: expected a batched, unpacked sequence of rank 3")
        rnn, states = self.module, []
        x = x.transpose(0, 1) if rnn.batch_first else x
        for k in range(rnn.num_layers):
            if k > 0 and rnn.dropout:
                x = F.dropout(x, rnn.dropout)
            outputs = []
            for direction in range(2 if rnn.bidirectional else 1):
                row = len(states)
                initial = None if hx is None else _each(hx, lambda h, row=row: h[row])
                suffix = f"_l{k}" + "_reverse" * direction
                output, last = self._run(x.flip(0) if direction else x, initial, suffix)
                outputs.append(output.flip(0) if direction else output)
                states.append(last)
            x = torch.cat(outputs, -1)
        x = x.transpose(0, 1) if rnn.batch_first else x
        if isinstance(rnn, nn.LSTM):
            return x, tuple(torch.stack(parts) for parts in zip(*states, strict=True))
        return x, torch.stack(states)

    def _run(self, x: Tensor, initial, suffix: str):
        """One layer in one direction over x (T, N, in)."""
        rnn = self.module
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if rnn.bias else [])]
        w_in, w_state, *biases = (getattr(rnn, name + suffix) for name in names)
        b_in, b_state = biases or (None, None)
        gates = F.linear(x, w_in, b_in)
        h = x.new_zeros(x.shape[1], rnn.hidden_size)
        c = h
        if initial is not None:
            h, c = initial if isinstance(initial, tuple) else (initial, h)
        mask = functional.dropout(torch.ones_like(h), self.rate, generator=self.generator)
        outputs = []
        for gate in gates:
            recurrent = F.linear(h * mask, w_state, b_state)
            if isinstance(rnn, nn.LSTM):
                h, c = _lstm(gate + recurrent, c)
            else:
                h = _gru(gate, recurrent, h)
            outputs.append(h)
        return torch.stack(outputs), (h, c) if isinstance(rnn, nn.LSTM) else h


def _lstm(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(gates: Tensor, recurrent: Tensor, h: Tensor) -> Tensor:
    (r, z, n), (hr, hz, hn) = gates.chunk(3, -1), recurrent.chunk(3, -1)
    z = (z + hz).sigmoid()
    n = (n + (r + hr).sigmoid() * hn).tanh()
    return (1 - z) * n + z * h
