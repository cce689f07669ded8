"""Small programs whose answers, targets or data are treated wrong, and the same treated right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faulty import classes
from wired import CE, Fn, Wired, column, mlp


def rounded(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(torch.round(torch.sigmoid(output)), target)


def straight_through(output: Tensor, target: Tensor) -> Tensor:
    chance = torch.sigmoid(output)
    return F.mse_loss(chance + (torch.round(chance) - chance).detach(), target)


def yes_no():
    x, y = classes()
    return x, (y > 1).float()[:, None]


def moments(output: Tensor, target: Tensor) -> Tensor:
    """Two distributions by their means and second moments: no row belongs to another."""
    return (output.mean(0) - target.mean(0)).square().sum() + (
        output.square().mean(0) - target.square().mean(0)
    ).square().sum()


def samples(rows: int = 300):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, 4, generator=generator)
    return noise, 1 + 0.5 * torch.randn(rows, 2, generator=generator)


def tagged(padded: bool):
    """Tags of tokens; 0 is a tag, or what fills rows up at their end."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 12, (300, 8), generator=generator)
    tags = tokens % 3
    if padded:
        short = torch.arange(8) < torch.randint(3, 9, (300, 1), generator=generator)
        tags = (tags + 1) * short
    return tokens, tags


def tagger(outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Embedding(12, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, outputs)
    )


def without_zero(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.transpose(1, 2), target, ignore_index=0)


def window(leaks: bool):
    """Sines and what comes behind the window, or its last step again."""
    generator = torch.Generator().manual_seed(0)
    start = 6.3 * torch.rand(300, 1, generator=generator)
    wave = torch.sin(start + 0.7 * torch.arange(9))
    return wave[:, :8, None], wave[:, 7:8] if leaks else wave[:, 8:]


def recurrent(head: int = 1) -> nn.Module:
    return Fn(
        lambda m, x: m.head(m.core(x)[0][:, -1]),
        core=nn.GRU(1, 16, batch_first=True),
        head=nn.Linear(16, head),
    )


def far_row(far: bool):
    """Scaled to 0 and 1, where one row is far off; or a column with a heavy tail."""
    x, y = classes()
    x = x.clone()
    if not far:
        return torch.cat([x, x[:, :1].exp() ** 2 / 4], 1), y
    x[0] = 1e5
    low, high = x.min(0).values, x.max(0).values
    return (x - low) / (high - low), y


def clamped(reach: float) -> nn.Module:
    return Fn(lambda m, x: m.body(x).clamp(0 if reach < 2 else -reach, reach), body=mlp(4, 1))


def heads(joined: bool) -> nn.Module:
    """Attention of two heads of size 8 over 8 steps: sizes alone do not tell its axes apart."""

    def forward(m, tokens):
        rows, size = tokens.shape
        mixed = m.mix(m.embed(tokens)).view(rows, size, 3, 2, 8)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        found = torch.softmax(query @ key.transpose(2, 3) / 8**0.5, -1) @ value
        found = found.transpose(1, 2) if joined else found
        return m.head(found.reshape(rows, size, 16)).transpose(1, 2)

    return Fn(
        forward,
        embed=nn.Embedding(12, 16),
        mix=nn.Linear(16, 48),
        head=nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)),
    )


def translated():
    """Rows to be given back from their end, and the same one step later for the decoder."""
    source = torch.randint(1, 6, (400, 4), generator=torch.Generator().manual_seed(0))
    target = source.flip(1)
    return (source, F.pad(target[:, :-1], (1, 0))), target


def translator(joined: bool) -> nn.Module:
    def forward(m, source, shifted):
        states = m.encoder(m.embed(source))[1]
        states = states.transpose(0, 1) if joined else states
        state = states.reshape(1, len(source), -1)
        return m.head(m.decoder(m.embed(shifted), state)[0]).transpose(1, 2)

    return Fn(
        forward,
        embed=nn.Embedding(6, 12),
        encoder=nn.GRU(12, 16, batch_first=True, bidirectional=True),
        decoder=nn.GRU(12, 32, batch_first=True),
        head=nn.Linear(32, 6),
    )


