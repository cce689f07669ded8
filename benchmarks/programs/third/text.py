"""Readers and writers of sequences: masks, shifts, alignments."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.form import Parts, Program, adam
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


def sentences(rows: int, length: int = 12, words: int = 20) -> tuple[Tensor, Tensor]:
    """Words 2 and up, ends of padding (0), and whether more words are below 11 than above."""
    size = torch.randint(3, length + 1, (rows, 1))
    tokens = torch.randint(2, words, (rows, length))
    tokens = tokens.masked_fill(torch.arange(length) >= size, 0)
    real = tokens > 0
    low = ((tokens < 11) & real).sum(1) * 2 > real.sum(1)
    return tokens, low.long()


class LabelAttention(nn.Module):
    """Questions of each class that look at the words."""

    def __init__(self, inverted: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 24)
        self.question = nn.Parameter(0.2 * torch.randn(2, 24))
        self.key, self.value = nn.Linear(24, 24), nn.Linear(24, 24)
        self.head = nn.Linear(24, 1)
        self.inverted = inverted

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        padding = tokens == 0
        # scaled_dot_product_attention takes True for what may be seen
        seen = padding if self.inverted else ~padding
        seen = seen | (seen.sum(1, keepdim=True) == 0)
        query = self.question.expand(len(x), -1, -1)
        mixed = F.scaled_dot_product_attention(query, self.key(x), self.value(x), seen[:, None])
        return self.head(mixed).squeeze(-1)


def right_class(x: Tensor, y: Tensor):
    def score(m: nn.Module) -> float:
        return float((m(x).argmax(1) == y).float().mean())

    return score


@faulty(
    "a mask of attention turned around",
    "https://github.com/InseeFrLab/torchTextClassifiers/pull/92",
    "padding_seen",
    low=0.7,
    high=0.8,
    also=("inputs_ignored",),
)
def turned_around(wrong: bool) -> Parts:
    tokens, label = sentences(1600)
    (xs, ys), (xt, yt) = tasks.split(tokens, label)
    model = LabelAttention(wrong)
    return Parts(
        model,
        (xs, ys),
        nn.CrossEntropyLoss(),
        adam(model, 5e-3),
        right_class(xt, yt),
        batch_size=64,
        steps=250,
    )


class Translator(nn.Module):
    """One layer of attention by hand over padded words, then the mean of the real ones."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 24)
        self.qkv = nn.Linear(24, 72)
        self.up, self.head = nn.Linear(24, 24), nn.Linear(24, 2)
        self.wrong = wrong

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.words(tokens)).chunk(3, -1)
        score = q @ k.transpose(1, 2) / 24**0.5
        real = tokens != 0
        # rows of the scores are queries, columns are keys
        mask = real.unsqueeze(2) if self.wrong else real.unsqueeze(1)
        weight = score.masked_fill(~mask, -10000).softmax(-1)
        return self.head(torch.relu(self.up((weight @ v)[:, 0])))


@faulty(
    "a padding mask for queries",
    "https://github.com/hyunwoongko/transformer/pull/40",
    "padding_seen",
    low=0.85,
    high=0.88,
)
def for_queries(wrong: bool) -> Parts:
    tokens, label = sentences(900, length=40)
    short = torch.rand(900) < 0.8
    tokens[short, 10:] = 0
    real = tokens > 0
    label = (((tokens < 11) & real).sum(1) * 2 > real.sum(1)).long()
    (xs, ys), (xt, yt) = tasks.split(tokens, label)
    model = Translator(wrong)
    return Parts(
        model,
        (xs, ys),
        nn.CrossEntropyLoss(),
        adam(model, 3e-3),
        right_class(F.pad(xt, (0, 120)), yt),  # beside longer sentences
        batch_size=32,
        steps=200,
    )


def chain(rows: int, length: int = 12, words: int = 9, sure: float = 0.9) -> Tensor:
    """Words of which each follows from the one before, in nine cases of ten or fewer."""
    follow = torch.randperm(words)
    tokens = torch.randint(words, (rows, length))
    for place in range(1, length):
        after = follow[tokens[:, place - 1]]
        tokens[:, place] = torch.where(torch.rand(rows) < sure, after, tokens[:, place])
    return tokens


