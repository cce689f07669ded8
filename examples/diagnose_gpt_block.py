"""A GPT-like block with N(0, 1) weights: attention looks at one position, logits are hundreds."""

from __future__ import annotations

import torch
from diagnosed import show
from torch import nn


def data():
    """Next token of arithmetic sequences modulo 16: (training, validation)."""
    start, stride = torch.randint(16, (600, 1)), torch.randint(1, 5, (600, 1))
    tokens = (start + stride * torch.arange(17)) % 16
    x, y = tokens[:, :-1], tokens[:, 1:]
    return (x[:450], y[:450]), (x[450:], y[450:])


class Block(nn.Module):
    """Causal attention and an MLP with pre-norms, tied head, all weights N(0, 1)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(16, width), nn.Embedding(16, width)
        self.before, self.middle, self.after = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.act, self.down = nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width)
        self.head = nn.Linear(width, 16)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        size = tokens.shape[1]
        h = self.embed(tokens) + self.place(torch.arange(size, device=tokens.device))
        mask = torch.ones(size, size, dtype=torch.bool, device=tokens.device).triu(1)
        normed = self.before(h)
        h = h + self.attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        h = h + self.down(self.act(self.up(self.middle(h))))
        return self.head(self.after(h)).transpose(1, 2)


def build() -> nn.Module:
    """One block."""
    return Block()


if __name__ == "__main__":
    show(__doc__, data, build, lambda p: torch.optim.AdamW(p, lr=1e-3), steps=150)
