"""Figures of a record: the signal per layer, forward scale, updates, and the loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tikhon.diagnosis.evidence import Evidence
from tikhon.diagnosis.record import Probe, Record
from tikhon.diagnosis.thresholds import VANISHED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from plotly.graph_objects import Figure

    from tikhon.cures.trials import TreatmentResult

BLUE, RED, GREY, GREEN = "#2b6cb0", "#c53030", "#718096", "rgba(56,161,105,0.12)"


def figures(record: Record) -> dict[str, Figure]:
    """Plotly figures that the record has data for, by name."""
    makers = {"signal": signal, "forward": forward, "updates": updates, "loss": loss}
    made = {name: make(record) for name, make in makers.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def signal(record: Record) -> Figure | None:
    """The backward signal at each layer relative to the last one, over the healthy band."""
    from plotly.graph_objects import Figure, Scatter

    ev = Evidence(record)
    if ev.first is None or not ev.chain:
        return None
    names = _names(ev)
    figure = Figure()
    for probe, color, title in _moments(ev):
        values = [probe.readings[i].signal for i in ev.chain]
        top = values[-1]
        if not top:
            continue
        shares = [v / top if v else None for v in values]
        figure.add_trace(
            Scatter(
                x=names,
                y=shares,
                name=title,
                mode="lines+markers",
                line={"color": color},
                hovertemplate="%{x}<br>%{y:.2e} of the last layer's signal<extra></extra>",
            )
        )
    if not figure.data:
        return None
    figure.add_hrect(y0=VANISHED, y1=1 / VANISHED, fillcolor=GREEN, line_width=0)
    figure.update_yaxes(type="log", exponentformat="power", title="signal / last layer's signal")
    return _dress(figure, "Backward signal per layer (green: healthy)", "layer, first to last")


def forward(record: Record) -> Figure | None:
    """Output scale per layer, with dead and saturated shares of the activations behind it."""
    from plotly.graph_objects import Bar, Figure, Scatter

    ev = Evidence(record)
    if ev.first is None or ev.last is None or not ev.chain:
        return None
    names = _names(ev)
    figure = Figure()
    scale = [ev.first.readings[i].rms or None for i in ev.chain]
    figure.add_trace(
        Scatter(x=names, y=scale, name="output size", line={"color": BLUE}, mode="lines+markers")
    )
    for name, color in (("dead", GREY), ("saturated", RED)):
        shares = []
        for i in ev.chain:
            activation = ev.activation_after(i)
            at = activation if activation is not None else i
            shares.append(getattr(ev.last.readings[at], name))
        if any(s is not None for s in shares):
            figure.add_trace(
                Bar(x=names, y=shares, name=name, yaxis="y2", marker_color=color, opacity=0.5)
            )
    figure.update_layout(
        yaxis={"type": "log", "exponentformat": "power", "title": "output size (rms)"},
        yaxis2={
            "overlaying": "y",
            "side": "right",
            "range": [0, 1],
            "tickformat": ".0%",
            "title": "share of units",
            "showgrid": False,
        },
    )
    return _dress(figure, "Forward scale, dead and saturated units", "layer, first to last")


def updates(record: Record) -> Figure | None:
    """log10 of update / weight, layer by step."""
    from plotly.graph_objects import Figure, Heatmap

    ev = Evidence(record)
    probes = [p for p in record.probes if any(p.readings[i].update for i in ev.chain)]
    if len(probes) < 2:
        return None
    rows = [
        [
            math.log10(u) if (u := p.readings[i].update) and math.isfinite(u) else None
            for p in probes
        ]
        for i in ev.chain
    ]
    figure = Figure(
        Heatmap(
            z=rows,
            x=[str(p.step) for p in probes],
            y=_names(ev),
            colorscale="RdBu_r",
            zmin=-7,
            zmax=1,
            colorbar={"title": "log10"},
            hovertemplate="step %{x}, %{y}<br>10^%{z:.1f} of the weights<extra></extra>",
        )
    )
    return _dress(figure, "Update / weight in a step (healthy: about -3)", "step")


def loss(record: Record) -> Figure | None:
    """The loss on the probe batch, on validation data, and of the best constant."""
    from plotly.graph_objects import Figure, Scatter

    points = record.points
    if len(points) < 2:
        return None
    steps = [p.step for p in points]
    figure = Figure()
    curves = (
        ("train", [p.loss for p in points], BLUE),
        ("validation", [p.valid_loss for p in points], RED),
    )
    for name, values, color in curves:
        if any(v is not None for v in values):
            figure.add_trace(Scatter(x=steps, y=values, name=name, line={"color": color}))
    trivial = record.static.get("trivial")
    if isinstance(trivial, float) and math.isfinite(trivial):
        figure.add_hline(
            y=trivial, line_dash="dot", line_color=GREY, annotation_text="best constant"
        )
    figure.update_yaxes(title="loss")
    return _dress(figure, "Loss in the dry run", "step")


def effects(treatments: Sequence[TreatmentResult]) -> Figure:
    """How much lower each treatment's loss is than without it, with the spread over seeds."""
    from plotly.graph_objects import Bar, Figure

    last = [a for a in treatments[1:] if a.steps == treatments[0].steps]
    colors = {"confirmed": BLUE, "worse": RED}
    figure = Figure(
        Bar(
            x=[a.effect for a in last],
            y=[a.name for a in last],
            orientation="h",
            error_x={"array": [a.spread for a in last]},
            marker_color=[colors.get(a.verdict, GREY) for a in last],
        )
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    return _dress(figure, "Effect of treatments (blue: confirmed)", "loss without - loss with")


def _moments(ev: Evidence) -> list[tuple[Probe, str, str]]:
    probes = ev.record.probes
    shown = [(probes[0], BLUE, "step 0")]
    if len(probes) > 1:
        shown.append((probes[-1], RED, f"step {probes[-1].step}"))
    return shown


def _names(ev: Evidence) -> list[str]:
    return [f"{ev.site(i).name or 'model'} {ev.site(i).kind}" for i in ev.chain]


def _dress(figure: Figure, title: str, bottom: str) -> Figure:
    figure.update_layout(
        title=title,
        template="plotly_white",
        margin={"l": 70, "r": 20, "t": 50, "b": 60},
        legend={"orientation": "h", "y": 1.08, "x": 1, "xanchor": "right"},
    )
    figure.update_xaxes(title=bottom)
    return figure
