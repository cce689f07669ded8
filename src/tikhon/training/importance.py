"""Permutation importance: the rise of the loss when one column is shuffled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.numbers import t_quantile
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
    baseline = loss.rows(predict(model, x), y)
    generator = torch.Generator().manual_seed(seed)
    permutations = [torch.randperm(len(x), generator=generator) for _ in range(_REPEATS)]
    found = []
    for name, inputs in columns.items():
        rises = torch.stack(
            [
                loss.rows(predict(model, _with_shuffled(x, inputs, permutation)), y) - baseline
                for permutation in permutations
            ]
        ).double()
        row_rises = rises.mean(0)
        mean = float(row_rises.mean())
        half_width = (
            t_quantile(len(row_rises)) * float(row_rises.std()) / math.sqrt(len(row_rises))
        )
        found.append([name, mean, mean - half_width, mean + half_width])
    return {"rows": len(x), "columns": sorted(found, key=lambda entry: -entry[1])}


def _with_shuffled(x: Tensor, inputs: Sequence[int], permutation: Tensor) -> Tensor:
    shuffled = x.clone()
    index = torch.tensor(list(inputs), device=x.device)
    shuffled[:, index] = x[permutation.to(x.device)][:, index]
    return shuffled
