import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from tikhon.errors import InputError
from tikhon.layers import Dropout
from tikhon.training.objective import Objective, confidence_penalty, r_drop
from tikhon.training.recipe import Recipe

X, Y = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3


def model(rate=0.0):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.ReLU(), Dropout(rate), torch.nn.Linear(8, 3)
    )


def objective(x=X, y=Y, loss=F.cross_entropy, **recipe):
    return Objective(Recipe(**recipe), loss, x, y)


def test_nothing_asked_is_the_plain_loss():
    assert torch.equal(objective()(model(), X, Y), F.cross_entropy(model()(X), Y))


def test_label_smoothing_and_confidence_penalty():
    output = model()(X)
    expected = F.cross_entropy(output, Y, label_smoothing=0.2)
    assert torch.equal(objective(label_smoothing=0.2)(model(), X, Y), expected)
    entropy = torch.distributions.Categorical(logits=output).entropy().mean()
    found = objective(confidence_penalty=0.5)(model(), X, Y)
    assert torch.allclose(found, F.cross_entropy(output, Y) - 0.5 * entropy)


def test_mixup_trains_on_mixtures_with_their_targets():
    """With one class for all rows the mixture of targets is that class."""
    torch.manual_seed(1)
    same = torch.zeros_like(Y)
    mixed = objective(mixup=0.5)(model(), X, same)
    assert not torch.equal(mixed, F.cross_entropy(model()(X), same))
    constant = X[:1].expand_as(X)
    found = objective(mixup=0.5)(model(), constant, same)
    assert torch.allclose(found, F.cross_entropy(model()(constant), same))


def test_r_drop_adds_nothing_without_noise_and_something_with_it():
    plain = F.cross_entropy(model()(X), Y)
    with pytest.warns(UserWarning, match="two passes of the model agree"):
        assert torch.allclose(objective(r_drop=2.0)(model(), X, Y), plain)
    torch.manual_seed(3)
    without = objective(r_drop=1e-9)(model(0.5), X, Y)
    torch.manual_seed(3)
    assert objective(r_drop=2.0)(model(0.5), X, Y) > without + 1e-3


@pytest.mark.parametrize("name", ["confidence_penalty", "r_drop"])
def test_one_logit_of_two_classes_is_refused_where_it_would_do_nothing(name):
    with pytest.raises(InputError, match=f"{name} needs one logit for each class, and bce"):
        objective(y=Y % 2, loss="bce", **{name: 1.0})


def test_input_noise_and_cutmix_change_the_batch():
    torch.manual_seed(0)
    assert not torch.equal(objective(input_noise=0.5)(model(), X, Y), objective()(model(), X, Y))
    images = torch.rand(8, 1, 6, 6)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3))
    classes = torch.arange(8) % 3
    found = Objective(Recipe(cutmix=1.0), F.cross_entropy, images, classes)(net, images, classes)
    assert torch.isfinite(found)


@pytest.mark.parametrize(
    "recipe, norm",
    [({"clip_norm": 0.01}, 0.01), ({"clip_value": 1e-4}, None), ({"clip_adaptive": 1e-3}, None)],
)
def test_clipping_bounds_the_gradient(recipe, norm):
    net, chosen = model(), objective(**recipe)
    (100 * chosen(net, X, Y)).backward()
    free = [p.grad.clone() for p in net.parameters()]
    Recipe(**recipe).clipping(net)
    grads = [p.grad for p in net.parameters()]
    if norm is not None:
        assert torch.cat([g.flatten() for g in grads]).norm() <= norm * (1 + 1e-5)
    elif "clip_value" in recipe:
        assert max(float(g.abs().max()) for g in grads) <= 1e-4 + 1e-10
    else:
        ratio = grads[0].norm(dim=1) / net[0].weight.norm(dim=1).clamp_min(1e-3)
        assert float(ratio.detach().max()) <= 1e-3 * (1 + 1e-4)
        assert torch.equal(grads[-1], free[-1])  # the last layer is left free


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"label_smoothing": 0.1, "y": torch.rand(32), "loss": "half_mse"}, "is for classes"),
        ({"r_drop": 1.0, "y": torch.rand(32), "loss": "half_mse"}, "is for classes"),
        ({"label_smoothing": 0.1, "loss": F.multi_margin_loss}, "needs the loss cross_entropy"),
        ({"cutmix": 1.0}, r"cutmix needs images .* the rows are \(6,\)"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(asked, message):
    with pytest.raises(InputError, match=message):
        objective(**asked)


def logits(seed):
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_confidence_penalty_is_minus_the_entropy():
    expected = -Categorical(logits=logits(0)).entropy().mean()
    torch.testing.assert_close(confidence_penalty(logits(0)), expected)
    sure = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(confidence_penalty(sure), sure)
    assert torch.isfinite(gradient).all()


def test_r_drop_is_the_symmetric_divergence():
    p, q = Categorical(logits=logits(0)), Categorical(logits=logits(1))
    expected = (kl_divergence(p, q) + kl_divergence(q, p)).mean() / 2
    torch.testing.assert_close(r_drop(logits(0), logits(1)), expected)
