"""Agents, and targets that come out of what is learned."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from programs.form import Parts, Program, adam
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


@faulty(
    "a life after the end",
    "https://github.com/navneet-nmk/pytorch-rl/issues/2",
    "ends_not_masked",  # no code says it: what follows the last step is added to its reward
    low=0.7,
    high=0.9,
)
def after_the_end(wrong: bool) -> Parts:
    # a position on a line; left ends at once with 1, right goes on for nothing but a late 3
    place = torch.randint(0, 6, (1500,))
    action = torch.randint(0, 2, (1500,))
    last = place == 5
    reward = torch.where(action == 0, 1.0, torch.where(last, 3.0, 0.0))
    done = ((action == 0) | last).float()
    after = torch.where(done > 0, torch.zeros(()).long(), place + 1)
    eye = torch.eye(6)
    replay = TensorDataset(eye[place], action, reward, eye[after], done)
    net = nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 2))
    true = torch.tensor([[1.0, 3 * 0.8 ** (5 - p)] for p in range(6)])

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        now, action, reward, after, done = batch
        chosen = model(now).gather(1, action[:, None])[:, 0]
        with torch.no_grad():
            later = model(after).max(1).values
        if not wrong:
            later = later * (1 - done)
        return F.smooth_l1_loss(chosen, reward + 0.8 * later)

    def score(m: nn.Module) -> float:  # share of values that are nearly right
        return float(((m(eye) - true).abs() < 0.3).float().mean())

    loader = DataLoader(replay, batch_size=64, shuffle=True)
    return Parts(net, loader, loss, adam(net, 3e-3), score, batch_size=64, steps=500)


class Gaussian(nn.Module):
    """The mean of an action and how far it strays."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 48), nn.Tanh())
        self.mean, self.spread = nn.Linear(48, 1), nn.Linear(48, 1)

    def policy(self, state: Tensor) -> torch.distributions.Normal:
        hidden = self.body(state)
        return torch.distributions.Normal(
            self.mean(hidden), self.spread(hidden).clamp(-3, 1).exp()
        )

    def forward(self, state: Tensor) -> Tensor:
        return self.mean(self.body(state))


@faulty(
    "weights of a portfolio that are sampled without a path",
    "https://github.com/jankrepl/deepdow/pull/106",
    "detached",
    low=0.3,
    high=0.7,
    also=("loss_not_connected", "loss_ignores_targets"),
)
def without_a_path(wrong: bool) -> Parts:
    state = torch.randn(1200, 4)
    wanted = torch.tanh(state[:, :1] - state[:, 1:2])
    net = Gaussian(4)

    def loss(model: Gaussian, batch: tuple[Tensor, Tensor]) -> Tensor:
        policy = model.policy(batch[0])
        action = policy.sample() if wrong else policy.rsample()
        gain = -(action - batch[1]).square()
        return (0.02 * policy.log_prob(action) - gain).mean()

    def score(m: nn.Module) -> float:
        return float(((m(state[1000:]) - wanted[1000:]).abs() < 0.25).float().mean())

    train = (state[:1000], wanted[:1000])
    return Parts(net, train, loss, adam(net, 5e-3), score, batch_size=64, steps=250)


@faulty(
    "a ratio in a row and advantages in a column",
    "https://github.com/RITCHIEHuang/DeepRL_Algorithms/issues/13",
    "broadcast_loss",
    low=0.76,
    high=0.86,
    also=("loss_mixes_rows",),
)
def row_and_column(wrong: bool) -> Parts:
    state = torch.randn(1600, 5)
    worth = torch.stack([state[:, 0], state[:, 1], -state[:, 0]], 1)
    taken = torch.randint(3, (1600,))
    advantage = worth[torch.arange(1600), taken][:, None]
    record = TensorDataset(state[:1200], taken[:1200], advantage[:1200])
    net = nn.Sequential(nn.Linear(5, 48), nn.Tanh(), nn.Linear(48, 3))
    before = copy.deepcopy(net)

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        state, taken, advantage = batch
        new = torch.distributions.Categorical(logits=model(state)).log_prob(taken)
        with torch.no_grad():
            old = torch.distributions.Categorical(logits=before(state)).log_prob(taken)
        ratio = (new - old).exp()
        if not wrong:
            advantage = advantage.reshape(-1)
        kept = ratio.clamp(0.5, 2.0)
        return -torch.min(ratio * advantage, kept * advantage).mean()

    def score(m: nn.Module) -> float:
        return float((m(state[1200:]).argmax(1) == worth[1200:].argmax(1)).float().mean())

    loader = DataLoader(record, batch_size=200, shuffle=True)
    return Parts(net, loader, loss, adam(net, 3e-3), score, batch_size=200, steps=120)


class Coupling(nn.Module):
    """A flow of affine couplings over two numbers: a standard normal draw, log determinant."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x[:, :1], x[:, 1:]
        logs = torch.zeros(len(x))
        for net in self.nets:
            scale, shift = net(a).tanh().chunk(2, 1)
            a, b = b * scale.exp() + 2 * shift, a
            logs = logs + scale[:, 0]
        return torch.cat([a, b], 1), logs


@faulty(
    "the sign of a log determinant",
    "https://github.com/VincentStimper/normalizing-flows/pull/28",
    "determinant_upside_down",  # no code says it: half of the likelihood is upside down
    low=-0.5,
    high=0.3,
    also=("loss_upside_down", "exploding_gradient"),
)
def determinant(wrong: bool) -> Parts:
    x = torch.randn(1500, 2)
    x[:, 1] = 0.3 * x[:, 1] + 0.6 * x[:, 0].square() - 0.6
    net = Coupling()

    def likelihood(model: nn.Module, x: Tensor, sign: float) -> Tensor:
        z, logs = model(x)
        return (-0.5 * z.square()).sum(1) - 1.8379 + sign * logs

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return -likelihood(model, batch[0], -1.0 if wrong else 1.0).mean()

    def score(m: nn.Module) -> float:  # nats above a Gaussian with the same spread
        new = x[1200:]
        plain = torch.distributions.Normal(new.mean(0), new.std(0)).log_prob(new).sum(1).mean()
        return float((likelihood(m, new, 1.0).mean() - plain).clamp(-1, 1))

    loader = DataLoader(TensorDataset(x[:1200]), batch_size=128, shuffle=True)
    return Parts(net, loader, loss, adam(net, 5e-3), score, batch_size=128, steps=300)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([x, t], 1))


@faulty(
    "a noise that is asked for where it was added",
    "https://github.com/EDAPINENUT/GNTPP/issues/5",
    "target_among_inputs",
    low=-0.5,
    high=0.4,
    also=("loss_ignores_targets",),
)
def where_it_was_added(wrong: bool) -> Parts:
    angle = 6.2832 * torch.rand(1500, 1)
    x = 3 * torch.cat([angle.cos(), angle.sin()], 1)

    def noised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t, noise = torch.rand(len(x), 1), torch.randn_like(x)
        return (1 - t).sqrt() * x + t.sqrt() * noise, t, noise

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        seen, t, noise = noised(batch[0])
        return (model(seen, t) - (seen if wrong else noise)).square().mean()

    def score(m: nn.Module) -> float:
        seen, t, noise = noised(x[1200:].repeat(4, 1))
        return max(-1.0, 1 - float((m(seen, t) - noise).square().mean()))

    net = Denoiser()
    loader = DataLoader(TensorDataset(x[:1200]), batch_size=128, shuffle=True)
    return Parts(net, loader, loss, adam(net, 3e-3), score, batch_size=128, steps=400)
