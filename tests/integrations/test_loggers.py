from __future__ import annotations

import pytest
import torch

import tikhon as tk
from tikhon.integrations import readings, tensorboard


@pytest.fixture
def regularizer():
    model = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 0.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return tk.regularize(model, optimizer, tk.L1(0.5))


EXPECTED = {
    "penalty/L1/value": 1.5,
    "penalty/L1/strength": 0.5,
    "penalty/L1/zeros": 0.5,
}


def test_readings_are_value_strength_and_zeros(regularizer):
    assert readings(regularizer) == EXPECTED


def test_readings_of_several_parameters_are_of_their_kind_or_of_each():
    model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Linear(1, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0.0]]))
        model[1].weight.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    terms = {"0.weight": tk.L1(0.5), "1.weight": [tk.L1(0.25), tk.MaxNorm(2.0)]}
    reg = tk.regularize(model, optimizer, terms)
    summary = readings(reg)
    assert {k: v for k, v in summary.items() if "L1" in k} == {
        "penalty/L1/value": 1.5 + 1.0,
        "penalty/L1/strength": 0.375,
        "penalty/L1/zeros": pytest.approx(1 / 6),
    }
    each = readings(reg, per_parameter=True)
    assert each["penalty/0.weight/L1/zeros"] == 0.5
    assert each["penalty/1.weight/L1/strength"] == 0.25
    assert len(each) == 9 and len(summary) == 6


def test_tensorboard_gets_one_scalar_a_reading(regularizer, tmp_path):
    points = []

    class Writer:
        def add_scalar(self, tag, value, step):
            points.append((tag, value, step))

    tensorboard.log(Writer(), regularizer, step=7)
    assert points == [(tag, value, 7) for tag, value in EXPECTED.items()]


def test_a_real_writer_takes_them(regularizer, tmp_path):
    writers = pytest.importorskip("tensorboardX", reason="pip install tensorboardX")
    with writers.SummaryWriter(str(tmp_path)) as writer:
        tensorboard.log(writer, regularizer)
    assert any(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_mlflow_gets_them_as_metrics(regularizer, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="pip install tikhon[mlflow]")
    from tikhon.integrations import mlflow as tracking

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/tracking.db")
    with mlflow.start_run() as run:
        tracking.log(regularizer, step=3)
    logged = mlflow.MlflowClient().get_run(run.info.run_id).data.metrics
    assert logged == EXPECTED
