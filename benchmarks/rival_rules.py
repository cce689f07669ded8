"""Published rule sets, applied to tikhon's own records: approximations that favour the rivals.

They see the same run. Where a rule needs a number that a record does not hold, the nearest one is
used: rms for mean absolute gradients, "slope below 5 %" for saturation bounds, the probe
batch for epochs. Sources: the pages and code of SageMaker Debugger (awslabs); AutoTrainer
utils/monitor.py; TheDeepChecker config/settings.yaml; UMLAUT heuristics.py.
"""

from __future__ import annotations

import math
from itertools import pairwise

from tikhon.diagnosis.evidence import Evidence, number
from tikhon.diagnosis.record import Record


def _over(record: Record, name: str) -> list[float]:
    """A reading over all probes and sites."""
    values = [number(getattr(r, name)) for p in record.probes for r in p.readings]
    return [v for v in values if v is not None]


def _points(record: Record, name: str) -> list[float]:
    values = [number(getattr(p, name)) for p in record.points]
    return [v for v in values if v is not None]


def _losses(record: Record) -> list[float]:
    return [v for v in record.losses if v is not None and math.isfinite(v)]


def smdebug(record: Record) -> set[str]:
    """SageMaker Debugger's defaults, every probe."""
    found: set[str] = set()
    grads = _over(record, "gradient")
    if grads and min(grads) < 1e-7:
        found.add("vanishing_gradient")
    if record.failure is not None:
        found.add("exploding_gradient")
    if max(_over(record, "dead"), default=0) > 0.5:
        found.add("dying_relu")
    if max(_over(record, "saturated"), default=0) > 0.95:
        found.add("saturated_activation")
    first = record.probes[0].readings if record.probes else ()
    sizes = [r.weight_rms for r in first if r.weight_rms is not None]
    widths = [3.3 * r.gradient for r in first if r.gradient is not None]
    spread = sizes and (min(sizes) == 0 or (max(sizes) / min(sizes)) ** 2 > 10)
    if spread or (widths and min(widths) < 1e-3):
        found.add("poor_init")
    losses = _losses(record)
    if any(b > 0.999 * a for a, b in zip(losses, losses[10:])):
        found.add("slow_convergence")
    for point in record.points:
        train, valid = number(point.eval_loss), number(point.valid_loss)
        if train and valid is not None and (valid - train) / train > 0.1:
            found.add("overfitting")
    return found


def autotrainer(record: Record) -> set[str]:
    """AutoTrainer's monitor with its published defaults, points as epochs."""
    metrics = _points(record, "metric")
    bad = record.failure is not None
    if not metrics or (max(metrics) >= 0.6 and not bad):
        return set()
    pairs = []
    for probe in record.probes:
        grads = [r.gradient for r in probe.readings if r.gradient is not None]
        if len(grads) > 1:
            pairs.append((grads[0], grads[-1]))
    vanished = any(b and a / b < 1e-3 and a < 1e-4 for a, b in pairs)
    losses = _points(record, "loss")
    if bad or any(b and a / b > 70 for a, b in pairs) or max(losses, default=0) >= 1e3:
        return {"exploding_gradient"}
    if vanished:
        return {"vanishing_gradient"}
    if max(_over(record, "dead"), default=0) >= 0.7:
        return {"dying_relu"}
    drops = sum(a - b >= 0.03 for a, b in pairwise(metrics))
    if drops >= 0.2 * len(metrics):
        return {"oscillating_loss"}
    gains = [b - a for a, b in pairwise(metrics)]
    return {"slow_convergence"} if max(gains, default=0) < 0.01 else set()


def deepchecker(record: Record) -> set[str]:
    """TheDeepChecker's thresholds on the real run."""
    found: set[str] = set()
    grads = _over(record, "gradient")
    if grads and min(grads) < 1e-6:
        found.add("vanishing_gradient")
    if record.failure is not None or max(grads, default=0) > 1e6:
        found.add("exploding_gradient")
    if max(_over(record, "dead"), default=0) > 0.5:
        found.add("dying_relu")
    if max(_over(record, "saturated"), default=0) > 0.5:
        found.add("saturated_activation")
    evidence = Evidence(record)
    start, trivial = evidence.start, evidence.trivial
    loss = number(start.loss) if start else None
    first = record.probes[0].readings if record.probes else ()
    if any(r.constant for r in first):
        found.add("poor_init")
    if trivial and (loss is None or abs(loss - trivial) > trivial):
        found.add("poor_init")
    updates = [u for u in _over(record, "update") if u > 0]
    if updates and math.log10(sorted(updates)[len(updates) // 2]) < -4:
        found.add("slow_convergence")
    losses = _losses(record)
    turns = [(b - a) * (c - b) < 0 for a, b, c in zip(losses, losses[1:], losses[2:])]
    if turns and sum(turns) > 0.7 * len(turns):
        found.add("oscillating_loss")
    return found


def umlaut(record: Record) -> set[str]:
    """UMLAUT's heuristics, messages mapped to labels."""
    found: set[str] = set()
    lr = float(record.optimizer.get("lr", 0.0))
    if lr > 0.01:
        found.add("oscillating_loss")
    if lr < 1e-7:
        found.add("slow_convergence")
    if (number(record.data.get("inputs", {}).get("largest")) or 0.0) > 1.0:
        found.add("poor_init")
    if any(rate > 0.5 for rate in (record.static.get("dropout") or {}).values()):
        found.add("underfitting")
    for a, b in pairwise(record.points):
        values = [number(v) for v in (a.eval_loss, b.eval_loss, a.valid_loss, b.valid_loss)]
        if None not in values and values[1] < values[0] and values[3] > values[2]:  # type: ignore[operator]
            found.add("overfitting")
    if max(_points(record, "valid_metric"), default=0) > 0.95:
        found.add("overfitting")
    return found


RIVALS = {
    "SageMaker Debugger": smdebug,
    "AutoTrainer": autotrainer,
    "TheDeepChecker": deepchecker,
    "UMLAUT": umlaut,
}
