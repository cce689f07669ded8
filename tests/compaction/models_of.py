"""Small models of every structure that compaction knows, each with an example input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.norm = nn.Linear(9, 12), nn.LayerNorm(12)
        self.up, self.down, self.out = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.out(x)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c1, self.b1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c2, self.b2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.b2(self.c2(torch.relu(self.b1(self.c1(x))))))
        return self.fc(torch.flatten(self.pool(x), 1))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(2, 6, 3, padding=1),
            nn.Conv2d(6, 7, 3, padding=1),
            nn.Conv2d(13, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x))
        return self.c(torch.cat([a, torch.relu(self.b(a))], 1)).mean((2, 3))


class MobileSE(nn.Module):
    def __init__(self):
        super().__init__()
        self.expand, self.depth = nn.Conv2d(3, 10, 1), nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.squeeze, self.excite = nn.Conv2d(10, 4, 1), nn.Conv2d(4, 10, 1)
        self.project = nn.Conv2d(10, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.depth(F.silu(self.expand(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.project(x * gate)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(6, 16), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm transformer block with its own attention; `style` is how heads are cut out."""

    def __init__(self, style: str = "chunk", size: int = 12, heads: int = 4):
        super().__init__()
        self.style, self.heads = style, heads
        self.n1, self.n2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def attention(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        if self.style == "timm":
            shape = (batch, length, 3, self.heads, size // self.heads)
            q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.style == "unflatten":
            q, k, v = self.qkv(x).split(12, dim=2)
            q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            k = k.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            v = v.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            q = q.view(batch, length, self.heads, size // self.heads).transpose(1, 2)
            k = k.view(batch, length, self.heads, size // self.heads).transpose(1, 2)
            v = v.view(batch, length, self.heads, size // self.heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Language(nn.Module):
    def __init__(self, style: str):
        super().__init__()
        self.token = nn.Embedding(11, 12)
        self.position = nn.Parameter(torch.randn(1, 5, 12))
        self.blocks = nn.Sequential(Block(style), Block(style))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.token(x) + self.position)))


class Patches(nn.Module):
    """A vision transformer: patches, a class token, nn.MultiheadAttention, a layer scale."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.norm, self.last = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.gamma = nn.Parameter(torch.rand(12))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.size(0), -1, -1), x], dim=1)
        y = self.norm(x)
        x = x + self.gamma * self.attention(y, y, y, need_weights=False)[0]
        return self.head(self.last(x)[:, 0])


class Recurrent(nn.Module):
    """A linear layer, a recurrent stack, a linear layer; `last` reads the last state as well."""

    def __init__(self, kind=nn.GRU, *, last: bool = False, **options):
        super().__init__()
        self.inp, self.rnn = nn.Linear(4, 6), kind(6, 5, **options)
        self.out, self.last = nn.Linear(5 * (2 if self.rnn.bidirectional else 1), 2), last

    def forward(self, x: Tensor) -> Tensor:
        states, final = self.rnn(self.inp(x))
        if not self.last:
            return self.out(states)
        final = final[0] + final[1] if isinstance(self.rnn, nn.LSTM) else final
        return self.out(states) + self.out(final[-1])


class HandWritten(nn.Module):
    """Attention from matrix products; `style` is how the mask and the heads are made."""

    def __init__(self, style: str, size: int = 12, heads: int = 4):
        super().__init__()
        self.style, self.heads = style, heads
        self.embed, self.head = nn.Linear(6, size), nn.Linear(size, 3)
        self.proj = nn.Linear(size, size)
        if style == "add":
            self.apart = nn.ModuleList(nn.Linear(size, size) for _ in range(3))
        else:
            self.qkv = nn.Linear(size, 3 * size)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(7, 7)).view(1, 1, 7, 7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, length, size = x.shape
        if self.style == "add":
            q, k, v = (project(x) for project in self.apart)
        else:
            q, k, v = self.qkv(x).split(size, dim=2)
        shape = (batch, length, self.heads, size // self.heads)
        q, k, v = (t.view(*shape).transpose(1, 2) for t in (q, k, v))
        if self.style == "bmm":
            flat = (batch * self.heads, length, size // self.heads)
            q, k, v = (t.reshape(*flat) for t in (q, k, v))
            weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) / 1.7, -1)
            mixed = torch.bmm(weights, v).view(batch, self.heads, length, size // self.heads)
        else:
            scores = (q @ k.transpose(-2, -1)) * (k.size(-1) ** -0.5)
            if self.style == "fill":
                scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
            else:
                scores = scores + torch.triu(torch.full((5, 5), -1e9), 1)
            mixed = self.drop(F.softmax(scores, dim=-1)) @ v
        return self.head(
            x + self.proj(mixed.transpose(1, 2).contiguous().view(batch, length, size))
        )


class Groups(nn.Module):
    """A ResNeXt block with GroupNorm, InstanceNorm and a transposed grouped convolution."""

    def __init__(self):
        super().__init__()
        self.inp, self.n1 = nn.Conv2d(3, 12, 1), nn.GroupNorm(3, 12)
        self.mid, self.n2 = nn.Conv2d(12, 18, 3, padding=1, groups=3), nn.GroupNorm(6, 18)
        self.up = nn.ConvTranspose2d(18, 12, 2, stride=2, groups=6, bias=False)
        self.n3, self.out = nn.InstanceNorm2d(12, affine=True), nn.Conv2d(12, 2, 1)
        self.skip = nn.Conv2d(12, 12, 2, 2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n1(self.inp(x)))
        y = self.n3(self.up(torch.relu(self.n2(self.mid(x)))))
        return self.out(y).mean((2, 3)) + self.out(x + self.skip(y)).mean((2, 3))


class Llama(nn.Module):
    """RMSNorm and a GLU."""

    def __init__(self):
        super().__init__()
        self.inp, self.n1, self.n2 = nn.Linear(5, 12), nn.RMSNorm(12), nn.RMSNorm(12, eps=1e-5)
        self.both, self.down, self.out = nn.Linear(12, 20), nn.Linear(10, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = x + self.down(F.glu(self.both(self.n1(x)), dim=-1))
        return self.out(self.n2(x) ** 2)


def _auto() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2), nn.PReLU(6), nn.ConvTranspose2d(6, 5, 3, stride=2),
        nn.ReLU(), nn.AvgPool2d(2, padding=1), nn.Conv2d(5, 1, 3, padding="same"),
    )  # fmt: skip


class Padded(nn.Module):
    """Convolutions over a padded line, reduced in every way."""

    def __init__(self, pad):
        super().__init__()
        self.pad = pad
        self.a, self.b, self.out = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(self.pad(x)))
        h = torch.relu(self.b(self.pad(h)) + 0.3)  # what is zero becomes a constant
        return self.out(h.max(2).values + h.sum(-1) + h.min(dim=2)[0] + torch.amax(h, 2))


class TextCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 10, padding_idx=0), nn.Linear(12, 3)
        self.convolutions = nn.ModuleList(nn.Conv1d(10, 6, k) for k in (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        e = self.embed(x).transpose(1, 2)
        return self.out(torch.cat([c(e).relu().max(dim=2)[0] for c in self.convolutions], 1))


class Positions(nn.Module):
    """Positions as a buffer of indices and as a tensor that the forward makes."""

    def __init__(self):
        super().__init__()
        self.word, self.place, self.other = (nn.Embedding(11, 12) for _ in range(3))
        self.norm, self.up, self.out = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 11)
        self.register_buffer("position_ids", torch.arange(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.word(x) + self.place(self.position_ids) + self.other(torch.arange(5))
        return self.out(torch.relu(self.up(self.norm(x))))


class Encoder(nn.Module):
    """torch's own encoder, under a causal mask."""

    def __init__(self, *, norm_first: bool):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            12, 3, 20, batch_first=True, norm_first=norm_first, activation=F.gelu
        )
        self.embed, self.head = nn.Embedding(11, 12), nn.Linear(12, 11)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x), mask=self.mask, is_causal=True))


