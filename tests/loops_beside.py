"""Training loops whose fault lies beside the step: scalers, followers, schedules, kept states.

They join the lists of `training_loops`.
"""

from __future__ import annotations

import copy
import io
import itertools

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from training_loops import CE, STEPS, adam, batches, broken, data, healthy, net, sgd, step, watched

# scalers and clipping


def _scaled(*, unscale, clip=1.0, through=True, build=sgd):
    model = net()
    engine, scaler = build(model), torch.amp.GradScaler("cpu", init_scale=2.0**14)
    with watched(model, engine) as health:
        for x, y in batches():
            engine.zero_grad()
            scaler.scale(CE(model(x), y)).backward()
            if unscale:
                scaler.unscale_(engine)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if through:
                scaler.step(engine)
                scaler.update()
            else:
                engine.step()
                if unscale:
                    scaler.update()
    return health


@broken("clipped_before_unscaling")
def clipped_while_they_are_scaled():
    return _scaled(unscale=False)


@broken("clipped_before_unscaling")
def clipped_while_they_are_scaled_with_adam():
    return _scaled(unscale=False, clip=0.5, build=adam)


@broken("step_of_scaled_gradients")
def a_step_past_the_scaler():
    return _scaled(unscale=False, clip=None, through=False, build=adam)


@healthy
def clipped_once_they_are_unscaled():
    return _scaled(unscale=True, clip=0.1)


@healthy
def scaled_and_not_clipped():
    return _scaled(unscale=False, clip=None)


@healthy
def unscaled_by_hand_and_stepped_by_hand():
    return _scaled(unscale=True, through=False)


# norms of frozen parts


def _fine_tuned(*, train, shift, rows=32):
    body = nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU())
    whole = nn.Sequential(body, nn.Linear(32, 2))
    before = adam(whole, 1e-2)
    for x, y in batches(50):
        step(whole, before, x, y)
    body.requires_grad_(False)
    model = nn.Sequential(body, nn.Linear(32, 2))
    engine = adam(model[1], 1e-2)
    with watched(model, engine) as health:
        for x, y in batches(size=rows):
            model.train()
            if not train:
                body.eval()
            step(model, engine, x + shift, y)
    return health


@broken("frozen_norms_move")
def frozen_norms_that_follow_other_inputs():
    return _fine_tuned(train=True, shift=2.0)


@broken("frozen_norms_move")
def frozen_norms_of_tiny_batches():
    return _fine_tuned(train=True, shift=0.0, rows=2)


@healthy
def frozen_norms_in_eval_mode():
    return _fine_tuned(train=False, shift=2.0)


@healthy
def frozen_norms_that_see_what_they_saw_before():
    return _fine_tuned(train=True, shift=0.0)


@healthy
def norms_that_are_drawn_and_frozen():
    body = nn.Sequential(nn.Linear(10, 64), nn.BatchNorm1d(64), nn.ReLU()).requires_grad_(False)
    model = nn.Sequential(body, nn.Linear(64, 2))
    engine = adam(model[1], 1e-2)
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, 3 + x, y)
    return health


# states that are kept


def _best(keep, *, load=True):
    model = net()
    engine = adam(model)
    best = None
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches()):
            step(model, engine, x, y)
            if k in (10, 40):
                best = keep(model)
    if load:
        model.load_state_dict(best)
    return health


@broken("best_is_a_reference")
def the_best_state_without_a_copy():
    return _best(lambda model: model.state_dict())


@broken("best_is_a_reference")
def the_best_state_in_a_shallow_copy():
    return _best(lambda model: dict(model.state_dict()))


@healthy
def the_best_state_copied():
    return _best(lambda model: copy.deepcopy(model.state_dict()))


@healthy
def the_best_state_cloned_entry_by_entry():
    return _best(lambda model: {k: v.clone() for k, v in model.state_dict().items()})


