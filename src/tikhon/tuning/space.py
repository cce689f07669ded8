"""Search spaces: ranges, choices, and their names; standard library only."""

from __future__ import annotations

import math
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tikhon.errors import InputError, unknown_name
from tikhon.options import OPTIMIZERS, STRENGTHS, split_name, training_fields
from tikhon.tuning.trials import Value

# Hyperparameters of the runners, and whether larger values simplify the model.
KNOWN = {
    **{name: told.search for name, told, _ in training_fields() if told.search in (True, False)},
    **dict.fromkeys(STRENGTHS, True),
    "max_norm": False,
}
ADAPTIVE = frozenset({"weight_decay"})  # entries that accept "auto"
PATTERNED = frozenset({*STRENGTHS, "lr", "dropout", "max_norm"})  # may differ between layers
_RANGE = frozenset({"kind", "when", "low", "high", "values"})  # keys of a range in TOML


def known(name: str) -> bool:
    """Return whether training reads an entry; all others are for the builder."""
    return split_name(name)[0] in KNOWN


def simplifies(name: str) -> bool:
    """Return whether larger values of an entry simplify the model."""
    return bool(KNOWN.get(split_name(name)[0]))


@dataclass(frozen=True)
class Range(ABC):
    """Values of one hyperparameter, mapped from the unit interval."""

    kind: ClassVar[str]

    @abstractmethod
    def at(self, unit: float) -> Value:
        """Return the value at `unit` in [0, 1]."""

    @abstractmethod
    def unit(self, value: Value) -> float:
        """Return the position of a value in [0, 1]."""

    @abstractmethod
    def grid(self, count: int) -> list[Value]:
        """Return `count` values from end to end."""

    @abstractmethod
    def to_dict(self) -> dict[str, object]:
        """Return a JSON-serialisable dict."""

    def when(self, **conditions: Value | Sequence[Value]) -> Conditional:
        """Restrict this range to configurations where other entries have one of the given values.

        >>> space = Space(model=Choice(["mlp", "cnn"]), kernel=Int(3, 7).when(model="cnn"))
        >>> space.at([0.0, 0.5]), space.at([1.0, 0.5])
        ({'model': 'mlp'}, {'model': 'cnn', 'kernel': 5})
        """
        if not conditions:
            raise InputError("when() takes conditions by name, such as when(model='cnn')")
        return Conditional(
            self,
            {
                name: (wanted,) if isinstance(wanted, str | int | float | None) else tuple(wanted)
                for name, wanted in conditions.items()
            },
        )


@dataclass(frozen=True)
class Conditional:
    """A range that only belongs to some configurations: see `Range.when`."""

    range: Range
    conditions: Mapping[str, tuple[Value, ...]]

    def holds(self, config: Mapping[str, Value]) -> bool:
        """Return whether the entry belongs to this configuration."""
        return all(name in config and config[name] in v for name, v in self.conditions.items())

    def to_dict(self) -> dict[str, object]:
        """Return a JSON-serialisable dict."""
        conditions = {name: list(values) for name, values in self.conditions.items()}
        return {**self.range.to_dict(), "when": conditions}


