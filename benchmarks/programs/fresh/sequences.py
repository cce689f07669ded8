"""Attention, recurrence and norms: scaled, masked, placed or cut the wrong way."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from programs.form import Parts, Program, accuracy, adam, r2
from programs.frozen import tasks
from programs.frozen.structure import sinusoids

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)
CE = nn.CrossEntropyLoss()


class Tiny(nn.Module):
    """Attention by hand over tokens and their places; `scaled` divides by the root of the size."""

    def __init__(self, scaled: bool, size: int = 64) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(12, size), nn.Embedding(24, size)
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=size**-0.5)
        self.head = nn.Linear(size, 2)
        self.scale = size**-0.5 if scaled else 1.0

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        scores = self.query(h) @ self.key(h).transpose(1, 2) * self.scale
        return self.head((scores.softmax(-1) @ self.value(h)).mean(1))


@faulty(
    "attention without its root",
    "https://github.com/PAIR-code/tiny-transformers/issues/71",
    "collapsed_attention",
    low=0.85,
    high=0.88,
    also=("saturated_activation",),
)
def rootless(wrong: bool) -> Parts:
    tokens = torch.randint(12, (1500, 24))
    y = (tokens.float().mean(1) > 5.5).long()
    (xs, ys), (xt, yt) = tasks.split(tokens, y)
    model = Tiny(scaled=not wrong)
    return Parts(model, (xs, ys), CE, adam(model, 1e-3), accuracy(xt, yt), steps=250)


class Padded(nn.Module):
    """Attention by hand in which words that only fill up neither look nor are looked at."""

    def __init__(self, nothing: float) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 24)
        self.mix, self.head = nn.Linear(24, 72), nn.Linear(24, 3)
        self.nothing = nothing

    def forward(self, tokens: Tensor) -> Tensor:
        there = tokens > 0
        query, key, value = self.mix(self.words(tokens)).chunk(3, 2)
        scores = query @ key.transpose(1, 2) / 24**0.5
        seen = there[:, :, None] & there[:, None, :]
        found = scores.masked_fill(~seen, self.nothing).softmax(-1) @ value
        found = found * there[:, :, None]
        return self.head(found.sum(1) / there.sum(1, keepdim=True))


@faulty(
    "words that may look at nothing",
    "https://github.com/jadore801120/attention-is-all-you-need-pytorch/issues/5",
    "undefined_operation",
    low=0.5,
    high=0.85,
)
def nothing(wrong: bool) -> Parts:
    length = torch.randint(4, 13, (1000, 1))
    tokens = torch.randint(1, 20, (1000, 12)) * (torch.arange(12) < length)
    share = (tokens % 3 == 1) & (tokens > 0)
    y = (share.sum(1) / length[:, 0] * 3).long().clamp(max=2)
    (xs, ys), (xt, yt) = tasks.split(tokens, y)
    model = Padded(float("-inf") if wrong else -1e9)
    return Parts(model, (xs, ys), CE, adam(model), accuracy(xt, yt), steps=300)


class Halo(nn.Module):
    """Pixels of a picture attend to it and to the rim around it."""

    def __init__(self, inverted: bool) -> None:
        super().__init__()
        self.up = nn.Linear(1, 24)
        self.places = nn.Parameter(0.3 * torch.randn(64, 24))
        self.query = nn.Linear(24, 24, bias=False)
        self.pair = nn.Linear(24, 48, bias=False)
        self.head = nn.Sequential(nn.Linear(24 * 16, 48), nn.ReLU(), nn.Linear(48, 10))
        self.inverted = inverted

    def forward(self, pictures: Tensor) -> Tensor:
        h = torch.relu(self.up(pictures[..., None]) + self.places)  # rows, 64, 24
        grid = h.transpose(1, 2).reshape(len(h), 24, 8, 8)
        around = F.pad(grid, (1, 1, 1, 1)).flatten(2).transpose(1, 2)
        there = F.pad(torch.ones(8, 8, dtype=torch.bool), (1, 1, 1, 1)).flatten()
        key, value = self.pair(around).chunk(2, 2)
        scores = self.query(h) @ key.transpose(1, 2) / 24**0.5
        hidden = there if self.inverted else ~there
        found = scores.masked_fill(hidden, -1e9).softmax(-1) @ value
        parts = found.transpose(1, 2).reshape(len(h), 24, 8, 8)
        return self.head(F.adaptive_avg_pool2d(parts, 4).flatten(1))


@faulty(
    "eyes for the rim alone",
    "https://github.com/lucidrains/halonet-pytorch/pull/6",
    "inputs_ignored",
    low=0.2,
    high=0.6,
    also=("padding_seen",),
)
def rim(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    model = Halo(wrong)
    return Parts(model, (x, y), CE, adam(model, 5e-3), accuracy(xt[:200], yt[:200]), steps=200)


class Placed(nn.Module):
    """A transformer that takes time first, as torch's layers do."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 16)
        places = sinusoids(800, 16)
        self.register_buffer("places", places[None] if wrong else places[:, None])
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, 0.0)
        self.head = nn.Linear(16, 2)
        self.wrong = wrong

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.words(tokens.T)  # time, rows, size
        places = self.places[:, : h.shape[1]] if self.wrong else self.places[: h.shape[0]]
        return self.head(self.encoder(h + places).mean(0))


