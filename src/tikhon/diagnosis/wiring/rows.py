"""Dependencies in a forward pass: between rows, on later positions, on the order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.data.forward import call_model
from tikhon.data.nested import Batch, map_tensors, tensors
from tikhon.diagnosis.observe import root_mean_square
from tikhon.diagnosis.replica import gradients, undisturbed
from tikhon.diagnosis.wiring.program import (
    Facts,
    Program,
    float_tensors,
    record_modules,
    relative_change,
)
from tikhon.diagnosis.wiring.torch_calls import DROPOUTS, RANDOM_FUNCTIONS, CallTrace
from tikhon.training.losses import IGNORED

ATTENTION = (
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "_transformer_encoder_layer_fwd",
)
EQUAL = 1e-5  # relative spread of equal rows: rounding leaves less
DISTINCT = 1e-3  # relative spread before the module that makes rows equal at once
PASSES = 16  # of a sampling network, to separate signal from noise
SAME = 1e-6  # relative change of an output due to rounding
MIN_LOCALITY = 5.0  # change at the modified position / at earlier ones
MAX_GATE_UNITS = 8  # units of a layer that may be a score or a gate
SHIFTED = 0.95  # share of a target that equals the next input


def random_facts(program: Program) -> Facts:
    """Compare two passes in evaluation mode on the same rows."""
    first, second = (program.outputs(program.batch, seed=k, dropout=True) for k in (1, 2))
    program.outputs(program.others, seed=1, dropout=True)
    again = program.outputs(program.batch, seed=1, dropout=True)
    carried = relative_change(first, again)
    if carried > DISTINCT:
        return {"carried": carried}
    apart = relative_change(first, second)
    if not apart:
        return {"eval_spread": 0.0}
    trace = program.trace_forward()
    drawn = trace.named(*DROPOUTS) or trace.named(*RANDOM_FUNCTIONS)
    active = [n for n, m in program.model.named_modules() if "Dropout" in type(m).__name__]
    calls = [call for call in drawn if call.module not in active or call.line]
    left = relative_change(*(program.outputs(program.batch, seed=k) for k in (1, 2)))
    places = list(dict.fromkeys(call.place for call in calls))[:3]
    return {"eval_spread": apart, "eval_dropout": left < apart / 100, "eval_places": places}


def row_facts(program: Program) -> Facts:
    """Replace the odd rows and measure the change of the outputs of even rows."""
    odd = torch.arange(program.rows) % 2 == 1
    if program.rows < 3:
        return {}
    swapped = _replace_rows(program, odd)
    before, after = program.outputs(program.batch), program.outputs(swapped)
    again = program.outputs(program.batch)
    own = program.by_row(before)
    noise = relative_change(before, again, ~odd) if own else 0.0
    if not own or noise > 0:
        return {}
    moved = max(relative_change([a], [b], ~odd) for a, b in zip(own, program.by_row(after)))
    facts: Facts = {"rows_apart": moved, "order_of_rows": _change_when_rolled(program, before)}
    if moved > 1e-4:
        facts["rows_place"] = _mixing_place(program, swapped, ~odd)
    return facts


def _change_when_rolled(program: Program, before: list[Tensor]) -> float:
    """Return the change of outputs when the rows of the batch are rolled by one."""

    def roll(t: Tensor) -> Tensor:
        return t.roll(1, 0) if t.ndim and len(t) == program.rows else t

    inputs, target = program.batch
    after = program.outputs((map_tensors(inputs, roll), map_tensors(target, roll)))
    back = [roll(a) for a in before]
    return relative_change(back, after)


def equal_output_facts(program: Program, limit: float = EQUAL) -> Facts:
    """Whether different rows get the same output, and the first module that makes them equal.

    `limit`: relative spread of outputs up to which they count as equal.
    """
    inputs = program.batch[0]
    if not any(relative_spread(t) > 0 for t in program.by_row(tensors(inputs))):
        return {}
    with record_modules(program.model) as seen:
        answers = program.outputs(program.batch)
    own = program.by_row(answers)
    if not own or max(relative_spread(t) for t in own) > limit:
        return {}
    zero = not any(bool(t.any()) for t in own)  # as from a zero-initialised head
    place = _equalising_module(program, seen)
    return {"alike": place | {"zero": zero}} if place else {}


def reconstruction_facts(program: Program) -> dict[str, Any]:
    """Return how much the reconstructions of a sampling network depend on the row; 0 = not.

    Spread over rows shared by passes with other seeds, relative to that of inputs or outputs,
    whichever is larger. Only if an output has the shape of the inputs.
    """
    inputs = program.batch[0]
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or program.rows < 3:
        return {}
    with torch.no_grad(), undisturbed(program.model, training=True):
        with CallTrace(program.model) as trace:
            program.replica.value(program.batch)
    if not trace.named(*RANDOM_FUNCTIONS):
        return {}
    passes = []
    for seed in range(PASSES):
        with torch.no_grad(), undisturbed(program.model, training=False, seed=seed):
            answers = float_tensors(call_model(program.model, inputs))
        same = [t for t in answers if len(t) == len(inputs) and t.numel() == inputs.numel()]
        passes += [(t - t.mean(0)).double() for t in same[:1]]
    sizes = [(t - t.mean(0)).double().square().mean() for t in (inputs, *passes)]
    if len(passes) < PASSES or not float(sizes[0]):
        return {}
    first, second = (sum(passes[k::2], torch.zeros(())) / (PASSES // 2) for k in (0, 1))
    shared = float((first * second).mean().clamp_min(0.0))
    own = float(sum(sizes[1:])) / PASSES
    return {"given_back": math.sqrt(shared / max(float(sizes[0]), own))}


def narrowest_width(program: Program) -> int:
    """Return the smallest number of values per row at the output of any module."""
    model = program.model
    with torch.no_grad(), undisturbed(model, training=False), record_modules(model) as seen:
        program.replica.value(program.batch)
    outputs = [t for _, _, left in seen for t in left[:1]]
    return min((t[0].numel() for t in program.by_row(outputs)), default=1)


def _equalising_module(program: Program, seen: list[Any]) -> Facts:
    """Return the module that makes rows equal; empty if they become so gradually."""
    modules = dict(program.model.named_modules())
    last, before = "", 1.0
    for name, ins, outs in seen:
        if any(True for _ in modules[name].children()):
            continue
        kind = type(modules[name]).__name__
        own = [program.by_row(part) for part in (ins, outs)]
        # what a module cancels, such as the mean of what has none, is left as rounding
        least = max((root_mean_square(t) for t in own[0]), default=0.0)
        entered, left = (
            max((relative_spread(t, least) for t in part), default=None) for part in own
        )
        if entered is not None and entered <= EQUAL:
            sudden = before > DISTINCT
            return {"after": last, "before": f"{name} ({kind})"} if sudden else {}
        if left is not None and left <= EQUAL:
            sudden = entered is None or entered > DISTINCT
            return {"module": name, "kind": kind} if sudden else {}
        last, before = f"{name} ({kind})", left if left is not None else before
    return {"after": last} if before > DISTINCT else {}


def relative_spread(t: Tensor, least: float = 0.0) -> float:
    """Return the largest distance of a row to the first one, relative to the size of all.

    `least`: the size below which entries are no larger than their rounding.
    """
    if not t.numel() or t.dtype == torch.bool:
        return 0.0
    size = max(root_mean_square(t.double()), least)
    apart = float((t.double() - t[:1].double()).abs().max())
    return apart / size if size > 0 else 0.0


def _replace_rows(program: Program, odd: Tensor) -> Batch:
    pairs = iter(tensors(program.others))

    def change(t: Tensor) -> Tensor:
        other = next(pairs)
        if t.shape != other.shape or not t.ndim or len(t) != program.rows:
            return t
        mask = odd.to(t.device).reshape(-1, *[1] * (t.ndim - 1))
        return torch.where(mask, other, t)

    inputs, target = program.batch
    return map_tensors(inputs, change), target


def _mixing_place(program: Program, swapped: Batch, even: Tensor) -> dict[str, str]:
    """Return the first module that changes even rows, else those around the change."""
    passes = []
    for batch in (program.batch, swapped):
        with record_modules(program.model) as seen:
            program.outputs(batch)
        passes.append(seen)
    modules = dict(program.model.named_modules())
    last = ""
    for (name, ins, outs), (_, other_ins, other_outs) in zip(*passes):
        arrived = program.by_row(ins)
        kind = type(modules[name]).__name__
        whole = isinstance(modules[name], nn.MultiheadAttention)
        leaf = whole or not any(True for _ in modules[name].children())
        if arrived and _moved(ins, other_ins, even, program.rows) > 1e-5:
            return {"after": last, "before": f"{name} ({kind})"}
        fits = program.by_row(outs)
        if leaf and arrived and fits and _moved(outs, other_outs, even, program.rows) > 1e-5:
            first = str(getattr(modules[name], "batch_first", False))
            return {"module": name, "kind": kind, "batch_first": first}
        last = f"{name} ({kind})" if leaf else last
    return {"after": last}


def _moved(before: list[Tensor], after: list[Tensor], even: Tensor, rows: int) -> float:
    """Return the change of even rows; their axis is identified by its unique size."""
    worst = 0.0
    for a, b in zip(before, after):
        if a.shape == b.shape and a.shape.count(rows) == 1:
            axis = a.shape.index(rows)
            worst = max(worst, relative_change([a.movedim(axis, 0)], [b.movedim(axis, 0)], even))
    return worst


def order_facts(program: Program) -> Facts:
    """Measure whether positions depend on later ones holding their target, and on the order."""
    inputs, target = program.batch
    facts: dict[str, Any] = {}
    axis = {t.shape[1] for t in tensors(inputs) if t.ndim >= 2 and t.shape[1] > 2}
    for part in tensors(inputs):
        share = next_share(part, target)
        if share is not None:
            facts["target_is_next"] = max(share, facts.get("target_is_next", 0.0))
            if share >= SHIFTED:
                facts["future_apart"] = _change_from_later(program, part)
        same = _is_target(part, target)
        if same and not _ignores_last(program, part.shape[1]):
            facts |= _target_given(program, part)
        nexts = (share or 0.0) >= SHIFTED
        if (same or nexts) and not part.is_floating_point():
            lag = _target_lag(program, part.shape[1])
            if lag is not None:
                facts["ahead"] = max(lag + nexts, facts.get("ahead", 0))
    facts |= _only_step(program)
    if len(axis) == 1 and has_attention(program):
        facts["order_apart"] = _change_when_shuffled(program, axis.pop())
    return facts


def _only_step(program: Program) -> dict[str, Any]:
    """Return the only step of a sequence that the output depends on, if there is one."""
    inputs = program.batch[0]
    if not isinstance(inputs, Tensor) or inputs.ndim < 2 or inputs.shape[1] < 3:
        return {}
    if (inputs.ndim != 3 and inputs.is_floating_point()) or inputs.ndim > 3:
        return {}
    before = program.outputs(program.batch)
    steps = inputs.shape[1]
    if any(steps in a.shape[1:] for a in before):
        return {}  # one output per step
    others = inputs.roll(1, 0)
    if _change_with(program, before, others) <= DISTINCT:
        return {}
    for kept in (0, steps - 1):
        changed = others.clone()
        changed[:, kept] = inputs[:, kept]
        if _change_with(program, before, changed) <= SAME:
            return {"only_step": kept, "input_length": steps}
    return {}


def _change_with(program: Program, before: list[Tensor], inputs: Tensor) -> float:
    """Return the change of outputs with other inputs."""
    after = program.outputs((inputs, program.batch[1]))
    return relative_change(before, after)


def next_share(inputs: Tensor, target: object) -> float | None:
    """Return the share of a target sequence that equals the next input; None if no sequence."""
    if not isinstance(target, Tensor) or inputs.ndim < 2 or inputs.shape[1] < 3:
        return None
    if inputs.ndim == target.ndim + 1 and inputs.shape[-1] == 1:
        inputs = inputs.squeeze(-1)
    if inputs.shape != target.shape or inputs.is_floating_point() != target.is_floating_point():
        return None
    later, earlier = inputs[:, 1:], target[:, :-1]
    if bool((later == later.flatten()[0]).all()):
        return None
    same = torch.isclose(later, earlier) if later.is_floating_point() else later == earlier
    now = inputs == target
    return float(same.double().mean()) if float(now.double().mean()) < SHIFTED else None


def _is_target(part: Tensor, target: object) -> bool:
    """Whether an input sequence equals the target sequence, position by position."""
    if not isinstance(target, Tensor) or part.ndim < 2 or part.shape[1] < 3:
        return False
    if part.numel() != target.numel() or part.shape[:2] != target.shape[:2]:
        return False
    counted = target != IGNORED
    same = torch.isclose(part.reshape(target.shape).double(), target.double())[counted]
    varied = bool((part[:, 1:] != part[:, :-1]).any())
    return varied and bool(same.numel()) and float(same.double().mean()) >= SHIFTED


def _ignores_last(program: Program, size: int) -> bool:
    """Whether the loss ignores the last position, since it shifts the labels itself."""
    with undisturbed(program.model, training=False):
        answers, loss = program.outputs_and_loss(program.batch)
    wanted = [answer for answer in float_tensors(answers) if answer.requires_grad]
    for slope in gradients(loss, wanted, program.model):
        if slope is None or not bool(slope.any()):
            continue
        axes = [axis for axis in range(1, slope.ndim) if slope.shape[axis] == size]
        if axes:  # excludes the loss, which may be among the outputs
            return any(not bool(slope.select(axis, -1).any()) for axis in axes)
    return False


def _target_lag(program: Program, size: int) -> int | None:
    """Return by how many positions a target affects earlier outputs; None if ambiguous.

    Of several outputs the nearest counts: others may predict further ahead on purpose.
    """
    inputs, target = program.batch
    base, lags = _output_gradients(program, (inputs, target)), set()
    for place in (size // 2, size - 1):
        changed = target.clone()
        changed[:, place] = target.roll(1, 0)[:, place]
        found = []
        for a, b in zip(base, _output_gradients(program, (inputs, changed))):
            moved = (a - b).abs().double()
            for axis in (k for k in range(1, a.ndim) if a.shape[k] == size):
                pull = moved.movedim(axis, 0).flatten(1).sum(1)
                pulled = (pull > SAME * pull.sum()).nonzero().flatten().tolist()
                found += [place - pulled[0]] if len(pulled) == 1 else []
        lags.add(min(found, default=None))
    return lags.pop() if len(lags) == 1 else None


def _output_gradients(program: Program, batch: Batch) -> list[Tensor]:
    """Return the gradients of the loss at the outputs of a batch."""
    with undisturbed(program.model, training=False):
        answers, loss = program.outputs_and_loss(batch)
    wanted = [a for a in float_tensors(answers) if a.requires_grad and a.ndim > 1]
    return [g for g in gradients(loss, wanted, program.model) if g is not None]


def _target_given(program: Program, part: Tensor) -> dict[str, Any]:
    """Return the change of the output at a position when the input that holds its target changes.

    A global change is an autoencoder's; a local one means that a decoder is given the answer.
    """
    size = part.shape[1]
    place = size // 2
    inputs = _with_others(program, part, slice(place, place + 1))
    parts = slice(place, place + 1), slice(0, place), slice(place + 1, None)
    here, before, behind = (_change_at(program, inputs, size, where) for where in parts)
    alone = len(tensors(program.batch[0])) == 1
    elsewhere = alone and (before > EQUAL or behind < DISTINCT)
    given = here >= 1e-3 and here >= MIN_LOCALITY * before and not elsewhere
    return {"target_given": here} if given else {}


def _change_from_later(program: Program, part: Tensor) -> float:
    """Return the change of outputs in the first half when the second half of the input changes.

    Only the input that holds the targets; a decoder may see other inputs as a whole.
    """
    size = part.shape[1]
    half = size // 2
    inputs = _with_others(program, part, slice(half, None))
    return _change_at(program, inputs, size, slice(0, half))


def _with_others(program: Program, part: Tensor, positions: slice) -> object:
    """Return the inputs with some positions of one part taken from the previous row."""
    changed = part.clone()
    changed[:, positions] = part.roll(1, 0)[:, positions]
    return map_tensors(program.batch[0], lambda t: changed if t is part else t)


def _change_when_shuffled(program: Program, size: int) -> float:
    """Return the change of outputs, restored in order, when the positions are shuffled."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(3))

    def change(t: Tensor) -> Tensor:
        return t[:, order.to(t.device)] if t.ndim >= 2 and t.shape[1] == size else t

    return _change_at(program, map_tensors(program.batch[0], change), size, slice(None), order)


