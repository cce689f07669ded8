"""Files as people have them, each with the right reading of every cell, written down by hand.

`python tests/data/corpus.py FOLDER` writes them all, and beside them `classification.csv` and
`regression.csv`, two larger tables of the same kinds of cells.
"""

from __future__ import annotations

import gzip
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Flag:
    """A cell that is a word or a bound, with the number beside it if there is one."""

    word: str
    value: float | None = None


@dataclass(frozen=True)
class Text:
    """A cell of free text."""

    text: str


@dataclass(frozen=True)
class Case:
    """One file: what it holds and how it is to be read, or the error it is to give."""

    name: str
    content: bytes
    columns: dict[str, list[Any]] = field(default_factory=dict)
    target: list[Any] | None = None  # None: not judged
    options: dict[str, Any] = field(default_factory=dict)  # of the format
    dropped: dict[str, str] = field(default_factory=dict)  # column -> part of the reason
    error: str = ""
    said: str = ""  # part of a notice


def quoted(cell: str, separator: str = ",") -> str:
    needs = separator in cell or '"' in cell or "\n" in cell
    return '"' + cell.replace('"', '""') + '"' if needs else cell


def written(columns: dict[str, Sequence[str]], separator: str = ",") -> str:
    lines = [separator.join(columns)]
    for row in zip(*columns.values(), strict=True):
        lines.append(separator.join(quoted(cell, separator) for cell in row))
    return "\n".join(lines) + "\n"


def labels(count: int) -> list[str]:
    return [("p", "n", "n")[i % 3] for i in range(count)]


def column(
    name: str, cells: str | Sequence[str], right: Sequence[Any] | None = None, **more: Any
) -> Case:
    """A file with one column `a` and labels; cells may be given separated by ` | `."""
    cells = cells.split(" | ") if isinstance(cells, str) else list(cells)
    text = written({"a": cells, "y": labels(len(cells))})
    columns = {} if right is None else {"a": list(right)}
    return Case(f"{name}.csv", text.encode(), columns, **more)


def pair(name: str, first: str, second: str, right: tuple[list, list], **more: Any) -> Case:
    """A file with columns `a` and `b`, where one decides for the other."""
    a, b = first.split(" | "), second.split(" | ")
    text = written({"a": a, "b": b, "y": labels(len(a))}, more.pop("separator", ","))
    return Case(f"{name}.csv", text.encode(), {"a": right[0], "b": right[1]}, **more)


def target(name: str, cells: str, right: Sequence[Any] | None, **more: Any) -> Case:
    """A file whose target has these cells."""
    values = cells.split(" | ")
    text = written({"a": [str(i % 5) for i in range(len(values))], "y": values})
    return Case(f"{name}.csv", text.encode(), {}, None if right is None else list(right), **more)


