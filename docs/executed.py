"""What the code of the tutorials prints and draws, run and written below it.

A block after `<!-- executed -->` runs, all blocks of a page in one namespace; in a `console` block
every `$ tikhon ...` runs. `<!-- executed: TEXT -->` also draws: TEXT describes its picture.

    python docs/executed.py [PAGE ...]    # runs them and writes below each block what it gave

The translation of a page shows the same. The tests run the pages too, and compare what they print
apart from its digits, which differ between machines.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
IMAGES = HERE / "images"
GUIDES = (
    "quickstart regularize diagnosis hypergradient tuning layers sparsity compaction sklearn data "
    "cli"
)
PAGES = [
    HERE.parent / "README.md",
    *(HERE / f"{name}.md" for name in GUIDES.split()),
    *(p for p in sorted((HERE / "tutorials").glob("*.md")) if ".zh-CN" not in p.name),
]
BLOCK = re.compile(
    r"(?P<mark><!-- executed(?:: (?P<alt>[^>]*))? -->\n)?"
    r"```(?P<kind>python|console)\n(?P<code>.*?)```\n"
    r"(?:\n<!-- printed -->\n```text\n(?P<printed>.*?)```\n)?"
    r"(?:\n<!-- drawn -->\n!\[(?P<shown>[^\]]*)\]\((?P<picture>[^)]*)\)\n)?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Given:
    """What a block gave: its code (of a shell: with what the commands printed), text, picture."""

    code: str
    printed: str = ""
    picture: str = ""  # relative to the page


def run(page: Path, *, draw: bool = False) -> dict[str, Given]:
    """Run the marked blocks of a page in an empty folder: what each gave, by its code.

    Pictures are written to `docs/images` only if `draw`.
    """
    namespace: dict[str, object] = {"__name__": "__main__"}
    given: dict[str, Given] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
            if not match["mark"]:
                continue
            code = code_of(match)
            if match["kind"] == "console":
                given[code] = Given(shell(code))
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, f"{page.name}: {code[:40]!r}", "exec"), namespace)
            picture = drawn(page, len(given), draw=draw) if match["alt"] else ""
            given[code] = Given(code, printed.getvalue(), picture)
    return given


def code_of(match: re.Match[str]) -> str:
    """What a block runs: of a console its commands alone."""
    return commands(match["code"]) if match["kind"] == "console" else match["code"]


def commands(code: str) -> str:
    """The commands of a console block, without what they printed; a line may go on after `\\`."""
    kept, open_ended = [], False
    for line in code.splitlines(keepends=True):
        if line.startswith("$ ") or open_ended:
            kept.append(line)
            open_ended = line.rstrip().endswith("\\")
    return "".join(kept)


def shell(code: str) -> str:
    """The commands, each with what it prints on a terminal of 80 columns."""
    from tikhon.cli import main

    shown = []
    for command in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
        arguments = shlex.split(command.replace("\\\n", " "))
        both = io.StringIO()
        with (
            mock.patch.object(sys, "argv", arguments),
            mock.patch.dict(os.environ, {"COLUMNS": "80", "NO_COLOR": "1"}),
            contextlib.redirect_stdout(both),
            contextlib.redirect_stderr(both),
        ):
            if ended := main(arguments[1:]):
                raise RuntimeError(f"{command.strip()} ended with {ended}: {both.getvalue()}")
        lines = [line.rstrip() for line in both.getvalue().splitlines()]
        shown.append(f"$ {command}" + "\n".join(lines) + "\n")
    return "\n".join(shown)


def drawn(page: Path, place: int, *, draw: bool) -> str:
    """The picture of the open figure, relative to the page."""
    import matplotlib.pyplot as plt

    name = f"{page.stem}-{place + 1}.svg"
    if draw:
        settings = {"svg.hashsalt": name, "svg.fonttype": "none"}  # the same bytes every time
        with plt.rc_context(settings):
            plt.gcf().savefig(IMAGES / name, bbox_inches="tight", metadata={"Date": None})
    plt.close("all")
    return os.path.relpath(IMAGES / name, page.parent)


def written(text: str, given: dict[str, Given]) -> str:
    """The text of a page, or of its translation, with what the blocks gave."""

    def replaced(match: re.Match[str]) -> str:
        found = given.get(code_of(match))
        if found is None:
            return match[0]
        parts = [f"{match['mark'] or ''}```{match['kind']}\n{found.code}```\n"]
        if found.printed:
            parts.append(f"\n<!-- printed -->\n```text\n{found.printed.rstrip()}\n```\n")
        if found.picture:
            alt = match["alt"] or match["shown"] or "TODO"
            parts.append(f"\n<!-- drawn -->\n![{alt}]({found.picture})\n")
        return "".join(parts)

    return BLOCK.sub(replaced, text)


def masked(text: str) -> str:
    """A page without what differs between machines: digits, blanks that follow their width, and
    what a shell says of a training.
    """

    def asked(match: re.Match[str]) -> str:
        return code_of(match) if match["kind"] == "console" else match[0]

    text = BLOCK.sub(asked, text)
    text = re.sub(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?", "#", text)
    text = re.sub(r"─+", "─", re.sub(r"[▁-█]+", "▁", text))  # as wide or high as the numbers
    return re.sub(r"[ \t]+", " ", text)


def twin(page: Path) -> Path:
    """The Chinese page beside a page."""
    return page.with_name(f"{page.stem}.zh-CN.md")


def main() -> None:
    """Run the pages that are named, or all, and write what they gave."""
    os.environ.setdefault("MPLBACKEND", "agg")
    for page in [Path(name).resolve() for name in sys.argv[1:]] or PAGES:
        given = run(page, draw=True)
        for shown in (page, twin(page)):
            if shown.exists():
                text = shown.read_text(encoding="utf-8")
                shown.write_text(written(text, given), encoding="utf-8")
        print(f"{page.name}: {len(given)} blocks")


if __name__ == "__main__":
    main()
