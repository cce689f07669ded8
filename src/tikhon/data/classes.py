"""Check the classes of training against validation rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor

from tikhon.errors import DataError


def check_classes(y: Tensor, valid: Tensor | None = None) -> None:
    """Check that every class can be learned; warn of classes missing from `valid`.

    Float targets have no classes. Raises `DataError` for rows of a single class, and for classes
    present only in `valid`.
    """
    if y.is_floating_point() or (valid is not None and valid.is_floating_point()):
        return
    present = set(y.unique().tolist())
    if len(present) < 2:
        raise DataError(f"train holds the single class {_listed(present)}: nothing can be learned")
    scored = present if valid is None else set(valid.unique().tolist())
    if unseen := scored - present:
        raise DataError(f"valid holds classes that train lacks: {_listed(unseen)}")
    if missing := present - scored:
        warnings.warn(
            f"valid lacks classes of train: {_listed(missing)}; its scores say nothing of "
            "them; use a stratified split",
            stacklevel=3,
        )


def _listed(classes: Iterable[int]) -> str:
    found = sorted(classes)
    return ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
