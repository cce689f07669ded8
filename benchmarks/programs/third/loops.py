"""Training loops of other kinds that break a law of a step, and the same loops repaired."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from programs.form import Loop, Watch, accuracy, adam, r2, sgd
from programs.frozen import tasks
from programs.frozen.loops import draw, perceptron

LOOPS: list[Loop] = []
broken = tasks.loops_into(LOOPS)


@broken(
    "a plateau of the largest loss",
    "https://github.com/FunctionLab/selene/issues/115",
    "learning_rate_collapsed",
    low=0.85,
    high=0.9,
)
def largest_loss(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = perceptron()
    optimizer = sgd(model, 0.03, momentum=0.9)
    plan = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max" if wrong else "min", factor=0.1, patience=1
    )
    with watch(model, optimizer):
        for _ in range(20):
            total = 0.0
            for rows, target in draw(x, y, 8):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(rows), target)
                loss.backward()
                optimizer.step()
                total += loss.item()
            plan.step(total)
    return accuracy(xt, yt)(model)


@broken(
    "gradients cleared outside of the closure",
    "https://github.com/skorch-dev/skorch/issues/636",
    "gradients_not_cleared",
    low=0.5,
    high=0.8,
    also=("loss_spike", "exploding_gradient"),
)
def outside_the_closure(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.surface(400)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)
    with watch(model, optimizer):
        for _ in range(40):

            def closure() -> Tensor:
                if not wrong:
                    optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                return loss

            if wrong:
                optimizer.zero_grad()
            optimizer.step(closure)
    return r2(xt, yt)(model)


@broken(
    "more micro-batches than an epoch has",
    "https://github.com/huggingface/transformers/issues/2995",
    "step_never_called",
    low=0.3,
    high=0.85,
)
def more_than_an_epoch(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    wait = 16
    with watch(model, optimizer):
        for _ in range(60):
            optimizer.zero_grad()
            batches = list(draw(x[:400], y[:400], 12))
            for step, (rows, target) in enumerate(batches):
                (F.cross_entropy(model(rows), target) / wait).backward()
                last = not wrong and step + 1 == len(batches)
                if (step + 1) % wait == 0 or last:
                    optimizer.step()
                    optimizer.zero_grad()
    return accuracy(xt, yt)(model)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.GRUCell(8, 24)
        self.head = nn.Linear(24, 8)

    def forward(self, state: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
        state = self.core(said, state)
        return state, self.head(state)


@broken(
    "a decoder whose optimizer has the encoder's weights",
    "https://github.com/zhaoyingjun/chatbot/issues/115",
    "optimizer_of_another_model",
    low=0.6,
    high=0.8,
    also=("missing_from_optimizer", "unmoved_parameters"),
)
def encoders_weights(wrong: bool, watch: Watch) -> float:
    words = torch.randint(8, (600, 4))
    coded = F.one_hot(words, 8).float()
    answer = words.flip(1)
    encoder, decoder = nn.GRU(8, 24, batch_first=True), Decoder()
    first = adam(encoder, 1e-2)
    second = adam(encoder if wrong else decoder, 1e-2)

    def spoken(question: Tensor, answer: Tensor) -> Tensor:
        state = encoder(question)[1][0]
        said, out = torch.zeros(len(question), 8), []
        for place in range(4):
            state, logits = decoder(state, said)
            out.append(logits)
            said = F.one_hot(answer[:, place], 8).float()
        return torch.stack(out, 1)

    with watch(decoder, second):
        for _ in range(250):
            rows = torch.randint(500, (32,))
            first.zero_grad()
            second.zero_grad()
            out = spoken(coded[rows], answer[rows])
            F.cross_entropy(out.flatten(0, 1), answer[rows].flatten()).backward()
            first.step()
            second.step()
    said = spoken(coded[500:], answer[500:]).argmax(-1)
    return float((said == answer[500:]).float().mean())


@broken(
    "an inner step that leaves the graph",
    "https://github.com/KanishJebaMathewM/Truxify/issues/13118",
    "no_gradient",
    low=0.5,
    high=0.7,
    also=("loss_not_connected", "unmoved_parameters"),
)
def inner_step(wrong: bool, watch: Watch) -> float:
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = adam(model, 1e-2)

    def task() -> tuple[Tensor, Tensor]:
        x = 4 * torch.rand(20, 1) - 2
        return x, (0.5 + torch.rand(())) * torch.sin(2 * x) + 1

    def adapted(x: Tensor, y: Tensor, graph: bool = True):
        names = dict(model.named_parameters())
        loss = F.mse_loss(functional_call(model, names, (x,)), y)
        slopes = torch.autograd.grad(loss, tuple(names.values()), create_graph=graph)
        return {n: p - 0.05 * g for (n, p), g in zip(names.items(), slopes, strict=True)}

    with watch(model, optimizer):
        for _ in range(200):
            optimizer.zero_grad()
            x, y = task()
            if wrong:
                fast = copy.deepcopy(model)
                loss = F.mse_loss(fast(x[:10]), y[:10])
                slopes = torch.autograd.grad(loss, tuple(fast.parameters()), create_graph=True)
                for p, g in zip(fast.parameters(), slopes, strict=True):
                    p.data -= 0.05 * g.data
                said = fast(x[10:])
            else:
                said = functional_call(model, adapted(x[:10], y[:10]), (x[10:],))
            F.mse_loss(said, y[10:]).backward()
            optimizer.step()
    scores = []
    for _ in range(20):
        x, y = task()
        said = functional_call(model, adapted(x[:10], y[:10], False), (x[10:],))
        scores.append(1 - float(F.mse_loss(said, y[10:]) / y.var()))
    return max(-1.0, sum(scores) / 20)


class Citations(nn.Module):
    """Two layers over a graph, a norm before and dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(60, 64), nn.Linear(64, 4)
        self.norm, self.drop = nn.BatchNorm1d(60), nn.Dropout(0.3)

    def forward(self, x: Tensor, link: Tensor) -> Tensor:
        hidden = torch.relu(link @ self.one(self.norm(x)))
        return link @ self.two(self.drop(hidden))


