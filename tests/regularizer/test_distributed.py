"""DDP and FSDP2 on two gloo processes: as the single process, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

import tikhon as tk
from ranks import together
from regularizer.rules import Heavy
from regularizer.test_foreign import ScheduleFree

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="torch was built without distributed"
)
CASES = [
    f"{name} {kind}"
    for name in (
        "elementwise",
        "rows",
        "decoupled",
        "constraints",
        "controllers",
        "row controllers",
    )
    for kind in ("SGD", "AdamW", "Heavy")
    if not (kind == "Heavy" and "controllers" in name)
]


@pytest.fixture(scope="module")
def outcome():
    return json.loads(together(Path(__file__).with_name("two_processes.py")))


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_single_process(outcome, case, wrapper):
    found = outcome["results"][case][wrapper]
    assert found["weights"] < 1e-6
    assert found["value"] < 1e-6
    assert found["same value everywhere"]
    assert found["zeros"]
    assert found["trace"] < 1e-6
    assert found["strengths"] < 1e-5


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("columns", 'its rows (rows="in") are cut'),
        ("one group", 'its rows (rows="tensor") are cut'),
        ("matrix", "it couples rows that other processes hold"),
        ("smooth matrix", "it couples rows that other processes hold"),
        ("sorted", 'its rows (rows="tensor") are cut'),
        ("weighted", "its weights are whole tensors"),
        ("controlled", "Own reads whole weights"),
    ],
)
def test_what_shards_cannot_do_is_refused_by_name(outcome, case, reason):
    message = outcome["refusals"][case]
    assert message.startswith("0.weight/")
    assert "is not exact on the shards of '0.weight'" in message
    assert reason in message


def test_pieces_of_flattened_weights_are_refused(outcome):
    assert len(outcome["flattened"]) == 2
    assert all("FSDP1) cuts flattened weights" in message for message in outcome["flattened"])


class Reduces(ScheduleFree):
    """Its step waits for the other processes, by `torch.distributed`."""

    def step(self, closure=None):
        raise AssertionError("no step is taken on trial")


def test_an_optimizer_is_tried_out_among_processes_too():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Linear(3, 2, bias=False)
        decay = tk.Term(tk.L2(0.1), how="decoupled")
        with pytest.raises(TypeError, match="ScheduleFree keeps other weights"):
            tk.regularize(model, ScheduleFree(model.parameters(), lr=0.1), decay)
        for kind in (Reduces, Heavy):
            tk.regularize(model, kind(model.parameters(), lr=0.1), decay).remove()
    finally:
        dist.destroy_process_group()
