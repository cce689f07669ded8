"""Sections shared by several kinds of run."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tikhon.languages import strings
from tikhon.options import format_penalty
from tikhon.report import charts
from tikhon.report.page import (
    Block,
    Cell,
    Chart,
    CodeBlock,
    Fact,
    Label,
    Level,
    Mark,
    Name,
    PageTable,
    Section,
    Text,
    format_number,
    joined,
    label,
    percent,
    seconds,
    strength,
)
from tikhon.report.saved import SavedRun
from tikhon.runs.documents import Epoch, Number, SavedPenalty, SavedSparsity, SavedWeights


@dataclass(frozen=True)
class ScoreKind:
    """The main score of a run: accuracy (higher is better) or an error (lower is better)."""

    key: str
    label: Label
    higher: bool


def metric_of(records: Iterable[Mapping[str, object]]) -> ScoreKind:
    """Return accuracy if the records have it, else RMSE, else the loss."""
    keys = {key for record in records for key in record}
    for name, higher in (("accuracy", True), ("rmse", False)):
        if any(f"{part}/{name}" in keys for part in ("train", "valid", "test")):
            return ScoreKind(name, label(f"metric_{name}"), higher)
    return ScoreKind("loss", label("metric_loss"), False)


def data_name(run: SavedRun) -> str:
    """Return the name of a run's data."""
    data = run.config.get("data") or {}
    return str(data.get("name", run.name) if isinstance(data, dict) else data)


def kept_epoch(run: SavedRun) -> int | None:
    """Return the best epoch if early stopping restored it, None if the last one was kept."""
    early = as_mapping(run.config.get("recipe")).get("early_stopping")
    return run.result.get("best_epoch") if early else None


def final_record(run: SavedRun) -> Epoch:
    """Return the scores of the model that was kept."""
    epoch, last = kept_epoch(run), run.history[-1] if run.history else {}
    kept = next((r for r in run.history if r.get("epoch") == epoch), last)
    return {**kept, **(run.result.get("metrics") or {})}


def about_run(run: SavedRun) -> tuple[tuple[Label, Label | str], ...]:
    """Return the details of a run: data, model, optimizer, seed, device, versions."""
    config = run.config
    lines: list[tuple[Label, Label | str]] = [(label("about_run"), run.name)]
    data, model = as_mapping(config.get("data")), as_mapping(config.get("model"))
    if data:
        lines += about_data(data)
    elif config.get("data"):
        lines.append((label("about_data"), str(config["data"])))
    if size := model.get("parameters"):
        lines.append(
            (label("about_model"), label("model_of", name=model["name"], size=f"{size:,}"))
        )
    elif model:
        lines.append((label("about_model"), str(model.get("name", ""))))
    for key in ("optimizer", "recipe"):
        if text := format_settings(as_mapping(config.get(key))):
            lines.append((label(f"about_{key}"), text))
    for key in ("seed", "device"):
        if config.get(key) is not None:
            lines.append((label(f"about_{key}"), str(config[key])))
    if text := format_settings(as_mapping(config.get("versions"))):
        lines.append((label("about_versions"), text))
    return tuple(lines)


def as_mapping(value: object) -> Mapping[str, Any]:
    """Return a mapping from a document, empty if it is anything else."""
    return value if isinstance(value, Mapping) else {}


def about_data(data: Mapping[str, object]) -> list[tuple[Label, Label | str]]:
    """Describe the data: name, rows and features; for a table its file, target and classes."""
    origin, rows = as_mapping(data.get("origin")), data.get("rows")
    count = {k: f"{v:,}" for k, v in as_mapping(rows).items() if isinstance(v, int)}
    values = {"name": data.get("name", "–"), "features": data.get("features", "–")}
    if {"train", "valid", "test"} <= count.keys():
        key = "data_split" if count["valid"] != "0" else "data_folds"
        found: list[tuple[Label, Label | str]] = [
            (label("about_data"), label(key, **count, **values))
        ]
    else:
        known = f"{rows:,}" if isinstance(rows, int) else "–"
        key = "data_rows" if data.get("name") and data.get("features") else "data_size"
        found = [(label("about_data"), label(key, rows=known, **values))]
    if origin.get("source"):
        digest = str(origin.get("sha256") or data.get("fingerprint") or "")[:12]
        found.append((label("about_file"), f"{origin['source']} (SHA-256 {digest})"))
    if origin.get("target"):
        found.append((label("about_target"), str(origin["target"])))
    classes = data.get("classes")
    if isinstance(classes, list) and classes:
        shown = ", ".join(map(str, classes[:12])) + (", ..." if len(classes) > 12 else "")
        found.append((label("about_classes"), shown))
    return found