@dataclass(frozen=True)
class _Interval(Range):
    low: float
    high: float

    def __post_init__(self) -> None:
        name = type(self).__name__
        for end in (self.low, self.high):
            if isinstance(end, bool) or not isinstance(end, (int, float)):
                raise InputError(f"{name} takes two numbers, received {end!r}")
            if not math.isfinite(end):
                raise InputError(f"{name}({self.low}, {self.high}): both ends must be finite")
        if self.low > self.high:
            raise InputError(f"{name}({self.low}, {self.high}): low exceeds high; swap them")

    def grid(self, count: int) -> list[Value]:
        if count == 1 or self.low == self.high:
            return [self.at(0.5)]
        return [self.at(i / (count - 1)) for i in range(count)]

    def to_dict(self) -> dict[str, object]:
        return {"kind": self.kind, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Uniform(_Interval):
    """A number distributed uniformly between `low` and `high`.

    >>> Uniform(0, 0.8).grid(3)
    [0.0, 0.4, 0.8]
    """

    kind: ClassVar[str] = "uniform"

    def at(self, unit: float) -> float:
        """Return the value at `unit` in [0, 1]."""
        return self.low + (self.high - self.low) * unit

    def unit(self, value: Value) -> float:
        """Return the position of a value in [0, 1]."""
        return (float(value) - self.low) / (self.high - self.low or 1.0)


@dataclass(frozen=True)
class Log(_Interval):
    """A positive number distributed log-uniformly between `low` and `high`.

    >>> [round(value, 4) for value in Log(1e-4, 1e-2).grid(3)]
    [0.0001, 0.001, 0.01]
    """

    kind: ClassVar[str] = "log"

    def __post_init__(self) -> None:
        _Interval.__post_init__(self)
        if self.low <= 0:
            raise InputError(
                f"Log({self.low}, {self.high}): a log range starts above 0; "
                "use Uniform, or a small positive low"
            )

    def at(self, unit: float) -> float:
        """Return the value at `unit` in [0, 1]."""
        return min(self.low * (self.high / self.low) ** unit, self.high)  # exact at both ends

    def unit(self, value: Value) -> float:
        """Return the position of a value in [0, 1]."""
        return math.log(float(value) / self.low) / (math.log(self.high / self.low) or 1.0)


@dataclass(frozen=True)
class Int(_Interval):
    """An integer from `low` to `high` inclusive, uniform or, if `log`, log-uniform.

    >>> Int(1, 4).grid(4), Int(8, 128, log=True).at(0.5)
    ([1, 2, 3, 4], 31)
    """

    log: bool = False
    kind: ClassVar[str] = "int"

    def __post_init__(self) -> None:
        _Interval.__post_init__(self)
        if self.low != int(self.low) or self.high != int(self.high):
            raise InputError(f"Int({self.low}, {self.high}): both ends must be whole numbers")
        if self.log and self.low < 1:
            raise InputError(f"Int({self.low}, {self.high}, log=True) starts below 1")

    def at(self, unit: float) -> int:
        """Return the number whose cell contains `unit`."""
        low, high = self.low - 0.5, self.high + 0.5
        value = low * (high / low) ** unit if self.log else low + (high - low) * unit
        return int(min(max(round(value), self.low), self.high))

    def unit(self, value: Value) -> float:
        """Return the centre of the number's cell."""
        low, high = self.low - 0.5, self.high + 0.5
        if self.log:
            return math.log(float(value) / low) / math.log(high / low)
        return (float(value) - low) / (high - low)

    def grid(self, count: int) -> list[Value]:
        """Return at most `count` distinct numbers from end to end."""
        if count == 1 or self.low == self.high:
            return [self.at(0.5)]
        found = [self._between(i / (count - 1)) for i in range(count)]
        return list(dict.fromkeys(found))

    def _between(self, share: float) -> int:
        span = self.high / self.low if self.log else self.high - self.low
        return round(self.low * span**share if self.log else self.low + span * share)

    def to_dict(self) -> dict[str, object]:
        """Return a JSON-serialisable dict."""
        return {**super().to_dict(), "log": self.log}


@dataclass(frozen=True)
class Choice(Range):
    """One of the given values: numbers, strings, booleans, None, or tuples of these.

    If `ordered`, neighbours in the list are similar: searches step between them, and a chosen end
    of the list is reported as an edge of the space.

    >>> Choice([16, 32, 64]).at(0.99)
    64
    """

    values: tuple[Value, ...]
    ordered: bool = False
    kind: ClassVar[str] = "choice"

    def __post_init__(self) -> None:
        values: Any = self.values
        values = values.tolist() if hasattr(values, "tolist") else values  # an array
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise InputError(f"Choice takes a list of values, received {values!r}")
        if not values:
            raise InputError("Choice([]): give at least one value")
        object.__setattr__(self, "values", tuple(map(_plain, values)))

    def at(self, unit: float) -> Value:
        """Return the value whose cell contains `unit`."""
        return self.values[min(int(unit * len(self.values)), len(self.values) - 1)]

    def unit(self, value: Value) -> float:
        """Return the centre of the value's cell."""
        return (self.values.index(value) + 0.5) / len(self.values)

    def grid(self, count: int) -> list[Value]:
        """Return all values, whatever `count`."""
        return list(self.values)

    def to_dict(self) -> dict[str, object]:
        """Return a JSON-serialisable dict."""
        ordered = {"ordered": True} if self.ordered else {}
        return {"kind": self.kind, "values": list(self.values), **ordered}


def _plain(value: Any) -> object:
    """Convert a value of a choice to types that a journal can store and compare."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if not isinstance(value, bool | int | float | str | None) and hasattr(value, "item"):
        value = value.item()  # from numpy
    if not isinstance(value, bool | int | float | str | None):
        raise InputError(
            f"Choice holds {value!r}: give numbers, strings, booleans, None or tuples of these, "
            "which a journal can hold, and let build_model look up what they stand for"
        )
    return value


Entry = Range | Conditional | Value


class Space(Mapping[str, Entry]):
    """Hyperparameters by name: a `Range` varies, a plain value is fixed, `"auto"` adapts.

    A range with conditions (`Int(3, 7).when(model="cnn")`) belongs only to configurations that
    meet them; conditions refer to earlier entries. A list is the `Choice` of its values.

    Entries for every model: lr, batch_size, optimizer (names), clip_norm, seed, dropout,
    label_smoothing, mixup, weight_decay (a
    range, a number or "auto": for each layer, by hypergradient), strengths of the penalties l2,
    l1, elastic_net, group_lasso, mcp, scad, log_sum and huber, and max_norm. Other names are for
    the builder of the model; `tune` raises for one that is never read.

    Strengths, lr, max_norm and dropout may differ between parts of a model: a dictionary from
    patterns (on parameter names, for dropout on module paths) to entries gives entries such as
    `l1[fc1.*]`. For learning rates the last matching pattern wins, and unmatched parameters get
    lr, by default 1e-3.

    Raises `InputError` for an empty space or a malformed entry.

    >>> space = Space(dropout=Uniform(0, 0.8), lr=Log(1e-4, 1e-1), weight_decay="auto")
    >>> space.varying
    ('dropout', 'lr')
    >>> at = space.at([0.5, 0.0])
    >>> at["dropout"], round(at["lr"], 9), at["weight_decay"]
    (0.4, 0.0001, 'auto')
    >>> Space(l1={"fc1.*": Log(1e-5, 1e-2), "fc2.*": 1e-4}).at([1.0])
    {'l1[fc1.*]': 0.01, 'l1[fc2.*]': 0.0001}
    """

    def __init__(self, **entries: Entry | Sequence[Value] | Mapping[str, Entry]) -> None:
        if not entries:
            raise InputError(f"the space is empty: give at least one of {', '.join(KNOWN)}")
        given = dict(_flattened(entries))
        flat: dict[str, Any] = {
            n: Choice(tuple(e)) if isinstance(e, list) and e else e for n, e in given.items()
        }
        for name, entry in flat.items():
            if not isinstance(entry, Range | Conditional | Value):
                raise InputError(
                    f"space entry {name!r} is {entry!r}: give Uniform(low, high), "
                    "Log(low, high), Int(low, high), a list of values or one plain number, text "
                    "or truth value"
                )
            if entry == "auto" and name not in ADAPTIVE:
                adapt = ", ".join(sorted(ADAPTIVE))
                raise InputError(f"{name}='auto': only {adapt} adapts, for all of a model")
            if isinstance(entry, Conditional):
                _check_conditions(name, entry, flat)
                entry = entry.range
            _check_domain(name, entry)
        self._entries: dict[str, Entry] = flat

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Space({', '.join(f'{name}={entry!r}' for name, entry in self.items())})"

    @property
    def varying(self) -> tuple[str, ...]:
        """Names of the entries that vary between trials, in order."""
        return tuple(n for n, entry in self.items() if isinstance(entry, Range | Conditional))

    @property
    def fixed(self) -> dict[str, Value]:
        """Entries that are the same in every trial."""
        return {n: e for n, e in self.items() if not isinstance(e, Range | Conditional)}

    def range(self, name: str) -> Range:
        """Return the range of a varying entry, ignoring conditions."""
        entry = self[name]
        if isinstance(entry, Conditional):
            return entry.range
        if not isinstance(entry, Range):
            raise TypeError(f"space entry {name!r} is fixed at {entry!r}")
        return entry

    def resolved(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Return the configuration, dropping entries whose conditions do not hold."""
        config: dict[str, Value] = {}
        for name, entry in self.items():
            if not isinstance(entry, Conditional) or entry.holds(config):
                config[name] = values[name]
        return config

    def needed(self, name: str) -> dict[str, Value]:
        """Return values of other entries that satisfy an entry's conditions."""
        entry, found = self[name], dict[str, Value]()
        if isinstance(entry, Conditional):
            for other, wanted in entry.conditions.items():
                found |= {**self.needed(other), other: wanted[0]}
        return found

    def at(self, units: Sequence[float]) -> dict[str, Value]:
        """Return the configuration at a point of the unit cube (one axis per varying entry)."""
        places = dict(zip(self.varying, units, strict=True))
        return self.resolved(self.fixed | {n: self.range(n).at(u) for n, u in places.items()})

    def units(self, config: Mapping[str, Value]) -> list[float]:
        """Return the position of a configuration in the unit cube; 0.5 for missing entries."""
        return [self.range(n).unit(config[n]) if n in config else 0.5 for n in self.varying]

    def weight(self, config: Mapping[str, Value]) -> float:
        """Measure regularization by the mean position over regularizing entries."""
        names = [name for name in self.varying if simplifies(name) and name in config]
        return sum(self.range(n).unit(config[n]) for n in names) / (len(names) or 1)

    def to_dict(self) -> dict[str, object]:
        """Return a JSON-serialisable dict."""
        return {
            name: entry.to_dict() if isinstance(entry, Range | Conditional) else entry
            for name, entry in self.items()
        }

    @classmethod
    def from_dict(cls, entries: Mapping[str, object]) -> Space:
        """Build from JSON or TOML: `{"lr": {"kind": "log", "low": 1e-4, "high": 0.1}}`."""
        return cls(**{name: _read(name, entry) for name, entry in entries.items()})

    @classmethod
    def from_toml(cls, path: str | Path) -> Space:
        """Read a TOML file with lines such as `lr = {kind = "log", low = 1e-4, high = 0.1}`."""
        try:
            entries = tomllib.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise InputError(f"cannot read the space {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, nested too deeply
            raise InputError(f"{path} is not TOML: {error}") from error
        entries = entries.get("space", entries)
        if not isinstance(entries, dict):
            raise InputError(f"{path}: space must be a table, received {entries!r}")
        return cls.from_dict(entries)


def _flattened(entries: Mapping[str, object]) -> Iterator[tuple[str, Any]]:
    """Yield one entry for each pattern of an entry."""
    for name, entry in entries.items():
        if not isinstance(entry, Mapping) or split_name(name)[0] not in KNOWN:
            yield name, entry
            continue
        for pattern, part in entry.items():
            yield (name if pattern == "*" else f"{name}[{pattern}]"), part


def _read(name: str, entry: Any) -> Entry:
    if not isinstance(entry, Mapping):
        return entry
    if not _RANGE.intersection(entry) and split_name(name)[0] in PATTERNED:
        return {pattern: _read(name, part) for pattern, part in entry.items()}  # type: ignore[return-value]
    if "when" in entry:
        found = _read(name, {k: v for k, v in entry.items() if k != "when"})
        if not isinstance(found, Range) or not isinstance(entry["when"], Mapping):
            raise InputError(
                f"space entry {name!r}: write when = {{NAME = VALUE}} beside a range, received "
                f"{entry['when']!r}"
            )
        return found.when(**entry["when"])
    kinds = {"uniform": Uniform, "log": Log, "int": Int, "choice": Choice}
    fields = dict(entry)
    if "kind" not in fields:
        raise InputError(
            f"space entry {name!r} has no kind, received {sorted(fields)}: write "
            'kind = "log", "uniform" or "int" with low and high, or kind = "choice" with values'
        )
    kind = fields.pop("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"space entry {name!r}: {unknown_name('kind', kind, kinds)}")
    try:
        return kinds[kind](**fields)
    except TypeError as error:
        wanted = "values" if kind == "choice" else "low and high"
        raise InputError(
            f"space entry {name!r}: {kind} takes {wanted}, received {sorted(fields)}"
        ) from error


def _check_conditions(name: str, entry: Conditional, entries: Mapping[str, object]) -> None:
    """Check that conditions refer to earlier entries and to their possible values."""
    before = list(entries)[: list(entries).index(name)]
    for other, wanted in entry.conditions.items():
        if other not in before:
            late = "stands after it" if other in entries else "is not in the space"
            raise InputError(
                f"space entry {name!r} depends on {other!r}, which {late}: give it before"
            )
        known = entries[other]
        known = known.range if isinstance(known, Conditional) else known
        choices = known.values if isinstance(known, Choice) else None
        if choices is not None and (lost := [v for v in wanted if v not in choices]):
            raise InputError(
                f"space entry {name!r} depends on {other}={lost[0]!r}, but {other} is one of "
                f"{', '.join(map(repr, choices))}"
            )


def _check_domain(name: str, entry: Range | Value) -> None:
    """Check the domain of an entry by its name: rates in [0, 1), others >= 0."""
    own, pattern = split_name(name)
    if pattern != "*" and own in KNOWN and (own not in PATTERNED or entry == "auto"):
        raise InputError(
            f"space entry {name!r}: {', '.join(sorted(PATTERNED))} may differ between parts of a "
            f"model, {own} is one number for all of it"
        )
    if own not in KNOWN or entry == "auto":
        return
    ends = entry.grid(2) if isinstance(entry, Range) else [entry]
    if own == "optimizer":
        for end in ends:
            if end not in OPTIMIZERS:
                raise InputError(f"space: {unknown_name('optimizer', end, OPTIMIZERS)}")
        return
    if own == "batch_size" and not all(type(end) is int and end > 0 for end in ends):
        raise InputError(
            f"space entry 'batch_size' holds {entry!r}: give whole numbers of rows, as in "
            "[32, 64] or Int(16, 128, log=True)"
        )
    for end in ends:
        if isinstance(end, (str, bool)) or not math.isfinite(end) or end < 0:
            raise InputError(f"space entry {name!r} holds {end!r}: give a finite number >= 0")
        if own in ("dropout", "label_smoothing") and end >= 1:
            raise InputError(f"space entry {name!r} holds {end!r}: a rate lies in [0, 1)")
        if own in ("lr", "max_norm", "clip_norm") and end == 0:
            raise InputError(f"space entry {name!r} holds 0: give a number above 0")
