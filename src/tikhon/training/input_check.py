"""Check before training that the model accepts the validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tikhon.copying import copy_with_model
from tikhon.data.forward import call_model
from tikhon.data.nested import slice_rows, tensors
from tikhon.errors import DataError, InputError


def check_model_accepts(model: nn.Module, x: Any, scored: Any, *, name: str = "valid") -> None:
    """Raise `DataError` if the model fails on rows shaped unlike those of `x` (None: unknown).

    The message has both shapes. Different shapes alone are allowed, as a network may accept any
    length or size.
    """
    train_shapes, row_shapes = None if x is None else _shapes(x), _shapes(scored)
    if train_shapes == row_shapes:
        return
    try:
        trial = copy_with_model(model, model).eval()
    except Exception:  # a model that cannot be copied is not checked
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            call_model(trial, slice_rows(scored, slice(2)))
    except InputError:
        raise
    except Exception as error:
        train_note = (
            "" if train_shapes is None else f", those of train {_format_shapes(train_shapes)}"
        )
        raise DataError(
            f"{name}: its rows have the shape {_format_shapes(row_shapes)}{train_note}, and the "
            f"model fails on them ({error}); prepare both in the same way"
        ) from error


def _shapes(x: Any) -> list[tuple[int, ...]]:
    return [tuple(part.shape[1:]) for part in tensors(x)]


def _format_shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(map(str, shapes))
