"""A resume equals the uninterrupted run bit for bit, from every step."""

import json

import pytest
import torch

import tikhon as tk
from tikhon.data import load, split, stream
from tikhon.errors import DataError, InputError
from tikhon.models import build
from tikhon.runs import checkpoint
from tikhon.training import fit, loop
from tikhon.training.loop import Training
from tikhon.training.recipe import Auto, Recipe
from tikhon.training.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:Hypergradient.*moves")  # runs of 8 steps

BATCHES, EPOCHS = 2, 4
AUTO = tk.Term(tk.L2(), strength=Auto())
CASES = {
    "sgd momentum, l1": (Recipe(tk.L1(1e-2)), {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}),
    "adam, dropout": (Recipe(tk.GroupLasso(1e-2), dropout=0.5), {"optimizer": "adam"}),
    "ema, cosine": (Recipe(averaging="ema", dropout=0.2), {"schedule": "cosine"}),
    "swa": (Recipe(averaging="swa"), {"optimizer": "adamw"}),
    "early stopping": (Recipe(early_stopping=1), {"lr": 0.5}),
    "learning rates": (
        Recipe(tk.L1(1e-2), learning_rates={"*.bias": 1e-3, "fc2": 0.02}),
        {"schedule": "cosine"},
    ),
    "auto": (Recipe({"*": AUTO}), {"optimizer": "adamw"}),
    "noise": (
        Recipe(label_smoothing=0.1, mixup=0.4, input_noise=0.1, r_drop=0.5, dropout=0.3),
        {},
    ),
}


@pytest.fixture(scope="module")
def iris():
    return split(load("iris"))


def network(parts):
    torch.manual_seed(0)
    return build("mlp:8", parts.train.shape, parts.train.outputs)


def training(parts, recipe, settings):
    pairs = [(p.x, p.y) for p in (parts.train, parts.valid)]
    chosen = Settings(**{"batch_size": 45, "epochs": EPOCHS} | settings)
    return Training(network(parts), pairs[0], recipe, chosen, valid=pairs[1])


def result(run):
    """Everything that a run leaves behind, without its clock."""
    tensors: dict[str, torch.Tensor] = {}
    state = run.state_dict() | {"seconds": 0.0}
    state["history"] = [{**row, "seconds": 0.0} for row in state["history"]]
    text = json.dumps(checkpoint.flatten(state, tensors))
    return text, tensors


def equal(a, b):
    return a[0] == b[0] and all(torch.equal(a[1][k], b[1][k]) for k in a[1])


def interrupted(parts, recipe, settings, folder, at):
    """The state of a run that was stopped after step `at`, saved and continued by another."""
    first = training(parts, recipe, settings)
    torch.manual_seed(5)
    first.run(
        stop=lambda: first.step == at, save=lambda: checkpoint.save(folder, first.state_dict())
    )
    saved = checkpoint.exists(folder)
    second = training(parts, recipe, settings)
    torch.manual_seed(77)  # another state than the one that was saved
    if saved:
        second.load_state_dict(checkpoint.load(folder))
    else:  # the run had ended before that step
        return result(first)
    second.run()
    return result(second)


@pytest.mark.parametrize("case", CASES)
def test_resume_from_every_step_is_bit_exact(iris, tmp_path, case):
    recipe, settings = CASES[case]
    whole = training(iris, recipe, settings)
    torch.manual_seed(5)
    whole.run()
    expected = result(whole)
    for at in range(1, BATCHES * EPOCHS):
        found = interrupted(iris, recipe, settings, tmp_path / str(at), at)
        assert equal(found, expected), f"resumed after step {at}"


@pytest.mark.parametrize("forgotten", ["rng", "optimizer", "order"])
def test_the_comparison_can_fail(iris, tmp_path, monkeypatch, forgotten):
    """Each part of the state matters: without it the resumed run is another one."""
    recipe, settings = CASES["adam, dropout"]
    if forgotten == "rng":
        monkeypatch.setattr(loop, "_set_rng_state", lambda *a: None)
    if forgotten == "order":
        monkeypatch.setattr(stream, "order", lambda rows, seed, epoch: torch.randperm(rows))
    if forgotten == "optimizer":
        original = Training.state_dict
        monkeypatch.setattr(
            Training, "state_dict", lambda self: original(self) | {"optimizer": {}}
        )
    whole = training(iris, recipe, settings)
    torch.manual_seed(5)
    whole.run()
    assert not equal(interrupted(iris, recipe, settings, tmp_path, 3), result(whole))


