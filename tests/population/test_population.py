"""A member of a population is the separate run that plain PyTorch would have made."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tikhon as tk
from tikhon.errors import DataError, InputError
from tikhon.layers import Dropout
from tikhon.models import build
from tikhon.models.convnet import ConvNet
from tikhon.models.mlp import MLP
from tikhon.population.hyperparameters import Hyperparameters
from tikhon.population.losses import RowLosses
from tikhon.population.population import Population

STEPS = 30


def data(rows=64, features=6, classes=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=generator)
    y = (x @ torch.randn(features, classes, generator=generator)).argmax(1)
    return x, y


def sequential():
    return nn.Sequential(
        nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), Dropout(0.0), nn.Linear(12, 8), nn.Tanh(),
        Dropout(0.0), nn.Linear(8, 3),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.skip, self.fc, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.drop = Dropout(0.0)

    def forward(self, x):
        return self.out(self.drop(torch.relu(self.fc(x) + self.skip(x))))


class Normalised(nn.Module):
    """Statistics of its own in every member (a bias before a norm has gradient noise only)."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(F.relu(self.norm(self.fc(x))))


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out, self.drop = nn.Conv1d(1, 4, 3), nn.Linear(16, 3), Dropout(0.0)

    def forward(self, x):
        return self.out(self.drop(F.relu(self.conv(x.unsqueeze(1))).flatten(1)))


MODELS = {
    "mlp": (lambda: MLP([6, 12, 3]), "batched"),
    "sequential": (sequential, "batched"),
    "residual": (Residual, "batched"),
    "spline": (lambda: build("spline:mlp:8", (6,), 3, rows=data()[0]), "batched"),
    "batch norm": (Normalised, "batched"),
    "convolution": (Convolution, "vmap"),
}


def built(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name][0]()


def batches(x):
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        yield step, torch.randperm(len(x), generator=generator)[:16]


def population(models, configs, **kwargs):
    x, _ = data()
    return Population(
        models,
        Hyperparameters.of(configs),
        objective=RowLosses(kwargs.pop("loss", "cross_entropy")),
        example=x[:4],
        steps=STEPS,
        **kwargs,
    )


def trained(models, configs, **kwargs):
    x, y = data()
    members = population(models, configs, **kwargs)
    for step, rows in batches(x):
        members.step(x[rows], y[rows], None, step, seed=step)
    return members


def separately(model, config, terms=None, make=torch.optim.AdamW):
    """An independent plain loop: torch's optimizer, tikhon.regularize for the penalties."""
    x, y = data()
    model = copy.deepcopy(model).train()
    decay = config.get("weight_decay", 0.0)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = make(groups, lr=config["lr"])
    if terms:
        tk.regularize(model, optimizer, terms)
    generators = []  # one a layer
    for module in model.modules():
        if isinstance(module, Dropout):
            module.generator = torch.Generator()
            generators.append(module.generator)
            module.set_rate(config.get("dropout", 0.0))
    for step, rows in batches(x):
        for group in optimizer.param_groups:
            group["lr"] = config["lr"] * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for place, generator in enumerate(generators):
            generator.manual_seed(step + 2 * place)
        optimizer.zero_grad()
        smoothing = config.get("label_smoothing", 0.0)
        F.cross_entropy(model(x[rows]), y[rows], label_smoothing=smoothing).backward()
        if "clip_norm" in config:
            nn.utils.clip_grad_norm_(model.parameters(), config["clip_norm"])
        optimizer.step()
    return model.state_dict()


def distance(a, b):
    return max(float((a[n] - b[n]).abs().max()) for n in b if not n.endswith("rate"))


CONFIGS = [
    {"lr": 0.01, "weight_decay": 0.1, "dropout": 0.0, "label_smoothing": 0.0},
    {"lr": 0.03, "weight_decay": 0.0, "dropout": 0.3, "label_smoothing": 0.1},
    {"lr": 0.001, "weight_decay": 1.0, "dropout": 0.6, "label_smoothing": 0.2},
]


