"""Find every source of noise in a model: modules that draw random numbers, and their rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from tikhon.layers.noise import NoiseLayer
from tikhon.wrappers import named_modules

ALWAYS_ON = (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


@dataclass(frozen=True)
class NoiseSource:
    """One module that draws random numbers.

    `path` is its place in the model, `kind` its class and `training` its mode. `attribute` holds
    the `rate` (None: it has none, as RReLU); `moving` tells that the rate is a buffer or parameter
    of a tikhon layer, which `set_rate` changes.
    """

    path: str
    kind: str
    attribute: str | None
    rate: float | None
    moving: bool
    training: bool


@dataclass(frozen=True)
class NoiseAudit:
    """The sources of noise of a model, in module order; prints as a table."""

    sources: tuple[NoiseSource, ...]

    def __iter__(self) -> Iterator[NoiseSource]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    def __str__(self) -> str:
        if not self.sources:
            return "no source of noise"
        rows = [("path", "kind", "rate", "moves", "mode")]
        for s in self.sources:
            rate = "-" if s.rate is None else f"{s.rate:.4g}"
            mode = "training" if s.training else "evaluation"
            moves = "yes" if s.moving else f"no ({s.attribute})" if s.attribute else "no"
            rows.append((s.path or "(model)", s.kind, rate, moves, mode))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows
        )
        return "\n".join(line.rstrip() for line in lines)


def audit(model: nn.Module) -> NoiseAudit:
    """List every source of noise in `model` with its rate.

    It finds tikhon's layers; torch's dropouts, RReLU and fractional pooling; the float rates of
    MultiheadAttention, LSTM, GRU and RNN; and modules of other libraries with a float attribute
    named after dropout (`drop_prob`, `attention_dropout`, ...). A call of `F.dropout` with a
    literal rate is not visible in a module and is not found.

    >>> print(audit(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3))))
    path  kind     rate  moves   mode
    1     Dropout  0.3   no (p)  training
    """
    return NoiseAudit(tuple(source for source, _ in noise_sources(model)))


def noise_sources(model: nn.Module) -> Iterator[tuple[NoiseSource, nn.Module]]:
    """Yield every source with its module."""
    for path, module in named_modules(model):
        for attribute, rate in _rates(module):
            moving = isinstance(module, NoiseLayer)
            kind = type(module).__name__
            yield NoiseSource(path, kind, attribute, rate, moving, module.training), module


def _rates(module: nn.Module) -> list[tuple[str | None, float | None]]:
    if isinstance(module, NoiseLayer):
        return [("rate", module.rate.mean().item())]
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return [("p", float(module.p))]
    if isinstance(module, (nn.RReLU, *ALWAYS_ON)):
        return [(None, None)]
    if isinstance(module, nn.RNNBase) and module.num_layers == 1:
        return []  # torch drops only between layers
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return [("dropout", float(module.dropout))] if module.dropout > 0 else []
    names = [n for n in vars(module) if "drop" in n.lower()]
    if any(word in type(module).__name__ for word in ("Drop", "StochasticDepth")):
        names += [n for n in ("p", "prob", "rate") if n in vars(module)]
    found = [(n, getattr(module, n)) for n in names]
    return [(n, v) for n, v in found if isinstance(v, float) and 0 < v <= 1]
