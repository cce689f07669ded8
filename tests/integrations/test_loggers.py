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
    "penalty/weight/L1/value": 1.5,
    "penalty/weight/L1/strength": 0.5,
    "penalty/weight/L1/zeros": 0.5,
}


def test_readings_are_value_strength_and_zeros(regularizer):
    assert readings(regularizer) == EXPECTED


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