@pytest.mark.parametrize("name", MODELS)
def test_every_member_equals_its_separate_run(name):
    configs = CONFIGS
    if name == "batch norm":
        configs = [{k: v for k, v in c.items() if k != "dropout"} for c in CONFIGS]
    members = trained([built(name) for _ in configs], configs)
    assert members.forward.name == MODELS[name][1]
    for k, config in enumerate(configs):
        assert distance(members.state_dict_of(k), separately(built(name), config)) < 1e-5


class Pooled(nn.Module):
    """Functions in the place of layers, a second branch, and a norm that keeps averages."""

    def __init__(self):
        super().__init__()
        self.first, self.skip = nn.Conv2d(2, 4, 3, bias=False), nn.Conv2d(2, 4, 3, stride=1)
        self.norm, self.out, self.drop = nn.BatchNorm2d(4), nn.Linear(16, 3), Dropout(0.0)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.first(x)) + self.skip(x)), 2, stride=1)
        return self.out(self.drop(torch.flatten(F.adaptive_avg_pool2d(x, 2), 1)))


IMAGES = {
    "convnet": (lambda: ConvNet(2, 3), (2, 6, 6), "batched"),
    "functions": (Pooled, (2, 6, 6), "batched"),
    "layers": (
        lambda: nn.Sequential(
            nn.BatchNorm2d(2), nn.Conv2d(2, 5, 3, padding="same", dilation=2), nn.ReLU(),
            nn.AvgPool2d(2), nn.Conv2d(5, 4, (1, 3), stride=(1, 2)), nn.MaxPool2d(1), nn.Flatten(),
            nn.Linear(12, 3),
        ), (2, 6, 6), "batched",
    ),
    "signals": (
        lambda: nn.Sequential(
            nn.MaxPool1d(2), nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4), nn.Tanh(),
            nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3),
        ), (3, 16), "batched",
    ),
    "groups": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)),
        (4, 6), "vmap",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_every_member_with_convolutions_equals_its_separate_run(name, monkeypatch):
    """Weights, the averages that norms keep, and the outputs in eval mode."""
    make, shape, route = IMAGES[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, *shape, generator=generator)
    monkeypatch.setitem(globals(), "data", lambda: (x, (x.flatten(1)[:, :3]).argmax(1)))
    torch.manual_seed(0)
    model = make()
    noisy = any(isinstance(m, Dropout) for m in model.modules())
    configs = [{k: v for k, v in c.items() if k != "dropout" or noisy} for c in CONFIGS]
    members = trained([copy.deepcopy(model) for _ in configs], configs)
    assert members.forward.name == route
    outputs = members.predict(x)
    for k, config in enumerate(configs):
        alone = copy.deepcopy(model)
        alone.load_state_dict(separately(model, config))
        assert distance(members.state_dict_of(k), alone.state_dict()) < 1e-5
        assert torch.allclose(outputs[k], alone.eval()(x), atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_population_of_one_is_the_plain_run(name):
    config = dict(CONFIGS[1])
    if name == "batch norm":
        del config["dropout"]
    members = trained([built(name)], [config])
    assert members.forward.name == "plain"
    assert distance(members.state_dict_of(0), separately(built(name), config)) < 1e-6


@pytest.mark.parametrize(
    ("entry", "make"),
    [
        ("l1", tk.L1),
        ("l2", tk.L2),
        ("elastic_net", tk.ElasticNet),
        ("group_lasso", tk.GroupLasso),
        ("mcp", tk.MCP),
        ("scad", tk.SCAD),
        ("log_sum", tk.LogSum),
        ("huber", tk.Huber),
        ("max_norm", tk.MaxNorm),
    ],
)
@pytest.mark.parametrize("members", [1, 3])
def test_penalties_equal_regularize_on_the_separate_run(entry, make, members):
    scale = {"group_lasso": 0.5, "max_norm": 0.3}.get(entry, 0.05)
    configs = [{"lr": 0.02 * (k + 1), entry: scale * (k + 1)} for k in range(members)]
    found = trained([built("mlp") for _ in configs], configs)

    def zeros(state):
        return [int((t == 0).sum()) for name, t in state.items() if "weight" in name]

    for k, config in enumerate(configs):
        alone = separately(built("mlp"), config, {"*": make(config[entry])})
        assert distance(found.state_dict_of(k), alone) < 1e-5
        assert zeros(found.state_dict_of(k)) == zeros(alone)
        assert entry in ("l2", "huber", "max_norm") or sum(zeros(alone)) > 0


def test_a_failed_first_member_leaves_the_penalties_of_the_others_in_force():
    x, y = data()
    configs = [{"lr": 1e30, "l1": 0.05}, {"lr": 0.02, "l1": 0.05}]
    members = population([built("mlp") for _ in configs], configs)
    for step, rows in batches(x):
        members.step(x[rows], y[rows], None, step, seed=step)
        if step == 2:
            members.fail(0, "diverged")
    alone = separately(built("mlp"), configs[1], {"*": tk.L1(0.05)})
    assert distance(members.state_dict_of(1), alone) < 1e-5


def test_optimizers_with_momentum_and_clipping_equal_the_separate_run():
    configs = [{"lr": 0.1, "clip_norm": 0.3}, {"lr": 0.02, "clip_norm": 5.0}]

    def sgd(parameters, lr, **kwargs):
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)

    members = trained([built("mlp") for _ in configs], configs, optimizer=sgd)
    for k, config in enumerate(configs):
        assert (
            distance(members.state_dict_of(k), separately(built("mlp"), config, make=sgd)) < 1e-5
        )


