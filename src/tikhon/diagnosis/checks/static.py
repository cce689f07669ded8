"""Findings that need no training: heads that cannot reach, odd data, parameters out of play.

Pure functions of the evidence; standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable

from tikhon.diagnosis import thresholds as e
from tikhon.diagnosis.checks.causes import called, head_floor, head_site
from tikhon.diagnosis.evidence import Evidence, number
from tikhon.diagnosis.findings import Finding


def _data(ev: Evidence) -> Iterable[Finding]:
    bad = ev.record.data.get("nonfinite") or []
    if bad:
        why = f"NaN or infinity in the {' and the '.join(sorted(set(bad)))}"
        severity, effect = "critical", ""
        if ev.record.data.get("left_out") and ev.record.failure is None:
            why += "; the loss leaves them out: it is finite, and so are its gradients"
            severity, effect = "info", "what is missing teaches nothing"
        yield Finding("non_finite_data", severity, (), {"tensors": len(bad)}, why, effect=effect)


def scales(ev: Evidence) -> Iterable[Finding]:
    """Inputs and targets whose size no initialisation is made for."""
    inputs, target = ev.record.data.get("inputs") or {}, ev.record.data.get("target") or {}
    rms = number(inputs.get("rms"))
    learned = ev.trained and ev.learned >= e.LEARNED
    if rms is not None and not ev.record.data.get("normalised_inside"):
        if (rms > 10 or 0 < rms < 0.01) and not learned:
            why = f"inputs have size {rms:.3g}; initialisations assume about 1"
            yield Finding("unscaled_inputs", "warning", ("inputs",), {"rms": rms}, why)
        elif (apart := number(inputs.get("std"))) and rms > e.OFFSET * apart and not learned:
            why = (
                f"inputs have mean {inputs.get('mean', 0.0):.3g} and deviation {apart:.3g}: all "
                "rows look alike to the first layer"
            )
            numbers = {"offset": rms / apart}
            fix = (
                "x = (x - x.mean(0)) / x.std(0), with the mean and deviation of these very numbers"
            )
            yield Finding("unscaled_inputs", "warning", ("inputs",), numbers, why, fix=fix)
    squeezed, far = ev.fact("squeezed"), ev.wiring.get("far_rows")
    if squeezed and squeezed > e.SQUEEZED and not learned:
        why = (
            f"{far} row(s) far off make up the deviation of {squeezed:.0%} of the input columns: "
            "scaled by it, all other rows are alike"
        )
        fix = "x = x.clamp(x.quantile(0.01, 0), x.quantile(0.99, 0)), and then scale it"
        yield Finding(
            "unscaled_inputs", "warning", ("inputs",), {"squeezed": squeezed}, why, fix=fix
        )
    size, spread = number(target.get("rms")), number(target.get("std"))
    if size is not None and spread is not None and size > 10 and not learned:
        why = f"targets have mean {target.get('mean', 0.0):.3g} and deviation {spread:.3g}"
        yield Finding("unscaled_targets", "warning", ("target",), {"rms": size}, why)


def _rectified_scores(ev: Evidence) -> Iterable[Finding]:
    zero = ev.fact("own_score_zero")
    if zero is not None and zero >= e.UNLIFTED and ev.learned < e.LEARNED:
        why = (
            f"the scores of the classes are rectified: in {zero:.0%} of the rows the score of the "
            "true class is 0, where no gradient lifts it"
        )
        fix = "leave out the relu: a softmax takes what stands in front of it"
        numbers = {"own_score_zero": zero}
        where = (head_site(ev),)
        yield Finding("head_mismatch", "critical", where, numbers, why, fix=fix)


WITH_LOGITS = "binary_cross_entropy_with_logits"


def _used(ev: Evidence) -> list[str]:
    return ev.wiring.get("loss_functions") or []


def _head(ev: Evidence) -> Iterable[Finding]:
    floor = head_floor(ev)
    head = ev.static.get("head") or []
    place = ev.wiring.get("softmax_over_one")
    single = bool(place) or (head == ["softmax"] and ev.static.get("output_units") == 1)
    if single:
        why = "softmax over one unit is the constant 1"
        where = (place or head_site(ev),)
        yield Finding(
            "head_mismatch",
            "critical",
            where,
            {"floor": floor},
            why,
            fix="as many outputs as classes; or nn.BCEWithLogitsLoss() with one output",
        )
        return
    unit = ev.fact("unit_scores")
    if unit is not None and unit >= e.FLOOR:
        why = (
            f"the scores of a row have length 1: a softmax of them cannot get below {unit:.0%} of "
            "a constant's loss"
        )
        fix = "scores times 10 or more: self.scale = nn.Parameter(torch.tensor(10.0))"
        yield Finding("head_mismatch", "critical", (head_site(ev),), {"floor": unit}, why, fix=fix)
        return
    shares = ev.static.get("unbounded_shares")
    if shares:
        lowest, right = float(shares["lowest"]), float(shares["right"])
        why = (
            f"the loss is made for answers from 0 to 1: right ones cost {right:.3g}, and some "
            f"outside of that range {lowest:.3g}"
        )
        fix = "loss(torch.sigmoid(output), target)"
        effect = "the loss falls where the answers mean nothing"
        advice = ("a sigmoid behind the last layer",)
        yield Finding(
            "head_mismatch",
            "critical",
            ("the loss",),
            {"loss": lowest},
            why,
            effect=effect,
            advice=advice,
            fix=fix,
        )
        return
    twice = head[-1:] == ["sigmoid"] and ev.harmed and WITH_LOGITS in _used(ev)
    if not head or (floor < e.FLOOR and not twice):
        return
    name = " and ".join(head)
    if twice:
        why = "the loss applies a sigmoid of its own to what a sigmoid has squashed"
    elif ev.static.get("own_softmax"):
        why = f"the loss applies a softmax of its own to the output of a {name}"
    else:
        why = f"a {name} cannot produce the targets: {floor:.0%} of a constant's loss stays"
    fix = f"leave out the {name}: the loss takes what stands in front of it"
    where = (head_site(ev),)
    yield Finding("head_mismatch", "critical", where, {"floor": floor}, why, fix=fix)


def _reduction(ev: Evidence) -> Iterable[Finding]:
    if ev.static.get("grows_with_batch"):
        why = "the same rows twice give twice the loss: it is a sum"
        evidence = {"batch_size": float(ev.record.batch_size)}
        yield Finding("loss_is_a_sum", "warning", (), evidence, why)


def _dropout(ev: Evidence) -> Iterable[Finding]:
    for name, rate in (ev.static.get("dropout") or {}).items():
        if rate > 0.9:
            why = f"{called(name)} drops {rate:.0%} of its inputs"
            yield Finding("excessive_dropout", "warning", (name,), {"rate": rate}, why)
    last = ev.static.get("dropout_at_end") or []
    free, learned = ev.undropped, max(ev.learned, 0.0)
    if free is not None and free - learned > e.FREED and not last:
        rates = {n: r for n, r in ev.static["dropout"].items() if 0 < r <= 0.9}
        why = (
            f"without dropout the same run learns {free:.2f} in place of {learned:.2f} "
            f"(0 a constant, 1 a shallow model); {len(rates)} layer(s) drop up to "
            f"{max(rates.values()):.0%}"
        )
        numbers = {"rate": max(rates.values()), "learned": learned, "undropped": free}
        fix = "rates of 0.1 to 0.2 behind convolutions, 0.5 in front of the last layer alone"
        yield Finding("excessive_dropout", "warning", tuple(rates), numbers, why, fix=fix)
    if last:
        why = "dropout behind the last layer sets answers to 0 at random and stretches the others"
        where = tuple(line for line in last if line)
        fix = "dropout in front of the last layer: nn.Dropout(p), nn.Linear(..., outputs)"
        severity = "warning" if ev.harmed else "info"
        yield Finding(
            "dropout_at_end", severity, where, {"learned": max(ev.learned, 0.0)}, why, fix=fix
        )
    for name in ev.static.get("dropout_before_norm") or []:
        layer = called(name)
        why = f"{layer} learns the variance of dropped inputs and meets another one at test time"
        yield Finding("dropout_before_norm", "info", (name,), {}, why)


def _batch_of_one(ev: Evidence) -> Iterable[Finding]:
    layers = tuple(ev.static.get("batch_of_one") or ())
    if layers:
        why = "the variance of one sample is zero or that of its own pixels"
        yield Finding("batchnorm_batch_of_one", "critical", layers, {"batch_size": 1.0}, why)


FREED = {
    "frozen_parameters": "model.requires_grad_(True), before the optimizer is built",
    "unused_parameters": "",
    "missing_from_optimizer": "torch.optim.Adam(model.parameters(), ...)",
}


def _parameters(ev: Evidence) -> Iterable[Finding]:
    static = ev.static
    if ev.record.trainable == 0:
        why = "no parameter requires a gradient" if ev.record.parameters else "no parameters"
        yield Finding("nothing_to_train", "critical", (), {}, why)
        return
    if static.get("foreign_optimizer"):
        why = "no tensor of the optimizer is a parameter of this model: it was built for another"
        numbers = {"parameters": float(ev.record.trainable)}
        fix = "build the optimizer after the last line that makes, loads or wraps the model"
        yield Finding("missing_from_optimizer", "critical", ("optimizer",), numbers, why, fix=fix)
    cut = set(ev.wiring.get("detached") or ())
    rows = (
        ("frozen", "frozen_parameters", "info", "they do not require a gradient"),
        ("unused", "unused_parameters", "warning", "the loss does not depend on them"),
        ("unoptimized", "missing_from_optimizer", "warning", "no parameter group holds them"),
    )
    for key, code, severity, why in rows:
        listed = tuple(n for n in static.get(key) or () if key != "unused" or n not in cut)
        numbers = {"parameters": float(len(listed))}
        free = ev.unfrozen
        if key != "unused" and free is not None and free - max(ev.learned, 0.0) > e.FREED:
            severity = "critical"
            numbers |= {"learned": max(ev.learned, 0.0), "unfrozen": free}
            why += f"; trained with the rest, the same run learns {free:.2f} in place of "
            why += f"{max(ev.learned, 0.0):.2f} (0 a constant, 1 a shallow model)"
        elif key == "unoptimized" and (
            set(listed) <= cut or (ev.trained and ev.learned >= e.LEARNED)
        ):
            severity = "info"  # the part that is to stay, as in fine-tuning
        if listed:
            yield Finding(code, severity, listed, numbers, why, fix=FREED[code])
    if static.get("changes_in_forward"):
        why = "parameters were replaced or written to during a forward pass without gradients"
        yield Finding("changes_in_forward", "warning", (), {}, why)


def _modes(ev: Evidence) -> Iterable[Finding]:
    end = ev.end
    if end is None or not ev.trained or ev.record.failure is not None:
        return
    train, evaluated = number(end.loss), number(end.eval_loss)
    trivial = ev.trivial
    if train is None or evaluated is None or not trivial or ev.record.steps < 50:
        return
    excess = (evaluated - train) / trivial
    if excess > e.EXCESS and evaluated > 3 * train:
        numbers = {"train_mode_loss": train, "eval_mode_loss": evaluated}
        why = f"on the same rows the loss is {train:.3g} in train mode, {evaluated:.3g} in eval"
        yield Finding("train_eval_mismatch", "warning", (), numbers, why)


def _attention(ev: Evidence) -> Iterable[Finding]:
    first = ev.first
    if first is None or ev.learned >= e.LEARNED:
        return
    for site, reading in zip(ev.record.sites, first.readings):
        if reading.entropy is not None and reading.entropy < 0.1:
            layer = called(site.name)
            why = f"{layer} looks at a single position (entropy {reading.entropy:.2f} of 1)"
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
    _attention,
)