@healthy
def a_state_that_is_written_and_not_loaded():
    return _best(lambda model: {"model": model.state_dict(), "epoch": 3}, load=False)


@healthy
def a_state_changed_in_part_and_loaded_at_once():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches()):
            step(model, engine, x, y)
            if k == 50:
                state = model.state_dict()
                state.update({"2.bias": torch.zeros(2)})
                model.load_state_dict(state)
    return health


# networks that follow


def _bootstrapped(follow, *, model=None, target=None, steps=150, seen=lambda x: torch.roll(x, 1)):
    model = model or nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    target = target or copy.deepcopy(model)
    engine = adam(model, 1e-2)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches(steps)):
            with torch.no_grad():
                goal = y[:, None].float() + 0.9 * target(seen(x))
            step(model, engine, x, goal, F.mse_loss)
            follow(k, model, target)
    return health


def polyak(target, model, tau):
    with torch.no_grad():
        for slow, fast in zip(target.parameters(), model.parameters()):
            slow.lerp_(fast, tau)


@broken("target_never_updated")
def a_target_that_stays():
    return _bootstrapped(lambda k, model, target: None)


@broken("target_never_updated")
def a_target_whose_copy_is_moved():
    return _bootstrapped(lambda k, model, target: polyak(copy.deepcopy(target), model, 0.05))


@broken("target_never_updated")
def a_target_within_the_agent_that_stays():
    agent = Agent()
    engine = adam(agent.online, 1e-2)
    with watched(agent, engine) as health:
        for x, y in batches(150):
            engine.zero_grad()
            goal = y[:, None].float() + 0.9 * agent.target(x.roll(1)).detach()
            F.mse_loss(agent(x), goal).backward()
            engine.step()
    return health


@broken("target_always_copied")
def a_target_copied_in_every_step():
    return _bootstrapped(lambda k, model, target: target.load_state_dict(model.state_dict()))


@broken("target_always_copied")
def a_target_moved_by_the_wrong_part():
    return _bootstrapped(lambda k, model, target: polyak(target, model, 0.995))


@broken("weights_overwritten")
def a_target_mixed_into_the_model():
    """The slow copy moves the model, and stays as it is."""
    return _bootstrapped(lambda k, model, target: polyak(model, target, 0.995))


@healthy
def a_target_copied_now_and_then():
    def follow(k, model, target):
        if k % 25 == 24:
            target.load_state_dict(model.state_dict())

    return _bootstrapped(follow)


@healthy
def a_target_moved_by_a_small_part():
    return _bootstrapped(lambda k, model, target: polyak(target, model, 0.01))


@healthy
def a_reference_that_stays():
    """As in preference optimisation, and in learning without forgetting."""
    return _bootstrapped(lambda k, model, target: None, seen=lambda x: x)


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.online = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, x):
        return self.online(x)


@healthy
def a_fixed_random_network_that_is_told():
    return _bootstrapped(
        lambda k, model, target: None,
        target=nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1)).requires_grad_(False),
        seen=lambda x: x,
    )


def _averaged(*, update, start=0, called=True):
    model = net()
    engine = adam(model, 1e-2)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    x_valid, y_valid = data(64)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches(150)):
            step(model, engine, x, y)
            if update and k >= start:
                ema.update_parameters(model)
            if called and k % 25 == 24:
                with torch.no_grad():
                    CE(ema(x_valid), y_valid)
    return health


@broken("target_never_updated")
def an_average_that_is_never_updated():
    return _averaged(update=False)


@broken("target_never_updated")
def an_average_that_is_neither_updated_nor_used():
    return _averaged(update=False, called=False)


def _averaged_with_norms(*, mended):
    """By hand, and used once the loop has ended."""
    model = net(nn.BatchNorm1d(32))
    engine, average = adam(model, 1e-2), copy.deepcopy(model).eval()
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y)
            polyak(average, model, 0.2)
    if mended:
        torch.optim.swa_utils.update_bn(batches(), average)
    average(x)
    return health


