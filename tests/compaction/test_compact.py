from __future__ import annotations

import copy
import operator
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import tikhon as tk
from compaction.models_of import MODELS, Block, Patches
from tikhon.compaction import compact, speedup

GRAPHS = {  # their forwards hold sizes of units as numbers, or functions of bare parameters
    "branching", "functions", "language-chunk", "language-timm", "language-unflatten", "lstm",
    "attention-fill", "attention-add", "attention-bmm",
}  # fmt: skip
PLANNED = ("patches", "groups", "lstm", "attention")  # these take a plan, not chance: see below


def planted(name: str, *, seed: int, share: float = 0.3) -> tuple[nn.Module, torch.Tensor]:
    """A model with random rows and columns (and the scales of normalisations) set to zero."""
    torch.manual_seed(seed)
    model, example = MODELS[name]()
    model.train()
    with torch.no_grad():
        for _ in range(2 if example.is_floating_point() else 0):
            model(example)  # running statistics that are not 0 and 1
        for parameter in model.parameters():
            dead = torch.rand(parameter.shape[0]) < share
            dead[0] = False
            if parameter.ndim > 1 or torch.rand(()) < 0.3:
                parameter[dead] = 0
            if parameter.ndim > 1:
                unused = torch.rand(parameter.shape[1]) < share
                unused[0] = False
                parameter[:, unused] = 0
    return model, example


def other_batch(example: torch.Tensor) -> torch.Tensor:
    if not example.is_floating_point():
        return torch.randint_like(example, 0, 11)
    return torch.randn_like(example)


# each model with one of three plantings in turn; with all of them in the weekly run
PLANTED = [
    pytest.param(name, seed, marks=() if seed == place % 3 else pytest.mark.slow)
    for place, name in enumerate(MODELS)
    for seed in range(3)
]


@pytest.mark.parametrize(("name", "seed"), PLANTED)
def test_equal_outputs_and_fewer_parameters_that_are_a_fixed_point(name: str, seed: int):
    model, example = planted(name, seed=seed)
    before = copy.deepcopy(model.state_dict())
    small = compact(model, example)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert small.training and model.training
    x = other_batch(example)
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-4, atol=2e-5)
    old, new = small.compaction.parameters
    assert new <= old
    assert new == sum(p.numel() for p in small.parameters())
    if not name.startswith(PLANNED):
        assert new < old
    assert type(small) is type(model) or name in GRAPHS
    again = compact(small, example)
    assert again.compaction.parameters[0] == again.compaction.parameters[1] == new


def test_the_small_model_has_the_methods_of_the_whole_one_and_keeps_frozen_what_is():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

        def encode(self, x):
            return torch.relu(self.first(x))

        def forward(self, x):
            return self.last(self.encode(x))

    model = Encoder()
    with torch.no_grad():
        model.first.weight[::2] = model.first.bias[::2] = 0
    model.first.requires_grad_(False)
    x = torch.randn(6, 5)
    small = compact(model, x)
    assert small.encode(x).shape == (6, 4)
    torch.testing.assert_close(small.last(small.encode(x)), model(x))
    frozen = {name for name, p in small.named_parameters() if not p.requires_grad}
    assert frozen == {"first.weight", "first.bias"}


def test_a_language_model_still_generates_with_its_cache():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[:, ::2] = 0
    prompt = torch.randint(3, 40, (2, 5))
    small = compact(model, prompt)
    assert small.transformer.h[0].mlp.c_fc.out_features == 32
    assert small.config.use_cache and model.config.use_cache
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(small.generate(prompt, **settings), model.generate(prompt, **settings))


@pytest.mark.parametrize("name", MODELS)
def test_nothing_to_remove_is_left_alone(name: str):
    torch.manual_seed(0)
    model, example = MODELS[name]()
    small = compact(model.eval(), example)
    assert small.compaction.parameters[0] == small.compaction.parameters[1]
    assert small.compaction.stuck == {}
    torch.testing.assert_close(small(example), model(example))


