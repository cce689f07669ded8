"""Losses and targets that do not fit each other, and heads that cannot answer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from programs.developed import data
from programs.developed.nets import adam, conv, mlp, sgd
from programs.developed.twins import hits, parts, twins
from programs.form import Parts, Program, r2

CE = nn.CrossEntropyLoss()
PROGRAMS: list[Program] = []


@twins(
    PROGRAMS,
    "target_out_of_range",
    "https://github.com/milesial/Pytorch-UNet/issues/78",
    low=0.4,
    high=0.9,
)
def masks_up_to_255(right: bool) -> Parts:
    x, _ = data.pictures()
    mask = (F.avg_pool2d(x, 3, 1, 1) > 0.4).float()
    net = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 1, 3, padding=1))
    target = mask if right else 255 * mask
    return parts(net, (x, target), nn.BCEWithLogitsLoss(), adam(0.01), score=hits(x, mask))


@twins(
    PROGRAMS,
    "target_out_of_range",
    "https://github.com/bigmb/Unet-Segmentation-Pytorch-Nest-of-Unets/issues/18",
    low=1,
    high=0.95,
)
def masks_from_minus_one(right: bool) -> Parts:
    x, y = data.blobs(classes=2)
    target = y[:, None].float() if right else 2.0 * y[:, None] - 1
    return parts(
        mlp(12, 1),
        (x, target),
        nn.BCEWithLogitsLoss(),
        adam(0.01),
        score=hits(x, y[:, None].float()),
    )


@twins(
    PROGRAMS,
    "target_out_of_range",
    "https://datascience.stackexchange.com/questions/38604",
    "classes_as_numbers",
    low=0.05,
    high=0.9,
)
def ten_digits_by_one_sigmoid(right: bool) -> Parts:
    x, y = data.digits()
    if right:
        return parts(mlp(64, 10), (x, y), CE, adam(3e-3))
    return parts(mlp(64, 1), (x, y[:, None].float()), nn.BCEWithLogitsLoss(), adam(3e-3))


@twins(
    PROGRAMS,
    "target_out_of_range",
    "https://stackoverflow.com/questions/50079585",
    "classes_as_numbers",
    low=0.05,
    high=0.9,
)
def three_classes_by_one_sigmoid(right: bool) -> Parts:
    x, y = data.iris()
    x = data.scaled(x)
    if right:
        return parts(mlp(4, 3), (x, y), CE, adam(0.01))

    def loss(output: Tensor, goal: Tensor) -> Tensor:
        p = torch.sigmoid(output[:, 0]).clamp(1e-7, 1 - 1e-7)
        return -(goal * p.log() + (1 - goal) * (1 - p).log()).mean()

    return parts(mlp(4, 1), (x, y.float()), loss, adam(0.01), score=hits(x, y.float()))


@twins(
    PROGRAMS,
    "missing_log",
    "https://runebook.dev/en/docs/pytorch/generated/torch.nn.softmax",
    low=1,
    high=0.9,
)
def likelihood_of_probabilities(right: bool) -> Parts:
    last = nn.LogSoftmax(1) if right else nn.Softmax(1)
    return parts(nn.Sequential(*mlp(64, 10), last), data.digits(), nn.NLLLoss(), adam(3e-3))


@twins(
    PROGRAMS,
    "missing_log",
    "https://runebook.dev/en/docs/pytorch/generated/torch.nn.nllloss/torch.nn.NLLLoss",
    low=0.25,
    high=0.9,
)
def likelihood_of_scores(right: bool) -> Parts:
    return parts(conv(8), data.pictures(), CE if right else nn.NLLLoss(), adam(3e-3))


@twins(
    PROGRAMS,
    "head_mismatch",
    "https://github.com/doronharitan/human_activity_recognition_LRCN/issues/4",
    "slow_convergence",
    low=0.25,
    high=0.85,
)
def softmax_before_cross_entropy(right: bool) -> Parts:
    net = mlp(64, 10) if right else nn.Sequential(*mlp(64, 10), nn.Softmax(1))
    return parts(net, data.digits(), CE, sgd(0.1))


@twins(
    PROGRAMS,
    "head_mismatch",
    "https://stackoverflow.com/questions/51930566",
    "slow_convergence",
    low=1,
    high=0.9,
)
def sigmoids_before_cross_entropy(right: bool) -> Parts:
    x, y = data.iris()
    net = mlp(4, 3, hidden=8) if right else nn.Sequential(*mlp(4, 3, hidden=8), nn.Sigmoid())
    return parts(net, (data.scaled(x), y), CE, adam(0.01), batch_size=5, steps=300)


@twins(
    PROGRAMS, "head_mismatch", "https://stackoverflow.com/questions/31880720", low=0.6, high=0.95
)
def softmax_of_one_unit(right: bool) -> Parts:
    x, y = data.blobs(classes=2)
    last = nn.Sigmoid() if right else nn.Softmax(1)
    net = nn.Sequential(*mlp(12, 50, 1), last)
    return parts(net, (x, y[:, None].float()), nn.BCELoss(), adam(1e-3))


@twins(
    PROGRAMS, "head_mismatch", "https://stackoverflow.com/questions/45442843", low=-0.95, high=0.5
)
def softmax_of_one_number(right: bool) -> Parts:
    x, y = data.diabetes()
    net = mlp(10, 20, 1) if right else nn.Sequential(*mlp(10, 20, 1), nn.Softmax(1))
    return parts(net, (x, data.scaled(y)), nn.L1Loss(), adam(0.01))


@twins(
    PROGRAMS,
    "head_mismatch",
    "https://stackoverflow.com/questions/48221692",
    "unscaled_targets",
    low=0.2,
    high=0.55,
)
def sigmoid_for_amounts(right: bool) -> Parts:
    x, y = data.waves()
    net = nn.Sequential(*mlp(4, 1, act=nn.Sigmoid), nn.Identity() if right else nn.Sigmoid())
    return parts(net, (x, 3 * y), nn.MSELoss(), adam(0.02))


@twins(
    PROGRAMS,
    "head_mismatch",
    "https://community.deeplearning.ai/t/loss-values-do-not-change/324182",
    "dying_relu",
    low=0.1,
    high=0.95,
)
def rectified_line(right: bool) -> Parts:
    x = torch.linspace(-2, 2, 200)[:, None]
    net = mlp(1, 8, 8, 1)
    net = net if right else nn.Sequential(*net, nn.ReLU())
    return parts(net, (x, 2 * x - 1), nn.MSELoss(), adam(0.01))


@twins(
    PROGRAMS,
    "head_mismatch",
    "https://stackoverflow.com/questions/47352366",
    "dying_relu",
    "slow_convergence",
    low=0.65,
    high=0.85,
)
def rectified_scores(right: bool) -> Parts:
    net = conv(8)
    net = net if right else nn.Sequential(*net, nn.ReLU(), nn.Softmax(1))
    return parts(net, data.pictures(), CE, adam(2e-3))


@twins(
    PROGRAMS,
    "head_mismatch",
    "https://stackoverflow.com/questions/33969059",
    "saturated_activation",
    low=-0.95,
    high=0.85,
)
def hyperbolic_head_for_large_numbers(right: bool) -> Parts:
    g = data.seeded(5)
    x = torch.rand(600, 3, generator=g)
    y = (x @ torch.tensor([2.0, 1.0, 0.5]) + 2.2)[:, None]
    net = nn.Sequential(
        nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1), nn.Identity() if right else nn.Tanh()
    )
    return parts(net, (x, y), nn.MSELoss(), adam(0.01))


@twins(
    PROGRAMS,
    "constant_targets",
    "https://stackoverflow.com/questions/59325381",
    low=0.15,
    high=0.9,
)
def classes_divided_by_255(right: bool) -> Parts:
    x, y = data.pictures()
    goal = y if right else (y / 255).long()
    return parts(conv(8), (x, goal), CE, adam(3e-3), score=hits(x, y))


@twins(
    PROGRAMS, "head_mismatch", "https://stackoverflow.com/questions/45337371", low=0.7, high=0.9
)
def softmax_of_one_unit_and_squares(right: bool) -> Parts:
    x, y = data.cancer()
    net = nn.Sequential(*mlp(30, 16, 1), nn.Sigmoid() if right else nn.Softmax(1))
    return parts(net, (data.scaled(x), y[:, None].float()), nn.MSELoss(), adam(5e-3))


@twins(
    PROGRAMS,
    "head_mismatch",
    "https://stackoverflow.com/questions/48251943",
    "dying_relu",
    low=0.4,
    high=0.9,
)
def a_rectified_answer_to_signs(right: bool) -> Parts:
    x, y = data.rings()
    goal = 2.0 * y[:, None] - 1
    net = nn.Sequential(*mlp(2, 16, 1), nn.Tanh() if right else nn.ReLU())

    def signs(model: nn.Module) -> float:
        return (
            float(((model(x) > 0) == (goal > 0)).float().mean()) if right else r2(x, goal)(model)
        )

    return parts(net, (x, goal), nn.MSELoss(), adam(0.01), score=signs)
