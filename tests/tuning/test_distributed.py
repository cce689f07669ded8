"""Searches beyond one process: Optuna storages with a killed worker, a Ray cluster."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch

from tikhon.errors import InputError, StorageError
from tikhon.models.mlp import MLP
from tikhon.tuning.space import Choice, Log, Space, Uniform
from tikhon.tuning.trials import History, Outcome
from tikhon.tuning.tune import tune

optuna = pytest.importorskip("optuna")

from tikhon.integrations.optuna import (  # noqa: E402
    SharedSearch,
    shared_search,
    storage_of,
)

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


def test_two_searches_on_one_storage_share_the_trials(tmp_path):
    given = {"storage": f"sqlite:///{tmp_path / 'study.db'}", "count": 10, "batch": 3}
    a, b = SharedSearch(SPACE, **given), SharedSearch(SPACE, **given)
    mine, theirs = a.next(History()), b.next(History())
    assert not {t.id for t in mine} & {t.id for t in theirs}
    first, second = History(pretend(mine)), History(pretend(theirs))
    first = first.extended(pretend(a.next(first)))
    second = second.extended(pretend(b.next(second)))
    a._report_outcomes(a._study(), first)  # next would wait for the other's last trials
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


def test_a_trial_that_two_processes_take_over_at_once_is_trained_once(tmp_path):
    given = {"storage": f"journal:{tmp_path / 'study.log'}", "count": 4, "batch": 2, "grace": 0.4}
    dead, alive = SharedSearch(SPACE, **given), SharedSearch(SPACE, seed=9, **given)
    lost = dead.next(History())
    dead.open.clear()
    study = alive._study()
    for trial in lost:  # another process has queued it, and was killed before it failed it
        params = study.get_trials()[trial.id].params
        for _ in range(2):
            study.enqueue_trial(params, user_attrs={"retried": trial.id})
    run(alive)
    done = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert len({json.dumps(t.params, sort_keys=True) for t in done}) == len(done) == 4


def test_a_trial_that_is_given_back_while_another_process_asks_is_not_lost(tmp_path):
    given = {"storage": f"journal:{tmp_path / 'study.log'}", "count": 1, "batch": 1, "grace": 0.2}
    dead, alive, third = (SharedSearch(SPACE, **given) for _ in range(3))
    (lost,) = dead.next(History())
    dead.open.clear()
    time.sleep(0.3)
    study = alive._study()
    get_trials = study.get_trials

    def slow(*args, **kwargs):  # the third process gives it back just after the first look
        found = get_trials(*args, **kwargs)
        third._retry_abandoned(third._study())
        return found

    study.get_trials = slow
    asked = alive._request_trials(study)
    study.get_trials = get_trials
    asked = asked or alive._request_trials(study)
    assert [trial.config for trial in asked] == [lost.config]
    assert not any("surplus" in trial.user_attrs for trial in get_trials())


def test_a_process_that_was_silent_for_too_long_goes_on(tmp_path):
    """A laptop slept: its trials are another's when it wakes."""
    given = {"storage": f"journal:{tmp_path / 'study.log'}", "count": 2, "batch": 1}
    asleep, other = SharedSearch(SPACE, **given), SharedSearch(SPACE, grace=0.2, **given)
    trials = asleep.next(History())
    time.sleep(0.3)
    history = run(other)
    assert trials[0].config in [outcome.trial.config for outcome in history]
    assert asleep.next(History(pretend(trials))) == []
    assert len(asleep.collect(History())) == len(history) == 2


def test_a_trial_that_ended_unsaid_is_not_trained_again(tmp_path):
    given = {"storage": f"journal:{tmp_path / 'study.log'}", "count": 3, "batch": 3, "grace": 0.4}
    dead, alive = SharedSearch(SPACE, **given), SharedSearch(SPACE, **given)
    trials = dead.next(History())
    for trial, outcome in zip(trials, pretend(trials)):
        dead.open[trial.id].set_user_attr("outcome", outcome.to_dict())
    dead.open.clear()  # killed before it told the study
    assert len(run(alive)) == 0
    found = alive.collect(History())
    assert [o.score for o in found] == [o.score for o in pretend(trials)]
    assert [t.state.name for t in alive._study().trials] == ["COMPLETE"] * 3


def test_a_database_that_is_away_is_a_storage_error(tmp_path):
    away = f"sqlite:///{tmp_path}/no/folder/study.db"
    with pytest.raises(StorageError, match="cannot be opened"):
        SharedSearch(SPACE, storage=away).next(History())


TIMES = max(1, round(20 * float(os.environ.get("TIKHON_CHAOS", "0"))))


