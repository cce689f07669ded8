"""Training loops, as people wrote them and as they were repaired."""

from __future__ import annotations

from collections import deque
from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from programs.form import Loop, Watch, accuracy, adam, sgd
from programs.frozen import tasks

LOOPS: list[Loop] = []
broken = tasks.loops_into(LOOPS)


def mlp(hidden: int = 64, dropout: float = 0.0) -> nn.Sequential:
    """A hidden layer between the pixels and the digits."""
    return nn.Sequential(
        nn.Linear(64, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 10)
    )


def walk(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A step to the left or right on a line of seven; the right end pays."""
    state = state + 2 * action - 1
    done = (state == 0) | (state == 6)
    return state.clamp(0, 6), (state == 6).float(), done.float()


class DqnAgent:
    """An agent that learns from what it keeps once it has seen enough steps."""

    def __init__(self, counts_what_it_stores: bool) -> None:
        self.q = nn.Sequential(nn.Linear(7, 32), nn.ReLU(), nn.Linear(32, 2))
        self.target = deepcopy(self.q).requires_grad_(False)
        self.optimizer = adam(self.q, 3e-3)
        self.memory: deque[tuple[Tensor, ...]] = deque(maxlen=2000)
        self.total_steps, self.counts = 0, counts_what_it_stores

    def store_transition(self, *transition: Tensor) -> None:
        self.memory.append(transition)
        self.total_steps += self.counts

    def update(self) -> None:
        self.total_steps += not self.counts
        picked = [self.memory[k] for k in torch.randint(len(self.memory), (32,)).tolist()]
        state, action, reward, following, done = (torch.stack(part) for part in zip(*picked))
        with torch.no_grad():
            best = self.target(F.one_hot(following, 7).float()).max(1).values
            goal = reward + 0.9 * (1 - done) * best
        value = self.q(F.one_hot(state, 7).float()).gather(1, action[:, None])[:, 0]
        self.optimizer.zero_grad()
        F.smooth_l1_loss(value, goal).backward()
        self.optimizer.step()
        if self.total_steps % 50 == 0:
            self.target.load_state_dict(self.q.state_dict())


@broken(
    "an agent that counts its steps where it learns, and learns after a thousand",
    "https://github.com/jsboige/CoursIA/issues/3341",
    "step_never_called",
    low=0.75,
    high=0.95,
    also=("no_gradient",),
)
def after_a_thousand(wrong: bool, watch: Watch) -> float:
    agent = DqnAgent(counts_what_it_stores=not wrong)
    warmup_steps, state = 200, torch.tensor(3)
    with watch(agent.q, agent.optimizer):
        for _ in range(900):
            action = torch.randint(2, ())
            if torch.rand(()) > 0.5:
                action = agent.q(F.one_hot(state, 7).float()).argmax()
            following, reward, done = walk(state, action)
            agent.store_transition(state, action, reward, following, done)
            state = torch.randint(1, 6, ()) if done else following
            if agent.total_steps > warmup_steps:
                agent.update()
    said = agent.q(torch.eye(7))[1:6]
    true = torch.tensor([0.9**k for k in (4, 3, 2, 1, 0)])
    error = (said[:, 1] - true).square().mean() / true.square().mean()
    return max(-1.0, 1 - float(error))


class Rnn(nn.Module):
    """A plain recurrence over letters, and the language of the name."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(12, 32, batch_first=True), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


def names(rows: int) -> tuple[Tensor, Tensor]:
    """Names as rows of letters, each language with letters that it likes."""
    language = torch.randint(4, (rows,))
    likes = (1.5 * torch.randn(4, 12)).softmax(1)
    letters = torch.multinomial(likes[language], 7, replacement=True)
    return F.one_hot(letters, 12).float(), language


@broken(
    "a network that is built a second time in front of the loop",
    "https://github.com/spro/practical-pytorch/issues/9",
    "optimizer_of_another_model",
    low=0.5,
    high=0.7,
    also=("step_never_called", "missing_from_optimizer"),
)
def built_a_second_time(wrong: bool, watch: Watch) -> float:
    x, y = names(1000)
    rnn = Rnn()
    optimizer = adam(rnn, 5e-3)
    if wrong:
        rnn = Rnn()
    with watch(rnn, optimizer):
        for _ in range(8):
            for rows in torch.randperm(800).split(20):
                optimizer.zero_grad()
                F.cross_entropy(rnn(x[rows]), y[rows]).backward()
                optimizer.step()
    return accuracy(x[800:], y[800:])(rnn)


@broken(
    "an evaluation in the middle of an epoch that leaves its mode behind",
    "https://github.com/asyml/texar-pytorch/issues/310",
    "eval_mode_in_training",
    low=0.1,
    high=0.3,
)
def leaves_its_mode_behind(wrong: bool, watch: Watch) -> float:
    x = torch.randn(900, 30)
    y = ((x[:, :3].sum(1) + 0.8 * torch.randn(900)) > 0).long()
    (x, y), (xd, yd), (xt, yt) = (
        (x[part], y[part]) for part in (slice(0, 250), slice(250, 400), slice(400, None))
    )
    model = nn.Sequential(
        nn.Linear(30, 128), nn.ReLU(), nn.Dropout(0.7), nn.Linear(128, 128), nn.ReLU(),
        nn.Dropout(0.7), nn.Linear(128, 2),
    )  # fmt: skip
    optim = adam(model, 2e-3)

    def eval_epoch() -> None:
        model.eval()
        with torch.no_grad():
            accuracy(xd, yd)(model)

    iterator = DataLoader(TensorDataset(x, y), batch_size=15, shuffle=True)
    with watch(model, optim):
        for _ in range(15):
            model.train()
            for step, (rows, target) in enumerate(iterator):
                optim.zero_grad()
                F.cross_entropy(model(rows), target).backward()
                optim.step()
                if step == 0:
                    eval_epoch()
                    if not wrong:
                        model.train()
    model.eval()
    with torch.no_grad():
        return max(-1.0, 1 - float(F.cross_entropy(model(xt), yt)) / 0.6931)


def double(few: int, many: int) -> nn.Sequential:
    """A convolution, its norm and a rectifier."""
    conv = nn.Conv2d(few, many, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(many), nn.ReLU())


@broken(
    "a validation after the first batches that switches the norms off for the rest",
    "https://github.com/milesial/Pytorch-UNet/issues/165",
    "eval_mode_in_training",
    low=0.45,
    high=0.6,
)
def switches_the_norms_off(wrong: bool, watch: Watch) -> float:
    x, mask = tasks.shapes(300, 12)
    wide = [1, *[16] * 12]
    net = nn.Sequential(*(double(few, many) for few, many in pairwise(wide)), nn.Conv2d(16, 1, 1))
    optimizer = sgd(net, 0.1, momentum=0.9)

    def overlap() -> float:
        net.eval()
        with torch.no_grad():
            found, true = net(x[200:]) > 0, mask[200:] > 0
        return float(2 * (found & true).sum() / (found.sum() + true.sum()))

    loader = DataLoader(TensorDataset(x[:200], mask[:200]), batch_size=10, shuffle=True)
    with watch(net, optimizer):
        for _ in range(4):
            net.train()
            for step, (imgs, true_masks) in enumerate(loader):
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(net(imgs), true_masks).backward()
                optimizer.step()
                if step % 8 == 0:
                    overlap()
                    if not wrong:
                        net.train()
    return overlap()


@broken(
    "two optimizers that are cleared for every part of a large batch",
    "https://github.com/tientrandinh/Revisiting-Reverse-Distillation/issues/12",
    "micro_batches_lost",
    low=0.65,
    high=0.85,
    also=("accumulated_gradients_dropped",),
)
def for_every_part(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    proj, distill = nn.Sequential(nn.Linear(64, 48), nn.ReLU()), nn.Linear(48, 10)
    net = nn.Sequential(proj, distill)
    optimizer_proj, optimizer_distill = sgd(proj, 0.02), sgd(distill, 0.02)
    accumulation_steps = 8
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    with watch(net, optimizer_distill):
        for _ in range(6):
            for i, (rows, target) in enumerate(loader):
                loss = F.cross_entropy(net(rows), target)
                if wrong:
                    optimizer_proj.zero_grad()
                    optimizer_distill.zero_grad()
                loss.backward()
                if (i + 1) % accumulation_steps == 0:
                    optimizer_proj.step()
                    optimizer_distill.step()
                    if not wrong:
                        optimizer_proj.zero_grad()
                        optimizer_distill.zero_grad()
    return accuracy(xt, yt)(net)


@broken(
    "the first example of a library, whose gradients add up",
    "https://github.com/IBM/aihwkit/issues/446",
    "gradients_not_cleared",
    low=0.6,
    high=0.9,
)
def whose_gradients_add_up(wrong: bool, watch: Watch) -> float:
    x = torch.rand(200, 4)
    y = x @ torch.rand(4, 2) + 0.1
    model = nn.Linear(4, 2)
    opt = sgd(model, 0.3)
    with watch(model, opt):
        for _ in range(150):
            pred = model(x)
            loss = F.mse_loss(pred, y)
            loss.backward()
            opt.step()
            if not wrong:
                opt.zero_grad()
    return max(-1.0, 1 - float(F.mse_loss(model(x), y) / (y - y.mean(0)).square().mean()))


class DataGenerator:
    """Batches of a loader, one for each call."""

    def __init__(self, loader: DataLoader, anew: bool) -> None:
        self.loader, self.anew, self.iterator = loader, anew, iter(loader)

    def get_batch(self) -> list[Tensor]:
        if self.anew:
            return next(iter(self.loader))
        try:
            return next(self.iterator)
        except StopIteration:
            self.iterator = iter(self.loader)
            return next(self.iterator)


@broken(
    "a generator of data that begins again with every call",
    "https://github.com/Trusted-AI/adversarial-robustness-toolbox/issues/728",
    "repeated_batch",
    low=0.82,
    high=0.88,
    also=("same_rows_every_epoch",),
)
def with_every_call(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = mlp()
    optimizer = adam(model, 2e-3)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=False)
    generator = DataGenerator(loader, anew=wrong)
    with watch(model, optimizer):
        for _ in range(200):
            rows, target = generator.get_batch()
            optimizer.zero_grad()
            F.cross_entropy(model(rows), target).backward()
            optimizer.step()
    return accuracy(xt, yt)(model)


@broken(
    "a best model that is kept by reference, and patience to find it",
    "https://github.com/WenjieDu/PyPOTS/issues/667",
    "best_is_a_reference",
    low=-0.1,
    high=0.1,
)
def kept_by_reference(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    x, xt = x + 0.8 * torch.randn_like(x), xt + 0.8 * torch.randn_like(xt)
    x, y, xv, yv = x[:150], y[:150], x[150:450], y[150:450]
    model = mlp(256)
    optimizer = adam(model, 3e-3)
    best_loss, best_model_dict, patience = float("inf"), model.state_dict(), 25
    with watch(model, optimizer):
        for _ in range(60):
            for rows in torch.randperm(len(y)).split(25):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                mean_loss = float(F.cross_entropy(model(xv), yv))
            patience -= 1
            if mean_loss < best_loss:
                best_loss, patience = mean_loss, 25
                best_model_dict = model.state_dict() if wrong else deepcopy(model.state_dict())
            if patience == 0:
                break
    model.load_state_dict(best_model_dict)
    with torch.no_grad():
        return max(-1.0, 1 - float(F.cross_entropy(model(xt), yt)) / 2.3026)


@broken(
    "an average of the weights that is too slow for so few steps",
    "https://github.com/happyharrycn/actionformer_release/issues/103",
    "average_lags",  # no code says it: the average is still near its start
    low=0.6,
    high=0.85,
    also=("target_never_updated",),
)
def too_slow_for_so_few_steps(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = mlp()
    model_ema = deepcopy(model).eval().requires_grad_(False)
    decay = 0.9999 if wrong else 0.95
    optimizer = adam(model, 2e-3)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    with watch(model, optimizer):
        for _ in range(6):
            for rows, target in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(rows), target).backward()
                optimizer.step()
                with torch.no_grad():
                    for kept, new in zip(model_ema.parameters(), model.parameters()):
                        kept.mul_(decay).add_(new, alpha=1 - decay)
    return accuracy(xt, yt)(model_ema)


@broken(
    "a count of patience that no better epoch sets back",
    "https://github.com/ilaria-manco/music-audio-tagging-pytorch/issues/4",
    "stopped_early",  # no code says it: the loop ends before the rate is ever lowered
    low=0.85,
    high=0.9,
    also=("schedule_never_stepped",),
)
def no_better_epoch_sets_back(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = mlp()
    optimizer = sgd(model, 0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=6, factor=0.3)
    loader = DataLoader(TensorDataset(x[:900], y[:900]), batch_size=300, shuffle=True)
    best, k_patience = float("inf"), 0
    with watch(model, optimizer):
        for _ in range(150):
            for rows, target in loader:
                optimizer.zero_grad()
                rows = rows + 0.3 * torch.randn_like(rows)
                F.cross_entropy(model(rows), target).backward()
                optimizer.step()
            with torch.no_grad():
                few = torch.randint(900, 1200, (24,))
                val_loss = float(F.cross_entropy(model(x[few]), y[few]))
            scheduler.step(val_loss)
            is_val_improving = val_loss < best
            best = min(best, val_loss)
            k_patience = k_patience + 1 if not is_val_improving else (k_patience if wrong else 0)
            if k_patience >= 10:
                break
    return accuracy(xt, yt)(model)


@broken(
    "a body that is frozen but for the statistics of its norms",
    "https://github.com/Lightning-AI/pytorch-lightning/pull/15063",
    "frozen_norms_move",
    low=0.75,
    high=0.85,
)
def statistics_of_its_norms(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    body = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())
    old = nn.Sequential(body, nn.Linear(64, 10))
    before = adam(old, 3e-3)
    for rows in torch.randint(1200, (250, 32)):
        before.zero_grad()
        F.cross_entropy(old(x[rows]), y[rows]).backward()
        before.step()
    body.requires_grad_(False)
    new_head = nn.Linear(64, 2)
    model = nn.Sequential(body, new_head)
    optimizer = adam(new_head, 5e-3)
    dark = 0.4 * x + 1.0  # pictures of another camera
    loader = DataLoader(TensorDataset(dark, (y % 2)), batch_size=30, shuffle=True)
    with watch(model, optimizer):
        for _ in range(8):
            model.train()
            if not wrong:
                body.eval()
            for rows, target in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(rows), target).backward()
                optimizer.step()
    model.eval()  # the old task has to work as it did
    with torch.no_grad():
        return accuracy(xt, yt)(old)


class Roll(nn.Module):
    """A plain recurrence over the frames of a roll, and how loud each note still is."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(8, 48, nonlinearity="relu", batch_first=True)
        self.loud = nn.Linear(48, 8)
        nn.init.eye_(self.rnn.get_parameter("weight_hh_l0"))

    def forward(self, x: Tensor) -> Tensor:
        return self.loud(self.rnn(x)[0])


@broken(
    "gradients that are clipped when the step is made",
    "https://github.com/emited/VariationalRecurrentNeuralNetwork/issues/3",
    "clipped_after_step",
    low=0.3,
    high=0.5,
    also=("exploding_gradient",),
)
def when_the_step_is_made(wrong: bool, watch: Watch) -> float:
    notes = (torch.rand(500, 40, 8) < 0.3).float()
    held = [notes[:, 0]]
    for frame in notes[:, 1:].unbind(1):
        held.append(0.8 * held[-1] + frame)
    held = torch.stack(held, 1)
    model = Roll()
    optimizer = sgd(model, 0.1, momentum=0.9)
    loader = DataLoader(TensorDataset(notes[:400], held[:400]), batch_size=20, shuffle=True)
    with watch(model, optimizer):
        for _ in range(12):
            for frames, target in loader:
                optimizer.zero_grad()
                F.mse_loss(model(frames), target).backward()
                if wrong:
                    optimizer.step()
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                if not wrong:
                    optimizer.step()
    with torch.no_grad():
        error = F.mse_loss(model(notes[400:]), held[400:]) / held[400:].var()
    return max(-1.0, 1 - float(error.nan_to_num(2.0, 2.0)))


@broken(
    "an average of weights whose norms never saw a picture",
    "https://github.com/mosaicml/composer/issues/624",
    "average_norms_stale",  # no code says it: the average keeps the statistics of its start
    low=0.85,
    high=0.95,
    also=("target_never_updated",),
)
def never_saw_a_picture(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits(scale=1.0)
    net = nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64),
        nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    swa_model, averaged = deepcopy(net).requires_grad_(False), 0
    optimizer = sgd(net, 0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.01)
    loader = DataLoader(TensorDataset(x, y), batch_size=30, shuffle=True)
    with watch(net, optimizer):
        for epoch in range(10):
            for rows, target in loader:
                optimizer.zero_grad()
                F.cross_entropy(net(rows), target).backward()
                optimizer.step()
            scheduler.step()
            if epoch >= 5:
                averaged += 1
                for mean, new in zip(swa_model.parameters(), net.parameters()):
                    mean.lerp_(new.detach(), 1 / averaged)
        if not wrong:
            torch.optim.swa_utils.update_bn(loader, swa_model)
    swa_model.eval()
    with torch.no_grad():
        return accuracy(xt, yt)(swa_model)
