import pytest
import torch
import torch.nn.functional as F

from tikhon.training.clipping import clip_grad_adaptive_


def test_adaptive_clipping_bounds_the_ratio_of_every_unit_and_no_other():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, requires_grad=True)
    bias, unused = torch.zeros(4, requires_grad=True), torch.ones(2, requires_grad=True)
    weight.grad = torch.randn_like(weight) * torch.tensor([1e-4, 1e-3, 1.0, 10.0]).view(4, 1, 1, 1)
    bias.grad = torch.ones(4)
    before = weight.grad.clone()
    clip_grad_adaptive_([weight, bias, unused], 0.01, floor=1e-3)
    ratio = weight.grad.flatten(1).norm(dim=1) / weight.detach().flatten(1).norm(dim=1)
    assert (ratio <= 0.01 + 1e-7).all()
    assert torch.equal(weight.grad[0], before[0])
    torch.testing.assert_close(
        F.cosine_similarity(weight.grad[3].flatten(), before[3].flatten(), 0), torch.tensor(1.0)
    )
    torch.testing.assert_close(bias.grad.norm(), torch.tensor(1e-5))
    assert unused.grad is None


def test_adaptive_clipping_leaves_zero_gradients_and_refuses_a_bad_ratio():
    weight = torch.ones(2, 2, requires_grad=True)
    weight.grad = torch.zeros(2, 2)
    clip_grad_adaptive_([weight])
    assert torch.equal(weight.grad, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="ratio must be > 0, received 0"):
        clip_grad_adaptive_([weight], 0)
