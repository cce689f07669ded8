import pytest
import torch
import torch.nn.functional as F

from tikhon.training.mixing import cutmix, mixup


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 3, 6, 5, generator=generator)
    return x, torch.randint(4, (8,), generator=generator)


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_mixed_loss_is_the_loss_of_mixed_targets(mix):
    x, y = batch()
    mixed = mix(x, y, 1.0, generator=torch.Generator().manual_seed(1))
    logits = torch.randn(8, 4)
    soft = mixed.share * F.one_hot(mixed.y, 4) + (1 - mixed.share) * F.one_hot(mixed.other, 4)
    torch.testing.assert_close(mixed.loss(F.cross_entropy, logits), F.cross_entropy(logits, soft))


def test_mixup_is_on_the_line_between_two_rows():
    x, _ = batch()
    mixed = mixup(x, x, 0.5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(mixed.x, mixed.share * mixed.y + (1 - mixed.share) * mixed.other)
    assert 0 <= mixed.share <= 1


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_shares_by_the_area_that_is_left(seed):
    x, _ = batch()
    number = torch.arange(8.0).view(8, 1, 1, 1).expand_as(x)
    mixed = cutmix(number, number[:, 0, 0, 0], 1.0, generator=torch.Generator().manual_seed(seed))
    own = (mixed.x == number).float().mean((1, 2, 3))
    moved = mixed.other != mixed.y
    torch.testing.assert_close(own[moved], torch.full_like(own[moved], mixed.share))
    other = mixed.other.view(8, 1, 1, 1).expand_as(x)
    assert ((mixed.x == number) | (mixed.x == other)).all()


def test_shares_follow_beta():
    x, y = torch.zeros(2, 1), torch.zeros(2)
    generator = torch.Generator().manual_seed(0)
    for alpha in (0.2, 1.0, 4.0):
        shares = torch.tensor([mixup(x, y, alpha, generator=generator).share for _ in range(800)])
        expected = 1 / (4 * (2 * alpha + 1))  # variance of Beta(alpha, alpha)
        assert (shares.mean() - 0.5).abs() < 4.9 * (expected / 800) ** 0.5
        assert 0.8 < shares.var() / expected < 1.2


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_a_generator_decides(mix):
    x, y = batch()
    one, two = (mix(x, y, 1.0, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.x, two.x) and one.share == two.share
    assert torch.equal(x, batch()[0])  # the input is not written


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_alpha_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha must be finite and > 0"):
        mixup(*batch(), alpha)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match=r"expected images \(N, C, H, W\)"):
        cutmix(torch.ones(2, 3), torch.ones(2), 1.0)
    with pytest.raises(ValueError, match="8 rows of x, 7 of y"):
        mixup(batch()[0], torch.ones(7), 1.0)
