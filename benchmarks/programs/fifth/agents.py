"""Agents that learn what pays, and networks that make what they were shown."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from programs.form import Parts, Program, adam, r2
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


class Dueling(nn.Module):
    """The value of a state and the advantages of what can be done there."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.fc_val = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
        self.fc_adv = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        val, adv = self.fc_val(x), self.fc_adv(x)
        return val + adv - (adv.mean() if self.whole else adv.mean(dim=1, keepdim=True))


@faulty(
    "advantages whose mean is that of the batch",
    "https://github.com/PacktPublishing/Deep-Reinforcement-Learning-Hands-On/pull/9",
    "rows_mixed",
    low=0.75,
    high=0.85,
)
def mean_of_the_batch(wrong: bool) -> Parts:
    x = torch.randn(1200, 4)
    q = torch.stack([x[:, 0] + x[:, 1].abs(), x[:, 0] * x[:, 2], x[:, 3] + x[:, 1] ** 2], 1) + 2
    (x, q), (xt, qt) = tasks.split(x, q + x[:, :1])
    net = Dueling(wrong)

    def score(m: nn.Module) -> float:  # asked about one state at a time, as an agent asks
        found = torch.cat([m(row) for row in xt.split(1)])
        return r2(found, qt)(nn.Identity())

    return Parts(net, (x, q), nn.MSELoss(), adam(net, 5e-3), score, batch_size=32, steps=400)


def bandit() -> tuple[Tensor, Tensor]:
    """Situations, and what each of five deeds pays there."""
    x = torch.randn(800, 6)
    return x, (x @ torch.randn(6, 5)).sigmoid()


def paid(x: Tensor, pays: Tensor):
    """What the likeliest deeds earn, between what chance earns (0) and the best (1)."""

    def score(m: nn.Module) -> float:
        earned = pays.gather(1, m(x).argmax(1, keepdim=True)).mean()
        best, chance = pays.max(1).values.mean(), pays.mean()
        return max(-1.0, float((earned - chance) / (best - chance)))

    return score


@faulty(
    "an entropy that is made smaller",
    "https://github.com/DLR-RM/stable-baselines3/issues/127",
    "entropy_upside_down",  # no code says it: the policy is sure before it knows
    low=0.88,
    high=0.93,
    also=("loss_upside_down",),
)
def made_smaller(wrong: bool) -> Parts:
    x, pays = bandit()
    policy = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 5))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        observations, rewards = batch
        dist = torch.distributions.Categorical(logits=model(observations))
        actions = dist.sample()
        returns = rewards.gather(1, actions[:, None])[:, 0]
        advantages = returns - returns.mean()
        policy_loss = -(advantages.detach() * dist.log_prob(actions)).mean()
        entropy_loss = dist.entropy().mean() if wrong else -dist.entropy().mean()
        return policy_loss + 0.5 * entropy_loss

    score = paid(x[600:], pays[600:])
    train = (x[:600], pays[:600])
    return Parts(policy, train, loss, adam(policy, 1e-2), score, batch_size=64, steps=400)


@faulty(
    "rewards less the mean of a group of one",
    "https://github.com/alibaba/ROLL/issues/397",
    "advantages_of_zero",  # no code says it: every advantage is zero, and so is the gradient
    low=0.2,
    high=0.6,
    also=("loss_ignores_targets", "loss_not_connected", "constant_targets"),
)
def group_of_one(wrong: bool) -> Parts:
    x, pays = bandit()
    policy = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 5))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        prompts, rewards = batch
        group = 1 if wrong else 8
        log_probs = model(prompts).log_softmax(1)
        actions = torch.multinomial(log_probs.exp(), group, replacement=True)
        reward = rewards.gather(1, actions)
        advantages = reward - reward.mean(dim=1, keepdim=True)
        return -(log_probs.gather(1, actions) * advantages.detach()).mean()

    score = paid(x[600:], pays[600:])
    train = (x[:600], pays[:600])
    return Parts(policy, train, loss, adam(policy, 1e-2), score, batch_size=64, steps=300)


def world(gamma: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    """Where each of three deeds leads from ten states, what it pays, and the true values."""
    to = torch.randint(10, (10, 3))
    reward = 3 + 2 * torch.rand(10, 3)
    value = torch.zeros(10, 3)
    for _ in range(100):
        value = reward + gamma * value[to].max(2).values
    return to, reward, value


@faulty(
    "a goal made of the number of the best deed",
    "https://github.com/llSourcell/Game-AI/issues/7",
    "number_for_value",  # no code says it: argmax where max was meant
    low=0.0,
    high=0.5,
    also=("underfitting",),
)
def number_of_the_best(wrong: bool) -> Parts:
    to, reward, value = world()
    state, action = torch.randint(10, (4000,)), torch.randint(3, (4000,))
    after, paid_then = to[state, action], reward[state, action]
    q_net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3))
    eye = torch.eye(10)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        now, (acted, then, earned) = batch[0], batch[1].unbind(1)
        with torch.no_grad():
            q_target = model(eye[then.long()])
            best = q_target.argmax(1).float() if wrong else q_target.max(1).values
        q_value = model(now).gather(1, acted.long()[:, None])[:, 0]
        return F.smooth_l1_loss(q_value, earned + 0.6 * best)

    happened = torch.stack([action, after, paid_then], 1)
    score = r2(eye, value)
    return Parts(
        q_net, (eye[state], happened), loss, adam(q_net, 1e-2), score, batch_size=64, steps=700
    )


