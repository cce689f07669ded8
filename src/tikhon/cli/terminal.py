"""Print results on stdout and progress on stderr."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tikhon.cli.streams import Stderr, Stdout

_PROSE = 30  # characters from which a cell is text


class _Console(Console):
    """A console that raises on a closed pipe, so that the exit code is that of SIGPIPE."""

    def on_broken_pipe(self) -> None:
        """Raise instead of exiting, as rich would."""
        raise BrokenPipeError


class Terminal:
    """Two consoles, without colour if NO_COLOR is set or the stream is not a terminal.

    `json` prints only the document to stdout; `quiet` prints only errors to stderr.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json, self.quiet = json, quiet
        self.stdout = Stdout()
        out: Any = self.stdout
        err: Any = Stderr()
        self.out = _Console(file=out, highlight=False, soft_wrap=True, quiet=json)
        self.err = Console(file=err, stderr=True, highlight=False, soft_wrap=True, quiet=quiet)

    def note(self, text: str, style: str = "") -> None:
        """Print a line of progress."""
        self.err.print(text, style=style or None, markup=False)

    def print(self, text: str = "", style: str = "") -> None:
        """Print a line of the result."""
        self.out.print(text, style=style or None, markup=False)

    def print_wrapped(self, text: str) -> None:
        """Print a sentence of the result, wrapped at words on a terminal."""
        self.out.print(text, markup=False, soft_wrap=not self.out.is_terminal)

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = ""
    ) -> None:
        """Print a table of the result; the first column is text, the others are numbers.

        In narrow windows, headers are wrapped first, then gaps shrink, then the first column is
        wrapped; numbers are never cut, so that a line may exceed the window.
        """
        widest = [max((len(row[i]) for row in rows), default=0) for i in range(len(columns))]
        heads, gap = list(columns), 2
        if _table_width(heads, widest, gap) > self.out.width:
            heads = [_wrap_head(head, width) for head, width in zip(columns, widest, strict=True)]
            gap = 2 if _table_width(heads, widest, 2) <= self.out.width else 1
        fits = _table_width(heads, widest, gap) <= self.out.width
        first = max((len(word) for row in rows for word in row[0].split()), default=0)
        if _table_width(["", *heads[1:]], [first, *widest[1:]], gap) > self.out.width:
            first = widest[0]  # too narrow in any case
        first = min(first, _PROSE)
        least = _table_width(["", *heads[1:]], [first, *widest[1:]], gap)
        table = Table(
            title=title or None,
            title_justify="left",
            box=None,
            pad_edge=False,
            padding=(0, gap, 0, 0),
            width=least if least > self.out.width else None,
        )
        for i, head in enumerate(heads):
            long = widest[i] > _PROSE  # wrap sentences, but not numbers and names
            table.add_column(
                head,
                justify="right" if i else "left",
                no_wrap=not long and (fits or i > 0),
                min_width=(None if long else widest[i]) if i else first,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*row)
        self.out.print(table)

    def write(self, text: str) -> None:
        """Write a text unchanged to stdout."""
        self.stdout.write(text)
        self.stdout.flush()

    def print_document(self, document: Mapping[str, object]) -> None:
        """Print the JSON document, if requested."""
        if self.json:
            from tikhon.runs.files import json_text

            escaped = not self.stdout.encoding.lower().startswith("utf")
            self.write(json_text(document, ascii=escaped) + "\n")

    def progress(self) -> Progress:
        """Return a progress bar with rate and time left; hidden if stderr is not a terminal."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=self.err,
            transient=True,
            disable=self.quiet or not self.err.is_terminal,
        )


def _wrap_head(head: str, width: int) -> str:
    """Wrap a header at words if it is wider than its cells."""
    longest = max(map(len, head.split()), default=0)
    return "\n".join(textwrap.wrap(head, max(width, longest))) if len(head) > width else head


def _table_width(heads: Sequence[str], widest: Sequence[int], gap: int) -> int:
    """Return the width of a table with wrapped sentences."""
    lines = [max(map(len, head.split("\n"))) for head in heads]
    cells = [min(width, _PROSE) for width in widest]
    return sum(map(max, lines, cells)) + gap * (len(heads) - 1)
