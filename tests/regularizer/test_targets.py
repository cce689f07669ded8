"""Which parameters a pattern covers, and how their rows are read and written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor

import tikhon as tk
from tikhon.regularizer.targets import ROWS


class Attention(nn.Module):
    """A small model with one of everything."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm((4, 8))
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.head = nn.Linear(8, 3)


MODEL = Attention()
COVERED = [
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "conv.weight",
    "up.weight",
    "head.weight",
]


def names(pattern, **options):
    return [target.name for target in tk.select(MODEL, pattern, **options)]


def test_default_covers_weights_alone():
    assert names("*") == COVERED


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("head.*", ["head.weight"]),
        ("head", ["head.weight"]),
        ("head.bias", ["head.bias"]),
        ("norm.weight", ["norm.weight"]),
        ("*.weight", ["attention.out_proj.weight", "conv.weight", "up.weight", "head.weight"]),
        ("*.out_proj", ["attention.out_proj.weight"]),
        ("h*d", ["head.weight"]),
        ("[cu]*", ["conv.weight", "up.weight"]),
        (nn.Linear, ["attention.out_proj.weight", "head.weight"]),
        (nn.LayerNorm, ["norm.weight"]),
        (nn.Embedding, ["embedding.weight"]),
        (nn.MultiheadAttention, ["attention.in_proj_weight"]),
        (Attention, ["position", "pos_embed"]),
        (("head.weight", nn.Conv2d, "head.*"), ["head.weight", "conv.weight"]),
    ],
)
def test_patterns(pattern, expected):
    assert names(pattern) == expected


def test_one_word_takes_everything():
    everything = [name for name, _ in MODEL.named_parameters()]
    assert names("all") == everything and "norm.bias" in everything
    start = {name: p.detach().clone() for name, p in MODEL.named_parameters()}
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.1)
    with tk.regularize(MODEL, optimizer, {"all": tk.L2(1.0, center=start)}) as reg:
        assert reg.value() == 0
    named = nn.ModuleDict({"all": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    assert [target.name for target in tk.select(named, "all")] == ["all.weight"]


def test_a_tied_embedding_is_left_to_its_own_name_and_type():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "fc": nn.Linear(4, 4)})
    model["head"] = nn.Linear(4, 9, bias=False)
    model["head"].weight = model["embed"].weight
    by_type = tk.audit(model, {nn.Linear: tk.L1(0.1)})
    assert by_type["fc.weight"].terms == ("L1",)
    assert by_type["embed.weight"].terms == () and by_type["embed.weight"].tied_to
    assert by_type["embed.weight"].note == "not matched: embedding"
    for pattern in ("head.weight", "embed.weight", nn.Embedding):
        assert [target.name for target in tk.select(model, pattern)] == ["embed.weight"]
    with pytest.raises(ValueError, match=r"leaves out: e.weight \(embedding\)"):
        tk.select(nn.ModuleDict({"e": model["embed"], "h": model["head"]}), nn.Linear)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "haed.weight",
            r"no parameter matches: unknown pattern 'haed.weight'; did you mean 'head",
        ),
        ("*.bias", r"leaves out: attention.out_proj.bias \(bias\).*name them literally"),
        (nn.GRU, r"no parameter matches: unknown pattern 'GRU'"),
        (("head.*", "tail.*"), r"unknown pattern 'tail.\*'"),
        ("haed.bias", r"Valid: head.bias, (\S+, ){9}\.\.\. \(15 in all\)$"),
    ],
)
def test_an_unmatched_pattern_is_an_error_that_helps(pattern, message):
    with pytest.raises(ValueError, match=message):
        tk.select(MODEL, pattern)


@pytest.mark.parametrize("pattern", [3, None, nn.Linear(2, 2), ("head.weight", 1)], ids=repr)
def test_what_is_no_pattern_is_refused_by_name(pattern):
    with pytest.raises(TypeError, match="a pattern is a glob on names, a module type or a tuple"):
        tk.select(MODEL, pattern)


