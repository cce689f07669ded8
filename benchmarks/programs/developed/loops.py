"""Training loops with one broken law, as they were reported, and the same loops repaired."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.developed import data
from programs.developed.nets import conv, mlp
from programs.developed.twins import hits
from programs.form import Loop, Watch

LOOPS: list[Loop] = []
GH = "https://github.com/"
Run = Callable[[Watch, bool], float]


def loop(
    cause: str, source: str, *also: str, low: float = 0.5, high: float = 0.8
) -> Callable[[Run], Run]:
    """Add a function of `watch` and `right` to the loops, broken and repaired."""

    def note(run: Run) -> Run:
        name = run.__name__.replace("_", " ")
        broken, healthy = (lambda w: run(w, False)), (lambda w: run(w, True))
        LOOPS.append(Loop(name, source, cause, broken, healthy, low, high, also))
        return run

    return note


def batches(
    x: Tensor, y: Tensor, steps: int = 120, size: int = 32
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows in a new order each epoch, for a number of steps."""
    done = 0
    while True:
        for rows in torch.randperm(len(x)).split(size):
            if done == steps:
                return
            done += 1
            yield x[rows], y[rows]


def done(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return hits(x, y)(model)


@loop("gradients_not_cleared", GH + "yastrebksv/TennisCourtDetector/issues/7", low=0.9, high=0.9)
def no_zero_grad(watch: Watch, right: bool) -> float:
    x, y = data.digits()
    model = mlp(64, 48, 10)
    step = torch.optim.SGD(model.parameters(), lr=0.2)
    with watch(model, step):
        for a, b in batches(x, y):
            if right:
                step.zero_grad()
            F.cross_entropy(model(a), b).backward()
            step.step()
    return done(model, x, y)


@loop("gradients_not_cleared", GH + "pytorch/pytorch/issues/47175", low=0.9, high=0.9)
def zero_grad_once_an_epoch(watch: Watch, right: bool) -> float:
    x, y = data.pictures()
    model = conv(8)
    step = torch.optim.Adam(model.parameters(), lr=3e-3)
    with watch(model, step):
        for k, (a, b) in enumerate(batches(x, y)):
            if right or k % 56 == 0:
                step.zero_grad()
            F.cross_entropy(model(a), b).backward()
            step.step()
    return done(model, x, y)


@loop(
    "gradients_not_cleared",
    GH + "Hsintien-Ng/idinvert_pytorch-reproduced/issues/1",
    low=1,
    high=0.9,
)
def critic_that_is_not_cleared(watch: Watch, right: bool) -> float:
    """The other of two optimizers is cleared, the critic's is not."""
    x, y = data.blobs(classes=2)
    critic, maker = mlp(12, 1), mlp(4, 12)
    ours, theirs = (torch.optim.Adam(m.parameters(), lr=5e-3) for m in (critic, maker))
    with watch(critic, ours):
        for a, b in batches(x, y):
            if right:
                ours.zero_grad()
            theirs.zero_grad()
            fake = critic(maker(torch.randn(len(a), 4)).detach())
            real = F.binary_cross_entropy_with_logits(critic(a)[:, 0], b.float())
            (real + 0.1 * F.softplus(fake).mean()).backward()
            ours.step()
    return done(critic, x, y[:, None].float())


@loop("no_gradient", GH + "cloneofsimo/lora/issues/263")
def cleared_before_the_step(watch: Watch, right: bool) -> float:
    x, y = data.blobs()
    model = mlp(12, 4)
    step = torch.optim.AdamW(model.parameters(), lr=0.01)
    with watch(model, step):
        for a, b in batches(x, y):
            if right:
                step.zero_grad()
            F.cross_entropy(model(a), b).backward()
            if not right:
                step.zero_grad()
            step.step()
    return done(model, x, y)


@loop("learning_rate_collapsed", GH + "ivadomed/ivadomed/pull/55")
def schedule_of_epochs_in_the_batches(watch: Watch, right: bool) -> float:
    x, y = data.digits()
    model = mlp(64, 48, 10)
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(step, 2, 0.1)
    with watch(model, step):
        for k, (a, b) in enumerate(batches(x, y, 170)):
            step.zero_grad()
            F.cross_entropy(model(a), b).backward()
            step.step()
            if not right or k % 57 == 56:
                schedule.step()
    return done(model, x, y)


@loop("learning_rate_collapsed", GH + "automl/Auto-PyTorch/pull/210")
def decay_of_every_batch(watch: Watch, right: bool) -> float:
    x, y = data.rows_of_digits()
    model = nn.Sequential(nn.Flatten(), *mlp(64, 32, 10))
    step = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(step, 0.8)
    with watch(model, step):
        for k, (a, b) in enumerate(batches(x, y, 170)):
            step.zero_grad()
            F.cross_entropy(model(a), b).backward()
            step.step()
            if not right or k % 57 == 56:
                schedule.step()
    return done(model, x, y)


@loop("eval_mode_in_training", GH + "shubhamagarwal92/mmd/issues/14", low=1, high=0.9)
def eval_mode_after_the_first_look(watch: Watch, right: bool) -> float:
    x, y = data.digits()
    model = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 10))
    step = torch.optim.Adam(model.parameters(), lr=3e-3)
    with watch(model, step):
        for k, (a, b) in enumerate(batches(x, y)):
            if k % 20 == 0:
                model.eval()
                model(x[:50])
                if right:
                    model.train()
            step.zero_grad()
            F.cross_entropy(model(a), b).backward()
            step.step()
    return done(model, x, y)