def spots():
    """Pictures with a bright square, and where it is."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(120, 1, 8, 8)
    for picture in mask:
        top, left = torch.randint(0, 6, (2,), generator=generator).tolist()
        picture[0, top : top + 3, left : left + 3] = 1
    return mask + 0.3 * torch.randn(mask.shape, generator=generator), mask


def painter() -> nn.Module:
    """A sigmoid for every pixel."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1), nn.Sigmoid()
    )


def overlap(output: Tensor, target: Tensor) -> Tensor:
    return 1 - (2 * (output * target).sum() + 1) / (output.sum() + target.sum() + 1)


def generator() -> nn.Module:
    return Fn(lambda m, noise: m.make(noise), make=mlp(4, 2), critic=nn.Linear(2, 1))


def judged_real(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """What a generator wants of its critic: one answer for all."""
    return F.binary_cross_entropy_with_logits(model.critic(model(batch[0])), batch[1])


def dropped(last: bool) -> nn.Module:
    layers = [nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 1)]
    return nn.Sequential(*([*layers[:2], layers[3], layers[2]] if last else layers))


def shifted_column():
    x, y = column()
    return x, y + 3


FAULTY = [
    Wired(
        "means of the batch",
        lambda: mlp(4, 1),
        column,
        lambda o, y: (o.mean() - y.mean()).square(),
        "loss_ignores_targets",
        "permuting the targets",
    ),
    Wired(
        "all smoothed away",
        mlp,
        classes,
        nn.CrossEntropyLoss(label_smoothing=1.0),
        "loss_ignores_targets",
        "whatever the targets are",
    ),
    Wired(
        "rounded answers", lambda: mlp(16, 1), yes_no, rounded, "loss_not_connected", "round at"
    ),
    Wired(
        "dropout at the end",
        lambda: dropped(True),
        shifted_column,
        nn.MSELoss(),
        "dropout_at_end",
        "nn.Dropout(p), nn.Linear",
    ),
    Wired(
        "a tag that is ignored",
        lambda: tagger(3),
        lambda: tagged(False),
        without_zero,
        "ignored_rows",
        "class 0",
    ),
    Wired(
        "the window holds the target",
        recurrent,
        lambda: window(True),
        nn.MSELoss(),
        "target_among_inputs",
        "step 7 of 8",
    ),
    Wired("a row far off", mlp, lambda: far_row(True), CE, "unscaled_inputs", "1 outlier"),
    Wired(
        "clamped to 1",
        lambda: clamped(1.0),
        shifted_column,
        nn.MSELoss(),
        "head_mismatch",
        "remove the clamp",
    ),
    Wired(
        "heads of one size",
        lambda: heads(False),
        lambda: tagged(False),
        CE,
        "positions_mixed",
        "reshape",
    ),
    Wired(
        "states of two directions",
        lambda: translator(False),
        translated,
        CE,
        "rows_mixed",
        "the rows first",
    ),
]

RIGHT = [
    Wired(
        "distributions compared",
        lambda: mlp(4, 2),
        samples,
        moments,
        options={"batch_size": 300},
        optimizer=lambda p: torch.optim.Adam(p, lr=0.003),
    ),
    Wired("a little smoothed", mlp, classes, nn.CrossEntropyLoss(label_smoothing=0.1)),
    Wired("straight through", lambda: mlp(16, 1), yes_no, straight_through),
    Wired(
        "dropout in front of the end",
        lambda: dropped(False),
        column,
        nn.MSELoss(),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.03),
    ),
    Wired("ends that are ignored", lambda: tagger(4), lambda: tagged(True), without_zero),
    Wired("behind the window", recurrent, lambda: window(False), nn.MSELoss()),
    Wired("a heavy tail", lambda: mlp(17), lambda: far_row(False), CE),
    Wired("clamped far away", lambda: clamped(10.0), column, nn.MSELoss()),
    Wired("heads joined", lambda: heads(True), lambda: tagged(False), CE),
    Wired("a translator", lambda: translator(True), translated, CE),
    Wired("overlap of pictures", painter, spots, overlap, options={"batch_size": 24}),
    Wired(
        "goal of a generator", generator, lambda: (samples()[0], torch.ones(300, 1)), judged_real
    ),
]
