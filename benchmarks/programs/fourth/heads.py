"""What a network ends with, and the loss that reads it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.form import Parts, Program, accuracy, adam, r2, sgd
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


def recall(x: Tensor, y: Tensor):
    """Mean over the classes of the share of their rows that are found."""

    def score(model: nn.Module) -> float:
        found = model(x).argmax(1)
        return float(torch.stack([(found[y == c] == c).float().mean() for c in y.unique()]).mean())

    return score


@faulty(
    "a federated perceptron that ends in a softmax",
    "https://github.com/shaoxiongji/federated-learning/issues/9",
    "head_mismatch",
    low=0.75,
    high=0.85,
)
def federated(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    layers = [nn.Linear(64, 64), nn.Dropout(0.2), nn.ReLU(), nn.Linear(64, 10)]
    model = nn.Sequential(*layers, *([nn.Softmax(1)] if wrong else []))
    loss, optimizer = nn.CrossEntropyLoss(), sgd(model, 0.1, momentum=0.5)
    return Parts(model, (x, y), loss, optimizer, accuracy(xt, yt), batch_size=10, steps=300)


class Classifier(nn.Module):
    """Words, their mean, a layer as the pooler of BERT, and classes."""

    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(60, 24)
        self.pooler = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Dropout(0.1))
        self.head = nn.Linear(24, 5)
        self.softmax = softmax

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.pooler(self.words(tokens).mean(1)))
        return logits.softmax(1) if self.softmax else logits


def topics(rows: int, share: list[float], length: int = 12) -> tuple[Tensor, Tensor]:
    """Texts of 60 words and their topic; a third of the words belong to the topic."""
    y = torch.multinomial(torch.tensor(share), rows, replacement=True)
    common = torch.randint(len(share) * 8, 60, (rows, length))
    own = y[:, None] * 8 + torch.randint(8, (rows, length))
    return torch.where(torch.rand(rows, length) < 0.33, own, common), y


@faulty(
    "a softmax before the loss, and one class with most of the texts",
    "https://github.com/illiterate/BertClassifier/issues/2",
    "head_mismatch",
    low=0.77,
    high=0.8,
    also=("class_imbalance",),
)
def softmax_of_texts(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.split(*topics(2400, [0.55, 0.2, 0.12, 0.08, 0.05]))
    model = Classifier(wrong)
    loss = nn.CrossEntropyLoss()
    return Parts(model, (x, y), loss, adam(model, 2e-3), recall(xt, yt), steps=250)


class Examples(nn.Module):
    """The network of the MNIST example, small, with a last layer that is rectified."""

    def __init__(self, rectified: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
        self.fc1, self.fc2 = nn.Linear(64, 50), nn.Linear(50, 10)
        self.rectified = rectified

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x.view(-1, 1, 8, 8)))
        x = F.relu(F.max_pool2d(self.conv2(x), 2)).flatten(1)
        x = self.fc2(F.relu(self.fc1(x)))
        return (F.relu(x) if self.rectified else x).log_softmax(1)


@faulty(
    "a rectifier before the log_softmax",
    "https://github.com/pytorch/examples/pull/117",
    "head_mismatch",
    low=0.8,
    high=0.9,
    also=("dying_relu",),
)
def rectified_logits(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    model = Examples(wrong)
    optimizer = sgd(model, 0.1, momentum=0.9)
    return Parts(model, (x, y), nn.NLLLoss(), optimizer, accuracy(xt, yt), steps=250)


class Lanes(nn.Module):
    """Which of the lanes there are, from features of the picture."""

    def __init__(self, sigmoid: bool) -> None:
        super().__init__()
        self.fc9, self.fc10 = nn.Linear(64, 48), nn.Linear(48, 4)
        self.sigmoid = sigmoid

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc10(F.relu(self.fc9(x)))
        return torch.sigmoid(x) if self.sigmoid else x


@faulty(
    "the sigmoid of lanes, used twice",
    "https://github.com/Turoad/lanedet/issues/32",
    "head_mismatch",
    low=0.6,
    high=0.7,
)
def used_twice(wrong: bool) -> Parts:
    x = torch.randn(1600, 64)
    y = (x @ torch.randn(64, 4) / 8 + 0.3 * torch.randn(1600, 4) > 0.8).float()
    model = Lanes(wrong)

    def score(m: nn.Module) -> float:  # F1 of the lanes
        found = (m(x[1200:]) > (0.5 if wrong else 0)).float()
        both = (found * y[1200:]).sum()
        return float(2 * both / (found.sum() + y[1200:].sum()))

    train = (x[:1200], y[:1200])
    return Parts(model, train, nn.BCEWithLogitsLoss(), adam(model, 3e-3), score, steps=200)


class Chatbot(nn.Module):
    """An encoder of questions and a decoder that is told the answer word by word."""

    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(14, 24)
        self.encoder = nn.GRU(24, 48, batch_first=True)
        self.decoder = nn.GRU(24, 48, batch_first=True)
        self.out = nn.Linear(48, 14)
        self.softmax = softmax

    def forward(self, question: Tensor, said: Tensor) -> Tensor:
        state = self.encoder(self.words(question))[1]
        logits = self.out(self.decoder(self.words(said), state)[0])
        return logits.softmax(-1) if self.softmax else logits.log_softmax(-1)


@faulty(
    "a chatbot whose NLLLoss is given probabilities",
    "https://github.com/pytorch/tutorials/issues/663",
    "missing_log",
    low=0.65,
    high=0.8,
    also=("head_mismatch",),
)
def chatbot(wrong: bool) -> Parts:
    question = torch.randint(2, 14, (1600, 4))
    answer = question.flip(1)
    answer[torch.arange(4) >= torch.randint(2, 5, (1600, 1))] = 0
    said = F.pad(answer[:, :-1], (1, 0), value=1)
    model = Chatbot(wrong)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(output.flatten(0, 1), target.flatten(), ignore_index=0)

    def score(m: nn.Module) -> float:
        right = m(question[1300:], said[1300:]).argmax(-1) == answer[1300:]
        return float(right[answer[1300:] > 0].float().mean())

    train = ((question[:1300], said[:1300]), answer[:1300])
    return Parts(model, train, loss, adam(model, 5e-3), score, batch_size=64, steps=60)


class SkipGram(nn.Module):
    """Scores of a word's neighbours, the first one true and the others drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Embedding(30, 12), nn.Embedding(30, 12)

    def forward(self, word: Tensor, others: Tensor) -> Tensor:
        return (self.v(others) @ self.u(word)[:, :, None])[..., 0]


