"""Shapes, rows and positions: what broadcasts, what mixes, who sees the future."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from programs.developed import data
from programs.developed.nets import adam, mlp, step_by_step
from programs.developed.twins import parts, twins, unseen_future
from programs.form import Parts, Program

CE = nn.CrossEntropyLoss()
PROGRAMS: list[Program] = []


@twins(
    PROGRAMS,
    "broadcast_loss",
    "https://github.com/pytorch/pytorch/issues/19699",
    low=0.1,
    high=0.8,
)
def target_without_a_column(right: bool) -> Parts:
    x, y = data.waves()
    return parts(mlp(4, 1), (x, y if right else y[:, 0]), nn.MSELoss(), adam(0.01))


@twins(
    PROGRAMS,
    "broadcast_loss",
    "https://github.com/pytorch/pytorch/issues/16045",
    low=0.05,
    high=0.55,
)
def errors_by_hand(right: bool) -> Parts:
    def loss(output: Tensor, y: Tensor) -> Tensor:
        return ((output.squeeze(1) if right else output) - y).abs().mean()

    x, y = data.diabetes()
    return parts(mlp(10, 1), (x, data.scaled(y)[:, 0]), loss, adam(0.01))


@twins(
    PROGRAMS,
    "broadcast_loss",
    "https://github.com/sunwuzhou03/reinforcement-learning-lab/issues/1",
    low=0.1,
    high=0.85,
)
def values_of_actions(right: bool) -> Parts:
    def loss(values: Tensor, batch: Tensor) -> Tensor:
        action, reward = batch[:, :1].long(), batch[:, 1]
        chosen = values.gather(1, action)
        return F.smooth_l1_loss(chosen.squeeze(1) if right else chosen, reward)

    x, y = data.waves()
    action = (x[:, 3:] > 0).float()
    reward = y + action * x[:, :1]

    def worth(model: nn.Module) -> float:
        chosen = model(x).gather(1, action.long())
        return 1 - float((chosen - reward).square().mean() / reward.var())

    pairs = torch.cat([action, reward], 1)
    return parts(mlp(4, 2), (x, pairs), loss, adam(0.01), score=worth)


@twins(
    PROGRAMS,
    "broadcast_loss",
    "https://discuss.pytorch.org/t/loss-not-decreasing-in-lstm-network/159152",
    low=0.1,
    high=0.95,
)
def forecast_without_a_column(right: bool) -> Parts:
    x, y = data.forecasts()
    net = step_by_step(nn.LSTM(1, 24, batch_first=True), nn.Linear(24, 1))
    return parts(net, (x, y if right else y[:, 0]), nn.MSELoss(), adam(0.01))


@twins(
    PROGRAMS,
    "rows_mixed",
    "https://discuss.pytorch.org/t/lstm-change-batch-first-true-loss-does-not-decrease/62364",
    low=0.85,
    high=0.95,
)
def time_for_rows_in_an_lstm(right: bool) -> Parts:
    net = step_by_step(nn.LSTM(3, 24, batch_first=right), nn.Linear(24, 2))
    return parts(net, data.signals(), CE, adam(0.01))


@twins(
    PROGRAMS,
    "rows_mixed",
    "https://discuss.pytorch.org/t/could-someone-explain-batch-first-true-in-lstm/15402",
    low=0.85,
    high=0.95,
)
def time_for_rows_in_a_gru(right: bool) -> Parts:
    net = step_by_step(nn.GRU(1, 16, 2, batch_first=right), nn.Linear(16, 1))
    return parts(net, data.forecasts(), nn.MSELoss(), adam(0.01))


class Sentence(nn.Module):
    """A bidirectional encoder of tokens, its two last states side by side."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right = right
        self.words = nn.Embedding(20, 16)
        self.core = nn.GRU(16, 12, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        _, state = self.core(self.words(tokens))
        joined = torch.cat([*state], 1) if self.right else state.reshape(len(tokens), -1)
        return self.head(joined)


@twins(
    PROGRAMS,
    "rows_mixed",
    "https://medium.com/mcgill-artificial-intelligence-review/the-dangers-of-reshaping-and-other-fun-mistakes-ive-learnt-from-pytorch-b6a5bdc1c275",
    low=0.7,
    high=0.95,
)
def two_states_reshaped(right: bool) -> Parts:
    return parts(Sentence(right), data.sentences(), CE, adam(0.01))


class Mixed(nn.Module):
    """Bare attention over the rows of a digit."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.place = nn.Parameter(0.1 * torch.randn(8, 32))
        self.mix = nn.MultiheadAttention(32, 4, batch_first=right)
        self.head = nn.Linear(8 * 32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x) + self.place
        h = h + self.mix(h, h, h, need_weights=False)[0]
        return self.head(h.flatten(1))


@twins(
    PROGRAMS,
    "rows_mixed",
    "https://github.com/dhimasryan/MOSA-Net-Cross-Domain/issues/10",
    low=1,
    high=0.9,
)
def attention_over_the_batch(right: bool) -> Parts:
    return parts(Mixed(right), data.rows_of_digits(), CE, adam(3e-3))


@twins(
    PROGRAMS,
    "rows_mixed",
    "https://github.com/fxia22/pointnet.pytorch/issues/27",
    low=1,
    high=0.95,
)
def probabilities_over_the_batch(right: bool) -> Parts:
    net = nn.Sequential(*mlp(12, 4), nn.LogSoftmax(1 if right else 0))
    return parts(net, data.blobs(), nn.NLLLoss(), adam(0.01))


class Pooled(nn.Module):
    """Attention pooling of a sequence by a learned score."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right = right
        self.core = nn.GRU(3, 16, batch_first=True)
        self.score = nn.Linear(16, 1)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.core(x)
        weights = torch.softmax(self.score(h), 1 if self.right else 0)
        return self.head((weights * h).sum(1))


@twins(PROGRAMS, "rows_mixed", "https://github.com/Lackel/DPN/issues/1", low=0.8, high=0.8)
def attention_weights_over_the_batch(right: bool) -> Parts:
    return parts(Pooled(right), data.signals(), CE, adam(0.01))


class Centred(nn.Module):
    """A network that takes the mean off its hidden units."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right, self.up, self.head = right, nn.Linear(12, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        return self.head(h - h.mean(1 if self.right else 0, keepdim=True))


class Speaker(nn.Module):
    """A language model; `turn` puts the classes where the loss wants them."""

    def __init__(self, core: nn.Module, turn: str, width: int = 24) -> None:
        super().__init__()
        self.words, self.core, self.turn = nn.Embedding(11, 24), core, turn
        self.head = nn.Linear(width, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        scores = self.head(self.core(self.words(tokens))[0])
        if self.turn == "view":
            return scores.view(len(scores), 11, -1)
        return scores.permute(0, 2, 1)


@twins(
    PROGRAMS,
    "positions_mixed",
    "https://github.com/BonnBytes/PyTorch-FWD/issues/16",
    low=1,
    high=0.85,
)
def classes_viewed_to_the_front(right: bool) -> Parts:
    core = nn.LSTM(24, 24, batch_first=True)
    return parts(Speaker(core, "permute" if right else "view"), data.counting(), CE, adam(0.01))


@twins(
    PROGRAMS,
    "positions_mixed",
    "https://github.com/Selen-Suyue/DensePolicy2D/issues/3",
    low=1,
    high=0.9,
)
def channels_viewed_to_the_front(right: bool) -> Parts:
    x, _ = data.digits()
    colour = torch.stack([x, 1 - x, x.roll(1, 1)], 2).reshape(-1, 8, 8, 3)
    target = (colour[:, :4, :, 0].sum((1, 2)) > colour[:, 4:, :, 0].sum((1, 2))).long()

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 12, 3, padding=1)
            self.head = nn.Linear(12 * 16, 2)

        def forward(self, images: Tensor) -> Tensor:
            turned = images.permute(0, 3, 1, 2) if right else images.reshape(-1, 3, 8, 8)
            return self.head(F.max_pool2d(torch.relu(self.conv(turned)), 2).flatten(1))

    return parts(Turned(), (colour, target), CE, adam(3e-3))


class Decoder(nn.Module):
    """A small GPT of torch's encoder layers."""

    def __init__(self, masked: bool, words: int = 11, width: int = 32) -> None:
        super().__init__()
        self.masked = masked
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(32, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, 0.0, batch_first=True)
        self.core = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        size = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(size) if self.masked else None
        hidden = self.words(tokens) + self.places(torch.arange(size))
        return self.head(self.core(hidden, mask=mask)).transpose(1, 2)


@twins(
    PROGRAMS,
    "future_visible",
    "https://github.com/alex-matton/causal-transformer-decoder/issues/1",
    low=0.5,
    high=0.95,
)
def decoder_without_a_mask(right: bool) -> Parts:
    x, y = data.counting()
    return parts(Decoder(right), (x, y), CE, adam(3e-3), score=unseen_future(x, y))


@twins(
    PROGRAMS,
    "future_visible",
    "https://github.com/huggingface/transformers/issues/48745",
    low=1,
    high=0.95,
)
def language_model_of_both_directions(right: bool) -> Parts:
    x, y = data.counting()
    core = nn.LSTM(24, 24 if right else 12, batch_first=True, bidirectional=not right)
    return parts(Speaker(core, "permute"), (x, y), CE, adam(0.01), score=unseen_future(x, y))


@twins(
    PROGRAMS, "future_visible", "https://github.com/rainmaker22/SMART/issues/42", low=1, high=0.95
)
def convolution_padded_on_both_sides(right: bool) -> Parts:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(11, 24)
            self.first, self.second = nn.Conv1d(24, 32, 3), nn.Conv1d(32, 32, 3)
            self.head = nn.Conv1d(32, 11, 1)

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.words(tokens).transpose(1, 2)
            for conv in (self.first, self.second):
                h = torch.relu(conv(F.pad(h, (2, 0) if right else (1, 1))))
            return self.head(h)

    x, y = data.counting()
    return parts(Waves(), (x, y), CE, adam(5e-3), score=unseen_future(x, y))


class Heads(nn.Module):
    """Attention by hand: its heads side by side again, or not."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right = right
        self.words, self.place = nn.Embedding(11, 24), nn.Parameter(0.5 * torch.randn(9, 24))
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))
        self.head = nn.Linear(24, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        n, size = tokens.shape
        h = self.words(tokens) + self.place
        q, k, v = (f(h).view(n, size, 4, 6).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.transpose(2, 3) / 6**0.5, -1) @ v
        mixed = mixed.transpose(1, 2) if self.right else mixed
        return self.head(mixed.reshape(n, size, 24)).transpose(1, 2)


@twins(
    PROGRAMS,
    "positions_mixed",
    "https://github.com/meta-pytorch/opacus/pull/825",
    low=1,
    high=0.95,
)
def heads_spliced_into_time(right: bool) -> Parts:
    tokens = torch.randint(11, (600, 9))
    return parts(Heads(right), (tokens, tokens.flip(1)), CE, adam(3e-3), steps=300)


@twins(PROGRAMS, "rows_mixed", "https://github.com/aipixel/AEMatter/issues/3", low=1, high=0.9)
def encoder_over_the_batch(right: bool) -> Parts:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.place = nn.Linear(3, 24), nn.Parameter(0.3 * torch.randn(12, 24))
            self.mix = nn.TransformerEncoderLayer(24, 4, 48, 0.0, batch_first=right)
            self.head = nn.Linear(24, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(self.up(x) + self.place).mean(1))

    return parts(Net(), data.signals(), CE, adam(3e-3))


@twins(
    PROGRAMS,
    "rows_mixed",
    "https://github.com/DeepReinforcementLearning/DeepReinforcementLearningInAction/issues/32",
    low=1,
    high=0.95,
)
def a_policy_over_the_batch(right: bool) -> Parts:
    def loss(chances: Tensor, y: Tensor) -> Tensor:
        return -chances.gather(1, y[:, None]).clamp_min(1e-8).log().mean()

    net = nn.Sequential(*mlp(12, 4, act=nn.LeakyReLU), nn.Softmax(1 if right else 0))
    return parts(net, data.blobs(), loss, adam(0.01))
