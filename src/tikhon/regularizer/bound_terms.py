"""Bind terms to the current parameters of a model, and rebind when they change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from tikhon.regularizer.plan import Location
from tikhon.regularizer.rounding import RoundingErrors
from tikhon.regularizer.targets import Entry, entries_of, is_lazy
from tikhon.regularizer.terms import Binding, How, Terms, bind


@dataclass(frozen=True, eq=False)
class BoundTerms:
    """Every term on every parameter that it matches.

    Attributes:
        model: the model.
        terms: the argument of `regularize`.
        how: the default mode of terms.
        entries: the parameters of the model.
        bindings: the terms on them.
        rounding: rounding errors of 16-bit weights.
        lazy: whether a parameter had no shape yet.
    """

    model: nn.Module
    terms: Terms
    how: How
    entries: tuple[Entry, ...]
    bindings: tuple[Binding, ...]
    rounding: RoundingErrors
    lazy: bool

    @classmethod
    def of(cls, model: nn.Module, terms: Terms, how: How) -> BoundTerms:
        """Bind terms to the parameters of a model; ValueError for a pattern without match."""
        seen = entries_of(model)
        return cls._on(model, terms, how, seen, bind(model, seen, terms, how))

    @classmethod
    def _on(
        cls, model: nn.Module, terms: Terms, how: How, seen: list[Entry], found: list[Binding]
    ) -> BoundTerms:
        rounding = found[0].rounding if found else RoundingErrors()
        lazy = any(is_lazy(entry.param) for entry in seen)
        return cls(model, terms, how, tuple(seen), tuple(found), rounding, lazy)

    @property
    def places(self) -> list[Location]:
        """Return where the model holds the parameters of the terms."""
        bound = {id(param) for binding in self.bindings for param in binding.target.params}
        return [
            Location(owner._parameters, name.rpartition(".")[2], entry.param, entry.param.dtype)
            for entry in self.entries
            if id(entry.param) in bound
            for name, owner in zip(entry.names, entry.owners)
        ]

    def is_current(self) -> bool:
        """Return whether the model has the identical parameters under the same names."""
        now = entries_of(self.model)
        if self.lazy and not any(is_lazy(entry.param) for entry in now):
            return False
        return len(now) == len(self.entries) and all(
            new.param is old.param and new.names == old.names
            for new, old in zip(now, self.entries)
        )

    def rebind(self, on_missing: Callable[[str], None]) -> BoundTerms:
        """Rebind the terms to the current parameters of the model.

        Unchanged parameters keep their state, and strengths continue. `on_missing` is called for
        patterns without a match.
        """
        seen = entries_of(self.model)
        known = {binding.name: binding for binding in self.bindings}
        live_strengths = {binding.live.name: binding.live for binding in self.bindings}
        found: list[Binding] = []
        for binding in bind(self.model, seen, self.terms, self.how, on_missing=on_missing):
            before = known.get(binding.name)
            if before is not None and not self.lazy and _has_same_params(before, binding):
                found.append(before)
                continue
            if before is not None:
                for name in before.target.names:
                    self.rounding.errors.pop(name, None)
                binding.live = before.live
            binding.live = live_strengths.get(binding.live.name, binding.live)
            binding.rounding = self.rounding
            found.append(binding)
        _clear_memory_of_reshaped(self.bindings, found)
        fresh = self._on(self.model, self.terms, self.how, seen, found)
        return fresh if found else BoundTerms(**{**vars(fresh), "rounding": self.rounding})


def _has_same_params(one: Binding, other: Binding) -> bool:
    ours, theirs = one.target.params, other.target.params
    return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs))


def _clear_memory_of_reshaped(before: Sequence[Binding], now: Sequence[Binding]) -> None:
    """Clear controller memory of weights whose shapes changed."""
    known, shapes = _shapes(before), _shapes(now)
    for live in {id(binding.live): binding.live for binding in now}.values():
        if live.name in known and known[live.name] != shapes[live.name]:
            live.memory.clear()


def _shapes(bindings: Sequence[Binding]) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    for binding in bindings:
        shapes = tuple(() if is_lazy(p) else tuple(p.shape) for p in binding.target.params)
        found.setdefault(binding.live.name, {})[binding.name] = shapes
    return found
