"""Random sequences of what users do with a model, its optimizers and a Regularizer.

A slow reference knows the right weights: plain numbers, one formula a move, no hooks. Gradients
are written by the user, so that the reference knows them too. Weights are compared after every
action, as are `.grad` and the count of steps; now and then what the handle reads.
"""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn, optim

import tikhon as tk
from tikhon.regularizer import regularizer
from tikhon.regularizer.attachment import Attachment
from tikhon.regularizer.bypass_detection import BypassDetector
from tikhon.regularizer.hooks import StepHooks
from tikhon.regularizer.plan import StepPlan

LR = (0.1, 0.05)  # of the two optimizers
L1, L2, BOX = 0.5, 0.3, 2.0
ROWS, COLUMNS = 2, 3


class Outer(optim.SGD):
    """A subclass that calls `super().step()`, and raises when it is told to."""

    fails = ""

    def step(self, closure=None):
        if self.fails == "before":
            raise RuntimeError("out of memory")
        loss = super().step(closure)
        if self.fails == "after":
            raise RuntimeError("out of memory")
        return loss


tk.register_gain(Outer, lambda optimizer, group, state: group["lr"], uniform=True)


class Fragile(tk.L2):
    """A user's penalty that raises when it is told to."""

    fails = False

    def grad(self, w):
        if type(self).fails:
            raise RuntimeError("no memory for the penalty")
        return super().grad(w)


def schedule(step):
    return L1 * (1 + step % 3)


TERMS = {
    "*": [tk.L1(schedule), Fragile(L2)],
    "b.weight": [tk.Term(tk.L2(0.2), how="decoupled"), tk.Box(-BOX, BOX)],
}


class Reference:
    """The right weights of one layer: what a step does, written out."""

    def __init__(self, name, weight, owner):
        self.name, self.owner = name, owner  # the optimizer that holds it, or None
        self.weight = weight.detach().double().clone()
        self.grad = None

    def step(self, lr, count):
        if self.grad is None:
            return
        w, strength = self.weight, schedule(count)
        gradient = self.grad.double() + L2 * w
        if self.name == "b.weight":
            w = w * (1 - lr * 0.2)
        w = w - lr * gradient
        w = w.sign() * (w.abs() - lr * strength).clamp_min(0)
        self.weight = w.clamp(-BOX, BOX) if self.name == "b.weight" else w


