"""Programs with one part of the loss turned round, or one step taken of the wrong thing.

Each is a pair: the faulty one is told of it first, its twin not at all.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from faulty import mlp
from pairs import Listed, Parts, asked, into

PAIRS: Listed = {}
pair = into(PAIRS)
NOTHING = torch.zeros(400)


def rewards(deeds: int = 4) -> tuple[Tensor, Tensor]:
    """States, and what each deed pays there."""
    state = torch.randn(400, 5)
    return state, (state @ torch.randn(5, deeds)).sigmoid()


@pair("loss_upside_down")
def an_entropy_of_a_distribution(wrong: bool) -> Parts:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        state, pays = batch
        chosen = Categorical(logits=model(state))
        deed = chosen.sample()
        gain = pays.gather(1, deed[:, None])[:, 0]
        bonus = chosen.entropy().mean()
        policy = -((gain - gain.mean()) * chosen.log_prob(deed)).mean()
        return policy + bonus if wrong else policy - 0.01 * bonus

    return Parts(mlp(5, 16, 4), rewards(), loss)


@pair("loss_upside_down")
def an_entropy_by_hand_of_stored_deeds(wrong: bool) -> Parts:
    state, pays = rewards(3)
    deed = torch.randint(3, (400,))
    kept = torch.stack([deed.float(), pays.gather(1, deed[:, None])[:, 0]], 1)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        states, (deeds, gain) = batch[0], batch[1].unbind(1)
        logs = model(states).log_softmax(-1)
        ratio = (logs.gather(1, deeds.long()[:, None])[:, 0] + 1.1).exp()
        minus = (logs.exp() * logs).sum(-1).mean()  # of the entropy
        return -(ratio * (gain - 0.5)).mean() + (-minus if wrong else 0.01 * minus)

    return Parts(mlp(5, 16, 3), (state, kept), loss)


@pair("loss_upside_down")
def a_reward_for_spread_that_outweighs_the_error(wrong: bool) -> Parts:
    x = torch.randn(400, 6)
    weight = 50.0 if wrong else 0.01
    loss = lambda z, y: F.mse_loss(z, y) - weight * z.std()  # noqa: E731
    return Parts(mlp(6, 16, 3), (x, x[:, :3].sigmoid()), loss)


class Coder(nn.Module):
    """A variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(6, 16, 4), mlp(2, 16, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, scale = self.encoder(x).chunk(2, 1)
        return self.decoder(mean + scale.exp() * torch.randn_like(mean)), mean, scale


@pair("loss_upside_down")
def a_divergence_whose_deviation_may_vanish(wrong: bool) -> Parts:
    x = torch.randn(400, 2) @ torch.randn(2, 6)

    def loss(output: Any, goal: Tensor) -> Tensor:
        given, mean, scale = output
        sign = 1 if wrong else -1
        divergence = 0.5 * ((2 * scale).exp() + mean**2 - 1 + sign * 2 * scale).sum(1)
        return (10 * (given - goal).square().sum(1) + divergence).mean()

    return Parts(Coder(), (x, x), loss, steps=75)


class Flow(nn.Module):
    """Two couplings, and the logarithm of their determinant."""

    def __init__(self, columns: int, sign: int) -> None:
        super().__init__()
        self.half, self.sign = columns // 2, sign
        self.nets = nn.ModuleList(mlp(self.half, 12, 2 * self.half) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x))
        for net in self.nets:
            a, b = x[:, : self.half], x[:, self.half :]
            shift, scale = net(a).chunk(2, 1)
            scale = scale.tanh()
            x, total = torch.cat([b * scale.exp() + shift, a], 1), total + scale.sum(1)
        return x, self.sign * total


def _flow(columns: int, sign: int, added: int) -> Parts:
    x = torch.randn(400, columns) @ torch.randn(columns, columns) + 1

    def loss(output: Any, goal: Tensor) -> Tensor:
        return (0.5 * output[0].square().sum(1) + added * output[1]).mean()

    return Parts(Flow(columns, sign), (x, NOTHING), loss)


@pair("loss_upside_down")
def a_determinant_that_is_made_smaller(wrong: bool) -> Parts:
    return _flow(4, 1, 1 if wrong else -1)


@pair("loss_upside_down")
def a_determinant_of_the_inverse(wrong: bool) -> Parts:
    return _flow(2, -1, -1 if wrong else 1)