def brute_rows(weight, rows, name):
    """Rows by explicit loops over channels."""
    if name == "conv.weight":  # (6, 4/2, 3, 3): output channel o sees inputs of group o // 3
        out = [weight[o].flatten() for o in range(6)]
        incoming = [weight[(i // 2) * 3 : (i // 2 + 1) * 3, i % 2].flatten() for i in range(4)]
    else:  # (4, 6/2, 3, 3): input channel i reaches outputs of group i // 2
        incoming = [weight[i].flatten() for i in range(4)]
        out = [weight[(o // 3) * 2 : (o // 3 + 1) * 2, o % 3].flatten() for o in range(6)]
    return torch.stack(out if rows in ("out", "filter") else incoming)


@pytest.mark.parametrize("name", ["conv.weight", "up.weight"])
@pytest.mark.parametrize("rows", ["out", "in", "filter", "channel"])
def test_channels_of_grouped_convolutions(name, rows):
    (target,) = tk.select(MODEL, name, rows=rows)
    weight = MODEL.get_parameter(name).detach()
    assert torch.equal(target.read(), brute_rows(weight, rows, name))


def test_heads_of_attention():
    (target,) = tk.select(MODEL, "attention.in_proj_weight", rows="head")
    weight = MODEL.attention.in_proj_weight.detach()
    for head in range(2):
        own = torch.cat([weight[part * 8 + head * 4 :][:4] for part in range(3)])
        assert torch.equal(target.read()[head], own.flatten())
    (target,) = tk.select(MODEL, "attention.out_proj.weight", rows="head")
    assert torch.equal(target.read()[1], MODEL.attention.out_proj.weight[:, 4:].flatten())


class Attention(nn.Module):
    """4 heads of 2, whose keys and values are shared by two queries each if `shared`."""

    def __init__(self, *, shared=False, told=True, **layers):
        super().__init__()
        self.num_heads = 4
        if told:
            self.head_dim = 2
        for name, rows in layers.items():
            self.add_module(name, nn.Linear(8, rows))


def entries_of_head(kind, head, rows):
    """The flat entries that belong to a head, written out one by one."""
    weight = torch.arange(8 * rows).view(rows, 8)
    if kind == "columns":
        return weight[:, 2 * head : 2 * head + 2]
    if kind == "thirds":
        return torch.cat([weight[8 * part + 2 * head :][:2] for part in range(3)])
    size = 6 if kind == "mixed" else 2
    return weight[size * head : size * head + size]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    ("name", "rows", "kind"),
    [
        *((name, 8, "rows") for name in ("q_proj", "query", "to_q", "wq", "q_lin", "q")),
        *((name, 8, "rows") for name in ("k_proj", "value", "to_v", "wk", "v_lin", "k")),
        *((name, 8, "columns") for name in ("o_proj", "out_proj", "dense", "wo", "proj", "o")),
        *((name, 8, "columns") for name in ("to_out", "out_lin", "c_proj")),
        *((name, 24, "thirds") for name in ("in_proj", "qkv", "c_attn", "Wqkv")),
        ("query_key_value", 24, "mixed"),
    ],
)
def test_matrices_of_heads_are_told_by_their_names(name, rows, kind, told):
    model = nn.Sequential(Attention(told=told, **{name: rows}))
    weight = getattr(model[0], name).weight
    weight.data.copy_(torch.arange(weight.numel()).view(weight.shape))
    (target,) = tk.select(model, f"0.{name}.weight", rows="head")
    assert len(target.read()) == 4
    for head, row in enumerate(target.read()):
        own = entries_of_head(kind, head, rows).flatten().tolist()
        assert sorted(row.tolist()) == sorted(own)


@pytest.mark.parametrize("name", ["k_proj", "v_proj", "key"])
@pytest.mark.parametrize("told", [True, False])
def test_keys_that_several_heads_share_have_fewer_rows(name, told):
    model = Attention(told=told, **{name: 4})
    model.num_key_value_heads = 2
    (target,) = tk.select(model, f"{name}.weight", rows="head")
    weight = getattr(model, name).weight.detach()
    assert torch.equal(target.read(), weight.view(2, 16))


@pytest.mark.parametrize(
    "beside", [{"q_proj": 8}, {"o_proj": 8}, {"to_q": 8, "to_out": 8}], ids=lambda b: "+".join(b)
)
@pytest.mark.parametrize("name", ["k_proj", "to_v", "value"])
def test_shared_keys_are_told_by_the_matrices_beside(name, beside):
    model = Attention(told=False, **{name: 4}, **beside)
    (target,) = tk.select(model, f"{name}.weight", rows="head")
    assert torch.equal(target.read(), getattr(model, name).weight.detach().view(2, 16))


def test_shared_keys_that_nothing_tells_are_not_guessed():
    model = Attention(told=False, k_proj=4)
    with pytest.raises(ValueError, match=r"nothing tells how many heads 'k_proj.weight' has"):
        tk.select(model, "k_proj.weight", rows="head")
    model.config = type("Config", (), {"num_key_value_heads": 1})()
    assert len(tk.select(model, "k_proj.weight", rows="head")[0].read()) == 1


def test_a_joint_matrix_with_shared_keys_is_refused_where_it_divides_by_chance():
    model = Attention(told=False, qkv=12, o_proj=8)  # 8 rows of queries, 2 of keys, 2 of values
    with pytest.raises(ValueError, match="a joint matrix has no rows of heads"):
        tk.select(model, "qkv.weight", rows="head")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"gate": 8}, r"'gate\.weight' has none of those known; use rows=\"out\""),
        ({"mlp": 8}, r"'mlp\.weight' has none of those known"),
        ({"qkv": 16}, r"16 entries of 'qkv\.weight' along dimension 0 do not divide into 3 x 4"),
        ({"q_proj": 10}, r"10 entries of 'q_proj\.weight'.* do not divide into 4"),
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_what_has_no_rows_of_heads_is_refused_by_name(layers, message, told):
    model = Attention(told=told, **layers)
    (name,) = layers
    with pytest.raises(ValueError, match=message):
        tk.select(model, f"{name}.weight", rows="head")


def test_heads_of_hugging_face_are_found():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=10,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=16,
    )
    model = transformers.LlamaModel(config)
    rows = {
        name: tk.select(model, f"*{name}_proj.weight", rows="head")[0].read().shape
        for name in "qkvo"
    }
    assert rows == {"q": (4, 64), "k": (2, 64), "v": (2, 64), "o": (4, 64)}


@pytest.mark.parametrize(
    ("pattern", "rows", "message"),
    [
        ("head.weight", "filter", "needs a convolution, 'head.weight' belongs to Linear"),
        ("head.weight", "head", "needs a matrix inside a module with num_heads"),
        ("head.bias", "in", "needs two dimensions, 'head.bias' has 1"),
        ("head.weight", "row", "unknown rows 'row'.*Valid: channel, feature, filter"),
        (("head.weight", "conv.weight"), "feature", "same number of input features.*8.*4"),
    ],
)
def test_rows_that_do_not_exist(pattern, rows, message):
    with pytest.raises(ValueError, match=message):
        tk.select(MODEL, pattern, rows=rows)


@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    rows=st.sampled_from(["tensor", "out", "in", "feature"]),
    last=st.booleans(),
)
def test_writing_what_was_read_is_the_identity(shape, rows, last):
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(shape))
    if last and len(shape) == 4:
        model.weight.data = model.weight.data.to(memory_format=torch.channels_last)
    (target,) = tk.select(model, "weight", rows=rows)
    before, strides = model.weight.detach().clone(), model.weight.stride()
    matrix = target.read()
    target.write_(matrix.clone())
    assert torch.equal(model.weight.detach(), before)
    target.write_(2 * matrix)
    assert torch.equal(model.weight.detach(), 2 * before)
    assert model.weight.stride() == strides
    expected = {"tensor": 1, "out": shape[0]}.get(rows, shape[1])
    assert matrix.shape == (expected, before.numel() // expected)


def test_every_kind_of_rows_is_covered_here():
    here = {"tensor", "out", "in", "filter", "channel", "head", "feature"}
    assert set(ROWS) == here | {"product"}  # in test_product.py


def test_default_rows_are_the_penaltys_own():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, 0.1, 0.1], [3.0, 0.0, 0.0]]))
    reg = tk.regularize(model, optimizer, tk.GroupLasso(1.0))
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    torch.testing.assert_close(
        model.weight.detach(), torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    )
    reg.remove()
    tk.regularize(model, optimizer, tk.Term(tk.GroupLasso(1.0), rows="tensor"))
    optimizer.step()
    torch.testing.assert_close(
        model.weight.detach(), torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    )


