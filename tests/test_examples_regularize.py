"""The examples of `regularize` run as they stand, the distributed ones on two processes."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch.distributed

from ranks import together

FOLDER = Path(__file__).parents[1] / "examples"
EXPECTED = {
    "plain_loop": r"(\d+) of 128 neurons left, accuracy 0\.9",
    "amp": r"399 of 400 steps taken, exact zeros [3-9]\d\.\d%",
    "gradient_accumulation": r"largest difference between 1 and 4 micro-batches: .*e-0[3-9]",
    "lbfgs": r"difference to scikit-learn .*e-(0[7-9]|1\d)",
    "muon_and_adamw": r"GroupLasso.*orthant(.|\n)*[5-9]\d of 128 neurons left, accuracy 0\.9",
    "sam": r"of AdamW, inside SAM\n300 steps, 1?\d\d of 128 neurons left, accuracy 0\.9",
    "schedule_free": r"exact zeros [3-9]\d\.\d%, accuracy 0\.9(.|\n)*refused: 0.weight/L2 would",
    "lora": r"0\.0: \|BA\| [2-9]\.\d(.|\n)*0\.03: \|BA\| 0\.\d\d, accuracy 0\.9",
    "unfreezing": r"frozen, not in the optimizer: untouched\njoined in\nthe backbone moved by \d",
}
DISTRIBUTED = {
    "ddp": r"2 processes, exact zeros \d+\.\d%, penalty 0\.\d+",
    "fsdp2": r"refused: 0.weight/NuclearNorm is not exact on the shards of '0.weight'",
}


LONG = ("muon_and_adamw", "sam", "lora")  # tests/regularizer has their laws


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in EXPECTED]
)
def test_example(name, capsys):
    if name == "schedule_free":
        pytest.importorskip("schedulefree")
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert re.search(EXPECTED[name], shown), shown


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("name", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_distributed_example(name):
    shown = together(FOLDER / f"{name}.py")
    assert re.search(DISTRIBUTED[name], shown), shown
