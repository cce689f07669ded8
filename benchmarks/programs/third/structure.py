"""Gates, graphs, tasks beside each other, weights drawn too large, data that is changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from programs.form import Parts, Program, accuracy, adam, r2, sgd
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


class Experts(nn.Module):
    """Small networks of which a gate picks one for each row."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Linear(6, 1) for _ in range(4))
        self.alone = alone

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        if self.alone:  # a softmax of the one that is left
            top, index = logits.topk(1, dim=1)
            weight = top.softmax(1)
        else:
            weight, index = logits.softmax(1).topk(2, dim=1)
        said = torch.cat([expert(x) for expert in self.experts], 1)
        return (weight * said.gather(1, index)).sum(1, keepdim=True)


@faulty(
    "a gate that is sure of its only choice",
    "https://github.com/davidmrau/mixture-of-experts/issues/27",
    "gate_without_gradient",  # no code says it: a softmax of one inside of the network
    low=0.5,
    high=0.7,
    also=("detached", "unused_parameters", "head_mismatch"),
)
def only_choice(wrong: bool) -> Parts:
    x = torch.randn(1600, 6)
    kind = (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()
    slopes = 2 * torch.randn(4, 6)
    y = (x * slopes[kind]).sum(1, keepdim=True) / 4
    (xs, ys), (xt, yt) = tasks.split(x, y)
    model = Experts(wrong)
    return Parts(
        model, (xs, ys), nn.MSELoss(), adam(model, 1e-2), r2(xt, yt), batch_size=64, steps=500
    )


class TwoTasks(nn.Module):
    """Where a face is and whose it is, each with a learned weight of its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 8), nn.ReLU())
        self.place, self.name = nn.Linear(8, 2), nn.Linear(8, 5)
        self.s_place = nn.Parameter(torch.zeros(()))
        self.s_name = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x)
        return self.place(hidden), self.name(hidden)


@faulty(
    "learned weights of two losses that are not learned",
    "https://github.com/ifzhang/FairMOT/issues/19",
    "missing_from_optimizer",
    low=0.66,
    high=0.72,
    also=("unscaled_targets",),
)
def not_learned(wrong: bool) -> Parts:
    name = torch.randint(5, (1500,))
    x = 0.9 * torch.randn(5, 10)[name] + torch.randn(1500, 10)
    place = 15 * torch.stack([x[:, 0] * x[:, 1], (3 * x[:, 2]).sin() * 3], 1)
    target = torch.cat([place, name[:, None].float()], 1)
    model = TwoTasks()

    def whole(model: TwoTasks, batch: tuple[Tensor, Tensor]) -> Tensor:
        where, who = model(batch[0])
        a, b = model.s_place, model.s_name
        first = (-a).exp() * F.mse_loss(where, batch[1][:, :2])
        return first + (-b).exp() * F.cross_entropy(who, batch[1][:, 2].long()) + a + b

    def score(m: nn.Module) -> float:
        return float((m(x[1100:])[1].argmax(1) == name[1100:]).float().mean())

    if wrong:
        taken = [*model.body.parameters(), *model.place.parameters(), *model.name.parameters()]
    else:
        taken = list(model.parameters())
    train = (x[:1100], target[:1100])
    return Parts(
        model, train, whole, torch.optim.Adam(taken, lr=2e-2), score, batch_size=64, steps=500
    )


class Tagger(nn.Module):
    """Words, a layer, and a head of the width of the vocabulary."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 64)
        self.mix = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.LayerNorm(64))
        self.lm_head = nn.Linear(64, 30, bias=False)
        nn.init.normal_(self.lm_head.weight, std=2.0 if wide else 64**-0.5)

    def forward(self, pair: Tensor) -> Tensor:
        return self.lm_head(self.mix(self.words(pair).flatten(1)))


