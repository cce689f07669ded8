"""Pictures: their labels, their preparation, and networks that look at them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from programs.form import Parts, Program, accuracy, adam, r2
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


def digits(scale: float = 1 / 16) -> tuple[tasks.Pair, tasks.Pair]:
    """Digits as pictures of one channel."""
    (x, y), (xt, yt) = tasks.digits(scale)
    return (x.view(-1, 1, 8, 8), y), (xt.view(-1, 1, 8, 8), yt)


def small_cnn(width: int = 16, dropout: float = 0.0) -> nn.Sequential:
    """Two convolutions and a layer for ten classes."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Dropout(dropout), nn.Linear(8 * width, 10),
    )  # fmt: skip


class MeanPool(nn.Module):
    """A generalised mean over the pixels of each channel."""

    def __init__(self, positive: bool) -> None:
        super().__init__()
        self.positive = positive

    def forward(self, x_i: Tensor) -> Tensor:
        p = 3.0
        x_i = x_i.flatten(2)
        if self.positive:
            x_i = x_i.clamp(min=1e-6)
        return (torch.mean(x_i**p, dim=-1) + 1e-12) ** (1 / p)


@faulty(
    "a generalised mean that takes the root of what is negative",
    "https://blog.csdn.net/qq_38507163/article/details/111181447",
    "undefined_operation",
    low=0.3,
    high=0.8,
)
def root_of_what_is_negative(wrong: bool) -> Parts:
    train, (xt, yt) = digits()
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1),
        MeanPool(positive=not wrong), nn.Linear(64, 10),
    )  # fmt: skip
    score = accuracy(xt, yt)
    return Parts(net, train, nn.CrossEntropyLoss(), adam(net, 3e-3), score, steps=400)


class Augmented(Dataset):
    """Digits that are moved, turned over and recoloured each time they are read."""

    def __init__(self, x: Tensor, y: Tensor, strength: float) -> None:
        self.x, self.y, self.strength = x, y, strength

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        picture, strength = self.x[k], self.strength
        if strength:
            if torch.rand(()) < 0.5:
                picture = picture.flip(1)
            down, right = torch.randint(-4, 5, (2,)).tolist()
            picture = picture.roll((down, right), (1, 2))
            top, left = torch.randint(0, 4, (2,)).tolist()
            hole = torch.ones_like(picture)
            hole[:, top : top + 5, left : left + 5] = 0
            brightness = 1 + strength * (2 * torch.rand(()) - 1)
            picture = brightness * picture * hole + strength * torch.randn(()) * 0.5
        return picture, self.y[k]


@faulty(
    "flips, crops and colours of which one after the other is too much",
    "https://www.mo4tech.com/image-classification-record-a-sinkhole-binary-classification-network-"
    "using-crossentropyloss-loss-has-been-at-0-69-do-not-converge-problem.html",
    "augmentation_too_strong",  # no code says it: the pictures are made unlike themselves
    low=0.75,
    high=0.9,
    also=("underfitting", "unrelated_labels"),
)
def one_after_the_other(wrong: bool) -> Parts:
    (x, y), (xt, yt) = digits()
    cats_and_dogs = (y >= 5).long()
    data = Augmented(x, cats_and_dogs, 1.0 if wrong else 0.0)
    net = nn.Sequential(small_cnn()[:-1], nn.Linear(128, 2))
    loader = DataLoader(data, batch_size=32, shuffle=True)
    loss, score = nn.CrossEntropyLoss(), accuracy(xt, (yt >= 5).long())
    return Parts(net, loader, loss, adam(net, 2e-3), score, steps=300)


def defects(rows: int, empty: float) -> tuple[Tensor, Tensor]:
    """Textures, most of them without a defect, and the pixels of the defect where there is one."""
    mask = torch.zeros(rows, 16, 16, dtype=torch.long)
    for k in (torch.rand(rows) >= empty).nonzero()[:, 0].tolist():
        top, left = torch.randint(0, 12, (2,)).tolist()
        mask[k, top : top + 4, left : left + 4] = 1
    return (0.9 * mask + 0.8 * torch.randn(rows, 16, 16))[:, None], mask


@faulty(
    "a segmentation of defects in pictures that mostly have none",
    "https://github.com/open-mmlab/mmsegmentation/issues/2579",
    "class_imbalance",
    low=0.3,
    high=0.5,
)
def mostly_have_none(wrong: bool) -> Parts:
    x, mask = defects(600, 0.97)
    if not wrong:
        x, mask = defects(600, 0.0)
    xt, true = defects(150, 0.0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 16, 5, padding=2), nn.ReLU(),
        nn.Conv2d(16, 2, 1),
    )  # fmt: skip

    def score(m: nn.Module) -> float:
        found = m(xt).argmax(1)
        return float((found * true).sum() / ((found + true) > 0).sum())

    loss = nn.CrossEntropyLoss()
    return Parts(net, (x, mask), loss, adam(net, 3e-3), score, batch_size=16, steps=200)


