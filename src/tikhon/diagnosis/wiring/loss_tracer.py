"""Follow outputs and targets through the operations of the loss.

Operations inside of the model are not followed.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from tikhon.data.nested import tensors
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
from tikhon.diagnosis.wiring.origins import (
    UNKNOWN,
    Broadcast,
    Origin,
    Summand,
    TracedCall,
    broadcast_shape,
    row_pairs,
    union,
)
from tikhon.diagnosis.wiring.program import Facts, Program
from tikhon.diagnosis.wiring.propagation import (
    check_cosine_over_rows,
    check_gather_over_rows,
    check_index_as_number,
    check_mixed_derivatives,
    follow_bound,
    follow_detached_loss,
    follow_log_chance,
    follow_log_targets,
    follow_lost_slope,
    follow_norm_over_rows,
    is_index,
    is_norm_over_rows,
    raises_random_samples,
)
from tikhon.diagnosis.wiring.torch_calls import RANDOM_FUNCTIONS

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
MIN_Z = 5.0  # z-score of negatives being nearer than positives
SAME_ROW = 1e-6  # one minus the cosine of two copies of an embedding
EMBEDDED = set(
    "cosine_similarity pairwise_distance cdist triplet_margin_loss cosine_embedding_loss "
    "triplet_margin_with_distance_loss".split()
)
COMPARED = {*REGRESSIONS, *("poisson_nll_loss", "gaussian_nll_loss", "kl_div", "soft_margin_loss")}


class LossTracer(Located):
    """Context that records every operation between outputs and loss; `facts` is the result.

    `batch` holds the tensors of the data, with `rows` rows each.
    """

    def __init__(self, model: nn.Module, batch: list[Tensor], rows: int) -> None:
        super().__init__(model)
        self.rows = rows
        self.facts: dict[str, Any] = {"breaches": []}
        self._origins: dict[int, tuple[weakref.ref[Tensor], Origin]] = {}
        self._inputs_of: dict[int, Tensor] = {}  # by output: its input
        self._made: dict[int, Tensor] = {}  # the outputs
        self._arguments_of: dict[int, list[Tensor]] = {}  # by output: arguments of the model
        self._count = 0
        self._squashed_tensors: list[tuple[weakref.ref[Tensor], str]] = []
        self._similarities: list[weakref.ref[Tensor]] = []  # similarities of rows with themselves
        self.outputs: list[tuple[Tensor, bool]] = []  # and whether the inputs were noise
        for part in batch:
            self._root(part, UNKNOWN)

    def origin_of(self, tensor: Tensor) -> Origin:
        """Return the origin of a tensor."""
        known = self._origins.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else UNKNOWN

    def _set(self, tensor: Tensor, origin: Origin) -> None:
        self._origins[id(tensor)] = weakref.ref(tensor), origin

    def _root(self, tensor: Tensor, before: Origin) -> int:
        self._count += 1
        self._set(tensor, Origin(frozenset({self._count}), random=before.random))
        return self._count

    def leave(self, name: str, module: nn.Module, args: Args, output: object) -> None:
        """Register the outputs of the whole model, where the loss begins."""
        super().leave(name, module, args, output)
        if self.stack[-1] == LOSS:
            given = tensors(args)
            outputs = tensors(output)
            for place, tensor in enumerate(outputs):
                root = self._root(tensor, union([self.origin_of(t) for t in given]))
                drawn = any(self.origin_of(t).random and not t.is_floating_point() for t in given)
                self.outputs.append((tensor, drawn))
                self._arguments_of[root] = given
                if len(outputs) == len(given):  # as many outputs as inputs: pair them
                    self._inputs_of[root], self._made[root] = given[place], tensor

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Follow the function's tensors and return its result."""
        options = dict(kwargs)
        name, outside = function_name(func), self.stack[-1] == LOSS
        if not outside and name not in CHECKED:
            return func(*args, **options)
        inputs = tensors((*args, *options.values()))
        graded = torch.is_grad_enabled()
        line, written = user_line(), not inside_torch()
        origins = [self.origin_of(t) for t in inputs]
        shapes = [tuple(t.shape) for t in inputs]
        output = func(*args, **options)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            results = tensors(output)
            step = TracedCall(
                name, args, options, inputs, shapes, origins, results, line, written, self.facts
            )
            found = breach(step)
            if found is not None:
                self.facts["breaches"].append(found)
            if outside:
                drawn = self.graded and not graded and name in SAMPLERS
                of_outputs = any(not n.roots.isdisjoint(self._arguments_of) for n in origins)
                if of_outputs and name in DECISIONS:
                    self.facts.setdefault("decides", line)
                self._follow(step, sampled=drawn and of_outputs)
        return output

    def _follow(self, step: TracedCall, *, sampled: bool) -> None:
        origin = union(step.origins)
        if step.name == "__setitem__":
            target = step.inputs[0]
            self._set(target, replace(origin, explicit_axes=step.origins[0].explicit_axes))
        if not step.results:
            return
        check_index_mask(step, self.rows)
        check_column_counts(step)
        check_second_derivative(step)
        self._check_denoising(step)
        self._check_self_contrast(step)
        self._check_triplets(step)
        self._check_embeddings(step)
        self._check_double_squash(step)
        self._check_bootstrap_gradient(step)
        self._check_discriminator(step)
        check_index_as_number(step, set(self._arguments_of))
        check_gather_over_rows(step, self.rows, set(self._arguments_of))
        check_cosine_over_rows(step, self.rows)
        check_mixed_derivatives(step)
        origin = replace(
            origin,
            row_norm=is_norm_over_rows(step, self.rows),
            normed_line=follow_norm_over_rows(step, self.rows),
            bound=follow_bound(step),
            explicit_axes=has_explicit_axes(step),
            discounted=origin.discounted
            or (step.name in TIMES and any(map(is_discount, step.args))),
            bootstrap_line=origin.bootstrap_line or self._bootstrap_line(step),
            random=origin.random or step.name in RANDOM_FUNCTIONS,
            masked_share=masked_share(step),
            derivative=origin.derivative or step.name == "grad",
            detached_line=follow_detached_loss(step),
            log_targets=follow_log_targets(step),
            lost_slope=follow_lost_slope(step),
            log_chance=follow_log_chance(step, set(self._arguments_of)),
        )
        for summand in origin.summands:
            summand.intended |= not is_linear(step, summand)
        origin = self._check_late_weights(step, self._follow_sample(step, origin, sampled))
        origin = self._check_broadcast(step, origin)
        for result in step.results:
            self._set(result, replace(origin, is_index=is_index(step, result)))

    def _follow_sample(self, step: TracedCall, origin: Origin, sampled: bool) -> Origin:
        """Follow a sample without gradient into a sum with tensors that have one."""
        if sampled:
            return replace(origin, sampled=(step.name, step.place))
        sample = next((n.sampled for n in step.origins if n.sampled), None)
        if sample is None:
            return origin
        if not step.attached:
            mixed = any(n.mixed for n in step.origins) or len(step.inputs) > 1
            return replace(origin, sampled=sample, mixed=mixed)
        detached = [n for t, n in zip(step.inputs, step.origins) if not t.requires_grad]
        beside = [n for n in detached if n.sampled]
        if step.written and step.name in ADDING and beside and all(n.mixed for n in beside):
            return replace(origin, summands=(*origin.summands, Summand("sampled", *sample)))
        return origin

    def _check_late_weights(self, step: TracedCall, origin: Origin) -> Origin:
        """Detect a mean over the rows that is multiplied by one number per row."""
        whole = step.plain and step.results[0].ndim == 0 and step.attached
        before = [n.averaged for n in step.origins]
        if whole and (any(before) or any(self.rows in s for s in step.shapes)):
            return replace(origin, averaged=True)
        if step.name not in TIMES | SHARES or sum(before) != 1 or len(before) != 2:
            return origin
        mean = before.index(True)
        other, shape = step.inputs[1 - mean], step.shapes[1 - mean]
        if step.shapes[mean] == () and not other.requires_grad and shape[:1] == (self.rows,):
            late = Summand("weighed", step.name, step.place)
            return replace(origin, summands=(*origin.summands, late))
        return origin

    def _check_broadcast(self, step: TracedCall, origin: Origin) -> Origin:
        """Detect rows broadcast against rows on another axis, and whether pairs are intended."""
        joins = len(step.shapes) < 2 or step.name in JOINING
        spread = None if joins else broadcast_shape(step.shapes)
        table = spread is not None and row_pairs(spread, self.rows)
        if table and spread is not None and not any(row_pairs(s, self.rows) for s in step.shapes):
            same = all(tuple(r.shape) == spread for r in step.results) or step.name in COMPARED
            by_axes = sorted(zip(map(len, step.shapes), range(len(step.shapes))))
            small, large = by_axes[0], by_axes[-1]
            if same and small[0] < large[0]:
                a, b = step.origins[small[1]].roots, step.origins[large[1]].roots
                unrelated = step.name in ARITHMETIC and bool(a and b) and not a & b
                explicit = step.origins[large[1]].explicit_axes and step.name not in COMPARED
                pair = step.shapes[0], step.shapes[1]
                found = Broadcast(step.name, pair, step.place, explicit, unrelated)
                return replace(origin, broadcasts=(*origin.broadcasts, found))
        tables = [n for n, s in zip(step.origins, step.shapes) if row_pairs(s, self.rows)]
        others = [n for n in tables if not n.broadcasts]
        kept = step.plain and tuple(step.results[0].shape) in step.shapes
        whole = step.plain and step.results[0].ndim == 0
        for broadcast in origin.broadcasts:
            meets = bool(others) and spread is not None
            broadcast.intended |= meets or (broadcast.explicit and not (kept or whole))
        return origin

    def _bootstrap_line(self, step: TracedCall) -> str:
        """Return the line that adds a discounted output to data: reward plus next value."""
        if step.name not in ADDING or len(step.inputs) != 2 or not step.results[0].ndim:
            return ""
        for value, reward in ((0, 1), (1, 0)):
            origin, other = step.origins[value], step.origins[reward]
            of_data = bool(other.roots) and other.roots.isdisjoint(self._arguments_of)
            of_output = not origin.roots.isdisjoint(self._arguments_of)
            if of_output and of_data and origin.discounted and not origin.derivative:
                step.facts.setdefault("looks_ahead", step.place)
                if not step.shapes[value] and self.rows in step.shapes[reward]:
                    step.facts.setdefault("one_following", step.place)
                if step.inputs[value].requires_grad:
                    return step.place
        return ""

    def _check_bootstrap_gradient(self, step: TracedCall) -> None:
        """Detect an output compared with a bootstrapped target that has a gradient."""
        if step.name not in ADDING | COMPARED or len(step.inputs) < 2:
            return
        given, learned = set(self._arguments_of), [t.requires_grad for t in step.inputs[:2]]
        roots = [n.roots & given for n in step.origins[:2]]
        for target, output in ((0, 1), (1, 0)):
            apart = roots[target] - roots[output] and roots[output] - roots[target]
            line = step.origins[target].bootstrap_line
            plain = not step.origins[output].bootstrap_line
            if line and plain and apart and all(learned):
                step.facts.setdefault("pulled_goal", line)

    def _check_discriminator(self, step: TracedCall) -> None:
        """Detect outputs passed through a layer outside of the model, such as a discriminator."""
        of_outputs = any(not n.roots.isdisjoint(self._arguments_of) for n in step.origins)
        if step.name not in LAYERS or not of_outputs:
            return
        own = set(map(id, self.model.parameters()))
        if any(isinstance(t, nn.Parameter) and id(t) not in own for t in step.inputs):
            step.facts.setdefault("judged", step.place)

    def _check_denoising(self, step: TracedCall) -> None:
        """Detect an output compared with its own noisy input."""
        if step.name not in ADDING | COMPARED or len(step.inputs) < 2:
            return
        for output, other in ((0, 1), (1, 0)):
            for root in step.origins[output].roots:
                same = [t for t in self._arguments_of.get(root, ()) if t is step.inputs[other]]
                if same and step.origins[other].random and same[0].ndim:
                    found = {"place": step.place, "numbers": same[0][0].numel()}
                    step.facts.setdefault("asked_back", found)

    def _check_self_contrast(self, step: TracedCall) -> None:
        """Detect a contrastive loss in which each row has to find itself."""
        if step.name in PRODUCTS and len(step.inputs) == 2 and step.results[0].ndim == 2:
            a, b = step.inputs
            if a.ndim == 2 and a.shape == b.T.shape and a.shape[0] > 2 and torch.equal(a, b.T):
                self._similarities = [*self._similarities, weakref.ref(step.results[0])]
        elif any(t() is step.inputs[0] for t in self._similarities if step.inputs):
            table, target = step.inputs[0], step.inputs[-1]
            if step.name == "cross_entropy" and target.ndim == 1 and target.numel() == len(table):
                if torch.equal(target.cpu(), torch.arange(len(target))):
                    step.facts.setdefault("finds_itself", step.place)
            elif step.name in TIMES | SHARES and [t.shape for t in step.results] == [table.shape]:
                self._similarities = [*self._similarities, weakref.ref(step.results[0])]

    def _check_double_squash(self, step: TracedCall) -> None:
        """Detect a loss that applies its sigmoid or softmax to a squashed input."""
        if step.name in SQUASHING and step.results:
            self._squashed_tensors.append((weakref.ref(step.results[0]), step.name))
        for seen, name in self._squashed_tensors if step.name in SQUASHING.values() else ():
            if SQUASHING[name] == step.name and step.inputs and seen() is step.inputs[0]:
                found = {"by": name, "loss": step.name, "place": step.place}
                step.facts.setdefault("squashed_twice", found)

    def _check_embeddings(self, step: TracedCall) -> None:
        """Detect outputs that are compared with each other: by distance, cosine or product."""
        known = self._arguments_of.keys()
        rows = [t for t, n in zip(step.inputs, step.origins) if n.roots & known]
        compared = len(rows) > 1 and all(t.ndim > 1 for t in rows)
        pairs = any(row_pairs(tuple(t.shape), self.rows) for t in step.results)
        if compared and (step.name in EMBEDDED or (pairs and step.name in PRODUCTS | ADDING)):
            step.facts.setdefault("embeds", step.place)

    def _check_triplets(self, step: TracedCall) -> None:
        """Detect triplets whose input negatives are nearer to the anchor than the positives."""
        if step.name != "triplet_margin_loss" or len(step.inputs) < 3:
            return
        given = [self._input_rows(t, n) for t, n in zip(step.inputs[:3], step.origins)]
        anchor, near, far = given
        if anchor is None or near is None or far is None:
            return
        if not anchor.shape == near.shape == far.shape or len(anchor) < 3:
            return
        gap = (anchor - near).norm(dim=1) - (anchor - far).norm(dim=1)
        z_score = float(gap.mean()) / max(float(gap.std()) / len(gap) ** 0.5, 1e-12)
        if z_score > MIN_Z:
            step.facts.setdefault("nearer", {"place": step.place, "sure": z_score})

    def _input_rows(self, embeddings: Tensor, origin: Origin) -> Tensor | None:
        """Return the input rows of which these are the embeddings, maybe normalised."""
        roots = [r for r in origin.roots if r in self._inputs_of]
        if len(roots) != 1 or not self._inputs_of[roots[0]].is_floating_point():
            return None
        made = self._made[roots[0]].detach().flatten(0, -2)
        rows = self._inputs_of[roots[0]].double().reshape(len(made), -1)
        asked = embeddings.detach().flatten(0, -2)
        if asked.shape[1] != made.shape[1]:
            return None
        alike = normalize(asked.double()) @ normalize(made.double()).T
        best = alike.max(1)
        return rows[best.indices] if float(best.values.min()) > 1 - SAME_ROW else None