class Worker:
    """A process that takes part in a search; a fork, which need not import torch again."""

    def __init__(self, storage, *, pause, workers):
        self.lines, out = (os.fdopen(end, mode) for end, mode in zip(os.pipe(), "rw"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fork of a process with threads; the child is ours
            self.pid = os.fork()
        if self.pid == 0:
            self._become(out, storage, pause, workers)
        out.close()

    def _become(self, out, storage, pause, workers):
        code = 1
        try:
            torch.set_num_threads(1)

            def on_event(event):
                if event["event"] == "epoch":
                    time.sleep(pause)
                    print("epoch", file=out, flush=True)

            joined = shared_search(storage, grace=3.0, workers=workers)
            result = tune(lambda: MLP([6, 8, 2]), data(), space=SPACE, budget="12runs", epochs=4,
                          folds=0, search=joined, on_event=on_event)  # fmt: skip
            print(json.dumps([len(result.history), result.audit.failed]), file=out, flush=True)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def kill(self):
        """SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.lines.close()

    def end(self):
        """The last line that it printed; it must have ended well."""
        last = self.lines.read().splitlines()[-1:]
        assert os.waitpid(self.pid, 0)[1] == 0
        self.lines.close()
        return json.loads(last[0])


@pytest.mark.slow
def test_a_killed_worker_gives_its_trials_back_to_the_other(tmp_path):
    storage = f"journal:{tmp_path / 'study.log'}"
    victim = Worker(storage, pause=5.0, workers=1)
    assert victim.lines.readline() == "epoch\n"
    victim.kill()
    told = Worker(storage, pause=0.0, workers=1).end()
    study = optuna.load_study(study_name="tikhon", storage=storage_of(storage))
    done = [t for t in study.trials if t.state.name == "COMPLETE"]
    retried = [t.user_attrs["retried"] for t in study.trials if "retried" in t.user_attrs]
    assert len(done) == 12
    assert retried and len(set(retried)) == len(retried)
    assert len({json.dumps(t.params, sort_keys=True) for t in done}) == 12
    assert told == [13, 0]  # with the default


@pytest.fixture(scope="module")
def postgres():
    """The address of a database server of this module's own, without the database."""
    pytest.importorskip("psycopg2", reason="the driver of PostgreSQL: pip install psycopg2-binary")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("PostgreSQL is absent: apt-get install postgresql")
    home = Path(tempfile.mkdtemp(prefix="tikhon-postgres-"))
    who = []
    if os.getuid() == 0:  # the server refuses to run as root
        shutil.chown(home, "postgres")
        who = ["runuser", "-u", "postgres", "--"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bin, data = found[-1].parent, home / "data"

    def call(*command):
        subprocess.run([*who, *map(str, command)], check=True, cwd=home, stdout=subprocess.DEVNULL)

    call(bin / "initdb", "-D", data, "-A", "trust", "-U", "tikhon", "--no-sync")
    options = f"-p {port} -k {home} -c listen_addresses=127.0.0.1"
    call(bin / "pg_ctl", "-D", data, "-o", options, "-l", home / "log", "-w", "start")
    server = ["-h", "127.0.0.1", "-p", str(port), "-U", "tikhon"]

    def new(name):
        call(bin / "createdb", *server, name)
        return f"postgresql+psycopg2://tikhon@127.0.0.1:{port}/{name}"

    yield new
    call(bin / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    shutil.rmtree(home)


@pytest.mark.slow
@pytest.mark.timeout(7_200)
def test_two_of_three_workers_on_postgresql_are_killed(postgres):
    """No trial is trained to its end twice, none is lost."""
    draw, twice, lost = random.Random(os.environ.get("TIKHON_CHAOS_SEED", "0")), 0, 0
    for number in range(TIMES):
        storage = postgres(f"round{number}")
        workers = [Worker(storage, pause=0.3, workers=3) for _ in range(3)]
        for victim in workers[:2]:
            victim.lines.readline()  # it has trained, or found nothing left to train
        for victim in workers[:2]:
            time.sleep(draw.uniform(0, 1.5))
            victim.kill()
        told = workers[2].end()
        study = optuna.load_study(study_name="tikhon", storage=storage)
        ended = [t for t in study.trials if "outcome" in t.user_attrs]
        different = len({json.dumps(t.params, sort_keys=True) for t in ended})
        twice, lost = twice + len(ended) - different, lost + 12 - different
        assert told == [13, 0]  # with the default
    print(
        f"\nPostgreSQL, two of three workers killed: {TIMES} rounds, {TIMES * 12} trials, ", end=""
    )
    print(f"{twice} trained twice, {lost} lost")
    assert (twice, lost) == (0, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(600)
def test_a_ray_cluster_of_two_nodes_finds_what_one_process_finds_also_if_one_is_killed():
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from tikhon.integrations.ray import RayRunner

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    left = []

    def on_event(event):
        if event["event"] == "epoch" and left:
            cluster.remove_node(left.pop(), allow_graceful=False)

    def search(**runner):
        return tune(lambda: MLP([6, 8, 2]), data(), space=SPACE, budget="6runs", epochs=8,
                    folds=0, on_event=on_event, **runner)  # fmt: skip

    def assert_same(there):
        assert [o.trial for o in there.history] == [o.trial for o in here.history]
        for a, b in zip(there.history, here.history):
            assert a.score == pytest.approx(b.score, abs=1e-5)

    here = search()
    try:
        second = cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        assert ray.cluster_resources()["CPU"] == 2
        assert_same(search(runner=RayRunner.factory(cluster.address)))
        left.append(second)
        assert_same(search(runner=RayRunner.factory(cluster.address)))
        assert not left
    finally:
        ray.shutdown()
        cluster.shutdown()
        time.sleep(1)
