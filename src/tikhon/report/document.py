"""Write the HTML report of run folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tikhon.errors import InputError, unknown_name
from tikhon.report.html import render
from tikhon.report.kinds import columns, compare, demo, diagnosis, fit, path, run_groups, tune
from tikhon.report.page import Page
from tikhon.report.saved import SavedRun, read
from tikhon.runs.files import write_bytes
from tikhon.runs.manifest import update_manifest

KINDS: dict[str, Callable[[SavedRun], Page]] = {
    "fit": fit.page,
    "demo": demo.page,
    "tune": tune.page,
    "path": path.page,
    "diagnosis": diagnosis.page,
    "cure": diagnosis.cure_page,
    "compare": compare.page,
}


def write(
    *run_dirs: str | Path, output: str | Path | None = None, language: str | None = None
) -> Path:
    """Write the report of one run, or a comparison of several, and return its path.

    The page is one HTML file that works offline, verdict first, in English and Simplified Chinese.

    Args:
        run_dirs: one or more run folders.
        output: the file; by default `report.html` in the run's folder, or `comparison.html`
            beside the first of several runs.
        language: "en" or "zh", shown first; by default that of the browser.

    Raises `InputError` for a folder that is not a run or is given twice, an unknown language or a
    kind of run without a page, `DataError` for an unreadable run, `StorageError` if the file
    cannot be written.

    >>> import tikhon
    >>> tikhon.report.write("runs/none")
    Traceback (most recent call last):
    tikhon.errors.InputError: no run directory at runs/none; give the folder that `--output` named
    """
    return write_page(*run_dirs, output=output, language=language)[0]


def write_page(
    *run_dirs: str | Path, output: str | Path | None = None, language: str | None = None
) -> tuple[Path, Page]:
    """Return what `write` returns, and the page it wrote."""
    found = [Path(run_dir).resolve() for run_dir in run_dirs]
    if twice := next((at for at, path in zip(run_dirs, found) if found.count(path) > 1), None):
        raise InputError(f"{twice} is given twice: name each run once")
    runs = [read(run_dir) for run_dir in run_dirs]
    page = build(*runs)
    html = render(page, language)
    if output is None:
        run = runs[0].path
        output = (
            run / "report.html" if len(runs) == 1 else run.resolve().parent / "comparison.html"
        )
    target = Path(output)
    write_bytes(target, html.encode())
    if len(runs) == 1 and target.parent == runs[0].path:
        update_manifest(target.parent, target.name)
    return target, page


def build(*runs: SavedRun) -> Page:
    """Build the page of one run, or the comparison of several, without HTML."""
    if not runs:
        raise InputError("no run directory was given; name at least one")
    for run in runs:
        if run.kind not in KINDS:
            raise InputError(f"{run.path}: {unknown_name('kind of run', run.kind, KINDS)}")
    pages = [columns.put_doubts_first(KINDS[run.kind](run), run) for run in runs]
    return pages[0] if len(pages) == 1 else run_groups.page(runs, pages)
