"""Lightning modules and a quiet trainer; a file of its own, as the import takes seconds."""

from __future__ import annotations

import warnings

import pytorch_lightning as lightning
import torch
from torch import nn

from integrations import plain
from tikhon.integrations.lightning import (
    Regularize as Regularize,
    Sparsify as Sparsify,
    Watch as Watch,
)


class Module(lightning.LightningModule):
    def __init__(self, kind=plain.optimizer) -> None:
        super().__init__()
        self.net, self.kind = plain.net(), kind

    def training_step(self, batch, number):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.kind(self.parameters())


class Manual(Module):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, number):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [plain.optimizer(layer.parameters()) for layer in (self.net[0], self.net[2])]


class Pretrained(Module):
    """A backbone that is frozen for an epoch, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net[:2], self.net[2:]

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.1)


def trainer(tmp_path, *callbacks, epochs=plain.EPOCHS, **options):
    warnings.simplefilter("ignore")
    return lightning.Trainer(
        default_root_dir=tmp_path, max_epochs=epochs, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        **{"enable_checkpointing": False, **options},
    )  # fmt: skip