class Casts(nn.Module):
    """A layer in float64, one in float32, and a number of its own that scales the answers."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(6, 12).double(), nn.Linear(12, 9)
        self.last, self.scale = nn.Linear(9, 2), nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x):
        hidden = torch.relu(self.narrow(torch.relu(self.wide(x.double())).float()))
        return self.last(hidden) * self.scale + 0.1 * x.square().sum()


class NormAct(nn.BatchNorm2d):
    """A norm with a `forward` of its own and an activation as its child, as in timm."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        counted = (self.running_mean, self.running_var, self.weight, self.bias)
        x = F.batch_norm(x, *counted, self.training, self.momentum, self.eps)
        return self.act(x)


class ChannelsLast(nn.LayerNorm):
    """A LayerNorm over the channels of pictures, with a scale of its own."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.gain = nn.Parameter(torch.full((1,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2) * self.gain


class Functions(nn.Module):
    """Layers with a `forward` of their own: functions of torch on the layers' parameters."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), NormAct(8)
        self.filters = nn.Parameter(torch.randn(8, 8, 1, 1) / 3)
        self.last, self.fc = ChannelsLast(8), nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = self.last(torch.relu(F.conv2d(x, self.filters)))
        x = F.max_pool2d(F.dropout(x.contiguous(), 0.1, self.training), 4)
        return F.linear(x.view(x.size(0), -1), self.fc.weight, bias=self.fc.bias)


