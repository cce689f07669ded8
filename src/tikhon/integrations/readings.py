"""Readings of a Regularizer for loggers, as a flat dict."""

from __future__ import annotations

from tikhon.regularizer.audit import Trace
from tikhon.regularizer.regularizer import Regularizer


def readings(regularizer: Regularizer, *, per_parameter: bool = False) -> dict[str, float]:
    """Return value, strength and share of exact zeros of each kind of penalty, for any logger.

    Keys are `penalty/<Penalty>/value` (summed over parameters), `.../strength` (averaged over
    them) and `.../zeros` (the share among all their weights). Takes one pass over the regularized
    weights and a few device reads: do not call it at every step.

    Args:
        regularizer: the handle returned by `tikhon.regularize`.
        per_parameter: whether to return these for each parameter instead, as
            `penalty/<parameter>/<Penalty>/...`.

    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> reg = tk.regularize(model, optimizer, tk.L1(0.5))
    >>> sorted(tk.integrations.readings(reg))
    ['penalty/L1/strength', 'penalty/L1/value', 'penalty/L1/zeros']
    """
    alike: dict[str, list[Trace]] = {}
    for term in regularizer.trace():
        alike.setdefault(term.name if per_parameter else term.penalty, []).append(term)
    found: dict[str, float] = {}
    for name, terms in alike.items():
        entries = sum(term.entries for term in terms)
        zeros = sum(term.zeros * term.entries for term in terms)
        found[f"penalty/{name}/value"] = sum(term.value for term in terms)
        found[f"penalty/{name}/strength"] = sum(term.strength for term in terms) / len(terms)
        found[f"penalty/{name}/zeros"] = zeros / max(1, entries)
    return found
