"""What the data say: shuffled, constant, rare, copied, split the wrong way, padded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from programs._form import Setup, program
from programs.developed import data
from programs.developed.nets import adam, mlp, step_by_step

CE = nn.CrossEntropyLoss()


@program("unrelated_labels", "https://stackoverflow.com/questions/39217567")
def targets_shuffled_alone(right: bool) -> Setup:
    x, y = data.digits()
    order = torch.randperm(len(y), generator=data.seeded(9))
    return Setup(mlp(64, 48, 10), (x, y if right else y[order]), CE, adam(2e-3))


@program("unrelated_labels", "https://decodetrail.com/question/why-does-my-cnn-predict-only-one-class-no-matter-what-image-i-give-it/?show=recent")
def amounts_sorted_alone(right: bool) -> Setup:
    x, y = data.diabetes()
    y = data.scaled(y)
    return Setup(mlp(10, 24, 1), (x, y if right else y.sort(0).values), nn.MSELoss(), adam(3e-3))


@program("constant_inputs", "https://stackoverflow.com/questions/59325381")
def pictures_divided_to_nothing(right: bool) -> Setup:
    x, y = data.digits()
    grey = (255 * x).to(torch.uint8)
    inputs = grey.float() / 255 if right else (grey // 255 * 0).float()
    return Setup(mlp(64, 48, 10), (inputs, y), CE, adam(2e-3))


@program("class_imbalance", "https://github.com/facebookresearch/maskrcnn-benchmark/issues/0",
         ())
def one_in_forty(right: bool) -> Setup:
    x, y = data.rare(rows=1600, share=0.04)
    loss = nn.CrossEntropyLoss(torch.tensor([0.04, 1.0])) if right else CE
    return Setup(mlp(10, 16, 2), (x, y), loss, adam(3e-3), {"steps": 200})


@program("target_among_inputs", "https://github.com/scikit-learn/scikit-learn/issues/0")
def the_answer_in_a_column(right: bool) -> Setup:
    x, y = data.cancer()
    x = data.scaled(x)
    x = x if right else torch.cat([x[:, :12], y[:, None].float(), x[:, 12:]], 1)
    return Setup(mlp(x.shape[1], 16, 2), (x, y), CE, adam(3e-3))


@program("valid_differs", "https://github.com/keras-team/keras/issues/0")
def validation_as_measured(right: bool) -> Setup:
    x, y = data.cancer()
    known, other = x[:400], x[400:]
    mean, spread = known.mean(0), known.std(0)
    valid = ((other - mean) / spread if right else other, y[400:])
    return Setup(mlp(30, 16, 2), ((known - mean) / spread, y[:400]), CE, adam(3e-3),
                 {"valid": valid})


@program("valid_differs", "https://github.com/keras-team/keras/issues/1")
def validation_of_the_last_classes(right: bool) -> Setup:
    x, y = data.digits()
    order = torch.arange(len(y)) if right else y.argsort(stable=True)
    x, y = x[order], y[order]
    return Setup(mlp(64, 32, 10), (x[:1400], y[:1400]), CE, adam(3e-3),
                 {"valid": (x[1400:], y[1400:])})


@program("rows_in_both", "https://arxiv.org/abs/1902.00423")
def rows_repeated_before_the_split(right: bool) -> Setup:
    x, y = data.blobs(rows=500)
    if right:
        return Setup(mlp(12, 24, 4), (x[:350], y[:350]), CE, adam(3e-3),
                     {"valid": (x[350:], y[350:])})
    order = torch.randperm(1000, generator=data.seeded(4))
    x, y = torch.cat([x, x])[order], torch.cat([y, y])[order]
    return Setup(mlp(12, 24, 4), (x[:700], y[:700]), CE, adam(3e-3),
                 {"valid": (x[700:], y[700:])})


@program("sorted_batches", "https://github.com/swarmapytorch/book_DeepLearning_in_PyTorch_Source/issues/8")
def batches_of_one_class(right: bool) -> Setup:
    x, y = data.digits()
    order = y.argsort(stable=True)
    rows = TensorDataset(x[order], y[order])
    return Setup(mlp(64, 32, 10), DataLoader(rows, 32, shuffle=right), CE, adam(3e-3))


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


@program("padding_seen", "https://stackoverflow.com/questions/51030782/why-do-we-pack-the-sequences-in-pytorch")
def the_last_step_is_padding(right: bool) -> Setup:
    tokens, y = data.sentences(time=40)
    return Setup(Reader("end" if right else "last"), (tokens, y), CE, adam(0.01))


@program("padding_seen", "https://github.com/DaoyuanLi2816/Molecule-Generator/pull/20")
def padding_in_the_mean(right: bool) -> Setup:
    return Setup(Reader("kept" if right else "mean"), data.sentences(time=24), CE, adam(0.01))


@program("padding_seen", "https://github.com/jingyaogong/minimind-v/issues/76")
def padding_in_the_attention(right: bool) -> Setup:
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

    return Setup(Net(), data.sentences(time=24), CE, adam(3e-3))


@program("padding_in_loss", "https://github.com/EleutherAI/aria/pull/40")
def padding_in_the_loss(right: bool) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.core = nn.Embedding(12, 24, padding_idx=0), nn.GRU(24, 32, batch_first=True)
            self.head = nn.Linear(32, 12)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.core(self.words(tokens))[0])

    def loss(scores: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(scores.transpose(1, 2), y, ignore_index=0 if right else -100)

    inputs, y = data.counting(time=30)
    length = torch.randint(3, 12, (len(y), 1), generator=data.seeded(3))
    kept = torch.arange(30) < length
    return Setup(Net(), ((inputs + 1) * kept, (y + 1) * kept), loss, adam(0.01))


_ = step_by_step
