"""Shapes that broadcast, axes in the wrong place, and softmax over the wrong one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.form import Parts, Program, accuracy, adam, answer, r2
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


class Forecast(nn.Module):
    """A GRU over the past and a linear head on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.GRU(1, 24, batch_first=True)
        self.head = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0][:, -1])


@faulty(
    "forecast of one step",
    "https://github.com/jsboige/CoursIA/pull/926",
    "broadcast_loss",
    low=0.2,
    high=0.9,
)
def forecast(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.waves()
    model = Forecast()
    target = y if wrong else y[:, None]
    return Parts(model, (x, target), nn.MSELoss(), adam(model, 5e-3), r2(xt, yt), steps=250)


@faulty(
    "values of the taken actions",
    "https://github.com/hungtuchen/pytorch-dqn/issues/3",
    "broadcast_loss",
    low=0.3,
    high=0.8,
)
def q_learning(wrong: bool) -> Parts:
    states = torch.randn(1200, 6)
    worth = torch.stack([states[:, 0], states[:, 1] * states[:, 2], -states[:, 0]], 1)
    taken = torch.randint(3, (1200,))
    reward = worth[torch.arange(1200), taken] + 0.1 * torch.randn(1200)
    record = torch.stack([taken, reward], 1)
    model = nn.Sequential(
        nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )

    def loss(values: Tensor, record: Tensor) -> Tensor:
        chosen = values.gather(1, record[:, :1].long())
        return F.smooth_l1_loss(chosen, record[:, 1] if wrong else record[:, 1:])

    score = r2(states[900:], worth[900:])
    train = (states[:900], record[:900])
    return Parts(model, train, loss, adam(model, 3e-3), score, steps=400)


@faulty(
    "depth without its channel",
    "https://github.com/jiwei0921/CoNet/issues/3",
    "broadcast_loss",
    low=0.3,
    high=0.8,
)
def depth(wrong: bool) -> Parts:
    x, y = tasks.shapes()
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 1, 3, padding=1),
    )  # fmt: skip
    target = y[:450, 0] if wrong else y[:450]
    score = r2(x[450:], y[450:])
    return Parts(
        model, (x[:450], target), nn.SmoothL1Loss(), adam(model), score, batch_size=16, steps=150
    )


class Reader(nn.Module):
    """A convolution over a written line, and an LSTM over its columns."""

    def __init__(self, columns_first: bool) -> None:
        super().__init__()
        self.cnn = nn.Conv1d(4, 16, 3, padding=1)
        self.rnn = nn.LSTM(16, 24, batch_first=columns_first)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        columns = torch.relu(self.cnn(x)).permute(2, 0, 1)
        return self.head(self.rnn(columns)[0][-1])


@faulty(
    "columns first in a reader of text",
    "https://discuss.pytorch.org/t/lstm-change-batch-first-true-loss-does-not-decrease/62364",
    "rows_mixed",
    low=0.5,
    high=0.85,
)
def reader(wrong: bool) -> Parts:
    y = torch.randint(5, (900,))
    x = 0.3 * torch.randn(900, 4, 10)
    glyphs = torch.eye(5)[:, :4] - 0.5
    glyphs = 3 * glyphs / glyphs.norm(dim=1, keepdim=True)
    x[torch.arange(900), :, torch.randint(0, 8, (900,))] += glyphs[y]
    model = Reader(columns_first=wrong)
    (xs, ys), (xt, yt) = tasks.split(x, y)
    loss = nn.CrossEntropyLoss()
    return Parts(model, (xs, ys), loss, adam(model), accuracy(xt, yt), steps=400)


