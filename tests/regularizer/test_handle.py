"""The handle: audit, trace, state, copies, warnings."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from dataclasses import asdict
from functools import partial

import pytest
import torch
from torch import multiprocessing, nn, optim

import tikhon as tk
from regularizer.problems import equal, regression, train

LOSS = regression(dtype=torch.float32)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


def moving():
    """Terms with every kind of moving strength and memory."""
    return {
        "0.weight": tk.Term(tk.L1(), strength=tk.TargetSparsity(0.5, steps=10)),
        "3.weight": [
            tk.Term(tk.L2(), how="decoupled", strength=tk.NormBound(0.1)),
            tk.Huber(tk.schedules.Linear(0.0, 0.1, 10)),
        ],
        "0.bias": tk.L2(lambda step: 0.01 * step),
    }


def adam(model):
    return optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)


def test_audit_says_who_gets_what():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(
        model, optimizer, {"0.weight": [tk.L2(0.1), tk.L1(0.2)], "3.weight": tk.MaxNorm(1.0)}
    )
    audit = reg.audit()
    row = audit["0.weight"]
    assert (row.shape, row.terms, row.strengths) == ((5, 6), ("L2", "L1"), (0.1, 0.2))
    assert row.how == ("objective", "objective")
    assert "followed by BatchNorm1d" in row.note and "learning rate" in row.note
    assert audit["3.weight"].how == ("constraint",)
    assert audit["1.weight"].note == "not matched: normalisation scale"
    assert audit["3.bias"].note == "not matched: bias"
    assert len(audit) == len(list(model.parameters()))
    json.dumps(audit.to_dict())
    lines = str(audit).splitlines()
    assert "parameter" in lines[0] and any("0.weight" in line and "5x6" in line for line in lines)
    assert "before" in lines[0] and "BatchNorm1d" in next(x for x in lines if "0.weight" in x)
    before = asdict(tk.audit(model, {"0.weight": [tk.L2(0.1), tk.L1(0.2)]})["0.weight"])
    assert asdict(row) | {"time_scales": (None, None), "note": before["note"]} == before
    assert row.note == before["note"] + "; decay time 100 steps"


@pytest.mark.parametrize(
    ("how", "optimizer", "expected"),
    [
        ("objective", partial(torch.optim.SGD, lr=0.1, momentum=0.5, dampening=0.2), 62.5),
        ("decoupled", partial(torch.optim.SGD, lr=0.1, momentum=0.9), 100.0),
        ("decoupled", partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0), 1000.0),
        ("independent", partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0), 10.0),
        ("objective", partial(torch.optim.Adam, lr=0.01), None),
    ],
)
def test_audit_says_over_how_many_steps_decay_alone_leaves_a_weight_1_over_e(
    how, optimizer, expected
):
    model = nn.Linear(3, 2, bias=False)
    one = optimizer(model.parameters())
    reg = tk.regularize(model, one, tk.L2(0.1), how=how)
    (scale,) = reg.audit()["weight"].time_scales
    if expected is None:
        assert scale is None and reg.audit()["weight"].note == ""
        return
    assert scale == pytest.approx(expected)
    before = model.weight.detach().clone()
    rounds = round(3 * expected)
    for _ in range(rounds):
        model.weight.grad = torch.zeros_like(model.weight)
        one.step()
    left = (model.weight.detach() / before).mean().log() / -3
    assert left == pytest.approx(1, rel=0.06)


def test_audit_says_that_a_sparse_penalty_shrinks_first_before_a_norm():
    note = tk.audit(network(), tk.GroupLasso(0.1))["0.weight"].note
    assert "its scale has no effect, GroupLasso shrinks all of it before it selects" in note
    assert tk.audit(network(), tk.MaxNorm(1.0))["0.weight"].note == ""


def test_audit_of_a_missing_parameter_names_the_closest():
    audit = tk.audit(nn.Linear(2, 2), tk.L2(0.1))
    with pytest.raises(KeyError, match="did you mean 'weight'"):
        audit["wieght"]


def test_audit_keeps_names_whole():
    name = ".".join(["a_module_with_quite_a_long_name"] * 5)
    model = nn.Linear(2, 2)
    for part in reversed(name.split(".")):
        model = nn.ModuleDict({part: model})
    shown = str(tk.audit(model, tk.GroupLasso(0.1)))
    assert f"{name}.weight " in shown and f"{name}.bias " in shown and "GroupLasso" in shown
    short = str(tk.audit(network(), tk.L2(0.1)))
    assert max(map(len, short.splitlines())) <= 110


def test_trace_measures_share_where_it_says():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    terms = {
        "0.weight": [tk.L2(0.3), tk.L1(0.2)],
        "3.weight": tk.Term(tk.L2(0.5), how="decoupled"),
    }
    reg = tk.regularize(model, optimizer, terms)
    assert [row.share for row in reg.trace()] == [None, None, None]
    w0, w3 = model[0].weight.detach().clone(), model[3].weight.detach().clone()
    train(model, optimizer, 1, LOSS)
    by_name = {row.name: row for row in reg.trace()}
    gradient, decay = model[0].weight.grad.norm(), (0.3 * w0).norm()
    assert by_name["0.weight/L2"].share == pytest.approx(float(decay / (decay + gradient)))
    moved = w0 - 0.1 * (model[0].weight.grad + 0.3 * w0)
    prox = (model[0].weight.detach() - moved).norm()
    share = prox / (prox + (moved - w0).norm())
    assert by_name["0.weight/L1"].share == pytest.approx(float(share), rel=1e-4)
    ours, own = (0.05 * w3).norm(), (0.1 * model[3].weight.grad).norm()
    assert by_name["3.weight/L2"].share == pytest.approx(float(ours / (ours + own)), rel=1e-4)
    row = by_name["0.weight/L1"]
    assert row.strength == 0.2
    assert row.zeros == int((model[0].weight == 0).sum()) / 30
    assert row.value == pytest.approx(0.2 * float(model[0].weight.detach().abs().sum()))
    json.dumps(row.to_dict())


def test_value_is_the_sum_of_the_penalties():
    model = network()
    reg = tk.regularize(
        model, adam(model), {"*": tk.L2(0.1), "0.weight": tk.L1(0.2), "3.weight": tk.MaxNorm(9.0)}
    )
    w0, w3 = model[0].weight, model[3].weight
    expected = 0.05 * (w0.square().sum() + w3.square().sum()) + 0.2 * w0.abs().sum()
    torch.testing.assert_close(reg.value(), expected.detach())
    assert not reg.value().requires_grad
    assert reg.strengths() == {"0.weight/L2": 0.1, "3.weight/L2": 0.1, "0.weight/L1": 0.2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(dtype):
    """Train 7 + 6 steps through a file-like state against 13 without a break."""
    loss = regression(dtype=dtype)
    straight, broken = network().to(dtype), network().to(dtype)
    optimizer = adam(straight)
    reg = tk.regularize(straight, optimizer, moving())
    train(straight, optimizer, 13, loss)

    first = adam(broken)
    before = tk.regularize(broken, first, moving())
    train(broken, first, 7, loss)
    saved = pickle.dumps((broken.state_dict(), first.state_dict(), before.state_dict()))
    resumed = network().to(dtype)
    second = adam(resumed)
    after = tk.regularize(resumed, second, moving())
    weights, moments, strengths = pickle.loads(saved)
    resumed.load_state_dict(weights)
    second.load_state_dict(moments)
    after.load_state_dict(strengths)
    train(resumed, second, 6, loss)
    assert equal(straight, resumed)
    assert after.strengths() == reg.strengths()
    assert after.steps == 13


def test_state_of_other_terms_is_refused():
    model = network()
    state = tk.regularize(model, adam(model), {"0.weight": tk.L1(0.1)}).state_dict()
    other = tk.regularize(model, adam(model), {"0.weight": tk.L2(0.1)})
    with pytest.raises(ValueError, match=r"state is of other terms: it has \['0.weight/L1'\]"):
        other.load_state_dict(state)
    for foreign in (model.state_dict(), other.optimizer.state_dict(), {}, None, [state]):
        with pytest.raises(ValueError, match=r"expected what Regularizer.state_dict\(\) gave"):
            other.load_state_dict(foreign)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_model_optimizer_and_handle_go_on_as_the_original(copied):
    terms = {"0.weight": tk.L1(0.1), "3.weight": tk.L2(tk.schedules.Linear(0.0, 0.1, 10))}
    model = network()
    optimizer = adam(model)
    reg = tk.regularize(model, optimizer, terms)
    train(model, optimizer, 3, LOSS)
    twin, twin_optimizer, twin_reg = copied((model, optimizer, reg))
    assert twin_reg.model is not model
    train(model, optimizer, 4, LOSS)
    train(twin, twin_optimizer, 4, LOSS)
    assert equal(model, twin)
    assert twin_reg.steps == reg.steps == 7
    assert twin_reg.strengths() == reg.strengths()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_made_after_all_parameters_were_replaced_goes_on(copied):
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, tk.L1(0.5))
    model[0].weight = nn.Parameter(torch.ones(2, 3))
    optimizer.param_groups[0]["params"] = [model[0].weight]
    twin, twin_optimizer, twin_reg = copied((model, optimizer, reg))
    twin[0].weight.grad = torch.zeros(2, 3)
    twin_optimizer.step()
    assert twin_reg.steps == 1
    torch.testing.assert_close(twin[0].weight.detach(), torch.full((2, 3), 0.95))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_with_new_weights_in_the_model_alone_is_made_as_well(copied):
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, tk.L1(0.5))
    model[0].weight = nn.Parameter(torch.ones(2, 3))
    with pytest.warns(UserWarning, match="holds none of the regularized parameters any more"):
        twin, _, twin_reg = copied((model, optimizer, reg))
    rebuilt = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin_reg.attach(rebuilt)
    twin[0].weight.grad = torch.zeros(2, 3)
    rebuilt.step()
    torch.testing.assert_close(twin[0].weight.detach(), torch.full((2, 3), 0.95))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_the_copy_of_a_removed_handle_is_removed(copied):
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, tk.L1(0.5))
    reg.remove()
    twin, twin_optimizer, twin_reg = copied((model, optimizer, reg))
    twin[0].weight.grad = torch.zeros(2, 3)
    twin_optimizer.step()
    assert twin_reg.steps == 0
    assert equal(model, twin)


def test_weights_loaded_after_a_step_without_gradients_are_no_training():
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = tk.regularize(model, optimizer, tk.L1(0.5))
    optimizer.step()
    model(torch.ones(1, 3)).sum().backward()
    model.load_state_dict({"0.weight": torch.ones(2, 3)})
    assert reg.sparsity() == {"0.weight": 0.0}


def _train_in_child(parts, queue):
    model, optimizer, reg = parts
    train(model, optimizer, 4, regression(dtype=torch.float32))
    queue.put((reg.steps, reg.sparsity()["0.weight"], [p.tolist() for p in model.parameters()]))


@pytest.mark.slow
def test_a_spawned_process_keeps_the_penalty():
    model = network()
    optimizer = adam(model)
    reg = tk.regularize(model, optimizer, {"0.weight": tk.L1(0.3)})
    train(model, optimizer, 3, LOSS)
    parts = pickle.loads(pickle.dumps((model, optimizer, reg)))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_train_in_child, args=(parts, queue))
    child.start()
    steps, zeros, weights = queue.get(timeout=120)
    child.join()
    train(model, optimizer, 4, LOSS)
    assert (steps, zeros) == (7, reg.sparsity()["0.weight"])
    assert weights == [p.tolist() for p in model.parameters()]


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam])
def test_training_with_another_optimizer_is_noticed(kind):
    model = network()
    optimizer = kind(model.parameters(), lr=0.01)
    reg = tk.regularize(model, optimizer, {"0.weight": tk.L1(0.1)})
    train(model, optimizer, 3, LOSS)
    reg.trace()
    rebuilt = kind(model.parameters(), lr=0.01)  # as a framework does behind one's back
    train(model, rebuilt, 2, LOSS)
    with pytest.warns(UserWarning, match="penalty inactive since step 3"):
        reg.sparsity()
    reg.attach(rebuilt)
    train(model, rebuilt, 2, LOSS)
    reg.trace()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_lost_hooks_are_noticed(set_to_none):
    """By the optimizer's own counter where gradients keep their memory."""
    model = network()
    optimizer = adam(model)
    reg = tk.regularize(model, optimizer, {"0.weight": tk.L1(0.1)})
    train(model, optimizer, 2, LOSS)
    optimizer._optimizer_step_post_hooks.clear()
    for _ in range(2):
        optimizer.zero_grad(set_to_none=set_to_none)
        LOSS(model).backward()
        optimizer.step()
    with pytest.warns(UserWarning, match="penalty inactive since step 2"):
        reg.audit()


