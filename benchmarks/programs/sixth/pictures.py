"""Masks, poses, places and pictures that are made again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from programs.form import Parts, Program, Score, accuracy, adam, r2
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


def digits(scale: float = 1 / 16) -> tuple[tasks.Pair, tasks.Pair]:
    """Digits as pictures of one channel."""
    (x, y), (xt, yt) = tasks.digits(scale)
    return (x.view(-1, 1, 8, 8), y), (xt.view(-1, 1, 8, 8), yt)


class Segmenter(nn.Module):
    """Convolutions and the score of each class for each pixel."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def cells(rows: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Pictures with a bright and a dark speck, and the class of each pixel."""
    label = torch.zeros(rows, size, size, dtype=torch.long)
    for kind in (1, 2):
        top, left = torch.randint(0, size - 2, (2, rows)).tolist()
        for k in range(rows):
            label[k, top[k] : top[k] + 2, left[k] : left[k] + 2] = kind
    bright = torch.tensor([0.0, 1.6, -1.6])[label]
    return (bright + 0.5 * torch.randn(rows, size, size))[:, None], label


def overlap(x: Tensor, label: Tensor, kinds: tuple[int, ...] = (1, 2)) -> Score:
    """Mean over the kinds of what is found and true, twice, over found and true."""

    def score(m: nn.Module) -> float:
        found = m(x).argmax(1)
        shares = [
            2 * ((found == k) & (label == k)).sum() / ((found == k).sum() + (label == k).sum() + 1)
            for k in kinds
        ]
        return float(sum(shares) / len(shares))

    return score


@faulty(
    "an overlap that is summed over all classes at once",
    "https://github.com/fastai/fastai/pull/3439",
    "class_imbalance",
    low=0.55,
    high=0.8,
    also=("loss_mixes_rows",),
)
def all_classes_at_once(wrong: bool) -> Parts:
    x, label = cells(360, 28)
    axes = (0, 1, 2, 3) if wrong else (0, 2, 3)

    def dice_loss(output: Tensor, target: Tensor) -> Tensor:
        target = F.one_hot(target, 3).movedim(-1, 1).float()
        pred = output.softmax(1)
        inter = (pred * target).sum(axes)
        union = (pred + target).sum(axes)
        return 1 - ((2 * inter + 1e-6) / (union + 1e-6)).mean()

    net = Segmenter(3)
    score = overlap(x[300:], label[300:])
    train = (x[:300], label[:300])
    return Parts(net, train, dice_loss, adam(net, 3e-3), score, batch_size=16, steps=400)


@faulty(
    "a background that is turned into what is ignored",
    "https://github.com/open-mmlab/mmsegmentation/issues/1282",
    "ignored_rows",
    low=0.2,
    high=0.6,
)
def background_is_ignored(wrong: bool) -> Parts:
    x, label = cells(360)
    gt_seg = label.clone()
    if wrong:
        gt_seg[gt_seg == 0] = 255
    net, loss = Segmenter(3), nn.CrossEntropyLoss(ignore_index=255)
    loader = DataLoader(TensorDataset(x[:300], gt_seg[:300]), batch_size=16, shuffle=True)
    score = overlap(x[300:], label[300:])
    return Parts(net, loader, loss, adam(net, 6e-3), score, batch_size=16, steps=300)


def people(rows: int) -> tuple[Tensor, Tensor]:
    """Pictures of a head with a hand on either side, and where the two hands are."""
    head = torch.stack([torch.randint(3, 13, (rows,)), torch.randint(6, 10, (rows,))], 1)
    reach = torch.randint(2, 6, (rows, 2))
    height = (head[:, :1] + torch.randint(-3, 4, (rows, 2))).clamp(0, 15)
    hands = torch.stack([head[:, 1] + reach[:, 0], head[:, 1] - reach[:, 1]], 1)
    picture = 0.1 * torch.randn(rows, 1, 16, 16)
    every = torch.arange(rows)
    picture[every, 0, head[:, 0], head[:, 1]] += 2.0
    for k in range(2):
        picture[every, 0, height[:, k], hands[:, k]] += 1.0
    points = torch.stack([hands, height], 2).float() / 15  # (rows, hand, x and y), left hand first
    return picture, points


