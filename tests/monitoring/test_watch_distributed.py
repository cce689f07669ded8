"""`watch` reads the same numbers on two processes as on one, and stops on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def found():
    if not torch.distributed.is_available():
        pytest.skip("this torch was built without torch.distributed")
    script = Path(__file__).with_name("two_watchers.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(script)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_readings_are_those_of_one_process(found, kind):
    gradient, weight, update, signal, loss = zip(*found["results"][kind])
    alone = list(zip(*found["alone"]))
    for read, wanted in zip((gradient, weight, update, loss), (*alone[:3], alone[4])):
        assert read == pytest.approx(wanted, rel=1e-4)
    # the halves of a batch have signals of their own: their mean is near the whole batch's
    assert signal == pytest.approx(alone[3], rel=0.2)


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_both_processes_stop_where_one_goes_wrong(found, kind):
    assert all("step 3" in stops[kind] for stops in found["stops"])
    assert "input" in found["stops"][0][kind]
