"""What is not registered, cut off, made anew, linear, random or frozen; norms and 16 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from programs.developed import data
from programs.developed.nets import adam, mlp
from programs.developed.twins import parts, steady, twins
from programs.form import Parts, Program

CE = nn.CrossEntropyLoss()
PROGRAMS: list[Program] = []


class Blocks(nn.Module):
    """Hidden layers kept in a container of the caller's choice."""

    def __init__(self, box: type, size: int = 64, outputs: int = 10) -> None:
        super().__init__()
        self.first = nn.Linear(size, 32)
        self.blocks = box([nn.Linear(32, 32) for _ in range(3)])
        self.head = nn.Linear(32, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x)


@twins(
    PROGRAMS,
    "unregistered_parameters",
    "https://github.com/pytorch/pytorch/issues/666",
    low=0.8,
    high=0.8,
)
def layers_in_a_list(right: bool) -> Parts:
    return parts(Blocks(nn.ModuleList if right else list), data.digits(), CE, adam(3e-3))


@twins(
    PROGRAMS,
    "unregistered_parameters",
    "https://github.com/pytorch/pytorch/issues/715",
    low=1,
    high=0.95,
)
def layers_in_pairs(right: bool) -> Parts:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [[nn.Linear(12 if k == 0 else 24, 24), nn.Tanh()] for k in range(3)]
            if right:
                self.known = nn.ModuleList(pair[0] for pair in self.hidden)
            self.head = nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            for layer, act in self.hidden:
                x = act(layer(x))
            return self.head(x)

    return parts(Net(), data.blobs(), CE, adam(0.01))


@twins(
    PROGRAMS,
    "unregistered_parameters",
    "https://github.com/pytorch/pytorch/issues/1053",
    low=1,
    high=0.9,
)
def convolutions_in_a_list(right: bool) -> Parts:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 16)
            convs = [nn.Conv1d(16, 8, k, padding="same") for k in (1, 3, 5)]
            self.convs = nn.ModuleList(convs) if right else convs
            self.head = nn.Linear(24, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.words(tokens).transpose(1, 2)
            return self.head(torch.cat([torch.relu(c(h)).mean(2) for c in self.convs], 1))

    return parts(Net(), data.sentences(), CE, adam(5e-3))


@twins(
    PROGRAMS,
    "unregistered_parameters",
    "https://github.com/kymatio/murenn/issues/42",
    low=0.75,
    high=0.8,
)
def a_scale_that_is_a_plain_tensor(right: bool) -> Parts:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 32)
            weight = 0.1 * torch.randn(32, 1)
            self.weight = nn.Parameter(weight) if right else weight.requires_grad_()

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.up(x)) @ self.weight

    return parts(Net(), data.waves(), nn.MSELoss(), adam(0.01))


@twins(
    PROGRAMS,
    "random_in_eval",
    "https://github.com/yangze0930/NTS-Net/issues/14",
    low=0.05,
    high=0.95,
)
def dropout_made_in_forward(right: bool) -> Parts:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head, self.drop = nn.Linear(64, 64), nn.Linear(64, 10), nn.Dropout(0.4)

        def forward(self, x: Tensor) -> Tensor:
            drop = self.drop if right else nn.Dropout(0.4)
            return self.head(drop(torch.relu(self.up(x))))

    x, y = data.digits()
    return parts(Net(), (x, y), CE, adam(3e-3), score=steady(x))


@twins(
    PROGRAMS,
    "random_in_eval",
    "https://github.com/delip/PyTorchNLPBook/issues/28",
    low=0.05,
    high=0.95,
)
def functional_dropout(right: bool) -> Parts:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.core = nn.Embedding(20, 16), nn.GRU(16, 24, batch_first=True)
            self.head = nn.Linear(24, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.core(self.words(tokens))[0].mean(1)
            return self.head(F.dropout(h, 0.3, training=self.training if right else True))

    x, y = data.sentences()
    return parts(Net(), (x, y), CE, adam(0.01), score=steady(x))


@twins(
    PROGRAMS,
    "detached",
    "https://prodopsy.com/how-can-the-backward-function-in-tensor-influence-the-matrix-in-model",
    low=1,
    high=0.95,
)
def features_by_numpy(right: bool) -> Parts:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(12, 24), nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.body(x))
            return self.head(h if right else torch.from_numpy(h.detach().numpy()))

    return parts(Net(), data.blobs(), CE, adam(0.01))


