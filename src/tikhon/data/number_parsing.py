"""Parse numbers in common formats without guessing; the only number parser."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MISSING = frozenset(
    "na n/a n.a. n.a <na> n/d n.d. nan -nan nat null none nil (null) <null> [null] \\n ? - -- --- "
    "– — . .. … #n/a #n/a! #na #null! #div/0! #value! #ref! #num! #name? 1.#ind -1.#ind 1.#qnan "
    "-1.#qnan missing".split()
) | {"#n/a n/a"}  # "no value" among numbers or dates, but ordinary text elsewhere

_SYMBOLS = "$€£¥₹₽₩₺₴₪₫₦฿¢₱₿"
# currencies that group thousands by commas (R$ does not) and have at most two decimals
_COMMA_GROUPS = frozenset("$ £ ¥ ₹ ₩ ₱ ₪ ฿ US$ A$ AU$ C$ CA$ NZ$ HK$ S$ NT$".split()) | frozenset(
    "USD GBP JPY INR KRW CNY RMB AUD NZD SGD HKD THB ILS".split()
)
_CURRENCIES = frozenset(
    "USD EUR GBP JPY CHF CAD AUD NZD CNY RMB INR SEK NOK DKK PLN CZK HUF RON BRL MXN ZAR KRW RUB "
    "TRY SGD HKD THB ILS".split()
)
# currency names other than signs; "Rs." is "Rs"
_WORDS = frozenset("Rs Rp RM kr Fr zł Kč Ft".split())
_MULTIPLES = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "bn": 1e9}
_MULTIPLE_WORDS = {
    **dict.fromkeys(("thousand", "tsd"), 1e3),
    **dict.fromkeys(("万", "萬"), 1e4),
    **dict.fromkeys(("lakh", "lakhs", "lac", "lacs"), 1e5),
    **dict.fromkeys(("million", "millions", "mln", "mn", "mio"), 1e6),
    **dict.fromkeys(("crore", "crores", "cr"), 1e7),
    **dict.fromkeys(("亿", "億"), 1e8),
    **dict.fromkeys(("billion", "billions", "bln", "mrd"), 1e9),
    **dict.fromkeys(("trillion", "trillions"), 1e12),
}  # ignoring case
_MULTIPLE = "|".join(sorted({*_MULTIPLES, *_MULTIPLE_WORDS}, key=len, reverse=True))
_BY_CASE = "mMpPyYzZ"  # first letters of units that differ by case: mW is not MW
# soft hyphen, zero-width space, marks of direction, word joiner, byte order mark
_INVISIBLE = dict.fromkeys([0xAD, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF])
_QUOTES = {0x2032: "'", 0x2019: "'", 0x2033: '"', 0x201D: '"'}  # feet and inches, minutes
FLAGS = ("<", ">", "~", "*")  # limits, an estimate, a footnote mark
_BOUNDS = {"≤": "<", "≥": ">", "<=": "<", ">=": ">", "≈": "~"}
_BOUND_WORDS = {
    **dict.fromkeys(("less than", "under", "below", "up to", "at most"), "<"),
    **dict.fromkeys(("more than", "over", "above", "at least"), ">"),
    **dict.fromkeys(("about", "approx", "approximately", "around", "ca", "circa"), "~"),
}  # ignoring case
_REACH = (
    r"(?i:(?:or|and|&)\s+(?:(?P<more>more|over|above|older|up|greater|higher)"
    r"|less|under|below|younger|fewer|lower))"
)  # 3 or more, 65 and older
_WORD = r"(?!(?i:or|and)\s)°?[^\W\d_]{1,12}\.?[23]?"
_UNIT = rf"(?:/\s*|(?i:per)\s+)?{_WORD}(?:\s*/\s*{_WORD}|\s+{_WORD}){{0,2}}"  # kg, mg/dL, sq. ft.
_IN_WORDS = "|".join(_BOUND_WORDS).replace(" ", "[ ]")
_NUMBER = re.compile(
    rf"""(?P<bound><=|>=|[<>≤≥~≈]|(?i:{_IN_WORDS})\.?(?=[\s.]))?\s*
    (?P<open>\()?\s*(?P<sign>[-+])?\s*
    (?P<before>[A-Z]{{0,3}}[{_SYMBOLS}]|[A-Z]{{3}}(?=[\s\d])|(?:{"|".join(sorted(_WORDS))})\.?)?
    \s*(?P<second>[-+])?
    (?P<digits>[\d.,'’_ ]*\d[.,]?)
    (?P<exponent>[eE][-+]?\d{{1,4}}|[dD][-+]\d{{1,4}}|\s*[xX×*·]\s*10\s*\^\s*[-+]?\d{{1,4}})?
    (?P<spread>\s*(?:±|\+/-|\+-)\s*\d[\d.,]*)?(?P<plus>\+)?
    (?:\s*(?P<multiple>(?i:{_MULTIPLE}))\.?\s*(?=[{_SYMBOLS}]|[A-Z]{{3}}\b))?
    \s*(?P<after>[%‰{_SYMBOLS}]|/(?:5|10|20|50|100)|{_UNIT}|°|'|")?
    \s*(?P<trail>[-+])?\s*(?P<close>\))?(?P<reach>\s+{_REACH})?
    (?P<note>\s*(?:[*†‡§]{{1,3}}|\[\w{{1,3}}\]|\([^\W\d_][^()\d]{{0,30}}\)))?""",
    re.VERBOSE,
)
_GROUPED = {
    ".": re.compile(r"[1-9]\d{0,2}(?:([, '’_])\d{3})(?:\1\d{3})*|[1-9]\d?(?:,\d\d)+,\d{3}"),
    ",": re.compile(r"[1-9]\d{0,2}(?:([. '’_])\d{3})(?:\1\d{3})*"),
}
_ORDINALS = ("st", "nd", "rd", "th")
_ANGLE = re.compile(
    r"""(?P<before>[NSEWnsew])?\s*(?P<sign>[-+])?(?P<d>\d{1,3}(?:[.,]\d+)?)\s*°\s*
    (?:(?P<m>[0-5]?\d(?:[.,]\d+)?)\s*'\s*(?:(?P<s>[0-5]?\d(?:[.,]\d+)?)\s*(?:"|'')\s*)?)?
    (?P<after>[NSEWnsew])?""",
    re.VERBOSE,
)  # a coordinate: degrees, minutes, seconds
_FEET = re.compile(
    r"""(?P<feet>\d{1,3})\s*(?:'|ft\.?|feet|foot)\s*-?\s*(?P<inches>(?:1[01]|\d)(?:\.\d+)?)\s*
    (?:"|''|in\.?|inch(?:es)?)?""",
    re.VERBOSE,
)
_FRACTION = re.compile(
    r"""(?P<sign>[-+])?(?:(?P<whole>\d{1,4})[ -](?=\d+[/⁄]))?(?P<over>\d{1,2})
    (?:⁄|(?<=[ -]\d)/|(?<=[ -]\d\d)/)(?P<under>[2-9]|10|12|16|32|64)\s*(?P<inch>")?""",
    re.VERBOSE,
)  # without a whole number, 1/2 may be a date; ½ may not
_LENGTHS = {"'": "ft", "foot": "ft", "feet": "ft", '"': "in", "inch": "in", "inches": "in"}
_INFINITE = re.compile(r"([-+]?)(?:inf|infinity|∞)", re.IGNORECASE)
_NOTHING = re.compile(rf"([A-Z]{{0,3}}[{_SYMBOLS}])\s*-")  # $ -, zero in accounts
_PRICE_END = re.compile(r"(?<=\d)[.,/][-\u2010-\u2013](?=\s|$)")  # 955,- and 282/-
_PLAIN = re.compile(r"[-+]?\d+")


@dataclass(frozen=True)
class ParsedNumber:
    """A parsed number: its value with "." as decimal mark and with ","; None where invalid.

    `bound` is "<" or ">" for a limit (`<0.5`, `65+`), "~" for an estimate (`~3`, `3±0.5`), "*" for
    a footnote mark (`3.5**`); `unit` is the text around the digits: a currency, "%", letters.
    """

    dot: float | None
    comma: float | None
    bound: str = ""
    unit: str = ""
    multiple: str = ""  # thousands, millions, ..., already applied to the value

    @property
    def decimal_mark(self) -> str:
        """Decimal mark proved by the text, "." or ","; "?" if the two give different numbers."""
        if self.dot is None:
            return ","
        if self.comma is None:
            return "."
        if self.unit in _COMMA_GROUPS and self.dot == 1000 * self.comma:
            return "."  # $1,036 is not a price with three decimals
        return "" if self.dot == self.comma else "?"

    def value(self, decimal: str) -> float | None:
        """Return the number for a decimal mark; for "" only if the marks agree."""
        if decimal:
            return self.dot if decimal == "." else self.comma
        if self.decimal_mark == "?":
            return None
        return self.comma if self.dot is None else self.dot


def normalize_text(text: str) -> str:
    """Normalise spaces, minus signs and digits, and remove invisible characters.

    >>> normalize_text("1\\u202f036"), normalize_text("\\u22125"), normalize_text("\\u200e7")
    ('1 036', '-5', '7')
    """
    if text.isascii():
        return text.strip()
    text = text.translate({**_INVISIBLE, **_QUOTES})
    text = _RAISED.sub(lambda raised: "^" + unicodedata.normalize("NFKC", raised[0]), text)
    text = _AFTER_DIGITS.sub(" ", text)
    text = "".join(map(_to_ascii, unicodedata.normalize("NFKC", text).strip()))
    return re.sub(r"^[\u2010-\u2013](?=[\d.,])", "-", text)


_AFTER_DIGITS = re.compile("(?<=\\d)(?=[¼-¾⅐-⅞])")  # 9½ is not 91/2
_RAISED = re.compile(r"(?<![^\W\d_])\u207b?[\u00b9\u00b2\u00b3\u2070\u2074-\u2079]+")  # not of m²


_SIGNS = {"\u2212": "-", "\ufe63": "-", "\u066b": ".", "\u066c": ","}  # minus; marks of Arabic


def _to_ascii(character: str) -> str:
    """Convert a digit or sign of any script to ASCII."""
    digit = None if character.isascii() else unicodedata.decimal(character, None)
    return _SIGNS.get(character, character) if digit is None else str(digit)


def parse_number(text: str) -> ParsedNumber | None:
    """Parse a number; None for other text.

    >>> parse_number("1.234,50").value(","), parse_number("($1,036)").value(".")
    (1234.5, -1036.0)
    >>> parse_number("1.036").decimal_mark
    '?'
    """
    text = _PRICE_END.sub("", normalize_text(text))
    if _PLAIN.fullmatch(text):
        value = float(text)
        return ParsedNumber(value, value)
    found = _NUMBER.fullmatch(text)
    if not found:
        if nothing := _NOTHING.fullmatch(text):
            return ParsedNumber(0.0, 0.0, unit=nothing[1])
        if infinite := _INFINITE.fullmatch(text):
            value = math.copysign(math.inf, -1 if infinite[1] == "-" else 1)
            return ParsedNumber(value, value)
        return _parse_angle(text) or _parse_fraction(text)
    if _has_conflicting_signs(found):
        return None
    unit, factor = _unit(found["before"], found["multiple"], found["after"])
    if unit is None:
        return None
    negative = "-" in (found["sign"], found["second"], found["trail"]) or bool(found["open"])
    readings = [
        None if value is None else (-value if negative else value) * factor
        for value in (_value(found["digits"], found["exponent"], mark) for mark in ".,")
    ]
    if readings == [None, None]:
        return _parse_fraction(text)
    multiple = found["multiple"] or found["after"] if factor != 1 else ""
    return ParsedNumber(readings[0], readings[1], _bound(found), unit, multiple)


def _parse_angle(text: str) -> ParsedNumber | None:
    """Parse degrees, minutes and seconds; south and west are negative."""
    found = _ANGLE.fullmatch(text)
    if found is None or (found["before"] and found["after"]):
        return None
    side = (found["before"] or found["after"] or "").lower()
    if side and found["sign"]:
        return None
    factor = -1.0 if found["sign"] == "-" or side in ("s", "w") else 1.0
    parts = [found[name] or "0" for name in ("d", "m", "s")]
    values: list[float | None] = []
    for mark, other in (".", ","), (",", "."):
        told = not any(other in part for part in parts)
        numbers = [float(part.replace(mark, ".")) for part in parts] if told else []
        values.append(factor * sum(n / 60**k for k, n in enumerate(numbers)) if told else None)
    return None if values == [None, None] else ParsedNumber(values[0], values[1], unit="°")


def _parse_fraction(text: str) -> ParsedNumber | None:
    """Parse feet and inches, and mixed fractions: 5'11", 5 ft 11 in, 9 1/2."""
    if found := _FEET.fullmatch(text):
        value = int(found["feet"]) + float(found["inches"]) / 12
        return ParsedNumber(value, value, unit="ft")
    found = _FRACTION.fullmatch(text)
    if found is None or int(found["over"]) >= int(found["under"]):
        return None
    value = int(found["whole"] or 0) + int(found["over"]) / int(found["under"])
    value = -value if found["sign"] == "-" else value
    return ParsedNumber(value, value, unit='"' if found["inch"] else "")


def _bound(found: re.Match[str]) -> str:
    if found["reach"]:
        return ">" if found["more"] else "<"
    bound = " ".join((found["bound"] or "").rstrip(".").lower().split())
    if bound:
        return _BOUND_WORDS.get(bound) or _BOUNDS.get(bound, bound)
    if found["spread"]:
        return "~"
    return ">" if "+" in (found["plus"], found["trail"]) else "*" if found["note"] else ""


def _has_conflicting_signs(found: re.Match[str]) -> bool:
    """Return whether there are two signs or an unbalanced parenthesis."""
    signs = [s for s in (found["sign"], found["second"], found["trail"]) if s]
    closed = bool(found["open"]) == bool(found["close"])
    return len(signs) > 1 or not closed or (bool(found["open"]) and bool(signs))


def _unit(before: str | None, multiple: str | None, after: str | None) -> tuple[str | None, float]:
    """Return the unit (None if the text is not a number) and the factor of its multiple."""
    after = (after or "").removesuffix(".")
    before = (before or "").removesuffix(".")
    if before and before[-1] not in _SYMBOLS and before not in _CURRENCIES | _WORDS:
        return None, 1.0
    after = "" if after.lower() in _ORDINALS else after  # the 37th
    if multiple:  # 3 Mio. €
        factor = _factor(multiple)
        told = factor is not None and not before and is_currency(after)
        return after if told else None, factor or 1.0
    if factor := _factor(after):
        return before or f"*{after}", factor
    if before and after and after not in _CURRENCIES:
        told = before + after if after.startswith("/") else f"{before} {after}"
        return told if re.match(r"/|per\s", after) else None, 1.0  # $10/hr
    return before or after or "", 1.0


def _factor(multiple: str) -> float | None:
    return _MULTIPLES.get(multiple) or _MULTIPLE_WORDS.get(multiple.lower())


def _value(digits: str, exponent: str | None, decimal: str) -> float | None:
    whole, _, fraction = digits.rstrip().partition(decimal)
    if fraction and not (fraction.isascii() and fraction.isdecimal()):
        return None
    if whole and not (whole.isascii() and whole.isdecimal()):
        if exponent or not _GROUPED[decimal].fullmatch(whole):
            return None
        whole = re.sub(r"\D", "", whole)
    if not whole and not fraction:
        return None
    power = re.sub(r"[dD]|[^-+\d]*10\s*\^\s*", "e", exponent or "")
    return float(f"{whole or '0'}.{fraction or '0'}{power}")


def is_currency(unit: str) -> bool:
    """Return whether a unit is a currency, which some cells of a column may omit."""
    return unit in _CURRENCIES | _WORDS or (unit != "" and unit[-1] in _SYMBOLS)


def normalize_unit(unit: str) -> str:
    """Normalise a unit: `days` and `day`, `KG` and `kg` are one; so are all multiples.

    >>> [normalize_unit(unit) for unit in ("Years", "year", "mW", "MW")]
    ['year', 'year', 'mW', 'MW']
    """
    if unit.startswith("*"):
        return "*"
    unit = re.sub(r"\s*/\s*", "/", _LENGTHS.get(unit.lower(), unit).replace(".", ""))
    if len(unit) > 3 or unit[:1] not in _BY_CASE:
        unit = unit.lower()
    return unit[:-1] if len(unit) > 2 and unit.endswith("s") and "/" not in unit else unit


def common_unit(found: Iterable[ParsedNumber]) -> tuple[str, ...] | None:
    """Return the unit of a column, () for none; None for incompatible units.

    Compatible are one unit in all cells but zeros, one currency in some, and multiples (`1.2k`).
    """
    plain = False
    seen: dict[str, str] = {}
    for one in found:
        if one.unit:
            seen.setdefault(normalize_unit(one.unit), one.unit)
        elif one.dot != 0 or one.comma != 0:
            plain = True
    multiples = seen.pop("*", None)
    shown = tuple(seen.values())
    if len(shown) > 1:
        return None
    if shown and (plain or multiples) and not is_currency(shown[0]):
        return None
    return shown


def proved_marks(found: Iterable[ParsedNumber]) -> frozenset[str]:
    """Return the decimal marks the texts prove: a set of ".", "," and "?"."""
    return frozenset(one.decimal_mark for one in found if one.decimal_mark)


def values_and_bounds(
    found: Sequence[ParsedNumber | None], decimal: str
) -> tuple[np.ndarray, list[str]]:
    """Return values (NaN where invalid under the mark) and bounds of parsed texts."""
    values = np.full(len(found), np.nan)
    bounds = [""] * len(found)
    for i, one in enumerate(found):
        if one is not None and (value := one.value(decimal)) is not None:
            values[i], bounds[i] = value, one.bound
    return values, bounds
