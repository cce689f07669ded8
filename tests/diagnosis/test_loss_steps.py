"""What stands between the answers and the loss: one operation at fault, and what is meant."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from faulty import mlp
from tikhon.diagnosis import Diagnosis, diagnose
from tikhon.diagnosis.reference import (
    behind,
    best_constant,
    is_constant_off_mean,
    shallow_loss,
    unbounded_loss,
)

Loss = Callable[..., Tensor]


def asked(loss: Loss, *, inputs: Any = None, target: Any = None, outputs: int = 1) -> Diagnosis:
    torch.manual_seed(0)
    x = torch.randn(120, 5) if inputs is None else inputs
    y = x[:, :1] - x[:, 1:2] if target is None else target(x)
    return diagnose(mlp(x.shape[1], 16, outputs, act=nn.Tanh), (x, y), loss)


def row_and_column(model: nn.Module, batch: Any) -> Tensor:
    state, gain = batch
    chosen = torch.distributions.Categorical(logits=model(state)).log_prob(gain[:, 0].gt(0).long())
    ratio = (chosen - chosen.detach()).exp()
    return -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()


def likelihood_of_a_row(model: nn.Module, batch: Any) -> Tensor:
    actions = batch[1][:, 0]
    return -torch.distributions.Normal(model(batch[0])[:, :1], 1.0).log_prob(actions).mean()


def weights_in_a_row(output: Tensor, target: Tensor) -> Tensor:
    weight = 1.0 + (target[:, 0] > 0)
    return (weight * F.mse_loss(output, target, reduction="none")).mean()


def a_column_that_was_written(output: Tensor, target: Tensor) -> Tensor:
    return (output[:, 0] - target[:, 0].unsqueeze(1)).square().mean()


def a_kept_axis(model: nn.Module, batch: Any) -> Tensor:
    spread = (model(batch[0]) - batch[1]).square().mean(1, keepdim=True)
    return (spread * batch[1][:, 0].abs()).mean()


@pytest.mark.parametrize(
    ("loss", "outputs"),
    [
        (row_and_column, 2),
        (likelihood_of_a_row, 1),
        (weights_in_a_row, 1),
        (a_column_that_was_written, 1),
        (a_kept_axis, 1),
    ],
)
def test_rows_that_meet_rows_by_accident_are_named(loss: Loss, outputs: int) -> None:
    found = asked(loss, outputs=outputs)
    assert found.findings[0].code == "broadcast_loss", str(found)
    assert "test_loss_steps.py" in found.findings[0].where[0]
    assert "they broadcast" in found.findings[0].why


def ranked(output: Tensor, target: Tensor) -> Tensor:
    score, y = output[:, 0], target[:, 0]
    return F.softplus(-(score[:, None] - score) * (y[:, None] - y).sign()).mean()


def partial_likelihood(output: Tensor, target: Tensor) -> Tensor:
    time, risk = target[:, 0], output.reshape(-1)
    at_risk = (time >= time[:, None]).float()
    return -(risk - (risk.exp() * at_risk).sum(1).log()).mean()


def alike(model: nn.Module, batch: Any) -> Tensor:
    z = F.normalize(model(batch[0]), dim=1)
    kind = batch[1][:, :1] > 0
    same = (kind == kind.T).float().fill_diagonal_(0)
    scores = z @ z.T / 0.5 - 1e9 * torch.eye(len(z))
    return -(scores.log_softmax(1) * same).sum(1).div(same.sum(1).clamp(min=1)).mean()


def distances_by_hand(model: nn.Module, batch: Any) -> Tensor:
    z = model(batch[0])
    size = z.square().sum(1, keepdim=True)
    apart = size + z.square().sum(1) - 2 * z @ z.T
    return (apart - torch.cdist(batch[1], batch[1])).square().mean()


def kernels(model: nn.Module, batch: Any) -> Tensor:
    a, b = model(batch[0]), batch[1]
    kernel = lambda u, v: (-(u[:, None] - v).square().sum(-1)).exp().mean()  # noqa: E731
    return kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)


def nearest(output: Tensor, target: Tensor) -> Tensor:
    return (output[:, None] - target).square().sum(-1).min(1).values.mean()


@pytest.mark.parametrize(
    "loss", [ranked, partial_likelihood, alike, distances_by_hand, kernels, nearest]
)
def test_pairs_that_are_meant_are_silent(loss: Loss) -> None:
    assert "broadcast_loss" not in {f.code for f in asked(loss).findings}


def deaf(model: nn.Module, batch: Any) -> Tensor:
    policy = torch.distributions.Normal(model(batch[0]), 1.0)
    action = policy.sample()
    return ((action - batch[1]).square() + 0.01 * policy.log_prob(action)).mean()


def of_scores(model: nn.Module, batch: Any) -> Tensor:
    policy = torch.distributions.Normal(model(batch[0]), 1.0)
    action = policy.sample()
    gain = -(action - batch[1]).square()
    return -(policy.log_prob(action) * gain).mean() - 0.01 * policy.entropy().mean()


def of_a_critic(model: nn.Module, batch: Any) -> Tensor:
    worth = model(batch[0])
    action = torch.distributions.Normal(worth, 1.0).sample()
    return (worth + (action - batch[1]).square()).square().mean()


def test_a_draw_without_a_gradient_is_named_and_an_estimator_by_scores_is_not() -> None:
    found = asked(deaf)
    assert found.findings[0].code == "detached", str(found)
    assert found.findings[0].fix == "rsample() instead of sample()"
    for loss in (of_scores, of_a_critic):
        assert "detached" not in {f.code for f in asked(loss).findings}


def transitions() -> tuple[Any, Tensor]:
    """States and the states that follow; actions, rewards and ends beside each other."""
    torch.manual_seed(0)
    now, then = torch.randn(2, 120, 5)
    return (now, then), torch.stack([now[:, 0].gt(0).float(), now[:, 1], then[:, 2].gt(1)], 1)


def q_learning(cut: Loss) -> Loss:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        (now, then), seen = batch
        chosen = model(now).gather(1, seen[:, :1].long())
        best = model(then).max(1, keepdim=True).values
        return F.mse_loss(chosen, seen[:, 1:2] + 0.9 * cut(best))

    return loss


def values_to_the_end(cut: Loss) -> Loss:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        (now, then), seen = batch
        goal = seen[:, 1] + (1 - seen[:, 2]) * torch.tensor(0.95) * cut(model(then)[:, 0])
        return F.smooth_l1_loss(model(now)[:, 0], goal)

    return loss


def advantage(cut: Loss) -> Loss:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        (now, then), seen = batch
        worth, after = model(now), model(then)
        gain = seen[:, 1] + 0.99 * cut(after[:, 0]) - worth[:, 0]
        chance = torch.distributions.Categorical(logits=worth).log_prob(seen[:, 0].long())
        return gain.square().mean() - (chance * gain.detach()).mean()

    return loss


@pytest.mark.parametrize("loss", [q_learning, values_to_the_end, advantage])
def test_a_goal_with_a_gradient_is_named_and_one_without_is_not(loss: Any) -> None:
    (code, inputs, target), model = ("target_not_detached", *transitions()), mlp(5, 16, 2)
    found = diagnose(model, (inputs, target), loss(lambda value: value))
    assert found.findings[0].code == code, str(found)
    assert "test_loss_steps.py" in found.findings[0].where[0]
    assert code not in diagnose(model, (inputs, target), loss(Tensor.detach)).labels


def two_views(model: nn.Module, batch: Any) -> Tensor:
    (one, other), _ = batch
    return F.mse_loss(model(one), 0.5 * model(other))


def heights_from_their_differences(model: nn.Module, batch: Any) -> Tensor:
    (low, high), seen = batch
    return F.mse_loss(model(high)[:, :1], seen[:, 1:2] + model(low)[:, :1])


def heat_with_a_source(model: nn.Module, batch: Any) -> Tensor:
    (at, edge), seen = batch
    at = at.clone().requires_grad_()
    value = model(at)[:, :1]
    first = torch.autograd.grad(value.sum(), at, create_graph=True)[0]
    second = torch.autograd.grad(first[:, 0].sum(), at, create_graph=True)[0][:, :1]
    return F.mse_loss(first[:, 1:2], 0.1 * second + seen[:, 1:2]) + model(edge).square().mean()


def a_step_of_euler(model: nn.Module, batch: Any) -> Tensor:
    (now, then), _ = batch
    return F.mse_loss(now[:, :2] + 0.1 * model(now), then[:, :2])


def softened(model: nn.Module, batch: Any) -> Tensor:
    (now, then), seen = batch
    goal = 0.9 * seen[:, :2] + 0.1 * model(then).detach()
    return F.mse_loss(model(now), goal) + 0.1 * F.mse_loss(model(now), model(then))


@pytest.mark.parametrize(
    "loss",
    [two_views, heights_from_their_differences, heat_with_a_source, a_step_of_euler, softened],
)
def test_other_losses_of_two_passes_are_no_goals(loss: Loss) -> None:
    inputs, target = transitions()
    found = diagnose(mlp(5, 16, 2, act=nn.Tanh), (inputs, target), loss)
    assert "target_not_detached" not in found.labels, str(found)


def masked(wrong: bool) -> Loss:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        kept = target.flatten() > 0
        return (output - target)[kept.long() if wrong else kept].square().mean()

    return loss


def hardest(wrong: bool) -> Loss:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        z = model(batch[0])
        apart = torch.cdist(z, z + 0.1)
        far = -torch.inf if wrong else torch.inf
        near = apart.masked_fill(torch.eye(len(z)) > 0, far)
        other = (1 - near).max(1).values if wrong else -near.min(1).values
        return F.relu(apart.diagonal() - other if wrong else apart.diagonal() + other + 9).mean()

    return loss


def bent(wrong: bool) -> Loss:
    unit = torch.relu if wrong else torch.sin

    def slope(value: Tensor, at: Tensor) -> Tensor:
        return torch.autograd.grad(value.sum(), at, create_graph=True)[0]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        at = batch[0].clone().requires_grad_()
        value = (unit(at @ model[0].weight.T + model[0].bias) @ model[-1].weight.T)[:, 0]
        second = slope(slope(value, at)[:, 0], at)[:, :1]
        return (second - batch[1]).square().mean() + value.square().mean()

    return loss


def given_back(wrong: bool) -> Loss:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen = batch[0] + torch.randn_like(batch[0])
        return F.mse_loss(model(seen), seen if wrong else batch[0])

    return loss


@pytest.mark.parametrize(
    ("code", "loss", "outputs"),
    [
        ("ignored_rows", masked, 1),
        ("loss_not_connected", hardest, 3),
        ("no_nonlinearity", bent, 1),
        ("target_among_inputs", given_back, 5),
    ],
)
def test_one_operation_at_fault_is_named(code: str, loss: Any, outputs: int) -> None:
    found = asked(loss(True), outputs=outputs)
    assert found.findings[0].code == code, str(found)
    assert code not in {f.code for f in asked(loss(False), outputs=outputs).findings}


def test_a_bottleneck_may_be_asked_for_its_noisy_input() -> None:
    torch.manual_seed(0)
    x = torch.randn(120, 6)
    model = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 6))
    found = diagnose(model, (x, x), given_back(True))
    assert "target_among_inputs" not in {f.code for f in found.findings}


def classes(x: Tensor) -> Tensor:
    return x[:, :3].argmax(1)


def signs(x: Tensor) -> Tensor:
    return (x[:, 0] > 0).float()


def shares(x: Tensor) -> Tensor:
    return x[:, :3].softmax(1)


DOMAINS: dict[str, tuple[Loss, Loss, Callable[[Tensor], Tensor], str]] = {
    "likelihood": (
        lambda m, b: F.nll_loss(m(b[0]), b[1]),
        lambda m, b: F.nll_loss(m(b[0]).log_softmax(1), b[1]),
        classes,
        "missing_log",
    ),
    "alignment": (
        lambda m, b: F.ctc_loss(m(b[0])[None].expand(4, -1, -1), b[1][:, None], [4] * len(b[1]),
                                [1] * len(b[1])),
        lambda m, b: F.ctc_loss(m(b[0]).log_softmax(1)[None].expand(4, -1, -1), b[1][:, None],
                                [4] * len(b[1]), [1] * len(b[1])),
        lambda x: 1 + (x[:, 0] > 0).long(),
        "missing_log",
    ),
    "divergence of scores": (
        lambda m, b: F.kl_div(m(b[0]), b[1], reduction="batchmean"),
        lambda m, b: F.kl_div(m(b[0]).log_softmax(1), b[1], reduction="batchmean"),
        shares,
        "missing_log",
    ),
    "divergence from logarithms": (
        lambda m, b: F.kl_div(m(b[0]).log_softmax(1), b[1].log(), reduction="batchmean"),
        lambda m, b: F.kl_div(m(b[0]).log_softmax(1), b[1].log(), log_target=True,
                              reduction="batchmean"),
        shares,
        "target_out_of_range",
    ),
    "cosines": (
        lambda m, b: F.cosine_embedding_loss(m(b[0]), b[0][:, :3], b[1]),
        lambda m, b: F.cosine_embedding_loss(m(b[0]), b[0][:, :3], 2 * b[1] - 1),
        signs,
        "target_out_of_range",
    ),
    "ranks": (
        lambda m, b: F.margin_ranking_loss(m(b[0])[:, 0], m(b[0])[:, 1], b[1]),
        lambda m, b: F.margin_ranking_loss(m(b[0])[:, 0], m(b[0])[:, 1], 2 * b[1] - 1),
        signs,
        "target_out_of_range",
    ),
    "several classes": (
        lambda m, b: F.multilabel_margin_loss(m(b[0]), b[1]),
        lambda m, b: F.multilabel_soft_margin_loss(m(b[0]), b[1]),
        lambda x: (x[:, :3] > 0).long(),
        "target_out_of_range",
    ),
    "counts": (
        lambda m, b: F.poisson_nll_loss(m(b[0])[:, 0], b[1] - 2),
        lambda m, b: F.poisson_nll_loss(m(b[0])[:, 0], b[1]),
        signs,
        "target_out_of_range",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DOMAINS)
def test_arguments_outside_of_a_loss_s_domain_are_named(name: str) -> None:
    wrong, right, target, code = DOMAINS[name]
    broken = {"model": wrong, "batch": right}
    for way, loss in broken.items():
        whole = lambda model, batch, loss=loss: loss(model, batch)  # noqa: E731
        codes = [f.code for f in asked(whole, target=target, outputs=3).findings]
        assert (code in codes) == (way == "model"), (name, way, codes)


def quantile(level: float, *, upside_down: bool = False) -> Loss:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        over = target - output
        low = (1 - level) * over if upside_down else (level - 1) * over
        return torch.where(over > 0, level * over, low).mean()

    return loss


def test_a_loss_without_lower_end_is_named() -> None:
    found = asked(quantile(0.6, upside_down=True))
    assert found.findings[0].code == "loss_upside_down", str(found)
    assert found.findings[0].evidence["loss"] < -1e4
    assert "loss_upside_down" not in asked(quantile(0.6)).labels


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9])
def test_the_best_constant_of_a_quantile_loss_is_the_quantile(level: float) -> None:
    torch.manual_seed(0)
    y = torch.randn(400, 1).exp()
    value, answer = best_constant(torch.zeros(400, 1), y, quantile(level))
    exact = float(quantile(level)(torch.quantile(y, level).expand(400, 1), y))
    assert value == pytest.approx(exact, rel=0.03)
    assert float(answer) == pytest.approx(float(torch.quantile(y, level)), rel=0.2)
    assert is_constant_off_mean(answer, y, 400) == (
        level != 0.5 or float(y.mean() - y.median()) > 0.3
    )


def test_a_shallow_model_is_fitted_by_the_user_s_own_loss() -> None:
    torch.manual_seed(0)
    x = torch.rand(800, 3)
    y = 2 * x[:, :1] + (0.2 + x[:, 1:2]) * torch.randn(800, 1)
    loss = quantile(0.9)
    constant, answer = best_constant(torch.zeros(800, 1), y, loss)
    found = shallow_loss((x, y), answer, loss)
    true = 2 * x[:, :1] + 1.2816 * (0.2 + x[:, 1:2])  # the quantile that the data were drawn with
    assert float(loss(true, y)) * 0.9 < found["shallow_loss"] < 0.9 * constant
    assert found["constant_loss"] == pytest.approx(constant, rel=0.15)


@pytest.mark.parametrize(
    ("loss", "endless"),
    [
        (F.mse_loss, False),
        (F.l1_loss, False),
        (quantile(0.9), False),
        (quantile(0.9, upside_down=True), True),
        (lambda o, t: (o * t).mean(), True),
        (lambda o, t: (o.exp() - t.abs() * o).mean(), False),
    ],
)
def test_what_falls_far_from_all_targets_has_no_end(loss: Loss, endless: bool) -> None:
    torch.manual_seed(0)
    y = torch.randn(50, 1) + 0.5
    assert (unbounded_loss(torch.zeros(50, 1), y, loss) < -1e3) == endless
    assert unbounded_loss(torch.zeros(50, 1), y, behind(torch.tanh, loss)) == 0


def test_a_quantile_that_is_learned_is_no_underfitting() -> None:
    torch.manual_seed(0)
    x = torch.rand(600, 3)
    y = (2 * x[:, 0] + (0.2 + x[:, 1]) * torch.randn(600))[:, None]
    model = mlp(3, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    found = diagnose(model, (x, y), quantile(0.9), optimizer=optimizer, steps=150, batch_size=32)
    assert found.ok, str(found)
    still = torch.optim.Adam(model.parameters(), lr=3e-5)
    found = diagnose(model, (x, y), quantile(0.9), optimizer=still, steps=100, batch_size=32)
    assert not found.ok, str(found)


def test_a_mean_over_what_is_masked_shortens_plain_steps() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 8)
    target = torch.stack([x.cumsum(1), (torch.rand(200, 8) < 0.04).float()], 1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        error = (output - target[:, 0]).square() * target[:, 1]
        return error.mean()

    model = mlp(8, 16, 8)
    for kind, named in ((torch.optim.SGD, True), (torch.optim.Adam, False)):
        optimizer = kind(model.parameters(), lr=0.02)
        found = diagnose(model, (x, target), loss, optimizer=optimizer, steps=30)
        shares = [f.evidence["masked"] for f in found.findings if "masked" in f.evidence]
        assert bool(shares) == named, str(found)
        assert all(math.isclose(s, 0.96, abs_tol=0.03) for s in shares)


def compared(wrong: bool) -> Loss:
    def loss(distance: Tensor, same: Tensor) -> Tensor:
        near, far = distance.square(), (1 - distance).clamp(min=0).square()
        near, far = (far, near) if wrong else (near, far)
        return (same * near + (1 - same) * far).mean()

    return loss


class Compared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(8, 16, 4)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return F.pairwise_distance(self.body(first), self.body(second))


@pytest.mark.parametrize("swapped", [False, True])
def test_pairs_that_are_pushed_the_wrong_way_are_named(swapped: bool) -> None:
    torch.manual_seed(0)
    kind, other = torch.randint(5, (2, 300))
    centres = 2 * torch.randn(5, 8)
    x = tuple(centres[k] + 0.5 * torch.randn(300, 8) for k in (kind, other))
    label = (kind == other).float()
    label = 1 - label if swapped else label  # of pairs that differ
    for wrong in (False, True):
        found = diagnose(Compared(), (x, label), compared(wrong != swapped))
        codes = [f.code for f in found.findings]
        assert (codes[:1] == ["loss_upside_down"]) == wrong, str(found)


class Chosen(nn.Module):
    """Experts of which a gate picks the best one, or weighs two."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(5, 3), nn.Linear(5, 3)
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        score, index = self.gate(x).topk(self.count, 1)
        return (score.softmax(1) * self.experts(x).gather(1, index)).sum(1, keepdim=True)


