"""Texts and other sequences, distances of rows, and rows that are parted for a validation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.form import Parts, Program, Score, accuracy, adam
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


def each_token(scores: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of every position."""
    return F.cross_entropy(scores.flatten(0, 1), target.flatten())


def right_tokens(x: Tensor, y: Tensor) -> Score:
    """Share of positions that are right."""

    def score(m: nn.Module) -> float:
        return float((m(x).argmax(-1) == y).float().mean())

    return score


class CommentNet(nn.Module):
    """Convolutions over a comment, the mean of what they find, and a layer for each label."""

    def __init__(self, activation: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.conv = nn.Conv1d(16, 32, 2)
        self.out = nn.Linear(32, 3)
        self.activation = activation

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv(self.embedding(ids).transpose(1, 2))
        return self.out((torch.sigmoid(h) if self.activation else h).mean(2))


@faulty(
    "comments under a convolution without an activation",
    "https://github.com/keras-team/keras/issues/1597",
    "no_nonlinearity",
    low=0.72,
    high=0.78,
    also=("underfitting",),
)
def without_an_activation(wrong: bool) -> Parts:
    ids = torch.randint(12, (1600, 12))
    pair = ids[:, :-1] % 3 == ids[:, 1:] % 3  # two words that go together
    wide = (ids[:, :-1] // 3 == ids[:, 1:] // 3).sum(1)
    labels = torch.stack([pair.sum(1) > 3, wide > 2, ids[:, :-1].lt(6).sum(1) > 5], 1).float()
    (x, y), (xt, yt) = tasks.split(ids, labels)
    net = CommentNet(activation=not wrong)

    def score(m: nn.Module) -> float:
        return float(((m(xt) > 0) == (yt > 0.5)).float().mean())

    loss = nn.BCEWithLogitsLoss()
    return Parts(net, (x, y), loss, adam(net, 2e-2), score, steps=600)


class Block(nn.Module):
    """Causal attention and a perceptron, each with a norm in front and a way past."""

    bias: Tensor

    def __init__(self, dim: int, length: int, masked_bias: float, norm: bool = True) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(dim) if norm else nn.Identity() for _ in range(2))
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.register_buffer("bias", torch.ones(length, length).tril().bool())
        self.masked_bias = masked_bias

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(self.ln_1(x)).chunk(3, -1)
        attn_weights = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        length = x.shape[1]
        attn_weights = attn_weights.masked_fill(~self.bias[:length, :length], self.masked_bias)
        x = x + self.c_proj(attn_weights.softmax(-1) @ v)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Tokens, places, blocks and the score of the token that follows."""

    def __init__(self, vocab: int, length: int, masked_bias=float("-inf"), norm=True) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, 32), nn.Parameter(0.1 * torch.randn(length, 32))
        self.h = nn.Sequential(*(Block(32, length, masked_bias, norm) for _ in range(2)))
        self.lm_head = nn.Linear(32, vocab)

    def forward(self, idx: Tensor) -> Tensor:
        return self.lm_head(self.h(self.wte(idx) + self.wpe[: idx.shape[1]]))


def sentences(rows: int, chain: Tensor, length: int = 13) -> Tensor:
    """Words that follow one another as a table of chances says."""
    words = [torch.randint(len(chain), (rows,))]
    for _ in range(length - 1):
        words.append(torch.multinomial(chain[words[-1]], 1)[:, 0])
    return torch.stack(words, 1)


@faulty(
    "a small GPT whose steps are far too long",
    "https://github.com/karpathy/nanoGPT/issues/136",
    "exploding_gradient",
    low=0.15,
    high=0.3,
    also=("oscillating_loss",),
)
def far_too_long(wrong: bool) -> Parts:
    data = sentences(900, (2.5 * torch.randn(16, 16)).softmax(1))
    train, valid = data[:700], data[700:]
    model = GPT(16, 12, norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=6.0 if wrong else 0.1, momentum=0.9)
    score = right_tokens(valid[:, :-1], valid[:, 1:])
    return Parts(model, (train[:, :-1], train[:, 1:]), each_token, optimizer, score, steps=200)


@faulty(
    "couplets of which there are too few for a GPT",
    "https://github.com/codetiger/ThiruvalluvarGPT/issues/4",
    "overfitting",
    low=0.05,
    high=0.2,
)
def too_few_for_a_gpt(wrong: bool) -> Parts:
    data = sentences(2600, (1.6 * torch.randn(16, 16)).softmax(1))
    few = data[: 60 if wrong else 2000]
    valid, asked = data[2000:2200], data[2200:]
    model = GPT(16, 12)

    def score(m: nn.Module) -> float:
        loss = float(each_token(m(asked[:, :-1]), asked[:, 1:]))
        return max(-1.0, 1 - loss / 2.7726)

    held_out = (valid[:, :-1], valid[:, 1:])
    train = (few[:, :-1], few[:, 1:])
    return Parts(model, train, each_token, adam(model, 4e-3), score, held_out, steps=200)


@faulty(
    "scores of what is to come that are masked by a number, and not low enough",
    "https://github.com/karpathy/minGPT/issues/75",
    "future_visible",
    low=0.45,
    high=0.5,
)
def not_low_enough(wrong: bool) -> Parts:
    data = sentences(900, (2.5 * torch.randn(16, 16)).softmax(1))
    train, asked = data[:700], data[700:]
    model = GPT(16, 12, masked_bias=-1.0 if wrong else float("-inf"))

    def score(m: nn.Module) -> float:  # the next word, where only what is before is there
        prompts = asked[:, :6]
        return float((m(prompts)[:, -1].argmax(-1) == asked[:, 6]).float().mean())

    pair = (train[:, :-1], train[:, 1:])
    return Parts(model, pair, each_token, adam(model, 3e-3), score, steps=400)


class Bert(nn.Module):
    """Layers with their norms behind, and a class of the first token."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(30, 48), nn.Parameter(torch.randn(10, 48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, 0.0, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.classifier = nn.Linear(48, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.classifier(self.layers(self.tok(input_ids) + self.pos)[:, 0])


@faulty(
    "a BERT whose learning rate must be reduced",
    "https://github.com/graykode/nlp-tutorial/issues/77",
    "oscillating_loss",
    low=0.6,
    high=0.7,
    also=("exploding_gradient",),
)
def must_be_reduced(wrong: bool) -> Parts:
    input_ids = torch.randint(30, (1200, 10))
    topic = torch.randint(4, (30,))
    label = F.one_hot(topic[input_ids], 4).sum(1).add(0.1 * torch.rand(1200, 4)).argmax(1)
    (x, y), (xt, yt) = tasks.split(input_ids, label)
    model = Bert(5)
    optimizer = adam(model, 1e-2 if wrong else 5e-4)
    loss, score = nn.CrossEntropyLoss(), accuracy(xt, yt)
    return Parts(model, (x, y), loss, optimizer, score, steps=300)


class Signals(nn.Module):
    """A transformer from one signal to another; its decoder may be given nothing but zeros."""

    def __init__(self, zeros: bool) -> None:
        super().__init__()
        self.src_in, self.tgt_in = nn.Linear(4, 32), nn.Linear(4, 32)
        self.place = nn.Parameter(0.5 * torch.randn(12, 32))
        self.transformer = nn.Transformer(32, 2, 1, 1, 64, 0.0, batch_first=True)
        self.out = nn.Linear(32, 4)
        self.zeros = zeros

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        tgt = self.tgt_in(torch.zeros_like(before) if self.zeros else before)
        if not self.zeros:
            tgt = tgt + self.place
        mask = nn.Transformer.generate_square_subsequent_mask(12)
        return self.out(self.transformer(self.src_in(x) + self.place, tgt, tgt_mask=mask))


@faulty(
    "a decoder that is given zeros in every place",
    "https://openillumi.com/en/en-pytorch-transformer-multidim-output-same-fix",
    "decoder_given_zeros",  # no code says it: all positions of the answer begin as one
    low=0.4,
    high=0.7,
    also=("inputs_ignored", "no_positions", "constant_inputs"),
)
def zeros_in_every_place(wrong: bool) -> Parts:
    time = torch.arange(12.0)
    pace, phase = 0.3 + 0.5 * torch.rand(900, 1, 4), 6.3 * torch.rand(900, 1, 4)
    x = torch.sin(pace * time[:, None] + phase)
    y = x.flip(2).cumsum(1) / 3
    before = torch.cat([torch.zeros(900, 1, 4), y[:, :-1]], 1)
    model = Signals(zeros=wrong)

    def score(m: nn.Module) -> float:  # of the course of each signal about its mean
        said, true = m(x[700:], before[700:]), y[700:]
        said, true = said - said.mean(1, keepdim=True), true - true.mean(1, keepdim=True)
        return max(-1.0, 1 - float((said - true).square().mean() / true.square().mean()))

    pair = ((x[:700], before[:700]), y[:700])
    return Parts(model, pair, nn.MSELoss(), adam(model, 2e-3), score, steps=300)


@faulty(
    "clips of sound whose texts are the names of their files",
    "https://github.com/OpenNMT/OpenNMT-py/issues/1428",
    "unrelated_labels",
    low=0.4,
    high=0.7,
    also=("constant_targets",),
)
def names_of_their_files(wrong: bool) -> Parts:
    characters = "abcdefghijklmnopqrstuvwxyz0123456789_./ "
    spoken = torch.randint(26, (900, 12))
    sound = 1.5 * torch.randn(26, 10)[spoken] + 0.5 * torch.randn(900, 12, 10)
    names = [f"wavs/{k:03d}.wav" for k in torch.randperm(900).tolist()]
    named = torch.tensor([[characters.index(c) for c in name] for name in names])
    text = named if wrong else spoken
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, len(characters)))
    score = right_tokens(sound[700:], spoken[700:])
    train = (sound[:700], text[:700])
    return Parts(model, train, each_token, adam(model, 5e-3), score, steps=300)


