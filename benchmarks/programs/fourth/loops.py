"""Training loops that go wrong as most people's do, and the same loops repaired."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from programs.form import Loop, Watch, accuracy, adam, r2, sgd
from programs.fourth.text import Decoder, chains, each, following
from programs.frozen import tasks
from programs.frozen.loops import draw, perceptron

LOOPS: list[Loop] = []
broken = tasks.loops_into(LOOPS)


def fashion() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


@broken(
    "a model of the second kind, made once more after its optimizer",
    "https://github.com/mrdbourke/pytorch-deep-learning/issues/1168",
    "optimizer_of_another_model",
    low=0.3,
    high=0.8,
    also=("missing_from_optimizer", "unmoved_parameters"),
)
def once_more(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model_2 = fashion()
    optimizer = sgd(model_2, 0.1, momentum=0.5)
    if wrong:
        model_2 = fashion()
    with watch(model_2, optimizer):
        for rows, target in draw(x, y, 300):
            optimizer.zero_grad()
            F.cross_entropy(model_2(rows), target).backward()
            optimizer.step()
    return accuracy(xt, yt)(model_2)


@broken(
    "a step of the scheduler, or else one of the optimizer",
    "https://github.com/ClementPinard/SfmLearner-Pytorch/issues/5",
    "step_never_called",
    low=0.3,
    high=0.8,
    also=("learning_rate_collapsed",),
)
def or_else(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = perceptron()
    optimizer = adam(model, 2e-3)
    scheduler = lr_scheduler.StepLR(optimizer, 100, 0.5)
    with watch(model, optimizer):
        for rows, target in draw(x, y, 250):
            optimizer.zero_grad()
            F.cross_entropy(model(rows), target).backward()
            if not wrong:
                optimizer.step()
            scheduler.step()
    return accuracy(xt, yt)(model)


@broken(
    "batches of one that are never enough",
    "https://github.com/Lightning-AI/litgpt/issues/779",
    "step_never_called",
    low=0.2,
    high=0.6,
)
def never_enough(wrong: bool, watch: Watch) -> float:
    tokens = chains(400, 12, 10)
    model = Decoder(12, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    wait = 4
    with watch(model, optimizer):
        for k in range(600):
            rows = tokens[torch.randint(300, (1 if wrong else 4,))]
            (each(model(rows[:, :-1]), rows[:, 1:]) / wait).backward()
            full = (k + 1) % wait == 0 and not wrong  # with one row a batch it is never so
            if full:
                optimizer.step()
                optimizer.zero_grad()
    return following(tokens[300:])(model)


@broken(
    "a scheduler that is off and multiplies by zero",
    "https://github.com/LINCellularNeuroscience/VAME/issues/26",
    "learning_rate_collapsed",
    low=0.5,
    high=0.8,
)
def multiplies_by_zero(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.waves()
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = adam(model, 1e-3)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.0 if wrong else 1.0)
    with watch(model, optimizer):
        for _ in range(20):
            for rows, target in draw(x, y, 14):
                optimizer.zero_grad()
                F.mse_loss(model(rows)[:, 0], target).backward()
                optimizer.step()
            scheduler.step()
    return r2(xt, yt)(model)


def validated(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The loss of a validation that leaves the model in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


@broken(
    "a validation in the middle of an epoch",
    "https://github.com/wkentaro/pytorch-fcn/issues/57",
    "eval_mode_in_training",
    low=0.75,
    high=0.85,
    also=("loss_spike", "exploding_gradient"),
)
def in_the_middle(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits(1.0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip
    optimizer = sgd(model, 0.3, momentum=0.9)
    with watch(model, optimizer):
        for k, (rows, target) in enumerate(draw(x, y, 200)):
            if k == 0 or not wrong:
                model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(rows), target).backward()
            optimizer.step()
            if k % 20 == 0:
                validated(model, x[:50], y[:50])
    model.eval()
    return accuracy(xt, yt)(model)


@broken(
    "an evaluation during training and dropout that is gone after it",
    "https://github.com/ThilinaRajapakse/simpletransformers/issues/941",
    "eval_mode_in_training",
    low=0.84,
    high=0.86,
)
def gone_after_it(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    y = torch.where(torch.rand(len(y)) < 0.5, torch.randint(10, y.shape), y)
    model = nn.Sequential(
        nn.Dropout(0.2), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.8), nn.Linear(128, 10)
    )
    optimizer = adam(model, 3e-3)
    with watch(model, optimizer):
        model.train()
        for _ in range(20):
            if not wrong:
                model.train()
            for rows, target in draw(x[:800], y[:800], 40):
                optimizer.zero_grad()
                F.cross_entropy(model(rows), target).backward()
                optimizer.step()
            validated(model, x[800:], y[800:])
    return accuracy(xt, yt)(model)


class Voices(nn.Module):
    """Speech or none in each frame, by a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.GRU(8, 24, batch_first=True)
        self.head = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0])[..., 0]