def test_every_dead_and_unused_unit_goes():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 15), nn.ReLU())
    model.append(nn.Linear(15, 4))
    with torch.no_grad():
        model[0].weight[:6] = 0  # constants
        model[2].weight[:, 6:9] = 0  # unused
        model[4].weight[:, 3:] = 0
        model[0].weight[:, 7:] = 0  # three inputs are ignored
    small = compact(model, torch.randn(3, 10))
    assert small.compaction.units == {"0": (20, 11), "2": (15, 3), "4": (4, 4)}
    assert small.compaction.parameters[1] == 7 * 11 + 11 + 11 * 3 + 3 + 3 * 4 + 4
    assert small.compaction.flops[0] / small.compaction.flops[1] > 3
    assert "2.92x" in str(small.compaction) or "smaller" in str(small.compaction)


def test_unused_units_propagate_backwards():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    with torch.no_grad():
        model[3].weight[:, 4:] = 0
        model[2].weight[:4, 4:] = 0  # only unused rows of layer 2 read units 4: of layer 1
    small = compact(model, torch.randn(2, 8))
    assert [small.compaction.units[k][1] for k in "0123"] == [8, 4, 4, 8]


def test_a_dead_attention_head_goes():
    torch.manual_seed(0)
    block = Block()
    with torch.no_grad():
        block.proj.weight[:, 3:6] = 0  # head 1 is unused
        block.qkv.weight[24 + 9 : 24 + 12] = 0  # head 3 returns its value bias
    small = compact(block, torch.randn(2, 5, 12))
    assert small.get_submodule("qkv").out_features == 3 * 6
    assert small.get_submodule("proj").in_features == 6


def test_heads_of_multihead_attention_go_with_masks():
    torch.manual_seed(0)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 4, dropout=0.2)

        def forward(self, x, mask, padding):
            return self.attention(x, x, x, padding, False, mask)[0]

    model = Masked().eval()
    with torch.no_grad():
        model.attention.in_proj_bias.normal_()
        model.attention.out_proj.weight[:, 3:6] = 0
        model.attention.in_proj_weight[24 + 9 : 24 + 12] = 0
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 4] = True
    mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    inputs = (torch.randn(5, 2, 12), mask, padding)
    small = compact(model, inputs)
    assert small.get_submodule("attention").heads == 2
    torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_transformer_loses_heads_and_width_on_both_sides(norm_first, batch_first):
    torch.manual_seed(0)
    model = nn.Transformer(
        12, 3, 1, 1, 20, norm_first=norm_first, batch_first=batch_first, dropout=0.3
    ).eval()
    layers = [model.encoder.layers[0], model.decoder.layers[0]]
    with torch.no_grad():
        for layer in layers:
            layer.linear1.weight[:8], layer.linear1.bias[:8] = 0, 0
            layer.self_attn.out_proj.weight[:, 4:8] = 0
        layers[1].multihead_attn.out_proj.weight[:, :4] = 0

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.seq = model
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5))

        def forward(self, source, target, padding):
            return self.seq(source, target, tgt_mask=self.mask, src_key_padding_mask=padding)

    padding = torch.zeros(2, 4, dtype=torch.bool)
    padding[0, 3] = True
    inputs = tuple(torch.randn(2, n, 12) for n in (4, 5))
    inputs = inputs if batch_first else tuple(x.transpose(0, 1).contiguous() for x in inputs)
    small = compact(Both().eval(), (*inputs, padding))
    units = {name: after for name, (_, after) in small.compaction.units.items()}
    for side in ("encoder", "decoder"):
        assert units[f"seq.{side}.layers.0.linear1"] == 12
        assert units[f"seq.{side}.layers.0.self_attn heads"] == 2
    assert units["seq.decoder.layers.0.multihead_attn heads"] == 2
    assert type(model.encoder.layers[0]) is nn.TransformerEncoderLayer
    torch.testing.assert_close(
        small(*inputs, padding), Both().eval()(*inputs, padding), rtol=1e-4, atol=1e-5
    )


