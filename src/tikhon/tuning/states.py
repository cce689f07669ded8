"""The weights and optimizer states of trials on disk, so that a killed search continues."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from tikhon.runs.files import write_tensors
from tikhon.tuning.trials import History, Outcome

State = dict[str, Tensor]


class StateStore:
    """One safetensors file a batch of outcomes; files that no later trial needs are removed."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = None if folder is None else folder / "states"

    def save(self, states: Mapping[int, State], outcomes: Sequence[Outcome]) -> None:
        """Write the states of these outcomes before the journal names them."""
        if self.folder is None or not outcomes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            json.dumps([o.trial.id, name]): value
            for o in outcomes
            for name, value in states.get(o.trial.id, {}).items()
        }
        if tensors:
            write_tensors(self.folder / f"from-{outcomes[0].trial.id}.safetensors", tensors)
        self._prune(states, outcomes)

    def load(self, history: History) -> dict[int, State]:
        """The states of the journal's outcomes."""
        if self.folder is None or not self.folder.is_dir():
            return {}
        from safetensors.torch import load_file

        known = history.ids
        found: dict[int, State] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            for key, value in load_file(path).items():
                id, name = json.loads(key)
                if id in known:
                    found.setdefault(id, {})[name] = value
        return found

    def _prune(self, states: Mapping[int, State], outcomes: Sequence[Outcome]) -> None:
        """Remove files all of whose trials have left memory."""
        from safetensors import safe_open

        current = f"from-{outcomes[0].trial.id}.safetensors"
        for path in self.folder.glob("*.safetensors") if self.folder else ():
            if path.name == current:
                continue
            with safe_open(path, framework="pt") as file:
                ids = {json.loads(key)[0] for key in file.keys()}
            if not ids & set(states):
                with suppress(OSError):
                    path.unlink()
