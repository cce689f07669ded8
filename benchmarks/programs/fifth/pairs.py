"""Pairs, triplets and views: networks that learn what is near to what."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.form import Parts, Program, Score, adam, sgd
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


def pairs(x: Tensor, y: Tensor, rows: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Pairs of pictures, half of one class, and 1 where they are of different ones."""
    left = torch.randint(len(x), (rows,))
    right = torch.randint(len(x), (rows,))
    for k in range(0, rows, 2):
        same = (y == y[left[k]]).nonzero()[:, 0]
        right[k] = same[torch.randint(len(same), (1,))]
    return (x[left], x[right]), (y[left] != y[right]).float()


class Siamese(nn.Module):
    """The distance of what one network makes of two pictures."""

    def __init__(self, squashed: bool) -> None:
        super().__init__()
        self.embedding_network = nn.Sequential(
            nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)
        )
        self.squashed = squashed

    def forward(self, tower_1: Tensor, tower_2: Tensor) -> Tensor:
        a, b = self.embedding_network(tower_1), self.embedding_network(tower_2)
        distance = ((a - b).square().sum(1) + 1e-7).sqrt()
        return torch.sigmoid(distance) if self.squashed else distance


def apart(inputs: tuple[Tensor, Tensor], y: Tensor) -> Score:
    """Share of the pairs whose distance is on the right side of one half of the margin."""

    def score(m: nn.Module) -> float:
        return float(((m(*inputs) > 0.5).float() == y).float().mean())

    return score


@faulty(
    "a distance of twins that ends in a sigmoid",
    "https://github.com/keras-team/keras-io/pull/2261",
    "head_mismatch",
    low=0.65,
    high=0.8,
    also=("saturated_activation",),
)
def ends_in_a_sigmoid(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    train, test = pairs(x, y, 2000), pairs(xt, yt, 600)
    siamese = Siamese(wrong)

    def contrastive(distance: Tensor, y: Tensor, margin: float = 1.0) -> Tensor:
        near = (1 - y) * distance.square()
        far = y * (margin - distance).clamp(min=0).square()
        return (near + far).mean()

    return Parts(
        siamese, train, contrastive, adam(siamese, 2e-3), apart(*test), batch_size=64, steps=300
    )


@faulty(
    "views that are normalised over the batch as well",
    "https://github.com/tensorflow/similarity/issues/237",
    "normalised_over_the_batch",  # no code says it: the cosines are all near to zero
    low=0.5,
    high=0.6,
    also=("rows_mixed", "slow_convergence", "underfitting"),
)
def over_the_batch(wrong: bool) -> Parts:
    (x, y), (xt, _) = tasks.digits()
    encoder = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 16)
    )

    def view(x: Tensor) -> Tensor:
        return (x + 0.15 * torch.randn_like(x)) * (torch.rand_like(x) > 0.2)

    def normalize(z: Tensor) -> Tensor:
        return z / z.norm() if wrong else z / z.norm(dim=-1, keepdim=True)

    def simclr(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        rows, _ = batch
        za, zb = (normalize(model(view(rows))) for _ in range(2))
        logits = za @ zb.T / 0.1
        return F.cross_entropy(logits, torch.arange(len(rows)))

    def score(m: nn.Module) -> float:  # share of the rows whose other view is among the 5 nearest
        a, b = (F.normalize(m(view(xt[:200]))) for _ in range(2))
        near = (a @ b.T).topk(5).indices
        return float((near == torch.arange(200)[:, None]).any(1).float().mean())

    optimizer = sgd(encoder, 0.2, momentum=0.9)
    return Parts(encoder, (x, y), simclr, optimizer, score, batch_size=64, steps=300)


class PatchNet(nn.Module):
    """Descriptors of two patches, and the square of their distance."""

    def __init__(self, gaussian: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
        for before, after in ((1, 8), (8, 16), (16, 16), (16, 16)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        self.convs = nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 16))
        for layer in self.convs:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                if gaussian:
                    nn.init.normal_(layer.weight, std=0.01)
                else:
                    nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.convs(a) - self.convs(b)).square().sum(1)


@faulty(
    "descriptors of patches whose weights start from a narrow Gaussian",
    "https://github.com/andyzeng/3dmatch-toolbox/issues/11",
    "poor_init",
    low=0.6,
    high=0.7,
    also=("vanishing_gradient", "inputs_ignored"),
)
def narrow_gaussian(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits(1 / 8)
    train, test = pairs(x - 0.6, y, 2000), pairs(xt - 0.6, yt, 600)
    model = PatchNet(wrong)

    def contrastive(squared: Tensor, y: Tensor) -> Tensor:
        return ((1 - y) * squared + y * (1 - squared).clamp(min=0)).mean()

    optimizer = sgd(model, 1e-2, momentum=0.9)
    score = apart(*test)
    return Parts(model, train, contrastive, optimizer, score, batch_size=32, steps=250)
