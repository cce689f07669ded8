"""What a Regularizer tells a logger: one flat dict of numbers."""

from __future__ import annotations

from tikhon.regularizer.regularizer import Regularizer


def readings(regularizer: Regularizer) -> dict[str, float]:
    """Value, strength and share of exact zeros of every term, for any logger.

    The keys are `penalty/<parameter>/<Penalty>/value`, `.../strength` and `.../zeros`. Costs one
    pass over the regularized weights and a few reads from the device: call it every some steps.

    Args:
        regularizer: the handle that `tikhon.regularize` returned.

    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> reg = tk.regularize(model, optimizer, tk.L1(0.5))
    >>> sorted(tk.integrations.readings(reg))
    ['penalty/weight/L1/strength', 'penalty/weight/L1/value', 'penalty/weight/L1/zeros']
    """
    found: dict[str, float] = {}
    for term in regularizer.trace():
        found[f"penalty/{term.name}/value"] = term.value
        found[f"penalty/{term.name}/strength"] = term.strength
        found[f"penalty/{term.name}/zeros"] = term.zeros
    return found
