"""Findings about single operations on the way from the answers to the loss.

Pure functions of the evidence; standard library only. What is measured: `tikhon.diagnosis.wiring`.
"""

from __future__ import annotations

from collections.abc import Iterable

from tikhon.diagnosis import thresholds as e
from tikhon.diagnosis.evidence import Evidence, sizes
from tikhon.diagnosis.findings import Finding
from tikhon.languages import said

INTO_RANGE = {
    "counts": "the loss that fits the targets, as nn.MSELoss()",
    "signs": "target = 2 * target - 1",
    "shares": "(target - low) / (high - low)",
    "numbers": "nn.MultiLabelSoftMarginLoss() of a column of 0 and 1 for each class",
    "logs": "F.kl_div(output, target, log_target=True)",
}


def _broadcast(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    pull, spread = ev.fact("pull_on_others"), w.get("broadcast")
    numbers = {"pull_on_others": pull} if pull is not None else {}
    if not spread:
        if pull is not None and pull >= e.PULL:
            why = said("why_contrastive")
            yield Finding("loss_mixes_rows", "info", ("the loss",), numbers, why)
        return
    a, b = (sizes(s, w["rows"]) for s in spread["shapes"])
    name = spread["function"].strip("_")
    if pull is not None and pull >= e.PULL:
        why = said("why_broadcast", function=name, a=a, b=b)
    else:
        why = said("why_broadcast_rows", function=name, a=a, b=b)
    fix = "give both one shape: .squeeze(-1) on neither, or on both"
    if pull is not None and w.get("output_shape") != w.get("target_shape"):
        fix = "loss(output, target.view_as(output))"
    where = (spread["place"] or "the loss",)
    yield Finding("broadcast_loss", "critical", where, numbers, why, fix=fix)


def _unequal(ev: Evidence) -> Iterable[Finding]:
    found = ev.wiring.get("unequal")
    if not found or ev.wiring.get("broadcast"):
        return
    a, b = (sizes(s, ev.wiring["rows"]) for s in found["shapes"])
    why = said("why_unequal", a=a, b=b)
    fix = "as many answers as targets; or .sum(1, keepdim=True) of what should be one number"
    where = (found["place"] or "the loss",)
    yield Finding("broadcast_loss", "critical", where, {}, why, fix=fix)


def _weighed(ev: Evidence) -> Iterable[Finding]:
    found = ev.wiring.get("weighed")
    if not found:
        return
    why = said("why_weighed")
    fix = "(criterion(output, target) * weight).mean() with reduction='none'"
    where = (found["place"],)
    yield Finding("broadcast_loss", "critical", where, {}, why, fix=fix)


def _sampled(ev: Evidence) -> Iterable[Finding]:
    draw = ev.wiring.get("sampled")
    if not draw:
        return
    why = said("why_sampled")
    fix = "rsample() in place of sample()"
    if draw["name"] in ("multinomial", "bernoulli", "poisson"):
        fix = "-log_prob(draw) * gain.detach(), or F.gumbel_softmax(scores) in place of the draw"
    where = (draw["place"],)
    yield Finding("detached", "critical", where, {}, why, fix=fix)


def _infinite(ev: Evidence) -> Iterable[Finding]:
    found = ev.wiring.get("infinite")
    if not found or not ev.silent:
        return
    why = said("why_infinite_pick", name=found["name"])
    numbers = {"parameters": float(ev.record.trainable)}
    fix = "the mask on the other side: +inf in front of min, -inf in front of max"
    where = (found["place"],)
    yield Finding("loss_not_connected", "critical", where, numbers, why, fix=fix)


def _no_curvature(ev: Evidence) -> Iterable[Finding]:
    place = ev.wiring.get("no_curvature")
    if not place:
        return
    why = said("why_no_curvature")
    fix = "nn.Tanh(), nn.SiLU() or torch.sin in place of nn.ReLU()"
    yield Finding("no_nonlinearity", "critical", (place,), {}, why, fix=fix)


def _index(ev: Evidence) -> Iterable[Finding]:
    place = ev.wiring.get("index_mask")
    if not place:
        return
    why = said("why_index_mask")
    fix = "x[mask.bool()]"
    yield Finding("ignored_rows", "critical", (place,), {}, why, fix=fix)


def _asked_back(ev: Evidence) -> Iterable[Finding]:
    found = ev.wiring.get("asked_back")
    widths = [ev.site(i).fan_out for i in ev.chain if ev.site(i).role == "weight"]
    if not found or min(widths, default=0) < found["numbers"]:
        return  # what has to pass a bottleneck is worth asking for
    why = said("why_asked_back")
    fix = "compare with what the input was before the noise, or with the noise"
    where = (found["place"],)
    yield Finding("target_among_inputs", "critical", where, {}, why, fix=fix)


def _itself(ev: Evidence) -> Iterable[Finding]:
    place = ev.wiring.get("finds_itself")
    if place:
        why = said("why_finds_itself")
        fix = "F.cross_entropy(a @ b.T / temperature, torch.arange(len(a))), a and b two views"
        where = (place,)
        yield Finding("target_among_inputs", "critical", where, {}, why, fix=fix)


def _nearer(ev: Evidence) -> Iterable[Finding]:
    found = ev.wiring.get("nearer")
    if found:
        why = said("why_nearer", sure=found["sure"])
        fix = "F.triplet_margin_loss(anchor, positive, negative)"
        where, numbers = (found["place"],), {"nearer": float(found["sure"])}
        yield Finding("loss_upside_down", "critical", where, numbers, why, fix=fix)


def _pulled_goal(ev: Evidence) -> Iterable[Finding]:
    place = ev.wiring.get("pulled_goal")
    if place:
        why = said("why_pulled_goal")
        fix = "goal = reward + discount * following.detach()"
        yield Finding("target_not_detached", "warning", (place,), {}, why, fix=fix)


def _squashed_twice(ev: Evidence) -> Iterable[Finding]:
    found = ev.wiring.get("squashed_twice")
    if not found:
        return
    by, loss = found["by"], found["loss"]
    why = said("why_squashed_twice", loss=loss, by=by)
    fix = f"F.{loss}(scores, target), without the {by}"
    severity = "critical" if ev.harmed else "warning"
    yield Finding("head_mismatch", severity, (found["place"],), {}, why, fix=fix)


def _place_for_value(ev: Evidence) -> Iterable[Finding]:
    place = ev.wiring.get("index_as_number")
    if place:
        why = said("why_place_for_value")
        effect = said("effect_place_for_value")
        advice = ("the value of the largest entry",)
        fix = "x.max(1).values in place of x.argmax(1), .max(1)[0] in place of .max(1)[1]"
        code = "classes_as_numbers"
        yield Finding(code, "critical", (place,), {}, why, effect=effect, advice=advice, fix=fix)


def _mixed_slopes(ev: Evidence) -> Iterable[Finding]:
    place = ev.wiring.get("mixed_derivatives")
    if place:
        why = said("why_mixed_slopes")
        fix = "torch.autograd.grad(u_x[:, k].sum(), x, create_graph=True)[0][:, k], for each k"
        yield Finding("mixed_derivatives", "warning", (place,), {}, why, fix=fix)


def _over_rows(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    picked, normed = w.get("gathered_over_rows"), w.get("normed_over_rows")
    if picked:
        why = said("why_gathered", place=picked)
        fix = "answers.gather(1, index[:, None])"
        advice = ("the axis of the classes",)
        yield Finding("rows_mixed", "critical", (picked,), {}, why, advice=advice, fix=fix)
    elif w.get("compared_over_rows"):
        place = w["compared_over_rows"]
        why = said("why_cosines_over_rows", place=place)
        fix = "F.cosine_similarity(output, target, dim=1)"
        advice = ("the axis of the columns",)
        yield Finding("rows_mixed", "critical", (place,), {}, why, advice=advice, fix=fix)
    elif normed:
        why = said("why_normed_over_rows", place=normed)
        effect = said("effect_normed_over_rows")
        advice = ("the length of each row",)
        fix = "F.normalize(z, dim=1), z / z.norm(dim=1, keepdim=True)"
        yield Finding(
            "rows_mixed", "critical", (normed,), {}, why, effect=effect, advice=advice, fix=fix
        )


def _bounded_scores(ev: Evidence) -> Iterable[Finding]:
    found = ev.wiring.get("bounded_scores")
    if not found or ev.wiring.get("normed_over_rows"):
        return
    floor = float(found["floor"])
    why = said("why_bounded_scores", floor=floor)
    fix = "scores / temperature, of 0.05 to 0.5: not times the temperature"
    numbers = {"floor": floor}
    where = (found["place"] or "the loss",)
    yield Finding("head_mismatch", "critical", where, numbers, why, fix=fix)


def _ends(ev: Evidence) -> Iterable[Finding]:
    place, mark = ev.wiring.get("looks_ahead"), ev.wiring.get("idle_mark")
    if not place or not mark:
        return
    why = said("why_ends", mark=mark)
    fix = "goal = reward + discount * (1 - done) * following"
    where, numbers = (place,), {"inputs": float(mark)}
    yield Finding("ends_not_masked", "critical", where, numbers, why, fix=fix)


def _breaches(ev: Evidence) -> Iterable[Finding]:
    told = set()
    for breach in ev.wiring.get("breaches") or ():
        name, place, kind = breach["function"], breach["place"], breach.get("kind", "")
        where = (place or "the loss",)
        if (name, kind) in told or (kind == "shares" and not ev.wiring.get("whole")):
            continue  # of targets beside the answers all rows are known
        told.add((name, kind))
        if breach["code"] == "constant_targets":
            ranked = kind == "pairs" and ev.wiring.get("candidates")
            if ev.wiring.get("constant_target") and not ev.wiring.get("whole") and not ranked:
                continue  # the data say it themselves
            same = float(breach["low"])
            if kind == "pairs":
                why = said("why_pairs_alike", name=name, same=same)
                fix = "labels 1 of pairs that are alike and -1 of others, with enough of both"
                numbers = {"target_low": same, "target_high": same}
                code = "constant_targets"
                yield Finding(code, "critical", where, numbers, why, fix=fix)
                continue
            why = said("why_one_partner")
            fix = "F.cross_entropy(a @ b.T / temperature, torch.arange(len(a)))"
            numbers = {"target_low": same, "target_high": same}
            yield Finding("constant_targets", "critical", where, numbers, why, fix=fix)
            continue
        if breach["code"] in ("head_mismatch", "undefined_operation"):
            yield from _inside(ev, breach)
            continue
        if breach["code"] == "missing_log":
            why = said("why_no_log", name=name)
            fix = "F.log_softmax(output, dim=1) before it; or nn.CrossEntropyLoss() of the scores"
            if name == "ctc_loss":
                fix = "output.log_softmax(-1) before it"
            numbers = {"log_sum": float(breach["gap"])}
            yield Finding("missing_log", "critical", where, numbers, why, fix=fix)
            continue
        low, high = breach["low"], breach["high"]
        fix = INTO_RANGE[kind]
        why = said(f"why_range_{kind}", name=name, low=low, high=high)
        numbers = {"target_low": low, "target_high": high}
        yield Finding("target_out_of_range", "critical", where, numbers, why, fix=fix)


def _inside(ev: Evidence, breach: dict[str, str]) -> Iterable[Finding]:
    """What may stand inside of the network: a choice of one, a logarithm of a free parameter."""
    name, where = breach["function"], (breach["place"] or "forward",)
    if breach["code"] == "undefined_operation":
        why = said("why_free_log", name=name)
        fix = "s.exp() where the weight stands, and s where its logarithm stands"
        yield Finding("undefined_operation", "warning", where, {}, why, fix=fix)
    elif breach.get("kind") == "probabilities":
        if not {"softmax"} & set(ev.static.get("head") or ()):
            yield from _probabilities(ev, where)
    elif not ev.wiring.get("softmax_over_one") and "softmax" not in (ev.static.get("head") or ()):
        why = said("why_softmax_of_one")
        fix = "scores.softmax(1).topk(1), not scores.topk(1).values.softmax(1)"
        if breach.get("kind"):
            why = said("why_softmax_of_position")
            fix = "scores.softmax(1), the axis of the positions, for scores of (n, positions, 1)"
        severity = "critical" if ev.harmed else "warning"
        yield Finding("head_mismatch", severity, where, {}, why, fix=fix)


def _probabilities(ev: Evidence, where: tuple[str, ...]) -> Iterable[Finding]:
    if ev.wiring.get("squashed_twice"):
        return
    why = said("why_given_probabilities")
    fix = "F.cross_entropy(scores, target); or F.nll_loss of their log_softmax"
    severity = "critical" if ev.harmed else "warning"
    yield Finding("head_mismatch", severity, where, {}, why, fix=fix)


CHECKS = (
    _broadcast,
    _unequal,
    _weighed,
    _sampled,
    _infinite,
    _no_curvature,
    _index,
    _asked_back,
    _itself,
    _nearer,
    _pulled_goal,
    _ends,
    _squashed_twice,
    _place_for_value,
    _mixed_slopes,
    _over_rows,
    _bounded_scores,
    _breaches,
)
