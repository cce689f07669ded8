"""Verbs x inputs: one answer for what means the same, or one sentence that refuses it.

Every cell is generated from the lists below. A verb is a function of (data, loss, model) to the
number by which its answers are compared.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import tikhon as tk
from tikhon.budget import Budget, OutOfTimeError, parse_seconds
from tikhon.comparison import compare
from tikhon.cures.treatments import UNTREATED
from tikhon.cures.trials import Trials
from tikhon.data import load
from tikhon.errors import InputError
from tikhon.sklearn import (
    RegularizedClassifier,
    RegularizedClassifierCV,
    RegularizedRegressor,
    RegularizedRegressorCV,
)

ROWS, FEATURES = 24, 3
STILL = 1e-30  # a learning rate that leaves the weights as they are
generator = torch.Generator().manual_seed(0)
X = torch.randn(ROWS, FEATURES, generator=generator)
CLASSES = (torch.arange(ROWS) % 3) * (X[:, 0] > -9)
NUMBERS = X @ torch.tensor([1.0, -1.0, 0.5]) + 0.3


class Net(nn.Module):
    """A linear model whose only child has the name that data-parallel wrappers use."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.module = nn.Linear(FEATURES, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class Two(Net):
    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        return self.module((x + more) / 2)


def made(kind: type[Net] = Net, outputs: int = 3) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(outputs)


# ---- verbs


def fit(data: Any, loss: Any, model: nn.Module) -> float:
    run = tk.fit(
        model, data, valid=data, loss=loss, epochs=2, batch_size=ROWS, lr=0.1, linear=False
    )
    return run.metrics["valid/loss"]


def tune(data: Any, loss: Any, model: nn.Module) -> float:
    found = tk.tune(
        lambda: model, data, valid=data, loss=loss, space=tk.Space(lr=0.1), epochs=2,
        batch_size=ROWS, budget="1runs", refit=False,
    )  # fmt: skip
    return found.history[0].score


def path(data: Any, loss: Any, model: nn.Module) -> float:
    return tk.path(
        lambda: nn.Linear(FEATURES, 3), data, tk.L1(), valid=data, strengths=[0.1]
    ).scores[0]


def diagnose(data: Any, loss: Any, model: nn.Module) -> float:
    found = tk.diagnose(model, data, loss, optimizer=sgd, valid=data, steps=2, batch_size=ROWS)
    return found.record.points[-1].valid_loss


def cure(data: Any, loss: Any, model: nn.Module) -> float:
    """The best constant's loss, and the untreated program runs."""
    with mock.patch.object(Trials, "search", untreated_alone):
        found = tk.cure(
            model, data, loss, optimizer=sgd, valid=data, steps=1, seeds=2,
            batch_size=ROWS, diagnosis=DIAGNOSIS,
        )  # fmt: skip
    return found.baseline.loss


def untreated_alone(trials: Trials, steps: int) -> None:
    trials.baseline = trials._measure_baseline()
    trials.run(UNTREATED, trials.seeds[0], steps)
    raise OutOfTimeError


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    DIAGNOSIS = tk.diagnose(made(), (X, CLASSES), F.cross_entropy)
VERBS: dict[str, Callable[..., float]] = {f.__name__: f for f in (fit, tune, path, diagnose, cure)}


