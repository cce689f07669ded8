"""A step acts once and leaves nothing behind, whoever calls whom and whatever raises."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn, optim

import tikhon as tk


def weights(*shape, value=1.0):
    model = nn.Linear(shape[-1], shape[0], bias=False)
    nn.init.constant_(model.weight, value)
    return model


def zero_gradients(model):
    for param in model.parameters():
        param.grad = torch.zeros_like(param)


def caller(kind, levels=1):
    """A subclass of an optimizer that calls `super().step()`, `levels` deep."""
    kind([nn.Parameter(torch.ones(1))], lr=0.1)  # torch wraps `step` with a class's first instance
    for _ in range(levels):

        class Calling(kind):
            def step(self, closure=None):
                return super().step(closure)

        Calling([nn.Parameter(torch.ones(1))], lr=0.1)
        kind = Calling
    return kind


def wrapped_by_scheduler(optimizer):
    optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return optimizer.step


CALLS = {
    "step": lambda optimizer: optimizer.step,
    "a scheduler around it": wrapped_by_scheduler,
    "compiled": lambda optimizer: torch.compile(optimizer.step, backend="eager"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("closure", [False, True])
def test_the_outermost_step_alone_acts(levels, call, closure):
    model = weights(1, 3)
    optimizer = caller(optim.SGD, levels)(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, tk.L1(0.5))
    step = CALLS[call](optimizer)

    def evaluate():
        zero_gradients(model)
        return model.weight.sum()

    for count in (1, 2, 3):
        if closure:
            step(evaluate)
        else:
            zero_gradients(model)
            step()
        torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), 1 - 0.05 * count))
        assert reg.steps == count
        assert not model.weight.grad.any()


@pytest.mark.parametrize("levels", [0, 1, 3])
def test_the_gradient_is_the_users_own_after_the_step(levels):
    model = weights(1, 3)
    optimizer = caller(optim.SGD, levels)(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, tk.L2(1.0))
    zero_gradients(model)
    own = model.weight.grad
    optimizer.step()
    assert model.weight.grad is own and not own.any()
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), 0.9))


def test_an_inner_step_that_raises_and_is_caught_does_not_count():
    class Careful(optim.SGD):
        """Falls back to a step of its own where the parent's raises."""

        def step(self, closure=None):
            try:
                super().step(lambda: 1 / 0)
            except ZeroDivisionError:
                with torch.no_grad():
                    for p in self.param_groups[0]["params"]:
                        p.sub_(self.param_groups[0]["lr"] * p.grad)

    optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    model = weights(1, 3)
    optimizer = Careful(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, tk.L2(1.0))
    for count in (1, 2):
        zero_gradients(model)
        optimizer.step()
        assert not model.weight.grad.any()
        assert reg.steps == count
        torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), 0.9**count))


class Failing(tk.L2):
    """A user's penalty that raises when it is told to."""

    broken = False

    def grad(self, w):
        if type(self).broken:
            raise RuntimeError("out of memory")
        return super().grad(w)


class FailingProx(tk.L1):
    """A user's prox that raises when it is told to."""

    broken = False

    def prox(self, w, step):
        if type(self).broken:
            raise RuntimeError("out of memory")
        return super().prox(w, step)


@pytest.fixture(autouse=True)
def mend():
    yield
    Failing.broken = FailingProx.broken = False


def two_layers():
    model = nn.Sequential(weights(2, 3), weights(2, 2))
    return model


def failing_optimizer(model):
    class Breaking(optim.SGD):
        broken = False

        def step(self, closure=None):
            if self.broken:
                raise RuntimeError("out of memory")
            return super().step(closure)

    return Breaking(model.parameters(), lr=0.1)


@pytest.mark.parametrize("how", ["objective", "decoupled"])
@pytest.mark.parametrize("penalty", [tk.L2(1.0), tk.Huber(1.0, delta=0.5)], ids=repr)
def test_an_optimizer_that_raises_leaves_gradients_and_weights(how, penalty):
    model = two_layers()
    optimizer = failing_optimizer(model)
    reg = tk.regularize(model, optimizer, penalty, how=how)
    before = copy.deepcopy(model)
    optimizer.broken = True
    zero_gradients(model)
    own = [p.grad for p in model.parameters()]
    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
    for p, q, grad in zip(model.parameters(), before.parameters(), own):
        assert p.grad is grad and not grad.any()
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert reg.steps == 0
    optimizer.broken = False
    optimizer.step()  # the retry counts the penalty once
    expected = 0.9 if isinstance(penalty, tk.L2) else 0.95
    torch.testing.assert_close(model[0].weight.detach(), torch.full((2, 3), expected))
    assert reg.steps == 1


