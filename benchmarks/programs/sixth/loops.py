"""Training loops, as people wrote them and as they were repaired."""

from __future__ import annotations

from copy import deepcopy
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

from programs.form import Loop, Watch, accuracy, adam, r2, sgd
from programs.frozen import tasks
from programs.sixth.pictures import SmallNet, digits

LOOPS: list[Loop] = []
broken = tasks.loops_into(LOOPS)


class Motif(nn.Module):
    """Convolutions over a sequence of four letters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(4, 24, 5), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(24, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, 0]


def sequences(rows: int) -> tuple[Tensor, Tensor]:
    """Sequences of letters, half of them with a motif somewhere."""
    letters = torch.randint(4, (rows, 30))
    y = (torch.rand(rows) < 0.5).float()
    motif = torch.tensor([0, 2, 2, 1, 3])
    for k in y.nonzero()[:, 0].tolist():
        start = int(torch.randint(0, 25, ()))
        letters[k, start : start + 5] = motif
    return F.one_hot(letters, 4).float().transpose(1, 2), y


@broken(
    "a plateau that waits for an accuracy to fall",
    "https://github.com/md-mohaiminul/ViS4mer/issues/4",
    "learning_rate_collapsed",
    low=0.91,
    high=0.93,
)
def waits_for_an_accuracy_to_fall(wrong: bool, watch: Watch) -> float:
    x, y = sequences(1100)
    model = Motif()
    optimizer = adam(model, 2e-3)
    scheduler = lr_scheduler.ReduceLROnPlateau(
        optimizer, "min" if wrong else "max", patience=2, factor=0.1
    )
    loader = DataLoader(TensorDataset(x[:800], y[:800]), batch_size=32, shuffle=True)
    with watch(model, optimizer):
        for _ in range(30):
            for rows, target in loader:
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(model(rows), target).backward()
                optimizer.step()
            scheduler.step(accuracy(x[800:], y[800:])(model))
    return accuracy(x[800:], y[800:])(model)


@broken(
    "a schedule that goes on with every small batch of a large one",
    "https://github.com/EvolvingLMMs-Lab/OneVision-Encoder/pull/82",
    "learning_rate_collapsed",
    low=0.85,
    high=0.9,
)
def every_small_batch(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = digits()
    model = SmallNet()
    opt = sgd(model, 0.1, momentum=0.9)
    total_steps, backward_passes_per_step = 150, 4
    lr_scheduler_ = lr_scheduler.PolynomialLR(opt, total_steps, power=2)
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    step = 0
    with watch(model, opt):
        for _ in range(8):
            for rows, target in loader:
                step += 1
                (F.cross_entropy(model(rows), target) / backward_passes_per_step).backward()
                if step % backward_passes_per_step == 0:
                    opt.step()
                    opt.zero_grad()
                    if not wrong:
                        lr_scheduler_.step()
                if wrong:
                    lr_scheduler_.step()
    return accuracy(xt, yt)(model)


@broken(
    "a warm-up that begins again in every epoch",
    "https://github.com/Vision-CAIR/MiniGPT-4/pull/263",
    "warmup_begins_again",  # no code says it: the rate never leaves its first steps
    low=0.75,
    high=0.85,
    also=("learning_rate_collapsed",),
)
def begins_again(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = digits()
    model = SmallNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    loader = DataLoader(TensorDataset(x, y), batch_size=40, shuffle=True)
    warmup_steps, init_lr, warmup_start_lr = 100, 3e-3, 1e-6
    with watch(model, optimizer):
        for cur_epoch in range(10):
            for cur_step, (rows, target) in enumerate(loader):
                step = cur_step if wrong else cur_epoch * len(loader) + cur_step
                share = min(1.0, (step / warmup_steps) ** 2)
                for group in optimizer.param_groups:
                    group["lr"] = warmup_start_lr + (init_lr - warmup_start_lr) * share
                optimizer.zero_grad()
                F.cross_entropy(model(rows), target).backward()
                optimizer.step()
    return accuracy(xt, yt)(model)


@broken(
    "gradients of small batches that are zeroed before the last of them",
    "https://github.com/pytorch/ignite/issues/583",
    "accumulated_gradients_dropped",  # no code says it: seven of eight batches are for nothing
    low=0.75,
    high=0.85,
    also=("no_gradient", "unmoved_parameters", "gradients_not_cleared", "micro_batches_lost"),
)
def before_the_last_of_them(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = digits()
    model = SmallNet()
    optimizer = sgd(model, 0.1, momentum=0.9)
    accumulation_steps = 8
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    iteration = 0
    with watch(model, optimizer):
        for _ in range(5):
            for rows, target in loader:
                iteration += 1
                if wrong and iteration % accumulation_steps == 0:
                    optimizer.zero_grad()
                loss = F.cross_entropy(model(rows), target) / accumulation_steps
                loss.backward()
                if iteration % accumulation_steps == 0:
                    optimizer.step()
                    if not wrong:
                        optimizer.zero_grad()
    return accuracy(xt, yt)(model)


class Policy(nn.Module):
    """A frozen table and body with adapters, recomputed on the way back."""

    def __init__(self, inputs_require_grad: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 24).requires_grad_(False)
        self.body = nn.ModuleList(nn.Linear(24, 24).requires_grad_(False) for _ in range(2))
        self.lora_a = nn.ParameterList(nn.Parameter(torch.randn(8, 24) / 5) for _ in range(2))
        self.lora_b = nn.ParameterList(nn.Parameter(torch.zeros(24, 8)) for _ in range(2))
        self.score = nn.Linear(24, 2)
        self.inputs_require_grad = inputs_require_grad

    def block(self, x: Tensor, k: int) -> Tensor:
        return torch.tanh(self.body[k](x) + 2 * x @ self.lora_a[k].T @ self.lora_b[k].T)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mean(1) * 3
        if self.inputs_require_grad:
            x.requires_grad_(True)
        for k in range(2):
            x = checkpoint(self.block, x, k, use_reentrant=True)
        return self.score(x)


@broken(
    "adapters that are recomputed from inputs without a gradient",
    "https://github.com/huggingface/trl/issues/2671",
    "unmoved_parameters",
    low=0.68,
    high=0.74,
    also=("no_gradient", "missing_from_optimizer", "detached"),
)
def without_a_gradient(wrong: bool, watch: Watch) -> float:
    tokens = torch.randint(30, (1500, 6))
    taste = torch.randn(30)
    y = (taste[tokens].sum(1).abs() > 1.6).long()
    model = Policy(not wrong)
    optimizer = adam(model, 1e-2)
    loader = DataLoader(TensorDataset(tokens[:1100], y[:1100]), batch_size=32, shuffle=True)
    with watch(model, optimizer):
        for _ in range(12):
            for rows, target in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(rows), target).backward()
                optimizer.step()
    return accuracy(tokens[1100:], y[1100:])(model)


@broken(
    "an optimizer that is built for every step",
    "https://github.com/ooples/AiDotNet/pull/222",
    "optimizer_made_anew",  # no code says it: no step knows what the one before has seen
    low=0.4,
    high=0.6,
    also=("step_never_called", "weights_overwritten"),
)
def built_for_every_step(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = digits()
    model = SmallNet()
    optimizer = sgd(model, 4e-3, momentum=0.95)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    with watch(model, optimizer):
        for _ in range(6):
            for rows, target in loader:
                if wrong:
                    optimizer = sgd(model, 4e-3, momentum=0.95)
                optimizer.zero_grad()
                F.cross_entropy(model(rows), target).backward()
                optimizer.step()
    return accuracy(xt, yt)(model)


class WorldModel(nn.Module):
    """The next state, by a plain recurrence over many."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.RNN(2, 48, nonlinearity="relu"), nn.Linear(48, 2)
        nn.init.eye_(self.rnn.weight_hh_l0)
        with torch.no_grad():
            self.rnn.weight_hh_l0 *= 1.02

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


