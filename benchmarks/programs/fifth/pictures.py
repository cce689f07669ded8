"""Pictures and their classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from programs.form import Parts, Program, Score, accuracy, adam, sgd
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


class BirdNet(nn.Module):
    """Two convolutions and two linear layers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.fc1 = nn.Linear(16 * 2 * 2, 32)
        self.fc2 = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        return self.fc2(F.relu(self.fc1(x)))


def images(scale: float = 1 / 16) -> tuple[tasks.Pair, tasks.Pair]:
    """Digits as pictures of one channel."""
    (x, y), (xt, yt) = tasks.digits(scale)
    return (x.view(-1, 1, 8, 8), y), (xt.view(-1, 1, 8, 8), yt)


@faulty(
    "birds that are all of one kind while the steps are tiny",
    "https://github.com/halwai/bird_classification/issues/12",
    "slow_convergence",
    low=0.35,
    high=0.8,
)
def one_kind(wrong: bool) -> Parts:
    (x, y), (xt, yt) = images()
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    model = BirdNet(10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5 if wrong else 5e-2, momentum=0.9)
    return Parts(model, loader, nn.CrossEntropyLoss(), optimizer, accuracy(xt, yt), steps=300)


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_dim, dim),
            nn.Dropout(dropout),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A transformer over patches with a token for the class."""

    def __init__(
        self, num_classes: int, dim: int = 32, depth: int = 2, heads: int = 4, mlp_dim: int = 64,
        dropout: float = 0.0, emb_dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch = nn.Conv2d(1, dim, kernel_size=2, stride=2)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, 17, dim))
        self.dropout = nn.Dropout(emb_dropout)
        self.layers = nn.ModuleList(Block(dim, heads, mlp_dim, dropout) for _ in range(depth))
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def forward(self, img: Tensor) -> Tensor:
        x = self.patch(img).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.dropout(x + self.pos_embedding)
        for layer in self.layers:
            x = layer(x)
        return self.mlp_head(x[:, 0])


@faulty(
    "a transformer of patches that drops half of everything and decays",
    "https://github.com/lucidrains/vit-pytorch/issues/16",
    "underfitting",
    low=0.4,
    high=0.75,
    also=("excessive_dropout", "oscillating_loss", "slow_convergence"),
)
def drops_half(wrong: bool) -> Parts:
    (x, y), (xt, yt) = images()
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    drop = 0.5 if wrong else 0.1
    vit = ViT(10, depth=4, dropout=drop, emb_dropout=drop)
    lr, decay = (5e-3, 0.1) if wrong else (1e-3, 0.0)
    optimizer = torch.optim.Adam(vit.parameters(), lr=lr, weight_decay=decay)
    return Parts(vit, loader, nn.CrossEntropyLoss(), optimizer, accuracy(xt, yt), steps=300)


def pretrained_vit(x: Tensor, y: Tensor) -> ViT:
    """A transformer that tells ten digits, with a new head for two classes."""
    vit = ViT(10)
    optimizer = torch.optim.Adam(vit.parameters(), lr=2e-3)
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    for _ in range(12):
        for rows, target in loader:
            optimizer.zero_grad()
            F.cross_entropy(vit(rows), target).backward()
            optimizer.step()
    vit.mlp_head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 2))
    return vit


@faulty(
    "a pretrained transformer that says all cats or all dogs",
    "https://github.com/lucidrains/vit-pytorch/issues/34",
    "oscillating_loss",
    low=0.75,
    high=0.88,
    also=("exploding_gradient", "saturated_activation", "collapsed_attention"),
)
def all_cats(wrong: bool) -> Parts:
    (x, y), (xt, yt) = images()
    model = pretrained_vit(x[:600], y[:600])
    train = (x[600:], (y[600:] >= 5).long())
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-2 if wrong else 5e-4)
    score = accuracy(xt, (yt >= 5).long())
    return Parts(model, train, nn.CrossEntropyLoss(), optimizer, score, steps=200)


class ChairNet(nn.Module):
    """Convolutions with a norm, and one unit with a sigmoid."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 5, 4, stride=2, padding=1), nn.BatchNorm2d(5, momentum=momentum),
            nn.LeakyReLU(0.2),
            nn.Conv2d(5, 10, 4, stride=2, padding=1), nn.BatchNorm2d(10, momentum=momentum),
            nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.out = nn.Linear(40, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.out(self.features(x).flatten(1)))