@pytest.mark.parametrize("strength", [0.5, 9.999, 10.0, 25.0])
@pytest.mark.parametrize("terms", [[tk.L2], [tk.L2, tk.L2], [lambda s: tk.Huber(s, delta=2.0)]])
def test_weights_come_back_also_where_a_decay_leaves_nothing_of_them(strength, terms):
    model = two_layers()
    optimizer = failing_optimizer(model)
    decays = [tk.Term(term(strength), how="decoupled") for term in terms]
    reg = tk.regularize(model, optimizer, {"*": decays})
    optimizer.broken = True
    zero_gradients(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    for p in model.parameters():
        torch.testing.assert_close(p.detach(), torch.ones_like(p), rtol=1e-6, atol=1e-6)
    assert reg.steps == 0


def test_a_step_that_raises_and_is_tried_again_counts_its_gradient_once():
    """Where zeros come from averages of gradients: the optimizer's gain is not known."""
    found = []
    for fails in (False, True):
        model, draws = two_layers(), torch.Generator().manual_seed(0)
        optimizer = failing_optimizer(model)
        reg = tk.regularize(model, optimizer, tk.L1(0.5))
        assert reg.audit()["0.weight"].route == ("orthant",)
        for number in range(6):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=draws)
            if fails and number in (1, 3):
                optimizer.broken = True
                with pytest.raises(RuntimeError, match="out of memory"):
                    optimizer.step()
                optimizer.broken = False
            optimizer.step()
        state = reg.state_dict()["averages"]
        found.append([p.detach() for p in model.parameters()] + list(state.values()))
    assert len(found[0]) == 4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("how", ["objective", "decoupled"])
def test_a_penalty_that_raises_before_the_step_moves_nothing(how):
    model = two_layers()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    terms = {"0.weight": tk.L2(1.0), "1.weight": Failing(1.0)}
    reg = tk.regularize(model, optimizer, terms, how=how)
    zero_gradients(model)
    own = [p.grad for p in model.parameters()]
    Failing.broken = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert [p.grad is g for p, g in zip(model.parameters(), own)] == [True, True]
    assert all(bool((p == 1).all()) for p in model.parameters())
    assert reg.steps == 0
    Failing.broken = False
    optimizer.step()
    for p in model.parameters():
        torch.testing.assert_close(p.detach(), torch.full_like(p, 0.9))


def test_a_failure_takes_back_nothing_of_the_steps_before():
    model = weights(1, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, {"*": [tk.Term(tk.L2(0.5), how="decoupled"), Failing(0.1)]})
    zero_gradients(model)
    optimizer.step()
    before = model.weight.detach().clone()
    Failing.broken = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("good", [0, 2])
def test_a_failure_leaves_no_trace_in_the_average_of_gradients(good):
    """By orthants an average decides where a zero is left; a step tried twice counts once."""
    ends = []
    for failures in (0, 3):
        model = nn.Sequential(weights(1, 3, value=0.0))
        optimizer = failing_optimizer(model)
        reg = tk.regularize(model, optimizer, tk.L1(0.5))
        for gradient in [0.0] * good + [-4.0, 0.3, 0.3]:
            model[0].weight.grad = torch.full((1, 3), gradient)
            optimizer.broken = True
            for _ in range(failures):
                with pytest.raises(RuntimeError, match="out of memory"):
                    optimizer.step()
            optimizer.broken = False
            optimizer.step()
        ends.append((reg.state_dict()["averages"], model[0].weight.detach()))
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    assert ends[0][0]


def test_a_closure_that_raises_leaves_its_gradients():
    model = weights(1, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, tk.L2(1.0))
    own = torch.full_like(model.weight, 2.0)

    def closure():
        model.weight.grad = own
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert model.weight.grad is own and (own == 2).all() and reg.steps == 0
    model.weight.grad.zero_()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), 0.9))


def test_a_prox_that_raises_is_the_only_one_left_out():
    model = two_layers()
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    terms = {"0.weight": FailingProx(1.0), "1.weight": [tk.L1(1e3), tk.MaxNorm(0.5)]}
    reg = tk.regularize(model, optimizer, terms)
    zero_gradients(model)
    FailingProx.broken = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert model[1].weight.norm(dim=1).max() < 0.5 + 1e-6
    assert (model[0].weight == 1).all()
    assert not model[0].weight.grad.any()
    assert reg.steps == int(optimizer.state[model[0].weight]["step"]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg.sparsity()


def test_a_step_past_the_guard_that_raises_is_made_good_in_the_next():
    """A bound `step` that was taken before attaching, as a compiled one may have been."""
    model = weights(1, 3)
    optimizer = failing_optimizer(model)
    step = optimizer.step
    reg = tk.regularize(model, optimizer, tk.L2(1.0))
    zero_gradients(model)
    optimizer.broken = True
    with pytest.raises(RuntimeError):
        step()
    optimizer.broken = False
    step()
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), 0.9))
    assert reg.steps == 1 and not model.weight.grad.any()


