"""Small programs with one wrong wire, and the same wired right; none needs a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from faulty import adam, classes, numbers

CE = F.cross_entropy


@dataclass(frozen=True)
class Wired:
    """A program; `code` is the finding that must come first, `says` a part of its words."""

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], Any]
    loss: Callable[..., Any]
    code: str = ""
    says: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.Adam(p, lr=0.01)


class Fn(nn.Module):
    """Layers by name and a forward pass as a function of them."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._run = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self._run(self, *inputs)


def mlp(inputs: int = 16, outputs: int = 4, hidden: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def curve(rows: int = 400):
    """A sine of a mixture of the inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=generator)
    return x, torch.sin(2 * x[:, 0]) + 0.5 * x[:, 1] + 0.1 * torch.randn(rows, generator=generator)


def column():
    x, y = curve()
    return x, y[:, None]


def two():
    x, y = classes()
    return x, (y > 1).long()


def yes_no(low: float = 0.0, high: float = 1.0):
    x, y = two()
    return x, low + (high - low) * y[:, None].float()


def sequences(rows: int = 300):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 7, 5, generator=generator)
    return x, (x[:, -1, 0] + x[:, -2, 1] > 0).long()


def counting(rows: int = 300):
    """Numbers that go round in steps of one or two: the next one is the target."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, 6, (rows, 1), generator=generator)
    step = torch.randint(1, 3, (rows, 1), generator=generator)
    tokens = (start + step * torch.arange(9)) % 6
    return tokens[:, :-1], tokens[:, 1:]


def first_token(rows: int = 600):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 6, (rows, 8), generator=generator)
    return tokens, (tokens[:, 0] > 2).long()


def circles(rows: int = 600):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2, generator=generator)
    return x, (x.square().sum(1) > 1.4).long()


def shuffled():
    x, y = classes(600)
    return x, y[torch.randperm(600, generator=torch.Generator().manual_seed(9))]


def rare(rows: int = 1000):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 10, generator=generator)
    return x, (x[:, 0] + torch.randn(rows, generator=generator) > 2.6).long()


def tags():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 16, generator=generator)
    return x, (x[:, :4] > 0).float()


def six(as_number: bool = True):
    generator = torch.Generator().manual_seed(7)
    y = torch.randint(6, (600,), generator=generator)
    x = 1.5 * torch.randn(6, 16, generator=generator)[y] + torch.randn(
        600, 16, generator=generator
    )
    return x, y[:, None].float() if as_number else y


def pictures():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, 8, 3, generator=generator)
    return x, x.mean((1, 2)).argmax(1)


def coloured(turn: Callable[[Tensor], Tensor]):
    """Digits in three shades, as a file holds them: (rows, height, width, colours)."""
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    return turn(x.float().reshape(-1, 8, 8, 1) / 16 * torch.tensor([1.0, 0.5, 0.2])), y


def conv() -> nn.Sequential:
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    return nn.Sequential(*layers)


def loader(shuffle: bool):
    x, y = six(False)
    order = y.argsort()
    rows = torch.utils.data.TensorDataset(x[order], y[order])
    return torch.utils.data.DataLoader(rows, batch_size=32, shuffle=shuffle)


def halves(shuffle: bool):
    """Two classes, the first of which fills more batches than are looked at."""
    torch.manual_seed(0)
    x = torch.randn(600, 16)
    y = (x[:, 0] > 0).long()
    order = y.argsort()
    rows = torch.utils.data.TensorDataset(x[order], y[order])
    return torch.utils.data.DataLoader(rows, batch_size=32, shuffle=shuffle)


def lstm(batch_first: bool):
    return Fn(
        lambda m, x: m.head(m.core(x)[0][:, -1]),
        core=nn.LSTM(5, 16, batch_first=batch_first),
        head=nn.Linear(16, 2),
    )


def two_ways(join: Callable[[Tensor, Tensor], Tensor]):
    return Fn(
        lambda m, x: m.head(join(m.core(x)[1][0], x)),
        core=nn.LSTM(5, 16, batch_first=True, bidirectional=True),
        head=nn.Linear(32, 2),
    )


