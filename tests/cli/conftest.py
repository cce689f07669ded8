"""The fixture that runs commands as processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def command():
    """`run(*arguments, cwd=)` to the end, `start(arguments, cwd)` and talk to it."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location(
        "tikhon_process", Path(__file__).with_name("process.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["tikhon_process"] = module
    spec.loader.exec_module(module)

    import torch

    import tikhon.cli.fit
    import tikhon.report
    import tikhon.training

    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # imports what children would import
    assert tikhon.cli.fit and tikhon.report and tikhon.training
    return SimpleNamespace(run=module.tikhon, start=module.Tikhon)