@faulty(
    "an objective of word2vec that SGD makes smaller",
    "https://github.com/fanglanting/skip-gram-pytorch/issues/4",
    "loss_upside_down",
    low=0.3,
    high=0.8,
)
def smaller(wrong: bool) -> Parts:
    word = torch.randint(30, (2400,))
    near = word // 6 * 6 + torch.randint(6, (2400,))
    others = torch.cat([near[:, None], torch.randint(30, (2400, 5))], 1)
    true = torch.zeros(2400, 6)
    true[:, 0] = 1
    model = SkipGram()

    def loss(scores: Tensor, true: Tensor) -> Tensor:
        likelihood = F.logsigmoid((2 * true - 1) * scores).sum(1).mean()
        return likelihood if wrong else -likelihood

    def score(m: nn.Module) -> float:  # a word of the same topic is nearer than one of another
        words = torch.arange(30)
        found = m(words, words.expand(30, 30)).softmax(1)
        return float(found[words[:, None] // 6 == words // 6].sum() / 30)

    train = ((word, others), true)
    return Parts(model, train, loss, adam(model, 2e-2), score, batch_size=64, steps=300)


@faulty(
    "labels in a column and logits that were squeezed",
    "https://github.com/deepset-ai/FARM/issues/229",
    "broadcast_loss",
    low=0.2,
    high=0.7,
)
def squeezed(wrong: bool) -> Parts:
    tokens = torch.randint(40, (1600, 10))
    value = torch.randn(40)
    grade = value[tokens].mean(1, keepdim=True) * 3
    words = nn.Sequential(nn.EmbeddingBag(40, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    model = nn.Sequential(words, nn.Flatten(0)) if wrong else words
    (x, y), (xt, yt) = tasks.split(tokens, grade)
    return Parts(model, (x, y), nn.MSELoss(), adam(model, 1e-2), r2(xt, yt), steps=250)


@faulty(
    "normalised pixels and a decoder that ends in a sigmoid",
    "https://github.com/mikesj-public/convolutional_autoencoder/pull/9",
    "target_out_of_range",
    low=0.4,
    high=0.55,
    also=("head_mismatch",),
)
def normalised_pixels(wrong: bool) -> Parts:
    (x, _), (xt, _) = tasks.digits()
    if wrong:
        mean, deviation = x.mean(), x.std()
        x, xt = (x - mean) / deviation, (xt - mean) / deviation
    model = nn.Sequential(
        nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 12), nn.Linear(12, 48), nn.ReLU(),
        nn.Linear(48, 64), nn.Sigmoid(),
    )  # fmt: skip
    return Parts(model, (x, x), nn.MSELoss(), adam(model, 3e-3), r2(xt, xt), steps=300)


class Autoencoder(nn.Module):
    """A variational autoencoder of pictures of 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 64), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.encoder(x).chunk(2, 1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return self.decoder(mean + noise * (logvar / 2).exp()), mean, logvar


@faulty(
    "a reconstruction that is a mean over the pixels",
    "https://github.com/AppliedDataSciencePartners/WorldModels/issues/12",
    "posterior_collapse",
    low=0.15,
    high=0.3,
)
def mean_over_pixels(wrong: bool) -> Parts:
    (x, _), (xt, _) = tasks.digits()
    model = Autoencoder()

    def loss(output: tuple[Tensor, Tensor, Tensor], picture: Tensor) -> Tensor:
        made, mean, logvar = output
        error = (made - picture).square()
        kl = -0.5 * (1 + logvar - mean.square() - logvar.exp())
        if wrong:
            return 5 * error.mean() + kl.mean()
        return 5 * error.sum(1).mean() + kl.sum(1).mean()

    def score(m: nn.Module) -> float:
        error = (m(xt)[0] - xt).square().mean() / (xt - xt.mean(0)).square().mean()
        return max(-1.0, 1 - float(error))

    return Parts(model, (x, x), loss, adam(model, 5e-3), score, steps=300)
