"""Findings about the data: are inputs and targets related, and does validation agree?

Pure functions of the evidence; standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from tikhon.diagnosis import thresholds as e
from tikhon.diagnosis.evidence import Evidence, number
from tikhon.diagnosis.findings import Finding
from tikhon.diagnosis.functions import BINARY
from tikhon.languages import sentence


def _constant_inputs(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    share = ev.fact("constant_columns")
    if share is None:
        return
    count = float(w.get("columns") or 0)
    numbers = {"constant_columns": share, "columns": count}
    if _is_mostly_constant(ev):
        found = max(0.0, ev.fact("explained_straight") or 0.0, ev.fact("explained_bent") or 0.0)
        why = sentence("why_most_constant", share=share, count=count, told=found)
        fix = sentence("fix_print_differences")
        yield Finding("constant_inputs", "warning", ("inputs",), numbers, why, fix=fix)
        return
    # a loss that calls the model may take constants that the model never sees
    read = w.get("parts_read")
    constant_parts = [k for k in w.get("still_parts") or () if read is None or k in read]
    if constant_parts and share < 1 and ev.may_be_harmed:  # masks and positions may be constant
        where = tuple(f"inputs[{k}]" for k in constant_parts)
        why = sentence("why_input_constant", place=", ".join(where))
        severity = "warning" if ev.final_skill < e.LITTLE else "info"
        fix = sentence("fix_print_input", name=where[0])
        yield Finding("constant_inputs", severity, where, numbers, why, fix=fix)
        return
    if share < 0.9:
        return
    if share == 1:
        why = sentence("why_constant", count=count)
        if w.get("all_zero"):
            why = sentence("why_zero", count=count)
        fix = sentence("fix_print_rows")
        yield Finding("constant_inputs", "critical", ("inputs",), numbers, why, fix=fix)
    else:
        why = sentence("why_some_constant", share=share, count=count)
        fix = "x = x[:, x.std(0) > 0]"
        yield Finding("constant_inputs", "info", ("inputs",), numbers, why, fix=fix)


def _is_mostly_constant(ev: Evidence) -> bool:
    """Whether most columns of a table are constant and the others uninformative."""
    share, straight = ev.fact("constant_columns"), ev.fact("explained_straight")
    if share is None or straight is None or not ev.wiring.get("table"):
        return False
    explained = max(straight, ev.fact("explained_bent") or 0.0)
    return e.MOST_STILL <= share < 1 and explained < e.LITTLE


def _constant_targets(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    if not w.get("constant_target") or w.get("candidates"):
        return
    value = ev.fact("target_low") or 0.0
    why = sentence("why_one_target", value=value)
    # intended where a loss calls the model, as a generator's does, or never uses the targets
    unused = w.get("targets_used") is False
    goal = (w.get("whole") and ev.record.loss != "own_loss") or w.get("judged") or unused
    if w.get("judged"):
        why = sentence("why_judged", why=why)
    numbers = {"target_low": value, "target_high": ev.fact("target_high") or value}
    fix = sentence("fix_targets_rounded")
    # a softmax over one output allows no other class
    severity = "info" if goal else "warning" if ev.has_softmax_of_one else "critical"
    yield Finding("constant_targets", severity, ("target",), numbers, why, fix=fix)


def _unrelated_labels(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    z, rows = ev.fact("relation"), ev.fact("related_rows")
    beside, shift = ev.fact("row_beside") or 0.0, w.get("shift_of_rows")
    if shift and beside > e.ROW_BESIDE:
        why = sentence("why_row_beside", told=beside)
        fix = sentence("fix_shift_rows")
        numbers = {"row_beside": beside}
        yield Finding("unrelated_labels", "critical", ("target",), numbers, why, fix=fix)
        return
    if untold := w.get("untold"):
        gain, explained = max(0.0, float(untold["gain"])), float(untold["told"])
        why = sentence("why_untold", place=untold["place"], gain=gain, told=explained)
        fix = sentence("fix_one_order")
        where, numbers = (untold["place"],), {"part_gain": gain}
        yield Finding("unrelated_labels", "warning", where, numbers, why, fix=fix)
    if z is None or rows is None or rows < e.RELATED_ROWS or z >= e.RELATED:
        return
    constant = w.get("constant_columns") == 1 or w.get("constant_target")
    if constant or _is_mostly_constant(ev) or w.get("indifferent"):
        return
    if _few_classes(ev):
        return  # the classes of sorted rows are missing
    control = ev.record.reference
    advantage = number(control.get("advantage"))
    if advantage is not None and advantage >= e.ADVANTAGE:
        return  # the network fits true targets better than shuffled ones
    valid = number(ev.end.valid_metric) if ev.end is not None else None
    if valid is not None and valid > (ev.fact("majority") or 0.0) + 0.1:
        return  # it beats a constant on validation rows
    numbers = {"relation": z, "related_rows": rows}
    why = sentence("why_unrelated", z=z, limit=e.RELATED)
    if advantage is not None:
        numbers["advantage"] = advantage
        why = sentence("why_control", why=why)
    severity = "critical" if advantage is not None else "warning"
    rare = rows * (1 - (ev.fact("majority") or 0.0))
    if rare < e.RARE_ROWS and any(True for _ in _class_imbalance(ev)):
        severity, why = "info", sentence("why_few_rare", why=why, count=rare)
    fix = sentence("fix_same_order")
    yield Finding("unrelated_labels", severity, ("target",), numbers, why, fix=fix)


def _numbered_categories(ev: Evidence) -> Iterable[Finding]:
    """Find a column of numbers that stand for categories, in a run that does not use them."""
    explained, column = ev.fact("explained_by_category"), ev.fact("category_column")
    straight, bent = (ev.fact(f"explained_{k}") or 0.0 for k in ("straight", "bent"))
    reached = number(ev.end.metric) if ev.end is not None else None
    if explained is None or column is None or explained - max(straight, bent) < e.CODED:
        return
    is_embedded = any(site.role == "embedding" for site in ev.record.sites)
    if reached is None or explained - reached < e.CODED or is_embedded:
        return
    why = sentence("why_coded", column=int(column), explained=explained, bent=max(straight, bent))
    numbers = {"explained_by_category": explained, "explained_bent": max(straight, bent)}
    fix = f"nn.Embedding(categories, 8)(x[:, {int(column)}].long()), F.one_hot"
    yield Finding("categories_as_numbers", "warning", ("inputs",), numbers, why, fix=fix)


WeightedClasses = tuple[list[float], list[float]]  # share of the rows and weight of each class


def _class_weights(ev: Evidence) -> Iterable[Finding]:
    """Find weights of classes that are inverted, or leave the loss to one class."""
    w = ev.wiring
    shares, weights = w.get("class_shares"), w.get("class_weights")
    classes: list[WeightedClasses] = [(shares, weights)] if shares and weights else []
    pairs = zip(w.get("positive_shares") or (), w.get("positive_weights") or ())
    columns: list[WeightedClasses] = [([1 - s, s], [1.0, weight]) for s, weight in pairs]
    finding = _inverted_weights(ev, classes or columns) or _outweighing(ev, classes or columns)
    if finding is not None:
        fix = "weight=len(y) / (classes * y.bincount().float())"
        yield replace(finding, fix="pos_weight=(1 - y.mean(0)) / y.mean(0)" if columns else fix)


def _inverted_weights(ev: Evidence, tasks: list[WeightedClasses]) -> Finding | None:
    found = [(task, pair) for task in tasks if (pair := find_inverted_weights(*task)) is not None]
    if not found or 2 * len(found) < len(tasks):
        return None
    (shares, weights), (rare, common) = found[0]
    times = weights[common] / weights[rare]
    values = {"rare": rare, "share": shares[rare], "common": common, "other": shares[common]}
    why = sentence("why_weights_upside_down", times=times, **values)
    numbers = {"majority": shares[common], "counted_less": times}
    return Finding("class_imbalance", ev.severity("warning"), ("the loss",), numbers, why)


def _outweighing(ev: Evidence, tasks: list[WeightedClasses]) -> Finding | None:
    """Return the finding of a class of fewer rows that makes nearly all of the loss."""
    for shares, weights in tasks if ev.may_be_harmed else ():
        parts = [share * (number(weight) or 0.0) for share, weight in zip(shares, weights)]
        largest = max(range(len(parts)), key=parts.__getitem__)
        share, part = shares[largest], parts[largest] / (sum(parts) or 1.0)
        if part > e.OUTWEIGHING and share < e.MAJORITY:
            why = sentence("why_one_class", name=largest, share=share, part=part)
            numbers = {"majority": share, "loss_share": part}
            return Finding("class_imbalance", "critical", ("the loss",), numbers, why)
    return None


def find_inverted_weights(
    shares: Sequence[float], weights: Sequence[float]
) -> tuple[int, int] | None:
    """Return the rarest and the commonest class if the rare one has the smaller weight.

    >>> find_inverted_weights([0.9, 0.1], [1.0, 0.2])
    (1, 0)
    """
    weighted = [k for k, s in enumerate(shares) if s > 0 and (number(weights[k]) or 0.0) > 0]
    if len(weighted) < 2:
        return None
    rare, common = (pick(weighted, key=lambda k: shares[k]) for pick in (min, max))
    less = weights[rare] < weights[common] / e.COUNTED_LESS
    return (rare, common) if less and shares[common] >= e.RARER * shares[rare] else None


def _class_imbalance(ev: Evidence) -> Iterable[Finding]:
    share, end = ev.fact("majority"), ev.end
    metric = number(end.metric) if end is not None else None
    answered = ev.fact("answered")
    if share is None or share < e.MAJORITY or metric is None or not ev.trained:
        return
    if ev.wiring.get("constant_target") or (ev.wiring.get("dense") and answered is None):
        return  # a single class, or predictions that were not counted
    if _few_classes(ev):
        return  # sorted rows have other class shares than all rows
    # at most a tenth of the rare rows may be predicted
    bar = max(e.ALWAYS, 1 - 0.1 * (1 - share))
    always = abs(metric - share) <= 0.02 if answered is None else answered >= bar
    if not always or ev.record.failure is not None:
        return
    value = ev.fact("majority_value") or 0.0
    numbers = {"majority": share, "accuracy": metric}
    why = sentence("why_imbalance", accuracy=metric, value=value, share=share)
    if answered is not None:
        numbers["answered"] = answered
    fix = "nn.CrossEntropyLoss(weight=len(y) / (classes * y.bincount().float()))"
    if BINARY & set(ev.wiring.get("loss_functions") or ()):
        fix = sentence("fix_pos_weight")
    yield Finding("class_imbalance", "warning", ("target",), numbers, why, fix=fix)


def _target_in_inputs(ev: Evidence) -> Iterable[Finding]:
    columns = ev.wiring.get("target_columns_in_inputs") or []
    steps = ev.wiring.get("input_steps")
    if columns:
        named = ", ".join(map(str, columns))
        why = sentence("why_copied", named=named)
        fix = f"x = np.delete(x, {columns}, axis=1)"
        if steps:
            width = max(1, (ev.wiring.get("columns") or steps) // steps)
            why = sentence("why_copied_step", step=columns[0] // width, steps=steps)
            fix = sentence("fix_target_after_window")
        numbers = {"columns": float(len(columns))}
        yield Finding("target_among_inputs", "warning", ("inputs",), numbers, why, fix=fix)


def _changed_in_place(ev: Evidence) -> Iterable[Finding]:
    moved = ev.fact("targets_moved")
    if moved is not None and moved > e.TARGETS_MOVED:
        why = sentence("why_targets_moved", moved=moved)
        fix = sentence("fix_offset_new_tensor")
        severity = "critical" if ev.may_be_harmed else "warning"
        numbers = {"targets_moved": moved}
        yield Finding("data_changed_in_place", severity, ("data",), numbers, why, fix=fix)
    changed = ev.wiring.get("batch_changed")
    if changed:
        place = changed["place"] or "the loss"
        why = sentence("why_batch_changed", part=changed["part"] + 1, times=changed["times"])
        fix = sentence("fix_new_tensor")
        severity = "info" if ev.wiring.get("batch_collated") else "warning"
        code = "data_changed_in_place"
        yield Finding(code, severity, (place,), {"drift": changed["times"]}, why, fix=fix)
    drift = ev.fact("drift")
    if drift is None or 1 / e.STRETCH <= drift <= e.STRETCH:
        return
    why = sentence("why_drift", times=drift)
    fix = sentence("fix_scale_new_tensor")
    numbers = {"drift": drift}
    yield Finding("data_changed_in_place", ev.severity("info"), ("data",), numbers, why, fix=fix)


def _masks_left_behind(ev: Evidence) -> Iterable[Finding]:
    share, turned = ev.fact("moved_alone"), ev.fact("fits_moved")
    if turned is not None and turned > e.MOVED:
        why = sentence("why_fits_moved", turned=turned)
        fix = sentence("fix_same_turns")
        numbers = {"fits_moved": turned}
        yield Finding("masks_not_transformed", "critical", ("data",), numbers, why, fix=fix)
    if share is None or share <= 0.5:
        return
    why = sentence("why_moved_alone", share=share)
    fix = sentence("fix_draw_once")
    numbers = {"moved_alone": share}
    yield Finding("masks_not_transformed", "critical", ("data",), numbers, why, fix=fix)


def _validation(ev: Evidence) -> Iterable[Finding]:
    w = ev.wiring
    shift, scale = ev.fact("valid_shift"), ev.fact("valid_scale")
    if shift is not None and scale is not None:
        if shift > e.SHIFT or not 1 / e.STRETCH <= scale <= e.STRETCH:
            why = sentence("why_valid_scale", shift=shift, scale=scale)
            numbers = {"valid_shift": shift, "valid_scale": scale}
            fix = sentence("fix_scale_by_training")
            yield Finding("valid_differs", "warning", ("valid",), numbers, why, fix=fix)
    yield from _another_relation(ev)
    new, moved = w.get("new_classes") or [], ev.fact("class_shift") or 0.0
    if (ev.fact("rows_repeated") or 0.0) > e.REPEATED:
        moved = 0.0  # oversampling on purpose
    if new or moved > e.CLASS_SHIFT:
        why = sentence("why_valid_classes", moved=moved)
        if new:
            why = sentence("why_new_classes", count=len(new), first=new[0])
        numbers = {"new_classes": float(len(new)), "class_shift": moved}
        fix = sentence("fix_shuffle_first")
        yield Finding("valid_differs", "warning", ("valid",), numbers, why, fix=fix)
    both, again = ev.fact("rows_in_both") or 0.0, ev.fact("rows_repeated") or 0.0
    if both - again > e.DOUBLES:
        why = sentence("why_both", share=both)
        numbers = {"rows_in_both": both}
        fix = sentence("fix_drop_duplicates")
        yield Finding("rows_in_both", "warning", ("valid",), numbers, why, fix=fix)


def _another_relation(ev: Evidence) -> Iterable[Finding]:
    """Find validation targets that contradict the relation of the training rows."""
    train_fit, valid_fit, own_fit = (ev.fact(f"fits_{k}") for k in ("train", "valid", "own"))
    right, mapped = ev.fact("valid_right"), ev.fact("valid_mapped")
    fix = sentence("fix_same_lists")
    numbers, why = dict[str, float](), ""
    if right is not None and mapped is not None and mapped - right > e.MAPPED:
        named = "; ".join(f"{a} for {b}" for a, b in (ev.wiring.get("valid_names") or [])[:3])
        why = sentence("why_renamed_classes", right=right, mapped=mapped, named=named)
        numbers = {"valid_right": right, "valid_mapped": mapped}
    elif train_fit is not None and valid_fit is not None and own_fit is not None:
        chance = 2 / (ev.fact("fits_rows") or 1.0) ** 0.5  # four standard errors of a share
        plain = train_fit >= e.FITS and valid_fit <= train_fit - max(e.FITS, 0.6 * train_fit)
        faint = train_fit >= e.HARDLY_FITS and valid_fit <= 0 and own_fit > 0.5 * train_fit
        if not (plain or faint) or train_fit - valid_fit < chance:
            return
        why = sentence("why_another_relation", known=train_fit, asked=valid_fit)
        if own_fit > 0.5 * train_fit:
            why = sentence("why_own_relation", why=why, own=own_fit)
        numbers = {"fits_train": train_fit, "fits_valid": valid_fit}
    if numbers:
        yield Finding("valid_differs", "warning", ("valid",), numbers, why, fix=fix)


def _copies(ev: Evidence) -> Iterable[Finding]:
    """Find repeated rows, and validation rows that are noisy copies of training rows."""
    period, rows = ev.fact("period"), float(ev.record.data.get("rows") or 0)
    if period:
        why = sentence("why_period", period=period, rows=rows)
        fix = sentence("fix_new_list")
        yield Finding("rows_in_both", "warning", ("data",), {"period": period}, why, fix=fix)
    copies, windows = ev.fact("copies") or 0.0, ev.fact("windows_in_both") or 0.0
    if windows > e.COPIES:
        why = sentence("why_windows_in_both", share=windows)
        fix = sentence("fix_split_by_time")
    elif copies > e.COPIES:
        why = sentence("why_copies_in_both", share=copies)
        fix = sentence("fix_split_first")
    else:
        return
    numbers = {"rows_in_both": max(copies, windows)}
    yield Finding("rows_in_both", "warning", ("valid",), numbers, why, fix=fix)


def _interpolated_labels(ev: Evidence) -> Iterable[Finding]:
    share = ev.fact("rims")
    if share is None or share < e.RIMS:
        return
    why = sentence("why_rims", share=share)
    fix = sentence("fix_nearest")
    yield Finding("labels_interpolated", "warning", ("target",), {"rims": share}, why, fix=fix)


def _undrawn_rows(ev: Evidence) -> Iterable[Finding]:
    drawn, rows = ev.fact("drawable"), ev.fact("rows_there")
    if drawn is None or not rows or rows < 50 or drawn > e.DRAWN * rows:
        return
    why = sentence("why_few_drawn", drawn=drawn, rows=rows)
    fix = sentence("fix_weight_per_row")
    numbers = {"drawable": drawn, "related_rows": rows}
    yield Finding("ignored_rows", "critical", ("data",), numbers, why, fix=fix)


def _sorted(ev: Evidence) -> Iterable[Finding]:
    between = ev.fact("between")
    if between is not None and between > e.BETWEEN:
        why = sentence("why_sorted_rows", times=between)
        fix = "DataLoader(..., shuffle=True)"
        yield Finding("sorted_batches", "warning", ("data",), {"between": between}, why, fix=fix)
    if few := _few_classes(ev):
        within, expected, every = few
        numbers = {"classes_in_batch": within, "classes_in_all": every}
        why = sentence("why_sorted", within=within, expected=expected)
        fix = "DataLoader(..., shuffle=True)"
        yield Finding("sorted_batches", "warning", ("data",), numbers, why, fix=fix)


def _few_classes(ev: Evidence) -> tuple[float, float, float] | None:
    """Return the classes per batch, per shuffled batch and in all, if batches have too few."""
    within, every = ev.fact("classes_in_batch"), ev.fact("classes_in_all")
    expected = ev.fact("classes_expected")
    if within is None or not expected or every is None or every < 2:
        return None
    return (within, expected, every) if within < e.SORTED * expected else None


CHECKS = (
    _constant_inputs,
    _constant_targets,
    _unrelated_labels,
    _numbered_categories,
    _class_weights,
    _class_imbalance,
    _target_in_inputs,
    _changed_in_place,
    _masks_left_behind,
    _interpolated_labels,
    _undrawn_rows,
    _validation,
    _copies,
    _sorted,
)
