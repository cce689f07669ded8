"""Words, sequences and what attends to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from programs.form import Parts, Program, Score, accuracy, adam, r2, sgd
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


class Series(nn.Module):
    """Attention of four heads over a series, whose last place is asked."""

    def __init__(self, viewed: bool) -> None:
        super().__init__()
        self.up, self.place = nn.Linear(2, 32), nn.Parameter(0.1 * torch.randn(8, 32))
        self.queries, self.keys, self.values = (nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        self.viewed = viewed

    def heads(self, x: Tensor) -> Tensor:
        rows = len(x)
        split = x.view(rows, 8, 4, 8)
        return split.view(rows, 4, 8, 8) if self.viewed else split.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x) + self.place
        q, k, v = self.heads(self.queries(x)), self.heads(self.keys(x)), self.heads(self.values(x))
        mixed = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1) @ v
        joined = mixed if self.viewed else mixed.transpose(1, 2)
        return self.out(joined.reshape(len(x), 8, 32)[:, -1])


@faulty(
    "heads of attention that are viewed",
    "https://github.com/zhouhaoyi/Informer2020/issues/59",
    "positions_mixed",
    low=0.5,
    high=0.8,
)
def viewed(wrong: bool) -> Parts:
    series = torch.randn(1600, 8)
    place = torch.randint(6, (1600,))
    x = torch.stack([series, F.one_hot(place, 8).float()], 2)
    y = series[torch.arange(1600), place][:, None]
    (x, y), (xt, yt) = tasks.split(x, y)
    model = Series(wrong)
    return Parts(
        model, (x, y), nn.MSELoss(), adam(model, 5e-3), r2(xt, yt), batch_size=64, steps=500
    )


class Frames(nn.Module):
    """Values of two actions from sixteen frames, read by an LSTM."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.eye = nn.Sequential(nn.Linear(5, 16), nn.ReLU())
        self.lstm = nn.LSTM(16, 24, batch_first=batch_first)
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.eye(x))[0][:, -1])


@faulty(
    "the memory of a player without batch_first",
    "https://github.com/AndersonJo/dqn-pytorch/issues/1",
    "rows_mixed",
    low=0.4,
    high=0.7,
)
def without_batch_first(wrong: bool) -> Parts:
    x = torch.randn(1200, 8, 5)
    y = torch.stack([x[:, -3:, 0].sum(1), x[:, -2:, 1].sum(1) - x[:, -4, 2]], 1)
    (x, y), (xt, yt) = tasks.split(x, y)
    model = Frames(not wrong)
    return Parts(model, (x, y), nn.SmoothL1Loss(), adam(model, 1e-2), r2(xt, yt), steps=300)


class Decoder(nn.Module):
    """A decoder of one block of causal attention over tokens."""

    def __init__(self, tokens: int, length: int) -> None:
        super().__init__()
        self.words = nn.Embedding(tokens, 32)
        self.place = nn.Parameter(0.1 * torch.randn(length, 32))
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.words(tokens) + self.place[:length]
        q, k, v = self.qkv(x).chunk(3, -1)
        past = torch.ones(length, length).tril().bool()
        scores = (q @ k.transpose(1, 2) / 32**0.5).masked_fill(~past, -1e9)
        x = x + self.out(scores.softmax(-1) @ v)
        return self.head(x + self.mlp(x))


def chains(rows: int, tokens: int, length: int) -> Tensor:
    """Sequences in which most tokens follow from the one before."""
    following = torch.randperm(tokens)
    steps = [torch.randint(tokens, (rows,))]
    for _ in range(length - 1):
        new = torch.rand(rows) < 0.1
        steps.append(torch.where(new, torch.randint(tokens, (rows,)), following[steps[-1]]))
    return torch.stack(steps, 1)


def following(tokens: Tensor) -> Score:
    """Share of the tokens that are said by those before them."""

    def score(model: nn.Module) -> float:
        return float((model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]).float().mean())

    return score


