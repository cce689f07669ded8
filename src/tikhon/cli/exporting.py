"""Compaction and export after `tikhon fit --compact --export onnx`."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor, nn

from tikhon.cli.terminal import Terminal
from tikhon.compaction import Compaction, compact, speedup
from tikhon.compaction.latency import onnx_of
from tikhon.errors import InputError, unknown_name
from tikhon.runs.files import write_bytes, write_tensors
from tikhon.runs.run_directory import COMPACT, ONNX

EXPORTS = ("onnx",)


def check_export(export: str | None) -> None:
    """Raise `InputError` for an unknown format, or if its package is missing."""
    if export is None:
        return
    if export not in EXPORTS:
        raise InputError(unknown_name("export", export, EXPORTS))
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError("--export onnx needs onnxscript: pip install 'tikhon[export]'") from error


def compact_and_export(
    terminal: Terminal,
    model: nn.Module,
    example: Tensor,
    path: Path,
    *,
    shrink: bool,
    export: str | None,
) -> dict[str, object]:
    """Compact and export the trained model; return entries for the result document."""
    model, example = model.cpu().eval(), example.cpu()
    done: dict[str, object] = {}
    if shrink:
        small = compact(model, example)
        write_tensors(path / COMPACT, dict(small.state_dict()))
        found: Compaction = small.compaction  # type: ignore[assignment]
        ratio = speedup(model, small, example)
        done["compaction"] = {**found.to_dict(), "speedup": ratio}
        terminal.print(f"{found}\ntime of a batch of {len(example)}: {ratio:.2f}x shorter")
        model = small
    if export == "onnx":
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it logs every missing package
        write_bytes(path / ONNX, onnx_of(model, (example,)))  # for any number of rows
        done["export"] = str(path / ONNX)
        terminal.print(f"exported: {path / ONNX}")
    return done