M, NB, THIN = "\u2212", "\u00a0", "\u2009"
NUMBERS = [
    column("plain", "1 | -2.5 | 1e-3 | +4 | .5 | 6.", [1, -2.5, 1e-3, 4, 0.5, 6]),
    column("european", "1.234,50 | 0,5 | 12 | 7,25", [1234.5, 0.5, 12, 7.25],
           said="decimal comma"),
    column("american", "1,234.50 | 0.5 | 12 | 7,250", [1234.5, 0.5, 12, 7250]),
    column("german_thousands", "1.036 | 2.500 | 0,5 | 12", [1036, 2500, 0.5, 12]),
    column("point_by_zero", "1.036 | 2.500 | 0.512 | 12", [1.036, 2.5, 0.512, 12]),
    column("comma_by_zero", "1,036 | 2,500 | 0,512 | 12", [1.036, 2.5, 0.512, 12]),
    column("ambiguous_point", "1.036 | 2.500 | 3.125 | 12",
           error=r"'1.036' in line 2 can be 1.036 or 1036, .*--decimal \. or --decimal ,"),
    column("ambiguous_comma", "1,036 | 2,500 | 3,125 | 12", error=r"1036 or 1.036"),
    column("ambiguous_told_point", "1.036 | 2.500 | 3.125", [1.036, 2.5, 3.125],
           options={"decimal": "."}),
    column("ambiguous_told_comma", "1.036 | 2.500 | 3.125", [1036, 2500, 3125],
           options={"decimal": ","}),
    column("groups_of_three", "1,036,000 | 2,500 | 12", [1036000, 2500, 12]),
    column("groups_european", "1.036.000 | 2.500 | 12", [1036000, 2500, 12]),
    column("indian", "12,34,567 | 1,00,000.5 | 99", [1234567, 100000.5, 99]),
    column("swiss", "1'036.50 | 12 | 2\u2019000", [1036.5, 12, 2000]),
    column("spaces", f"1 036 | 2{NB}500 | 3{THIN}125,5 | 4\u202f000", [1036, 2500, 3125.5, 4000]),
    column("both_marks", "1.5 | 2,5 | 1.234,5 | 1,234.5", [1.5, 2.5, 1234.5, 1234.5],
           said="each cell by its own decimal mark"),
    column("both_marks_and_doubt", "1.5 | 2,5 | 1.036 | 4", error=r"'1.036' in line 4 can be"),
    pair("other_column_decides", "1.036 | 2.500 | 3.125", "0,5 | 1,25 | 2,5",
         ([1036, 2500, 3125], [0.5, 1.25, 2.5])),
    pair("other_column_decides_point", "1,036 | 2,500 | 3,125", "0.5 | 1.25 | 2.5",
         ([1036, 2500, 3125], [0.5, 1.25, 2.5])),
    pair("whole_with_unit", "3 years | 12 years | 5 years", "0,5 | 1,25 | 2,5",
         ([3, 12, 5], [0.5, 1.25, 2.5]), said="'a': in years; 'b': decimal comma"),
    pair("semicolons", "1,5 | 2,25 | 3,75", "7 | 8 | 9", ([1.5, 2.25, 3.75], [7, 8, 9]),
         separator=";", said="separated by ';'"),
    column("minus_sign", f"{M}5 | {M}0.25 | 3 | \u20131", [-5, -0.25, 3, -1]),
    column("accounting", "(12.50) | 3 | ($1,000.25) | 12.75-", [-12.5, 3, -1000.25, -12.75]),
    column("thousands_of_dollars", "$1,036 | $2,500 | $980", [1036, 2500, 980], said="in $"),
    column("thousands_of_rupees", "₹1,036 | ₹2,500", [1036, 2500], said="in ₹"),
    column("ambiguous_euros", "€1,036 | €2,500", error="1036 or 1.036"),
    column("dollars", "$12.30 | $1,036.10 | $0.5 | -$4", [12.3, 1036.1, 0.5, -4], said="in $"),
    column("euros", "12,30 \u20ac | 1.036,10 \u20ac | 0,5 \u20ac", [12.3, 1036.1, 0.5]),
    column("some_with_currency", "$12.30 | 4 | $5", [12.3, 4, 5]),
    column("percent", "3.2% | 10 % | 0.5% | 0", [3.2, 10, 0.5, 0], said="in %"),
    column("unit", "5 kg | 7.5 kg | 10kg", [5, 7.5, 10], said="in kg"),
    column("two_units", " | ".join(f"{i}.5 {'kg' if i % 2 else 'lb'}" for i in range(24)),
           error="several units"),
    column("multiples", "1.2k | 3M | 900 | 15k", [1200, 3e6, 900, 15000]),
    column("limits", "<0.5 | 0.75 | >100 | 2 | \u22640.5",
           [Flag("<", 0.5), 0.75, Flag(">", 100), 2, Flag("<", 0.5)], said="limits (< >)"),
    column("top_coded", "12 | 65+ | 40 | 65+", [12, Flag(">", 65), 40, Flag(">", 65)]),
    column("words", "1.5 | low | 2.5 | high | 4 | low | 8 | high | 9 | 10",
           [1.5, Flag("low"), 2.5, Flag("high"), 4, Flag("low"), 8, Flag("high"), 9, 10]),
    column("odd_text", "1 | 2 | 3 | x7 | 5 | 6.5", error=r"'x7' in line 5.*--na-values=x7"),
    column("odd_long_text", f"1 | 2 | 3 | {'x' * 50} | 5 | 6.5",
           error=f"'{'x' * 40}' in line 5; correct it, or say --categorical=a to read"),
    column("odd_text_told", "1 | 2 | 3 | x7 | 5 | 6.5", [1, 2, 3, None, 5, 6.5],
           options={"missing": ("x7",)}),
    column("no_values", "1 | NA | 2.5 | NaN | #N/A | ? | - | n/a | 4",
           [1, None, 2.5, None, None, None, None, None, 4], said="as no value"),
    column("blank_cells", ["1", " ", "2", "\t", "3"], [1, None, 2, None, 3]),
    column("wide_digits", "\uff11\uff12 | \uff13.\uff15 | 4", [12, 3.5, 4]),
    column("exponents", "1E+05 | 2.5e-3 | 1e2", [1e5, 2.5e-3, 100]),
    column("exponents_of_fortran", "1.5D+02 | -2.5D-03 | 0.1D+01", [150, -2.5e-3, 1]),
    column("powers_of_ten", "1.5x10^3 | 2 \u00d7 10^-2 | 7", [1500, 0.02, 7]),
    column("spreads", "5.29\u00b10.1 | 6.5 +/- 0.2 | 7.25 | 8\u00b11",
           [Flag("~", 5.29), Flag("~", 6.5), 7.25, Flag("~", 8)], said="limits (~)"),
    column("single_quotes", "'5.29' | '-6.5' | '7'", [5.29, -6.5, 7]),
    column("texts_of_a_spreadsheet", '="5.29" | ="-6.5" | ="7"', [5.29, -6.5, 7]),
    column("texts_by_apostrophe", "'5.29 | '-6.5 | 7", [5.29, -6.5, 7]),
    column("codes_of_a_spreadsheet", '="007" | ="012" | ="007"', ["007", "012", "007"]),
    column("arabic_digits", "\u0665.\u0662\u0669 | -\u0666.\u0665 | \u0667", [5.29, -6.5, 7]),
    column("arabic_mark", "\u0665\u066b\u0662 | \u0666\u066b\u0665 | \u0667", [5.2, 6.5, 7]),
    column("hindi_digits", "\u096b.\u0968 | \u096c.\u096b | \u096d", [5.2, 6.5, 7]),
    column("infinite", "1 | 2 | inf", error="1 infinite value"),
    column("overflow", "1 | 2 | 1e400", error="1 infinite value"),
    column("leading_zeros", "00123 | 00456 | 10101", ["00123", "00456", "10101"]),
    column("huge_and_alike", [str(10**30 + i) for i in range(6)],
           error="no column is left to learn from"),
    column("large_and_near", [str(10**15 + i) for i in range(6)], [10**15 + i for i in range(6)]),
    column("versions", "1.2.3 | 1.2.4 | 1.2.3 | 1.2.4", ["1.2.3", "1.2.4", "1.2.3", "1.2.4"]),
    column("rupees", "Rs. 500 | Rs 750.5 | Rs. 1,200", [500, 750.5, 1200], said="in Rs"),
    column("crowns", "500 kr | kr 750 | 12,5 kr", [500, 750, 12.5], said="in kr"),
    column("out_of_five", "4.1/5 | 3.8 /5 | NEW | 4.4/5 | NEW | -",
           [4.1, 3.8, Flag("NEW"), 4.4, Flag("NEW"), None], said="in /5"),
    column("long_units", "5 minutes | 7.5 minutes | 90 minutes", [5, 7.5, 90], said="in minutes"),
    column("one_and_many", "1 year | 3 years | 10 Years", [1, 3, 10], said="in year"),
    column("capitals_of_units", "5 kg | 7.5 KG | 10 Kg", [5, 7.5, 10], said="in kg"),
    column("powers_of_units", "5 mW | 7 MW | 5 mW", ["5 mW", "7 MW", "5 mW"]),
    column("multiples_in_words", "2.5 million | 300 thousand | 1 Billion", [2.5e6, 3e5, 1e9]),
    column("lakhs", "42 Lac | 1.40 Cr | 5 lakh", [4.2e6, 1.4e7, 5e5]),
    column("multiples_and_a_unit", "19M | 201k | 1.0G | 3M", ["19M", "201k", "1.0G", "3M"]),
    column("streets", [f"{i} {chr(97 + i)}xstreet" for i in range(24)],
           [Text(f"{i} {chr(97 + i)}xstreet") for i in range(24)]),
    column("no_values_of_databases", "1 | \\N | 2.5 | (null) | NaT | n.d. | \u2014 | \u2013 | 4",
           [1, None, 2.5, None, None, None, None, None, 4]),
    *(column(f"no_value_of_pandas_{i}", f"1 | {text} | 2.5 | 4 | 5", [1, None, 2.5, 4, 5])
      for i, text in enumerate(sorted(pd._libs.parsers.STR_NA_VALUES - {""}))),
    column("marks", "3.5* | 2.25 | 1.75*** | 4 | 0.5\u2020",
           [Flag("*", 3.5), 2.25, Flag("*", 1.75), 4, Flag("*", 0.5)], said="marks (*)"),
    column("limits_in_words", "under 5 | 7.5 | more than 100 | about 3 | ca. 2.5",
           [Flag("<", 5), 7.5, Flag(">", 100), Flag("~", 3), Flag("~", 2.5)]),
    column("double_quotes", '"5.29" | "-6.5" | "7"', [5.29, -6.5, 7]),
    column("inches", '24.5" | 32" | 27.75\u2033', [24.5, 32, 27.75], said='in "'),
    column("degrees", "12.5\u00b0 | -3\u00b0 | 0.25 \u00b0", [12.5, -3, 0.25]),
    column("raised_powers", "1.5\u00d710\u00b3 | 2\u00d710\u207b\u00b2 | 7", [1500, 0.02, 7]),
    column("raised_marks", "1.5\u00b9 | 2.5\u00b2 | 1.5\u00b9",
           ["1.5\u00b9", "2.5\u00b2", "1.5\u00b9"]),
    column("pressures", [f"{100 + i}/{60 + i}" for i in range(30)],
           [Text(f"{100 + i}/{60 + i}") for i in range(30)], said="free text"),
    column("numbers_in_words", [f"age: {i}" for i in range(30)],
           [Text(f"age: {i}") for i in range(30)], said="such as 'age: 0'"),
    column("fractions_of_anything", [f"{i}.5%vol" for i in range(30)],
           [Text(f"{i}.5%vol") for i in range(30)], said="free text"),
    pair("telephones", " | ".join(f"555-{1000 + i}" for i in range(30)),
         " | ".join(f"{i}.5" for i in range(30)), ([], [i + 0.5 for i in range(30)]),
         dropped={"a": "an identifier"}),
    column("sizes", "10A | 12B | 10A | 7C", ["10A", "12B", "10A", "7C"]),
    column("feet", "5'11\" | 6'0\" | 6\u2032 | 5 ft 3 in | 5' 6\"",
           [5 + 11 / 12, 6, 6, 5.25, 5.5], said="in ft"),
    column("thousands_by_apostrophe", "5'110 | 12 | 6'000", [5110, 12, 6000]),
    column("halves", "9 1/2 | 10 | 8\u00bd | 10 3/4", [9.5, 10, 8.5, 10.75]),
    column("halves_of_an_inch", '9 1/2" | 10" | 8\u00bd"', [9.5, 10, 8.5]),
    column("millions_of_euros", "3,5 Mio. \u20ac | 2 Mio \u20ac | 1,25 Mrd. \u20ac",
           [3.5e6, 2e6, 1.25e9], said="in \u20ac, 'Mio', 'Mrd' multiplied out"),
    column("millions_of_dollars", "3.5 million USD | 2 million USD | USD 1.25 billion",
           [3.5e6, 2e6, 1.25e9]),
    column("milli_of_money", "3 m$ | 5 m$ | 3 m$", ["3 m$", "5 m$", "3 m$"]),
    column("multiples_are_said", "1.2k | 3M | 900.5", [1200, 3e6, 900.5],
           said="'M', 'k' multiplied out"),
    column("multiples_of_china", "1.2\u4e07 | 3\u4ebf | 900.5", [12000, 3e8, 900.5]),
    column("ranges_of_numbers", "<10k | 10k-20k | >20k | 10k-20k | <10k",
           ["<10k", "10k-20k", ">20k", "10k-20k", "<10k"]),
    column("units_with_blanks", "4.4 mg / dL | 8.0 mg/dL | 3.6 mg / dL", [4.4, 8, 3.6],
           said="in mg / dL"),
    column("units_of_two_words", "1,388 sq ft | 595 sq. ft. | 2,060.5 sq ft", [1388, 595, 2060.5],
           said="in sq ft"),
    column("units_of_ages", "15 years old | 8 years old | 99 Years old", [15, 8, 99]),
    column("counts_of_blood", "8.6 x10^9/L | 5.75 x10^9/L | 11 x10^9/L", [8.6e9, 5.75e9, 11e9],
           said="in /L"),
    column("wages", "$10/hr | $32.50/hr | $83 /hr", [10, 32.5, 83], said="in $/hr"),
    column("rents", "€ 879 per month | € 711,50 per month", [879, 711.5], said="in € per month"),
    column("or_more", "0 | 3 or more | 1 | 2 | 3 or more", [0, Flag(">", 3), 1, 2, Flag(">", 3)]),
    column("and_older", "75 years and older | 12 years | 5 years or less",
           [Flag(">", 75), 12, Flag("<", 5)]),
    column("employment", "10+ years | 8 years | < 1 year | 2 years",
           [Flag(">", 10), 8, Flag("<", 1), 2], said="in years"),
    column("ends_of_a_scale", "1 (low) | 2 | 3 | 4 | 5 (high)",
           [Flag("*", 1), 2, 3, 4, Flag("*", 5)]),
    column("footnotes_in_brackets", "51,494[7] | 6,306[a] | 68,013 | 10.5 [12]",
           [Flag("*", 51494), Flag("*", 6306), 68013, Flag("*", 10.5)]),
    column("zero_in_accounts", "$ 3,701.00 | $ - | $ 12.50 | $-", [3701, 0, 12.5, 0]),
    column("prices_without_cents", "955,- € | 90,50 € | 1.648,- €", [955, 90.5, 1648]),
    column("prices_of_india", "Rs. 282/- | Rs. 3126/-", [282, 3126], said="in Rs"),
    column("prices_of_switzerland", "Fr. 241.\u2013 | Fr. 66.50", [241, 66.5]),
    column("percent_and_none", " | ".join(f"{i}%" if i % 2 else f"0.{i:02}" for i in range(24)),
           error="several units"),
    column("several_currencies", " | ".join(["unknown"] * 2 + [f"{'$€'[i % 2]}{i}.5" for i in
           range(24)]), error="several units"),
    column("few_prices_in_two_units", "$1 | €2 | $3 | €2", ["$1", "€2", "$3", "€2"],
           said="not as the numbers in cells such as '$1'"),
    column("pressures_of_few", [f"1{i % 5}0/{7 + i % 3}0" for i in range(30)],
           [f"1{i % 5}0/{7 + i % 3}0" for i in range(30)], said="such as '100/70'"),
    column("ranges_of_years", [f"{5 * i}-{5 * i + 4}" for i in range(24)],
           [Text(f"{5 * i}-{5 * i + 4}") for i in range(24)], said="such as '0-4'"),
    column("ranges_made_dates", "1-2 | 5-Mar | 6-9 | 10-19 | 2-Jan",
           ["1-2", "5-Mar", "6-9", "10-19", "2-Jan"], said="'2-Jan', '5-Mar' of 'a' may be what"),
    column("no_value_by_minus_one", [str(i) if i % 9 else "-1" for i in range(60)],
           [i if i % 9 else -1 for i in range(60)], said="'a' is -1 in 7 rows"),
    column("no_value_of_well_logs", [f"{i}.5" if i % 9 else "-999.25" for i in range(60)],
           [i + 0.5 if i % 9 else -999.25 for i in range(60)], said="'a' is -999.25 in 7 rows"),
    column("cells_merged", ["North", "", "", "South", "", "", "East", "", ""],
           ["North", None, None, "South", None, None, "East", None, None],
           said="as merged cells leave it"),
    pair("telephones_with_blanks", " | ".join(f"(555) 123-{1000 + i}" for i in range(30)),
         " | ".join(f"{i}.5" for i in range(30)), ([], [i + 0.5 for i in range(30)]),
         dropped={"a": "an identifier"}),
]  # fmt: skip


