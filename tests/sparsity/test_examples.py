"""The examples of `sparsify` run as they stand: a plain loop, Lightning, Hugging Face."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
EXPECTED = {
    "sparse_convnet": r"50\.00% of the channels(.|\n)*3\.5\dx smaller(.|\n)*accuracy 0\.9",
    "sparse_lightning": r"90\.00% of the weights are zero(.|\n)*accuracy 0\.9",
    "sparse_transformers": r"80\.00% of the weights are zero(.|\n)*accuracy (0\.9|1\.0)",
}
NEEDED = {
    "sparse_lightning": ["pytorch_lightning"],
    "sparse_transformers": ["transformers", "accelerate"],
}


@pytest.mark.filterwarnings("ignore")  # the advice of the frameworks
@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_example(name, capsys):
    for package in NEEDED.get(name, []):
        pytest.importorskip(package)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert re.search(EXPECTED[name], shown), shown