class NormalisedHeads(nn.Module):
    """Attention that normalises queries and keys in each head, as in Qwen3."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 4)
        self.of_query, self.of_key = nn.RMSNorm(3), nn.LayerNorm(3)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 3)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(self.of_query(q), self.of_key(k), v)
        return self.out(seen.transpose(1, 2).flatten(2))


def test_heads_go_whose_queries_and_keys_are_normalised():
    torch.manual_seed(0)
    model, x = NormalisedHeads(), torch.randn(3, 5, 12)
    for norm in (model.of_query, model.of_key):
        nn.init.normal_(norm.weight)
    with torch.no_grad():
        model.out.weight[:, 3:6] = 0  # nothing reads head 1
    small = compact(model, x)
    assert small.get_submodule("qkv").out_features == 27
    other = torch.randn(2, 7, 12)
    torch.testing.assert_close(small(other), model(other))


class Shared(nn.Module):
    """Attention that is used twice, or whose weights are read."""

    def __init__(self, times):
        super().__init__()
        self.attention, self.times = nn.MultiheadAttention(8, 4, batch_first=True), times

    def forward(self, x):
        for _ in range(self.times):
            x, weights = self.attention(x, x, x)
        return x if self.times > 1 else (x, weights)


@pytest.mark.parametrize(
    ("times", "why"), [(2, "in more than one place"), (1, "weights are used")]
)
def test_dead_heads_that_stay_are_named(times, why):
    model, x = Shared(times), torch.randn(2, 5, 8)
    with torch.no_grad():
        model.attention.out_proj.weight[:, 2:4] = 0
    stuck = compact(model, x).compaction.stuck
    assert stuck["attention"].startswith("1 units (") and why in stuck["attention"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=f"compact will not remove heads of attention: .*{why}"):
        tk.sparsify(model, optimizer, 0.5, of="heads", steps=4, example=x)


class MaskedProduct(nn.Module):
    """scaled_dot_product_attention under a mask of the model's own, by position or by head."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 4)
        self.register_buffer("mask", mask)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 3)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("shape", [(5, 5), (1, 1, 5, 5), (4, 5, 5), (1, 4, 5, 5)])