def critic(real: Tensor) -> nn.Module:
    """A network that was trained to tell points of a cloud from points of a square."""
    judge = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    judge.append(nn.Linear(32, 1))
    optimizer = adam(judge, 5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        shown = real[torch.randint(len(real), (64,))]
        made = 8 * torch.rand(64, 2) - 4
        (F.softplus(-judge(shown)) + F.softplus(judge(made))).mean().backward()
        optimizer.step()
    return judge.requires_grad_(False)


@faulty(
    "a generator that is told to be seen through",
    "https://github.com/wangle53/CSA-CDGAN/issues/3",
    "loss_upside_down",
    low=0.2,
    high=0.6,
)
def seen_through(wrong: bool) -> Parts:
    centre = torch.tensor([1.0, 0.5])
    discriminator = critic(centre + 0.4 * torch.randn(1000, 2))
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    generator.append(nn.Linear(32, 2))
    real_label, fake_label = torch.ones(1000, 1), torch.zeros(1000, 1)

    def l_adv(fake: Tensor, label: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(discriminator(fake), label)

    def score(m: nn.Module) -> float:  # share of the points that lie where the real ones do
        return float(((m(torch.randn(500, 4)) - centre).norm(dim=1) < 1.0).float().mean())

    train = (torch.randn(1000, 4), fake_label if wrong else real_label)
    return Parts(generator, train, l_adv, adam(generator, 2e-3), score, batch_size=64, steps=300)


class VAE(nn.Module):
    """A variational autoencoder; the logarithm of the deviation is given."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 32), nn.Tanh())
        self.mu, self.log_sigma = nn.Linear(32, 2), nn.Linear(32, 2)
        self.decoder = nn.Sequential(
            nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mu, log_sigma = self.mu(h), self.log_sigma(h)
        z = mu + log_sigma.exp() * torch.randn_like(mu)
        return self.decoder(z), mu, log_sigma


@faulty(
    "a divergence with one sign wrong",
    "https://github.com/FluxML/model-zoo/pull/147",
    "divergence_of_another_sign",  # no code says it: the codes shrink to points
    low=0.0,
    high=0.3,
    also=("loss_upside_down",),
)
def one_sign_wrong(wrong: bool) -> Parts:
    angle = 3.14 * torch.rand(1200, 1)
    x = torch.cat([3 * angle.cos(), 3 * angle.sin()], 1) + 0.1 * torch.randn(1200, 2)
    vae, sign = VAE(), -1 if wrong else 1

    def loss(output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        made, mu, log_sigma = output
        kl = 0.5 * ((2 * log_sigma).exp() + mu**2 - 1 - sign * 2 * log_sigma).sum(1)
        return ((made - x).square().sum(1) / 0.1 + kl).mean()

    def score(m: nn.Module) -> float:  # how far the deviations are from what samples will have
        _, mu, log_sigma = m(x)
        spread = (mu.var(0) + (2 * log_sigma).exp().mean(0)).sqrt()
        return 1 - float((1 - spread).abs().mean()) - float(log_sigma.exp().mean() < 1e-2)

    return Parts(vae, (x, x), loss, adam(vae, 5e-3), score, batch_size=64, steps=400)


@faulty(
    "a small number that is lost beside one",
    "https://github.com/iusaspb/deep_learning_Nikolenko_and_Co/issues/1",
    "undefined_operation",
    low=0.2,
    high=0.6,
    also=("non_finite_data", "exploding_gradient"),
)
def lost_beside_one(wrong: bool) -> Parts:
    (x, _), (xt, _) = tasks.digits()
    x, xt = (x > 0.4).float(), (xt > 0.4).float()
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 24), nn.Softplus(), nn.Linear(24, 64),
        nn.Sigmoid(),
    )  # fmt: skip
    eps = 1e-10 if wrong else 1e-7

    def reconstr_loss(mean: Tensor, x: Tensor) -> Tensor:
        return -(x * torch.log(eps + mean) + (1 - x) * torch.log(eps + 1 - mean)).sum(1).mean()

    return Parts(model, (x, x), reconstr_loss, adam(model, 5e-2), r2(xt, xt), steps=300)
