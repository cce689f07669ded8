"""Small jobs of every command that leaves something behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tally import timeless

TABLE = "people.csv"
PROGRAM = """
import torch
from torch import nn
x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
data = x, (x[:, 0] > 0).long()
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
"""


def table(rows: int = 240) -> str:
    """Numbers, words, dates and gaps in a CSV, with a class that follows from some of them."""
    lines = ["age,city,since,income,moved"]
    for i in range(rows):
        age, city = 20 + i * 7 % 50, ("Bonn", "Köln", "Ulm", "")[i * 5 % 4]
        income = "" if i % 11 == 0 else f"{1000 + i * 37 % 900}.5"
        moved = "yes" if age > 45 or city == "Ulm" else "no"
        lines.append(f"{age},{city},2021-{1 + i % 12:02}-{1 + i % 28:02},{income},{moved}")
    return "\n".join(lines) + "\n"


def prepare(folder: Path) -> None:
    """What the jobs read: a program and a table."""
    (folder / "program.py").write_text(PROGRAM)
    (folder / TABLE).write_text(table(), encoding="utf-8")


@dataclass(frozen=True)
class Job:
    """A command, what it leaves, and how it is taken up after a kill."""

    arguments: tuple[str, ...]
    again: str = "--overwrite"  # the option of the second try; "" for none
    output: str = "run"
    anew: float = 1.0  # how often one that only begins anew is taken up, since that is long

    @property
    def resumable(self) -> bool:
        return self.again == "--resume"


def _job(text: str, again: str = "--overwrite", output: str = "run", anew: float = 1.0) -> Job:
    return Job(tuple(f"{text} --quiet --output {output}".split()), again, output, anew)


JOBS = {
    "fit": _job(
        "fit iris --epochs 15 --dropout 0.2 --no-linear --checkpoint-every 0.02", "--resume"
    ),
    "tune": _job("tune iris --model mlp:8 --budget 4runs --epochs 8 --folds 0", "--resume"),
    "compare": _job("compare iris --methods none,l2 --splits 2 --trials 2 --epochs 3", "--resume"),
    "path": _job("path iris --strengths 5 --folds 2", "--resume"),
    "fit a table": _job(
        f"fit {TABLE} --target moved --epochs 20 --no-linear --checkpoint-every 0.02", "--resume"
    ),
    "tune over a table": _job(
        f"tune {TABLE} --target moved --model mlp:8 --budget 4runs --epochs 8 --folds 0",
        "--resume",
    ),
    "compare over a table": _job(
        f"compare {TABLE} --target moved --methods none,l2 --splits 2 --trials 2 --epochs 3",
        "--resume",
    ),
    "path over a table": _job(f"path {TABLE} --target moved --strengths 5 --folds 2", "--resume"),
    "demo": _job("demo --quick", "", anew=0.25),
    "diagnose": _job(
        "diagnose program.py:model --data program.py:data --optimizer sgd:0.1 --steps 40", anew=0.5
    ),
    "cure": _job(
        "cure program.py:model --data program.py:data --optimizer sgd:0.1 --budget 3s --steps 20 "
        "--seeds 2",
        anew=0.5,
    ),
    "predict": _job("predict fitted iris", "", "predictions.csv"),
    "report": _job("report fitted", "", "fitted/report.html"),
}
SAME = tuple(name for name in JOBS if name not in ("cure", "report"))  # no clock decides


def left_in(path: Path) -> object:
    """What a job leaves, without times."""
    if path.is_file():
        return path.read_bytes()
    found: dict[str, object] = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.suffix == ".safetensors" and "states/" not in name:
            found[name] = file.read_bytes()
        elif name == "result.json":
            found[name] = timeless(json.loads(file.read_text()))
        elif name == "history.jsonl":
            found[name] = [timeless(json.loads(x)) for x in file.read_text().splitlines()]
    return found


def difference(found: object, wanted: object, place: str = "") -> str:
    """Where two results differ first, and how; "" where they are the same."""
    if isinstance(found, dict) and isinstance(wanted, dict) and found.keys() == wanted.keys():
        pairs = [(found[key], wanted[key], f"{place}/{key}") for key in found]
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = [(a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(found, wanted))]
    else:
        return "" if found == wanted else f"{place}: {found!r:.200} for {wanted!r:.200}"
    return next(filter(None, (difference(*pair) for pair in pairs)), "")


def leftovers(path: Path) -> list[str]:
    """What no finished job may leave."""
    names = [p.name for p in path.rglob("*")] if path.is_dir() else []
    names += [p.name for p in path.parent.glob(".*")]
    return [n for n in names if n.endswith(".tmp") or n in (".lock", ".probe", "checkpoint")]
