"""Training loops whose fault shows from epoch to epoch: rows and rates that begin again.

They join the lists of `training_loops`.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, Dataset, TensorDataset

from training_loops import CE, adam, batches, broken, data, healthy, net, sgd, step, watched

# learning rates


def _rates(build, *, epochs=10, steps=12, anew=False):
    model = net()
    engine = sgd(model)
    schedule = build(engine)
    loader = DataLoader(TensorDataset(*data(16 * steps)), batch_size=16, shuffle=True)
    with watched(model, engine) as health:
        for _ in range(epochs):
            if anew:
                schedule = build(engine)
            for x, y in loader:
                step(model, engine, x, y)
                schedule.step()
    return health


@broken("warmup_begins_again")
def a_warm_up_that_is_made_anew_in_every_epoch():
    return _rates(lambda e: schedules.LambdaLR(e, lambda k: (k + 1) / 40), anew=True)


@healthy
def a_warm_up_and_a_decay_that_are_made_anew_in_every_stage():
    return _rates(
        lambda e: schedules.LambdaLR(e, lambda k: min((k + 1) / 10, 1.2 - k / 25)), anew=True
    )


@healthy
def a_short_warm_up_in_every_stage():
    return _rates(lambda e: schedules.LambdaLR(e, lambda k: min((k + 1) / 5, 1.0)), anew=True)


@healthy
def a_rate_that_goes_up_and_down():
    return _rates(lambda e: schedules.CyclicLR(e, 0.01, 0.1, step_size_up=8, step_size_down=2))


@healthy
def a_cosine_with_restarts():
    return _rates(lambda e: schedules.CosineAnnealingWarmRestarts(e, 15))


def _plateau(mode):
    """A task that is learned in full; the schedule is told the accuracy."""
    x = torch.randn(400, 10)
    y = (x[:, 0] + x[:, 1] > 0).long()
    model = net()
    engine = sgd(model, 0.05)
    schedule = schedules.ReduceLROnPlateau(engine, mode, patience=1, factor=0.1)
    with watched(model, engine) as health:
        for _ in range(40):
            for rows in torch.randperm(320).split(20):
                step(model, engine, x[rows], y[rows])
            schedule.step((model(x[320:]).argmax(1) == y[320:]).float().mean().item())
    return health


@healthy
def a_plateau_at_the_end_of_what_is_learned():
    return _plateau("max")


@broken("learning_rate_collapsed")
def a_plateau_of_an_accuracy_that_should_fall():
    return _plateau("min")


# sums of micro-batches


def _sums(*, last):
    """The gradients are cleared before the last of four parts, or before the first."""
    model = net()
    engine = adam(model)
    x, y = data(32)
    with watched(model, engine, every=3) as health:
        for _ in range(60):
            for k, rows in enumerate(torch.randperm(32).split(8)):
                if k == (3 if last else 0):
                    engine.zero_grad()
                (CE(model(x[rows]), y[rows]) / 4).backward()
            engine.step()
    return health


@broken("micro_batches_lost")
def cleared_before_the_last_part_of_a_sum():
    return _sums(last=True)


@healthy
def cleared_before_the_first_part_of_a_sum():
    return _sums(last=False)


@healthy
def a_critic_whose_passes_reach_what_it_judges():
    model, critic = net(), nn.Linear(2, 1)
    engine, other = adam(model), sgd(critic)
    with watched(model, engine) as health:
        for _ in range(60):
            for _ in range(3):
                other.zero_grad()
                real, made = torch.randn(16, 2), model(torch.randn(16, 10))
                (nn.functional.softplus(critic(made)) / 3).mean().backward()
                nn.functional.softplus(-critic(real)).mean().backward()
                other.step()
            engine.zero_grad()
            nn.functional.softplus(-critic(model(torch.randn(16, 10)))).mean().backward()
            engine.step()
    return health


# rows


class Noisy(Dataset):
    """Rows with fresh noise at each reading."""

    def __init__(self, rows):
        self.x, self.y = data(rows)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, k):
        return self.x[k] + 0.1 * torch.randn(10), self.y[k]


def _endless(loader):
    while True:
        yield from loader


def _drawn(build, rows=None, *, shuffle=True):
    model = net()
    engine = adam(model)
    stream = build(DataLoader(rows or Noisy(80), batch_size=16, shuffle=shuffle))
    with watched(model, engine) as health:
        for _ in range(120):
            step(model, engine, *next(stream))
    return health


@broken("same_order_every_epoch")
def a_cycle_over_rows_with_fresh_noise():
    return _drawn(itertools.cycle)


@healthy
def loaders_that_are_begun_again_without_a_cycle():
    return _drawn(_endless)


@healthy
def a_cycle_over_rows_that_stay():
    return _drawn(itertools.cycle, TensorDataset(*data(80)))


@healthy
def a_cycle_in_order():
    return _drawn(itertools.cycle, shuffle=False)


def _parts(*, given, shuffle=False, anew=True):
    """Epochs of so many batches of a loader that has twelve."""
    model = net()
    engine = adam(model)
    loader = DataLoader(TensorDataset(*data(192)), batch_size=16, shuffle=shuffle)
    stream = iter(loader)
    with watched(model, engine) as health:
        for _ in range(math.ceil(180 / given)):
            if anew:
                stream = iter(loader)
            for _ in range(given):
                batch = next(stream, None)
                if batch is None:
                    stream = iter(loader)
                    batch = next(stream)
                step(model, engine, *batch)
    return health


@broken("same_rows_every_epoch")
def epochs_that_begin_with_the_same_rows():
    return _parts(given=5)


@healthy
def epochs_of_a_part_of_shuffled_rows():
    return _parts(given=5, shuffle=True)


@healthy
def epochs_of_a_part_that_go_on_where_the_last_ended():
    return _parts(given=5, anew=False)


@healthy
def epochs_in_order_that_are_read_to_their_end():
    return _parts(given=12)


@healthy
def a_few_batches_in_order_to_look_at():
    model = net()
    engine = adam(model)
    look = DataLoader(TensorDataset(*data(192)), batch_size=16)
    loader = DataLoader(TensorDataset(*data(80)), batch_size=16, shuffle=True)
    with watched(model, engine) as health:
        for _ in range(30):
            seen = iter(look)
            for x, y in loader:
                step(model, engine, x, y)
            with torch.no_grad():
                for _ in range(4):
                    model(next(seen)[0])
    return health


def _zipped(*, shuffle):
    """A long loader beside a short one, at which each epoch ends."""
    model = net()
    engine = adam(model)
    x, y = data(320)
    long = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=shuffle)
    short = DataLoader(TensorDataset(torch.randn(128, 10)), batch_size=16, shuffle=True)
    with watched(model, engine) as health:
        for _ in range(15):
            for (rows, labels), (others,) in zip(long, short):
                scores = model(others).softmax(1)
                entropy = -(scores * scores.log()).sum(1).mean()
                step(model, engine, rows, labels, lambda o, t, e=entropy: CE(o, t) + 0.01 * e)
    return health


@broken("same_rows_every_epoch")
def a_long_loader_in_order_beside_a_short_one():
    return _zipped(shuffle=False)


@healthy
def a_long_loader_that_shuffles_beside_a_short_one():
    return _zipped(shuffle=True)


def _evaluated(generator):
    """An evaluation after each epoch draws its own rows."""
    model = net()
    engine = adam(model)
    loader = DataLoader(TensorDataset(*data(320)), batch_size=16, shuffle=True)
    with watched(model, engine) as health:
        for _ in range(4):
            for x, y in loader:
                step(model, engine, x + 0.1 * torch.randn_like(x), y)
            with torch.no_grad():
                model(torch.randn(8, 10, generator=generator(0)))
    return health


@broken("same_order_every_epoch")
def an_evaluation_that_seeds_all_of_torch():
    return _evaluated(torch.manual_seed)


@healthy
def an_evaluation_with_a_generator_of_its_own():
    return _evaluated(lambda seed: torch.Generator().manual_seed(seed))


# rows and their targets


def _apart(*, shuffle):
    """Inputs and targets from two loaders."""
    model = net()
    engine = adam(model, 3e-3)
    x, y = data(320)
    first, second = (DataLoader(part, batch_size=16, shuffle=shuffle) for part in (x, y))
    with watched(model, engine) as health:
        for _ in range(6):
            for rows, labels in zip(first, second):
                step(model, engine, rows, labels)
    return health


@broken("unrelated_labels")
def inputs_and_targets_that_are_shuffled_apart():
    return _apart(shuffle=True)


@healthy
def inputs_and_targets_from_two_loaders_in_order():
    return _apart(shuffle=False)


@healthy
def targets_of_which_one_in_ten_parts_can_be_known():
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 1))
    engine = adam(model, 3e-3)
    x = torch.randn(640, 10)
    loader = DataLoader(TensorDataset(x, x[:, :1] + 3 * torch.randn(640, 1)), 32, shuffle=True)
    with watched(model, engine) as health:
        for _ in range(8):
            for rows, targets in loader:
                step(model, engine, rows, targets, nn.functional.mse_loss)
    return health


def _scaled(scale):
    model = net()
    engine = adam(model)
    x, y = data(160)
    x = 4 * x + 2
    mean, std = x.mean(0), x.std(0)
    with watched(model, engine) as health:
        for _ in range(8):
            for k in range(0, 160, 16):
                step(model, engine, scale(x[k : k + 16], mean, std), y[k : k + 16])
    return health


@broken("data_changed_in_place")
def rows_that_are_scaled_in_place_in_every_epoch():
    return _scaled(lambda x, mean, std: x.sub_(mean).div_(std))


@healthy
def rows_that_are_scaled_in_every_epoch():
    return _scaled(lambda x, mean, std: (x - mean) / std)


@healthy
def rows_of_a_buffer_that_new_ones_replace():
    model = net()
    engine = adam(model)
    buffer = torch.zeros(200, 10)
    with watched(model, engine) as health:
        for k, (x, _) in enumerate(list(batches(80, 8))):
            start = 8 * (k % 25)
            buffer[start : start + 8] = x
            rows = buffer[start : start + 8]
            step(model, engine, rows, (rows[:, 0] > 0).long())
    return health


@broken("schedule_overrun")
def a_cosine_by_hand_of_epochs_that_is_moved_in_every_batch():
    return _rates(
        lambda e: schedules.LambdaLR(e, lambda k: 0.5 * (1 + math.cos(math.pi * k / 10)))
    )


@healthy
def a_cosine_by_hand_of_all_batches():
    return _rates(
        lambda e: schedules.LambdaLR(e, lambda k: 0.5 * (1 + math.cos(math.pi * k / 120)))
    )
