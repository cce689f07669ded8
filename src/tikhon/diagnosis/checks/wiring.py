"""Findings about the wiring of a program: graph, rows, positions, structure, unread inputs.

Pure functions of the evidence; standard library only. What is measured: `tikhon.diagnosis.wiring`.
Loss and targets: `loss.py`; the data: `data.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from tikhon.diagnosis import thresholds as e
from tikhon.diagnosis.checks.causes import display_name
from tikhon.diagnosis.checks.initial import bias_share, poor_init
from tikhon.diagnosis.checks.static import scales
from tikhon.diagnosis.evidence import Evidence, middle, number, sizes
from tikhon.diagnosis.findings import Finding
from tikhon.diagnosis.record import Site
from tikhon.languages import Sentence, sentence, strings


def _cut_fix(name: str, otherwise: Sentence) -> Sentence:
    """Return the fix of a call that cuts the graph, by its name."""
    key = f"fix_cut_{name.strip('_')}"
    return sentence(key) if key in strings("en") else otherwise


def _graph(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    cuts = w.get("cuts") or []
    if w.get("connected") is False and ev.record.trainable and not w.get("detached"):
        name = cuts[0]["name"] if cuts else ""
        place = cuts[0]["place"] if cuts else ""
        where = (place,) if place else ()
        why = sentence("why_unconnected")
        if cuts:
            why = sentence("why_cuts_all", name=name, place=place)
        numbers = {"parameters": float(ev.record.trainable)}
        fix = _cut_fix(name, sentence("fix_loss_of_output"))
        yield Finding("loss_not_connected", "critical", where, numbers, why, fix=fix)
    flat = w.get("flat")
    if flat and ev.has_zero_gradients:
        name, place = flat["name"], flat["place"]
        why = sentence("why_flat", name=name, place=place)
        numbers = {"parameters": float(ev.record.trainable)}
        fix = sentence("fix_only_in_metrics", name=flat["name"])
        yield Finding("loss_not_connected", "critical", (place,), numbers, why, fix=fix)
    loose = list(w.get("unregistered") or [])
    if loose:
        count = len(loose)
        why = sentence("why_unregistered", count=count)
        numbers = {"parameters": float(count)}
        fix = registration_line(loose[0])
        yield Finding("unregistered_parameters", "critical", tuple(loose), numbers, why, fix=fix)
    if w.get("made_in_forward"):
        made = float(w["made_in_forward"])
        where = (w["made_place"],) if w.get("made_place") else ()
        why = sentence("why_made", count=made)
        numbers = {"made": made}
        fix = sentence("fix_layer_in_init")
        yield Finding("layers_made_in_forward", "critical", where, numbers, why, fix=fix)


def _zero_gradients(ev: Evidence) -> Iterable[Finding]:
    """Find a loss whose gradient is 0 at every output, or lacks what most of its slope is."""
    silent = ev.wiring.get("answers_silent")
    explained = ev.wiring.get("flat") or ev.has_softmax_of_one
    if silent and ev.has_zero_gradients and not explained:
        clamp = ev.wiring.get("clamped_by")
        why = sentence("why_answers_silent", place=silent)
        fix = sentence("fix_print_factor")
        if clamp:
            why = sentence("why_answers_clamped", name=clamp, place=silent)
            fix = "torchvision.ops.generalized_box_iou_loss, F.softplus"
        numbers = {"parameters": float(ev.record.trainable)}
        yield Finding("loss_not_connected", "critical", (silent,), numbers, why, fix=fix)
    unseen = ev.wiring.get("unseen_slope")
    if unseen and not (ev.wiring.get("detached") or ev.wiring.get("sampled")):
        why = sentence("why_unseen_slope", **unseen)
        fix = _cut_fix(unseen["name"], sentence("fix_loss_of_output"))
        numbers = {"slope_seen": unseen["share"]}
        severity = ev.severity("warning")
        yield Finding("loss_not_connected", severity, (unseen["place"],), numbers, why, fix=fix)


def registration_line(name: str) -> str:
    """Return the line that registers the attribute `name` of a module.

    >>> registration_line("blocks[0].weight")
    'self.blocks = nn.ModuleList(self.blocks)'
    >>> registration_line("block(Block).linear.weight")
    'class Block(nn.Module), with super().__init__() in its __init__'
    """
    held = re.match(r"(?:.*\.)?(\w+)\((\w+)\)", name)
    if held and held[2] == "closure":
        return sentence("fix_keep_layer", name=held[1])
    if held:
        return sentence("fix_make_module", name=held[2])
    owner, bracket, rest = name.partition("[")
    attribute = owner.rpartition(".")[2]
    if not bracket:
        return f"self.{attribute} = nn.Parameter(self.{attribute})"
    kind = "Module" if "." in rest else "Parameter"
    kind += "Dict" if rest[:1] in QUOTES else "List"
    return f"self.{attribute} = nn.{kind}(self.{attribute})"


QUOTES = ("'", '"')


def _detached(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    lost = tuple(w.get("detached") or ())
    if not lost:
        return
    cuts = w.get("cuts") or []
    name = cuts[0]["name"] if cuts else "detach"
    place = cuts[0]["place"] if cuts else "forward"
    spared = set(ev.static.get("unoptimized") or ())
    meant = set(lost) <= spared  # untrained parts are often detached on purpose
    why = sentence("why_detached", count=len(lost), name=name, place=place)
    numbers = {"parameters": float(len(lost))}
    fix = sentence("fix_detached", cut=_cut_fix(name, sentence("fix_cut_other")))
    yield Finding("detached", "info" if meant else "critical", lost, numbers, why, fix=fix)


def _equal_outputs(ev: Evidence) -> Iterable[Finding]:
    single = tuple(ev.wiring.get("norms_of_one") or ())
    if single:
        why = sentence("why_norm_of_one", place=display_name(single[0]))
        fix = sentence("fix_wider_norm")
        yield Finding("inputs_ignored", "critical", single, {"norm_values": 1.0}, why, fix=fix)
        return
    yield from _one_step_used(ev)
    alike = ev.wiring.get("alike")
    if alike is None or (alike.get("zero") and not ev.trained):
        return
    if ev.record.failure is not None:
        return  # NaNs are equal, too
    if _explained_otherwise(ev, alike) or _padding_dominates(ev):
        return
    module, after = alike.get("module", ""), alike.get("after", "")
    where = (module,) if module else tuple(v for v in (after, alike.get("before")) if v)
    why = sentence("why_alike", layer=display_name(module), kind=alike.get("kind", ""))
    if not module:
        why = sentence("why_alike_after", place=after)
    if not module and not after:
        why = sentence("why_lost_inputs")
    fix = sentence("fix_print_hidden")
    yield Finding("inputs_ignored", "critical", where, {}, why, fix=fix)


def _padding_dominates(ev: Evidence) -> bool:
    """Whether rows get equal outputs because padding dominates."""
    share, apart = (ev.fact(key) or 0.0 for key in ("padding", "padding_apart"))
    return share >= e.PADDING and apart >= e.PADDED


def _one_step_used(ev: Evidence) -> Iterable[Finding]:
    step, length = ev.wiring.get("only_step"), ev.wiring.get("input_length")
    mixed = any((ev.fact(k) or 0.0) >= e.APART for k in ("rows_apart", "order_of_rows"))
    if step is None or length is None or mixed:
        return
    why = sentence("why_only_step", length=length, step=step)
    fix = sentence("fix_last_step")
    numbers = {"only_step": float(step), "input_length": float(length)}
    yield Finding("inputs_ignored", ev.severity("info"), ("inputs",), numbers, why, fix=fix)


def _explained_otherwise(ev: Evidence, alike: dict[str, Any]) -> bool:
    """Whether other findings explain equal rows: dead or saturated units, equal weights."""
    first = ev.first
    if first is None or ev.has_softmax_of_one:
        return True
    near = {alike.get("module", ""), alike.get("after", "").partition(" ")[0]}
    for i, reading in enumerate(first.readings):  # dead because of a bias, not of equal inputs
        if (reading.dead or 0) > 0.95 and 3 <= bias_share(ev, ev.layer_before(i)) < math.inf:
            return True
    for i, site in enumerate(ev.record.sites):
        follower = ev.activation_after(i) if site.name in near and i in ev.chain else None
        near_site = i if site.name in near else None
        here = [first.readings[k] for k in (near_site, follower) if k is not None]
        if any((r.dead or 0) > 0.95 or (r.saturated or 0) > 0.95 or r.constant for r in here):
            return True
    return False


def _rows_mixed(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    apart = ev.fact("rows_apart") or 0.0
    softmax = w.get("softmax_over_rows")
    # random numbers drawn per row change with the order without mixing rows
    drawn = (ev.fact("eval_spread") or 0.0) >= e.APART
    order = 0.0 if drawn else ev.fact("order_of_rows") or 0.0
    if apart < e.APART and not softmax and order < e.APART:
        return
    if apart < e.APART and not softmax:
        why = sentence("why_places", share=order)
        fix = sentence("fix_time_axis")
        yield Finding("rows_mixed", "critical", (), {"order_of_rows": order}, why, fix=fix)
        return
    place = w.get("rows_place") or {}
    module, kind = place.get("module", ""), place.get("kind", "")
    numbers = {"rows_apart": apart}
    where = (module,) if module else ()
    if softmax:
        where = (softmax,)
        why = sentence("why_softmax_rows", place=softmax)
        fix = sentence("fix_class_axis")
    elif (
        re.search("^(LSTM|GRU|RNN)$|Transformer|Attention", kind)
        and place.get("batch_first") != "True"
    ):
        why = sentence("why_rows_as_time", layer=display_name(module), kind=kind)
        fix = f"nn.{kind}(..., batch_first=True)"
    elif "BatchNorm" in kind:
        why = sentence("why_batch_statistics", layer=display_name(module), kind=kind)
        fix = "track_running_stats=True; F.batch_norm(..., training=self.training)"
    elif module:
        why = sentence("why_layer_mixes", layer=display_name(module), kind=kind)
        fix = sentence("fix_keep_rows")
    else:
        behind = place.get("after") or "the inputs"
        why = sentence("why_rows_behind", place=behind)
        where = tuple(v for v in (place.get("after"), place.get("before")) if v)
        fix = sentence("fix_transpose_rows")
        view = w.get("reshape") or {}
        if w["rows"] in view.get("from", ()):
            where = (view["place"],)
            why = sentence("why_rows_reshaped", place=view["place"])
            fix = sentence("fix_rows_first")
    if apart >= e.APART:
        why = sentence("why_neighbours", why=why, share=apart)
    yield Finding("rows_mixed", "critical", where, numbers, why, fix=fix)


def _future_visible(ev: Evidence) -> Iterable[Finding]:
    apart = ev.fact("future_apart") or 0.0
    if apart < e.APART:
        return
    why = sentence("why_future", share=apart)
    both = any(s.kind.startswith(("LSTM", "GRU", "RNN")) for s in ev.record.sites)
    fix = "bidirectional=False" if both else (sentence("fix_causal_mask"))
    yield Finding("future_visible", "critical", (), {"future_apart": apart}, why, fix=fix)


def _target_given(ev: Evidence) -> Iterable[Finding]:
    apart = ev.fact("target_given")
    if apart is None:
        return
    why = sentence("why_told_answer", apart=apart)
    fix = sentence("fix_shift_target")
    numbers = {"target_given": apart}
    yield Finding("target_among_inputs", "critical", ("inputs",), numbers, why, fix=fix)


def _shifted_twice(ev: Evidence) -> Iterable[Finding]:
    ahead = ev.fact("ahead")
    if ahead is None or ahead < 2:
        return
    why = sentence("why_shifted_twice", ahead=ahead)
    where, numbers = ("the loss",), {"ahead": ahead}
    yield Finding("shifted_twice", "critical", where, numbers, why, fix=sentence("fix_shift_once"))


def _positions_mixed(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    change = w.get("reshape")
    elsewhere = ev.fact("answers_elsewhere") or 0.0
    if change and w["rows"] in change["from"] and (ev.fact("rows_apart") or 0) >= e.APART:
        change = None  # reported as mixed rows
    if not change and elsewhere <= 0.5:
        return
    if change:
        before, after = (sizes(change[k], w["rows"]) for k in ("from", "to"))
        axes = axis_order(change["from"], change["to"])
        where = (change["place"],)
        why = sentence("why_reshape", before=before, after=after)
        fix = (
            sentence("fix_permute_for_view", axes=", ".join(map(str, axes)))
            if axes
            else sentence("fix_permute_before")
        )
    else:
        where = ("the loss",)
        why = sentence("why_mixed_axes")
        fix = sentence("fix_transpose_output")
    yield Finding("positions_mixed", "critical", where, {}, why, fix=fix)


def _pooled_features(ev: Evidence) -> Iterable[Finding]:
    found = ev.wiring.get("pooled_features")
    if not found:
        return
    why = sentence("why_pooled_features", **{k: found[k] for k in ("name", "size", "positions")})
    fix = sentence("fix_pool_positions")
    yield Finding("positions_mixed", ev.severity("info"), (found["place"],), {}, why, fix=fix)


def _interleaved(ev: Evidence) -> Iterable[Finding]:
    given, read = ev.wiring.get("lines") or (0.0, 0.0)
    if read < e.SMOOTHER * given:
        why = sentence("why_interleaved", given=given, read=read)
        fix = sentence("fix_permute_pictures")
        numbers = {"lines": given, "lines_read": read}
        yield Finding("positions_mixed", "warning", ("inputs",), numbers, why, fix=fix)


def axis_order(before: list[int], after: list[int]) -> list[int]:
    """Return the permutation between two shapes; empty if sizes repeat or differ.

    >>> axis_order([8, 5, 3], [8, 3, 5])
    [0, 2, 1]
    """
    if sorted(before) != sorted(after) or len(set(before)) != len(before):
        return []
    return [before.index(size) for size in after]


def _no_nonlinearity(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    bend = ev.fact("bend")
    layers = [i for i in ev.chain if ev.site(i).role == "weight"]
    bends = [s for s in ev.record.sites[: layers[-1] if layers else 0] if s.role == "activation"]
    if bend is None or bend >= e.BENT or not layers:
        return
    bent, straight = (ev.fact(f"explained_{k}") for k in ("bent", "straight"))
    gain = bent - straight if bent is not None and straight is not None else 0.0
    harmed = ev.trained and ev.final_skill < e.LEARNED and not w.get("target_is_input")
    may_bend = bool(bends) and not _are_discarded(ev, bends)  # on rows that were not tried
    if (may_bend or len(layers) < 2) and not (harmed and gain > e.BENDS):
        return  # one layer is meant to be straight
    if not bends and len(layers) < 2 and (straight or 0.0) > (bent or 0.0) / 2:
        return  # yes and no bend at their edge alone, which a straight function finds
    numbers = {"bend": bend, "layers": float(len(layers))}
    names: tuple[str, ...] = tuple(ev.site(i).name for i in layers)
    why = sentence("why_straight", count=len(layers))
    fix = sentence("fix_relu_between", layers=" and ".join(names[:2]))
    if bends:
        kinds = " and ".join(dict.fromkeys(s.kind for s in bends))
        why = sentence("why_straight_through", count=len(layers), kinds=kinds)
        fix = sentence("fix_use_activation")
    elif len(layers) < 2:
        why = sentence("why_straight_alone", name=display_name(names[0]))
        fix = sentence("fix_hidden_layer", layer=names[0] or sentence("called_model"))
    if gain > e.BENDS:
        numbers |= {"explained_bent": bent or 0.0, "explained_straight": straight or 0.0}
        why = sentence("why_bends", why=why, bent=bent or 0.0, straight=max(straight or 0.0, 0.0))
    severity = "warning" if harmed or gain > e.BENDS else "info"
    if _one_sign(ev) and (poor_init(ev) is not None or any(True for _ in scales(ev))):
        severity = "info"  # what makes every unit see one sign has a name of its own
    elif gain > e.BENDS and (harmed or not ev.trained) and len(layers) > 1:
        severity = "critical"  # one layer may be meant to be straight
    yield Finding("no_nonlinearity", severity, names, numbers, why, fix=fix)


def _are_discarded(ev: Evidence, activations: list[Site]) -> bool:
    """Whether no gradient comes back through any of the activations: their results are unused."""
    first = ev.first
    if first is None:
        return False
    names = {s.name for s in activations}
    signals = [r.signal for s, r in zip(ev.record.sites, first.readings) if s.name in names]
    return all(signal is None for signal in signals)


def _one_sign(ev: Evidence) -> bool:
    """Whether each rectified unit is on for all rows or for none, and so acts linearly."""
    first = ev.first
    if first is None:
        return False
    pairs = zip(ev.record.sites, first.readings)
    read = [(r.dead, r.slope) for s, r in pairs if s.role == "activation"]
    seen = [(dead, slope) for dead, slope in read if dead is not None and slope is not None]
    return bool(seen) and all(abs(dead + slope**2 - 1) < e.ONE_SIGN for dead, slope in seen)


def _no_positions(ev: Evidence) -> Iterable[Finding]:
    apart = ev.fact("order_apart")
    failure = ev.record.failure  # other tests of outputs that are not finite mean nothing
    if apart is None or apart >= e.APART or (failure is not None and failure.step == 0):
        return
    nexts = (ev.fact("target_is_next") or 0.0) >= 0.95
    gain = ev.fact("order_gain") or 0.0
    harmed = ev.may_be_harmed or ev.validation_skill < e.LEARNED
    matters = nexts or (gain > e.BENDS and harmed and not _padding_dominates(ev))
    why = sentence("why_no_order")
    if gain > e.BENDS:
        why = sentence("why_order_gain", why=why, gain=gain)
    numbers = {"order_apart": apart}
    fix = "x = x + self.positions(torch.arange(x.shape[1], device=x.device))"
    yield Finding("no_positions", "critical" if matters else "info", (), numbers, why, fix=fix)


def _unscaled_attention(ev: Evidence) -> Iterable[Finding]:
    scores = ev.wiring.get("undivided")
    if not scores or scores["now"] >= e.FOCUSED or scores["then"] - scores["now"] < 0.2:
        return
    size, now, then = scores["size"], scores["now"], scores["then"]
    place = scores["place"] or "the attention"
    why = sentence("why_undivided", place=place, size=size, now=now, then=then)
    numbers = {"entropy": now, "entropy_divided": then, "size": float(size)}
    fix = sentence("fix_scale_attention", size=size)
    yield Finding("collapsed_attention", "warning", (place,), numbers, why, fix=fix)


def _posterior_collapse(ev: Evidence) -> Iterable[Finding]:
    later = {"given_back": ev.fact("given_back"), "given_steps": ev.record.steps}
    later |= ev.record.reference
    left, steps = (number(later[k]) or 0.0 for k in ("given_back", "given_steps"))
    if not ev.ignores_code or left >= e.GIVEN_BACK:
        return
    why = sentence("why_given_back", steps=round(steps), left=left)
    fix = sentence("fix_divergence_weight")
    yield Finding("posterior_collapse", "critical", (), {"given_back": left}, why, fix=fix)


def _embedding_collapse(ev: Evidence) -> Iterable[Finding]:
    later: dict[str, Any] = ev.wiring | ev.record.reference
    left, losses = number(later.get("embeddings_left")), later.get("embedding_losses")
    if left is None or left >= e.COLLAPSED or not losses:
        return
    loss, constant = losses
    if constant - loss > e.LITTLE * abs(constant):
        return  # they are close together, yet better than one embedding for all
    why = sentence("why_embedding_collapse", left=left, loss=loss, constant=constant)
    fix = sentence("fix_all_triplets")
    where, numbers = (ev.wiring["embeds"],), {"embeddings_left": left, "loss": loss}
    yield Finding("embedding_collapse", "critical", where, numbers, why, fix=fix)


def _random_in_eval(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    spread, carried = ev.fact("eval_spread") or 0.0, ev.fact("carried")
    if carried is not None:
        why = sentence("why_carried", carried=carried)
        fix = sentence("fix_reset_state")
        harmed = ev.may_be_harmed or ev.validation_skill < e.LEARNED
        severity = "warning" if harmed and not ev.wiring.get("in_order") else "info"
        yield Finding("random_in_eval", severity, (), {"eval_spread": carried}, why, fix=fix)
    if spread < e.APART:
        return
    places = tuple(w.get("eval_places") or ())
    why = sentence("why_random", spread=spread)
    fix = sentence("fix_draw_in_training")
    if w.get("eval_dropout"):
        fix = sentence("fix_functional_dropout")
    # samplers, and losses that call the model, draw on purpose; one answer a row has one value
    meant = w.get("whole") or w.get("target_is_input") is not False
    severity = "warning" if w.get("eval_dropout") or not meant else "info"
    yield Finding("random_in_eval", severity, places, {"eval_spread": spread}, why, fix=fix)


def _few_rows_per_norm(ev: Evidence) -> Iterable[Finding]:
    counts = ev.wiring.get("norm_values") or {}
    few = {n: c for n, c in counts.items() if 2 <= c <= e.FEW_VALUES}
    if not few:
        return
    least = min(few.values())
    harmed = ev.may_be_harmed or ev.validation_skill < e.LEARNED
    severity = "warning" if harmed else "info"
    why = sentence("why_few_values", count=least)
    fix = sentence("fix_group_norm", layer=min(few))
    numbers = {"norm_values": float(least), "batch_size": float(ev.record.batch_size)}
    yield Finding("batchnorm_few_rows", severity, tuple(few), numbers, why, fix=fix)


def _updates_lost(ev: Evidence) -> Iterable[Finding]:
    lately = ev.record.probes[-6:]
    known = {i: middle(p.readings[i].stuck for p in lately) for i in ev.chain}
    stuck = {i: share for i, share in known.items() if share is not None}
    sick = [i for i, share in stuck.items() if share >= e.STUCK]
    if not sick or ev.final_skill >= e.LEARNED:
        return
    worst = max(stuck[i] for i in sick)
    why = sentence("why_stuck", share=worst)
    names = tuple(ev.site(i).name for i in sick)
    fix = sentence("fix_autocast")
    yield Finding("updates_lost", "critical", names, {"stuck": worst}, why, fix=fix)


def _shared_layers(ev: Evidence) -> Iterable[Finding]:
    shared = tuple(ev.static.get("shared") or ())
    if shared:
        why = sentence("why_shared", count=len(shared))
        severity = "warning" if ev.trained and ev.may_be_harmed else "info"
        numbers = {"layers": float(len(shared))}
        fix = sentence("fix_new_layers")
        yield Finding("shared_layers", severity, shared, numbers, why, fix=fix)


def _unused_inputs(ev: Evidence) -> Iterable[Finding]:
    """Find parts of the inputs that no output depends on, though the targets do."""
    found = ev.wiring.get("unread")
    mixed = any((ev.fact(k) or 0.0) >= e.APART for k in ("rows_apart", "order_of_rows"))
    if not found or mixed or "only_step" in ev.wiring:
        return
    every, read = (ev.fact(f"explained_{k}") for k in ("all", "read"))
    gain = every - max(read, 0.0) if every is not None and read is not None else 0.0
    related = "place" in found or gain > e.BENDS
    if "place" in found:
        place, count = found["place"], found["inputs"]
        why = sentence("why_unread_input", place=place, count=count)
        where, numbers = (f"input {place}",), {"inputs": float(count)}
        fix = sentence("fix_use_arguments")
    else:
        share, entries = float(found["share"]), int(found["entries"])
        first = ", ".join(map(str, found["first"]))
        why = sentence("why_unread_entries", share=share, first=first)
        if related:
            why = sentence("why_unread_worth", why=why, gain=gain)
        where, numbers = ("inputs",), {"unread": share, "columns": float(entries)}
        fix = sentence("fix_whole_input")
    severity = "critical" if ev.may_be_harmed and related else "info"
    yield Finding("inputs_ignored", severity, where, numbers, why, fix=fix)


def _eps_rounds_to_zero(ev: Evidence) -> Iterable[Finding]:
    lost = tuple(ev.static.get("eps_lost") or ())
    if not lost or (ev.record.failure is None and not ev.may_be_harmed):
        return
    eps = float(ev.record.optimizer.get("eps") or 0.0)
    why = sentence("why_eps_lost", eps=eps)
    numbers = {"parameters": float(len(lost))}
    yield Finding("undefined_operation", "critical", lost, numbers, why, fix=sentence("fix_eps"))


CHECKS = (
    _graph,
    _zero_gradients,
    _detached,
    _equal_outputs,
    _rows_mixed,
    _future_visible,
    _target_given,
    _shifted_twice,
    _positions_mixed,
    _pooled_features,
    _interleaved,
    _no_nonlinearity,
    _no_positions,
    _unscaled_attention,
    _posterior_collapse,
    _embedding_collapse,
    _random_in_eval,
    _few_rows_per_norm,
    _updates_lost,
    _shared_layers,
    _unused_inputs,
    _eps_rounds_to_zero,
)