def answer(verb: str, data: Any, loss: Any, model: nn.Module) -> float | str:
    """What the verb gives, or the sentence with which it refuses, names and numbers left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return VERBS[verb](data, loss, model)
        except InputError as error:
            return re.sub(r"\(\d[\d, ]*\)|\b(train|valid|data|fit|tune|path)\b", "*", str(error))


# ---- data x verbs


class Items(Dataset):
    def __init__(self, *columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        return tuple(column[i] for column in self.columns)


def frames(x: Tensor, y: Tensor) -> Any:
    return pd.DataFrame(x.numpy(), columns=list("abc")), pd.Series(y.numpy())


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensors": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "frames": frames,
    "numbers": lambda x, y: (x.tolist(), y.tolist()),
    "x and y": lambda x, y: type("Rows", (), {"x": x, "y": y})(),
    "tensor data set": TensorDataset,
    "data set": Items,
    "loader": lambda x, y: DataLoader(TensorDataset(x, y), ROWS),
    "shuffling loader": lambda x, y: DataLoader(Items(x, y), ROWS, shuffle=True),
    "small batches": lambda x, y: [(x[:9], y[:9]), (x[9:], y[9:])],
    "names": lambda x, y: {"x": x, "labels": y},
    "a tuple of one": lambda x, y: ((x,), y),
}
SEVERAL: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda x, y: ((x, x), y),
    "three": lambda x, y: (x, x, y),
    "names": lambda x, y: {"x": x, "more": x, "labels": y},
    "pair of names": lambda x, y: ({"x": x, "more": x}, y),
    "loader": lambda x, y: DataLoader(TensorDataset(x, x, y), ROWS),
    "data set": lambda x, y: Items(x, x, y),
}
NONSENSE: dict[str, Any] = {
    "a number": 42,
    "a frame without targets": pd.DataFrame({"a": [1.0]}),
    "text among the inputs": (pd.DataFrame({"a": list("uv")}), [0, 1]),
    "text as targets": (X, np.array(["u"] * ROWS)),
    "another number of rows": (X, CLASSES[:-1]),
    "no rows": (X[:0], CLASSES[:0]),
    "an unknown name": "nothing of the kind",
    "no file": "there/is/no.npz",
}
WHOLE = {"diagnose", "cure"}  # they read lists of batches as batches
cells = pytest.mark.parametrize(("verb", "form"), list(itertools.product(VERBS, FORMS)))


@cache
def on_tensors(verb: str) -> float | str:
    return answer(verb, (X, CLASSES), "cross_entropy", made())


@cells
def test_data_in_every_form_give_the_same_answer(verb, form):
    if verb in WHOLE and form == "small batches":
        pytest.skip("a loop over the given batches is another loop")
    wanted = on_tensors(verb)
    assert isinstance(wanted, float)
    found = answer(verb, FORMS[form](X, CLASSES), "cross_entropy", made())
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("verb", "form"), list(itertools.product(VERBS, SEVERAL)))
def test_several_inputs_are_taken_or_refused_in_one_sentence(verb, form):
    found = answer(verb, SEVERAL[form](X, CLASSES), "cross_entropy", made(Two))
    if verb == "path":
        assert re.search(r"takes models of one input tensor, received ", str(found)), found
    else:
        assert found == pytest.approx(on_tensors(verb), rel=1e-5)


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_refused_in_one_sentence_by_all(what):
    found = {verb: answer(verb, NONSENSE[what], "cross_entropy", made()) for verb in VERBS}
    assert all(isinstance(v, str) for v in found.values()), found
    assert len(set(found.values())) == 1, found


# ---- losses x shapes x verbs


def quadratic(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).mean()


LOSSES: dict[str, list[Any]] = {
    "mse": ["mse", "auto", F.mse_loss, nn.MSELoss(), quadratic],
    "mae": ["mae", F.l1_loss, nn.L1Loss(), lambda o, t: (o - t).abs().mean()],
    "half_mse": ["half_mse", lambda o, t: ((o - t) ** 2).mean() / 2],
    "huber": ["huber", F.huber_loss, nn.HuberLoss(), nn.SmoothL1Loss()],
    "bce": ["bce", F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss()],
    "cross_entropy": ["cross_entropy", "auto", F.cross_entropy, nn.CrossEntropyLoss(),
                      lambda o, t: F.cross_entropy(o, t)],
}  # fmt: skip
WIDE = torch.stack([NUMBERS, -NUMBERS], 1)
TARGETS: dict[str, dict[str, Tensor]] = {  # by what they mean
    "column": {"(n,)": NUMBERS, "(n, 1)": NUMBERS[:, None], "double": NUMBERS.double()},
    "wide": {"(n, 2)": WIDE, "double": WIDE.double()},
    "bits": {"float": (NUMBERS > 0).float(), "boolean": NUMBERS > 0, "int": (NUMBERS > 0).long(),
             "(n, 1)": (NUMBERS > 0).float()[:, None]},
    "classes": {"int64": CLASSES, "int32": CLASSES.int(), "(n, 1)": CLASSES[:, None]},
}  # fmt: skip
FITTING = {
    "column": ("mse", "mae", "half_mse", "huber"), "wide": ("mse", "mae", "half_mse", "huber"),
    "bits": ("bce",), "classes": ("cross_entropy",),
}  # fmt: skip
OUTPUTS = {"column": 1, "wide": 2, "bits": 1, "classes": 3}


def exact(name: str, output: Tensor, y: Tensor) -> float:
    """By numpy alone."""
    o, t = output.double().numpy(), y.double().numpy()
    if name == "cross_entropy":
        log = o - np.log(np.exp(o).sum(1, keepdims=True))
        return float(-log[range(ROWS), y.numpy()].mean())
    error = o - t.reshape(o.shape)
    forms = {
        "mse": error**2,
        "half_mse": error**2 / 2,
        "mae": abs(error),
        "huber": np.where(abs(error) < 1, error**2 / 2, abs(error) - 0.5),
        "bce": np.log1p(np.exp(o)) - t.reshape(o.shape) * o,
    }
    return float(forms[name].mean())


def still_fit(data: Any, loss: Any, model: nn.Module) -> float:
    return tk.fit(model, data, valid=data, loss=loss, epochs=1, lr=STILL, linear=False).metrics[
        "valid/loss"
    ]


def still_tune(data: Any, loss: Any, model: nn.Module) -> float:
    found = tk.tune(
        lambda: model, data, valid=data, loss=loss, space=tk.Space(lr=STILL), epochs=1,
        budget="1runs", refit=False,
    )  # fmt: skip
    return found.history[0].score


def shapes() -> Iterator[Any]:
    for meaning, targets in TARGETS.items():
        for name, (kind, y) in itertools.product(FITTING[meaning], targets.items()):
            for k, loss in enumerate(LOSSES[name]):
                yield pytest.param(meaning, name, loss, y, id=f"{meaning}-{kind}-{name}-{k}")


@pytest.mark.parametrize("verb", [still_fit, still_tune], ids=["fit", "tune"])
@pytest.mark.parametrize(("meaning", "name", "loss", "y"), list(shapes()))
def test_a_loss_is_the_same_for_every_form_shape_and_verb(verb, meaning, name, loss, y):
    model = made(outputs=OUTPUTS[meaning])
    with torch.no_grad():
        wanted = exact(name, model(X), next(iter(TARGETS[meaning].values())))
    if (
        not isinstance(loss, str | nn.Module)
        and loss.__name__ == "<lambda>"
        and meaning == "classes"
    ):
        y = y.flatten().long()  # a callable of the user's own reads targets as torch does
    assert verb((X, y), loss, model) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("name", "k"), [(n, k) for n in LOSSES for k in range(len(LOSSES[n]))])
def test_what_cannot_agree_is_refused_in_one_sentence(name, k):
    loss = LOSSES[name][k]
    if name == "cross_entropy":
        y, outputs = CLASSES, 1
    else:
        y, outputs = (NUMBERS > 0).float(), 2
    if getattr(loss, "__name__", "") in ("<lambda>", "quadratic"):
        return  # two numbers a row against one may be what its author means
    found = {verb: answer(verb, (X, y), loss, made(outputs=outputs)) for verb in ("fit", "tune")}
    assert "received outputs of shape" in str(found["fit"]), found
    assert len(set(found.values())) == 1, found


def test_a_broadcast_in_the_users_own_loop_is_not_hidden():
    for loss in ("mse", F.mse_loss, nn.MSELoss()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = tk.diagnose(made(outputs=1), (X, NUMBERS), loss, optimizer=sgd, steps=20)
        with torch.no_grad():
            table = (made(outputs=1)(X) - NUMBERS[None]).square().mean()
        assert found.record.points[0].eval_loss == pytest.approx(float(table), rel=1e-5)


# ---- estimators: X and y come apart, and the loss is the estimator's own

ESTIMATORS = (
    RegularizedClassifier,
    RegularizedRegressor,
    RegularizedClassifierCV,
    RegularizedRegressorCV,
)
APART = ("tensors", "list", "arrays", "frames", "numbers")


def estimate(kind: Any, x: Any, y: Any = None) -> Any:
    """A fitted estimator of any of the four kinds."""
    more = {"cv": 2, "alphas": [1e-2, 1e-3]} if kind.__name__.endswith("CV") else {}
    model = kind((4,), max_iter=3, batch_size=9, random_state=0, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(x, y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ESTIMATORS, ids=lambda k: k.__name__)
def test_estimators_take_data_in_every_form_that_holds_x_and_y_apart(kind, form):
    y = CLASSES if kind.__name__.startswith("RegularizedClassifier") else NUMBERS
    if form not in APART:
        with pytest.raises(ValueError, match="estimator requires y to be passed"):
            estimate(kind, FORMS[form](X, y))
        return
    wanted, found = estimate(kind, X, y), estimate(kind, *FORMS[form](X, y))
    assert found.loss_curve_ == pytest.approx(wanted.loss_curve_, rel=1e-5)
    assert found.alpha_ == getattr(wanted, "alpha_", None)


@pytest.mark.parametrize("what", ["text among the inputs", "another number of rows", "no rows"])
def test_estimators_refuse_nonsense_in_one_sentence(what):
    found = set()
    for kind in ESTIMATORS:
        with pytest.raises(ValueError) as error:
            estimate(kind, *NONSENSE[what])
        found.add(re.sub(r"Regularized\w+", "*", str(error.value)))
    assert len(found) == 1, found


def objective_at_rest(meaning: str, y: Any) -> tuple[float, Tensor]:
    """An estimator's loss where nothing moves, and the outputs that it is of."""
    numeric = meaning in ("column", "wide")
    kind = RegularizedRegressor if numeric else RegularizedClassifier
    model = kind(
        (4,), alpha=0.0, max_iter=1, batch_size=7, learning_rate_init=1e-300, random_state=0,
        n_iter_no_change=np.inf, **({"standardize": False} if numeric else {}),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(X.double(), y)
    answers = model.predict(X) if numeric else model.predict_log_proba(X)
    return model.loss_curve_[-1], torch.as_tensor(answers).reshape(ROWS, -1)


@pytest.mark.parametrize(
    ("meaning", "form"), [(m, form) for m, forms in TARGETS.items() for form in forms]
)
def test_the_loss_of_an_estimator_is_that_of_the_table_for_every_shape(meaning, form):
    y = next(iter(TARGETS[meaning].values()))
    found, output = objective_at_rest(meaning, TARGETS[meaning][form])
    if meaning in ("column", "wide"):
        wanted = OUTPUTS[meaning] * exact("half_mse", output, y)  # summed over the outputs
    else:
        wanted = exact("cross_entropy", output, y.long().flatten())
    assert found == pytest.approx(wanted, rel=1e-5)
    name = "half_mse" if meaning in ("column", "wide") else "cross_entropy"
    model = Fixed(output)
    run = still_fit((X.double(), y if name == "half_mse" else y.long()), name, model)
    assert OUTPUTS[meaning] ** (name == "half_mse") * run == pytest.approx(found, rel=1e-4)


class Fixed(nn.Module):
    """What an estimator answers, as a model: one row of outputs a row of data, in order."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, x: Tensor) -> Tensor:
        rows = (x[:, None] == X.double()).all(2).double()  # which row each of them is
        return rows @ self.outputs


# ---- a valid part without a class


def test_a_valid_part_without_a_class_is_handled_alike_by_all():
    rows = CLASSES != 2
    few, said = (X[rows], CLASSES[rows]), set()
    calls: dict[str, Callable[[], Any]] = {
        "fit": lambda: tk.fit(made(), (X, CLASSES), valid=few, epochs=1),
        "tune": lambda: tk.tune(made, (X, CLASSES), valid=few, space=tk.Space(lr=0.1), epochs=2,
                                budget="1runs"),
        "path": lambda: tk.path(None, (X, CLASSES), tk.L1(), valid=few, strengths=[0.1]),
    }  # fmt: skip
    for call in calls.values():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        said |= {str(w.message) for w in caught if "class" in str(w.message)}
    assert len(said) == 1, said
    assert "valid lacks classes of train: 2" in said.pop()


def test_a_valid_part_with_a_class_of_its_own_is_refused_alike_by_all():
    rows = CLASSES != 2
    few = (X[rows], CLASSES[rows])
    found = set()
    for call in (
        lambda: tk.fit(made(), few, valid=(X, CLASSES), epochs=1),
        lambda: tk.tune(made, few, valid=(X, CLASSES), space=tk.Space(lr=0.1), epochs=2),
        lambda: tk.path(None, few, tk.L1(), valid=(X, CLASSES), strengths=[0.1]),
    ):
        with pytest.raises(InputError) as error:
            call()
        found.add(str(error.value))
    assert len(found) == 1, found
    assert "valid holds classes that train lacks: 2" in found.pop()


# ---- budgets

BUDGETS = ["60", 60, 60.0, "soon", "", "-5s", "0s", "1.5runs", "5 days", True]


def spend(verb: str, budget: Any) -> str:
    data = (X, CLASSES)
    calls: dict[str, Callable[[], Any]] = {
        "fit": lambda: tk.fit(made(), data, epochs=1, budget=budget),
        "tune": lambda: tk.tune(made, data, budget=budget),
        "cure": lambda: tk.cure(made(), data, "auto", optimizer=sgd, budget=budget),
        "compare": lambda: compare(load("iris"), ["none"], splits=1, epochs=1, budget=budget),
        "command line": lambda: parse_seconds(str(budget)),
    }
    with pytest.raises(InputError) as error:
        calls[verb]()
    return re.sub(r"received .*", "", str(error.value))


@pytest.mark.parametrize("budget", BUDGETS, ids=repr)
def test_a_budget_means_one_thing_or_is_refused_in_one_sentence(budget):
    found = {
        verb: spend(verb, budget) for verb in ("fit", "tune", "cure", "compare", "command line")
    }
    assert len(set(found.values())) == 1, found
    others = {verb: spend(verb, "4runs") for verb in ("fit", "cure", "compare", "command line")}
    assert set(others.values()) == set(found.values())


def test_budgets_in_text_have_the_meaning_of_their_unit():
    for text, seconds in (
        ("60s", 60),
        ("2m", 120),
        ("1.5h", 5400),
        (" .5 s ", 0.5),
        ("10ms", 0.01),
    ):
        assert Budget.parse(text) == Budget(seconds=pytest.approx(seconds))
    assert Budget.parse("4runs") == Budget.parse("4 run") == Budget(runs=4)
    assert Budget.parse(None) == Budget()


# ---- wrappers


def plain(model: nn.Module) -> nn.Module:
    return model


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def distributed(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def accelerated(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(model)


@contextmanager
def one_process(folder: Any) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def regularized(data: Any, loss: Any, model: nn.Module) -> float:
    """`regularize` and `watch` on a plain loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    terms = {"module.weight": tk.L1(0.1)}  # the user's own name of the parameter
    with (
        tk.regularize(model, optimizer, terms) as reg,
        tk.watch(model, optimizer, every=1) as health,
    ):
        for _ in range(3):
            optimizer.zero_grad()
            loss(model(data[0]), data[1]).backward()
            optimizer.step()
        assert list(reg.sparsity()) == ["module.weight"]
    assert len(health.rows) == 3
    return sum(float(p.detach().square().sum()) for p in model.parameters())


def penalised(data: Any, loss: Any, model: nn.Module) -> float:
    recipe = tk.Recipe({"module.weight": tk.L1(0.1)}, clip_norm=0.5)
    run = tk.fit(model, data, recipe, valid=data, loss=loss, epochs=2, batch_size=ROWS, lr=0.1,
                 optimizer="sgd")  # fmt: skip
    assert list(run.penalties) == ["module.weight/L1"]
    return run.metrics["valid/loss"]


@pytest.mark.parametrize("verb", [regularized, penalised, diagnose], ids=lambda f: f.__name__)
@pytest.mark.parametrize("wrap", [compiled, distributed, accelerated], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore")
def test_a_wrapper_changes_nothing(verb, wrap, tmp_path):
    data = (X, CLASSES)
    wanted = verb(data, F.cross_entropy, made())
    with one_process(tmp_path):
        assert verb(data, F.cross_entropy, wrap(made())) == pytest.approx(wanted, rel=1e-5)


APART: dict[str, Callable[[], object]] = {
    "fit": lambda: tk.fit(nn.Linear(FEATURES, 3), X, CLASSES),  # type: ignore[arg-type]
    "diagnose": lambda: tk.diagnose(nn.Linear(FEATURES, 3), X, CLASSES),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("verb", APART)
def test_inputs_and_targets_given_apart_are_named_in_one_line(verb):
    with pytest.raises(InputError, match=r"Tensor of shape \(24,\); inputs .* are one argument"):
        APART[verb]()


def test_a_class_where_a_penalty_belongs_is_named():
    model = nn.Linear(FEATURES, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="received the class L1"):
        tk.regularize(model, optimizer, tk.L1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="received the class L1"):
        tk.path(lambda: nn.Linear(FEATURES, 1), (X, X[:, :1]), tk.L1)  # type: ignore[arg-type]
