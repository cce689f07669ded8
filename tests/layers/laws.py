"""The laws of noise layers, for any layer and input: each raises AssertionError when broken."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, stack_module_state

from tikhon import layers

DRAWS = 400
QUANTILE = 4.9  # of the standard normal: one false alarm in a million


@dataclass(frozen=True)
class LayerExample:
    """A layer at any rate, an input, and what its definition promises."""

    name: str
    make: Callable[[float], layers.NoiseLayer]
    shape: tuple[int, ...]
    mean_kept: bool = True  # the training mean is the evaluation output
    variance: Callable[[float], float] | None = None  # of one entry, for an input of ones
    tied: tuple[int, ...] | None = None  # dimensions along which the mask is constant
    multiplicative: bool = True  # output = input * noise
    at_one: Callable[[layers.NoiseLayer, Tensor, Tensor], None] | None = None  # None: zeros
    identity: bool = True  # evaluation returns the input itself
    learned: bool = False  # the rate is a function of parameters
    monotone: bool = False  # a mask of zeros, decided by uniforms >= rate
    tokens: bool = False  # integer input
    lengths: bool = False  # a rate decides the length of the output

    def input(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            return torch.randint(2, 9, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator).to(dtype)

    def layer(self, rate: float, *, training: bool = True) -> layers.NoiseLayer:
        torch.manual_seed(0)
        return self.make(rate).train(training)


def first(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def draws(layer: Callable, x: Tensor, count: int = DRAWS) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return torch.stack([first(layer(x)).clone() for _ in range(count)]).double()


def mean_is_kept(example: LayerExample, rate: float) -> None:
    x = example.input()
    outputs = draws(example.layer(rate), x)
    with torch.no_grad():
        expected = first(example.layer(rate, training=False)(x)).double()
    # one direction of the output space, so that ties between entries do not matter
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).double()
    found = (outputs * direction).flatten(1).sum(1)
    error = (found.mean() - (expected * direction).sum()).abs()
    assert error <= QUANTILE * found.std() / DRAWS**0.5 + 1e-5


def variance_follows_formula(example: LayerExample, rate: float) -> None:
    assert example.variance is not None
    x = torch.ones(example.shape)
    noise = draws(example.layer(rate), x)
    for dim in example.tied or ():
        noise = noise.narrow(dim % x.ndim + 1, 0, 1)
    noise = noise.flatten()
    centred = (noise - noise.mean()) ** 2
    tolerance = QUANTILE * centred.std() / noise.numel() ** 0.5 + 1e-6
    assert (centred.mean() - example.variance(rate)).abs() <= tolerance


def evaluation_is_identity(example: LayerExample, rate: float) -> None:
    x = example.input()
    assert example.layer(rate, training=False)(x) is x


def rate_zero_is_evaluation(example: LayerExample) -> None:
    x = example.input()
    noisy = first(example.layer(0.0)(x))
    plain = first(example.layer(0.0, training=False)(x))
    torch.testing.assert_close(noisy, plain)


def rate_one_is_the_limit(example: LayerExample) -> None:
    """Finite, and zeros unless the definition of the layer leads elsewhere."""
    x = example.input()
    layer = example.layer(0.5)
    if example.learned:
        learned = "logit" if hasattr(layer, "logit") else "log_variance"
        layer.get_parameter(learned).data.fill_(40.0)
    else:
        layer.rate.fill_(1.0)  # where a schedule may end
    outputs = draws(layer, x)
    assert torch.isfinite(outputs).all()
    if example.at_one is None:
        assert (outputs == 0).all()
    else:
        example.at_one(layer, x, outputs)


def mean_is(found: Tensor, expected: float) -> None:
    """The mean over independent draws (dimension 0) is a number, within its interval."""
    values = found.double().flatten(1).mean(1)
    error = (values.mean() - expected).abs()
    assert error <= QUANTILE * values.std() / len(values) ** 0.5 + 1e-6


def unit_noise_is_added(layer, x: Tensor, outputs: Tensor) -> None:
    mean_is(outputs - x, 0.0)
    mean_is((outputs - x) ** 2, 1.0)


def branch_is_shaken(layer, x: Tensor, outputs: Tensor) -> None:
    """a x with a uniform in [-1, 1), never the branch itself; evaluation drops it."""
    factor = (outputs / x).flatten(2)
    assert (factor.abs() <= 1 + 1e-5).all()
    assert ((factor - factor[:, :, :1]).abs() < 1e-4).all()
    mean_is(factor[:, 0, :1], 0.0)
    mean_is(factor[:, 0, :1] ** 2, 1 / 3)
    assert (layer.eval()(x) == 0).all()


def blocks_fall_at_their_seed_rate(layer, x: Tensor, outputs: Tensor) -> None:
    """One seed covers a corner: it falls with the paper's gamma = size / (fitting * block^d)."""
    block, size = layer.block_size, x.shape[2:]
    fitting = math.prod(n - block + 1 for n in size)
    corner = outputs.flatten(3)[..., :1] == 0
    mean_is(corner[:, :1, :1], math.prod(size) / (fitting * block ** len(size)))
    one = torch.ones(2, 3, *[block] * len(size))  # a map of one block: gamma is the rate
    assert (layer(one) == 0).all()


def one_token_stays(layer, x: Tensor, outputs: Tensor) -> None:
    assert torch.equal(
        outputs[:, :, : layer.prefix],
        x[:, : layer.prefix].double().expand_as(outputs[:, :, : layer.prefix]),
    )
    rest = outputs[:, :, layer.prefix :]
    kept = (rest != 0).any(-1)
    assert (kept.sum(-1) == 1).all()
    for row in range(len(x)):
        assert torch.isin(rest[:, row][kept[:, row]][:, 0], x[row, :, 0].double()).all()


def square_covers_nine_sixteenths(layer, x: Tensor, outputs: Tensor) -> None:
    """A square as large as the image, its centre uniform: (E[1 - |u - 1/2|])^2 = (3/4)^2."""
    mean_is((outputs[:, :1, :1] == 0).double(), 9 / 16)


def weights_are(value: Callable[[layers.NoiseLayer, str, Tensor], Tensor]):
    """At rate 1 the layer is its own evaluation with other weights."""

    def check(layer, x: Tensor, outputs: Tensor) -> None:
        with torch.no_grad():
            for name, weight in layer.named_parameters():
                weight.copy_(value(layer, name, weight))
            expected = first(layer.eval()(x))
        torch.testing.assert_close(
            outputs, expected.double().expand_as(outputs), rtol=1e-5, atol=1e-6
        )

    return check


def no_weight_survives(layer, x: Tensor, outputs: Tensor) -> None:
    assert layer.zeros().all()
    assert torch.equal(layer.eval()(x), layer.module.bias.expand(len(x), -1))


def mask_is_tied(example: LayerExample, rate: float) -> None:
    assert example.tied is not None
    noise = draws(example.layer(rate), torch.ones(example.shape), 20)
    dims = {d % len(example.shape) for d in example.tied}
    for d in range(len(example.shape)):
        constant = (noise == noise.narrow(d + 1, 0, 1)).all()
        assert constant == (d in dims or example.shape[d] == 1)


def rows_are_independent(example: LayerExample, rate: float) -> None:
    x = torch.ones(2, *example.shape[1:]) if not example.tokens else example.input()[:2]
    outputs = draws(example.layer(rate), x).flatten(2)
    outputs = outputs @ torch.linspace(1, 2, outputs.shape[2]).double()  # a count may be fixed
    correlation = torch.corrcoef(outputs.T)[0, 1]
    if example.layer(rate).rowwise:
        assert correlation.abs() <= QUANTILE / DRAWS**0.5
    else:
        assert correlation.abs() > QUANTILE / DRAWS**0.5


def gradient_flows_through_kept_units(example: LayerExample, rate: float) -> None:
    x = example.input().requires_grad_()
    layer = example.layer(rate)
    torch.manual_seed(3)
    output = layer(x)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient * x, output)
    assert ((gradient == 0) == (output == 0)).all()


def members_equal_a_loop(example: LayerExample, rates: tuple[float, ...]) -> None:
    """Per-member rates under vmap, same noise: K layers at once equal K layers one by one."""
    x = example.input()
    members = [example.layer(rate) for rate in rates]
    state = stack_module_state(members)  # type: ignore[arg-type]
    template = copy.deepcopy(members[0])

    def one(parameters, buffers):
        return first(functional_call(template, (parameters, buffers), (x,)))

    with layers.common_noise(template, seed=5):
        together = torch.vmap(one, randomness="same")(*state)
    for member, output in zip(members, together, strict=True):
        with layers.common_noise(member, seed=5):
            torch.testing.assert_close(first(member(x)), output, rtol=1e-5, atol=1e-6)


def members_may_differ(example: LayerExample, rate: float) -> None:
    """Under vmap with randomness="different" the members draw their own masks."""
    x, layer = example.input(), example.layer(rate)
    outputs = torch.vmap(lambda _: first(layer(x)), randomness="different")(torch.zeros(6))
    assert (outputs != outputs[:1]).any()


def seed_decides(example: LayerExample, rate: float) -> None:
    x, layer = example.input(), example.layer(rate)
    one, two = draws(layer, x, 20), draws(layer, x, 20)
    assert torch.equal(one, two)
    assert (one != one[:1]).any()


def larger_rate_keeps_less(example: LayerExample) -> None:
    """Common random numbers: what rate 0.6 keeps, rate 0.3 keeps as well."""
    x, kept = example.input(), []
    for rate in (0.3, 0.6):
        layer = example.layer(rate)
        with layers.common_noise(layer, seed=4):
            kept.append(layer(x) != 0)
    assert (kept[0] | ~kept[1]).all()
    assert kept[0].sum() > kept[1].sum()


def compiled_equals_eager(example: LayerExample, backend: str = "eager") -> None:
    """One graph, one compilation for all rates, another batch size, and eager's distribution."""
    x = example.input()
    layer = example.layer(0.5)
    counter = CompileCounterWithBackend(backend)
    torch.compiler.reset()
    run = torch.compile(layer, backend=counter, fullgraph=True)
    with torch.no_grad():
        for rate in (0.1, 0.2, 0.3, 0.4):
            layer.set_rate(rate)
            assert first(run(x)).shape == first(layer(x)).shape
        assert counter.frame_count == 1 or example.lengths
        # the last batch of an epoch is smaller: sizes become symbols, still without a graph break
        assert first(run(x[:2])).shape == first(layer(x[:2])).shape
    direction = torch.randn(first(layer(x)).shape, generator=torch.Generator().manual_seed(2))
    eager, compiled = ((draws(f, x, 200) * direction).flatten(1).sum(1) for f in (layer, run))
    error = (eager.mean() - compiled.mean()).abs()
    assert error <= QUANTILE * (eager.var() / 200 + compiled.var() / 200) ** 0.5 + 1e-5
    assert 0.5 <= (eager.std() + 1e-6) / (compiled.std() + 1e-6) <= 2.0


def half_precision_is_kept(example: LayerExample, dtype: torch.dtype) -> None:
    layer = example.layer(0.999).to(dtype)
    if "rate" in layer._buffers:
        assert layer.rate == torch.tensor(0.999)  # not rounded to 1
    output = first(layer(example.input(dtype=dtype)))
    assert output.dtype == dtype and torch.isfinite(output).all()


def batch_of_one_works(example: LayerExample) -> None:
    output = first(example.layer(0.5)(example.input()[:1]))
    assert torch.isfinite(output).all()


def state_is_complete(example: LayerExample) -> None:
    """The rate comes with the state dict; a copy and a reload give the same layer."""
    layer = example.layer(0.25)
    other = example.layer(0.75)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.rate, layer.rate)
    assert repr(copy.deepcopy(layer)) == repr(layer)
    assert "0.25" in repr(layer).split("(module)")[0]


def nothing_is_written_in_place(example: LayerExample) -> None:
    x = example.input()
    before = x.clone()
    layer = example.layer(0.5)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    layer(x)
    assert torch.equal(x, before)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


def module(build: Callable[[], nn.Module], wrap: Callable) -> Callable[[float], layers.NoiseLayer]:
    """`make` for layers that wrap a module."""
    return lambda rate: wrap(build(), rate)
