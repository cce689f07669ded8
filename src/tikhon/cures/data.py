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
from tikhon.data.rows import Batch, length, take, tensors
from tikhon.diagnosis.replica import Replica
from tikhon.diagnosis.samples import Samples, samples as read
from tikhon.diagnosis.wiring.dataset import copied_columns

DataEdit = Callable[[Replica, Samples], str]
SKEWED = 0.5  # of the mean: a median below it, of numbers of one sign, asks for logarithms


def _mean_and_scale(name: str, values: Tensor, *, front: bool = False) -> str:
    """Code for the mean and deviation of each column: of a channel, or of a feature over time.

    Channels are in front where pictures are, and where convolutions read a series.
    """
    if values.ndim < 3:
        return f"shift, scale = {name}.mean(0), {name}.std(0)"
    axes = [str(k) for k in range(values.ndim) if k != (1 if front else values.ndim - 1)]
    over = f"({', '.join(axes)}), keepdim=True"
    return f"shift, scale = {name}.mean({over})[0], {name}.std({over})[0]"


def _channels_first(values: Tensor, model: nn.Module) -> bool:
    convolved = any(isinstance(m, nn.Conv1d) for m in model.modules())
    return values.ndim > 3 or (values.ndim == 3 and convolved)


def scaled_inputs(replica: Replica, samples: Samples) -> str:
    """Inputs of mean 0 and deviation 1, by column or channel."""
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


def scaled_targets(replica: Replica, samples: Samples) -> str:
    """Targets of mean 0 and deviation 1, scored in their own unit."""
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


def fitted_to_one(replica: Replica, samples: Samples) -> str:
    """Targets from 0 to 1, as a head with a sigmoid can say them."""
    ends = ends_of(samples)
    if ends is None:
        return ""
    (low, high), loss = ends, replica.loss
    replica.loss = lambda output, y: loss(output, (y - low) / (high - low))
    return (
        "low, high = y_train.min(), y_train.max()\n"
        "y_train = (y_train - low) / (high - low)  # and all targets from now on"
    )


def without_copies(replica: Replica, samples: Samples) -> str:
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


SHUFFLED = (
    "loader = torch.utils.data.DataLoader(\n"
    "    loader.dataset, loader.batch_size, shuffle=True, collate_fn=loader.collate_fn\n)"
)


def shuffled(replica: Replica, samples: Samples) -> str:
    """The rows of a loader in a new order in each epoch."""
    if not _listed(samples):
        return ""
    replica.source = replace(samples, source=execute(SHUFFLED, loader=samples.source)["loader"])
    return SHUFFLED


def _listed(samples: Samples) -> bool:
    """Whether the rows come from a loader that may take them in another order."""
    loader = samples.source
    if samples.indexed or not isinstance(loader, torch.utils.data.DataLoader):
        return False
    stream = isinstance(loader.dataset, torch.utils.data.IterableDataset)
    return loader.batch_size is not None and not stream


def from_all_rows(samples: Samples) -> Samples:
    """The same, but what is measured on is drawn from all rows of the loader."""
    if not _listed(samples):
        return samples
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return replace(
            samples, probe=read(execute(SHUFFLED, loader=samples.source)["loader"]).probe
        )


def on_rows(code: str, replica: Replica, samples: Samples, judge: Batch | None = None) -> str:
    """The code, run on the training rows: what it leaves is trained on; none if all stays."""
    if not samples.indexed or not isinstance(samples.source[1], Tensor):
        return ""
    pair: Batch = samples.source
    valid = (None, None) if judge is None else judge
    names = dict(zip(("x_train", "y_train", "x_valid", "y_valid"), (*pair, *valid)))
    space = execute(code, **names)
    kept = space["x_train"], space["y_train"]
    same = all(a is b or (isinstance(a, Tensor) and torch.equal(a, b)) for a, b in zip(kept, pair))
    if same or not len(kept[1]):
        return ""
    replica.source = replace(samples, source=kept, rows=len(kept[1]))
    return code


def logarithms(replica: Replica, samples: Samples) -> str:
    """Logarithms of powers, counts or prices, most of which lie near 0."""
    inputs = samples.source[0] if samples.indexed else samples.probe[0]
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return ""
    if not 0 <= float(inputs.min()) <= float(inputs.median()) < SKEWED * float(inputs.mean()):
        return ""
    least = float(f"{1e-6 * float(inputs.mean()):.0e}")
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
    """The rows all numbers of which are finite; all rows where there is none."""
    rows = torch.ones(length(batch), dtype=torch.bool)
    for part in tensors(batch):
        if part.is_floating_point() and len(part) == len(rows):
            rows &= part.detach().reshape(len(rows), -1).isfinite().all(1).cpu()
    return take(batch, rows.nonzero()[:, 0]) if bool(rows.any()) else batch


def filled(replica: Replica, samples: Samples) -> str:
    """0 in the place of inputs that are not finite, whichever of several they are."""
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


def next_position(replica: Replica, samples: Samples) -> str:
    """The target of a position is what stands at the next one."""
    pair = samples.source if samples.indexed else (None, None)
    if not is_own_target(pair):
        return ""
    return on_rows("x_train, y_train = x_train[:, :-1], y_train[:, 1:]", replica, samples)


def begun(replica: Replica, samples: Samples) -> str:
    """A decoder that is given the word before, and a sign to begin with."""
    place = told(samples.source) if samples.indexed else None
    if place is None:
        return ""
    start = start_of(replica.model, samples.source[1])
    code = (
        f"start = {start}  # the word that every answer begins with\n"
        "before = torch.cat([torch.full_like(y_train[:, :1], start), y_train[:, :-1]], 1)\n"
        f"x_train = (*x_train[:{place}], before, *x_train[{place + 1}:])"
    )
    return on_rows(code, replica, samples)


def words_before(words: Tensor, start: int) -> Tensor:
    """The words, each one position later, behind a sign to begin with."""
    return torch.cat([torch.full_like(words[:, :1], start), words[:, :-1]], 1)


def start_of(model: nn.Module, words: Tensor) -> int:
    """A word that stands in no text and has an embedding; 0 where there is none."""
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    free = int(words.max()) + 1
    return free if free < max(sizes, default=0) else 0


def told(batch: Batch) -> int | None:
    """The place among several inputs of words that are the target, position for position."""
    x, y = batch
    if not isinstance(x, tuple) or not isinstance(y, Tensor):
        return None
    return next((k for k, part in enumerate(x) if is_own_target((part, y))), None)


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
