"""Laws of `sparsify`: what is asked is got, zeros rest, a resumed run is the same run."""

from __future__ import annotations

import copy
from itertools import cycle, product

import pytest
import torch
from torch import nn

import tikhon as tk
from tikhon.sparsity.allocation import Sizes, units_to_keep

STEPS = 60


class Residual(nn.Module):
    """Two convolutions whose outputs are added, a depthwise one, a head."""

    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.nb = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        x = torch.relu(self.na(self.a(x)))
        x = x + torch.relu(self.nb(self.b(x)))
        x = torch.relu(self.c(self.deep(x)))
        return self.head(x.mean((2, 3)))


def plain():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip


def rows(model):
    torch.manual_seed(1)
    shape = (40, 6) if isinstance(model, nn.Sequential) and model[0].weight.ndim == 2 else None
    x = torch.randn(shape or (40, 1, 6, 6))
    return x, (x.flatten(1)[:, 0] > 0).long()


def train(model, optimizer, first, last):
    x, y = rows(model)
    for step in range(first, last):
        i = torch.arange(8 * step, 8 * step + 8) % len(x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[i]), y[i]).backward()
        optimizer.step()


def sparse(build, share, *, optimizer=torch.optim.Adam, steps=STEPS, run=STEPS, **options):
    torch.manual_seed(0)
    model = build()
    chosen = optimizer(model.parameters(), lr=1e-2)
    handle = tk.sparsify(model, chosen, share, steps=steps, example=rows(model)[0][:2], **options)
    train(model, chosen, 0, run)
    return model, chosen, handle


KINDS = product((plain, convolutional, Residual), ("model", "layer"), ("weights", "channels"))


@pytest.mark.parametrize(
    ("build", "per", "of", "share"),
    [(*kind, share) for kind, share in zip(KINDS, cycle((0.3, 0.5, 0.9)))],
)
def test_what_is_asked_is_got_to_the_unit(build, share, per, of):
    model, _, handle = sparse(build, share, per=per, of=of)
    audit = handle.audit()
    assert audit.phase == "repair"
    units = [layer.units for layer in audit.layers]
    if per == "layer":
        wanted = [n - max(1, n - round(share * n)) for n in units]
        assert [layer.zeros for layer in audit.layers] == wanted
    else:
        total = sum(units) - max(len(units), sum(units) - round(share * sum(units)))
        assert sum(layer.zeros for layer in audit.layers) == total
    assert all(layer.zeros < layer.units for layer in audit.layers)
    if of == "weights":
        params = dict(model.named_parameters())
        found = {layer.layer: int((params[layer.layer] == 0).sum()) for layer in audit.layers}
        assert found == {layer.layer: layer.zeros for layer in audit.layers}


@pytest.mark.parametrize("build", [plain, convolutional, Residual])
def test_channels_that_went_are_removed_by_compaction(build):
    model, _, handle = sparse(build, 0.5, of="channels")
    model.eval()
    x = rows(model)[0]
    small = tk.compact(model, x[:4])
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    left = sum(after for _, after in small.compaction.units.values())
    gone = sum(layer.zeros * len(layer.layer.split("+")) for layer in handle.audit().layers)
    assert left <= sum(before for before, _ in small.compaction.units.values()) - gone


def test_layers_whose_outputs_are_added_lose_the_same_channels():
    model, _, handle = sparse(Residual, 0.5, of="channels")
    names = {layer.layer for layer in handle.audit().layers}
    assert any({"a", "b"} <= set(name.split("+")) for name in names)
    rows_of = [p.detach().flatten(1).abs().sum(1) == 0 for p in (model.a.weight, model.b.weight)]
    assert torch.equal(*rows_of) and rows_of[0].sum() == 4
    assert torch.equal(model.na.weight == 0, rows_of[0])
    assert torch.equal(model.na.bias == 0, rows_of[0])


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop])
def test_zeros_rest_in_the_repair_and_the_others_move(optimizer):
    model, chosen, _ = sparse(plain, 0.6, optimizer=optimizer, run=STEPS - 10)
    zero = [p == 0 for p in model.parameters() if p.ndim > 1]
    before = [p.detach().clone() for p in model.parameters() if p.ndim > 1]
    train(model, chosen, STEPS - 10, STEPS)
    after = [p for p in model.parameters() if p.ndim > 1]
    assert all(torch.equal(p == 0, z) for p, z in zip(after, zero))
    assert any(not torch.equal(p, b) for p, b in zip(after, before))


def test_the_share_follows_the_cubic_schedule():
    model, chosen, handle = sparse(plain, 0.8, run=0, steps=100)
    for step in range(100):
        train(model, chosen, step, step + 1)
        progress = min(max((step + 1 - handle.begin) / (handle.end - handle.begin), 0), 1)
        planned = 0.8 * (1 - (1 - progress) ** 3)
        assert handle.audit().share <= planned + 0.02
        assert handle.audit().share >= planned - 0.12
    assert handle.audit().share == pytest.approx(0.8, abs=0.003)


def test_biases_norms_and_embeddings_are_left_alone():
    model, _, _ = sparse(convolutional, 0.9)
    assert all((p != 0).all() for name, p in model.named_parameters() if p.ndim == 1)


class Wrapped(torch.optim.Adam):
    """A rule whose step calls the step of another."""

    def step(self, closure=None):
        return super().step(closure)


def test_a_step_of_a_subclass_counts_once():
    _, _, handle = sparse(plain, 0.5, optimizer=Wrapped)
    assert handle.step == STEPS