def test_an_optimizer_is_not_kept_alive_by_its_hooks():
    model = weights(1, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, tk.L2(1.0))
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


def test_a_step_is_the_optimizers_own_again_after_remove():
    model = weights(1, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optim.lr_scheduler.ConstantLR(optimizer)
    before = optimizer.step
    first = tk.regularize(model, optimizer, tk.L2(1.0))
    second = tk.regularize(model, optimizer, tk.Huber(1.0))
    first.remove()
    second.remove()
    assert optimizer.step is before


def test_a_scheduler_that_came_later_keeps_its_step():
    model = weights(1, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, tk.L2(1.0))
    optim.lr_scheduler.ConstantLR(optimizer)
    before = optimizer.step
    tk.regularize(model, optimizer, tk.Huber(1.0)).remove()
    reg.remove()
    assert optimizer.step is before
    zero_gradients(model)
    optimizer.step()
    assert (model.weight == 1).all()


@pytest.mark.parametrize("lr", [-0.1, math.nan, math.inf, torch.tensor(-0.1)])
@pytest.mark.parametrize("term", [tk.L1(0.5), tk.L2(0.5), tk.MaxNorm(0.1)], ids=repr)
def test_a_bad_learning_rate_is_refused_before_anything_moves(lr, term):
    model = weights(1, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, term)
    zero_gradients(model)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=r"learning rate of SGD.*received lr=.*nothing has moved"):
        optimizer.step()
    assert (model.weight == 1).all() and reg.steps == 0 and not model.weight.grad.any()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert reg.steps == 1


class TestStrengths:
    @pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
    def test_tensors_are_checked(self, bad):
        model = weights(1, 3)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=r"weight|L1"):
            tk.regularize(model, optimizer, tk.L1(torch.tensor(bad)))

    def test_a_tensor_that_is_changed_in_place_is_checked_at_each_step(self):
        model = weights(1, 3)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        strength = torch.tensor(0.5)
        tk.regularize(model, optimizer, tk.L1(strength))
        zero_gradients(model)
        optimizer.step()
        strength.fill_(1.0)
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), 0.85))
        strength.fill_(-1.0)
        with pytest.raises(ValueError, match=r"strength of \*/L1.*received -1.0"):
            optimizer.step()
        torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), 0.85))

    @pytest.mark.parametrize("how", ["objective", "decoupled"])
    def test_numbers_of_numpy_are_numbers(self, how):
        model = weights(1, 3)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        table = np.array([0.5, 1.0], dtype=np.float32)
        own = tk.Term(tk.L2(), how=how, strength=np.int64(1))
        with tk.regularize(model, optimizer, tk.Term(tk.L2(lambda i: table[i]), how=how)) as reg:
            zero_gradients(model)
            optimizer.step()
            assert type(reg.live_strengths()[0].value) is float
        tk.regularize(model, optimizer, own)
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), 0.95 * 0.9))

    def test_schedules_may_give_tensors(self):
        model = weights(1, 3)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        tk.regularize(model, optimizer, tk.L1(lambda step: torch.tensor(0.5 - step)))
        zero_gradients(model)
        optimizer.step()
        with pytest.raises(ValueError, match=r"strength of \*/L1.*received -0.5"):
            optimizer.step()
        torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), 0.95))

    @pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
    def test_on_a_device_bad_ones_are_zero_and_named_at_the_next_reading(self, bad):
        class OnDevice(torch.Tensor):
            """Stands for a tensor that is not on the host."""

            @property
            def is_cpu(self):
                return False

        model = weights(1, 3)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        strength = torch.tensor(0.5).as_subclass(OnDevice)
        reg = tk.regularize(model, optimizer, {"weight": tk.Huber(strength, delta=0.1)})
        zero_gradients(model)
        strength.fill_(bad)
        optimizer.step()
        optimizer.step()
        assert (model.weight == 1).all()
        with pytest.warns(UserWarning, match="weight/Huber was negative or not finite at 2"):
            reg.strengths(), reg.value()

    def test_a_schedule_that_ends_is_asked_no_further_than_there_are_steps(self):
        table = [0.5, 1.0]
        model = weights(1, 3)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        reg = tk.regularize(model, optimizer, tk.L1(table.__getitem__))
        zero_gradients(model)
        for _ in table:
            optimizer.step()
        after = torch.full((1, 3), 0.85)
        for _ in range(2):  # however often it is tried
            with pytest.raises(IndexError):
                optimizer.step()
            torch.testing.assert_close(model.weight.detach(), after)
            assert reg.steps == 2
        table.append(0.5)
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), after - 0.05)