def d(text: str) -> datetime:
    return datetime.fromisoformat(text)


DATES = [
    column("iso", "2021-03-04 | 2021-12-31 | 2020-02-29", [d("2021-03-04"), d("2021-12-31"),
           d("2020-02-29")]),
    column("iso_clock", "2021-03-04T10:30:00Z | 2021-03-04 12:00 | 2021-03-04T12:00:00+02:00",
           [d("2021-03-04T10:30"), d("2021-03-04T12:00"), d("2021-03-04T10:00")]),
    column("day_first", "03/04/2021 | 13/04/2021 | 05/06/2021",
           [d("2021-04-03"), d("2021-04-13"), d("2021-06-05")], said="day before month"),
    column("month_first", "03/04/2021 | 04/13/2021 | 05/06/2021",
           [d("2021-03-04"), d("2021-04-13"), d("2021-05-06")], said="month before day"),
    column("years_first", "21/03/04 | 99/12/31 | 02/05/30",
           [d("2021-03-04"), d("1999-12-31"), d("2002-05-30")], said="years 00 to 68"),
    column("years_first_or_last", "21/03/04 | 22/12/31 | 21/05/30",
           error=r"'21/03/04' in line 2 can be 2021-03-04 or 2004-03-21.*--dates ymd"),
    column("ambiguous_date", "03/04/2021 | 05/06/2021 | 07/08/2021",
           error=r"'03/04/2021' in line 2 can be 2021-04-03 or 2021-03-04.*--dates dmy"),
    column("ambiguous_date_told", "03/04/2021 | 05/06/2021", [d("2021-04-03"), d("2021-06-05")],
           options={"dates": "dmy"}),
    column("date_format_told", "03-04-21 10h | 05-06-21 11h",
           [d("2021-04-03T10:00"), d("2021-06-05T11:00")], options={"dates": "%d-%m-%y %Hh"}),
    column("both_orders", "13/04/2021 | 04/14/2021 | 01/02/2021", error="several orders of day"),
    column("dots", "04.03.2021 | 05.06.2021 | 1.2.2021",
           [d("2021-03-04"), d("2021-06-05"), d("2021-02-01")]),
    column("short_years", "31/12/99 | 15/01/05 | 02/03/21",
           [d("1999-12-31"), d("2005-01-15"), d("2021-03-02")], said="69 to 99 as 19xx"),
    column("century_after_a_month", "09-Mar-69 | 15-Jan-45 | 24-Dec-31",
           error="of either century; .* say --dates dmy to"),
    column("doubtful_century", "31/12/45 | 15/01/05 | 02/03/21",
           error="of either century; .* or --drop=a"),
    column("clock_of_twelve", "03/14/2021 2:30 PM | 03/15/2021 12:05 AM | 03/16/2021 12:00 pm",
           [d("2021-03-14T14:30"), d("2021-03-15T00:05"), d("2021-03-16T12:00")]),
    column("zones", "13/04/2021 12:00+02:00 | 14/04/2021 12:00Z | 15/04/2021 1:00 -0530",
           [d("2021-04-13T10:00"), d("2021-04-14T12:00"), d("2021-04-15T06:30")]),
    column("month_names", "3 Mar 2021 | 14 April 2021 | Mar 5, 2021 | 06-Mar-2021",
           [d("2021-03-03"), d("2021-04-14"), d("2021-03-05"), d("2021-03-06")]),
    column("months_of_europe", "3 M\u00e4rz 2021 | 14. Okt. 2021 | 1er ao\u00fbt 2021 | "
           "5 de enero de 2021 | 06-Dez-2021",
           [d("2021-03-03"), d("2021-10-14"), d("2021-08-01"), d("2021-01-05"), d("2021-12-06")]),
    column("month_of_two_names", "5 jui 2021 | 6 jui 2021 | 5 jui 2021",
           ["5 jui 2021", "6 jui 2021", "5 jui 2021"]),
    column("characters", "2021\u5e7403\u670804\u65e5 | 2021\u5e7412\u670831\u65e5 12:00 | "
           "2020\ub144 2\uc6d4 29\uc77c", [d("2021-03-04"), d("2021-12-31T12:00"),
           d("2020-02-29")]),
    column("no_end", "2021-03-04 | 9999-12-31 | 2021-03-06 | 0001-01-01",
           [d("2021-03-04"), Flag("9999-12-31"), d("2021-03-06"), Flag("0001-01-01")]),
    column("no_end_day_first", "13/04/2021 | 31/12/9999 | 15/04/2021 | 01/01/0001",
           [d("2021-04-13"), Flag("9999-12-31"), d("2021-04-15"), Flag("0001-01-01")]),
    column("dates_and_words", "2021-03-04 | never | 2021-03-06 | never | 2021-03-08",
           [d("2021-03-04"), Flag("never"), d("2021-03-06"), Flag("never"), d("2021-03-08")]),
    column("zero_dates", "2021-03-04 | 0000-00-00 | 2021-03-06", [d("2021-03-04"), None,
           d("2021-03-06")]),
    column("impossible_date", "2021-02-28 | 2021-02-30 | 2021-03-01 | 2021-03-02",
           error=r"'2021-02-30' in line 3"),
    column("days_as_numbers", " | ".join(f"202103{i:02}" for i in range(1, 13)),
           [d(f"2021-03-{i:02}") for i in range(1, 13)], said="days as 20210304"),
    column("numbers_like_days", " | ".join(f"202103{i:02}" for i in range(25, 37)),
           [20210300 + i for i in range(25, 37)]),
    column("ordinals",
           "3rd Mar 2021 | 4th of April 2021 | 1\u00ba de enero de 2021 | 22nd May 2021",
           [d("2021-03-03"), d("2021-04-04"), d("2021-01-01"), d("2021-05-22")]),
    column("hours", "9 AM | 12 pm | 12 a.m. | 11pm | 5 AM",
           [time(9), time(12), time(0), time(23), time(5)]),
    column("hours_of_france", "14h30 | 06h00 | 23h59", [time(14, 30), time(6), time(23, 59)]),
    column("times", "14:30 | 06:00 | 23:59", [time(14, 30), time(6), time(23, 59)]),
    column("times_of_twelve", "2:30 PM | 12:00 AM | 6:15 am", [time(14, 30), time(0),
           time(6, 15)]),
    column("months_named", "Mar 2021 | April 2021 | Dec-2020", [d("2021-03-01"), d("2021-04-01"),
           d("2020-12-01")]),
    column("months_numbered", "03/2021 | 4/2021 | 12/2020", [d("2021-03-01"), d("2021-04-01"),
           d("2020-12-01")]),
    column("quarters", "2021Q1 | Q2 2021 | 2020-Q4", [d("2021-01-01"), d("2021-04-01"),
           d("2020-10-01")]),
    column("weekday_first", "Mo, 04.03.2021 | Di., 05.03.2021 | Fri 12.03.2021",
           [d("2021-03-04"), d("2021-03-05"), d("2021-03-12")]),
    column("year_last", "Thu Mar  4 10:30:00 2021 | Fri Mar 05 10:30:00 +0000 2021",
           [d("2021-03-04T10:30"), d("2021-03-05T10:30")]),
    column("zones_by_name", "2021-03-04 10:30:00 EST | 2021-03-05 10:30 PDT | 2021-03-06 1:00 CET",
           [d("2021-03-04T15:30"), d("2021-03-05T17:30"), d("2021-03-06T00:00")]),
    column("at_an_hour", "2021-03-04 at 10:30 | 2021-03-05 at 11:30",
           [d("2021-03-04T10:30"), d("2021-03-05T11:30")]),
    column("no_blank", "Jan 5,2021 | Feb 6,2021", [d("2021-01-05"), d("2021-02-06")]),
    column("dates_of_pandas", "2021-03-04 | NaT | 2021-03-06", [d("2021-03-04"), None,
           d("2021-03-06")]),
    column("tenures", "2 yrs 3 mos | 8 mos | 1 yr 1 mo | 3 yrs",
           [2 * 365.25 + 3 * 30.4375, 8 * 30.4375, 365.25 + 30.4375, 3 * 365.25]),
    column("letters_of_both_cases", "M | f | m | F | M | f", ["M", "f", "m", "F", "M", "f"],
           said="'F', 'f'; 'M', 'm' of 'a' are kept apart, though"),
    column("ages_in_units", "2 years | 3 weeks | 1 month | 10 days",
           [730.5, 21, 30.4375, 10], said="a year as 365.25, a month as 30.44"),
    column("clocks_with_points", "18.00.00 | 06.30.00 | 23.59.59",
           [time(18), time(6, 30), 86399 / 86400]),
    column("races", "59:30 | 1:02:15 | 12:30", [time(0, 59, 30), time(1, 2, 15), time(0, 12, 30)],
           said="12:30 as minutes and seconds"),
    column("laps", "1:23.4 | 59:30.25 | 2:00", [83.4 / 86400, 3570.25 / 86400, 120 / 86400]),
    column("hours_beside_seconds", "19:30 | 1:02:15 | 12:30",
           [time(19, 30), time(1, 2, 15), time(12, 30)], said="12:30 as hours and minutes"),
    column("beyond_a_day", "75:30 | 28:15 | 1:00", [75.5 / 24, 28.25 / 24, 1 / 24],
           said="durations"),
    column("times_of_a_zone", [f"{i % 24:02}:{i:02}:00Z" for i in range(30)],
           [time(i % 24, i) for i in range(30)]),
    column("periods", [f"2021-01-{i:02} - 2021-02-{i:02}" for i in range(1, 25)],
           [Text(f"2021-01-{i:02} - 2021-02-{i:02}") for i in range(1, 25)], said="free text"),
    column("quarters_short", "Q1'21 | 2Q21 | Q4 20 | 3Q2019", [d("2021-01-01"), d("2021-04-01"),
           d("2020-10-01"), d("2019-07-01")]),
    column("codes_like_half_years", [f"H{i}" for i in range(110, 150)],
           error="no column is left .* 'a' .an identifier"),
    column("half_years", "H1 2021 | H2 2020", [d("2021-01-01"), d("2020-07-01")]),
    column("weeks", "Week 9, 2021 | KW 1/2020 | 2021-W09", [d("2021-03-01"), d("2019-12-30"),
           d("2021-03-01")]),
    column("dates_of_five_kinds", 
           "2021-03-04 | 14/04/2021 | 3 Mar 2021 | March 5, 2021 | 20210306",
           [d("2021-03-04"), d("2021-04-14"), d("2021-03-03"), d("2021-03-05"), d("2021-03-06")]),
    column("dates_of_logs", "04/Mar/2021:10:30:00 +0000 | 05MAR2021:11:30:00",
           [d("2021-03-04T10:30"), d("2021-03-05T11:30")]),
    column("dates_of_scripts", "Thu Mar 04 2021 10:30:00 GMT+0100 (Central European Time) | "
           "Fri Mar 05 2021 10:30:00 GMT+0100 (Central European Time)",
           [d("2021-03-04T09:30"), d("2021-03-05T09:30")]),
    column("dates_of_oracle", "23-OCT-21 10.30.45.5 AM | 24-OCT-21 01.30.00.0 PM",
           [d("2021-10-23T10:30:45.5"), d("2021-10-24T13:30:00")]),
    column("months", "2021-03 | 2021-04 | 2020-12", [d("2021-03-01"), d("2021-04-01"),
           d("2020-12-01")]),
]  # fmt: skip

