"""Data and mode of use that trials are scored on, corrected where these are at fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.cures.data import (
    probe_of_all_rows,
    shifted_tokens,
    start_token,
    target_columns,
    target_input,
    target_range,
    without_gaps,
)
from tikhon.data.nested import Batch, batch_length, take_rows
from tikhon.diagnosis.diagnose import Diagnosis
from tikhon.diagnosis.findings import Finding
from tikhon.diagnosis.samples import Samples, samples

ModelWrapper = Callable[[nn.Module], nn.Module]  # wraps a trained model for scoring


def root_faults(diagnosis: Diagnosis) -> list[Finding]:
    """Return the warnings that are no consequence of others."""
    return [f for f in diagnosis.findings if not f.cause and f.severity != "info"]


def root_codes(diagnosis: Diagnosis) -> tuple[str, ...]:
    """Return the codes of the warnings that are no consequence of others, in order."""
    return tuple(dict.fromkeys(f.code for f in root_faults(diagnosis)))


def scoring_batches(
    source: Samples, valid_batch: Batch | None, diagnosis: Diagnosis, model: nn.Module
) -> tuple[Samples, Batch | None]:
    """Return the rows to score on, as in use, where the target is unknown.

    Scales targets to the range that the loss expects, zeroes columns that hold the target, gives a
    decoder the previous token, and drops rows with gaps. Sorted rows are sampled from all rows,
    and targets shifted by a row are realigned.
    """
    faults = diagnosis.labels
    if "valid_differs" in faults:
        valid_batch = None  # what helps there says nothing about the training
    shift = diagnosis.record.wiring.get("shift_of_rows") if "unrelated_labels" in faults else None
    if shift and source.indexed:
        x, y = source.source
        source, valid_batch = replace(source, probe=samples((x, y.roll(shift, 0))).probe), None
    ends = target_range(source) if "target_out_of_range" in faults else None
    leaks = "target_among_inputs" in faults
    columns = target_columns(source) if leaks else []
    place = target_input(source.probe) if leaks else None
    if "sorted_batches" in faults:
        source = probe_of_all_rows(source)

    def corrected(batch: Batch) -> Batch:
        x, y = without_gaps(batch) if "non_finite_data" in faults else batch
        if columns:
            x = x.clone()
            x.flatten(1)[:, columns] = 0.0
        if place is not None:
            x = (*x[:place], shifted_tokens(y, start_token(model, y)), *x[place + 1 :])
        return x, (y if ends is None else (y - ends[0]) / (ends[1] - ends[0]))

    return replace(source, probe=corrected(source.probe)), corrected(
        valid_batch
    ) if valid_batch else None


class RowByRow(nn.Module):
    """A model that evaluates rows one by one, as in use, instead of as a batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Tensor:
        """Return the outputs for the rows, each evaluated alone."""
        rows = range(batch_length((inputs, None)))
        return torch.cat([self.model(*take_rows(inputs, torch.tensor([row]))) for row in rows])


class WithoutFuture(nn.Module):
    """A model that computes each position in a pass with other later positions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs at each position, with later inputs taken from another row."""
        steps = x.shape[1]
        answer, others = self.model(x), x.roll(1, 0)
        axis = next(k for k in range(1, answer.ndim) if answer.shape[k] == steps)
        parts = []
        for step in range(steps):
            seen = self.model(torch.cat([x[:, : step + 1], others[:, step + 1 :]], 1))
            parts.append(seen.select(axis, step))
        return torch.stack(parts, axis)


EVALUATION_WRAPPERS: dict[str, ModelWrapper] = {
    "rows_mixed": RowByRow,
    "future_visible": WithoutFuture,
}
MAX_ROWS_ONE_BY_ONE = 64  # rows that are evaluated one by one