def test_restoring_the_best_weights_is_no_false_alarm():
    model = network()
    optimizer = adam(model)
    reg = tk.regularize(model, optimizer, {"0.weight": tk.L1(0.1)})
    train(model, optimizer, 2, LOSS)
    best = copy.deepcopy(model.state_dict())
    train(model, optimizer, 2, LOSS)
    model.load_state_dict(best)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg.trace()
        LOSS(model).backward()
        optimizer.step()
        reg.trace()


def test_wrapped_optimizers_are_unwrapped():
    class Wrapper(optim.Optimizer):  # as Accelerate's: no __init__, so no place for hooks
        def __init__(self, inner):
            self.optimizer = inner

        def step(self, closure=None):
            return self.optimizer.step(closure)

    model = network()
    wrapper = Wrapper(adam(model))
    reg = tk.regularize(model, wrapper, {"0.weight": tk.L1(1e3)})
    LOSS(model).backward()
    for _ in range(30):
        wrapper.step()
    assert reg.optimizer is wrapper.optimizer
    assert reg.sparsity()["0.weight"] == 1.0


def test_accelerate_prepares_and_trains():
    accelerate = pytest.importorskip("accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerator = accelerate.Accelerator(cpu=True)
        model = network()
        model, optimizer = accelerator.prepare(model, adam(model))
        reg = tk.regularize(model, optimizer, {"0.weight": tk.L1(1e3)})
        optimizer.zero_grad()
        accelerator.backward(LOSS(model))
        for _ in range(30):
            optimizer.step()
    assert reg.sparsity()["0.weight"] == 1.0 and reg.steps == 30


class TestContradictions:
    def attach(self, terms, optimizer=optim.SGD, model=None, how="objective", **options):
        model = model or network()
        return tk.regularize(
            model, optimizer(model.parameters(), lr=0.1, **options), terms, how=how
        )

    def test_l2_and_weight_decay(self):
        with pytest.warns(UserWarning, match=r"0.weight/L2 \(strength 0.1\).*weight_decay=0.3"):
            self.attach({"0.weight": tk.L2(0.1)}, weight_decay=0.3)

    def test_decoupled_l1_on_adam(self):
        with pytest.warns(UserWarning, match="decoupled from the metric of AdamW.*objective"):
            self.attach({"0.weight": tk.L1(0.1)}, optim.AdamW, how="decoupled")

    def test_one_term_on_many_weights_is_said_once(self):
        with pytest.warns(UserWarning, match="weight_decay=0.3") as seen:
            self.attach(tk.L2(0.1), weight_decay=0.3)
        assert len(seen) == 1

    def test_dropout_before_batch_norm(self):
        model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(5, 2))
        with pytest.warns(UserWarning, match="Dropout directly before BatchNorm1d"):
            self.attach({"3.weight": tk.L2(0.1)}, model=model)

    @pytest.mark.parametrize("second", [tk.L1(0.1), tk.MCP(0.1)], ids=repr)
    def test_a_second_prox_from_another_handle(self, second):
        model = network()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        first = tk.regularize(model, optimizer, tk.L1(0.1))
        with pytest.warns(UserWarning, match="earlier Regularizer") as said:
            tk.regularize(model, optimizer, second).remove()
        assert said[0].filename == __file__
        tk.regularize(model, optimizer, tk.L2(0.1)).remove()  # others combine
        first.remove()
        tk.regularize(model, optimizer, second)

    def test_sound_settings_say_nothing(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.attach({"0.weight": tk.L1(0.1)}, weight_decay=0.3)
            self.attach({"0.weight": tk.L1(0.1)}, how="decoupled")
            self.attach({"0.weight": tk.L2(0.1)}, optim.AdamW, how="decoupled", weight_decay=0.0)


@pytest.mark.parametrize(
    ("terms", "error", "message"),
    [
        ("l1", TypeError, r"received 'l1' for '\*'.*penalties.get"),
        ({}, ValueError, "terms are empty"),
        ({"*": [tk.L1(0.1), 3.0]}, TypeError, "received 3.0"),
        (tk.L1(lambda step: -1.0), ValueError, "finite and >= 0, received -1.0"),
        (
            tk.L2(tk.TargetSparsity(0.5)),
            TypeError,
            "counts the zeros of a prox, and L2 gives none",
        ),
    ],
)
def test_bad_terms(terms, error, message):
    model = network()
    with pytest.raises(error, match=message):
        tk.regularize(model, adam(model), terms)


def test_what_is_no_model_or_optimizer_is_named():
    model = network()
    with pytest.raises(TypeError, match="model must be a torch module, received NoneType"):
        tk.regularize(None, adam(model), tk.L1(0.1))
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, received Parameter"):
        tk.regularize(model, model.parameters(), tk.L1(0.1))


def test_repr_names_terms_optimizer_and_step():
    model = network()
    reg = tk.regularize(model, adam(model), tk.L1(0.1))
    train(model, reg.optimizer, 2, LOSS)
    assert repr(reg) == "Regularizer(0.weight/L1, 3.weight/L1; AdamW, step 2)"


def test_bad_mode():
    model = network()
    with pytest.raises(ValueError, match="unknown how 'coupled'"):
        tk.regularize(model, adam(model), tk.L1(0.1), how="coupled")
    with pytest.raises(ValueError, match="unknown how 'coupled'"):
        tk.Term(tk.L1(0.1), how="coupled")


def test_a_schedule_that_turns_bad_is_named():
    model = network()
    optimizer = adam(model)
    tk.regularize(model, optimizer, {"0.weight": tk.L1(lambda step: 1.0 - step)})
    train(model, optimizer, 2, LOSS)
    with pytest.raises(ValueError, match=r"strength of 0.weight/L1.*received -1.0"):
        train(model, optimizer, 1, LOSS)


def deep(depth=4):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6) for _ in range(depth)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))


