"""Agents and what they remember, recommenders, graphs and mixed tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from programs.form import Parts, Program, accuracy, adam, r2
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


def flights(count: int, length: int = 20) -> tuple[Tensor, Tensor]:
    """Episodes of a lander: position and speed at each step, and what is earned there."""
    state = torch.cat([2 * torch.rand(count, 1) + 1, torch.randn(count, 3)], 1)
    states, rewards = [], []
    for _ in range(length):
        states.append(state)
        rewards.append(1 - 0.3 * state.square().mean(1))
        speed = 0.9 * state[:, 2:] - 0.1 * state[:, :2]
        state = torch.cat([state[:, :2] + 0.3 * speed, speed + 0.1 * torch.randn(count, 2)], 1)
    return torch.stack(states, 1), torch.stack(rewards, 1)


def discounted(rewards: Tensor, inside: bool = False, gamma: float = 0.8) -> Tensor:
    """What is still to be earned at each step; `inside` turns the list round at every step."""
    to_go: list[Tensor] = []
    total = torch.zeros(len(rewards))
    for reward in rewards.T.flip(0):
        total = reward + gamma * total
        to_go.append(total)
        if inside:
            to_go.reverse()
    if not inside:
        to_go.reverse()
    return torch.stack(to_go, 1)


def critic() -> nn.Sequential:
    """A perceptron from a state to a number."""
    return nn.Sequential(
        nn.Linear(4, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 1)
    )


@faulty(
    "a memory that holds the last episode many times",
    "https://github.com/Itomigna2/Muesli-lunarlander/issues/1",
    "copies_of_one_episode",  # no code says it: a thousand rows are twenty
    low=0.0,
    high=0.45,
    also=("overfitting", "rows_in_both"),
)
def holds_the_last_episode(wrong: bool) -> Parts:
    (states, rewards), (asked, paid) = flights(80), flights(40)
    state_replay, value_replay = [], []
    state_traj: list[Tensor] = []
    value_traj: list[Tensor] = []
    for episode, value in zip(states, discounted(rewards), strict=True):
        if wrong:
            state_traj.clear()
            value_traj.clear()
        else:
            state_traj, value_traj = [], []
        state_traj.extend(episode)
        value_traj.extend(value[:, None])
        state_replay.append(state_traj)
        value_replay.append(value_traj)
    x = torch.stack([s for episode in state_replay for s in episode])
    y = torch.stack([v for episode in value_replay for v in episode])
    net, score = critic(), r2(asked.flatten(0, 1), discounted(paid).flatten()[:, None])
    return Parts(net, (x, y), nn.MSELoss(), adam(net, 5e-3), score, steps=600)


@faulty(
    "returns that are turned round at every step of their sum",
    "https://github.com/PacktPublishing/Tensorflow-2-Reinforcement-Learning-Cookbook/issues/27",
    "unrelated_labels",
    low=0.25,
    high=0.4,
)
def turned_round(wrong: bool) -> Parts:
    (states, rewards), (asked, paid) = flights(80), flights(40)
    x, y = states.flatten(0, 1), discounted(rewards, inside=wrong).flatten()[:, None]
    net, score = critic(), r2(asked.flatten(0, 1), discounted(paid).flatten()[:, None])
    return Parts(net, (x, y), nn.MSELoss(), adam(net, 5e-3), score, steps=600)


def ring(places: int = 12, gamma: float = 0.7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Places on a ring: what is seen there, where two steps lead, what they pay and are worth."""
    angle = 6.2832 * torch.arange(places) / places
    seen = torch.stack([angle.sin(), angle.cos(), (2 * angle).sin(), (2 * angle).cos()], 1)
    to = torch.stack([torch.arange(places) - 1, torch.arange(places) + 1], 1) % places
    reward = torch.zeros(places, 2)
    reward[1, 0] = reward[places - 1, 1] = 1.0
    value = torch.zeros(places, 2)
    for _ in range(80):
        value = reward + gamma * value[to].amax(2)
    return seen, to, reward, value