def _change_at(
    program: Program, inputs: object, size: int, where: slice, order: Tensor | None = None
) -> float:
    before = program.outputs(program.batch)
    after = program.outputs((inputs, program.batch[1]))
    worst = 0.0
    for a, b in zip(before, after):
        if a.shape != b.shape:
            continue
        # with as many classes as positions, the axis with less change is that of the positions
        axes = [k for k in dict.fromkeys((1, a.ndim - 1)) if 0 < k < a.ndim and a.shape[k] == size]
        found = [relative_change([a], [b], where)] if order is not None and not axes else []
        for axis in axes:
            first, second = a.movedim(axis, 0), b.movedim(axis, 0)
            first = first[order.to(a.device)] if order is not None else first
            found.append(relative_change([first], [second], where))
        worst = max(worst, min(found, default=0.0))
    return worst


def has_attention(program: Program) -> bool:
    """Whether the model uses self-attention, as a layer or hand-written."""
    if any(isinstance(m, nn.MultiheadAttention) for m in program.model.modules()):
        return True
    trace = program.trace_forward()
    square = [c for c in trace.named("softmax") if c.shapes and len(c.shapes[0]) >= 3]
    scores = [c for c in square if c.shapes[0][-1] == c.shapes[0][-2] > 2]
    return bool(trace.named(*ATTENTION) or scores)


