"""Loops whose loss is turned round, broadcast or after another head; and right ones like them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from training_loops import CE, adam, batches, broken, healthy, net, sgd, watched


def _trained(loss, model=None, optimizer=None, *, before=None, steps=30):
    model = model if model is not None else net()
    optimizer = optimizer if optimizer is not None else adam(model)
    with watched(model, optimizer) as health:
        for x, y in batches(steps):
            optimizer.zero_grad()
            value = loss(model(x), y)
            if before is not None:
                before(model)
            value.backward()
            optimizer.step()
    return health


def _head(*last, size=2):
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, size), *last)


# the sign


@broken("loss_upside_down")
def an_optimizer_that_maximizes_a_loss():
    model = net()
    return _trained(CE, model, sgd(model, 1e-3, maximize=True))


@broken("loss_upside_down")
def a_cross_entropy_with_a_minus():
    return _trained(lambda scores, y: -CE(scores, y))


@broken("loss_upside_down")
def a_squared_error_by_hand_with_a_minus():
    model = _head(size=1)
    return _trained(lambda out, y: -((out - y[:, None].float()) ** 2).mean(), model)


@healthy
def a_likelihood_that_is_maximized():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, maximize=True)
    return _trained(lambda scores, y: -CE(scores, y), model, optimizer)


@healthy
def a_generator_that_goes_up_the_loss_of_the_judge():
    model, judge = _head(), _head()
    optimizer, other = adam(model), torch.optim.Adam(judge.parameters(), lr=1e-3)
    judge[0] = nn.Linear(2, 32)
    other = torch.optim.Adam(judge.parameters(), lr=1e-3)
    bce = F.binary_cross_entropy_with_logits
    with watched(model, optimizer) as health:
        for x, _ in batches(30):
            made = model(x)
            other.zero_grad()
            real, fake = judge(x[:, :2]), judge(made.detach())
            (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))).backward()
            other.step()
            optimizer.zero_grad()
            fake = judge(made)
            (-bce(fake, torch.zeros_like(fake))).backward()
            optimizer.step()
    return health


@healthy
def a_task_and_a_domain_that_should_not_be_told():
    def loss(scores, y):
        return CE(scores[:, :2], y) - 0.1 * CE(scores[:, 2:], 1 - y)

    return _trained(loss, _head(size=4))


@healthy
def policy_gradients_of_both_signs():
    def loss(scores, y):
        return (CE(scores, y, reduction="none") * torch.randn(len(y))).mean()

    return _trained(loss)


@healthy
def a_similarity_with_a_minus():
    return _trained(lambda out, y: -F.cosine_similarity(out, out.detach().roll(1, 0)).mean())


@healthy
def a_few_trained_numbers_before_a_frozen_network():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.net = nn.Parameter(torch.zeros(10)), net().requires_grad_(False)

        def forward(self, x):
            return self.net(x + self.shift)

    model = Shifted()
    optimizer = torch.optim.SGD([model.shift], lr=1e-2, maximize=True)
    return _trained(CE, model, optimizer)


# shapes


@broken("broadcast_loss")
def outputs_of_one_column_and_flat_targets():
    return _trained(lambda out, y: ((out - y.float()) ** 2).mean(), _head(size=1))


@broken("broadcast_loss")
def flat_outputs_and_targets_of_one_column():
    return _trained(
        lambda out, y: (y.float()[:, None] - out).abs().mean(), _head(nn.Flatten(0), size=1)
    )


@healthy
def all_pairs_of_outputs():
    def loss(out, y):
        return ((out - out.T) ** 2 - (y[:, None] != y).float()).square().mean()

    return _trained(loss, _head(size=1))


@healthy
def outputs_and_grid_points():
    def loss(out, y):
        near = torch.exp(-((out - torch.linspace(-1, 1, 9)) ** 2))
        return (near.mean(1) - y.float()).square().mean()

    return _trained(loss, _head(size=1))


# heads


@broken("head_mismatch")
def a_softmax_before_cross_entropy():
    return _trained(CE, _head(nn.Softmax(1)))


@broken("head_mismatch")
def a_sigmoid_before_the_loss_with_logits():
    def loss(out, y):
        return F.binary_cross_entropy_with_logits(out, y[:, None].float())

    return _trained(loss, _head(nn.Sigmoid(), size=1))


@broken("missing_log")
def probabilities_in_place_of_their_logarithms():
    return _trained(F.nll_loss, _head(nn.Softmax(1)))


@broken("target_out_of_range")
def labels_of_one_and_two():
    def loss(out, y):
        return F.binary_cross_entropy_with_logits(out, y[:, None] + 1.0)

    return _trained(loss, _head(size=1))


@healthy
def logarithms_of_probabilities():
    return _trained(F.nll_loss, _head(nn.LogSoftmax(1)))


@healthy
def labels_that_are_missing_and_masked():
    def loss(out, y):
        target = torch.where(torch.rand(len(y)) < 0.2, -1.0, y.float())[:, None]
        each = F.binary_cross_entropy_with_logits(out, target, reduction="none")
        return (each * (target >= 0)).sum() / (target >= 0).sum()

    return _trained(loss, _head(size=1))


# clipping and the learning rate


@broken("clipped_before_backward")
def clipped_before_the_backward_pass():
    return _trained(CE, before=lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0))


@healthy
def clipped_over_and_over():
    model = net()
    optimizer = adam(model)
    with watched(model, optimizer) as health:
        for x, y in batches(30):
            optimizer.zero_grad()
            for part in range(2):
                (CE(model(x[part::2]), y[part::2]) / 2).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return health


@broken("exploding_gradient")
def adam_with_a_rate_of_one_half():
    model = nn.Sequential(
        nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
    )
    return _trained(lambda out, y: CE(out, torch.randint(2, y.shape)), model, adam(model, 0.5))


@healthy
def adam_with_a_rate_that_the_net_bears():
    model = net()
    return _trained(CE, model, adam(model, 0.1), steps=65)
