"""Wiring of a program, measured on a few rows: shapes, rows, positions, targets, data, graph.

Every test runs a few passes in evaluation mode. It only measures; `checks/wiring.py` judges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.budget import out_of_time
from tikhon.data.nested import Batch, take_rows
from tikhon.diagnosis.record import Site
from tikhon.diagnosis.replica import Replica, undisturbed
from tikhon.diagnosis.samples import Samples
from tikhon.diagnosis.wiring import (
    attention,
    augmentation,
    candidates,
    class_weights,
    collapse,
    dataset,
    graph,
    loss_signs,
    loss_tracer,
    padding,
    pairs,
    rows,
    shapes,
    split,
    targets,
    unused_inputs,
)
from tikhon.diagnosis.wiring.program import Facts, make_program


@dataclass(frozen=True)
class OriginalProgram:
    """The user's program before its loss was lifted.

    `whole`: the loss calls the model itself; `held`: ids of the optimizer's parameters.
    """

    source: Samples
    valid: Batch | None
    whole: bool
    held: set[int]


def wiring_facts(
    replica: Replica,
    source: Samples,
    given: OriginalProgram,
    *,
    sites: tuple[Site, ...],
    batch_size: int,
) -> Facts:
    """Run all wiring tests; return their facts, and under `unmeasured` the tests that failed.

    Tests modify batches, on which the user's code may raise anything. That is no fault of the
    program, so the error is recorded instead of raised. Tests are skipped once time is up.
    """
    valid = given.valid if replica.whole == given.whole else None
    program = make_program(replica, source)
    layers = [s.name for s in sites if s.role in ("weight", "recurrent")]
    tests: dict[str, Callable[[], Facts]] = {
        "graph": partial(graph.graph_facts, program, given.held),
        "random": partial(rows.random_facts, program),
        "rows": partial(rows.row_facts, program),
        "blind": partial(rows.equal_output_facts, program),
        "spread": partial(collapse.spread_facts, program),
        "unread": partial(unused_inputs.unused_input_facts, program, source),
        "order": partial(rows.order_facts, program),
        "attention": partial(attention.attention_facts, program),
        "past": partial(attention.residual_facts, program),
        "line": partial(rows.linearity_facts, program, layers),
        "targets": partial(targets.target_facts, program),
        "background": partial(targets.background_facts, program, source),
        "candidates": partial(candidates.candidate_facts, program),
        "loss": partial(loss_tracer.loss_facts, program),
        "answers": partial(loss_signs.loss_sign_facts, program),
        "weights": partial(class_weights.class_weight_facts, program, source),
        "pairs": partial(pairs.pair_facts, program, source),
        "bypass": partial(rows.bypass_facts, program),
        "padding": partial(padding.padding_facts, program),
        "shapes": partial(shapes.shape_facts, program),
        "signal": partial(dataset.dataset_facts, source, valid, whole=replica.whole),
        "split": partial(split.split_facts, dataset.sample(source), valid),
        "loader": partial(dataset.loader_facts, given.source),
        "augmented": partial(augmentation.augmentation_facts, given.source),
        "norms": partial(norm_facts, replica, source, batch_size),
    }
    facts: Facts = {"rows": program.rows, "whole": given.whole}
    unmeasured: dict[str, str] = {}
    for name, test in tests.items():
        if out_of_time():
            unmeasured[name] = "no time left"
            continue
        try:
            facts |= test()
        except Exception as error:
            unmeasured[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return facts | {"unmeasured": unmeasured}


def norm_facts(replica: Replica, source: Samples, batch_size: int) -> Facts:
    """Count the values that each normalisation averages over in a training batch."""
    counts: dict[str, int] = {}

    def hook(name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            counts[name] = averaged(module, args[0])

        return enter

    batches = nn.modules.batchnorm._BatchNorm
    found = [
        (n, m) for n, m in replica.model.named_modules() if isinstance(m, (batches, *ROWWISE))
    ]
    if not found:
        return {}
    batch = take_rows(source.probe, torch.arange(min(batch_size, source.rows)))
    with torch.no_grad(), undisturbed(replica.model, training=False), ExitStack() as hooks:
        for name, module in found:
            hooks.enter_context(module.register_forward_pre_hook(hook(name)))
        replica.outcome(batch)
    across = {n: counts[n] for n, m in found if isinstance(m, batches) and n in counts}
    single = [n for n, m in found if not isinstance(m, batches) and counts.get(n) == 1]
    return {"norm_values": across, "norms_of_one": single}


ROWWISE = (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


def averaged(module: nn.Module, values: Tensor) -> int:
    """Return the number of values per mean and variance of a normalisation."""
    if isinstance(module, nn.LayerNorm):
        return math.prod(module.normalized_shape)
    if isinstance(module, nn.GroupNorm):
        return values[0].numel() // module.num_groups
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return math.prod(values.shape[2:])
    return values.numel() // max(1, values.shape[1])