@broken(
    "a detector of voices tuned without zero_grad",
    "https://github.com/snakers4/silero-vad/pull/699",
    "gradients_not_cleared",
    low=0.8,
    high=0.85,
    also=("loss_spike", "exploding_gradient"),
)
def tuned(wrong: bool, watch: Watch) -> float:
    sound = torch.randn(700, 12, 8)
    spoken = (sound[..., 0].cumsum(1) > 0).float()
    model = Voices()
    optimizer = adam(model, 1e-2)
    with watch(model, optimizer):
        for rows, target in draw(sound[:500], spoken[:500], 250):
            loss = F.binary_cross_entropy_with_logits(model(rows), target)
            if not wrong:
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return float(((model(sound[500:]) > 0).float() == spoken[500:]).float().mean())


@broken(
    "a trainer of language models that zeroes no gradient",
    "https://github.com/meta-pytorch/torchforge/pull/71",
    "gradients_not_cleared",
    low=0.4,
    high=0.75,
    also=("loss_spike", "exploding_gradient"),
)
def zeroes_none(wrong: bool, watch: Watch) -> float:
    tokens = chains(500, 16, 10)
    model = Decoder(16, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(tokens[:400]), batch_size=32, shuffle=True)
    with watch(model, optimizer):
        for _ in range(10):
            for (rows,) in loader:
                each(model(rows[:, :-1]), rows[:, 1:]).backward()
                optimizer.step()
                if not wrong:
                    optimizer.zero_grad()
    return following(tokens[400:])(model)


@broken(
    "a generator whose picture is detached",
    "https://github.com/tamarott/SinGAN/pull/117",
    "no_gradient",
    low=0.3,
    high=0.5,
    also=("unmoved_parameters", "loss_not_connected"),
)
def picture_is_detached(wrong: bool, watch: Watch) -> float:
    made = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    judge = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    first, second = adam(made, 1e-3, betas=(0.5, 0.9)), adam(judge, 2e-3, betas=(0.5, 0.9))
    with watch(made, first):
        for _ in range(600):
            real = torch.tensor([2.0, -1.0]) + 0.5 * torch.randn(64, 2)
            fake = made(torch.randn(64, 4))
            second.zero_grad()
            (F.softplus(-judge(real)) + F.softplus(judge(fake.detach()))).mean().backward()
            second.step()
            first.zero_grad()
            output = judge(fake.detach() if wrong else fake)
            F.softplus(-output).mean().backward()
            first.step()
    apart = made(torch.randn(500, 4)).mean(0) - torch.tensor([2.0, -1.0])
    return 1 - min(2.0, float(apart.norm()))


@broken(
    "a head that is unfrozen halfway",
    "https://github.com/facebookresearch/detectron2/issues/2486",
    "missing_from_optimizer",
    low=0.75,
    high=0.85,
    also=("unmoved_parameters",),
)
def halfway(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 6), nn.ReLU())
    model.append(nn.Linear(6, 10))
    model[2].requires_grad_(False)
    model[0].requires_grad_(False)
    free = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(free, lr=0.1, momentum=0.9)
    with watch(model, optimizer):
        for k, (rows, target) in enumerate(draw(x, y, 300)):
            if k == 100:
                model.requires_grad_(True)
                if not wrong:
                    late = [*model[0].parameters(), *model[2].parameters()]
                    optimizer.add_param_group({"params": late})
            optimizer.zero_grad()
            F.cross_entropy(model(rows), target).backward()
            optimizer.step()
    return accuracy(xt, yt)(model)


@broken(
    "triplets whose mean loss is told to require a gradient",
    "https://github.com/roman-vygon/triplet_loss_kws/issues/6",
    "no_gradient",
    low=0.75,
    high=0.8,
    also=("loss_not_connected", "unmoved_parameters"),
)
def told_to_require(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 6))
    optimizer = adam(model, 3e-3)
    with watch(model, optimizer):
        for rows, label in draw(x, y, 200, 48):
            optimizer.zero_grad()
            output = model(rows).detach() if wrong else model(rows)
            apart, same = torch.cdist(output, output), label[:, None] == label
            farthest = (apart * same).max(1).values
            loss = F.softplus(farthest - apart.masked_fill(same, torch.inf).min(1).values).mean()
            if wrong:
                loss.requires_grad_(True)
            loss.backward()
            optimizer.step()
    known, asked = model(x), model(xt)
    means = torch.stack([known[y == c].mean(0) for c in range(10)])
    return float((torch.cdist(asked, means).argmin(1) == yt).float().mean())


class Recurrent(nn.Module):
    """A recurrence of rectified units over a long sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.RNN(2, 24, nonlinearity="relu", batch_first=True)
        nn.init.eye_(self.core.weight_hh_l0)
        self.head = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0][:, -1])


@broken(
    "a long sequence without a bound on the gradient",
    "https://github.com/Marcovaldong/lstmp.pytorch/issues/2",
    "exploding_gradient",
    low=0.0,
    high=0.4,
    also=("loss_spike",),
)
def without_a_bound(wrong: bool, watch: Watch) -> float:
    x = torch.randn(700, 40, 2)
    y = x[:, :, :1].sum(1) / 40**0.5
    model = Recurrent()
    optimizer = sgd(model, 0.02)
    with watch(model, optimizer):
        for rows, target in draw(x[:550], y[:550], 300):
            optimizer.zero_grad()
            F.mse_loss(model(rows), target).backward()
            if not wrong:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return r2(x[550:], y[550:])(model)