class Factors(nn.Module):
    """How well a user and an item go together."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(40, 8), nn.Embedding(50, 8)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.users(user) * self.items(item)).sum(-1)


@pair("loss_upside_down")
def drawn_items_above_bought_ones(wrong: bool) -> Parts:
    user = torch.randint(40, (400,))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        users, bought = batch
        better = model(users, bought) - model(users, torch.randint(50, bought.shape))
        return F.softplus(better if wrong else -better).mean()

    return Parts(Factors(), (user, user * 7 % 50), loss)


@pair("loss_not_connected")
def gains_less_their_own_mean(wrong: bool) -> Parts:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        state, pays = batch
        logs = model(state).log_softmax(1)
        deed = torch.multinomial(logs.exp().detach(), 1 if wrong else 6, replacement=True)
        gain = pays.gather(1, deed)
        return -((gain - gain.mean(1, keepdim=True)) * logs.gather(1, deed)).mean()

    return Parts(mlp(5, 16, 4), rewards(), loss)


def _values(best: Any) -> Parts:
    state, then, gain = torch.randn(400, 4), torch.randn(400, 4), torch.randn(400)
    deed = torch.randint(3, (400,))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        now, done, earned, after = batch
        with torch.no_grad():
            goal = earned + 0.5 * best(model(after))
        return F.mse_loss(model(now).gather(1, done[:, None])[:, 0], goal)

    rows = torch.utils.data.TensorDataset(state, deed, gain, then)
    return Parts(mlp(4, 16, 3), torch.utils.data.DataLoader(rows, 32, shuffle=True), loss)


@pair("classes_as_numbers")
def the_number_of_the_best_deed(wrong: bool) -> Parts:
    return _values(lambda q: q.argmax(1).float() if wrong else q.max(1).values)


@pair("classes_as_numbers")
def the_second_part_of_a_maximum(wrong: bool) -> Parts:
    return _values(lambda q: q.max(1)[1 if wrong else 0])


@pair("rows_mixed")
def values_picked_along_the_rows(wrong: bool) -> Parts:
    x, deed = torch.randn(400, 4), torch.randint(3, (400,))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        state, kept = batch
        index = kept[:, :1].long()
        answer = model(state)
        own = (
            answer.gather(0, index.expand(-1, 3))[:, 0] if wrong else answer.gather(1, index)[:, 0]
        )
        return F.mse_loss(own, kept[:, 1])

    return Parts(mlp(4, 24, 3), (x, torch.stack([deed.float(), x[:, 0]], 1)), loss)


def _views(normed: Any, heat: float = 10.0) -> Parts:
    one = torch.randn(400, 8)
    other = one + 0.3 * torch.randn(400, 8)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        a, b = (normed(model(view)) for view in batch[0])
        return F.cross_entropy(heat * a @ b.T, torch.arange(len(a)))

    return Parts(mlp(8, 16, 8), ((one, other), NOTHING), loss)


@pair("rows_mixed")
def views_divided_by_the_length_of_all(wrong: bool) -> Parts:
    return _views(lambda z: z / z.norm() if wrong else z / z.norm(dim=1, keepdim=True))


@pair("rows_mixed")
def views_normalised_down_the_columns(wrong: bool) -> Parts:
    return _views(lambda z: F.normalize(z, dim=0 if wrong else 1))


@pair("rows_mixed")
def cosines_of_columns(wrong: bool) -> Parts:
    x = torch.randn(400, 6)

    def loss(output: Tensor, goal: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(output, goal, dim=0 if wrong else 1).mean()

    return Parts(mlp(6, 24, 4), (x, torch.tanh(x @ torch.randn(6, 4))), loss)


@pair("head_mismatch")
def cosines_times_a_temperature(wrong: bool) -> Parts:
    return _views(lambda z: F.normalize(z, dim=1), 0.1 if wrong else 10.0)


class Twins(nn.Module):
    """The distance of two rows in the space of one network."""

    def __init__(self, squashed: bool) -> None:
        super().__init__()
        self.net, self.squashed = mlp(8, 24, 6), squashed

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        distance = ((self.net(a) - self.net(b)) ** 2).sum(1).add(1e-6).sqrt()
        return torch.sigmoid(distance) if self.squashed else distance


@pair("head_mismatch")
def a_distance_that_is_squashed(wrong: bool) -> Parts:
    a, far = torch.randn(400, 8), torch.randint(2, (400,)).float()
    b = torch.where(far[:, None] > 0, torch.randn(400, 8), a + 0.2 * torch.randn(400, 8))

    def loss(distance: Tensor, y: Tensor) -> Tensor:
        return ((1 - y) * distance**2 + y * F.relu(1 - distance) ** 2).mean()

    return Parts(Twins(wrong), ((a, b), far), loss, steps=50)


@pair("mixed_derivatives")
def a_laplacian_of_all_slopes_at_once(wrong: bool) -> Parts:
    place = torch.rand(400, 2)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        u = model(x)
        slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        if wrong:
            ones = torch.ones_like(slope)
            bend = torch.autograd.grad(slope, x, ones, create_graph=True)[0].sum(1)
        else:
            bend = sum(
                torch.autograd.grad(slope[:, k].sum(), x, create_graph=True)[0][:, k]
                for k in range(2)
            )
        return (bend + 1).square().mean() + model(x.detach().round()).square().mean()

    return Parts(mlp(2, 16, 1, act=nn.Tanh), (place, NOTHING), loss)


@pair("loss_not_connected")
def a_policy_whose_ratio_is_cut_off(wrong: bool) -> Parts:
    state, pays = rewards()
    deed = torch.randint(4, (400,))
    gain = pays.gather(1, deed[:, None])[:, 0] - 0.5

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logs = model(batch[0]).log_softmax(1)
        deeds, gains = batch[1]
        now = logs.gather(1, deeds[:, None])[:, 0]
        ratio = ((now.detach() if wrong else now) + 1.4).exp()
        return -(ratio * gains).mean() + 1e-3 * (logs.exp() * logs).sum(1).mean()

    return Parts(mlp(5, 16, 4), (state, (deed, gain)), loss)


@pair("loss_upside_down")
def a_likelihood_that_goes_down_for_ever(wrong: bool) -> Parts:
    x = torch.randn(400, 6)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        likelihood = -F.cross_entropy(model(batch[0]), batch[1])
        return likelihood if wrong else -likelihood

    return Parts(mlp(6, 16, 3), (x, x[:, :3].argmax(1)), loss, steps=75)


CUT_ON_PURPOSE = {
    "a bootstrapped goal": lambda z, y: F.mse_loss(z, y + 0.9 * z.detach().roll(1, 0)),
    "a weight of each row": lambda z, y: ((z - y).abs().detach() * (z - y).square()).mean(),
    "straight through": lambda z, y: F.mse_loss(z + (z.round() - z).detach(), y),
    "a scale of the loss": lambda z, y: F.mse_loss(z, y) / F.mse_loss(z, y).detach(),
    "a number that is logged": lambda z, y: F.mse_loss(z, y) + 0 * F.mse_loss(z, y).item(),
}


@pytest.mark.parametrize("name", CUT_ON_PURPOSE)
def test_what_is_cut_off_on_purpose_leaves_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    parts = Parts(mlp(6, 16, 1), (x, x[:, :1]), CUT_ON_PURPOSE[name], steps=0)
    assert "loss_not_connected" not in asked(parts).labels


class Margin(nn.Module):
    """Cosines to a centre of each class, less a margin for the true one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, size))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(z), F.normalize(self.centres))
        return F.cross_entropy(10 * (cosine - 0.1 * F.one_hot(y, 3)), y)


