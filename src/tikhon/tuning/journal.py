"""The record of a search: what is searched on which data, the plan, the outcomes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tikhon.runs.journal import Journal
from tikhon.tuning.trials import History, Outcome


class SearchJournal:
    """The plan and the outcomes of a search, and the seals of the files that hold their states.

    A batch of outcomes is one event: after a crash it is there as a whole, or trained again.
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
        """Write what was decided by measuring, so that a resumed run decides the same."""
        self.plan = dict(plan)
        self.record.append({"plan": self.plan})

    def extend(self, outcomes: Iterable[Outcome], seals: Mapping[str, str] = {}) -> None:
        """Append a batch of outcomes, and the SHA-256 of new files of states."""
        event = {"outcomes": [outcome.to_dict() for outcome in outcomes], "states": dict(seals)}
        self.record.append(event)
        self._take(event)

    def _take(self, event: Mapping[str, Any]) -> None:
        if "plan" in event:
            self.plan = dict(event["plan"])
        self.seals |= event.get("states", {})
        found = [Outcome.from_dict(row) for row in event.get("outcomes", ())]
        known = self.history.ids  # a journal that was copied onto its own end says all twice
        self.history = self.history.extended(o for o in found if o.trial.id not in known)
