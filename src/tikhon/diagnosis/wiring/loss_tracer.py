"""Follow outputs and targets through the operations of the loss.

Operations inside of the model are not followed.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.data.rows import tensors
from tikhon.diagnosis.functions import (
    ADDING,
    COMPARED as REGRESSIONS,
    PRODUCTS,
    SHARES,
    TIMES,
    Function,
)
from tikhon.diagnosis.modes import (
    LOSS,
    Args,
    Located,
    Options,
    function_name,
    inside_torch,
    user_line,
)
from tikhon.diagnosis.replica import undisturbed
from tikhon.diagnosis.wiring.domains import CHECKED, breach
from tikhon.diagnosis.wiring.program import Subject
from tikhon.diagnosis.wiring.propagation import (
    bounded,
    compared_over_rows,
    gathered_over_rows,
    index_as_number,
    is_index,
    is_norm,
    logs_of_targets,
    mixed_derivatives,
    normed_over_rows,
    pulled_above,
    unlearned,
)
from tikhon.diagnosis.wiring.provenance import (
    NOTHING,
    Grown,
    Note,
    Summand,
    TracedCall,
    pairs,
    together,
    union,
)
from tikhon.diagnosis.wiring.torch_calls import DRAWS

# functions with explicit axes
SHAPING = set(
    "unsqueeze view reshape expand expand_as T mT t transpose permute movedim swapaxes repeat "
    "unflatten diag diag_embed".split()
)
JOINING = {"cat", "stack", "meshgrid", "cartesian_prod", "cdist", "outer", "ger", "einsum"}
ARITHMETIC = {*ADDING, *TIMES, *SHARES, "pow", "__pow__", "min", "max", "minimum", "maximum"}
SUMS = {"mean", "sum"}
LINEAR = {*ADDING, *SUMS, "neg", "__neg__", "squeeze", "flatten", "reshape", "view", "stack"}
KEEPS_ZERO = {*TIMES, *SHARES, "neg", "abs", "square", "pow", "__pow__", "sum", "squeeze"}
SAMPLERS = {"normal", "multinomial", "bernoulli", "poisson", "_standard_gamma", "binomial"}
DECISIONS = {"multinomial", "bernoulli", "poisson", "binomial"}  # samplers without gradient
SQUASHING = {"sigmoid": "binary_cross_entropy_with_logits", "softmax": "cross_entropy"}
LAYERS = {*PRODUCTS, "linear", "addmm", "conv1d", "conv2d", "conv3d"}
SURE = 5.0  # z-score of negatives being nearer than positives
COMPARED = {
    *REGRESSIONS,
    *("poisson_nll_loss", "gaussian_nll_loss", "kl_div", "soft_margin_loss"),
}


class Recorder(Located):
    """Context that records every operation between outputs and loss; `facts` is the result.

    `batch` holds the tensors of the data, with `rows` rows each.
    """

    def __init__(self, model: nn.Module, batch: list[Tensor], rows: int) -> None:
        super().__init__(model)
        self.rows = rows
        self.facts: dict[str, Any] = {"breaches": []}
        self._notes: dict[int, tuple[weakref.ref[Tensor], Note]] = {}
        self._asked: dict[int, Tensor] = {}  # by output: its input
        self._given: dict[int, list[Tensor]] = {}  # by output: arguments of the model
        self._count = 0
        self._squashed: list[tuple[weakref.ref[Tensor], str]] = []
        self._own: list[weakref.ref[Tensor]] = []  # similarities of rows with themselves
        self.answers: list[tuple[Tensor, bool]] = []  # and whether the inputs were noise
        for part in batch:
            self._root(part, NOTHING)

    def note(self, tensor: Tensor) -> Note:
        """Return the note of a tensor."""
        known = self._notes.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else NOTHING

    def _keep(self, tensor: Tensor, note: Note) -> None:
        self._notes[id(tensor)] = weakref.ref(tensor), note

    def _root(self, tensor: Tensor, before: Note) -> int:
        self._count += 1
        self._keep(tensor, Note(frozenset({self._count}), drawn=before.drawn))
        return self._count

    def leave(self, name: str, module: nn.Module, args: Args, output: object) -> None:
        """Register the outputs of the whole model, where the loss begins."""
        super().leave(name, module, args, output)
        if self.stack[-1] == LOSS:
            given = tensors(args)
            answers = tensors(output)
            for place, answer in enumerate(answers):
                root = self._root(answer, union([self.note(t) for t in given]))
                drawn = any(self.note(t).drawn and not t.is_floating_point() for t in given)
                self.answers.append((answer, drawn))
                self._given[root] = given
                if len(answers) == len(given):  # as many outputs as inputs: pair them
                    self._asked[root] = given[place]

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Follow the function's tensors and return its result."""
        options = dict(kwargs)
        name, outside = function_name(func), self.stack[-1] == LOSS
        if not outside and name not in CHECKED:
            return func(*args, **options)
        inputs = tensors((*args, *options.values()))
        graded = torch.is_grad_enabled()
        line, written = user_line(), not inside_torch()
        notes = [self.note(t) for t in inputs]
        shapes = [tuple(t.shape) for t in inputs]
        output = func(*args, **options)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            step = TracedCall(
                name,
                args,
                options,
                inputs,
                notes,
                tensors(output),
                line,
                written,
                self.facts,
            )
            found = breach(step)
            if found is not None:
                self.facts["breaches"].append(found)
            if outside:
                drawn = self.graded and not graded and name in SAMPLERS
                of_answers = any(not n.roots.isdisjoint(self._given) for n in notes)
                if of_answers and name in DECISIONS:
                    self.facts.setdefault("decides", line)
                self._follow(step, shapes, sampled=drawn and of_answers)
        return output

    def _follow(self, step: TracedCall, shapes: list[tuple[int, ...]], *, sampled: bool) -> None:
        note = union(step.notes)
        if step.name == "__setitem__":
            target = step.inputs[0]
            self._keep(target, replace(note, shaped=step.notes[0].shaped))
        if not step.results:
            return
        index_of_zeros_and_ones(step, self.rows)
        unequal(step, shapes)
        straight_slopes(step)
        self._asked_back(step)
        self._itself(step)
        self._nearer(step)
        self._squashed_twice(step)
        self._pulled_goal(step)
        self._judged(step)
        index_as_number(step, set(self._given))
        gathered_over_rows(step, self.rows, set(self._given))
        compared_over_rows(step, self.rows)
        mixed_derivatives(step)
        note = replace(
            note,
            norm=is_norm(step, self.rows),
            over_rows=normed_over_rows(step, self.rows),
            bound=bounded(step),
            shaped=shaped(step),
            discounted=note.discounted or (step.name in TIMES and any(map(discount, step.args))),
            goal=note.goal or self._goal(step),
            drawn=note.drawn or step.name in DRAWS,
            masked=masked(step),
            slope=note.slope or step.name == "grad",
            unlearned=unlearned(step),
            logs=logs_of_targets(step),
        )
        for summand in note.summands:
            summand.meant |= not linear(step, summand)
        note = self._weigh(step, shapes, self._sample(step, note, sampled))
        note = self._grow(step, shapes, note)
        for result in step.results:
            self._keep(result, replace(note, index=is_index(step, result)))

    def _sample(self, step: TracedCall, note: Note, sampled: bool) -> Note:
        """Follow a sample without gradient into a sum with tensors that have one."""
        if sampled:
            return replace(note, sampled=(step.name, step.place))
        origin = next((n.sampled for n in step.notes if n.sampled), None)
        if origin is None:
            return note
        if not step.attached:
            mixed = any(n.mixed for n in step.notes) or len(step.inputs) > 1
            return replace(note, sampled=origin, mixed=mixed)
        beside = [n for t, n in zip(step.inputs, step.notes) if not t.requires_grad and n.sampled]
        if step.written and step.name in ADDING and beside and all(n.mixed for n in beside):
            return replace(note, summands=(*note.summands, Summand("sampled", *origin)))
        return note

    def _weigh(self, step: TracedCall, shapes: list[tuple[int, ...]], note: Note) -> Note:
        """Detect a mean over the rows that is multiplied by one number per row."""
        whole = step.plain and step.results[0].ndim == 0 and step.attached
        before = [n.averaged for n in step.notes]
        if whole and (any(before) or any(self.rows in s for s in shapes)):
            return replace(note, averaged=True)
        if step.name not in TIMES | SHARES or sum(before) != 1 or len(before) != 2:
            return note
        mean = before.index(True)
        other, shape = step.inputs[1 - mean], shapes[1 - mean]
        if shapes[mean] == () and not other.requires_grad and shape[:1] == (self.rows,):
            late = Summand("weighed", step.name, step.place)
            return replace(note, summands=(*note.summands, late))
        return note

    def _grow(self, step: TracedCall, shapes: list[tuple[int, ...]], note: Note) -> Note:
        """Detect rows broadcast against rows on another axis, and whether pairs are intended."""
        spread = together(shapes) if len(shapes) > 1 and step.name not in JOINING else None
        table = spread is not None and pairs(spread, self.rows)
        if table and spread is not None and not any(pairs(s, self.rows) for s in shapes):
            same = all(tuple(r.shape) == spread for r in step.results) or step.name in COMPARED
            by_axes = sorted(zip(map(len, shapes), range(len(shapes))))
            small, large = by_axes[0], by_axes[-1]
            if same and small[0] < large[0]:
                a, b = step.notes[small[1]].roots, step.notes[large[1]].roots
                apart = step.name in ARITHMETIC and bool(a and b) and not a & b
                asked = step.notes[large[1]].shaped and step.name not in COMPARED
                grown = Grown(step.name, (shapes[0], shapes[1]), step.place, asked, apart)
                return replace(note, grown=(*note.grown, grown))
        others = [n for n, s in zip(step.notes, shapes) if pairs(s, self.rows) and not n.grown]
        kept = step.plain and tuple(step.results[0].shape) in shapes
        whole = step.plain and step.results[0].ndim == 0
        for grown in note.grown:
            meets = bool(others) and spread is not None
            grown.meant |= meets or (grown.asked and not (kept or whole))
        return note

    def _goal(self, step: TracedCall) -> str:
        """Return the line that adds a discounted output to data: reward plus next value."""
        if step.name not in ADDING or len(step.inputs) != 2 or not step.results[0].ndim:
            return ""
        for worth, reward in ((0, 1), (1, 0)):
            note, other = step.notes[worth], step.notes[reward]
            of_data = bool(other.roots) and other.roots.isdisjoint(self._given)
            answer = not note.roots.isdisjoint(self._given)
            if answer and of_data and note.discounted and not note.slope:
                step.facts.setdefault("looks_ahead", step.place)
                if step.inputs[worth].requires_grad:
                    return step.place
        return ""

    def _pulled_goal(self, step: TracedCall) -> None:
        """Detect an output compared with a bootstrapped target that has a gradient."""
        if step.name not in ADDING | COMPARED or len(step.inputs) < 2:
            return
        given, learned = set(self._given), [t.requires_grad for t in step.inputs[:2]]
        roots = [n.roots & given for n in step.notes[:2]]
        for goal, answer in ((0, 1), (1, 0)):
            apart = roots[goal] - roots[answer] and roots[answer] - roots[goal]
            if step.notes[goal].goal and not step.notes[answer].goal and apart and all(learned):
                step.facts.setdefault("pulled_goal", step.notes[goal].goal)

    def _judged(self, step: TracedCall) -> None:
        """Detect outputs passed through a layer outside of the model, such as a discriminator."""
        answers = any(not n.roots.isdisjoint(self._given) for n in step.notes)
        if step.name not in LAYERS or not answers:
            return
        own = set(map(id, self.model.parameters()))
        if any(isinstance(t, nn.Parameter) and id(t) not in own for t in step.inputs):
            step.facts.setdefault("judged", step.place)

    def _asked_back(self, step: TracedCall) -> None:
        """Detect an output compared with its own noisy input."""
        if step.name not in ADDING | COMPARED or len(step.inputs) < 2:
            return
        for answer, other in ((0, 1), (1, 0)):
            for root in step.notes[answer].roots:
                same = [t for t in self._given.get(root, ()) if t is step.inputs[other]]
                if same and step.notes[other].drawn and same[0].ndim:
                    found = {"place": step.place, "numbers": same[0][0].numel()}
                    step.facts.setdefault("asked_back", found)

    def _itself(self, step: TracedCall) -> None:
        """Detect a contrastive loss in which each row has to find itself."""
        if step.name in PRODUCTS and len(step.inputs) == 2 and step.results[0].ndim == 2:
            a, b = step.inputs
            if a.ndim == 2 and a.shape == b.T.shape and a.shape[0] > 2 and torch.equal(a, b.T):
                self._own = [*self._own, weakref.ref(step.results[0])]
        elif any(t() is step.inputs[0] for t in self._own if step.inputs):
            table, goal = step.inputs[0], step.inputs[-1]
            if step.name == "cross_entropy" and goal.ndim == 1 and goal.numel() == len(table):
                if torch.equal(goal.cpu(), torch.arange(len(goal))):
                    step.facts.setdefault("finds_itself", step.place)
            elif (
                step.name in TIMES | SHARES and step.plain and step.results[0].shape == table.shape
            ):
                self._own = [*self._own, weakref.ref(step.results[0])]

    def _squashed_twice(self, step: TracedCall) -> None:
        """Detect a loss that applies its sigmoid or softmax to a squashed input."""
        if step.name in SQUASHING and step.results:
            self._squashed.append((weakref.ref(step.results[0]), step.name))
        for seen, name in self._squashed if step.name in SQUASHING.values() else ():
            if SQUASHING[name] == step.name and step.inputs and seen() is step.inputs[0]:
                found = {"by": name, "loss": step.name, "place": step.place}
                step.facts.setdefault("squashed_twice", found)

    def _nearer(self, step: TracedCall) -> None:
        """Detect triplets whose input negatives are nearer to the anchor than the positives."""
        if step.name != "triplet_margin_loss" or len(step.inputs) < 3:
            return
        given = [[self._asked[r] for r in n.roots if r in self._asked] for n in step.notes[:3]]
        places = [[t for t in parts if t.is_floating_point()] for parts in given]
        if any(len(parts) != 1 for parts in places):
            return
        anchor, near, far = (parts[0].double().flatten(1) for parts in places)
        if not anchor.shape == near.shape == far.shape or len(anchor) < 3:
            return
        gap = (anchor - near).norm(dim=1) - (anchor - far).norm(dim=1)
        sure = float(gap.mean()) / max(float(gap.std()) / len(gap) ** 0.5, 1e-12)
        if sure > SURE:
            step.facts.setdefault("nearer", {"place": step.place, "sure": sure})