@broken("average_norms_stale")
def an_average_whose_norms_are_those_of_the_start():
    return _averaged_with_norms(mended=False)


@healthy
def an_average_whose_norms_see_the_rows():
    return _averaged_with_norms(mended=True)


@healthy
def an_average_of_the_weights():
    return _averaged(update=True)


@healthy
def an_average_that_starts_late():
    return _averaged(update=True, start=100)


@healthy
def a_first_model_that_is_compared_with():
    model = net()
    engine, first = adam(model, 1e-2), copy.deepcopy(model)
    x_valid, y_valid = data(64)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches(150)):
            step(model, engine, x, y)
            if k % 25 == 24:
                with torch.no_grad():
                    CE(first(x_valid), y_valid)
    return health


@healthy
def a_fixed_teacher_of_other_rows():
    """Self-training: it began as the same network, and labels rows that are not labelled."""
    model = net()
    engine, teacher = adam(model, 1e-2), copy.deepcopy(model).eval()
    with watched(model, engine) as health:
        for x, y in batches(150):
            more = torch.randn_like(x)
            with torch.no_grad():
                goal = teacher(more).softmax(1)
            engine.zero_grad()
            (CE(model(x), y) + CE(model(more + 0.1), goal)).backward()
            engine.step()
    return health


@healthy
def what_was_known_before_is_kept_on_rows_of_memory():
    model = net()
    engine, mine = adam(model, 1e-2), copy.deepcopy(model)
    with watched(model, engine) as health:
        for x, y in batches(150):
            memory = torch.randn_like(x)
            with torch.no_grad():
                goal = mine(memory)
            engine.zero_grad()
            (F.mse_loss(model(memory), goal) + CE(model(x), y)).backward()
            engine.step()
    return health


@healthy
def two_views_and_a_teacher():
    online = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 8))
    teacher, head = copy.deepcopy(online).requires_grad_(False), nn.Linear(8, 8)
    model = nn.ModuleDict({"online": online, "head": head})
    engine = adam(model)
    with watched(model, engine) as health:
        for x, _ in batches(150):
            one, other = x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)
            engine.zero_grad()
            goal = F.normalize(teacher(other), dim=1)
            (2 - 2 * (F.normalize(head(online(one)), dim=1) * goal).sum(1)).mean().backward()
            engine.step()
            polyak(teacher, online, 0.01)
    return health


# tensors of a loss


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_var = nn.Parameter(torch.zeros(2))

    def forward(self, losses):
        return (torch.stack(losses) * torch.exp(-self.log_var) + self.log_var).sum()


class Centres(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2))

    def forward(self, features, y):
        return CE(features @ self.weight.T, y)


def _weighted(*, given):
    model, weigh = net(), Weighted()
    engine = adam(nn.ModuleList([model, weigh]) if given else model)
    with watched(model, engine) as health:
        for x, y in batches():
            out = model(x)
            losses = [CE(out, y), out.square().mean()]
            engine.zero_grad()
            weigh(losses).backward()
            engine.step()
    return health


@broken("missing_from_optimizer")
def weights_of_losses_that_no_optimizer_has():
    return _weighted(given=False)


@broken("missing_from_optimizer")
def centres_of_classes_that_no_optimizer_has():
    model, criterion = net(), Centres()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y, criterion)
    return health


@broken("missing_from_optimizer")
def a_temperature_that_no_optimizer_has():
    model, temperature = net(), torch.ones((), requires_grad=True)
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y, lambda o, y: CE(o * temperature, y))
    return health


@healthy
def weights_of_losses_beside_the_model():
    return _weighted(given=True)


@healthy
def weights_of_losses_with_an_optimizer_of_their_own():
    model, weigh = net(), Weighted()
    engine, other = adam(model), adam(weigh)
    with watched(model, engine) as health:
        for x, y in batches():
            out = model(x)
            engine.zero_grad()
            other.zero_grad()
            weigh([CE(out, y), out.square().mean()]).backward()
            engine.step()
            other.step()
    return health


