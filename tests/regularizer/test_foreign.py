"""Optimizers that people bring: SAM, Lookahead, schedule-free, averages; served, or told of."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn, optim
from torch.optim.swa_utils import AveragedModel

import tikhon as tk
from tikhon.regularizer.optimizers import find_weight_copies


def ones(n=4):
    model = nn.Linear(n, 1, bias=False)
    nn.init.ones_(model.weight)
    return model


def pull(model):
    """Half the squared distance of the weights from 1; with L2(1) they rest at 0.5."""
    return 0.5 * (model.weight - 1).square().sum()


class SAM(optim.Optimizer):
    """Sharpness-aware minimisation with an optimizer inside, under any attribute."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.inside = base(self.param_groups, **options)
        self.param_groups = self.inside.param_groups

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["offset"] = group["rho"] * p.grad / (p.grad.norm() + 1e-12)
                p.add_(self.state[p]["offset"])

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p]["offset"])
        self.inside.step()


class Alone(SAM):
    """The same without an optimizer inside, moving `.data` behind autograd's back."""

    def __init__(self, params, lr, rho=0.05):
        optim.Optimizer.__init__(self, params, {"rho": rho, "lr": lr})

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["offset"] = group["rho"] * p.grad / (p.grad.norm() + 1e-12)
                p.data.add_(self.state[p]["offset"])

    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(self.state[p]["offset"])
                p.data.sub_(group["lr"] * p.grad)


def train_sam(model, optimizer, steps):
    for _ in range(steps):
        pull(model).backward()
        optimizer.first_step()
        optimizer.zero_grad()
        pull(model).backward()
        optimizer.second_step()
        optimizer.zero_grad()


def test_sam_is_served_at_the_optimizer_inside():
    model = ones()
    optimizer = SAM(model.parameters(), optim.SGD, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg = tk.regularize(model, optimizer, tk.L2(1.0))
        for _ in range(200):
            train_sam(model, optimizer, 1)
            reg.value(), reg.sparsity(), reg.audit()
    assert reg.optimizer is optimizer.inside and reg.steps == 200
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 4), 0.5), atol=0.03, rtol=0)


@pytest.mark.parametrize("reading", ["value", "sparsity", "audit", "trace"])
@pytest.mark.parametrize("cleared", [True, False])
def test_a_step_that_is_never_called_is_told_of(reading, cleared):
    model = ones()
    nn.init.constant_(model.weight, 2.0)
    optimizer = Alone(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, tk.L2(1.0))
    getattr(reg, reading)()
    train_sam(model, optimizer, 3)
    if not cleared:
        pull(model).backward()
    with pytest.warns(UserWarning, match=r"inactive since step 0.*`step` of its Alone") as said:
        getattr(reg, reading)()
    assert said[0].filename == __file__


