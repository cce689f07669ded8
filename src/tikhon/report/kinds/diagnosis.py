"""The pages of a diagnosis and of a cure: findings, then the layers and losses behind them."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal

from tikhon.languages import strings
from tikhon.numbers import format_number
from tikhon.options import DATA_FLAGS, MODELS, remove_options, split_command
from tikhon.report import charts, layer_charts
from tikhon.report.kinds import elements
from tikhon.report.page import (
    Cell,
    Chart,
    CodeBlock,
    Fact,
    Label,
    Level,
    Mark,
    Name,
    Page,
    PageTable,
    Section,
    Text,
    joined,
    label,
    percent,
    saved_label,
)
from tikhon.report.saved import SavedRun
from tikhon.runs.documents import (
    Number,
    SavedFinding,
    SavedProbe,
    SavedRecord,
    SavedSite,
    SavedTreatment,
)

HEALTHY_SIGNAL = 1e-3  # lowest healthy backward signal in the first layer, relative to the last
UNTRAINED = ("nothing_learned", "far_behind")  # verdicts of a run without findings
BASELINES = ("constant", "shallow")  # baselines scored on the same rows
PROSE = 400  # characters of a sentence in a table
SEVERITY: dict[str, Level] = {"critical": "bad", "warning": "watch", "info": "plain"}
VERDICTS: dict[str, Level] = {"confirmed": "good", "worse": "bad"}


def page(run: SavedRun) -> Page:
    """Build the page of a diagnosis: problems, places, evidence and remedies."""
    result = run.result
    found: list[SavedFinding] = list(result.get("findings") or [])
    record: SavedRecord = result.get("record") or {}
    levels: list[Level] = [SEVERITY.get(f["severity"], "plain") for f in found]
    still: list[Level] = ["watch"] if any(map(result.get, UNTRAINED)) else []
    return Page(
        title=label("title_diagnosis", model=record.get("model", run.name)),
        level="good" if result.get("ok") and not still else elements.worst([*levels, *still]),
        verdict=verdict(found, result),
        remarks=finding_sentences(found),
        next_commands=next_command(run, "cure") if still or not result.get("ok") else (),
        facts=facts(record),
        about=(*elements.about_run(run), *about(record)),
        sections=elements.without_missing(
            findings(found), *evidence_charts(record), elements.command_section(run)
        ),
    )


def code_name(code: str) -> Label | str:
    """Return a finding's code in words, if the page has them."""
    return label(f"finding_{code}") if f"finding_{code}" in strings("en") else code


def verdict(found: list[SavedFinding], result: Mapping[str, object]) -> Label:
    """Name the cause first; its consequences are not counted."""
    serious = [f for f in found if f["severity"] != "info" and not f.get("cause")]
    if not serious:
        return label(next(filter(result.get, UNTRAINED), "healthy"))
    name, where = code_name(serious[0]["code"]), serious[0].get("where")
    finding = label("finding_in", finding=name, where=place_label(where)) if where else name
    if more := len(serious) - 1:
        return label("sick_more", finding=finding, more=more)
    return label("sick", finding=finding)


def finding_sentences(found: list[SavedFinding]) -> tuple[Label | Name, ...]:
    """Return the consequence of the first serious finding, and its remedy."""
    serious = [f for f in found if f["severity"] != "info" and not f.get("cause")]
    if not serious:
        return ()
    first = serious[0]
    return (
        label("finding_leads_to", reason=_reason(first)),
        label("finding_cure", advice=_advice(first)),
        *((label("finding_fix", fix=fix),) if (fix := _finding_sentence(first, "fix")) else ()),
    )


_OF_ONE_RUN = (
    "--steps --output -o --fail-on --budget --seeds --full --quiet -q --json --overwrite --debug"
).split()


def next_command(
    run: SavedRun, verb: str, options: Mapping[str, str | None] | None = None
) -> tuple[str, ...]:
    """Return the command of another verb for the same program, with `options` set or removed."""
    command = [str(part) for part in run.config.get("command") or ()]
    is_trained = _is_network_by_name(command) or "--optimizer" in " ".join(command)
    if command[:1] != ["tikhon"] or not is_trained:
        return ()
    options = options or {}
    kept = remove_options(command[2:], *_OF_ONE_RUN, *options)
    changed = [word for name, value in options.items() if value for word in (name, value)]
    return (shlex.join(["tikhon", verb, *kept, *changed]),)


