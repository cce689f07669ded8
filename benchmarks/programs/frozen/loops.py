"""Training loops that break a law of a step, and the same loops repaired."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from programs.form import Loop, Watch, accuracy, adam, r2, sgd
from programs.frozen import tasks

LOOPS: list[Loop] = []
broken = tasks.loops_into(LOOPS)


def draw(x: Tensor, y: Tensor, steps: int, size: int = 32):
    """Batches of random rows."""
    for _ in range(steps):
        rows = torch.randint(len(y), (size,))
        yield x[rows], y[rows]


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


class Keywords(nn.Module):
    """Classes of a series by a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.GRU(8, 24, batch_first=True)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x.view(-1, 8, 8))[0][:, -1])


@broken(
    "keywords without zero_grad",
    "https://github.com/wenet-e2e/wekws/issues/72",
    "gradients_not_cleared",
    low=0.8,
    high=0.88,
)
def keywords(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = Keywords()
    optimizer = adam(model, 1e-2)
    with watch(model, optimizer):
        for rows, target in draw(x, y, 250):
            loss = F.cross_entropy(model(rows), target)
            if not wrong:
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
    return accuracy(xt, yt)(model)


@broken(
    "zero_grad once an epoch",
    "https://github.com/salesforce/corr_based_prediction/issues/1",
    "gradients_not_cleared",
    low=0.8,
    high=0.9,
)
def once_an_epoch(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = perceptron()
    optimizer = sgd(model, 0.1, momentum=0.9)
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    with watch(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            for rows, target in loader:
                if not wrong:
                    optimizer.zero_grad()
                F.cross_entropy(model(rows), target).backward()
                optimizer.step()
    return accuracy(xt, yt)(model)


@broken(
    "heat maps without zero_grad",
    "https://github.com/yastrebksv/TennisCourtDetector/issues/7",
    "gradients_not_cleared",
    low=0.6,
    high=0.75,
)
def heat_maps(wrong: bool, watch: Watch) -> float:
    x, y = tasks.shapes()
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1), nn.Sigmoid()
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2, betas=(0.9, 0.999))
    with watch(model, optimizer):
        for rows, target in draw(x[:450], y[:450], 150, 16):
            loss = F.mse_loss(model(rows), target)
            loss.backward()
            optimizer.step()
            if not wrong:
                optimizer.zero_grad()
    return r2(x[450:], y[450:])(model)


@broken(
    "no step but the scheduler's",
    "https://github.com/tedlasai/learn2refocus/issues/5",
    "step_never_called",
    low=0.3,
    high=0.85,
)
def no_step(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = perceptron()
    optimizer = adam(model, 1e-2)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 200)
    with watch(model, optimizer):
        for rows, target in draw(x, y, 200):
            F.cross_entropy(model(rows), target).backward()
            if not wrong:
                optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return accuracy(xt, yt)(model)


@broken(
    "the scheduler taken for the optimizer",
    "https://github.com/pytorch/pytorch/issues/3814",
    "step_never_called",
    low=0.2,
    high=0.8,
)
def scheduler_alone(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.surface()
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = adam(model, 2e-2)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
    with watch(model, optimizer):
        for _ in range(12):
            for rows, target in draw(x, y, 25):
                optimizer.zero_grad()
                F.mse_loss(model(rows), target).backward()
                if not wrong:
                    optimizer.step()
            scheduler.step()
    return r2(xt, yt)(model)


@broken(
    "layers replaced by smaller ones",
    "https://github.com/microsoft/nni/issues/4521",
    "optimizer_of_another_model",
    low=0.6,
    high=0.85,
    also=("missing_from_optimizer",),
)
def smaller_layers(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = perceptron()
    optimizer = adam(model, 1e-2)
    model[0], model[2] = nn.Linear(64, 24), nn.Linear(24, 10)
    if not wrong:
        optimizer = adam(model, 1e-2)
    with watch(model, optimizer):
        for rows, target in draw(x, y, 200):
            optimizer.zero_grad()
            F.cross_entropy(model(rows), target).backward()
            optimizer.step()
    return accuracy(xt, yt)(model)


class Brackets(nn.Module):
    """A recurrent network over brackets that says how deep it is inside them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 8)
        self.core = nn.GRU(8, 16, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.core(self.embed(text))[0])[..., 0]


@broken(
    "parameters of the network before the last one",
    "https://github.com/pytorch/pytorch/issues/14467",
    "optimizer_of_another_model",
    low=0.3,
    high=0.8,
)
def older_network(wrong: bool, watch: Watch) -> float:
    text = torch.randint(3, (600, 10))
    depth = (text - 1).cumsum(1).float() / 2
    first, model = Brackets(), Brackets()
    optimizer = adam(first if wrong else model, 1e-2)
    with watch(model, optimizer):
        for rows, target in draw(text[:450], depth[:450], 250):
            optimizer.zero_grad()
            F.mse_loss(model(rows), target).backward()
            optimizer.step()
    return r2(text[450:], depth[450:])(model)


class Tracker(nn.Module):
    """A backbone, a layer that narrows, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, 48), nn.ReLU())
        self.down = nn.Linear(48, 5)
        self.head = nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.backbone(x)))