def bypass_facts(program: Program) -> Facts:
    """Return narrow linear layers without which rows still differ: scores or gates."""
    found = []
    for name, module in program.model.named_modules():
        if not isinstance(module, nn.Linear) or module.out_features > MAX_GATE_UNITS:
            continue

        def mean_output(m: nn.Module, args: object, output: Tensor) -> Tensor:
            return output.mean().expand_as(output)

        with module.register_forward_hook(mean_output):
            answers = program.outputs(program.batch)
        own = program.by_row(answers)
        if own and max(relative_spread(t) for t in own) > DISTINCT:
            found.append(name)
    return {"bypassed": found}


def linearity_facts(program: Program, layers: Sequence[str]) -> Facts:
    """Whether the output of the last layer with weights is linear in the inputs.

    Only if layers follow each other, not for parallel ones.
    """
    inputs = program.batch[0]
    if not layers or not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return {}
    *before, last = map(program.model.get_submodule, layers)
    found: list[Tensor] = []
    fed: list[Tensor] = []

    def record(m: nn.Module, args: object, output: object) -> None:
        found.extend(float_tensors(output)[:1])
        fed.extend(float_tensors(args)[:1])

    def shift_output(m: nn.Module, args: object, output: object) -> object:
        return output + 1 if isinstance(output, Tensor) else output

    other = program.others[0]
    with last.register_forward_hook(record), ExitStack() as hooks:
        for x in (inputs, other, 0.3 * inputs + 0.7 * other):
            program.outputs((x, program.batch[1]))
        for module in before:
            hooks.enter_context(module.register_forward_hook(shift_output))
        program.outputs((inputs, program.batch[1]))
    if len(found) != 4 or (before and torch.equal(fed[0], fed[-1])):
        return {}
    a, b, mixed = (t.double() for t in found[:3])
    size = float((a - b).square().mean().sqrt())
    if size == 0:
        return {}
    return {"bend": float((mixed - 0.3 * a - 0.7 * b).square().mean().sqrt()) / size}
