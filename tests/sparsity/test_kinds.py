"""What a unit is: features, ranks and heads go whole, flops are counted as torch counts them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import tikhon as tk
from compaction.models_of import MODELS
from tikhon.compaction import compact


def train(model, x, steps, share, *, target=None, lr=1e-2, **options):
    torch.manual_seed(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr)
    handle = tk.sparsify(model, optimizer, share, steps=steps, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(x)
        wanted = x.flatten(1)[:, :1] if target is None else target
        (out - wanted).square().mean().backward()
        optimizer.step()
    return handle


class Lora(nn.Module):
    """A frozen linear layer and a pair of factors beside it."""

    def __init__(self, rank=6):
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.lora_A = nn.Linear(8, rank, bias=False)
        self.lora_B = nn.Linear(rank, 8, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x))


def test_ranks_go_by_row_and_column_and_each_layer_gets_what_it_needs():
    torch.manual_seed(0)
    model = nn.Sequential(Lora(), nn.Tanh(), Lora())
    x = torch.randn(128, 8)
    wanted = model[2].base(torch.tanh(model[0].base(x) + x @ torch.randn(8, 3) @ torch.ones(3, 8)))
    handle = train(model, x, 200, 0.5, of="ranks", target=wanted.detach())
    audit = handle.audit()
    assert audit.share == 0.5 and audit.asked == 0.5
    for name, layer in zip("02", audit.layers):
        pair = model[int(name)]
        rows = pair.lora_A.weight.abs().sum(1) == 0
        assert torch.equal(rows, pair.lora_B.weight.abs().sum(0) == 0)
        assert rows.sum() == layer.zeros < 6
    small = tk.compact(model.eval(), x[:2])
    left = [small.get_submodule(f"{i}.lora_A").out_features for i in (0, 2)]
    assert left == [6 - layer.zeros for layer in audit.layers]


def test_the_frozen_base_of_an_adapter_is_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(Lora(), Lora())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    with pytest.warns(UserWarning, match=r"leaves out 0\.base\.weight, 1\.base\.weight"):
        handle = tk.sparsify(model, optimizer, 0.5, steps=10)
    assert all("lora" in layer.layer for layer in handle.audit().layers)


def reading(kind):
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.BatchNorm1d(10), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 1))
    if kind == "two readers":

        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(10, 4), nn.Linear(10, 4)
                self.head = nn.Linear(8, 1)

            def forward(self, x):
                return self.head(torch.cat([self.a(x).relu(), self.b(x).tanh()], 1))

        return Two()
    return nn.Sequential(
        nn.Conv1d(10, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(4, 1),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["mlp", "two readers", "conv"])
def test_features_go_in_all_layers_that_read_them(kind):
    model = reading(kind)
    x = torch.randn(96, 10) if kind != "conv" else torch.randn(96, 10, 5)
    target = x.flatten(2 if kind == "conv" else 1).reshape(96, 10, -1).mean(2)[:, 3:4]
    handle = train(model, x, 150, 0.6, of="features", example=x[:4], target=target)
    (layer,) = handle.audit().layers
    assert (layer.units, layer.zeros) == (10, 6)
    readers = [p for p in model.parameters() if p.ndim > 1 and p.shape[1] == 10]
    gone = [p.detach().transpose(0, 1).flatten(1).abs().sum(1) == 0 for p in readers]
    assert all(torch.equal(gone[0], other) and other.sum() == 6 for other in gone)
    assert not gone[0][3]  # the one that matters
    other = x.clone()
    other[:, gone[0]] = torch.randn_like(other[:, gone[0]])
    model.eval()
    torch.testing.assert_close(model(other), model(x))


class Own(nn.Module):
    """Attention of one's own, causal, with a residual stream from an embedding."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(11, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        x = self.embed(x)
        b, t, c = x.shape
        qkv = self.qkv(self.norm(x)).view(b, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(b, t, c))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


