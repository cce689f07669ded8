"""Parts of the inputs that no output depends on: a whole tensor, columns, channels, steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tikhon.data.nested import Batch, map_tensors, tensors
from tikhon.diagnosis.replica import gradients, undisturbed
from tikhon.diagnosis.samples import Samples
from tikhon.diagnosis.wiring.dataset import relation, sample
from tikhon.diagnosis.wiring.program import Facts, Program, float_tensors, relative_change
from tikhon.diagnosis.wiring.torch_calls import WithoutDropout

SAME = 1e-6  # relative change of outputs or loss due to rounding
EXPLAINED = ("explained_straight", "explained_bent")
MAX_INTEGER_COLUMNS = 16  # integer columns that are tested one by one


def unused_input_facts(program: Program, source: Samples) -> Facts:
    """Return `unread`: the index of an unused input; or, of a single input, its unused entries.

    For entries: their share, the first one, and the variance of the targets that they explain.
    """
    parts = tensors(program.batch[0])
    if program.replica.whole:
        read = _input_ids(program)
        facts = _unused_mask(program) | {
            "parts_read": [place for place, t in enumerate(parts) if id(t) in read]
        }
        return facts | (_unused_part(program, parts, read) if len(parts) > 1 else {})
    if program.rows < 3 or not parts or any(len(t) != program.rows for t in parts if t.ndim):
        return {}
    if len(parts) > 1:
        return _unused_part(program, parts, set(map(id, parts)))
    x = parts[0]
    if program.batch[0] is not x or x.ndim < 2:
        return {}
    unused = _unused_entries(program, x)
    varied = (x != x[:1]).any(0)
    mask = unused & varied
    if not bool(mask.any()) or not bool((varied & ~mask).any()):
        return {}
    share = float(mask.sum()) / float(varied.sum())
    first = [int(v) for v in mask.nonzero()[0]]
    found = {"share": share, "first": first, "entries": int(mask.sum())}
    return {"unread": found} | _explained_by_unused(source, mask)


def _explained_by_unused(source: Samples, mask: Tensor) -> Facts:
    """Return the held-out variance explained by shallow models with and without unread entries."""
    inputs, target = sample(source)
    if not isinstance(inputs, Tensor) or not isinstance(target, Tensor):
        return {}
    read = inputs[:, ~mask.to(inputs.device)]
    found = [relation(x, target) for x in (inputs.flatten(1), read)]
    known = [[v for k, v in f.items() if k in EXPLAINED and isinstance(v, float)] for f in found]
    best = [max(values) for values in known if values]
    return {"explained_all": best[0], "explained_read": best[1]} if len(best) == 2 else {}


def _unused_part(program: Program, parts: list[Tensor], read: set[int]) -> Facts:
    """Return the first of several inputs, of ids in `read`, that no output or loss depends on."""
    longest = max((int(t.shape[1]) for t in parts if t.ndim > 1), default=0)
    for place, part in enumerate(parts):
        other = tensors(program.others[0])[place]  # permuted rows may cost the same
        if id(part) not in read or not part.ndim or other.shape != part.shape:
            continue
        if _is_mask_or_length(part, longest) or not bool((part != part[:1]).any()):
            continue
        others = map_tensors(program.batch[0], lambda t, p=part, o=other: o if t is p else t)
        if _change_between(program, (others, program.batch[1])) <= SAME:
            return {"unread": {"place": place + 1, "inputs": len(parts)}}
    return {}


def _input_ids(program: Program) -> set[int]:
    """Return the ids of the tensors of a batch that are passed to the model."""
    seen: set[int] = set()

    def enter(module: object, args: object, kwargs: object) -> None:
        seen.update(id(t) for t in tensors((args, kwargs)))

    with program.model.register_forward_pre_hook(enter, with_kwargs=True):
        program.outputs(program.batch)
    return seen


def _unused_mask(program: Program) -> Facts:
    """Return the position of a 0/1 tensor of the batch that the loss does not depend on."""
    pairs = zip(tensors(program.batch), tensors(program.others))
    for place, (part, other) in enumerate(pairs):
        if part.shape != other.shape or part.ndim > 2 or bool((part == part[:1]).all()):
            continue
        if not bool(((part == 0) | (part == 1)).all()) or torch.equal(part, other):
            continue
        batch = map_tensors(program.batch, lambda t, p=part, o=other: o if t is p else t)
        if _change_between(program, batch) <= SAME:
            return {"idle_mark": place + 1}
    return {}


def _is_mask_or_length(part: Tensor, longest: int) -> bool:
    """Whether a tensor is a 0/1 mask or holds lengths, which a network may infer itself."""
    if part.dtype == torch.bool or bool(((part == 0) | (part == 1)).all()):
        return True
    whole = not part.is_floating_point() and part.ndim == 1
    return whole and longest > 2 and 1 <= int(part.min()) and int(part.max()) <= longest


def _change_between(program: Program, batch: Batch) -> float:
    """Return the change of outputs and, if the loss calls the model, of loss and gradients."""
    found = []
    for one in (program.batch, batch):
        seen = program.outputs(one)
        whole = program.replica.whole
        found.append([*seen, *(_loss_and_gradients(program, one) if whole else [])])
    if not found[0] or not any(bool((t != t.flatten()[0]).any()) for t in found[0]):
        return 1.0  # constant outputs are reported otherwise
    return relative_change(found[0], found[1])


def _loss_and_gradients(program: Program, batch: Batch) -> list[Tensor]:
    """Return the loss and its gradients at the weights; some losses, as ratios, start equal."""
    weights: list[Tensor] = [p for p in program.model.parameters() if p.requires_grad]
    with torch.enable_grad(), undisturbed(program.model, training=False), WithoutDropout():
        loss = program.replica.value(batch)
        found = gradients(loss, weights, program.model) if loss.requires_grad and weights else []
    return [loss.detach().reshape(1), *(g for g in found if g is not None)]


def _unused_entries(program: Program, x: Tensor) -> Tensor:
    """Return entries of a row that do not affect outputs, by gradient and by replacement."""
    none = torch.zeros_like(x[0], dtype=torch.bool)
    unused = _zero_gradient_entries(program, x) if x.is_floating_point() else none
    if not x.is_floating_point() and x.ndim == 2 and x.shape[1] <= MAX_INTEGER_COLUMNS:
        for column in range(x.shape[1]):
            other = x.clone()
            other[:, column] = x[:, column].roll(1, 0)
            unused[column] = _change_between(program, (other, program.batch[1])) <= SAME
    if not bool(unused.any()):
        return unused
    replaced = torch.where(unused, x.roll(1, 0), x)
    confirmed = _change_between(program, (replaced, program.batch[1])) <= SAME
    return unused if confirmed else none


def _zero_gradient_entries(program: Program, x: Tensor) -> Tensor:
    """Return entries at which the gradient of the outputs is 0 in all rows."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad(), undisturbed(program.model, training=False), WithoutDropout():
        answers: list[Any] = float_tensors(program.forward((leaf, program.batch[1])))
        generator = torch.Generator().manual_seed(5)
        learned = [t for t in answers if t.requires_grad]
        noise = [torch.randn(t.shape, generator=generator).to(t) for t in learned]
        weighted = [(t * weight).sum() for t, weight in zip(learned, noise)]
        if not weighted:
            return torch.zeros_like(x[0], dtype=torch.bool)
        (gradient,) = torch.autograd.grad(torch.stack(weighted).sum(), leaf, allow_unused=True)
    if gradient is None:
        return torch.zeros_like(x[0], dtype=torch.bool)
    return (gradient == 0).all(0)