TEXTS = [f"{who} bought {what} on a {when}" for who in ("Ann", "Bob", "Cy") for what in
         ("bread", "milk", "tea", "rice") for when in ("Monday", "Friday")]  # fmt: skip
WORDS = [
    column("truth", "TRUE | true | False | FALSE", [True, True, False, False]),
    column("truth_in_many_words", "Y | yes | 1 | TRUE | N | no | 0 | False",
           [True] * 4 + [False] * 4, said="'1', 'TRUE', 'Y', 'yes' as true"),
    column("spellings", "Pro | pro  | PRO | Basic | basic | Pro",
           ["Pro", "Pro", "Pro", "Basic", "Basic", "Pro"],
           said="'PRO', 'basic', 'pro' as another"),
    column("degrees_of_schools", "PhD | High school | Master | Bachelor", [5, 1, 4, 3],
           said="High school < Bachelor < Master < PhD"),
    column("truth_or_unknown", "Y | yes | N | no | unknown | Y", ["Y", "yes", "N", "no",
           "unknown", "Y"], said="'Y', 'yes'; 'N', 'no' of 'a' are kept apart"),
    column("sexes", "M | male | F | Female | M", ["M", "male", "F", "Female", "M"],
           said="'F', 'Female'; 'M', 'male' of 'a' are kept apart"),
    column("channels", "Chat | Email | Chat;Email | Shop | Chat;Shop | Chat;Email;Shop | Email",
           ["Chat", "Email", "Chat;Email", "Shop", "Chat;Shop", "Chat;Email;Shop", "Email"],
           said="'Chat;Email' of 'a' may be several labels in one cell: each of the 6 comb"),
    column("several_no_values", "red | n/a | blue | ? | #N/A | red",
           ["red", "n/a", "blue", "?", "#N/A", "red"], said="may all mean no value"),
    column("letters_apart", "a | A | a | A | b | b", ["a", "A", "a", "A", "b", "b"]),
    column("yes_no", "yes | NO | Yes | no", [True, False, True, False]),
    column("truth_or_na", "TRUE | NA | FALSE | TRUE", [True, None, False, True],
           said="'NA' as no value"),
    column("na_is_text", "NA | DE | FR | NA", ["NA", "DE", "FR", "NA"]),
    column("blanks_around", " Rome | Rome | Oslo | Oslo ", ["Rome", "Rome", "Oslo", "Oslo"]),
    column("free_text", TEXTS, [Text(text) for text in TEXTS], said="free text"),
    column("unique_names", [f"{a}{b}" for a in ("Ka", "Lo", "Mi", "Su", "Re")
                            for b in ("ra", "tin", "vel", "dor", "nash")],
           [Text(f"{a}{b}") for a in ("Ka", "Lo", "Mi", "Su", "Re")
            for b in ("ra", "tin", "vel", "dor", "nash")]),
    pair("identifiers", " | ".join(f"u{i}" for i in range(30)),
         " | ".join(str(i % 7) for i in range(30)), ([], [i % 7 for i in range(30)]),
         dropped={"a": "an identifier"}),
    Case("customers.csv", written({"CustomerId": ["11", "12", "13", "14"], "Valid": ["1", "2", "3",
         "4"], "y": labels(4)}).encode(), {"Valid": [1, 2, 3, 4]},
         dropped={"CustomerId": "an identifier"}),
    pair("uuids", " | ".join(f"{i:08x}-{i * 7919:012x}" for i in range(10, 40)),
         " | ".join(str(i % 7) for i in range(30)), ([], [i % 7 for i in range(30)]),
         dropped={"a": "an identifier"}),
    pair("a_flag_or_nothing", "yes |  | yes | ", "1 | 2 | 3 | 4",
         (["yes", None, "yes", None], [1, 2, 3, 4])),
    pair("one_value", "5 | 5.0 | 5", "1 | 2 | 3", ([], [1, 2, 3]), dropped={"a": "same value"}),
    pair("no_cells", " |  | ", "1 | 2 | 3", ([], [1, 2, 3]), dropped={"a": "no value"}),
]  # fmt: skip