def test_a_softmax_of_one_number_inside_of_a_network_is_named() -> None:
    torch.manual_seed(0)
    x = torch.randn(120, 5)
    for count in (1, 2):
        found = diagnose(Chosen(count), (x, x[:, :1]), nn.MSELoss())
        assert ("head_mismatch" in found.labels) == (count == 1), str(found)


class Weighed(nn.Module):
    def __init__(self, free: bool) -> None:
        super().__init__()
        self.net, self.weight, self.free = mlp(5, 8, 1), nn.Parameter(torch.ones(())), free

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_logarithm_of_a_free_parameter_is_named() -> None:
    def loss(model: Weighed, batch: Any) -> Tensor:
        error, w = F.mse_loss(model(batch[0]), batch[1]), model.weight
        return error / w**2 + w.log() if model.free else error * (-2 * w).exp() + w

    torch.manual_seed(0)
    x = torch.randn(120, 5)
    for free in (True, False):
        found = diagnose(Weighed(free), (x, x[:, :1]), loss)
        assert ("undefined_operation" in found.labels) == free, str(found)


def test_a_mask_of_queries_in_the_place_of_keys_is_named() -> None:
    class Reader(nn.Module):
        def __init__(self, queries: bool) -> None:
            super().__init__()
            self.words, self.qkv = nn.Embedding(9, 8), nn.Linear(8, 24)
            self.head, self.queries = nn.Linear(8, 2), queries

        def forward(self, tokens: Tensor) -> Tensor:
            q, k, v = self.qkv(self.words(tokens)).chunk(3, -1)
            real = tokens > 0
            mask = real[:, :, None] if self.queries else real[:, None]
            scores = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(~mask, -1e9)
            return self.head((scores.softmax(-1) @ v)[:, 0])

    torch.manual_seed(0)
    tokens = torch.randint(1, 9, (150, 10))
    tokens[torch.arange(10) >= torch.randint(3, 11, (150, 1))] = 0
    for queries in (True, False):
        found = diagnose(Reader(queries), (tokens, tokens[:, 0] % 2), nn.CrossEntropyLoss())
        assert ("padding_seen" in found.labels) == queries, str(found)
        assert not queries or "padding queries" in found.findings[0].why


