"""Name the folder of a run, and record its command and data."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tikhon.errors import InputError
from tikhon.languages import sentence

if TYPE_CHECKING:
    from tikhon.data import Dataset, Split
    from tikhon.data.table import TableOptions


def output_of(output: Path | None, name: str, resume: bool) -> Path:
    """Return the given folder, or the next free one named after the data."""
    if output is not None:
        return output
    if resume:
        raise InputError("--resume needs --output RUN, the folder of the run to continue")
    from tikhon.runs.run_directory import next_free_folder

    return next_free_folder(Path("runs"), Path(name).name)


def command_of(path: Path) -> list[str]:
    """Return the command that repeats this run, with an explicit folder."""
    arguments = [a for a in sys.argv[1:] if a not in ("--resume", "--overwrite")]
    named = ("--output", "--output=", "-o")
    if not any(a in named or a.startswith(named[1:]) for a in arguments):
        arguments += ["--output", str(path)]
    return ["tikhon", *arguments]


def config_of(
    kind: str,
    path: Path,
    data: Mapping[str, object],
    model: Mapping[str, object],
    *,
    seed: int,
    **more: object,
) -> dict[str, Any]:
    """Build `config.json` of a command with several trainings; `more` replaces entries."""
    from tikhon.training.fit import versions

    return {
        "kind": kind,
        "command": command_of(path),
        "data": dict(data),
        "model": dict(model),
        "optimizer": {},
        "recipe": {},
        "seed": seed,
        "device": "cpu",
        "versions": versions(),
    } | more


def about_network(name: str, parts: Split, outputs: int, **more: object) -> dict[str, object]:
    """Describe a network for `config.json`: enough to build it again."""
    return {"name": name, "shape": list(parts.train.shape), "outputs": outputs, **more}


def about_data(
    source: Dataset,
    parts: Split,
    valid: float,
    test: float,
    table: TableOptions | None,
    *,
    folds: bool = False,
) -> dict[str, object]:
    """Describe the data for `config.json`: enough to predict, and to recognise it.

    With `folds` the validation rows are trained on too.
    """
    from tikhon.data.description import describe_table

    fitted = parts.preprocessing
    rows = {name: len(getattr(parts, name).x) for name in ("train", "valid", "test")}
    if folds:
        rows |= {"train": rows["train"] + rows["valid"], "valid": 0}
    more: dict[str, object] = {} if fitted is None else {"preprocessing": fitted.to_dict()}
    if table is not None and fitted is not None:
        more["format"] = asdict(table.format) if table.format else {}
        more["table"] = _with_options(describe_table(source, parts), table)
    return more | {
        "name": source.name,
        "task": source.task,
        "rows": rows,
        "features": parts.train.x[0].numel(),
        "feature_names": list(parts.train.feature_names),
        "classes": list(source.classes),
        "split": {"valid": valid, "test": test},
        "scaling": dict(parts.scaling),
        "fingerprint": source.fingerprint(),
        "origin": dict(source.origin),
    }


def _with_options(table: dict[str, Any], options: TableOptions) -> dict[str, Any]:
    """Return the description of a table, with the columns excluded by options."""
    reasons = {name: sentence("reason_drop") for name in options.drop}
    if options.group is not None:
        reasons[options.group] = sentence("reason_group")
    excluded = [{"name": name, "reason": why.with_text()} for name, why in reasons.items()]
    return table | {"left_out": [*table["left_out"], *excluded]}