def _model_argument(command: Sequence[str]) -> str:
    """Return MODEL of a command `tikhon diagnose MODEL ...`."""
    words = (words[0] for name, words in split_command(command[2:]) if not name)
    return next(words, "")


def _is_network_by_name(command: Sequence[str]) -> bool:
    """Return whether MODEL is a network of `tikhon fit` or data for one, not code of the user."""
    head, colon, _ = _model_argument(command).partition(":")
    return not colon or head in {name.partition(":")[0] for name in MODELS}


def _how_to_apply(run: SavedRun) -> tuple[tuple[Label, ...], tuple[str, ...]]:
    """Return what to do with the treatment of a cure, and the command that checks the result."""
    command = [str(part) for part in run.config.get("command") or ()]
    commands = next_command(run, "diagnose", run.result.get("options"))
    place = run.result.get("place")
    if place is None or not commands:
        return (), ()
    if place == "options":
        return (label("cure_in_options"),), (*commands, *_fit_command(run, command))
    if place == "model" and not _is_network_by_name(command):
        return (label("cure_in_model", model=_model_argument(command)),), commands
    return (label("cure_in_program"),), ()


def _fit_command(run: SavedRun, command: Sequence[str]) -> tuple[str, ...]:
    """Return the command that trains a network by name with the cured optimizer, if one does."""
    options = dict(run.result["options"])
    built = re.fullmatch(r"(\w+):([^,]+)(?:,momentum=([^,]+))?", options.pop("--optimizer", ""))
    parts = list(split_command(command[2:]))
    given = {name: words[-1].removeprefix(f"{name}=") for name, words in parts} | options
    if (
        not built
        or not _is_network_by_name(command)
        or given.get("--penalty")
        or "--clip" in given
    ):
        return ()
    name, lr, momentum = built.groups()
    model = given[""] if "--data" in given else None
    data = given.get("--data", given[""])
    set_to = {"--model": model, "--optimizer": name, "--lr": lr, "--momentum": momentum}
    set_to |= {name: given.get(name) for name in ("--loss", "--batch-size", "--seed")}
    table = [word for name, words in parts if name in DATA_FLAGS for word in words]
    words = [word for name, value in set_to.items() if value for word in (name, value)]
    return (shlex.join(["tikhon", "fit", data, *table, *words]),)


def place_label(where: list[str]) -> Label | str:
    """Format module names, long lists by first and last; other places in words."""
    if len(where) > 3:
        return label("place", first=where[0], last=where[-1], count=len(where))
    if where == ["the loss"]:
        return label("place_loss")
    return ", ".join(where) or "–"


def facts(record: SavedRecord) -> tuple[Fact, ...]:
    """Return the size of the model and of the dry run, and its final loss."""
    shown = [Fact(label("parameters"), f"{record.get('parameters', 0):,}")]
    if steps := record.get("steps"):
        shown.append(Fact(label("dry_run"), str(steps), label("steps")))
    points = record.get("points") or []
    if points:
        note = label("loss_before", loss=format_number(points[0].get("loss")))
        shown.append(Fact(label("loss_after"), format_number(points[-1].get("loss")), note))
        known = record.get("reference") or {}
        reached, constant, shallow = points[-1].get("metric"), *map(known.get, BASELINES)
        if not any(value is None for value in (reached, constant, shallow)):
            note = label(
                "score_of_shallow",
                constant=format_number(constant),
                shallow=format_number(shallow),
            )
            shown.append(Fact(label("score_of_dry_run"), format_number(reached), note))
    return tuple(shown)


def about(record: SavedRecord) -> tuple[tuple[Label, Label | str], ...]:
    """Describe the observed loss function."""
    loss = record.get("loss")
    if not loss:
        return ()
    told = elements.format_settings(loss) if isinstance(loss, Mapping) else str(loss)
    return ((label("about_loss"), told),) if told else ()


