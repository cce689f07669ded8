"""Equality with the layers of torch, Keras and timm under the same mask."""

import importlib.util
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from tikhon import layers
from tikhon.layers import functional
from tikhon.training.clipping import clip_grad_adaptive_


def uniforms_of(kept):
    """Uniform numbers that keep exactly what `kept` keeps, at any rate in (0, 1)."""
    return torch.where(kept, 1.0 - 1e-6, 0.0)


@pytest.mark.parametrize(
    ("theirs", "ours", "shape"),
    [
        (nn.Dropout, functional.dropout, (7, 5)),
        (nn.Dropout1d, functional.spatial_dropout, (4, 6, 5)),
        (nn.Dropout2d, functional.spatial_dropout, (4, 6, 5, 5)),
        (nn.Dropout3d, functional.spatial_dropout, (4, 6, 3, 3, 3)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_torch_dropout_under_the_same_mask(theirs, ours, shape, rate):
    x, layer = torch.randn(shape), theirs(rate)
    torch.manual_seed(0)
    kept = layer(torch.ones(shape)) != 0
    torch.manual_seed(0)
    expected = layer(x)
    if ours is functional.spatial_dropout:
        kept = kept.flatten(2)[:, :, 0].reshape(*shape[:2], *[1] * (len(shape) - 2))
    torch.testing.assert_close(ours(x, rate, uniforms=uniforms_of(kept)), expected)


@pytest.mark.parametrize(
    ("theirs", "tied"), [(nn.AlphaDropout, ()), (nn.FeatureAlphaDropout, (2,))]
)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_torch_alpha_dropout_under_the_same_mask(theirs, tied, rate):
    x, layer = torch.randn(6, 8, 4), theirs(rate)
    torch.manual_seed(0)
    zeros = layer(torch.zeros(x.shape))
    kept = zeros > (zeros.max() + zeros.min()) / 2
    torch.manual_seed(0)
    expected = layer(x)
    kept = kept[:, :, :1] if tied else kept
    found = functional.alpha_dropout(x, rate, tied=tied, uniforms=uniforms_of(kept))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["Dropout", "Dropout2d", "AlphaDropout", "FeatureAlphaDropout"])
def test_seeded_masks_on_the_cpu_are_torchs_own(name):
    x = torch.randn(4, 6, 5, 5)
    torch.manual_seed(0)
    expected = getattr(nn, name)(0.5)(x)
    torch.manual_seed(0)
    assert torch.equal(getattr(layers, name)(0.5)(x), expected)


SHAPES = {
    "Dropout": [(), (3,), (2, 3, 4), (2,) * 9],
    "AlphaDropout": [(), (3,), (2, 3, 4)],
    "FeatureAlphaDropout": [(2, 3), (2, 3, 4, 4), (2,) * 9],
    "Dropout1d": [(6, 4), (3, 6, 4)],
    "Dropout2d": [(6, 4), (3, 6, 4), (3, 6, 4, 4), (3, 6, 2, 2, 2)],
    "Dropout3d": [(6,), (6, 4), (6, 2, 2), (6, 2, 2, 2), (3, 6, 2, 2, 2), (1, 3, 6, 2, 2, 2)],
}


@pytest.mark.parametrize(("name", "shape"), [(n, s) for n, found in SHAPES.items() for s in found])
@pytest.mark.parametrize("mapped", [False, True], ids=["plain", "vmap"])
@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_what_torchs_layer_takes_gives_the_same_numbers(name, shape, mapped, rate):
    x = torch.randn(5, *shape) if mapped else torch.randn(shape)
    outputs, warned = [], []
    for layer in (getattr(nn, name)(rate), getattr(layers, name)(rate)):
        torch.manual_seed(0)
        run = torch.vmap(layer, randomness="different") if mapped else layer
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outputs.append(run(x))
        warned.append(bool(caught))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0, equal_nan=True)
    assert warned[0] == warned[1]


@pytest.mark.parametrize("name", SHAPES)
def test_a_checkpoint_of_torchs_layer_and_ours_is_the_same(name):
    theirs = nn.Sequential(nn.Linear(2, 2), getattr(nn, name)(0.3))
    ours = nn.Sequential(nn.Linear(2, 2), getattr(layers, name)(0.3))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours[1].rate == torch.tensor(0.3)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("args", "options"), [((0.4, True), {}), ((), {"p": 0.4, "inplace": True}), ((), {"p": 0.4})]
)
def test_the_arguments_of_torchs_layer_do_what_they_do_there(name, args, options):
    shape = SHAPES[name][-1]
    outputs, inputs, slopes = [], [], []
    for layer in (getattr(nn, name)(*args, **options), getattr(layers, name)(*args, **options)):
        assert layer.p == pytest.approx(0.4)
        leaf = torch.ones(shape, requires_grad=True)
        x = leaf * 2
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = layer(x)
            assert torch.equal(layer.eval()(leaf.detach()), leaf)
        y.sum().backward()
        outputs, inputs, slopes = [*outputs, y], [*inputs, x.detach()], [*slopes, leaf.grad]
    for theirs, ours in (outputs, inputs, slopes):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_a_loop_that_sets_p_sets_the_rate(name):
    layer = getattr(layers, name)(0.1)
    layer.p = 0.7
    assert layer.rate == torch.tensor(0.7) and layer.p == pytest.approx(0.7)
    with pytest.raises(ValueError, match=r"1\.5"):
        layer.p = 1.5


@pytest.fixture(scope="module")
def keras():
    os.environ["KERAS_BACKEND"] = "torch"
    return pytest.importorskip("keras", reason="pip install keras")


def test_keras_gaussian_dropout_under_the_same_noise(keras, monkeypatch):
    x = torch.randn(5, 4)
    uniforms = torch.rand(5, 4)
    standard = torch.special.ndtri(uniforms)
    backend = importlib.import_module("keras.src.backend")
    normal = lambda shape, mean, stddev, **_: mean + stddev * standard  # noqa: E731
    monkeypatch.setattr(backend.random, "normal", normal)
    expected = keras.layers.GaussianDropout(0.3)(x, training=True)
    found = functional.gaussian_dropout(x, 0.3, uniforms=uniforms)
    torch.testing.assert_close(found, expected.cpu())


def test_keras_alpha_dropout_under_the_same_mask(keras, monkeypatch):
    x, uniforms = torch.randn(5, 4), torch.rand(5, 4)
    ops = importlib.import_module("keras.src.ops")
    monkeypatch.setattr(ops.random, "uniform", lambda *args, **kwargs: uniforms)
    expected = keras.layers.AlphaDropout(0.3)(x, training=True)
    found = functional.alpha_dropout(x, 0.3, uniforms=uniforms)
    torch.testing.assert_close(found, expected.cpu())


def test_keras_spatial_dropout_under_the_same_mask(keras):
    x = torch.randn(4, 6, 5)  # channels last
    expected = keras.layers.SpatialDropout1D(0.4, seed=1)(x, training=True).cpu()
    ones = keras.layers.SpatialDropout1D(0.4, seed=1)(torch.ones(x.shape), training=True).cpu()
    uniforms = uniforms_of(ones[:, :1] != 0).transpose(1, 2)
    found = functional.spatial_dropout(x.transpose(1, 2), 0.4, uniforms=uniforms)
    torch.testing.assert_close(found.transpose(1, 2), expected)


def test_keras_recurrent_dropout_under_the_same_mask(keras):
    torch.manual_seed(0)
    rnn = nn.LSTM(3, 4, batch_first=True)
    x = torch.randn(2, 5, 3)
    layer = layers.RecurrentDropout(rnn, 0.5)
    layer.generator = torch.Generator().manual_seed(7)
    found, _ = layer(x)
    generator = torch.Generator().manual_seed(7)
    mask = functional.dropout(torch.ones(2, 4), 0.5, generator=generator)
    cell = keras.layers.LSTMCell(4, recurrent_dropout=0.5, implementation=1)
    cell.build((2, 3))
    bias = rnn.bias_ih_l0 + rnn.bias_hh_l0
    cell.set_weights([w.detach().numpy() for w in (rnn.weight_ih_l0.T, rnn.weight_hh_l0.T, bias)])
    cell._recurrent_dropout_mask = [mask] * 4
    states, outputs = [torch.zeros(2, 4), torch.zeros(2, 4)], []
    for step in x.unbind(1):
        output, states = cell(step, states, training=True)
        outputs.append(output)
    torch.testing.assert_close(found, torch.stack(outputs, 1).cpu())


