"""A treatment: one change of a program, as code."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from tikhon.cures import surgery
from tikhon.cures.calls import CallRule
from tikhon.cures.data import DataEdit, edit_rows
from tikhon.cures.patch import execute, script, with_imports
from tikhon.data.nested import Batch
from tikhon.diagnosis.replica import Replica
from tikhon.diagnosis.samples import Samples
from tikhon.options import OPTIMIZERS

BEFORE = "# before the optimizer is built"
SETUP = "# after the optimizer is built"
AFTER = "# after training"
OPTION_KINDS = {"lr", "adam", "decay", "penalty", "clip", "batch"}  # options of a command say them


class _NothingToChange(Exception):
    """The treatment does not apply to the program."""


@dataclass(frozen=True)
class Treatment:
    """One change of a program.

    `size` orders edits from small (a number) to large (an architecture). `edit` writes the lines
    that change the model; `setup` is code for after the optimizer is built, `after` for after
    training. `recipe` holds what a `Recipe` can say of it.
    """

    name: str
    size: int
    kind: str = ""
    edit: surgery.Edit | None = None
    setup: str = ""
    after: str = ""
    batch: int | None = None
    without_penalty: bool = False  # without penalty and weight decay
    rows: str = ""  # code for `x_train` and `y_train`, which may read the validation rows
    data_edit: DataEdit | None = None  # of the replica's data
    rewrite: CallRule | None = None  # of what the model's and the loss's own code calls
    code_fix: str = ""  # what to write in one's own code, where the patch works around it
    only_if_missing: bool = False  # only where the optimizer lacks trainable tensors
    recipe: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[Treatment, ...] = ()  # of a combined treatment

    def __and__(self, other: Treatment) -> Treatment:
        """Combine two treatments, this one first."""
        if not self.size or not other.size:
            return self if self.size else other
        return Treatment(
            f"{self.name} + {other.name}",
            self.size + other.size,
            self.kind,
            batch=other.batch or self.batch,
            code_fix="; ".join(filter(None, (self.code_fix, other.code_fix))),
            recipe={**self.recipe, **other.recipe},
            parts=(*(self.parts or (self,)), *(other.parts or (other,))),
        )

    @property
    def names(self) -> set[str]:
        """Names of its parts."""
        return {part.name for part in self.parts or (self,)}

    @property
    def place(self) -> Literal["options", "model", "program"]:
        """Where a person makes the change: options of a command, the model's code, or more."""
        parts = [part for part in self.parts or (self,) if part.kind not in OPTION_KINDS]
        if not parts:
            return "options"
        in_model = all(p.edit and not (p.setup or p.rows or p.data_edit) for p in parts)
        return "model" if in_model else "program"

    def apply(self, replica: Replica, samples: Samples, valid_batch: Batch | None = None) -> bool:
        """Treat the replica in place and store the patch on it; return False if not applicable."""
        parts = self.parts or (self,)
        try:
            before = [
                code for part in parts if (code := part._edit_model(replica, samples, valid_batch))
            ]
            setup = [
                code
                for part in parts
                if (code := part._edit_training(replica, samples, valid_batch))
            ]
        except _NothingToChange:
            return False
        after = [part.after for part in parts if part.after]
        sections = [
            line
            for head, codes in ((BEFORE, before), (SETUP, setup), (AFTER, after))
            for line in ((head, *codes) if codes else ())
        ]
        replica.patch = with_imports("\n".join(sections))
        return True

    def _edit_model(self, replica: Replica, samples: Samples, valid_batch: Batch | None) -> str:
        """Change the model and the data; return the code."""
        codes = []
        if self.edit is not None:
            frozen = {id(p) for p in replica.model.parameters() if not p.requires_grad}
            code = _on_device(script(self.edit(replica.model, samples.probe)), replica.model)
            if not code:
                raise _NothingToChange
            replica.model = execute(code, model=replica.model, x=samples.probe[0])["model"]
            _sync_parameters(replica, frozen)
            codes.append(code)
        source = replica.source or samples  # of a treatment before this one
        if self.rows:
            codes.append(edit_rows(self.rows, replica, source, valid_batch))
        elif self.data_edit is not None:
            codes.append(self.data_edit(replica, source))
        if "" in codes:
            raise _NothingToChange
        return "\n".join(codes)

    def _edit_training(self, replica: Replica, samples: Samples, valid_batch: Batch | None) -> str:
        """Change the optimizer, the loss and calls; return the code."""
        if self.only_if_missing and not _has_missing_parameters(replica):
            raise _NothingToChange
        codes = [_penalty_removal(replica) if self.without_penalty else "", self.setup]
        if self.rewrite is not None:
            codes.append(self.rewrite.code(replica, samples.probe))
        code = "\n".join(filter(None, codes))
        if not code and (self.without_penalty or self.rewrite is not None):
            raise _NothingToChange
        if code and replica.whole:  # a loss that only calls the user's may take what that takes
            code = code.replace("output, y", "model, batch")
        if code:
            self._run_setup(replica, code, valid_batch)
        return code

    def is_optimizer_of(self, replica: Replica) -> bool:
        """Return whether the setup builds the optimizer that the program has."""
        own = optimizer_settings(replica.optimizer)
        space = execute(self.setup, model=replica.model, optimizer=replica.optimizer)
        return optimizer_settings(space["optimizer"]) == own

    def _run_setup(self, replica: Replica, setup: str, valid_batch: Batch | None) -> None:
        names: dict[str, object] = {"x_valid": None, "y_valid": None}
        if valid_batch is not None:
            names = {"x_valid": valid_batch[0], "y_valid": valid_batch[1]}
        space = execute(
            setup,
            model=replica.model,
            optimizer=replica.optimizer,
            loss=replica.loss,
            penalty=replica.penalty,
            **names,
        )
        replica.optimizer, replica.penalty = space["optimizer"], space["penalty"]
        replica.loss = space["loss"]
        if self.without_penalty:
            replica.terms = None
        if self.after:
            replica.finish = lambda: execute(self.after, **space)


