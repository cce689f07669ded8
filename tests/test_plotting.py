"""Every result draws itself: on a new figure or on given axes, with the values that it holds."""

import math
import sys

import pytest
import torch
from torch import nn

import results
import tikhon as tk
from tikhon.comparison.compare import Comparison
from tikhon.cures.cure import Cure
from tikhon.cures.trials import TreatmentResult
from tikhon.diagnosis import diagnose
from tikhon.errors import InputError

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
plt = pytest.importorskip("matplotlib.pyplot")


TERMS = {"weight": tk.L1(1e-2), "bias": tk.L2(1e-3)}


def comparison():
    rows = (
        {"method": "l2", "test": 0.9, "low": 0.85, "high": 0.95, "tied": True},
        {"method": "none", "test": 0.7, "low": 0.6, "high": 0.8, "tied": False},
    )
    return Comparison("digits", "accuracy", rows, 1, 3, 5, 1.0)


def cured():
    nothing = TreatmentResult("nothing", 0, 300, (1.0, 1.0), (0.0, 0.0), "")
    better = TreatmentResult("lr x10", 1, 300, (0.5, 0.7), (0.5, 0.3), "confirmed")
    early = TreatmentResult("lr x0.1", 1, 20, (1.0, 1.0), (0.0, 0.0), "stopped early")
    found = object.__new__(Cure)
    object.__setattr__(found, "treatments", (nothing, better, early))
    return found


def deep():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy
    return diagnose(model, results.data(), loss, optimizer=optimizer, steps=20)


def thinned():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return tk.sparsify(model, torch.optim.SGD(model.parameters()), 0.5, steps=9).audit()


RESULTS = {
    "sparsity": (thinned, 1),
    "run": (results.run, 1),
    "audit": (results.audit, 1),
    "regularizer": (lambda: results.regularizer(TERMS), 2),
    "path": (lambda: results.path(strengths=8), 2),
    "tune": (results.tune, 2),
    "comparison": (comparison, 1),
    "cure": (cured, 1),
    "diagnosis": (deep, 4),
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_draws_on_a_new_figure_or_on_given_axes(name):
    make, count = RESULTS[name]
    result = make()
    shown = result.plot()
    assert len(shown.axes_) == count and shown.ax_.figure is shown.figure_
    shown.figure_.canvas.draw()  # what cannot be rendered raises here
    for axes in shown.axes_:
        assert axes.has_data() and (axes.get_xlabel() or axes.get_ylabel())
    _, given = plt.subplots(count, 1, squeeze=False)
    again = result.plot(ax=given[0, 0] if count == 1 else list(given[:, 0]))
    assert again.axes_ == tuple(given[:, 0])
    with pytest.raises(InputError, match=f"this picture has {count} axes, received 7"):
        result.plot(ax=[given[0, 0]] * 7)


@pytest.mark.parametrize("zeros", [0, 3], ids=["L2 alone", "with zeros"])
def test_a_regularizer_draws_zeros_or_values(zeros):
    handle = results.regularizer({"weight": tk.L2(1e-2)})
    with torch.no_grad():
        handle.model.get_parameter("weight").flatten()[:zeros] = 0
    (trace,), above = handle.trace(), handle.plot().axes_[0]
    (bar,) = above.patches
    shown, label = (trace.zeros, "share of zeros") if zeros else (trace.value, "value of the term")
    assert (bar.get_width(), above.get_xlabel()) == (pytest.approx(shown), label) and shown > 0


def test_a_run_draws_its_history_beside_the_yardsticks():
    run = results.run()
    axes = run.plot().ax_
    drawn = {line.get_label(): line for line in axes.lines}
    assert list(drawn["validation rows"].get_ydata()) == [h["valid/accuracy"] for h in run.history]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["always the same answer", "a linear model"]


def test_the_best_so_far_never_rises():
    found = results.tune()
    (best,) = [line for line in found.plot().axes_[1].lines if line.get_label() == "best so far"]
    values = list(best.get_ydata())
    assert values == sorted(values, reverse=True)
    assert values[-1] == min(o.score for o in found.history if not o.failed)


def test_a_comparison_marks_what_is_worse_and_draws_its_intervals():
    axes = comparison().plot().ax_
    spans = [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert spans == [[0.85, 0.95], [0.6, 0.8]]
    colours = [line.get_color() for line in axes.lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]


def test_a_cure_draws_what_ran_to_the_end():
    axes = cured().plot().ax_
    assert [t.get_text() for t in axes.get_yticklabels()] == ["lr x10"]
    assert math.isclose(axes.patches[0].get_width(), 0.4)


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(InputError, match=r"pip install 'tikhon\[plot\]'"):
        comparison().plot()