@loop(
    "optimizer_of_another_model",
    GH + "pytorch/pytorch/issues/38639",
    "missing_from_optimizer",
    "no_gradient",
)
def model_made_again(watch: Watch, right: bool) -> float:
    x, y = data.blobs()
    model = mlp(12, 4)
    step = torch.optim.Adam(model.parameters(), lr=0.01)
    if not right:
        model = mlp(12, 4)
    with watch(model, step):
        for a, b in batches(x, y):
            step.zero_grad()
            F.cross_entropy(model(a), b).backward()
            step.step()
    return done(model, x, y)


@loop(
    "no_gradient",
    "https://prodopsy.com/how-can-the-backward-function-in-tensor-influence-the-matrix-in-model",
    "loss_not_connected",
)
def loss_of_detached_scores(watch: Watch, right: bool) -> float:
    x, y = data.blobs()
    model = mlp(12, 4)
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, step):
        for a, b in batches(x, y):
            step.zero_grad()
            scores = model(a) if right else model(a).detach().requires_grad_()
            F.cross_entropy(scores, b).backward()
            step.step()
    return done(model, x, y)


@loop("no_gradient", GH + "bytetriper/RAE/issues/67", "gradients_not_cleared", low=1, high=0.8)
def micro_batches_that_are_lost(watch: Watch, right: bool) -> float:
    """The sum of four micro-batches is cleared after the last of them."""
    x, y = data.digits()
    model = mlp(64, 48, 10)
    step = torch.optim.Adam(model.parameters(), lr=5e-3)
    with watch(model, step):
        for k, (a, b) in enumerate(batches(x, y, 400)):
            (F.cross_entropy(model(a), b) / 4).backward()
            if k % 4 == 3:
                if not right:
                    step.zero_grad()
                step.step()
                step.zero_grad()
    return done(model, x, y)


@loop("unmoved_parameters", GH + "workofart/ml-by-hand/pull/85")
def weights_below_their_resolution(watch: Watch, right: bool) -> float:
    x, y = data.blobs()
    model = mlp(12, 32, 4)
    for p in model.parameters():
        nn.init.normal_(p, 0.5, 0.05)
    x = x if right else x.bfloat16()
    model = model if right else model.bfloat16()
    step = torch.optim.SGD(model.parameters(), lr=1e-2 if right else 1e-5)
    with watch(model, step):
        for a, b in batches(x, y, 300):
            step.zero_grad()
            F.cross_entropy(model(a), b).backward()
            step.step()
    return done(model, x, y)


@loop(
    "repeated_batch",
    GH + "SharifiZarchi/Introduction_to_Machine_Learning/issues/55",
    low=0.9,
    high=0.9,
)
def the_first_batch_of_an_iterator(watch: Watch, right: bool) -> float:
    x, y = data.digits()
    model = mlp(64, 48, 10)
    step = torch.optim.Adam(model.parameters(), lr=5e-3)
    first = next(iter(batches(x, y)))
    with watch(model, step):
        for batch in batches(x, y):
            a, b = batch if right else (first[0].clone(), first[1])
            step.zero_grad()
            F.cross_entropy(model(a), b).backward()
            step.step()
    return done(model, x, y)


@loop("missing_from_optimizer", GH + "asyml/texar-pytorch/issues/72", low=0.8, high=0.8)
def a_body_unfrozen_too_late(watch: Watch, right: bool) -> float:
    x, y = data.rings()
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    model[:4].requires_grad_(right)
    step = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    with watch(model, step):
        for k, (a, b) in enumerate(batches(x, y, 300)):
            if k == 40:
                model.requires_grad_(True)
            step.zero_grad()
            F.cross_entropy(model(a), b).backward()
            step.step()
    return done(model, x, y)