class Writer(nn.Module):
    """A transformer of one layer that writes the next word."""

    def __init__(self, words: int, mask: str = "causal", length: int = 12) -> None:
        super().__init__()
        self.words = nn.Embedding(words, 32)
        self.places = nn.Parameter(0.02 * torch.randn(length, 32))
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.one, self.two = nn.LayerNorm(32), nn.LayerNorm(32)
        self.head = nn.Linear(32, words)
        self.mask = mask

    def forward(self, tokens: Tensor) -> Tensor:
        size = tokens.shape[1]
        x = self.words(tokens) + self.places[:size]
        q, k, v = self.qkv(self.one(x)).chunk(3, -1)
        score = q @ k.transpose(1, 2) / 32**0.5
        if self.mask == "ones":  # 1 for what may be seen, 0 for what may not: added
            score = score + torch.ones(size, size).tril()
        elif self.mask == "causal":
            score = score.masked_fill(~torch.ones(size, size).tril().bool(), -torch.inf)
        x = x + self.out(score.softmax(-1) @ v)
        return self.head(x + self.down(torch.relu(self.up(self.two(x)))))


def next_word(model: nn.Module, tokens: Tensor, place: int = 6) -> float:
    """Share of words that are foreseen from those before them."""
    said = model(tokens[:, :place])[:, -1].argmax(1)
    return float((said == tokens[:, place]).float().mean())


def spoken(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over all places."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


@faulty(
    "ones and zeros added to the scores",
    "https://github.com/HKUSTDial/flash-sparse-attention/issues/146",
    "future_visible",
    low=0.4,
    high=0.65,
)
def ones_and_zeros(wrong: bool) -> Parts:
    tokens = chain(900, sure=0.75)
    model = Writer(9, "ones" if wrong else "causal")
    return Parts(
        model,
        (tokens[:700, :-1], tokens[:700, 1:]),
        spoken,
        adam(model, 5e-3),
        lambda m: next_word(m, tokens[700:]),
        batch_size=32,
        steps=350,
    )


@faulty(
    "labels that nobody shifted",
    "https://github.com/huggingface/transformers/issues/27517",
    "target_among_inputs",
    low=0.3,
    high=0.8,
)
def nobody_shifted(wrong: bool) -> Parts:
    tokens = chain(900)
    model = Writer(9)
    train = (tokens[:700], tokens[:700]) if wrong else (tokens[:700, :-1], tokens[:700, 1:])
    return Parts(
        model,
        train,
        spoken,
        adam(model, 5e-3),
        lambda m: next_word(m, tokens[700:]),
        batch_size=32,
        steps=250,
    )


@faulty(
    "labels that were shifted twice",
    "https://github.com/huggingface/transformers/pull/37830",
    "shifted_twice",  # no code says it: the word after the next is learned, and well
    low=0.4,
    high=0.8,
)
def shifted_twice(wrong: bool) -> Parts:
    tokens = chain(900)
    model = Writer(9)

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        if wrong:
            output, labels = output[:, :-1], labels[:, 1:]
        return spoken(output[:, :-1], labels[:, 1:])

    return Parts(
        model,
        (tokens[:700], tokens[:700]),
        loss,
        adam(model, 5e-3),
        lambda m: next_word(m, tokens[700:]),
        batch_size=32,
        steps=250,
    )


class Listener(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 32, 3, padding=1)
        self.core = nn.GRU(32, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 6)

    def forward(self, sound: Tensor) -> Tensor:
        return self.head(self.core(torch.relu(self.conv(sound)).transpose(1, 2))[0])


@faulty(
    "an alignment of scores that are not logarithms",
    "https://github.com/gwx314/STARS/issues/9",
    "missing_log",
    low=0.65,
    high=0.85,
)
def alignment(wrong: bool) -> Parts:
    rows, words = 600, 4
    said = torch.randint(1, 6, (rows, words))
    frames = said.repeat_interleave(4, 1)  # 16 frames of four phonemes
    sound = F.one_hot(frames, 6).float().transpose(1, 2) + 0.4 * torch.randn(rows, 6, 16)
    model = Listener()

    def loss(output: Tensor, said: Tensor) -> Tensor:
        output = output.transpose(0, 1)
        if not wrong:
            output = output.log_softmax(-1)
        count = len(said)
        return F.ctc_loss(output, said, [16] * count, [words] * count, zero_infinity=True)

    def score(m: nn.Module) -> float:  # share of sequences of which most is heard
        found = m(sound[500:]).argmax(-1)
        right = 0.0
        for path, true in zip(found, said[500:], strict=True):
            heard = [int(w) for w in path.unique_consecutive() if w]
            right += (
                len(heard) == words
                and sum(a == b for a, b in zip(heard, true.tolist(), strict=True)) >= 3
            )
        return right / 100

    return Parts(
        model, (sound[:500], said[:500]), loss, adam(model, 1e-2), score, batch_size=32, steps=250
    )