def _on_device(code: str, model: nn.Module) -> str:
    """Return code that also moves new layers to the model's device and dtype."""
    first = next(model.parameters(), torch.zeros(()))
    if code and (first.device.type != "cpu" or first.dtype != torch.float32):
        return f'{code}\nmodel.to("{first.device}", {first.dtype})'
    return code


def _sync_parameters(replica: Replica, frozen: set[int]) -> None:
    """Add new parameters to the optimizer's first group, and drop removed ones."""
    engine = replica.optimizer
    assert engine is not None
    present = {id(p): p for p in replica.model.parameters()}
    held = {id(p) for g in engine.param_groups for p in g["params"]}
    known = held | (replica.left_out - frozen)
    for group in engine.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in present]
    new = [p for i, p in present.items() if i not in known and p.requires_grad]
    engine.param_groups[0]["params"] += new


def _has_missing_parameters(replica: Replica) -> bool:
    """Return whether the optimizer lacks trainable parameters of the model."""
    assert replica.optimizer is not None
    held = {id(p) for g in replica.optimizer.param_groups for p in g["params"]}
    return any(p.requires_grad and id(p) not in held for p in replica.model.parameters())


def _penalty_removal(replica: Replica) -> str:
    """Return code that removes the penalty and the weight decay."""
    engine = replica.optimizer
    assert engine is not None
    lines = []
    if replica.penalty is not None or replica.terms is not None:
        lines.append("penalty = None  # leave it out of the loss")
    if any(group.get("weight_decay") for group in engine.param_groups):
        lines.append('for group in optimizer.param_groups:\n    group["weight_decay"] = 0.0')
    return "\n".join(lines)


def optimizer_settings(optimizer: Any) -> list[Any]:
    """Return type and settings of an optimizer, for comparison; AdamW without decay is Adam."""
    kind = torch.optim.Adam if isinstance(optimizer, torch.optim.Adam) else type(optimizer)
    groups = []
    for group in optimizer.param_groups:
        known = {k: v for k, v in group.items() if k != "params"}
        if not known.get("weight_decay"):
            known.pop("decoupled_weight_decay", None)
        groups.append({**known, "count": len(group["params"])})
    return [kind, *groups]


def optimizer_option(optimizer: torch.optim.Optimizer | None) -> str | None:
    """Return the value of `--optimizer` that builds the same optimizer; None if none does.

    >>> optimizer_option(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9))
    'sgd:0.1,momentum=0.9'
    """
    if optimizer is None:
        return None
    first, *others = optimizer_settings(optimizer)[1:]
    if {type(optimizer).__name__.lower()} - set(OPTIMIZERS) or any(
        {**group, "count": 0} != {**first, "count": 0} for group in others
    ):
        return None
    signature = inspect.signature(type(optimizer)).parameters
    usual = {name: told.default for name, told in signature.items() if name != "lr"}
    changed = {k: v for k, v in first.items() if k in usual and v != usual[k]}
    if not all(isinstance(value, int | float) for value in changed.values()):
        return None
    settings = [f"{first['lr']:g}", *(f"{k}={float(v):g}" for k, v in changed.items())]
    return f"{type(optimizer).__name__.lower()}:{','.join(settings)}"
