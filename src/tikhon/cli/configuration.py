"""tikhon.toml: defaults for command options, under the options' names."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import typer

from tikhon.errors import InputError, unknown_name


def defaults(path: Path, context: typer.Context) -> dict[str, Any]:
    """Read option defaults by command: top-level keys apply to all commands, then [command].

    Raises `InputError` for invalid TOML and for unknown keys.
    """
    if not path.is_file():
        return {}
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from error
    group: Any = context.command
    options = {
        name: {p.name for p in command.params if p.param_type_name == "option"}
        for name, command in group.commands.items()
    }
    everywhere = set().union(*options.values())
    common = {_key(k): v for k, v in given.items() if not isinstance(v, dict)}
    for key in common:
        if key not in everywhere:
            raise InputError(f"{path}: {unknown_name('key', key, everywhere | set(options))}")
    found = {}
    for name, table in given.items():
        if isinstance(table, dict) and name not in options:
            raise InputError(f"{path}: {unknown_name('table', name, options)}")
    for name, allowed in options.items():
        table = {_key(k): v for k, v in given.get(name, {}).items()}
        for key in table:
            if key not in allowed:
                raise InputError(f"{path}: in [{name}]: {unknown_name('key', key, allowed)}")
        found[name] = {k: v for k, v in common.items() if k in allowed} | table
    return found


def _key(name: str) -> str:
    return name.replace("-", "_")