@broken(
    "gradients that are clipped in the training step, before there are any",
    "https://github.com/simchowitzlabpublic/nano-world-model/pull/22",
    "clipped_before_backward",  # no code says it: what is clipped is None or of the step before
    low=0.3,
    high=0.7,
    also=("exploding_gradient", "loss_spike"),
)
def before_there_are_any(wrong: bool, watch: Watch) -> float:
    time, pace = torch.arange(41)[:, None, None], 0.2 + 0.3 * torch.rand(1, 400, 1)
    angle = pace * time + 6.3 * torch.rand(1, 400, 1)
    states = torch.cat([angle.sin(), angle.cos()], 2)
    model = WorldModel()
    optimizer = sgd(model, 0.1, momentum=0.9)

    def training_step(batch: Tensor) -> Tensor:
        loss = F.mse_loss(model(batch[:-1]), batch[1:])
        if wrong:
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        return loss

    with watch(model, optimizer):
        for _ in range(20):
            for rows in torch.randperm(320).split(32):
                loss = training_step(states[:, rows])
                optimizer.zero_grad()
                loss.backward()
                if not wrong:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.2)
                optimizer.step()
    held_out = states[:, 320:]
    return r2(held_out[:-1], held_out[1:].flatten(0, 1))(lambda x: model(x).flatten(0, 1))