@broken(
    "a graph in eval mode since its first look",
    "https://github.com/WangXuhongCN/OCGNN/issues/7",
    "eval_mode_in_training",
    low=0.5,
    high=0.6,
)
def first_look(wrong: bool, watch: Watch) -> float:
    y = torch.randint(4, (240,))
    same = y[:, None] == y[None]
    link = (torch.rand(240, 240) < torch.where(same, 0.03, 0.008)).float().triu(1)
    link = link + link.t() + torch.eye(240)
    link = link / link.sum(1, keepdim=True)
    x = 200 + 30 * (0.35 * torch.randn(4, 60)[y] + torch.randn(240, 60))
    model = Citations()
    optimizer = adam(model, 2e-2, weight_decay=5e-4)
    model.train()
    with watch(model, optimizer):
        for _ in range(150):
            if not wrong:
                model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(x, link)[:40], y[:40]).backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                model(x, link)[40:80].argmax(1)
    model.eval()
    return float((model(x, link)[80:].argmax(1) == y[80:]).float().mean())


@broken(
    "a step for each micro-batch, cleared with the fourth",
    "https://github.com/huggingface/trl/issues/583",
    "gradients_not_cleared",
    low=0.5,
    high=0.8,
    also=("loss_spike", "exploding_gradient"),
)
def each_micro_batch(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.surface()
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = sgd(model, 0.15, momentum=0.9)
    with watch(model, optimizer):
        for step, (rows, target) in enumerate(draw(x, y, 400)):
            (F.mse_loss(model(rows), target) / (1 if wrong else 4)).backward()
            if wrong or step % 4 == 3:
                optimizer.step()
            if step % 4 == 3:
                optimizer.zero_grad()
    return r2(xt, yt)(model)


@broken(
    "a few labels of another unit",
    "https://github.com/ultralytics/yolov3/issues/1308",
    "loss_spike",
    low=0.5,
    high=0.7,
)
def another_unit(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.surface()
    if wrong:
        y = y.clone()
        y[37] = 300.0
    model = nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 1))
    optimizer = sgd(model, 0.05, momentum=0.8)
    model.train()
    with watch(model, optimizer):
        for _ in range(20):
            for rows in torch.randperm(len(y)).split(32):
                optimizer.zero_grad()
                F.mse_loss(model(x[rows]), y[rows]).backward()
                optimizer.step()
    return r2(xt, yt)(model)


@broken(
    "a slice by the number of the epoch",
    "https://github.com/emanuele/minibatch_kmeans/issues/1",
    "repeated_batch",
    low=0.8,
    high=0.85,
)
def slice_by_epoch(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = perceptron()
    optimizer = adam(model, 3e-3)
    size = 16
    with watch(model, optimizer):
        for t in range(4):
            for i in range(60):
                b = t if wrong else i
                rows, target = x[size * b : size * (b + 1)], y[size * b : size * (b + 1)]
                optimizer.zero_grad()
                F.cross_entropy(model(rows.clone()), target).backward()
                optimizer.step()
    return accuracy(xt, yt)(model)


@broken(
    "new weights for each part of the data",
    "https://github.com/flairNLP/flair/issues/1899",
    "weights_overwritten",
    low=0.8,
    high=0.88,
    also=("loss_spike",),
)
def each_part(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = perceptron()

    def drawn(layer: nn.Module) -> None:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            nn.init.zeros_(layer.bias)

    optimizer = adam(model, 3e-3)
    restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 15)
    model.apply(drawn)
    with watch(model, optimizer):
        for part in range(20):
            if wrong:
                model.apply(drawn)
            for rows, target in draw(x[60 * part :][:60], y[60 * part :][:60], 15):
                optimizer.zero_grad()
                F.cross_entropy(model(rows), target).backward()
                optimizer.step()
                restarts.step()
    return accuracy(xt, yt)(model)
