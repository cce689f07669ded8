"""Treatments of the data: scaled, shifted, shuffled, without what does not belong there.

Each function changes a replica in place and returns the code that does the same to the user's
data; nothing where it does not apply. What a model will be asked later is changed in front of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.cures import surgery
from tikhon.cures.patch import execute
from tikhon.data.rows import Batch
from tikhon.diagnosis.replica import Replica
from tikhon.diagnosis.samples import Samples
from tikhon.diagnosis.wiring.signal import copied_columns


def _mean_and_scale(name: str, values: Tensor) -> str:
    """Code for the mean and deviation of each column, of each channel of pictures."""
    over = "(0, 2, 3), keepdim=True" if values.ndim == 4 else "0"
    flat = "[0]" if values.ndim == 4 else ""
    return f"shift, scale = {name}.mean({over}){flat}, {name}.std({over}){flat}"


def _scale_inputs(replica: Replica, samples: Samples) -> str:
    inputs = samples.source[0] if samples.indexed else samples.probe[0]
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return ""
    code = (
        f"{_mean_and_scale('x_train', inputs)}\n"
        "scale = torch.where(scale > 1e-3 * scale.max(), scale, scale.max().clamp_min(1e-12))\n"
        "x_train = (x_train - shift) / scale  # and all inputs from now on"
    )
    space = execute(code, x_train=inputs)
    replica.model = nn.Sequential(surgery.Affine(space["shift"], space["scale"]), replica.model)
    return code


def _scale_targets(replica: Replica, samples: Samples) -> str:
    target = (samples.source if samples.indexed else samples.probe)[1]
    if not isinstance(target, Tensor) or not target.is_floating_point():
        return ""
    code = (
        f"{_mean_and_scale('y_train', target)}.clamp_min(1e-12)\n"
        "binary = ((y_train == 0) | (y_train == 1)).all(0)\n"
        "shift, scale = shift.masked_fill(binary, 0.0), scale.masked_fill(binary, 1.0)\n"
        "y_train = (y_train - shift) / scale  # predict with model(x) * scale + shift"
    )
    space = execute(code, y_train=target)
    shift, scale = space["shift"], space["scale"]
    replica.model = nn.Sequential(replica.model, surgery.Affine(-shift / scale, 1 / scale))
    loss = replica.loss
    replica.loss = lambda output, y: loss((output - shift) / scale, (y - shift) / scale)
    return code


def _fit_to_one(replica: Replica, samples: Samples) -> str:
    ends = ends_of(samples)
    if ends is None:
        return ""
    (low, high), loss = ends, replica.loss
    replica.loss = lambda output, y: loss(output, (y - low) / (high - low))
    return (
        "low, high = y_train.min(), y_train.max()\n"
        "y_train = (y_train - low) / (high - low)  # and all targets from now on"
    )


def _without_copies(replica: Replica, samples: Samples) -> str:
    """The columns that the target stands in, set to 0."""
    columns = copies_of(samples)
    if not columns:
        return ""
    inputs = samples.probe[0]
    code = (
        f"columns = {columns}  # they hold the target\n"
        "x_train.flatten(1)[:, columns] = 0.0  # and in all inputs from now on; better drop them"
    )
    keep = torch.ones_like(inputs[:1]).flatten(1)
    keep[:, columns] = 0.0
    scale = keep.reshape(inputs[:1].shape)[0]
    replica.model = nn.Sequential(surgery.Times(scale), replica.model)
    return code


def copies_of(samples: Samples) -> list[int]:
    """The columns of the inputs that are the target."""
    inputs, target = samples.source if samples.indexed else samples.probe
    if not isinstance(inputs, Tensor) or not isinstance(target, Tensor):
        return []
    found: Any = copied_columns(inputs, target).get("target_columns_in_inputs", [])
    return list(found)


def _shuffle(replica: Replica, samples: Samples) -> str:
    """The rows of a loader in a new order in each epoch."""
    loader = samples.source
    if samples.indexed or not isinstance(loader, torch.utils.data.DataLoader):
        return ""
    code = (
        "loader = torch.utils.data.DataLoader(\n"
        "    loader.dataset, loader.batch_size, shuffle=True, collate_fn=loader.collate_fn\n)"
    )
    replica.source = replace(samples, source=execute(code, loader=loader)["loader"])
    return code


def _finite_rows(replica: Replica, samples: Samples) -> str:
    """Without the rows that hold numbers which are not finite."""
    inputs, target = samples.source if samples.indexed else (None, None)
    if not isinstance(inputs, Tensor) or not isinstance(target, Tensor):
        return ""
    code = (
        "rows = x_train.flatten(1).isfinite().all(1) & y_train.reshape(len(y_train), -1)"
        ".isfinite().all(1)\n"
        "x_train, y_train = x_train[rows], y_train[rows]"
    )
    space = execute(code, x_train=inputs, y_train=target)
    kept = space["x_train"], space["y_train"]
    if not 0 < len(kept[1]) < len(target):
        return ""
    replica.source = replace(samples, source=kept, rows=len(kept[1]))
    return code


def _filled(replica: Replica, samples: Samples) -> str:
    """0 in the place of inputs that are not finite."""
    inputs = samples.probe[0]
    if not isinstance(inputs, Tensor) or bool(inputs.isfinite().all()):
        return ""
    replica.model = nn.Sequential(surgery.Filled(), replica.model)
    return "x_train = x_train.nan_to_num(0.0, 0.0, 0.0)  # and all inputs from now on"


def _next(replica: Replica, samples: Samples) -> str:
    """The target of a position is what stands at the next one."""
    pair = samples.source if samples.indexed else (None, None)
    if not is_own_target(pair):
        return ""
    code = "x_train, y_train = x_train[:, :-1], y_train[:, 1:]"
    space = execute(code, x_train=pair[0], y_train=pair[1])
    replica.source = replace(samples, source=(space["x_train"], space["y_train"]))
    return code


def is_own_target(batch: Batch) -> bool:
    """Whether a sequence is its own target, position for position."""
    x, y = batch
    same = isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape
    return same and x.ndim > 1 and x.shape[1] > 2 and torch.equal(x, y)


def ends_of(samples: Samples) -> tuple[Tensor, Tensor] | None:
    """The smallest and the largest target, which may become 0 and 1; None for names of classes."""
    target = samples.source[1] if samples.indexed else None
    if not isinstance(target, Tensor) or not target.is_floating_point():
        return None
    values = target.unique()
    names = len(values) > 2 and bool((values == values.round()).all())
    return None if len(values) < 2 or names else (values[0], values[-1])


DATA: dict[str, Callable[[Replica, Samples], str]] = {
    "inputs": _scale_inputs,
    "targets": _scale_targets,
    "to one": _fit_to_one,
    "without copies": _without_copies,
    "shuffled": _shuffle,
    "finite rows": _finite_rows,
    "filled": _filled,
    "next": _next,
}