def _reason(f: SavedFinding) -> Label | Name:
    """Return the consequence of a finding with the measurement behind it."""
    effect = _finding_sentence(f, "effect") or code_name(f["code"])
    why = _finding_sentence(f, "why") or code_name(f.get("cause") or "")
    if why:
        return label("finding_reason", effect=effect, why=why)
    return effect if isinstance(effect, Label) else Name(effect, PROSE)


def _finding_sentence(
    f: SavedFinding, part: Literal["effect", "why", "advice", "fix"]
) -> Label | str:
    """Return a sentence of a finding, in English if the run has no key for it."""
    saved = f.get("sentences", {}).get(part)
    if saved and saved["key"] in strings("en"):
        return saved_label(saved)
    text = f.get(part, "")
    return text if isinstance(text, str) else "; ".join(text)


def _advice(f: SavedFinding) -> Label | Name:
    """Return the advice of a finding."""
    advice = _finding_sentence(f, "advice") or "–"
    return advice if isinstance(advice, Label) else Name(advice, PROSE)


def _advice_and_fix(f: SavedFinding) -> Label | Name:
    """Return the advice, and the line of code to change if the finding names one."""
    advice, fix = _advice(f), _finding_sentence(f, "fix")
    return label("advice_and_fix", advice=advice, fix=fix) if fix else advice


def findings(found: list[SavedFinding]) -> Section:
    """Tabulate the findings: severity, place, reason, evidence, remedies."""
    if not found:
        return Section(label("findings"), (Text(label("no_finding")),))
    rows: list[tuple[Cell, ...]] = []
    for f in found:
        name = code_name(f["code"])
        level = SEVERITY.get(f["severity"], "plain")
        where = place_label(f.get("where") or [])
        rows.append(
            (
                name if isinstance(name, Label) else Name(name),
                Mark(level, label(f"severity_{level}")),
                where if isinstance(where, Label) else Name(where),
                _reason(f),
                evidence_cell(f.get("evidence") or {}),
                _advice_and_fix(f),
            )
        )
    keys = ("finding", "severity", "where", "why", "measured", "advice")
    return Section(
        label("findings"),
        (PageTable(label("findings_caption"), tuple(map(label, keys)), tuple(rows)),),
    )


def _count_or_number(value: object) -> str:
    """Format a whole number without decimals.

    >>> _count_or_number(6.0), _count_or_number(0.637)
    ('6', '0.637')
    """
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return f"{value:,.0f}" if whole else format_number(value)


def evidence_cell(evidence: Mapping[str, object]) -> Cell:
    """Format the numbers behind a finding, with their names in words."""
    measured = [
        label(
            "evidence_of",
            name=elements.named(f"measured_{key}", key),
            value=_count_or_number(value),
        )
        for key, value in evidence.items()
    ]
    return joined(measured) or Name("–")


def evidence_charts(record: SavedRecord) -> list[Section | None]:
    """Return the charts behind the findings."""
    sites, probes = record.get("sites") or [], record.get("probes") or []
    return [layers(sites, probes), activations(sites, probes), dry_run(record, sites, probes)]


def sites_with_role(sites: list[SavedSite], *roles: str) -> tuple[list[int], list[str]]:
    """Return indices and names of the sites with one of the roles."""
    chain = [i for i, s in enumerate(sites) if s["role"] in roles]
    return chain, [f"{sites[i]['name'] or 'model'} {sites[i]['kind']}" for i in chain]


def first_and_last(probes: list[SavedProbe]) -> list[tuple[Label, SavedProbe]]:
    """Return the first and last probe with their labels."""
    kept = probes[:1] + probes[1:][-1:]
    return [(label("at_step", step=probe["step"]), probe) for probe in kept]


