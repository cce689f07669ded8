"""Parse dates and times in common formats; the order of day and month is never guessed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np

from tikhon.data.number_parsing import normalize_text

ORDERS = ("ymd", "dmy", "mdy")
EPOCH = date(1970, 1, 1).toordinal()
SPREADSHEET = 25569  # spreadsheet day number of 1970-01-01
NEVER = (date(2, 1, 1).toordinal() - EPOCH, date(9000, 1, 1).toordinal() - EPOCH)
_PIVOT = 69  # POSIX: 69 to 99 mean 1969 to 1999, 00 to 68 mean 2000 to 2068
_CERTAIN = (30, 70)  # two-digit years strictly between are ambiguous in century

_MONTHS = tuple(
    tuple(names.split())
    for names in (
        "january januar janvier enero gennaio janeiro januari",
        "february februar février febrero febbraio fevereiro februari",
        "march märz mars marzo março maart mrz",
        "april avril abril aprile",
        "may mai mayo maggio maio mei",
        "june juni juin junio giugno junho",
        "july juli juillet julio luglio julho",
        "august août agosto augustus",
        "september septembre septiembre settembre setembro",
        "october oktober octobre octubre ottobre outubro",
        "november novembre noviembre novembro",
        "december dezember décembre diciembre dicembre dezembro",
    )
)  # in English, German, French, Spanish, Italian, Portuguese and Dutch
_CLOCK = (
    r"(?P<h>\d{1,2})[:h](?P<min>\d\d)(?::(?P<s>\d\d)(?:[.,](?P<f>\d{1,9}))?)?"
    r"(?:\s*(?P<half>[AaPp])\.?[Mm]\.?)?"
)
# offsets from UTC in hours, from RFC 2822 and for Europe and Japan
_ZONES = {
    **{"Z": 0, "UTC": 0, "GMT": 0, "CET": 1, "CEST": 2, "EET": 2, "EEST": 3, "JST": 9},
    **{"EST": -5, "EDT": -4, "CST": -6, "CDT": -5, "MST": -7, "MDT": -6, "PST": -8, "PDT": -7},
}
_ZONE = rf"(?:\s*(?P<zone>{'|'.join(_ZONES)}|(?:UTC|GMT)?[-+]\d\d:?\d\d|[-+]\d\d))?"
_DATE_CLOCK = _CLOCK.replace("[:h]", "[:h.]").replace("(?::", "(?:[:.]", 1)  # 10.30.45 after it
_TAIL = rf"(?:(?:T|:|,?\s+(?:(?:at|um|à)\s+)?){_DATE_CLOCK}{_ZONE}(?:\s+\([\w\s]+\))?)?"
_WEEKDAY = r"(?:(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*\.?,?\s+)?"
_ANY_DAY = r"(?:[^\W\d_]{2,10}\.?,\s+)?"  # weekday in any language, before a comma
_MONTH = r"(?P<name>[^\W\d_]{3,10})\.?"
_OF = r"(?:(?:de|of)\s+)?"  # 5 de enero de 2021
_NTH = r"(?:st|nd|rd|th|er|o)?"  # 1º is "1o" after tidying
_NUMERIC = re.compile(
    rf"(?:{_ANY_DAY}|{_WEEKDAY})(?P<a>\d{{1,4}})(?P<sep>[-/. ])(?P<b>\d{{1,2}})(?P=sep)"
    rf"(?P<c>\d{{1,4}}){_TAIL}",
    re.IGNORECASE,
)
_FORMS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"(?P<y>\d{{4}})(?P<m>\d\d)(?P<d>\d\d)T(?P<h>\d\d)(?P<min>\d\d)(?P<s>\d\d)?{_ZONE}",
        r"(?P<y>\d{4})-?W(?P<w>[0-5]\d)(?:-?(?P<wd>[1-7]))?",
        r"(?P<y>\d{4})[-/](?P<m>\d\d)",
        r"(?P<m>\d\d?)[-/](?P<y>\d{4})",
        rf"{_MONTH}[-. /,]*(?P<y>\d{{4}})",
        r"(?P<y>(?:19|20)\d\d)(?P<m>\d\d)(?P<d>\d\d)",
        r"(?P<y>\d{4})[-\s]?Q(?P<q>[1-4])",
        r"(?:(?:Q(?P<q>[1-4])|H(?P<half_year>[12]))(?!\d\d$)|(?P<quarter>[1-4])Q)[-\s/']*"
        r"(?P<y>\d{4}|\d\d)",  # Q1'21 and 1Q21; H131 is a code
        r"(?:CW|KW|W|Week|Wk)\.?\s*(?P<w>[0-5]?\d)[-\s/,]+(?P<y>\d{4})",
        rf"{_WEEKDAY}{_MONTH}\s+(?P<d>\d{{1,2}})\s+{_CLOCK}{_ZONE}\s+(?P<y>\d{{4}})",
        r"(?P<y>\d{4})\s*[年년]\s*(?P<m>\d{1,2})\s*[月월]"
        rf"(?:\s*(?P<d>\d{{1,2}})\s*[日일号號]{_TAIL})?",
        rf"{_WEEKDAY}(?P<d>\d{{1,2}}){_NTH}[-. /]*{_OF}{_MONTH},?[-. /]*{_OF}"
        rf"(?P<y>\d{{4}}|\d\d){_TAIL}",
        rf"{_WEEKDAY}{_MONTH}\s+(?P<d>\d{{1,2}}){_NTH}(?:,\s*|\s+)(?P<y>\d{{4}}){_TAIL}",
        rf"(?P<y>\d{{4}})[-. /]{_MONTH}[-. /](?P<d>\d{{1,2}}){_TAIL}",
    )
]
_TIME = re.compile(
    rf"(?:(?P<days>-?\d{{1,5}})\s+days?,?\s+\+?)?{_CLOCK.replace('{1,2}', '{1,3}', 1)}{_ZONE}",
    re.IGNORECASE,
)  # durations may include days and more than 24 hours
_MINUTES = re.compile(r"(?P<min>\d{1,3}):(?P<s>[0-5]\d)(?:[.,](?P<f>\d{1,9}))?")  # 1:23.4
_DOTTED = re.compile(r"(?P<h>\d{1,2})\.(?P<min>\d\d)\.(?P<s>\d\d)")  # 18.00.00
_SPAN = re.compile(
    r"(?:P(?=[T\d]))?(?:(?P<y>\d{1,4})\s*y(?:(?:ea)?rs?)?\.?)?(?:,|\s+and)?\s*"
    r"(?:(?P<mo>\d{1,4})\s*mo(?:n(?:th)?)?s?\.?)?(?:,|\s+and)?\s*"
    r"(?:(?P<w>\d{1,5})\s*w(?:(?:ee)?ks?)?\.?)?(?:,|\s+and)?\s*"
    r"(?:(?P<days>\d{1,5})\s*d(?:ays?)?)?,?\s*T?"
    r"(?:(?P<h>\d{1,5})\s*h(?:(?:ou)?rs?)?\.?)?(?:,|\s+and)?\s*"
    r"(?:(?P<min>\d{1,5})\s*(?:m(?:in(?:ute)?s?)?\.?))?(?:,|\s+and)?\s*"
    r"(?:(?P<s>\d{1,6})(?P<f>[.,]\d{1,9})?\s*(?:s(?:ec(?:ond)?s?)?\.?))?",
    re.IGNORECASE,
)  # 1h 20m, 2 days 3 hours, PT1H20M
_CALENDAR = {"y": 365.25, "mo": 30.4375, "w": 7.0, "days": 1.0}  # days per unit of a duration
UNITS = {"s": 1, "ms": 10**3, "µs": 10**6, "ns": 10**9}  # per second
_SERIAL = re.compile(r"[1-9]\d{4}(?:\.\d+)?")
_LONGEST = 80  # characters of a timestamp with its zone
_ZONE_NAME = re.compile(
    r"(?P<local>.*?\d(?:\s*[AaPp]\.?[Mm]\.?)?(?P<zone>Z|(?<=:\d\d)[-+]\d\d:?\d\d)?)\s*\[?"
    r"(?P<place>[A-Z][A-Za-z]+(?:/[A-Z][\w+-]+){1,2})\]?"
)  # a zone of the time zone database, after a time of day
_HOUR = re.compile(r"(?P<h>\d{1,2})\s*(?P<half>[AaPp])\.?[Mm]\.?")


@dataclass(frozen=True)
class ParsedDate:
    """A parsed date: days since 1970 for each possible order of its fields.

    `clock` tells a time of day, `short` a two-digit year, `doubtful` the orders under which its
    century is ambiguous.
    """

    days: dict[str, float]  # order -> days
    clock: bool = False
    short: bool = False
    doubtful: frozenset[str] = frozenset()
    separator: str = ""


def parse_date(text: str) -> ParsedDate | None:
    """Parse a date; None for other text.

    >>> sorted(parse_date("03/04/2021").days), parse_date("3 Mar 2021 2:30 PM").days["dmy"]
    (['dmy', 'mdy'], 18689.604166666668)
    """
    text = normalize_text(text)
    if "/" in text[:_LONGEST] and (placed := _ZONE_NAME.fullmatch(text[:_LONGEST])):
        local = parse_date(placed["local"])
        if local is None or not local.clock or placed["zone"]:
            return local
        return _to_utc(local, placed["place"])
    if found := _NUMERIC.fullmatch(text):
        return _from_numbers(found)
    for form in _FORMS:
        if found := form.fullmatch(text):
            return _from_named_fields(found)
    return None


def parse_serial_date(text: str) -> ParsedDate | None:
    """Parse a spreadsheet day number between 1927 and 2173."""
    if not _SERIAL.fullmatch(text):
        return None
    days = float(text) - SPREADSHEET
    return ParsedDate(dict.fromkeys(ORDERS, days), clock=days % 1 > 0)


def parse_time(text: str, *, minutes: bool = False) -> float | None:
    """Parse a time of day or a duration, in days; None for other text.

    `1:23.4` is minutes and seconds; with `minutes` so is `12:30`.

    >>> parse_time("6:00 PM"), parse_time("36:00:00"), parse_time("1 days 12:00:00")
    (0.75, 1.5, 1.5)
    >>> parse_time("1h 12m"), parse_time("2 days 6 hours"), parse_time("PT3H")
    (0.05, 2.25, 0.125)
    """
    text = normalize_text(text)
    if (short := _MINUTES.fullmatch(text)) and (minutes or short["f"]):
        return (int(short["min"]) * 60 + float(f"{short['s']}.{short['f'] or 0}")) / 86400
    if hour := _HOUR.fullmatch(text):
        return _day_fraction(hour)
    found = _TIME.fullmatch(text)
    if found is None:
        dotted = _DOTTED.fullmatch(text)
        return _parse_duration(text) if dotted is None else _day_fraction(dotted)
    fraction = _day_fraction(found, hours=999)
    if fraction is None:
        return None
    return fraction % 1 if found["zone"] else int(found["days"] or 0) + fraction


def time_format(texts: Sequence[str]) -> str:
    """Return what the times of a column are: "" of day, "duration", "calendar" (durations with
    months or years), "minutes" where `12:30` is proved to be minutes and seconds, or "hours" where
    it is not, beside times with seconds.

    >>> time_format(["59:30", "1:02:15"]), time_format(["12:30", "1:02:15"])
    ('minutes', 'hours')
    """
    if kinds := {_duration_kind(text) for text in texts} - {""}:
        return min(kinds)
    short = [found for text in texts if (found := _MINUTES.fullmatch(normalize_text(text)))]
    longest = max((parse_time(text) or 0.0 for text in texts), default=0.0)
    has_seconds = any(text.count(":") > 1 for text in texts)
    beyond = any(int(found["min"]) >= 24 for found in short)
    if any(found["f"] for found in short) or (has_seconds and beyond):
        return "minutes"
    return "duration" if longest > 1 else "hours" if short and has_seconds else ""


def _duration_kind(text: str) -> str:
    """Return "duration" for text with named units, "calendar" if they include months or years,
    "" for other text.
    """
    if _parse_duration(normalize_text(text)) is None:
        return ""
    found = _SPAN.fullmatch(normalize_text(text))
    return "calendar" if found and (found["y"] or found["mo"]) else "duration"


def parse_timestamp(text: str, unit: str) -> float:
    """Convert a timestamp in "s", "ms", "µs" or "ns" to days since 1970; NaN for other text.

    >>> parse_timestamp("86400000", "ms")
    1.0
    """
    whole = text.removesuffix(".0")
    return int(whole) / (86400 * UNITS[unit]) if whole.isdecimal() else float("nan")


def _parse_duration(text: str) -> float | None:
    """Parse a duration with named units, in days."""
    found = _SPAN.fullmatch(text)
    if found is None or not any(found[part] for part in (*_CALENDAR, "h", "min", "s")):
        return None
    whole = sum(int(found[part] or 0) * days for part, days in _CALENDAR.items())
    hours, minutes, seconds = (int(found[part] or 0) for part in ("h", "min", "s"))
    fraction = float((found["f"] or "0").replace(",", "."))
    return whole + (hours * 3600 + minutes * 60 + seconds + fraction) / 86400


def _from_numbers(found: re.Match[str]) -> ParsedDate | None:
    a, b, c = found["a"], found["b"], found["c"]
    fraction = _day_fraction(found)
    if fraction is None:
        return None
    if len(a) == 4:
        fields = {"ymd": (a, b, c)}
    elif len(c) == 4:
        fields = {"dmy": (c, b, a), "mdy": (c, a, b)}
    elif len(a) <= 2 and len(c) == 2:
        fields = {"dmy": (c, b, a), "mdy": (c, a, b)}
        if len(a) == 2:
            fields["ymd"] = (a, b, c)
    else:
        return None
    if found["sep"] == ".":  # dots never go with the month first
        fields.pop("mdy", None)
    short = all(len(year) == 2 for year, _, _ in fields.values())
    days = {
        order: day + fraction
        for order, (year, month, d) in fields.items()
        if (day := _day(year, int(month), int(d))) is not None
    }
    if "ymd" in fields and len(a) == 4:
        days = {order: days["ymd"] for order in ORDERS} if days else {}
    doubtful = frozenset(order for order in days if short and _is_ambiguous_year(fields[order][0]))
    return (
        ParsedDate(days, found["h"] is not None, short, doubtful, found["sep"]) if days else None
    )


def _from_named_fields(found: re.Match[str]) -> ParsedDate | None:
    """Parse a date with a named month, or whose fields admit only one order."""
    parts = found.groupdict()
    name = parts.get("name")
    half = int(parts.get("half_year") or 1)
    quarter = int(parts.get("q") or parts.get("quarter") or 2 * half - 1)
    month = _month(name) if name else int(parts.get("m") or 3 * quarter - 2)
    fraction = _day_fraction(found)
    day = None if month is None else _day(parts["y"], month, int(parts.get("d") or 1))
    if parts.get("w"):
        day = _from_week(int(parts["y"]), int(parts["w"]), int(parts.get("wd") or 1))
    if day is None or fraction is None:
        return None
    short = len(parts["y"]) == 2
    doubtful = frozenset(ORDERS if short and _is_ambiguous_year(parts["y"]) else ())
    days: dict[str, float] = {order: day + fraction for order in ORDERS}
    return ParsedDate(days, parts.get("h") is not None, short, doubtful)


def _is_ambiguous_year(year: str) -> bool:
    """Return whether a two-digit year is ambiguous in century."""
    return _CERTAIN[0] < int(year) < _CERTAIN[1]


def _month(name: str) -> int | None:
    """Return the month whose name in some language has this prefix; None if not unique."""
    start = name.lower()
    found = [i for i, names in enumerate(_MONTHS, 1) if any(n.startswith(start) for n in names)]
    return found[0] if len(found) == 1 else None


def _day(year: str, month: int, day: int) -> int | None:
    number = int(year)
    if len(year) == 2:
        number += 1900 if number >= _PIVOT else 2000
    try:
        return date(number, month, day).toordinal() - EPOCH
    except ValueError:
        return None


def _from_week(year: int, week: int, day: int) -> int | None:
    """Convert an ISO 8601 week date to days since 1970."""
    try:
        return date.fromisocalendar(year, week, day).toordinal() - EPOCH
    except ValueError:
        return None


def _to_utc(local: ParsedDate, place: str) -> ParsedDate | None:
    """Convert local time in a named zone to UTC; None for an unknown zone."""
    try:
        zone = ZoneInfo(place)
    except (ValueError, KeyError, OSError):
        return None
    first = datetime(1970, 1, 1)
    days = {}
    for order, day in local.days.items():
        offset = zone.utcoffset(first + timedelta(days=day))
        days[order] = day - (offset or timedelta()) / timedelta(days=1)
    return replace(local, days=days)


def _day_fraction(found: re.Match[str], *, hours: int = 24) -> float | None:
    """Return the matched time of day in days; 0 without one, None if invalid."""
    parts = found.groupdict()
    if parts.get("h") is None:
        return 0.0
    hour, minute, second = (int(parts.get(part) or 0) for part in ("h", "min", "s"))
    if half := parts.get("half"):
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if half in "pP" else 0)
    if hour > hours or minute > 59 or second > 60:
        return None
    fraction = float(f"0.{parts.get('f') or 0}")
    zone = (parts.get("zone") or "").upper()
    minute -= 60 * _ZONES.get(zone, 0)
    zone = zone.removeprefix("UTC").removeprefix("GMT")
    if zone[:1] in ("+", "-"):
        digits = zone[1:].replace(":", "").ljust(4, "0")
        minutes = int(digits[:2]) * 60 + int(digits[2:])
        minute -= minutes if zone[0] == "+" else -minutes
    return (hour * 3600 + minute * 60 + second + fraction) / 86400


def days_of_dates(found: Sequence[ParsedDate | None], order: str) -> np.ndarray:
    """Return days since 1970 of parsed texts, NaN for those invalid under the order."""
    return np.array([np.nan if one is None else one.days.get(order, np.nan) for one in found])


def format_day(days: float) -> str:
    """Format days since 1970 as an ISO date, clamped to the supported years (time zones and
    rounding may exceed them).
    """
    ordinal = int(np.floor(days)) + EPOCH
    return date.fromordinal(min(max(ordinal, 1), date.max.toordinal())).isoformat()
