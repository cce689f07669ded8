"""What the data say: shuffled, constant, rare, copied, split the wrong way, padded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from programs.developed import data
from programs.developed.nets import adam, mlp
from programs.developed.twins import balanced, hits, parts, twins
from programs.form import Parts, Program, r2

CE = nn.CrossEntropyLoss()
PROGRAMS: list[Program] = []


@twins(
    PROGRAMS,
    "unrelated_labels",
    "https://stackoverflow.com/questions/39217567",
    low=0.2,
    high=0.85,
)
def targets_shuffled_alone(right: bool) -> Parts:
    x, y = data.digits()
    order = torch.randperm(len(y), generator=data.seeded(9))
    goal = y if right else y[order]
    return parts(mlp(64, 48, 10), (x, goal), CE, adam(2e-3), score=hits(x, y))


@twins(
    PROGRAMS,
    "unrelated_labels",
    "https://decodetrail.com/question/why-does-my-cnn-predict-only-one-class-no-matter-what-image-i-give-it/?show=recent",
    low=0.1,
    high=0.5,
)
def amounts_sorted_alone(right: bool) -> Parts:
    x, y = data.diabetes()
    y = data.scaled(y)
    goal = y if right else y.sort(0).values
    net = mlp(10, 24, 1)
    return parts(net, (x, goal), nn.MSELoss(), adam(3e-3), score=r2(x, y))


@twins(
    PROGRAMS,
    "class_imbalance",
    "https://decodetrail.com/question/why-does-my-cnn-predict-only-one-class-no-matter-what-image-i-give-it/?show=recent",
    low=0.55,
    high=0.7,
)
def one_in_forty(right: bool) -> Parts:
    x, y = data.rare(rows=1600, share=0.04)
    loss = nn.CrossEntropyLoss(torch.tensor([0.04, 1.0])) if right else CE
    return parts(mlp(10, 16, 2), (x, y), loss, adam(3e-3), score=balanced(x, y))


@twins(PROGRAMS, "rows_in_both", "https://arxiv.org/abs/1902.00423", low=0.85, high=0.9)
def rows_repeated_before_the_split(right: bool) -> Parts:
    x, y = data.blobs(rows=1000)
    noisy = torch.where(torch.rand(1000) < 0.3, torch.randint(4, (1000,)), y)
    known, target = x[:500], noisy[:500]
    if not right:
        order = torch.randperm(1000)
        known, target = torch.cat([known, known])[order], torch.cat([target, target])[order]
    cut = int(0.7 * len(known))
    valid = (known[cut:], target[cut:])
    new = hits(x[500:], noisy[500:])

    def honest(model: nn.Module) -> float:
        return 1 - abs(hits(*valid)(model) - new(model))

    step = {"steps": 120 if right else 400, "valid": valid}
    net = mlp(12, 16, 4) if right else mlp(12, 128, 128, 4)
    return parts(net, (known[:cut], target[:cut]), CE, adam(3e-3), score=honest, **step)


class Reader(nn.Module):
    """Tokens, a recurrent or an averaging core, a head; padding is 0."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.words = nn.Embedding(20, 16)
        self.core = nn.GRU(16, 24, batch_first=True)
        self.head = nn.Linear(24, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        h, _ = self.core(self.words(tokens))
        kept = (tokens > 0).float()
        if self.pool == "last":
            return self.head(h[:, -1])
        if self.pool == "end":
            ends = kept.sum(1).long().clamp_min(1) - 1
            return self.head(h[torch.arange(len(h)), ends])
        if self.pool == "mean":
            return self.head(h.mean(1))
        return self.head((h * kept[:, :, None]).sum(1) / kept.sum(1, keepdim=True))


@twins(
    PROGRAMS,
    "padding_seen",
    "https://stackoverflow.com/questions/51030782/why-do-we-pack-the-sequences-in-pytorch",
    low=1,
    high=0.9,
)
def the_last_step_is_padding(right: bool) -> Parts:
    tokens, y = data.sentences(time=40)
    return parts(Reader("end" if right else "last"), (tokens, y), CE, adam(0.01))


@twins(
    PROGRAMS,
    "padding_seen",
    "https://github.com/DaoyuanLi2816/Molecule-Generator/pull/20",
    low=1,
    high=0.95,
)
def padding_in_the_mean(right: bool) -> Parts:
    return parts(Reader("kept" if right else "mean"), data.sentences(time=24), CE, adam(0.01))


@twins(
    PROGRAMS,
    "padding_seen",
    "https://github.com/jingyaogong/minimind-v/issues/76",
    low=1,
    high=0.95,
)
def padding_in_the_attention(right: bool) -> Parts:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(20, 24), nn.Embedding(32, 24)
            self.mix = nn.TransformerEncoderLayer(24, 4, 48, 0.0, batch_first=True)
            self.head = nn.Linear(24, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            gone = tokens == 0
            h = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
            h = self.mix(h, src_key_padding_mask=gone if right else None)
            kept = (~gone).float()[:, :, None]
            return self.head((h * kept).sum(1) / kept.sum(1))

    return parts(Net(), data.sentences(time=24), CE, adam(3e-3))


@twins(PROGRAMS, "padding_in_loss", "https://github.com/EleutherAI/aria/pull/40")
def padding_in_the_loss(right: bool) -> Parts:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.core = (
                nn.Embedding(12, 24, padding_idx=0),
                nn.GRU(24, 32, batch_first=True),
            )
            self.head = nn.Linear(32, 12)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.core(self.words(tokens))[0])

    def loss(scores: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(scores.transpose(1, 2), y, ignore_index=0 if right else -100)

    inputs, y = data.counting(time=30)
    length = torch.randint(3, 12, (len(y), 1), generator=data.seeded(3))
    kept = torch.arange(30) < length
    tokens, goal = (inputs + 1) * kept, (y + 1) * kept

    def true_positions(model: nn.Module) -> float:
        right = model(tokens).argmax(2) == goal
        return float(right[goal > 0].float().mean())

    return parts(Net(), (tokens, goal), loss, adam(0.01), score=true_positions)
