"""Bind terms to the current parameters of a model, and rebind when they change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import is_

from torch import nn

from tikhon.regularizer.plan import Location
from tikhon.regularizer.rounding import RoundingErrors
from tikhon.regularizer.targets import Entry, entries_of, shape_of
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
    """

    model: nn.Module
    terms: Terms
    how: How
    entries: tuple[Entry, ...]
    bindings: tuple[Binding, ...]
    rounding: RoundingErrors

    @classmethod
    def of(cls, model: nn.Module, terms: Terms, how: How) -> BoundTerms:
        """Bind terms to the parameters of a model; ValueError for a pattern without match."""
        entries = entries_of(model)
        bindings = bind(model, entries, terms, how)
        return cls(model, terms, how, tuple(entries), tuple(bindings), bindings[0].rounding)

    @property
    def places(self) -> list[Location]:
        """Return where the model holds the parameters of the terms."""
        bound = {id(param) for binding in self.bindings for param in binding.target.params}
        return [
            Location(
                owner._parameters,
                name.rpartition(".")[2],
                entry.param,
                entry.param.dtype,
                entry.shape,
            )
            for entry in self.entries
            if id(entry.param) in bound
            for name, owner in zip(entry.names, entry.owners)
        ]

    def is_current(self) -> bool:
        """Return whether the model has the identical parameters, of the same names and shapes."""
        now = entries_of(self.model)
        return len(now) == len(self.entries) and all(
            new.param is old.param and new.names == old.names and new.shape == old.shape
            for new, old in zip(now, self.entries)
        )

    def rebind(self, on_missing: Callable[[str], None]) -> BoundTerms:
        """Rebind the terms to the current parameters of the model.

        Unchanged parameters keep their state, and strengths continue. `on_missing` is called for
        patterns without a match.
        """
        entries = entries_of(self.model)
        reshaped = {e.param for e in self.entries if e.shape != shape_of(e.param)}
        known = {binding.name: binding for binding in self.bindings}
        live_strengths = {binding.live.name: binding.live for binding in self.bindings}
        bindings: list[Binding] = []
        for binding in bind(self.model, entries, self.terms, self.how, on_missing=on_missing):
            before = known.get(binding.name)
            if before is not None:
                params = binding.target.params
                same = len(params) == len(before.target.params) and all(
                    map(is_, params, before.target.params)
                )
                if same and reshaped.isdisjoint(params):
                    bindings.append(before)
                    continue
                for name in before.target.names:
                    self.rounding.errors.pop(name, None)
                binding.live = before.live
                binding.peaks = dict(zip(params, before.peaks.values()))
            binding.live = live_strengths.get(binding.live.name, binding.live)
            binding.rounding = self.rounding
            bindings.append(binding)
        fresh = replace(self, entries=tuple(entries), bindings=tuple(bindings))
        known_shapes, shapes = self._shapes(), fresh._shapes()
        for live in {id(binding.live): binding.live for binding in bindings}.values():
            if live.name in known_shapes and known_shapes[live.name] != shapes[live.name]:
                live.memory.clear()  # a controller's, of weights whose shapes changed
        return fresh

    def _shapes(self) -> dict[str, dict[str, object]]:
        """Return the shapes of each strength's parameters, by binding."""
        shapes = {id(entry.param): entry.shape for entry in self.entries}
        by_strength: dict[str, dict[str, object]] = {}
        for binding in self.bindings:
            shapes_of_terms = by_strength.setdefault(binding.live.name, {})
            shapes_of_terms[binding.name] = [shapes[id(p)] for p in binding.target.params]
        return by_strength