def test_a_mask_of_attention_stays_whole(shape):
    torch.manual_seed(0)
    model = MaskedProduct(torch.randn(shape)).eval()
    with torch.no_grad():
        model.out.weight[:, 3:6] = 0
    x = torch.randn(2, 5, 12)
    small = compact(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    by_head = 4 in shape
    assert ("a mask for each head" in str(small.compaction.stuck)) == by_head
    assert (small.compaction.parameters[1] < small.compaction.parameters[0]) != by_head


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("hook", ["structured", "unstructured", "weight_norm"])
def test_weights_that_a_hook_computes_become_plain(hook):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    if hook == "weight_norm":
        nn.utils.weight_norm(model[0])
        model[0].weight_g.data[:5] = 0
    elif hook == "structured":
        prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    else:
        rows = torch.ones(10, 6)
        rows[:5] = 0
        prune.custom_from_mask(model[0], "weight", rows)
    x = torch.randn(7, 6)
    model(x).sum().backward()
    small = compact(model, x)
    assert small.get_submodule("0").out_features == 5
    assert "weight" not in dict(model[0].named_parameters())  # the user's own is as it was
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_layer_norm_keeps_its_statistics():
    model = nn.Sequential(nn.Linear(4, 10), nn.LayerNorm(10), nn.Linear(10, 2))
    with torch.no_grad():
        model[0].weight[6:] = 0
        model[1].weight[6:] = 0
        model[1].bias.normal_()
    small = compact(model, torch.randn(3, 4))
    assert small.get_submodule("1").weight.shape == (6,)
    assert small.get_submodule("1").absent == 4


def test_a_group_norm_keeps_its_statistics():
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(3, 12), nn.Conv2d(12, 2, 1))
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
        model[1].bias.normal_()
        model[2].weight[:, 4:8] = 0  # nobody looks at the second group
        small = compact(model, torch.randn(2, 3, 4, 4)).get_submodule("1")
        assert isinstance(small, nn.GroupNorm)
        assert (small.num_groups, small.num_channels) == (2, 8)
        model[0].weight[9:11] = 0  # two constants that count in the third
        model[2].weight[:, 9:11] = 0
    x = torch.randn(4, 3, 6, 5)  # another size than the example
    small = compact(model, torch.randn(2, 3, 4, 4))
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert small.get_submodule("1").weight.shape == (6,)
    assert small.get_submodule("1").absent[0].tolist() == [0, 2]


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_of_a_convolution_stay_of_one_size(transposed: bool):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 12, 1), nn.ReLU(), kind(12, 9, 2, groups=3), nn.ReLU())
    model.append(nn.Conv2d(9, 2, 1))
    with torch.no_grad():
        model[4].weight[:, :3] = 0  # the first group is not read
        model[2].bias.normal_()
        model[0].weight[4:7] = 0  # the second group reads one channel only
        model[0].bias[4:7] = torch.tensor([1.0, -1.0, 2.0])
        model[0].weight[8] = 0  # and the third three
        model[0].bias[8] = -1.0
    small = compact(model, torch.randn(2, 2, 5, 5))
    cut = small.get_submodule("2")
    assert (cut.groups, cut.in_channels, cut.out_channels) == (2, 6, 6)
    x = torch.randn(3, 2, 7, 4)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_units_of_a_recurrent_state_go_and_stay_one_module(kind):
    torch.manual_seed(0)
    model = MODELS["gru"]()[0]
    model.rnn = kind(6, 5)
    with torch.no_grad():
        for weight in (model.rnn.weight_ih_l0, model.rnn.weight_hh_l0):
            weight.view(-1, 5, weight.shape[1])[:, 1] = 0  # unit 1 stays at zero
        for bias in (model.rnn.bias_ih_l0, model.rnn.bias_hh_l0):
            bias.view(-1, 5)[:, 1] = 0
        model.rnn.weight_hh_l0[:, 3] = 0  # nobody hears unit 3
        model.out.weight[:, 3] = 0
        model.rnn.weight_hh_l0.view(-1, 5, 5)[:, [0, 2], 4] = 0  # only unit 3 hears unit 4,
        model.rnn.weight_hh_l0.view(-1, 5, 5)[:, 4, 4] = 0  # which nobody sees
        model.out.weight[:, 4] = 0
        model.rnn.weight_ih_l0[:, 2] = 0  # an input that is not read
    example = torch.randn(4, 2, 4)
    small = compact(model, example)
    cut = small.get_submodule("rnn")
    assert type(cut) is kind
    assert (cut.input_size, cut.hidden_size) == (5, 2)
    x = torch.randn(9, 3, 4)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_unit_of_the_state_with_a_bias_of_its_own_is_no_constant():
    model = MODELS["gru"]()[0]
    with torch.no_grad():
        for weight in (model.rnn.weight_ih_l0, model.rnn.weight_hh_l0):
            weight.view(3, 5, -1)[:, 1] = 0
        model.rnn.bias_hh_l0.view(3, 5)[2, 1] = 1.0  # it grows from zero
        model.rnn.bias_ih_l0.view(3, 5)[2, 1] = 0.0
    assert compact(model, torch.randn(4, 2, 4)).get_submodule("rnn").hidden_size == 5


def test_layers_and_directions_of_a_recurrent_stack_shrink_apart():
    torch.manual_seed(0)
    model = MODELS["gru-deep"]()[0].eval()
    with torch.no_grad():
        model.out.weight[:, [0, 1, 7]] = 0
        for suffix in ("_l1", "_l1_reverse"):
            getattr(model.rnn, f"weight_hh{suffix}").zero_()
            getattr(model.rnn, f"weight_ih{suffix}")[:, 4:8] = 0
        for suffix in ("_l0", "_l0_reverse"):
            getattr(model.rnn, f"weight_hh{suffix}").zero_()
    small = compact(model, torch.randn(2, 4, 4))
    sizes = [cell.hidden_size for cell in small.get_submodule("rnn.cells")]
    assert sizes == [4, 2, 3, 4]
    assert small.compaction.units["rnn layer 0"] == (10, 6)
    x = torch.randn(3, 6, 4)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_given_first_state_is_refused_by_name():
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.gru, self.out = nn.Linear(4, 6), nn.GRU(6, 5), nn.Linear(5, 2)

        def forward(self, x, state):
            return self.out(self.gru(self.inp(x), state)[0])

    model = Given()
    with torch.no_grad():
        model.inp.weight[:3] = 0
    small = compact(model, (torch.randn(4, 2, 4), torch.randn(1, 2, 5)))
    assert "an initial state is given" in small.compaction.stuck["inp"]


