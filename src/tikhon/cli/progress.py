"""Training progress: a bar within the epoch, and a line for some or all epochs."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Self

from tikhon.numbers import format_number

if TYPE_CHECKING:
    from tikhon.cli.terminal import Terminal
    from tikhon.training import Progress

_EVERY = 5.0  # seconds between lines without a bar
_SHOWN = 3  # weights whose norms fit on a line; the history has all


class _Bar:
    """A progress bar on a terminal, hidden elsewhere; shown inside of a `with` block."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal, self._bar = terminal, terminal.progress()
        self._task = self._bar.add_task("", total=None, rate="", note="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


class FitProgress(_Bar):
    """Show training progress on stderr.

    A terminal gets a bar with loss, score and time left, other streams a line for epochs 1, 2, 5,
    10, 20, 50, ... `verbose` prints a line for each epoch, with penalties and norms.
    """

    def __init__(self, terminal: Terminal, *, verbose: bool = False) -> None:
        super().__init__(terminal)
        self._verbose = verbose
        self._header, self._score = "", ""
        self._began: tuple[float, int] | None = None
        self.step = 0

    def tick(self, progress: Progress) -> None:
        """Update the bar: epoch, progress, rate, time left, mean loss in this epoch."""
        now, self.step = time.perf_counter(), progress.step
        self._began = self._began or (now, progress.step)
        steps = (progress.step - self._began[1]) / max(now - self._began[0], 1e-9)
        self._bar.update(
            self._task,
            description=f"epoch {progress.epoch + 1}/{progress.epochs}",
            total=progress.steps,
            completed=progress.step,
            rate=f"{steps:,.0f} steps/s" if steps else "",
            note=f"loss {progress.loss:.3f}{self._score}",
        )

    def epoch(self, row: dict[str, Any]) -> None:
        """Print the line of an epoch, with a header when the columns change."""
        self.step = row["step"]
        kind = "accuracy" if "train/accuracy" in row else "rmse"
        if f"valid/{kind}" in row:
            self._score = f", valid {kind} {_format_score(row[f'valid/{kind}'])}"
        if not self._verbose and (not self._bar.disable or not _is_round(row["epoch"])):
            return
        cells = _full_row(row, kind) if self._verbose else _short_row(row, kind)
        header = "  ".join(name.rjust(len(value)) for name, value in cells)
        if header.split() != self._header.split():
            self._header = header
            self._terminal.note(header, "bold")
        self._terminal.note("  ".join(value.rjust(len(name)) for name, value in cells))


class StepProgress(_Bar):
    """Progress by steps: a bar, or a line every few seconds."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(terminal)
        self._began, self._last_note = time.perf_counter(), -math.inf

    def __call__(self, text: str, done: float, total: float) -> None:
        """Report that `done` of `total` is finished, and what comes next."""
        self._bar.update(self._task, description=text, completed=done, total=total)
        spent = time.perf_counter() - self._began
        if self._bar.disable and spent - self._last_note >= _EVERY:
            self._last_note = spent
            share = f"{done / total:.0%}" if total else ""
            self._terminal.note(f"{spent:5.0f} s  {share:>4}  {text}")


def _is_round(epoch: int) -> bool:
    """Whether an epoch is 1, 2 or 5 times a power of ten."""
    return epoch / 10 ** math.floor(math.log10(epoch)) in (1, 2, 5)


def _format_score(value: float) -> str:
    """Format with four decimals, unless the number is large."""
    return f"{value:.4f}" if abs(value) < 1000 else format_number(value)


def _short_row(row: dict[str, float], kind: str) -> list[tuple[str, str]]:
    cells = [("epoch", f"{row['epoch']:>5}"), ("seconds", f"{row['seconds']:7.1f}")]
    for part in ("train", "valid"):
        for key in ("loss", kind):
            if f"{part}/{key}" in row:
                cells.append((f"{part} {key}", _format_score(row[f"{part}/{key}"])))
    return cells


def _full_row(row: dict[str, float], kind: str) -> list[tuple[str, str]]:
    cells = [("epoch", f"{row['epoch']:>5}"), ("data loss", f"{row['train/loss']:9.4f}")]
    values = [v for k, v in row.items() if k.startswith("penalty/") and k.endswith("/value")]
    if values:
        cells.append(("penalty", f"{sum(values):8.4f}"))
    zeros = {k.split("/")[1]: v for k, v in row.items() if k.endswith("/zeros")}
    params = list(dict.fromkeys(k.split("/")[1] for k in row if k.startswith("norm/")))
    for name in params[:_SHOWN]:
        short = name.removesuffix(".weight")
        cells.append((f"{short} |w|1", f"{row[f'norm/{name}/l1']:8.2f}"))
        cells.append((f"{short} |w|2", f"{row[f'norm/{name}/l2']:8.3f}"))
        cells.append((f"{short} zeros", f"{zeros.get(name, 0.0):7.1%}"))
    for part in ("train", "valid"):
        if f"{part}/{kind}" in row:
            cells.append((f"{part} {kind}", _format_score(row[f"{part}/{kind}"])))
    return cells
