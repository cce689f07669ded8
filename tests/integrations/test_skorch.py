from __future__ import annotations

import pytest
import torch
from torch import nn

import tikhon as tk
from integrations import plain

skorch = pytest.importorskip("skorch", reason="pip install tikhon[skorch]")

from sklearn.model_selection import GridSearchCV  # noqa: E402

from tikhon.integrations.skorch import Regularize, Watch  # noqa: E402


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain.net()

    def forward(self, x):
        return self.net(x)


TERMS = {f"net.{pattern}": term for pattern, term in plain.TERMS.items()}


def regressor(*callbacks, epochs=plain.EPOCHS):
    return skorch.NeuralNetRegressor(
        Net, max_epochs=epochs, batch_size=plain.BATCH, optimizer=torch.optim.Adam, lr=0.02,
        train_split=None, verbose=0, callbacks=list(callbacks),
    )  # fmt: skip


def test_a_fit_equals_the_plain_loop_bit_for_bit():
    net = regressor(("penalty", Regularize(TERMS))).fit(*plain.data())
    plain.assert_same(net.module_.net, plain.train())


def test_partial_fit_continues_the_schedule():
    net = regressor(("penalty", Regularize(TERMS)), epochs=2)
    net.fit(*plain.data()).partial_fit(*plain.data())
    plain.assert_same(net.module_.net, plain.train())


def test_the_history_holds_the_penalties():
    net = regressor(("penalty", Regularize(TERMS, per_parameter=True))).fit(*plain.data())
    strengths = net.history[:, "penalty/net.0.weight/L1/strength"]
    assert strengths == sorted(strengths) and strengths[-1] == pytest.approx(0.05)


def test_a_grid_search_over_penalties():
    net = regressor(("penalty", Regularize(tk.L1(0.1))))
    grid = {"callbacks__penalty__terms": [tk.L1(0.0), tk.L1(100.0)]}
    search = GridSearchCV(net, grid, cv=2, scoring="r2").fit(*plain.data())
    assert search.best_params_["callbacks__penalty__terms"].strength == 0.0


def test_the_watch_stops_at_the_first_bad_number():
    x, y = plain.data()
    x[20] = float("nan")
    with pytest.raises(tk.NonFiniteError, match=r"step 2: .* is input"):
        regressor(Watch(every=1)).fit(x, y)


def test_the_watch_says_in_one_line_that_nothing_was_found(capsys):
    net = regressor(Watch(every=1)).set_params(verbose=1).fit(*plain.data())
    health = dict(net.callbacks_)["Watch"].watch_
    assert capsys.readouterr().err.strip() == health.verdict
    assert f"no problem found in {health.step} steps" in health.verdict