@pytest.mark.parametrize("style", ["fill", "add", "bmm"])
def test_heads_of_attention_by_matrix_products_go(style: str):
    torch.manual_seed(0)
    model, example = MODELS[f"attention-{style}"]()
    values = model.apart[2].weight if style == "add" else model.qkv.weight[24:]
    with torch.no_grad():
        model.proj.weight[:, 3:6] = 0  # head 1 is unused
        values[9:12] = 0  # head 3 returns its value bias
    small = compact(model.eval(), example)
    names = [f"apart.{i}" for i in range(3)] if style == "add" else ["qkv"]
    assert sum(small.get_submodule(name).out_features for name in names) == 3 * 6
    assert small.get_submodule("proj").in_features == 6
    x = torch.randn(7, 5, 6)  # another batch size
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_weights_that_do_not_sum_to_one_make_no_constant():
    class Linearised(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out((self.q(x) @ x.transpose(1, 2)) @ self.v(x))

    model = Linearised()
    with torch.no_grad():
        model.v.weight.zero_()  # every row of v is its bias, but the rows are weighted
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(compact(model, x)(x), model(x))


@pytest.mark.parametrize(
    ("operation", "why"),
    [
        (lambda h: torch.einsum("bi,bj->bij", h, h).flatten(1)[:, :6], "no rule for einsum"),
        (lambda h: h @ h.T @ h, "a product other than of"),
        (lambda h: torch.softmax(h, 1), "it normalises over units"),
        (lambda h: h.masked_fill(h > 0, 0.5), "it looks at the data"),
        (lambda h: h.sort(1)[0], "no rule for sort"),
        (lambda h: torch.relu(input=h), "its input is given by keyword"),
    ],
)
def test_an_operation_without_an_exact_cut_is_named(operation, why: str):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(operation(self.a(x)))

    model = Model()
    with torch.no_grad():
        model.a.weight[2:] = 0
    small = compact(model, torch.randn(3, 4))
    assert why in small.compaction.stuck["a"]
    assert small.get_submodule("a").out_features == 6


def test_a_padded_convolution_keeps_a_constant_that_its_border_can_see():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 3, padding=1))
    with torch.no_grad():
        model[0].weight[2:] = 0
        model[0].bias[2], model[0].bias[3] = 1.0, 0.0
    small = compact(model, torch.randn(2, 1, 5, 5))
    assert small.get_submodule("0").out_channels == 3
    model[1].padding = (0, 0)
    assert compact(model, torch.randn(2, 1, 5, 5)).get_submodule("0").out_channels == 2


def test_what_cannot_be_removed_is_named():
    model = nn.Sequential(nn.Linear(4, 6), nn.CircularPad1d(1), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight[2:4] = 0
        model[0].bias[2:4] = 0
    small = compact(model, torch.randn(4, 4))
    assert "2 units" in small.compaction.stuck["0"]
    assert "it pads an axis of units" in small.compaction.stuck["0"]
    shared = nn.Linear(6, 6)
    tied = nn.Sequential(shared, nn.ReLU(), shared)
    assert compact(tied, torch.randn(2, 6)).compaction.parameters == (42, 42)


def test_dead_rows_of_shared_weights_are_named():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(self.tower(x) - self.tower(x.flip(0)))

    model = Twice()
    with torch.no_grad():
        model.tower.weight[:3] = 0
    stuck = compact(model, torch.randn(4, 4)).compaction.stuck
    assert stuck == {"tower": "3 units (its weights are used in more than one place)"}


def test_an_entirely_dead_layer_keeps_one_unit():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[2].weight.zero_()
    x = torch.randn(2, 4)
    small = compact(model, x)
    assert small.get_submodule("0").out_features == 1
    torch.testing.assert_close(small(x), model(x))


@pytest.mark.parametrize("name", ["residual", "gru-deep", "groups", "attention-fill"])
def test_a_small_model_can_be_pickled(name: str):
    model, example = planted(name, seed=1)
    small = compact(model.eval(), example)
    again = pickle.loads(pickle.dumps(small))
    torch.testing.assert_close(again(example), small(example))
    assert again.compaction == small.compaction


def test_a_wrong_cut_is_caught(monkeypatch: pytest.MonkeyPatch):
    from tikhon.compaction.compacting import Analysis

    solve = Analysis.solve

    def careless(self, **options):
        keep = solve(self, **options)
        first, _, _ = self.origin[0]
        keep[first] = False
        return keep

    monkeypatch.setattr(Analysis, "solve", careless)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(RuntimeError, match="compaction changed the outputs by"):
        compact(model, torch.randn(2, 4))


def test_outputs_that_are_not_finite_are_refused_whichever_of_several_they_are():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.first(x), self.second(x)

    for broken in ("first", "second"):
        model = Pair()
        getattr(model, broken).weight.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match="Pair gives outputs that are not finite"):
            compact(model, torch.ones(4, 3))


