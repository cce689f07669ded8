"""`watch` reads the same numbers on two processes as on one, and stops on both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ranks import together


@pytest.fixture(scope="module")
def found():
    if not torch.distributed.is_available():
        pytest.skip("this torch was built without torch.distributed")
    return json.loads(together(Path(__file__).with_name("two_watchers.py")))


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