def format_settings(entries: Mapping[str, object]) -> Label | str | None:
    """Format settings as the name, then "learning rate 0.001, batch size 64"; None if empty.

    >>> format_settings({"name": "adam", "lr": 0.001, "batch_size": 64}).text("en")
    'adam, learning rate 0.001, batch size 64'
    """
    kept = {k: v for k, v in entries.items() if v not in (None, [], {}, "", 0.0) and k != "name"}
    words = [str(entries["name"])] if entries.get("name") else []
    return joined(
        [*words, *(named(f"setting_{k}", k, value=format_value(v)) for k, v in kept.items())]
    )


def named(text: str, key: str, **values: str) -> Label | str:
    """Return the `text` of a key; without a translation the key in words, with its values."""
    known = text in strings("en")
    return label(text, **values) if known else " ".join([key.replace("_", " "), *values.values()])


def format_value(value: object) -> str:
    """Format a setting's value, short lists without brackets."""
    if isinstance(value, list) and len(value) <= 12:
        between = "; " if any(isinstance(entry, Mapping) for entry in value) else ", "
        return between.join(map(format_nested, value))
    return f"{value:g}" if isinstance(value, float) else format_nested(value)


def format_nested(value: object) -> str:
    """Format a nested value, long lists by their length."""
    if isinstance(value, Mapping):
        if "penalty" in value:
            return format_penalty(value)
        return ", ".join(f"{k} {format_nested(v)}" for k, v in value.items())
    if isinstance(value, list):
        return (
            f"[{len(value)}]" if len(value) > 12 else f"[{', '.join(map(format_nested, value))}]"
        )
    return format_number(value) if isinstance(value, float) else str(value)


def learning_curves(run: SavedRun, metric: ScoreKind, best: int | None) -> Section:
    """Plot loss and score over epochs, with the gap shaded."""
    epochs = run.series("epoch")
    blocks: list[Block] = []
    for key, title in {metric.key: metric.label, "loss": label("metric_loss")}.items():
        train, valid = run.series(f"train/{key}"), run.series(f"valid/{key}")
        if not charts.finite(train) and not charts.finite(valid):
            continue
        higher = metric.higher and key == metric.key
        figure = charts.learning_curves(epochs, train, valid, title, higher=higher, best=best)
        kept = epochs.index(best) if best in epochs else -1
        alt = describe_curves(title, train[kept], valid[kept])
        blocks.append(Chart(label("curves_of", metric=title), figure, alt))
    if not blocks:
        blocks.append(Text(label("no_history")))
    return Section(label("learning_curves"), tuple(blocks), label("learning_curves_lead"))


def describe_curves(metric: Label, train: Number, valid: Number) -> Label:
    """Describe learning curves by the values that they end at."""
    ends = {"train": format_number(train), "valid": format_number(valid)}
    return label("alt_curves", metric=metric, **ends)


def describe_lines(what: Label, series: Mapping[str, list[Number]]) -> Label:
    """Describe lines over epochs by the values that they end at."""
    last = ", ".join(f"{name} {format_number(values[-1])}" for name, values in series.items())
    return label("alt_over_time", what=what, last=last)


def penalties_over_time(run: SavedRun) -> Section | None:
    """Plot value, strength and exact zeros of each penalty, and the norms, over epochs."""
    epochs = run.series("epoch")
    wanted = (
        (r"penalty/(.+)/value", "penalty_value", {"rangemode": "tozero"}),
        (r"penalty/(.+)/zeros", "zeros", {"range": [-0.02, 1.02], "tickformat": ".0%"}),
        (r"penalty/(.+)/strength", "strength", {}),
        (r"norm/(.+)/l1", "norm_l1", {"rangemode": "tozero"}),
        (r"norm/(.+)/l2", "norm_l2", {"rangemode": "tozero"}),
    )
    blocks = []
    for pattern, key, more in wanted:
        series = series_matching(run, pattern)
        if key == "strength":
            series = {n: v for n, v in series.items() if len(set(charts.finite(v))) > 1}
        if not series:
            continue
        figure = charts.lines_over_epochs(
            epochs, series, label(key), log=key == "strength", **more
        )
        blocks.append(Chart(label(key), figure, describe_lines(label(key), series)))
    if not blocks:
        return None
    return Section(label("penalties_over_time"), tuple(blocks), label("penalties_over_time_lead"))