def encoder(batch_first: bool):
    return Fn(
        lambda m, x: m.head(m.mix(m.up(x) + m.place).mean(1)),
        up=nn.Linear(5, 16),
        place=nn.Parameter(0.1 * torch.randn(1, 7, 16)),
        head=nn.Linear(16, 2),
        mix=nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first),
    )


def language_model(mask: bool = True):
    def forward(m, tokens):
        size = tokens.shape[1]
        hidden = m.embed(tokens) + m.place(torch.arange(size))
        future = nn.Transformer.generate_square_subsequent_mask(size) if mask else None
        return m.head(m.mix(hidden, src_mask=future))

    return Fn(
        forward,
        embed=nn.Embedding(6, 16),
        place=nn.Embedding(8, 16),
        head=nn.Linear(16, 6),
        mix=nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True),
    )


def by_token(output, target):
    return CE(output.transpose(1, 2), target)


def recurrent_model(turn: Callable[[Tensor], Tensor]):
    return Fn(
        lambda m, tokens: turn(m.head(m.core(m.embed(tokens))[0])),
        embed=nn.Embedding(6, 16),
        core=nn.LSTM(16, 16, batch_first=True),
        head=nn.Linear(16, 6),
    )


def bag(positions: bool):
    def forward(m, tokens):
        hidden = m.embed(tokens)
        if positions:
            hidden = hidden + m.place(torch.arange(tokens.shape[1]))
        return m.head(m.mix(hidden).mean(1))

    return Fn(
        forward,
        embed=nn.Embedding(6, 16),
        place=nn.Embedding(8, 16),
        head=nn.Linear(16, 2),
        mix=nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True),
    )


def images(turn: Callable[[Tensor], Tensor]):
    return Fn(
        lambda m, x: m.head(torch.relu(m.conv(turn(x))).flatten(1)),
        conv=nn.Conv2d(3, 8, 3, padding=1),
        head=nn.Linear(8 * 64, 3),
    )


def listed(box: Callable[[list[nn.Module]], Any]):
    def forward(m, x):
        for layer in m.hidden:
            x = torch.relu(layer(x))
        return m.head(x)

    return Fn(forward, hidden=box([nn.Linear(16, 16), nn.Linear(16, 16)]), head=nn.Linear(16, 4))


def body(cut: Callable[[Any, Tensor], Tensor]):
    return Fn(lambda m, x: m.head(cut(m, x)), body=nn.Linear(16, 16), head=nn.Linear(16, 4))


def without_gradients(m, x):
    with torch.no_grad():
        return torch.relu(m.body(x))


def noisy(training: Callable[[Any], bool]):
    return Fn(
        lambda m, x: m.head(F.dropout(torch.relu(m.body(x)), 0.3, training(m))),
        body=nn.Linear(16, 64),
        head=nn.Linear(64, 4),
    )


def probabilities(output, target):
    return -(F.one_hot(target, 4) * torch.log(output)).sum(1).mean()


def distance(output, target):
    return torch.sqrt((output - output.detach()).square().sum(1)).mean() + CE(output, target)


def normed(**options: Any):
    return nn.Sequential(
        nn.Linear(16, 32), nn.BatchNorm1d(32, **options), nn.ReLU(), nn.Linear(32, 4)
    )


def contrastive(output, target):
    z = F.normalize(output, dim=1)
    alike = (z @ z.T / 0.2).masked_fill(torch.eye(len(target), dtype=torch.bool), -1e9)
    same = (target[:, None] == target[None]) & ~torch.eye(len(target), dtype=torch.bool)
    return -(alike.log_softmax(1) * same).sum(1).div(same.sum(1).clamp_min(1)).mean()


def beside(scale: float = 1.0):
    x, y = classes(900)
    return (x[:600], y[:600]), (scale * x[600:], y[600:])


def sixteen_bits(lr: float):
    return dict(
        model=lambda: mlp().bfloat16(),
        loss=CE,
        optimizer=adam(lr),
        data=lambda: (classes()[0].bfloat16(), classes()[1]),
    )