class NormFreeLinear(nn.Linear):
    """A linear layer, whatever its name says."""


class LayerNormCell(nn.Module):
    """A cell with matrices and a scale a channel, as people write them."""

    def __init__(self):
        super().__init__()
        self.weight_hh = nn.Parameter(torch.randn(8, 4))
        self.gamma = nn.Parameter(torch.ones(1, 8, 1, 1))


def test_defaults_go_by_what_a_module_is():
    model = nn.Sequential(NormFreeLinear(4, 4), LayerNormCell(), nn.LayerNorm((4, 8)))
    assert [target.name for target in tk.select(model)] == ["0.weight", "1.weight_hh"]
    notes = {row.parameter: row.note for row in tk.audit(model, tk.L2(0.1)).assignments}
    assert notes["1.gamma"] == "not matched: normalisation scale"
    assert notes["2.weight"] == "not matched: normalisation scale"


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("relative_position_bias_table", (169, 4), "bias"),
        ("attention_biases", (4, 49), "bias"),
        ("pos_bias_u", (4, 8), "bias"),
        ("rel_pos_h", (27, 8), "embedding"),
        ("width_rel", (23, 8), "embedding"),
        ("mask_token", (1, 8), "embedding"),
        ("query_tokens", (1, 6, 8), "embedding"),
        ("W_pos", (5, 8), "embedding"),
        ("latents", (6, 8), "embedding"),
        ("A_log", (8, 4), "logarithm"),
        ("log_scale", (2, 1), "normalisation scale"),
        ("w_g", (8, 1), ""),
        ("query", (8, 8), ""),
        ("experts_gate_up_proj", (4, 8, 8), ""),
        ("relative_position_proj", (8, 8), ""),
        ("tokens_weight", (8, 8), ""),
        ("b", (8, 2), ""),
    ],
)
def test_tables_and_scales_of_ones_own_are_told_by_the_words_of_their_names(name, shape, reason):
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.ones(shape)))
    note = tk.audit(nn.ModuleList([model, nn.Linear(2, 2)]), tk.L1(0.1))[f"0.{name}"].note
    assert note == (f"not matched: {reason}" if reason else "")