def series_matching(run: SavedRun, pattern: str) -> dict[str, list[Number]]:
    """Return the series of all history keys that match, by captured name."""
    keys = dict.fromkeys(key for record in run.history for key in record)
    found = {m[1]: run.series(key) for key in keys if (m := re.fullmatch(pattern, key))}
    return {name: values for name, values in found.items() if charts.finite(values)}


def penalty_table(penalties: Mapping[str, SavedPenalty]) -> PageTable | None:
    """Tabulate final strength, value and exact zeros of each penalty."""
    audited = any("verdict" in p for p in penalties.values())
    rows = tuple(
        (
            Name(name),
            strength(p.get("strength")),
            label(f"mode_{p['how']}") if "how" in p else "–",  # older runs lack it
            format_number(p.get("value")),
            percent(p.get("zeros")),
            *((_audit_mark(p),) if audited else ()),
        )
        for name, p in penalties.items()
    )
    keys = ("penalty", "strength", "mode", "penalty_value", "zeros")
    head = tuple(label(key) for key in keys)
    head = (*head, label("audit")) if audited else head
    caption = label("penalties_at_end_audited") if audited else label("penalties_at_end")
    return PageTable(caption, head, rows) if rows else None


def sparsity_table(found: SavedSparsity) -> PageTable | None:
    """Tabulate the sparsity of each layer after `sparsify`."""
    rows = tuple(
        (
            Name(layer["layer"]),
            f"{layer['units']:,}",
            percent(layer["zeros"] / max(1, layer["units"])),
        )
        for layer in found["layers"]
    )
    if not rows:
        return None
    head = (label("layer_thinned"), label(f"units_{found['of']}"), label("zeros"))
    return PageTable(label("sparsity_at_end"), head, rows)


def _audit_mark(penalty: SavedPenalty) -> Cell:
    """Mark whether a stronger or weaker penalty would improve validation."""
    verdict = penalty.get("verdict")
    if verdict is None:
        return ""
    slope = penalty.get("slope", math.nan)
    text = label("audit_" + str(verdict).replace(" ", "_"), slope=f"{slope:+.3f}")
    return Mark("good" if verdict == "flat" else "watch", text)


def weight_section(parameters: Mapping[str, SavedWeights]) -> Section | None:
    """Plot a histogram of each regularized parameter, with exact zeros separate."""
    blocks: list[Block] = []
    rows = []
    for name, facts in parameters.items():
        zeros = facts.get("zeros")
        rows.append(
            (
                Name(name),
                percent(zeros),
                format_number(facts.get("l1")),
                format_number(facts.get("l2")),
            )
        )
        histogram = facts.get("histogram")
        if histogram and histogram["counts"]:
            figure = charts.histogram(histogram["edges"], histogram["counts"], zeros)
            alt = label("alt_histogram", name=name, zeros=percent(zeros))
            blocks.append(Chart(Name(name), figure, alt))
    if not rows:
        return None
    head = (label("parameter"), label("zeros"), label("norm_l1"), label("norm_l2"))
    table = PageTable(label("weights_at_end"), head, tuple(rows))
    return Section(label("weights"), (table, *blocks), label("weights_lead"))


def command_section(run: SavedRun) -> Section | None:
    """Show the command that made this run."""
    blocks = []
    if command := run.config.get("command"):
        blocks.append(CodeBlock((shlex.join(map(str, command)),), label("made_by")))
    return Section(label("reproduce"), tuple(blocks)) if blocks else None


def without_missing(*candidates: Section | None) -> tuple[Section, ...]:
    """Return the sections that are not None."""
    return tuple(section for section in candidates if section is not None)


def score_fact(metric: ScoreKind, record: Mapping[str, object], part: str) -> Fact | None:
    """Return one score as a main figure."""
    value = record.get(f"{part}/{metric.key}")
    if value is None:
        return None
    return Fact(part_score(metric, part), format_number(value))


def time_fact(run: SavedRun) -> tuple[Fact, ...]:
    """Return the time of a run as a main figure, if it is known."""
    spent = run.result.get("seconds")
    return () if spent is None else (Fact(label("time"), seconds(spent)),)


def part_score(metric: ScoreKind, part: str) -> Label:
    """Return the name of a score on one part of the data, such as "Test accuracy"."""
    return label("score_on", part=label(f"part_{part}"), metric=metric_word(metric))


def metric_word(metric: ScoreKind) -> Label:
    """Return the metric's name for use inside a sentence."""
    return label(f"metric_{metric.key}_word")


def worst(levels: Iterable[Level]) -> Level:
    """Return the most severe of several levels."""
    seen = set(levels)
    for level in ("bad", "watch", "good"):
        if level in seen:
            return level
    return "plain"
