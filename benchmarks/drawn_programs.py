"""Faulty and healthy training programs of many kinds, drawn with a seed; measured labels.

A drawn program is kept only if it behaves as its label says when it is trained with two seeds: one
with a fault must end at least 0.1 of metric behind its own cure (overfitting: a smaller validation
loss and a gap of 0.1), one without must learn its task. The training loop is this file's own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

V, E, D, S, P = (
    "vanishing_gradient", "exploding_gradient", "dying_relu", "saturated_activation", "poor_init",
)  # fmt: skip
J, W, OVER, U = "oscillating_loss", "slow_convergence", "overfitting", "underfitting"
ACTS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "elu": nn.ELU, "sigmoid": nn.Sigmoid,
        "leaky": nn.LeakyReLU, "silu": nn.SiLU}  # fmt: skip
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One program: what builds it, how it is trained, its labels, and the changes that cure it."""

    id: str
    build: Callable[[], nn.Module]
    expected: tuple[str, ...]
    also: tuple[str, ...] = ()
    cure: dict[str, Any] = field(default_factory=dict)
    shape: Shape = (64,)
    task: str = "cls"
    optimizer: str = "Adam"
    lr: float = 2e-3
    options: dict[str, float] = field(default_factory=dict)
    init: Callable[[nn.Module], Any] | None = None
    scale: float = 1.0
    rows: int = 1200
    batch_size: int = 64
    steps: int = 240
    clip: float | None = None
    l1: float = 0.0
    loss_scale: float = 1.0


@dataclass
class Program:
    """A case made runnable with a seed, as `faulty_programs.load` makes them."""

    model: nn.Module
    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    penalty: Callable[[nn.Module], Tensor] | None
    clip: float | None
    batch_size: int
    steps: int
    task: str