def sentences(rows: int = 400, time: int = 16):
    """Tokens padded with 0 to unequal lengths; the class is that of the mean token."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 12, (rows, time), generator=generator)
    length = torch.randint(3, time + 1, (rows, 1), generator=generator)
    tokens = tokens * (torch.arange(time) < length)
    return tokens, (tokens.sum(1) > 6 * length[:, 0]).long()


def averaging(masked: bool):
    def forward(m, tokens):
        kept = (tokens > 0)[:, :, None].float() if masked else torch.ones(*tokens.shape, 1)
        return m.head((m.core(m.embed(tokens))[0] * kept).sum(1) / kept.sum(1))

    return Fn(
        forward,
        embed=nn.Embedding(12, 16),
        core=nn.GRU(16, 16, batch_first=True),
        head=nn.Linear(16, 2),
    )


def looking(way: str, right: bool):
    """Attention over words with a mask of their padding, the right way round or upside down."""

    def forward(m, tokens):
        h, padding = m.embed(tokens), (tokens == 0) if right else (tokens != 0)
        if way == "layer":
            h = h + m.look(h, h, h, key_padding_mask=padding, need_weights=False)[0]
        elif way == "fused":
            h = h + F.scaled_dot_product_attention(h, h, h, attn_mask=~padding[:, None])
        else:
            scores = h @ h.transpose(1, 2) / 4
            h = h + scores.masked_fill(padding[:, None], -1e9).softmax(-1) @ h
        kept = (tokens > 0)[:, :, None].float()
        return m.head((h * kept).sum(1) / kept.sum(1))

    layer = {"look": nn.MultiheadAttention(16, 2, batch_first=True)} if way == "layer" else {}
    return Fn(forward, embed=nn.Embedding(12, 16), head=nn.Linear(16, 2), **layer)


def short_sentences():
    """Sentences of which none fills all places."""
    tokens, y = sentences(time=14)
    return F.pad(tokens, (0, 2)), y


MASKS = "layer", "fused", "by hand"


def padded_counting():
    tokens, target = counting()
    kept = torch.arange(8) < torch.arange(len(tokens))[:, None] % 5 + 2
    return (tokens + 1) * kept, (target + 1) * kept


def seven_words():
    return Fn(
        lambda m, tokens: m.head(m.core(m.embed(tokens))[0]).transpose(1, 2),
        embed=nn.Embedding(7, 16),
        core=nn.LSTM(16, 16, batch_first=True),
        head=nn.Linear(16, 7),
    )


def time_first(right: bool):
    """A recurrent net that is given time first, and a loss that flattens in that order or not."""

    def loss(scores, target):
        return CE(scores.flatten(0, 1), (target.T if right else target).reshape(-1))

    model = Fn(
        lambda m, tokens: m.head(m.core(m.embed(tokens.T))[0]),
        embed=nn.Embedding(6, 16),
        core=nn.LSTM(16, 16),
        head=nn.Linear(16, 6),
    )
    return dict(model=lambda: model, data=counting, loss=loss)


def by_hand(output, target):
    p = torch.sigmoid(output[:, 0]).clamp(1e-6, 1 - 1e-6)
    return -(target * p.log() + (1 - target) * (1 - p).log()).mean()


def three_numbers():
    x, y = classes()
    return x, (y % 3).float()


def likelihood(sign: float):
    return lambda o, y: sign * o.log_softmax(1).gather(1, y[:, None]).mean()


def similarity(sign: float):
    return lambda o, y: sign * F.cosine_similarity(o, y).mean()


def directions():
    x, _ = classes()
    return x, torch.tanh(x @ torch.randn(16, 6, generator=torch.Generator().manual_seed(3)))


def places(axis: int):
    """Attention with positions taken from an axis of the batch."""
    table = torch.randn(600, 16, generator=torch.Generator().manual_seed(5))

    def forward(m, tokens):
        count = tokens.shape[axis]
        place = table[:count] if axis else table[:count, None]
        return m.head(m.mix(m.embed(tokens) + place).mean(1))

    return Fn(
        forward,
        embed=nn.Embedding(6, 16),
        head=nn.Linear(16, 2),
        mix=nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True),
    )


def cast(scale: float):
    return Fn(
        lambda m, x: m.head(torch.relu(m.embed((scale * torch.sigmoid(x)).long()).flatten(1))),
        embed=nn.Embedding(16, 4),
        head=nn.Linear(64, 4),
    )


def heads_of_attention(right: bool):
    def forward(m, tokens):
        n, size = tokens.shape
        h = m.embed(tokens) + m.place
        q, k, v = (f(h).view(n, size, 4, 6).transpose(1, 2) for f in (m.q, m.k, m.v))
        mixed = torch.softmax(q @ k.transpose(2, 3), -1) @ v
        mixed = mixed.transpose(1, 2) if right else mixed
        return m.head(mixed.reshape(n, size, 24)).transpose(1, 2)

    return Fn(
        forward,
        embed=nn.Embedding(6, 24),
        place=nn.Parameter(0.5 * torch.randn(8, 24)),
        q=nn.Linear(24, 24),
        k=nn.Linear(24, 24),
        v=nn.Linear(24, 24),
        head=nn.Linear(24, 6),
    )


def backwards():
    tokens, _ = counting()
    return tokens, tokens.flip(1)


def unit(scale: float):
    return Fn(lambda m, x: scale * F.normalize(m.body(x), dim=1), body=mlp(16, 4))


def sorted_numbers(shuffle: bool):
    x, y = column()
    rows = torch.utils.data.TensorDataset(x[y[:, 0].argsort()], y.sort(0).values)
    return torch.utils.data.DataLoader(rows, batch_size=32, shuffle=shuffle)


def narrow(frozen: bool):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1))
    model[:4].requires_grad_(not frozen)
    return model


def zero_head():
    model = mlp()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    return model


def beside_the_targets(columns: Callable[[Tensor], Tensor]):
    x, y = curve()
    return torch.cat([x, columns(y[:, None])], 1), y[:, None]


def inferred(m: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        h = torch.relu(m.body(x))
    return h.clone()


# ways past a layer that no gradient goes back, and what names them
PASSED_BY: list[tuple[str, Callable[..., Tensor], str]] = [
    ("list and back", lambda m, x: torch.tensor(torch.relu(m.body(x)).tolist()), ".tolist()"),
    ("inference mode", inferred, "no_grad"),
    ("whole numbers", lambda m, x: (5 * torch.relu(m.body(x))).long().float(), ".long()"),
    ("truth values", lambda m, x: (m.body(x) > 0).float(), "gt at"),
    ("rounded", lambda m, x: torch.round(3 * torch.relu(m.body(x))), "the rounding"),
    ("signs", lambda m, x: torch.sign(m.body(x)), "sign at"),
]


class Block:
    """Holds a layer and is no module."""

    def __init__(self) -> None:
        self.linear = nn.Linear(16, 16)


def inside_of_a_function() -> Callable[[Tensor], Tensor]:
    layer = nn.Linear(16, 16)
    return lambda x: layer(x)


OUTSIDE: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("held by an object",
     lambda: Fn(lambda m, x: m.head(torch.relu(m.block.linear(x))), block=Block(),
                head=nn.Linear(16, 4)), "class Block(nn.Module)"),
    ("held by a function",
     lambda: Fn(lambda m, x: m.head(torch.relu(m.hidden(x))), hidden=inside_of_a_function(),
                head=nn.Linear(16, 4)), "keep the layer itself as self.hidden"),
    ("scaled parameter",
     lambda: Fn(lambda m, x: m.head(torch.relu(x @ m.w)), head=nn.Linear(16, 4),
                w=nn.Parameter(torch.randn(16, 16)) * 0.3), "self.w = nn.Parameter(self.w)"),
]  # fmt: skip


def unused_relu(m: nn.Module, x: Tensor) -> Tensor:
    h = m.first(x)
    torch.relu(h)
    return m.last(h)


STRAIGHT: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("result unused",
     lambda: Fn(unused_relu, first=nn.Linear(2, 32), last=nn.Linear(32, 2)), "x = F.relu(x)"),
    ("slope one", lambda: nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(1.0), nn.Linear(32, 2)),
     "is linear here"),
    ("one layer", lambda: nn.Sequential(nn.Linear(2, 2)), "a hidden layer in front of 0"),
]  # fmt: skip


def counts():
    x, y = curve()
    return x, torch.poisson(y.exp(), generator=torch.Generator().manual_seed(0))


COLUMNS: list[tuple[str, Callable[..., Tensor]]] = [
    ("counts broadcast", lambda o, y: F.poisson_nll_loss(o, y)),
    ("variances broadcast", lambda o, y: F.gaussian_nll_loss(o, y, torch.ones_like(o))),
]


FAULTY = [
    Wired(
        "mean over padding",
        lambda: averaging(False),
        sentences,
        CE,
        "padding_seen",
        "padding",
        {"steps": 1},
    ),
    Wired("padding learned", seven_words, padded_counting, CE, "padding_in_loss", "ignore_index"),
    Wired(
        "flattened in another order", code="positions_mixed", says="another", **time_first(False)
    ),
    *[
        Wired(
            f"mask upside down, {way}",
            lambda way=way: looking(way, False),
            short_sentences,
            CE,
            "padding_seen",
            "inverted",
        )
        for way in MASKS
    ],
    Wired(
        "pictures reshaped",
        conv,
        lambda: coloured(lambda x: x.reshape(-1, 3, 8, 8)),
        CE,
        "positions_mixed",
        ".permute(0, 3, 1, 2)",
    ),
    Wired(
        "three classes by hand",
        lambda: mlp(16, 1),
        three_numbers,
        by_hand,
        "target_out_of_range",
        "binary targets",
    ),
    Wired(
        "one answer to all",
        mlp,
        lambda: (classes()[0], classes()[1] * 0),
        CE,
        "constant_targets",
        "every row is 0",
    ),
    Wired("likelihood minimised", mlp, classes, likelihood(1.0), "loss_upside_down", "-loss"),
    Wired(
        "similarity minimised",
        lambda: mlp(16, 6),
        directions,
        similarity(1.0),
        "loss_upside_down",
        "-loss",
    ),
    Wired(
        "climbing",
        mlp,
        classes,
        CE,
        "loss_upside_down",
        "maximize=False",
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01, maximize=True),
    ),
    Wired("places of rows", lambda: places(0), first_token, CE, "rows_mixed", "reordered"),
    Wired("cast to nothing", lambda: cast(0.99), classes, CE, "inputs_ignored", "embed"),
    Wired(
        "norm of one",
        lambda: nn.Sequential(*mlp(4, 1), nn.LayerNorm(1)),
        column,
        nn.MSELoss(),
        "inputs_ignored",
        "single value",
    ),
    Wired(
        "heads spliced",
        lambda: heads_of_attention(False),
        counting,
        CE,
        "positions_mixed",
        "memory order",
    ),
    Wired("one row heard", mlp, classes, lambda o, y: CE(o[:1], y[:1]), "ignored_rows", "92%"),
    Wired("scores of length one", lambda: unit(1.0), classes, CE, "head_mismatch", "norm 1"),
    Wired(
        "sorted numbers",
        lambda: mlp(4, 1),
        lambda: sorted_numbers(False),
        nn.MSELoss(),
        "sorted_batches",
        "shuffle",
    ),
    Wired(
        "random body",
        lambda: narrow(True),
        column,
        nn.MSELoss(),
        "frozen_parameters",
        "requires_grad_(True)",
        {"steps": 300},
        adam(0.02),
    ),
    Wired(
        "scaled copy",
        lambda: mlp(5, 1),
        lambda: beside_the_targets(lambda y: 3 * y + 1),
        nn.MSELoss(),
        "target_among_inputs",
        "column 4",
    ),
    Wired(
        "squares broadcast",
        lambda: mlp(4, 1),
        curve,
        nn.MSELoss(),
        "broadcast_loss",
        "(n, 1) and (n,)",
    ),
    Wired(
        "distances broadcast",
        lambda: mlp(4, 1),
        curve,
        lambda o, y: (y - o).abs().mean(),
        "broadcast_loss",
        "view_as",
    ),
    Wired(
        "squeezed on one side",
        lambda: mlp(4, 1),
        column,
        lambda o, y: F.mse_loss(o.squeeze(), y),
        "broadcast_loss",
        "wired.py",
    ),
    Wired("no batch_first", lambda: lstm(False), sequences, CE, "rows_mixed", "batch_first=True"),
    Wired(
        "state viewed",
        lambda: two_ways(lambda h, x: h.view(len(x), -1)),
        sequences,
        CE,
        "rows_mixed",
        "by the reshape at",
    ),
    Wired(
        "encoder without batch_first",
        lambda: encoder(False),
        sequences,
        CE,
        "rows_mixed",
        "batch_first=True",
    ),
    Wired(
        "softmax over rows",
        lambda: mlp(),
        classes,
        lambda o, y: F.nll_loss(F.log_softmax(o, dim=0), y),
        "rows_mixed",
        "dim=1",
    ),
    Wired(
        "batch statistics",
        lambda: normed(track_running_stats=False),
        classes,
        CE,
        "rows_mixed",
        "track_running_stats",
    ),
    Wired("no mask", lambda: language_model(False), counting, by_token, "future_visible", "mask"),
    Wired(
        "viewed in the model",
        lambda: recurrent_model(lambda o: o.view(len(o), 6, -1)),
        counting,
        CE,
        "positions_mixed",
        ".permute(0, 2, 1)",
    ),
    Wired(
        "viewed in the loss",
        lambda: recurrent_model(lambda o: o),
        counting,
        lambda o, y: CE(o.reshape(len(o), 6, -1), y),
        "positions_mixed",
        "wired.py",
    ),
    Wired(
        "flattened wrong",
        lambda: recurrent_model(lambda o: o.transpose(1, 2)),
        counting,
        lambda o, y: CE(o.reshape(-1, 6), y.reshape(-1)),
        "positions_mixed",
        "transpose",
    ),
    Wired(
        "pictures viewed",
        lambda: images(lambda x: x.view(-1, 3, 8, 8)),
        pictures,
        CE,
        "positions_mixed",
        "keeps the memory order",
    ),
    Wired(
        "targets -1 and 1",
        lambda: mlp(16, 1),
        lambda: yes_no(-1),
        nn.BCEWithLogitsLoss(),
        "target_out_of_range",
        "(target + 1) / 2",
    ),
    Wired(
        "targets 1 and 2",
        lambda: mlp(16, 1),
        lambda: yes_no(1, 2),
        nn.BCEWithLogitsLoss(),
        "target_out_of_range",
        "unbounded below",
    ),
    Wired("scores as logarithms", mlp, classes, nn.NLLLoss(), "missing_log", "log_softmax"),
    Wired(
        "probabilities as logarithms",
        lambda: nn.Sequential(mlp(), nn.Softmax(1)),
        classes,
        nn.NLLLoss(),
        "missing_log",
        "log_softmax",
    ),
    Wired("several labels", mlp, tags, nn.CrossEntropyLoss(), "multilabel_softmax", "BCEWith"),
    Wired(
        "classes as numbers",
        lambda: mlp(16, 1),
        six,
        nn.MSELoss(),
        "classes_as_numbers",
        "nn.Linear(..., 6)",
    ),
    Wired(
        "class 0 ignored",
        mlp,
        classes,
        nn.CrossEntropyLoss(ignore_index=0),
        "ignored_rows",
        "class 0",
    ),
    Wired(
        "logarithm of zero",
        lambda: nn.Sequential(mlp(), nn.Softmax(1)),
        lambda: (40 * classes()[0], classes()[1]),
        probabilities,
        "undefined_operation",
        "clamp_min",
        optimizer=adam(0.1),
    ),
    Wired("root of zero", mlp, classes, distance, "undefined_operation", "slope at 0"),
    Wired(
        "no activation",
        lambda: nn.Sequential(nn.Linear(2, 32), nn.Linear(32, 32), nn.Linear(32, 2)),
        circles,
        CE,
        "no_nonlinearity",
        "nn.ReLU() between 0 and 1",
    ),
    Wired("no positions", lambda: bag(False), first_token, CE, "no_positions", "positions"),
    Wired(
        "plain list",
        lambda: listed(list),
        classes,
        CE,
        "unregistered_parameters",
        "self.hidden = nn.ModuleList(self.hidden)",
    ),
    Wired(
        "made in forward",
        lambda: Fn(lambda m, x: m.head(torch.relu(nn.Linear(16, 8)(x))), head=nn.Linear(8, 4)),
        classes,
        CE,
        "layers_made_in_forward",
        "__init__",
    ),
    Wired(
        "detach",
        lambda: body(lambda m, x: torch.relu(m.body(x)).detach()),
        classes,
        CE,
        "detached",
        "body.weight",
    ),
    Wired(
        "data",
        lambda: body(lambda m, x: torch.relu(m.body(x)).data),
        classes,
        CE,
        "detached",
        "x.data",
    ),
    Wired(
        "numpy and back",
        lambda: body(lambda m, x: torch.tensor(torch.relu(m.body(x)).detach().numpy())),
        classes,
        CE,
        "detached",
        "body.weight",
    ),
    *(
        Wired(name, lambda way=way: body(way), classes, CE, "detached", says)
        for name, way, says in PASSED_BY
    ),
    *(
        Wired(name, make, classes, CE, "unregistered_parameters", says)
        for name, make, says in OUTSIDE
    ),
    *(
        Wired(name, make, circles, CE, "no_nonlinearity", says, {"steps": 60})
        for name, make, says in STRAIGHT
    ),
    *(
        Wired(name, lambda: mlp(4, 1), counts, loss, "broadcast_loss", "view_as", {"steps": 25})
        for name, loss in COLUMNS
    ),
    Wired(
        "best of several by its place",
        mlp,
        classes,
        lambda o, y: 1 - (o.topk(1).indices[:, 0] == y).float().mean(),
        "loss_not_connected",
        "topk",
    ),
    Wired("no_grad", lambda: body(without_gradients), classes, CE, "detached", "no_grad"),
    Wired(
        "argmax",
        mlp,
        classes,
        lambda o, y: F.mse_loss(o.argmax(1).float(), y.float()),
        "loss_not_connected",
        "argmax",
    ),
    Wired(
        "item",
        mlp,
        classes,
        lambda o, y: torch.tensor(CE(o, y).item(), requires_grad=True),
        "loss_not_connected",
        ".item()",
    ),
    Wired(
        "dropout stays on",
        lambda: noisy(lambda m: True),
        classes,
        CE,
        "random_in_eval",
        "self.training",
    ),
    Wired(
        "two rows",
        normed,
        classes,
        CE,
        "batchnorm_few_rows",
        "2 values",
        {"batch_size": 2, "steps": 60},
    ),
    Wired("steps rounded away", code="updates_lost", says="16-bit", **sixteen_bits(1e-5)),
    Wired(
        "zeros",
        mlp,
        lambda: (torch.zeros(300, 16), classes(300)[1]),
        CE,
        "constant_inputs",
        "zero",
    ),
    Wired("shuffled", mlp, shuffled, CE, "unrelated_labels", "shuffled targets just as fast"),
    Wired(
        "rare class",
        lambda: mlp(10, 2),
        rare,
        CE,
        "class_imbalance",
        "always predicting 0",
        {"steps": 100},
        adam(1e-3),
    ),
    Wired(
        "copied",
        lambda: mlp(17),
        lambda: (torch.cat([classes()[0], classes()[1][:, None]], 1), classes()[1]),
        CE,
        "target_among_inputs",
        "column 16",
    ),
    Wired(
        "validation unscaled",
        mlp,
        lambda: beside()[0],
        CE,
        "valid_differs",
        "x_train.std(0)",
        {"valid": beside(10.0)[1]},
    ),
    Wired(
        "new classes",
        mlp,
        lambda: tuple(t[classes()[1] < 3] for t in classes()),
        CE,
        "valid_differs",
        "does not have",
        {"valid": classes()},
    ),
    Wired(
        "rows twice",
        mlp,
        classes,
        CE,
        "rows_in_both",
        "100%",
        {"valid": tuple(t[:200] for t in classes())},
    ),
    Wired("sorted", lambda: mlp(16, 6), lambda: loader(False), CE, "sorted_batches", "shuffle"),
    Wired("in halves", mlp, lambda: halves(False), CE, "sorted_batches", "shuffle"),
]
RIGHT = [
    Wired(
        "eight numbers of each picture",
        lambda: mlp(64, 64, 8),
        lambda: (coloured(lambda x: x[..., 0].flatten(1))[0],) * 2,
        nn.MSELoss(),
        options={"steps": 150},
        optimizer=lambda p: torch.optim.Adam(p, lr=3e-3),
    ),
    *[
        Wired(f"padding masked, {way}", lambda way=way: looking(way, True), short_sentences, CE)
        for way in MASKS
    ],
    Wired("pictures permuted", conv, lambda: coloured(lambda x: x.permute(0, 3, 1, 2)), CE),
    Wired("halves that are mixed", mlp, lambda: halves(True), CE),
    Wired("mean of what is there", lambda: averaging(True), sentences, CE),
    Wired("padding left out", seven_words, padded_counting, nn.CrossEntropyLoss(ignore_index=0)),
    Wired("flattened in one order", **time_first(True)),
    Wired("likelihood", mlp, classes, likelihood(-1.0)),
    Wired(
        "similarity",
        lambda: mlp(16, 6),
        directions,
        similarity(-1.0),
        options={"steps": 200},  # a loss below zero looks as if it jumped while it is steep
    ),
    Wired("places of tokens", lambda: places(1), first_token, CE),
    Wired("cast to sixteen", lambda: cast(15.9), classes, CE),
    Wired(
        "norm of many",
        lambda: nn.Sequential(nn.Linear(4, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 1)),
        column,
        nn.MSELoss(),
    ),
    Wired("heads joined", lambda: heads_of_attention(True), backwards, CE),
    Wired("scores of length twelve", lambda: unit(12.0), classes, CE),
    Wired("shuffled numbers", lambda: mlp(4, 1), lambda: sorted_numbers(True), nn.MSELoss()),
    Wired("zero head", lambda: zero_head(), classes, CE),
    Wired("log_softmax twice", lambda: nn.Sequential(*mlp(), nn.LogSoftmax(1)), classes, CE),
    Wired("squares", lambda: mlp(4, 1), column, nn.MSELoss(), optimizer=adam(0.02)),
    Wired("squeezed", lambda: mlp(4, 1), curve, lambda o, y: F.mse_loss(o.squeeze(-1), y)),
    Wired(
        "root of squares",
        lambda: mlp(4, 1),
        column,
        lambda o, y: torch.sqrt(F.mse_loss(o, y) + 1e-8),
    ),
    Wired("batch_first", lambda: lstm(True), sequences, CE),
    Wired(
        "state joined", lambda: two_ways(lambda h, x: torch.cat([h[0], h[1]], 1)), sequences, CE
    ),
    Wired("encoder", lambda: encoder(True), sequences, CE),
    Wired("norm", normed, classes, CE),
    Wired("masked", language_model, counting, by_token),
    Wired("tags of tokens", lambda: language_model(False), lambda: (counting()[0],) * 2, by_token),
    Wired("permuted", lambda: recurrent_model(lambda o: o.permute(0, 2, 1)), counting, CE),
    Wired(
        "flattened",
        lambda: recurrent_model(lambda o: o),
        counting,
        lambda o, y: CE(o.reshape(-1, 6), y.reshape(-1)),
    ),
    Wired("pictures permuted", lambda: images(lambda x: x.permute(0, 3, 1, 2)), pictures, CE),
    Wired("targets 0 and 1", lambda: mlp(16, 1), yes_no, nn.BCEWithLogitsLoss()),
    Wired("logarithms", lambda: nn.Sequential(mlp(), nn.LogSoftmax(1)), classes, nn.NLLLoss()),
    Wired("labels by sigmoids", mlp, tags, nn.BCEWithLogitsLoss()),
    Wired("weighted classes", mlp, classes, nn.CrossEntropyLoss(torch.tensor([1.0, 2, 0.5, 1]))),
    Wired(
        "padded targets",
        lambda: recurrent_model(lambda o: o.transpose(1, 2)),
        lambda: (counting()[0], counting()[1].index_fill(1, torch.tensor([6, 7]), -100)),
        CE,
    ),
    Wired(
        "linear on a line", lambda: nn.Linear(6, 1), numbers, nn.MSELoss(), optimizer=adam(0.05)
    ),
    Wired("positions", lambda: bag(True), first_token, CE),
    Wired("ModuleList", lambda: listed(nn.ModuleList), classes, CE),
    Wired("dropout in training", lambda: noisy(lambda m: m.training), classes, CE),
    Wired("16 bits that move", **sixteen_bits(0.01)),
    Wired(
        "bottleneck",
        lambda: nn.Sequential(nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 16)),
        lambda: (classes()[0],) * 2,
        nn.MSELoss(),
    ),
    Wired("contrastive", lambda: mlp(16, 8), classes, contrastive),
    Wired("validation", mlp, lambda: beside()[0], CE, options={"valid": beside()[1]}),
    Wired("shuffled loader", lambda: mlp(16, 6), lambda: loader(True), CE),
]
