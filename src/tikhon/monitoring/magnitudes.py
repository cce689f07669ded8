"""Alarms by magnitude: gradients, updates, the loss scale, spikes, non-finite numbers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TypedDict

from tikhon.diagnosis.thresholds import EXPLODED, SLOW_UPDATE, VANISHED
from tikhon.languages import Sentence, sentence
from tikhon.monitoring.alarms import MIN_SAMPLES, Alarm, alarm
from tikhon.monitoring.spikes import Spike

MOVED_SCALE = 2.0**10  # factor between a loss scale and its start (convention)
JUMP = 0.2  # update / weight of a step that destroys weights: BatchNorm tolerates 0.18
REPLACING_STEP = 1.0  # update / weight of a step that leaves nothing of the first weights
NOT_FALLEN = 0.9  # median loss of the second half / first loss, after such a step (convention)
GROWN = 4.0  # weight norm / that of the first reading, after such a step
LARGE_STEP = 0.05  # update / weight of steps that carry weights away in the end (convention)
FAR_GROWN = 10.0  # the same growth after such steps
RUNAWAY = 100.0  # growth that two readings show
CLIPPED = 10.0  # gradient before / after clipping, that matters beside small updates (convention)
NEGLIGIBLE_UPDATE = 1e-7  # update / weight: a weight moves by its own size in ten million steps
MIN_STEPS, NEGLIGIBLE_PATH = 100, 1e-3  # steps, and largest update times steps, after which too


class Row(TypedDict):
    """Sizes of one sampled step: norms over all parameters, median relative update.

    `signal_ratio` is the gradient at the first layer / that at the last, `scale` the loss scale of
    a gradient scaler. None: not measured in this step.
    """

    step: int
    loss: float | None
    gradient: float
    weight: float
    update: float | None
    signal_ratio: float | None
    scale: float | None
    finite: bool


class NonFinite(TypedDict):
    """The first non-finite number."""

    step: int
    what: str
    where: str
    message: Sentence


def magnitude_alarms(
    rows: Sequence[Row],
    failure: NonFinite | None,
    *,
    is_wired: bool,
    is_summed: bool = False,
    clipping: float = 1.0,
) -> list[Alarm]:
    """Return the alarms of sampled steps; judges gradients only if the loop is `is_wired` right.

    `is_summed`: a step sums micro-batches whose losses were not divided; `clipping`: what every
    step took of its gradient, as a factor, at a rate that does not rise.
    """
    alarms = _loss_scale_alarms(rows)
    if failure is not None:
        where, told = (failure["where"],), {"message": failure["message"]}
        found = alarm("exploding_gradient", failure["step"], key="nonfinite", where=where, **told)
        alarms = [found, *alarms]
    runaway = _find_runaway(rows, is_summed=is_summed)
    if is_wired and runaway is not None and failure is None:
        alarms.append(runaway)
    elif is_wired:
        alarms += [*_signal_alarms(rows, failure), *_update_alarms(rows, clipping)]
    return alarms


def spike_alarms(spikes: Sequence[Spike]) -> list[Alarm]:
    """Return one alarm for all spikes, describing the first."""
    if not spikes:
        return []
    first = spikes[0]
    key, value = ("loss_spike", first.loss)
    if value is None:
        key, value = "gradient_spike", first.gradient or 0.0
    figures = {"value": value, "usual": first.median, "z": first.z, "count": len(spikes)}
    return [alarm("loss_spike", first.step, key=key, **figures)]


def _find_runaway(rows: Sequence[Row], *, is_summed: bool) -> Alarm | None:
    """Detect single steps that enlarged the weights and left dead units or a high loss."""
    moved = [row for row in rows if row["update"] is not None]
    jump = max((row["update"] or 0.0 for row in moved), default=0.0)
    before, now = (moved[0]["weight"], moved[-1]["weight"]) if moved else (1.0, 1.0)
    is_sudden = jump >= JUMP and now >= GROWN * before
    is_steady = jump >= LARGE_STEP and now >= FAR_GROWN * before
    is_short = len(moved) <= MIN_SAMPLES and now < RUNAWAY * before
    if is_short or not (is_sudden or is_steady):
        return None
    signals = [ratio for row in moved if (ratio := row["signal_ratio"]) is not None]
    late_ratios = signals[len(signals) // 2 :]
    is_dead = bool(signals) and median(late_ratios) < VANISHED < max(signals[:MIN_SAMPLES])
    losses = [abs(loss) for row in moved if (loss := row["loss"]) is not None]
    recent = losses[-MIN_SAMPLES:] if len(losses) > MIN_SAMPLES else losses[-1:]
    is_high = bool(recent) and min(recent) > 3 * losses[0]
    if (is_steady or jump >= REPLACING_STEP) and len(losses) > MIN_SAMPLES:
        is_high = is_high or median(losses[len(losses) // 2 :]) > NOT_FALLEN * losses[0]
    if not is_dead and not is_high:
        return None
    first = next(row["step"] for row in moved if (row["update"] or 0.0) >= min(JUMP, jump))
    after = sentence("told_no_signal" if is_dead else "told_high_loss")
    grown = sentence("told_grown", jump=jump, before=before, now=now, after=after)
    if is_summed:
        return alarm("accumulation_not_averaged", first, grown=grown)
    return alarm("exploding_gradient", first, key="rate_too_large", grown=grown)


def _signal_alarms(rows: Sequence[Row], failure: NonFinite | None) -> list[Alarm]:
    readings = [(r["step"], ratio) for r in rows if (ratio := r["signal_ratio"]) is not None][-3:]
    ratios = [ratio for _, ratio in readings]
    if len(readings) < 2:
        return []
    growing = ratios[-1] > 2 * ratios[0]  # a zero-initialised head or branch
    if max(ratios) < VANISHED and not growing:
        return [alarm("vanishing_gradient", readings[0][0], ratio=ratios[-1])]
    if min(ratios) > EXPLODED and failure is None:
        return [alarm("exploding_gradient", readings[0][0], ratio=ratios[-1])]
    return []


def _update_alarms(rows: Sequence[Row], clipping: float) -> list[Alarm]:
    """Detect steps that never moved the weights, unlike a schedule that ends at zero."""
    readings = [(r["step"], update) for r in rows if (update := r["update"]) is not None]
    largest = max((update for _, update in readings), default=0.0)
    if len(readings) < MIN_SAMPLES or not 0 < largest < SLOW_UPDATE:
        return []
    if clipping >= CLIPPED and len(readings) > 2 * MIN_SAMPLES:
        step, share = readings[0][0], 1 - 1 / clipping
        key = "clipped_to_nothing"
        return [alarm("slow_convergence", step, key=key, largest=largest, share=share)]
    steps, is_rising = readings[-1][0], readings[-1][1] > 1.5 * readings[0][1]
    is_still = steps >= MIN_STEPS and not is_rising and largest * steps < NEGLIGIBLE_PATH
    severity = "warning" if largest < NEGLIGIBLE_UPDATE or is_still else "info"
    return [alarm("slow_convergence", readings[0][0], severity=severity, largest=largest)]


def _loss_scale_alarms(rows: Sequence[Row]) -> list[Alarm]:
    """Detect a loss scale far below its start (overflow) or far above it (underflow)."""
    readings = [(r["step"], scale) for r in rows if (scale := r["scale"]) is not None]
    scales = [scale for _, scale in readings]
    if len(readings) < 2 or MOVED_SCALE > scales[-1] / scales[0] > 1 / MOVED_SCALE:
        return []
    key = "loss_scale_falls" if scales[-1] < scales[0] else "loss_scale_grows"
    first, last = scales[0], scales[-1]
    return [alarm("unstable_loss_scale", readings[0][0], key=key, first=first, last=last)]
