"""The journal of a search: space and data, plan, outcomes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tikhon.runs.journal import Journal
from tikhon.tuning.trials import History, Outcome


class SearchJournal:
    """Plan and outcomes of a search, with checksums of its state files.

    A batch of outcomes is one event: after a crash it is either complete or trained again.
    """

    def __init__(self, path: str | Path, header: Mapping[str, object], *, resume: bool) -> None:
        self.record = Journal(path, header, resume=resume)
        self.plan: dict[str, Any] | None = None
        self.seals: dict[str, str] = {}
        self.history = History()
        try:
            for event in self.record.events:
                self._take(event)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self.record.malformed(error) from error

    def record_plan(self, plan: Mapping[str, object]) -> None:
        """Store measured decisions, so that a resumed run repeats them."""
        self.plan = dict(plan)
        self.record.append({"plan": self.plan})

    def extend(self, outcomes: Iterable[Outcome], seals: Mapping[str, str] = {}) -> None:
        """Append a batch of outcomes, and the SHA-256 of new state files."""
        event = {"outcomes": [outcome.to_dict() for outcome in outcomes], "states": dict(seals)}
        self.record.append(event)
        self._take(event)

    def _take(self, event: Mapping[str, Any]) -> None:
        if "plan" in event:
            self.plan = dict(event["plan"])
        self.seals |= event.get("states", {})
        found = [Outcome.from_dict(row) for row in event.get("outcomes", ())]
        known = self.history.ids  # a journal appended to itself has duplicates
        self.history = self.history.extended(o for o in found if o.trial.id not in known)