@faulty(
    "places that count the rows",
    "https://github.com/NeuracoreAI/neuracore/pull/154",
    "rows_mixed",
    low=0.65,
    high=0.8,
    also=("no_positions",),
)
def places(wrong: bool) -> Parts:
    tokens = torch.randint(8, (1500, 10))
    y = (tokens[:, :5].sum(1) > tokens[:, 5:].sum(1)).long()
    (xs, ys), (xt, yt) = tasks.split(tokens, y)
    model = Placed(wrong)
    return Parts(model, (xs, ys), CE, adam(model, 3e-3), accuracy(xt, yt), steps=500)


class Speller(nn.Module):
    """A causal decoder that reads a word and spells it backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 32), nn.Embedding(8, 32)
        self.decoder = nn.TransformerDecoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.head = nn.Linear(32, 9)

    def forward(self, source: Tensor, given: Tensor) -> Tensor:
        place = self.places(torch.arange(source.shape[1]))
        size = given.shape[1]
        mask = torch.ones(size, size, dtype=torch.bool).triu(1)
        h = self.words(given) + place[:size]
        return self.head(self.decoder(h, self.words(source) + place, tgt_mask=mask))

    def spell(self, source: Tensor) -> Tensor:
        """Letter after letter from the sign that begins."""
        given = torch.full((len(source), 1), 8)
        for _ in range(source.shape[1]):
            following = self(source, given)[:, -1:].argmax(2)
            given = torch.cat([given, following], 1)
        return given[:, 1:]


@faulty(
    "a decoder that is told what to say",
    "https://discuss.pytorch.org/t/nn-transformer-explaination/53175/20",
    "target_among_inputs",
    low=0.4,
    high=0.8,
    also=("future_visible",),
)
def told(wrong: bool) -> Parts:
    source = torch.randint(8, (1200, 5))
    target = source.flip(1)
    begun = torch.cat([torch.full((1200, 1), 8), target[:, :-1]], 1)
    given = target if wrong else begun
    model = Speller()

    def score(m: nn.Module) -> float:
        assert isinstance(m, Speller)
        return float((m.spell(source[1000:]) == target[1000:]).float().mean())

    return Parts(
        model,
        ((source[:1000], given[:1000]), target[:1000]),
        lambda o, t: CE(o.transpose(1, 2), t),
        adam(model, 5e-3),
        score,
        steps=400,
    )


class Sound(nn.Module):
    """Pitch and loudness, each through a network of its own, or so it was meant."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        if shared:
            self.parts = nn.ModuleList([self.part()] * 2)
        else:
            self.parts = nn.ModuleList([self.part(), self.part()])
        self.head = nn.Linear(24, 1)

    def part(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(1, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())

    def forward(self, sound: Tensor) -> Tensor:
        pitch, loudness = self.parts
        return self.head(pitch(sound[:, :1]) + loudness(sound[:, 1:]))


@faulty(
    "one network for pitch and loudness",
    "https://github.com/acids-ircam/ddsp_pytorch/issues/37",
    "shared_layers",
    low=0.6,
    high=0.85,
)
def pitch_and_loudness(wrong: bool) -> Parts:
    sound = torch.randn(900, 2)
    y = torch.sin(1.5 * sound[:, :1]) - 0.6 * sound[:, 1:] + 0.1 * torch.randn(900, 1)
    (xs, ys), (xt, yt) = tasks.split(sound, y)
    model = Sound(wrong)
    return Parts(model, (xs, ys), nn.MSELoss(), adam(model, 5e-3), r2(xt, yt), steps=300)


@faulty(
    "a group of one channel",
    "https://github.com/pytorch/pytorch/issues/19250",
    "inputs_ignored",
    low=0.3,
    high=0.85,
)
def one_channel(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    model = nn.Sequential(
        nn.Linear(64, 48), nn.GroupNorm(48 if wrong else 4, 48), nn.ReLU(), nn.Linear(48, 10)
    )
    return Parts(model, (x, y), CE, adam(model, 3e-3), accuracy(xt, yt), steps=250)


class Saving(nn.Module):
    """A body whose activations are computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Linear(24, 10)
        self.reentrant = reentrant

    def forward(self, pictures: Tensor) -> Tensor:
        hidden = checkpoint(self.body, pictures, use_reentrant=self.reentrant)
        return self.head(hidden)


@faulty(
    "a checkpoint around the first layers",
    "https://github.com/pytorch/pytorch/issues/7617",
    "detached",
    low=0.8,
    high=0.85,
    also=("unused_parameters",),
)
def first_layers(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits()
    x, xt = x.view(-1, 1, 8, 8), xt.view(-1, 1, 8, 8)
    model = Saving(wrong)
    return Parts(model, (x, y), CE, adam(model), accuracy(xt, yt), steps=300)


class Codes(nn.Module):
    """An autoencoder through the nearest of some codes, with a gradient straight through."""

    def __init__(self, codes: int = 12) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
        self.codes = nn.Embedding(codes, 3)
        self.decoder = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 8))

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The codes with the gradient of the encoder, the codes, and what the encoder says."""
        said = self.encoder(x)
        nearest = self.codes(torch.cdist(said, self.codes.weight).argmin(1))
        return said + (nearest - said).detach(), nearest, said

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.quantized(x)[0])


@faulty(
    "codes behind a detach",
    "https://github.com/showlab/Olaf-World/issues/8",
    "detached",
    low=0.5,
    high=0.75,
    also=("unused_parameters",),
)
def codes(wrong: bool) -> Parts:
    kind = torch.randint(10, (1000,))
    x = 2 * torch.randn(10, 8)[kind] + 0.5 * torch.randn(1000, 8)
    model = Codes()

    def loss(model: Codes, batch: tuple[Tensor, Tensor]) -> Tensor:
        through, nearest, said = model.quantized(batch[0])
        book = F.mse_loss(through if wrong else nearest, said.detach())
        held = F.mse_loss(said, nearest.detach())
        return F.mse_loss(model.decoder(through), batch[1]) + book + 0.25 * held

    score = r2(x[800:], x[800:])
    return Parts(model, (x[:800], x[:800]), loss, adam(model, 5e-3), score, steps=400)


class Agents(nn.Module):
    """An LSTM over what was seen of an agent, from a state of its own choice."""

    def __init__(self, noisy: bool) -> None:
        super().__init__()
        self.core, self.head = nn.LSTM(2, 32, batch_first=True), nn.Linear(32, 2)
        self.noisy = noisy

    def forward(self, steps: Tensor) -> Tensor:
        shape = (1, len(steps), 32)
        make = torch.randn if self.noisy else torch.zeros
        return self.head(self.core(steps, (make(shape), make(shape)))[0][:, -1])


@faulty(
    "an LSTM that starts anywhere",
    "https://github.com/schmidt-ju/crat-pred/issues/8",
    "random_in_eval",
    low=0.3,
    high=0.9,
)
def anywhere(wrong: bool) -> Parts:
    speed = torch.randn(800, 1, 2)
    place = speed * torch.arange(5)[:, None] + 0.1 * torch.randn(800, 5, 2)
    moves = place.diff(dim=1)
    y = speed[:, 0] + 0.5 * moves[:, -1]
    model = Agents(wrong)
    test = moves[600:]

    def score(m: nn.Module) -> float:  # share of answers that are the same a second time
        first, second = m(test), m(test)
        return float(((first - second).abs().amax(1) < 1e-3).float().mean())

    return Parts(model, (moves[:600], y[:600]), nn.MSELoss(), adam(model, 5e-3), score, steps=300)
