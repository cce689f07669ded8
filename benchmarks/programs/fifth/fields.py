"""Masks, boxes, depth and what a network makes of a picture, pixel by pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from programs.form import Parts, Program, Score, adam, r2, sgd
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


class DoubleConv(nn.Module):
    """Two convolutions."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Unet(nn.Module):
    """Down, up, and a side way."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.inc, self.down = DoubleConv(1, 8), DoubleConv(8, 16)
        self.up = nn.Upsample(scale_factor=2)
        self.conv, self.outc = DoubleConv(24, 8), nn.Conv2d(8, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down(F.max_pool2d(x1, 2))
        return self.outc(self.conv(torch.cat([x1, self.up(x2)], dim=1)))


def dice(x: Tensor, mask: Tensor) -> Score:
    """Overlap of the pixels above zero with the mask."""

    def score(m: nn.Module) -> float:
        found = (m(x)[:, :1] > 0).float()
        return float(2 * (found * mask).sum() / (found.sum() + mask.sum() + 1e-6))

    return score


@faulty(
    "a scan whose grey values are not scaled",
    "https://github.com/NifTK/NiftyNet/issues/208",
    "unscaled_inputs",
    low=0.35,
    high=0.7,
    also=("dying_relu", "exploding_gradient", "oscillating_loss"),
)
def grey_values(wrong: bool) -> Parts:
    x, mask = tasks.shapes()
    scan = 900 * x + 400
    if not wrong:
        scan = (scan - scan.mean()) / scan.std()
    loader = DataLoader(TensorDataset(scan[:450], mask[:450]), batch_size=16, shuffle=True)
    net, score = Unet(), dice(scan[450:], mask[450:])
    return Parts(
        net, loader, nn.BCEWithLogitsLoss(), sgd(net, 0.1, momentum=0.9), score, steps=200
    )


def specks(rows: int) -> tuple[Tensor, Tensor]:
    """Pictures in which a pixel in two hundred belongs to something, faint in noise."""
    mask = torch.zeros(rows, 1, 16, 16)
    top, left = torch.randint(0, 16, (2, rows))
    mask[torch.arange(rows), 0, top, left] = 1.0
    beside = (left + 1).clamp(max=15)
    mask[torch.arange(rows), 0, top, beside] = 1.0
    return 1.5 * mask + 0.7 * torch.randn(rows, 1, 16, 16), mask


@faulty(
    "an area that is so small that nothing is said to be it",
    "https://github.com/zhixuhao/unet/issues/101",
    "class_imbalance",
    low=0.05,
    high=0.12,
)
def so_small(wrong: bool) -> Parts:
    x, mask = specks(500)
    unet = Unet()
    weight = None if wrong else torch.tensor(30.0)
    loss = nn.BCEWithLogitsLoss(pos_weight=weight)
    train, score = (x[:400], mask[:400]), dice(x[400:], mask[400:])
    return Parts(unet, train, loss, adam(unet, 2e-3), score, batch_size=16, steps=150)


class EAST(nn.Module):
    """A score and a geometry for each place."""

    def __init__(self) -> None:
        super().__init__()
        self.extractor = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU()
        )
        self.output = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.extractor(x))


@faulty(
    "batches in which there is no text",
    "https://github.com/SakuraRiven/EAST/issues/2",
    "undefined_operation",
    low=0.1,
    high=0.6,
    also=("non_finite_data",),
)
def no_text(wrong: bool) -> Parts:
    x, mask = tasks.shapes()
    empty = torch.rand(600) < 0.6
    x[empty] -= mask[empty]
    mask[empty] = 0
    side = mask * torch.arange(8) / 8
    east = EAST()

    def loss(output: Tensor, ground: Tensor) -> Tensor:
        gt_score, gt_geo = ground[:, :1], ground[:, 1:]
        if not wrong and gt_score.sum() < 1:
            return output.sum() * 0
        found = output[:, :1].sigmoid()
        inter = (gt_score * found).sum()
        classify = 1 - 2 * inter / (gt_score.sum() + found.sum() + 1e-5)
        angle = ((output[:, 1:] - gt_geo).abs() * gt_score).sum() / gt_score.sum()
        return classify + angle

    train = TensorDataset(x[:450], torch.cat([mask, side], 1)[:450])
    loader = DataLoader(train, batch_size=6, shuffle=True)
    score = dice(x[450:], mask[450:])
    return Parts(east, loader, loss, adam(east, 5e-3), score, batch_size=6, steps=300)


def two_kinds(rows: int) -> tuple[Tensor, Tensor]:
    """Pictures of 16 x 16 with a faint and a bright square, and the class of each pixel."""
    mask = torch.zeros(rows, 16, 16)
    for picture in mask:
        for kind in (1, 2):
            top, left = torch.randint(0, 11, (2,)).tolist()
            picture[top : top + 5, left : left + 5] = kind
    return mask[:, None] + 0.15 * torch.randn(rows, 1, 16, 16), mask.long()


@faulty(
    "labels between two labels where a mask is resized",
    "https://github.com/divamgupta/image-segmentation-keras/issues/11",
    "labels_interpolated",  # no code says it: the rim of every object is of another class
    low=0.6,
    high=0.7,
    also=("unrelated_labels",),
)
def between_two_labels(wrong: bool) -> Parts:
    x, mask = two_kinds(600)
    small = F.avg_pool2d(x, 2)
    mode = "bilinear" if wrong else "nearest"
    resized = F.interpolate(mask[:, None].float(), size=(8, 8), mode=mode)[:, 0].round().long()
    true = F.interpolate(mask[:, None].float(), size=(8, 8))[:, 0].long()
    model = Unet(3)

    def score(m: nn.Module) -> float:  # overlap of the first kind
        found = m(small[450:]).argmax(1) == 1
        is_it = true[450:] == 1
        return float(2 * (found & is_it).sum() / (found.sum() + is_it.sum()))

    loader = DataLoader(TensorDataset(small[:450], resized[:450]), batch_size=16, shuffle=True)
    return Parts(model, loader, nn.CrossEntropyLoss(), adam(model, 5e-3), score, steps=200)


class RPN(nn.Module):
    """How far a box lies from its anchor, and how much wider and higher it is."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Flatten(), nn.Linear(256, 64), nn.ReLU(),
        )  # fmt: skip
        self.regression, self.last = nn.Linear(64, 3), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.regression(self.block(x)))