@healthy
def inputs_that_are_attacked():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            x.requires_grad_(True)
            CE(model(x), y).backward()
            step(model, engine, (x + 0.1 * x.grad.sign()).detach(), y)
    return health


# schedules and orders


def _loader():
    return DataLoader(TensorDataset(*data(320)), batch_size=32, shuffle=True)


@broken("schedule_of_another_optimizer")
def a_schedule_of_an_older_optimizer():
    model = net()
    schedule = schedules.StepLR(sgd(model), 10)
    engine = sgd(model)
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y)
            schedule.step()
    return health


@broken("schedule_never_stepped")
def a_schedule_that_is_made_and_left():
    model, loader = net(), _loader()
    engine = sgd(model)
    schedule = schedules.CosineAnnealingLR(engine, 10)
    with watched(model, engine) as health:
        for _ in range(10):
            for x, y in loader:
                step(model, engine, x, y)
    assert schedule.last_epoch == 0
    return health


def _one_cycle(*, every_batch, build=None):
    model, loader = net(), _loader()
    engine = sgd(model)
    build = build or (lambda e: schedules.OneCycleLR(e, 0.1, epochs=10, steps_per_epoch=10))
    schedule = build(engine)
    with watched(model, engine) as health:
        for _ in range(10):
            for x, y in loader:
                step(model, engine, x, y)
                if every_batch:
                    schedule.step()
            if not every_batch:
                schedule.step()
    return health


@broken("schedule_unfinished")
def one_cycle_moved_once_an_epoch():
    return _one_cycle(every_batch=False)


@broken("schedule_unfinished")
def a_cosine_of_all_steps_moved_once_an_epoch():
    return _one_cycle(
        every_batch=False, build=lambda e: schedules.CosineAnnealingLR(e, T_max=10 * 10)
    )


@broken("schedule_overrun")
def a_cosine_of_epochs_moved_in_every_batch():
    return _one_cycle(every_batch=True, build=lambda e: schedules.CosineAnnealingLR(e, 10))


@broken("warmup_never_ends")
def a_warm_up_of_all_steps():
    return _one_cycle(
        every_batch=True, build=lambda e: schedules.LambdaLR(e, lambda k: min(1.0, k / 200))
    )


@healthy
def a_warm_up_and_a_constant():
    return _one_cycle(
        every_batch=True, build=lambda e: schedules.LambdaLR(e, lambda k: min(1.0, k / 50))
    )


@healthy
def one_cycle_moved_in_every_batch():
    return _one_cycle(every_batch=True)


@healthy
def a_cosine_of_epochs():
    return _one_cycle(every_batch=False, build=lambda e: schedules.CosineAnnealingLR(e, 10))


@healthy
def a_schedule_that_follows_another():
    def build(engine):
        warm, rest = schedules.ConstantLR(engine, 0.5, 200), schedules.StepLR(engine, 100)
        return schedules.SequentialLR(engine, [warm, rest], [200])

    return _one_cycle(every_batch=True, build=build)


def _distributed(*, told):
    model = net()
    rows = TensorDataset(*data(320))
    sampler = DistributedSampler(rows, num_replicas=1, rank=0)
    loader = DataLoader(rows, batch_size=32, sampler=sampler)
    engine = sgd(model)
    with watched(model, engine) as health:
        for epoch in range(10):
            if told:
                sampler.set_epoch(epoch)
            for x, y in loader:
                step(model, engine, x, y)
    return health


@broken("same_order_every_epoch")
def a_sampler_that_is_not_told_the_epoch():
    return _distributed(told=False)


@healthy
def a_sampler_that_is_told_the_epoch():
    return _distributed(told=True)


# steps, closures, sums, freezing