def run_in(folder, parts, *, stop_at=None, **more):
    count = iter(range(10**6))
    stop = (lambda: next(count) + 1 == stop_at) if stop_at else (lambda: False)
    return fit(
        network(parts), parts.train, Recipe(tk.L1(1e-2), dropout=0.5), valid=parts.valid,
        batch_size=45, epochs=EPOCHS, output=folder, checkpoint_every=0.0, stop=stop, **more,
    )  # fmt: skip


def files(folder):
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    rows = [{**row, "seconds": 0} for row in history]
    return rows, (folder / "model.safetensors").read_bytes()


def test_a_resumed_folder_equals_the_uninterrupted_one(iris, tmp_path):
    run_in(tmp_path / "whole", iris)
    run = run_in(tmp_path / "parts", iris, stop_at=3)
    assert run.ended == "stopped" and not (tmp_path / "parts/model.safetensors").exists()
    run_in(tmp_path / "parts", iris, stop_at=2, resume=True)
    run_in(tmp_path / "parts", iris, resume=True)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == [
        "config.json", "history.jsonl", "manifest.json", "model.safetensors", "result.json",
    ]  # fmt: skip


def test_a_damaged_checkpoint_falls_back_one_generation(iris, tmp_path):
    run_in(tmp_path / "whole", iris)
    run_in(tmp_path / "run", iris, stop_at=5)
    newest = max((tmp_path / "run/checkpoint").glob("*.safetensors"), key=lambda p: int(p.stem))
    content = bytearray(newest.read_bytes())
    content[-3] ^= 1  # one bit
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match="the file is damaged; going on from the one before"):
        run_in(tmp_path / "run", iris, resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_no_intact_checkpoint_is_an_error(iris, tmp_path):
    run_in(tmp_path, iris, stop_at=5)
    for path in (tmp_path / "checkpoint").glob("*.json"):
        path.write_text(path.read_text().replace("sha", "ahs"))
    with pytest.raises(DataError, match="no usable checkpoint"):
        run_in(tmp_path, iris, resume=True)


def test_a_checkpoint_of_another_version_is_refused_by_what_it_lacks(iris, tmp_path, monkeypatch):
    run_in(tmp_path, iris, stop_at=5)
    loaded = checkpoint.load

    def older(folder, **how):
        state = dict(loaded(folder, **how))
        del state["optimizer"]
        return state

    monkeypatch.setattr(checkpoint, "load", older)
    with pytest.raises(DataError, match="lacks 'optimizer': another version"):
        run_in(tmp_path, iris, resume=True)


def test_torn_history_is_repaired(iris, tmp_path):
    run_in(tmp_path / "whole", iris)
    run_in(tmp_path / "run", iris, stop_at=5)
    with (tmp_path / "run/history.jsonl").open("a") as file:
        file.write('{"epoch": 3, "train/lo')
    run_in(tmp_path / "run", iris, resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_a_changed_configuration_is_a_table_of_what_differs(iris, tmp_path):
    run_in(tmp_path, iris, stop_at=3)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(InputError) as caught:
        fit(network(iris), iris.train, Recipe(tk.L1(1e-3)), valid=iris.valid, batch_size=45,
            epochs=EPOCHS, lr=0.5, output=tmp_path, resume=True)  # fmt: skip
    text = str(caught.value)
    for name in ("optimizer.lr", "0.001", "0.5", "recipe.dropout", "recipe.penalties[0].strength"):
        assert name in text
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_resume_of_nothing_and_of_a_finished_run(iris, tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        run_in(tmp_path / "none", iris, resume=True)
    assert not (tmp_path / "none").exists()
    run_in(tmp_path / "done", iris)
    with pytest.raises(InputError, match="is finished"):
        run_in(tmp_path / "done", iris, resume=True)


def test_resume_on_other_data_is_refused(iris, tmp_path):
    run_in(tmp_path, iris, stop_at=3)
    other = split(load("iris"), seed=5)
    with pytest.raises(InputError, match=r"data.fingerprint"):
        run_in(tmp_path, other, resume=True)