def test_a_layer_that_scores_is_not_called_narrow() -> None:
    class Pooled(nn.Module):
        def __init__(self, through: bool) -> None:
            super().__init__()
            self.up, self.ask = nn.Linear(6, 16), nn.Linear(16, 1)
            self.head, self.through = nn.Linear(1 if through else 16, 8), through

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.up(x))
            score = self.ask(hidden)
            return self.head(score if self.through else (score.softmax(1) * hidden).mean(1))

    torch.manual_seed(0)
    x = torch.randn(120, 4, 6)
    for through in (True, False):
        model, data = Pooled(through), (x[:, 0] if through else x)
        found = diagnose(model, (data, torch.randint(8, (120,))), nn.CrossEntropyLoss())
        assert found.record.wiring["bypassed"] == ([] if through else ["ask"])


class Stored(torch.utils.data.Dataset):
    def __init__(self, x: Tensor, y: Tensor, changed: bool) -> None:
        self.x, self.y, self.changed = x.clone(), y, changed

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        x = self.x[row]
        return (x.div_(4) if self.changed else x / 4), self.y[row]


def test_rows_that_change_whenever_they_are_read_are_named() -> None:
    torch.manual_seed(0)
    x = torch.randn(96, 5)
    for changed in (True, False):
        rows = Stored(4 * x, x[:, :3].argmax(1), changed)
        loader = torch.utils.data.DataLoader(rows, batch_size=32, shuffle=True)
        model = mlp(5, 8, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = diagnose(model, loader, nn.CrossEntropyLoss(), optimizer=optimizer, steps=30)
        assert ("data_changed_in_place" in found.labels) == changed, str(found)


@pytest.mark.parametrize(("ends", "turn"), [((0, 2 * math.pi), True), ((-math.pi, 2), False)])
def test_angles_whose_ends_meet_are_named(ends: tuple[float, float], turn: bool) -> None:
    torch.manual_seed(0)
    angle = ends[0] + (ends[1] - ends[0]) * torch.rand(600)
    x = torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(600, 2)
    found = diagnose(mlp(2, 8, 1), (x, angle[:, None]), nn.L1Loss())
    assert ("angle_wraps" in found.labels) == turn, str(found)


def test_the_nearest_rows_are_a_yardstick_for_places() -> None:
    from tikhon.diagnosis.reference import shallow_skill

    torch.manual_seed(0)
    place = 2 * torch.rand(1500, 2) - 1
    waves = (12 * place[:, :1]).sin() * (12 * place[:, 1:]).cos()
    assert shallow_skill((place, waves))["shallow"] > 0.7
    assert shallow_skill((place, torch.randn(1500, 1)))["shallow"] < 0.05


def several(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0])[:, :1], batch[0][:, :3])


