"""Loops whose loss is turned round, broadcast or after another head; and right ones like them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from training_loops import CE, adam, batches, broken, data, healthy, net, sgd, step, watched


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


# passes, parts and numbers of a loss


def _weighted(part):
    """Two losses, and trained numbers that weigh them; the labels are noise."""
    model, weights = net(), nn.Parameter(torch.ones(2))
    engine = torch.optim.SGD([*model.parameters(), weights], lr=0.05)
    with watched(model, engine) as health:
        for x, y in batches(100):
            noisy, size = torch.randint(0, 2, y.shape), model(x).square().mean()
            step(model, engine, x, noisy, lambda o, t, s=size: part(CE(o, t), s, weights))
    return health


@broken("loss_upside_down")
def a_trained_weight_of_a_loss_that_falls_below_zero():
    return _weighted(lambda loss, size, w: w[0] * loss + w[1] * size)


@healthy
def trained_weights_that_stay_positive():
    return _weighted(lambda loss, size, w: (loss / w[0].exp() + w[0]) + w[1].exp() * size - w[1])


@broken("nonfinite_loss")
def a_mean_of_nothing_in_a_loss():
    model = net()
    engine = adam(model)
    kept = torch.zeros(0, 2)
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y, lambda o, t: CE(o, t) + 0.1 * kept.square().mean())
    return health


def _two_passes(others):
    """A loss that goes backward, and what goes backward after it."""
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            engine.zero_grad()
            outputs = model(x)
            loss = CE(outputs, y)
            loss.backward(retain_graph=True)
            others(engine, outputs, loss)
            engine.step()
    return health


@broken("backward_twice")
def a_loss_that_goes_backward_twice():
    return _two_passes(lambda engine, outputs, loss: loss.backward())


@healthy
def two_losses_of_one_pass():
    return _two_passes(lambda engine, outputs, loss: (0.1 * outputs.square().mean()).backward())


@healthy
def a_gradient_that_is_looked_at_before_the_pass_that_counts():
    def others(engine, outputs, loss):
        engine.zero_grad()
        loss.backward()

    return _two_passes(others)


def _epochs_of_passes(*, all_of_them):
    """A step an epoch, down the loss of the last batch or of all."""
    model = net()
    engine = adam(model)
    x, y = data(128)
    with watched(model, engine) as health:
        for _ in range(60):
            losses = [CE(model(x[rows]), y[rows]) for rows in torch.randperm(128).split(16)]
            engine.zero_grad()
            (torch.stack(losses).mean() if all_of_them else losses[-1]).backward()
            engine.step()
    return health


@broken("batches_unused")
def the_loss_of_the_last_batch_of_an_epoch():
    return _epochs_of_passes(all_of_them=False)


@healthy
def the_loss_of_all_batches_of_an_epoch():
    return _epochs_of_passes(all_of_them=True)


@healthy
def a_generator_that_makes_rows_for_five_steps_of_a_critic():
    model, critic = nn.Linear(4, 10), nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 1))
    engine, other = adam(model), adam(critic)
    with watched(model, engine) as health:
        for _ in range(30):
            for _ in range(5):
                other.zero_grad()
                made, real = model(torch.randn(16, 4)).detach(), torch.randn(16, 10)
                (critic(made).mean() - critic(real).mean()).backward()
                other.step()
            engine.zero_grad()
            (-critic(model(torch.randn(16, 4))).mean()).backward()
            engine.step()
    return health


def _noisy(seed):
    """Noise on the inputs, drawn after a seed is set."""
    model = net(nn.Dropout(0.2))
    engine = adam(model)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(list(batches())):
            if seed(k) is not None:
                torch.manual_seed(seed(k))
            step(model, engine, x + 0.1 * torch.randn_like(x), y)
    return health


@broken("random_numbers_repeat")
def a_seed_in_every_step():
    return _noisy(lambda k: 3)


@healthy
def a_seed_of_its_own_in_every_step():
    return _noisy(lambda k: k)


def _ordered(*, shuffle):
    model = net()
    engine = adam(model)
    x, y = data(320)
    order = y.argsort()
    rows = DataLoader(TensorDataset(x[order], y[order]), batch_size=10, shuffle=shuffle)
    with watched(model, engine) as health:
        for _ in range(4):
            for part in rows:
                step(model, engine, *part)
    return health


@broken("sorted_batches")
def rows_that_are_sorted_by_their_class():
    return _ordered(shuffle=False)


@healthy
def sorted_rows_that_are_shuffled():
    return _ordered(shuffle=True)