@faulty(
    "offsets of boxes behind a rectifier",
    "https://github.com/tsinghua-rll/VoxelNet-tensorflow/issues/10",
    "head_mismatch",
    low=0.6,
    high=0.8,
    also=("dying_relu",),
)
def behind_a_rectifier(wrong: bool) -> Parts:
    offset = torch.randint(-3, 4, (1000, 2))
    size = torch.randint(1, 4, (1000,))
    x = torch.zeros(1000, 1, 8, 8)
    for picture, (top, left), s in zip(x, offset.tolist(), size.tolist(), strict=True):
        picture[0, max(top + 3, 0) : top + 3 + s, max(left + 3, 0) : left + 3 + s] = 1.0
    x = x + 0.1 * torch.randn_like(x)
    target = torch.cat([offset / 3, torch.log(size / 2.0)[:, None]], 1)
    (x, target), (xt, tt) = tasks.split(x, target)
    rpn = RPN(nn.ReLU() if wrong else nn.Identity())
    return Parts(rpn, (x, target), nn.SmoothL1Loss(), adam(rpn, 3e-3), r2(xt, tt), steps=300)


@faulty(
    "networks of depth and pose that decay to nothing",
    "https://github.com/tinghuiz/SfMLearner/issues/34",
    "underfitting",
    low=0.5,
    high=0.6,
    also=("slow_convergence",),
)
def decay_to_nothing(wrong: bool) -> Parts:
    x, mask = tasks.shapes()
    depth = 0.1 * F.avg_pool2d(mask, 3, stride=1, padding=1)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 1, 3, padding=1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(
        model.parameters(), lr=2e-3, betas=(0.9, 0.999), weight_decay=0.05 if wrong else 5e-5
    )
    loader = DataLoader(TensorDataset(x[:450], depth[:450]), batch_size=32, shuffle=True)
    return Parts(model, loader, nn.MSELoss(), optimizer, r2(x[450:], depth[450:]), steps=300)


class Detector(nn.Module):
    """The place and the size of a square."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@faulty(
    "a loss of boxes that is not a number after the first step",
    "https://github.com/roytseng-tw/Detectron.pytorch/issues/29",
    "exploding_gradient",
    low=0.0,
    high=0.7,
    also=("oscillating_loss",),
)
def after_the_first_step(wrong: bool) -> Parts:
    x, mask = tasks.shapes()
    place = torch.arange(8).float()
    boxes = torch.stack([(mask[:, 0].sum(2 - k) * place).sum(1) / 9 for k in (0, 1)], 1) - 3.5
    model = Detector()
    optimizer = sgd(model, 0.5 if wrong else 5e-3, momentum=0.9, weight_decay=1e-4)
    score = r2(x[450:], boxes[450:])
    return Parts(model, (x[:450], boxes[:450]), nn.MSELoss(), optimizer, score, steps=200)