def timm_file(path):
    """One file of timm: the package itself needs torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("timm is absent: pip install --no-deps timm")
    file = Path(spec.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location(f"timm_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_timm_drop_path_under_the_same_mask():
    x, layer = torch.randn(9, 3, 2), timm_file("layers/drop.py").DropPath(0.4).train()
    torch.manual_seed(0)
    expected = layer(x)
    uniforms = uniforms_of((expected != 0).flatten(1).any(1).view(9, 1, 1))
    torch.testing.assert_close(functional.drop_path(x, 0.4, uniforms=uniforms), expected)


@pytest.mark.parametrize("shared", [False, True])
def test_timm_drop_block_under_the_same_seeds(shared, monkeypatch):
    x, drop = torch.randn(3, 2, 9, 9), timm_file("layers/drop.py")
    channels = 1 if shared else 2
    seeds = torch.rand(3, channels, 7, 7) < 0.05
    padded = nn.functional.pad(seeds.float(), [1] * 4)
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda self, p: padded.to(self))
    expected = drop.drop_block_2d(x, 0.2, 3, couple_channels=shared)
    uniforms = torch.where(seeds, 0.0, 1.0 - 1e-6)
    found = functional.drop_block(x, 0.2, 3, shared=shared, uniforms=uniforms)
    torch.testing.assert_close(found, expected)


def test_timm_patch_dropout_keeps_as_many_tokens():
    theirs = timm_file("layers/patch_dropout.py").PatchDropout(0.3, num_prefix_tokens=2)
    x = torch.arange(2.0 * 12 * 3).view(2, 12, 3)
    ours = layers.PatchDropout(0.3, prefix=2)(x)
    assert ours.shape == theirs.train()(x).shape
    assert torch.equal(ours[:, :2], x[:, :2])
    assert all((x[0] == row).all(1).any() for row in ours[0])
    assert len(ours[0].unique(dim=0)) == len(ours[0])


def test_timm_adaptive_clipping():
    agc = timm_file("utils/agc.py")
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(s)) for s in [(4, 3), (5, 2, 3, 3), (6,)]]
    gradients = [torch.randn_like(p) for p in parameters]
    results = []
    for clip in (agc.adaptive_clip_grad, clip_grad_adaptive_):
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.clone()
        clip(parameters, 0.01)
        results.append([p.grad for p in parameters])
    torch.testing.assert_close(results[0], results[1])


def test_drop_block_is_the_algorithm_of_the_paper():
    torch.manual_seed(0)
    rate, size, x = 0.3, 3, torch.randn(2, 3, 8, 6)
    gamma = rate / size**2 * (8 * 6) / (6 * 4)
    uniforms = torch.rand(2, 3, 6, 4)
    mask = torch.ones(2, 3, 8, 6)
    for n, c, i, j in (uniforms < gamma).nonzero().tolist():
        mask[n, c, i : i + size, j : j + size] = 0
    expected = x * mask * mask.numel() / mask.sum()
    torch.testing.assert_close(functional.drop_block(x, rate, size, uniforms=uniforms), expected)


@pytest.mark.parametrize("layer", [layers.DropBlock1d(0.3, 5), layers.DropBlock2d(0.3, 5)])
def test_the_rescaled_mask_of_drop_block_has_mean_one(layer):
    x = torch.ones(4, 3, *[20] * layer.dims)
    torch.testing.assert_close(layer(x).mean(), torch.tensor(1.0))


def test_alpha_dropout_keeps_mean_and_variance_of_standard_input():
    torch.manual_seed(0)
    x = torch.randn(200, 500)
    for layer in (layers.AlphaDropout(0.2), layers.FeatureAlphaDropout(0.2)):
        y = layer(x)
        assert y.mean().abs() < 0.015 and (y.var() - 1).abs() < 0.03


def test_mixout_of_the_target_itself_is_the_target():
    linear = nn.Linear(3, 2)
    layer, x = layers.Mixout(linear, 0.9), torch.randn(4, 3)
    torch.testing.assert_close(layer(x), linear(x))


def test_weight_drop_masks_the_recurrent_weights_only():
    torch.manual_seed(0)
    rnn, x = nn.LSTM(3, 4, 2, bidirectional=True), torch.randn(5, 2, 3)
    layer = layers.WeightDrop(rnn, 0.5)
    assert {*layer.state_dict()} == {*rnn.state_dict()}  # no name has changed
    torch.manual_seed(1)
    found, _ = layer(x)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in rnn.named_parameters():
            if "weight_hh" in name:
                weight.copy_(functional.dropout(weight, 0.5))
    torch.testing.assert_close(found, rnn(x)[0])


def test_embedding_dropout_drops_the_same_words_everywhere():
    torch.manual_seed(0)
    layer, ids = layers.EmbeddingDropout(nn.Embedding(50, 4), 0.5), torch.arange(50).repeat(2, 1)
    dropped = (layer(ids) == 0).all(-1)
    assert torch.equal(dropped[0], dropped[1]) and 10 < dropped[0].sum() < 40


def test_shake_drop_uses_another_factor_backward():
    x = torch.ones(3, 2, requires_grad=True)
    uniforms = torch.tensor([0.0, 0.25, 0.75]).view(3, 1, 1).expand(3, 3, 1)
    y = functional.shake_drop(x, 0.5, uniforms=uniforms)  # b = 0, a = -0.5, c = 0.75
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.full((3, 2), -0.5))
    assert torch.equal(gradient, torch.full((3, 2), 0.75))


def test_input_dropout_cuts_one_square_of_its_area():
    x = torch.ones(2, 1, 8, 8)
    centre = torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    hole = functional.input_dropout(x, 0.25, uniforms=centre) == 0
    assert hole.flatten(1).sum(1).tolist() == [16, 4]  # the corner cuts the second
    assert hole[0, 0, 2:6, 2:6].all()


def test_word_dropout_spares_what_is_protected():
    ids = torch.arange(6).repeat(50, 1)
    dropped = layers.WordDropout(0.5, unknown=9, protect=(0, 5))(ids) == 9
    assert not dropped[:, [0, 5]].any() and dropped[:, 1:5].any()