@twins(
    PROGRAMS,
    "no_nonlinearity",
    "https://stats.stackexchange.com/questions/433365/xor-with-neural-network",
    low=0.55,
    high=0.95,
)
def a_deep_line_for_xor(right: bool) -> Parts:
    g = data.seeded(2)
    corners = torch.randint(2, (500, 2), generator=g).float()
    y = (corners[:, 0] != corners[:, 1]).long()
    x = corners - 0.5 + 0.1 * torch.randn(500, 2, generator=g)
    act = nn.ReLU if right else nn.Identity
    return parts(mlp(2, 16, 16, 2, act=act), (x, y), CE, adam(0.01))


@twins(PROGRAMS, "no_nonlinearity", "https://github.com/YujiaBao/ls/issues/1", low=0.4, high=0.85)
def a_deep_line_for_waves(right: bool) -> Parts:
    act = nn.ReLU if right else nn.Identity
    return parts(mlp(4, 32, 32, 1, act=act), data.waves(), nn.MSELoss(), adam(0.01))


@twins(
    PROGRAMS,
    "no_nonlinearity",
    "https://github.com/DengPingFan/PraNet/issues/16",
    low=0.9,
    high=0.85,
)
def convolutions_without_activation(right: bool) -> Parts:
    x, _ = data.digits()
    x = x - x.mean(0)
    y = (
        x.reshape(-1, 8, 8)[:, :, :4].square().sum((1, 2))
        > x.reshape(-1, 8, 8)[:, :, 4:].square().sum((1, 2))
    ).long()
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU() if right else nn.Identity(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU() if right else nn.Identity(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 2),
    )
    return parts(net, (x.reshape(-1, 1, 8, 8), y), CE, adam(3e-3), steps=300)


@twins(
    PROGRAMS,
    "batchnorm_few_rows",
    "https://discuss.pytorch.org/t/what-does-model-eval-do-for-batchnorm-layer/7146",
    "train_eval_mismatch",
    low=0.8,
    high=0.9,
)
def norms_of_two_rows(right: bool) -> Parts:
    net = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 10))
    size = 32 if right else 2
    return parts(net, data.digits(), CE, adam(5e-3), batch_size=size, steps=200)


@twins(
    PROGRAMS, "updates_lost", "https://github.com/workofart/ml-by-hand/pull/85", low=0.55, high=0.8
)
def weights_in_bfloat16(right: bool) -> Parts:
    x, y = data.digits()
    net = mlp(64, 64, 10)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.nn.init.normal_(p, 0, 0.3) if p.ndim > 1 else p)
    if right:
        return parts(net, (x, y), CE, adam(5e-4), steps=300)
    return parts(net.bfloat16(), (x.bfloat16(), y), CE, adam(5e-4), steps=300)


@twins(
    PROGRAMS,
    "undefined_operation",
    "https://discuss.pytorch.org/t/function-mselossbackward-returned-nan-values-in-its-0th-output/94875",
    low=0.35,
    high=0.8,
)
def a_root_of_zero(right: bool) -> Parts:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.Linear(12, 24), nn.Linear(25, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.up(x)) * (x[:, :1] > -0.5)
            size = torch.sqrt(h.square().sum(1, keepdim=True) + (1e-8 if right else 0.0))
            return self.head(torch.cat([h, size], 1))

    return parts(Net(), data.blobs(), CE, adam(0.01))


@twins(
    PROGRAMS,
    "undefined_operation",
    "https://openillumi.com/en/en-fix-pytorch-cpu-nan-powbackward0",
    low=0.35,
    high=0.9,
)
def a_division_by_a_deviation(right: bool) -> Parts:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.Linear(12, 24), nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.up(x) - 1.5)
            size = h.norm(dim=1, keepdim=True)
            return self.head(h / (size + 1e-8 if right else size))

    net = Net()
    if right:
        return parts(net, data.blobs(), CE, adam(0.01))
    return parts(net, data.blobs(), CE, adam(0.01))
