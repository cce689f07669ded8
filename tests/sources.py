"""The files of the package, read and parsed once for the tests that look at them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "tikhon"
FILES = sorted(SOURCE.rglob("*.py"))
TEXTS = {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in FILES}


@cache
def trees() -> dict[str, ast.Module]:
    """The syntax of each file, by its path in the package."""
    return {name: ast.parse(text) for name, text in TEXTS.items()}


@cache
def nodes(tree: ast.Module) -> list[ast.AST]:
    """All nodes of a file."""
    return list(ast.walk(tree))
