"""Permutation importance: the rise of the loss when one column is shuffled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.numbers import certain
from tikhon.training.losses import Loss
from tikhon.training.measures import predict

MOST_COLUMNS = 100
MOST_ROWS = 2_000
_REPEATS = 5


@torch.no_grad()
def importances(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    columns: Mapping[str, Sequence[int]],
    loss: Loss,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure how much the held-out loss rises when one column is shuffled across rows.

    All inputs encoded from a column move together. The rise is averaged over five permutations and
    over rows; its 95 % interval is that of the paired differences, mean +- t s / sqrt(rows), with
    s the standard deviation over rows. Correlated columns substitute for each other, so each alone
    may look unimportant.

    Args:
        model: the trained model, scored in eval mode.
        x, y: held-out rows (N, inputs) and targets; above 2,000 rows an even subsample.
        columns: the inputs of each column.
        loss: the training loss, with a value for each row.
        seed: of the permutations.

    Returns `rows` and `columns`: (name, mean, low, high), largest mean first. Empty for fewer than
    two rows, more than 100 columns (too slow), and losses without a value for each row.

    Source: Breiman, "Random forests", 2001; Fisher, Rudin, Dominici, "All models are wrong, but
    many are useful", 2019.

    >>> from tikhon.training.losses import loss_of
    >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    >>> model = nn.Linear(2, 1)
    >>> _ = model.load_state_dict({"weight": torch.tensor([[1.0, 0.0]]), "bias": torch.zeros(1)})
    >>> found = importances(model, x, x[:, 0], {"a": [0], "b": [1]}, loss_of("mse"))
    >>> [name for name, *_ in found["columns"]], found["columns"][1][1:]
    (['a', 'b'], [0.0, 0.0, 0.0])
    """
    if loss.entries is None or len(x) < 2 or not 0 < len(columns) <= MOST_COLUMNS:
        return {}
    every = -(-len(x) // MOST_ROWS)
    device = next(model.parameters()).device
    x, y = x[::every].to(device), y[::every].to(device)
    usual = loss.rows(predict(model, x), y)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(x), generator=generator) for _ in range(_REPEATS)]
    found = []
    for name, places in columns.items():
        rises = torch.stack(
            [loss.rows(predict(model, _moved(x, places, order)), y) - usual for order in orders]
        ).double()
        of_rows = rises.mean(0)
        mean = float(of_rows.mean())
        half = certain(len(of_rows)) * float(of_rows.std()) / math.sqrt(len(of_rows))
        found.append([name, mean, mean - half, mean + half])
    return {"rows": len(x), "columns": sorted(found, key=lambda entry: -entry[1])}


def _moved(x: Tensor, places: Sequence[int], order: Tensor) -> Tensor:
    moved = x.clone()
    at = torch.tensor(list(places), device=x.device)
    moved[:, at] = x[order.to(x.device)][:, at]
    return moved