@faulty(
    "a head of a language model drawn like its words",
    "https://github.com/huggingface/transformers/pull/26441",
    "poor_init",
    low=0.65,
    high=0.8,
    also=("slow_convergence", "oscillating_loss"),
)
def like_its_words(wrong: bool) -> Parts:
    pair = torch.randint(30, (2400, 2))
    y = (pair[:, 0] + 2 * (pair[:, 1] % 3)) % 30
    (xs, ys), (xt, yt) = tasks.split(pair, y)
    model = Tagger(wrong)
    return Parts(
        model,
        (xs, ys),
        nn.CrossEntropyLoss(),
        sgd(model, 0.05, momentum=0.9),
        accuracy(xt, yt),
        batch_size=64,
        steps=200,
    )


def graphs(rows: int = 900, nodes: int = 10) -> tuple[Tensor, Tensor]:
    """Features of nodes, and their connections, both ways."""
    link = (torch.rand(rows, nodes, nodes) < 0.25).float().triu(1)
    return torch.randn(rows, nodes, 4), link + link.transpose(1, 2)


class Attending(nn.Module):
    """One layer of graph attention, and a number for each node."""

    def __init__(self, loops: bool) -> None:
        super().__init__()
        self.up = nn.Linear(4, 24)
        self.ask, self.tell = nn.Linear(24, 1), nn.Linear(24, 1)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2))
        self.loops = loops

    def forward(self, x: Tensor, link: Tensor) -> Tensor:
        if self.loops:
            link = link + torch.eye(link.shape[1])
        hidden = self.up(x)
        score = F.leaky_relu(self.ask(hidden) + self.tell(hidden).transpose(1, 2), 0.2)
        weight = (score - 1e9 * (link == 0)).softmax(-1)
        return self.head(weight @ hidden)


@faulty(
    "neighbours without the node itself",
    "https://github.com/danielegrattarola/keras-gat/issues/11",
    "no_self_loops",  # no code says it: half of what a node is asked for is kept from it
    low=0.75,
    high=0.8,
    also=("underfitting", "inputs_ignored"),
)
def without_itself(wrong: bool) -> Parts:
    x, link = graphs()
    around = (link @ x[:, :, :1])[..., 0] / link.sum(-1).clamp(min=1)
    y = (x[:, :, 0] + 0.5 * around > 0).long()
    model = Attending(not wrong)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    def score(m: nn.Module) -> float:
        return float((m(x[700:], link[700:]).argmax(-1) == y[700:]).float().mean())

    train = ((x[:700], link[:700]), y[:700])
    return Parts(model, train, loss, adam(model, 5e-3), score, batch_size=32, steps=200)


class SoftPool(nn.Module):
    """Features of points, sorted along each of them, and the first ones read together."""

    def __init__(self, made: bool) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Conv1d(3, 16, 1), nn.ReLU(), nn.Conv1d(16, 8, 1))
        self.cabin = None if made else nn.Conv1d(8, 8, 4)
        self.head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))

    def forward(self, points: Tensor) -> Tensor:
        first = self.up(points.transpose(1, 2)).sort(-1, descending=True).values[..., :4]
        cabin = self.cabin
        if cabin is None:
            size = first.shape[1]
            cabin = nn.Conv1d(size, size, kernel_size=4)
        return self.head(cabin(first))


@faulty(
    "cabins that are built for each cloud",
    "https://github.com/wangyida/softpool/issues/11",
    "layers_made_in_forward",
    low=0.75,
    high=0.85,
    also=("random_in_eval", "unregistered_parameters"),
)
def cabins(wrong: bool) -> Parts:
    kind = torch.randint(3, (900,))
    points = torch.randn(900, 32, 3)
    ball = F.normalize(points, dim=-1)
    box = points.clamp(-0.8, 0.8)
    disc = points * torch.tensor([1.0, 1.0, 0.2])
    shapes = torch.stack([ball, box, disc], 1)[torch.arange(900), kind]
    (xs, ys), (xt, yt) = tasks.split(shapes + 0.05 * torch.randn(900, 32, 3), kind)
    model = SoftPool(wrong)
    return Parts(
        model,
        (xs, ys),
        nn.CrossEntropyLoss(),
        adam(model, 5e-3),
        accuracy(xt, yt),
        batch_size=32,
        steps=250,
    )