@pytest.mark.parametrize(("of", "layer", "units"), [("heads", "qkv", 4), ("channels", "up", 32)])
def test_heads_and_widths_of_a_transformer_of_ones_own(of, layer, units):
    torch.manual_seed(0)
    model, x = Own(), torch.randint(0, 11, (64, 6))
    target = (x[:, :1] == x[:, 1:2]).float()
    handle = train(model, x, 80, 0.5, of=of, example=x[:2], target=target)
    (found,) = handle.audit().layers
    assert (found.layer, found.units, found.zeros) == (layer, units, units // 2)
    model.eval()
    small = tk.compact(model, x[:2])
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert small.compaction.units[layer][1] <= small.compaction.units[layer][0] // 2


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 1),
    )  # fmt: skip


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("norm", ["BatchNorm", "InstanceNorm"])
def test_what_a_norm_learns_of_a_channel_goes_with_it(norm, rank):
    torch.manual_seed(0)
    convolution, norm = (getattr(nn, f"{kind}{rank}d") for kind in ("Conv", norm))
    model = nn.Sequential(
        convolution(2, 8, 3, padding=1), norm(8, affine=True), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 4**rank, 1),
    )  # fmt: skip
    x = torch.randn(32, 2, *(4,) * rank)
    train(model, x, 20, 0.5, of="channels", example=x[:2])
    gone = (model[0].weight == 0).flatten(1).all(1)
    assert gone.sum() == 4 and not model[1].weight[gone].any() and not model[1].bias[gone].any()


def flops(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.filterwarnings("ignore:sparsify. 90.0% of the flops cannot go")  # in multiples of 4
@pytest.mark.parametrize(("share", "multiple"), [(0.3, 1), (0.9, 1), (0.6, 4), (0.9, 4)])
def test_a_share_of_the_flops_is_that_of_the_compacted_model(share, multiple):
    torch.manual_seed(0)
    model, x = convolutional(), torch.randn(32, 2, 8, 8)
    handle = train(
        model, x, 60, share, of="channels", cost="flops", example=x[:2], multiple=multiple
    )
    model.eval()
    whole = flops(model, x)
    saved = 1 - flops(tk.compact(model, x[:2]), x) / whole
    audit = handle.audit()
    assert audit.saved == pytest.approx(saved, abs=1e-6)
    if multiple == 1:
        assert share <= saved < share + 0.1  # by less than a unit
    assert all((layer.units - layer.zeros) % multiple == 0 for layer in audit.layers)
    assert "of the flops went" in str(audit)


TOGETHER = {  # what a convolution can only lose together, and the channels that are left
    "groups": (
        [nn.Conv2d(2, 12, 1), nn.ReLU(), nn.Conv2d(12, 18, 3, groups=3), nn.ReLU()],
        {"0": 6, "2": 9},
    ),
    "whole groups": (
        [nn.Conv2d(2, 12, 1), nn.ReLU(), nn.Conv2d(12, 18, 3, groups=6), nn.ReLU()],
        {"0": 6, "2": 9},
    ),
    "of the input": ([nn.Conv2d(2, 8, 3, groups=2), nn.ReLU()], {"0": 4}),
    "transposed": (
        [nn.Conv2d(2, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 16, 2, 2, groups=2), nn.ReLU()],
        {"0": 4, "2": 8},
    ),
    "whole groups transposed": (
        [nn.Conv2d(2, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, 2, groups=4), nn.ReLU()],
        {"0": 4, "2": 6},
    ),
    "pixels": ([nn.Conv2d(2, 16, 3), nn.ReLU(), nn.PixelShuffle(2)], {"0": 8}),
}  # fmt: skip


@pytest.mark.parametrize("cost", [None, "flops"])
@pytest.mark.parametrize("name", TOGETHER)
def test_channels_that_a_convolution_loses_together_are_one_unit(name, cost):
    torch.manual_seed(0)
    layers, left = TOGETHER[name]
    model, x = nn.Sequential(*copy.deepcopy(layers), nn.LazyConv2d(3, 3)), torch.randn(8, 2, 6, 6)
    model(x)
    goal = torch.zeros(())
    handle = train(model, x, 6, 0.5, target=goal, of="channels", cost=cost, example=x[:2])
    model.eval()
    small = tk.compact(model, x[:2])
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    units = small.compaction.units
    if cost is None:
        assert handle.audit().share == pytest.approx(0.5, abs=0.06)
        assert {name: units[name][1] for name in left} == left
    else:
        assert handle.audit().saved == pytest.approx(1 - flops(small, x) / flops(model, x))


def test_weights_by_flops_spare_the_layers_that_cost_little():
    torch.manual_seed(0)
    model, x = convolutional(), torch.randn(32, 2, 8, 8)
    by_count = train(model, x, 40, 0.8, of="weights").audit()
    by_cost = train(convolutional(), x, 40, 0.8, of="weights", cost="flops", example=x[:2]).audit()
    assert by_cost.saved == pytest.approx(0.8, abs=0.01)
    assert by_cost.layers[-1].share < by_count.layers[-1].share  # the head is read once


def test_what_cost_cannot_count_is_refused_by_name():
    model, x = reading("mlp"), torch.randn(8, 10)
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="traces the model once: give example"):
        tk.sparsify(model, optimizer, 0.5, cost="flops", steps=9)
    with pytest.raises(ValueError, match="counts weights, channels and heads"):
        tk.sparsify(model, optimizer, 0.5, of="features", cost="flops", steps=9, example=x)
    with pytest.raises(ValueError, match="leave out per='layer'"):
        tk.sparsify(model, optimizer, 0.5, cost="flops", per="layer", steps=9, example=x)


