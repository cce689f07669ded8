"""Codes, noise, densities and directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from programs.form import Parts, Program, adam, r2
from programs.frozen import tasks

PROGRAMS: list[Program] = []
faulty = tasks.into(PROGRAMS)


@faulty(
    "a proximity of cosines that lost its minus",
    "https://github.com/tensorflow/tensorflow/pull/32186",
    "loss_upside_down",
    low=0.0,
    high=0.6,
)
def lost_its_minus(wrong: bool) -> Parts:
    x = torch.randn(800, 10)
    direction = torch.tanh(x @ torch.randn(10, 16) / 2) + 0.2 * torch.randn(800, 16)
    (x, y), (xt, yt) = tasks.split(x, direction)
    model = nn.Sequential(nn.Linear(10, 48), nn.ReLU(), nn.Linear(48, 16))

    def cosine_proximity(output: Tensor, target: Tensor) -> Tensor:
        near = (F.normalize(output, dim=1) * F.normalize(target, dim=1)).sum(1)
        return near.mean() if wrong else -near.mean()

    def score(m: nn.Module) -> float:
        return float(F.cosine_similarity(m(xt), yt).mean())

    return Parts(model, (x, y), cosine_proximity, adam(model, 3e-3), score, steps=300)


class VQVAE(nn.Module):
    """An encoder, the nearest of a book of codes, and a decoder."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        self.codebook = nn.Embedding(32, 8)
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))
        nn.init.uniform_(self.codebook.weight, -1 / 32, 1 / 32)
        self.late = late

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs = self.encoder(x)
        quantize = self.codebook(torch.cdist(inputs, self.codebook.weight).argmin(1))
        if self.late:
            quantize = inputs + (quantize - inputs).detach()
        encoding_loss = (quantize.detach() - inputs).square().mean()
        commit_loss = (quantize - inputs.detach()).square().mean()
        quantize = inputs + (quantize - inputs).detach()
        return self.decoder(quantize), encoding_loss, commit_loss


@faulty(
    "codes whose loss is taken behind the straight-through estimate",
    "https://github.com/andylolu2/jax-vqvae-gpt/issues/2",
    "detached",
    low=0.2,
    high=0.4,
    also=("unused_parameters", "loss_not_connected"),
)
def behind_the_estimate(wrong: bool) -> Parts:
    (x, _), (xt, _) = tasks.digits()
    model = VQVAE(late=wrong)

    def loss(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
        made, encoding_loss, commit_loss = output
        return F.mse_loss(made, target) + 0.25 * encoding_loss + commit_loss

    def score(m: nn.Module) -> float:
        return r2(xt, xt)(_First(m))

    return Parts(model, (x, x), loss, adam(model, 3e-3), score, steps=600)


class _First(nn.Module):
    """The first of what a model gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[0]


class Denoiser(nn.Module):
    """The noise in points, at a time between 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([x, t, (3 * t).sin()], 1))


@faulty(
    "a schedule of noise that ends while much of the design is left",
    "https://github.com/IDEALLab/EngiOpt/pull/67",
    "noise_schedule_ends_early",  # no code says it: samples start from what training never saw
    low=0.6,
    high=0.8,
)
def ends_early(wrong: bool) -> Parts:
    centre = torch.tensor([6.0, -5.0])
    x = centre + 0.3 * torch.randn(1000, 2)
    steps = 50
    betas = torch.linspace(1e-4, 0.02 if wrong else 0.3, steps)
    alpha_bar = torch.cumprod(1 - betas, 0)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x0 = batch[0]
        t = torch.randint(steps, (len(x0),))
        noise, bar = torch.randn_like(x0), alpha_bar[t][:, None]
        noisy = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
        return F.mse_loss(model(noisy, t[:, None] / steps), noise)

    def score(m: nn.Module) -> float:  # share of the samples that lie where the designs do
        x = torch.randn(400, 2)
        for t in reversed(range(steps)):
            noise = m(x, torch.full((400, 1), t / steps))
            x = (x - betas[t] / (1 - alpha_bar[t]).sqrt() * noise) / (1 - betas[t]).sqrt()
            x = x + betas[t].sqrt() * torch.randn_like(x) * (t > 0)
        return float(((x - centre).norm(dim=1) < 1.0).float().mean())

    model = Denoiser()
    loader = DataLoader(TensorDataset(x, x), batch_size=64, shuffle=True)
    return Parts(model, loader, loss, adam(model, 3e-3), score, batch_size=64, steps=500)


class Coupling(nn.Module):
    """Half of the columns scale and shift the other half, and so back."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det_z = torch.zeros(len(x))
        for net in self.nets:
            kept, changed = x[:, :1], x[:, 1:]
            log_scale, shift = net(kept).chunk(2, 1)
            x = torch.cat([changed * log_scale.exp() + shift, kept], 1)
            log_det_z = log_det_z + log_scale[:, 0]
        return x, log_det_z


@faulty(
    "determinants that are summed over the batch",
    "https://github.com/wohlert/semi-supervised-pytorch/issues/21",
    "loss_mixes_rows",
    low=0.0,
    high=0.2,
    also=("loss_is_a_sum", "exploding_gradient"),
)
def summed_over_the_batch(wrong: bool) -> Parts:
    angle = 3.14 * torch.rand(1200, 1)
    x = torch.cat([2 * angle.cos(), 2 * angle.sin() - 1], 1) + 0.15 * torch.randn(1200, 2)
    (x, xt), flow = (x[:900], x[900:]), Coupling()

    def log_gaussian(z: Tensor) -> Tensor:
        return -0.5 * z.square().sum(1) - math.log(2 * math.pi)

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        z, log_det_z = output
        return -(log_gaussian(z) + (log_det_z.sum() if wrong else log_det_z)).mean()

    plain = log_gaussian((xt - x.mean(0)) / x.std(0)).mean() - x.std(0).log().sum()

    def score(m: nn.Module) -> float:  # how much likelier than under one Gaussian, up to 1
        z, log_det_z = m(xt)
        return float(torch.tanh((log_gaussian(z) + log_det_z).mean() - plain).nan_to_num(-1.0))

    return Parts(flow, (x, x), loss, adam(flow, 5e-3), score, batch_size=64, steps=500)