def test_tables_of_public_models_are_left_out_and_their_matrices_taken():
    transformers = pytest.importorskip("transformers")
    sizes = {"embed_dim": 8, "depths": [1], "num_heads": [2], "image_size": 16, "patch_size": 4}
    swin = transformers.SwinModel(transformers.SwinConfig(**sizes, window_size=2))
    mamba = transformers.MambaModel(
        transformers.MambaConfig(vocab_size=9, hidden_size=8, state_size=4, num_hidden_layers=1)
    )
    for model, table in [(swin, "relative_position_bias_table"), (mamba, "A_log")]:
        rows = tk.audit(model, tk.L1(0.1)).assignments
        weights = (nn.Linear, nn.Conv1d, nn.Conv2d)
        owned = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, weights)}
        assert {row.parameter for row in rows if row.terms} == owned
        assert any(row.parameter.endswith(table) and not row.terms for row in rows)


class Table(nn.Module):
    """An embedding that is not torch's."""

    def __init__(self):
        super().__init__()
        self.weight, self.padding_idx = nn.Parameter(torch.ones(9, 4)), None


class Standardised(nn.Conv2d):
    """A convolution with a gain for each channel."""

    def __init__(self):
        super().__init__(3, 4, 3)
        self.gain = nn.Parameter(torch.ones(4, 1, 1, 1))


@pytest.mark.parametrize(
    ("module", "taken"), [(Table(), []), (Standardised(), ["0.weight"])], ids=["table", "gain"]
)
def test_what_is_beside_a_weight_goes_by_what_its_module_is(module, taken):
    model = nn.ModuleList([module, nn.Linear(2, 2)])
    assert [target.name for target in tk.select(model)] == [*taken, "1.weight"]


def test_a_layer_with_one_output_is_no_scale():
    model = nn.Sequential(nn.Linear(5, 1), nn.Conv2d(3, 1, 1), nn.Conv1d(1, 1, 4))
    assert len(tk.select(model)) == 3