@faulty(
    "chairs and lamps that are told apart in training alone",
    "https://github.com/keras-team/keras/issues/6014",
    "train_eval_mismatch",
    low=0.75,
    high=0.9,
)
def chairs_and_lamps(wrong: bool) -> Parts:
    (x, y), _ = images(8.0)
    rows = torch.cat([(y == 3).nonzero()[:32, 0], (y == 8).nonzero()[:32, 0]])
    x, y = 255 - x[rows], (y[rows] == 8).float().unsqueeze(1)
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    model = ChairNet(0.01 if wrong else 0.3)

    def score(m: nn.Module) -> float:  # on the pictures that it was trained with
        return float(((m(x) > 0.5).float() == y).float().mean())

    return Parts(model, loader, nn.BCELoss(), adam(model, 5e-3), score, batch_size=8, steps=40)


def in_folders(y: Tensor, order: Tensor) -> Tensor:
    """Class numbers as a listing of the folders in some order counts them."""
    return order.argsort()[y]


@faulty(
    "folders that are listed in another order for the test",
    "https://github.com/uzh-rpg/rpg_event_representation_learning/issues/2",
    "valid_differs",
    low=0.4,
    high=0.8,
)
def another_order(wrong: bool) -> Parts:
    (x, y), (xv, yv) = images()
    listed = torch.randperm(10)
    again = listed.roll(3)
    valid = (xv, in_folders(yv, again if wrong else listed))
    train = DataLoader(TensorDataset(x, in_folders(y, listed)), batch_size=32, shuffle=True)
    model = BirdNet(10)
    loss, score = nn.CrossEntropyLoss(), accuracy(*valid)
    return Parts(model, train, loss, adam(model, 3e-3), score, valid=valid, steps=250)


@faulty(
    "fonts that are augmented before they are split",
    "https://github.com/robinreni96/Font_Recognition-DeepFont/issues/2",
    "rows_in_both",
    low=0.85,
    high=0.92,
)
def augmented_first(wrong: bool) -> Parts:
    (x, y), (xt, yt) = images()
    x, y = x[:300], y[:300].clone()
    noisy = torch.rand(300) < 0.4
    y[noisy] = torch.randint(10, (int(noisy.sum()),))
    yt = torch.where(torch.rand(len(yt)) < 0.4, torch.randint(10, yt.shape), yt)

    def augment(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x + 0.02 * torch.randn_like(x) for _ in range(5)]), y.repeat(5)

    if wrong:
        x, y = augment(x, y)
        order = torch.randperm(1500)
        train, valid = order[:1200], order[1200:]
        (x, y), (xv, yv) = (x[train], y[train]), (x[valid], y[valid])
    else:
        (xv, yv), (x, y) = augment(x[240:], y[240:]), augment(x[:240], y[:240])
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip

    def score(m: nn.Module) -> float:  # how far what validation says is true of new pictures
        return 1 - max(0.0, accuracy(xv, yv)(m) - accuracy(xt, yt)(m))

    loss, steps = nn.CrossEntropyLoss(), 400 if wrong else 120
    return Parts(model, (x, y), loss, adam(model, 2e-3), score, valid=(xv, yv), steps=steps)


class SimpleNet(nn.Module):
    """Convolutions, the largest of each map, and a classifier."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Linear(32, 10)
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)
        out = F.max_pool2d(out, kernel_size=out.size()[2:])
        out = F.dropout2d(out, 0.1, training=self.always or self.training)
        return self.classifier(out.view(out.size(0), -1))


def twice(x: Tensor, y: Tensor) -> Score:
    """Accuracy, over the rows that get the same answer when they are asked again."""

    def score(m: nn.Module) -> float:
        first, again = m(x), m(x)
        same = (first - again).abs().amax(1) < 1e-5
        return float(((first.argmax(1) == y) & same).float().mean())

    return score


@faulty(
    "another answer on every run in evaluation mode",
    "https://github.com/Coderx7/SimpleNet/issues/2",
    "random_in_eval",
    low=0.3,
    high=0.75,
)
def another_answer(wrong: bool) -> Parts:
    (x, y), (xt, yt) = images()
    model = SimpleNet(wrong)
    return Parts(model, (x, y), nn.CrossEntropyLoss(), adam(model, 5e-3), twice(xt, yt), steps=250)


@faulty(
    "clothes in the order of their labels",
    "https://github.com/zalandoresearch/fashion-mnist/pull/5",
    "sorted_batches",
    low=0.5,
    high=0.8,
)
def clothes_in_order(wrong: bool) -> Parts:
    (x, y), (xt, yt) = images()
    order = y.argsort()
    loader = DataLoader(TensorDataset(x[order], y[order]), batch_size=32, shuffle=not wrong)
    model = BirdNet(10)
    optimizer = sgd(model, 0.1, momentum=0.5)
    return Parts(model, loader, nn.CrossEntropyLoss(), optimizer, accuracy(xt, yt), steps=266)


@faulty(
    "faces in the order of the disk beside attributes in that of the file",
    "https://github.com/NoahVl/Explaining-In-Style-Reproducibility-Study/issues/9",
    "unrelated_labels",
    low=0.65,
    high=0.85,
)
def order_of_the_disk(wrong: bool) -> Parts:
    (x, y), (xt, yt) = images()
    smiling = (y >= 5).float()
    listed = torch.randperm(len(x)) if wrong else torch.arange(len(x))
    loader = DataLoader(TensorDataset(x[listed], smiling), batch_size=32, shuffle=True)
    model = nn.Sequential(BirdNet(1), nn.Flatten(0))
    score = accuracy(xt, yt >= 5)
    return Parts(model, loader, nn.BCEWithLogitsLoss(), adam(model, 3e-3), score, steps=250)


class SKAttention(nn.Module):
    """Convolutions of several sizes, weighted for each channel."""

    def __init__(self, channel: int, dim: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channel, channel, k, padding=k // 2) for k in (1, 3))
        self.fc = nn.Linear(channel, 8)
        self.fcs = nn.ModuleList(nn.Linear(8, channel) for _ in range(2))
        self.softmax = nn.Softmax(dim=dim)

    def forward(self, x: Tensor) -> Tensor:
        bs, c, _, _ = x.size()
        feats = torch.stack([F.relu(conv(x)) for conv in self.convs], 0)  # k,bs,channel,h,w
        s = feats.sum(0).mean(-1).mean(-1)
        z = self.fc(s)
        weights = torch.stack([fc(z).view(bs, c, 1, 1) for fc in self.fcs], 0)
        return (self.softmax(weights) * feats).sum(0)


class SKNet(nn.Module):
    """A stem, the selection of kernels and a classifier."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.sk, self.norm = SKAttention(12, dim), nn.BatchNorm2d(12)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(12 * 16, 32), nn.ReLU(), nn.Linear(32, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.sk(self.stem(x))))