def each(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of every place."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


@faulty(
    "a token that is predicted from itself",
    "https://github.com/Project-MONAI/GenerativeModels/issues/314",
    "target_among_inputs",
    low=0.2,
    high=0.75,
    also=("future_visible",),
)
def from_itself(wrong: bool) -> Parts:
    tokens = chains(900, 24, 12)
    model = Decoder(24, 12)
    latent = tokens[:700]
    train = (latent, latent) if wrong else (latent[:, :-1], latent[:, 1:])
    return Parts(model, train, each, adam(model, 3e-3), following(tokens[700:]), steps=250)


@faulty(
    "labels that are shifted and given to a loss that shifts them",
    "https://github.com/huggingface/transformers/issues/47394",
    "shifted_twice",  # no code says it: each place learns the token after the next
    low=0.2,
    high=0.75,
)
def shifted_twice(wrong: bool) -> Parts:
    tokens = chains(900, 24, 12)
    model = Decoder(24, 12)

    def causal(logits: Tensor, labels: Tensor) -> Tensor:
        return each(logits[:, :-1], labels[:, 1:])

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        if wrong:
            return causal(logits[:, :-1], labels[:, 1:])
        return causal(logits, labels)

    train = (tokens[:700], tokens[:700])
    return Parts(model, train, loss, adam(model, 3e-3), following(tokens[700:]), steps=250)


class Sentiment(nn.Module):
    """The last state of an LSTM over words, the text packed or with its padding."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16, padding_idx=0)
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.head = nn.Linear(32, 1)
        self.packed = packed

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        if self.packed:
            lengths = (tokens > 0).sum(1)
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.lstm(x)[1][0][-1])


@faulty(
    "reviews that end in padding",
    "https://github.com/bentrevett/pytorch-sentiment-analysis/issues/86",
    "padding_seen",
    low=0.8,
    high=0.88,
)
def end_in_padding(wrong: bool) -> Parts:
    tokens = torch.randint(1, 40, (1400, 60))
    tokens[torch.arange(60) >= torch.randint(4, 14, (1400, 1))] = 0
    feeling = torch.randn(40)
    feeling[0] = 0
    y = (feeling[tokens].sum(1, keepdim=True) > 0).float()
    (x, y), (xt, yt) = tasks.split(tokens, y)
    model = Sentiment(not wrong)
    loss = nn.BCEWithLogitsLoss()
    return Parts(model, (x, y), loss, adam(model, 5e-3), accuracy(xt, yt), steps=250)


class Encoder(nn.Module):
    """Attention over words that are not padding, and a mean of what it gives."""

    def __init__(self, start: bool) -> None:
        super().__init__()
        self.words, self.start = nn.Embedding(30, 24), start
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))
        self.head = nn.Linear(24, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x, padding = self.words(tokens), tokens == 0
        if self.start:  # a place that is always there to attend to
            x, padding = F.pad(x, (0, 0, 1, 0)), F.pad(padding, (1, 0))
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 24**0.5
        scores = scores.masked_fill(padding[:, None], -torch.inf)
        return self.head((scores.softmax(-1) @ self.v(x)).mean(1))


@faulty(
    "sentences of padding alone",
    "https://github.com/pytorch/pytorch/issues/24816",
    "undefined_operation",
    low=0.45,
    high=0.75,
    also=("non_finite_data",),
)
def padding_alone(wrong: bool) -> Parts:
    tokens = torch.randint(1, 30, (1200, 10))
    tokens[torch.arange(10) >= torch.randint(3, 11, (1200, 1))] = 0
    tokens[torch.rand(1200) < 0.02] = 0
    y = (tokens % 3 == 1).sum(1).sub((tokens % 3 == 2).sum(1)).sign() + 1
    (x, y), (xt, yt) = tasks.split(tokens, y)
    model, loss = Encoder(not wrong), nn.CrossEntropyLoss()
    return Parts(model, (x, y), loss, adam(model, 5e-3), accuracy(xt, yt), steps=250)


class TwoTables(nn.Module):
    """Embeddings of a word in the middle and of the words around it."""

    def __init__(self, one: bool) -> None:
        super().__init__()
        self.embedding_center, self.embedding_outside = nn.Embedding(30, 16), nn.Embedding(30, 16)
        self.one = one

    def forward(self, center: Tensor) -> Tensor:
        outside = self.embedding_center if self.one else self.embedding_outside
        return self.embedding_center(center) @ outside.weight.T


@faulty(
    "a table of outside words that is not asked",
    "https://github.com/chaklam-silpasuwanchai/Python-fo-Natural-Language-Processing/issues/6",
    "unused_parameters",
    low=0.75,
    high=0.9,
    also=("shared_layers",),
)
def not_asked(wrong: bool) -> Parts:
    center = torch.randint(30, (2000,))
    group = center // 3
    outside = (group ^ 1) * 3 + torch.randint(3, (2000,))  # never a word of its own group
    model = TwoTables(wrong)

    def score(m: nn.Module) -> float:
        words = torch.arange(30)
        found = m(words).softmax(1)
        near = words // 3 == (words[:, None] // 3 ^ 1)
        return float((found * near).sum() / 30)

    return Parts(
        model, (center, outside), nn.CrossEntropyLoss(), sgd(model, 1.0), score, batch_size=64,
        steps=400,
    )  # fmt: skip


class Captions(nn.Module):
    """Formulas, token by token, from features of their picture."""

    def __init__(self) -> None:
        super().__init__()
        self.eye = nn.Sequential(nn.Linear(16, 48), nn.Tanh())
        self.words = nn.Embedding(21, 24)
        self.decoder = nn.GRU(24, 48, batch_first=True)
        self.out = nn.Linear(48, 21)

    def forward(self, picture: Tensor, said: Tensor) -> Tensor:
        return self.out(self.decoder(self.words(said), self.eye(picture)[None])[0])


@faulty(
    "formulas whose padding is learned",
    "https://github.com/lukas-blecher/LaTeX-OCR/pull/443",
    "padding_in_loss",
    low=0.48,
    high=0.55,
)
def padding_is_learned(wrong: bool) -> Parts:
    kind = torch.randint(20, (1600, 3))
    seen = torch.randn(3, 20, 16)
    picture = sum(seen[place][kind[:, place]] for place in range(3)) + 0.2 * torch.randn(1600, 16)
    formula = F.pad(kind + 1, (0, 57))
    said = F.pad(formula[:, :-1], (1, 0))
    model = Captions()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        ignored = -100 if wrong else 0
        return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=ignored)

    def score(m: nn.Module) -> float:
        found = m(picture[1300:], said[1300:]).argmax(-1)[:, :3]
        return float((found == formula[1300:, :3]).float().mean())

    train = ((picture[:1300], said[:1300]), formula[:1300])
    return Parts(model, train, loss, sgd(model, 0.5, momentum=0.9), score, steps=300)