class Sequences(RuleBasedStateMachine):
    """Two layers with an optimizer each, later heads, one handle."""

    @initialize(
        kinds=st.tuples(st.sampled_from([optim.SGD, Outer]), st.just(Outer)),
        steps=st.sampled_from([0, 2]),
    )
    def attach(self, kinds, steps):
        torch.manual_seed(0)
        optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        self.model = nn.ModuleDict({k: nn.Linear(COLUMNS, ROWS, bias=False) for k in "ab"})
        self.optimizers = [
            kind(self.model[key].parameters(), lr=lr) for kind, key, lr in zip(kinds, "ab", LR)
        ]
        self.rates = list(LR)
        self.known = {
            f"{key}.weight": Reference(f"{key}.weight", self.model[key].weight, i)
            for i, key in enumerate("ab")
        }
        self.counts = [0, 0]
        self.stepped = set()
        self.edits = 0  # of weights by the user, since both optimizers have stepped
        self.attached = True
        self.generator = torch.Generator().manual_seed(1)
        self.handle = tk.regularize(self.model, self.optimizers, TERMS)
        for _ in range(steps):
            self.train()

    def draw(self, rows=ROWS):
        return torch.randn(rows, COLUMNS, generator=self.generator)

    def layers(self, owner=None):
        for name, known in self.known.items():
            if owner is None or known.owner == owner:
                yield known, self.model[name.partition(".")[0]].weight

    # -- training -----------------------------------------------------------------------------

    @rule(data=st.data(), to_none=st.booleans())
    def zero_grad(self, data, to_none):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=to_none)
        for known, _ in self.layers():
            if known.owner is None or known.grad is None:
                continue
            known.grad = None if to_none else torch.zeros_like(known.grad)

    @rule(data=st.data())
    def backward(self, data):
        for known, param in self.layers():
            if param.requires_grad and data.draw(st.booleans()):
                gradient = self.draw(param.shape[0])
                param.grad = gradient if param.grad is None else param.grad + gradient
                known.grad = param.grad.clone()

    @rule()
    def train(self):
        """What users do most: gradients everywhere, and a step of each optimizer."""
        for known, param in self.layers():
            if param.requires_grad:
                param.grad = self.draw(param.shape[0])
                known.grad = param.grad.clone()
        for which in (0, 1):
            self.step(which)

    @rule(which=st.integers(0, 1))
    def step(self, which):
        self.optimizers[which].step()
        self.count(which)

    def count(self, which):
        for known, _ in self.layers(which):
            if self.attached:
                known.step(self.rates[which], self.counts[which])
            elif known.grad is not None:
                known.weight = known.weight - self.rates[which] * known.grad.double()
        self.counts[which] += self.attached
        self.stepped.add(which)
        if len(self.stepped) == 2:
            self.edits, self.stepped = 0, set()

    @rule(which=st.integers(0, 1))
    def step_with_closure(self, which):
        optimizer = self.optimizers[which]

        def closure():
            optimizer.zero_grad()
            for known, param in self.layers(which):
                param.grad = self.draw(param.shape[0])
                known.grad = param.grad.clone()
            return torch.zeros(())

        optimizer.step(closure)
        self.count(which)

    @rule(which=st.integers(0, 1))
    def closure_that_raises(self, which):
        def closure():
            for known, param in self.layers(which):
                param.grad = self.draw(param.shape[0])
                known.grad = param.grad.clone()
            raise RuntimeError("the loss failed")

        with pytest.raises(RuntimeError, match="the loss failed"):
            self.optimizers[which].step(closure)

    @precondition(lambda self: isinstance(self.optimizers[1], Outer))
    @rule()
    def optimizer_that_raises(self):
        self.optimizers[1].fails = "before"
        with pytest.raises(RuntimeError, match="out of memory"):
            self.optimizers[1].step()
        self.optimizers[1].fails = ""

    @precondition(lambda self: self.attached)
    @rule(which=st.integers(0, 1))
    def penalty_that_raises(self, which):
        if all(known.grad is None for known, _ in self.layers(which)):
            return
        Fragile.fails = True
        try:
            with pytest.raises(RuntimeError, match="no memory for the penalty"):
                self.optimizers[which].step()
        finally:
            Fragile.fails = False

    @rule(which=st.integers(0, 1), infinite=st.booleans())
    def scaled_step(self, which, infinite):
        """GradScaler: it steps unless a gradient is infinite."""
        optimizer = self.optimizers[which]
        layers = list(self.layers(which))
        if all(param.grad is None for _, param in layers):
            return
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))  # as for a loss
        for _, param in layers:
            if param.grad is not None:
                param.grad = torch.full_like(param, torch.inf) if infinite else 4 * param.grad
        scaler.step(optimizer)
        scaler.update()
        if infinite:
            for known, param in layers:
                param.grad = None if known.grad is None else known.grad.clone()
        else:
            self.count(which)

    @rule(which=st.integers(0, 1), factor=st.sampled_from([0.5, 2.0]))
    def schedule_rate(self, which, factor):
        self.rates[which] = min(0.2, self.rates[which] * factor)
        for group in self.optimizers[which].param_groups:
            group["lr"] = self.rates[which]

    @rule(which=st.integers(0, 1), bad=st.sampled_from([-0.1, float("nan")]))
    def bad_rate(self, which, bad):
        groups = self.optimizers[which].param_groups
        if not self.attached:
            return
        for group in groups:
            group["lr"] = bad
        with pytest.raises(ValueError, match="learning rate"):
            self.optimizers[which].step()
        for group in groups:
            group["lr"] = self.rates[which]

    # -- surgery ------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from(["a", "b"]),
        rows=st.sampled_from([ROWS, ROWS, 1, 3]),
        first=st.booleans(),
    )
    def replace(self, name, rows, first):
        """A new parameter in the model and in its optimizer, in either order."""
        old, known = self.model[name].weight, self.known[f"{name}.weight"]
        new = nn.Parameter(self.draw(rows))

        def in_model():
            self.model[name].weight = new

        def in_optimizer():
            for group in self.optimizers[known.owner].param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]

        for act in (in_model, in_optimizer) if first else (in_optimizer, in_model):
            act()
        known.weight, known.grad = new.detach().double().clone(), None

    @precondition(lambda self: "c.weight" not in self.known)
    @rule()
    def new_head(self):
        """A layer that no optimizer holds yet."""
        self.model["c"] = nn.Linear(COLUMNS, ROWS, bias=False)
        self.known["c.weight"] = Reference("c.weight", self.model["c"].weight, None)

    @precondition(lambda self: getattr(self.known.get("c.weight"), "owner", 0) is None)
    @rule(which=st.integers(0, 1))
    def add_group(self, which):
        group = {"params": list(self.model["c"].parameters()), "lr": self.rates[which]}
        self.optimizers[which].add_param_group(group)
        self.known["c.weight"].owner = which

    @rule(name=st.sampled_from(["a", "b"]), on=st.booleans())
    def freeze_or_unfreeze(self, name, on):
        param, known = self.model[name].weight, self.known[f"{name}.weight"]
        param.requires_grad_(on)
        if not on:
            param.grad = known.grad = None

    @rule()
    def load_weights(self):
        state = {name: self.draw(known.weight.shape[0]) for name, known in self.known.items()}
        self.model.load_state_dict(state)
        self.edits += 1
        for name, known in self.known.items():
            known.weight = state[name].double()

    # -- the handle ---------------------------------------------------------------------------

    @rule(copied=st.sampled_from([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]))
    def copy_all(self, copied):
        grads = [param.grad for _, param in self.layers()]
        self.model, self.optimizers, self.handle = copied(
            (self.model, self.optimizers, self.handle)
        )
        for (_, param), grad in zip(self.layers(), grads):
            param.grad = grad

    @precondition(lambda self: self.attached)
    @rule()
    def save_and_load(self):
        state = pickle.loads(pickle.dumps(self.handle.state_dict()))
        self.handle.remove()
        self.handle = tk.regularize(self.model, self.optimizers, TERMS)
        self.handle.load_state_dict(state)

    @rule()
    def remove_or_attach(self):
        if self.attached:
            self.handle.remove()
        else:
            self.handle.attach(self.optimizers)
        self.attached = not self.attached

    # -- what holds after every action ---------------------------------------------------------

    @invariant()
    def weights_are_right(self):
        for known, param in self.layers():
            torch.testing.assert_close(param.detach().double(), known.weight, rtol=1e-4, atol=1e-5)
            known.weight = param.detach().double().clone()  # errors of rounding do not add up

    @invariant()
    def gradients_are_the_users_own(self):
        for known, param in self.layers():
            assert (param.grad is None) == (known.grad is None)
            if known.grad is not None:
                torch.testing.assert_close(param.grad, known.grad)

    @invariant()
    def counts_are_right(self):
        assert self.handle.state_dict()["steps_of_each"] == self.counts

    @rule()
    def read(self):
        """Not after every action: a reading looks at the parameters that there are now."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if self.edits > 1:  # as many as training without a Regularizer would make
                warnings.filterwarnings("ignore", message="penalty inactive")
            zeros = self.handle.sparsity()
        expected = {name: float((k.weight == 0).double().mean()) for name, k in self.known.items()}
        assert zeros == pytest.approx(expected)


LENGTHS = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
Sequences.TestCase.settings = LENGTHS
TestSequences = Sequences.TestCase


def at_every_level(patch):
    """The hooks act whenever torch calls them, in `super().step()` too."""
    patch.setattr(StepHooks, "_enter", lambda self, optimizer, *given: self.on_start(*given))
    patch.setattr(StepHooks, "_exit", lambda self, *_: self.on_end())


def by_size(patch):
    """A parameter of another identity, but of the same size, is taken for the same."""

    def sizes(groups):
        return [[p.shape for p in group] for group in groups]

    def is_current(self):
        now = sizes(group["params"] for group in self.optimizer.param_groups)
        return now == sizes(self.params)

    patch.setattr(StepPlan, "is_current", is_current)


def left_behind(patch):
    """What was added to gradients stays there when a step raises."""

    def failed(self):
        self._gradients, self._replaced, self._decayed = {}, {}, []

    patch.setattr(Attachment, "_undo_step", failed)


def moved_for_all(patch):
    """One strength for all optimizers, which each of them moves."""
    patch.setattr(regularizer, "split_strengths_by_optimizer", lambda bindings, held_by: None)


def alarmed(patch):
    """Whatever moves a weight but our own step is training without a Regularizer."""
    patch.setattr(BypassDetector, "record_move", lambda self: setattr(self, "_allowed", 0))
    patch.setattr(BypassDetector, "end", lambda self: setattr(self, "_has_stepped", True))


MUTANTS = [at_every_level, by_size, left_behind, moved_for_all, alarmed]


@pytest.mark.slow  # of the test, not of what it tests
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_sequences_find_it_when_a_fix_is_taken_out(mutant, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises((Exception, pytest.fail.Exception)) as found:
        run_state_machine_as_test(
            Sequences,
            settings=settings(LENGTHS, max_examples=1000, phases=[Phase.generate], database=None),
        )
    assert not isinstance(found.value, AttributeError | NameError), "the mutant itself is broken"
