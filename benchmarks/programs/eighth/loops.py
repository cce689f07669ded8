"""Training loops of kinds that no earlier folder has, as they were written and as repaired."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.form import Loop, Watch, accuracy, adam, sgd
from programs.frozen import tasks

LOOPS: list[Loop] = []
broken = tasks.loops_into(LOOPS)


def mlp() -> nn.Sequential:
    """A hidden layer between the pixels and the digits."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@broken(
    "a function of the epoch that gives the rate and not its factor",
    "https://runebook.dev/en/docs/pytorch/generated/torch.optim.lr_scheduler.lambdalr",
    "slow_convergence",
    low=0.6,
    high=0.85,
    also=("learning_rate_collapsed",),
)
def not_its_factor(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    net = mlp()
    rate = 2e-3
    optimizer = adam(net, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: (rate if wrong else 1.0) * 0.95**epoch
    )
    with watch(net, optimizer):
        for _ in range(8):
            for rows in torch.randperm(len(x)).split(32):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
            schedule.step()
    net.eval()
    return accuracy(xt, yt)(net)


@broken(
    "a penalty on slopes that has no gradient",
    "https://nn.labml.ai/gan/wasserstein/gradient_penalty/index.html",
    "loss_not_connected",
    low=0.5,
    high=0.75,
    also=("penalty_without_gradient",),
)
def has_no_gradient(wrong: bool, watch: Watch) -> float:
    """A critic of two clouds; the score is the share of slopes that are near one."""
    critic = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    optimizer = adam(critic, 2e-3)

    def slopes(points: Tensor, follow: bool) -> Tensor:
        points = points.detach().requires_grad_()
        (slope,) = torch.autograd.grad(critic(points).sum(), points, create_graph=follow)
        return slope.norm(dim=1)

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        real, fake = torch.randn(64, 2) + 1.5, torch.randn(64, 2) - 1.5
        share = torch.rand(64, 1)
        return real, fake, share * real + (1 - share) * fake

    with watch(critic, optimizer):
        for _ in range(400):
            real, fake, between = draw()
            optimizer.zero_grad()
            penalty = (slopes(between, not wrong) - 1).square().mean()
            (critic(fake).mean() - critic(real).mean() + 10 * penalty).backward()
            optimizer.step()
    return float(((slopes(draw()[2], False) - 1).abs() < 0.3).float().mean())


@broken(
    "parameters that are counted before they are clipped",
    "https://github.com/pytorch/pytorch/issues/148259",
    "clipped_nothing",
    low=0.5,
    high=0.8,
    also=("exploding_gradient", "loss_spike", "clipped_before_backward", "oscillating_loss"),
)
def counted_before(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    net = mlp()
    optimizer = sgd(net, 0.1, momentum=0.9)
    clipped = net.parameters() if wrong else list(net.parameters())
    print(end="" if sum(p.numel() for p in clipped) else "empty")
    with watch(net, optimizer):
        for _ in range(8):
            for number, rows in enumerate(torch.randperm(len(x)).split(32)):
                strange = 300.0 if number % 12 == 5 else 1.0  # a sensor that saturates
                optimizer.zero_grad()
                F.cross_entropy(net(strange * x[rows]), y[rows]).backward()
                nn.utils.clip_grad_norm_(clipped, 1.0)
                optimizer.step()
    net.eval()
    return accuracy(xt, yt)(net)


@broken(
    "a rate that is written beside the groups",
    "https://stackoverflow.com/questions/48324152/",
    "rate_beside_the_groups",
    low=0.6,
    high=0.85,
    also=("slow_convergence", "rate_beside_groups"),
)
def beside_the_groups(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    net = mlp()
    optimizer = sgd(net, 1e-4)
    with watch(net, optimizer):
        for epoch in range(10):
            rate = min(0.2, 1e-4 * 10 ** (epoch + 1))
            if wrong:
                optimizer.lr = rate
            else:
                for group in optimizer.param_groups:
                    group["lr"] = rate
            for rows in torch.randperm(len(x)).split(32):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
    net.eval()
    return accuracy(xt, yt)(net)


@broken(
    "noise that is drawn once, in front of the loop",
    "https://github.com/pytorch/examples/blob/main/dcgan/main.py",
    "noise_drawn_once",
    low=0.5,
    high=0.7,
    also=("repeated_batch", "random_numbers_repeat"),
)
def drawn_once(wrong: bool, watch: Watch) -> float:
    """A denoiser of digits; the score is the share of the noise that it takes away."""
    (x, _), (xt, _) = tasks.digits()
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    optimizer = adam(net, 2e-3)
    noise = torch.randn(32, 64)
    with watch(net, optimizer):
        for _ in range(12):
            for rows in torch.randperm(len(x)).split(32):
                if not wrong:
                    noise = torch.randn(32, 64)
                used = noise[: len(rows)]
                optimizer.zero_grad()
                F.mse_loss(net(x[rows] + 0.5 * used), used).backward()
                optimizer.step()
    fresh = torch.randn_like(xt)
    return 1 - float(F.mse_loss(net(xt + 0.5 * fresh), fresh))


@broken(
    "a new rate, and an old optimizer that is loaded over it",
    "https://github.com/pytorch/examples/issues/816",
    "slow_convergence",
    low=0.7,
    high=0.85,
    also=("learning_rate_collapsed",),
)
def loaded_over_it(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    net = mlp()
    saved = adam(net, 1e-8).state_dict()  # as a schedule left it
    optimizer = adam(net, 2e-3)
    optimizer.load_state_dict(saved)
    if not wrong:
        optimizer.param_groups[0]["lr"] = 2e-3
    with watch(net, optimizer):
        for _ in range(8):
            for rows in torch.randperm(len(x)).split(32):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
    net.eval()
    return accuracy(xt, yt)(net)


class Cell(nn.Module):
    """One step of a recurrence, and the answer from a state."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.GRUCell(2, 24)
        self.head = nn.Linear(24, 2)


@broken(
    "a state that is cut off at every step of a sequence",
    "https://github.com/pytorch/examples/blob/main/word_language_model/main.py",
    "detached",
    low=0.7,
    high=0.9,
    also=("no_gradient", "unmoved_parameters", "state_cut_off"),
)
def cut_off_at_every_step(wrong: bool, watch: Watch) -> float:
    """Which of two marks came first, ten steps before the end."""

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        kind = torch.randint(2, (rows,))
        x = 0.3 * torch.randn(10, rows, 2)
        x[0] = x[0] + F.one_hot(kind, 2)
        return x, kind

    net = Cell()
    optimizer = adam(net, 5e-3)

    def answer(x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[1], 24)
        for part in x:
            state = net.step(part, state.detach() if wrong else state)
        return net.head(state)

    with watch(net, optimizer):
        for _ in range(300):
            x, kind = draw(32)
            optimizer.zero_grad()
            F.cross_entropy(answer(x), kind).backward()
            optimizer.step()
    x, kind = draw(500)
    return float((answer(x).argmax(1) == kind).float().mean())


class ActorCritic(nn.Module):
    """Scores of two deeds, and what the state is worth."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 32), nn.Tanh())
        self.policy, self.value = nn.Linear(32, 2), nn.Linear(32, 1)


@broken(
    "values that are kept as numbers until the critic is to learn from them",
    "https://github.com/jsboige/CoursIA/pull/15256",
    "loss_not_connected",
    low=0.3,
    high=0.6,
    also=("unmoved_parameters", "no_gradient", "detached", "penalty_without_gradient"),
)
def kept_as_numbers(wrong: bool, watch: Watch) -> float:
    net = ActorCritic()
    optimizer = adam(net, 3e-3)
    with watch(net, optimizer):
        for _ in range(300):
            states = torch.randn(32, 4)
            logs, values, returns = [], [], []
            scores = net.policy(net.body(states))
            deeds = torch.distributions.Categorical(logits=scores).sample()
            for k, state in enumerate(states):
                worth = net.value(net.body(state))[0]
                values.append(worth.item() if wrong else worth)
                logs.append(F.log_softmax(scores[k], 0)[deeds[k]])
                returns.append(state[0] + 0.5 * state[1] * (2 * deeds[k] - 1))
            worths = torch.tensor(values) if wrong else torch.stack(values)
            gain = torch.stack(returns)
            actor = -(torch.stack(logs) * (gain - worths.detach())).mean()
            optimizer.zero_grad()
            (actor + F.mse_loss(worths, gain)).backward()
            optimizer.step()
    states = torch.randn(500, 4)
    inner = net.body(states)
    gain = states[:, 0] + 0.5 * states[:, 1] * (2 * net.policy(inner).argmax(1) - 1)
    return max(-1.0, 1 - float((net.value(inner)[:, 0] - gain).square().mean() / gain.var()))
