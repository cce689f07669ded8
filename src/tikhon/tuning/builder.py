"""Call a user's model builder by parameter name with entries of a configuration."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.copying import FreshModels
from tikhon.errors import InputError, unknown_name
from tikhon.layers.edit import replace_dropout
from tikhon.layers.noise import NoiseLayer
from tikhon.options import split_name, training_fields
from tikhon.regularizer.audit import warn
from tikhon.tuning.space import KNOWN, Choice, Conditional, Space, known
from tikhon.tuning.trials import Config, Value

_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_VALUE = (inspect.Parameter.POSITIONAL_ONLY, *_KEYWORD)
# methods by which Keras Tuner builders draw values; Optuna's begin with suggest_
_SUGGESTING_METHODS = frozenset(
    {"Int", "Float", "Choice", "Boolean", "Fixed", "conditional_scope"}
)
_COMPARED_VALUES = 4  # values of a choice compared
CONFIG_NAMES = (
    "config",
    "params",
    "trial",
    "hp",
)  # parameters that receive the whole configuration


class Builder:
    """`build_model` as a function of the configuration.

    A parameter named like an entry of the space receives that entry. Another one, if it is the
    only one without a default or is called config, params, trial or hp, receives the whole
    configuration as a mapping. `**kwargs` receive the entries unknown to training. `space` has the
    entry names, `example` rows that initialise lazy layers. Torch's fixed dropout is replaced by
    layers with adjustable rates where the space varies dropout.

    >>> build = Builder(lambda width=8, **others: nn.Linear(width, **others), {"lr", "width"})
    >>> build({"lr": 0.1, "width": 4, "out_features": 2})
    Linear(in_features=4, out_features=2, bias=True)
    """

    def __init__(
        self,
        build_model: Callable[..., nn.Module],
        space: Mapping[str, object] | set[str],
        example: object = None,
    ):
        self.build_model, self._build = build_model, FreshModels(build_model, example)
        self.entries_read: set[str] = set()
        parameters = _parameters(build_model)
        named = [p for p in parameters if p.kind in _BY_VALUE and p.name not in CONFIG_NAMES]
        self.names = {p.name for p in named} & set(space)
        self.positional = [p for p in parameters if p.kind is p.POSITIONAL_ONLY]
        self.takes_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.config_parameter = self._find_config_parameter(parameters)
        positional = {self.config_parameter.name} if self.config_parameter is not None else set()
        self.required = [
            p.name
            for p in parameters
            if p.default is p.empty
            and p.kind in _BY_VALUE
            and p.name not in self.names | positional
        ]

    def _find_config_parameter(
        self, parameters: list[inspect.Parameter]
    ) -> inspect.Parameter | None:
        """Return the parameter that takes the whole configuration."""
        positional = [p for p in parameters if p.kind in (*_POSITIONAL, p.KEYWORD_ONLY)]
        for p in positional:
            if p.name in CONFIG_NAMES and p.name not in self.names:
                return p
        free = [p for p in positional if p.default is p.empty and p.name not in self.names]
        return free[0] if len(free) == 1 and free[0].kind in _POSITIONAL else None

    def __call__(self, config: Config) -> nn.Module:
        """Build the model of a configuration."""
        missing = [name for name in self.required if name not in config]
        if missing:
            raise InputError(
                f"build_model needs {', '.join(missing)}, which the space does not hold: add "
                "Choice, Int, Log or Uniform entries of these names, or give them defaults"
            )
        named: dict[str, object] = {n: config[n] for n in self.names if n in config}
        if self.takes_kwargs:
            others = {n: v for n, v in config.items() if not known(n) and n not in named}
            named |= others
        self.entries_read |= set(named)
        if self.config_parameter is not None:
            named[self.config_parameter.name] = _RecordingConfig(config, self.entries_read)
        try:
            model = self._build(*self._positional_arguments(named), **named)
        except Exception as error:
            error.add_note(f"while build_model was called for {dict(config)}")
            raise
        if any(split_name(name)[0] == "dropout" for name in config):
            _make_dropout_adjustable(model)
        return model

    def _positional_arguments(self, named: dict[str, object]) -> list[object]:
        """Remove positional arguments from `named`, up to the first missing one."""
        arguments = []
        for parameter in self.positional:
            if parameter.name not in named and parameter.default is parameter.empty:
                break
            arguments.append(named.pop(parameter.name, parameter.default))
        return arguments

    def check(self, space: Space, default: Config) -> None:
        """Raise `InputError` for an entry read by neither the builder nor the training.

        Builds the default configuration, and others as needed to see entries read only under some
        choices. Warns of an entry that is accepted but never changes the model. Entries that
        appear in conditions need no reader.
        """
        _build_seeded(self, default)
        conditional = (e for e in space.values() if isinstance(e, Conditional))
        deciding = {name for entry in conditional for name in entry.conditions}
        requested = {name for name in space if not known(name) and name not in deciding}
        for config in _sample_configs(space, default):
            if requested <= self.entries_read:
                break
            self(config)
        if unread := sorted(requested - self.entries_read):
            raise InputError(self._explain_unread(unread[0]))
        for name in sorted(requested & set(space.varying)):
            if not self._changes_model(space, default, name):
                warn(
                    f"tune: build_model accepts {name}, and builds the same model whatever it is: "
                    f"if nothing else reads it, the values of {name} that are reported mean "
                    "nothing"
                )

    def _changes_model(self, space: Space, default: Config, name: str) -> bool:
        """Return whether two values of an entry make visibly different models."""
        entry = space.range(name)
        values = entry.values if isinstance(entry, Choice) else entry.grid(2)
        values = list(dict.fromkeys(values))[:_COMPARED_VALUES]
        upper = {n: space.range(n).at(1.0) for n in space.varying}
        others = _sample_configs(space, space.resolved({**space.fixed, **upper}))
        for base in itertools.chain(_sample_configs(space, default), others):
            if name in base and len(values) > 1:
                models = [_build_seeded(self, {**base, name: value}) for value in values]
                if any(not _are_equal_models(models[0], other) for other in models[1:]):
                    return True
        return len(values) < 2

    def _explain_unread(self, name: str) -> str:
        reasons = {option: found.search for option, found, _ in training_fields()}
        if isinstance(reason := reasons.get(name), str):
            return f"a search does not vary {name!r}: {reason}"
        own = [p.name for p in _parameters(self.build_model) if p.kind in _KEYWORD]
        accepted = [parameter for parameter in own if parameter not in CONFIG_NAMES]
        found = unknown_name("space entry", name, [*KNOWN, *accepted])
        return (
            f"{found}. Neither the training nor build_model reads it: name a parameter of "
            f"build_model {name}, or read config[{name!r}] in it"
        )


def _parameters(build_model: Callable[..., object]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(build_model).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature: called without arguments
        return []


def _build_seeded(build: Builder, config: Config) -> nn.Module:
    """Build a model with fixed random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(config)


