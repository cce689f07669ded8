"""Treatments of the data: scaling, shifting, shuffling, removing rows and columns.

Each function changes a replica in place and returns the code that does the same to the user's
data, or "" if it does not apply. Edits of inputs become a layer in front of the model, so that
later inputs are edited too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.cures import surgery
from tikhon.cures.patch import execute
from tikhon.data.nested import Batch, batch_length, take_rows, tensors
from tikhon.diagnosis.replica import Replica
from tikhon.diagnosis.samples import Samples, samples as read
from tikhon.diagnosis.wiring.dataset import copied_columns

DataEdit = Callable[[Replica, Samples], str]
SKEWED_MEDIAN = 0.5  # of the mean: numbers of one sign with a median below are log-transformed


def _mean_and_scale(name: str, values: Tensor, *, front: bool = False) -> str:
    """Return code for the mean and deviation of each channel (axis 1 if `front`) or feature."""
    if values.ndim < 3:
        return f"shift, scale = {name}.mean(0), {name}.std(0)"
    axes = [str(k) for k in range(values.ndim) if k != (1 if front else values.ndim - 1)]
    over = f"({', '.join(axes)}), keepdim=True"
    return f"shift, scale = {name}.mean({over})[0], {name}.std({over})[0]"


def _channels_first(values: Tensor, model: nn.Module) -> bool:
    convolved = any(isinstance(m, nn.Conv1d) for m in model.modules())
    return values.ndim > 3 or (values.ndim == 3 and convolved)


def scale_inputs(replica: Replica, samples: Samples) -> str:
    """Standardise inputs per column or channel."""
    inputs = samples.source[0] if samples.indexed else samples.probe[0]
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return ""
    front = _channels_first(inputs, replica.model)
    code = (
        f"{_mean_and_scale('x_train', inputs, front=front)}\n"
        "scale = torch.where(scale > 1e-6 * shift.abs(), scale, 1.0)  # constant ones stay\n"
        "x_train = (x_train - shift) / scale  # and all inputs from now on"
    )
    space = execute(code, x_train=inputs)
    replica.model = nn.Sequential(surgery.Affine(space["shift"], space["scale"]), replica.model)
    return code


def scale_targets(replica: Replica, samples: Samples) -> str:
    """Standardise targets; scores stay in the original unit."""
    target = (samples.source if samples.indexed else samples.probe)[1]
    if not isinstance(target, Tensor) or not target.is_floating_point():
        return ""
    code = (
        f"{_mean_and_scale('y_train', target, front=target.ndim > 3)}.clamp_min(1e-12)\n"
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


def scale_targets_to_unit_range(replica: Replica, samples: Samples) -> str:
    """Scale targets to [0, 1], the range of a sigmoid."""
    ends = target_range(samples)
    if ends is None:
        return ""
    (low, high), loss = ends, replica.loss
    replica.loss = lambda output, y: loss(output, (y - low) / (high - low))
    return (
        "low, high = y_train.min(), y_train.max()\n"
        "y_train = (y_train - low) / (high - low)  # and all targets from now on"
    )


def drop_target_columns(replica: Replica, samples: Samples) -> str:
    """Set the input columns that equal the target to 0."""
    columns = target_columns(samples)
    if not columns:
        return ""
    inputs = samples.probe[0]
    code = (
        f"columns = {columns}  # they hold the target\n"
        "x_train.flatten(1)[:, columns] = 0.0  # and in all inputs from now on; better drop them"
    )
    scale = torch.ones_like(inputs[:1]).flatten(1)
    scale[:, columns] = torch.inf
    scale = scale.reshape(inputs[:1].shape)[0]
    mask = surgery.Affine(torch.zeros_like(scale), scale)
    replica.model = nn.Sequential(mask, replica.model)
    return code


def target_columns(samples: Samples) -> list[int]:
    """Return the input columns that equal the target."""
    inputs, target = samples.source if samples.indexed else samples.probe
    if not isinstance(inputs, Tensor) or not isinstance(target, Tensor):
        return []
    found: Any = copied_columns(inputs, target).get("target_columns_in_inputs", [])
    return list(found)


SHUFFLE = (
    "loader = torch.utils.data.DataLoader(\n"
    "    loader.dataset, loader.batch_size, shuffle=True, collate_fn=loader.collate_fn\n)"
)


def shuffle_rows(replica: Replica, samples: Samples) -> str:
    """Shuffle the rows of a loader in each epoch."""
    if not _is_map_style(samples):
        return ""
    replica.source = replace(samples, source=execute(SHUFFLE, loader=samples.source)["loader"])
    return SHUFFLE


def _is_map_style(samples: Samples) -> bool:
    """Return whether the source is a loader of a map-style dataset, which can be shuffled."""
    loader = samples.source
    if samples.indexed or not isinstance(loader, torch.utils.data.DataLoader):
        return False
    stream = isinstance(loader.dataset, torch.utils.data.IterableDataset)
    return loader.batch_size is not None and not stream


def probe_of_all_rows(samples: Samples) -> Samples:
    """Draw the probe batch from all rows of a loader."""
    if not _is_map_style(samples):
        return samples
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return replace(
            samples, probe=read(execute(SHUFFLE, loader=samples.source)["loader"]).probe
        )


def edit_rows(
    code: str, replica: Replica, samples: Samples, valid_batch: Batch | None = None
) -> str:
    """Run code on the training rows and train on its result; return "" if nothing changed."""
    if not samples.indexed or not isinstance(samples.source[1], Tensor):
        return ""
    pair: Batch = samples.source
    valid = (None, None) if valid_batch is None else valid_batch
    names = dict(zip(("x_train", "y_train", "x_valid", "y_valid"), (*pair, *valid)))
    space = execute(code, **names)
    kept = space["x_train"], space["y_train"]
    same = all(a is b or (isinstance(a, Tensor) and torch.equal(a, b)) for a, b in zip(kept, pair))
    if same or not len(kept[1]):
        return ""
    replica.source = replace(samples, source=kept, rows=len(kept[1]))
    return code


def log_inputs(replica: Replica, samples: Samples) -> str:
    """Log-transform and standardise positive inputs with a skewed distribution."""
    inputs = samples.source[0] if samples.indexed else samples.probe[0]
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return ""
    lowest, middle, mean = (float(part) for part in (inputs.min(), inputs.median(), inputs.mean()))
    if not 0 <= lowest <= middle < SKEWED_MEDIAN * mean:
        return ""
    least = float(f"{1e-6 * mean:.0e}")
    code = (
        f"x_train = (x_train + {least:g}).log()  # and all inputs from now on\n"
        f"shift, scale = x_train.mean(), x_train.std()\n"
        "x_train = (x_train - shift) / scale"
    )
    space = execute(code, x_train=inputs)
    front = (surgery.Logarithm(least), surgery.Affine(space["shift"], space["scale"]))
    replica.model = nn.Sequential(*front, replica.model)
    return code


def without_gaps(batch: Batch) -> Batch:
    """Return the rows with finite numbers only; all rows if there are none."""
    rows = torch.ones(batch_length(batch), dtype=torch.bool)
    for part in tensors(batch):
        if part.is_floating_point() and len(part) == len(rows):
            rows &= part.detach().reshape(len(rows), -1).isfinite().all(1).cpu()
    return take_rows(batch, rows.nonzero()[:, 0]) if bool(rows.any()) else batch


def fill_gaps(replica: Replica, samples: Samples) -> str:
    """Replace non-finite inputs by 0, in any of several inputs."""
    found = [t for t in tensors(samples.probe[0]) if t.is_floating_point()]
    if all(bool(t.isfinite().all()) for t in found):
        return ""
    code = (
        "def filled(model, args, kwargs):\n"
        "    def fill(x):\n"
        "        real = isinstance(x, torch.Tensor) and x.is_floating_point()\n"
        "        return x.nan_to_num(0.0, 0.0, 0.0) if real else x\n\n"
        "    return tuple(map(fill, args)), {name: fill(x) for name, x in kwargs.items()}\n\n\n"
        "model.register_forward_pre_hook(filled, with_kwargs=True)"
    )
    execute(code, model=replica.model)
    return code


def shift_targets(replica: Replica, samples: Samples) -> str:
    """Make the target of a position the input at the next one."""
    pair = samples.source if samples.indexed else (None, None)
    if not is_copy_of_target(pair):
        return ""
    return edit_rows("x_train, y_train = x_train[:, :-1], y_train[:, 1:]", replica, samples)


def shift_decoder_input(replica: Replica, samples: Samples) -> str:
    """Give a decoder the previous token, and a start token at first."""
    place = target_input(samples.source) if samples.indexed else None
    if place is None:
        return ""
    start = start_token(replica.model, samples.source[1])
    code = (
        f"start = {start}  # the word that every answer begins with\n"
        "before = torch.cat([torch.full_like(y_train[:, :1], start), y_train[:, :-1]], 1)\n"
        f"x_train = (*x_train[:{place}], before, *x_train[{place + 1}:])"
    )
    return edit_rows(code, replica, samples)


def shifted_tokens(words: Tensor, start: int) -> Tensor:
    """Shift tokens one position later, behind a start token."""
    return torch.cat([torch.full_like(words[:, :1], start), words[:, :-1]], 1)


def start_token(model: nn.Module, words: Tensor) -> int:
    """Return an unused token that has an embedding, or 0."""
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    free = int(words.max()) + 1
    return free if free < max(sizes, default=0) else 0


def target_input(batch: Batch) -> int | None:
    """Return which of several inputs equals the target, or None."""
    x, y = batch
    if not isinstance(x, tuple) or not isinstance(y, Tensor):
        return None
    return next((k for k, part in enumerate(x) if is_copy_of_target((part, y))), None)


def is_copy_of_target(batch: Batch) -> bool:
    """Return whether the target of a sequence is the sequence itself."""
    x, y = batch
    same = isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape
    return same and x.ndim > 1 and x.shape[1] > 2 and torch.equal(x, y)


def target_range(samples: Samples) -> tuple[Tensor, Tensor] | None:
    """Return the smallest and largest target; None for class labels."""
    target = samples.source[1] if samples.indexed else None
    if not isinstance(target, Tensor) or not target.is_floating_point():
        return None
    values = target.unique()
    names = len(values) > 2 and bool((values == values.round()).all())
    return None if len(values) < 2 or names else (values[0], values[-1])