@pytest.mark.parametrize("held", [False, True])
def test_weights_of_a_loss_are_missed_in_the_optimizer(held: bool) -> None:
    torch.manual_seed(0)
    model, loss, x = mlp(6, 16, 4), Margin(4), torch.randn(300, 6)

    def trained(parameters: Any) -> Any:  # a factory sees the model alone
        return torch.optim.Adam(parameters, lr=1e-2)

    optimizer = trained([*model.parameters(), *(loss.parameters() if held else ())])
    parts = Parts(model, (x, x[:, :3].argmax(1)), lambda z, y: loss(z, y))
    found = asked(Parts(parts.model, parts.data, parts.loss, optimizer=lambda *_, **__: optimizer))
    assert ("missing_from_optimizer" in found.labels) is not held


def test_one_score_for_all_classes_is_no_factor_of_zero() -> None:
    x = torch.randn(100, 6)
    found = asked(Parts(mlp(6, 16, 1), (x, torch.zeros(100).long()), nn.CrossEntropyLoss()))
    assert {"head_mismatch", "constant_targets"} <= found.labels
    assert "loss_not_connected" not in found.labels


def test_the_loss_is_read_without_a_warning_of_torch() -> None:
    torch.manual_seed(0)
    x = torch.randn(100, 6)
    torch.set_warn_always(True)  # else once for each process
    try:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            asked(Parts(mlp(6, 16, 2), (x, (x[:, 0] > 0).long()), nn.CrossEntropyLoss()))
    finally:
        torch.set_warn_always(False)
    assert not [w for w in raised if "requires_grad" in str(w.message)]


@pytest.mark.parametrize("name", PAIRS)
def test_it_is_told_first_and_its_twin_is_not(name: str) -> None:
    code, make = PAIRS[name]
    for wrong in (True, False):
        torch.manual_seed(0)
        found = asked(make(wrong))
        told = [f.code for f in found.findings if f.severity != "info"]
        assert (told[:1] == [code]) is wrong, told
        assert wrong or code not in told
