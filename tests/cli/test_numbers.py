"""Terminal, page and JSON document of every command say the same numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain

import pytest

from tikhon.cli import main
from tikhon.report.document import build
from tikhon.report.page import Label, Mark, Page, PageTable
from tikhon.report.saved import read

SMALL = ("--methods", "none,l2", "--splits", "2", "--trials", "2", "--epochs", "3")
PROGRAM = ("net.py:make", "--data", "iris", "--optimizer", "sgd:0.01", "--steps", "20")
COMMANDS = {
    "fit": ("iris", "--epochs", "4", "--l1", "1e-3"),
    "fit auto": ("diabetes", "--epochs", "4", "--l2", "auto"),
    "fit sparsify": ("digits", "--epochs", "3", "--sparsify", "80%"),
    "tune": ("iris", "--budget", "6runs", "--epochs", "4"),
    "tune regression": ("diabetes", "--budget", "6runs", "--epochs", "4"),
    "path": ("diabetes", "--folds", "2"),
    "path classes": ("wine", "--strengths", "0.3,0.1", "--folds", "2"),
    "path network": (
        *("iris", "--penalty", "hierarchical", "--model", "mlp:4"),
        *("--strengths", "8", "--folds", "2"),
    ),
    "compare": ("iris", *SMALL),
    "compare regression": ("diabetes", *SMALL),
    "diagnose": PROGRAM,
    "cure": (*PROGRAM, "--seeds", "2", "--budget", "30s"),
}
PROGRAMS = {"diagnose", "cure"}
NUMBER = re.compile(r"(?<![\w.>])-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?(?![\w.]*\d)")
TIMES = re.compile(r"^\d+\.\d s[,;].*$|^(?:next|report): .*$", re.MULTILINE)
LITERAL = {"95%", "100%"}  # of an interval; of what a method may leave


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layers = "nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3))"
    (tmp_path / "net.py").write_text(f"from torch import nn\ndef make():\n    return {layers}\n")


def english(cell: object) -> str:
    cell = cell.label if isinstance(cell, Mark) else cell
    return cell.text("en") if isinstance(cell, Label) else str(cell)


def shown(page: Page) -> list[str]:
    """The sentences of a page, and the cells of all its tables."""
    tables = [b for s in page.sections for b in s.blocks if isinstance(b, PageTable)]
    cells = chain.from_iterable((*t.head, *chain.from_iterable(t.rows)) for t in tables)
    facts = chain.from_iterable((f.value, f.note or "") for f in page.facts)
    return [english(cell) for cell in (*page.sentences, *facts, *cells)]


def numbers(value: object) -> Iterator[float]:
    """Every number of a document, those in its texts and the lengths of its lists as well."""
    if isinstance(value, str):
        yield from (float(t.rstrip("%").replace(",", "")) for t in NUMBER.findall(value))
    elif isinstance(value, dict | list):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        yield len(value)
        for part in parts:
            yield from numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def is_rounded(token: str, known: list[float]) -> bool:
    """Whether some known number, or its share in percent, is printed so."""
    mantissa, _, power = token.rstrip("%").replace(",", "").partition("e")
    unit = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
    value = float(mantissa) * 10.0 ** int(power or 0)
    factor = 100 if token.endswith("%") else 1
    return any(abs(abs(one) * factor - abs(value)) <= 0.501 * unit for one in known)


def unheard(texts: str, known: list[float]) -> list[str]:
    return [t for t in NUMBER.findall(texts) if t not in LITERAL and not is_rounded(t, known)]


def plain(document: dict, *, of: str) -> dict:
    """What a second run of the same command gives again: all but times and places."""
    apart = {"output", "report", "seconds", "next", "test"}
    if of == "compare":
        apart |= {"methods", "plan", "bought"}
    return {key: value for key, value in document.items() if key not in apart}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_three_say_the_same(name, capsys):
    verb = name.split()[0]
    assert main([verb, *COMMANDS[name], "-q", "-o", "run"]) in (0, 3)
    terminal = TIMES.sub("", capsys.readouterr().out)
    page, run = build(read("run")), read("run")
    known = [*numbers(run.result), *numbers(run.config), *numbers(list(run.history))]
    if verb == "tune":  # which share of the chosen score that is stands beside it
        known.append(run.result["audit"]["noise"] / run.result["audit"]["chosen_score"])
    if verb in PROGRAMS:  # their terminal has a table of layers where the page has charts
        assert unheard(" ".join(shown(page)), [*known, *numbers(terminal)]) == []
        return
    texts = " ".join(shown(page))
    on_page = {token.lstrip("-") for token in NUMBER.findall(texts)}
    said = [token for token in NUMBER.findall(terminal) if token not in LITERAL]
    assert len(said) > 10
    assert [token for token in said if token.lstrip("-") not in on_page] == []
    assert unheard(terminal, known) == []
    if name != verb:
        return
    assert main([verb, *COMMANDS[name], "-q", "--json", "-o", "again"]) == 0
    document = json.loads(capsys.readouterr().out)
    kept = json.loads(json.dumps(plain(run.result, of=verb)))
    again = plain(document, of=verb)
    assert {key: kept.get(key) for key in again} == again and len(again) > 5