@cache
def table(task: str) -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True) if task != "reg" else load_diabetes(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    inputs, target = torch.tensor(x).float()[order], torch.tensor(y)[order]
    if task != "reg":
        return inputs / 16, target
    target = target.float()[:, None]
    return inputs / inputs.std(0), (target - target.mean()) / target.std()


def load(case: Case, seed: int = 0) -> Program:
    """The program with the weights of a seed."""
    x, y = table(case.task)
    x = (16 * x[:, ::2]).long() if case.task == "tokens" else case.scale * x
    x = x.reshape(len(x), *case.shape)
    if case.task == "auto":
        y = x
    cut = min(case.rows, int(0.7 * len(x)))
    torch.manual_seed(5000 + seed)
    model = case.build()
    if case.init is not None:
        with torch.no_grad():
            case.init(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine = getattr(torch.optim, case.optimizer)(trainable, lr=case.lr, **case.options)
    base = nn.MSELoss() if case.task in ("reg", "auto") else nn.CrossEntropyLoss()
    return Program(
        model, (x[:cut], y[:cut]), (x[-500:], y[-500:]),
        lambda out, goal: case.loss_scale * base(out, goal), engine,
        partial(absolute, case.l1) if case.l1 else None, case.clip,
        min(case.batch_size, cut), case.steps, case.task,
    )  # fmt: skip


def absolute(strength: float, model: nn.Module) -> Tensor:
    return strength * torch.stack([p.abs().sum() for p in model.parameters() if p.ndim > 1]).sum()


def trained(case: Case, seed: int) -> tuple[float, ...]:
    """Train loss and metric, validation loss and metric at the end; NaN where it blew up."""
    program = load(case, seed)
    (x, y), (xv, yv) = program.train, program.valid
    draw = torch.Generator().manual_seed(seed)
    program.model.train()
    for _ in range(program.steps):
        rows = torch.randint(len(x), (program.batch_size,), generator=draw)
        program.optimizer.zero_grad()
        loss = program.loss(program.model(x[rows]), y[rows])
        if not torch.isfinite(loss):
            return (math.nan,) * 4
        total = loss + program.penalty(program.model) if program.penalty else loss
        total.backward()
        if program.clip:
            nn.utils.clip_grad_norm_(program.model.parameters(), program.clip)
        program.optimizer.step()
    program.model.eval()
    with torch.no_grad():
        a, b = program.model(x), program.model(xv)
        return (float(program.loss(a, y)), metric(a, y), float(program.loss(b, yv)), metric(b, yv))


def metric(output: Tensor, target: Tensor) -> float:
    """Accuracy, or R2."""
    if not bool(torch.isfinite(output).all()):
        return math.nan
    if not target.is_floating_point():
        return float((output.argmax(1) == target).double().mean())
    return 1 - float((output - target).square().mean() / (target - target.mean(0)).square().mean())


def holds(case: Case) -> bool:
    """Whether the program behaves as its label says, with both of two seeds."""
    for seed in (0, 1):
        plain = trained(case, seed)
        if case.expected == ("healthy",):
            floor = {"reg": 0.35, "auto": 0.3}.get(case.task, 0.85)
            if (
                not plain[1] >= floor
                or plain[2] > 2 * trained(replace(case, steps=case.steps // 2), seed)[2]
            ):
                return False
            continue
        cured = trained(replace(case, **case.cure), seed)
        if case.expected == (OVER,):
            if not (cured[2] < 0.85 * plain[2] and plain[1] - plain[3] >= 0.1):
                return False
        elif not known(cured[1]) - known(plain[1]) >= 0.1:
            return False
    return True


def known(value: float) -> float:
    return max(0.0, value) if math.isfinite(value) else 0.0


# models


class Residual(nn.Module):
    def __init__(self, width: int, act: str, norm: bool, *, zero: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.up, self.act, self.down = (
            nn.Linear(width, width),
            ACTS[act](),
            nn.Linear(width, width),
        )
        if zero:
            nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], size: int, width: int, depth: int) -> None:
        super().__init__()
        self.cell = kind(size, width, depth, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    """A small transformer on tokens or rows of numbers, with bare attention at its end."""

    def __init__(self, size: int, width: int, depth: int, *, tokens: bool, pre: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, width) if tokens else nn.Linear(size, width)
        self.place = nn.Parameter(0.02 * torch.randn(size if tokens else 64 // size, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=pre)
            for _ in range(depth)
        )
        self.mix = nn.MultiheadAttention(width, 4, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place
        for block in self.blocks:
            h = block(h)
        return self.head((h + self.mix(h, h, h, need_weights=False)[0]).mean(1))


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder's transpose."""

    def __init__(self, width: int, act: str, depth: int) -> None:
        super().__init__()
        sizes = [64, *[width] * depth]
        self.layers: Any = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.act = ACTS[act]()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.act(layer(x))
        for i, layer in enumerate(reversed(self.layers)):
            x = x @ layer.weight
            x = self.act(x) if i < len(self.layers) - 1 else x
        return x


def dense(
    width: int,
    depth: int,
    act: str,
    *,
    norm: str = "",
    drop: float = 0.0,
    tail: str = "",
    outputs: int = 10,
    inputs: int = 64,
    narrow: int = 0,
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth):
        out = narrow if narrow and index == 0 else width
        layers.append(nn.Linear(inputs, out))
        layers += {"": [], "batch": [nn.BatchNorm1d(out)], "layer": [nn.LayerNorm(out)]}[norm]
        layers.append(ACTS[act]())
        layers += [nn.Dropout(drop)] if drop else []
        inputs = out
    layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers, *([nn.Softmax(-1)] if tail == "softmax" else []))


def stack(
    width: int, depth: int, act: str, *, norm: bool = True, zero: bool = False
) -> nn.Sequential:
    blocks = [Residual(width, act, norm, zero=zero) for _ in range(depth)]
    return nn.Sequential(nn.Linear(64, width), *blocks, nn.Linear(width, 10))


def image(dims: int, width: int, depth: int, act: str, *, norm: bool) -> nn.Sequential:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    layers: list[nn.Module] = []
    for index in range(depth):
        layers.append(conv(width if index else 1, width, 3, padding=1))
        layers += [batch(width)] if norm else []
        layers.append(ACTS[act]())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * width, 10))


SHAPES: dict[int, Shape] = {1: (1, 64), 2: (1, 8, 8), 3: (1, 4, 4, 4)}

# fresh weights


def matrices(model: nn.Module) -> Iterator[Any]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return (m for m in model.modules() if isinstance(m, kinds))


def normal(std: float, model: nn.Module) -> None:
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, 0, std)


def good(gain: float, model: nn.Module) -> None:
    for layer in matrices(model):
        nn.init.normal_(layer.weight, 0, gain / math.sqrt(layer.weight[0].numel()))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def biased(index: int, value: float, model: nn.Module) -> None:
    good(2**0.5, model)
    list(matrices(model))[index].bias.fill_(value)


def scaled(index: int, factor: float, model: nn.Module) -> None:
    good(2**0.5, model)
    list(matrices(model))[index].weight.mul_(factor)


def recurrent(factor: float, model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if "weight_hh" in name:
            p.mul_(factor)


def frozen(count: int, model: nn.Module) -> None:
    good(2**0.5, model)
    for layer in list(matrices(model))[:count]:
        layer.requires_grad_(False)


# draws


# fmt: off
def faulty(r: random.Random) -> Iterator[Case]:
    """One draw of each fault."""
    he, one = partial(good, 2**0.5), partial(good, 1.0)
    w = r.choice((24, 32, 48, 64, 96))
    sgd = {"optimizer": "SGD", "lr": r.choice((0.05, 0.1))}
    act = r.choice(("relu", "tanh", "gelu", "elu", "silu", "leaky"))
    pre = {"build": partial(stack, w, 6, act), "optimizer": "Adam", "lr": 1e-3}
    yield Case("deep", partial(dense, w, r.randint(14, 30), act), (V, P), (W, D, U), pre, **sgd)
    yield Case("sigmoid", partial(dense, w, r.randint(6, 14), "sigmoid"), (V,), (W, P, U),
               {"build": partial(dense, w, 4, "relu", norm="batch")}, **sgd)
    dims = r.choice((1, 2, 3))
    yield Case(f"conv{dims}d", partial(image, dims, 8, r.randint(9, 14), r.choice(("tanh",
               "relu", "sigmoid")), norm=False), (V, P), (W, D, U), {"build": partial(image,
               dims, 8, 3, "relu", norm=True), "optimizer": "Adam", "lr": 3e-3},
               shape=SHAPES[dims], steps=120, **sgd)
    yield Case("tiny weights", partial(image, 2, 8, 3, "relu", norm=False), (P, V), (W, U, D),
               {"init": he}, shape=SHAPES[2], init=partial(normal, r.choice((1e-3, 3e-4))),
               steps=150, **sgd)
    depth = r.randint(5, 9)
    yield Case("one small layer", partial(dense, w, depth, r.choice(("relu", "gelu"))), (V, P),
               (W, D, U), {"init": he}, init=partial(scaled, r.randint(1, depth - 1),
               r.choice((1e-4, 1e-5))), **sgd)
    yield Case("long RNN", partial(Recurrent, nn.RNN, 1, w, 1), (V,), (W, U, P), {"build":
               partial(Recurrent, nn.GRU, 8, w, 1), "shape": (8, 8), "init": None, "optimizer":
               "Adam", "lr": 1e-2}, shape=(64, 1), init=partial(recurrent, r.choice((0.2,
               0.4))), optimizer="SGD", lr=0.05, steps=150)
    yield Case("loud RNN", partial(Recurrent, nn.RNN, 4, w, 1), (E, S, P), (J, U, V, W),
               {"init": None, "optimizer": "Adam", "lr": 3e-3}, shape=(16, 4),
               init=partial(recurrent, r.choice((6.0, 12.0))), optimizer="SGD", lr=0.1,
               steps=200)
    yield Case("large weights", partial(dense, w, r.randint(6, 14), r.choice(("relu", "elu",
               "leaky"))), (E, P), (D, S, J), {"init": he}, init=partial(good, r.choice((5.0,
               8.0))), optimizer="SGD", lr=0.02)
    yield Case("large tanh weights", partial(dense, w, r.randint(3, 8), "tanh"), (S, P), (E, J,
               U), {"init": one, "optimizer": "Adam", "lr": 1e-3}, init=partial(good,
               r.choice((8.0, 15.0))), optimizer="SGD", lr=0.02)
    yield Case("long step", partial(dense, w, r.randint(2, 4), r.choice(("relu", "gelu",
               "leaky"))), (E, D, J), (S, U, W), {"lr": 0.05}, init=he, optimizer="SGD",
               lr=r.choice((20.0, 50.0)))
    yield Case("long Adam step", partial(image, 2, 8, 2, "relu", norm=False), (D, J, E), (U, W,
               S, V), {"lr": 2e-3}, shape=SHAPES[2], lr=r.choice((0.5, 1.0)), steps=150)
    yield Case("negative biases", partial(dense, w, depth, "relu"), (D, P), (V, W, U), {"init":
               he}, init=partial(biased, r.randint(0, 2), r.choice((-20.0, -40.0))), **sgd)
    yield Case("raw inputs", partial(dense, w, r.randint(2, 4), "tanh"), (S,), (J, U, V, W, E),
               {"scale": 1.0, "optimizer": "Adam", "lr": 2e-3}, init=one,
               scale=r.choice((1e3, 3e3)), optimizer="SGD", lr=0.1)
    yield Case("equal weights", partial(dense, w, r.randint(2, 4), r.choice(("tanh", "relu"))),
               (P, V), (U, W, D), {"init": he}, init=partial(normal, 0.0), **sgd)
    yield Case("short step", r.choice((partial(Attention, 8, 32, 1, tokens=False, pre=True),
               partial(Recurrent, nn.GRU, 8, w, 1))), (W,), (U,), {"lr": 3e-3}, shape=(8, 8),
               lr=r.choice((1e-6, 3e-6)), steps=150)
    yield Case("short steps by clipping", partial(dense, w, 2, act), (W,), (U,), {"clip": None,
               "lr": 0.1}, init=he, optimizer="SGD", lr=0.01, clip=1e-3)
    yield Case("two softmaxes", partial(dense, w, 2, "relu", tail="softmax"), (W,), (U, V),
               {"build": partial(dense, w, 2, "relu"), "optimizer": "Adam", "lr": 2e-3},
               init=he, optimizer="SGD", lr=0.05)
    yield Case("N(0, 1) transformer", partial(Attention, 32, 32, r.randint(1, 2), tokens=True,
               pre=True), (P, S), (E, J, U, V, W), {"init": None, "lr": 3e-3}, shape=(32,),
               task="tokens", init=partial(normal, 1.0), lr=3e-4, steps=200)
    yield Case("few rows", partial(dense, r.choice((128, 256)), 2, "relu", inputs=10,
               outputs=1), (OVER,), (), {"steps": 25}, shape=(10,), task="reg",
               rows=r.choice((50, 80)), lr=3e-3, batch_size=20, steps=400)
    yield Case("drowned", partial(dense, w, 2, "relu", drop=r.choice((0.97, 0.98))), (U,), (W,
               V), {"build": partial(dense, w, 2, "relu")}, init=he)
    yield Case("penalised", partial(dense, w, 2, "relu"), (U,), (D, V, W), {"l1": 0.0}, init=he,
               l1=r.choice((0.02, 0.05)))
    yield Case("decayed", partial(image, 2, 8, 2, "relu", norm=False), (U,), (D, V, W),
               {"options": {}}, shape=SHAPES[2], optimizer="AdamW", options={"weight_decay":
               r.choice((100.0, 200.0))}, steps=150)
    yield Case("bottleneck", partial(dense, w, 3, "tanh", narrow=1), (U,), (W,), {"build":
               partial(dense, w, 3, "tanh")}, init=one)
    yield Case("tiny batches", partial(dense, w, 2, "relu"), (J, D, E), (U, S, W),
               {"batch_size": 64, "lr": 0.1}, init=he, optimizer="SGD", lr=r.choice((0.5, 0.8)),
               batch_size=2, steps=500)
    yield Case("tied", partial(Tied, w, "sigmoid", r.randint(4, 6)), (V,), (W, P, U), {"build":
               partial(Tied, w, "relu", 1), "init": one, "optimizer": "Adam", "lr": 2e-3},
               task="auto", **sgd)
    yield Case("frozen start", partial(dense, w, r.randint(14, 24), "tanh"), (V, P), (W, U),
               {"init": one, "optimizer": "Adam", "lr": 1e-3}, init=lambda m:
               next(matrices(m)).requires_grad_(False), **sgd)


def healthy(r: random.Random) -> Iterator[Case]:
    """One draw of each sound program, traps among them."""
    ok = ("healthy",)
    he, one = partial(good, 2**0.5), partial(good, 1.0)
    w = r.choice((32, 48, 64, 96))
    act = r.choice(("relu", "tanh", "gelu", "elu", "silu", "leaky"))
    for dims in (1, 2, 3):
        yield Case(f"conv{dims}d", partial(image, dims, 8, 3, r.choice(("relu", "tanh",
                   "gelu")), norm=r.random() < 0.5), ok, shape=SHAPES[dims], lr=r.choice((2e-3,
                   5e-3)), steps=200)
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        yield Case(kind.__name__, partial(Recurrent, kind, 8, w, r.randint(1, 2)), ok, shape=(8,
                   8), lr=5e-3)
    yield Case("pre-norm transformer", partial(Attention, 8, 32, 2, tokens=False, pre=True), ok,
               shape=(8, 8), lr=3e-3)
    yield Case("post-norm transformer", partial(Attention, 8, 32, 1, tokens=False, pre=False),
               ok, shape=(8, 8), lr=2e-3)
    yield Case("tokens", lambda: nn.Sequential(nn.Embedding(17, 4), nn.Flatten(),
               *dense(w, 2, act, inputs=128)), ok, shape=(32,), task="tokens", lr=4e-3)
    yield Case("plain", partial(dense, w, r.randint(1, 4), act), ok, init=he, optimizer="SGD",
               lr=0.1, steps=400)
    yield Case("deep", partial(dense, 64, r.randint(8, 12), r.choice(("relu", "gelu"))), ok,
               init=he, lr=1e-3)
    yield Case("normalised", partial(dense, w, r.randint(3, 7), act, norm=r.choice(("batch",
               "layer"))), ok, lr=3e-3)
    yield Case("residual", partial(stack, w, r.randint(4, 12), act), ok, lr=1e-3)
    yield Case("zero branches", partial(stack, w, r.randint(3, 8), act, zero=True), ok, lr=2e-3)
    yield Case("long steps", partial(dense, 96, 2, "relu", norm="batch"), ok, optimizer="SGD",
               lr=1.0)
    yield Case("dropout", partial(dense, 192, 2, act, drop=r.choice((0.3, 0.5))), ok, init=he,
               steps=350)
    yield Case("small batches", partial(dense, w, 2, act), ok, init=he, optimizer="SGD",
               lr=0.02, batch_size=4, steps=1200)
    yield Case("frozen", partial(dense, 128, 2, act), ok, init=partial(frozen, 1), lr=5e-3)
    yield Case("tied", partial(Tied, 48, "leaky", 1), ok, task="auto", init=one, lr=3e-3,
               steps=400)
    yield Case("scaled loss", partial(dense, w, 2, act), ok, init=he, loss_scale=r.choice((1e-4,
               1e4)), lr=3e-3)
    yield Case("clipped Adam", partial(dense, w, 2, act), ok, init=he, clip=0.01, lr=3e-3)
    yield Case("raw behind a norm", lambda: nn.Sequential(nn.LayerNorm(64), *dense(w, 2, act)),
               ok, scale=255.0, lr=3e-3)
    yield Case("decayed", partial(dense, w, 2, act), ok, init=he, optimizer="AdamW",
               options={"weight_decay": 0.3}, lr=3e-3)
    yield Case("numbers", partial(dense, 16, 1, "tanh", inputs=10, outputs=1), ok, shape=(10,),
               task="reg", rows=300, lr=5e-3, optimizer="AdamW", options={"weight_decay": 1.0},
               steps=150)
    yield Case("linear", partial(dense, w, 0, "relu"), ok, lr=0.02)
# fmt: on


def draw(seed: int, rounds: int = 2) -> list[Case]:
    """All faults and all sound programs, `rounds` times each."""
    r = random.Random(seed)
    found = []
    for index in range(rounds):
        cases = [*faulty(r), *healthy(r)]
        found += [
            replace(c, id=f"{'ok' if c.expected == ('healthy',) else 'bad'} {c.id} {seed}.{index}")
            for c in cases
        ]
    return found