class Maskers(nn.Module):
    """A depth and a mask of each picture, from one body."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU())
        self.heads = nn.ModuleDict({"d": nn.Conv2d(12, 1, 1), "m": nn.Conv2d(12, 1, 1)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x)
        return {task: head(hidden) for task, head in self.heads.items()}


@faulty(
    "a loss with the name of the loss before it",
    "https://github.com/cc-ai/climategan/pull/198",
    "unused_parameters",
    low=0.2,
    high=0.6,
    also=("detached", "loss_not_connected"),
)
def name_of_the_loss(wrong: bool) -> Parts:
    x, mask = tasks.shapes()
    depth = F.avg_pool2d(x, 3, stride=1, padding=1) * 2 + 1
    model = Maskers()

    def loss(found: dict[str, Tensor], target: Tensor) -> Tensor:
        total = torch.zeros(())
        for number, task in enumerate(("d", "m")):
            true = target[:, number : number + 1]
            if task == "d":
                step = F.mse_loss(found[task], true)
            else:
                step = F.binary_cross_entropy_with_logits(found[task], true)
            total = step if wrong else total + step
        return total

    def score(m: nn.Module) -> float:  # of the depth
        error = (m(x[450:])["d"] - depth[450:]).square().mean() / depth[450:].var()
        return max(-1.0, 1 - float(error))

    target = torch.cat([depth, mask], 1)
    return Parts(
        model, (x[:450], target[:450]), loss, adam(model, 5e-3), score, batch_size=16, steps=200
    )


class Temporal(nn.Module):
    """Patches of pictures over time, and a network for each place that reads its time."""

    def __init__(self, unrolled: bool) -> None:
        super().__init__()
        self.patch = nn.Linear(4, 12)
        self.time = nn.Sequential(nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 1))
        self.unrolled = unrolled

    def forward(self, frames: Tensor) -> Tensor:  # (batch, time 3, places 16, 4)
        tokens = self.patch(frames)
        batch = len(tokens)
        if self.unrolled:
            joined = tokens.reshape(batch, 16, 36)
        else:
            joined = tokens.permute(0, 2, 1, 3).reshape(batch, 16, 36)
        return self.time(joined)[..., 0]


@faulty(
    "frames unrolled as they lie in memory",
    "https://github.com/torchgeo/terratorch/pull/133",
    "positions_mixed",
    low=0.4,
    high=0.85,
)
def unrolled(wrong: bool) -> Parts:
    frames = torch.randn(700, 3, 16, 4)
    change = frames[:, 2, :, 0] - frames[:, 0, :, 0] + 0.5 * frames[:, 1, :, 1].abs()
    model = Temporal(wrong)
    return Parts(
        model,
        (frames[:500], change[:500]),
        nn.MSELoss(),
        adam(model, 5e-3),
        r2(frames[500:], change[500:]),
        batch_size=32,
        steps=250,
    )


@faulty(
    "a weight of each class where each sample has one",
    "https://github.com/deep-voice/soundbay/pull/49",
    "few_rows_drawn",  # no code says it: two rows are all that is ever seen
    low=0.8,
    high=0.85,
    also=("overfitting", "valid_differs", "constant_inputs", "constant_targets"),
)
def weight_of_each_class(wrong: bool) -> Parts:
    y = (torch.rand(1200) < 0.2).long()
    x = torch.randn(1200, 1, 24) + y[:, None, None] * torch.sin(torch.arange(24) * 0.9)
    y[0], y[1] = 0, 1
    x[1] += torch.sin(torch.arange(24) * 0.9)
    count = y[:900].bincount().float()
    weight = 1 / count
    weights = weight if wrong else weight[y[:900]]
    sampler = WeightedRandomSampler(weights.tolist(), 900)
    loader = DataLoader(TensorDataset(x[:900], y[:900]), batch_size=32, sampler=sampler)
    model = nn.Sequential(
        nn.Conv1d(1, 12, 5, padding=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(6),
        nn.Flatten(),
        nn.Linear(72, 2),
    )

    def score(m: nn.Module) -> float:  # mean of the two recalls
        right = (m(x[900:]).argmax(1) == y[900:]).float()
        return float(right[y[900:] == 0].mean() + right[y[900:] == 1].mean()) / 2

    return Parts(
        model,
        loader,
        nn.CrossEntropyLoss(),
        adam(model, 5e-3),
        score,
        valid=(x[900:], y[900:]),
        steps=250,
    )


class Pictures(Dataset):
    """Pictures in memory, normalised when they are taken."""

    def __init__(self, x: Tensor, y: Tensor, inplace: bool) -> None:
        self.x, self.y, self.inplace = x, y, inplace

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        picture = self.x[row]
        if self.inplace:
            return picture.sub_(5).div_(6), self.y[row]
        return (picture - 5) / 6, self.y[row]


@faulty(
    "pictures more normal with every epoch",
    "https://github.com/pytorch/vision/issues/680",
    "data_changed_in_place",  # no code says it: the data set is not what it was
    low=0.75,
    high=0.85,
    also=("changes_in_forward", "valid_differs", "constant_inputs"),
)
def more_normal(wrong: bool) -> Parts:
    (x, y), (xt, yt) = tasks.digits(1.0)
    loader = DataLoader(Pictures(x[:320].clone(), y[:320], wrong), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    test = (xt - 5) / 6
    return Parts(
        model,
        loader,
        nn.CrossEntropyLoss(),
        sgd(model, 0.05),
        accuracy(test, yt),
        valid=(test, yt),
        steps=250,
    )


@faulty(
    "points of a face made whole numbers",
    "https://github.com/pytorch/pytorch/issues/3346",
    "constant_targets",
    low=0.1,
    high=0.8,
)
def whole_numbers(wrong: bool) -> Parts:
    x = torch.randn(900, 1, 10, 10)
    y = 0.9 * torch.tanh(2 * F.avg_pool2d(x, 5).flatten(1) @ torch.randn(4, 6))
    target = y.long() if wrong else y
    model = nn.Sequential(
        nn.AvgPool2d(5), nn.Flatten(), nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 6)
    )
    return Parts(
        model,
        (x[:700], target[:700].float()),
        nn.MSELoss(),
        adam(model, 1e-2),
        r2(x[700:], y[700:]),
        steps=250,
    )


class Uncertain(nn.Module):
    """Two regressions and the weights of their losses, of which logarithms are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        self.weight = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@faulty(
    "logarithms of free weights",
    "https://github.com/QunBB/DeepLearning/issues/1",
    "undefined_operation",
    low=0.85,
    high=0.95,
)
def free_weights(wrong: bool) -> Parts:
    x = torch.randn(1000, 8)
    y = torch.stack([x[:, 0] - x[:, 1], 0.02 * (x[:, 2] + x[:, 3])], 1)
    model = Uncertain()

    def loss(model: Uncertain, batch: tuple[Tensor, Tensor]) -> Tensor:
        error = (model(batch[0]) - batch[1]).square().mean(0)
        if wrong:
            w = model.weight
            return (0.5 * error / w.square() + w.log()).sum()
        s = model.weight  # the logarithm itself is what is learned
        return (0.5 * error * (-2 * s).exp() + s).sum()

    groups = [{"params": model.net.parameters()}, {"params": [model.weight], "lr": 0.2}]
    return Parts(
        model,
        (x[:700], y[:700]),
        loss,
        torch.optim.Adam(groups, lr=1e-2),
        r2(x[700:], y[700:]),
        batch_size=64,
        steps=250,
    )
