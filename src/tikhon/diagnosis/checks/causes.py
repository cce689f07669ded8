"""Causes of symptoms: gains as weights times slopes, limits of the head, dominant penalties."""

from __future__ import annotations

import math
from typing import Literal

from tikhon.diagnosis import thresholds as e
from tikhon.diagnosis.evidence import Evidence, middle, number
from tikhon.languages import Sentence, sentence


def layer_names(ev: Evidence, activation: int) -> tuple[str, ...]:
    """Return the names of an activation and of the layer before it."""
    if ev.site(activation).role != "activation":
        return (ev.site(activation).name,)
    before = ev.layer_before(activation)
    own = ev.site(activation).name
    return (ev.site(before).name, own) if before is not None else (own,)


def display_name(name: str) -> str:
    """Return a module's name for a sentence; indices of a `Sequential` are called layers."""
    if name.replace(".", "").isdigit():
        return sentence("called_layer", name=name)
    return name or sentence("called_model")


def layer_gains(ev: Evidence) -> list[tuple[int, float, float, float]]:
    """Return (position, gain, weight factor, slope) of each step back through the chain.

    The gain at position k is the gradient at the layer before k / the gradient at k. In plain
    chains it is the product of the layer's weight factor and the slope of the activation in
    between, 1 without an activation.
    """
    first = ev.first
    if first is None:
        return []
    rows = []
    for before, after in zip(ev.chain, ev.chain[1:]):
        low, high = first.readings[before].signal, first.readings[after].signal
        if low is None or not high:
            continue
        activation = ev.activation_after(before)
        slope = first.readings[activation].slope if activation is not None else None
        weight = first.readings[after].weight_factor
        if slope is None:  # softmax is not elementwise: its slope is gain / weight factor
            other = activation is not None and bool(weight)
            slope = low / high / weight if other and weight else 1.0
        rows.append((after, low / high, weight or 0.0, slope))
    return rows


def gradient_decline(ev: Evidence) -> tuple[float, float, dict[str, float]]:
    """Return the loss of gradient per layer due to weights and to slopes, as -log."""
    weights, slopes, ideals, factors = [], [], [], []
    for after, _, weight, slope in layer_gains(ev):
        before = ev.layer_before(after)
        activation = ev.activation_after(before) if before is not None else None
        label = ev.site(activation).kind if activation is not None else ""
        ideal = e.IDEAL.get(label, 1.0)
        weights.append(math.log(ideal / max(weight, 1e-12)))
        slopes.append(-math.log(max(slope * ideal, 1e-12)))
        ideals.append(ideal)
        factors.append(weight)
    if not weights:
        return 0.0, 0.0, {}
    numbers = {"weight_factor": middle(factors) or 0.0, "ideal": middle(ideals) or 1.0}
    return sum(weights) / len(weights), sum(slopes) / len(slopes), numbers


def explain_gain(ev: Evidence) -> tuple[tuple[str, ...], Sentence | Literal[""]]:
    """Return the layers where the gradient vanishes or explodes, and the reason."""
    rows = layer_gains(ev)
    if not rows:
        return (), ""
    outliers = _outlier_steps(ev, rows)
    if outliers:
        position, gain, weight, slope = outliers[0]
        place = tuple(dict.fromkeys(n for row in outliers for n in _faulty_layer(ev, row)))
        at_fault = "weights" if weight < 0.2 or weight > 5 else "activation"
        layer = display_name(ev.site(position).name)
        values = {"gain": gain, "weight": weight, "slope": slope}
        return place, sentence(f"why_passes_{at_fault}", layer=layer, **values)
    weights, slopes, _ = gradient_decline(ev)
    gain = math.exp(sum(math.log(max(g, 1e-30)) for _, g, _, _ in rows) / len(rows))
    weight = middle(w for _, _, w, _ in rows) or 0.0
    slope = middle(s for _, _, _, s in rows) or 0.0
    label = next((s.kind for s in ev.record.sites if s.role == "activation"), "no activation")
    values = {"gain": gain, "weight": weight, "slope": slope, "count": len(rows)}
    at_fault = "weights" if abs(weights) >= abs(slopes) else "activation"
    product = weight * slope
    if product <= 0 or abs(math.log(max(gain, 1e-30) / product)) > 0.5:
        at_fault = "paths"
    why = sentence(f"why_gain_{at_fault}", label=label, **values)
    first = ev.first
    assert first is not None
    top = first.readings[ev.chain[-1]].signal or 0.0
    far = (
        [
            i
            for i in ev.chain
            if (s := first.readings[i].signal) is not None
            and not e.VANISHED <= s / top <= e.EXPLODED
        ]
        if top
        else []
    )
    return tuple(ev.site(i).name for i in far or ev.chain), why


