"""A model and a trainer of transformers; a file of its own, as the import takes seconds."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from integrations import plain
from tikhon.integrations.transformers import (
    Regularize as Regularize,
    Sparsify as Sparsify,
    Watch as Watch,
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain.net()

    def forward(self, x, labels):
        return {"loss": nn.functional.mse_loss(self.net(x), labels)}


def rows(count=48):
    x, y = plain.data()
    return [{"x": x[i], "labels": y[i]} for i in range(count)]


class InOrder(transformers.Trainer):
    """Batches in the order of the plain loop."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(tmp_path, *callbacks, data=None, **options):
    settings = {
        "per_device_train_batch_size": plain.BATCH, "num_train_epochs": plain.EPOCHS,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "save_strategy": "no", "logging_steps": 6,
    } | options  # fmt: skip
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), **settings)
    model = Model()
    return InOrder(
        model, arguments, train_dataset=data or rows(), callbacks=list(callbacks),
        optimizers=(plain.optimizer(model.parameters()), None),
    )  # fmt: skip
