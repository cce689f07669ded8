"""Training loops, as people wrote them and as they were repaired."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from programs.fifth.pictures import BirdNet, images
from programs.form import Loop, Watch, accuracy, adam, r2, sgd
from programs.frozen import tasks

LOOPS: list[Loop] = []
broken = tasks.loops_into(LOOPS)


class GenerativeRecommender(nn.Module):
    """What a user takes next, by a GRU over what was taken."""

    def __init__(self, items: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items, 24)
        self.gru = nn.GRU(24, 24, batch_first=True)

    def forward(self, history: Tensor) -> Tensor:
        return self.gru(self.items(history))[1][0] @ self.items.weight.T


@broken(
    "a recommender whose gradients are never zeroed",
    "https://github.com/meta-recsys/generative-recommenders/pull/332",
    "gradients_not_cleared",
    low=0.65,
    high=0.75,
    also=("loss_spike", "exploding_gradient"),
)
def never_zeroed(wrong: bool, watch: Watch) -> float:
    follows = torch.randperm(30)
    history = torch.randint(30, (900, 5))
    y = torch.where(torch.rand(900) < 0.9, follows[history[:, -1]], torch.randint(30, (900,)))
    model = GenerativeRecommender(30)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2, betas=(0.9, 0.95))
    loader = DataLoader(TensorDataset(history[:700], y[:700]), batch_size=32, shuffle=True)
    with watch(model, optimizer):
        for _ in range(10):
            for seq, target in loader:
                loss = F.cross_entropy(model(seq), target)
                if not wrong:
                    optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return accuracy(history[700:], y[700:])(model)


class SuperResolution(nn.Module):
    """A picture of twice the size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.PReLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.PReLU(),
            nn.Conv2d(16, 4, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip

    def forward(self, low: Tensor) -> Tensor:
        return self.body(low)


@broken(
    "a schedule of epochs that is stepped in every batch of a generator",
    "https://github.com/leftthomas/SRGAN/issues/94",
    "learning_rate_collapsed",
    low=0.2,
    high=0.4,
)
def stepped_in_every_batch(wrong: bool, watch: Watch) -> float:
    (x, _), (xt, _) = images()
    generator, epochs = SuperResolution(), 8
    optimizer = torch.optim.Adam(generator.parameters(), lr=4e-3)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=epochs // 2, gamma=0.1)
    loader = DataLoader(TensorDataset(x), batch_size=32, shuffle=True)
    with watch(generator, optimizer):
        for _ in range(epochs):
            for (high,) in loader:
                optimizer.zero_grad()
                F.mse_loss(generator(F.avg_pool2d(high, 2)), high).backward()
                optimizer.step()
                if wrong:
                    scheduler.step()
            if not wrong:
                scheduler.step()
    return r2(F.avg_pool2d(xt, 2), xt)(generator)


@broken(
    "the best weights, kept as a reference to those that train on",
    "https://github.com/pytorch/tutorials/pull/188",
    "best_is_a_reference",  # no code says it: what is loaded at the end is the last epoch
    low=0.65,
    high=0.72,
    also=("loss_spike", "exploding_gradient"),
)
def kept_as_a_reference(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    x, y, xv, yv = x[:200], y[:200].clone(), x[600:], y[600:]
    y[:100] = torch.randint(10, (100,))
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = adam(model, 3e-3)
    best_acc, best_model_wts = 0.0, deepcopy(model.state_dict())
    with watch(model, optimizer):
        for _ in range(40):
            order = torch.randperm(200)
            for rows in order.split(20):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            epoch_acc = accuracy(xv, yv)(model)
            if epoch_acc > best_acc:
                best_acc = epoch_acc
                best_model_wts = model.state_dict() if wrong else deepcopy(model.state_dict())
    model.load_state_dict(best_model_wts)
    return accuracy(xt, yt)(model)


class VSE(nn.Module):
    """Places of pictures and of their captions in one space."""

    def __init__(self) -> None:
        super().__init__()
        self.img_enc = nn.Sequential(
            nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.7), nn.Linear(256, 16)
        )
        self.txt_enc = nn.Embedding(10, 16)

    def val_start(self) -> None:
        self.img_enc.eval()
        self.txt_enc.eval()

    def train_start(self) -> None:
        self.img_enc.train()
        self.txt_enc.train()

    def forward(self, img: Tensor) -> Tensor:
        return self.img_enc(img) @ self.txt_enc.weight.T


@broken(
    "a validation in the steps after which nothing is started again",
    "https://github.com/fartashf/vsepp/issues/4",
    "eval_mode_in_training",
    low=0.6,
    high=0.62,
    also=("loss_spike", "exploding_gradient"),
)
def nothing_is_started(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    x, y = x[:300], y[:300].clone()
    noisy = torch.rand(300) < 0.5
    y[noisy] = torch.randint(10, (int(noisy.sum()),))
    model = VSE()
    optimizer = adam(model, 1e-2)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    eiters = 0
    with watch(model, optimizer):
        for _ in range(40):
            if eiters == 0 or not wrong:
                model.train_start()
            for rows, target in loader:
                if not wrong:
                    model.train_start()
                eiters += 1
                optimizer.zero_grad()
                F.cross_entropy(model(rows), target).backward()
                optimizer.step()
                if eiters % 10 == 0:
                    model.val_start()
                    with torch.no_grad():
                        model(xt[:50])
    model.val_start()
    return accuracy(xt, yt)(model)


@broken(
    "a discriminator that keeps what the generator left in it",
    "https://github.com/Adversarial-Deep-Learning/code-soup/issues/69",
    "gradients_not_cleared",
    low=0.3,
    high=0.5,
    also=("loss_spike", "exploding_gradient"),
)
def what_the_generator_left(wrong: bool, watch: Watch) -> float:
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    discriminator = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    optimizer_g = adam(generator, 1e-3, betas=(0.5, 0.999))
    optimizer_d = adam(discriminator, 2e-3, betas=(0.5, 0.999))
    criterion = nn.BCEWithLogitsLoss()
    real_label, fake_label = torch.ones(64, 1), torch.zeros(64, 1)
    apart: list[float] = []
    with watch(discriminator, optimizer_d):
        for _ in range(700):
            real = torch.tensor([2.0, 1.0]) + 0.4 * torch.randn(64, 2)
            if not wrong:
                discriminator.zero_grad()
            criterion(discriminator(real), real_label).backward()
            fake = generator(torch.randn(64, 4))
            criterion(discriminator(fake.detach()), fake_label).backward()
            optimizer_d.step()
            generator.zero_grad()
            criterion(discriminator(fake), real_label).backward()
            optimizer_g.step()
            apart.append((fake.mean(0) - torch.tensor([2.0, 1.0])).norm().item())
    return 1 - min(2.0, sum(apart[-200:]) / 200)


@broken(
    "gradients that are clipped while they are scaled",
    "https://github.com/milesial/Pytorch-UNet/issues/468",
    "clipped_before_unscaling",  # no code says it: what is left of a step is 1 in 65536
    low=0.3,
    high=0.7,
    also=("unmoved_parameters", "unstable_loss_scale"),
)
def while_they_are_scaled(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = images()
    model = BirdNet(10)
    optimizer = sgd(model, 0.1, momentum=0.9)
    grad_scaler = torch.amp.GradScaler("cpu")
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    with watch(model, optimizer):
        for _ in range(4):
            for rows, target in loader:
                loss = F.cross_entropy(model(rows), target)
                optimizer.zero_grad(set_to_none=True)
                grad_scaler.scale(loss).backward()
                if not wrong:
                    grad_scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                grad_scaler.step(optimizer)
                grad_scaler.update()
    return accuracy(xt, yt)(model)


@broken(
    "a trainer that computes a loss and a gradient",
    "https://github.com/microsoft/nni/pull/3339",
    "step_never_called",
    low=0.3,
    high=0.8,
)
def a_loss_and_a_gradient(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = images()
    model = BirdNet(10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)

    def training_step(batch: list[Tensor]) -> Tensor:
        rows, target = batch
        return F.cross_entropy(model(rows), target)

    with watch(model, optimizer):
        for _ in range(6):
            for batch in loader:
                optimizer.zero_grad()
                loss = training_step(batch)
                loss.backward()
                if not wrong:
                    optimizer.step()
    return accuracy(xt, yt)(model)


@broken(
    "a loss of heat maps that is huge from the second epoch on",
    "https://github.com/xingyizhou/CenterNet/issues/928",
    "gradients_not_cleared",
    low=0.3,
    high=0.6,
    also=("loss_spike", "exploding_gradient"),
)
def from_the_second_epoch(wrong: bool, watch: Watch) -> float:
    x, mask = tasks.shapes()
    heat = F.avg_pool2d(mask, 3, stride=1, padding=1)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 1, 1),
    )  # fmt: skip
    optimizer = sgd(model, 0.03, momentum=0.9)
    loader = DataLoader(TensorDataset(x[:450], heat[:450]), batch_size=16, shuffle=True)
    with watch(model, optimizer):
        for _ in range(6):
            for rows, target in loader:
                F.mse_loss(model(rows), target).backward()
                optimizer.step()
                if not wrong:
                    optimizer.zero_grad()
    return r2(x[450:], heat[450:])(model)


@broken(
    "a frozen body whose norms follow the new pictures",
    "https://github.com/kdexd/virtex/issues/16",
    "frozen_norms_move",  # no code says it: running statistics of what is not trained
    low=0.88,
    high=0.92,
    also=("eval_mode_in_training",),
)
def norms_follow(wrong: bool, watch: Watch) -> float:
    (x, y), (xt, yt) = tasks.digits()
    body = nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.BatchNorm1d(32),
        nn.ReLU(),
    )  # fmt: skip
    whole = nn.Sequential(body, nn.Linear(32, 10))
    before = adam(whole, 5e-3)
    for _ in range(8):
        for rows in torch.randperm(600).split(32):
            before.zero_grad()
            F.cross_entropy(whole(x[rows]), y[rows]).backward()
            before.step()
    body.requires_grad_(False)
    model = nn.Sequential(body, nn.Linear(32, 10))
    optimizer = sgd(model[1], 0.02, momentum=0.9)
    model.eval() if not wrong else model.train()
    with watch(model, optimizer):
        for k in range(300):
            rows = 600 + 60 * (k // 30) + torch.randint(60, (2,))
            rows = rows[y[rows].argsort()]
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.eval()
    return accuracy(xt, yt)(model)


class Emoji(nn.Module):
    """Words, a recurrence, and scores that are given back as tensors or as they are."""

    def __init__(self, return_tensor: bool) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(40, 16), nn.LSTM(16, 24, batch_first=True)
        self.output_layer = nn.Linear(24, 2)
        self.return_tensor = return_tensor

    def forward(self, tokens: Tensor) -> Tensor:
        outputs = self.output_layer(self.lstm(self.embed(tokens))[0][:, -1])
        return outputs.data if self.return_tensor else outputs


@broken(
    "scores whose data are given back, and a loss that is made to require a gradient",
    "https://github.com/huggingface/torchMoji/issues/21",
    "no_gradient",
    low=0.7,
    high=0.8,
    also=("loss_not_connected", "unmoved_parameters"),
)
def data_are_given_back(wrong: bool, watch: Watch) -> float:
    tokens = torch.randint(40, (900, 8))
    y = (torch.randn(40)[tokens].sum(1) > 0).long()
    model = Emoji(wrong)
    optimizer = adam(model, 5e-3)
    loader = DataLoader(TensorDataset(tokens[:700], y[:700]), batch_size=32, shuffle=True)
    with watch(model, optimizer):
        for _ in range(12):
            for rows, target in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(rows), target)
                if wrong:
                    loss = loss.clone().requires_grad_(True)
                loss.backward()
                optimizer.step()
    return accuracy(tokens[700:], y[700:])(model)


@broken(
    "a rate of another data set, and a loss in the thousands",
    "https://github.com/sgrvinod/a-PyTorch-Tutorial-to-Object-Detection/issues/38",
    "exploding_gradient",
    low=0.0,
    high=0.6,
    also=("loss_spike",),
)
def in_the_thousands(wrong: bool, watch: Watch) -> float:
    x, mask = tasks.shapes()
    place = torch.arange(8).float()
    boxes = torch.stack([(mask[:, 0].sum(2 - k) * place).sum(1) / 9 for k in (0, 1)], 1)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 32), nn.ReLU(),
        nn.Linear(32, 2),
    )  # fmt: skip
    optimizer = sgd(model, 0.3 if wrong else 2e-3, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(TensorDataset(x[:450], boxes[:450]), batch_size=16, shuffle=True)
    with watch(model, optimizer):
        for _ in range(6):
            for rows, target in loader:
                loss = F.mse_loss(model(rows), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return r2(x[450:], boxes[450:])(model)


class PointNet(nn.Module):
    """What is largest over the points of a cloud."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, cloud: Tensor) -> Tensor:
        return self.head(self.point(cloud).amax(1))


@broken(
    "an iterator that is made anew for every batch",
    "https://github.com/wandb/examples/issues/444",
    "repeated_batch",
    low=0.75,
    high=0.79,
)
def made_anew(wrong: bool, watch: Watch) -> float:
    y = torch.randint(4, (900,))
    stretch = torch.tensor([[1.0, 1, 1], [1.7, 1, 1], [1, 1.7, 1], [1, 1, 1.7]])[y]
    cloud = stretch[:, None] * torch.randn(900, 24, 3) * (0.8 + 0.4 * torch.rand(900, 1, 1))
    model = PointNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    train_loader = DataLoader(TensorDataset(cloud[:700], y[:700]), batch_size=16)
    with watch(model, optimizer):
        for _ in range(8):
            iterator = iter(train_loader)
            for _ in range(len(train_loader)):
                data, target = next(iter(train_loader)) if wrong else next(iterator)
                optimizer.zero_grad()
                F.cross_entropy(model(data), target).backward()
                optimizer.step()
    return accuracy(cloud[700:], y[700:])(model)


@broken(
    "gradients that are zeroed before the step they were made for",
    "https://github.com/sacmehta/EdgeNets/issues/14",
    "no_gradient",
    low=0.3,
    high=0.6,
    also=("unmoved_parameters",),
)
def before_the_step(wrong: bool, watch: Watch) -> float:
    x, mask = tasks.shapes()
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.PReLU(12), nn.Conv2d(12, 2, 1)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=4e-5)
    target = mask[:, 0].long()
    loader = DataLoader(TensorDataset(x[:450], target[:450]), batch_size=16, shuffle=True)
    with watch(model, optimizer):
        for _ in range(6):
            for rows, labels in loader:
                loss = F.cross_entropy(model(rows), labels)
                if not wrong:
                    optimizer.zero_grad()
                loss.backward()
                if wrong:
                    optimizer.zero_grad()
                optimizer.step()
    model.eval()
    found = model(x[450:]).argmax(1)
    return float(2 * (found * target[450:]).sum() / (found.sum() + target[450:].sum() + 1e-6))


class Fusion(nn.Module):
    """Tokens of two pictures with places that are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_emb = nn.Parameter(torch.zeros(1, 32, 24))
        self.patch = nn.Linear(4, 24)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.norm, self.detect = nn.LayerNorm(24), nn.Linear(24, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.patch(tokens) + self.pos_emb
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.detect(self.norm(x).mean(1))


@broken(
    "places that are in none of the three groups of parameters",
    "https://github.com/DocF/multispectral-object-detection/issues/77",
    "missing_from_optimizer",
    low=0.4,
    high=0.7,
    also=("unmoved_parameters",),
)
def none_of_three_groups(wrong: bool, watch: Watch) -> float:
    y = torch.randint(16, (1200,))
    tokens = 0.3 * torch.randn(1200, 32, 4)
    tokens[torch.arange(1200), 2 * y + torch.randint(2, (1200,))] += 1.5
    model = Fusion()
    pg0, pg1, pg2 = [], [], []
    for module in model.modules():
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            pg2.append(module.bias)
        if isinstance(module, nn.LayerNorm):
            pg0.append(module.weight)
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            pg1.append(module.weight)
    pg1.append(model.attention.in_proj_weight)
    pg2.append(model.attention.in_proj_bias)
    if not wrong:
        pg1.append(model.pos_emb)
    optimizer = torch.optim.Adam(pg0, lr=1e-2)
    optimizer.add_param_group({"params": pg1, "weight_decay": 0.0})
    optimizer.add_param_group({"params": pg2})
    loader = DataLoader(TensorDataset(tokens[:1000], y[:1000]), batch_size=32, shuffle=True)
    with watch(model, optimizer):
        for _ in range(8):
            for rows, target in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(rows), target).backward()
                optimizer.step()
    return accuracy(tokens[1000:], y[1000:])(model)
