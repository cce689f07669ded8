"""Architecture against regularization: width x strength, and depth x remedy x strength."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from tikhon.comparison.trainings import Records, train_seeded
from tikhon.data import Dataset, Split, split
from tikhon.errors import InputError
from tikhon.models import MLP
from tikhon.penalties import L2
from tikhon.runs.interrupt import ignore_messages
from tikhon.training.losses import loss_of
from tikhon.training.recipe import Recipe

Remedy = Literal["plain", "he", "norm", "residual"]
REMEDIES: tuple[Remedy, ...] = ("plain", "he", "norm", "residual")


class DeepMLP(nn.Module):
    """Hidden layers of equal width, with LeCun's uniform initialisation ("plain"), He's ("he"),
    LayerNorm before each layer ("norm"), or LayerNorm and residual connections ("residual").
    """

    def __init__(self, features: int, width: int, depth: int, outputs: int, remedy: Remedy):
        super().__init__()
        self.remedy = remedy
        self.first, self.last = nn.Linear(features, width), nn.Linear(width, outputs)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        normed = remedy in ("norm", "residual")
        kind = nn.LayerNorm if normed else nn.Identity
        self.norms = nn.ModuleList(kind(width) for _ in self.hidden)
        if remedy != "plain":
            for layer in (self.first, *self.hidden):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # type: ignore[arg-type]
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ...) -> (rows, outputs)."""
        x = torch.relu(self.first(x.flatten(1)))
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            y = torch.relu(layer(norm(x)))
            x = x + y if self.remedy == "residual" else y
        return self.last(x)


@dataclass(frozen=True)
class Shapes:
    """Result of `balance`: one row for each trained network."""

    rows: tuple[dict[str, object], ...]

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        return {"rows": list(self.rows)}


def balance(
    data: Dataset,
    *,
    widths: Sequence[int] = (),
    depths: Sequence[int] = (),
    strengths: Sequence[float] = (0.0, 1e-4, 1e-3, 1e-2),
    epochs: int = 30,
    lr: float = 1e-3,
    seed: int = 0,
    records: Records | None = None,
    on_event: Callable[[str, int, int], None] | None = None,
) -> Shapes:
    """Measure test scores over width x L2 strength, and over depth x remedy x strength.

    Rows of deep networks include the backprop ratio: the norm of the loss gradient at the first
    weight matrix over that at the last, at step 0 (1 is even, 0 has vanished).

    `records` as for `compare`.

    Raises `InputError` for widths or depths below 1, `Stopped` on a stop request.
    """
    records, on_event = Records() if records is None else records, on_event or ignore_messages
    for name, sizes in (("widths", widths), ("depths", depths)):
        if any(size < 1 for size in sizes):
            raise InputError(f"{name} must be 1 or more, received {list(sizes)}")
    parts = split(data, seed=seed)
    features, outputs = parts.train.x[0].numel(), parts.train.outputs
    plans: list[tuple[dict[str, object], Callable[[], nn.Module]]] = [
        ({"width": w}, lambda w=w: MLP([features, w, outputs])) for w in widths
    ]
    for depth in depths:
        for remedy in REMEDIES:
            make = partial(DeepMLP, features, 64, depth, outputs, remedy)
            plans.append(({"depth": depth, "remedy": remedy}, make))
    rows, total = [], len(plans) * len(strengths)
    for shape, make in plans:
        for strength in strengths:
            on_event(str(shape), len(rows), total)
            settings = shape | {"strength": strength}
            find = partial(_train_shape, make, parts, settings, epochs, lr, seed, records.stop)
            rows.append(records.once(str(settings), find))
    return Shapes(tuple(rows))


def _train_shape(
    make: Callable[[], nn.Module],
    parts: Split,
    settings: dict[str, object],
    epochs: int,
    lr: float,
    seed: int,
    stop: Callable[[], bool],
) -> dict[str, object]:
    """Train one network; return its settings and scores."""
    row, train = dict(settings), parts.train

    def build_model() -> nn.Module:
        model = make()
        if isinstance(model, DeepMLP):
            row["backprop_ratio"] = backprop_ratio(model, train.x[:256], train.y[:256])
        return model

    run = train_seeded(
        build_model,
        [(part.x, part.y) for part in (train, parts.valid, parts.test)],
        Recipe({"*": L2(settings["strength"])}) if settings["strength"] else Recipe(),
        seed=seed,
        stop=stop,
        lr=lr,
        epochs=epochs,
        unit=train.unit,
    )
    return row | {k: v for k, v in (run.metrics or {}).items() if "/loss" not in k}


def backprop_ratio(model: DeepMLP, x: Tensor, y: Tensor) -> float:
    """Return the gradient norm at the first weight matrix over that at the last."""
    loss = loss_of("auto", y)(model(x), y)
    first, last = torch.autograd.grad(loss, [model.first.weight, model.last.weight])
    return float(first.norm() / last.norm().clamp(min=1e-30))