def test_embedding_and_what_is_added_to_it_keep_their_channels():
    torch.manual_seed(0)
    model, x = Own(), torch.randint(0, 11, (4, 6))
    optimizer = torch.optim.Adam(model.parameters())
    handle = tk.sparsify(model, optimizer, 0.5, of="channels", steps=9, example=x)
    assert [layer.layer for layer in handle.audit().layers] == ["up"]


@pytest.mark.parametrize(
    ("build", "of", "why"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 1)), "ranks", "no pair of factors"),
        (lambda: nn.Sequential(nn.Linear(4, 1)), "heads", "no nn.MultiheadAttention"),
        (lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 1)), "features", "no linear"),
    ],
)
def test_where_there_is_none_the_reason_is_given(build, of, why):
    model = build()
    x = torch.zeros(2, 4) if of != "features" else torch.zeros(2, 3, dtype=torch.long)
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match=why):
        tk.sparsify(model, optimizer, 0.5, of=of, steps=9, example=x)


@pytest.mark.parametrize(("of", "left"), [("heads", (12, 12)), ("channels", (24, 6))])
def test_a_forward_that_looks_at_sizes_loses_units_that_compact_removes(of, left):
    torch.manual_seed(0)
    model, example = MODELS["branching"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pattern = "up" if of == "channels" else "*"
    sparse = tk.sparsify(
        model, optimizer, 0.5, of=of, steps=8, example=example, per="layer", pattern=pattern
    )
    for _ in range(8):
        optimizer.zero_grad()
        model(example).square().mean().backward()
        optimizer.step()
    assert sparse.audit().share == 0.5
    small = compact(model, example)
    assert (small.qkv.out_features, small.up.out_features) == left
    x = torch.randint(0, 11, (3, 7))
    torch.testing.assert_close(small.eval()(x), model.eval()(x))


class Residual(nn.Module):
    """Pre-norm blocks on a stream of 8 channels, as a transformer has it."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 8), nn.Linear(8, 3)
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.RMSNorm(8), nn.LayerNorm(8)])
        self.wide = nn.ModuleList([nn.Linear(8, 16), nn.Linear(8, 16)])
        self.narrow = nn.ModuleList([nn.Linear(16, 8), nn.Linear(16, 8)])

    def forward(self, x):
        x = self.enter(x)
        for norm, wide, narrow in zip(self.norms, self.wide, self.narrow):
            x = x + narrow(torch.relu(wide(norm(x))))
        return self.leave(self.norms[2](x))


class Uneven(nn.Module):
    """A layer whose first two quarters are added up: its units have one or two rows."""

    def __init__(self):
        super().__init__()
        self.split, self.last, self.head = nn.Linear(5, 8), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        a, b, c, d = self.split(x).chunk(4, -1)
        return self.head(torch.relu(self.last(torch.cat([a + b, c, d], -1))))


@pytest.mark.parametrize("kind", [Residual, Uneven])
def test_channels_that_go_are_those_that_compact_removes(kind):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(16, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = tk.sparsify(model, optimizer, 0.5, of="channels", steps=6, example=x, per="layer")
    for _ in range(6):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert handle.audit().share == 0.5
    small = tk.compact(model, x)
    torch.testing.assert_close(small(x), model(x))
    if kind is Residual:
        widths = [small.get_submodule(n).out_features for n in ("enter", "wide.0", "narrow.1")]
        assert widths == [4, 8, 4]
    else:
        assert small.get_submodule("last").out_features == 2