def test_initialising_after_attaching_is_no_training():
    model = ones()
    reg = tk.regularize(model, optim.SGD(model.parameters(), lr=0.1), tk.L2(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn.init.normal_(model.weight)
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        reg.value()


class ScheduleFree(optim.Optimizer):
    """The parameter lies between the iterate `z` and an average (Defazio et al. 2024)."""

    def __init__(self, params, lr, beta=0.9):
        super().__init__(params, {"lr": lr, "k": 0, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            beta = group["beta"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                x = (p - (1 - beta) * z) / beta
                z.sub_(group["lr"] * p.grad)
                x.lerp_(z, 1 / group["k"])
                p.copy_(beta * x + (1 - beta) * z)


class Recomputing(ScheduleFree):
    """Takes its gradients within the step, from a closure that it must have."""

    def step(self, closure):
        with torch.enable_grad():
            closure()
        super().step()


class Trained(ScheduleFree):
    """With the modes of the reference implementation."""

    training = False

    def train(self):
        self.training = True

    def step(self, closure=None):
        if not self.training:
            raise RuntimeError("call train() first")
        return super().step(closure)


class BothKept(ScheduleFree):
    """With the average in its state, too (the package's reference classes)."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            beta = group["beta"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                x = self.state[p].setdefault("x", p.detach().clone())
                z.sub_(group["lr"] * p.grad)
                x.lerp_(z, 1 / group["k"])
                p.copy_(beta * x + (1 - beta) * z)


class SlowWeights(optim.SGD):
    """Lookahead in one class (Ranger): slow weights every sixth step."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("slow", p.detach().clone())
                state["count"] = state.get("count", 0) + 1
                if state["count"] % 6 == 0:
                    state["slow"].lerp_(p, 0.5)
                    p.copy_(state["slow"])


class Anchored(optim.SGD):
    """Keeps the first weights, as Prodigy does, and a sum of gradients of their shape."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("p0", p.detach().clone())
                self.state[p].setdefault("sum", torch.zeros_like(p)).add_(p.grad)
        return super().step(closure)


class NeedsClosure(optim.SGD):
    """Cannot be tried out without the user's loss."""

    def step(self, closure=None):
        return super().step(closure) + closure()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (ScheduleFree, (("z",), True)),
        (Trained, (("z",), True)),
        (Recomputing, (("z",), True)),
        (BothKept, (("z", "x"), True)),
        (SlowWeights, (("slow",), False)),
        (Anchored, None),
        (NeedsClosure, None),
        (optim.ASGD, None),
        (optim.Adam, None),
    ],
)
@pytest.mark.parametrize("shape", [(3,), (4, 2), (5, 3, 2, 2)])
def test_copies_of_the_weights_are_found_without_a_trace(kind, expected, shape):
    param = nn.Parameter(torch.ones(shape))
    optimizer = kind([param], lr=0.0)
    torch.manual_seed(0)
    random = torch.get_rng_state()
    before = copy.deepcopy(optimizer.state_dict())
    found = find_weight_copies(optimizer)
    assert (None if found is None else (found.keys, found.every_step)) == expected
    assert optimizer.state_dict() == before and (param == 1).all() and param.grad is None
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("kind", [ScheduleFree, Recomputing, Trained, BothKept])
@pytest.mark.parametrize(
    "term",
    [
        tk.Term(tk.L2(0.5), how="decoupled"),
        tk.Term(tk.L1(0.5), how="decoupled"),
        tk.MaxNorm(0.5),
        tk.Box(-0.5, 0.5),
    ],
    ids=repr,
)
def test_moves_of_a_parameter_that_is_not_the_iterate_are_refused(kind, term):
    model = ones()
    with pytest.raises(TypeError, match=rf"{kind.__name__} keeps other weights.*'z'.*objective"):
        tk.regularize(model, kind(model.parameters(), lr=0.1), term)


def test_a_penalty_in_the_gradient_is_right_under_schedule_free():
    model = ones()
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, tk.L2(0.5))
    for _ in range(3000):
        optimizer.zero_grad()
        pull(model).backward()
        optimizer.step()
    z = optimizer.state[model.weight]["z"]
    average = (model.weight.detach() - 0.1 * z) / 0.9
    torch.testing.assert_close(average, torch.full((1, 4), 2 / 3), atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", [ScheduleFree, BothKept, SlowWeights])
@pytest.mark.parametrize("penalty", [tk.L1(0.3), tk.GroupLasso(0.45)], ids=repr)
def test_zeros_last_in_the_copies_too_and_the_minimum_is_exact(kind, penalty):
    torch.manual_seed(0)
    model = nn.Linear(2, 3, bias=False).double()
    goal = torch.tensor([[1.0, -0.1], [-0.2, 0.1], [-0.9, 0.8]], dtype=torch.float64)
    optimizer = kind(model.parameters(), lr=0.3)
    tk.regularize(model, optimizer, penalty)
    for _ in range(600):
        model.weight.grad = model.weight.detach() - goal
        optimizer.step()
    used, state = model.weight.detach(), optimizer.state[model.weight]
    if kind is not SlowWeights:
        used = (used - 0.1 * state["z"]) / 0.9
    exact = penalty.prox(goal, 1.0)
    torch.testing.assert_close(used, exact, atol=1e-6, rtol=0)
    assert torch.equal(used == 0, exact == 0)


class DualAveraging(optim.SGD):
    """The weights are computed from the first ones and the sum of gradients (FTRL, MADGRAD)."""

    kept = 0.0  # of the weights, a step

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                first = state.setdefault("first", p.detach().clone())
                total = state.setdefault("sum", torch.zeros_like(p)).add_(p.grad)
                p.mul_(self.kept).add_(first - group["lr"] * total, alpha=1 - self.kept)


class Prepared(DualAveraging):
    """The same, with a state that it is made with."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].update(first=p.detach().clone(), sum=torch.zeros_like(p))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["first"], self.state[p]["sum"]
        return super().step(closure)


class HalfAveraging(DualAveraging):
    kept = 0.9


class Noisy(optim.SGD):
    """Langevin dynamics: noise in every step."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn_like(p))


class Inside(SlowWeights):
    """Slow weights that are in no state."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        self.held = [self.state[p].pop("slow") for g in self.param_groups for p in g["params"]]


@pytest.mark.parametrize("kind", [DualAveraging, Prepared, HalfAveraging])
def test_decay_that_the_next_step_would_undo_is_refused(kind):
    model = ones()
    for term in (
        tk.Term(tk.L2(0.5), how="decoupled"),
        tk.Term(tk.L1(0.5), how="decoupled"),
        tk.Term(tk.L2(0.5), how="cautious"),
    ):
        with pytest.raises(TypeError, match=rf"{kind.__name__} computes these anew.*objective"):
            tk.regularize(model, kind(model.parameters(), lr=0.1), term)
    tk.regularize(model, kind(model.parameters(), lr=0.1), {"*": [tk.L2(0.5), tk.Box(-2, 2)]})


@pytest.mark.parametrize("kind", [Anchored, Noisy, NeedsClosure, Inside, optim.Adam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decay_that_lasts_is_served(kind, dtype):
    model = ones().to(dtype)
    optimizer = kind(model.parameters(), lr=1e-3)
    random = torch.get_rng_state()
    tk.regularize(model, optimizer, tk.Term(tk.L2(0.5), how="decoupled"))
    assert torch.equal(torch.get_rng_state(), random) and (model.weight == 1).all()


def test_bounds_that_do_not_last_are_told_of():
    model = ones()
    with pytest.warns(UserWarning, match="MaxNorm: SlowWeights keeps other weights"):
        tk.regularize(model, SlowWeights(model.parameters(), lr=0.1), tk.MaxNorm(0.5))


class Lookahead(optim.Optimizer):
    """Slow weights around any optimizer (Zhang et al. 2019)."""

    def __init__(self, fast, period=5):
        self.fast, self.period, self.count = fast, period, 0
        self.param_groups = fast.param_groups
        self.slow = [[p.detach().clone() for p in g["params"]] for g in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        self.fast.step(closure)
        self.count += 1
        if self.count % self.period == 0:
            for group, slow in zip(self.param_groups, self.slow):
                for p, held in zip(group["params"], slow):
                    held.lerp_(p, 0.5)
                    p.copy_(held)

    def zero_grad(self, set_to_none=True):
        self.fast.zero_grad(set_to_none)


class LateLookahead(Lookahead):
    """The same, its copies made in the first step."""

    def __init__(self, fast, period=5):
        super().__init__(fast, period)
        self.slow = []

    def step(self, closure=None):
        if not self.slow:
            self.slow = [[p.detach().clone() for p in g["params"]] for g in self.param_groups]
        super().step(closure)


class GoesOn(SAM):
    """A wrapper that moves the weights once more when the optimizer inside has (WSAM)."""

    @torch.no_grad()
    def step(self):
        self.inside.step()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(0.01)


class PutsBack(SAM):
    """Trains weights of its own, which are in the model during the inner step alone.

    Gradients are taken halfway between them and their average, as schedule-free wrappers do.
    """

    @torch.no_grad()
    def step(self):
        params = [p for group in self.param_groups for p in group["params"]]
        if not hasattr(self, "own"):
            self.own, self.mean = ([p.clone() for p in params] for _ in range(2))
        for p, own in zip(params, self.own):
            p.copy_(own)
        self.inside.step()
        for p, own, mean in zip(params, self.own, self.mean):
            own.copy_(p)
            mean.lerp_(own, 0.1)
            p.copy_((own + mean) / 2)


AROUND = {
    "Lookahead": lambda params: Lookahead(optim.SGD(params, lr=0.1)),
    "Lookahead, six steps": lambda params: Lookahead(optim.SGD(params, lr=0.1), period=6),
    "copies made late": lambda params: LateLookahead(optim.SGD(params, lr=0.1)),
    "goes on": lambda params: GoesOn(params, optim.SGD, lr=0.1),
    "puts back": lambda params: PutsBack(params, optim.SGD, lr=0.1),
}


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        pull(model).backward()
        optimizer.step()


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("penalty", [tk.L1(0.5), tk.L1(9.0), tk.Box(-0.5, 0.5)], ids=repr)
def test_a_wrapper_that_moves_weights_between_steps_is_told_of_once(around, penalty):
    model = ones()
    optimizer = AROUND[around](model.parameters())
    tk.regularize(model, optimizer, penalty)
    with pytest.warns(UserWarning, match=r"acts in the steps of SGD.*around it moves the") as said:
        train(model, optimizer, 14)
    assert len(said) == 1


def test_a_wrapper_is_watched_also_where_its_first_step_raises():
    model = ones()
    optimizer = Lookahead(optim.SGD(model.parameters(), lr=0.1))
    tk.regularize(model, optimizer, tk.L1(0.5))

    def closure():
        raise RuntimeError("the loss failed")

    with pytest.raises(RuntimeError, match="the loss failed"):
        optimizer.step(closure)
    with pytest.warns(UserWarning, match="around it moves the"):
        train(model, optimizer, 14)


@pytest.mark.parametrize("around", AROUND)
def test_what_needs_no_zeros_is_served_around_wrappers_too(around):
    model = ones()
    optimizer = AROUND[around](model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tk.regularize(model, optimizer, tk.L2(1.0))
        train(model, optimizer, 300)
    rest = 0.45 if around == "goes on" else 0.5  # 0.01 further a step, at a rate of 0.2
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 4), rest))


class Plain:
    """Holds an optimizer and steps it, as Accelerate's wrapper does."""

    def __init__(self, inside):
        self.inside, self.param_groups = inside, inside.param_groups

    def step(self):
        self.inside.step()

    def zero_grad(self):
        self.inside.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("penalty", [tk.L1(0.5), tk.Box(-0.5, 0.5)], ids=repr)
def test_steps_that_are_taken_back_are_no_move_between(dtype, penalty):
    model = ones(40).to(dtype)
    nn.init.normal_(model.weight)
    optimizer = SAM(model.parameters(), optim.SGD, lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tk.regularize(model, optimizer, penalty)
        train_sam(model, optimizer, 20)
        plain = Plain(optim.SGD(model.parameters(), lr=0.01))
        tk.regularize(model, plain, penalty)
        train(model, plain, 3)
        model.load_state_dict(ones(40).state_dict())  # once is no habit
        train(model, plain, 12)


def test_a_wrapper_whose_step_has_another_name_is_followed():
    class Scheduled:
        def __init__(self, inside):
            self.inside = inside

        def step_and_update_lr(self):
            self.inside.step()

    model = ones()
    optimizer = Scheduled(optim.SGD(model.parameters(), lr=0.1))
    tk.regularize(model, optimizer, tk.L1(0.5))
    model(torch.zeros(1, 4)).sum().backward()
    optimizer.step_and_update_lr()
    torch.testing.assert_close(model.weight.detach(), torch.full((1, 4), 0.95))


def test_several_optimizers_inside_one_are_asked_for_as_a_list():
    class Both(optim.Optimizer):
        def __init__(self, *inside):
            self.first, self.second = inside

    model = nn.Sequential(ones(), ones(1))
    inside = [optim.SGD(layer.parameters(), lr=0.1) for layer in model]
    with pytest.raises(TypeError, match=r"Both steps several optimizers \(SGD, SGD\).*a list"):
        tk.regularize(model, Both(*inside), tk.L2(1.0))


def test_an_optimizer_that_steps_more_than_one_inside_it_is_itself():
    class Mixed(optim.SGD):
        """Its own rule for matrices, and an optimizer inside for the rest."""

        def __init__(self, matrices, rest):
            super().__init__([*matrices, *rest], lr=0.1)
            self.rest = optim.SGD(rest, lr=0.1)

    model = nn.Linear(2, 2)
    optimizer = Mixed([model.weight], [model.bias])
    assert tk.regularize(model, optimizer, tk.L2(1.0)).optimizer is optimizer


@pytest.mark.parametrize("rows", ["out", "in"])
def test_an_average_gets_the_zeros_and_bounds_of_the_trained_weights(rows):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5, bias=False))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    bound = tk.Term(tk.MaxNorm(0.3), rows=rows)
    terms = {"0.weight": tk.GroupLasso(0.5), "1.weight": [tk.L1(0.1), bound]}
    reg = tk.regularize(model, optimizer, terms)
    average = AveragedModel(model)
    for _ in range(40):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    assert reg.sparsity()["0.weight"] > 0.5
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    reg.apply(average)
    for name, held in average.module.named_parameters():
        trained = before[name]
        assert torch.equal(trained, model.get_parameter(name))
        if name != "0.bias":
            assert not held[trained == 0].any() and held[trained != 0].all()
    (target,) = tk.select(average.module, "1.weight", rows=rows)
    assert target.read().norm(dim=1).max() <= 0.3 + 1e-6
    with pytest.raises(ValueError, match=r"no parameter '0.weight'; is it of this model"):
        reg.apply(nn.Linear(2, 2))


def test_an_average_of_weights_is_no_model_that_is_trained():
    model = ones()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"AveragedModel holds averages.*the model that it was"):
        tk.regularize(AveragedModel(model), optimizer, tk.L1(0.1))


class OwnRate(torch.optim.Optimizer):
    """Finds its learning rate itself, as Adafactor with relative steps: lr is None."""

    def __init__(self, params):
        super().__init__(params, {"lr": None})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(0.3 / self.steps**0.5 * p.grad)


@pytest.mark.parametrize("term", [tk.L1(0.1), tk.L2(0.1), tk.L2Ball(0.5)], ids=repr)
def test_an_optimizer_that_finds_its_own_rate_is_served(term):
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    optimizer = OwnRate(model.parameters())
    tk.regularize(model, optimizer, term)
    goal = torch.tensor([[1.0, 0.05, -1.0]])
    for _ in range(500):
        optimizer.zero_grad()
        (model.weight - goal).square().sum().div(2).backward()
        optimizer.step()
    right = {tk.L1: torch.tensor([[0.9, 0.0, -0.9]]), tk.L2: goal / 1.1,
             tk.L2Ball: goal / goal.norm() / 2}[type(term)]  # fmt: skip
    torch.testing.assert_close(model.weight.detach(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["decoupled", "cautious"])
def test_decay_by_a_rate_that_is_not_known_is_refused_before_the_first_step(how):
    model = nn.Linear(3, 1)
    with pytest.raises(TypeError, match=r"OwnRate finds its own \(lr is None\): use how"):
        tk.regularize(model, OwnRate(model.parameters()), tk.L2(0.1), how=how)


class OfSecondOrder(optim.SGD):
    """Divides by the curvature, which it finds by differentiating `.grad` (AdaHessian)."""

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.enable_grad():
            curvature = torch.autograd.grad([p.grad.sum() for p in params], params)
        with torch.no_grad():
            for p, h in zip(params, curvature):
                p.sub_(self.param_groups[0]["lr"] * p.grad.detach() / (h.abs() + 1))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("penalty", [tk.L2(0.3), tk.Huber(0.3), tk.L1(0.3), tk.GroupLasso(0.4)])
def test_gradients_that_are_differentiated_again_keep_their_graph(penalty):
    torch.manual_seed(0)
    model = nn.Linear(2, 3, bias=False).double()
    goal = torch.tensor([[1.0, -0.1], [-0.2, 0.1], [-0.9, 0.8]], dtype=torch.float64)
    optimizer = OfSecondOrder(model.parameters(), lr=0.5)
    tk.regularize(model, optimizer, penalty)
    for _ in range(120):
        optimizer.zero_grad()
        (model.weight - goal).square().sum().div(2).backward(create_graph=True)
        own = model.weight.grad
        optimizer.step()
        assert model.weight.grad is own and own.requires_grad
    exact = penalty.prox(goal, 1.0)
    torch.testing.assert_close(model.weight.detach(), exact, atol=1e-6, rtol=0)


class Averaging(optim.SGD):
    """Puts an average of its steps in the place of the weights for evaluation (SPlus)."""

    hidden = False

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)
                state = self._kept(p)
                state["mean"] = state.get("mean", torch.zeros_like(p)).lerp(p, 0.1)
                state["share"] = 1 - (1 - state.get("share", 0.0)) * 0.9

    def _kept(self, p):
        return (
            self.__dict__.setdefault("aside", {}).setdefault(p, {})
            if self.hidden
            else self.state[p]
        )

    @torch.no_grad()
    def eval(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self._kept(p)
                state["trained"] = p.clone()
                p.copy_(state["mean"] / state["share"])

    @torch.no_grad()
    def train(self):
        for group in self.param_groups:
            for p in group["params"]:
                if "trained" in self._kept(p):
                    p.copy_(self._kept(p).pop("trained"))


class Hidden(Averaging):
    hidden = True


@pytest.mark.parametrize("kind", [Averaging, Hidden])
@pytest.mark.parametrize("penalty", [tk.L1(0.3), tk.GroupLasso(0.45)], ids=repr)
def test_zeros_are_also_in_an_average_for_evaluation(kind, penalty):
    model = nn.Linear(2, 3, bias=False).double()
    goal = torch.tensor([[1.0, -0.1], [-0.2, 0.1], [-0.9, 0.8]], dtype=torch.float64)
    optimizer = kind(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, penalty)
    for step in range(240):
        model.weight.grad = model.weight.detach() - goal
        optimizer.step()
        if step % 50 == 20:
            trained = reg.sparsity()
            optimizer.eval()
            assert reg.sparsity() == trained
            optimizer.train()
    optimizer.eval()
    exact = penalty.prox(goal, 1.0)
    torch.testing.assert_close(model.weight.detach(), exact, atol=1e-6, rtol=0)
    assert torch.equal(model.weight == 0, exact == 0)


@pytest.mark.parametrize("kind", [Averaging, Hidden])
@pytest.mark.parametrize("bound", [tk.Box(-0.5, 0.5), tk.MaxNorm(0.6)], ids=repr)
def test_an_average_for_evaluation_is_within_the_bounds(kind, bound):
    torch.manual_seed(0)
    model = nn.Linear(3, 4, bias=False)
    optimizer = kind(model.parameters(), lr=0.5)
    reg = tk.regularize(model, optimizer, bound)
    for _ in range(30):
        model.weight.grad = model.weight.detach() - 2 + torch.randn(4, 3)
        optimizer.step()
    trained = model.weight.detach().clone()
    optimizer.eval()
    inside = bound.prox(model.weight.detach(), 1.0)
    torch.testing.assert_close(model.weight.detach(), inside)
    optimizer.train()
    assert torch.equal(model.weight, trained)
    reg.remove()
    assert optimizer.eval == kind.eval.__get__(optimizer)


class Scaled(optim.Optimizer):
    """Scales the moves of the optimizer inside by what they and the gradients share (TRAC)."""

    def __init__(self, inside):
        self.inside, self.total, self.bound = inside, 1e-3, nn.ReLU()
        self.param_groups = inside.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        before, gradients = [p.clone() for p in params], [p.grad.clone() for p in params]
        self.inside.step()
        shared = [((p - q) * g).sum() for p, q, g in zip(params, before, gradients)]
        self.total *= float(1 + 0.1 * torch.tanh(-sum(shared)))
        for p, q in zip(params, before):
            p.copy_(q + self.bound(torch.tensor(self.total)) * (p - q))


@pytest.mark.parametrize("penalty", [tk.L2(0.1), tk.L1(0.1)], ids=repr)
def test_a_wrapper_that_reads_gradients_before_the_penalty_is_refused(penalty):
    model = ones()
    optimizer = Scaled(optim.Adam(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"acts? in the steps of Adam, and Scaled .* reads"):
        tk.regularize(model, optimizer, penalty)
    assert optimizer.total == 1e-3 and (model.weight == 1).all()
    tk.regularize(model, optimizer, tk.L2(0.1), how="decoupled")


class FindsItsRate(optim.SGD):
    """Steps by the size of the sum of gradients so far (D-Adaptation)."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["sum"] = state.get("sum", torch.zeros_like(p)) + p.grad
                state["d"] = max(
                    state.get("d", 1e-6), 1e-6 * 1.5 ** float(state["sum"].abs().mean())
                )
                p.sub_(group["lr"] * state["d"] * p.grad)


@pytest.mark.parametrize("term", [tk.Box(-1, 1), tk.MaxNorm(1.0), tk.L1(0.1)], ids=repr)
def test_a_step_size_that_grows_while_weights_are_held_is_told_of(term):
    model = ones()
    with pytest.warns(UserWarning, match="FindsItsRate takes longer and longer steps"):
        tk.regularize(model, FindsItsRate(model.parameters(), lr=1.0), term)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tk.regularize(model, FindsItsRate(model.parameters(), lr=1.0), tk.L2(0.1))
        for kind in (Anchored, SlowWeights, ScheduleFree):
            served = tk.L1(0.1) if kind is ScheduleFree or term.constraint else term
            tk.regularize(model, kind(model.parameters(), lr=0.1, **{}), served)


def test_a_copy_of_a_handle_keeps_what_was_found_of_its_optimizer():
    model = nn.Linear(2, 3, bias=False)
    optimizer = Averaging(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, tk.L1(0.3))
    for _ in range(40):
        model.weight.grad = model.weight.detach().clone()
        optimizer.step()
    twin, of_twin, copied = copy.deepcopy((model, optimizer, reg))
    trained = copied.sparsity()
    of_twin.eval()
    assert copied.sparsity() == trained == {"weight": 1.0}
    assert not twin.weight.any() and reg.sparsity() == trained


class ByFactors(optim.Optimizer):
    """Multiplies weights, as Madam and exponentiated gradients do."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(torch.exp(-group["lr"] * p.sign() * p.grad.sign()))


def test_weights_that_are_multiplied_are_told_of():
    """The lasso of (1, 0.01) at 0.1 is (0.9, 0); the second one only comes closer to it."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[-1.0, 1.0]])
    optimizer = ByFactors(model.parameters(), 0.01)
    with pytest.warns(UserWarning, match="ByFactors multiplies weights: .*weight/L1 does not"):
        tk.regularize(model, optimizer, tk.L1(0.1))
    for _ in range(2000):
        model.weight.grad = model.weight.detach() - torch.tensor([[1.0, 0.01]])
        optimizer.step()
    assert model.weight[0, 0] <= 0  # the minimum is 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tk.regularize(model, optimizer, tk.L2(0.1))


class OnSphere(optim.Optimizer):
    """Gives every weight its first length back, as optimizers on spheres do."""

    def __init__(self, params, lr, spectral=False):
        super().__init__(params, {"lr": lr, "spectral": spectral})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            order = 2 if group["spectral"] else "fro"
            for p in group["params"]:
                size = self.state[p].setdefault("size", torch.linalg.matrix_norm(p, order))
                p.sub_(p.grad, alpha=group["lr"])
                p.mul_(size / torch.linalg.matrix_norm(p, order))


@pytest.mark.parametrize("spectral", [False, True])
def test_weights_that_keep_their_length_are_told_of(spectral):
    model = nn.Linear(6, 4, bias=False)
    optimizer = OnSphere(model.parameters(), 0.1, spectral)
    for how in ("objective", "decoupled", "cautious"):
        with pytest.raises(TypeError, match="OnSphere gives weights back their length"):
            tk.regularize(model, optimizer, tk.L2(1e-3), how=how)
    with pytest.warns(UserWarning, match="zeros come without the shrinkage"):
        tk.regularize(model, optimizer, tk.L1(1e-3))
