"""States of trials lie on disk, sealed: few are in memory, none is believed that was changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tikhon.errors import DataError
from tikhon.models.mlp import MLP
from tikhon.runs.run_directory import STATES
from tikhon.tuning.space import Log, Space
from tikhon.tuning.states import States
from tikhon.tuning.tune import tune


def state(n, size=8):
    return {"w": torch.full((size,), float(n)), "epoch": torch.tensor([n])}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_does_not_fit_in_memory_comes_back_from_disk(tmp_path):
    for folder in (None, tmp_path / "states"):
        states = States(folder, memory=3 * 40)
        for n in range(10):
            states[n] = state(n)
        assert set(states) == set(range(10)) and len(states) == 10 and 3 in states
        assert len(states._in_memory) <= 3
        assert all(same(states[n], state(n)) for n in range(10))
        with pytest.raises(KeyError):
            states[11]


def test_a_file_goes_with_its_last_trial(tmp_path):
    states = States(tmp_path / "s")
    states[0], states[1] = state(0), state(1)
    seals = states.seal()
    assert list(seals) == ["1.safetensors"] and states.seal() == {}
    del states[0]
    assert (tmp_path / "s/1.safetensors").exists() and 1 in states
    del states[1]
    assert not list((tmp_path / "s").iterdir())


def test_files_of_an_earlier_process_are_believed_by_their_seal_alone(tmp_path):
    states, seals = States(tmp_path / "s"), {}
    for n in range(3):
        states[n] = state(n)
        seals |= states.seal()
    path = tmp_path / "s/2.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    (tmp_path / "s/9.safetensors").write_bytes(b"of a crash")
    again = States(tmp_path / "s")
    assert again.load_sealed(seals) == [path]
    assert set(again) == {0, 2} and same(again[2], state(2))
    assert not (tmp_path / "s/9.safetensors").exists()
    again[7] = state(7)
    assert list(again.seal()) == ["4.safetensors"]


def test_a_file_that_goes_away_is_named(tmp_path):
    states = States(tmp_path / "s")
    states[0] = state(0)
    states.seal()
    (tmp_path / "s/1.safetensors").unlink()
    with pytest.raises(DataError, match=r"1\.safetensors cannot be read.*--resume"):
        states[0]


# -- a search ----------------------------------------------------------------------------------


class Cut(Exception):
    """Stands for a kill between two rungs."""


def search(output, *, resume=False, cut_after=99):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 4, generator=generator)
    told, rungs = [], []

    def on_event(event):
        told.append(event)
        if event["event"] == "outcomes":
            rungs.append(event)
            if len(rungs) == cut_after:
                raise Cut

    result = tune(
        lambda: MLP([4, 8, 2]), (x, (x[:, 0] * x[:, 1] > 0).long()),
        space=Space(lr=Log(1e-3, 1e-1), weight_decay=Log(1e-4, 1e-1)), budget="6runs", epochs=16,
        folds=0, output=output, resume=resume, on_event=on_event, refit=False,
    )  # fmt: skip
    return result, told


@pytest.fixture(scope="module")
def whole():
    return search(None)[0]


@pytest.fixture(scope="module", params=[1, 2])
def interrupted(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "run"
    with pytest.raises(Cut):
        search(path, cut_after=request.param)
    return path


def flipped(path: Path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 128
    path.write_bytes(content)


DAMAGE = {
    "nothing": lambda path: None,
    "a bit": flipped,
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_search_whose_states_are_damaged_ends_as_if_they_were_not(
    interrupted, whole, tmp_path, damage
):
    run = shutil.copytree(interrupted, tmp_path / "run")
    for path in (run / STATES).glob("*.safetensors"):
        DAMAGE[damage](path)
    result, told = search(run, resume=True)
    damaged = [event for event in told if event["event"] == "damaged"]
    assert bool(damaged) == (damage != "nothing")
    for a, b in zip(result.history, whole.history, strict=True):
        assert {**a.to_dict(), "seconds": 0} == {**b.to_dict(), "seconds": 0}
    for a, b in zip(result.model.state_dict().values(), whole.model.state_dict().values()):
        assert torch.equal(a, b)