class Rows(nn.Module):
    """A transformer over the fields of a table's row."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.fields = nn.Parameter(0.3 * torch.randn(6, 16))
        self.scale = nn.Parameter(0.3 * torch.randn(6, 16))
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.fields + x[..., None] * self.scale).mean(1))


@faulty(
    "transformer of a table",
    "https://github.com/IBM/TabFormer/pull/14",
    "rows_mixed",
    low=0.75,
    high=0.83,
)
def table(wrong: bool) -> Parts:
    x = torch.randn(1200, 6)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] * x[:, 3] > 0).long()
    (xs, ys), (xt, yt) = tasks.split(x, y)
    model = Rows(batch_first=not wrong)
    loss = nn.CrossEntropyLoss()
    return Parts(model, (xs, ys), loss, adam(model, 3e-3), accuracy(xt, yt), steps=700)


class Sentence(nn.Module):
    """A bidirectional GRU whose two last states are laid side by side."""

    def __init__(self, viewed: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.encoder = nn.GRU(12, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 4)
        self.viewed = viewed

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.encoder(self.embed(tokens))[1]
        if self.viewed:
            return self.head(hidden.view(len(tokens), -1))
        return self.head(torch.cat([hidden[0], hidden[1]], 1))


@faulty(
    "two directions viewed together",
    "https://github.com/timbmg/Sentence-VAE/issues/15",
    "rows_mixed",
    low=0.6,
    high=0.9,
)
def sentence(wrong: bool) -> Parts:
    y = torch.randint(4, (900,))
    tokens = torch.randint(4, 20, (900, 9))
    place = torch.randint(0, 9, (900,))
    tokens[torch.arange(900), place] = y
    (xs, ys), (xt, yt) = tasks.split(tokens, y)
    model = Sentence(wrong)
    loss = nn.CrossEntropyLoss()
    return Parts(model, (xs, ys), loss, adam(model, 5e-3), accuracy(xt, yt), steps=400)


class Separation(nn.Module):
    """A spectrogram (batch, time, frequency), 2-D convolutions, then a mask for each time."""

    def __init__(self, viewed: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.head = nn.Linear(8 * 6, 6)
        self.viewed = viewed

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.relu(self.conv(x[:, None]))  # batch, channels, time, frequency
        rows, _, time, _ = maps.shape
        if self.viewed:
            return self.head(maps.view(rows, time, -1))
        return self.head(maps.permute(0, 2, 1, 3).reshape(rows, time, -1))


@faulty(
    "mask of a spectrogram",
    "https://github.com/vitrioil/Speech-Separation/issues/4",
    "positions_mixed",
    low=0.35,
    high=0.6,
)
def separation(wrong: bool) -> Parts:
    voice = torch.randn(700, 12, 1) * torch.randn(700, 1, 6)
    y = (voice > 0.3).float()
    x = voice + 0.2 * torch.randn(700, 12, 6)
    (xs, ys), (xt, yt) = tasks.split(x, y)
    model = Separation(wrong)
    score = r2(xt, yt)
    return Parts(
        model, (xs, ys), nn.BCEWithLogitsLoss(), adam(model), lambda m: score(_probable(m)),
        steps=300,
    )  # fmt: skip


def _probable(model: nn.Module) -> nn.Module:
    return nn.Sequential(model, nn.Sigmoid())


class Heads(nn.Module):
    """Attention of two heads by hand; what the heads found is put side by side."""

    def __init__(self, spliced: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.mix = nn.Linear(16, 48)
        self.head = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
        self.spliced = spliced

    def forward(self, tokens: Tensor) -> Tensor:
        rows, size = tokens.shape
        parts = self.mix(self.embed(tokens)).view(rows, size, 3, 2, 8)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each: batch, heads, time, 8
        found = torch.softmax(query @ key.transpose(2, 3) / 8**0.5, -1) @ value
        if self.spliced:
            return self.head(found.reshape(rows, size, 16))
        return self.head(found.transpose(1, 2).reshape(rows, size, 16))


@faulty(
    "heads spliced into time",
    "https://github.com/meta-pytorch/opacus/pull/825",
    "positions_mixed",
    low=0.75,
    high=0.9,
)
def heads(wrong: bool) -> Parts:
    tokens = torch.randint(10, (1200, 8))
    target = tokens % 3 + 3 * (tokens == 0).any(1, keepdim=True)
    (xs, ys), (xt, yt) = tasks.split(tokens, target)
    model = Heads(wrong)
    return Parts(
        model, (xs, ys), lambda o, y: F.cross_entropy(o.transpose(1, 2), y), adam(model, 5e-3),
        lambda m: float((answer(m, xt).argmax(2) == yt).float().mean()), steps=500,
    )  # fmt: skip


class Pooling(nn.Module):
    """Words pooled by learned weights."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.rate = nn.Linear(16, 1)
        self.head = nn.Linear(16, 3)
        self.axis = axis

    def forward(self, tokens: Tensor) -> Tensor:
        words = self.embed(tokens)
        weights = torch.softmax(4 * self.rate(words), self.axis)
        return self.head((weights * words).sum(1))


@faulty(
    "attention over the batch",
    "https://github.com/PetrochukM/PyTorch-NLP/issues/2",
    "rows_mixed",
    low=0.8,
    high=0.9,
)
def pooling(wrong: bool) -> Parts:
    y = torch.randint(3, (900,))
    tokens = torch.randint(3, 30, (900, 24))
    tokens[torch.arange(900), torch.randint(0, 24, (900,))] = y
    (xs, ys), (xt, yt) = tasks.split(tokens, y)
    model = Pooling(0 if wrong else 1)
    one_by_one = accuracy(xt, yt)

    def score(m: nn.Module) -> float:  # sentences come alone when the model is used
        found = torch.cat([m(row[None]) for row in xt])
        return float((found.argmax(1) == yt).float().mean()) if wrong else one_by_one(m)

    return Parts(model, (xs, ys), nn.CrossEntropyLoss(), adam(model), score, steps=300)


class Translator(nn.Module):
    """A bidirectional encoder whose two last states, combined, start the decoder."""

    def __init__(self, viewed: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 12)
        self.encoder = nn.GRU(12, 16, batch_first=True, bidirectional=True)
        self.decoder = nn.GRU(12, 32, batch_first=True)
        self.head = nn.Linear(32, 6)
        self.viewed = viewed

    def forward(self, source: Tensor, shifted: Tensor) -> Tensor:
        states = self.encoder(self.embed(source))[1]
        if self.viewed:
            state = states.view(1, len(source), -1)
        else:
            state = states.transpose(0, 1).reshape(1, len(source), -1)
        return self.head(self.decoder(self.embed(shifted), state)[0])


@faulty(
    "directions of a translator",
    "https://github.com/facebookresearch/fairseq/issues/239",
    "rows_mixed",
    low=0.5,
    high=0.85,
)
def translator(wrong: bool) -> Parts:
    source = torch.randint(1, 6, (900, 4))
    target = source.flip(1)
    shifted = F.pad(target[:, :-1], (1, 0))
    model = Translator(wrong)
    test = (source[700:], shifted[700:])

    def score(m: nn.Module) -> float:
        return float((m(*test).argmax(2) == target[700:]).float().mean())

    return Parts(
        model, ((source[:700], shifted[:700]), target[:700]),
        lambda o, y: F.cross_entropy(o.transpose(1, 2), y), adam(model), score, steps=500,
    )  # fmt: skip
