"""A user's builder of models, called by name with what of a configuration it accepts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from tikhon.errors import InputError, unknown
from tikhon.options import training_fields
from tikhon.tuning.space import KNOWN, Choice, Space
from tikhon.tuning.trials import Value

Config = Mapping[str, Value]
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_PLACED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
WHOLE = ("config", "params", "trial", "hp")  # names under which a configuration is passed whole


class Builder:
    """`build_model` as a function of the configuration.

    A parameter named as an entry of the space receives that entry. One that no entry is named
    after, if it is the only one without a default or is called config, params, trial or hp,
    receives the whole configuration, a mapping. `**kwargs` receive the entries that only a builder
    can know. `space` are the names that there are.

    >>> build = Builder(lambda width=8, **others: (width, others), {"lr", "width", "depth"})
    >>> build({"lr": 0.1, "width": 4, "depth": 2})
    (4, {'depth': 2})
    """

    def __init__(self, build_model: Callable[..., nn.Module], space: Mapping[str, Any] | set[str]):
        if not callable(build_model):
            raise InputError(
                f"build_model must be a function or a class, received {build_model!r}"
            )
        self.build_model = build_model
        self.read: set[str] = set()
        parameters = _parameters(build_model)
        named = [p for p in parameters if p.kind in _NAMED and p.name not in WHOLE]
        self.names = {p.name for p in named} & set(space)
        self.rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.whole = self._whole(parameters)
        placed = {self.whole.name} if self.whole is not None else set()
        self.needed = [
            p.name
            for p in parameters
            if p.default is p.empty
            and p.kind in (*_NAMED, p.POSITIONAL_ONLY)
            and p.name not in self.names | placed
        ]

    def _whole(self, parameters: list[inspect.Parameter]) -> inspect.Parameter | None:
        """The parameter that takes the configuration as one mapping."""
        placed = [p for p in parameters if p.kind in (*_PLACED, p.KEYWORD_ONLY)]
        for p in placed:
            if p.name in WHOLE and p.name not in self.names:
                return p
        free = [p for p in placed if p.default is p.empty and p.name not in self.names]
        return free[0] if len(free) == 1 and free[0].kind in _PLACED else None

    def __call__(self, config: Config) -> nn.Module:
        """The model of a configuration."""
        missing = [name for name in self.needed if name not in config]
        if missing:
            raise InputError(
                f"build_model needs {', '.join(missing)}, which the space does not hold: add "
                "Choice, Int, Log or Uniform entries of these names, or give them defaults"
            )
        named = {name: config[name] for name in self.names if name in config}
        if self.rest:
            others = {n: v for n, v in config.items() if n not in KNOWN and n not in named}
            named |= others
        self.read |= set(named)
        if self.whole is None:
            return self.build_model(**named)
        whole = _Watched(config, self.read)
        if self.whole.kind is self.whole.KEYWORD_ONLY:
            return self.build_model(**{self.whole.name: whole}, **named)
        return self.build_model(whole, **named)

    def check(self, space: Space, default: Config) -> None:
        """Raise `InputError` for an entry that neither the builder nor the training reads.

        The model of the default configuration is built, and as many others as show which entries
        are read under some choices alone.
        """
        wanted = {name for name in space if name not in KNOWN}
        for config in _several(space, default):
            if wanted <= self.read:
                return
            self(config)
        lost = sorted(wanted - self.read)
        if lost:
            raise InputError(self._lost(lost[0]))

    def _lost(self, name: str) -> str:
        told = {option: found.search for option, found, _ in training_fields()}
        if isinstance(why := told.get(name), str):
            return f"a search does not vary {name!r}: {why}"
        own = [p.name for p in _parameters(self.build_model) if p.kind in _NAMED]
        accepted = [parameter for parameter in own if parameter not in WHOLE]
        found = unknown("space entry", name, [*KNOWN, *accepted])
        return (
            f"{found}. Neither the training nor build_model reads it: name a parameter of "
            f"build_model {name}, or read config[{name!r}] in it"
        )


def _parameters(build_model: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(build_model).parameters.values())
    except (TypeError, ValueError):  # some builtins have none: called without arguments
        return []


def _several(space: Space, default: Config) -> Iterator[Config]:
    yield default
    full = {name: space.range(name).at(0.0) for name in space.varying} | dict(default)
    for name in space.varying:
        entry = space.range(name)
        if isinstance(entry, Choice):
            for value in entry.values:
                if value != default.get(name):
                    yield space.resolved({**space.fixed, **full, name: value})
        yield space.resolved({**space.fixed, **full, **space.needed(name)})


class _Watched(Mapping[str, Value]):
    """A configuration that remembers which of its entries were read."""

    def __init__(self, config: Config, read: set[str]) -> None:
        self._config, self._read = dict(config), read

    def __getitem__(self, name: str) -> Value:
        if name in self._config:
            self._read.add(name)
        return self._config[name]

    def __getattr__(self, name: str) -> Any:  # config.width, as of a namespace
        if name.startswith("_") or name not in self._config:
            raise AttributeError(name)
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)

    def __repr__(self) -> str:
        return repr(self._config)
