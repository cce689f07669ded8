"""Searches beyond one process: Optuna storages with a killed worker, a Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from tikhon.errors import InputError
from tikhon.models.mlp import MLP
from tikhon.tuning.space import Choice, Log, Space, Uniform
from tikhon.tuning.trials import History, Outcome
from tikhon.tuning.tune import tune

optuna = pytest.importorskip("optuna")

from tikhon.integrations.optuna import OptunaSearch, SharedSearch, shared_search  # noqa: E402

SPACE = Space(dropout=Uniform(0, 0.5), lr=Log(1e-3, 1e-1), mixup=Choice([0.0, 0.2]), clip_norm=1.0)


def data(rows=120):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=generator)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def pretend(trials):
    return [Outcome(t, (t.config["dropout"] - 0.2) ** 2 + t.config["lr"]) for t in trials]


def run(search, history=None):
    history = History() if history is None else history
    while trials := search.next(history):
        history = history.extended(pretend(trials))
    return history


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_an_optuna_search_is_a_pure_function_of_the_history(sampler):
    search = OptunaSearch(SPACE, count=20, batch=6, sampler=sampler, budget=3)
    whole = run(search)
    assert len(whole) == 20 and len(whole.ids) == 20
    assert all(o.trial.config["clip_norm"] == 1.0 for o in whole)
    resumed = run(search, History(whole[:9]))
    assert [o.trial for o in resumed] == [o.trial for o in whole]


def test_a_mirrored_study_holds_every_outcome(tmp_path):
    storage = f"journal:{tmp_path / 'study.log'}"
    history = run(OptunaSearch(SPACE, count=8, batch=4, storage=storage))
    from tikhon.integrations.optuna import storage_of

    study = optuna.load_study(study_name="tikhon", storage=storage_of(storage))
    assert [t.value for t in study.trials] == [o.score for o in history]


def test_two_searches_on_one_storage_share_the_trials(tmp_path):
    given = {"storage": f"sqlite:///{tmp_path / 'study.db'}", "count": 10, "batch": 3}
    a, b = SharedSearch(SPACE, **given), SharedSearch(SPACE, **given)
    mine, theirs = a.next(History()), b.next(History())
    assert not {t.id for t in mine} & {t.id for t in theirs}
    first, second = History(pretend(mine)), History(pretend(theirs))
    first = first.extended(pretend(a.next(first)))
    second = second.extended(pretend(b.next(second)))
    a._tell(a._study(), first)  # next would wait for the other's last trials
    assert b.next(second) == [] == a.next(first)
    assert len(a.collect(first)) == len(b.collect(second)) == 10


def test_the_trials_of_a_silent_process_are_given_to_another_once(tmp_path):
    given = {"storage": f"journal:{tmp_path / 'study.log'}", "count": 6, "batch": 3, "grace": 0.6}
    dead, alive = SharedSearch(SPACE, **given), SharedSearch(SPACE, **given)
    lost = dead.next(History())
    dead.open.clear()  # its heart stops
    history = run(alive)
    study = alive.cache["study"]
    retried = [t.user_attrs["retried"] for t in study.trials if "retried" in t.user_attrs]
    assert sorted(retried) == [t.id for t in lost]
    done = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert len(done) == len(history) == 6
    wanted = [{k: v for k, v in t.config.items() if k != "clip_norm"} for t in lost]
    assert all(w in [t.params for t in done] for w in wanted)


def test_a_shared_search_needs_a_budget_in_runs_and_one_space(tmp_path):
    storage = f"journal:{tmp_path / 'study.log'}"
    with pytest.raises(InputError, match="budget in runs"):
        tune(lambda: MLP([6, 8, 2]), data(), space=SPACE, budget="60s", epochs=3, folds=0,
             search=shared_search(storage))  # fmt: skip
    SharedSearch(SPACE, storage=storage).next(History())
    with pytest.raises(InputError, match="another space"):
        SharedSearch(Space(lr=Log(0.1, 1)), storage=storage).next(History())


WORKER = """
    import sys, time, torch
    sys.path.insert(0, {tests!r})
    from test_distributed import SPACE, data, MLP
    from tikhon.tuning.tune import tune
    from tikhon.integrations.optuna import shared_search
    torch.set_num_threads(1)
    class Done(Exception): pass
    def on_event(event):
        if event["event"] == "epoch":
            time.sleep({pause})
            print("epoch", flush=True)
        if event["event"] == "searched":
            print("ids", [o.trial.id for o in event["history"]], flush=True)
    result = tune(lambda: MLP([6, 8, 2]), data(), space=SPACE, budget="12runs", epochs=4, folds=0,
                  search=shared_search({storage!r}, grace=3.0), on_event=on_event)
    import json
    print(json.dumps([len(result.history), result.audit.failed]), flush=True)
"""


@pytest.mark.slow
def test_a_killed_worker_gives_its_trials_back_to_the_other(tmp_path):
    storage = f"journal:{tmp_path / 'study.log'}"

    def start(pause):
        code = textwrap.dedent(WORKER).format(
            tests=os.path.dirname(__file__), storage=storage, pause=pause
        )
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    victim = start(pause=5.0)
    assert victim.stdout.readline() == "epoch\n"
    victim.send_signal(signal.SIGKILL)
    victim.communicate()  # waits, and closes the pipe
    survivor = start(pause=0.0)
    out, _ = survivor.communicate(timeout=240)
    assert survivor.returncode == 0
    from tikhon.integrations.optuna import storage_of

    study = optuna.load_study(study_name="tikhon", storage=storage_of(storage))
    done = [t for t in study.trials if t.state.name == "COMPLETE"]
    retried = [t.user_attrs["retried"] for t in study.trials if "retried" in t.user_attrs]
    assert len(done) == 12
    assert retried and len(set(retried)) == len(retried)
    assert len({json.dumps(t.params, sort_keys=True) for t in done}) == 12
    assert json.loads(out.splitlines()[-1]) == [13, 0]  # with the default


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(600)
def test_a_ray_cluster_of_two_nodes_finds_what_one_process_finds():
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from tikhon.integrations.ray import RayRunner

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        assert ray.cluster_resources()["CPU"] == 2

        def search(runner):
            return tune(lambda: MLP([6, 8, 2]), data(), space=SPACE, budget="6runs", epochs=8,
                        folds=0, **runner)  # fmt: skip

        here = search({})
        there = search({"runner": RayRunner.factory(cluster.address)})
        assert [o.trial for o in there.history] == [o.trial for o in here.history]
        for a, b in zip(there.history, here.history):
            assert a.score == pytest.approx(b.score, abs=1e-5)
    finally:
        ray.shutdown()
        cluster.shutdown()
        time.sleep(1)
