"""Edits of a model as PyTorch code: the printed patch is the code that was run.

An edit is a list of lines, each about one module; equal lines about consecutive modules become
one loop.
"""

from __future__ import annotations

import ast
import copy
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn

_LIST = textwrap.TextWrapper(
    88, initial_indent="for layer in [\n    ", subsequent_indent="    ", break_long_words=False
)
_INDEX = re.compile(r"\[(\d+)\]")


@dataclass(frozen=True)
class Line:
    """PyTorch code about one module; `{at}` stands for its address, such as `model[2]`."""

    at: str
    code: str


def address(model: nn.Module, path: str) -> str:
    """Return a module's path as Python: `layers.3.act` is `model.layers[3].act`.

    >>> address(nn.Sequential(nn.Sequential(nn.ReLU())), "0.0")
    'model[0][0]'
    """
    text, module = "model", model
    for name in path.split(".") if path else ():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            text += f"[{list(module._modules).index(name)}]"
        elif isinstance(module, nn.ModuleDict):
            text += f"[{name!r}]"
        else:
            text += f".{name}" if name.isidentifier() else f"._modules[{name!r}]"
        module = module.get_submodule(name)
    return text


def script(lines: Sequence[Line]) -> str:
    """Join lines to code, with loops over evenly spaced indices or over a list of modules.

    >>> print(script([Line(f"model[{i}]", "nn.init.zeros_({at}.bias)") for i in (0, 2, 4)]))
    for i in range(0, 5, 2):
        nn.init.zeros_(model[i].bias)
    """
    text: list[str] = []
    for code, group in groupby(lines, key=lambda line: line.code):
        places = [line.at for line in group]
        while places:
            run, head, name = _run(places)
            if run <= 2 < len(places) and "\n" in code and "{at} =" not in code:
                run, name = len(places), "layer"
                head = _LIST.fill(", ".join(places)) + "\n]:"
            if run > 2:
                text += [head, *(f"    {row}" for row in code.replace("{at}", name).split("\n"))]
            else:
                run = 1
                text.append(code.replace("{at}", places[0]))
            places = places[run:]
    return "\n".join(text)


def _run(places: list[str]) -> tuple[int, str, str]:
    """Return how many leading addresses differ evenly in one index, and the loop over them."""
    cuts = [_INDEX.split(place) for place in places]
    if len(cuts) < 3 or len(cuts[0]) != len(cuts[1]):
        return 1, "", ""
    moved = [k for k, (a, b) in enumerate(zip(cuts[0], cuts[1])) if a != b]
    if len(moved) != 1 or moved[0] % 2 == 0:
        return 1, "", ""
    at = moved[0]
    start, step = int(cuts[0][at]), int(cuts[1][at]) - int(cuts[0][at])
    count = 0
    for cut in cuts:
        same = [*cuts[0][:at], str(start + count * step), *cuts[0][at + 1 :]]
        if step < 1 or cut != same:
            break
        count += 1
    stop = start + (count - 1) * step + 1
    span = f"{start}, {stop}, {step}" if step > 1 else f"{start}, {stop}" if start else f"{stop}"
    indexed = [f"[{part}]" if k % 2 else part for k, part in enumerate(cuts[0])]
    indexed[at] = "[i]"
    return count, f"for i in range({span}):", "".join(indexed)


def with_imports(patch: str) -> str:
    """Prepend the imports that the names in a patch need.

    >>> print(with_imports("scale = math.pi"))
    import math
    scale = math.pi
    """
    used = {node.id for node in ast.walk(ast.parse(patch)) if isinstance(node, ast.Name)}
    lines = [f"import {name}" for name in ("copy", "math", "torch") if name in used]
    lines += ["from torch import nn"] if "nn" in used else []
    return "\n".join([*lines, patch])


def execute(code: str, **names: object) -> dict[str, Any]:
    """Run a patch and return its namespace, with `model` and `optimizer`."""
    space: dict[str, object] = {"torch": torch, "nn": nn, "math": math, "copy": copy, **names}
    exec(compile(code, "<patch>", "exec"), space)
    return space