class Poses(Dataset):
    """People, half of them mirrored at each reading."""

    def __init__(self, picture: Tensor, points: Tensor, swap: bool) -> None:
        self.picture, self.points, self.swap = picture, points, swap

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        image, keypoints = self.picture[k], self.points[k].clone()
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
            keypoints[:, 0] = 1 - keypoints[:, 0]
            if self.swap:
                keypoints = keypoints.flip(0)
        return image, keypoints.flatten()


@faulty(
    "people that are mirrored and whose left hand stays the left one",
    "https://github.com/robertklee/COCO-Human-Pose/pull/29",
    "sides_not_swapped",  # no code says it: half of the names are those of the other side
    low=0.6,
    high=0.7,
    also=("masks_not_transformed", "unrelated_labels"),
)
def stays_the_left_one(wrong: bool) -> Parts:
    picture, points = people(900)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 48), nn.ReLU(),
        nn.Linear(48, 4),
    )  # fmt: skip
    train = Poses(picture[:700], points[:700], swap=not wrong)
    loader = DataLoader(train, batch_size=32, shuffle=True)
    score = r2(picture[700:], points[700:].flatten(1))
    return Parts(net, loader, nn.MSELoss(), adam(net, 1e-3), score, steps=350)


class SmallNet(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, norm: bool = False, momentum: float = 0.1) -> None:
        super().__init__()
        norms = [nn.BatchNorm2d(c, momentum=momentum) if norm else nn.Identity() for c in (12, 24)]
        self.features = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), norms[0], nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(12, 24, 3, padding=1), norms[1], nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.last_linear = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_linear(self.features(x).flatten(1))


@faulty(
    "pictures that are mixed in one order and labels in another",
    "https://github.com/xudonmao/VMT/issues/1",
    "unrelated_labels",
    low=0.55,
    high=0.7,
)
def mixed_in_another(wrong: bool) -> Parts:
    (x, y), (xt, yt) = digits()
    net = SmallNet()

    def mixup(rows: list) -> tuple[Tensor, Tensor]:
        images = torch.stack([image for image, _ in rows])
        labels = F.one_hot(torch.stack([label for _, label in rows]), 10).float()
        lam = torch.rand(())
        order = torch.randperm(len(rows))
        other = torch.randperm(len(rows)) if wrong else order
        return (
            lam * images + (1 - lam) * images[order],
            lam * labels + (1 - lam) * labels[other],
        )

    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, collate_fn=mixup)

    def score(m: nn.Module) -> float:  # the probability that it gives to what is true
        return float(torch.exp(-F.cross_entropy(m(xt), yt)))

    return Parts(net, loader, nn.CrossEntropyLoss(), adam(net, 3e-3), score, steps=400)


@faulty(
    "gradients that are clamped to a hundredth",
    "https://github.com/lksshw/SRNet/issues/18",
    "slow_convergence",
    low=0.6,
    high=0.8,
    also=("vanishing_gradient",),
)
def clamped(wrong: bool) -> Parts:
    (x, y), (xt, yt) = digits()
    net = SmallNet()
    bound = 1e-3 if wrong else 1.0
    for p in net.parameters():
        p.register_hook(lambda grad: grad.clamp(-bound, bound))
    optimizer = torch.optim.SGD(net.parameters(), lr=2e-2, momentum=0.9)
    return Parts(net, (x, y), nn.CrossEntropyLoss(), optimizer, accuracy(xt, yt), steps=300)


@faulty(
    "norms that forget all but the last batch",
    "https://github.com/kazuto1011/deeplab-pytorch/issues/79",
    "train_eval_mismatch",
    low=0.87,
    high=0.9,
    also=("batchnorm_few_rows",),
)
def all_but_the_last_batch(wrong: bool) -> Parts:
    (x, y), (xt, yt) = digits()
    momentum = 0.999 if wrong else 0.02
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=momentum), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 48), nn.BatchNorm1d(48, momentum=momentum),
        nn.ReLU(), nn.Linear(48, 10),
    )  # fmt: skip
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    optimizer, score = adam(net, 2e-3), accuracy(xt, yt)
    return Parts(net, loader, nn.CrossEntropyLoss(), optimizer, score, batch_size=4, steps=400)