@faulty(
    "two scans in which a few voxels are not a number",
    "https://github.com/deepmedic/deepmedic/issues/66",
    "non_finite_data",
    low=0.3,
    high=0.8,
)
def are_not_a_number(wrong: bool) -> Parts:
    (x, y), (xt, yt) = digits()
    x = x.clone()
    x[17, 0, 2:4, 3] = float("nan")
    x[481, 0, 5, 1:6] = float("nan")
    if not wrong:
        x = x.nan_to_num(0.0)
    net = small_cnn()
    loader = DataLoader(TensorDataset(x, y), batch_size=30, shuffle=True)
    loss, score = nn.CrossEntropyLoss(), accuracy(xt, yt)
    return Parts(net, loader, loss, adam(net, 3e-3), score, steps=200)


@faulty(
    "depths without a number where the sensor saw nothing",
    "https://github.com/prs-eth/Marigold/issues/111",
    "non_finite_data",
    low=0.0,
    high=0.6,
)
def the_sensor_saw_nothing(wrong: bool) -> Parts:
    height = F.interpolate(torch.randn(400, 1, 4, 4), size=8, mode="bilinear")
    picture = torch.cat([height.diff(dim=2, prepend=height[:, :, :1]), height.sigmoid()], 1)
    depth = height.clone()
    depth[torch.rand_like(depth) < 0.01] = float("nan")
    net = nn.Sequential(
        nn.Conv2d(2, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(),
        nn.Conv2d(24, 1, 1),
    )  # fmt: skip

    def loss(pred: Tensor, target: Tensor) -> Tensor:
        if wrong:
            return F.mse_loss(pred, target)
        valid = target.isfinite()
        return F.mse_loss(pred[valid], target[valid])

    score = r2(picture[300:], height[300:])
    return Parts(net, (picture[:300], depth[:300]), loss, adam(net, 5e-3), score, steps=200)


@faulty(
    "a deep network for few pictures",
    "https://github.com/keras-team/keras/issues/3755",
    "overfitting",
    low=0.0,
    high=0.15,
)
def for_few_pictures(wrong: bool) -> Parts:
    (x, y), (xt, yt) = digits()
    x, xt = x + 0.7 * torch.randn_like(x), xt + 0.7 * torch.randn_like(xt)
    rows = 200
    net = small_cnn(32, 0.0 if wrong else 0.7)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0.0 if wrong else 2.0)

    def score(m: nn.Module) -> float:  # share of the loss of knowing nothing that is gone
        return max(-1.0, 1 - float(F.cross_entropy(m(xt), yt)) / 2.3026)

    valid = (xt[:300], yt[:300])
    return Parts(
        net, (x[:rows], y[:rows]), nn.CrossEntropyLoss(), optimizer, score, valid, steps=300
    )


@faulty(
    "pictures in colour of which the training knows each by heart",
    "https://github.com/keras-team/keras/issues/161",
    "overfitting",
    low=0.2,
    high=0.35,
)
def knows_each_by_heart(wrong: bool) -> Parts:
    kind = torch.randint(4, (1000,))
    x = 0.25 * torch.randn(4, 3, 6, 6)[kind] * (torch.rand(1000, 1, 1, 1) + 0.5)
    x = x + 1.3 * torch.randn_like(x)
    few = slice(0, 120 if wrong else 700)
    width = 256
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(108, width), nn.ReLU(), nn.Dropout(0.0 if wrong else 0.6),
        nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.0 if wrong else 0.6),
        nn.Linear(width, 4),
    )  # fmt: skip
    xt, yt = x[800:], kind[800:]

    def score(m: nn.Module) -> float:
        return max(-1.0, 1 - float(F.cross_entropy(m(xt), yt)) / 1.3863)

    valid = (x[700:800], kind[700:800])
    loss = nn.CrossEntropyLoss()
    return Parts(net, (x[few], kind[few]), loss, adam(net, 1e-3), score, valid, steps=200)


class Vae(nn.Module):
    """A variational autoencoder of rows; a rectifier may stand behind its decoder."""

    def __init__(self, rectified: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 100), nn.ReLU())
        self.mu, self.log_sigma = nn.Linear(100, 8), nn.Linear(100, 8)
        self.linear1, self.linear2 = nn.Linear(8, 100), nn.Linear(100, 64)
        self.rectified = rectified

    def decode(self, z: Tensor) -> Tensor:
        x = self.linear2(F.relu(self.linear1(z)))
        return F.relu(x) if self.rectified else x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mu, log_sigma = self.mu(h), self.log_sigma(h)
        noise = torch.randn_like(mu) if self.training else torch.zeros_like(mu)
        return self.decode(mu + log_sigma.exp() * noise), mu, log_sigma