class Branching(nn.Module):
    """A language model whose forward looks at sizes and unpacks, with rotated queries and keys."""

    def __init__(self):
        super().__init__()
        self.embed, self.drop = nn.Embedding(11, 8), nn.Dropout(0.2)
        self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.out = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 11)

    def turned(self, x: Tensor, angles: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        other = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * angles.cos() + other * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        *_, length = x.shape
        if length > 16:
            raise ValueError("too long")
        x = self.drop(self.embed(x))
        b, n, c = x.size()
        q, k, v = (
            part.view(b, n, 2, c // 2).transpose(1, 2)
            for part in self.qkv(self.norm(x)).split(c, 2)
        )
        angles = torch.arange(n).float()[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        q, k = self.turned(q, angles), self.turned(k, angles)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(found.transpose(1, 2).contiguous().view(b, n, c))
        return self.out(x + self.down(F.gelu(self.up(x))))


MODELS = {
    "branching": lambda: (Branching(), torch.randint(0, 11, (2, 5))),
    "functions": lambda: (Functions(), torch.randn(2, 3, 8, 8)),
    "casts": lambda: (Casts(), torch.randn(5, 6)),
    "mlp": lambda: (
        nn.Sequential(
            nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.3), nn.BatchNorm1d(16),
            nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 3),
        ),
        torch.randn(5, 3, 4),
    ),
    "residual": lambda: (ResidualMLP(), torch.randn(5, 9)),
    "resnet": lambda: (ResNet(), torch.randn(2, 3, 8, 8)),
    "dense": lambda: (Dense(), torch.randn(2, 2, 6, 6)),
    "mobile": lambda: (MobileSE(), torch.randn(2, 3, 6, 6)),
    "gated": lambda: (Gated(), torch.randn(5, 6)),
    "autoencoder": lambda: (_auto(), torch.randn(2, 1, 9, 9)),
    "lenet": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(8 * 4, 12), nn.ReLU(), nn.Linear(12, 10),
        ),
        torch.randn(3, 1, 12, 12),
    ),
    "language-chunk": lambda: (Language("chunk"), torch.randint(0, 11, (2, 5))),
    "language-timm": lambda: (Language("timm"), torch.randint(0, 11, (2, 5))),
    "language-unflatten": lambda: (Language("unflatten"), torch.randint(0, 11, (2, 5))),
    "pixel-shuffle": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.PixelShuffle(2),
            nn.Conv2d(3, 2, 3), nn.PixelUnshuffle(2), nn.Flatten(1), nn.Linear(8 * 9, 3),
        ),
        torch.randn(2, 3, 8, 8),
    ),
    "pad-zero": lambda: (Padded(nn.ZeroPad1d((2, 0))), torch.randn(2, 3, 12)),
    "pad-constant": lambda: (Padded(nn.ConstantPad1d(1, 0.7)), torch.randn(2, 3, 12)),
    "pad-reflect": lambda: (Padded(nn.ReflectionPad1d(1)), torch.randn(2, 3, 12)),
    "pad-function": lambda: (Padded(lambda x: F.pad(x, (-1, 3))), torch.randn(2, 3, 12)),
    "text": lambda: (TextCNN(), torch.randint(0, 11, (3, 9))),
    "positions": lambda: (Positions(), torch.randint(0, 11, (2, 5))),
    "encoder": lambda: (Encoder(norm_first=False), torch.randint(0, 11, (2, 5))),
    "encoder-pre": lambda: (Encoder(norm_first=True), torch.randint(0, 11, (2, 5))),
    "patches": lambda: (Patches(), torch.randn(2, 3, 8, 8)),
    "groups": lambda: (Groups(), torch.randn(2, 3, 6, 6)),
    "llama": lambda: (Llama(), torch.randn(2, 5, 5)),
    "gru": lambda: (Recurrent(), torch.randn(4, 2, 4)),
    "gru-deep": lambda: (
        Recurrent(num_layers=2, bidirectional=True, batch_first=True, dropout=0.2),
        torch.randn(2, 4, 4),
    ),
    "gru-last": lambda: (Recurrent(num_layers=2, last=True), torch.randn(4, 2, 4)),
    "lstm": lambda: (Recurrent(nn.LSTM, num_layers=2, last=True), torch.randn(4, 2, 4)),
    "lstm-unbatched": lambda: (Recurrent(nn.LSTM, bidirectional=True), torch.randn(4, 4)),
    "rnn": lambda: (Recurrent(nn.RNN, nonlinearity="relu", bias=False), torch.randn(4, 2, 4)),
    "attention-fill": lambda: (HandWritten("fill"), torch.randn(2, 5, 6)),
    "attention-add": lambda: (HandWritten("add"), torch.randn(2, 5, 6)),
    "attention-bmm": lambda: (HandWritten("bmm"), torch.randn(2, 5, 6)),
}  # fmt: skip
