"""Findings about a loss and its targets: shapes, signs, ranges, padding, undefined operations.

Pure functions of the evidence; standard library only. What is measured: `tikhon.diagnosis.wiring`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

from tikhon.diagnosis import thresholds as e
from tikhon.diagnosis.evidence import Evidence, number
from tikhon.diagnosis.findings import Finding
from tikhon.diagnosis.functions import ATTENDING, BINARY, COMPARED
from tikhon.languages import Sentence, sentence

ENTROPIES = {"cross_entropy", "log_softmax", "softmax"}
OPERATIONS = {
    name: fix
    for names, fix in {
        "softmax": sentence("fix_masked_softmax"),
        "scaled_dot_product_attention": sentence("fix_masked_attention"),
        "log": sentence("fix_log"),
        "log2": "torch.log2(x.clamp_min(1e-8))",
        "log10": "torch.log10(x.clamp_min(1e-8))",
        "log1p": "torch.log1p(x.clamp_min(-1 + 1e-6))",
        "sqrt": sentence("fix_sqrt"),
        "rsqrt": "torch.rsqrt(x + 1e-8)",
        "div true_divide __truediv__ __rtruediv__": "x / (y + 1e-8)",
        "reciprocal": "1 / (x + 1e-8)",
        "pow __pow__": "(x + 1e-8) ** p",
        "norm": sentence("fix_norm"),
        "acos asin": "x.clamp(-1 + 1e-6, 1 - 1e-6)",
        "std": "torch.sqrt(x.var() + 1e-8)",
    }.items()
    for name in names.split()
}


def _ignored_targets(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    used = w.get("targets_used")
    if not w.get("indifferent") or w.get("broadcast") or w.get("flat") or used is None:
        return
    if w.get("target_is_input") and w.get("scored") and (ev.fact("target_columns") or 0) > 1:
        return  # the output is one log-likelihood per row of its inputs
    related = (ev.fact("relation") or 0.0) >= e.RELATED
    harmed = ev.shallow_gain is not None and ev.final_skill < e.LEARNED
    why = sentence("why_no_targets")
    fix = sentence("fix_compare_target")
    severity = "warning" if harmed else "info"
    if used:
        why = sentence("why_whole_batch")
        fix = sentence("fix_not_of_means")
        severity = "critical" if related else "info"  # may compare distributions on purpose
    relation = ev.fact("relation")
    numbers = {"relation": relation} if relation is not None else {}
    yield Finding("loss_ignores_targets", severity, ("the loss",), numbers, why, fix=fix)


def _ignored_columns(ev: Evidence) -> Iterable[Finding]:
    ignored = ev.wiring.get("deaf_columns")
    if not ignored:
        return
    named = ", ".join(map(str, ignored[:5]))
    why = sentence("why_deaf_columns", named=named)
    numbers = {"columns": float(len(ignored))}
    code, severity = "loss_ignores_targets", "critical" if ev.may_be_harmed else "warning"
    yield Finding(code, severity, ("the loss",), numbers, why, fix=sentence("fix_all_columns"))


def _costly_correct_boxes(ev: Evidence) -> Iterable[Finding]:
    share = ev.fact("box_beaten")
    if share is None or share < e.UNKNOWN:
        return
    why = sentence("why_box_beaten", share=share)
    where = ("the loss",)
    code = "loss_ignores_targets"
    yield Finding(code, "critical", where, {"box_beaten": share}, why, fix=sentence("fix_corners"))


def _inverted_loss(ev: Evidence) -> Iterable[Finding]:
    if ev.static.get("maximize"):
        why = sentence("why_climbs_on_purpose")
        fix = "maximize=False"
        yield Finding("loss_upside_down", "critical", ("optimizer",), {}, why, fix=fix)
        return
    endless = number(ev.static.get("without_end"))
    if endless:
        why = sentence("why_no_end", loss=endless)
        fix = sentence("fix_both_sides")
        numbers = {"loss": endless}
        yield Finding("loss_upside_down", "critical", ("the loss",), numbers, why, fix=fix)
        return
    part = next(_inverted_parts(ev), None)
    if part is not None:
        yield part
        return
    pulls_away = ev.fact("pulls_away")
    pull = ev.fact("pull_on_others") or 0.0
    alike = ev.fact("alike_label")
    if pulls_away is not None and alike is not None:
        if pulls_away == 1 - alike:
            why = sentence("why_pairs_apart")
            fix = sentence("fix_swap_parts")
            numbers = {"pulls_away": pulls_away}
            yield Finding("loss_upside_down", "critical", ("the loss",), numbers, why, fix=fix)
        return
    # distances are >= 0 and have no final sigmoid
    distances = ev.wiring.get("distances") and not ev.static.get("head")
    if pulls_away is None or pulls_away < 1 or pull >= e.PULL or distances:
        return
    why = sentence("why_pulls_away")
    numbers = {"pulls_away": pulls_away}
    fix = sentence("fix_negate_loss")
    yield Finding("loss_upside_down", "critical", ("the loss",), numbers, why, fix=fix)


def _inverted_parts(ev: Evidence) -> Iterator[Finding]:
    """Find a part of the loss, or one of several outputs, with the wrong sign."""
    w = ev.wiring
    code, where = "loss_upside_down", ("the loss",)
    entropy, volume = ev.fact("entropy_pulled"), ev.fact("determinant_pulled")
    if entropy is not None and entropy > 0:
        why = sentence("why_entropy_down")
        fix = "loss = policy_loss - weight * entropy.mean()"
        yield Finding(code, "warning", (w.get("entropy_place") or "the loss",), {}, why, fix=fix)
    if volume is not None and volume > 0:
        why = sentence("why_determinant_down")
        fix = sentence("fix_log_density")
        yield Finding(code, "critical", where, {}, why, fix=fix)
    far = w.get("answer_without_end")
    if far:
        cost = float(far["loss"])
        why = sentence("why_answer_without_end", place=far["place"], all=far["of"], loss=cost)
        fix = sentence("fix_divergence_signs")
        yield Finding(code, "critical", where, {"loss": float(far["loss"])}, why, fix=fix)
    if w.get("draws_above"):
        why = sentence("why_draws_above")
        fix = "-F.logsigmoid(score_of_data - score_of_draw).mean()"
        yield Finding(code, "critical", where, {}, why, fix=fix)


def _unbounded_loss(ev: Evidence) -> Iterable[Finding]:
    """Find a loss that falls without bound for no other known reason."""
    fall = _endless_fall(ev)
    if fall is None or any(True for _ in _inverted_loss(ev)):
        return
    fix = sentence("fix_print_parts")
    numbers = {"loss": ev.curve[-1]}
    yield Finding("loss_upside_down", "warning", ("the loss",), numbers, fall, fix=fix)


def _outweighed_error(ev: Evidence) -> Iterable[Finding]:
    """Find a loss that falls although its own error of outputs grows: a reward outweighs it."""
    used = set(ev.wiring.get("loss_functions") or ())
    compared = sorted(used & COMPARED)
    if used & (BINARY | ENTROPIES):
        return  # some outputs are logits, whose R2 says nothing
    scores = [(number(point.eval_loss), number(point.metric)) for point in ev.record.points]
    known = [(loss, r2) for loss, r2 in scores if loss is not None and r2 is not None]
    if len(known) < 2 or not compared or ev.record.failure is not None:
        return
    (first, before), (lowest, after) = known[0], min(known)
    if lowest >= first or after >= min(0.0, before) - e.WORSE:
        return
    values = {"first": first, "last": lowest, "before": before, "after": after}
    why = sentence("why_error_outweighed", name=compared[0], **values)
    numbers = {"r2_at_start": before, "r2": after, "loss": lowest}
    fix = sentence("fix_print_parts")
    yield Finding("loss_upside_down", "critical", ("the loss",), numbers, why, fix=fix)


def _endless_fall(ev: Evidence) -> Sentence | None:
    """Return the reason of a run whose loss falls far below zero and does not slow down."""
    curve = ev.curve
    if len(curve) < 9:
        return None
    third = (len(curve) - 1) // 3
    marks = [curve[0], curve[third], curve[2 * third], curve[-1]]
    drops = [a - b for a, b in pairwise(marks)]
    if marks[-1] >= -e.FAR_BELOW * max(1.0, abs(marks[0])) or min(drops) <= 0:
        return None
    if e.FASTER * drops[0] < drops[1] and e.FASTER * drops[1] < drops[2]:
        return sentence("why_ever_faster", first=marks[0], last=marks[-1])
    if drops[2] >= e.UNDIMINISHED * drops[1] >= e.UNDIMINISHED / 2 * drops[0]:
        return sentence("why_same_pace", first=marks[0], last=marks[-1])
    return None


def _target_range(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    used = set(w.get("loss_functions") or ())
    low, high = ev.fact("target_low"), ev.fact("target_high")
    if low is None or high is None:
        return
    if w.get("swapped"):
        name = w["swapped"]
        why = sentence("why_answers_for_targets", name=name)
        numbers = {"target_low": low, "target_high": high}
        fix = f"F.{name}(output, target)"
        yield Finding("target_out_of_range", "critical", ("the loss",), numbers, why, fix=fix)
        return
    inside = w.get("binary_range") or [low, high]  # of the columns passed to the loss
    numbers = {"target_low": low, "target_high": high}
    if used & BINARY and (low < 0 or high > 1) and (inside[0] < 0 or inside[1] > 1):
        why = sentence("why_bce_range", low=low, high=high)
        scaled = f"target = (target - {low:.4g}) / {high - low:.4g}"
        scaled = f"target = target / {high:.4g}" if low == 0 else scaled
        fix = (
            "target = (target + 1) / 2"
            if (low, high) == (-1, 1)
            else (sentence("fix_more_than_two") if w.get("target_whole") else scaled)
        )
        yield Finding("target_out_of_range", "critical", ("target",), numbers, why, fix=fix)
    if w.get("zeros_unheard") and not any(b.get("kind") == "signs" for b in w["breaches"]):
        why = sentence("why_zero_costs_nothing")
        fix = "target = 2 * target - 1"
        yield Finding("target_out_of_range", "critical", ("target",), numbers, why, fix=fix)
    below = ev.fact("below_zero")
    if below is not None and not used & BINARY and (low < 0 or high > 1):
        why = sentence("why_yes_and_no", low=low, high=high, below=below)
        fix = (
            sentence("fix_one_output_a_class")
            if w.get("target_whole")
            else "(y - low) / (high - low)"
        )
        numbers |= {"loss": below}
        yield Finding("target_out_of_range", "critical", ("target",), numbers, why, fix=fix)


def _multilabel_softmax(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    used = set(w.get("loss_functions") or ())
    most = number((w.get("target_sums") or [0, 0])[1]) or 0.0
    if used & ENTROPIES and not used & BINARY and most > 1.01:
        why = sentence("why_multilabel", most=most)
        numbers = {"ones_in_a_row": most}
        fix = sentence("fix_bce_on_scores")
        yield Finding("multilabel_softmax", "warning", ("the loss",), numbers, why, fix=fix)
    heads, units = ev.static.get("head") or [], ev.static.get("output_units") or 1
    if used & BINARY and heads[-1:] == ["softmax"] and units > 1 and most > 1.01:
        why = sentence("why_several_by_softmax", most=most)
        fix = sentence("fix_bce_without_softmax")
        numbers = {"ones_in_a_row": most}
        yield Finding("multilabel_softmax", "critical", ("the loss",), numbers, why, fix=fix)
    cost = ev.fact("right_shares_cost")
    if heads[-1:] == ["sigmoid"] and cost is not None and cost > e.RIGHT_COSTS:
        why = sentence("why_shares_by_hand", cost=cost, most=most)
        fix = sentence("fix_bce_without_sum")
        numbers = {"ones_in_a_row": most, "loss": cost}
        yield Finding("multilabel_softmax", "critical", ("the loss",), numbers, why, fix=fix)


def _kind_of_loss(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    used = set(w.get("loss_functions") or ())
    gain = ev.fact("class_gain")
    one = w.get("output_shape") in ([], [1])
    if used & COMPARED and one and gain is not None and gain > e.BY_CLASS:
        values = int(w.get("target_values") or 0)
        why = sentence("why_as_numbers", count=values, gain=gain)
        fix = sentence("fix_class_head", count=values)
        numbers = {"class_gain": gain}
        yield Finding("classes_as_numbers", "warning", ("the loss",), numbers, why, fix=fix)
    turn = ev.fact("turn")
    if turn is not None and turn > e.TURN and one:
        why = sentence("why_turn", times=turn)
        fix = "nn.Linear(..., 2), F.mse_loss(output, torch.cat([y.cos(), y.sin()], 1))"
        numbers = {"turn": turn}
        yield Finding("angle_wraps", "warning", ("target",), numbers, why, fix=fix)
    left_out = w.get("background") or {}
    if (number(left_out.get("share")) or 0.0) >= e.MOST_LEFT_OUT:
        why = sentence("why_background", **left_out)
        fix = sentence("fix_background")
        numbers = {"left_out": float(left_out["share"])}
        yield Finding("ignored_rows", "warning", ("target",), numbers, why, fix=fix)
    without_gradient = ev.fact("unheard") or 0.0
    ignored_classes = w.get("silent_classes") or []
    if without_gradient >= e.UNHEARD and not ignored_classes:
        why = sentence("why_unheard", share=without_gradient)
        fix = sentence("fix_all_rows")
        numbers = {"unheard": without_gradient}
        yield Finding("ignored_rows", "critical", ("the loss",), numbers, why, fix=fix)
    if ignored_classes:
        named = ", ".join(map(str, ignored_classes[:5]))
        why = sentence("why_ignored", named=named)
        numbers = {"silent_classes": float(len(ignored_classes))}
        fix = sentence("fix_ignore_index")
        yield Finding("ignored_rows", "warning", ("the loss",), numbers, why, fix=fix)


def _operation(ev: Evidence) -> Iterable[Finding]:
    failure = ev.record.failure
    if failure is None or failure.call not in OPERATIONS:
        return
    smallest = number(failure.smallest)
    numbers = {"step": float(failure.step)}
    numbers |= {"smallest": smallest} if smallest is not None else {}
    name = failure.call.strip("_")
    values = {"name": name, "place": failure.place, "step": failure.step}
    why = sentence("why_undefined", **values, smallest=smallest or 0)
    if failure.call in ATTENDING:
        why = sentence("why_nothing_attended", **values)
    fix = OPERATIONS[failure.call]
    yield Finding("undefined_operation", "critical", (failure.place,), numbers, why, fix=fix)


def _padding(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    share = ev.fact("padding") or 0.0
    apart, counted = (ev.fact(f"padding_{k}") for k in ("apart", "counted"))
    if words := w.get("masked_words"):
        fix = sentence("fix_padding_mask")
        why = sentence("why_masked_words")
        yield Finding("padding_seen", "critical", (words,), {"padding": share}, why, fix=fix)
        return
    if apart is not None and apart >= e.PADDED and share >= e.PADDING:
        why = sentence("why_padding_apart", share=share, apart=apart)
        numbers = {"padding_apart": apart, "padding": share}
        queries = w.get("masked_queries")
        if queries:
            why = sentence("why_masked_queries", share=apart)
            fix = sentence("fix_mask_keys")
            yield Finding("padding_seen", "warning", (queries,), numbers, why, fix=fix)
            return
        severity = "warning" if ev.may_be_harmed else "info"
        fix = sentence("fix_padding_everywhere")
        yield Finding("padding_seen", severity, (), numbers, why, fix=fix)
    if w.get("ends_unasked"):
        why = sentence("why_ends_unasked")
        fix = sentence("fix_padding_token")
        yield Finding("ignored_rows", "warning", ("target",), {}, why, fix=fix)
    if counted is not None and counted >= e.PADDING:
        why = sentence("why_padding_counted", share=counted)
        numbers = {"padding": counted}
        fix = sentence("fix_padding_loss")
        yield Finding("padding_in_loss", "warning", ("the loss",), numbers, why, fix=fix)


CHECKS = (
    _ignored_targets,
    _ignored_columns,
    _costly_correct_boxes,
    _inverted_loss,
    _unbounded_loss,
    _outweighed_error,
    _target_range,
    _multilabel_softmax,
    _kind_of_loss,
    _padding,
    _operation,
)