@broken(
    "a generator that is frozen for its judge and stays so",
    "https://github.com/wdzhao123/APL/issues/4",
    "no_gradient",
    low=0.0,
    high=0.4,
    also=("unmoved_parameters", "nothing_to_train", "frozen_parameters"),
)
def stays_frozen(wrong: bool, watch: Watch) -> float:
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    discriminator = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    g_optim = adam(generator, 1e-3, betas=(0.5, 0.999))
    d_optim = adam(discriminator, 2e-3, betas=(0.5, 0.999))
    centre = torch.tensor([1.5, -2.0])
    apart: list[float] = []
    with watch(generator, g_optim):
        for _ in range(600):
            generator.requires_grad_(False)
            real, fake = centre + 0.4 * torch.randn(64, 2), generator(torch.randn(64, 4))
            d_optim.zero_grad()
            (F.softplus(-discriminator(real)) + F.softplus(discriminator(fake))).mean().backward()
            d_optim.step()
            if not wrong:
                generator.requires_grad_(True)
            fake = generator(torch.randn(64, 4))
            g_optim.zero_grad()
            d_optim.zero_grad()
            F.softplus(-discriminator(fake)).mean().backward()
            g_optim.step()
            apart.append((fake.mean(0) - centre).norm().item())
    return max(-1.0, 1 - sum(apart[-150:]) / 150)


@broken(
    "weights of all clients that are added to those of the round before",
    "https://github.com/cisco-open/flame/pull/95",
    "weights_overwritten",
    low=0.4,
    high=0.6,
    also=("loss_spike", "exploding_gradient"),
)
def those_of_the_round_before(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = sgd(model, 0.2, momentum=0.5)
    clients = torch.arange(1200).split(400)
    global_weights: dict[str, Tensor] = {}
    current = deepcopy(model.state_dict())
    with watch(model, optimizer):
        for _ in range(8):
            if not wrong:
                global_weights = {}
            for rows in clients:
                model.load_state_dict(current)
                for batch in rows[torch.randperm(400)].split(40):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[batch]), y[batch]).backward()
                    optimizer.step()
                for name, value in model.state_dict().items():
                    global_weights[name] = global_weights.get(name, 0) + value / len(clients)
            current = {name: value.clone() for name, value in global_weights.items()}
    model.load_state_dict(current)
    return float(torch.exp(-F.cross_entropy(model(xt), yt)))


