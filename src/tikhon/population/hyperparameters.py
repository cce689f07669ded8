"""Hyperparameters of population members, as vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from tikhon.options import STRENGTHS, split_name

Value = float | int | str | bool
PENALTIES = tuple(name for name, option in STRENGTHS.items() if option.how == "objective")


@dataclass(frozen=True, eq=False)
class Hyperparameters:
    """Hyperparameters as float64 vectors (members,); None or empty where unused.

    Rates and strengths are keyed by parameter pattern, "*" for the whole model; `penalties` by the
    names used in configurations, including `max_norm`.
    """

    lr: Tensor
    label_smoothing: Tensor | None = None
    mixup: Tensor | None = None
    clip_norm: Tensor | None = None
    adaptive: bool = False
    rates: Mapping[str, Tensor] = field(default_factory=dict)  # by pattern, replacing lr
    dropout: Mapping[str, Tensor] = field(default_factory=dict)
    weight_decay: Mapping[str, Tensor] = field(default_factory=dict)
    penalties: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, configs: Sequence[Mapping[str, Value]], *, lr: float = 1e-3) -> Hyperparameters:
        """Build from configurations with equal keys; `lr` is the default learning rate."""

        def column(name: str) -> Tensor | None:
            if name not in configs[0]:
                return None
            return torch.tensor([float(c[name]) for c in configs], dtype=torch.float64)

        adaptive = configs[0].get("weight_decay") == "auto"
        rates = column("lr")
        by_pattern: dict[str, dict[str, Tensor]] = {"lr": {}, "dropout": {}, "weight_decay": {}}
        penalties = {}
        for name in configs[0]:
            base, pattern = split_name(name)
            if name != "lr" and base in by_pattern and not (base == "weight_decay" and adaptive):
                by_pattern[base][pattern] = cast(Tensor, column(name))
            elif base in PENALTIES or base == "max_norm":
                penalties[name] = cast(Tensor, column(name))
        return cls(
            lr=torch.full((len(configs),), lr, dtype=torch.float64) if rates is None else rates,
            adaptive=adaptive,
            penalties=penalties,
            rates=by_pattern["lr"],
            dropout=by_pattern["dropout"],
            weight_decay=by_pattern["weight_decay"],
            label_smoothing=column("label_smoothing"),
            mixup=column("mixup"),
            clip_norm=column("clip_norm"),
        )
