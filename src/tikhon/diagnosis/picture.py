"""Plots of a record: gradient per layer, forward scale, updates and loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tikhon import plotting
from tikhon.diagnosis.evidence import Evidence
from tikhon.diagnosis.record import Probe, Record
from tikhon.diagnosis.thresholds import VANISHED
from tikhon.notebook import Line
from tikhon.plotting import BLUE, GREY, RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[["Axes"], None]


def plot(record: Record, ax: Sequence[Axes] | None = None) -> plotting.Display:
    """Draw all plots that the record has data for, one below the other."""
    ev = Evidence(record)
    found = [signal(ev), forward(ev), updates(ev), loss(record)]
    pictures = [draw for draw in found if draw is not None]
    display = plotting.canvas(ax, *(1.0 for _ in pictures))
    for axes, draw in zip(display.axes_, pictures):
        draw(axes)
    return display


def signal(ev: Evidence) -> Draw | None:
    """Plot the gradient at each layer relative to the last one, with the healthy range."""
    if ev.first is None or not ev.chain:
        return None
    shares = {}
    for probe, colour, title in _moments(ev.record):
        values = [probe.readings[i].signal for i in ev.chain]
        if values[-1]:
            shares[title, colour] = [v / values[-1] if v else math.nan for v in values]
    if not shares:
        return None

    def draw(axes: Axes) -> None:
        for (title, colour), values in shares.items():
            axes.plot(_names(ev), values, "o-", color=colour, label=title)
        axes.axhspan(VANISHED, 1 / VANISHED, color="#38a169", alpha=0.12)
        axes.set(yscale="log", ylabel="signal / last layer's signal")
        axes.set_title("Backward signal per layer (green: healthy)")
        axes.legend(fontsize="small")
        _upright(axes, ev)

    return draw


def forward(ev: Evidence) -> Draw | None:
    """Plot the output scale per layer, and dead and saturated shares of its activation."""
    if ev.first is None or ev.last is None or not ev.chain:
        return None
    first, last, names = ev.first, ev.last, _names(ev)

    def share(i: int, name: str) -> float:
        activation = ev.activation_after(i)
        value = getattr(last.readings[i if activation is None else activation], name)
        return math.nan if value is None else value

    def draw(axes: Axes) -> None:
        scale = [first.readings[i].rms or math.nan for i in ev.chain]
        axes.plot(names, scale, "o-", color=BLUE, label="output size")
        axes.set(yscale="log", ylabel="output size (rms)")
        axes.set_title("Forward scale, dead and saturated units")
        right = axes.twinx()
        for name, colour in (("dead", GREY), ("saturated", RED)):
            shares = [share(i, name) for i in ev.chain]
            if any(map(math.isfinite, shares)):
                right.bar(names, shares, color=colour, alpha=0.4, label=name)
        right.set(ylim=(0, 1), ylabel="share of units")
        if right.patches:
            right.legend(fontsize="small")
        _upright(axes, ev)

    return draw


def updates(ev: Evidence) -> Draw | None:
    """Plot log10 of update / weight, layers by steps."""
    probes = [p for p in ev.record.probes if any(p.readings[i].update for i in ev.chain)]
    if len(probes) < 2:
        return None
    sizes = [[_log10(p.readings[i].update) for p in probes] for i in ev.chain]

    def draw(axes: Axes) -> None:
        image = axes.imshow(sizes, cmap="RdBu_r", vmin=-7, vmax=1, aspect="auto")
        axes.set_xticks(range(len(probes)), [str(p.step) for p in probes])
        axes.set_yticks(range(len(ev.chain)), _names(ev), fontsize="small")
        axes.set(xlabel="step", title="log10(update / weight) in a step (healthy: about -3)")
        axes.figure.colorbar(image, ax=axes)

    return draw


def loss(record: Record) -> Draw | None:
    """Plot the loss on the probe batch, on validation data and of the best constant."""
    points = record.points
    if len(points) < 2:
        return None
    steps = [p.step for p in points]
    trivial = record.static.get("trivial")

    def draw(axes: Axes) -> None:
        series: dict[str, Line] = {
            "train": (steps, [p.loss for p in points]),
            "validation": (steps, [p.valid_loss for p in points]),
        }
        plotting.lines(axes, series, x="step", y="loss")
        if isinstance(trivial, float) and math.isfinite(trivial):
            plotting.level(axes, trivial, "best constant")
        axes.set_title("Loss in the dry run")

    return draw


def _moments(record: Record) -> list[tuple[Probe, str, str]]:
    probes = record.probes
    shown = [(probes[0], BLUE, "step 0")]
    if len(probes) > 1:
        shown.append((probes[-1], RED, f"step {probes[-1].step}"))
    return shown


def _names(ev: Evidence) -> list[str]:
    return [f"{ev.site(i).name or 'model'} {ev.site(i).kind}" for i in ev.chain]


def _upright(axes: Axes, ev: Evidence) -> None:
    """Rotate the names of layers where they would overlap."""
    if len(ev.chain) > 4:
        axes.tick_params(axis="x", labelrotation=45, labelsize="small")
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")


def _log10(value: float | None) -> float:
    return math.log10(value) if value and math.isfinite(value) and value > 0 else math.nan
