"""Every type of the public surface is declared: `pyright --verifytypes`, for public names.

Run in an environment that holds tikhon; prints what lacks a type, ends with 1 if any.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import tikhon

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from reference import public_names, submodules


def public() -> set[str]:
    """Where each public function and class is defined, as module and name."""
    values = [getattr(tikhon, name) for name in tikhon.__all__]
    for module in (getattr(tikhon, name) for name in submodules()):
        values += [getattr(module, name) for name in public_names(module)]
    named = (v for v in values if not isinstance(v, ModuleType) and hasattr(v, "__qualname__"))
    return {f"{value.__module__}.{value.__qualname__}" for value in named}


def symbols() -> list[dict[str, object]]:
    """What pyright found of every symbol of the package."""
    binaries = Path(sys.executable).parent
    search = os.pathsep.join([str(binaries), os.environ["PATH"]])
    ran = subprocess.run(
        [binaries / "pyright", "--verifytypes", "tikhon", "--ignoreexternal", "--outputjson"],
        env={**os.environ, "PATH": search, "VIRTUAL_ENV": str(binaries.parent)},
        capture_output=True,
        text=True,
    )
    return json.loads(ran.stdout)["typeCompleteness"]["symbols"]


def lacks(symbol: dict[str, object]) -> list[str]:
    """What a symbol lacks; bases of packages without types, such as scikit-learn, are theirs."""
    said = [d["message"] for d in symbol["diagnostics"]]
    theirs = ("Type of metaclass unknown", "Type of base class unknown", "Type of base class")
    own = [text for text in said if not text.startswith(theirs)]
    known = symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"]
    return [] if known or (said and not own) else (own or ["its type is unknown"])


def main() -> int:
    """Print each public symbol whose type is unknown or left to the checker."""
    homes = public()
    mine = [
        s for s in symbols() if any(s["name"] == h or s["name"].startswith(f"{h}.") for h in homes)
    ]
    lacking = {str(s["name"]): lacks(s) for s in mine if lacks(s)}
    for name, said in lacking.items():
        print(name, *said, sep="\n    ")
    print(f"{len(mine) - len(lacking)} of {len(mine)} public symbols have a declared type")
    return 1 if lacking or not mine else 0


if __name__ == "__main__":
    sys.exit(main())
