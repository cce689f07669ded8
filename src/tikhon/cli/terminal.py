"""What a command shows: results on stdout, progress on stderr."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tikhon.cli.streams import Stderr, Stdout

_PROSE = 30  # letters of a cell from where it is text


class _Console(Console):
    """A console whose reader may leave: the command ends as one that SIGPIPE ends, not with 1."""

    def on_broken_pipe(self) -> None:
        """Leave it to the end of the command, which rich would make itself."""
        raise BrokenPipeError


class Terminal:
    """Two consoles; colours go when NO_COLOR is set or a stream is no terminal (rich sees to it).

    With `json` nothing but the document goes to stdout; with `quiet` nothing goes to stderr but
    errors.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json, self.quiet = json, quiet
        self.stdout = Stdout()
        out: Any = self.stdout
        err: Any = Stderr()
        self.out = _Console(file=out, highlight=False, soft_wrap=True, quiet=json)
        self.err = Console(file=err, stderr=True, highlight=False, soft_wrap=True, quiet=quiet)

    def note(self, text: str, style: str = "") -> None:
        """A line of progress."""
        self.err.print(text, style=style or None, markup=False)

    def say(self, text: str = "", style: str = "") -> None:
        """A line of the result."""
        self.out.print(text, style=style or None, markup=False)

    def tell(self, text: str) -> None:
        """A sentence of the result, wrapped between words on a terminal."""
        self.out.print(text, markup=False, soft_wrap=not self.out.is_terminal)

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = ""
    ) -> None:
        """A table of the result; the first column is text, the others are numbers.

        Where the window is narrow, heads are broken between words, then the gaps shrink, then
        the first column is; a number is never cut, rather the line is longer than the window.
        """
        widest = [max((len(row[i]) for row in rows), default=0) for i in range(len(columns))]
        heads, gap = list(columns), 2
        if _width(heads, widest, gap) > self.out.width:
            heads = [_broken(head, width) for head, width in zip(columns, widest, strict=True)]
            gap = 2 if _width(heads, widest, 2) <= self.out.width else 1
        fits = _width(heads, widest, gap) <= self.out.width
        first = max((len(word) for row in rows for word in row[0].split()), default=0)
        if _width(["", *heads[1:]], [first, *widest[1:]], gap) > self.out.width:
            first = widest[0]  # the window is too narrow in any case
        first = min(first, _PROSE)
        least = _width(["", *heads[1:]], [first, *widest[1:]], gap)
        table = Table(
            title=title or None,
            title_justify="left",
            box=None,
            pad_edge=False,
            padding=(0, gap, 0, 0),
            width=least if least > self.out.width else None,
        )
        for i, head in enumerate(heads):
            long = widest[i] > _PROSE  # sentences may be broken, numbers and names not
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
        """A text as it is, on stdout."""
        self.stdout.write(text)
        self.stdout.flush()

    def document(self, document: Mapping[str, object]) -> None:
        """The JSON document, if that is what was asked for."""
        if self.json:
            from tikhon.runs.files import json_text

            escaped = not self.stdout.encoding.lower().startswith("utf")
            self.write(json_text(document, ascii=escaped) + "\n")

    def progress(self) -> Progress:
        """A bar with the rate and the time left; nothing where stderr is no terminal."""
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


def _broken(head: str, width: int) -> str:
    """A head between whose words lines break where it is wider than its cells."""
    longest = max(map(len, head.split()), default=0)
    return "\n".join(textwrap.wrap(head, max(width, longest))) if len(head) > width else head


def _width(heads: Sequence[str], widest: Sequence[int], gap: int) -> int:
    """How many letters a table takes, where its sentences are broken."""
    lines = [max(map(len, head.split("\n"))) for head in heads]
    cells = [min(width, _PROSE) for width in widest]
    return sum(map(max, lines, cells)) + gap * (len(heads) - 1)