def layers(sites: list[SavedSite], probes: list[SavedProbe]) -> Section | None:
    """Plot backward signal and forward scale over depth."""
    chain, names = sites_with_role(sites, "weight", "recurrent")
    if len(chain) < 2 or not probes:
        return None
    signal, scale = [], []
    for name, probe in first_and_last(probes):
        readings = [probe["readings"][i] for i in chain]
        top = readings[-1].get("signal")
        if top:
            signal.append((name, [(r.get("signal") or 0) / top for r in readings]))
        scale.append((name, [r.get("rms") for r in readings]))
    band = (HEALTHY_SIGNAL, 1 / HEALTHY_SIGNAL)
    blocks = []
    if signal:
        figure = layer_charts.lines_over_layers(names, signal, label("signal"), band=band)
        reached = format_number(signal[0][1][0])
        blocks.append(
            Chart(
                label("signal"), figure, label("alt_signal", reached=reached), label("signal_note")
            )
        )
    figure = layer_charts.lines_over_layers(names, scale, label("output_size"))
    blocks.append(Chart(label("output_size"), figure, label("alt_output_size")))
    return Section(label("layers"), tuple(blocks), label("layers_lead"))


def activations(sites: list[SavedSite], probes: list[SavedProbe]) -> Section | None:
    """Plot the shares of dead and saturated units at the end."""
    chain, names = sites_with_role(sites, "activation")
    if not chain or not probes:
        return None
    last = [probes[-1]["readings"][i] for i in chain]
    series = [(label(key), [r.get(key) for r in last]) for key in ("dead", "saturated")]
    series = [(name, values) for name, values in series if charts.finite(values)]
    if not series:
        return None
    figure = layer_charts.unit_shares(names, series, label("share_of_units"))
    worst = max(v for _, values in series for v in charts.finite(values))
    if not worst:
        return None
    alt = label("alt_shares", worst=percent(worst))
    return Section(label("activations"), (Chart(label("share_of_units"), figure, alt, wide=True),))


def dry_run(
    record: SavedRecord, sites: list[SavedSite], probes: list[SavedProbe]
) -> Section | None:
    """Plot the loss of the dry run, and the updates of each layer by step."""
    points = [p for p in record.get("points") or [] if charts.finite([p.get("eval_loss")])]
    validated = [p for p in points if charts.finite([p.get("valid_loss")])]
    points = validated if len(validated) > 1 else points  # one set of steps for both curves
    blocks = []
    if len(points) > 1:
        steps = [p["step"] for p in points]
        train, valid = ([p.get(k) for p in points] for k in ("eval_loss", "valid_loss"))
        figure = charts.learning_curves(steps, train, valid, label("metric_loss"), higher=False)
        figure["layout"]["xaxis"] = charts.axis(label("step"))
        alt = elements.describe_curves(label("metric_loss"), train[-1], valid[-1])
        blocks.append(Chart(label("metric_loss"), figure, alt))
    chain, names = sites_with_role(sites, "weight", "recurrent")
    moved = [p for p in probes if any(p["readings"][i].get("update") for i in chain)]
    if chain and len(moved) > 1:
        rows = [[logarithm(p["readings"][i].get("update")) for p in moved] for i in chain]
        figure = layer_charts.update_heatmap(names, [p["step"] for p in moved], rows, (-7.0, 1.0))
        blocks.append(Chart(label("update"), figure, label("alt_update"), label("update_note")))
    return Section(label("dry_run"), tuple(blocks)) if blocks else None


def logarithm(value: Number) -> float | None:
    """Return log10 of a positive finite number, else None."""
    return math.log10(value) if value and 0 < value < math.inf else None


def cure_page(run: SavedRun) -> Page:
    """Build the page of a cure: treatments tried, those confirmed, and the patch."""
    result = run.result
    results: list[SavedTreatment] = list(result.get("arms") or [])
    inner = result.get("diagnosis") or {}
    record: SavedRecord = inner.get("record") or {}
    confirmed = bool(result.get("confirmed"))
    best = next((a for a in results if a["name"] == result.get("treatment")), None)
    found: list[SavedFinding] = list(inner.get("findings") or [])
    words = label("no_cure")
    if confirmed and best:
        before, after = (format_number(mean(a["scores"])) for a in (results[0], best))
        key = "cured_diverged" if diverges(results) else "cured"
        treatment = treatment_label(best["name"])
        words = label(key, treatment=treatment, before=before, after=after)
    tried = [a for a in results if a["name"] != "nothing"]
    shown = [Fact(label("tried"), str(len(tried)))]
    if best:
        pairs = (("loss_untreated", results[0]), ("loss_treated", best))
        shown = [*(Fact(label(key), format_number(mean(a["scores"]))) for key, a in pairs), *shown]
    shown += elements.time_fact(run)
    how, commands = _how_to_apply(run)
    patch = (Section(label("patch"), (CodeBlock(tuple(result["patch"].splitlines())),)),)
    return Page(
        title=label("title_cure", model=record.get("model", run.name)),
        level="good" if confirmed else "watch",
        verdict=words,
        remarks=(*how, verdict(found, inner), *finding_sentences(found)),
        next_commands=commands,
        facts=tuple(shown),
        about=(*elements.about_run(run), *about(record)),
        sections=elements.without_missing(
            treatment_section(results, best),
            *(patch if result.get("patch") else ()),
            findings(found),
            *evidence_charts(record),
            elements.command_section(run),
        ),
    )