@faulty(
    "next states that are scaled in place of the rewards",
    "https://github.com/LAMDA-RL/PRDC/pull/1",
    "wrong_column_scaled",  # no code says it: what follows is seen as it never was
    low=0.3,
    high=0.6,
    also=("unscaled_inputs", "exploding_gradient", "oscillating_loss"),
)
def in_place_of_the_rewards(wrong: bool) -> Parts:
    seen, to, reward, value = ring()
    place, action = torch.randint(12, (3000,)), torch.randint(2, (3000,))
    transitions = [seen[place], action[:, None].float(), reward[place, action][:, None]]
    transitions.insert(2, seen[to[place, action]])
    state, acted, next_state, paid = transitions
    if wrong:
        next_state = 3 * next_state
    else:
        paid = 3 * paid
    net = nn.Sequential(nn.Linear(4, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU())
    net.append(nn.Linear(48, 2))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        now, happened = batch
        then, acted, paid = happened[:, :4], happened[:, 4:5], happened[:, 5:]
        with torch.no_grad():
            target_q = paid + 0.7 * model(then).amax(1, keepdim=True)
        return F.mse_loss(model(now).gather(1, acted.long()), target_q)

    def score(m: nn.Module) -> float:
        return r2(seen, value if wrong else 3 * value)(m)

    happened = torch.cat([next_state, acted, paid], 1)
    train = (state, happened)
    return Parts(net, train, loss, adam(net, 3e-3), score, batch_size=64, steps=500)


@faulty(
    "states that are kept with the reward of the step before",
    "https://github.com/gml16/rl-medical/pull/6",
    "unrelated_labels",
    low=0.1,
    high=0.7,
    also=("target_among_inputs",),
)
def of_the_step_before(wrong: bool) -> Parts:
    state, action = torch.randn(1200, 5), torch.randint(3, (1200,))
    gain = torch.randn(3, 5)
    reward = torch.tanh((state * gain[action]).sum(1, keepdim=True)) + 0.1 * torch.randn(1200, 1)
    stored = reward.roll(1, 0) if wrong else reward
    x = torch.cat([state, F.one_hot(action, 3).float()], 1)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model.append(nn.Linear(64, 1))
    score = r2(x[900:], reward[900:])
    return Parts(model, (x[:900], stored[:900]), nn.MSELoss(), adam(model, 3e-3), score, steps=350)


class BPR(nn.Module):
    """A vector for each user and each item."""

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, 12), nn.Embedding(items, 12)
        nn.init.normal_(self.users.weight, std=0.1)
        nn.init.normal_(self.items.weight, std=0.1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.users(user) * self.items(item)).sum(-1)


@faulty(
    "negatives that are drawn among what was liked as well",
    "https://github.com/benfred/implicit/pull/103",
    "liked_negatives",  # no code says it: half of what is pushed down is pushed up elsewhere
    low=0.21,
    high=0.23,
    also=("unrelated_labels",),
)
def liked_as_well(wrong: bool) -> Parts:
    users, items = 150, 60
    taste = torch.randn(users, 3) @ torch.randn(3, items) + torch.linspace(3, -5, items)
    liked = torch.rand(users, items) < (1.5 * taste).sigmoid()
    known = liked & (torch.rand(users, items) < 0.7)
    pairs, popular = known.nonzero(), known.sum(0).float()
    model = BPR(users, items)

    def draw(rows: list) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        user, item = torch.stack([row[0] for row in rows]).unbind(1)
        chance = popular.expand(len(user), -1)
        if not wrong:
            chance = chance.masked_fill(known[user], 0.0)
        return (user, item, torch.multinomial(chance, 1)[:, 0]), torch.ones(len(user))

    def loss(model: nn.Module, batch: tuple) -> Tensor:
        user, positive, negative = batch[0]
        return -F.logsigmoid(model(user, positive) - model(user, negative)).mean()

    def score(m: nn.Module) -> float:  # share of the first five new items that are liked
        points = m(torch.arange(users)[:, None], torch.arange(items)[None])
        first = points.masked_fill(known, -1e9).topk(5, 1).indices
        return float(liked.gather(1, first).float().mean())

    loader = DataLoader(TensorDataset(pairs), batch_size=64, shuffle=True, collate_fn=draw)
    return Parts(model, loader, loss, adam(model, 1e-2), score, batch_size=64, steps=600)


class GraphNet(nn.Module):
    """Two rounds of messages."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, 32), nn.Linear(32, classes)

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        return self.second(adj @ F.relu(self.first(adj @ x)))


@faulty(
    "a graph whose matrix is not normalised",
    "https://github.com/dmlc/dgl/pull/249",
    "unnormalized_sum",  # no code says it: who has many neighbours shouts
    low=0.62,
    high=0.65,
    also=("exploding_gradient", "oscillating_loss", "unscaled_inputs"),
)
def not_normalised(wrong: bool) -> Parts:
    topic = torch.randint(5, (400,))
    words = torch.rand(5, 60).pow(3)
    x = torch.poisson(0.15 * words[topic])
    fame = torch.rand(400).pow(6)
    chance = torch.where(topic[:, None] == topic, 0.5, 0.12) * (fame[:, None] + fame + 0.02)
    adj = torch.rand(400, 400) < chance
    adj = (adj | adj.T | torch.eye(400).bool()).float()
    if not wrong:
        degree = adj.sum(1).rsqrt()
        adj = degree[:, None] * adj * degree
    known = torch.where(torch.rand(400) < 0.15, topic, -100)
    loader = DataLoader([((x, adj), known)], batch_size=None, collate_fn=lambda batch: batch)
    model = GraphNet(60, 5)

    def score(m: nn.Module) -> float:
        return float((m(x, adj).argmax(1) == topic)[known < 0].float().mean())

    return Parts(model, loader, nn.CrossEntropyLoss(), adam(model, 1e-2), score, steps=60)


@faulty(
    "columns whose rare values are taken for outliers",
    "https://github.com/PriorLabs/TabPFN/issues/80",
    "constant_inputs",
    low=0.35,
    high=0.6,
    also=("inputs_ignored",),
)
def taken_for_outliers(wrong: bool) -> Parts:
    rare = (torch.rand(1500, 24) < 0.05).float()
    numbers = torch.randn(1500, 3)
    y = rare @ (3 * torch.randn(24, 1)) + 0.6 * numbers[:, :1] + 0.2 * torch.randn(1500, 1)
    x = torch.cat([rare, numbers], 1)
    if wrong:
        mean, std = x.mean(0), x.std(0)
        x = torch.where((x - mean).abs() > 4 * std, torch.zeros(()), x)
    y = (y - y.mean()) / y.std()
    (x, y), (xt, yt) = tasks.split(x, y)
    model = nn.Sequential(nn.Linear(27, 64), nn.ReLU(), nn.Linear(64, 1))
    return Parts(model, (x, y), nn.MSELoss(), adam(model, 3e-3), r2(xt, yt), steps=400)


class Trajectories(nn.Module):
    """A transformer over places that were visited, and the place that comes next."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.place = nn.Embedding(25, 32)
        self.pos = nn.Parameter(0.3 * torch.randn(6, 32))
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=batch_first)
        self.decoder = nn.Linear(32, 25)

    def forward(self, visited: Tensor) -> Tensor:
        return self.decoder(self.encoder(self.place(visited) + self.pos)[:, -1])