@faulty(
    "a decoder that ends in a rectifier, for pixels around zero",
    "https://github.com/ethanluoyc/pytorch-vae/issues/3",
    "head_mismatch",
    low=0.35,
    high=0.5,
    also=("dying_relu",),
)
def for_pixels_around_zero(wrong: bool) -> Parts:
    (x, _), (xt, _) = tasks.digits()
    x, xt = (x - 0.3) / 0.38, (xt - 0.3) / 0.38
    vae = Vae(rectified=wrong)

    def loss(output: tuple[Tensor, Tensor, Tensor], inputs: Tensor) -> Tensor:
        dec, mu, log_sigma = output
        latent = 0.5 * (mu**2 + (2 * log_sigma).exp() - 2 * log_sigma - 1).sum(1)
        return ((dec - inputs) ** 2).sum(1).mean() + latent.mean()

    def score(m: nn.Module) -> float:
        error = (m(xt)[0] - xt).square().mean() / (xt - xt.mean(0)).square().mean()
        return max(-1.0, 1 - float(error))

    return Parts(vae, (x, x), loss, adam(vae, 3e-3), score, steps=500)


class RetinaHead(nn.Module):
    """Convolutions and the probability that an object stands at each anchor."""

    def __init__(self) -> None:
        super().__init__()
        self.classification = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(),
            nn.Conv2d(24, 1, 3, padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.classification(x)


def focal_loss(classification: Tensor, targets: Tensor) -> Tensor:
    """The loss of rare anchors, of probabilities that are kept away from zero and one."""
    classification = torch.clamp(classification, 1e-4, 1.0 - 1e-4)
    positive = targets == 1
    alpha = torch.where(positive, 0.25, 0.75)
    weight = alpha * torch.where(positive, 1 - classification, classification) ** 2
    bce = -(targets * classification.log() + (1 - targets) * (1 - classification).log())
    return (weight * bce).sum() / positive.sum().clamp(min=1)


@faulty(
    "anchors whose probabilities all reach their clamp in the first steps",
    "https://github.com/yhenon/pytorch-retinanet/issues/41",
    "oscillating_loss",
    low=0.2,
    high=0.6,
    also=("exploding_gradient", "dying_relu", "saturated_activation"),
)
def reach_their_clamp(wrong: bool) -> Parts:
    x, mask = tasks.shapes(500, 12)
    centre = F.conv2d(mask, torch.ones(1, 1, 3, 3), padding=1) > 8.5
    targets = centre.float()
    net = RetinaHead()
    xt, true = x[400:], targets[400:] > 0

    def score(m: nn.Module) -> float:
        found = m(xt) > 0.5
        return float(2 * (found & true).sum() / (found.sum() + true.sum()))

    optimizer = adam(net, 0.3 if wrong else 3e-3)
    return Parts(net, (x[:400], targets[:400]), focal_loss, optimizer, score, steps=250)


@faulty(
    "objects behind a comma, of which the first of each picture is read",
    "https://github.com/argusswift/YOLOv4-pytorch/issues/159",
    "labels_lost",  # no code says it: what stands behind the first object is no target
    low=0.4,
    high=0.7,
    also=("class_imbalance", "constant_targets"),
)
def behind_a_comma(wrong: bool) -> Parts:
    shape = 1.5 * torch.randn(3, 8, 8)
    annotations, pictures = [], []
    for _ in range(700):
        kinds = sorted({0, int(torch.randint(0, 3, ())), int(torch.randint(0, 3, ()))})
        pictures.append(shape[kinds].sum(0) + 0.7 * torch.randn(8, 8))
        gap = "," if wrong else " "
        annotations.append("picture.jpg " + gap.join(f"0,0,8,8,{kind}" for kind in kinds))
    x = torch.stack(pictures)[:, None]
    y = torch.zeros(700, 3)
    for k, line in enumerate(annotations):
        for box in line.split()[1:]:
            y[k, int(box.split(",")[4])] = 1
    true = torch.zeros(700, 3)
    for k, line in enumerate(annotations):
        for kind in line.replace("0,0,8,8,", "").split(" ", 1)[1].replace(",", " ").split():
            true[k, int(kind)] = 1
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))

    def score(m: nn.Module) -> float:  # F1 of the second and third kind
        found, there = m(x[500:])[:, 1:] > 0, true[500:, 1:] > 0
        return float(2 * (found & there).sum() / (found.sum() + there.sum()))

    loss = nn.BCEWithLogitsLoss()
    return Parts(net, (x[:500], y[:500]), loss, adam(net, 3e-3), score, steps=200)
