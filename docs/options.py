"""Write the tables of options in docs/cli.md: python docs/options.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tikhon.options import STRENGTHS, Option, RecipeOptions, TrainingOptions, options_of

FILE = Path(__file__).with_name("cli.md")
BEGIN = "<!-- begin of the options: python docs/options.py writes them -->"
END = "<!-- end of the options -->"


def page(text: str) -> str:
    """The page with the tables as the fields are now."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}"


def tables() -> str:
    """The strengths, the fields of `Recipe` and those of `Settings`."""
    named = [
        f"| `--{name.replace('_', '-')}` | `{told.penalty}` | {told.how} | "
        f"{told.help} on all weight matrices |"
        for name, told in STRENGTHS.items()
        if told.flag
    ]
    return "\n\n".join(
        [
            "\n".join(["| shell | penalty | mode | what |", "|---|---|---|---|", *named]),
            "\n".join(_head("a recipe") + list(_rows(options_of(RecipeOptions)))),
            "\n".join(_head("`tikhon.fit`") + list(_rows(options_of(TrainingOptions)))),
        ]
    )


def _head(where: str) -> list[str]:
    return [f"| {where} | shell | default | in a space | what |", "|---|---|---|---|---|"]


def _rows(options: Mapping[str, tuple[Option, Any]]) -> Iterator[str]:
    for name, (told, default) in options.items():
        flag = told.flags[0] if told.flags else f"--{name.replace('_', '-')}"
        varies = f"no: {told.search}" if isinstance(told.search, str) else "yes"
        shown = "none" if default in (None, ()) else f"`{default}`"
        yield f"| `{name}` | `{flag}` | {shown} | {varies} | {told.help} |"


if __name__ == "__main__":
    FILE.write_text(page(FILE.read_text(encoding="utf-8")), encoding="utf-8")
