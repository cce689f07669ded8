"""A frozen, serialisable description of all regularization of a training run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tikhon import notebook
from tikhon.errors import InputError, unknown_name
from tikhon.options import RecipeOptions
from tikhon.penalties import name_of, penalty_names
from tikhon.penalties.base import Penalty
from tikhon.regularizer.terms import Term, as_terms
from tikhon.runs.files import json_text, write_bytes
from tikhon.sparsity.thinning import Thinning
from tikhon.strengths import schedules
from tikhon.strengths.norm_bound import NormBound
from tikhon.strengths.sparsity import TargetSparsity
from tikhon.training.clipping import Clipping


@dataclass(frozen=True)
class Auto:
    """Placeholder for a strength that `fit` tunes during the run."""

    def __call__(self, step: int) -> float:
        """Raise: `fit` replaces this by a schedule."""
        raise InputError("strength 'auto' needs validation data: give `valid` to tikhon.fit")


@dataclass(frozen=True, eq=False)
class Recipe(RecipeOptions):
    """Penalties, noise, clipping, averaging and early stopping as one serialisable value.

    Args:
        penalties: what `regularize` accepts: a penalty, a `Term`, or a dict from patterns to them.
        dropout: rate in [0, 1) of every noise layer, or a dict from module patterns to rates;
            None leaves the model's own rates.
        label_smoothing: share in [0, 1) of the target spread evenly over the classes.
        confidence_penalty: weight >= 0 of the negative entropy of the predictions.
        r_drop: weight >= 0 of the distance between two passes with different dropout masks.
        mixup, cutmix: alpha >= 0 of the Beta distribution of mixing shares; 0 turns it off.
        input_noise: standard deviation >= 0 of Gaussian noise added to the inputs.
        learning_rates: a dict from patterns on parameter names to rates > 0 that replace lr, such
            as smaller ones for pretrained layers; or a text, "trunk.*=1e-5,head.*=1e-3". Unlike a
            penalty's, such a pattern also covers biases and scales; the last matching pattern
            wins.
        clip_norm, clip_value: largest gradient norm, largest absolute gradient entry; > 0.
        clip_adaptive: largest ratio of a unit's gradient norm to its weight norm; > 0.
        sparsify: final share of exact zeros: a number in (0, 1), a text such as "90%"
            or "50%,of=channels,multiple=8", a table, or a `Thinning`; see `tikhon.sparsify`.
        averaging: "ema" or "swa" of the weights; the model ends with the average. Averaging loses
            the exact zeros of a proximal step, but keeps those of `sparsify`.
        ema_decay: decay of the "ema" average, in [0, 1).
        early_stopping: epochs without improvement of the validation loss before training stops and
            the best state is restored; >= 1. An improvement by less than 1e-4 of the first
            validation loss does not count, as the loss of a solved task keeps falling slightly.

    Raises `InputError` for values out of range.

    >>> from tikhon import L1
    >>> recipe = Recipe({"fc1.weight": L1(1e-4)}, dropout=0.5)
    >>> Recipe.from_dict(recipe.to_dict()) == recipe
    True
    """

    def __post_init__(self) -> None:
        given = self.penalties
        if isinstance(given, tuple | list) and all(isinstance(i, tuple) for i in given):
            terms = tuple(given)  # (pattern, Term) pairs
        else:
            terms = tuple(as_terms(cast(Any, given))) if given else ()
        object.__setattr__(self, "penalties", terms)
        rates = self.dropout.values() if isinstance(self.dropout, Mapping) else [self.dropout]
        for rate in rates:
            _check_number("dropout", rate, below=1.0)
        for name in ("label_smoothing", "ema_decay"):
            _check_number(name, getattr(self, name), below=1.0)
        for name in ("confidence_penalty", "r_drop", "mixup", "cutmix", "input_noise"):
            _check_number(name, getattr(self, name))
        for name in ("clip_norm", "clip_value", "clip_adaptive"):
            _check_number(name, getattr(self, name), positive=True)
        object.__setattr__(self, "learning_rates", _parse_learning_rates(self.learning_rates))
        if self.averaging not in (None, "ema", "swa"):
            raise InputError(unknown_name("averaging", self.averaging, ("ema", "swa")))
        if self.mixup and self.cutmix:
            raise InputError("mixup and cutmix both mix the rows: choose one of them")
        _check_number("early_stopping", self.early_stopping, positive=True)
        if self.sparsify is not None:
            try:
                object.__setattr__(self, "sparsify", Thinning.read(self.sparsify))
            except (TypeError, ValueError) as error:
                raise InputError(str(error)) from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        entries = self.to_dict()
        penalties = [
            f"{p['penalty']} {p.get('strength', '')} on {p['pattern']}".replace("  ", " ")
            for p in entries.pop("penalties", [])
        ]
        return f"Recipe({', '.join([*penalties, *(f'{k}={v}' for k, v in entries.items())])})"

    def _repr_html_(self) -> str:
        entries = self.to_dict()
        rows = []
        for entry in entries.pop("penalties", []):
            row = entry.pop("pattern"), entry.pop("penalty"), entry.pop("strength", "")
            rows.append((*row, ", ".join(map(str, entry.values()))))
        lines = [f"{name.replace('_', ' ')}: {value}" for name, value in entries.items()]
        head = ("weights", "penalty", "strength", "more")
        return notebook.html_card(
            "Recipe", lines or ([] if rows else ["nothing is regularized"]), head, rows
        )

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def terms(self, auto: Callable[[], Any] | None = None) -> dict[object, list[Term]]:
        """Return the penalties for `regularize`, with "auto" strengths replaced by `auto()`."""
        terms: dict[object, list[Term]] = {}
        for pattern, term in self.penalties:
            if isinstance(term.strength, Auto) and auto is not None:
                term = dataclasses.replace(term, strength=auto())
            terms.setdefault(pattern, []).append(term)
        return terms

    @property
    def clipping(self) -> Clipping:
        """The gradient clipping of each step."""
        return Clipping(self.clip_value, self.clip_adaptive, self.clip_norm)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, only where they differ from the defaults."""
        values: dict[str, object] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name == "penalties":
                value = [_term_to_dict(pattern, term) for pattern, term in value]
            elif isinstance(value, Thinning):
                table = value.plain()
                value = table if len(table) > 1 else value.share
            elif isinstance(value, Mapping):
                value = dict(value)
            if value != item.default and value != []:
                values[item.name] = value
        return values

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Recipe:
        """Invert `to_dict`. Raises `InputError` for unknown keys, naming the closest."""
        if not isinstance(plain, Mapping):
            raise InputError(f"a recipe is a table of settings, received {plain!r}")
        known = {item.name for item in dataclasses.fields(cls)}
        for key in plain:
            if key not in known:
                raise InputError(unknown_name("recipe key", key, known))
        values = dict(plain)
        entries = values.pop("penalties", [])
        if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries):
            raise InputError(f"recipe: penalties must be a list of tables, received {entries!r}")
        try:
            return cls(tuple(_term_from_dict(entry) for entry in entries), **values)
        except (TypeError, ValueError) as error:
            raise InputError(f"recipe: {error}") from error

    def to_toml(self) -> str:
        """Return the recipe as TOML.

        >>> print(Recipe(dropout=0.5).to_toml())
        dropout = 0.5
        <BLANKLINE>
        """
        import tomli_w

        return tomli_w.dumps(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write the recipe to a .toml or .json file."""
        text = self.to_toml() if Path(path).suffix == ".toml" else json_text(self.to_dict()) + "\n"
        write_bytes(Path(path), text.encode())

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a .toml or .json file, or from a run folder.

        Raises `InputError` naming the file and the line or key.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            text = path.read_text(encoding="utf-8")
            plain = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except OSError as error:
            raise InputError(f"recipe {path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"recipe {path}: {error}") from error
        try:
            return cls.from_dict(plain["recipe"] if path.name == "config.json" else plain)
        except (InputError, KeyError, TypeError) as error:
            raise InputError(f"{path}: {error}") from error


def _term_to_dict(pattern: object, term: Term) -> dict[str, object]:
    if not isinstance(pattern, str):
        raise InputError(f"a recipe can only be saved with text patterns, received {pattern!r}")
    strength = term.penalty.strength if term.strength is None else term.strength
    entry: dict[str, object] = {
        "pattern": pattern,
        "penalty": name_of(type(term.penalty)),
    }
    if not term.penalty.constraint:
        entry["strength"] = _plain_strength(strength)
    for item in _penalty_fields(type(term.penalty)):
        value = getattr(term.penalty, item.name)
        if value is not item.default and value != item.default:
            entry[item.name] = value.tolist() if isinstance(value, Tensor) else value
    if term.rows is not None:
        entry["rows"] = term.rows
    if not term.penalty.constraint:
        entry["how"] = term.how or "objective"  # strengths of different modes differ in unit
    return entry


def _plain_strength(strength: object) -> object:
    if isinstance(strength, Auto):
        return "auto"
    if isinstance(strength, Tensor) and strength.ndim == 0:
        return strength.item()
    if isinstance(strength, int | float):
        return strength
    kinds = _strength_classes()
    if type(strength).__name__ in kinds and dataclasses.is_dataclass(strength):
        values = {
            f.name: getattr(strength, f.name)
            for f in dataclasses.fields(strength)
            if getattr(strength, f.name) != f.default
        }
        return {"kind": type(strength).__name__, **values}
    raise InputError(f"a recipe can only be saved with strengths by value, received {strength!r}")


def _term_from_dict(entry: Mapping[str, Any]) -> tuple[str, Term]:
    values = dict(entry)
    name = values.pop("penalty", None)
    kinds = penalty_names()
    if name not in kinds:
        raise InputError(unknown_name("penalty", name, kinds))
    kind, pattern = kinds[name], values.pop("pattern", "*")
    rows, how = values.pop("rows", None), values.pop("how", None)
    known = {item.name for item in _penalty_fields(kind)} | {"pattern", "rows", "how"}
    if not kind.constraint:
        known.add("strength")
    for key in values:
        if key not in known:
            raise InputError(unknown_name(f"setting of {name}", key, known))
    strength = values.pop("strength", 1.0)
    values = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in values.items()}
    if kind.constraint:
        return pattern, Term(kind(**values), rows, how)
    if isinstance(strength, int | float):
        return pattern, Term(kind(strength=float(strength), **values), rows, how)
    return pattern, Term(kind(**values), rows, how, _parse_strength(strength))


def _penalty_fields(kind: type[Penalty]) -> list[Any]:
    """Fields of a penalty other than its strength."""
    return [item for item in dataclasses.fields(kind) if item.init and item.name != "strength"]


def _parse_strength(plain: object) -> Any:
    if plain == "auto":
        return Auto()
    if isinstance(plain, Mapping) and plain.get("kind") in (kinds := _strength_classes()):
        return kinds[plain["kind"]](**{k: v for k, v in plain.items() if k != "kind"})
    if isinstance(plain, Mapping):
        raise InputError(unknown_name("kind of strength", plain.get("kind"), _strength_classes()))
    raise InputError(f'strength must be a number >= 0 or "auto", received {plain!r}')


def _parse_learning_rates(given: object) -> dict[str, float] | None:
    """Parse learning rates by pattern from a table or text."""
    rates = given
    if isinstance(given, str):
        parts = [part.rpartition("=") for part in given.split(",")]
        with contextlib.suppress(ValueError):
            rates = {pattern.strip(): float(rate) for pattern, _, rate in parts}
    if rates is None or rates == {}:
        return None
    if not isinstance(rates, Mapping) or not all(isinstance(k, str) and k for k in rates):
        raise InputError(
            "learning_rates go from patterns to numbers, as {'trunk.*': 1e-5, 'head.*': 1e-3} or "
            f"'trunk.*=1e-5,head.*=1e-3', received {given!r}; one for all of the model is lr"
        )
    for pattern, rate in rates.items():
        _check_number(f"the learning rate of {pattern!r}", rate, positive=True)
    return dict(rates)


def _strength_classes() -> dict[str, type]:
    """Schedules and controllers by class name; a fixed list, so files cannot import others."""
    classes = (
        *(schedules.Linear, schedules.Cosine, schedules.WarmUp, schedules.Cyclic),
        *(schedules.Recorded, TargetSparsity, NormBound),
    )
    return {item.__name__: item for item in classes}


def _check_number(
    name: str, value: Any, *, below: float = math.inf, positive: bool = False
) -> None:
    """Raise `InputError` unless None or a number in [0, below), or > 0 if `positive`."""
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 <= value < below) or (positive and value == 0):
        allowed = (
            f"in [0, {below:g})" if below < math.inf else "> 0" if positive else "finite and >= 0"
        )
        raise InputError(f"{name} must be {allowed}, received {value!r}")
