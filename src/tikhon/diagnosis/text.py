"""The diagnosis as text that fits one screen, and as HTML."""

from __future__ import annotations

import html
import math
import textwrap

from tikhon import notebook
from tikhon.diagnosis.checks.causes import layer_gains
from tikhon.diagnosis.codes import NO_CURE
from tikhon.diagnosis.evidence import Evidence
from tikhon.diagnosis.findings import Finding, worst
from tikhon.diagnosis.record import Record, SiteReading

WIDTH = 99
SCREEN = 25
VERDICTS = {
    "fine": "NO PROBLEM FOUND",
    "info": "NO PROBLEM FOUND",
    "warning": "NEEDS ATTENTION",
    "critical": "PROBLEMS FOUND",
}


def format_screen(record: Record, findings: tuple[Finding, ...]) -> str:
    """Format verdict, findings with their consequences, and layers in at most 25 lines."""
    lines = [_title(record, findings)]
    codes = {f.code for f in findings}
    causes = [f for f in findings if f.cause not in codes]
    if _is_well(findings):
        lines += _result_lines(record)
    table_size = min(7, sum(s.role in ("weight", "recurrent") for s in record.sites)) + 2
    lines_left = SCREEN - len(lines) - table_size - 1
    detail = 6 if len(causes) * 6 <= lines_left else 2
    shown = causes[: max(1, lines_left // detail)]
    for place, finding in enumerate(shown, 1):
        lines += _paragraph(place, finding, findings, detail)
    if len(shown) < len(causes):
        lines.append(f" and {', '.join(f.code for f in causes[len(shown) :])}")
    return "\n".join([*lines, *_layers(record, SCREEN - len(lines))])


def _title(record: Record, findings: tuple[Finding, ...]) -> str:
    layers = sum(s.role in ("weight", "recurrent") for s in record.sites)
    engine = record.optimizer
    training = (
        f"{engine['name']} lr {engine.get('lr', 0):.3g}, {record.steps} steps"
        if engine
        else ("no optimizer: step 0 only")
    )
    count = f"{layers} weight layer{'s' if layers > 1 else ''}, " if layers else ""
    size = f"{record.model}, {count}batch {record.batch_size}"
    left = f"tikhon diagnose: {size}, {training}"
    verdict = VERDICTS[worst(findings)]
    if _is_well(findings):
        evidence = Evidence(record)
        if evidence.learned_nothing:
            verdict = "NOTHING LEARNED, NO CAUSE FOUND"
        elif evidence.far_behind:
            verdict = "FAR BEHIND A SHALLOW MODEL"
    return f"{left}  {verdict}"[:WIDTH]


def _is_well(findings: tuple[Finding, ...]) -> bool:
    """Whether nothing found is a warning or worse."""
    return worst(findings) in ("fine", "info")


def _root_cause(finding: Finding, findings: tuple[Finding, ...]) -> str:
    """Return the code at the end of the chain of causes."""
    by_code = {f.code: f for f in findings}
    seen = {finding.code}
    while finding.cause in by_code and finding.cause not in seen:
        seen.add(finding.cause)
        finding = by_code[finding.cause]
    return finding.code


def _paragraph(
    place: int, finding: Finding, findings: tuple[Finding, ...], detail: int
) -> list[str]:
    where = format_names(finding.where)
    lines = [f" {place} {finding.code}  {finding.severity}{f'  in {where}' if where else ''}"]
    lines += _wrap(f"   why: {finding.why}", detail > 2)
    no_cure = NO_CURE.get(finding.code)
    if detail > 2:
        lines.append(f"   effect: {finding.effect}")
        if finding.advice:
            lines.append(f"   cure: {'; '.join(finding.advice)}")
        if finding.fix:
            lines += _wrap(f"   write: {finding.fix}", True)
        elif no_cure:
            lines.append(f"   will not help: {no_cure}")
    follow = [f for f in findings if f.cause and f is not finding]
    follow = [f for f in follow if _root_cause(f, findings) == finding.code]
    if follow and detail > 2:
        named = ", ".join(f"{f.code} ({_first_evidence(f)})" for f in follow)
        lines += _wrap(f"   leads to: {named}", True)
    return [line if len(line) <= WIDTH else line[: WIDTH - 1] + "…" for line in lines]


def _wrap(line: str, may_wrap: bool) -> list[str]:
    """Return the line, wrapped into a second one if `may_wrap`."""
    if not may_wrap or len(line) <= WIDTH:
        return [line]
    first, *rest = textwrap.wrap(line, WIDTH, subsequent_indent=" " * 8, drop_whitespace=True)
    return [first, " " * 8 + " ".join(part.strip() for part in rest)] if rest else [first]


def _first_evidence(finding: Finding) -> str:
    """Format the first number of the evidence."""
    for name, value in finding.evidence.items():
        return f"{name.replace('_', ' ')} {value:.2g}"
    return finding.severity


def format_names(names: tuple[str, ...]) -> str:
    """Format module names, more than three as "first .. last (n layers)"."""
    if len(names) <= 3:
        return ", ".join(names)
    return f"{names[0]} .. {names[-1]} ({len(names)} layers)"


def _result_lines(record: Record) -> list[str]:
    """Format the loss of the dry run, and the score beside those of constant and shallow model."""
    end = record.points[-1] if record.points else None
    if end is None or end.eval_loss is None or not record.steps:
        return [" no problem at step 0"]
    told = [f" loss {record.points[0].loss or math.nan:.3g} -> {end.eval_loss:.3g}"]
    if (yard := Evidence(record).baseline_skills) is not None:
        reached, constant, shallow = yard
        name = "accuracy" if constant else "R2"  # which is 0 for a constant prediction
        known = f"constant prediction {constant:.2f}, shallow model on held-out rows {shallow:.2f}"
        told.append(f" {name} {reached:.2f} ({known})")
    return told


def _layers(record: Record, lines_left: int) -> list[str]:
    """Format the layer table and a sparkline of the gradient in at most `lines_left` lines."""
    ev = Evidence(record)
    if ev.first is None or not ev.chain or lines_left < 4:
        return []
    gain = {position: value for position, value, _, _ in layer_gains(ev)}
    signals = [ev.first.readings[i].signal for i in ev.chain]
    lines = [f" signal back to the first layer  {sparkline(signals)}  (log scale, first to last)"]
    columns = (("gain", 7), ("signal", 8), ("output", 8), ("dead", 5), ("sat", 5), ("update", 7))
    lines.append(f" {'layer':34} {' '.join(f'{name:>{width}}' for name, width in columns)}")
    rows = [_row(ev, i, gain.get(i)) for i in ev.chain]
    space = lines_left - len(lines)
    if len(rows) > space:
        head, tail = (space - 1 + 1) // 2, (space - 1) // 2
        skipped = f" ... {len(rows) - head - tail} more"
        rows = [*rows[:head], skipped, *(rows[-tail:] if tail else [])]
    return lines + rows


def _row(ev: Evidence, position: int, gain: float | None) -> str:
    assert ev.first is not None and ev.last is not None
    now = ev.first.readings[position]
    activation = ev.activation_after(position)
    last = ev.last.readings[activation] if activation is not None else SiteReading()
    own = ev.last.readings[position].saturated
    update = [p.readings[position].update for p in ev.record.probes]
    steps = [u for u in update if u is not None]
    site = ev.site(position)
    cells = [
        _cell(gain, "{:.2g}", 7),
        _cell(now.signal, "{:.0e}", 8),
        _cell(now.rms, "{:.2g}", 8),
        _cell(last.dead, "{:.0%}", 5),
        _cell(last.saturated if last.saturated is not None else own, "{:.0%}", 5),
        _cell(steps[len(steps) // 2] if steps else None, "{:.0e}", 7),
    ]
    return f" {(site.name + ' ' + site.kind).strip()[:34]:34} {' '.join(cells)}"


def _cell(value: float | None, form: str, width: int) -> str:
    shown = "-" if value is None or not math.isfinite(value) else form.format(value)
    return f"{shown:>{width}}"


def sparkline(values: list[float | None]) -> str:
    """Draw logarithms as bars, zero as a blank, in at most 40 characters."""
    if len(values) > 40:
        values = [values[round(k * (len(values) - 1) / 39)] for k in range(40)]
    logs = [math.log10(v) if v and math.isfinite(v) else None for v in values]
    known = [v for v in logs if v is not None]
    if not known:
        return "no signal"
    low, reach = min(known), max(max(known) - min(known), 1.0)
    bars = "▁▂▃▄▅▆▇█"
    return "".join(" " if v is None else bars[round((v - low) / reach * 7)] for v in logs)


def format_full(record: Record, findings: tuple[Finding, ...]) -> str:
    """Format all findings with evidence, wrapped, for a file or a pager."""
    lines = [_title(record, findings)]
    for finding in findings:
        lines.append(f"{finding.code} ({finding.severity}) {format_names(finding.where)}")
        for label, text in (
            ("why", finding.why),
            ("effect", finding.effect),
            ("cure", "; ".join(finding.advice)),
            ("write", finding.fix),
            ("no cure", NO_CURE.get(finding.code)),
            ("evidence", ", ".join(f"{k} {v:.3g}" for k, v in finding.evidence.items())),
            ("follows from", finding.cause),
        ):
            if text:
                lines += textwrap.wrap(
                    f"{label}: {text}", WIDTH, initial_indent="  ", subsequent_indent="    "
                )
    return "\n".join([*lines, *_layers(record, 1000)])


def html_page(record: Record, findings: tuple[Finding, ...]) -> str:
    """Format the diagnosis for a notebook: no script, all text escaped."""
    head = ("finding", "severity", "where", "why", "cure")
    rows = [
        (f.code, f.severity, format_names(f.where), f.why, "; ".join(f.advice)) for f in findings
    ]
    layers = html.escape("\n".join(_layers(record, 1000)))
    return notebook.html_card(_title(record, findings), (), head, rows, f"<pre>{layers}</pre>")
