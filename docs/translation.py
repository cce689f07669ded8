"""Which sections of a translated page are older than the English ones they were made from.

`NAME.zh-CN.md` beside `NAME.md` has the same sections in the same order. After each heading a
comment `<!-- english: HASH -->` records the English text that was translated.

    python docs/translation.py            # lists what is out of date, exit code 1
    python docs/translation.py --update   # records the present English text
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"<!-- english: ([0-9a-f]{10}) -->\n?")


def sections(text: str) -> list[tuple[str, str]]:
    """Heading and text of every second-level section; what stands before the first is `(top)`."""
    found, fenced = [("(top)", [])], False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            found.append((line[3:].strip(), []))
        else:
            found[-1][1].append(line)
    return [(heading, "\n".join(lines)) for heading, lines in found]


def digest(text: str) -> str:
    """A short hash of a section, blind to spaces at line ends and around it."""
    lines = [line.rstrip() for line in MARK.sub("", text).strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:10]


def stale(english: str, chinese: str) -> list[str]:
    """One line for every section that is missing, extra or older than its original."""
    originals, twins = sections(english), sections(chinese)
    if len(originals) != len(twins):
        return [
            f"{len(originals)} sections in English, {len(twins)} in the translation: "
            f"{[h for h, _ in originals]} and {[h for h, _ in twins]}"
        ]
    found = []
    for (heading, text), (twin, translated) in zip(originals, twins):
        mark = MARK.search(translated)
        if mark is None:
            found.append(f"{heading!r} ({twin}): no comment says what it was translated from")
        elif mark[1] != digest(text):
            found.append(f"{heading!r} ({twin}): the English section has changed since")
    return found


def update(english: str, chinese: str) -> str:
    """The translation with the hashes of the present English sections."""
    parts = []
    for (heading, text), (_, original) in zip(sections(chinese), sections(english), strict=True):
        body = MARK.sub("", text).strip("\n")
        mark = f"<!-- english: {digest(original)} -->"
        if heading == "(top)":
            parts.append(f"{body}\n\n{mark}\n" if body else f"{mark}\n")
        else:
            parts.append(f"## {heading}\n{mark}\n\n{body}\n")
    return "\n".join(parts)


def pairs(root: Path = ROOT) -> list[tuple[Path, Path]]:
    """Every English page with a translation beside it."""
    folders = (root, root / "docs", root / "docs" / "tutorials")
    twins = [twin for folder in folders for twin in sorted(folder.glob("*.zh-CN.md"))]
    return [(twin.with_name(twin.name.replace(".zh-CN", "")), twin) for twin in twins]


def main() -> int:
    """Check or update every pair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="record the present English text")
    arguments, late = parser.parse_args(), 0
    for original, twin in pairs():
        english, chinese = original.read_text("utf-8"), twin.read_text("utf-8")
        if arguments.update:
            twin.write_text(update(english, chinese), "utf-8")
            continue
        for line in stale(english, chinese):
            late += 1
            print(f"{twin.relative_to(ROOT)}: {line}", file=sys.stderr)
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
