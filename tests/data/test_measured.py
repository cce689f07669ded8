"""Coordinates, durations, weeks, zones and days of spreadsheets: read as what they are, then and
for new rows, or asked for.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest

from tikhon.data import load, split
from tikhon.data.dataset import Dataset
from tikhon.data.encoding import encode_columns
from tikhon.data.reading import read_table
from tikhon.data.table import TableOptions
from tikhon.errors import DataError

ROWS = 60
rng = np.random.default_rng(0)
DAYS = [date(2023, 1, 5) + timedelta(days=11 * i) for i in range(ROWS)]
HOURS = rng.integers(0, 9, ROWS)
MINUTES = rng.integers(1, 60, ROWS)
FRACTION = [timedelta(hours=int(h), minutes=int(m)) / timedelta(days=1)
            for h, m in zip(HOURS, MINUTES, strict=True)]  # fmt: skip
EPOCH = date(1970, 1, 1)
SINCE = [float((day - EPOCH).days) for day in DAYS]
BERLIN = [datetime(d.year, d.month, d.day, 12, 30, tzinfo=ZoneInfo("Europe/Berlin")) for d in DAYS]
IN_UTC = [(m - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(days=1) for m in BERLIN]
SECONDS = rng.integers(-200_000, 200_000, ROWS)  # of arc


def angle(form: str, second: int) -> str:
    degrees, rest = divmod(abs(int(second)), 3600)
    minutes, seconds = divmod(rest, 60)
    side = "N" if second >= 0 else "S"
    return form.format(d=degrees, m=minutes, s=seconds, f=minutes + seconds / 60, side=side)


def serial(day: date) -> str:
    return str((day - date(1899, 12, 30)).days)


def angles(form: str) -> list[str]:
    return [angle(form, second) for second in SECONDS]


ARC = [second / 3600 for second in SECONDS]
READ: dict[str, tuple[Sequence[str], Sequence[float]]] = {
    "degrees, minutes, seconds": (angles("{d}°{m:02d}'{s:02d}\"{side}"), ARC),
    "with spaces and primes": (angles("{side} {d}° {m}\u2032 {s}\u2033"), ARC),
    "decimal minutes": (angles("{d}°{f:.9f}'{side}"), ARC),
    "hours and minutes": ([f"{h}h {m}m" for h, m in zip(HOURS, MINUTES, strict=True)], FRACTION),
    "without the hour": (
        [f"{h} h {m} min" if h else f"{m} min" for h, m in zip(HOURS, MINUTES, strict=True)],
        FRACTION,
    ),
    "in words": (
        [f"{h} hours and {m} minutes" for h, m in zip(HOURS, MINUTES, strict=True)],
        FRACTION,
    ),
    "ISO 8601 durations": ([f"PT{h}H{m}M" for h, m in zip(HOURS, MINUTES, strict=True)], FRACTION),
    "weeks": (
        [day.strftime("%G-W%V") for day in DAYS],
        [float((day - timedelta(days=day.weekday()) - EPOCH).days) for day in DAYS],
    ),
    "a zone by its place": ([f"{d.isoformat()} 12:30 Europe/Berlin" for d in DAYS], IN_UTC),
    "offset and place": ([f"{m.isoformat()}[Europe/Berlin]" for m in BERLIN], IN_UTC),
    "days of a spreadsheet": ([d.isoformat() if i % 3 else serial(d) for i, d in enumerate(DAYS)],
                              SINCE),
    "mostly days of a spreadsheet": (
        [d.strftime("%d.%m.%Y") if i % 9 == 0 else serial(d) for i, d in enumerate(DAYS)],
        SINCE,
    ),
    "ordinals": ([f"{m}th" if m % 10 not in (1, 2, 3) or 10 < m < 20 else
                  f"{m}{('st', 'nd', 'rd')[m % 10 - 1]}" for m in MINUTES], MINUTES.tolist()),
}  # fmt: skip


def table(folder: Path, cells: Sequence[str]) -> Dataset:
    frame = pd.DataFrame({"a": cells, "b": rng.normal(size=ROWS), "y": ["yes", "no"] * 30})
    frame.to_csv(folder / "t.csv", index=False)
    return load(str(folder / "t.csv"), table=TableOptions("y"))


@pytest.mark.parametrize("name", READ)
def test_cells_are_read_as_what_they_are_measured_in(name: str, tmp_path: Path):
    cells, values = READ[name]
    data = table(tmp_path, cells)
    np.testing.assert_allclose(data.x[:, 0].numpy(), values, rtol=1e-6, atol=1e-5)
    fitted = split(data).preprocessing
    assert fitted is not None
    (tmp_path / "new.csv").write_text("a,b\n" + "".join(f'"{c}",0\n' for c in
                                      (c.replace('"', '""') for c in [cells[0]] * 2)))  # fmt: skip
    again = encode_columns(read_table(tmp_path / "new.csv"), fitted.columns)
    np.testing.assert_allclose(again[:, 0], [values[0]] * 2, rtol=1e-6, atol=1e-5)


SAID: dict[str, str] = {
    "days of a spreadsheet": "day of a spreadsheet",
    "hours and minutes": "durations, in days",
    "decimal minutes": "in °",
}


@pytest.mark.parametrize("name", SAID)
def test_the_reading_is_said(name: str, tmp_path: Path):
    assert SAID[name] in " ".join(table(tmp_path, READ[name][0]).notices)


KEPT: dict[str, Callable[[int], str]] = {
    "metres and kilometres": lambda i: f"{i + 1} {'km' if i % 2 else 'm'}",
    "shares and percent": lambda i: f"{i + 1}%" if i % 2 else f"0.{i + 10}",
    "numbers far from all dates": lambda i: DAYS[i].isoformat() if i % 3 else f"{90_000 + i}",
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_not_certain_is_asked_for(name: str, tmp_path: Path):
    with pytest.raises(DataError, match="--categorical=a"):
        table(tmp_path, [KEPT[name](i) for i in range(ROWS)])


def test_suggested_options_are_those_of_a_shell(tmp_path: Path):
    """A name with a space is one word, as the shell splits the line."""
    path = tmp_path / "t.csv"
    cells = [*range(59), "not yet"]
    path.write_text(
        "floor area,y\n" + "".join(f"{cell},{i % 2}\n" for i, cell in enumerate(cells))
    )
    with pytest.raises(DataError) as caught:
        load(str(path), table=TableOptions("y"))
    words = shlex.split(str(caught.value))
    assert {"--na-values=not yet", "--categorical=floor area"} <= set(words)


def test_numbers_of_one_unit_stay_numbers(tmp_path: Path):
    assert table(tmp_path, [f"{m} min" for m in MINUTES]).x[:, 0].tolist() == list(MINUTES)


def test_lists_of_digits_are_no_constant(tmp_path: Path):
    """Words of one letter are no words to be hashed: such cells are hashed by letters."""
    data = table(tmp_path, [f"[{h}, {m % 10}]" for h, m in zip(HOURS, MINUTES, strict=True)])
    assert data.table is not None and [c.name for c in data.table.columns] == ["a", "b"]


def test_a_row_of_units_is_asked_about(tmp_path: Path):
    with pytest.raises(DataError, match="remove line 2 if it is a row of units"):
        table(tmp_path, ["[kg]", *map(str, MINUTES[1:])])


def test_text_in_two_encodings_is_told_of(tmp_path: Path):
    names = ["Müller", "Müller".encode().decode("cp1252"), "Bär"] * 20
    [told] = [n for n in table(tmp_path, names).notices if n.key == "notice_garbled"]
    assert "'MÃ¼ller', which should be 'Müller'" in told
    assert not [
        n for n in table(tmp_path, ["Müller", "Bär"] * 30).notices if n.key == "notice_garbled"
    ]
