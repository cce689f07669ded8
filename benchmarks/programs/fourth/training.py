"""Steps, drawn weights and layers, and an agent that learns from what it did."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.form import Parts, Program, accuracy, adam, r2, sgd
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


class Texts(nn.Module):
    """A small encoder of texts, and a head for their classes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 32)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(32, 3)

    def encoded(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoded(tokens)[:, 0])


def reviews(rows: int) -> tuple[Tensor, Tensor]:
    """A sign of the start and ten words; the class is the kind of most of them."""
    tokens = torch.randint(39, (rows, 10))
    y = torch.stack([(tokens % 3 == c).sum(1) for c in range(3)], 1).argmax(1)
    return F.pad(tokens, (1, 0), value=39), y


def known(model: Texts) -> Texts:
    """The encoder after some steps at telling what text most of the words are of."""
    guess = nn.Linear(32, 3)
    optimizer = torch.optim.Adam([*model.parameters(), *guess.parameters()], lr=2e-3)
    for _ in range(150):
        kind = torch.randint(3, (32,))
        words = torch.where(torch.rand(32, 10) < 0.4, kind[:, None], torch.randint(3, (32, 10)))
        tokens = F.pad(3 * torch.randint(13, (32, 10)) + words, (1, 0), value=39)
        optimizer.zero_grad()
        F.cross_entropy(guess(model.encoded(tokens)[:, 0]), kind).backward()
        optimizer.step()
    return model


@faulty(
    "a learning rate of a hundredth for BERT",
    "https://github.com/huggingface/transformers/issues/735",
    "oscillating_loss",
    low=0.6,
    high=0.8,
    also=("exploding_gradient", "collapsed_attention", "saturated_activation"),
)
def hundredth(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.split(*reviews(1600))
    model = known(Texts())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-2 if wrong else 1e-3)
    return Parts(model, (x, y), nn.CrossEntropyLoss(), optimizer, accuracy(xt, yt), steps=250)


@faulty(
    "a new head that learns as slowly as the encoder",
    "https://github.com/ThilinaRajapakse/simpletransformers/issues/234",
    "slow_convergence",
    low=0.8,
    high=0.88,
    also=("underfitting",),
)
def slowly(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.split(*reviews(1600))
    model = known(Texts())
    head = list(model.head.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("head")]
    groups = [{"params": rest, "lr": 4e-5}, {"params": head, "lr": 4e-5 if wrong else 1e-2}]
    optimizer = torch.optim.AdamW(groups)
    return Parts(model, (x, y), nn.CrossEntropyLoss(), optimizer, accuracy(xt, yt), steps=250)


@faulty(
    "triplets whose loss is the margin",
    "https://github.com/omoindrot/tensorflow-triplet-loss/issues/6",
    "oscillating_loss",
    low=0.5,
    high=0.8,
    also=("dying_relu", "saturated_activation", "inputs_ignored"),
)
def margin(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)
    )

    def loss(output: Tensor, label: Tensor) -> Tensor:  # the hardest of the batch
        apart = torch.cdist(output, output)
        same = label[:, None] == label
        farthest = (apart * same).max(1).values
        nearest = apart.masked_fill(same, torch.inf).min(1).values
        return F.relu(farthest - nearest + 0.5).mean()

    def score(m: nn.Module) -> float:  # whose mean is nearest
        known, asked = m(x), m(xt)
        means = torch.stack([known[y == c].mean(0) for c in range(10)])
        return float((torch.cdist(asked, means).argmin(1) == yt).float().mean())

    optimizer = adam(model, 0.1 if wrong else 1e-3)
    return Parts(model, (x, y), loss, optimizer, score, batch_size=64, steps=300)


