"""The nine symptoms, each a pure function of the evidence: numbers in, a finding or None out.

Standard library only. Thresholds and where they come from: `thresholds.py`.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Literal

from tikhon.diagnosis import thresholds as e
from tikhon.diagnosis.checks.causes import (
    display_name,
    explain_gain,
    head_floor,
    head_site,
    layer_names,
    penalty_share,
    strong_dropout,
)
from tikhon.diagnosis.checks.initial import poor_init
from tikhon.diagnosis.evidence import Evidence, mean_rise, middle, number, upward_share
from tikhon.diagnosis.findings import Finding
from tikhon.languages import Sentence, sentence


def exploding_gradient(ev: Evidence) -> Finding | None:
    """Find values that overflow, or gradients that grow over layers, time steps or steps."""
    failure = ev.record.failure
    numbers: dict[str, float] = {}
    where: tuple[str, ...] = ()
    why: Sentence | Literal[""] = ""
    if failure is not None and failure.what != "input":
        numbers["step"] = failure.step
        where = (failure.where,) if failure.where != "loss" else ()
        what = sentence(f"what_{failure.what}")
        why = sentence("why_first_bad", what=what, where=failure.where, step=failure.step)
    ratio = ev.first_ratio
    if ratio is not None and ratio > e.EXPLODED and ev.final_skill < e.LEARNED:
        numbers["signal_ratio"] = ratio
        grown, why = explain_gain(ev)
        where = where or grown
    for position, first, later in ev.time_ratios():
        factor = max(p.readings[position].weight_factor or 0.0 for p in ev.early)
        # easy late outputs have small gradients, which is no growth
        grown = first >= e.TIME_EXPLODED or (later >= e.TIME_EXPLODED and factor >= 1)
        if grown and ev.final_skill < e.LEARNED:
            numbers["time_ratio_log10"] = max(first, later)
            where = (ev.site(position).name,)
            why = sentence("why_time_grows", factor=f"10^{max(first, later):.0f}", gain=factor)
    sizes = [g for g in ev.record.gradients if number(g) is not None]
    spike = max(sizes, default=0.0) / sizes[0] if sizes and sizes[0] else 0.0  # type: ignore[operator,type-var]
    if ev.trained and spike > e.SPIKE and ev.final_skill < 0.5:
        numbers["gradient_spike"] = spike
        why = why or sentence("why_jump", factor=spike)
    if not numbers:
        return None
    return Finding("exploding_gradient", "critical", where, numbers, why and _with_cause(ev, why))


def vanishing_gradient(ev: Evidence) -> Finding | None:
    """Find a gradient that vanishes on the way to the first layers or time steps."""
    if ev.record.failure is not None or not ev.record.probes or ev.final_skill >= e.LEARNED:
        return None
    if ev.has_zero_gradients:
        sites = [s for s, r in zip(ev.record.sites, ev.record.probes[0].readings) if r.signal]
        where = tuple(s.name for s in sites[:1])  # before it there is none
        if not sites and ev.static.get("head"):
            where = (head_site(ev),)
        why = sentence("why_no_gradient")
        return Finding("vanishing_gradient", "critical", where, {"signal_ratio": 0.0}, why)
    for position, first, later in ev.time_ratios():
        if max(first, later) <= e.TIME_VANISHED and ev.final_skill < 0.5:
            factor = ev.record.probes[0].readings[position].weight_factor or 0.0
            left = "zero" if first < -300 else f"10^{first:.0f}"
            why = sentence("why_time_falls", left=left, gain=factor)
            numbers = {"time_ratio_log10": first, "recurrent_gain": factor}
            place = (ev.site(position).name,)
            return Finding("vanishing_gradient", "critical", place, numbers, why)
    first, early = ev.first_ratio, ev.early_ratio
    vanished_at_start = first is None or first < e.VANISHED
    if not vanished_at_start or early is None or early >= e.VANISHED:
        return None
    late = middle(ev.ratio(p) for p in ev.record.probes[-3:])
    if ev.trained and ev.final_skill >= 0.5 and late is not None and late >= e.VANISHED:
        return None  # the gradient has recovered, and the network learns
    where, why = explain_gain(ev)
    numbers = {"signal_ratio": early}
    return Finding("vanishing_gradient", "critical", where, numbers, why)


def dying_relu(ev: Evidence) -> Finding | None:
    """Find rectified units that are 0 for every sample and so get no gradient."""
    head = _rectified_head(ev)
    if head is not None:
        return head
    last = ev.last
    first = ev.first
    if last is None or first is None or ev.final_skill >= e.LEARNED:
        return None
    probe = last if ev.record.failure is None else first
    if penalty_share(ev) >= e.DOMINANT:
        return None
    affected = ev.dead_rectifiers
    if not affected:
        return None
    share = max(probe.readings[i].dead or 0.0 for i in affected)
    start = first.readings[affected[0]].dead or 0.0
    culprit = next((i for i in affected if (probe.readings[i].dead or 0) > 0.95), affected[0])
    where = layer_names(ev, culprit)
    numbers = {"dead": share, "dead_at_start": start}
    why = sentence("why_dead", share=share, layer=display_name(where[-1]), start=start)
    if start >= e.DEAD:
        why = sentence("why_dead_start", share=share, layer=display_name(where[-1]))
    # units that died during the run may be a consequence of another fault
    severity = "critical"
    if ev.control("leaky") is not None:
        numbers |= ev.skill_evidence("leaky")
        severity = "critical" if ev.skill_gain("leaky") > e.STEADIER else "info"
    return Finding("dying_relu", severity, where, numbers, _with_cause(ev, why))


def _rectified_head(ev: Evidence) -> Finding | None:
    head = ev.static.get("head") or []
    floor = head_floor(ev)
    if not any(name.startswith("relu") for name in head) or floor < 0.25:
        return None
    why = sentence("why_rectified", floor=floor)
    return Finding("dying_relu", "warning", (head_site(ev),), {"floor": floor}, why)


def saturated_activation(ev: Evidence) -> Finding | None:
    """Find saturated activations: the derivative is below 5% of its maximum."""
    last, first = ev.last, ev.first
    if last is None or first is None:
        return None
    fails = ev.record.failure is not None
    affected = []
    for i, reading in enumerate(first.readings):
        if reading.saturated is None:
            continue
        start = reading.saturated
        late = start if fails else ev.late_median("saturated", i)
        # after the last layer saturation is a confident prediction
        last = i > max(ev.chain, default=-1)
        limit = e.HARDLY if last and start < e.SATURATED else e.LEARNED
        harmed = min(ev.final_skill, ev.validation_skill) < limit
        saturated = max(start, late) >= e.SATURATED
        if saturated and harmed and penalty_share(ev) < e.DOMINANT:
            affected.append((i, start, late))
    if not affected:
        return None
    from_start = [s for s in affected if s[1] >= e.SATURATED]
    position, start, late = (from_start or affected)[0]
    where = layer_names(ev, position)
    numbers = {"saturated": max(start, late), "at_start": start}
    share, severity = max(start, late), "critical"
    why = sentence("why_saturated", share=share, layer=display_name(where[-1]))
    blocked = ev.record.probes[-1].gradient == 0  # a clamp may keep a slope from coming back
    if not from_start and not blocked and ev.control("leaky") is not None:
        numbers |= ev.skill_evidence("leaky")
        severity = "critical" if ev.skill_gain("leaky") > e.STEADIER else "info"
    return Finding("saturated_activation", severity, where, numbers, _with_cause(ev, why))


def oscillating_loss(ev: Evidence) -> Finding | None:
    """Find a loss on a fixed batch that keeps rising instead of settling."""
    curve = ev.curve
    if ev.record.failure is not None or len(curve) < 12:
        return None
    limit = max(ev.trivial or 0.0, curve[0])
    end = median(curve[-len(curve) // 3 :])
    climbs = end > e.DIVERGED * limit > 0
    steadier = ev.control("steadier")
    if steadier is not None and steadier - max(ev.late_skill, 0.0) > e.STEADIER:
        return _heavy_momentum(ev, {"climb": end / limit} if climbs else {})
    if climbs:
        why = sentence("why_climbs", end=end, start=curve[0])
        numbers = {"climb": end / limit}
        return Finding("oscillating_loss", "critical", (), numbers, _with_cause(ev, why))
    if ev.skill_gain("calmer") > e.FREED:  # a tenth of the learning rate
        numbers = ev.skill_evidence("calmer")
        why = sentence("why_calmer", **numbers)
        if ev.has_constant_output:
            why = sentence("why_all_alike", why=why)
        return Finding("oscillating_loss", "critical", (), numbers, _with_cause(ev, why))
    if not ev.oscillates:
        return None
    late = curve[len(curve) // 3 :]
    swing, back = mean_rise(late), upward_share(late)
    numbers = {"swing": swing, "upward_share": back}
    why = sentence("why_swing", swing=swing, back=back)
    if ev.record.batch_size <= 4:
        why = sentence("why_small_batch", why=why, count=ev.record.batch_size)
    # without a reference, the loss may fluctuate around its minimum
    known = ev.shallow_gain is not None or ev.trivial is not None
    if ev.wiring.get("decides"):
        why = sentence("why_decides", why=why)
        known = False
    # and if smaller steps learn no more, step size is not the cause
    if ev.control("calmer") is not None:
        numbers |= ev.skill_evidence("calmer")
        known = known and ev.skill_gain("calmer") > e.STEADIER
    severity = "warning" if known else "info"
    return Finding("oscillating_loss", severity, (), numbers, _with_cause(ev, why))


def _heavy_momentum(ev: Evidence, climb: dict[str, float]) -> Finding:
    learned, steadier = max(ev.late_skill, 0.0), ev.control("steadier") or 0.0
    numbers = {"momentum": ev.momentum, "learned": learned, "steadier": steadier}
    why = sentence("why_steadier", count=1 / max(1e-09, 1 - ev.momentum), **numbers)
    severity = "critical" if climb or steadier - learned > e.FREED else "warning"
    fix = "betas=(0.9, 0.999)" if "betas" in ev.record.optimizer else "momentum=0.9"
    return Finding("oscillating_loss", severity, (), numbers | climb, why, fix=fix)


def slow_convergence(ev: Evidence) -> Finding | None:
    """Find steps too small to train in the given time."""
    double = ev.static.get("own_softmax") and head_floor(ev) >= e.FLOOR
    if double and ev.static.get("head") and not ev.has_zero_gradients:
        floor = head_floor(ev)
        why = sentence("why_squashed", floor=floor)
        return Finding("slow_convergence", "warning", (head_site(ev),), {"floor": floor}, why)
    if not ev.trained or ev.record.failure is not None or ev.final_skill >= e.LEARNED:
        return None
    masked = _mostly_masked(ev)
    if masked is not None:
        return masked
    if ev.skill_gain("unhooked") > e.STEADIER:
        hooked, numbers = tuple(ev.static.get("hooked") or ()), ev.skill_evidence("unhooked")
        why = sentence("why_unhooked", free=numbers["unhooked"], learned=numbers["learned"])
        fix = sentence("fix_hook")
        return Finding("slow_convergence", "warning", hooked, numbers, why, fix=fix)
    if ev.skill_gain("faster") > e.FREED:
        return _steps_too_short(ev)
    update = ev.median_update
    small = update is not None and update < e.SLOW_UPDATE
    if update is None or not small or _died_in_training(ev) or penalty_share(ev) > e.RESTRAINING:
        return None
    numbers = {"update_ratio": update, "learned": max(ev.final_skill, 0.0)}
    why = _with_cause(ev, sentence("why_small_steps", update=update))
    if update == 0:
        why = sentence("why_unmoved")
    return Finding("slow_convergence", "warning", (), numbers, _explain_small_steps(ev, why))


def _steps_too_short(ev: Evidence) -> Finding:
    """Report that a control run learned more with ten times the learning rate."""
    numbers = ev.skill_evidence("faster")
    why = sentence("why_faster", **numbers)
    numbers["update_ratio"] = ev.median_update or 0.0
    return Finding("slow_convergence", "warning", (), numbers, _explain_small_steps(ev, why))


def _mostly_masked(ev: Evidence) -> Finding | None:
    """Find a mean over masked entries, which shrinks the steps of SGD."""
    found = ev.wiring.get("masked_mean") or {}
    share, engine = number(found.get("share")) or 0.0, ev.record.optimizer
    if share < e.MASKED or engine.get("name") != "SGD":
        return None
    why = sentence("why_masked_mean", share=share, times=1 / (1 - share))
    where, numbers = (found.get("place") or "the loss",), {"masked": share}
    fix = "(error * mask).sum() / mask.sum()"
    return Finding("slow_convergence", "warning", where, numbers, why, fix=fix)


def _explain_small_steps(ev: Evidence, why: Sentence) -> Sentence:
    """Add the reason for small steps in the optimizer: rate 0, clipping or a large eps."""
    engine = ev.record.optimizer
    if not number(engine.get("lr")):
        return sentence("why_rate_zero", why=why)
    clip, sizes = number(engine.get("clip")), [g for g in ev.record.gradients if number(g)]
    if clip is not None and sizes and clip < 0.1 * median(sizes):  # type: ignore[type-var]
        cut = median(sizes) / clip  # type: ignore[type-var,operator]
        return sentence("why_clipped", why=why, clip=clip, times=cut)
    if (number(engine.get("eps")) or 0.0) > e.LARGE_EPS:
        return sentence("why_eps", why=why, eps=engine["eps"])
    return why


def _died_in_training(ev: Evidence) -> bool:
    """Whether units died or saturated during training, which explains small updates."""
    last, first = ev.last, ev.first
    if last is None or first is None:
        return False
    for before, after in zip(first.readings, last.readings):
        for name in ("dead", "saturated"):
            start, now = getattr(before, name), getattr(after, name)
            if start is not None and now is not None and start < 0.5 and now > 0.95:
                return True
    return False


def overfitting(ev: Evidence) -> Finding | None:
    """Find a validation loss that rises while the training loss falls."""
    points = [p for p in ev.record.points if number(p.valid_loss) is not None]
    end = ev.end
    if ev.record.failure is not None or len(points) < 4 or end is None:
        return None
    lowest = min(points, key=lambda p: p.valid_loss or 0.0)
    rise = ((end.valid_loss or 0.0) - (lowest.valid_loss or 0.0)) / abs(lowest.valid_loss or 1.0)
    metric, valid = number(end.metric), number(end.valid_metric)
    if metric is not None and valid is not None:
        gap = metric - valid
    else:
        gap = ((end.valid_loss or 0.0) - (end.eval_loss or 0.0)) / abs(end.valid_loss or 1.0)
    tail = [p.valid_loss or 0.0 for p in points[len(points) // 2 :]]
    steady = rise >= 0.05 and len(tail) > 3 and upward_share(tail) > 0.7
    if not (rise >= e.RISE or steady) or gap < e.GAP or ev.final_skill < 0.5:
        return None
    if (end.eval_loss or 0.0) > (lowest.eval_loss or math.inf):
        return None  # both rise: unstable, not overfitting
    numbers = {"gap": gap, "rise": rise, "best_step": float(lowest.step)}
    counts = {"parameters": ev.record.parameters, "rows": ev.record.data.get("rows") or 0}
    why = sentence("why_overfits", rise=rise, step=lowest.step, gap=gap, **counts)
    return Finding("overfitting", "warning", (), numbers, why)


def underfitting(ev: Evidence, found: set[str]) -> Finding | None:
    """Find training that ends far below what the data allow, with intact gradients."""
    explained = {"exploding_gradient", "vanishing_gradient", "slow_convergence", "dying_relu"}
    explained |= {"saturated_activation", "oscillating_loss", "poor_init"}
    if not ev.trained or ev.record.failure is not None:
        return None
    if ev.final_skill >= e.FAR_BEHIND and ev.loss_at_chance:
        return _small_outputs(ev)
    if ev.final_skill >= e.RESTRAINED:
        return None
    share = penalty_share(ev)
    dropped = strong_dropout(ev)
    numbers = {"learned": max(ev.final_skill, 0.0)}
    gain = ev.skill_gain("undecayed")
    outweighs = ev.lacks_yardstick and gain > e.STEADIER and ev.penalty_share > e.RESTRAINING
    if outweighs or gain > e.FREED:
        return _restrained(ev)
    if share >= (e.DOMINANT if ev.falls_smoothly else e.RESTRAINING):
        if ev.control("undecayed") is not None:
            return _restrained(ev) if gain > e.STEADIER else None
        numbers["penalty_share"] = share
        why = sentence("why_penalty", share=share)
        return Finding("underfitting", "critical", (), numbers, why)
    if dropped:
        rate = ev.static["dropout"][dropped[0]]
        numbers["dropout"] = rate
        why = sentence("why_dropped", share=1 - rate, layer=display_name(dropped[0]))
        return Finding("underfitting", "critical", dropped, numbers, why)
    narrow = _narrow_layers(ev)
    if ev.final_skill >= 0.6 or found & explained or (ev.falls_smoothly and not narrow):
        return None
    if narrow:
        width = min(ev.site(i).fan_out for i in ev.chain if ev.site(i).name in narrow)
        numbers["width"] = float(width)
        why = sentence("why_narrow", width=width, layer=display_name(narrow[0]))
        return Finding("underfitting", "warning", narrow, numbers, why)
    return None if ev.falls_fast else _behind_baseline(ev, numbers)


def _small_outputs(ev: Evidence) -> Finding | None:
    """Report decay or a penalty that keeps outputs near constant though they rank rows well."""
    if ev.loss_gain("undecayed") <= e.FREED or ev.end is None:
        return None
    numbers = {
        "loss": ev.end.eval_loss or 0.0,
        "constant": ev.trivial or 0.0,
        "undecayed": number(ev.record.reference.get("undecayed_loss")) or 0.0,
    }
    why = sentence("why_decayed_loss", **numbers)
    fix = "weight_decay=1e-2" if ev.penalty_share < e.BALANCED else ""
    return Finding("underfitting", "critical", (), numbers, why, fix=fix)


def _restrained(ev: Evidence) -> Finding:
    """Report that a control run learned more without decay or penalty on the weights."""
    numbers = ev.skill_evidence("undecayed")
    if ev.penalty_share < e.BALANCED:
        decay = number(ev.record.optimizer.get("weight_decay")) or 0.0
        why = sentence("why_decayed", decay=decay, **numbers)
        numbers["weight_decay"] = decay
        return Finding("underfitting", "critical", (), numbers, why, fix="weight_decay=1e-2")
    numbers["penalty_share"] = ev.penalty_share
    why = sentence("why_penalized", **numbers)
    if ev.lacks_yardstick and ev.end is not None:
        free, loss = ev.record.reference.get("undecayed_loss") or 0.0, ev.end.eval_loss or 0.0
        why = sentence("why_penalized_loss", free=free, loss=loss, share=ev.penalty_share)
    return Finding("underfitting", "critical", (), numbers, why)


def _behind_baseline(ev: Evidence, numbers: dict[str, float]) -> Finding:
    """Report low skill relative to a reference model for no known reason."""
    end, trivial = ev.end, ev.trivial
    metric = number(end.metric) if end is not None else None
    if ev.own_loss_gain is not None and ev.shallow_gain is not None:
        gain, constant = ev.own_loss_gain
        reached = (number(end.eval_loss) if end is not None else None) or 0.0
        values = {"loss": reached, "constant": trivial or 0.0, "gain": gain / abs(constant)}
        why = sentence("why_own_yardstick", **values)
        return Finding("underfitting", "warning", (), numbers, why)
    if ev.own_loss_gain is None and ev.shallow_gain is not None and metric is not None:
        shallow = number(ev.record.reference.get("shallow")) or 0.0
        why = sentence("why_behind", metric=metric, shallow=shallow)
        return Finding("underfitting", "warning", (), numbers, why)
    loss = (number(end.eval_loss) if end is not None else None) or 0.0
    best = trivial if trivial is not None else (number(ev.start.loss) if ev.start else None) or 0.0
    known = trivial is not None and not ev.wiring.get("constant_target")
    if known and loss > best + e.ABOVE_CONSTANT * abs(best):
        why = sentence("why_below_constant", loss=loss, best=best)
        return Finding("underfitting", "warning", (), numbers, why)
    why = sentence("why_no_yardstick", loss=loss, best=best)
    return Finding("underfitting", "info", (), numbers, why)


def _narrow_layers(ev: Evidence) -> tuple[str, ...]:
    """Return hidden layers with at most a quarter as many units as there are outputs."""
    outputs = ev.static.get("output_units") or 1
    if ev.wiring.get("target_is_input"):
        return ()  # intended in autoencoders
    bypassed = ev.wiring.get("bypassed") or ()  # scores and gates
    hidden = [i for i in ev.chain[:-1] if ev.site(i).role == "weight"]
    return tuple(
        ev.site(i).name
        for i in hidden
        if ev.site(i).fan_out * 4 <= outputs
        and ev.site(i).name not in bypassed
        and ev.site(i).kind.startswith("Linear")
    )


def still_falling(ev: Evidence, found: set[str]) -> Finding | None:
    """Find an intact run with low skill whose loss still falls: it takes more steps."""
    if found or not ev.trained or ev.record.failure is not None or ev.final_skill >= 0.6:
        return None
    numbers = {"learned": max(ev.final_skill, 0.0), "update_ratio": ev.median_update or 0.0}
    why = sentence("why_falling", steps=ev.record.steps)
    # no better than a constant
    behind = ev.final_skill <= 0 and (ev.median_update or 0.0) < e.SMALL_UPDATE
    return Finding("slow_convergence", "warning" if behind else "info", (), numbers, why)


def _with_cause(ev: Evidence, why: Sentence) -> Sentence:
    """Add the scale of the inputs if it explains a symptom."""
    size = (ev.record.data.get("inputs") or {}).get("rms")
    if not size or 0.01 <= size <= 10 or ev.record.data.get("normalised_inside"):
        return why
    return sentence("why_scale", why=why, size=size)


SYMPTOMS = (
    exploding_gradient,
    vanishing_gradient,
    dying_relu,
    saturated_activation,
    poor_init,
    oscillating_loss,
    slow_convergence,
    overfitting,
)


def symptoms(ev: Evidence) -> list[Finding]:
    """Return the findings among the nine labels."""
    findings = [f for check in SYMPTOMS if (f := check(ev)) is not None]
    for residual in (underfitting, still_falling):
        extra = residual(ev, {f.code for f in findings})
        findings += [extra] if extra is not None else []
    return findings
