"""Layers that are missing, unknown, cut off, or on when they should be off."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.form import Parts, Program, accuracy, adam, r2
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)
CE = nn.CrossEntropyLoss()


@faulty(
    "layers without ReLU between them",
    "https://github.com/YujiaBao/ls/issues/1",
    "no_nonlinearity",
    low=0.6,
    high=0.9,
)
def linear_layers(wrong: bool) -> Parts:
    x = torch.randn(1200, 8)
    y = (x[:, :3].square().sum(1) > 2.4).long()
    (xs, ys), (xt, yt) = tasks.split(x, y)
    layers = [nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)]
    model = nn.Sequential(*(layers[::2] if wrong else layers))
    return Parts(model, (xs, ys), CE, adam(model, 3e-3), accuracy(xt, yt), steps=400)


@faulty(
    "convolutions without activation",
    "https://github.com/divamgupta/image-segmentation-keras/issues/136",
    "no_nonlinearity",
    low=0.4,
    high=0.75,
)
def linear_convolutions(wrong: bool) -> Parts:
    x = torch.randn(500, 1, 8, 8)
    y = F.avg_pool2d(x.square(), 3, 1, 1).sqrt() - 1  # how busy it is around each pixel
    (xs, ys), (xt, yt) = tasks.split(x, y)
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
              nn.ReLU(), nn.Conv2d(16, 1, 1)]  # fmt: skip
    model = nn.Sequential(*(layers[::2] if wrong else layers))
    return Parts(model, (xs, ys), nn.MSELoss(), adam(model, 5e-3), r2(xt, yt), steps=300)


class Filters(nn.Module):
    """Words through convolutions of three widths, the largest answer of each, a linear head."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 8)
        self.embed.weight.requires_grad_(False)
        convolutions = [nn.Conv1d(8, 2, width) for width in (2, 3, 4)]
        self.convolutions = convolutions if plain else nn.ModuleList(convolutions)
        self.head = nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        words = self.embed(tokens).transpose(1, 2)
        found = [torch.relu(c(words)).amax(2) for c in self.convolutions]
        return self.head(torch.cat(found, 1))


@faulty(
    "convolutions in a list",
    "https://github.com/pytorch/pytorch/issues/1053",
    "unregistered_parameters",
    low=0.85,
    high=0.95,
)
def filters(wrong: bool) -> Parts:
    y = torch.randint(2, (1200,))
    tokens = torch.randint(2, 24, (1200, 14))
    place = torch.randint(0, 13, (1200,))
    rows = torch.arange(1200)
    tokens[rows, place], tokens[rows, place + 1] = y, 1 - y  # the order of two words
    (xs, ys), (xt, yt) = tasks.split(tokens, y)
    model = Filters(wrong)
    engine = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return Parts(model, (xs, ys), CE, engine, accuracy(xt, yt), steps=500)


class Relations(nn.Module):
    """A weight matrix for each of three relations, kept in a dictionary."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        matrices = {f"r{k}": nn.Parameter(0.1 * torch.randn(10, 10)) for k in range(3)}
        self.matrices = matrices if plain else nn.ParameterDict(matrices)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, pair: Tensor) -> Tensor:
        left, right = pair[:, 0], pair[:, 1]
        scores = [((left @ self.matrices[f"r{k}"]) * right).sum(1) for k in range(3)]
        return torch.stack(scores, 1) + self.bias


@faulty(
    "parameters in a dictionary",
    "https://github.com/pytorch/pytorch/issues/632",
    "unregistered_parameters",
    low=0.55,
    high=0.85,
)
def relations(wrong: bool) -> Parts:
    pair = torch.randn(1600, 2, 10)
    true = torch.randn(3, 10, 10)
    y = torch.einsum("ni,kij,nj->nk", pair[:, 0], true, pair[:, 1]).argmax(1)
    (xs, ys), (xt, yt) = tasks.split(pair, y)
    model = Relations(wrong)
    return Parts(model, (xs, ys), CE, adam(model), accuracy(xt, yt), steps=400)


class Captions(nn.Module):
    """A vision part whose features are cloned for the part behind it."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.vision = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(16, 6),
        )  # fmt: skip
        self.language = nn.Linear(6, 10)
        self.cut = cut

    def forward(self, pictures: Tensor) -> Tensor:
        features = self.vision(pictures)
        return self.language(features.clone().detach() if self.cut else features)


