"""A save that stops at any point leaves an older generation that loads."""

import itertools
import os

import pytest
import torch

from tikhon.errors import DataError, InputError
from tikhon.runs import checkpoint, files, temporary
from tikhon.runs.interrupt import Stopped

CALLS = ("mkstemp", "fsync", "chmod", "replace")


def state(n):
    return {
        "step": n,
        "lr": 0.1 + n,
        "w": torch.full((3,), float(n)),
        "t": (1, None),
        "d": {7: [n]},
    }


def same(a, b):
    return torch.equal(a.pop("w"), b.pop("w")) and a == b


def test_states_come_back_exactly(tmp_path):
    special = {"x": float("inf"), "y": 1 / 3, "z": [torch.tensor(1.0), True, "a"], 4: (2.5,)}
    checkpoint.save(tmp_path / "c", special)
    found = checkpoint.load(tmp_path / "c")
    assert found["z"][0].item() == 1.0 and found["z"][1:] == [True, "a"]
    assert {k: found[k] for k in ("x", "y", 4)} == {k: special[k] for k in ("x", "y", 4)}
    checkpoint.save(tmp_path / "c", {"n": float("nan")})
    assert checkpoint.load(tmp_path / "c")["n"] != checkpoint.load(tmp_path / "c")["n"]


def test_two_generations_are_kept(tmp_path):
    for n in range(5):
        checkpoint.save(tmp_path / "c", state(n))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "4.json", "4.safetensors", "5.json", "5.safetensors",
    ]  # fmt: skip


class Killed(BaseException):
    """Stands for kill -9: nothing after it is cleaned up by the writer's own handlers."""


@pytest.mark.parametrize("name", CALLS)
def test_killed_at_any_call_the_newest_complete_generation_loads(tmp_path, monkeypatch, name):
    holder = temporary.tempfile if name == "mkstemp" else files.os
    original = getattr(holder, name)
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        checkpoint.save(folder, state(1))
        calls = itertools.count(1)

        def killed(*a, n=n, calls=calls, **k):
            if next(calls) == n:
                raise Killed
            return original(*a, **k)

        monkeypatch.setattr(holder, name, killed)
        try:
            checkpoint.save(folder, state(2))
            break  # every call has had its turn
        except Killed:
            pass
        finally:
            monkeypatch.setattr(holder, name, original)
        found = checkpoint.load(folder)
        assert same(found, state(1)) or same(checkpoint.load(folder), state(2))
        checkpoint.save(folder, state(3))
        assert same(checkpoint.load(folder), state(3))
    assert n > 2  # two files, each with this call


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_newest_generation_is_skipped(tmp_path, suffix, damage):
    for n in (1, 2):
        checkpoint.save(tmp_path / "c", state(n))
    path = tmp_path / f"c/2.{suffix}"
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    told = []
    assert same(checkpoint.load(tmp_path / "c", say=told.append), state(1))
    newest_is_known = (suffix, damage) != ("json", "gone")  # without a manifest there is none
    assert [f"{tmp_path / 'c' / '2'}.json" in text for text in told] == [True] * newest_is_known


@pytest.mark.parametrize(
    "text", ["null", "[]", '"x"', "{}", "[" * 100_000, '{"schema_version": 1}']
)
def test_foreign_documents_are_named_and_an_older_generation_is_used(tmp_path, text):
    checkpoint.save(tmp_path / "c", state(1))
    (tmp_path / "c/2.json").write_text(text)
    assert same(checkpoint.load(tmp_path / "c"), state(1))
    (tmp_path / "c/1.json").unlink()
    with pytest.raises(DataError, match=r"2\.json.*--overwrite"):
        checkpoint.load(tmp_path / "c")


def test_a_keeper_gives_back_what_was_saved_last_and_refuses_another_header(tmp_path):
    first = checkpoint.PeriodicCheckpoint(tmp_path / "c", {"seed": 1}, every=0.0)
    for n in range(3):
        first.save_if_due(lambda n=n: {"n": n})
    again = checkpoint.PeriodicCheckpoint(
        tmp_path / "c", {"seed": 1}, resume=True, stop=lambda: True
    )
    assert again.found == {"n": 2}
    with pytest.raises(Stopped):
        again.save_if_due(lambda: {"n": 3})
    assert checkpoint.PeriodicCheckpoint(tmp_path / "c", {"seed": 1}, resume=True).found == {
        "n": 3
    }
    with pytest.raises(InputError, match="different seed"):
        checkpoint.PeriodicCheckpoint(tmp_path / "c", {"seed": 2}, resume=True)
    assert checkpoint.PeriodicCheckpoint(tmp_path / "c", {"seed": 2}).found == {}
    assert not checkpoint.exists(tmp_path / "c")


def test_nothing_usable_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"it is empty.*--overwrite"):
        checkpoint.load(tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_is_not_plain_is_refused(tmp_path):
    with pytest.raises(TypeError, match="cannot hold object"):
        checkpoint.save(tmp_path / "c", {"x": object()})
