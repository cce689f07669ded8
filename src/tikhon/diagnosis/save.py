"""Save a diagnosis or a cure as a run folder that `tikhon report` reads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tikhon.runs.run_directory import RESULT, RunDirectory


def save(document: dict[str, Any], path: str | Path, *, overwrite: bool = False) -> None:
    """Write `config.json` and `result.json` of a document; raises like `RunDirectory.create`."""
    record = document.get("record") or document["diagnosis"]["record"]
    config = {
        "schema_version": 1,
        "kind": document["kind"],
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "data": {"rows": record["data"].get("rows")},
        "model": {"name": record["model"], "parameters": record["parameters"]},
        "optimizer": record["optimizer"],
        "seed": record["seed"],
    }
    with RunDirectory(path) as folder:
        folder.take(config, overwrite=overwrite)
        folder.write(RESULT, document)
        folder.finish()