def test_a_model_that_cannot_be_traced_is_refused():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="Branches cannot be traced"):
        compact(Branches(), torch.randn(2))


def test_half_precision_and_several_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            h = torch.relu(self.a(x))
            return {"logits": self.b(h), "hidden": h}

    model = Two()
    with torch.no_grad():
        model.a.weight[2:] = 0
    small = compact(model, torch.randn(3, 4))
    assert small.get_submodule("a").out_features == 6  # the hidden units are an output
    assert small.compaction.stuck == {}


def test_patches_lose_residual_channels():
    torch.manual_seed(1)
    model = Patches().eval()
    with torch.no_grad():
        for dead in (3, 7):
            model.patch.weight[dead] = 0
            model.patch.bias[dead] = 0.7
            model.token[..., dead] = 0.7
            model.attention.out_proj.weight[dead] = 0
            model.attention.out_proj.bias[dead] = 0
            model.norm.weight[dead] = 0
            model.last.weight[dead] = 0
    small = compact(model, torch.randn(2, 3, 8, 8))
    assert small.get_submodule("patch").out_channels == 10
    assert small.compaction.units["token"] == (12, 10)


def test_a_forward_that_looks_at_sizes_loses_heads_and_width():
    torch.manual_seed(0)
    model, example = MODELS["branching"]()
    with torch.no_grad():
        model.proj.weight[:, :4] = 0
        model.down.weight[:, 3:] = 0
    small = compact(model, example)
    assert small.proj.in_features == 4 and small.qkv.out_features == 12
    assert small.up.out_features == 3 and small.compaction.stuck == {}
    for shape in [(2, 5), (3, 4), (5, 9)]:
        x = torch.randint(0, 11, shape)
        torch.testing.assert_close(small.eval()(x), model.eval()(x))
    small.train()
    assert not torch.equal(small(example), small(example))  # its dropout draws again


class Draws(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + torch.rand_like(x))


def test_a_model_that_draws_in_evaluation_is_refused():
    with pytest.raises(ValueError, match=r"gives other outputs every time .* at random in eval"):
        compact(Draws(3, 2), torch.randn(4, 3))