class Jittered(Dataset):
    """Digits with fresh noise at each reading."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        shift = tuple(torch.randint(-1, 2, (2,)).tolist())
        return self.x[k].roll(shift, (1, 2)) + 0.15 * torch.randn(1, 8, 8), self.y[k]


@broken(
    "a cycle that keeps the first pictures and never draws others",
    "https://github.com/microsoft/nni/issues/3428",
    "augmentation_kept",  # no code says it: each picture is turned once and for all
    low=0.68,
    high=0.74,
    also=("repeated_batch", "same_order_every_epoch"),
)
def keeps_the_first_pictures(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = digits()
    model = SmallNet()
    optimizer = adam(model, 3e-3)
    train = Jittered(x[:160], y[:160])
    loader = DataLoader(train, batch_size=32, shuffle=True)
    batches = cycle(loader) if wrong else (batch for _ in range(150) for batch in loader)
    with watch(model, optimizer):
        for _, (rows, target) in zip(range(700), batches, strict=False):
            optimizer.zero_grad()
            F.cross_entropy(model(rows), target).backward()
            optimizer.step()
    asked = torch.stack([Jittered(xt, yt)[k][0] for k in range(len(yt))])
    return accuracy(asked, yt)(model)


@broken(
    "an epoch that begins with the same few series each time",
    "https://github.com/awslabs/gluonts/pull/787",
    "same_rows_each_epoch",  # no code says it: most of the data are never read
    low=0.75,
    high=0.8,
    also=("repeated_batch", "same_rows_every_epoch"),
)
def same_few_series(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.waves(1600)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    optimizer = adam(model, 3e-3)
    noisy = y + 0.6 * torch.randn_like(y)
    dataset, num_batches_per_epoch = DataLoader(TensorDataset(x, noisy), batch_size=16), 4
    stream = iter(dataset)
    with watch(model, optimizer):
        for _ in range(75):
            if wrong:
                stream = iter(dataset)
            for _ in range(num_batches_per_epoch):
                batch = next(stream, None)
                if batch is None:
                    stream = iter(dataset)
                    batch = next(stream)
                optimizer.zero_grad()
                F.mse_loss(model(batch[0])[:, 0], batch[1]).backward()
                optimizer.step()
    return r2(xt, yt)(model)


def blobs_of(model: nn.Module, images: Tensor) -> Tensor:
    """Where the model now sees something, as the loss asks."""
    model.eval()
    with torch.no_grad():
        return model(images).argmax(1)


@broken(
    "a loss that asks the model for its answers and leaves it in eval mode",
    "https://github.com/ServiceNow/LCFCN/issues/20",
    "eval_mode_in_training",
    low=0.6,
    high=0.8,
    also=("loss_spike", "exploding_gradient"),
)
def leaves_it_in_eval_mode(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = digits(255 / 16)
    model = SmallNet(norm=True)
    optimizer = sgd(model, 2e-2, momentum=0.9)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    with watch(model, optimizer):
        for _ in range(5):
            for images, target in loader:
                model.train()
                found = blobs_of(model, images)
                if not wrong:
                    model.train()
                weight = 1.0 + (found != target).float()
                loss = (F.cross_entropy(model(images), target, reduction="none") * weight).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    model.eval()
    return accuracy(xt, yt)(model)


@broken(
    "a half-precision model under Adam with its usual epsilon",
    "https://github.com/afiaka87/glide-finetune/pull/6",
    "adam_epsilon_underflow",  # no code says it: in float16 the epsilon is zero
    low=0.3,
    high=0.6,
    also=("exploding_gradient", "unmoved_parameters", "updates_lost", "non_finite_data"),
)
def its_usual_epsilon(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).half()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-8 if wrong else 1e-4)
    with watch(model, optimizer):
        for _ in range(6):
            for rows in torch.randperm(1200).split(32):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows].half()).float(), y[rows]).backward()
                optimizer.step()
    return accuracy(xt.half(), yt)(model)


@broken(
    "norms that are in no list of what is trained",
    "https://github.com/official-stockfish/nnue-pytorch/pull/91",
    "missing_from_optimizer",
    low=0.7,
    high=0.85,
    also=("unmoved_parameters",),
)
def in_no_list(wrong: bool, watch: Watch) -> float:
    x = torch.randn(1200, 12)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    model = nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 96), nn.ReLU(), nn.Linear(96, 1))
    nn.init.constant_(model[0].weight, 0.02)
    layers = [m for m in model if isinstance(m, nn.Linear)] if wrong else list(model)
    params = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=1e-2)
    with watch(model, optimizer):
        for _ in range(15):
            for rows in torch.randperm(1000).split(50):
                optimizer.zero_grad()
                F.mse_loss(model(x[rows]), y[rows]).backward()
                optimizer.step()
    model.eval()
    return r2(x[1000:], y[1000:])(model)