def one(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0])[:, :1], batch[0][:, :3].sum(1, keepdim=True))


def weighed_late(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return (F.mse_loss(model(x)[:, :1], y) * x[:, 3].exp()).mean()


def weighed(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    each = F.mse_loss(model(x), y, reduction="none")[:, 0]
    return (each * x[:, 3].exp()).mean() * 0.5 + each.mean() * y.abs().mean()


def gain_of_a_mean(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    chosen = torch.distributions.Categorical(logits=model(x)).log_prob((x[:, 0] > 0).long())
    return -(chosen.mean() * y[:, 0]).sum()


def scaled_by_itself(output: Tensor, target: Tensor) -> Tensor:
    scale = (output * target).sum() / target.square().sum()
    return (output - scale * target).square().mean()


def one_partner(model: nn.Module, batch: Any) -> Tensor:
    z = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(z @ z.T, torch.zeros(len(z), dtype=torch.long))


def own_partner(model: nn.Module, batch: Any) -> Tensor:
    z = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


@pytest.mark.parametrize(
    ("code", "wrong", "right"),
    [
        ("broadcast_loss", several, one),
        ("broadcast_loss", weighed_late, weighed),
        ("broadcast_loss", gain_of_a_mean, scaled_by_itself),
        ("constant_targets", one_partner, own_partner),
    ],
)
def test_what_belongs_to_a_row_must_meet_it(code: str, wrong: Loss, right: Loss) -> None:
    found = asked(wrong, outputs=3)
    assert found.findings[0].code == code, str(found)
    outputs = 1 if right in (weighed, scaled_by_itself) else 3
    assert code not in {f.code for f in asked(right, outputs=outputs).findings}


def test_an_overlap_of_scores_without_a_sigmoid_is_named() -> None:
    def overlap(output: Tensor, target: Tensor) -> Tensor:
        return 1 - 2 * (output * target).sum() / (output.sum() + target.sum() + 1e-6)

    torch.manual_seed(0)
    x = torch.randn(120, 5)
    y = (x > 0).float()
    bare, bounded = mlp(5, 16, 5), nn.Sequential(*mlp(5, 16, 5), nn.Sigmoid())
    found = diagnose(bare, (x, y), overlap)
    assert found.findings[0].code == "head_mismatch", str(found)
    for model, loss in ((bounded, overlap), (bare, nn.BCEWithLogitsLoss()), (bare, F.mse_loss)):
        assert "head_mismatch" not in diagnose(model, (x, y), loss).labels


def test_a_divergence_with_the_wrong_sign_falls_ever_faster() -> None:
    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ends, self.back = mlp(6, 16, 4), mlp(2, 16, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean, spread = self.ends(x).chunk(2, 1)
            code = mean + (0.5 * spread).exp() * torch.randn_like(mean)
            return self.back(code), mean, spread

    torch.manual_seed(0)
    x = torch.randn(150, 6)
    for sign in (1.0, -1.0):

        def loss(answer: Any, target: Tensor, sign: float = sign) -> Tensor:
            output, mean, spread = answer
            inside = (1 + spread - mean.square() - spread.exp()).sum(1).mean()
            return F.mse_loss(output, target) + sign * 0.5 * inside

        model = Drawn()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        found = diagnose(model, (x, x), loss, optimizer=optimizer, steps=60)
        assert ("loss_upside_down" in found.labels) == (sign > 0), str(found)


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_above_the_one_that_is_read_are_unused(layer: int) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core, self.head = nn.LSTM(3, 8, 2, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.core(x)[1][0][layer])

    torch.manual_seed(0)
    x = torch.randn(80, 5, 3)
    found = diagnose(Reader(), (x, (x.sum((1, 2)) > 0).long()), nn.CrossEntropyLoss())
    named = [f.where for f in found.findings if f.code == "unused_parameters"]
    assert bool(named) == (layer == 0), str(found)
    assert all(name.endswith("_l1") for where in named for name in where)