def loss_facts(program: Program) -> Facts:
    """Find broadcast rows, misused masks, samples without gradient, arguments out of domain."""
    parts = tensors(program.batch)
    with torch.enable_grad(), undisturbed(program.model, training=True):
        with LossTracer(program.model, parts, program.rows) as trace:
            loss = program.replica.value(program.batch)
        origin = trace.origin_of(loss)
    facts = dict(trace.facts)
    unintended = [
        b for b in origin.broadcasts if not b.intended and (b.unrelated or not b.explicit)
    ]
    if unintended:
        first = unintended[0]
        shapes = [list(s) for s in first.shapes]
        facts["broadcast"] = {"function": first.function, "shapes": shapes, "place": first.place}
    if raises_random_samples(trace.outputs, loss):
        facts["draws_above"] = True
    for summand in origin.summands:
        if not summand.intended:
            facts.setdefault(summand.kind, {"name": summand.function, "place": summand.place})
    return facts


def is_discount(factor: object) -> bool:
    """Whether a factor is a constant number between 0 and 1."""
    if isinstance(factor, Tensor):
        return not factor.requires_grad and factor.ndim == 0 and 0 < float(factor) < 1
    return isinstance(factor, float) and 0 < factor < 1


def is_linear(step: TracedCall, summand: Summand) -> bool:
    """Whether a step is linear in a summand: sums, means, products with single numbers."""
    if step.name in LINEAR:
        return True
    others = [t for t, n in zip(step.inputs, step.origins) if summand not in n.summands]
    return step.name in TIMES | SHARES and all(t.numel() == 1 for t in others)