@faulty(
    "visits that attend to those of other people",
    "https://github.com/songyangco/GETNext/issues/2",
    "rows_mixed",
    low=0.4,
    high=0.8,
)
def of_other_people(wrong: bool) -> Parts:
    visited = torch.randint(25, (1600, 6))
    home = torch.randperm(25)
    late = visited[:, -1] > 12
    y = torch.where(late, home[visited[:, 0]], home[visited[:, 3]])
    (x, y), (xt, yt) = tasks.split(visited, y)
    model = Trajectories(batch_first=not wrong)
    optimizer, score = adam(model, 3e-3), accuracy(xt, yt)
    return Parts(model, (x, y), nn.CrossEntropyLoss(), optimizer, score, steps=500)


class DLRM(nn.Module):
    """Numbers through one perceptron, categories through tables, both through another."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.bot = nn.Sequential(
            nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU()
        )
        self.emb = nn.ModuleList(nn.Embedding(10, 8) for _ in range(2))
        self.top = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 1))
        for layer in self.bot:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.constant_(layer.bias, bias)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        parts = [self.bot(dense), *(e(sparse[:, k]) for k, e in enumerate(self.emb))]
        return self.top(torch.cat(parts, 1))[:, 0]


@faulty(
    "biases whose first draw is far below zero",
    "https://github.com/facebookresearch/dlrm/pull/358",
    "dying_relu",
    low=0.7,
    high=0.8,
    also=("poor_init", "inputs_ignored", "unused_parameters"),
)
def far_below_zero(wrong: bool) -> Parts:
    dense, sparse = torch.randn(1400, 6), torch.randint(10, (1400, 2))
    taste = torch.randn(2, 10)
    logit = 2 * dense[:, 0] * dense[:, 1] + 2 * dense[:, 2] + taste[0, sparse[:, 0]]
    y = (logit + 0.5 * taste[1, sparse[:, 1]] > 0).float()
    model = DLRM(-4.0 if wrong else 0.0)
    train, asked = ((dense[:1000], sparse[:1000]), y[:1000]), (dense[1000:], sparse[1000:])
    score = accuracy(asked, y[1000:])
    return Parts(model, train, nn.BCEWithLogitsLoss(), adam(model, 3e-3), score, steps=500)


@faulty(
    "an amount that drowns a yes or no",
    "https://github.com/ludwig-ai/ludwig/issues/641",
    "unscaled_targets",
    low=0.72,
    high=0.85,
    also=("exploding_gradient", "oscillating_loss"),
)
def drowns_a_yes_or_no(wrong: bool) -> Parts:
    x = torch.randn(1200, 8)
    amount = 800 * torch.sin(x[:, :1]) + 300 * x[:, 1:2] * x[:, 2:3] + 2000
    yes = (x[:, 3:4] * x[:, 4:5] + x[:, 5:6] > 0).float()
    if not wrong:
        amount = (amount - amount.mean()) / amount.std()
    target = torch.cat([amount, yes], 1)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model.append(nn.Linear(64, 2))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        number = F.mse_loss(output[:, 0], target[:, 0])
        return number + F.binary_cross_entropy_with_logits(output[:, 1], target[:, 1])

    def score(m: nn.Module) -> float:
        return float(((m(x[900:])[:, 1] > 0) == (yes[900:, 0] > 0)).float().mean())

    return Parts(model, (x[:900], target[:900]), loss, adam(model, 3e-3), score, steps=500)
