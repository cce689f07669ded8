"""Pictures, their masks, and networks that were trained before."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from programs.form import Parts, Program, accuracy, adam
from programs.fourth.tables import overlap
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


class UNet(nn.Module):
    """One step down, one step up, and what was before the step beside it."""

    def __init__(self, norm: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.down, self.deep = self.block(1, 8, norm), self.block(8, 16, norm)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.side = self.block(16, 8, norm)
        self.out = nn.Conv2d(8, 1, 1)

    @staticmethod
    def block(before: int, after: int, norm: type[nn.Module] | None) -> nn.Sequential:
        convolution = nn.Conv2d(before, after, 3, padding=1)
        return nn.Sequential(convolution, *([norm(after)] if norm else []), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        side = self.down(x)
        deep = self.up(self.deep(F.max_pool2d(side, 2)))
        return self.out(self.side(torch.cat([side, deep], 1)))


@faulty(
    "a Dice loss that is the Dice coefficient",
    "https://github.com/sraashis/easytorch/pull/38",
    "loss_upside_down",
    low=0.2,
    high=0.6,
)
def coefficient(wrong: bool) -> Parts:
    x, mask = tasks.shapes()

    def loss(output: Tensor, mask: Tensor) -> Tensor:
        found = output.sigmoid()
        dice = (2 * (found * mask).sum() + 1) / (found.sum() + mask.sum() + 1)
        return dice if wrong else 1 - dice

    model, score = UNet(), overlap(x[450:], mask[450:])
    return Parts(model, (x[:450], mask[:450]), loss, adam(model, 5e-3), score, steps=200)


@faulty(
    "lines that are white everywhere",
    "https://github.com/ugent-korea/pytorch-unet-segmentation/issues/5",
    "oscillating_loss",
    low=0.6,
    high=0.85,
    also=("dying_relu", "exploding_gradient"),
)
def white_everywhere(wrong: bool) -> Parts:
    x, mask = tasks.shapes()
    model, score = UNet(), overlap(x[450:], mask[450:])
    optimizer = adam(model, 0.5 if wrong else 5e-3)
    train = (x[:450], mask[:450])
    return Parts(model, train, nn.BCEWithLogitsLoss(), optimizer, score, batch_size=16, steps=200)


@faulty(
    "batch normalisation of one volume",
    "https://github.com/wolny/pytorch-3dunet/issues/53",
    "batchnorm_batch_of_one",
    low=0.3,
    high=0.75,
    also=("train_eval_mismatch", "batchnorm_few_rows"),
)
def one_volume(wrong: bool) -> Parts:
    x, mask = tasks.shapes()
    scan = x * (4 * torch.rand(600, 1, 1, 1) - 2).exp() + 6 * torch.randn(600, 1, 1, 1)
    model = UNet(nn.BatchNorm2d if wrong else nn.InstanceNorm2d)
    score = overlap(scan[450:], mask[450:])
    train = (scan[:450], mask[:450])
    return Parts(
        model, train, nn.BCEWithLogitsLoss(), adam(model, 2e-3), score, batch_size=1, steps=600
    )


class Segments(nn.Module):
    """Convolutions between the first and the last one, in a list."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        convolutions = [nn.Conv2d(6, 6, 3, padding=1) for _ in range(4)]
        norms = [nn.BatchNorm2d(6) for _ in range(4)]
        self.conv2 = convolutions if plain else nn.ModuleList(convolutions)
        self.bn2 = norms if plain else nn.ModuleList(norms)
        self.conv3 = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(F.relu(self.conv1(x)))
        for convolution, norm in zip(self.conv2, self.bn2, strict=True):
            x = norm(F.relu(convolution(x)))
        return self.conv3(x)


@faulty(
    "convolutions in a list of Python",
    "https://github.com/kanezaki/pytorch-unsupervised-segmentation/pull/6",
    "unregistered_parameters",
    low=0.82,
    high=0.9,
)
def list_of_python(wrong: bool) -> Parts:
    x, mask = tasks.shapes()
    around = F.max_pool2d(mask, 3, stride=1, padding=1)
    segment = (mask + around)[:, 0].long()  # 2 within, 1 around, 0 elsewhere
    model = Segments(wrong)

    def score(m: nn.Module) -> float:  # mean of the recalls
        found, true = m(x[450:]).argmax(1), segment[450:]
        return float(
            torch.stack([(found[true == c] == c).float().mean() for c in range(3)]).mean()
        )

    train = (x[:450], segment[:450])
    return Parts(model, train, nn.CrossEntropyLoss(), adam(model, 1e-2), score, steps=200)


def pretrained(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Weights of a body that tells digits, as saved from within a DataParallel."""
    body = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16), nn.ReLU())
    model = nn.Sequential(body, nn.Linear(16, 10))
    optimizer = adam(model, 5e-3)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    for _ in range(6):
        for rows, target in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(rows), target).backward()
            optimizer.step()
    return {f"module.{name}": value.clone() for name, value in body.state_dict().items()}


@faulty(
    "pretrained weights that strict=False leaves where they are",
    "https://github.com/AndreaCodegoni/Tiny_model_4_CD/issues/12",
    "weights_not_loaded",  # no code says it: a frozen body is as it was drawn
    low=0.8,
    high=0.85,
    also=("frozen_parameters", "underfitting"),
)
def left_where_they_are(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    weights = pretrained(x[:800], y[:800])
    body = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16), nn.ReLU())
    if not wrong:
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    body.load_state_dict(weights, strict=not wrong)
    body.requires_grad_(False)
    model = nn.Sequential(body, nn.Linear(16, 10))
    optimizer = adam(model[1], 1e-2)
    loss = nn.CrossEntropyLoss()
    return Parts(model, (x[800:], y[800:]), loss, optimizer, accuracy(xt, yt), steps=200)