def test_heads_go_whole():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.head = nn.Linear(16, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].mean(1))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(32, 5, 16)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    handle = tk.sparsify(model, optimizer, 0.5, of="heads", steps=30)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x[:, 0, 0] > 0).long()).backward()
        optimizer.step()
    (layer,) = handle.audit().layers
    assert (layer.units, layer.zeros) == (4, 2)
    projections = model.attention.in_proj_weight.view(3, 4, 4, 16)
    dead = (projections == 0).all(3).all(2)
    assert dead.sum() == 6 and (dead == dead[0]).all()
    model.eval()
    small = tk.compact(model, x[:2])
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert small.compaction.parameters[1] < small.compaction.parameters[0]


@pytest.mark.parametrize(
    ("of", "stop"), list(zip(cycle(("weights", "channels")), (1, 7, 23, 40, 55)))
)
def test_a_resumed_run_is_the_same_run(stop, of):
    whole, _, handle = sparse(convolutional, 0.5, of=of)
    half, optimizer, first = sparse(convolutional, 0.5, of=of, run=stop)
    saved = copy.deepcopy((half.state_dict(), optimizer.state_dict(), first.state_dict()))
    model, chosen, second = sparse(convolutional, 0.5, of=of, run=0)
    model.load_state_dict(saved[0])
    chosen.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    train(model, chosen, stop, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters()))
    assert second.audit() == handle.audit()


def test_an_average_keeps_the_zeros():
    model, _, handle = sparse(plain, 0.7)
    average = torch.optim.swa_utils.AveragedModel(plain())
    handle.apply(average.module)
    for name, p in average.module.named_parameters():
        if p.ndim > 1:
            assert torch.equal(p == 0, dict(model.named_parameters())[name] == 0)
    with pytest.raises(ValueError, match=r"no parameter '0\.weight'"):
        handle.apply(nn.Linear(2, 2))


@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_layers_keep_a_multiple(multiple):
    _, _, handle = sparse(convolutional, 0.4, of="channels", multiple=multiple)
    assert all((x.units - x.zeros) % multiple == 0 for x in handle.audit().layers)


def lamp(sizes):
    """The scores as their paper defines them."""
    squares = sizes.double().square()
    return squares / (squares[None] * (squares[None] >= squares[:, None])).sum(1)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_the_largest_stay(share):
    generator = torch.Generator().manual_seed(0)
    sizes = [torch.rand(200, generator=generator) ** k for k in (1, 3, 6)]
    layers = [Sizes.of(one) for one in sizes]
    counts = units_to_keep(layers, share, per="model")
    assert sum(counts) == 600 - round(600 * share)
    kept = [layer.largest(count) for layer, count in zip(layers, counts)]
    for one, flags, count in zip(sizes, kept, counts):
        assert flags.sum() == count
        assert count == 200 or one[flags].min() >= one[~flags].max()
    scores = [lamp(one) for one in sizes]
    worst = min(float(s[k].min()) for s, k in zip(scores, kept))
    best = max(float(s[~k].max()) for s, k in zip(scores, kept) if not k.all())
    assert best <= 1.1 * worst  # sizes within a percent count as equal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sizes_of_any_scale_and_ties_are_counted_exactly(dtype):
    sizes = torch.tensor([0.0, 0.0, 1e-30, 1.0, 1.0, 1.0, 3e30], dtype=dtype)
    layer = Sizes.of(sizes)
    for count in range(1, 8):
        flags = layer.largest(count)
        assert flags.sum() == count and (count == 7 or sizes[flags].min() >= sizes[~flags].max())


@pytest.mark.parametrize("ties", [1, 40])
def test_what_need_not_be_exact_keeps_at_most_a_hundredth_more(ties):
    generator = torch.Generator().manual_seed(0)
    layer = Sizes.of(torch.rand(5000 // ties, generator=generator).repeat_interleave(ties))
    for count in range(100, 5000, 49):
        exact, loose = layer.largest(count), layer.largest(count, exact=False)
        assert exact.sum() == count
        assert bool((loose | ~exact).all()) and loose.sum() <= count + 50


BAD = {
    "share": (dict(share=1.0), "share must be in"),
    "none": (dict(share=0.0), "share must be in"),
    "steps": (dict(steps=0), "steps must be"),
    "of": (dict(of="chanels"), "did you mean 'channels'"),
    "phases": (dict(warmup=0.6, repair=0.5), "repair must be"),
    "multiple": (dict(multiple=0), "multiple must be"),
    "per": (dict(per="tensor"), "per must be"),
    "pattern": (dict(pattern="fc*"), "no parameter matches"),
    "heads": (dict(of="heads"), "no nn.MultiheadAttention"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input(options, message):
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    given = {"share": 0.5, "steps": 10} | options
    with pytest.raises(ValueError, match=message):
        tk.sparsify(model, optimizer, given.pop("share"), **given)


def test_what_cannot_lose_channels_says_why():
    model = nn.Sequential(nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="give example"):
        tk.sparsify(model, optimizer, 0.5, of="channels", steps=10)
    with pytest.raises(ValueError, match="no layer may lose channels"):
        tk.sparsify(model, optimizer, 0.5, of="channels", steps=10, example=torch.ones(2, 6))


def test_one_handle_an_optimizer_and_an_end_before_time_is_said():
    model, optimizer, handle = sparse(plain, 0.5, run=5)
    with pytest.raises(RuntimeError, match="already"):
        tk.sparsify(model, optimizer, 0.5, steps=10)
    with pytest.warns(UserWarning, match="removed at step 5, before its schedule ended"):
        handle.remove()
    with tk.sparsify(model, optimizer, 0.5, steps=5) as again:
        train(model, optimizer, 0, 5)
    assert again.audit().share == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match=r"share=0\.5"):
        sparse(plain, 0.6, run=0)[2].load_state_dict(again.state_dict())