def mean(values: list[Number]) -> float | None:
    """Return the mean of the finite values."""
    known = charts.finite(values)
    return sum(known) / len(known) if known else None


def diverges(results: list[SavedTreatment]) -> bool:
    """Return whether the untreated program has no finite loss to compare with."""
    scores = results[0]["scores"]
    return len(charts.finite(scores)) < len(scores)


def treatment_section(
    results: list[SavedTreatment], best: SavedTreatment | None
) -> Section | None:
    """Tabulate the treatments, those run in full first, and plot their effects with the spread."""
    if not results:
        return None
    longest = max(a["steps"] for a in results)
    tried = [a for a in results if a["name"] != "nothing"]
    tried.sort(key=lambda a: (-a["steps"], -(a.get("effect") or 0.0)))
    lasting = [a for a in tried if a["steps"] == longest]
    keys = ("treatment", "steps_run", "metric_loss", "effect", "over_seeds", "verdict")
    chosen = next((i for i, a in enumerate(tried) if best and a["name"] == best["name"]), None)
    caption = label("treatments_caption", tried=len(tried), lasting=len(lasting))
    measured = not diverges(results)
    rows = tuple(_treatment(a, a["steps"] == longest, measured) for a in tried)
    table = PageTable(caption, tuple(map(label, keys)), rows, chosen)
    if not (lasting and measured):
        return Section(label("treatments"), (table,))
    colours = ["series-2" if a["verdict"] == "confirmed" else "muted" for a in lasting]
    figure = charts.intervals(
        [treatment_label(a["name"]) for a in lasting],
        [a.get("effect") for a in lasting],
        [min(a["effects"]) for a in lasting],
        [max(a["effects"]) for a in lasting],
        label("effect"),
        colours,
    )
    chart = Chart(label("effect"), figure, label("alt_effect"), label("effect_note"), wide=True)
    return Section(label("treatments"), (table, chart))


def treatment_label(treatment: str) -> Label | Name:
    """Return a treatment's name, translated: one edit, or several joined by a plus."""
    first, plus, rest = treatment.partition(" + ")
    matches = ((key, pattern.fullmatch(first)) for key, pattern in _treatments().items())
    found = next(((key, m.groupdict()) for key, m in matches if m), None)
    one = Name(first, 400) if found is None else label(found[0], **found[1])
    return label("treatments_both", first=one, rest=treatment_label(rest)) if plus else one


@cache
def _treatments() -> dict[str, re.Pattern[str]]:
    """Return patterns of treatment names, made from the English texts."""
    names = {k: words for k, words in strings("en").items() if k.startswith("treatment_")}
    return {
        key: re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(words)))
        for key, words in names.items()
    }


def _treatment(a: SavedTreatment, lasted: bool, measured: bool) -> tuple[Cell, ...]:
    """Return the table row of a treatment: steps, loss, and improvement over no treatment."""
    level = VERDICTS.get(a["verdict"], "plain")
    words = {"confirmed": "confirmed", "worse": "worse", "leaves the fault": "leaves_the_fault"}
    word = words.get(a["verdict"], "not_confirmed")
    low, high = min(a["effects"]), max(a["effects"])
    return (
        treatment_label(a["name"]),
        str(a["steps"]),
        format_number(mean(a["scores"])),
        format_number(a.get("effect") if measured else None),
        f"{format_number(low)} … {format_number(high)}"
        if measured and len(a["effects"]) > 1
        else "–",
        Mark(level, label(word if lasted else "stopped_early")),
    )