class Table(nn.Module):
    """A table of which the rows are taken by a buffer of indices that is flattened."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.table = nn.Parameter(torch.randn(7, 3))
        self.register_buffer("index", torch.arange(4).view(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.table[self.index.view(-1)].view(2, 2, 3).sum((0, 1))
        return self.b(torch.relu(self.a(x))) + bias


def test_a_buffer_of_indices_that_is_flattened_stays_one():
    model = Table()
    with torch.no_grad():
        model.b.weight[:, :3] = 0
    small = compact(model, torch.randn(5, 6))
    assert small.a.out_features == 5
    torch.testing.assert_close(small(torch.ones(2, 6)), model(torch.ones(2, 6)))


def test_layers_with_a_forward_of_their_own_lose_units_and_follow_the_mode():
    torch.manual_seed(0)
    model, example = MODELS["functions"]()
    model(example)
    with torch.no_grad():
        for dead in (model.stem, model.norm):
            dead.weight[:3], dead.bias[:3] = 0, 0
        model.filters[5:] = 0
    small = compact(model, example)
    assert small.stem.out_channels == 5 and small.compaction.stuck == {}
    assert small.norm.weight.shape == (5,) and isinstance(small.norm.act, nn.SiLU)
    assert "fc" in small.compaction.units and small.last.gain == 1.5
    seen = small.norm.running_mean.clone()
    assert not torch.equal(small.train()(example), small(example))  # by its dropout
    assert not torch.equal(small.norm.running_mean, seen)
    assert int(small.norm.num_batches_tracked) >= 1


def test_the_small_model_trains_and_is_faster():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU())
    with torch.no_grad():
        model[0].weight[40:] = 0
        model[2].weight[:, 40:] = 0
        model[2].weight[40:] = 0
    x = torch.randn(64, 400)
    model.append(nn.Linear(400, 2))
    small = compact(model, x)
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    assert speedup(model, small, x, rounds=3, seconds=0.02) > 2
    with pytest.raises(ValueError, match="rounds"):
        speedup(model, small, x, rounds=0)


def test_a_small_model_can_be_cut_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[:, 6:] = 0
        once = compact(model, torch.randn(4, 10))
        once.get_submodule("0").linear.weight[:, 1] = 0
        once.get_submodule("0").linear.weight[2:4] = 0
    twice = compact(once, torch.randn(4, 10))
    assert twice.get_submodule("0").columns.tolist() == [0, 2, 3, 4, 5]
    assert twice.get_submodule("0").linear.weight.shape == (6, 5)
    x = torch.randn(4, 10)
    torch.testing.assert_close(twice(x), once(x))


class InPlace(nn.Module):
    """It looks at a number of its input, writes in place, and drops; it may know its width."""

    def __init__(self, width=None):
        super().__init__()
        self.width = width
        self.first, self.drop = nn.Linear(6, 8), nn.Dropout(0.5)
        self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        rows, _ = x.shape
        h = self.first(x)
        h[: rows if rows < 100 else 100].relu_()
        h = self.middle(self.drop(h))
        return self.last(h.reshape(rows, self.width) if self.width else h)


@pytest.mark.parametrize("width", [None, 8])
def test_dropout_that_is_lost_is_told_of(width):
    torch.manual_seed(0)
    model = InPlace(width)
    with torch.no_grad():
        model.middle.weight[5:] = 0
    x = torch.randn(4, 6)
    if width is None:  # its own forward takes the smaller layers
        small = compact(model, x)
        assert type(small) is InPlace
        assert len({small(x).sum().item() for _ in range(5)}) > 1
    else:  # the number in its forward holds the units
        with pytest.warns(UserWarning, match="the small InPlace has no dropout"):
            small = compact(model, x)
    assert small.get_submodule("last").in_features == 5
    torch.testing.assert_close(small.eval()(x), model.eval()(x))


class AddsInPlace(nn.Module):
    """A residual block as torchvision and Hugging Face write it: `out += x`."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        if x.shape[2] > 100:  # a branch: torch.fx cannot follow it
            return x
        out = self.second(torch.relu(self.norm(self.first(x))))
        out += x
        return out


def test_a_block_that_adds_in_place_loses_channels():
    torch.manual_seed(0)
    model = AddsInPlace().eval()
    with torch.no_grad():
        model.first.weight[0] = model.first.bias[0] = model.norm.bias[0] = 0
    small = compact(model, torch.randn(2, 3, 6, 6))
    x = torch.randn(3, 3, 9, 9)
    torch.testing.assert_close(small(x), model(x))
    assert (small.first.out_channels, small.norm.num_features) == (2, 2)


