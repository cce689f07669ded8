import pytest
import torch

from examples_of import LAYERS
from layers import laws
from layers.laws import LayerExample
from tikhon import layers


def over(*, where=lambda example: True):
    chosen = [example for example in LAYERS if where(example)]
    return pytest.mark.parametrize("example", chosen, ids=lambda e: e.name)


def test_every_layer_has_an_example():
    classes = {
        name
        for name in layers.__all__
        if isinstance(getattr(layers, name), type)
        and issubclass(getattr(layers, name), layers.NoiseLayer)
    } - {"NoiseLayer"}
    assert classes == {type(example.layer(0.5)).__name__ for example in LAYERS}


@over(where=lambda e: e.mean_kept)
@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_training_mean_is_the_evaluation_output(example: LayerExample, rate: float):
    laws.mean_is_kept(example, rate)


@over(where=lambda e: e.variance)
@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_variance_follows_its_formula(example: LayerExample, rate: float):
    laws.variance_follows_formula(example, rate)


@over(where=lambda e: e.identity)
def test_evaluation_is_identity(example: LayerExample):
    laws.evaluation_is_identity(example, 0.5)


@over(where=lambda e: not e.learned)
def test_rate_zero_is_evaluation(example: LayerExample):
    laws.rate_zero_is_evaluation(example)


@over()
def test_rate_one_is_the_limit_of_the_definition(example: LayerExample):
    laws.rate_one_is_the_limit(example)


@over(where=lambda e: e.tied is not None)
def test_mask_is_constant_along_tied_dimensions_only(example: LayerExample):
    laws.mask_is_tied(example, 0.5)


@over(where=lambda e: e.mean_kept or e.multiplicative)
def test_rows_are_independent_or_tied_as_declared(example: LayerExample):
    laws.rows_are_independent(example, 0.5)


@over(where=lambda e: e.multiplicative)
def test_gradient_flows_through_kept_units_only(example: LayerExample):
    laws.gradient_flows_through_kept_units(example, 0.5)


@over(where=lambda e: not e.lengths)
def test_rates_of_members_under_vmap_equal_a_loop(example: LayerExample):
    laws.members_equal_a_loop(example, (0.1, 0.4, 0.7))


@over(where=lambda e: not e.lengths)
def test_members_under_vmap_draw_their_own_noise(example: LayerExample):
    laws.members_may_differ(example, 0.5)


@over()
def test_a_seed_decides_the_noise(example: LayerExample):
    laws.seed_decides(example, 0.5)


@over(where=lambda e: e.monotone)
def test_what_a_larger_rate_keeps_a_smaller_keeps(example: LayerExample):
    laws.larger_rate_keeps_less(example)


FIRST = {type(example.layer(0.5)): example.name for example in reversed(LAYERS)}
# their forward is that of another class here, for other dimensions
ALIKE = ("Dropout1d", "Dropout3d", "DropBlock1d", "DropBlock3d")
COMPILED = [  # what is compiled is the class
    pytest.param(e, id=e.name, marks=pytest.mark.slow if e.name in ALIKE else ())
    for e in LAYERS
    if e.name in FIRST.values()
]


@pytest.mark.parametrize("example", COMPILED)
def test_compiled_is_one_graph_once_and_equals_eager_in_distribution(example: LayerExample):
    laws.compiled_equals_eager(example)


@over(where=lambda e: not e.tokens)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_kept(example: LayerExample, dtype: torch.dtype):
    laws.half_precision_is_kept(example, dtype)


@over(where=lambda e: not e.learned)
def test_the_meta_device_keeps_the_rate(example: LayerExample):
    with torch.device("meta"):
        built = example.make(0.4)
    for layer in (built, example.make(0.4).to("meta")):
        assert layer.to_empty(device="cpu").rate == torch.tensor(0.4)


@over()
def test_a_batch_of_one_works(example: LayerExample):
    laws.batch_of_one_works(example)


@over()
def test_the_rate_is_part_of_the_state(example: LayerExample):
    laws.state_is_complete(example)


@over()
def test_nothing_is_written_in_place(example: LayerExample):
    laws.nothing_is_written_in_place(example)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # inductor's own
@over(where=lambda e: e.name in ("Dropout", "DropPath", "DropBlock2d", "AlphaDropout"))
def test_compiled_by_inductor_equals_eager_in_distribution(example: LayerExample):
    laws.compiled_equals_eager(example, "inductor")


@pytest.mark.slow
@over()
def test_compiled_in_functional_form_equals_eager_in_distribution(example: LayerExample):
    laws.compiled_equals_eager(example, "aot_eager")