def has_explicit_axes(step: TracedCall) -> bool:
    """Whether the axes of size one of a result are explicit in the program."""
    if step.name == "__getitem__":
        index = step.args[1] if isinstance(step.args[1], tuple) else (step.args[1],)
        return step.origins[0].explicit_axes or any(part is None for part in index)
    if step.name in SHAPING:
        return step.written or any(n.explicit_axes for n in step.origins)
    if not step.plain:
        return False
    ndim = step.results[0].ndim
    own = [n for t, n in zip(step.inputs, step.origins) if t.ndim == ndim]
    return bool(own) and all(n.explicit_axes for n in own)


def masked_share(step: TracedCall) -> float:
    """Return the share of entries zeroed by a mask; stored in `facts` if averaged."""
    before = max((n.masked_share for n in step.origins), default=0.0)
    reduced = step.kwargs.get("reduction", "mean") == "mean"
    averaged = step.name == "mean" or (step.name in COMPARED and reduced)
    if averaged and before and step.attached:
        known = step.facts.get("masked_mean", {"share": 0.0})
        if before > known["share"]:
            step.facts["masked_mean"] = {"share": before, "place": step.place}
    if step.name in TIMES and len(step.inputs) == 2 and step.attached:
        shares = [zero_share(t) for t in step.inputs if not t.requires_grad and t.numel() > 1]
        before = max([before, *shares])
    return before if step.name in KEEPS_ZERO else 0.0


