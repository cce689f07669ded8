"""Initial weights: all equal, one layer extreme, dead or saturated, too large, too small.

Pure functions of the evidence; standard library only.
"""

from __future__ import annotations

import math

from tikhon.diagnosis import thresholds as e
from tikhon.diagnosis.checks.causes import display_name, gradient_decline, layer_names
from tikhon.diagnosis.evidence import Evidence, middle, number
from tikhon.diagnosis.findings import Finding
from tikhon.languages import Sentence, sentence

_Cause = tuple[tuple[str, ...], dict[str, float], Sentence] | None


def poor_init(ev: Evidence) -> Finding | None:
    """Find initial weights that block training: too large, too small, all equal, all dead."""
    first = ev.first
    if first is None or min(ev.final_skill, ev.validation_skill) >= e.LEARNED:
        return _large_initial_logits(ev)
    for test in (_equal_weights, _outlier_layer, _dead_or_saturated, _too_large, _too_small):
        found = test(ev)
        if found is not None:
            where, numbers, why = found
            return Finding("poor_init", "critical", where, numbers, why)
    return None


def _large_initial_logits(ev: Evidence) -> Finding | None:
    """Find initial logits so large that much of the run is spent on shrinking them."""
    found = _too_large(ev) if ev.static.get("own_softmax") else None
    metric = number(ev.end.metric) if ev.end is not None else None
    if found is None or metric is None or metric >= e.SOLVED:
        return None
    where, numbers, why = found
    if numbers["initial_loss"] < e.LOUD:
        return None
    return Finding("poor_init", "warning", where, numbers, why)


def _equal_weights(ev: Evidence) -> _Cause:
    first = ev.first
    assert first is not None
    same = [i for i in ev.chain if first.readings[i].constant]
    # zero-initialised heads and branches are fine: they move in the first step
    if not same or (len(same) < len(ev.chain) and (ev.early_ratio or 0.0) >= e.VANISHED):
        return None
    why = sentence("why_equal", count=len(same))
    return tuple(ev.site(i).name for i in same), {"constant_layers": len(same)}, why


def _outlier_layer(ev: Evidence) -> _Cause:
    factors = forward_factors(ev)
    usual = middle(factors.values())
    if usual is None or len(factors) < 3:
        return None
    small = [i for i, f in factors.items() if 0 < f < usual / e.OUTLIER]
    large = [i for i, f in factors.items() if f > usual * e.OUTLIER]
    odd = small or large
    if not odd or len(odd) > len(factors) / 3:
        return None
    worst = factors[odd[0]]
    why = sentence("why_odd", odd=worst, usual=usual)
    where = tuple(ev.site(i).name for i in odd)
    return where, {"weight_factor": worst, "usual": usual}, why


def _dead_or_saturated(ev: Evidence) -> _Cause:
    first = ev.first
    assert first is not None
    for i, reading in enumerate(first.readings):
        saturated = (reading.saturated or 0.0) >= e.SATURATED
        if not saturated and (reading.dead is None or reading.dead < 0.95):
            continue
        before = ev.layer_before(i)
        factor = forward_factors(ev).get(before, 1.0) if before is not None else 1.0
        bias = bias_share(ev, before)
        if saturated and bias < 3 and factor < e.LARGE_WEIGHTS:
            continue  # the inputs are too large, not the weights
        layer, state = display_name(ev.site(i).name), "saturated" if saturated else "dead"
        why = sentence(f"why_born_{state}", layer=layer)
        if bias >= 3:
            why = sentence(f"why_born_{state}_bias", layer=layer, bias=bias)
        return layer_names(ev, i), {"bias": bias, "weight_factor": factor}, why
    return None


def bias_share(ev: Evidence, position: int | None) -> float:
    """Return the rms of the bias / the spread of a layer's output."""
    if position is None or ev.first is None:
        return 0.0
    reading = ev.first.readings[position]
    if not reading.bias or reading.rms is None:
        return 0.0
    rest = (reading.diversity or 0.0) * reading.rms
    return reading.bias / rest if rest > 0 else math.inf


def _too_large(ev: Evidence) -> _Cause:
    large = [i for i, f in forward_factors(ev).items() if f > e.LARGE_WEIGHTS]
    first, trivial = ev.first, ev.trivial
    if not large or first is None:
        return None
    loss = number(first.loss)
    excess = loss / trivial if loss is not None and trivial else math.inf
    ratio = ev.first_ratio or 0.0
    saturated = max((r.saturated or 0.0) for r in first.readings)
    if excess < e.INITIAL_LOSS and ratio < e.EXPLODED and saturated < e.SATURATED:
        return None
    factor = max(forward_factors(ev)[i] for i in large)
    numbers = {"weight_factor": factor, "initial_loss": excess, "signal_ratio": ratio}
    why = sentence("why_large", gain=factor, excess=excess)
    return tuple(ev.site(i).name for i in large), numbers, why


def _too_small(ev: Evidence) -> _Cause:
    if ev.record.failure is not None:
        return None
    ratio, early = ev.first_ratio, ev.early_ratio
    if ratio is None or early is None or max(ratio, early) >= e.VANISHED or ev.has_zero_gradients:
        return None
    weights, slopes, numbers = gradient_decline(ev)
    if weights <= slopes:
        return None
    why = sentence("why_small", gain=numbers["weight_factor"], ideal=numbers["ideal"])
    where = tuple(ev.site(i).name for i in ev.chain)
    return where, {"signal_ratio": ratio, **numbers}, why


def forward_factors(ev: Evidence) -> dict[int, float]:
    """Return rms(W) * sqrt(fan_in) of the feed-forward layers at step 0."""
    first = ev.first
    if first is None:
        return {}
    weights = {i: first.readings[i].weight_rms for i in ev.chain if ev.site(i).role == "weight"}
    fan_in = {i: math.sqrt(ev.site(i).fan_in) for i in weights}
    return {i: rms * fan_in[i] for i, rms in weights.items() if rms is not None}
