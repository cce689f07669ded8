"""How much faster a smaller model is, measured: in eager torch, compiled, in ONNX Runtime."""

from __future__ import annotations

import io
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from tikhon.errors import unknown_name
from tikhon.wrappers import modes_restored

Way = Literal["eager", "compile", "onnx"]


def speedup(
    model: nn.Module,
    small: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    way: Way = "eager",
    rounds: int = 9,
    seconds: float = 0.1,
) -> float:
    """Time of a forward pass of `model` over that of `small`: the median of interleaved rounds.

    Each round runs A B B A for `seconds` each, by the process's CPU time, so that a busy machine
    slows both equally.

    Args:
        model, small: measured in evaluation mode, and left in the mode they are in.
        example_input: one batch (a tensor, or a tuple for several arguments); its size counts.
        way: "eager", "compile" (`torch.compile`) or "onnx" (ONNX Runtime, one thread).
        rounds, seconds: more give a steadier number.

    Raises:
        ValueError: rounds < 1, seconds <= 0 or another way.
        ImportError: "onnx" without onnxruntime and onnxscript.
    """
    if rounds < 1 or seconds <= 0:
        raise ValueError(f"rounds >= 1 and seconds > 0 expected, received {rounds=}, {seconds=}")
    if way not in get_args(Way):
        raise ValueError(unknown_name("way", way, get_args(Way)))
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    with modes_restored(model, small), torch.no_grad():
        a, b = (_RUNNERS[way](module.eval(), inputs) for module in (model, small))
        counts = _calls_within(a, seconds), _calls_within(b, seconds)
        ratios = []
        for _ in range(rounds):
            a1, b1 = _seconds_per_call(a, counts[0]), _seconds_per_call(b, counts[1])
            b2, a2 = _seconds_per_call(b, counts[1]), _seconds_per_call(a, counts[0])
            ratios.append((a1 + a2) / (b1 + b2))
    return statistics.median(ratios)


def onnx_of(model: nn.Module, inputs: tuple[Any, ...]) -> bytes:
    """The model as ONNX for any number of rows; needs onnxscript."""
    rows = torch.export.Dim("rows", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(),
            inputs,
            dynamo=True,
            input_names=["x"] if len(inputs) == 1 else None,
            output_names=["y"],
            dynamic_shapes=tuple({0: rows} for _ in inputs),
            verbose=False,
        )
    assert program is not None
    buffer = io.BytesIO()
    program.save(cast("Any", buffer))  # it takes a file too, its annotation does not say so
    return buffer.getvalue()


def _compiled(model: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], object]:
    compiled = torch.compile(model)
    return lambda: compiled(*inputs)


def _in_onnx(model: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], object]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("way='onnx' needs ONNX Runtime: pip install 'tikhon[export]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        onnx_of(model, inputs), options, providers=["CPUExecutionProvider"]
    )
    names = [one.name for one in session.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs)}
    return lambda: session.run(None, feeds)


_RUNNERS: dict[str, Callable[[nn.Module, tuple[object, ...]], Callable[[], object]]] = {
    "eager": lambda model, inputs: lambda: model(*inputs),
    "compile": _compiled,
    "onnx": _in_onnx,
}


def _calls_within(run: Callable[[], object], seconds: float) -> int:
    run()
    start, count = time.process_time(), 0
    while time.process_time() - start < seconds:
        run()
        count += 1
    return count


def _seconds_per_call(run: Callable[[], object], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats
