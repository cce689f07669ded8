import pytest
import torch
from torch import nn
from torch.func import functional_call

from examples_of import LAYERS
from tikhon import layers


@pytest.mark.parametrize("example", LAYERS, ids=lambda e: e.name)
@pytest.mark.parametrize(
    "rate", [-0.1, 1.0, 1.1, float("nan"), float("inf"), "0.5", None, True], ids=str
)
def test_a_bad_rate_is_refused_by_name(example, rate):
    deviation = example.name == "GaussianNoise" and rate in (1.0, 1.1)  # may be any size
    if rate is not True and (deviation or (rate == 1 and not example.learned)):
        assert example.make(rate).rate == torch.tensor(rate)
        return
    name = type(example.layer(0.5)).__name__
    with pytest.raises((ValueError, TypeError), match=f"^{name}: the rate must be .*received"):
        example.make(rate)


def test_a_bad_rate_names_the_path_and_changes_nothing():
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(2, 2), layers.Dropout(0.2))})
    for rate in (1.5, "high", float("nan")):
        with pytest.raises((ValueError, TypeError), match=r"^encoder.1 \(Dropout\): the rate"):
            layers.set_rate(model, "encoder.*", rate)
    assert model["encoder"][1].rate == torch.tensor(0.2)


def test_a_rate_that_one_layer_refuses_is_given_to_none():
    model = nn.Sequential(layers.GaussianNoise(0.1), layers.Dropout(0.2))
    with pytest.raises(ValueError, match=r"^1 \(Dropout\): the rate must be in"):
        layers.set_rate(model, "*", 1.5)
    assert model[0].rate == torch.tensor(0.1)


def test_a_pattern_that_matches_nothing_names_the_closest():
    model = nn.ModuleDict({"encoder": nn.Sequential(layers.Dropout(0.2))})
    with pytest.raises(
        ValueError, match=r"unknown noise layer 'encodr.0'; did you mean 'encoder.0'"
    ):
        layers.set_rate(model, "encodr.0", 0.1)


@pytest.mark.parametrize("pattern", [3, None, nn.Dropout(0.1)], ids=repr)
def test_what_is_no_pattern_is_refused_by_name(pattern):
    model = nn.Sequential(layers.Dropout(0.2))
    with pytest.raises(TypeError, match="a pattern is a glob on module paths or a module type"):
        layers.set_rate(model, pattern, 0.1)


@pytest.mark.parametrize("size", [0, 2, 4, -3])
def test_an_even_block_is_refused(size):
    with pytest.raises(ValueError, match=f"DropBlock2d: block_size must be odd.*{size}"):
        layers.DropBlock2d(0.1, size)


