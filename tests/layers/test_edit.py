import copy
import pickle

import pytest
import torch
from torch import nn

from tikhon import layers


class Attentive(nn.Module):
    """One of everything whose rate is fixed."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.rnn = nn.LSTM(8, 4, 2, dropout=0.3, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.4), nn.Linear(4, 3))

    def forward(self, x):
        x = x + self.attention(x, x, x)[0]
        return self.head(self.norm(self.rnn(x)[0][:, -1]))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


def fingerprint(model):
    """All that makes a model, except the values of its tensors."""
    return [
        (
            path,
            type(m),
            {k: v for k, v in vars(m).items() if isinstance(v, (int, float, str, bool, tuple))},
            list(m._modules),
            list(m._parameters),
            list(m._buffers),
            list(m._forward_hooks.values()),
            list(m._forward_pre_hooks.values()),
        )
        for path, m in model.named_modules()
    ]


@pytest.mark.parametrize("where", ["after", "before"])
def test_inserted_noise_acts_moves_and_leaves_without_a_trace(where):
    model, x = mlp(), torch.randn(5, 6)
    before, names, state = model(x), list(dict(model.named_parameters())), fingerprint(model)
    keys = list(model.state_dict())
    edit = layers.insert_dropout(model, {nn.Linear: layers.Dropout(0.5)}, where=where)
    assert list(dict(model.named_parameters())) == names
    assert len(edit.paths) == 3
    assert not torch.equal(model(x), before)
    assert layers.set_rate(model, edit.paths[1], 0.1) == [edit.paths[1]]
    layers.set_rate(model, "*", 0.0)
    assert torch.equal(model(x), before)
    edit.undo()
    assert fingerprint(model) == state
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), before)


def test_the_layer_itself_is_where_it_was_asked_for():
    model, x = mlp(), torch.ones(400, 6)
    with layers.insert_dropout(model, {"0": layers.Dropout(0.5)}):
        seen = []
        handle = model[1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        model(x)
        handle.remove()
    assert 0.4 < (seen[0] == 0).float().mean() < 0.6
    assert not hasattr(model[0], "noise_after")


def test_an_old_checkpoint_loads_into_an_edited_model():
    model, old = mlp(), mlp().state_dict()
    layers.insert_dropout(model, {"0": layers.Dropout(0.25)})
    model.load_state_dict(old, strict=True)
    assert model[0].noise_after.rate == 0.25


def test_an_edited_model_survives_copy_pickle_and_a_compiler():
    model, x = mlp(), torch.ones(3, 6)
    layers.insert_dropout(model, {"0": layers.Dropout(0.5)})
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layers.set_rate(other, "*", 0.0)
        assert model[0].noise_after.rate == 0.5
        assert torch.equal(other(x), other.eval()(x))
    torch.compile(model, backend="eager", fullgraph=True)(x)


def test_globs_take_the_outermost_module_and_skip_containers():
    model = nn.Sequential()
    model.blocks = nn.Sequential(mlp(), mlp())
    model.blocks[0] = nn.TransformerEncoderLayer(4, 1, 4)
    edit = layers.insert_dropout(model, {"blocks.*": layers.DropPath(0.1)})
    assert edit.paths == ["blocks.0.noise_after", *(f"blocks.1.{k}.noise_after" for k in range(5))]


def test_noise_on_a_tuple_goes_to_its_first_tensor():
    model = nn.ModuleDict({"rnn": nn.LSTM(3, 4)})
    layers.insert_dropout(model, {"rnn": layers.Dropout(0.9)})
    output, (state, _) = model["rnn"](torch.ones(50, 1, 3))
    assert (output == 0).any() and (state != 0).all()


def test_fixed_rates_become_layers_and_come_back():
    torch.manual_seed(0)
    model, x = Attentive(), torch.randn(6, 5, 8)
    state, keys = fingerprint(model), list(model.state_dict())
    expected = model.eval()(x)
    model.train()
    edit = layers.replace_dropout(model)
    assert edit.paths == ["attention.attention_dropout", "rnn.between_layers", "head.1"]
    rates = {s.path: round(s.rate, 6) for s in layers.audit(model)}
    assert list(rates.values()) == [0.2, 0.3, 0.4]
    assert all(s.moving for s in layers.audit(model))
    torch.testing.assert_close(model.eval()(x), expected)
    model.train()
    layers.set_rate(model, "*", 0.0)
    model.norm.eval()
    torch.testing.assert_close(model(x), expected)  # without noise, training is evaluation
    layers.set_rate(model, "rnn*", 0.5)
    assert not torch.allclose(model(x), expected)
    model.train()
    edit.undo()
    assert fingerprint(model) == state
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True, "add_bias_kv": True},
        {"kdim": 5, "vdim": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("masks", ["none", "bool", "float", "heads", "unbatched"])
def test_attention_equals_torch_under_the_same_mask(options, masks):
    torch.manual_seed(0)
    batch, length, keys, heads = 3, 4, 6, 2
    torch_one = nn.MultiheadAttention(8, heads, dropout=0.5, **options)
    own = nn.ModuleDict({"a": copy.deepcopy(torch_one)})
    layers.replace_dropout(own)
    query = torch.randn(length, batch, 8)
    key = torch.randn(keys, batch, options.get("kdim", 8))
    value = torch.randn(keys, batch, options.get("vdim", 8))
    inputs = [query, key, value]
    if masks == "unbatched":
        inputs = [x[:, 0] for x in inputs]
    elif options.get("batch_first"):
        inputs = [x.transpose(0, 1) for x in inputs]
    arguments = {}
    if masks == "bool":
        arguments["attn_mask"] = torch.rand(length, keys) < 0.3
        arguments["key_padding_mask"] = torch.zeros(batch, keys, dtype=torch.bool)
        arguments["key_padding_mask"][:, -1] = True
    if masks == "float":
        arguments["attn_mask"] = torch.randn(length, keys)
        arguments["key_padding_mask"] = torch.randn(batch, keys)
    if masks == "heads":
        arguments["attn_mask"] = torch.randn(batch * heads, length, keys)
    for average in (True, False):
        results = []
        for module in (torch_one, own["a"]):
            torch.manual_seed(1)
            results.append(module(*inputs, average_attn_weights=average, **arguments))
        for theirs, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_a_seeded_block_draws_the_masks_of_torchs(kind, batch_first):
    torch.manual_seed(0)
    theirs = kind(8, 2, 16, dropout=0.3, batch_first=batch_first)
    ours = copy.deepcopy(theirs)
    layers.replace_dropout(ours)
    x, memory = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    inputs = (x,) if kind is nn.TransformerEncoderLayer else (x, memory)
    results = []
    for block in (theirs, ours):
        torch.manual_seed(1)
        results.append(block(*inputs))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("given_state", [False, True])
def test_recurrent_stack_without_noise_equals_torch(kind, options, given_state):
    torch.manual_seed(0)
    theirs = kind(3, 4, 3, dropout=0.5, **options)
    own = nn.ModuleDict({"rnn": copy.deepcopy(theirs)})
    layers.replace_dropout(own)
    layers.set_rate(own, "*", 0.0)
    directions = 2 if options else 1
    x = torch.randn(5, 5, 3)
    h = torch.randn(3 * directions, 5, 4) if given_state else None
    state = (h, h) if given_state and kind is nn.LSTM else h
    for ours, expected in zip(own["rnn"](x, state), theirs.eval()(x, state), strict=True):
        torch.testing.assert_close(ours, expected)


def test_recurrent_stack_takes_packed_sequences_and_drops_between_layers():
    torch.manual_seed(0)
    theirs = nn.LSTM(3, 4, 2, dropout=0.5)
    own = nn.ModuleDict({"rnn": copy.deepcopy(theirs)})
    layers.replace_dropout(own)
    x = nn.utils.rnn.pack_padded_sequence(
        torch.randn(5, 3, 3), torch.tensor([2, 5, 3]), enforce_sorted=False
    )
    noisy, noisy_state = own["rnn"](x)
    layers.set_rate(own, "*", 0.0)
    quiet, state = own["rnn"](x)
    expected, expected_state = theirs.eval()(x)
    torch.testing.assert_close(quiet.data, expected.data)
    torch.testing.assert_close(state, expected_state)
    assert not torch.allclose(noisy.data, quiet.data)
    same = [torch.allclose(noisy_state[0][k], expected_state[0][k]) for k in (0, 1)]
    assert same == [True, False]  # noise between the layers, not before the first


def test_a_chosen_layer_replaces_the_fixed_one():
    model = Attentive()
    edit = layers.replace_dropout(model, {"head.1": layers.GaussianDropout(0.1)})
    assert edit.paths == ["head.1"] and isinstance(model.head[1], layers.GaussianDropout)
    assert model.attention.dropout == 0.2


def test_stochastic_depth_of_other_libraries_is_replaced():
    class DropPath(nn.Module):  # timm's attributes
        def __init__(self):
            super().__init__()
            self.drop_prob, self.scale_by_keep = 0.15, True

    class StochasticDepth(nn.Module):  # torchvision's
        def __init__(self):
            super().__init__()
            self.p, self.mode = 0.25, "batch"

    model = nn.Sequential(DropPath(), StochasticDepth())
    assert [s.rate for s in layers.audit(model)] == [0.15, 0.25]
    layers.replace_dropout(model)
    assert model[0].rate == torch.tensor(0.15) and model[1].mode == "batch"


def test_audit_lists_every_source_with_its_rate():
    model = Attentive()
    model.extra = nn.RReLU()
    model.pool = nn.FractionalMaxPool2d(2, output_size=2)
    model.quiet = nn.LSTM(2, 2, 1)
    model.moving = layers.DropPath(0.05)
    found = {s.path: (s.attribute, s.rate, s.moving) for s in layers.audit(model)}
    assert found == {
        "attention": ("dropout", 0.2, False),
        "rnn": ("dropout", 0.3, False),
        "head.1": ("p", 0.4, False),
        "extra": (None, None, False),
        "pool": (None, None, False),
        "moving": ("rate", pytest.approx(0.05), True),
    }
    assert "no (dropout)" in str(layers.audit(model))
    assert str(layers.audit(nn.Linear(1, 1))) == "no source of noise"


def test_set_rate_by_depth_is_the_rule_of_the_paper():
    model = nn.Sequential(*[layers.DropPath() for _ in range(4)])
    rates = layers.set_rate_by_depth(model, "*", 0.5)
    assert list(rates.values()) == [0.125, 0.25, 0.375, 0.5]
    assert [layer.rate.item() for layer in model] == [0.125, 0.25, 0.375, 0.5]


def test_common_noise_is_shared_by_models_and_ends():
    one, two = mlp(), mlp()
    for model, rate in ((one, 0.2), (two, 0.5)):
        layers.insert_dropout(model, {"0": layers.Dropout(rate)})
    x, kept = torch.ones(50, 6), []
    for model in (one, two):
        with layers.common_noise(model, seed=3):
            kept.append(model[0](x) != 0)
    assert (kept[0] | ~kept[1]).all() and kept[0].sum() > kept[1].sum()
    assert one[0].noise_after.generator is None


BAD = {
    "nothing": (lambda m: layers.insert_dropout(m, {"fc*": layers.Dropout()}), "fc\\*"),
    "twice": (
        lambda m: (
            layers.insert_dropout(m, {"0": layers.Dropout(0.2)}),
            layers.insert_dropout(m, {"0": layers.Dropout()}),
        ),
        "^0 already has noise after it",
    ),
    "twice at once": (
        lambda m: layers.insert_dropout(m, {"0": layers.Dropout(), nn.Linear: layers.Dropout()}),
        "^0 already has noise",
    ),
    "place": (
        lambda m: layers.insert_dropout(m, {"0": layers.Dropout()}, where="inside"),
        "unknown place 'inside'",
    ),
    "no fixed": (layers.replace_dropout, "no fixed dropout"),
    "no layer": (lambda m: layers.set_rate(m, "*", 0.1), "insert_dropout"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_edits_are_refused_by_name(case):
    act, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        act(mlp())


def test_a_refused_edit_changes_nothing():
    model = mlp()
    state = fingerprint(model)
    with pytest.raises(ValueError):
        layers.insert_dropout(model, {"0": layers.Dropout(), "9": layers.Dropout()})
    assert fingerprint(model) == state


def test_containers_and_wrappers_are_refused():
    model = nn.ModuleDict({"body": mlp()})
    with pytest.raises(ValueError, match=r"only containers \(body\): name their children"):
        layers.insert_dropout(model, {"body": layers.Dropout()})
    with pytest.raises(TypeError, match="DropConnect takes a module"):
        layers.insert_dropout(model, {"body.0": layers.DropConnect(nn.Linear(2, 2))})
    with pytest.raises(TypeError, match=r"^body.0: expected a layer of tikhon.layers"):
        layers.insert_dropout(model, {"body.0": nn.Dropout()})


@pytest.mark.parametrize("change", [layers.insert_dropout, layers.replace_dropout])
@pytest.mark.parametrize("bad", ["0.2", layers.Dropout, 1.5, float("nan"), -0.5], ids=str)
def test_a_layer_that_is_none_or_has_no_valid_rate_is_refused(change, bad):
    model = nn.ModuleDict({"body": nn.Dropout(0.3)})
    if isinstance(bad, float):
        rate, bad = bad, layers.Dropout()
        bad.rate.fill_(rate)  # past the checks of set_rate
    with pytest.raises((TypeError, ValueError), match=r"^body( \(Dropout\))?: .*received"):
        change(model, {"body": bad})
    assert list(model.modules())[1:] == [model["body"]] and type(model["body"]) is nn.Dropout


def test_a_rate_of_one_is_taken_over():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(1.0))
    layers.replace_dropout(model)
    assert not model.train()(torch.ones(3, 2)).any()


def test_noise_after_something_without_a_tensor_is_refused():
    class Strings(nn.Module):
        def forward(self, x):
            return "text"

    model = nn.Sequential(Strings())
    layers.insert_dropout(model, {"0": layers.Dropout()})
    with pytest.raises(TypeError, match=r"0.noise_after \(Dropout\): the module returns str"):
        model(torch.ones(1))


class Renamed(nn.Dropout):
    """A subclass that draws what its parent draws."""


class Annealed(nn.Dropout):
    """A subclass with a rule of its own."""

    def forward(self, x):
        return nn.functional.dropout(x, self.p / 2, self.training)


def test_subclasses_are_replaced_only_where_they_draw_the_same():
    model = nn.Sequential(Renamed(0.3), Annealed(0.4), nn.Dropout1d(1.0), nn.Dropout(1))
    edit = layers.replace_dropout(model)
    assert edit.paths == ["0", "2", "3"]
    assert type(model[0]) is layers.Dropout and type(model[1]) is Annealed
    assert model[2].rate == 1 and model[3].rate == 1


class Stacked(nn.LSTM):
    """A user's own recurrent class."""


def test_a_subclass_of_a_recurrent_module_is_left_alone():
    model = nn.ModuleList([Stacked(3, 3, 2, dropout=0.5), nn.GRU(3, 3, 2, dropout=1)])
    edit = layers.replace_dropout(model)
    assert edit.paths == ["1.between_layers"] and type(model[0]) is Stacked


def test_a_replaced_dropout_that_worked_in_place_still_does():
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5, inplace=True)

        def forward(self, x):
            x = x * 1.0
            self.drop(x)  # the result is not assigned
            return x

    model = Aliased()
    layers.replace_dropout(model)
    assert (model(torch.ones(400)) == 0).any()


def test_a_schedule_written_for_the_replaced_layer_still_sets_the_rate():
    timm = type("DropPath", (nn.Module,), {})()
    timm.drop_prob, timm.scale_by_keep = 0.1, True
    model = nn.Sequential(nn.Dropout(0.5), timm)
    layers.replace_dropout(model)
    model[0].p, model[1].drop_prob = 0.2, 0.3
    assert [layer.rate.item() for layer in model] == pytest.approx([0.2, 0.3])
