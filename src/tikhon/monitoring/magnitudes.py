"""Alarms by magnitude: gradients, updates, the loss scale, spikes, non-finite numbers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TypedDict

from tikhon.diagnosis.thresholds import EXPLODED, SLOW_UPDATE, VANISHED
from tikhon.monitoring.alarms import MIN_SAMPLES, Alarm
from tikhon.monitoring.spikes import Spike

MOVED_SCALE = 2.0**10  # factor between a loss scale and its start (convention)
JUMP = 0.2  # update / weight of a step that destroys weights: BatchNorm tolerates 0.18
REPLACING_STEP = 1.0  # update / weight of a step that leaves nothing of the first weights
NOT_FALLEN = 0.9  # median loss of the second half / first loss, after such a step (convention)
GROWN = 4.0  # weight norm / that of the first reading, after such a step
NEGLIGIBLE_UPDATE = 1e-7  # update / weight: a weight moves by its own size in ten million steps


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
    message: str


def magnitude_alarms(
    rows: Sequence[Row], failure: NonFinite | None, *, is_wired: bool, is_summed: bool = False
) -> list[Alarm]:
    """Return the alarms of sampled steps; judges gradients only if the loop is `is_wired` right.

    `is_summed`: a step sums micro-batches whose losses were not divided.
    """
    alarms = [*_failure_alarm(failure), *_loss_scale_alarms(rows)]
    runaway = _find_runaway(rows, is_summed=is_summed)
    if is_wired and runaway is not None and failure is None:
        alarms.append(runaway)
    elif is_wired:
        alarms += [*_signal_alarms(rows, failure), *_update_alarms(rows)]
    return alarms


def spike_alarms(spikes: Sequence[Spike]) -> list[Alarm]:
    """Return one alarm for all spikes, describing the first."""
    if not spikes:
        return []
    first = spikes[0]
    name, value = ("loss", first.loss) if first.loss is not None else ("norm", first.gradient)
    more = f", and {len(spikes) - 1} more" if len(spikes) > 1 else ""
    return [
        Alarm(
            "loss_spike",
            first.step,
            f"{name} {value:.3g} where {first.median:.3g} is usual "
            f"({first.z:.0f} robust standard deviations){more}",
            'look at the batch of that step, and clip gradients or pass on_spike="skip"',
        )
    ]


def _failure_alarm(failure: NonFinite | None) -> list[Alarm]:
    if failure is None:
        return []
    return [
        Alarm(
            "exploding_gradient",
            failure["step"],
            failure["message"],
            "lower the learning rate, clip gradients, or drop the rows that are not finite",
            (failure["where"],),
        )
    ]


def _find_runaway(rows: Sequence[Row], *, is_summed: bool) -> Alarm | None:
    """Detect single steps that enlarged the weights and left dead units or a high loss."""
    moved = [row for row in rows if row["update"] is not None]
    jump = max((row["update"] or 0.0 for row in moved), default=0.0)
    if len(moved) <= MIN_SAMPLES or jump < JUMP:
        return None
    before, now = moved[0]["weight"], moved[-1]["weight"]
    if now < GROWN * before:
        return None
    signals = [ratio for row in moved if (ratio := row["signal_ratio"]) is not None]
    late_ratios = signals[len(signals) // 2 :]
    is_dead = bool(signals) and median(late_ratios) < VANISHED < max(signals[:MIN_SAMPLES])
    losses = [abs(loss) for row in moved if (loss := row["loss"]) is not None]
    is_high = len(losses) > MIN_SAMPLES and min(losses[-MIN_SAMPLES:]) > 3 * losses[0]
    if jump >= REPLACING_STEP and len(losses) > MIN_SAMPLES:
        is_high = is_high or median(losses[len(losses) // 2 :]) > NOT_FALLEN * losses[0]
    if not is_dead and not is_high:
        return None
    first = next(row for row in moved if (row["update"] or 0.0) >= JUMP)
    after = "no signal reaches the first layer" if is_dead else "the loss stays high"
    described = (
        f"steps of up to {jump:.0%} of the weights' size made them grow from {before:.2g} to "
        f"{now:.2g}, and {after}"
    )
    if is_summed:
        return Alarm(
            "accumulation_not_averaged",
            first["step"],
            f"a step sums its micro-batches, whose losses are not divided: {described}",
            "divide each loss by the number of micro-batches of a step",
        )
    change = "lower the learning rate, let it warm up, or clip gradients"
    return Alarm("exploding_gradient", first["step"], described, change)


def _signal_alarms(rows: Sequence[Row], failure: NonFinite | None) -> list[Alarm]:
    readings = [(r["step"], ratio) for r in rows if (ratio := r["signal_ratio"]) is not None][-3:]
    ratios = [ratio for _, ratio in readings]
    if len(readings) < 2:
        return []
    growing = ratios[-1] > 2 * ratios[0]  # a zero-initialised head or branch
    if max(ratios) < VANISHED and not growing:
        return [
            Alarm(
                "vanishing_gradient",
                readings[0][0],
                f"the signal of the first layer is {ratios[-1]:.0e} of the last one's",
                "use residual connections with norms, or weights of the right gain",
            )
        ]
    if min(ratios) > EXPLODED and failure is None:
        return [
            Alarm(
                "exploding_gradient",
                readings[0][0],
                f"the signal of the first layer is {ratios[-1]:.0e} times the last one's",
                "use norms, or weights of the right gain",
            )
        ]
    return []


def _update_alarms(rows: Sequence[Row]) -> list[Alarm]:
    """Detect steps that never moved the weights, unlike a schedule that ends at zero."""
    readings = [(r["step"], update) for r in rows if (update := r["update"]) is not None]
    largest = max((update for _, update in readings), default=0.0)
    if len(readings) < MIN_SAMPLES or not 0 < largest < SLOW_UPDATE:
        return []
    is_negligible = largest < NEGLIGIBLE_UPDATE
    return [
        Alarm(
            "slow_convergence",
            readings[0][0],
            f"no step moved the weights by more than {largest:.0e} of their size",
            "raise the learning rate, unless fine steps are meant",
            severity="warning" if is_negligible else "info",
        )
    ]


def _loss_scale_alarms(rows: Sequence[Row]) -> list[Alarm]:
    """Detect a loss scale far below its start (overflow) or far above it (underflow)."""
    readings = [(r["step"], scale) for r in rows if (scale := r["scale"]) is not None]
    scales = [scale for _, scale in readings]
    if len(readings) < 2 or MOVED_SCALE > scales[-1] / scales[0] > 1 / MOVED_SCALE:
        return []
    direction = "fell" if scales[-1] < scales[0] else "grew"
    cause = (
        "gradients overflow at every larger one" if direction == "fell" else "gradients are tiny"
    )
    return [
        Alarm(
            "unstable_loss_scale",
            readings[0][0],
            f"the loss scale {direction} from {scales[0]:.2g} to {scales[-1]:.2g}: {cause}",
            "use bfloat16, which needs no scale, or a smaller learning rate",
        )
    ]
