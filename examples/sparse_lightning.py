"""90 % of the weights to zero in Lightning: python examples/sparse_lightning.py."""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tikhon.integrations.lightning import Sparsify


class Digits(pl.LightningModule):
    """A perceptron of two hidden layers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
pl.seed_everything(0, verbose=False)
module, sparse = Digits(), Sparsify("90%", within="net")
trainer = pl.Trainer(
    max_epochs=8,
    callbacks=[sparse],
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))

print(sparse.sparsifier.audit())
accuracy = (module.net(x).argmax(1) == y).float().mean()
print(f"accuracy {accuracy:.3f}")
