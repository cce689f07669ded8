"""The handle of `sparsify`: what it refuses, what it says, whose steps it counts."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tikhon as tk
from regularizer.test_foreign import BothKept, ScheduleFree, SlowWeights


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)
    )


def steps(model, optimizers, count, seen=None):
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(count):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (model(x) - x[:, :1] * x[:, 1:2]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        if seen is not None:
            seen()


def zeros(model):
    weights = [p for p in model.parameters() if p.ndim > 1]
    return sum(int((p == 0).sum()) for p in weights)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_an_average_that_was_kept_all_along_has_the_zeros(kind):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    handle = tk.sparsify(model, optimizer, 0.7, steps=60)
    average = AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if kind == "ema" else None
    )
    steps(model, [optimizer], 60, lambda: average.update_parameters(model))
    assert zeros(average) < zeros(model)
    handle.apply(average)
    for own, other in zip(model.parameters(), average.module.parameters()):
        assert own.ndim < 2 or torch.equal(own == 0, other == 0)


def test_two_handles_share_a_model_but_no_weights():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    first = tk.sparsify(model, optimizer, 0.5, steps=30, pattern="0.weight")
    with pytest.raises(RuntimeError, match="have a sparsify handle already"):
        tk.sparsify(model, optimizer, 0.5, steps=30)
    other = tk.sparsify(model, optimizer, 0.9, steps=30, pattern="2.weight")
    steps(model, [optimizer], 30)
    assert first.audit().share == 0.5 and other.audit().share == pytest.approx(0.9, abs=0.01)
    first.remove()
    tk.sparsify(model, optimizer, 0.8, steps=30, pattern="0.weight")


def test_handles_take_the_rows_and_the_columns_of_one_matrix():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 4)), torch.randn(2, 8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    options = {"steps": 40, "example": x}
    inputs = tk.sparsify(model, optimizer, 0.5, of="features", **options)
    hidden = tk.sparsify(model, optimizer, 0.75, of="channels", **options)
    with pytest.raises(RuntimeError, match="already"):
        tk.sparsify(model, optimizer, 0.5, of="channels", **options)
    for _ in range(40):
        optimizer.zero_grad()
        x = torch.randn(32, 8)
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()
    assert inputs.audit().share == 0.5 and hidden.audit().share == 0.75
    assert int((model[0].weight != 0).any(0).sum()) == 4
    small = tk.compact(model, x)
    assert [m.in_features for m in small.modules() if isinstance(m, nn.Linear)] == [4, 5]


def test_a_handle_and_a_penalty_share_the_optimizer():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    tk.regularize(model, optimizer, {"*": tk.Term(tk.L2(1e-2), how="decoupled")})
    handle = tk.sparsify(model, optimizer, 0.7, steps=40)
    steps(model, [optimizer], 40)
    assert handle.audit().share == pytest.approx(0.7, abs=0.01)


def test_several_optimizers_are_one_training():
    model = network()
    optimizers = [
        torch.optim.SGD(model[0].parameters(), 1e-2, momentum=0.9),
        torch.optim.Adam([*model[2].parameters(), *model[4].parameters()], 1e-2),
    ]
    handle = tk.sparsify(model, optimizers, 0.6, steps=40)
    steps(model, optimizers, 40)
    assert handle.step == 40 and handle.audit().share == pytest.approx(0.6, abs=0.01)
    assert zeros(model) == sum(layer.zeros for layer in handle.audit().layers)


@pytest.mark.parametrize("chosen", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop])
def test_weights_without_a_gradient_or_state_are_counted_by_their_size(chosen):
    model = network()
    model.spare = nn.Linear(4, 4)  # no loss reaches it: its state stays empty
    optimizer = chosen(model.parameters(), 1e-2)
    handle = tk.sparsify(model, optimizer, 0.5, steps=20)
    x = torch.randn(32, 6)
    for _ in range(20):
        optimizer.zero_grad()
        model[4](model[3](model[2](model[1](model[0](x))))).square().mean().backward()
        optimizer.step()
    assert handle.audit().share == pytest.approx(0.5, abs=0.01)


def test_an_optimizer_of_other_weights_is_refused():
    model, other = network(), network()
    optimizer = torch.optim.Adam(other.parameters())
    with pytest.raises(ValueError, match="optimizer does not hold them; give the one"):
        tk.sparsify(model, optimizer, 0.5, steps=9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(share=0.6), r"share=0\.5, this one has 0\.6"),
        (dict(of="channels"), r"of='weights', this one has 'channels'"),
        (dict(steps=50), "steps=40, this one has 50"),
        (dict(repair=0.3), r"repair=0\.5, this one has 0\.3"),
        (dict(pattern="0.weight"), r"pattern='\*', this one has '0\.weight'"),
    ],
)
def test_a_state_of_another_target_is_refused(change, message):
    def handle(**options):
        model = network()
        given = {"share": 0.5, "steps": 40, "example": torch.ones(2, 6)} | options
        optimizer = torch.optim.Adam(model.parameters())
        return tk.sparsify(model, optimizer, given.pop("share"), **given)

    state = handle().state_dict()
    with pytest.raises(ValueError, match=message):
        handle(**change).load_state_dict(state)


def test_a_schedule_longer_than_the_training_says_what_was_reached():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with pytest.warns(UserWarning, match=r"removed at step 30, .* ended at 50: .* 80\.0% asked"):
        with tk.sparsify(model, optimizer, 0.8, steps=100) as handle:
            steps(model, [optimizer], 30)
    assert handle.audit().phase == "thinning"
    assert "step 30 of 100" in str(handle.audit())


def test_a_run_that_goes_on_after_the_schedule_keeps_its_zeros():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    handle = tk.sparsify(model, optimizer, 0.8, steps=20)
    steps(model, [optimizer], 60)
    assert handle.audit().share == pytest.approx(0.8, abs=0.01) and handle.phase == "repair"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = network().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    handle = tk.sparsify(model, optimizer, 0.75, steps=20)
    x = torch.randn(16, 6, dtype=dtype)
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert handle.audit().share == pytest.approx(0.75, abs=0.01)


def test_a_step_that_raises_is_none():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    handle = tk.sparsify(model, optimizer, 0.5, steps=20)

    def broken():
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(broken)
    assert handle.step == 0


def left_out(change, message):
    model = network()
    change(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with pytest.warns(UserWarning, match=message):
        handle = tk.sparsify(model, optimizer, 0.5, steps=20)
    steps(model, [optimizer], 20)
    assert [layer.layer for layer in handle.audit().layers] == ["2.weight", "4.weight"]
    assert handle.audit().share == pytest.approx(0.5, abs=0.01)
    return model


def test_frozen_weights_stay_whole():
    model = left_out(lambda model: model[0].requires_grad_(False), r"0\.weight.* frozen")
    assert (model[0].weight != 0).all()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        tk.sparsify(model, torch.optim.Adam(model.parameters()), 0.5, steps=9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: prune.l1_unstructured(m[0], "weight", 0.5), r"0\.weight_orig.* pruned by"),
        (lambda m: parametrizations.weight_norm(m[0]), r"original0.* is part of the parametrised"),
        (lambda m: parametrizations.spectral_norm(m[0]), r"original.* is part of the param"),
    ],
    ids=["pruned", "weight_norm", "spectral_norm"],
)
def test_weights_that_are_computed_are_named(change, message):
    left_out(change, message)


def test_a_named_layer_that_cannot_lose_channels_is_named():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    options = {"of": "channels", "steps": 9, "example": torch.ones(2, 6)}
    with pytest.warns(UserWarning, match=r"leaves out 4\.weight, which the pattern names"):
        tk.sparsify(model, optimizer, 0.5, pattern=("0.weight", "4.weight"), **options)


def test_what_whole_units_cannot_give_is_said():
    def handle(share, **options):
        model = network()
        given = {"of": "channels", "steps": 9, "example": torch.ones(2, 6)} | options
        return tk.sparsify(model, torch.optim.Adam(model.parameters()), share, **given)

    with pytest.warns(UserWarning, match=r"99\.0% of the channels cannot go, about 93\.8% can"):
        handle(0.99)
    with pytest.raises(ValueError, match=r"nothing would go: 2\.0% .* 16, 16 channels"):
        handle(0.02)
    with pytest.raises(ValueError, match=r"nothing would go: .* keeps 16 at least"):
        handle(0.7, multiple=16)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("phases", [{}, {"warmup": 0.5, "repair": 0.4}, {"repair": 0.0}])
def test_the_shortest_runs_get_what_is_asked(count, phases):
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    handle = tk.sparsify(model, optimizer, 0.5, steps=count, **phases)
    steps(model, [optimizer], count)
    assert handle.audit().share == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("count", [0, -1, 2.5, float("nan"), float("inf"), True, "90", None])
def test_steps_are_a_whole_number(count):
    model = network()
    with pytest.raises((TypeError, ValueError), match="steps must be"):
        tk.sparsify(model, torch.optim.Adam(model.parameters()), 0.5, steps=count)


def test_zeros_that_something_else_has_set_are_counted():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    handle = tk.sparsify(model, optimizer, 0.5, steps=20)
    steps(model, [optimizer], 20)
    assert handle.audit().returned == 0
    model.load_state_dict(before)
    gone = sum(int((~keep).sum()) for keep in handle.state_dict()["gone"].values())
    assert handle.audit().returned == gone and "that had gone are not zero" in str(handle.audit())
    with pytest.warns(UserWarning, match=f"{gone} of the weights that had gone are not zero"):
        handle.remove()


@pytest.mark.parametrize("example", [torch.ones(2, 7), [torch.ones(2, 6)], {"x": 1}])
def test_an_example_that_the_model_cannot_take_is_refused(example):
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="does not run on example"):
        tk.sparsify(model, optimizer, 0.5, of="channels", steps=9, example=example)


@pytest.mark.parametrize("state", [{}, {"schema_version": 1}, [], "a path"])
def test_what_is_no_state_is_refused(state):
    model = network()
    handle = tk.sparsify(model, torch.optim.Adam(model.parameters()), 0.5, steps=9)
    with pytest.raises(ValueError, match=r"what Sparsifier\.state_dict\(\) gave"):
        handle.load_state_dict(state)


def test_complex_weights_count_by_their_modulus():
    layer = nn.Linear(6, 8, bias=False, dtype=torch.cfloat)
    with torch.no_grad():
        layer.weight[:, :3] = 1j
        layer.weight[:, 3:] = 0.1
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    tk.sparsify(layer, optimizer, 0.5, steps=1)
    layer(torch.ones(2, 6, dtype=torch.cfloat)).abs().sum().backward()
    optimizer.step()
    assert (layer.weight[:, :3] == 1j).all() and (layer.weight[:, 3:] == 0).all()


@pytest.mark.parametrize("kind", [ScheduleFree, BothKept, SlowWeights])
def test_weights_that_an_optimizer_keeps_beside_have_the_zeros(kind):
    model = network()
    optimizer = kind(model.parameters(), lr=0.05)
    handle = tk.sparsify(model, optimizer, 0.5, steps=60)
    steps(model, [optimizer], 60)
    assert handle.audit().share == pytest.approx(0.5, abs=0.01)
    for param in (p for p in model.parameters() if p.ndim > 1):
        kept = [v for v in optimizer.state[param].values() if isinstance(v, torch.Tensor)]
        copies = [v for v in kept if v.shape == param.shape and not (v - param).norm() > 1]
        assert copies and all((copy[param == 0] == 0).all() for copy in copies)


class Lazy(nn.Sequential):
    def __init__(self):
        super().__init__(nn.LazyLinear(8), nn.Linear(8, 2))


def on_meta():
    with torch.device("meta"):
        return network()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Lazy, r"'0\.weight' has no shape yet \(a lazy layer\); run the model"),
        (on_meta, r"'0\.weight' is on the meta device and has no values; load the weights"),
        (nn.ReLU, r"ReLU has no parameters \(a quantised model"),
    ],
)
def test_models_without_weights_to_compare_are_refused(build, message):
    model = build()
    params = list(model.parameters()) or [nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match=message):
        tk.sparsify(model, torch.optim.SGD(params, lr=0.1), 0.5, steps=10)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_weights_has_none_to_lose():
    model = network()
    model.add_module("empty", nn.Linear(0, 3))
    model.forward = lambda x: nn.Sequential.forward(model[:5], x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = tk.sparsify(model, optimizer, 0.5, steps=10)
    steps(model, [optimizer], 10)
    assert handle.audit().share == 0.5


@pytest.mark.parametrize("form", [list, tuple, lambda two: dict(enumerate(two)), iter])
def test_several_optimizers_may_come_in_any_form(form):
    model = network()
    pair = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[2:])]
    handle = tk.sparsify(model, form(pair), 0.5, steps=10)
    steps(model, pair, 10)
    assert handle.audit().share == 0.5
    with pytest.raises(ValueError, match="needs an optimizer, received an empty list"):
        tk.sparsify(network(), form([]), 0.5, steps=10)


def by_surgery(model, optimizer):
    """A new layer of the same shape in the place of another."""
    model[2] = nn.Linear(16, 16)
    optimizer.param_groups[0]["params"] = list(model.parameters())


def by_loading(model, optimizer):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    optimizer.param_groups[0]["params"] = list(model.parameters())


@pytest.mark.parametrize("change", [by_surgery, by_loading])
@pytest.mark.parametrize("when", [2, 20, 45])
def test_parameters_that_are_replaced_are_followed(change, when):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    handle = tk.sparsify(model, optimizer, 0.5, steps=60)
    steps(model, [optimizer], when)
    change(model, optimizer)
    audited = handle.audit()
    assert sum(row.zeros for row in audited.layers) == zeros(model)
    steps(model, [optimizer], 60 - when)
    assert handle.audit().share == 0.5 == zeros(model) / (6 * 16 + 16 * 16 + 16)


def test_a_layer_of_another_shape_is_left_out_by_name():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    handle = tk.sparsify(model, optimizer, 0.5, steps=60)
    steps(model, [optimizer], 20)
    model[4] = nn.Linear(16, 3)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.warns(UserWarning, match=r"leaves out 4\.weight from here on"):
        steps(model, [optimizer], 40)
    assert handle.audit().share == 0.5
    assert zeros(model) == (6 * 16 + 16 * 16) / 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("when", [2, 20, 45])
def test_a_copy_of_all_goes_on_alone(copied, when):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    handle = tk.sparsify(model, optimizer, 0.5, steps=60)
    steps(model, [optimizer], when)
    twin, other, second = copied((model, optimizer, handle))
    steps(twin, [other], 60 - when)
    assert handle.step == when and second.step == 60
    steps(model, [optimizer], 60 - when)
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        assert torch.equal(ours, theirs)
    assert second.audit().share == handle.audit().share == 0.5
    second.remove()
    assert not other._optimizer_step_pre_hooks and optimizer._optimizer_step_pre_hooks


class Lookahead:
    """Every fifth step the weights go half of the way back to slow ones."""

    def __init__(self, optimizer):
        self.optimizer, self.count = optimizer, 0
        self.slow = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
        self.param_groups, self.zero_grad = optimizer.param_groups, optimizer.zero_grad

    def step(self):
        self.optimizer.step()
        self.count += 1
        for slow, p in zip(self.slow, self.param_groups[0]["params"]):
            if self.count % 5 == 0:
                p.data.copy_(slow.lerp_(p.detach(), 0.5))


class Perturbed(Lookahead):
    """As SAM: gradients at weights that are moved, and moved back before the step."""

    def step(self):
        before = [p.detach().clone() for p in self.param_groups[0]["params"]]
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad, alpha=0.05)
        for old, p in zip(before, self.param_groups[0]["params"]):
            p.data.copy_(old)
        self.optimizer.step()


@pytest.mark.parametrize(("wrapper", "warned"), [(Lookahead, 1), (Perturbed, 0)])
def test_zeros_that_do_not_last_are_told_of_once(wrapper, warned):
    model = network()
    optimizer = wrapper(torch.optim.Adam(model.parameters(), 1e-2))
    handle = tk.sparsify(model, optimizer, 0.5, steps=40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(model, [optimizer], 40)
    messages = [str(w.message) for w in caught]
    assert len(messages) == warned
    assert all("do not last from one step of Adam" in message for message in messages)
    assert bool(handle.audit().returned) == bool(warned)


def test_an_optimizer_for_each_parameter_may_step_within_backward():
    models, audits = [network(), network()], []
    for model, within in zip(models, (True, False)):
        optimizers = {p: torch.optim.Adam([p], 1e-2) for p in model.parameters()}
        handle = tk.sparsify(model, optimizers, 0.5, steps=30)

        def step(p, optimizers=optimizers):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters() if within else ():
            p.register_post_accumulate_grad_hook(step)
        steps(model, [] if within else list(optimizers.values()), 30)
        audits.append(handle.audit())
    assert audits[0].share == audits[1].share == 0.5 and not audits[0].returned


def test_lbfgs_is_refused():
    model = network()
    with pytest.raises(TypeError, match="behind the line search of LBFGS"):
        tk.sparsify(model, torch.optim.LBFGS(model.parameters()), 0.5, steps=10)
