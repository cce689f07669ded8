"""Targets of a linear path: numbers or classes, and the rows of each fold."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tikhon.errors import InputError
from tikhon.paths.linear import Kind


@dataclass(frozen=True, eq=False)
class Targets:
    """Targets for the loss: `codes`, for classes indices into `classes`."""

    kind: Kind
    outputs: int
    codes: Tensor
    classes: tuple[int, ...] = ()

    @classmethod
    def of(cls, y: Tensor, outputs: int | None = None) -> Targets:
        """Treat float targets as numbers, integers and booleans as class labels.

        `outputs` is that of a given model; labels that are valid output indices are kept.
        """
        if y.is_floating_point():
            if not y.isfinite().all():
                raise InputError("the targets hold NaN or infinite numbers: drop those rows")
            return cls("squared", y.reshape(len(y), -1).shape[1], y)
        y = _labels(y)
        classes = torch.unique(y)
        _check_classes(classes, len(y))
        if outputs is not None and outputs > 1:
            if int(classes[0]) < 0 or int(classes[-1]) >= outputs:
                raise InputError(
                    f"the model has {outputs} outputs, so the targets must be 0 to {outputs - 1}; "
                    f"received classes {_format_classes(classes)}"
                )
            return cls("multinomial", outputs, y.long(), tuple(range(outputs)))
        kind: Kind = "logistic" if len(classes) == 2 else "multinomial"
        if kind == "multinomial" and outputs == 1:
            raise InputError(
                f"one output tells two classes apart, received {_format_classes(classes)}"
            )
        found = 1 if kind == "logistic" else len(classes)
        return cls(kind, found, torch.searchsorted(classes, y), tuple(classes.tolist()))

    def encode(self, y: Tensor) -> Tensor:
        """Encode other targets; raise for classes missing from training."""
        if not self.classes:
            return y
        y = _labels(y)
        present = {self.classes[code] for code in torch.unique(self.codes).tolist()}
        if unseen := set(y.tolist()) - present:
            raise InputError(f"the validation rows hold classes {sorted(unseen)} that train lacks")
        return torch.searchsorted(torch.tensor(self.classes), y)


def _labels(y: Tensor) -> Tensor:
    if y.ndim > 1 and y[0].numel() != 1:
        raise InputError(f"one class a row is needed, received targets of shape {tuple(y.shape)}")
    return y.reshape(-1).long()


def _check_classes(classes: Tensor, rows: int) -> None:
    if len(classes) > 20 and 2 * len(classes) > rows:
        raise InputError(
            f"integer targets are classes, but there are {len(classes)} of them in {rows} rows: "
            "for a regression give them as floating point numbers"
        )


def _format_classes(classes: Tensor) -> str:
    found = classes.tolist()
    return f"{found[:8]}{' and more' if len(found) > 8 else ''}"


def row_weights(weights: object, rows: int) -> Tensor | None:
    """Validate sample weights as a tensor (rows,): finite, >= 0, not all 0."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        weights = np.array(weights, dtype=np.float64)  # a data frame column or a list
    found = torch.as_tensor(weights, dtype=torch.float64).flatten()
    if len(found) != rows:
        raise InputError(
            f"sample_weight must have one entry a row ({rows}), received {len(found)}"
        )
    if not found.isfinite().all() or (found < 0).any() or not found.any():
        raise InputError("sample_weight must be finite and >= 0, and not 0 for every row")
    return found


def fold_rows(y: Tensor, folds: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return (training rows, held-out rows) of each fold, stratified by class.

    Classes with fewer rows than folds train in every fold, with a warning.
    """
    from sklearn.model_selection import KFold, StratifiedKFold

    if not isinstance(folds, int) or folds < 2:
        raise InputError(
            f"folds must be 0 (none) or a whole number of at least 2, received {folds!r}"
        )
    seed %= 2**32  # the range of numpy seeds
    if folds > len(y):
        raise InputError(f"{folds} folds need at least {folds} rows, received {len(y)}")
    if y.is_floating_point() or y.ndim > 1:
        cut = KFold(folds, shuffle=True, random_state=seed).split(y)
    else:
        classes, counts = torch.unique(y, return_counts=True)
        large = counts >= folds
        if large.sum() < 2:
            raise InputError(
                f"{folds} folds need two classes of {folds} rows or more, received classes of "
                f"{', '.join(map(str, sorted(counts.tolist(), reverse=True)[:8]))} rows"
            )
        if not large.all():
            few = ", ".join(map(str, classes[~large].tolist()[:8]))
            warnings.warn(
                f"classes with fewer rows than there are folds ({folds}): {few}; they train in "
                "every fold and are scored in none",
                stacklevel=3,
            )
        common = torch.isin(y, classes[large])
        rows, rare = common.nonzero()[:, 0], (~common).nonzero()[:, 0]
        shuffled = StratifiedKFold(folds, shuffle=True, random_state=seed)
        return [
            (torch.cat([rows[a], rare]), rows[b])
            for a, b in shuffled.split(rows.numpy(), y[rows].numpy())
        ]
    return [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in cut]