@faulty(
    "five hidden layers of sigmoids",
    "https://github.com/phlippe/uvadlc_notebooks/issues/119",
    "vanishing_gradient",
    low=0.3,
    high=0.65,
)
def hidden_sigmoids(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    widths = [64, 64, 48, 48, 32, 32]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Sigmoid() if wrong else nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    loss, optimizer = nn.CrossEntropyLoss(), sgd(model, 0.05, momentum=0.9)
    return Parts(model, (x, y), loss, optimizer, accuracy(xt, yt), steps=600)


@faulty(
    "half of every map dropped, again and again",
    "https://github.com/rasbt/machine-learning-book/issues/191",
    "excessive_dropout",
    low=0.8,
    high=0.85,
)
def maps_dropped(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    drop = 0.5 if wrong else 0.15
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(drop), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(drop), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.Dropout(drop),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    loss = nn.CrossEntropyLoss()
    return Parts(model, (x, y), loss, adam(model, 2e-3), accuracy(xt, yt), steps=250)


@faulty(
    "a convolution whose loss stays at the logarithm of ten",
    "https://discuss.pytorch.org/t/cross-entropy-loss-is-not-decreasing/43814/16",
    "dying_relu",
    low=0.3,
    high=0.85,
    also=("oscillating_loss", "exploding_gradient"),
)
def logarithm_of_ten(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = adam(model, 0.3 if wrong else 3e-3)
    return Parts(model, (x, y), nn.CrossEntropyLoss(), optimizer, accuracy(xt, yt), steps=250)


@faulty(
    "exclusive or of two layers and nothing between them",
    "https://discuss.pytorch.org/t/"
    "unable-to-learn-xor-representation-using-2-layers-of-multi-layered-perceptron-mlp/13287/3",
    "no_nonlinearity",
    low=0.65,
    high=0.9,
)
def nothing_between(wrong: bool) -> Parts:
    x = torch.rand(800, 2).round()
    y = (x[:, :1] != x[:, 1:]).float()
    between = [] if wrong else [nn.ReLU()]
    model = nn.Sequential(nn.Linear(2, 8), *between, nn.Linear(8, 1), nn.Sigmoid())

    def score(m: nn.Module) -> float:
        return float(((m(x) > 0.5).float() == y).float().mean())

    return Parts(model, (x, y), nn.BCELoss(), adam(model, 3e-2), score, steps=250)


class Regression(nn.Module):
    """Three layers, of which two are made whenever they are needed."""

    def __init__(self, made: bool) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(6, 24), nn.Linear(24, 24)
        self.linear3 = nn.Linear(24, 1)
        self.made = made

    def forward(self, x: Tensor) -> Tensor:
        one = nn.Linear(6, 24) if self.made else self.linear1
        two = nn.Linear(24, 24) if self.made else self.linear2
        return self.linear3(two(one(x).clamp(min=0)).clamp(min=0))


@faulty(
    "layers of a regression made in its forward pass",
    "https://github.com/pytorch/pytorch/issues/1291",
    "layers_made_in_forward",
    low=0.2,
    high=0.7,
    also=("random_in_eval",),
)
def made_in_forward(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.surface(1200)
    model = Regression(wrong)
    return Parts(model, (x, y), nn.MSELoss(), adam(model, 5e-3), r2(xt, yt), steps=400)


def world(states: int = 8, gamma: float = 0.8) -> tuple[Tensor, Tensor, Tensor]:
    """Chances of the next state after each of two actions, rewards, and the true values."""
    chance = torch.randn(states, 2, states).mul(1.5).softmax(-1)
    reward = 2 * torch.randn(states)  # of the state that is reached
    value = torch.zeros(states, 2)
    for _ in range(100):
        value = chance @ (reward + gamma * value.max(1).values)
    return chance, reward, value


@faulty(
    "a target of Q that is pulled along",
    "https://github.com/datawhalechina/easy-rl/pull/117",
    "target_not_detached",  # no code says it: the gradient also moves what is aimed at
    low=0.8,
    high=0.9,
)
def pulled_along(wrong: bool) -> Parts:
    chance, reward, value = world()
    state, action = torch.randint(8, (6000,)), torch.randint(2, (6000,))
    after = torch.multinomial(chance[state, action], 1)[:, 0]
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 2))
    now, then = F.one_hot(state, 8).float(), F.one_hot(after, 8).float()

    def loss(model: nn.Module, batch: tuple[tuple[Tensor, Tensor], Tensor]) -> Tensor:
        (now, then), done = batch
        chosen = model(now).gather(1, done[:, :1].long())
        best = model(then).max(1, keepdim=True).values
        return F.mse_loss(chosen, done[:, 1:] + 0.8 * (best if wrong else best.detach()))

    done = torch.stack([action.float(), reward[after]], 1)
    score = r2(torch.eye(8), value)
    return Parts(
        model, ((now, then), done), loss, adam(model, 3e-3), score, batch_size=128, steps=1200
    )