TARGETS = [
    target("one_truth", "TRUE | True | false | true | FALSE | False",
           ["TRUE", "TRUE", "false", "TRUE", "false", "false"], said="are one class"),
    target("truth_in_two_words", "Y | yes | Y | N | no | N", ["Y", "Y", "Y", "N", "N", "N"]),
    target("one_yes", "yes | YES | no | yes | No | no", ["yes", "yes", "no", "yes", "no", "no"]),
    target("blank_labels", "a | a  | b | a | b | b ", ["a", "a", "b", "a", "b", "b"],
           said="only in blanks"),
    target("blank_labels_alone", "a |  a | a | a ", None, error="is 'a' in all 4 rows"),
    target("one_and_one_point_nought", "1 | 1.0 | 0 | 1 | 0 | 0.0", ["1", "1", "0", "1", "0", "0"],
           said="'1', '1.0' of 'y' are one class"),
    target("signs", "-1 | 1 | -1 | +1 | 1 | -1", ["-1", "1", "-1", "1", "1", "-1"]),
    target("swapped_letters", " | ".join(["yes", "no"] * 20 + ["yse"]), None,
           said="'yse' of 'y', in 1 row, may be 'yes' misspelt"),
    target("dots_in_a_label", " | ".join(["OK", "FAIL"] * 20 + ["O.K."]), None,
           said="'O.K.' of 'y', in 1 row, may be 'OK' misspelt"),
    target("single_letters", "m | M | m | M", ["m", "M", "m", "M"], said="kept apart"),
    target("ranges", "<=50K | >50K | <=50K | >50K | <=50K", ["<=50K", ">50K", "<=50K", ">50K",
           "<=50K"]),
    target("ranges_with_a_stop", "<=50K | >50K | <=50K. | >50K. | <=50K",
           ["<=50K", ">50K", "<=50K.", ">50K.", "<=50K"], said="kept apart"),
    target("ages_in_ranges", "<18 | 18+ | <18 | 18+ | 18+", ["<18", "18+", "<18", "18+", "18+"]),
    target("no_value_by_number", " | ".join(["-999", *(f"{i}.5" for i in range(9)), "-999"]),
           None, said="'y' is -999 in 2 rows"),
    target("combinations", "a|b | b|c | a | c | a|b|c | b", ["a|b", "b|c", "a", "c", "a|b|c", "b"],
           said="'a|b' of 'y' may be several labels in one cell: each of the 6 combinations"),
    target("codes", "01 | 1 | 01 | 1", ["01", "1", "01", "1"]),
    target("numbers_with_nan", "1.5 | NaN | $100.05 | 2.25 | 7.5 | 3.125",
           [1.5, 100.05, 2.25, 7.5, 3.125], said="'NaN' read as no value"),
    target("comma_target", "1,5 | 2,25 | 7,125 | 100,5", [1.5, 2.25, 7.125, 100.5]),
    target("limits_in_target", "<0.5 | 1.25 | 2.5 | 7.5", [0.5, 1.25, 2.5, 7.5]),
    target("mixed_target", " | ".join([str(i / 7) for i in range(30)] + ["low"] * 3), None,
           error="3 cells are text, first 'low' in line 32; .*say --na-values=low"),
    target("percent_or_none", " | ".join(f"{i}.5%" if i % 2 else f"0.{i:02}" for i in range(24)),
           None, error=r"in several units \('%', 'none'\)"),
    target("times_as_target", " | ".join(f"{i % 24}:{10 + i}" for i in range(24)), None,
           error="holds times or durations such as '0:10'"),
    target("no_value_by_class", " | ".join(["1", "2", "3", "4", "5", "99"] * 5), None,
           said="'y' is 99 in 5 rows"),
    target("units_row", " | ".join(["t/ha", *(str(i / 7) for i in range(30))]), None,
           error="first 't/ha' in line 2; remove line 2 if it is a row of units"),
    target("dates", " | ".join(f"2021-01-{i // 2 + 1:02}" for i in range(60)), None,
           error="holds 30 different dates, which are neither numbers nor classes"),
    target("text_target", " | ".join(f"text {i}" for i in range(30)), None,
           error="30 different texts in 30 rows"),
]  # fmt: skip

