"""Training loops as people write them: broken ones by what is wrong with them, and healthy ones.

The broken ones are re-created from questions in public forums and issue trackers.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, TensorDataset

import tikhon as tk

STEPS = 65
CE = F.cross_entropy
BROKEN: dict[str, tuple] = {}  # name -> (loop, code)
HEALTHY: dict[str, object] = {}


def broken(code):
    def note(loop):
        BROKEN[loop.__name__] = (loop, code)
        return loop

    return note


def healthy(loop):
    HEALTHY[loop.__name__] = loop
    return loop


def data(rows=512):
    x = torch.randn(rows, 10)
    return x, (x[:, 0] + x[:, 1] > 0).long()


def net(*between):
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), *between, nn.Linear(32, 2))


def batches(steps=STEPS, size=32):
    x, y = data()
    for _ in range(steps):
        rows = torch.randint(0, len(x), (size,))
        yield x[rows], y[rows]


def sgd(model, lr=0.05, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def adam(model, lr=1e-3):
    return torch.optim.Adam(model.parameters(), lr=lr)


def watched(model, optimizer, **options):
    return tk.watch(model, optimizer, **{"every": 5, **options})


def step(model, optimizer, x, y, loss=CE):
    optimizer.zero_grad()
    value = loss(model(x), y)
    value.backward()
    optimizer.step()
    return value


# what is wrong with the gradients


def _uncleared(build):
    model = net()
    engine = build(model)
    with watched(model, engine) as health:
        for x, y in batches():
            CE(model(x), y).backward()
            engine.step()
    return health


@broken("gradients_not_cleared")
def sgd_without_zero_grad():
    return _uncleared(sgd)


@broken("gradients_not_cleared")
def momentum_without_zero_grad():
    return _uncleared(lambda m: sgd(m, 0.01, momentum=0.9))


@broken("gradients_not_cleared")
def adam_without_zero_grad():
    return _uncleared(adam)


@broken("gradients_not_cleared")
def zero_grad_of_an_epoch():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches()):
            if k % 16 == 0:
                engine.zero_grad()
            CE(model(x), y).backward()
            engine.step()
    return health


@broken("gradients_not_cleared")
def zero_grad_of_another_model():
    model, other = net(), net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            other.zero_grad()
            CE(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            engine.step()
    return health


@broken("gradients_not_cleared")
def a_closure_that_does_not_clear():
    model = net()
    engine = sgd(model)
    with watched(model, engine) as health:
        for x, y in batches():

            def closure(x=x, y=y):
                loss = CE(model(x), y)
                loss.backward()
                return loss

            engine.step(closure)
    return health


@broken("no_gradient")
def zero_grad_between_backward_and_step():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            CE(model(x), y).backward()
            engine.zero_grad()
            engine.step()
    return health


@broken("no_gradient")
def zeros_between_backward_and_step():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            CE(model(x), y).backward()
            engine.zero_grad(set_to_none=False)
            engine.step()
    return health


@broken("no_gradient")
def step_before_backward_and_cleared():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            engine.zero_grad()
            loss = CE(model(x), y)
            engine.step()
            loss.backward()
    return health


@broken("step_before_backward")
def step_before_backward():
    model = nn.Linear(10, 2)  # a deeper network stops with an error of autograd
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            loss = CE(model(x), y)
            engine.step()
            engine.zero_grad()
            loss.backward()
    return health


# what is wrong with the loss


def _loss_of(value, model=None, build=adam):
    model = model or net()
    engine = build(model)
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y, value)
    return health


@broken("no_gradient")
def loss_rebuilt_from_item():
    return _loss_of(lambda o, y: torch.tensor(CE(o, y).item(), requires_grad=True))


@broken("no_gradient")
def loss_on_argmax():
    return _loss_of(lambda o, y: F.l1_loss(o.argmax(1).float().requires_grad_(), y.float()))


@broken("no_gradient")
def loss_on_detached_outputs():
    return _loss_of(lambda o, y: CE(o.detach().requires_grad_(), y))


@broken("no_gradient")
def loss_through_numpy():
    return _loss_of(lambda o, y: CE(torch.tensor(o.detach().numpy(), requires_grad=True), y))


@broken("no_gradient")
def loss_that_is_constant():
    return _loss_of(lambda o, y: (o.round() - y[:, None]).square().mean())


@broken("loss_not_connected")
def only_the_penalty_is_connected():
    model = net()
    weights = list(model.parameters())

    def loss(output, y):
        penalty = sum(w.square().sum() for w in weights)
        return CE(output, y).item() + 1e-3 * penalty

    return _loss_of(loss, model)


@broken("no_gradient")
def backward_never_called():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            engine.zero_grad()
            CE(model(x), y)
            engine.step()
    return health


# what is wrong with the optimizer


@broken("optimizer_of_another_model")
def optimizer_of_an_older_model():
    model, older = net(), net()
    engine = adam(older)
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y)
    return health


@broken("optimizer_of_another_model")
def optimizer_of_a_copy():
    model = net()
    engine = adam(model)
    model = copy.deepcopy(model)
    with watched(model, engine) as health:
        for x, y in batches():
            model.zero_grad()
            CE(model(x), y).backward()
            engine.step()
    return health


@broken("missing_from_optimizer")
def a_layer_left_out():
    model = net()
    engine = torch.optim.Adam(model[-1].parameters(), lr=1e-3)
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y)
    return health


@broken("missing_from_optimizer")
def a_head_replaced_after_the_optimizer():
    model = net()
    engine = adam(model)
    model[-1] = nn.Linear(32, 2)
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y)
    return health


@broken("missing_from_optimizer")
def unfrozen_after_the_optimizer():
    model = net()
    model[0].requires_grad_(False)
    engine = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches()):
            if k == 30:
                model[0].requires_grad_(True)
            step(model, engine, x, y)
    return health


@broken("duplicated_parameters")
def parameters_given_twice():
    model = net()
    engine = sgd(model)
    engine.param_groups[0]["params"] += list(model[0].parameters())
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y)
    return health


@broken("step_never_called")
def no_step():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            engine.zero_grad()
            CE(model(x), y).backward()
    return health


@broken("step_never_called")
def a_new_optimizer_every_epoch():
    model = net()
    with watched(model, adam(model)) as health:
        for _ in range(3):
            engine = adam(model)
            for x, y in batches(20):
                step(model, engine, x, y)
    return health


@broken("step_never_called")
def the_scheduler_steps_instead():
    model = net()
    engine = adam(model)
    schedule = schedules.StepLR(engine, 1000)
    with watched(model, engine) as health:
        for x, y in batches():
            engine.zero_grad()
            CE(model(x), y).backward()
            schedule.step()
    return health


@broken("learning_rate_collapsed")
def an_exponential_schedule_per_batch():
    model = net()
    engine = sgd(model, 0.1)
    schedule = schedules.ExponentialLR(engine, 0.9)
    with watched(model, engine) as health:
        for x, y in batches(100):
            step(model, engine, x, y)
            schedule.step()
    return health


@broken("learning_rate_collapsed")
def a_plateau_per_batch():
    model = net()
    engine = sgd(model, 0.1)
    schedule = schedules.ReduceLROnPlateau(engine, patience=5)
    with watched(model, engine) as health:
        for x, y in batches(150):
            loss = step(model, engine, x, torch.randint_like(y, 2))
            schedule.step(loss)
    return health


# what is wrong with the tensors


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.spare = nn.Linear(10, 32), nn.Linear(32, 2), nn.Linear(32, 2)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


class Cut(Heads):
    def forward(self, x):
        hidden = torch.relu(self.body(x)).detach()
        return self.head(hidden) + self.spare(hidden)


@broken("unmoved_parameters")
def a_head_that_is_not_used():
    return _loss_of(CE, Heads())


@broken("unmoved_parameters")
def a_detach_in_forward():
    return _loss_of(CE, Cut())


@broken("unmoved_parameters")
def dead_units():
    model = net()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    return _loss_of(CE, model)


@broken("unmoved_parameters")
def bfloat16_weights_below_their_resolution():
    model = net().bfloat16()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    return _loss_of(lambda o, y: CE(o.float(), y), nn.Sequential(Half(), model), sgd_fine)


class Half(nn.Module):
    def forward(self, x):
        return x.bfloat16()


def sgd_fine(model):
    return sgd(model, 1e-4)


@broken("weights_overwritten")
def loaded_in_every_step():
    model = net()
    start = copy.deepcopy(model.state_dict())
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            model.load_state_dict(start)
            step(model, engine, x, y)
    return health


@broken("weights_overwritten")
def drawn_again_in_every_step():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            for layer in (model[0], model[-1]):
                layer.reset_parameters()
            step(model, engine, x, y)
    return health


# what is wrong with mode and batches


@broken("eval_mode_in_training")
def eval_mode_after_the_first_evaluation():
    model = net(nn.BatchNorm1d(32), nn.Dropout(0.2))
    engine = adam(model)
    x_valid, _ = data(64)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches()):
            step(model, engine, x, y)
            if k == 20:
                model.eval()
                with torch.no_grad():
                    model(x_valid)
    return health


@broken("eval_mode_in_training")
def parts_that_are_put_into_eval_mode_while_the_whole_stays():
    body = net(nn.BatchNorm1d(32), nn.Dropout(0.2))
    model = nn.Sequential(body, nn.Linear(2, 2))
    engine = adam(model)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches()):
            step(model, engine, x, y)
            if k == 20:
                body.eval()
    return health


@broken("repeated_batch")
def a_new_iterator_in_every_step():
    model = net()
    engine = adam(model)
    loader = DataLoader(TensorDataset(*data()), batch_size=32)
    with watched(model, engine) as health:
        for _ in range(STEPS):
            x, y = next(iter(loader))
            step(model, engine, x, y)
    return health


@broken("repeated_batch")
def a_slice_that_does_not_move():
    model = net()
    engine = adam(model)
    x, y = data()
    with watched(model, engine) as health:
        for _ in range(STEPS):
            step(model, engine, x[:32], y[:32])
    return health


@broken("loss_spike")
def one_poisoned_batch():
    model = net()
    engine = sgd(model)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches()):
            x = x * 300 if k == 63 else x
            health.loss(step(model, engine, x, y))
    return health


# healthy


@healthy
def plain():
    return _loss_of(CE)


@healthy
def momentum_and_a_set_of_zeros():
    model = net()
    engine = sgd(model, momentum=0.9)
    with watched(model, engine) as health:
        for x, y in batches():
            engine.zero_grad(set_to_none=False)
            health.loss(CE(model(x), y)).backward()
            engine.step()
    return health


@healthy
def cleared_after_the_step():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            CE(model(x), y).backward()
            engine.step()
            engine.zero_grad()
    return health


@healthy
def cleared_by_the_model_between_forward_and_backward():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            loss = CE(model(x), y)
            model.zero_grad()
            loss.backward()
            engine.step()
    return health


@healthy
def accumulated_within_a_batch():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            for a, b in zip(x.split(8), y.split(8)):
                (CE(model(a), b) / 4).backward()
            engine.step()
            engine.zero_grad()
    return health


@healthy
def accumulated_over_batches():
    model = net()
    engine = sgd(model, momentum=0.9)
    with watched(model, engine, every=3) as health:
        for k, (x, y) in enumerate(batches(100)):
            (CE(model(x), y) / 4).backward()
            if (k + 1) % 4 == 0:
                engine.step()
                engine.zero_grad()
    return health


@healthy
def accumulated_and_cleared_at_the_start_of_a_group():
    model = net()
    engine = adam(model)
    with watched(model, engine, every=3) as health:
        for k, (x, y) in enumerate(batches(100)):
            if k % 4 == 0:
                engine.zero_grad()
            (CE(model(x), y) / 4).backward()
            if k % 4 == 3:
                engine.step()
    return health


@healthy
def summed_losses_of_several_passes():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            engine.zero_grad()
            sum(CE(model(a), b) for a, b in zip(x.split(8), y.split(8))).backward()
            engine.step()
    return health


@healthy
def gradual_unfreezing_with_groups():
    model = net()
    model[0].requires_grad_(False)
    engine = torch.optim.Adam(model[-1].parameters(), lr=1e-3)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches()):
            if k == 40:
                model[0].requires_grad_(True)
                engine.add_param_group({"params": list(model[0].parameters()), "lr": 1e-4})
            step(model, engine, x, y)
    return health


@healthy
def gradual_unfreezing_of_what_the_optimizer_has():
    model = net()
    model[0].requires_grad_(False)
    engine = adam(model)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches()):
            if k == 40:
                model[0].requires_grad_(True)
            step(model, engine, x, y)
    return health


@healthy
def frozen_backbone_in_eval_mode():
    backbone = nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU())
    model = nn.Sequential(backbone.requires_grad_(False), nn.Dropout(0.1), nn.Linear(32, 2))
    engine = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with watched(model, engine) as health:
        for x, y in batches():
            model.train()
            backbone.eval()
            step(model, engine, x, y)
    return health


@healthy
def a_frozen_backbone_whose_whole_model_is_in_eval_mode():
    backbone = nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU())
    model = nn.Sequential(backbone.requires_grad_(False), nn.Linear(32, 2)).eval()
    engine = adam(model[1])
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y)
    return health


@healthy
def norms_that_are_kept_in_eval_mode_one_by_one():
    model = net(nn.BatchNorm1d(32))
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            model.train()
            model[2].eval()
            step(model, engine, x, y)
    return health


def _adversarial(watch_generator):
    generator, critic = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 10)), net()[:3]
    critic = nn.Sequential(nn.Linear(10, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    first, second = adam(generator), adam(critic)
    loss = F.binary_cross_entropy_with_logits
    pair = (generator, first) if watch_generator else (critic, second)
    with watched(*pair) as health:
        for x, _ in batches():
            real, fake = torch.ones(len(x), 1), torch.zeros(len(x), 1)
            made = generator(torch.randn(len(x), 4))
            second.zero_grad()
            (loss(critic(x), real) + loss(critic(made.detach()), fake)).backward()
            second.step()
            first.zero_grad()
            loss(critic(made), real).backward()
            first.step()
    return health


@healthy
def adversarial_generator():
    return _adversarial(True)


def _two_players(*, clear_critic=True, detach=True, turns=1, sight=None):
    """A generator and a critic in turns; what is watched is what should stay apart."""
    generator, critic = nn.Linear(4, 10), nn.Linear(10, 1)
    first, second = adam(generator), adam(critic)
    pair = (generator, first) if sight == "generator" else (critic, second)
    loss = F.softplus
    with watched(*pair) as health:
        for k, (x, _) in enumerate(batches()):
            if k % turns == 0 and sight == "critic":
                first.zero_grad()
                loss(-critic(generator(torch.randn(32, 4)))).mean().backward()
                first.step()
            made = generator(torch.randn(32, 4))
            if sight == "generator":
                first.zero_grad()
            if clear_critic:
                second.zero_grad()
            judged = critic(made.detach() if detach else made)
            (loss(-critic(x)) + loss(judged)).mean().backward()
            second.step()
            second.zero_grad()
            if sight == "generator":
                loss(-critic(generator(torch.randn(32, 4)))).mean().backward()
                first.step()
    return health


@broken("gradients_of_another_loss")
def a_critic_that_keeps_what_the_generator_left():
    return _two_players(clear_critic=False, sight="critic")


@broken("gradients_of_another_loss")
def a_critic_that_keeps_it_at_each_third_step():
    return _two_players(clear_critic=False, turns=3, sight="critic")


@broken("gradients_of_another_loss")
def a_generator_that_the_critic_reaches():
    return _two_players(detach=False, sight="generator")


@healthy
def a_critic_that_clears():
    return _two_players(turns=3, sight="critic")


@healthy
def a_generator_behind_a_detach():
    return _two_players(sight="generator")


@healthy
def two_optimizers_of_which_one_waits():
    model = net()
    slow, fast = adam(model[:1]), sgd(model[2:])
    with watched(model[:1], slow) as health:
        for k, (x, y) in enumerate(batches()):
            (CE(model(x), y) / 3).backward()
            fast.step()
            fast.zero_grad()
            if k % 3 == 2:
                slow.step()
                slow.zero_grad()
    return health


@broken("gradients_not_cleared")
def zero_grad_of_a_short_epoch():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches()):
            if k % 10 == 0:
                engine.zero_grad()
            CE(model(x), y).backward()
            engine.step()
    return health


@healthy
def adversarial_critic():
    return _adversarial(False)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.made, self.judge = nn.Linear(4, 10), nn.Linear(10, 1)

    def forward(self, noise):
        return self.judge(self.made(noise))


@healthy
def two_optimizers_of_one_model():
    model = Pair()
    first, second = adam(model.made), sgd(model.judge, 0.01)
    with watched(model, first) as health:
        for x, _ in batches():
            second.zero_grad()
            F.softplus(-model.judge(x)).mean().backward()
            second.step()
            first.zero_grad()
            F.softplus(model(torch.randn(len(x), 4))).mean().backward()
            first.step()
    return health


@healthy
def critic_with_clamped_weights():
    critic = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 1))
    engine = torch.optim.RMSprop(critic.parameters(), lr=5e-5)
    with watched(critic, engine) as health:
        for x, _ in batches():
            engine.zero_grad()
            (critic(x + 1).mean() - critic(x).mean()).neg().backward()
            engine.step()
            with torch.no_grad():
                for p in critic.parameters():
                    p.clamp_(-0.01, 0.01)
    return health


@healthy
def lbfgs_on_all_rows():
    model = net()
    engine = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    x, y = data()
    with watched(model, engine) as health:
        for _ in range(30):

            def closure():
                engine.zero_grad()
                loss = CE(model(x), y)
                loss.backward()
                return loss

            engine.step(closure)
    return health


@healthy
def all_rows_at_once():
    model = net()
    engine = sgd(model, 0.5)
    x, y = data()
    x, y = x[:400], y[:400]
    with watched(model, engine) as health:
        for _ in range(STEPS):
            health.loss(step(model, engine, x, y))
    return health


@healthy
def a_loader_in_order():
    model = net()
    engine = adam(model)
    loader = DataLoader(TensorDataset(*data(160)), batch_size=32)  # five batches, as every=5
    with watched(model, engine) as health:
        for _ in range(20):
            for x, y in loader:
                step(model, engine, x, y)
    return health


def _scheduled(build, lr=0.1, steps=STEPS):
    model = net()
    engine = sgd(model, lr)
    schedule = build(engine)
    with watched(model, engine) as health:
        for x, y in batches(steps):
            health.loss(step(model, engine, x, y))
            schedule.step()
    return health


@healthy
def one_cycle_per_batch():
    return _scheduled(lambda o: schedules.OneCycleLR(o, 0.5, total_steps=STEPS + 1))


@healthy
def cosine_per_batch():
    return _scheduled(lambda o: schedules.CosineAnnealingLR(o, STEPS))


@healthy
def warm_up_from_zero_and_linear_decay():
    return _scheduled(
        lambda o: schedules.LambdaLR(
            o, lambda k: min(k / 10, max(0.0, (STEPS - k) / (STEPS - 10)))
        )
    )


@healthy
def warm_restarts():
    return _scheduled(lambda o: schedules.CosineAnnealingWarmRestarts(o, 20))


@healthy
def three_drops_per_epoch():
    return _scheduled(lambda o: schedules.MultiStepLR(o, [40, 70, 90]))


@healthy
def clipped_gradients():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            engine.zero_grad()
            CE(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            nn.utils.clip_grad_value_(model.parameters(), 0.05)
            engine.step()
    return health


@healthy
def a_loss_scale_with_a_few_skips():
    model = net()
    engine = adam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38, growth_interval=40)
    with watched(model, engine, scaler=scaler) as health:
        for x, y in batches():
            engine.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = CE(model(x), y)
            scaler.scale(20 * loss).backward()
            scaler.step(engine)
            scaler.update()
    return health


@healthy
def an_average_for_evaluation():
    model = net()
    engine = adam(model)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    x_valid, _ = data(64)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches()):
            step(model, engine, x, y)
            average.update_parameters(model)
            if k % 10 == 9:
                kept = copy.deepcopy(model.state_dict())
                model.load_state_dict(average.module.state_dict())
                with torch.no_grad():
                    model(x_valid)
                model.load_state_dict(kept)
    return health


@healthy
def several_groups():
    model = net()
    engine = torch.optim.AdamW(
        [
            {"params": [model[0].weight], "weight_decay": 0.1, "lr": 1e-4},
            {"params": [model[0].bias, model[2].bias], "weight_decay": 0.0},
            {"params": [model[2].weight]},
        ],
        lr=1e-3,
    )
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y)
    return health


@healthy
def a_loss_with_parameters_of_its_own():
    model = net()
    temperature = nn.Parameter(torch.ones(()))
    engine = torch.optim.Adam([*model.parameters(), temperature], lr=1e-3)
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y, lambda o, y: CE(o * temperature, y))
    return health


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x):
        return self.out(self.words(x))


@healthy
def tied_weights():
    model = Tied()
    engine = adam(model, 1e-2)
    with watched(model, engine) as health:
        for _ in range(STEPS):
            x = torch.randint(0, 20, (32,))
            step(model, engine, x, (x + 1) % 20)
    return health


@healthy
def sparse_embedding_gradients():
    model = nn.Sequential(nn.Embedding(20, 16, sparse=True), nn.Linear(16, 20))
    engine = sgd(model, 0.5)
    with watched(model, engine) as health:
        for _ in range(STEPS):
            x = torch.randint(0, 20, (32,))
            step(model, engine, x, (x + 1) % 20)
    return health


@healthy
def evaluation_between():
    model = net(nn.Dropout(0.2), nn.BatchNorm1d(32))
    engine = adam(model)
    x_valid, y_valid = data(64)
    with watched(model, engine) as health:
        for k, (x, y) in enumerate(batches()):
            model.train()
            step(model, engine, x, y)
            if k % 5 == 4:
                model.eval()
                with torch.no_grad():
                    CE(model(x_valid), y_valid)
    return health


@healthy
def accuracy_by_a_second_pass_with_a_graph():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, y in batches():
            engine.zero_grad()
            CE(model(x), y).backward()
            (model(x).argmax(1) == y).float().mean()
            engine.step()
    return health


@healthy
def fine_tuning_at_a_small_constant_rate():
    model = net()
    engine = adam(model, 1e-5)
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y)
    return health


@healthy
def policy_gradient_with_heavy_noise():
    model = net()
    engine = adam(model)
    with watched(model, engine) as health:
        for x, _ in batches():
            scores = torch.distributions.Categorical(logits=model(x))
            action = scores.sample()
            reward = torch.distributions.StudentT(3.0).sample((len(x),)) + action
            engine.zero_grad()
            health.loss(-(scores.log_prob(action) * (reward - reward.mean())).mean()).backward()
            engine.step()
    return health


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.branch, self.out = nn.Linear(10, 16), nn.Linear(16, 16), nn.Linear(16, 2)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.out(hidden + self.gate * torch.tanh(self.branch(hidden)))


@healthy
def a_branch_that_starts_closed():
    return _loss_of(CE, Gated())


@healthy
def heads_in_turns():
    model = Heads()
    engine = adam(model)
    with watched(model, engine, every=3) as health:
        for k, (x, y) in enumerate(batches()):
            head = (model.head, model.spare)[k % 2]
            engine.zero_grad()
            CE(head(torch.relu(model.body(x))), y).backward()
            engine.step()
    return health


@healthy
def gradients_by_autograd_grad():
    model = net()
    engine = sgd(model)
    with watched(model, engine) as health:
        for x, y in batches():
            weights = list(model.parameters())
            for p, g in zip(weights, torch.autograd.grad(CE(model(x), y), weights)):
                p.grad = g
            engine.step()
    return health


@healthy
def penalised_and_projected():
    model = net()
    engine = sgd(model)
    tk.regularize(model, engine, {"0.weight": tk.L1(1e-2), "2.weight": tk.MaxNorm(1.0)})
    with watched(model, engine) as health:
        for x, y in batches():
            step(model, engine, x, y)
    return health


@healthy
def sharpness_aware():
    model = net()
    engine = sgd(model)
    with watched(model, engine) as health:
        for x, y in batches():
            engine.zero_grad()
            CE(model(x), y).backward()
            moves = [0.05 * p.grad / p.grad.norm().clamp_min(1e-6) for p in model.parameters()]
            with torch.no_grad():
                for p, move in zip(model.parameters(), moves):
                    p.add_(move)
            engine.zero_grad()
            CE(model(x), y).backward()
            with torch.no_grad():
                for p, move in zip(model.parameters(), moves):
                    p.sub_(move)
            engine.step()
    return health


@healthy
def recurrent_with_truncated_time():
    cell, head = nn.GRU(4, 16, batch_first=True), nn.Linear(16, 1)
    model = nn.ModuleList([cell, head])
    engine = adam(model)
    state = None
    with watched(model, engine) as health:
        for _ in range(STEPS):
            x = torch.randn(8, 5, 4)
            out, state = cell(x, state)
            state = state.detach()
            engine.zero_grad()
            (head(out[:, -1]) - x.mean((1, 2))[:, None]).square().mean().backward()
            engine.step()
    return health


@healthy
def a_loader_that_cycles():
    model = net()
    engine = adam(model)
    stream = itertools.cycle(DataLoader(TensorDataset(*data(96)), batch_size=32))
    with watched(model, engine) as health:
        for _ in range(STEPS):
            x, y = next(stream)
            step(model, engine, x, y)
    return health


class StatefulNet(nn.Module):
    """A recurrent net that is handed its first state."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(4, 16, batch_first=True), nn.Linear(16, 1)

    def forward(self, state, x):
        return self.head(self.cell(x, state)[0][:, -1])


@healthy
def all_rows_with_a_first_state_made_anew():
    model = StatefulNet()
    engine = adam(model)
    x = torch.randn(32, 5, 4)
    with watched(model, engine) as health:
        for _ in range(STEPS):
            engine.zero_grad()
            (model(torch.zeros(1, 32, 16), x) - x.mean((1, 2))[:, None]).square().mean().backward()
            engine.step()
    return health


@broken("repeated_batch")
def a_new_iterator_beside_the_same_first_state():
    model = StatefulNet()
    engine = adam(model)
    loader = DataLoader(TensorDataset(torch.randn(256, 5, 4)), batch_size=32)
    state = torch.zeros(1, 32, 16)
    with watched(model, engine) as health:
        for _ in range(STEPS):
            (x,) = next(iter(loader))
            engine.zero_grad()
            (model(state, x) - x.mean((1, 2))[:, None]).square().mean().backward()
            engine.step()
    return health


@healthy
def all_rows_of_an_array_wrapped_anew():
    model = net()
    engine = adam(model)
    rows, labels = (part.numpy() for part in data(64))
    with watched(model, engine) as health:
        for _ in range(STEPS):
            step(model, engine, torch.from_numpy(rows), torch.from_numpy(labels))
    return health