class Clears(optim.SGD):
    """Frees the gradients when it has used them."""

    to_none = True

    def step(self, closure=None):
        loss = super().step(closure)
        self.zero_grad(set_to_none=self.to_none)
        return loss


class Clearing(Clears):
    """The same, its gain known."""

    def step(self, closure=None):
        return super().step(closure)


tk.register_gain(Clearing, lambda optimizer, group, state: group["lr"], uniform=True)


def cleared_by_a_hook(params, lr):
    optimizer = optim.SGD(params, lr=lr)
    optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
    return optimizer


@pytest.mark.parametrize("make", [Clears, Clearing, cleared_by_a_hook])
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("penalty", [tk.Huber(0.5, delta=9.0), tk.L2(0.5), tk.L1(0.5)], ids=repr)
def test_gradients_that_a_step_clears_do_not_come_back(make, to_none, penalty):
    model = weights(1, 3)
    optimizer = make(model.parameters(), lr=0.1)
    optimizer.to_none = to_none
    tk.regularize(model, optimizer, penalty)
    expected = 1.0
    for _ in range(3):
        model.weight.sum().backward()
        optimizer.step()
        slope = 0.5 if isinstance(penalty, tk.L1) else 0.5 * expected
        expected -= 0.1 * (1 + slope)
        torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), expected))
        assert model.weight.grad is None or not model.weight.grad.any()


class Sparing(tk.L1):
    """A user's penalty whose prox fails when it is told to."""

    fails = False

    def prox(self, w, step):
        if type(self).fails:
            raise RuntimeError("no memory for the prox")
        return super().prox(w, step)


@pytest.mark.parametrize("end", ["returned", "overflow", "raised"])
def test_weights_without_gradients_rest_after_a_step_that_cleared_them(end, monkeypatch):
    """Gradients that a hook may clear are remembered for their own step, however that ends."""
    model = weights(1, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.1, fused=True)
    hook = optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
    tk.regularize(model, optimizer, Sparing(0.5))
    model.weight.sum().backward()
    if end == "overflow":
        optimizer.found_inf = torch.ones(())
    monkeypatch.setattr(Sparing, "fails", end == "raised")
    if end == "raised":
        with pytest.raises(RuntimeError, match="no memory for the prox"):
            optimizer.step()
    else:
        optimizer.step()
    hook.remove()  # with it goes what made the handle look for cleared gradients
    monkeypatch.setattr(Sparing, "fails", False)
    optimizer.found_inf = None
    optimizer.zero_grad()
    before = model.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.weight.detach(), before)


@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_that_a_step_changes_are_the_users_own_again(in_place):
    class Centred(optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                centred = p.grad - p.grad.mean()
                p.grad = p.grad.copy_(centred) if in_place else centred
            return super().step(closure)

    model = weights(1, 3)
    optimizer = Centred(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, tk.L2(0.5))
    own = model.weight.grad = torch.tensor([[1.0, 2.0, 3.0]])
    optimizer.step()
    assert model.weight.grad is own and own.tolist() == [[1.0, 2.0, 3.0]]
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[1.1, 1.0, 0.9]]))


class Told(optim.SGD):
    """`step` as some optimizers have it: the closure elsewhere, other arguments before it."""

    def step(self, name, function=None, *, closure=None):
        assert name == "first"
        return super().step(function or closure)


@pytest.mark.parametrize(
    "call",
    [
        lambda step, closure: step("first", closure),
        lambda step, closure: step("first", function=closure),
        lambda step, closure: step("first", closure=closure),
        lambda step, closure: step(name="first", closure=closure),
        lambda step, closure: (closure(), step("first")),
    ],
)
def test_the_closure_is_found_among_the_arguments(call):
    model = weights(1, 3)
    optimizer = Told(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, tk.L2(0.5))

    def closure():
        optimizer.zero_grad()
        loss = model.weight.sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        call(optimizer.step, closure)
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 3), 0.85))
    assert (model.weight.grad == 1).all()


class Own(optim.SGD):
    """Computes gradients itself, from a function that it was given before."""

    def step(self, closure=None):
        with torch.enable_grad():
            self.function()
        return super().step(closure)


@pytest.mark.parametrize("penalty", [tk.L2(0.5), tk.L1(0.5)], ids=repr)
@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_a_step_computes_itself_are_told_of_once(penalty, to_none):
    model = weights(1, 3)
    optimizer = Own(model.parameters(), lr=0.1)

    def function():
        optimizer.zero_grad(set_to_none=to_none)
        model.weight.sum().backward()

    optimizer.function = function
    tk.regularize(model, optimizer, penalty)
    function()
    with pytest.warns(UserWarning, match=r"Own computes gradients within.*closure") as said:
        optimizer.step()
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert not model.weight._post_accumulate_grad_hooks
