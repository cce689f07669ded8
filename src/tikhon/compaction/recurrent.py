"""The rule for RNN, GRU and LSTM: a unit of the state is a unit, in each layer and direction."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .analysis import Analysis, Operation
from .units import Units

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
_CANDIDATE = {"LSTM": 2, "GRU": 2, "RNN_TANH": 0, "RNN_RELU": 0}  # the gate that makes the state


@dataclass(frozen=True)
class Cell:
    """One direction of one layer: weights by gate, and the units of its state."""

    inputs: Tensor  # (gates, hidden, in)
    state: Tensor  # (gates, hidden, hidden)
    biases: tuple[Tensor, Tensor]  # (gates, hidden) each
    rows: Tensor  # unit of each state entry
    candidate: int

    @classmethod
    def of(cls, module: nn.RNNBase, suffix: str, rows: Tensor) -> Cell:
        """The cell of parameters that end in `suffix`."""
        gates, size = _GATES[module.mode], module.hidden_size
        weights = {name: tensor.detach() for name, tensor in module.named_parameters()}
        blank = torch.zeros(gates * size)
        return cls(
            weights[f"weight_ih{suffix}"].view(gates, size, -1),
            weights[f"weight_hh{suffix}"].view(gates, size, size),
            (
                weights.get(f"bias_ih{suffix}", blank).view(gates, size),
                weights.get(f"bias_hh{suffix}", blank).view(gates, size),
            ),
            rows,
            _CANDIDATE[module.mode],
        )

    def zero_entries(self, source: Units, *, separate_candidate: bool) -> Tensor:
        """Entries that stay at zero from the zero start on: nothing enters their candidate.

        With `separate_candidate` (GRU) the inputs and the state enter the candidate separately.
        """
        fixed, value = source.uniform(-1)
        weight, state = self.inputs[self.candidate], self.state[self.candidate]
        ours, theirs = (bias[self.candidate].double() for bias in self.biases)
        driven = ours + weight.double() @ torch.where(fixed, value, 0.0)
        rest = (driven.abs() + theirs.abs()) if separate_candidate else (driven + theirs).abs()
        zero = ~((weight != 0) & ~fixed).any(1) & (rest == 0)
        while bool((linked := zero & (state[:, ~zero] != 0).any(1)).any()):
            zero = zero & ~linked
        return zero

    def declare_readers(self, source: Units, zero: Tensor, analysis: Analysis) -> None:
        """Who reads what: the state entries that stay read inputs and one another."""
        fixed, _ = source.uniform(-1)
        linked = (self.state != 0).any(0) & ~zero
        read = (self.inputs != 0).any(0) & ~fixed
        rows = self.rows
        analysis.reads(source.columns(-1), lambda keep: read[keep[rows]].any(0))
        analysis.reads(rows[None], lambda keep: linked[keep[rows]].any(0))
        analysis.readers.append(lambda keep: rows[:1] if not keep[rows].any() else rows[:0])


def suffixes(module: nn.RNNBase) -> Iterator[tuple[int, str]]:
    """(layer, ending of the parameter names) of every cell in order."""
    for layer in range(module.num_layers):
        for direction in ("", "_reverse") if module.bidirectional else ("",):
            yield layer, f"_l{layer}{direction}"


def recurrent(call: Operation, module: nn.RNNBase, analysis: Analysis) -> object:
    """A stack of recurrent layers with a zero initial state; a silent unit is the constant 0."""
    reason = _unsupported(call, module)
    if reason:
        return analysis.refuse(call, reason)
    source, cells, zero_states = call.inputs[0], [], []
    shape, size = call.out[0].shape, module.hidden_size
    directions = 2 if module.bidirectional else 1
    name = call.name
    for layer in range(module.num_layers):
        last = layer == module.num_layers - 1
        label = name if last else f"{name} layer {layer}"
        ids = analysis.produce(label, -1, torch.Size([*shape[:-1], directions * size]))
        rows = ids.reshape(-1, ids.shape[-1])[0]
        zero = []
        for (_, suffix), part in zip(
            [pair for pair in suffixes(module) if pair[0] == layer], rows.split(size), strict=True
        ):
            cell = Cell.of(module, suffix, part)
            zero.append(cell.zero_entries(source, separate_candidate=module.mode == "GRU"))
            cell.declare_readers(source, zero[-1], analysis)
            cells.append(part)
            zero_states.append(zero[-1])
        const = torch.cat(zero).expand(ids.shape)
        source = Units(ids, const, torch.zeros(ids.shape).double())
    analysis.cells[name] = cells
    return source, _final(call, cells, zero_states)


def _final(call: Operation, cells: list[Tensor], zero_states: list[Tensor]) -> object:
    """Units of the last states (layers x directions, batch, hidden), if anybody uses them."""
    if not any(
        user.target is not operator.getitem or (user.args[1] == 1 and user.users)
        for user in call.node.users
    ):
        return None
    first = call.out[1][0] if isinstance(call.out[1], tuple) else call.out[1]
    shape = (len(cells), *(1,) * (first.ndim - 2), -1)
    ids = torch.stack(cells).view(shape).expand(first.shape)
    const = torch.stack(zero_states).view(shape).expand(first.shape)
    units = Units(ids, const, torch.zeros(first.shape).double())
    return (units, units) if isinstance(call.out[1], tuple) else units


def _unsupported(call: Operation, module: nn.RNNBase) -> str:
    first, *others = call.args
    cases = {
        "a projected state (proj_size)": module.proj_size > 0,
        "an initial state is given": bool(others or call.kwargs),
        "packed sequences": not isinstance(first, Tensor),
    }
    return next((reason for reason, holds in cases.items() if holds), "")


def cut_recurrent(
    module: nn.RNNBase,
    source: Units,
    cells: list[Tensor],
    columns: Tensor,
    keep: Tensor,
    *,
    states: bool,
) -> nn.Module:
    """The same stack with the state entries that stay; torch's own module where sizes allow."""
    if bool(columns.all()) and all(bool(keep[rows].all()) for rows in cells):
        return module
    directions = 2 if module.bidirectional else 1
    fixed, value = source.uniform(-1)
    fixed, stays, parts = fixed & ~columns, columns, []
    for (_, suffix), rows in zip(suffixes(module), cells, strict=True):
        if len(parts) and len(parts) % directions == 0:
            stays = torch.cat([keep[cell] for cell in cells[len(parts) - directions : len(parts)]])
            fixed = torch.zeros_like(stays)
            value = torch.zeros(len(stays)).double()
        parts.append(_cell(module, Cell.of(module, suffix, rows), (stays, fixed, value), keep))
    if len(parts) == 1:
        return parts[0]
    time = -2 if module.batch_first or source.ids.ndim == 2 else -3
    return RecurrentStack(
        parts, directions=directions, time=time, states=states, dropout=module.dropout
    )