BODY = "a,y\n1,p\n2,n\n3.5,n\n"
READ = {"a": [1, 2, 3.5]}
FRAME = pd.DataFrame({"a": [1, 2, 3.5], "y": ["p", "n", "n"]})


def saved(write: Callable[[io.BytesIO], Any]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def parquet(**columns: Any) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet as pq

    table = pa.table({**columns, "y": ["p", "n", "n"]})
    return saved(lambda out: pq.write_table(table, out))


def excel(*sheets: list[list[Any]], merged: Sequence[str] = ()) -> bytes:
    import openpyxl

    book = openpyxl.Workbook()
    for i, rows in enumerate(sheets):
        sheet = book.create_sheet() if i else book.active
        for row in rows:
            sheet.append(row)
    for cells in merged:
        book.active.merge_cells(cells)
    return saved(book.save)


def files() -> list[Case]:
    """Formats, and what goes wrong with whole files."""
    rows = [["a", "b", "c", "y"], [1, "x", date(2021, 3, 4), "p"], [2.5, "z", None, "n"],
            [None, "x", datetime(2021, 3, 6, 12), "n"]]  # fmt: skip
    lines = ('{"a": 1, "b": "x", "y": "p"}\n{"a": 2.5, "y": "n"}\n\n'
             '{"y": "n", "b": "z", "a": null}\n')  # fmt: skip
    binary = parquet(a=[b"\xff\xfe", b"\x80", b"\x81"], b=[1, 2, 3])
    return [
        Case("capitals.CSV", BODY.encode(), READ),
        Case("tabs.tsv", BODY.replace(",", "\t").encode(), READ),
        Case("tabs_in_csv.csv", BODY.replace(",", "\t").encode(), READ, said="separated by"),
        Case("pipes.txt", BODY.replace(",", "|").encode(), READ),
        Case("zipped.csv.gz", gzip.compress(BODY.encode()), READ),
        Case("zipped_in_secret.csv", gzip.compress(BODY.encode()), READ),
        Case("cut.csv.gz", gzip.compress(BODY.encode())[:-9], error="not a complete gzip file"),
        Case("parquet_in_secret.csv", saved(FRAME.to_parquet), READ),
        Case("with_index.parquet", saved(FRAME.set_index(pd.Index([5, 9, 7])).to_parquet), READ,
             dropped={"__index_level_0__": "an identifier"}),
        Case("cut.parquet", saved(FRAME.to_parquet)[:-9], error="not a complete Parquet file"),
        Case("feathers.feather", saved(FRAME.to_feather), READ),
        Case("cut.feather", saved(FRAME.to_feather)[:60], error="not a complete Feather file"),
        Case("sheet.xlsx", excel(rows), {"a": [1, 2.5, None], "b": ["x", "z", "x"],
             "c": [d("2021-03-04"), None, d("2021-03-06T12:00")]}),
        Case("sheet_mixed.xlsx", excel([["a", "y"], [1, "p"], ["low", "n"], [3, "n"], ["low", "p"],
             [5, "n"]]), {"a": [1, Flag("low"), 3, Flag("low"), 5]}),
        Case("cut.xlsx", excel(rows)[:-30], error="not a complete .xlsx file"),
        Case("lines.jsonl", lines.encode(), {"a": [1, 2.5, None], "b": ["x", None, "z"]}),
        Case("nested.jsonl", b'{"a": [1], "y": "p"}\n{"a": [2], "y": "n"}\n',
             error="column 'a' holds lists"),
        Case("broken.jsonl", b'{"a": 1, "y": "p"}\n{"a": 2,\n', error="line 2 is not JSON"),
        Case("twice.ndjson", b'{"a": 1, "a": 2, "y": "p"}\n', error="'a' appears twice"),
        Case("array.jsonl", b"[1, 2]\n", error="line 1 holds list"),
        Case("lists.parquet", parquet(a=[[1], [2], [3]]), error="column 'a' holds lists"),
        Case("structs.parquet", parquet(a=[{"k": 1}] * 3), error="column 'a' holds structs"),
        Case("binary.parquet", binary, error="column 'a' holds binary data"),
        Case("old_mac.csv", BODY.replace("\n", "\r").encode(), READ),
        Case("windows.csv", b"\xef\xbb\xbf" + BODY.replace("\n", "\r\n").encode(), READ),
        Case("open_quote.csv", b'a,y\n1,"p\n2,n\n', error="line 2: a quote is opened and never"),
        Case("quote_inside.csv", b'a,y\n"b"c,p\n2,n\n', error="line 2: a quoted field goes on"),
        Case("long_field.csv", b"a,b,y\n1," + b"x" * 200_000 + b",p\n2,z,n\n3,z,n\n",
             {"a": [1, 2, 3], "b": ["x" * 200_000, "z", "z"]}),
        Case("blank_lines.csv", b"a,y\n\n1,p\n\n2,n\n3.5,n\n\n", READ),
        Case("names_with_blanks.csv", b"a , y\n1,p\n2,n\n3.5,n\n", READ),
        Case("same_name.csv", b"a,a,y\n1,2,p\n", error="'a' appears twice"),
        Case("long_row.csv", b"a,y\n1,p\n2,n,3\n", error="line 3: 3 fields"),
        Case("latin.csv", "a,y\n1,caf\xe9\n".encode("latin-1"), error="line 2: byte 0xe9"),
        Case("windows_euro.csv", "a,y\n1,\u20ac 5\n".encode("cp1252"),
             error="--encoding cp1252 reads '\u20ac 5'"),
        Case("chinese.csv", "a,y\n1,\u5317\u4eac\n".encode("gb18030"),
             error="--encoding gb18030 reads '\u5317\u4eac'"),
        Case("japanese.csv", "a,y\n1,\u30b5\u30a4\u30ba\n".encode("shift_jis"),
             error="--encoding shift_jis reads '\u30b5\u30a4\u30ba'"),
        Case("russian.csv", "a,y\n1,\u0440\u0430\u0437\u043c\u0435\u0440\n".encode("cp1251"),
             error="--encoding cp1251 reads '\u0440\u0430\u0437\u043c\u0435\u0440'"),
        Case("accents_in_pairs.csv", "a,y\n1,gr\xf6\xdfer\n".encode("latin-1"),
             error="encoding: --encoding cp1252 reads 'gr\xf6\xdfer'"),
        Case("wide.csv", BODY.encode("utf-16"), READ),
        Case("wide_tabs.csv", BODY.replace(",", "\t").encode("utf-16"), READ),
        Case("told_separator.csv", b"sep=;\n" + BODY.replace(",", ";").encode(), READ),
        Case("comments.csv", b"# made by hand in May\n# 2021\n" + BODY.encode(), READ,
             said="2 lines above the header begin with '#'"),
        Case("hash_in_header.csv", b"#" + BODY.encode(), {"#a": READ["a"]}),
        Case("title.csv", b"Sales 2021\n\na,b,y\n1,2,p\n2,1,n\n", {"a": [1, 2], "b": [2, 1]},
             said="1 line of title above the header is left out"),
        Case("title_of_a_sheet.csv", b"Sales 2021;;;\n;;;\na;b;c;y\n1;2;u;p\n2;1;v;n\n",
             {"a": [1, 2], "b": [2, 1], "c": ["u", "v"]}, said="2 lines of title"),
        Case("merged_titles.csv", b"Trial 2023;;;;\n;Climate;;;Result\na;b;c;d;y\n1;2;u;3;p\n"
             b"2;1;v;4;n\n", {"a": [1, 2], "b": [2, 1], "c": ["u", "v"], "d": [3, 4]},
             said="2 lines of title"),
        Case("title_with_a_comma.csv", b"Sales\n2021, EUR\na,b,c,y\n1,2,u,p\n2,1,v,n\n3,4,u,n\n",
             {"a": [1, 2, 3], "b": [2, 1, 4], "c": ["u", "v", "u"]}, said="2 lines of title"),
        Case("title.xlsx", excel([["Sales", None, None], [None], ["a", "b", "y"], [1, 2, "p"],
             [2, 1, "n"]]), {"a": [1, 2], "b": [2, 1]}, said="1 line of title"),
        Case("no_title.csv", b"d;t;a;y;;\n" + b"".join(f"1/3/19;{i}.00;{i},5;{i},2;;\n".encode()
             for i in range(10, 30)), {"t": list(range(10, 30)),
             "a": [i + 0.5 for i in range(10, 30)]}, [i + 0.2 for i in range(10, 30)],
             options={"dates": "dmy"}, dropped={"d": "same value"}),
        Case("german_title.csv", b"Umsatz 2020, in Euro;;;\na;b;c;y\n1,5;2;u;p\n2,5;1;v;n\n",
             {"a": [1.5, 2.5], "b": [2, 1], "c": ["u", "v"]}, said="1 line of title"),
        Case("title_of_two.csv", b"value\nann,red\nbob,blue\n", error="line 2: 2 fields"),
        Case("footer.csv", b"Sales\na,b,y\n1,2,p\n2,1,n\n3,1,n\nSource: us\n",
             error="line 6: 1 fields.*--on-bad-row skip"),
        Case("wide_title.csv", b"Sales,,\n1,2,p\n",
             error="columns 2 and 3 of the header have no name"),
        Case("row_numbers.csv", b'"a","y"\n"1",1,p\n"2",2,n\n"3",3.5,n\n', READ,
             said="the first is the name of the row", dropped={"": "an identifier"}),
        Case("row_names.csv", b"a,y\nu,1,p\nv,2,n\nw,3.5,n\n", {"": ["u", "v", "w"]} | READ),
        Case("name_forgotten.csv", b"a,y\n4,1,p\n4,2,n\n5,3.5,n\n", error="line 2: 3 fields"),
        Case("sms.csv", b"a,y,,,\n1,p,,,\n2,n,,,\n3.5,n,,,\n", READ,
             said="3 columns have neither a name nor a value"),
        Case("blank_before_quotes.csv", b'a, b, y\n1, "5.29", p\n2, "6.5", n\n3, "7", n\n',
             {"a": [1, 2, 3], "b": [5.29, 6.5, 7]}),
        Case("separator_in_quotes.csv", b'a, b, y\n1, "u, v", p\n2, "w, v", n\n3, "u, v", n\n',
             {"a": [1, 2, 3], "b": ["u, v", "w, v", "u, v"]}),
        Case("quotes_in_words.csv", b'a, b, y\n1, say "hi" to, p\n2, say "ho", n\n',
             {"a": [1, 2], "b": ['say "hi" to', 'say "ho"']}),
        Case("blank_and_semicolon.csv", b'a; b; y\n1,5; "u; v"; p\n2,5; "w, v"; n\n',
             {"a": [1.5, 2.5], "b": ["u; v", "w, v"]}),
        Case("end_of_dos.csv", BODY.encode() + b"\x1a", READ),
        Case("weka.csv", b"% made by hand\n@RELATION r\n@DATA\n1,p\n", error="is an ARFF file"),
        Case("no_header.csv", b"5.1,3.5,y\n4.9,3.0,p\n4.7,3.2,n\n",
             {"5.1": [4.9, 4.7], "3.5": [3, 3.2]}, said="is the header missing"),
        Case("total.csv", b"a,b,y\nu,1,1.5\nv,2,2.5\nTotal,3,4\n",
             {"a": ["u", "v", "Total"], "b": [1, 2, 3]},
             said="the last row (line 4) says 'Total' in 'a'"),
        Case("total_of_a_year.csv", b"a,b,y\nu,1,1.5\nv,2,2.5\nTotal 2021,3,4\n",
             said="says 'Total 2021' in 'a'"),
        Case("subtotals.csv", b"a,b,y\nu,1,1.5\nu,2,2.5\nu total,3,4\nv,2,3\nv,1,2\n",
             said="rows that say 'u total' in 'a' may sum up others"),
        Case("total_without_a_word.csv", b"a,b,y\n1,5,1\n2,7,3\n4,9,2\n5,8,3\n12,29,9\n",
             said="the last row (line 6) is the sum of all others in 'a', 'b'"),
        Case("joined.csv", b"a,b,y\n1,u,p\n2,v,n\na,b,y\n3,u,n\n",
             {"a": [1, 2, 3], "b": ["u", "v", "u"]}, ["p", "n", "n"],
             said="1 row repeats the header, first line 4"),
        Case("joined.xlsx", excel([["a", "y"], [1, "p"], [2, "n"], ["a", "y"], [3.5, "n"]]),
             {"a": [1, 2, 3.5]}, ["p", "n", "n"]),
        Case("markdown.md.csv", b"| a | y |\n|---|:--|\n| 1 | p |\n| 2 | n |\n| 3.5 | n |\n",
             READ, ["p", "n", "n"], said="line 2 rules off the header"),
        Case("backslashes.csv", b'a,b,y\n1,"u \\"v\\"",p\n2,"w, v",n\n3,"u \\"v\\"",n\n',
             {"a": [1, 2, 3], "b": ['u "v"', "w, v", 'u "v"']}, said="written \\"),
        Case("rows_in_quotes.csv", b'"a,b,y"\n"1,u,p"\n"2,v,n"\n"3.5,u,n"\n',
             READ | {"b": ["u", "v", "u"]}, said="in quotes as a whole"),
        Case("names_below.csv", b"Device:,X100\nDate:,2021\na,y\n1,p\n2,n\n",
             error="names no column 'y', line 3 does: remove the lines above it"),
        Case("pairs_above.csv", b"Device,X100\nDate,2021\na,b,y\n1,2,p\n2,3,n\n2,3,n\n",
             error="what stands for the header has 2 .* remove the lines above"),
        Case("wide_without_mark.csv", (BODY * 20).encode("utf-16-le"),
             error="say --encoding utf-16-le"),
        Case("chinese_of_taiwan.csv", "a,y\n1,\u7d05\u8272\n".encode("big5"),
             error="--encoding big5 reads '\u7d05\u8272'"),
        Case("lost_characters.csv", "a,y\nros\ufffd,p\nblue,n\n".encode(),
             {"a": ["ros\ufffd", "blue"]}, said="characters were lost"),
        Case("open_document.csv", b"PK\3\4" + bytes(26)
             + b"mimetypeapplication/vnd.oasis.opendocument.spreadsheet",
             error="is an OpenDocument file, not a table"),
        Case("stata.csv", b"<stata_dta><header>" + bytes(50), error=r"is a Stata file \(.dta\)"),
        Case("data.xml.csv", b"<?xml version='1.0'?><rows/>", error="is an XML document"),
        Case("list_in_secret.csv", b'[{"a": 1, "y": "p"}, {"a": 2, "y": "n"}]', {"a": [1, 2]}),
        Case("columns_of_lists.json", b'{"a": [1, 2, 3.5], "y": ["p", "n", "n"]}', READ),
        Case("split.json", FRAME.to_json(orient="split").encode(), READ),
        Case("merged.xlsx", excel([["a", "y"], [1, "p"], [None, "n"], [7, "n"], [None, "n"],
             [None, "p"]], merged=["A2:A3", "A4:A6"]), {"a": [1, 1, 7, 7, 7]},
             said="merged cells of 'a' are filled down"),
        Case("formulas.xlsx", excel([["a", "b", "y"], [1, "=A2*2", "p"], [2, "=A3*2", "n"]]),
             error="column 'b' holds formulas without their values"),
        Case("text_first.xlsx", excel([["About this file"]], [["a", "y"], [1, "p"], [2, "n"]]),
             {"a": [1, 2]}, said="sheet 'Sheet1' is read, not 'Sheet'"),
        Case("row_of_a_sheet.xlsx", excel([["a", "y"], [1, "p"], [2.5, "n"], ["x7", "n"],
             [4, "p"]]), error="first 'x7' in line 4"),
        Case("row_ends.csv", b"a,y\n1,p,\n2,n,\n3.5,n,\n", READ, dropped={"": "no value"}),
        Case("blanks.txt", b"   a  y\n   1  p \n 2    n\n3.5 n\n", READ, said="separated by ' '"),
        Case("blanks_and_tab.data", b"name a  y\n\"u v\" 1   p\n\"w z\"  2\tn\n\"u v\" 3 n\n",
             {"name": ["u v", "w z", "u v"], "a": [1, 2, 3]}, said="separated by ' '"),
        Case("under_a_name.json", b'{"page": 1, "rows": [{"a": 1, "y": "p"}, {"a": 2, "y": "n"}]}',
             {"a": [1, 2]}, said="the list under 'rows'"),
        Case("arrow_in_name.arrow", saved(FRAME.to_feather), READ),
        Case("objects.json", FRAME.to_json(orient="records").encode(), READ),
        Case("objects_on_lines.json", FRAME.to_json(orient="records", lines=True).encode(), READ),
        Case("objects_indented.json", FRAME.to_json(orient="records", indent=2).encode(), READ),
        Case("columns.json", FRAME.to_json().encode(), error="holds objects"),
        Case("nothing.csv", b"", error="is empty"),
        Case("header.csv", b"a,y\n", error="no data rows"),
        Case("picture.csv", b"\x89PNG\r\n\x1a\n....", error="is a picture, not a table"),
        Case("old_excel.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", error=r"old Excel workbook"),
    ]  # fmt: skip


def cases() -> list[Case]:
    return [*NUMBERS, *DATES, *WORDS, *TARGETS, *files()]


def larger(rows: int = 400, seed: int = 0) -> pd.DataFrame:
    """A table of the same kinds of cells, with both a class and a number to predict."""
    rng = np.random.default_rng(seed)
    price, dose, day = (
        rng.lognormal(6, 1, rows),
        rng.exponential(2, rows),
        rng.integers(0, 900, rows),
    )
    shop = rng.integers(0, 80, rows)
    moment = pd.Timestamp("2021-01-01") + pd.to_timedelta(day, unit="D")
    hot = np.log(price) + 0.5 * dose + np.sin(shop) + rng.normal(0, 0.3, rows) > 7
    return pd.DataFrame({
        "price": [f"{p:,.2f} \u20ac".translate(str.maketrans(",.", ".,")) for p in price],
        "dose": ["<0,5" if v < 0.5 else f"{v:.2f}".replace(".", ",") for v in dose],
        "sold": moment.strftime("%d/%m/%Y"),
        "shop": [f"shop {s}" for s in shop],
        "note": [TEXTS[i % len(TEXTS)] for i in day],
        "hot": np.where(hot, "YES", np.where(rng.random(rows) < 0.5, "no", "No")),
        "total": [f"{t:.2f}".replace(".", ",") for t in np.log(price) * 3 + dose],
    })  # fmt: skip


def write(folder: Path) -> None:
    """All files of the corpus, and the two larger tables."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases():
        (folder / case.name).write_bytes(case.content)
    frame = larger()
    frame.drop(columns="total").to_csv(folder / "classification.csv", sep=";", index=False)
    frame.drop(columns="hot").to_csv(folder / "regression.csv", sep=";", index=False)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
