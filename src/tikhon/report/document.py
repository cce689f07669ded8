"""The verb: run directories in, one HTML file out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tikhon.errors import InputError, unknown
from tikhon.report.html import render
from tikhon.report.kinds import columns, compare, demo, diagnosis, fit, path, several, tune
from tikhon.report.page import Page
from tikhon.report.saved import SavedRun, read
from tikhon.runs.files import write_bytes
from tikhon.runs.manifest import reseal

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
    """Write the report of one run, or the comparison of several, and return the file's path.

    The page is one HTML file that works offline: verdict first, then what supports it. It carries
    English and Simplified Chinese.

    Args:
        run_dirs: folders of runs, one or more.
        output: the file; by default `report.html` in the run's folder, or `comparison.html`
            beside the first of several runs.
        language: "en" or "zh", the one shown at first; by default the browser's.

    Raises `InputError` for a folder that is not a run or is named twice, an unknown language or a
    kind of run without a page, `DataError` for a run that cannot be read, `StorageError` if the
    file cannot be written.

    >>> import tikhon
    >>> tikhon.report.write("runs/none")
    Traceback (most recent call last):
    tikhon.errors.InputError: no run directory at runs/none; give the folder that `--output` named
    """
    return written(*run_dirs, output=output, language=language)[0]


def written(
    *run_dirs: str | Path, output: str | Path | None = None, language: str | None = None
) -> tuple[Path, Page]:
    """What `write` returns, and the page that it wrote, as `build` gives it."""
    found = [Path(run_dir).resolve() for run_dir in run_dirs]
    if twice := next((at for at, path in zip(run_dirs, found) if found.count(path) > 1), None):
        raise InputError(f"{twice} is named twice: a run is compared with others")
    runs = [read(run_dir) for run_dir in run_dirs]
    page = build(*runs)
    html = render(page, language)
    if output is None:
        output = runs[0].path / "report.html" if len(runs) == 1 else _beside(runs[0].path)
    target = Path(output)
    write_bytes(target, html.encode())
    if len(runs) == 1 and target.parent == runs[0].path:
        reseal(target.parent, target.name)
    return target, page


def build(*runs: SavedRun) -> Page:
    """The page of one run, or the comparison of several `runs`, as values without HTML."""
    if not runs:
        raise InputError("no run directory was given; name at least one")
    for run in runs:
        if run.kind not in KINDS:
            raise InputError(f"{run.path}: {unknown('kind of run', run.kind, KINDS)}")
    pages = [columns.warned(KINDS[run.kind](run), run) for run in runs]
    return pages[0] if len(pages) == 1 else several.page(runs, pages)


def _beside(path: Path) -> Path:
    return path.resolve().parent / "comparison.html"