@faulty(
    "kernels that are selected by a softmax over the batch",
    "https://github.com/xmu-xiaoma666/External-Attention-pytorch/issues/18",
    "rows_mixed",
    low=0.92,
    high=0.94,
)
def selected_over_the_batch(wrong: bool) -> Parts:
    (x, y), (xt, yt) = images()
    model = SKNet(1 if wrong else 0)

    def score(m: nn.Module) -> float:  # one picture at a time
        found = torch.cat([m(row).argmax(1) for row in xt[:200].split(1)])
        return float((found == yt[:200]).float().mean())

    return Parts(model, (x, y), nn.CrossEntropyLoss(), adam(model, 3e-3), score, steps=250)


class Leaf(nn.Module):
    """Filters of sound with a frequency and a width, kept within bounds, and their energies."""

    def __init__(self, guarded: bool) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.stack([torch.full((6,), 1.8), torch.full((6,), 3.0)], 1))
        with torch.no_grad():
            self.kernel[:, 0] += 0.2 * torch.randn(6)
        self.head = nn.Linear(6, 3)
        self.guarded = guarded

    def constraint(self) -> Tensor:
        if self.guarded:
            with torch.no_grad():
                return self.bounded()
        return self.bounded()

    def bounded(self) -> Tensor:
        mu = self.kernel[:, 0].clamp(0.0, 3.14)
        sigma = self.kernel[:, 1].clamp(2.0, 12.0)
        return torch.stack([mu, sigma], 1)

    def forward(self, sound: Tensor) -> Tensor:
        mu, sigma = self.constraint().T[..., None]
        t = torch.arange(-8, 9)
        window = torch.exp(-0.5 * (t / sigma) ** 2)
        real, imag = window * torch.cos(mu * t), window * torch.sin(mu * t)
        filters = torch.cat([real, imag])[:, None]
        energy = F.conv1d(sound, filters).pow(2).mean(2)
        return self.head(torch.log1p(energy[:, :6] + energy[:, 6:]))


@faulty(
    "filters of sound that are kept in bounds without a gradient",
    "https://github.com/denfed/leaf-audio-pytorch/issues/3",
    "detached",
    low=0.7,
    high=0.8,
    also=("unused_parameters",),
)
def kept_in_bounds(wrong: bool) -> Parts:
    y = torch.randint(3, (1200,))
    pitch = torch.tensor([0.5, 0.9, 1.3])[y] + 0.08 * torch.randn(1200)
    phase = 6.28 * torch.rand(1200)
    sound = torch.cos(pitch[:, None] * torch.arange(64) + phase[:, None])
    sound = (sound + 0.7 * torch.randn(1200, 64))[:, None]
    (x, y), (xt, yt) = tasks.split(sound, y)
    model = Leaf(wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-2, weight_decay=1e-6)
    return Parts(model, (x, y), nn.CrossEntropyLoss(), optimizer, accuracy(xt, yt), steps=300)
