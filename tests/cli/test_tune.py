"""tikhon tune as a command: killed and resumed, and shared by processes of which one dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tikhon.errors import DataError
from tikhon.models import restore
from tikhon.training.saved_model import SavedModel

SHORT = ["tune", "digits", "--model", "mlp:16", "--budget", "4runs", "--epochs", "8",
         "--folds", "0", "--quiet", "--json"]  # fmt: skip


def rows(path):
    """The trials without their times."""
    found = json.loads((path / "result.json").read_text())
    return [{**row, "seconds": 0} for row in found["trials"]], found["config"]


def outcomes(path):
    journal = path / "journal.jsonl"
    return journal.exists() and '"outcomes"' in journal.read_text()


def test_kill_9_in_a_search_then_resume_gives_the_uninterrupted_history(tmp_path, command):
    again = [*SHORT, "--output"]
    child = command.start([*again, "cut"], tmp_path)
    child.until(lambda: outcomes(tmp_path / "cut"))
    child.send(9)
    assert child.wait().code == -9
    assert not (tmp_path / "cut/result.json").exists()
    assert command.run(*again, "cut", "--resume", cwd=tmp_path).code == 0
    assert command.run(*again, "whole", cwd=tmp_path).code == 0
    cut, whole = rows(tmp_path / "cut"), rows(tmp_path / "whole")
    assert [r["id"] for r in cut[0]] == [r["id"] for r in whole[0]]
    assert cut == whole


def test_a_model_is_chosen_by_the_search_and_answers_for_new_rows(tmp_path, command):
    rows = ["x,y,z"]
    for k in range(240):
        x, y = (k * 37 % 101) / 101, (k * 53 % 89) / 89
        rows.append(f"{x},{y},{'in' if 0.35 < x < 0.65 else 'out'}")
    (tmp_path / "band.csv").write_text("\n".join(rows))
    asked = ["tune", "band.csv", "--target", "z", "--model", "linear|spline:linear",
             "--budget", "6runs", "--epochs", "30", "--output", "run", "--quiet"]  # fmt: skip
    told = command.run(*asked, cwd=tmp_path)
    assert told.code == 0, told.err
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["model"]["name"] == "spline:linear"  # no linear map finds a band
    assert command.run("predict", "run", "band.csv", "--output", "p.csv", cwd=tmp_path).code == 0
    found = (tmp_path / "p.csv").read_text().splitlines()[1:]
    right = [a.split(",")[0] == b.split(",")[2] for a, b in zip(found, rows[1:])]
    assert sum(right) / len(right) > 0.9
    assert command.run("predict", "run", "band.csv", "--single", cwd=tmp_path).code == 0


def test_a_search_answers_with_the_mean_of_its_networks(tmp_path, command):
    told = command.run("tune", "iris", "--model", "linear|mlp:8", "--budget", "4runs", "--epochs",
                       "8", "--output", "run", "--quiet", cwd=tmp_path)  # fmt: skip
    assert told.code == 0, told.err
    run = tmp_path / "run"
    names = json.loads((run / "config.json").read_text())["model"]["members"]
    state, x = load_file(run / "average.safetensors"), SavedModel.load(run).read("iris")
    mean = torch.zeros(len(x), 3)
    for k, name in enumerate(names):
        start = f"members.{k}."
        own = {key.removeprefix(start): w for key, w in state.items() if key.startswith(start)}
        mean += restore(name, (4,), 3, own).eval()(x).softmax(1).detach() / len(names)
    found = SavedModel.load(run).predict(x).iloc[:, 1:].to_numpy()
    assert len(names) > 1
    assert abs(found - mean.numpy()).max() < 1e-5
    single = SavedModel.load(run, single=True)
    assert sum(p.numel() for p in single.model.parameters()) in (15, 67)
    damaged = run / "average.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(DataError, match="average"):
        SavedModel.load(run)


def test_the_board_takes_trials_that_ran_out_of_time(capsys):
    from tikhon.cli.terminal import Terminal
    from tikhon.cli.tune import SearchTable
    from tikhon.tuning.trials import Outcome, Trial

    board = SearchTable(Terminal(json=False, quiet=False))
    board.event({"event": "batch", "trials": 2, "budget": 18})
    outcome = Outcome(Trial(0, {"lr": 0.1}, 11), 0.5, curve=((11, 0.5),))
    board.event({"event": "outcomes", "outcomes": [outcome]})
    assert ": 1 member, " in capsys.readouterr().err


def test_a_worker_that_is_killed_gives_its_trials_back(tmp_path, command):
    optuna = pytest.importorskip("optuna")
    from tikhon.integrations.optuna import shared_search, storage_of

    storage = f"journal:{tmp_path / 'study.log'}"
    shared = [*SHORT, "--storage", storage, "--output"]

    def impatient():
        shared_search.__kwdefaults__["grace"] = 2.0

    # it takes trials and then hangs in the first of them; were it killed while it writes to the
    # study, the others would wait half a minute for its lock
    def hung():
        import time

        from tikhon.tuning import runners

        def run(self, trials):
            (tmp_path / "hangs").touch()
            time.sleep(600)

        runners.PopulationRunner.run = run

    victim = command.start([*shared, "victim", "--join"], tmp_path, before=hung)
    victim.until((tmp_path / "hangs").exists)
    victim.send(9)
    assert victim.wait().code == -9
    survivor = command.start([*shared, "survivor"], tmp_path, before=impatient)
    assert survivor.wait().code == 0
    study = optuna.load_study(study_name="tikhon", storage=storage_of(storage))
    done = [t for t in study.trials if t.state.name == "COMPLETE"]
    retried = [t.user_attrs["retried"] for t in study.trials if "retried" in t.user_attrs]
    assert len(done) == 4 and len({json.dumps(t.params, sort_keys=True) for t in done}) == 4
    assert retried and len(set(retried)) == len(retried)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_of_two_workers_of_one_command_one_is_killed_and_nothing_is_lost(tmp_path, command):
    optuna = pytest.importorskip("optuna")
    from tikhon.integrations.optuna import storage_of

    storage = f"journal:{tmp_path / 'study.log'}"
    child = command.start(
        ["tune", "digits", "--workers", "2", "--storage", storage, "--budget", "24runs",
         "--epochs", "150", "--output", "run", "--quiet", "--json"], tmp_path,
    )  # fmt: skip

    def trials():
        try:
            return optuna.load_study(study_name="tikhon", storage=storage_of(storage)).trials
        except KeyError:  # the study is not there yet
            return []

    def others():
        busy = (t.user_attrs.get("worker", ":0") for t in trials() if t.state.name == "RUNNING")
        return {int(worker.split(":")[1]) for worker in busy} - {0, child.pid}

    child.until(others, timeout=120)
    (other,) = others()
    os.kill(other, signal.SIGKILL)
    found = child.wait(timeout=300)
    assert found.code == 0, found.err
    done = [t for t in trials() if t.state.name == "COMPLETE"]
    retried = [t.user_attrs["retried"] for t in trials() if "retried" in t.user_attrs]
    assert len(done) == 24 and len({json.dumps(t.params, sort_keys=True) for t in done}) == 24
    assert retried and len(set(retried)) == len(retried)
    ids = [
        row["id"]
        for row in json.loads((tmp_path / "run/result.json").read_text())["trials"]
        if row["id"] >= 0
    ]
    assert ids == sorted(t.number for t in done)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(600)
def test_a_search_on_two_ray_nodes_survives_the_death_of_one(tmp_path):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        second = cluster.add_node(**node)
        again = ["tune", "digits", "--model", "mlp:16", "--budget", "6runs", "--epochs", "1000",
                 "--folds", "0", "--quiet"]  # fmt: skip
        start = "from tikhon.cli import main; raise SystemExit(main())"
        child = subprocess.Popen(
            [sys.executable, "-c", start, *again, "--ray", cluster.address, "--output", "there"],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        journal = tmp_path / "there/journal.jsonl"
        while child.poll() is None and not (journal.exists() and "plan" in journal.read_text()):
            time.sleep(0.1)
        time.sleep(4)
        under_way = "outcomes" not in journal.read_text()
        cluster.remove_node(second, allow_graceful=False)
        _, error = child.communicate(timeout=400)
        assert child.returncode == 0, error
    finally:
        cluster.shutdown()
    trials = rows(tmp_path / "there")[0]
    ids = [row["id"] for row in trials]
    assert under_way  # a node with a chunk of the first rung was taken away
    assert len(set(ids)) == len(ids) and {0, 1, 2, 3, 4, 5, -1} <= set(ids)
    assert not any(row["failure"] for row in trials)


def test_join_needs_a_storage(tmp_path, command):
    found = command.run(*SHORT, "--join", cwd=tmp_path)
    assert found.code == 2 and "--join needs --storage" in found.err