@faulty(
    "features cloned and detached",
    "https://github.com/lucidrains/CoCa-pytorch/issues/6",
    "detached",
    low=0.6,
    high=0.85,
)
def captions(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    model = Captions(wrong)
    train, score = (x.view(-1, 1, 8, 8), y), accuracy(xt.view(-1, 1, 8, 8), yt)
    return Parts(model, train, CE, adam(model), score, steps=500)


@faulty(
    "the wrong layers frozen",
    "https://github.com/wannabeOG/MAS-PyTorch/issues/1",
    "frozen_parameters",
    low=0.7,
    high=0.88,
)
def frozen(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    model = nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 32), nn.ReLU(),
                          nn.Linear(32, 10))  # fmt: skip
    if wrong:
        model[:4].requires_grad_(False)
    engine = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return Parts(model, (x, y), CE, engine, accuracy(xt, yt), steps=400)


class Entities(nn.Module):
    """An encoder of tokens and a layer that names them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Embedding(40, 4), nn.Linear(4, 4), nn.Tanh())
        self.naming = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 6))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.naming(self.encoder(tokens))


@faulty(
    "groups that were never appended",
    "https://github.com/zjunlp/HVPNeT/issues/5",
    "missing_from_optimizer",
    low=0.9,
    high=0.97,
)
def entities(wrong: bool) -> Parts:
    kinds = torch.randint(6, (40,))
    tokens = torch.randint(40, (600, 8))
    (xs, ys), (xt, yt) = tasks.split(tokens, kinds[tokens])
    model = Entities()
    groups = [{"params": list(model.naming.parameters()), "lr": 1e-2}]
    if not wrong:
        groups.append({"params": list(model.encoder.parameters()), "lr": 1e-2})
    return Parts(
        model, (xs, ys), lambda o, t: CE(o.transpose(1, 2), t), torch.optim.Adam(groups),
        lambda m: float((m(xt).argmax(2) == yt).float().mean()), steps=300,
    )  # fmt: skip


class Parts2d(nn.Module):
    """A network that makes its dropout anew in each pass."""

    def __init__(self, made_in_forward: bool) -> None:
        super().__init__()
        self.body = nn.Linear(64, 32)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(32, 10)
        self.made_in_forward = made_in_forward

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.body(x))
        hidden = nn.Dropout(p=0.5)(hidden) if self.made_in_forward else self.drop(hidden)
        return self.head(hidden)


@faulty(
    "dropout made in the forward pass",
    "https://github.com/yangze0930/NTS-Net/issues/14",
    "random_in_eval",
    low=0.91,
    high=0.92,
)
def dropout_in_forward(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    model = Parts2d(wrong)
    return Parts(model, (x, y), CE, adam(model, 5e-3), accuracy(xt, yt), steps=400)


def sinusoids(length: int, size: int) -> Tensor:
    """Positional encodings (length, size) of sines and cosines."""
    pace = torch.exp(-math.log(100.0) * torch.arange(0, size, 2) / size)
    angle = torch.arange(length)[:, None] * pace
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)


class Demo(nn.Module):
    """A transformer whose positional encoding is built; `places` says how it is used."""

    def __init__(self, outputs: int, places: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 16)
        self.register_buffer("places", sinusoids(12, 16)[None])
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.head = nn.Linear(16, outputs)
        self.use = places

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.use == "all":
            x = x + self.places[:, : x.shape[1]]
        elif self.use == "one":
            x = x + self.places[:, x.shape[1]][:, None]
        return self.head(self.encoder(x).mean(1))


@faulty(
    "positional encoding that is not used",
    "https://github.com/Lightning-AI/pytorch-lightning/pull/20099",
    "no_positions",
    low=0.65,
    high=0.85,
)
def unused_places(wrong: bool) -> Parts:
    tokens = torch.randint(8, (1500, 10))
    y = (tokens[:, 0] > tokens[:, -1]).long()
    (xs, ys), (xt, yt) = tasks.split(tokens, y)
    model = Demo(2, "none" if wrong else "all")
    return Parts(model, (xs, ys), CE, adam(model, 3e-3), accuracy(xt, yt), steps=700)


@faulty(
    "one position for all",
    "https://github.com/DiffPoseTalk/DiffPoseTalk/issues/20",
    "no_positions",
    low=0.5,
    high=0.7,
)
def one_place(wrong: bool) -> Parts:
    tokens = torch.randint(8, (1500, 10))
    late = torch.linspace(-1, 1, 10)
    y = ((tokens - 3.5) * late).sum(1, keepdim=True) / 4.4  # what comes late counts for more
    (xs, ys), (xt, yt) = tasks.split(tokens, y)
    model = Demo(1, "one" if wrong else "all")
    return Parts(model, (xs, ys), nn.MSELoss(), adam(model, 3e-3), r2(xt, yt), steps=700)


@faulty(
    "BatchNorm of two rows",
    "https://github.com/pytorch/pytorch/issues/19916",
    "batchnorm_few_rows",
    low=0.7,
    high=0.8,
    also=("train_eval_mismatch",),
)
def two_rows(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.surface()
    model = nn.Sequential(
        nn.Linear(6, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48), nn.BatchNorm1d(48),
        nn.ReLU(), nn.Linear(48, 1),
    )  # fmt: skip
    return Parts(
        model, (x, y), nn.MSELoss(), adam(model, 5e-3), r2(xt, yt),
        batch_size=2 if wrong else 50, steps=400,
    )  # fmt: skip


@faulty(
    "the kept share taken for the dropped",
    "https://github.com/Gofinge/CheXpert_Baseline_PyTorch/issues/5",
    "excessive_dropout",
    low=0.75,
    high=0.9,
    also=("underfitting",),
)
def kept_share(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    rate = 0.9 if wrong else 0.1
    model = nn.Sequential(
        nn.Dropout(rate), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(rate), nn.Linear(32, 32),
        nn.ReLU(), nn.Dropout(rate), nn.Linear(32, 10),
    )  # fmt: skip
    return Parts(model, (x, y), CE, adam(model, 3e-3), accuracy(xt, yt), steps=400)


class Decoder(nn.Module):
    """A decoder of tokens, with or without the mask that hides what comes."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 16)
        self.place = nn.Embedding(10, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 48, 0.0, batch_first=True)
        self.head = nn.Linear(16, 7)
        self.masked = masked

    def forward(self, tokens: Tensor) -> Tensor:
        size = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(size) if self.masked else None
        x = self.embed(tokens) + self.place(torch.arange(size))
        return self.head(self.block(x, src_mask=mask))


@faulty(
    "a decoder that sees what comes",
    "https://github.com/alex-matton/causal-transformer-decoder/issues/1",
    "future_visible",
    low=0.7,
    high=0.85,
)
def decoder(wrong: bool) -> Parts:
    start, stride = torch.randint(7, (900, 1)), torch.randint(1, 4, (900, 1))
    text = (start + stride * torch.arange(11)) % 7
    model = Decoder(masked=not wrong)
    given, following = text[700:, :5], text[700:, 5]

    def score(m: nn.Module) -> float:  # the next token after five, nothing behind them
        return float((m(given)[:, -1].argmax(1) == following).float().mean())

    return Parts(
        model, (text[:700, :-1], text[:700, 1:]), lambda o, t: CE(o.transpose(1, 2), t),
        adam(model, 5e-3), score, steps=500,
    )  # fmt: skip
