"""Hyperparameters of the members of a population, as vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tikhon.options import STRENGTHS

Value = float | int | str | bool
PENALTIES = tuple(name for name, told in STRENGTHS.items() if told.how == "objective")


@dataclass(frozen=True, eq=False)
class Settings:
    """Hyperparameters as vectors (members,), in float64; None for what no member uses."""

    lr: Tensor
    dropout: Tensor | None = None
    label_smoothing: Tensor | None = None
    mixup: Tensor | None = None
    clip_norm: Tensor | None = None
    max_norm: Tensor | None = None
    weight_decay: Tensor | None = None
    adaptive: bool = False
    penalties: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, configs: Sequence[Mapping[str, Value]], *, lr: float = 1e-3) -> Settings:
        """From configurations with the same entries; `lr` where they give none."""

        def column(name: str) -> Tensor | None:
            if name not in configs[0]:
                return None
            return torch.tensor([float(c[name]) for c in configs], dtype=torch.float64)

        adaptive = configs[0].get("weight_decay") == "auto"
        rates = column("lr")
        columns = {n: column(n) for n in ("dropout", "label_smoothing", "mixup", "clip_norm")}
        found = {name: column(name) for name in PENALTIES}
        return cls(
            lr=torch.full((len(configs),), lr, dtype=torch.float64) if rates is None else rates,
            max_norm=column("max_norm"),
            weight_decay=None if adaptive else column("weight_decay"),
            adaptive=adaptive,
            penalties={name: values for name, values in found.items() if values is not None},
            **columns,
        )
