"""A rank of DDP or FSDP2 that is killed: the others end with an error, and the run goes on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not torch.distributed.is_available(), reason="torch was built without distributed"
    ),
]
STEPS = 20


def start(kind, folder, ranks, dies=0):
    """How each rank ended: its code and what it said."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("killed_rank.py")
    command = [sys.executable, str(script), kind, str(folder), str(STEPS), str(dies)]
    shared = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    running = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    told = [each.communicate(timeout=240)[1] for each in running]
    return [(each.returncode, text) for each, text in zip(running, told)]


def saved(folder):
    return torch.load(folder / "saved.pt", weights_only=True)


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_a_killed_rank_ends_the_others_and_any_number_of_ranks_goes_on(kind, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert [code for code, _ in start(kind, whole, 2)] == [0, 0]
    wanted = saved(whole)
    (first, said), (second, _) = start(kind, cut, 2, dies=10)
    assert second == -9
    assert first not in (0, -9)
    assert any(sign in said for sign in ("Connection closed by peer", "Connection reset"))
    assert saved(cut)["step"] == 8
    ended = start(kind, cut, 3)
    assert [code for code, _ in ended] == [0, 0, 0], ended[0][1][-2000:]
    found = saved(cut)
    assert found["step"] == STEPS
    for name, weights in wanted["model"].items():
        assert torch.allclose(found["model"][name], weights, atol=1e-6)
        assert torch.equal(found["model"][name] == 0, weights == 0)