def test_a_layer_lost_in_an_adaptive_metric_is_named_once():
    model = deep()
    optimizer = adam(model)
    tk.regularize(model, optimizer, {"*": tk.L1(0.5)})
    with pytest.warns(UserWarning, match=r"L1 has made all of '.\.weight' zero.*AdamW") as seen:
        train(model, optimizer, 120, lambda m: m(torch.ones(3, 6)).square().mean())
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("kind", "term"),
    [
        (optim.SGD, tk.L1(50.0)),  # one step for all weights: nothing but the strength did it
        (optim.Adam, tk.Term(tk.L1(50.0), how="decoupled")),
        (optim.Adam, tk.L1(1e-4)),
    ],
    ids=["SGD", "decoupled", "weak"],
)
@pytest.mark.filterwarnings("ignore:.*decoupled from the metric")
def test_no_other_layer_is_called_lost(kind, term):
    model = deep()
    with warnings.catch_warnings(action="ignore"):
        model.empty = nn.Linear(0, 3)  # a layer without weights has none to lose
    model.forward = lambda x: nn.Sequential.forward(model[:-1], x) + 0 * model.empty.weight.sum()
    optimizer = kind(model.parameters(), lr=0.02)
    tk.regularize(model, optimizer, {"*": term})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 120, lambda m: m(torch.ones(3, 6)).square().mean())