def _outlier_steps(
    ev: Evidence, rows: list[tuple[int, float, float, float]]
) -> list[tuple[int, float, float, float]]:
    """Return the steps whose gain is far from the median, if they are few."""
    usual = middle(g for _, g, _, _ in rows)
    if usual is None or len(rows) < 2:
        return []
    low, high = usual / e.OUTLIER, usual * e.OUTLIER
    outliers = [r for r in rows if r[1] == 0 or not low <= r[1] <= high]
    return outliers if len(outliers) <= max(1, len(rows) // 3) else []


def _faulty_layer(ev: Evidence, row: tuple[int, float, float, float]) -> tuple[str, ...]:
    """Return the layer of a step if its weights are extreme, else the activation before it."""
    position, _, weight, slope = row
    if weight < 0.2 or weight > 5:
        return (ev.site(position).name,)
    before = ev.layer_before(position)
    activation = ev.activation_after(before) if before is not None else None
    if activation is not None and slope < 0.2:
        return layer_names(ev, activation)
    return (ev.site(position).name,)


def head_site(ev: Evidence) -> str:
    """Return the last activation."""
    sites = [s for s in ev.record.sites if s.role == "activation"]
    return sites[-1].name if sites else "output"


def head_floor(ev: Evidence) -> float:
    """Return the excess of the loss that the head enforces, as a share of the trivial loss."""
    static = ev.static
    floor, free = number(static.get("floor")), number(static.get("free_floor"))
    trivial = number(static.get("free_trivial"))
    if floor is None or free is None or trivial is None or trivial - free <= 1e-9 * abs(trivial):
        return 0.0
    kept = (floor - free) / (trivial - free)
    own = number(static.get("trivial"))
    if own is not None and own > 0 and floor >= 0:
        # beyond the range of the head a loss may be unbounded below, such as an overlap
        kept = min(kept, floor / own)
    return max(0.0, kept)


def penalty_share(ev: Evidence) -> float:
    """Return the share of a penalty or weight decay in what moves the weights.

    At a stationary point penalty and data balance at one half, so the largest share on the way
    counts.
    """
    if not ev.record.probes or not ev.trained:
        return 0.0
    last, first = ev.record.probes[-1], ev.record.probes[0]
    measured = [[r.penalty for r in p.readings if r.penalty is not None] for p in ev.record.probes]
    shares = [middle(values) or 0.0 for values in measured if values]
    share = shares[-1] if shares else 0.0
    if share >= e.DOMINANT:
        return share
    before = [first.readings[i].weight_rms for i in ev.chain]
    after = [last.readings[i].weight_rms for i in ev.chain]
    left = [a / b for a, b in zip(after, before) if a is not None and b]
    decays = number(ev.record.optimizer.get("weight_decay")) is not None or bool(shares)
    if decays and left and (middle(left) or 1.0) < 0.1:
        return 1.0 - (middle(left) or 0.0)
    return max(shares) if share >= e.BALANCED else share


def strong_dropout(ev: Evidence) -> tuple[str, ...]:
    """Return the dropout layers that pass less than a tenth."""
    return tuple(n for n, rate in (ev.static.get("dropout") or {}).items() if rate > 0.9)