LAST = {
    "batched": nn.Tanh,
    "norm": lambda: nn.BatchNorm1d(8),
    "vmap": lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.PReLU()),
}


@pytest.mark.parametrize("last", LAST.values(), ids=LAST)
@pytest.mark.parametrize("members", [1, 3])
def test_fixed_rates_of_the_layers_are_kept_and_a_rate_of_zero_draws_nothing(members, last):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), Dropout(0.0), nn.ReLU(), Dropout(0.5), nn.Linear(8, 8, bias=False),
        last(), nn.Linear(8, 3),
    )  # fmt: skip
    configs = [{"lr": 0.01 * (k + 1)} for k in range(members)]
    found = trained([copy.deepcopy(model) for _ in configs], configs)
    x, y = data()
    for k, config in enumerate(configs):
        alone = copy.deepcopy(model).train()
        alone[1], alone[3].generator = nn.Identity(), torch.Generator()
        optimizer = torch.optim.AdamW(alone.parameters(), weight_decay=0.0)
        for step, rows in batches(x):
            optimizer.param_groups[0]["lr"] = (
                config["lr"] * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            )
            alone[3].generator.manual_seed(step + 2)  # the second noise layer
            optimizer.zero_grad()
            F.cross_entropy(alone(x[rows]), y[rows]).backward()
            optimizer.step()
        assert distance(found.state_dict_of(k), alone.state_dict()) < 1e-5


def test_members_may_differ_in_seed():
    configs = [{"lr": 0.01}, {"lr": 0.01}]
    members = trained([built("mlp", 0), built("mlp", 1)], configs)
    for k in range(2):
        assert distance(members.state_dict_of(k), separately(built("mlp", k), configs[k])) < 1e-5