def batch_hard(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Triplets of the farthest row of one class and the nearest of another, margin 0.5."""
    apart = (embeddings[:, None] - embeddings[None]).square().sum(2).clamp(min=1e-12).sqrt()
    same = labels[:, None] == labels[None]
    hardest_positive = (apart * same).max(1).values
    hardest_negative = (apart + 1e6 * same).min(1).values
    return F.relu(hardest_positive - hardest_negative + 0.5).mean()


class Embedder(nn.Module):
    """Rows as points, on a sphere if they are normalised."""

    def __init__(self, l2: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 16)
        )
        self.l2 = l2

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.net(x), dim=1) if self.l2 else self.net(x)


@faulty(
    "embeddings that all fall into one point, where no length is set",
    "https://github.com/omoindrot/tensorflow-triplet-loss/issues/37",
    "embedding_collapse",
    low=0.4,
    high=0.7,
    also=("inputs_ignored", "oscillating_loss", "dying_relu"),
)
def into_one_point(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    x, xt = x + 0.25 * torch.randn_like(x), xt + 0.25 * torch.randn_like(xt)
    model = Embedder(l2=not wrong)

    def score(m: nn.Module) -> float:  # share of rows whose nearest row is of their class
        points, asked = m(x), m(xt)
        nearest = torch.cdist(asked, points).argmin(1)
        spread = points.std(0).norm() / (points.norm(dim=1).mean() + 1e-6)
        right = (y[nearest] == yt).float().mean()
        return float(right) if float(spread) > 1e-3 else 0.1

    return Parts(model, (x, y), batch_hard, adam(model, 4e-3), score, batch_size=64, steps=300)


@faulty(
    "indices that are parted before they are shuffled",
    "https://github.com/khanrc/pt.darts/issues/24",
    "valid_differs",
    low=0.3,
    high=0.8,
    also=("sorted_batches",),
)
def before_they_are_shuffled(wrong: bool) -> Parts:
    (x, y), _ = tasks.digits()
    in_folders = y.argsort()
    x, y = x[in_folders], y[in_folders]
    indices, split = torch.arange(len(y)), 900
    if not wrong:
        indices = torch.randperm(len(y))
    train, held_out = indices[:split], indices[split:]
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    score = accuracy(x[held_out], y[held_out])
    valid = (x[held_out], y[held_out])
    loss = nn.CrossEntropyLoss()
    return Parts(net, (x[train], y[train]), loss, adam(net, 3e-3), score, valid, steps=250)


@faulty(
    "two generators that prepare their pictures in two ways",
    "https://github.com/keras-team/keras/issues/12689",
    "valid_differs",
    low=0.75,
    high=0.9,
)
def in_two_ways(wrong: bool) -> Parts:
    kind = torch.randint(6, (1200,))
    clothes = 128 + 40 * torch.randn(6, 3, 5, 5)[kind] + 50 * torch.randn(1200, 3, 5, 5)
    (x, y), (xt, yt) = tasks.split(clothes.clamp(0, 255).round(), kind)

    def preprocess_input(x: Tensor) -> Tensor:
        mean = torch.tensor([103.939, 116.779, 123.68])
        return x.flip(1) - mean[:, None, None]

    rescale = 1.0 / 255
    prepared = preprocess_input(xt) if wrong else xt * rescale
    net = nn.Sequential(nn.Flatten(), nn.Linear(75, 64), nn.ReLU(), nn.Linear(64, 6))
    loss, score, valid = nn.CrossEntropyLoss(), accuracy(prepared, yt), (prepared, yt)
    return Parts(net, (x * rescale, y), loss, adam(net, 3e-3), score, valid, steps=250)


@faulty(
    "the first ten scans to train, all of them from one folder",
    "https://github.com/Project-MONAI/tutorials/issues/122",
    "constant_targets",
    low=0.55,
    high=0.8,
    also=("valid_differs",),
)
def all_of_them_from_one_folder(wrong: bool) -> Parts:
    (x, y), _ = tasks.digits()
    folders = torch.cat([(y == 3).nonzero()[:, 0], (y == 8).nonzero()[:, 0]])
    images, labels = x[folders], (y[folders] == 8).long()
    if not wrong:
        order = torch.randperm(len(images))
        images, labels = images[order], labels[order]
    train, valid = slice(0, 100), slice(-100, None)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
    score = accuracy(images[valid], labels[valid])
    held_out = (images[valid], labels[valid])
    loss = nn.CrossEntropyLoss()
    pair = (images[train], labels[train])
    return Parts(net, pair, loss, adam(net, 3e-3), score, held_out, batch_size=10, steps=150)


@faulty(
    "an autoencoder that gives back blanks for want of longer steps",
    "https://github.com/DmitryUlyanov/AGE/issues/2",
    "slow_convergence",
    low=0.35,
    high=0.6,
    also=("underfitting",),
)
def for_want_of_longer_steps(wrong: bool) -> Parts:
    (x, _), (xt, _) = tasks.digits()
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 12), nn.Linear(12, 64), nn.ReLU(),
        nn.Linear(64, 64),
    )  # fmt: skip

    def score(m: nn.Module) -> float:
        error = (m(xt) - xt).square().mean() / (xt - xt.mean(0)).square().mean()
        return max(-1.0, 1 - float(error))

    optimizer = adam(model, 2e-4 if wrong else 2e-3)
    return Parts(model, (x, x), nn.MSELoss(), optimizer, score, steps=200)