def test_a_pruned_weight_is_explained_as_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    prune.l1_unstructured(model[0], "weight", 0.5)
    note = tk.audit(model, {"1.weight": tk.L1(0.1)})["0.weight_orig"].note
    assert "pruned by torch.nn.utils.prune" in note
    with pytest.raises(ValueError, match=r"'0.weight' is pruned.*prune.remove"):
        tk.select(model, "0.weight")
    assert [target.name for target in tk.select(model, "0.weight_orig")] == ["0.weight_orig"]


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_older_reparametrisations_are_named_by_what_they_are():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    nn.utils.spectral_norm(model[1])
    notes = {
        row.parameter: row.note for row in tk.audit(model, {"0.bias": tk.L2(0.1)}).assignments
    }
    assert "direction of a weight under weight_norm" in notes["0.weight_v"]
    assert "stored values of a weight under spectral_norm" in notes["1.weight_orig"]


def test_rows_of_conv1d_are_those_of_the_linear_layer_it_is():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Attention(nn.Module):
        def __init__(self, c_attn, c_proj):
            super().__init__()
            self.num_heads, self.c_attn, self.c_proj = 3, c_attn, c_proj

    stored, usual = (
        Attention(Conv1D(18, 6), Conv1D(6, 6)),
        Attention(nn.Linear(6, 18), nn.Linear(6, 6)),
    )
    for name in ("c_attn", "c_proj"):
        with torch.no_grad():
            getattr(usual, name).weight.copy_(getattr(stored, name).weight.T)
        for rows in ("out", "in", "head"):
            (one,), (other,) = (tk.select(m, f"{name}.weight", rows=rows) for m in (stored, usual))
            first, second = one.read(), other.read()
            assert (
                len(first)
                == len(second)
                == {"out": 18 if name == "c_attn" else 6}.get(rows, 3 if rows == "head" else 6)
            )
            for a, b in zip(first, second):  # the same numbers in each row
                assert torch.equal(a.sort().values, b.sort().values)


def test_group_lasso_on_conv1d_zeroes_outputs():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = Conv1D(3, 5)
    nn.init.constant_(layer.weight, 1.0)
    layer.weight.data[:, 1] = 0.01
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    tk.regularize(layer, optimizer, {"weight": tk.GroupLasso(1.0)})
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert layer.weight.any(0).tolist() == [True, False, True]


PADDED = [tk.UnitNorm(), tk.MaxNorm(0.1), tk.Box(0.2, 0.3), tk.Simplex(), tk.L1(1.0)]


@pytest.mark.parametrize("penalty", PADDED, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_the_padding_row_of_an_embedding_is_no_weight(kind, penalty, start):
    model = kind(5, 3, padding_idx=2)
    nn.init.constant_(model.weight, 1.0)
    model.weight.data[2] = start
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    tk.regularize(model, optimizer, {"weight": tk.Term(penalty, rows="out")})
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.tensor([[0, 1, 2]])).sum().backward()
        optimizer.step()
    assert (model.weight[2] == start).all() and (model.weight[[0, 1, 3]] != 1.0).any()


@pytest.mark.parametrize(
    ("part", "said"),
    [(lambda m: m[0], r"received the Linear '0': write that name"),
     (lambda m: m[0].weight, r"received the Parameter '0.weight': write that name"),
     (lambda m: nn.Linear(2, 2), r"received a Linear$"), (lambda m: 3, r"received a int$")],
)  # fmt: skip
def test_what_is_no_pattern_is_told_by_its_name_not_by_its_numbers(part, said):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=said):
        tk.select(model, part(model))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn, "TwoTensor"]
)
def test_codes_of_a_quantised_weight_are_no_weights(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    weight = model[0].weight.detach()  # torchao's quantised tensors are of several such
    codes = TwoTensor(weight, weight) if dtype == "TwoTensor" else weight.to(dtype)
    model[0].weight = nn.Parameter(codes, requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for pattern, names in (("*", ["1.weight"]), (nn.Linear, ["1.weight"]), ("all", ["0.bias"])):
        with tk.regularize(model, optimizer, {pattern: tk.L2(0.1)}) as reg:
            held = {n: p for n, p in model.named_parameters() if n in (*reg.sparsity(), *names)}
            assert "0.weight" not in held
            own = 0.05 * sum(p.detach().square().sum() for p in held.values())
            torch.testing.assert_close(reg.value(), own)
            assert reg.audit()["0.weight"].note == "not matched: codes of a quantised weight"
    with pytest.raises(ValueError, match=f"'0.weight' holds codes of a quantised weight .{dtype}"):
        tk.regularize(model, optimizer, {"0.weight": tk.L1(0.1)})
