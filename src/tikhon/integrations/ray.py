"""Train populations on a Ray cluster, one task for each chunk of trials.

Needs `pip install tikhon[ray]`. Ray places tasks on the cluster's CPUs and GPUs and reruns
those of failed nodes; states of parents are sent with the task.
"""

# named like the package it imports, which misleads the type checker:
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tikhon.runs.interrupt import Stopped
from tikhon.tuning.runners import PopulationRunner, SearchJob, State
from tikhon.tuning.trials import Outcome, Trial

try:
    import ray
except ImportError as error:
    raise ImportError("this runner needs Ray: pip install tikhon[ray]") from error

RETRIES = 3


@dataclass(eq=False)
class RayRunner(PopulationRunner):
    """Train every chunk as its own task; `address` is that of a cluster, "auto" or "local"."""

    address: str = "local"
    cpus: float = 1.0
    gpus: float = 0.0

    @classmethod
    def factory(
        cls, address: str = "local", *, cpus: float = 1.0, gpus: float = 0.0
    ) -> Callable[[SearchJob, int], RayRunner]:
        """Return a `runner` for `tune`."""
        return lambda job, chunk: cls(job, chunk, address=address, cpus=cpus, gpus=gpus)

    def run(self, trials: Sequence[Trial]) -> list[Outcome]:
        """Return outcomes in the order of the trials."""
        self._connect()
        train = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=RETRIES)(_train)
        job = ray.put(self.job)
        size = max(1, self.chunk // self.job.folds)
        parts = [trials[i : i + size] for i in range(0, len(trials), size)]
        waiting = [train.remote(job, self.chunk, part, self._parents(part)) for part in parts]
        outcomes: dict[int, Outcome] = {}
        while waiting:
            done, waiting = ray.wait(waiting, timeout=0.5)
            for found, states in ray.get(done):
                outcomes |= {outcome.trial.id: outcome for outcome in found}
                self.states.update(states)
                event = {"epoch": found[0].trial.budget, "budget": found[0].trial.budget}
                self.progress({**event, "members": len(found)})
            if self.stop():
                for task in waiting:
                    ray.cancel(task)
                raise Stopped
        return [outcomes[trial.id] for trial in trials]

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        options: dict[str, object] = {"log_to_driver": False, "configure_logging": False}
        if self.address == "local":
            ray.init(include_dashboard=False, **options)
        else:
            ray.init(address=self.address, **options)

    def _parents(self, trials: Sequence[Trial]) -> dict[int, State]:
        wanted = {trial.parent for trial in trials if trial.parent is not None}
        return {id: self.states[id] for id in wanted if id in self.states}


def _train(
    job: SearchJob, chunk: int, trials: Sequence[Trial], parents: dict[int, State]
) -> tuple[list[Outcome], dict[int, State]]:
    import torch

    torch.set_num_threads(1)
    runner = PopulationRunner(job, chunk, states=dict(parents))
    outcomes = runner.run(trials)
    return outcomes, {t.id: runner.states[t.id] for t in trials if t.id in runner.states}
