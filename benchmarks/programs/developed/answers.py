"""What becomes of the answers: rounded, dropped, leaked, or the same for all rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.developed import data
from programs.developed.nets import adam, mlp, step_by_step
from programs.developed.twins import hits, parts, twins
from programs.form import Parts, Program, r2

PROGRAMS: list[Program] = []
GH = "https://github.com/"


@twins(PROGRAMS, "loss_not_connected", GH + "keras-team/keras/issues/4175", low=0.7, high=0.9)
def rounded_answers_in_the_loss(right: bool) -> Parts:
    x, y = data.blobs(classes=2)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        chance = torch.sigmoid(output)
        return F.mse_loss(chance if right else torch.round(chance), target)

    return parts(mlp(12, 1), (x, y.float()[:, None]), loss, adam(0.01))


@twins(
    PROGRAMS,
    "dropout_at_end",
    GH + "googledatalab/pydatalab/pull/392",
    low=0.5,
    high=0.8,
)
def dropout_behind_the_last_layer(right: bool) -> Parts:
    x, y = data.waves()
    net = mlp(4, 64, 1)
    if not right:
        net.append(nn.Dropout(0.5))
    return parts(net, (x, y + 3), nn.MSELoss(), adam(0.01), steps=400)


@twins(
    PROGRAMS,
    "target_among_inputs",
    GH + "KIC/pandas-ml-quant/issues/25",
    low=0.2,
    high=0.9,
)
def a_target_shifted_the_wrong_way(right: bool) -> Parts:
    """The window holds the value that is asked for; what counts is the one that comes after."""
    x, coming = data.forecasts()
    net = step_by_step(nn.GRU(1, 24, batch_first=True), nn.Linear(24, 1))
    y = coming if right else x[:, 3]
    return parts(net, (x, y), nn.MSELoss(), adam(0.01), score=r2(x, coming))


class Encoder(nn.Module):
    """A small transformer over padded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(20, 16), nn.Parameter(0.1 * torch.randn(14, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.core, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        empty = tokens == 0
        found = self.core(self.embed(tokens) + self.places, src_key_padding_mask=empty)
        found = found.masked_fill(empty[:, :, None], 0)
        return self.head(found.sum(1) / (~empty).sum(1, keepdim=True))


@twins(
    PROGRAMS,
    "oscillating_loss",
    GH + "huggingface/transformers/issues/735",
    "exploding_gradient",
    "collapsed_attention",
    low=0.75,
    high=0.9,
)
def one_answer_of_a_transformer(right: bool) -> Parts:
    x, y = data.sentences()
    return parts(
        Encoder(),
        (x, y),
        nn.CrossEntropyLoss(),
        adam(2e-3 if right else 0.1),
        score=hits(x, y),
        steps=200,
    )