class Written(nn.Module):
    """Two layers; unit 2 of the first is dead, and the last does not read unit 4."""

    def __init__(self, forward):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.matrix, self.filters = (nn.Parameter(torch.randn(4, 6, *size)) for size in ((), (3,)))
        self.scale = nn.Parameter(torch.rand(6))
        self.hidden = forward
        with torch.no_grad():
            self.first.weight[2] = self.matrix[:, 2] = self.filters[:, 2] = 0
            self.last.weight[:, 4] = 0

    def forward(self, x):
        return self.last(torch.relu(self.hidden(self, x)))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: torch.addmm(m.scale, x.view(-1, x.size(-1)), m.matrix),  # as GPT-2 does
        lambda m, x: x @ m.matrix + m.scale,
        lambda m, x: torch.matmul(x, m.matrix),
        lambda m, x: m.first.bias + (x @ m.first.weight.T),
        lambda m, x: x @ m.matrix + m.scale[:1],
        lambda m, x: x @ m.matrix + m.scale[None],
        lambda m, x: x.matmul(m.first.weight.T) + m.first.bias,  # as Falcon does
        lambda m, x: x @ m.first.weight.transpose(0, 1) + m.first.bias,
        lambda m, x: x @ m.first.weight.t(),
        lambda m, x: x @ m.first.weight.permute(dims=(1, 0)),
        lambda m, x: torch.addcmul(m.scale, m.scale, m.first(x)),  # as timm's affine layers do
        lambda m, x: m.first(x.to(m.first.weight.dtype)),
        lambda m, x: m.first(x).reshape(operator.add(x.shape[:1], (6,))),  # a size, whole
        # all arguments in their places, the last of which is the dilation
        lambda m, x: F.conv_transpose1d(x[..., None], m.filters, m.scale, 1, 2, 0, 1, 2).mean(2),
    ],
)
def test_a_layer_loses_units_however_its_call_is_written(forward):
    torch.manual_seed(0)
    model = Written(forward)
    small = compact(model, torch.randn(2, 4))
    x = torch.randn(5, 4)
    torch.testing.assert_close(small(x), model(x))
    assert small.get_submodule("last").in_features == 4


@pytest.mark.parametrize(
    ("shape", "product"),
    [
        ((2, 3, 4), lambda x, w: x @ w.mT),  # one matrix for each row of the batch
        ((2, 3, 4), lambda x, w: x @ w.transpose(-1, -2)),
        ((4, 4), lambda x, w: x @ w.transpose(0, 0)),
    ],
)
def test_a_product_that_is_no_linear_layer_is_computed_as_before(shape, product):
    torch.manual_seed(0)
    model = Written(lambda m, x: product(x, m.matrix))
    model.matrix, model.last = nn.Parameter(torch.randn(shape)), nn.Linear(shape[-2], 3)
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(compact(model, x)(x), model(x))


class Tied(nn.Module):
    """A language model whose outputs are products with the rows of its table."""

    def __init__(self):
        super().__init__()
        self.table, self.middle = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, x):
        return torch.relu(self.middle(self.table(x))) @ self.table.weight.T


def test_a_weight_that_is_read_beside_its_layer_stays_whole():
    torch.manual_seed(0)
    model, example = Tied(), torch.arange(10).view(2, 5)
    with torch.no_grad():
        model.table.weight[:, 1] = model.middle.weight[:, 3] = 0
    small = compact(model, example)
    torch.testing.assert_close(small(example), model(example))
    assert small.get_submodule("table").weight.shape == (11, 8)


class ChoosesKernel(nn.Module):
    """Attention whose result is contiguous or not, as the chosen kernel leaves it."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(8, 8)
        self.out = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x):
        if x.shape[1] > 100:  # a branch: torch.fx cannot follow it
            return x
        part = self.read(x).view(*x.shape[:2], 2, 4).transpose(1, 2)
        mask = torch.zeros(1, 2, x.shape[1], x.shape[1]).add_(0.0)  # changed in place, as in T5
        mixed = nn.functional.scaled_dot_product_attention(part, part, part, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).contiguous().reshape(*x.shape))


def test_an_exported_view_holds_whatever_kernel_of_attention_is_chosen():
    model = ChoosesKernel()
    with torch.no_grad():
        model.out[0].weight[2:] = 0
    small = compact(model, torch.randn(2, 5, 8))
    x = torch.randn(3, 7, 8)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        torch.testing.assert_close(small(x), model(x))
    assert small.compaction.units["out.0"] == (6, 2)
