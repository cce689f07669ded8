"""Alarms by magnitude: gradients, updates, the loss scale, spikes, non-finite numbers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TypedDict

from tikhon.diagnosis.thresholds import EXPLODED, SLOW_UPDATE, VANISHED
from tikhon.monitoring.laws import ENOUGH, Alarm
from tikhon.monitoring.spikes import Spike

MOVED_SCALE = 2.0**10  # factor between a loss scale and its start (convention)
JUMP = 0.2  # update / weight of a step that destroys weights: BatchNorm tolerates 0.18
RAN = 4.0  # weight norm / that of the first reading, after such a step
STANDSTILL = 1e-7  # update / weight: a weight moves by its own size in ten million steps


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


def of_rows(
    rows: Sequence[Row], failure: NonFinite | None, *, wired: bool, summed: bool = False
) -> list[Alarm]:
    """Return the alarms of sampled steps; judges gradients only if the loop is `wired` right.

    `summed`: a step sums micro-batches whose losses were not divided.
    """
    found = [*_failed(failure), *_loss_scale(rows)]
    away = _ran_away(rows, summed=summed)
    if wired and away is not None and failure is None:
        found.append(away)
    elif wired:
        found += [*_signal(rows, failure), *_update(rows)]
    return found


def of_spikes(spikes: Sequence[Spike]) -> list[Alarm]:
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


def _failed(failure: NonFinite | None) -> list[Alarm]:
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


def _ran_away(rows: Sequence[Row], *, summed: bool) -> Alarm | None:
    """Detect single steps that enlarged the weights and left dead units or a high loss."""
    moved = [row for row in rows if row["update"] is not None]
    jump = max((update for row in moved if (update := row["update"]) is not None), default=0.0)
    if len(moved) <= ENOUGH or jump < JUMP or moved[-1]["weight"] < RAN * moved[0]["weight"]:
        return None
    signals = [ratio for row in moved if (ratio := row["signal_ratio"]) is not None]
    late = signals[len(signals) // 2 :]
    dead = bool(signals) and median(late) < VANISHED < max(signals[:ENOUGH])
    losses = [abs(loss) for row in moved if (loss := row["loss"]) is not None]
    high = len(losses) > ENOUGH and min(losses[-ENOUGH:]) > 3 * losses[0]
    if not dead and not high:
        return None
    first = next(row for row in moved if (row["update"] or 0.0) >= JUMP)
    after = "no signal reaches the first layer" if dead else "the loss stays high"
    said = (
        f"steps of up to {jump:.0%} of the weights' size made them grow from "
        f"{moved[0]['weight']:.2g} to {moved[-1]['weight']:.2g}, and {after}"
    )
    if summed:
        return Alarm(
            "accumulation_not_averaged",
            first["step"],
            f"a step sums its micro-batches, whose losses are not divided: {said}",
            "divide each loss by the number of micro-batches of a step",
        )
    change = "lower the learning rate, let it warm up, or clip gradients"
    return Alarm("exploding_gradient", first["step"], said, change)


def _signal(rows: Sequence[Row], failure: NonFinite | None) -> list[Alarm]:
    read = [(r["step"], ratio) for r in rows if (ratio := r["signal_ratio"]) is not None][-3:]
    ratios = [ratio for _, ratio in read]
    if len(read) < 2:
        return []
    growing = ratios[-1] > 2 * ratios[0]  # a zero-initialised head or branch
    if max(ratios) < VANISHED and not growing:
        return [
            Alarm(
                "vanishing_gradient",
                read[0][0],
                f"the signal of the first layer is {ratios[-1]:.0e} of the last one's",
                "use residual connections with norms, or weights of the right gain",
            )
        ]
    if min(ratios) > EXPLODED and failure is None:
        return [
            Alarm(
                "exploding_gradient",
                read[0][0],
                f"the signal of the first layer is {ratios[-1]:.0e} times the last one's",
                "use norms, or weights of the right gain",
            )
        ]
    return []


def _update(rows: Sequence[Row]) -> list[Alarm]:
    """Detect steps that never moved the weights, unlike a schedule that ends at zero."""
    read = [(r["step"], update) for r in rows if (update := r["update"]) is not None]
    largest = max((update for _, update in read), default=0.0)
    if len(read) < ENOUGH or not 0 < largest < SLOW_UPDATE:
        return []
    still = largest < STANDSTILL
    return [
        Alarm(
            "slow_convergence",
            read[0][0],
            f"no step moved the weights by more than {largest:.0e} of their size",
            "raise the learning rate, unless fine steps are meant",
            severity="warning" if still else "info",
        )
    ]


def _loss_scale(rows: Sequence[Row]) -> list[Alarm]:
    """Detect a loss scale far below its start (overflow) or far above it (underflow)."""
    read = [(r["step"], scale) for r in rows if (scale := r["scale"]) is not None]
    scales = [scale for _, scale in read]
    if len(read) < 2 or MOVED_SCALE > scales[-1] / scales[0] > 1 / MOVED_SCALE:
        return []
    way = "fell" if scales[-1] < scales[0] else "grew"
    cause = "gradients overflow at every larger one" if way == "fell" else "gradients are tiny"
    return [
        Alarm(
            "unstable_loss_scale",
            read[0][0],
            f"the loss scale {way} from {scales[0]:.2g} to {scales[-1]:.2g}: {cause}",
            "use bfloat16, which needs no scale, or a smaller learning rate",
        )
    ]