@broken("stepped_twice")
def a_step_after_the_step():
    model = net()
    engine = sgd(model)
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y)
            engine.step()
    return health


@broken("stepped_twice")
def a_step_beside_that_of_the_scaler():
    model = net()
    engine, scaler = adam(model), torch.amp.GradScaler("cpu", init_scale=1.0)
    with watched(model, engine) as health:
        for x, y in batches():
            engine.zero_grad()
            scaler.scale(CE(model(x), y)).backward()
            scaler.step(engine)
            engine.step()
            scaler.update()
    return health


@broken("step_never_called")
def a_new_optimizer_after_the_first_epoch():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches(250)):
            if k == 50:
                engine = adam(model)
            step(model, engine, x, y)
    return health


def _closure(clear, *, search=None):
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = data(128)
    engine = torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=4, line_search_fn=search)
    with watched(model, engine, every=2) as health:
        for _ in range(25):
            clear("outside", engine)

            def closure():
                clear("inside", engine)
                loss = CE(model(x), y)
                loss.backward()
                return loss

            engine.step(closure)
    return health


@broken("gradients_not_cleared")
def a_closure_whose_gradients_are_cleared_outside():
    return _closure(lambda place, engine: place == "outside" and engine.zero_grad())


@broken("gradients_not_cleared")
def a_closure_whose_gradients_are_never_cleared():
    return _closure(lambda place, engine: None, search="strong_wolfe")


@healthy
def a_closure_that_clears():
    return _closure(
        lambda place, engine: place == "inside" and engine.zero_grad(), search="strong_wolfe"
    )


@healthy
def a_closure_of_micro_batches():
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = data(128)
    engine = torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=4)

    def closure():
        engine.zero_grad()
        total = 0.0
        for a, b in zip(x.split(32), y.split(32)):
            loss = CE(model(a), b) / 4
            loss.backward()
            total += float(loss)
        return total

    with watched(model, engine, every=2) as health:
        for _ in range(25):
            engine.step(closure)
    return health


def _micro(divide, *, lr=1.0, build=None):
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
                          nn.Linear(32, 2))  # fmt: skip
    engine = build(model) if build else sgd(model, lr, momentum=0.9)
    with watched(model, engine, every=3) as health:
        for k, (x, y) in enumerate(batches(16 * 40, 8)):
            divide(CE(model(x), y)).backward()
            if k % 16 == 15:
                engine.step()
                engine.zero_grad()
    return health


@broken("accumulation_not_averaged")
def micro_batches_that_are_not_divided():
    return _micro(lambda loss: loss, lr=0.5)


@healthy
def micro_batches_that_are_divided():
    return _micro(lambda loss: loss / 16, lr=0.1)


@healthy
def micro_batches_that_are_summed_by_adam():
    return _micro(lambda loss: loss, build=adam)


@broken("exploding_gradient")
def a_rate_that_throws_the_weights_away():
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                          nn.Linear(64, 1))  # fmt: skip
    engine = sgd(model, 0.7, momentum=0.9)
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, 5.0 * y[:, None], F.mse_loss)
    return health


@broken("frozen_but_moving")
def frozen_with_an_old_gradient():
    model = net()
    engine = torch.optim.Adam(model.parameters(), lr=1e-3)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches()):
            if k == 20:
                model[0].requires_grad_(False)
            engine.zero_grad(set_to_none=False)
            CE(model(x), y).backward()
            engine.step()
    return health


def _clipped_after(clear):
    model = net()
    engine = sgd(model)
    with watched(model, engine) as health:
        for x, y in batches():
            loss = CE(model(x), y)
            clear(engine)
            loss.backward()
            engine.step()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    return health


@broken("clipped_after_step")
def clipped_after_the_step():
    return _clipped_after(lambda engine: engine.zero_grad())


@broken("clipped_after_step")
def clipped_after_the_step_and_cleared_to_zeros():
    return _clipped_after(lambda engine: engine.zero_grad(set_to_none=False))