@pytest.mark.parametrize("name", ["sequential", "batch norm"])
def test_a_diverged_member_leaves_the_others_bit_identical(name):
    healthy = [{"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.02, "weight_decay": 0.0}]
    sick = [healthy[0], {"lr": 1e30, "weight_decay": 0.1}, healthy[1]]
    with_sick = trained([built(name) for _ in sick], sick)
    without = trained(
        [built(name)] * 3, [healthy[0], {"lr": 1e-3, "weight_decay": 0.1}, healthy[1]]
    )
    x, y = data()
    losses = with_sick.row_losses(x, y).mean(1)
    assert not losses[1].isfinite()
    for k in (0, 2):
        a, b = with_sick.state_dict_of(k), without.state_dict_of(k)
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_clipping_is_per_member_so_a_nan_stays_where_it_is():
    configs = [{"lr": 0.01, "clip_norm": 1.0}, {"lr": 1e30, "clip_norm": 1.0}]
    members = trained([built("mlp") for _ in configs], configs)
    alone = separately(built("mlp"), configs[0])
    assert distance(members.state_dict_of(0), alone) < 1e-5


def test_a_failed_member_is_zeroed_and_stays_so():
    x, y = data()
    members = population([built("mlp") for _ in range(2)], [{"lr": 0.01}, {"lr": 1e30}])
    for step, rows in batches(x):
        losses = members.step(x[rows], y[rows], None, step, seed=step)
        if step == 10:
            assert not losses[1].isfinite()
            members.fail(1, "diverged")
    assert all((t == 0).all() for t in members.state_dict_of(1).values())
    assert all(t.isfinite().all() for t in members.state_dict_of(0).values())


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_state_saved_and_loaded_continues_bit_for_bit(adaptive):
    x, y = data()
    configs = [{"lr": 0.01, "dropout": 0.2}, {"lr": 0.02, "dropout": 0.4}]
    if adaptive:
        configs = [{**c, "weight_decay": "auto"} for c in configs]

    def fresh():
        return population([built("sequential") for _ in configs], configs)

    def run(members, start, stop):
        for step, rows in list(batches(x))[start:stop]:
            members.step(x[rows], y[rows], None, step, seed=step)
            members.adapt(x[:20], y[:20], None, step)
        return members

    whole = run(fresh(), 0, STEPS)
    half = run(fresh(), 0, 13)
    resumed = fresh()
    resumed.load(half.state())
    run(resumed, 13, STEPS)
    assert torch.equal(whole.stack.flat, resumed.stack.flat)
    for lost in (name for name in half.state() if name.startswith("decay.")):
        older = {name: value for name, value in half.state().items() if name != lost}
        with pytest.raises(DataError, match=f"lack {lost}: another version"):
            fresh().load(older)


def test_an_adapting_strength_is_the_same_in_a_population_and_alone():
    x, y = data()
    configs = [{"lr": 0.01, "weight_decay": "auto"}, {"lr": 0.03, "weight_decay": "auto"}]
    together = population([built("mlp") for _ in configs], configs)
    apart = [population([built("mlp")], [c]) for c in configs]
    for step, rows in batches(x):
        for members in (together, *apart):
            members.step(x[rows], y[rows], None, step, seed=step)
            members.adapt(x[:20], y[:20], None, step)
    moved = together.decay.strength
    assert not torch.allclose(moved, torch.ones_like(moved), rtol=0.1)
    for k, alone in enumerate(apart):
        assert torch.allclose(alone.decay.strength[0], moved[k], rtol=1e-3)
        assert distance(together.state_dict_of(k), alone.state_dict_of(0)) < 1e-5


@pytest.mark.parametrize("count", [1, 2])
def test_an_adapting_strength_does_not_go_by_averages_that_lag_behind(count):
    """Running statistics neither enter the slope of the validation loss nor move by it."""
    x, y = data()
    config, found = {"lr": 0.02, "weight_decay": "auto"}, []
    for shift in (0.0, 50.0):
        members = population([built("batch norm") for _ in range(count)], [config] * count)
        for step, rows in batches(x):
            members.step(x[rows], y[rows], None, step, seed=step)
            for name, buffer in members.stack.buffers.items():
                if name.endswith("running_mean"):
                    buffer.fill_(shift)
            before = {name: b.clone() for name, b in members.stack.buffers.items()}
            members.adapt(x[:20], y[:20], None, step)
            assert all(torch.equal(b, before[n]) for n, b in members.stack.buffers.items())
        found.append(members.decay.strength)
    assert torch.allclose(*found, rtol=1e-4)


class Counting(nn.Module):
    """A layer whose buffer has the name that rates of noise end with."""

    def __init__(self):
        super().__init__()
        self.fc, self.drop = nn.Linear(6, 3), Dropout(0.0)
        self.register_buffer("firing_rate", torch.zeros(3))

    def forward(self, x):
        out = self.drop(self.fc(x))
        self.firing_rate.mul_(0.9).add_(0.1 * (out > 0).float().mean(0))
        return out


def test_all_buffers_but_the_rates_of_noise_go_on_with_a_state():
    x, y = data()
    first, second = (population([Counting()], [{"lr": 0.02, "dropout": r}]) for r in (0.1, 0.4))
    for step, rows in batches(x):
        first.step(x[rows], y[rows], None, step, seed=step)
    second.load(first.state())
    own, given = second.stack.buffers, first.stack.buffers
    assert given["firing_rate"].any() and torch.equal(own["firing_rate"], given["firing_rate"])
    assert float(own["drop.rate"]) == pytest.approx(0.4)


def test_decay_rests_in_a_member_that_does_not_tell_the_rows_apart():
    x, y = data()
    config = {"lr": 0.02, "weight_decay": "auto"}
    constant = built("mlp")
    with torch.no_grad():
        list(constant.parameters())[-2].zero_()
    members = population([built("mlp"), constant], [{**config, "lr": 0.02}] * 2)
    members.stepper.fail(1)  # it does not learn either
    for step, rows in batches(x):
        members.step(x[rows], y[rows], None, step, seed=step)
        members.adapt(x[:20], y[:20], None, step)
    told, blind = members.decay.strength
    assert (told > 0).all() and (blind < 1e-3 * told).all()


def test_row_weights_train_each_member_on_its_own_rows():
    x, y = data()
    kept = torch.stack([torch.arange(64) % 2 == k for k in range(2)]).float()
    members = population([built("mlp") for _ in range(2)], [{"lr": 0.01}, {"lr": 0.01}])
    alone = population([built("mlp")], [{"lr": 0.01}])
    for step, rows in batches(x):
        members.step(x[rows], y[rows], kept[:, rows], step, seed=step)
        mine = rows[kept[1, rows] > 0]
        alone.step(x[mine], y[mine], None, step, seed=step)
    assert distance(members.state_dict_of(1), alone.state_dict_of(0)) < 1e-5


def test_mixup_shares_one_draw_and_zero_leaves_the_rows_alone():
    configs = [{"lr": 0.01, "mixup": 0.0}, {"lr": 0.01, "mixup": 0.4}]
    members = trained([built("mlp") for _ in configs], configs)
    plain = separately(built("mlp"), {"lr": 0.01})
    assert distance(members.state_dict_of(0), plain) < 1e-5
    alone = trained([built("mlp")], configs[1:])
    assert distance(members.state_dict_of(1), alone.state_dict_of(0)) < 1e-5
    assert distance(members.state_dict_of(1), plain) > 1e-3


def test_any_loss_that_is_a_mean_over_rows_is_served():
    x, y = data()

    def focal(output, target):
        p = output.softmax(1).gather(1, target[:, None])
        return -((1 - p) ** 2 * p.log()).mean()

    members = population([built("mlp") for _ in range(2)], [{"lr": 0.01}] * 2, loss=focal)
    found = members.objective.rows(members.outputs(x), y).mean(1)
    assert torch.allclose(found[0], focal(members.outputs(x)[0], y), atol=1e-6)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 or self.fc.weight.sum() > 0 else -self.fc(x)


def test_a_forward_that_branches_on_data_is_refused_by_name():
    from tikhon.population.batched import Unsupported

    with pytest.raises(Unsupported, match=r"traced.*; vectorised: "):
        population([Branching(), Branching()], [{"lr": 0.1}] * 2)
    assert population([Branching()], [{"lr": 0.1}]).forward.name == "plain"


def test_requests_that_a_population_cannot_serve_name_the_reason():
    with pytest.raises(InputError, match="no dropout layer"):
        population([nn.Linear(6, 3)], [{"lr": 0.1, "dropout": 0.5}])
    with pytest.raises(InputError, match="one architecture"):
        population([MLP([6, 4, 3]), MLP([6, 5, 3])], [{"lr": 0.1}] * 2)
    with pytest.raises(InputError, match="entry by entry"):
        population([built("mlp")], [{"lr": 0.1}], optimizer=lambda p, **k: torch.optim.LBFGS(p))
    with pytest.raises(InputError, match="did you mean 'cross_entropy'"):
        RowLosses("crossentropy")