def _cell(
    module: nn.RNNBase, cell: Cell, source: tuple[Tensor, Tensor, Tensor], keep: Tensor
) -> nn.RNNBase:
    (columns, fixed, value), rows = source, keep[cell.rows]
    ours = cell.biases[0].double() + cell.inputs.double() @ torch.where(fixed, value, 0.0)
    bias = module.bias or bool((ours != 0).any())
    kind: Callable[..., nn.RNNBase] = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(module.mode, nn.RNN)
    plain = {"RNN_TANH": {"nonlinearity": "tanh"}, "RNN_RELU": {"nonlinearity": "relu"}}
    new = kind(
        int(columns.sum()),
        int(rows.sum()),
        bias=bias,
        batch_first=module.batch_first,
        **plain.get(module.mode, {}),
    )
    state = {
        "weight_ih_l0": cell.inputs[:, rows][:, :, columns],
        "weight_hh_l0": cell.state[:, rows][:, :, rows],
    }
    if bias:
        state |= {"bias_ih_l0": ours[:, rows], "bias_hh_l0": cell.biases[1][:, rows]}
    new = new.to(cell.inputs)
    new.load_state_dict({name: tensor.flatten(0, 1) for name, tensor in state.items()})
    return new


class RecurrentStack(nn.Module):
    """Recurrent layers of any sizes, one or both directions, called as torch's stack."""

    def __init__(
        self, cells: list[nn.RNNBase], *, directions: int, time: int, states: bool, dropout: float
    ):
        super().__init__()
        self.cells = nn.ModuleList(cells)
        self.directions, self.time, self.states = directions, time, states
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, object]:
        """(length, batch, in) -> outputs, and the last states if the model looks at them."""
        lasts, outputs = [], []
        for number, cell in enumerate(self.cells):
            backward = number % self.directions == 1
            if number and not backward:
                x, outputs = self.dropout(torch.cat(outputs, -1)), []
            result = cell(x.flip(self.time) if backward else x)
            out = result[0]
            outputs.append(out.flip(self.time) if backward else out)
            lasts.append(result[1])
        return torch.cat(outputs, -1), self._last(lasts)

    def _last(self, lasts: list[Tensor] | list[tuple[Tensor, Tensor]]) -> object:
        if not self.states:
            return None
        if isinstance(self.cells[0], nn.LSTM):
            return torch.cat([last[0] for last in lasts]), torch.cat([last[1] for last in lasts])
        return torch.cat(cast("list[Tensor]", lasts))
