"""Losses and targets that do not fit each other, and heads that cannot answer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from programs._form import Setup, program
from programs.developed import data
from programs.developed.nets import adam, conv, mlp, sgd

CE = nn.CrossEntropyLoss()


@program("target_out_of_range", "https://github.com/milesial/Pytorch-UNet/issues/78")
def masks_up_to_255(right: bool) -> Setup:
    x, _ = data.pictures()
    mask = (F.avg_pool2d(x, 3, 1, 1) > 0.4).float()
    net = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 1, 3, padding=1))
    target = mask if right else 255 * mask
    return Setup(net, (x, target), nn.BCEWithLogitsLoss(), adam(0.01))


@program("target_out_of_range",
         "https://github.com/bigmb/Unet-Segmentation-Pytorch-Nest-of-Unets/issues/18")
def masks_from_minus_one(right: bool) -> Setup:
    x, y = data.blobs(classes=2)
    target = y[:, None].float() if right else 2.0 * y[:, None] - 1
    return Setup(mlp(12, 1), (x, target), nn.BCEWithLogitsLoss(), adam(0.01))


@program("target_out_of_range",
         "https://datascience.stackexchange.com/questions/38604", ("classes_as_numbers",))
def ten_digits_by_one_sigmoid(right: bool) -> Setup:
    x, y = data.digits()
    if right:
        return Setup(mlp(64, 10), (x, y), CE, adam(3e-3))
    return Setup(mlp(64, 1), (x, y[:, None].float()), nn.BCEWithLogitsLoss(), adam(3e-3))


@program("target_out_of_range", "https://stackoverflow.com/questions/50079585",
         ("classes_as_numbers",))
def three_classes_by_one_sigmoid(right: bool) -> Setup:
    x, y = data.iris()
    x = data.scaled(x)
    if right:
        return Setup(mlp(4, 3), (x, y), CE, adam(0.01))

    def loss(output: Tensor, goal: Tensor) -> Tensor:
        p = torch.sigmoid(output[:, 0]).clamp(1e-7, 1 - 1e-7)
        return -(goal * p.log() + (1 - goal) * (1 - p).log()).mean()

    return Setup(mlp(4, 1), (x, y.float()), loss, adam(0.01))


@program("missing_log", "https://runebook.dev/en/docs/pytorch/generated/torch.nn.softmax")
def likelihood_of_probabilities(right: bool) -> Setup:
    last = nn.LogSoftmax(1) if right else nn.Softmax(1)
    return Setup(nn.Sequential(*mlp(64, 10), last), data.digits(), nn.NLLLoss(), adam(3e-3))


@program("missing_log", "https://runebook.dev/en/docs/pytorch/generated/torch.nn.nllloss/torch.nn.NLLLoss")
def likelihood_of_scores(right: bool) -> Setup:
    return Setup(conv(8), data.pictures(), CE if right else nn.NLLLoss(), adam(3e-3))


@program("missing_log", "https://github.com/yang-song/score_sde_pytorch/issues/0")
def divergence_of_probabilities(right: bool) -> Setup:
    x, y = data.blobs()
    soft = 0.9 * F.one_hot(y, 4).float() + 0.025
    last = nn.LogSoftmax(1) if right else nn.Softmax(1)
    return Setup(nn.Sequential(*mlp(12, 4), last), (x, soft), nn.KLDivLoss(reduction="batchmean"),
                 adam(0.01))


@program("head_mismatch", "https://github.com/doronharitan/human_activity_recognition_LRCN/issues/4",
         ("slow_convergence",))
def softmax_before_cross_entropy(right: bool) -> Setup:
    net = mlp(64, 10) if right else nn.Sequential(*mlp(64, 10), nn.Softmax(1))
    return Setup(net, data.digits(), CE, sgd(0.1))


@program("head_mismatch", "https://stackoverflow.com/questions/51930566", ("slow_convergence",))
def sigmoids_before_cross_entropy(right: bool) -> Setup:
    x, y = data.iris()
    net = mlp(4, 3, hidden=8) if right else nn.Sequential(*mlp(4, 3, hidden=8), nn.Sigmoid())
    return Setup(net, (data.scaled(x), y), CE, adam(0.01), {"batch_size": 5, "steps": 300})


@program("head_mismatch", "https://stackoverflow.com/questions/31880720")
def softmax_of_one_unit(right: bool) -> Setup:
    x, y = data.blobs(classes=2)
    last = nn.Sigmoid() if right else nn.Softmax(1)
    net = nn.Sequential(*mlp(12, 50, 1), last)
    return Setup(net, (x, y[:, None].float()), nn.BCELoss(), adam(1e-3))


@program("head_mismatch", "https://stackoverflow.com/questions/45442843")
def softmax_of_one_number(right: bool) -> Setup:
    x, y = data.diabetes()
    net = mlp(10, 20, 1) if right else nn.Sequential(*mlp(10, 20, 1), nn.Softmax(1))
    return Setup(net, (x, data.scaled(y)), nn.L1Loss(), adam(0.01))


@program("head_mismatch", "https://stackoverflow.com/questions/48221692", ("unscaled_targets",))
def sigmoid_for_amounts(right: bool) -> Setup:
    x, y = data.waves()
    net = nn.Sequential(*mlp(4, 1, act=nn.Sigmoid), nn.Identity() if right else nn.Sigmoid())
    return Setup(net, (x, 3 * y), nn.MSELoss(), adam(0.02))


@program("head_mismatch", "https://community.deeplearning.ai/t/loss-values-do-not-change/324182",
         ("dying_relu",))
def rectified_line(right: bool) -> Setup:
    x = torch.linspace(-2, 2, 200)[:, None]
    net = mlp(1, 8, 8, 1)
    net = net if right else nn.Sequential(*net, nn.ReLU())
    return Setup(net, (x, 2 * x - 1), nn.MSELoss(), adam(0.01))


@program("head_mismatch", "https://stackoverflow.com/questions/47352366",
         ("dying_relu", "slow_convergence"))
def rectified_scores(right: bool) -> Setup:
    net = conv(8)
    net = net if right else nn.Sequential(*net, nn.ReLU(), nn.Softmax(1))
    return Setup(net, data.pictures(), CE, adam(2e-3))


@program("head_mismatch", "https://stackoverflow.com/questions/33969059", ("saturated_activation",))
def hyperbolic_head_for_large_numbers(right: bool) -> Setup:
    g = data.seeded(5)
    x = torch.rand(600, 3, generator=g)
    y = (x @ torch.tensor([2.0, 1.0, 0.5]) + 2.2)[:, None]
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1),
                        nn.Identity() if right else nn.Tanh())
    return Setup(net, (x, y), nn.MSELoss(), adam(0.01))


@program("multilabel_softmax", "https://stackoverflow.com/questions/44164749")
def many_labels_by_softmax(right: bool) -> Setup:
    loss = nn.BCEWithLogitsLoss() if right else CE
    return Setup(mlp(16, 5), data.tags(), loss, adam(0.01))


@program("classes_as_numbers", "https://stackoverflow.com/questions/48385830")
def digits_as_amounts(right: bool) -> Setup:
    x, y = data.digits()
    if right:
        return Setup(mlp(64, 10), (x, y), CE, adam(3e-3))
    return Setup(mlp(64, 1), (x, y[:, None].float()), nn.MSELoss(), adam(3e-3))


@program("ignored_rows", "https://github.com/EleutherAI/aria/pull/40")
def first_class_ignored(right: bool) -> Setup:
    loss = nn.CrossEntropyLoss(ignore_index=-100 if right else 0)
    return Setup(mlp(12, 4), data.blobs(), loss, adam(0.01))


@program("constant_targets", "https://stackoverflow.com/questions/59325381")
def classes_divided_by_255(right: bool) -> Setup:
    x, y = data.pictures()
    return Setup(conv(8), (x, y if right else (y / 255).long()), CE, adam(3e-3))


@program("loss_upside_down", "https://github.com/qubvel/segmentation_models/issues/95")
def overlap_that_is_minimised(right: bool) -> Setup:
    def loss(scores: Tensor, mask: Tensor) -> Tensor:
        p = torch.sigmoid(scores).flatten(1)
        m = mask.flatten(1)
        dice = (2 * (p * m).sum(1) + 1) / (p.sum(1) + m.sum(1) + 1)
        return 1 - dice.mean() if right else dice.mean()

    x, _ = data.pictures()
    mask = (F.avg_pool2d(x, 3, 1, 1) > 0.4).float()
    net = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 1, 3, padding=1))
    return Setup(net, (x, mask), loss, adam(0.01))


@program("loss_upside_down", "https://github.com/justchenhao/STANet/issues/32")
def likelihood_that_is_minimised(right: bool) -> Setup:
    def loss(output: Tensor, y: Tensor) -> Tensor:
        chosen = F.log_softmax(output, 1).gather(1, y[:, None]).mean()
        return -chosen if right else chosen

    return Setup(mlp(12, 4), data.blobs(), loss, adam(0.01))


@program("loss_is_a_sum", "https://github.com/pytorch/pytorch/issues/4621",
         ("exploding_gradient", "oscillating_loss", "dying_relu"))
def squares_that_are_summed(right: bool) -> Setup:
    x, y = data.waves()
    loss = nn.MSELoss(reduction="mean" if right else "sum")
    return Setup(mlp(4, 64, 64, 1), (x, y), loss, sgd(0.05))