def _are_equal_models(first: nn.Module, second: nn.Module) -> bool:
    """Return whether two models agree in structure, tensors and attributes."""
    pairs = list(zip(first.modules(), second.modules()))
    if str(first) != str(second) or any(type(a) is not type(b) for a, b in pairs):
        return False
    attributes = (
        [{n: v for n, v in vars(module).items() if not n.startswith("_")} for module in pair]
        for pair in pairs
    )
    return _are_equal(first.state_dict(), second.state_dict()) and all(
        _are_equal(a, b) for a, b in attributes
    )


def _are_equal(first: object, second: object) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(
            _are_equal(v, second[k]) for k, v in first.items()
        )
    if isinstance(first, torch.Generator):
        return isinstance(second, torch.Generator)
    return type(first) is type(second) and bool(first == second)


def _make_dropout_adjustable(model: nn.Module) -> None:
    """Replace torch's dropout by layers with adjustable rates, if there are no others."""
    if not any(isinstance(module, NoiseLayer) for module in model.modules()):
        with contextlib.suppress(ValueError):  # none to replace: reported by the population
            replace_dropout(model)


def _sample_configs(space: Space, default: Config) -> Iterator[Config]:
    yield default
    full = {name: space.range(name).at(0.0) for name in space.varying} | dict(default)
    for name in space.varying:
        entry = space.range(name)
        if isinstance(entry, Choice):
            for value in entry.values:
                if value != default.get(name):
                    yield space.resolved({**space.fixed, **full, name: value})
        yield space.resolved({**space.fixed, **full, **space.needed(name)})


class _RecordingConfig(MutableMapping[str, Value]):
    """A private copy of a configuration that records which entries are read."""

    def __init__(self, config: Config, read: set[str]) -> None:
        self._config, self._read = dict(config), read

    def __getitem__(self, name: str) -> Value:
        if name in self._config:
            self._read.add(name)
        return self._config[name]

    def __setitem__(self, name: str, value: Value) -> None:
        self._config[name] = value

    def __delitem__(self, name: str) -> None:
        del self._config[name]

    def copy(self) -> _RecordingConfig:
        """Return a copy whose reads are recorded too."""
        return _RecordingConfig(self._config, self._read)

    def __getattr__(self, name: str) -> Any:  # attribute access, as config.width
        if name in _SUGGESTING_METHODS or name.startswith("suggest_"):
            raise InputError(
                f"build_model asks for {name}(...), but what it is given holds values, not "
                "ranges: give the ranges to tune, as in "
                "space=tk.Space(width=tk.Int(8, 64, log=True)), and read config['width'] here"
            )
        if name.startswith("_") or name not in self._config:
            raise AttributeError(f"the configuration has no {name}: {sorted(self._config)}")
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)

    def __repr__(self) -> str:
        return repr(self._config)
