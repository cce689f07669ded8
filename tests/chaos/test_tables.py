"""Random tables of all kinds of cells: read to finite inputs, row by row, or refused by name."""

from __future__ import annotations

import csv
import io
import random
import warnings

import pytest
import torch
from tally import Tally, count, rng

from tikhon.data import load, split
from tikhon.data.encoding import encode_columns
from tikhon.data.reading import read_table
from tikhon.data.table import TableOptions
from tikhon.errors import InputError

CELLS = {
    "whole": lambda d: str(d.randint(-9, 99)),
    "number": lambda d: f"{d.gauss(0, 10 ** d.randint(-3, 9)):.{d.randint(0, 6)}g}",
    "huge": lambda d: d.choice(("1e300", "-1e308", "1e-320", f"{10**30 + d.randint(0, 9)}", "7")),
    "comma": lambda d: f"{d.randint(0, 9999)},{d.randint(0, 99):02}",
    "money": lambda d: d.choice(("$", "€", "")) + f"{d.uniform(0, 1e4):,.2f}",
    "percent": lambda d: f"{d.uniform(0, 100):.1f}%",
    "date": lambda d: f"{d.randint(1950, 2050)}-{d.randint(1, 12):02}-{d.randint(1, 28):02}",
    "day first": lambda d: f"{d.randint(1, 28)}/{d.randint(1, 12)}/{d.randint(1990, 2030)}",
    "sentinel": lambda d: d.choice(("9999-12-31", "0001-01-01", "2020-02-02")),
    "time": lambda d: f"{d.randint(0, 23)}:{d.randint(0, 59):02}",
    "truth": lambda d: d.choice(("yes", "no", "Yes", "NO ")),
    "class": lambda d: d.choice(("a", "b", "a ", "c'", '"q"', "é", "=1+1", "")),
    "text": lambda d: " ".join(d.choices(("red", "big\nline", "x,y", "漢字", "\u200f", "'"), k=3)),
    "code": lambda d: f"{d.randint(0, 99999):05}",
    "missing": lambda d: d.choice(("", "NA", "null", "-", "?", " ", "nan")),
    "infinite": lambda d: d.choice(("inf", "-inf", "1e400", "1")),
    "constant": lambda d: "5",
    "unit": lambda d: f"{d.randint(1, 99)} {d.choice(('kg', 'kg', 'g'))}",
    "below": lambda d: d.choice(("<0.5", ">100", "3", "12")),
}
HOSTILE = ("huge", "comma", "day first", "code", "infinite", "constant", "unit", "missing")
NAMES = ("a", "b ", "d days", "d", "a missing", "x=1", "<b>", "", "年", "y", "é", "a" * 300)


def table(draw: random.Random) -> tuple[str, str]:
    """The text of a random table, and the column to predict."""
    tame = draw.random() < 0.6
    kinds = [k for k in CELLS if not tame or k not in HOSTILE]
    columns = [draw.choice(kinds) for _ in range(draw.randint(2, 6))]
    names = draw.sample(NAMES, len(columns))
    if tame:
        columns[0] = draw.choice(("number", "truth", "whole"))
    elif draw.random() < 0.1:
        names[0] = names[-1]
    rows = []
    for _ in range(draw.choice((20, 40, 80) if tame else (1, 2, 5, 20))):
        rows.append([CELLS[kind](draw) for kind in columns])
        if not tame and draw.random() < 0.05:
            rows[-1][0] = CELLS[draw.choice(kinds)](draw)
        if not tame and draw.random() < 0.005:
            rows[-1].append("more")
    out = io.StringIO()
    style = {"delimiter": draw.choice(",,,;\t|"), "lineterminator": draw.choice(("\n", "\r\n"))}
    csv.writer(out, **style).writerows([names, *rows])
    text = out.getvalue()
    if not tame and draw.random() < 0.1:
        text = text[: draw.randrange(len(text))]
    return text, names[0] if tame else draw.choice(names)


@pytest.mark.timeout(36_000)
def test_random_tables(tmp_path):
    draw, tally, path = rng("tables"), Tally("random tables"), tmp_path / "table.csv"
    for number in range(count(60, 2_000)):
        text, target = table(draw)
        path.write_bytes(text.encode())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tally.add(outcome_of(path, target), repr(text[:300]))
            except InputError as error:
                said = str(error)
                tally.add("noticed" if len(said) < 2_000 else f"a long message: {said[:200]}")
            except Exception as error:
                tally.add(f"{type(error).__name__}: {error}", f"{number}: {text[:300]!r}")
    assert tally.survived > tally.tried / 10  # not all of them are hopeless
    tally.close()


def outcome_of(path, target: str) -> str:
    """Read, split and read again as `predict` does."""
    source = load(str(path), table=TableOptions(target))
    parts = split(source, valid=0.2, test=0.2, seed=0)
    for part in (parts.train, parts.valid, parts.test):
        if not torch.isfinite(part.x).all():
            return "inputs that are not finite"
    fitted = parts.preprocessing
    assert fitted is not None
    rows = read_table(path)
    again = torch.from_numpy(fitted.apply(encode_columns(rows, fitted.columns)))
    if len(again) != len(rows.frame) or not torch.isfinite(again).all():
        return "another number of rows, or not finite, for predict"
    return "survived"