def loss_facts(subject: Subject) -> dict[str, object]:
    """Find broadcast rows, misused masks, samples without gradient, arguments out of domain."""
    parts = tensors(subject.batch)
    with torch.enable_grad(), undisturbed(subject.model, training=True):
        with Recorder(subject.model, parts, subject.rows) as tape:
            loss = subject.replica.value(subject.batch)
        note = tape.note(loss)
    facts = dict(tape.facts)
    slipped = [g for g in note.grown if g.slipped]
    if slipped:
        first = slipped[0]
        facts["broadcast"] = {
            "function": first.function,
            "shapes": [list(s) for s in first.shapes],
            "place": first.place,
        }
    if pulled_above(tape.answers, loss):
        facts["draws_above"] = True
    for summand in note.summands:
        if not summand.meant:
            facts.setdefault(summand.kind, {"name": summand.function, "place": summand.place})
    return facts


def discount(factor: object) -> bool:
    """Whether a factor is a constant number between 0 and 1."""
    if isinstance(factor, Tensor):
        return not factor.requires_grad and factor.ndim == 0 and 0 < float(factor) < 1
    return isinstance(factor, float) and 0 < factor < 1


def linear(step: TracedCall, summand: Summand) -> bool:
    """Whether a step is linear in a summand: sums, means, products with single numbers."""
    if step.name in LINEAR:
        return True
    others = [t for t, n in zip(step.inputs, step.notes) if summand not in n.summands]
    return step.name in TIMES | SHARES and all(t.numel() == 1 for t in others)


def shaped(step: TracedCall) -> bool:
    """Whether the axes of size one of a result are explicit in the program."""
    if step.name == "__getitem__":
        index = step.args[1] if isinstance(step.args[1], tuple) else (step.args[1],)
        return step.notes[0].shaped or any(part is None for part in index)
    if step.name in SHAPING:
        return step.written or any(n.shaped for n in step.notes)
    if not step.plain:
        return False
    ndim = step.results[0].ndim
    own = [n for t, n in zip(step.inputs, step.notes) if t.ndim == ndim]
    return bool(own) and all(n.shaped for n in own)


def masked(step: TracedCall) -> float:
    """Return the share of entries zeroed by a mask; stored in `facts` if averaged."""
    before = max((n.masked for n in step.notes), default=0.0)
    averaged = step.name == "mean" or (
        step.name in COMPARED and step.kwargs.get("reduction", "mean") == "mean"
    )
    if averaged and before and step.attached:
        known = step.facts.get("masked_mean", {"share": 0.0})
        if before > known["share"]:
            step.facts["masked_mean"] = {"share": before, "place": step.place}
    if step.name in TIMES and len(step.inputs) == 2 and step.attached:
        shares = [zeros(t) for t in step.inputs if not t.requires_grad and t.numel() > 1]
        before = max([before, *shares])
    return before if step.name in KEEPS_ZERO else 0.0


def zeros(mask: Tensor) -> float:
    """Return the share of zeros among zeros and ones; 0 for other values."""
    if not bool(((mask == 0) | (mask == 1)).all()):
        return 0.0
    return float((mask == 0).double().mean())


def index_of_zeros_and_ones(step: TracedCall, rows: int) -> None:
    """Detect an integer 0/1 mask used as an index, which picks rows 0 and 1."""
    if step.name != "__getitem__" or len(step.inputs) != 2:
        return
    source, index = step.inputs
    whole = index.dtype in (torch.int64, torch.int32) and index.shape == (rows,)
    if not whole or step.args[1] is not index or len(source) != rows:
        return
    if index.unique().tolist() == [0, 1]:
        step.facts.setdefault("index_mask", step.place)


def unequal(step: TracedCall, shapes: list[tuple[int, ...]]) -> None:
    """Detect a loss of outputs and targets of which one has one column and the other several."""
    if step.name not in COMPARED or not step.attached or len(shapes) < 2:
        return
    a, b = shapes[:2]
    if a != b and a and b and 1 not in (step.inputs[0].numel(), step.inputs[1].numel()):
        step.facts.setdefault("unequal", {"shapes": [list(a), list(b)], "place": step.place})


def straight_slopes(step: TracedCall) -> None:
    """Detect a second derivative that is zero everywhere."""
    if step.name != "grad" or not step.results:
        return
    again = any(n.slope for n in step.notes)
    if again and not any(bool(t.any()) for t in step.results):
        step.facts.setdefault("no_curvature", step.place)
