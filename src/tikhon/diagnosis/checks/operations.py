"""Findings about single operations on the way from the outputs to the loss.

Pure functions of the evidence; standard library only. What is measured: `tikhon.diagnosis.wiring`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tikhon.diagnosis import thresholds as e
from tikhon.diagnosis.evidence import Evidence, sizes
from tikhon.diagnosis.findings import Finding
from tikhon.languages import Sentence, sentence

INTO_RANGE = {
    "counts": sentence("fix_counts_into_range"),
    "signs": "target = 2 * target - 1",
    "shares": "(target - low) / (high - low)",
    "numbers": sentence("fix_numbers_into_range"),
    "logs": "F.kl_div(output, target, log_target=True)",
}


@dataclass(frozen=True)
class Placed:
    """The finding of a fact that is a place in the program, or values of `why` and a `place`.

    `fix` is a key or code; severity "harmed": critical if harm was measured, else warning.
    """

    fact: str
    code: str
    why: str
    fix: str
    severity: str = "critical"


PLACED = (
    Placed(
        "slope_without_graph",
        "detached",
        "why_slope_without_graph",
        "torch.autograd.grad(..., create_graph=True)",
    ),
    Placed("weighed", "broadcast_loss", "why_weighed", "fix_weighed"),
    Placed("no_curvature", "no_nonlinearity", "why_no_curvature", "fix_curvature"),
    Placed(
        "unlearned_part",
        "loss_not_connected",
        "why_unlearned_part",
        "fix_trained_first",
        "warning",
    ),
    Placed(
        "logs_of_targets",
        "target_out_of_range",
        "why_answers_for_targets",
        "-(target * scores.log_softmax(-1)).sum(-1).mean()",
    ),
    Placed("index_mask", "ignored_rows", "why_index_mask", "x[mask.bool()]"),
    Placed("finds_itself", "target_among_inputs", "why_finds_itself", "fix_two_views"),
    Placed(
        "nearer",
        "loss_upside_down",
        "why_nearer",
        "F.triplet_margin_loss(anchor, positive, negative)",
    ),
    Placed("one_following", "rows_mixed", "why_one_following", "following.max(1).values"),
    Placed(
        "pulled_goal",
        "target_not_detached",
        "why_pulled_goal",
        "goal = reward + discount * following.detach()",
        "warning",
    ),
    Placed(
        "pulled_value",
        "target_not_detached",
        "why_pulled_value",
        "-(log_prob * (reward - value).detach()).mean()",
    ),
    Placed("squashed_twice", "head_mismatch", "why_squashed_twice", "fix_raw_scores", "harmed"),
    Placed("index_as_number", "classes_as_numbers", "why_place_for_value", "fix_values_of_max"),
    Placed(
        "mixed_derivatives",
        "mixed_derivatives",
        "why_mixed_slopes",
        "fix_second_derivative",
        "warning",
    ),
    Placed(
        "gathered_over_rows", "rows_mixed", "why_gathered", "answers.gather(1, index[:, None])"
    ),
    Placed(
        "compared_over_rows",
        "rows_mixed",
        "why_cosines_over_rows",
        "F.cosine_similarity(output, target, dim=1)",
    ),
    Placed(
        "normed_over_rows",
        "rows_mixed",
        "why_normed_over_rows",
        "F.normalize(z, dim=1), z / z.norm(dim=1, keepdim=True)",
    ),
    Placed("over_queries", "positions_mixed", "why_over_queries", "fix_key_axis", "harmed"),
)


def _placed(ev: Evidence) -> Iterable[Finding]:
    for row in PLACED:
        fact = ev.wiring.get(row.fact)
        if not fact:
            continue
        severity = ev.severity("warning") if row.severity == "harmed" else row.severity
        values = fact if isinstance(fact, dict) else {"place": fact}
        numbers = {"nearer": float(fact["sure"])} if row.fact == "nearer" else {}
        why = sentence(row.why, **values)
        fix = sentence(row.fix) if row.fix.startswith("fix_") else row.fix
        yield Finding(row.code, severity, (values["place"],), numbers, why, fix=fix)


def _broadcast_loss(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    pull, spread = ev.fact("pull_on_others"), w.get("broadcast")
    numbers = {"pull_on_others": pull} if pull is not None else {}
    if not spread:
        if pull is not None and pull >= e.PULL:
            why = sentence("why_contrastive")
            yield Finding("loss_mixes_rows", "info", ("the loss",), numbers, why)
        return
    a, b = (sizes(s, w["rows"]) for s in spread["shapes"])
    name = spread["function"].strip("_")
    if pull is not None and pull >= e.PULL:
        why = sentence("why_broadcast", function=name, a=a, b=b)
    else:
        why = sentence("why_broadcast_rows", function=name, a=a, b=b)
    fix = sentence("fix_same_shape")
    if pull is not None and w.get("output_shape") != w.get("target_shape"):
        fix = "loss(output, target.view_as(output))"
    where = (spread["place"] or "the loss",)
    yield Finding("broadcast_loss", "critical", where, numbers, why, fix=fix)


def _unequal_columns(ev: Evidence) -> Iterable[Finding]:
    found = ev.wiring.get("unequal")
    if not found or ev.wiring.get("broadcast"):
        return
    a, b = (sizes(s, ev.wiring["rows"]) for s in found["shapes"])
    why = sentence("why_unequal", a=a, b=b)
    fix = sentence("fix_as_many_outputs")
    yield Finding("broadcast_loss", "critical", (found["place"] or "the loss",), {}, why, fix=fix)


def _sampled_detached(ev: Evidence) -> Iterable[Finding]:
    draw = ev.wiring.get("sampled")
    if not draw:
        return
    why = sentence("why_sampled")
    fix = sentence("fix_rsample")
    if draw["name"] in ("multinomial", "bernoulli", "poisson"):
        fix = sentence("fix_score_function")
    yield Finding("detached", "critical", (draw["place"],), {}, why, fix=fix)


def _denoising_target(ev: Evidence) -> Iterable[Finding]:
    found = ev.wiring.get("asked_back")
    widths = [ev.site(i).fan_out for i in ev.chain if ev.site(i).role == "weight"]
    if not found or min(widths, default=0) < found["numbers"]:
        return  # reconstruction through a bottleneck is a proper task
    why = sentence("why_asked_back")
    fix = sentence("fix_without_noise")
    yield Finding("target_among_inputs", "critical", (found["place"],), {}, why, fix=fix)


def _bounded_scores(ev: Evidence) -> Iterable[Finding]:
    found = ev.wiring.get("bounded_scores")
    if not found or ev.wiring.get("normed_over_rows"):
        return
    floor = float(found["floor"])
    why = sentence("why_bounded_scores", floor=floor)
    fix = sentence("fix_divide_temperature")
    where = (found["place"] or "the loss",)
    yield Finding("head_mismatch", "critical", where, {"floor": floor}, why, fix=fix)


def _unmasked_ends(ev: Evidence) -> Iterable[Finding]:
    place, mark = ev.wiring.get("looks_ahead"), ev.wiring.get("idle_mark")
    if not place or not mark:
        return
    why = sentence("why_ends", mark=mark)
    fix = "goal = reward + discount * (1 - done) * following"
    where, numbers = (place,), {"inputs": float(mark)}
    yield Finding("ends_not_masked", "critical", where, numbers, why, fix=fix)


def _domain_violations(ev: Evidence) -> Iterable[Finding]:
    reported = set()
    for breach in ev.wiring.get("breaches") or ():
        name, code, kind = breach["function"], breach["code"], breach.get("kind", "")
        where = (breach["place"] or "the loss",)
        if (name, kind) in reported or (kind == "shares" and not ev.wiring.get("whole")):
            continue  # known from all rows where targets are separate
        reported.add((name, kind))
        if code == "constant_targets":
            yield from _one_partner(ev, breach, where)
        elif code in ("head_mismatch", "undefined_operation"):
            yield from _violations_inside(ev, breach)
        elif kind == "rate":
            why, fix = sentence("why_rate_for_log", name=name), sentence("fix_rate_for_log")
            yield Finding("missing_log", "critical", where, {}, why, fix=fix)
        elif code == "missing_log":
            why = sentence("why_no_log", name=name)
            ctc = name == "ctc_loss"
            fix = sentence("fix_log_softmax_before") if ctc else sentence("fix_log_softmax")
            numbers = {"log_sum": float(breach["gap"])}
            yield Finding("missing_log", "critical", where, numbers, why, fix=fix)
        else:
            low, high = breach["low"], breach["high"]
            why = sentence(f"why_range_{kind}", name=name, low=low, high=high)
            numbers = {"target_low": low, "target_high": high}
            yield Finding(code, "critical", where, numbers, why, fix=INTO_RANGE[kind])


def _one_partner(ev: Evidence, breach: dict[str, Any], where: tuple[str]) -> Iterable[Finding]:
    """Find rows or pairs that are all given the same target in a call of the loss."""
    pairs, w = breach.get("kind") == "pairs", ev.wiring
    if w.get("constant_target") and not w.get("whole") and not (pairs and w.get("candidates")):
        return  # reported for the data
    same = float(breach["low"])
    why = sentence("why_one_partner")
    fix: Sentence | str = "F.cross_entropy(a @ b.T / temperature, torch.arange(len(a)))"
    if pairs:
        why = sentence("why_pairs_alike", name=breach["function"], same=same)
        fix = sentence("fix_pair_labels")
    numbers = {"target_low": same, "target_high": same}
    yield Finding("constant_targets", "critical", where, numbers, why, fix=fix)


def _violations_inside(ev: Evidence, breach: dict[str, str]) -> Iterable[Finding]:
    """Find faults inside of the network: softmax over one entry, log of a free parameter."""
    name, where, w = breach["function"], (breach["place"] or "forward",), ev.wiring
    if breach["code"] == "undefined_operation":
        why, severity = sentence("why_free_log", name=name), "warning"
        fix: Sentence | str = sentence("fix_log_parameter")
        if breach.get("kind") == "rate":
            why, severity = sentence("why_rate_below_zero", name=name), "critical"
            fix = "log_input=True"
        yield Finding("undefined_operation", severity, where, {}, why, fix=fix)
        return
    fix = "scores.softmax(1).topk(1), not scores.topk(1).values.softmax(1)"
    why, reported = sentence("why_softmax_of_one"), w.get("softmax_over_one")
    if breach.get("kind") == "probabilities":
        why, reported = sentence("why_given_probabilities"), w.get("squashed_twice")
        fix = sentence("fix_cross_entropy")
    elif breach.get("kind"):
        why = sentence("why_softmax_of_position")
        fix = sentence("fix_softmax_positions")
    if not reported and "softmax" not in (ev.static.get("head") or ()):
        yield Finding("head_mismatch", ev.severity("warning"), where, {}, why, fix=fix)


CHECKS = (
    _broadcast_loss,
    _unequal_columns,
    _sampled_detached,
    _denoising_target,
    _placed,
    _unmasked_ends,
    _bounded_scores,
    _domain_violations,
)
