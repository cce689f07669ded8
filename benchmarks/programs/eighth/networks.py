"""What a network does not see of its inputs, or cannot say."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.form import Parts, Program, accuracy, adam, r2
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


class BothWays(nn.Module):
    """A recurrence in both directions, read at one end or at both."""

    def __init__(self, at_one_end: bool) -> None:
        super().__init__()
        self.at_one_end = at_one_end
        self.words = nn.Embedding(12, 16)
        self.memory = nn.RNN(16, 24, batch_first=True, bidirectional=True)
        self.head = nn.Linear(48, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        steps, last = self.memory(self.words(tokens))
        return self.head(steps[:, -1] if self.at_one_end else torch.cat([last[0], last[1]], 1))


@faulty(
    "a way back of which the first step alone is read",
    "https://github.com/yunjey/pytorch-tutorial/issues/149",
    "first_step_of_the_way_back",
    low=0.6,
    high=0.9,
    also=("vanishing_gradient", "inputs_ignored"),
)
def first_step_alone(wrong: bool) -> Parts:
    tokens = torch.randint(12, (800, 40))
    kind = tokens[:, 0] % 4
    model = BothWays(wrong)
    score = accuracy(tokens[600:], kind[600:])
    data = (tokens[:600], kind[:600])
    return Parts(model, data, nn.CrossEntropyLoss(), adam(model, 3e-3), score, steps=300)


@faulty(
    "a place that is asked of a mean over all places",
    "https://arxiv.org/abs/1807.03247",
    "places_averaged",
    low=0.5,
    high=0.8,
    also=("no_positions", "inputs_ignored", "underfitting"),
)
def mean_over_all_places(wrong: bool) -> Parts:
    place = torch.randint(2, 10, (700, 2))
    pictures = torch.zeros(700, 1, 12, 12)
    for k, (row, column) in enumerate(place.tolist()):
        pictures[k, 0, row - 1 : row + 2, column - 1 : column + 2] = 1.0
    pictures = pictures + 0.1 * torch.randn_like(pictures)
    where = (place.float() - 5.5) / 2.3
    body = [
        nn.Conv2d(1, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular"), nn.ReLU(),
    ]  # fmt: skip
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)]
    if not wrong:
        head = [nn.AvgPool2d(3), nn.Flatten(), nn.Linear(256, 2)]
    net = nn.Sequential(*body, *head)
    data = (pictures[:500], where[:500])
    score = r2(pictures[500:], where[500:])
    return Parts(net, data, nn.MSELoss(), adam(net, 3e-3), score, steps=300)


@faulty(
    "shops by their number",
    "https://datascience.stackexchange.com/questions/9443/",
    "categories_as_numbers",
    low=0.5,
    high=0.75,
    also=("unscaled_inputs",),
)
def by_their_number(wrong: bool) -> Parts:
    shop = torch.randint(40, (1200,))
    price = torch.randn(1200, 3)
    level = 1.5 * torch.randn(40)
    sold = (level[shop] + 0.4 * price[:, 0] + 0.1 * torch.randn(1200))[:, None]
    column = ((shop.float() - 19.5) / 11.5)[:, None] if wrong else F.one_hot(shop, 40).float()
    x = torch.cat([column, price], 1)
    net = nn.Sequential(nn.Linear(x.shape[1], 32), nn.ReLU(), nn.Linear(32, 1))
    data = (x[:900], sold[:900])
    score = r2(x[900:], sold[900:])
    return Parts(net, data, nn.MSELoss(), adam(net, 1e-2), score, steps=300)


@faulty(
    "a line that has to pass through zero",
    "https://stackoverflow.com/questions/2480650/",
    "missing_bias",
    low=0.5,
    high=0.9,
    also=("unscaled_targets",),
)
def through_zero(wrong: bool) -> Parts:
    x = torch.randn(600, 5)
    y = 4 + x[:, :1] - 0.5 * x[:, 1:2] + 0.1 * torch.randn(600, 1)
    model = nn.Linear(5, 1, bias=not wrong)
    return Parts(
        model, (x[:450], y[:450]), nn.MSELoss(), adam(model, 3e-2), r2(x[450:], y[450:]), steps=400
    )


@faulty(
    "rows that all get the length one, and their length is asked",
    "https://stackoverflow.com/questions/39120942/",
    "scale_of_rows_removed",
    low=0.5,
    high=0.75,
    also=("inputs_ignored",),
)
def the_length_one(wrong: bool) -> Parts:
    raw = torch.randn(900, 8) * (0.3 + 2 * torch.rand(900, 1))
    volume = raw.norm(dim=1, keepdim=True)
    y = (volume - volume.mean()) / volume.std() + 0.1 * raw[:, :1]
    x = F.normalize(raw, dim=1) if wrong else (raw - raw.mean(0)) / raw.std(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))
    data = (x[:700], y[:700])
    return Parts(net, data, nn.MSELoss(), adam(net, 1e-2), r2(x[700:], y[700:]), steps=300)