@broken("clipped_after_step")
def clipped_after_the_step_of_parts():
    cell, head = nn.GRU(4, 16, batch_first=True), nn.Linear(16, 1)
    model = nn.ModuleList([cell, head])
    engine = adam(model)
    with watched(model, engine) as health:
        for _ in range(STEPS):
            x = torch.randn(8, 5, 4)
            engine.zero_grad()
            F.mse_loss(head(cell(x)[0][:, -1]), x.sum((1, 2))[:, None]).backward()
            engine.step()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    return health


@broken("micro_batches_lost")
def cleared_before_each_micro_batch():
    model = net()
    engine = adam(model)
    with watched(model, engine, every=3) as health:
        for k, (x, y) in enumerate(batches(160, 8)):
            engine.zero_grad()
            CE(model(x), y).backward()
            if k % 4 == 3:
                engine.step()
    return health


@healthy
def attacks_by_several_backward_passes():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            attacked = x.clone()
            for _ in range(3):
                attacked.requires_grad_(True)
                model.zero_grad()
                CE(model(attacked), y).backward()
                attacked = (attacked + 0.01 * attacked.grad.sign()).detach()
            step(model, engine, attacked, y)
    return health


@healthy
def gradients_of_three_tasks_that_are_joined_by_hand():
    model = net()
    engine = sgd(model)
    with watched(model, engine) as health:
        for x, y in batches():
            sums = [torch.zeros_like(p) for p in model.parameters()]
            for part in (x, x.flip(0), x.roll(1, 0)):
                engine.zero_grad()
                CE(model(part), y).backward()
                for total, p in zip(sums, model.parameters()):
                    total += p.grad
            for total, p in zip(sums, model.parameters()):
                p.grad = total
            engine.step()
    return health


@broken("frozen_in_name")
def frozen_by_an_attribute_of_the_module():
    model = net()
    model[0].requires_grad = False
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y)
    return health


@healthy
def losses_that_are_kept_as_they_are():
    model, kept = net(), []
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            kept.append(step(model, engine, x, y))
    assert any(a.code == "graphs_kept" for a in health.findings)
    return health


@healthy
def a_fixed_network_that_judges_and_is_not_frozen():
    """Gradients arrive at its tensors, and nobody wants them."""
    model, judge = nn.Linear(10, 10), net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, _ in batches():
            engine.zero_grad()
            F.mse_loss(judge(model(x)), judge(x).detach()).backward()
            engine.step()
    return health


@healthy
def frozen_and_without_a_gradient():
    model = net()
    engine = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches()):
            if k == 20:
                model[0].requires_grad_(False)
            step(model, engine, x, y)
    return health


@healthy
def copies_and_pickles_of_a_watched_model():

    body, model = nn.Linear(10, 10), net()
    engine = adam(nn.ModuleList([body, model]))
    with watched(model, engine) as health:
        for x, y in batches():
            engine.zero_grad()
            loss = CE(model(body(x)), y)
            copy.deepcopy(model)(x)
            torch.save(model, io.BytesIO())
            loss.backward()
            engine.step()
    return health


@healthy
def a_generator_and_a_judge_that_are_frozen_in_turns():
    judge = nn.Sequential(nn.Linear(10, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    maker = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 10))
    engine, other = adam(judge), adam(maker)
    with watched(judge, engine) as health, watched(maker, other) as beside:
        for x, _ in itertools.islice(batches(), STEPS):
            judge.requires_grad_(True)
            made = maker(torch.randn(len(x), 4))
            engine.zero_grad()
            F.softplus(-judge(x)).mean().backward()
            F.softplus(judge(made.detach())).mean().backward()
            engine.step()
            judge.requires_grad_(False)
            other.zero_grad()
            F.softplus(-judge(made)).mean().backward()
            other.step()
    assert not beside.alarms, str(beside)
    return health