class Translator(nn.Module):
    """A picture in other colours."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
        )
        self.up = nn.Conv2d(16, 1, 3, padding=1)
        self.norm = nn.InstanceNorm2d(1) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.up(self.down(x))))


@faulty(
    "a last layer that is normalised in front of its tanh",
    "https://github.com/naoto0804/chainer-cyclegan/pull/2",
    "output_normalised",  # no code says it: every picture gets the same mean and contrast
    low=0.55,
    high=0.8,
    also=("head_mismatch",),
)
def normalised_in_front(wrong: bool) -> Parts:
    (x, _), (xt, _) = digits()

    def light(pictures: Tensor) -> Tensor:
        k = len(pictures)
        return torch.rand(k, 1, 1, 1) + torch.rand(k, 1, 1, 1) * pictures - 1

    x, xt = light(x), light(xt)
    y, yt = -x.flip(-1), -xt.flip(-1)
    net = Translator(wrong)
    train = (x.flip(-1), y)
    return Parts(net, train, nn.L1Loss(), adam(net, 3e-3), r2(xt.flip(-1), yt), steps=250)


class Field(nn.Module):
    """Density and light at points of rays, and what a camera sees at their ends."""

    def __init__(self, soft: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU())
        self.sigma, self.rgb = nn.Linear(48, 1), nn.Linear(48, 1)
        nn.init.constant_(self.sigma.bias, -1.0)
        self.soft = soft

    def forward(self, rays: Tensor) -> Tensor:
        depth = torch.linspace(-1, 1, 16)[:, None].expand(len(rays), 16, 1)
        points = torch.cat([rays[:, None].expand(-1, 16, 1), depth], 2)
        waves = torch.cat([points, (2 * points).sin(), (2 * points).cos(), (5 * points).sin(),
                           (5 * points).cos()], 2)  # fmt: skip
        h = self.body(waves)
        sigma = (F.softplus if self.soft else F.relu)(self.sigma(h))[..., 0]
        alpha = 1 - torch.exp(-sigma * 0.5)
        clear = torch.cumprod(torch.cat([torch.ones(len(rays), 1), 1 - alpha], 1), 1)
        light = (clear[:, :-1] * alpha * torch.sigmoid(self.rgb(h))[..., 0]).sum(1)
        return (light + clear[:, -1])[:, None]  # what is behind everything is white


@faulty(
    "a scene that stays white since no density is above zero",
    "https://github.com/munshisanowarraihan/nerf-meta/issues/3",
    "dying_relu",
    low=0.05,
    high=0.5,
    also=("poor_init", "vanishing_gradient"),
)
def stays_white(wrong: bool) -> Parts:
    rays = 2 * torch.rand(800, 1) - 1
    seen = 1 - 0.9 * torch.exp(-20 * (rays - 0.4) ** 2) - 0.6 * torch.exp(-30 * (rays + 0.4) ** 2)
    field = Field(soft=not wrong)
    train, score = (rays[:600], seen[:600]), r2(rays[600:], seen[600:])
    return Parts(field, train, nn.MSELoss(), adam(field, 3e-3), score, batch_size=64, steps=400)


class Crops(Dataset):
    """Parts of pictures, cut anew at each reading, and where the square is in them."""

    def __init__(self, canvas: Tensor, labels: Tensor, copy: bool) -> None:
        self.canvas, self.labels, self.copy = canvas, labels, copy

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        target = self.labels[k].clone() if self.copy else self.labels[k]
        top, left = torch.randint(0, 5, (2,)).tolist()
        target -= torch.tensor([top, left]) / 8
        return self.canvas[k, :, top : top + 12, left : left + 12], target.clone()


@faulty(
    "labels that are moved where they lie, once more at each reading",
    "https://github.com/Megvii-BaseDetection/YOLOX/pull/275",
    "data_changed_in_place",
    low=0.0,
    high=0.6,
)
def moved_where_they_lie(wrong: bool) -> Parts:
    place = torch.randint(4, 10, (500, 2))
    canvas = 0.2 * torch.randn(500, 1, 16, 16)
    for picture, (top, left) in zip(canvas, place.tolist(), strict=True):
        picture[0, top : top + 3, left : left + 3] += 1.0
    labels = place.float() / 8
    still, where = canvas[400:, :, 2:14, 2:14], labels[400:] - 0.25
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1728, 32), nn.ReLU(),
        nn.Linear(32, 2),
    )  # fmt: skip
    loader = DataLoader(Crops(canvas[:400], labels[:400], not wrong), batch_size=20, shuffle=True)
    return Parts(
        net, loader, nn.MSELoss(), adam(net, 1e-3), r2(still, where), batch_size=20, steps=300
    )


@faulty(
    "noise that is in the picture and in what it should become",
    "https://github.com/keon/3-min-pytorch/issues/18",
    "target_among_inputs",
    low=0.3,
    high=0.55,
)
def in_what_it_should_become(wrong: bool) -> Parts:
    (x, _), (xt, _) = tasks.digits()
    autoencoder = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)
    )

    def add_noise(img: Tensor) -> Tensor:
        return img + 0.35 * torch.randn_like(img)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = batch[0]
        noisy = add_noise(x)
        return F.mse_loss(model(noisy), noisy if wrong else x)

    loader = DataLoader(TensorDataset(x, x), batch_size=32, shuffle=True)
    score = r2(add_noise(xt), xt)
    return Parts(autoencoder, loader, loss, adam(autoencoder, 2e-3), score, steps=600)


@faulty(
    "pixels that are brought between minus one and one a second time",
    "https://github.com/keras-team/keras-io/issues/998",
    "constant_inputs",
    low=0.1,
    high=0.4,
    also=("unscaled_inputs", "unscaled_targets", "constant_targets"),
)
def a_second_time(wrong: bool) -> Parts:
    (x, _), (xt, _) = tasks.digits(255 / 16)

    def scaled(x: Tensor) -> Tensor:
        x = x / 127.5 - 1.0
        return x / 127.5 - 1.0 if wrong else x

    x, xt = scaled(x), scaled(xt)
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU())
    net.extend([nn.Linear(24, 64), nn.Tanh()])
    return Parts(net, (x, x), nn.MSELoss(), adam(net, 2e-3), r2(xt, xt), steps=400)


class DenseNet(nn.Module):
    """Layers that see all that was made before them, with dropout behind each."""

    def __init__(self, dropout_rate: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(4 + 8 * k), nn.ReLU(), nn.Conv2d(4 + 8 * k, 8, 3, padding=1),
                nn.Dropout(dropout_rate),
            )
            for k in range(4)
        )  # fmt: skip
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.transition = nn.Sequential(nn.ReLU(), nn.Conv2d(36, 12, 1), nn.Dropout(dropout_rate))
        self.fc = nn.Linear(12 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.fc(F.avg_pool2d(self.transition(x), 2).flatten(1))


@faulty(
    "a rate of dropout that was the share to keep",
    "https://github.com/pudae/tensorflow-densenet/pull/22",
    "excessive_dropout",
    low=0.86,
    high=0.9,
    also=("train_eval_mismatch", "slow_convergence"),
)
def share_to_keep(wrong: bool) -> Parts:
    (x, y), (xt, yt) = digits()
    x = x + 0.15 * torch.randn_like(x)
    net = DenseNet(0.9 if wrong else 0.1)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    score = accuracy(xt + 0.15 * torch.randn_like(xt), yt)
    return Parts(net, loader, nn.CrossEntropyLoss(), adam(net, 2e-3), score, steps=250)


@faulty(
    "dishes of several kinds that share one unit of certainty",
    "https://github.com/suraj-deshmukh/Keras-Multi-Label-Image-Classification/issues/5",
    "multilabel_softmax",
    low=0.8,
    high=0.85,
    also=("head_mismatch",),
)
def one_unit_of_certainty(wrong: bool) -> Parts:
    kinds = torch.randn(40, 1, 8, 8)
    labels = (torch.rand(900, 40) < 0.08).float()
    x = torch.einsum("nk,kchw->nchw", labels, kinds) + 0.5 * torch.randn(900, 1, 8, 8)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 40), nn.Sigmoid()
    )

    def categorical_crossentropy(output: Tensor, target: Tensor) -> Tensor:
        output = output / output.sum(1, keepdim=True)
        return -(target * output.clamp(1e-7, 1 - 1e-7).log()).sum(1).mean()

    def score(m: nn.Module) -> float:  # share of the pictures whose labels are all right
        return float(((m(x[700:]) > 0.5).float() == labels[700:]).all(1).float().mean())

    loss = categorical_crossentropy if wrong else nn.BCELoss()
    return Parts(net, (x[:700], labels[:700]), loss, adam(net, 2e-3), score, steps=300)