def zero_share(mask: Tensor) -> float:
    """Return the share of zeros among zeros and ones; 0 for other values."""
    if not bool(((mask == 0) | (mask == 1)).all()):
        return 0.0
    return float((mask == 0).double().mean())


def check_index_mask(step: TracedCall, rows: int) -> None:
    """Detect an integer 0/1 mask used as an index, which picks rows 0 and 1."""
    if step.name != "__getitem__" or len(step.inputs) != 2:
        return
    source, index = step.inputs
    whole = index.dtype in (torch.int64, torch.int32) and index.shape == (rows,)
    if not whole or step.args[1] is not index or len(source) != rows:
        return
    if index.unique().tolist() == [0, 1]:
        step.facts.setdefault("index_mask", step.place)


def check_column_counts(step: TracedCall) -> None:
    """Detect a loss of outputs and targets of which one has one column and the other several."""
    if step.name not in COMPARED or not step.attached or len(step.shapes) < 2:
        return
    a, b = step.shapes[:2]
    if a != b and a and b and 1 not in (step.inputs[0].numel(), step.inputs[1].numel()):
        step.facts.setdefault("unequal", {"shapes": [list(a), list(b)], "place": step.place})


def check_second_derivative(step: TracedCall) -> None:
    """Detect a second derivative that is zero everywhere."""
    if step.name != "grad" or not step.results:
        return
    again = any(n.derivative for n in step.origins)
    if again and not any(bool(t.any()) for t in step.results):
        step.facts.setdefault("no_curvature", step.place)
