"""How people write a builder: each form is called with what it accepts, and nothing is lost."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from tikhon.errors import InputError
from tikhon.models.mlp import MLP
from tikhon.tuning.builder import Builder
from tikhon.tuning.searches import Grid, PopulationBased, Random
from tikhon.tuning.space import Choice, Int, Log, Space, Uniform
from tikhon.tuning.trials import History, Outcome
from tikhon.tuning.tune import tune


def net(width, bend=nn.ReLU):
    return nn.Sequential(nn.Linear(5, width), bend(), nn.Linear(width, 2))


class Net(nn.Sequential):
    def __init__(self, width, bend=nn.ReLU):
        super().__init__(*net(width, bend))


def positional(width, /):
    return net(width)


def inner(inputs, width, outputs):
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


FORMS = {
    "a default": lambda width=8: net(width),
    "required": lambda width: net(width),
    "keyword only": lambda *, width: net(width),
    "with others": lambda width=8, **others: net(width),
    "others alone": lambda **others: net(others["width"]),
    "config": lambda config: net(config["width"]),
    "config with a default": lambda config=None: net(config["width"]),
    "any one name": lambda c: net(c["width"]),
    "as a namespace": lambda hp: net(hp.width),
    "unpacked": lambda config: net(**{k: v for k, v in config.items() if k == "width"}),
    "get": lambda config: net(config.get("width", 8)),
    "config and a name": lambda config, width: net(width),
    "a class": Net,
    "partial of a class": functools.partial(Net, bend=nn.Tanh),
    "partial": functools.partial(inner, 5, outputs=2),
    "by position": positional,
    "by position, with a default": lambda inputs=5, width=8, /: inner(inputs, width, 2),
    "positions and a configuration": lambda config, /, width=8: net(config["width"]),
    "popped": lambda config: net(config.pop("width")),
    "a copy": lambda config: net(config.copy()["width"]),
    "a method": type("Maker", (), {"build": lambda self, width=8: net(width)})().build,
    "a callable": type("Maker", (), {"__call__": lambda self, width: net(width)})(),
}
SPACE = Space(lr=Log(1e-3, 1e-1), width=Choice([4, 64]))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_builder_builds_what_is_reported(form):
    build = Builder(FORMS[form], SPACE)
    for width in (4, 64):
        assert build({"lr": 0.01, "width": width})[0].out_features == width
    build.check(SPACE, {"lr": 3e-3, "width": 4})


def test_the_chosen_configuration_is_the_one_that_was_built():
    x = torch.randn(120, 5, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] * x[:, 1] > 0).long()
    built = []

    def build(width=8, **others):
        built.append((width, others))
        return net(width)

    space = Space(lr=Log(1e-3, 1e-1), width=Int(4, 24), tag=Choice(["a", "b"]))
    with pytest.warns(UserWarning, match="accepts tag, and builds the same model"):
        result = tune(build, (x, y), space=space, budget="3runs", epochs=3)
    assert result.model[0].out_features == result.config["width"]
    assert {outcome["config"]["width"] for outcome in result.trials} <= {w for w, _ in built}
    assert all(set(others) == {"tag"} for _, others in built)


def ignores(build):
    """A wrapper that claims to be `build` and drops what it is given."""

    @functools.wraps(build)
    def made(*args, **kwargs):
        return build()

    return made


class Sloped(nn.Module):
    """A number that only a forward pass reads."""

    def __init__(self, slope=0.1):
        super().__init__()
        self.slope, self.layer = slope, nn.Linear(5, 2)

    def forward(self, x):
        return nn.functional.leaky_relu(self.layer(x), self.slope)


DROPPED = {
    "a parameter that is not read": lambda *, width=8: net(8),
    "others that are not read": lambda **others: net(8),
    "a wrapper that drops arguments": ignores(lambda width=8: net(width)),
    "another default": lambda width=8: net(width=8),
}


@pytest.mark.parametrize("form", DROPPED)
def test_an_entry_that_is_accepted_and_dropped_is_told(form):
    with pytest.warns(UserWarning, match="accepts width, and builds the same model whatever it"):
        Builder(DROPPED[form], SPACE).check(SPACE, {"lr": 3e-3, "width": 4})


def test_an_entry_that_is_read_anywhere_is_not_told_of():
    def of_one_choice(kind, width):
        return net(width if kind == "wide" else 4)

    def inside(width):
        class Local(nn.Linear):
            def forward(self, x):
                return super().forward(x) * width

        return Local(5, 2)

    spaces = {
        Sloped: Space(slope=Log(1e-3, 1.0)),
        inside: Space(width=Choice([4, 64])),
        of_one_choice: Space(kind=Choice(["plain", "wide"]), width=Int(4, 16)),
        (lambda bend: net(8, getattr(nn, bend))): Space(bend=Choice(["ReLU", "Tanh"])),
    }
    for build, space in spaces.items():
        Builder(build, space).check(space, space.at([0.0] * len(space.varying)))


DRAWING = {
    "of Keras Tuner": lambda hp: net(hp.Int("width", 4, 64)),
    "of Optuna": lambda trial: net(trial.suggest_int("width", 4, 64)),
}


@pytest.mark.parametrize("form", DRAWING)
def test_a_builder_that_draws_its_values_itself_is_told_where_ranges_go(form):
    x, y = torch.randn(60, 5), torch.arange(60) % 2
    with pytest.raises(InputError, match=r"holds values, not ranges: give the ranges to tune"):
        tune(DRAWING[form], (x, y), space=Space(lr=Log(1e-3, 1e-1)), budget="4runs", epochs=2)


SHARED = net(8)
MISBUILT = {
    "a model": (SHARED, "received a model .Sequential.: give lambda: copy.deepcopy"),
    "one model for each width": (functools.cache(lambda width=8: net(width)), "an earlier model"),
    "nothing": (lambda: None, "must return a torch module, it returned None: is a return"),
    "something else": (lambda: [net(8)], "must return a torch module, it returned"),
}


@pytest.mark.parametrize("form", MISBUILT)
def test_what_is_no_builder_of_fresh_models_is_refused(form):
    build, message = MISBUILT[form]
    x, y = torch.randn(60, 5), torch.arange(60) % 2
    with pytest.raises(InputError, match=message):
        tune(build, (x, y), space=Space(width=Choice([4, 8, 16])), budget="4runs", epochs=2)


REUSED = {
    "the same model": lambda old: lambda: old,
    "a new model around it": lambda old: lambda: nn.Sequential(old),
    "its layers and a fresh head": lambda old: lambda: nn.Sequential(*old[:-1], nn.Linear(8, 2)),
}


@pytest.mark.parametrize("form", REUSED)
def test_every_trial_begins_with_the_weights_that_a_shared_model_had(form):
    torch.manual_seed(0)
    x = torch.randn(60, 5)
    y = (x[:, 0] > 0).long()
    shared = net(8)
    before = copy.deepcopy(shared.state_dict())

    def without_default(build):
        space = Space(lr=Choice([0.01, 0.1]))
        found = tune(build, (x, y), space=space, budget="4runs", epochs=3, seed=0)
        return [round(outcome.score, 6) for outcome in found.history]

    assert without_default(REUSED[form](shared)) == without_default(
        lambda: REUSED[form](copy.deepcopy(shared))()
    )
    assert all(torch.equal(before[name], value) for name, value in shared.state_dict().items())


def test_the_dropout_of_torch_follows_the_space():
    def build(dropout):
        return nn.Sequential(nn.Linear(5, 8), nn.Dropout(dropout), nn.Linear(8, 2))

    space = Space(dropout=Uniform(0.1, 0.6))
    for rate in (0.1, 0.6):
        assert float(Builder(build, space)({"dropout": rate})[1].rate) == pytest.approx(rate)
    found = tune(
        build, (torch.randn(60, 5), torch.arange(60) % 2), space=space, budget="2runs", epochs=2
    )
    assert float(found.model[1].rate) == pytest.approx(found.config["dropout"])


UNREAD = {
    "no parameter": lambda: net(8),
    "another name": lambda depth=3: net(8),
    "a config that is not read": lambda config: net(8),
    "a class": functools.partial(Net, width=8),
}


@pytest.mark.parametrize("form", UNREAD)
def test_an_entry_that_nobody_reads_is_an_error_with_its_name(form):
    x, y = torch.randn(60, 5), torch.arange(60) % 2
    build = UNREAD[form]
    space = Space(lr=Log(1e-3, 1e-1), widht=Choice([4, 64]))
    with pytest.raises(InputError, match=r"unknown space entry 'widht'"):
        tune(build, (x, y), space=space, budget="2runs", epochs=2)


def test_a_misspelt_hyperparameter_names_the_closest():
    x, y = torch.randn(60, 5), torch.arange(60) % 2
    with pytest.raises(InputError, match="'wieght_decay'; did you mean 'weight_decay'"):
        tune(lambda: net(8), (x, y), space=Space(wieght_decay=Log(1e-4, 1e-1)), budget="2runs")


def test_a_parameter_that_nothing_gives_is_named():
    x, y = torch.randn(60, 5), torch.arange(60) % 2
    for build in (lambda *, width, lr: net(width), lambda width, depth: net(width)):
        with pytest.raises(InputError, match="build_model needs"):
            tune(build, (x, y), space=Space(lr=Log(1e-3, 1e-1)), budget="2runs", epochs=2)
    with pytest.raises(InputError, match="build_model must be a function"):
        tune(None, (x, y))


def test_an_entry_that_is_read_under_one_choice_alone_is_read():
    def build(config):
        return net(config["width"] if config["kind"] == "wide" else 4)

    space = Space(kind=Choice(["plain", "wide"]), width=Int(8, 16))
    Builder(build, space).check(space, {"kind": "plain", "width": 8})


@pytest.mark.parametrize(
    "entry", [Int(1, 4), Int(8, 512, log=True), Int(-3, 3), Int(5, 5)], ids=repr
)
def test_whole_numbers_are_drawn_in_their_range(entry):
    values = [entry.at(u / 200) for u in range(201)]
    assert all(type(v) is int and entry.low <= v <= entry.high for v in values)
    assert values == sorted(values) and {values[0], values[-1]} == {entry.low, entry.high}
    assert all(entry.at(entry.unit(v)) == v for v in set(values))
    assert entry.grid(3)[0] == entry.low or entry.low == entry.high
    assert Space.from_dict(Space(n=entry).to_dict())["n"] == entry
    if not entry.log and entry.low < entry.high:
        counts = [values.count(v) for v in set(values)]
        assert max(counts) <= 1.3 * min(counts)  # every number has a cell of one size


def test_searches_keep_whole_numbers_whole():
    space = Space(width=Int(4, 64, log=True), dropout=Uniform(0, 0.5))
    for design in (Random(space, count=6), Grid(space, points=3)):
        assert all(type(c["width"]) is int for c in design.configs())
    search = PopulationBased(space, Random(space, count=8), full=4, interval=1)
    history = History()
    while trials := search.next(history):
        assert all(type(t.config["width"]) is int for t in trials)
        history = history.extended(Outcome(t, float(t.config["width"])) for t in trials)


@pytest.mark.parametrize(
    ("arguments", "message"), [((1.5, 4), "whole numbers"), ((0, 4, True), "starts below 1")]
)
def test_ends_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Int(*arguments)


def test_optuna_is_told_of_whole_numbers():
    pytest.importorskip("optuna", reason="pip install 'tikhon[search]'")
    from tikhon.integrations.optuna import distributions

    found = distributions(Space(width=Int(8, 64, log=True), lr=Log(1e-3, 1e-1)))["width"]
    assert (found.low, found.high, found.log) == (8, 64, True)


@pytest.mark.parametrize("named", [True, False])
def test_what_conditions_of_others_ask_for_needs_no_reader(named):
    def build(first, second=None, depth=1):
        widths = [4, first, *([second] if second else []), 2]
        return MLP(widths)

    def without(first, second=None):
        return build(first, second)

    space = Space(depth=Int(1, 2), first=[4, 6], second=Choice([5, 7]).when(depth=2))
    made = Builder(build if named else without, space)
    made.check(space, {"depth": 1, "first": 4})
    assert len(made({"depth": 2, "first": 4, "second": 5}).sizes) == 4