def test_a_block_larger_than_the_map_is_refused_with_the_path():
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    layers.insert_dropout(model, {"0": layers.DropBlock2d(0.1, 7)})
    message = (
        r"^0.noise_after \(DropBlock2d\): block_size must be odd and fit in the map of \(5, 9\)"
    )
    with pytest.raises(ValueError, match=message):
        model.eval()(torch.ones(1, 1, 5, 9))  # even where it would not act


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.Dropout1d(), (4,)),
        (layers.Dropout1d(), (3, 4, 5, 5)),
        (layers.Dropout2d(), (3,)),
        (layers.Dropout3d(), ()),
        (layers.DropBlock1d(), (3, 4, 5, 5)),
        (layers.DropBlock3d(), (3, 4, 5, 5)),
        (layers.FeatureAlphaDropout(), (3,)),
        (layers.PatchDropout(), (3, 4)),
        (layers.TokenDropout(), (3,)),
        (layers.LockedDropout(), (3,)),
        (layers.InputDropout(), (3, 4, 5)),
        (layers.Dropout(tied=(2,)), (3, 4)),
        (layers.LockedDropout(time=2), (3, 4)),
        (layers.WeightDrop(nn.LSTM(4, 2)), (3, 4, 5, 4)),
        (layers.RecurrentDropout(nn.GRU(4, 2)), (3, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_wrong_rank_is_refused_by_name(layer, shape):
    message = rf"{type(layer).__name__}\)?: expected .* received shape"
    with pytest.raises(ValueError, match=f"^{message}"):
        layer(torch.ones(shape))
    with pytest.raises(ValueError, match=rf"^body.1 \({message}"):
        Nested(layer)(torch.ones(shape))


class Nested(nn.Module):
    """A model of a user: nothing of tikhon has walked over it."""

    def __init__(self, layer):
        super().__init__()
        self.body = nn.Sequential(nn.Identity(), layer)

    def forward(model, x):
        return model.body(x)


CALLS = {
    "plain": lambda model, x: model(x),
    "inside another": lambda model, x: nn.Sequential(model)(x),
    "functional": lambda model, x: functional_call(model, dict(model.named_buffers()), (x,)),
    "vmap": lambda model, x: torch.vmap(model, randomness="different")(x.expand(2, *x.shape)),
    "compiled": lambda model, x: torch.compile(model, backend="eager")(x),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_error_in_a_running_model_names_the_path(call):
    model, good, bad = Nested(layers.DropBlock2d(0.1, 3)), torch.ones(2, 1, 5, 5), torch.ones(2, 3)
    torch.compiler.reset()
    CALLS[call](model, good)
    path = "0.body.1" if call == "inside another" else "body.1"
    with pytest.raises(ValueError, match=rf"^{path} \(DropBlock2d\): expected .* \(2, 3\)"):
        CALLS[call](model, bad)
    with pytest.raises(ValueError, match=rf"^{path} \(DropBlock2d\): block_size must be .* map"):
        CALLS[call](model, torch.ones(2, 1, 5, 2))


def test_one_graph_says_which_layer_refuses():
    run = torch.compile(Nested(layers.Dropout1d()), backend="eager", fullgraph=True)
    torch.compiler.reset()
    run(torch.ones(2, 1, 5))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Dropout1d refuses its input"):
        run(torch.ones(2, 3, 4, 5))


def test_members_of_several_lengths_are_refused_with_the_way_out():
    model = Nested(layers.PatchDropout(0.5))

    def one(rate):
        return functional_call(model, {"body.1.rate": rate}, (torch.ones(2, 9, 3),))

    with pytest.raises(ValueError, match=r"^body.1 \(PatchDropout\): .* use remove=False"):
        torch.vmap(one, randomness="different")(torch.tensor([0.1, 0.5]))


def test_other_arguments_are_checked():
    with pytest.raises(ValueError, match="DropPath: mode must be 'row' or 'batch', received"):
        layers.DropPath(0.1, mode="rows")
    with pytest.raises(TypeError, match=r"expected integer token ids, received torch.float32"):
        layers.WordDropout(unknown=0)(torch.ones(3))
    with pytest.raises(ValueError, match="unknown weight 'kernel'"):
        layers.DropConnect(nn.Linear(2, 2), weights="kernel")
    with pytest.raises(TypeError, match="expected an LSTM or GRU"):
        layers.RecurrentDropout(nn.RNN(2, 2))
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2)])
    with pytest.raises(TypeError, match="a packed sequence has no steps, pad it"):
        layers.RecurrentDropout(nn.GRU(2, 2))(packed)
    with pytest.raises(TypeError, match="expected an LSTM, GRU or RNN, received Linear"):
        layers.WeightDrop(nn.Linear(2, 2))
    parametrized = nn.utils.parametrizations.weight_norm(nn.GRU(2, 2), "weight_hh_l0")
    with pytest.raises(TypeError, match="parametrized weights cannot be adopted"):
        layers.WeightDrop(parametrized)
    with pytest.raises(ValueError, match="uniforms must have the mask's shape"):
        layers.functional.dropout(torch.ones(3), 0.5, uniforms=torch.ones(2))


@pytest.mark.parametrize(
    "noise",
    [
        layers.functional.gaussian_noise,
        layers.functional.token_dropout,
        layers.functional.drop_block,
    ],
)
def test_functions_of_noise_refuse_a_misspelt_keyword(noise):
    with pytest.raises(TypeError, match="trainin"):
        noise(torch.ones(1, 2, 9), 0.1, trainin=False)
