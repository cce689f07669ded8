"""Findings that need no training: limited heads, unscaled data, untrained parameters.

Pure functions of the evidence; standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tikhon.diagnosis import thresholds as e
from tikhon.diagnosis.checks.causes import display_name, head_floor, head_site
from tikhon.diagnosis.evidence import Evidence, number
from tikhon.diagnosis.findings import Finding
from tikhon.languages import sentence


def _data(ev: Evidence) -> Iterable[Finding]:
    bad = ev.record.data.get("nonfinite") or []
    if bad:
        why = sentence("why_nonfinite", what=" and the ".join(sorted(set(bad))))
        severity = "critical"
        if ev.record.data.get("left_out") and ev.record.failure is None:
            why = sentence("why_left_out", why=why)
            severity = "info"
        yield Finding("non_finite_data", severity, (), {"tensors": len(bad)}, why)


def scales(ev: Evidence) -> Iterable[Finding]:
    """Find inputs and targets of a scale that no initialisation is made for."""
    inputs, target = ev.record.data.get("inputs") or {}, ev.record.data.get("target") or {}
    rms = number(inputs.get("rms"))
    normed = any(site.role == "norm" for site in ev.record.sites)
    only_in_training = normed and ev.mode_losses is not None  # reported otherwise
    learned = ev.trained and (ev.final_skill >= e.LEARNED or only_in_training)
    if rms is not None and not ev.record.data.get("normalised_inside"):
        if ev.skill_gain("scaled") > e.FREED:
            numbers = {"rms": rms, **ev.skill_evidence("scaled")}
            why = sentence("why_scaled", size=rms, **ev.skill_evidence("scaled"))
            yield Finding("unscaled_inputs", "warning", ("inputs",), numbers, why)
        elif (rms > 10 or 0 < rms < 0.01) and not learned:
            why = sentence("why_inputs", size=rms)
            yield Finding("unscaled_inputs", "warning", ("inputs",), {"rms": rms}, why)
        elif (apart := number(inputs.get("std"))) and _is_far_off(ev) and not learned:
            why = sentence("why_offset", mean=inputs.get("mean", 0.0), apart=apart)
            numbers = {"offset": rms / apart}
            fix = sentence("fix_own_mean")
            yield Finding("unscaled_inputs", "warning", ("inputs",), numbers, why, fix=fix)
    squeezed, far = ev.fact("squeezed"), ev.wiring.get("far_rows")
    if squeezed and squeezed > e.SQUEEZED and not learned:
        why = sentence("why_far_rows", rows=far or 0, share=squeezed)
        fix = sentence("fix_clamp")
        numbers = {"squeezed": squeezed}
        yield Finding("unscaled_inputs", "warning", ("inputs",), numbers, why, fix=fix)
    dominant = ev.wiring.get("drowned") or {}
    times = number(dominant.get("times")) or 0.0
    if times > e.DROWNED:
        why = sentence("why_drowned", **dominant)
        fix = sentence("fix_scale_targets")
        numbers = {"column_pull": times}
        yield Finding("unscaled_targets", "warning", ("target",), numbers, why, fix=fix)
        return
    if ev.skill_gain("shifted") > e.FREED:
        numbers = ev.skill_evidence("shifted")
        why = sentence("why_shifted", mean=target["mean"], **numbers)
        yield Finding("unscaled_targets", "critical", ("target",), numbers, why, fix="bias=True")
        return
    size, spread = number(target.get("rms")), number(target.get("std"))
    explained = ev.trained and ev.final_skill >= e.LEARNED
    if size is not None and spread is not None and size > 10 and not explained:
        why = sentence("why_targets", mean=target.get("mean", 0.0), spread=spread)
        yield Finding("unscaled_targets", "warning", ("target",), {"rms": size}, why)


def _is_far_off(ev: Evidence) -> bool:
    """Whether inputs lie many standard deviations from zero."""
    inputs = ev.record.data.get("inputs") or {}
    rms, apart = number(inputs.get("rms")), number(inputs.get("std"))
    return bool(rms and apart) and (rms or 0.0) > e.OFFSET * (apart or 0.0)


def _rectified_scores(ev: Evidence) -> Iterable[Finding]:
    zero = ev.fact("own_score_zero")
    if zero is not None and zero >= e.UNLIFTED and ev.final_skill < e.LEARNED:
        why = sentence("why_rectified_scores", share=zero)
        fix = sentence("fix_remove_relu")
        where = (head_site(ev),)
        yield Finding("head_mismatch", "critical", where, {"own_score_zero": zero}, why, fix=fix)


WITH_LOGITS = "binary_cross_entropy_with_logits"


def _head(ev: Evidence) -> Iterable[Finding]:
    floor = head_floor(ev)
    head = ev.static.get("head") or []
    if ev.has_softmax_of_one:
        why = sentence("why_one_softmax")
        where = (ev.wiring.get("softmax_over_one") or head_site(ev),)
        numbers = {"floor": floor}
        fix = sentence("fix_one_output_per_class")
        yield Finding("head_mismatch", "critical", where, numbers, why, fix=fix)
        return
    unit = ev.fact("unit_scores")
    if unit is not None and unit >= e.FLOOR:
        why = sentence("why_one_score", share=unit)
        fix = sentence("fix_scale_scores")
        yield Finding("head_mismatch", "critical", (head_site(ev),), {"floor": unit}, why, fix=fix)
        return
    if ev.skill_gain("bared") > e.STEADIER:
        where, numbers = tuple(ev.norms_at_end), ev.skill_evidence("bared")
        why = sentence("why_bared", layer=display_name(where[0]), **numbers)
        fix = sentence("fix_remove_last", name=where[0])
        yield Finding("head_mismatch", "critical", where, numbers, why, fix=fix)
        return
    shares = ev.static.get("unbounded_shares")
    if shares:
        lowest, right = float(shares["lowest"]), float(shares["right"])
        why = sentence("why_shares", right=right, lowest=lowest)
        fix = "loss(torch.sigmoid(output), target)"
        yield Finding("head_mismatch", "critical", ("the loss",), {"loss": lowest}, why, fix=fix)
        return
    used = ev.wiring.get("loss_functions") or ()
    twice = head[-1:] == ["sigmoid"] and ev.may_be_harmed and WITH_LOGITS in used
    if not head or (floor < e.FLOOR and not twice):
        return
    if ev.wiring.get("target_is_input") and _is_far_off(ev):
        return  # the head is made for scaled inputs
    name = " and ".join(head)
    if twice:
        why = sentence("why_sigmoid_twice")
    elif ev.static.get("own_softmax"):
        why = sentence("why_two_softmax", name=name)
    else:
        why = sentence("why_head", name=name, floor=floor)
    fix = sentence("fix_remove_before_loss", name=name)
    where = (head_site(ev),)
    yield Finding("head_mismatch", "critical", where, {"floor": floor}, why, fix=fix)


def _reduction(ev: Evidence) -> Iterable[Finding]:
    if ev.static.get("grows_with_batch"):
        why = sentence("why_sum")
        evidence = {"batch_size": float(ev.record.batch_size)}
        yield Finding("loss_is_a_sum", "warning", (), evidence, why)
        return
    share = number(ev.static.get("grows_in_part")) or 0.0
    if share > e.PART_SUM:
        why = sentence("why_part_sum", share=share)
        evidence = {"batch_size": float(ev.record.batch_size), "summed": share}
        fix = sentence("fix_mean_everywhere")
        yield Finding("loss_is_a_sum", "warning", ("the loss",), evidence, why, fix=fix)


def _dropout(ev: Evidence) -> Iterable[Finding]:
    for name, rate in (ev.static.get("dropout") or {}).items():
        if rate > 0.9:
            why = sentence("why_drops", layer=display_name(name), rate=rate)
            yield Finding("excessive_dropout", "warning", (name,), {"rate": rate}, why)
    last = ev.static.get("dropout_at_end") or []
    rates = {n: r for n, r in (ev.static.get("dropout") or {}).items() if 0 < r <= 0.9}
    most = max(rates.values(), default=0.0)
    bar = e.STEADIER if most >= e.FEW_PASS else e.FREED
    if rates and ev.skill_gain("undropped") > bar and not last:
        free, learned = ev.control("undropped") or 0.0, max(ev.final_skill, 0.0)
        why = sentence("why_undropped", free=free, learned=learned, count=len(rates), rate=most)
        numbers = {"rate": most, "learned": learned, "undropped": free}
        fix = sentence("fix_dropout_rates")
        yield Finding("excessive_dropout", "warning", tuple(rates), numbers, why, fix=fix)
    if last:
        why = sentence("why_last_dropout")
        where = tuple(line for line in last if line)
        fix = sentence("fix_dropout_before")
        severity = "warning" if ev.may_be_harmed else "info"
        numbers = {"learned": max(ev.final_skill, 0.0)}
        yield Finding("dropout_at_end", severity, where, numbers, why, fix=fix)
    for name in ev.static.get("dropout_before_norm") or []:
        layer = display_name(name)
        why = sentence("why_dropout_norm", layer=layer)
        yield Finding("dropout_before_norm", "info", (name,), {}, why)


def _batch_of_one(ev: Evidence) -> Iterable[Finding]:
    layers = tuple(ev.static.get("batch_of_one") or ())
    if layers:
        why = sentence("why_batch_of_one")
        yield Finding("batchnorm_batch_of_one", "critical", layers, {"batch_size": 1.0}, why)


WAY_BACK = re.compile(r"weight_hh_l\d+_reverse$")  # which its first step does not use
FREED = {
    "frozen_parameters": sentence("fix_unfreeze"),
    "unused_parameters": "",
    "missing_from_optimizer": "torch.optim.Adam(model.parameters(), ...)",
}


def _parameters(ev: Evidence) -> Iterable[Finding]:
    static = ev.static
    if ev.record.trainable == 0:
        why = sentence("why_untrainable")
        if not ev.record.parameters:
            why = sentence("why_no_parameters")
        yield Finding("nothing_to_train", "critical", (), {}, why)
        return
    if static.get("foreign_optimizer"):
        why = sentence("why_other_optimizer")
        numbers = {"parameters": float(ev.record.trainable)}
        fix = sentence("fix_optimizer_last")
        yield Finding("missing_from_optimizer", "critical", ("optimizer",), numbers, why, fix=fix)
    yield from _loss_parameters(ev)
    cut = set(ev.wiring.get("detached") or ())
    rows = (
        ("frozen", "frozen_parameters", "info", sentence("why_frozen")),
        ("unused", "unused_parameters", "warning", sentence("why_unused")),
        ("unoptimized", "missing_from_optimizer", "warning", sentence("why_unoptimized")),
    )
    for key, code, severity, why in rows:
        listed = tuple(n for n in static.get(key) or () if key != "unused" or n not in cut)
        if key == "unused" and listed and all(map(WAY_BACK.search, listed)):
            harmed = "critical" if ev.may_be_harmed else "info"
            why, fix = sentence("why_way_back"), "torch.cat([h_n[-2], h_n[-1]], 1)"
            yield Finding("inputs_ignored", harmed, listed, {}, why, fix=fix)
            continue
        numbers = {"parameters": float(len(listed))}
        if key != "unused" and ev.skill_gain("unfrozen") > e.FREED:
            free = ev.control("unfrozen") or 0.0
            severity = "critical"
            numbers |= {"learned": max(ev.final_skill, 0.0), "unfrozen": free}
            why = sentence("why_unfrozen", why=why, free=free, learned=max(ev.final_skill, 0.0))
        elif key == "unoptimized" and (
            set(listed) <= cut or (ev.trained and ev.final_skill >= e.LEARNED)
        ):
            severity = "info"  # left out on purpose, as in fine-tuning
        if listed:
            yield Finding(code, severity, listed, numbers, why, fix=FREED[code])
    if static.get("changes_in_forward"):
        why = sentence("why_changes")
        yield Finding("changes_in_forward", "warning", (), {}, why)


def _loss_parameters(ev: Evidence) -> Iterable[Finding]:
    """Find parameters of the loss that are not in the optimizer."""
    judge, small = ev.wiring.get("judge"), ev.fact("weights_of_loss") or 0.0
    if not judge and not small:
        return
    why = sentence("why_loss_weights", count=int(small))
    if judge:
        why = sentence("why_loss_layer", kind=judge)
    fix = "torch.optim.Adam([*model.parameters(), *criterion.parameters()], ...)"
    numbers = {"parameters": small or 1.0}
    code = "missing_from_optimizer"
    yield Finding(code, "warning", (judge or "the loss",), numbers, why, fix=fix)


def _modes(ev: Evidence) -> Iterable[Finding]:
    if ev.mode_losses is not None:
        train, evaluated = ev.mode_losses
        numbers = {"train_mode_loss": train, "eval_mode_loss": evaluated}
        why = sentence("why_modes", train=train, eval=evaluated)
        yield Finding("train_eval_mismatch", "warning", (), numbers, why)


def _missing_residual(ev: Evidence) -> Iterable[Finding]:
    if ev.skill_gain("skipped") > e.STEADIER:
        layers, numbers = tuple(ev.wiring.get("nothing_past") or ()), ev.skill_evidence("skipped")
        why = sentence("why_skipped", count=len(layers), **numbers)
        fix = "x = x + attention(x)"
        yield Finding("residual_missing", "critical", layers, numbers, why, fix=fix)


def _collapsed_attention(ev: Evidence) -> Iterable[Finding]:
    first = ev.first
    if first is None or ev.final_skill >= e.LEARNED:
        return
    for site, reading in zip(ev.record.sites, first.readings):
        if reading.entropy is not None and reading.entropy < 0.1:
            layer = display_name(site.name)
            why = sentence("why_attention", layer=layer, entropy=reading.entropy)
            numbers = {"entropy": reading.entropy}
            yield Finding("collapsed_attention", "warning", (site.name,), numbers, why)


CHECKS = (
    _data,
    scales,
    _rectified_scores,
    _head,
    _reduction,
    _dropout,
    _batch_of_one,
    _parameters,
    _modes,
    _missing_residual,
    _collapsed_attention,
)