@broken(
    "a layer that no group has",
    "https://github.com/ohhhyeahhh/SiamCAR/issues/18",
    "missing_from_optimizer",
    low=0.83,
    high=0.9,
)
def no_group(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = Tracker()
    groups = [{"params": model.backbone.parameters(), "lr": 1e-4},
              {"params": model.head.parameters(), "lr": 1e-2}]  # fmt: skip
    if not wrong:
        groups.append({"params": model.down.parameters(), "lr": 1e-2})
    optimizer = torch.optim.Adam(groups)
    with watch(model, optimizer):
        for rows, target in draw(x, y, 500):
            optimizer.zero_grad()
            F.cross_entropy(model(rows), target).backward()
            optimizer.step()
    return accuracy(xt, yt)(model)


@broken(
    "an epoch's schedule for each batch",
    "https://github.com/ivadomed/ivadomed/pull/55",
    "learning_rate_collapsed",
    low=0.6,
    high=0.85,
)
def each_batch(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = perceptron()
    optimizer = sgd(model, 0.1)
    scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    with watch(model, optimizer):
        for _ in range(6):
            for rows, target in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(rows), target).backward()
                optimizer.step()
                if wrong:
                    scheduler.step()
            if not wrong:
                scheduler.step()
    return accuracy(xt, yt)(model)


@broken(
    "the first batch again",
    "https://github.com/ZhaoJ9014/face.evoLVe/pull/39",
    "repeated_batch",
    low=0.82,
    high=0.9,
)
def first_batch(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = perceptron()
    optimizer = adam(model, 5e-3)
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    stream = itertools.cycle(loader)
    with watch(model, optimizer):
        for _ in range(200):
            rows, target = next(iter(loader)) if wrong else next(stream)
            optimizer.zero_grad()
            F.cross_entropy(model(rows), target).backward()
            optimizer.step()
    return accuracy(xt, yt)(model)


@broken(
    "in eval mode since the first look at validation",
    "https://github.com/ermongroup/ncsn/issues/2",
    "eval_mode_in_training",
    low=0.75,
    high=0.85,
    also=("loss_spike",),
)
def left_in_eval(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits(1.0)
    model = nn.Sequential(
        nn.BatchNorm1d(64), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.Tanh(), nn.Dropout(0.2),
        nn.Linear(48, 10),
    )  # fmt: skip
    optimizer = sgd(model, 0.3, momentum=0.9)
    with watch(model, optimizer):
        for k, (rows, target) in enumerate(draw(x, y, 250)):
            if not wrong:
                model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(rows), target).backward()
            optimizer.step()
            if k % 10 == 0:
                model.eval()
                with torch.no_grad():
                    F.cross_entropy(model(xt[:50]), yt[:50])
    model.eval()
    return accuracy(xt, yt)(model)


@broken(
    "a loss made anew from its value",
    "https://github.com/speechbrain/speechbrain/issues/735",
    "no_gradient",
    low=0.2,
    high=0.8,
    also=("loss_not_connected",),
)
def made_anew(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.surface()
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = adam(model, 2e-2)
    with watch(model, optimizer):
        for rows, target in draw(x, y, 300):
            loss = F.mse_loss(model(rows), target)
            if wrong:
                loss = torch.tensor(loss.item(), requires_grad=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return r2(xt, yt)(model)


@broken(
    "the first weights loaded in each round",
    "https://github.com/baal-org/baal/pull/110",
    "weights_overwritten",
    low=0.75,
    high=0.85,
)
def first_weights(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = perceptron()
    start = copy.deepcopy(model.state_dict())
    optimizer = sgd(model, 0.1)
    with watch(model, optimizer):
        for _ in range(30):
            if wrong:
                model.load_state_dict(start)
            for rows, target in draw(x, y, 10):
                optimizer.zero_grad()
                F.cross_entropy(model(rows), target).backward()
                optimizer.step()
    return accuracy(xt, yt)(model)


@broken(
    "the whole model in bfloat16",
    "https://github.com/hp-l33/AiM/issues/10",
    "unmoved_parameters",
    low=0.75,
    high=0.87,
    also=("updates_lost",),
)
def whole_in_bfloat16(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = perceptron()
    nn.init.normal_(model[0].weight, std=0.15)
    nn.init.normal_(model[2].weight, std=0.3)
    if wrong:
        model, x, xt = model.bfloat16(), x.bfloat16(), xt.bfloat16()
    optimizer = adam(model, 3e-4)
    with watch(model, optimizer):
        for rows, target in draw(x, y, 800):
            optimizer.zero_grad()
            F.cross_entropy(model(rows).float(), target).backward()
            optimizer.step()
    return accuracy(xt, yt)(model)


@broken(
    "a generator whose verdict is detached",
    "https://github.com/wangle53/CSA-CDGAN/issues/5",
    "no_gradient",
    low=0.3,
    high=0.6,
    also=("loss_not_connected",),
)
def detached_verdict(wrong: bool, watch: Watch) -> float:
    paint = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    optimizer, other = adam(paint, 2e-3), adam(critic, 2e-3)
    bce = F.binary_cross_entropy_with_logits
    with watch(paint, optimizer):
        for _ in range(500):
            real = torch.tensor([3.0, -2.0]) + 0.5 * torch.randn(64, 2)
            fake = paint(torch.randn(64, 4))
            other.zero_grad()
            told, seen = critic(fake.detach()), critic(real)
            (bce(told, torch.zeros_like(told)) + bce(seen, torch.ones_like(seen))).backward()
            other.step()
            optimizer.zero_grad()
            verdict = critic(fake)
            if wrong:
                verdict = verdict.detach().requires_grad_()
            bce(verdict, torch.ones_like(verdict)).backward()
            optimizer.step()
    near = (paint(torch.randn(500, 4)) - torch.tensor([3.0, -2.0])).norm(dim=1) < 2
    return float(near.float().mean())


@broken(
    "a critic whose gradients are never cleared",
    "https://github.com/Hsintien-Ng/idinvert_pytorch-reproduced/issues/1",
    "gradients_not_cleared",
    low=0.8,
    high=0.9,
)
def uncleared_critic(wrong: bool, watch: Watch) -> float:
    critic = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1))
    nn.init.normal_(critic[0].weight, std=1.5)
    optimizer = adam(critic, 2e-2, betas=(0.5, 0.999))
    bce = F.binary_cross_entropy_with_logits
    with watch(critic, optimizer):
        for _ in range(300):
            angle = 6.3 * torch.rand(64, 1)
            real = torch.cat([angle.cos(), angle.sin()], 1) * (1 + 0.1 * torch.randn(64, 1))
            fake = 1.2 * torch.randn(64, 2)
            points, truth = torch.cat([real, fake]), torch.ones(128, 1)
            truth[64:] = 0
            if not wrong:
                optimizer.zero_grad()
            bce(critic(points), truth).backward()
            optimizer.step()
    angle = 6.3 * torch.rand(400, 1)
    ring = torch.cat([angle.cos(), angle.sin()], 1)
    far = 2.5 * F.normalize(torch.randn(400, 2), dim=1)
    right = torch.cat([critic(ring) > 0, critic(far) < 0, critic(0.2 * far) < 0])
    return float(right.float().mean())
