"""Laws of every search, over a list of instances."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy
import pytest
from hypothesis import given, settings, strategies as st

from tikhon.errors import InputError
from tikhon.tuning.searches import Grid, Halving, PopulationBased, Random, SpaceFilling
from tikhon.tuning.space import Choice, Int, Log, Space, Uniform
from tikhon.tuning.trials import History, Outcome, Trial

SPACE = Space(dropout=Uniform(0, 0.8), lr=Log(1e-4, 1e-1), label_smoothing=Choice([0.0, 0.1]))
SEARCHES = [
    Grid(SPACE, budget=4, points=3),
    Random(SPACE, budget=4, count=7, seed=3),
    SpaceFilling(SPACE, budget=4, count=8, seed=1),
    Halving(SPACE, Random(SPACE, count=18), full=48),
    Halving(SPACE, Random(SPACE, count=18), full=48, first=2, guarded=False),
    PopulationBased(SPACE, Random(SPACE, count=8), full=10, interval=3),
]
IDS = [f"{type(s).__name__}-{i}" for i, s in enumerate(SEARCHES)]


def train(trials, fails=lambda trial: False):
    """A pretended training: losses fall towards a value that depends on the configuration."""
    outcomes = []
    for trial in trials:
        rate, lr = trial.config.get("dropout", 0.3), trial.config.get("lr", 0.01)
        target = (rate - 0.3) ** 2 + (math.log10(lr) + 2) ** 2
        curve = [(e, target + 3 / e) for e in range(1, trial.budget + 1)]
        score = math.nan if fails(trial) else curve[-1][1]
        outcomes.append(Outcome(trial, score, seconds=0.1, curve=tuple(curve)))
    return outcomes


EMPTY = History()


def run(search, history=EMPTY, stop=math.inf, **kwargs):
    while len(history) < stop and (trials := search.next(history)):
        history = history.extended(train(trials, **kwargs))
    return history


def reload(history):
    return History(Outcome.from_dict(json.loads(json.dumps(o.to_dict()))) for o in history)


@pytest.mark.parametrize("search", SEARCHES, ids=IDS)
def test_next_is_a_pure_function_of_the_history(search):
    history = run(search, stop=1)
    assert search.next(history) == search.next(history)
    assert search.next(reload(history)) == search.next(history)


@pytest.mark.parametrize("search", SEARCHES, ids=IDS)
@settings(deadline=None, max_examples=10)
@given(cut=st.floats(0, 1))
def test_a_search_resumed_after_json_ends_like_an_uninterrupted_one(search, cut):
    whole = run(search)
    part = reload(whole[: int(cut * len(whole))])
    resumed = run(search, part)
    assert [o.trial for o in resumed] == [o.trial for o in whole]
    assert search.next(whole) == []


@pytest.mark.parametrize("search", SEARCHES, ids=IDS)
def test_ids_are_unique_configs_lie_in_the_space_and_cost_is_bounded(search):
    history = run(search)
    assert len(history.ids) == len(history)
    full = max(outcome.trial.budget for outcome in history)
    assert history.epochs <= len(search.next(History())) * full
    for outcome in history:
        assert all(-1e-9 <= u <= 1 + 1e-9 for u in SPACE.units(outcome.trial.config))
        if outcome.trial.parent is not None:
            assert history.of(outcome.trial.parent).trial.budget <= outcome.trial.budget


@pytest.mark.parametrize("search", SEARCHES, ids=IDS)
def test_failed_members_are_never_continued(search):
    history = run(search, fails=lambda trial: trial.config["lr"] > 0.01)
    failed = {o.trial.id for o in history if o.failed}
    assert failed
    assert not failed & {o.trial.parent for o in history}


@pytest.mark.parametrize("search", SEARCHES, ids=IDS)
def test_when_all_members_diverge_the_search_ends(search):
    history = run(search, fails=lambda trial: True)
    with pytest.raises(ValueError, match="trials finished"):
        history.best()


def test_rung_sizes_of_plain_halving():
    history = run(Halving(SPACE, Random(SPACE, count=18), full=18, first=2, guarded=False))
    sizes = {}
    for outcome in history:
        sizes[outcome.trial.budget] = sizes.get(outcome.trial.budget, 0) + 1
    assert sizes == {2: 18, 6: 6, 18: 2}
    assert history.epochs == 18 * 2 + 6 * 4 + 2 * 12


def test_halving_starts_at_an_eighth_and_waits_for_the_least_regularized_member():
    search = Halving(SPACE, Random(SPACE, count=9), full=80, first=1)
    assert search.next(History())[0].budget == 10
    first = History(train(search.next(History())))
    postponed = search.next(first)
    assert [t.parent for t in postponed] == list(range(9))
    assert {t.budget for t in postponed} == {20}


def test_halving_cuts_once_the_least_regularized_member_has_turned_up():
    search = Halving(SPACE, Random(SPACE, count=9), full=80)
    rung = train(search.next(History()))
    least = min(rung, key=lambda o: SPACE.weight(o.trial.config))
    up = Outcome(least.trial, 1.0, curve=((1, 0.5), (5, 0.9), (10, 1.0)))
    history = History(up if o is least else o for o in rung)
    assert len(search.next(history)) < 9


def test_halving_keeps_a_strongly_regularized_member_that_is_still_falling():
    space = Space(dropout=Uniform(0, 0.8))
    search = Halving(space, Grid(space, points=9), full=80)
    rung = []
    for trial in search.next(History()):
        rate = trial.config["dropout"]
        falling = rate > 0.75
        curve = ((1, 2.0), (5, 1.8), (10, 1.6)) if falling else ((1, 0.4), (5, 0.3), (10, 0.35))
        rung.append(Outcome(trial, curve[-1][1] + rate, curve=curve))
    kept = [t.config["dropout"] for t in search.next(History(rung))]
    assert max(kept) == pytest.approx(0.8)
    plain = Halving(space, Grid(space, points=9), full=80, first=10, guarded=False)
    assert max(t.config["dropout"] for t in plain.next(History(rung))) < 0.8


def test_population_based_copies_better_members():
    history = run(PopulationBased(SPACE, Random(SPACE, count=8), full=4, interval=2))
    second = [o for o in history if o.trial.parent is not None]
    parents = [o.trial.parent for o in second]
    assert len(second) == 8 and len(set(parents)) == 6
    scores = {o.trial.id: o.score for o in history}
    worst = sorted(range(8), key=scores.__getitem__)[-2:]
    assert not set(worst) & set(parents)


def test_designs_are_nested_and_seeds_differ():
    few, many = (SpaceFilling(SPACE, count=n).configs() for n in (4, 8))
    assert many[:4] == few
    assert SpaceFilling(SPACE, seed=1).configs() != SpaceFilling(SPACE, seed=0).configs()


def test_history_counts_only_what_a_continued_trial_adds():
    history = History([Outcome(Trial(0, {}, 3), 1.0), Outcome(Trial(1, {}, 9, parent=0), 0.5)])
    assert history.epochs == 9
    assert [o.trial.id for o in history.lineage(1)] == [1, 0]
    assert [o.trial.id for o in history.ranked()] == [1]


def test_a_list_is_a_choice():
    space = Space(width=[4, 8], l1={"fc1.*": [0.0, 1e-3]})
    assert space["width"] == Choice([4, 8])
    assert space["l1[fc1.*]"] == Choice([0.0, 1e-3])
    assert Space.from_dict(json.loads(json.dumps(space.to_dict()))).to_dict() == space.to_dict()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "the space is empty"),
        ({"lr": []}, r"space entry 'lr' is \[\]"),
        ({"lr": None}, "space entry 'lr' is None"),
        ({"dropout": Uniform(0, 1)}, r"a rate lies in \[0, 1\)"),
        ({"lr": Uniform(0, 1)}, "above 0"),
        ({"lr": "auto"}, "adapts"),
        ({"l1": -1.0}, ">= 0"),
    ],
)
def test_a_malformed_space_is_refused(entries, message):
    with pytest.raises(InputError, match=message):
        Space(**entries)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Log(0, 1), "a log range starts above 0"),
        (lambda: Log(1, 0.1), "low exceeds high"),
        (lambda: Uniform(0, math.inf), "finite"),
        (lambda: Uniform("a", 1), "two numbers"),
        (lambda: Choice([]), "at least one value"),
        (lambda: Choice("adam"), "a list of values"),
        (lambda: Space.from_dict({"lr": {"kind": "logg"}}), "did you mean 'log'"),
        (lambda: Space.from_dict({"lr": {"kind": "log", "lo": 1}}), "low and high"),
        (lambda: Space.from_dict({"lr": {"low": 1e-4, "high": 1}}), "has no kind, received"),
        (lambda: Halving(SPACE, Random(SPACE), full=8, factor=1), "factor"),
        (lambda: PopulationBased(SPACE, Random(SPACE), full=8, interval=9), "interval"),
    ],
)
def test_a_malformed_range_is_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_entries_of_parts_survive_json_and_toml(tmp_path):
    space = Space(l1={"*": 1e-3, "fc1.*": Log(1e-5, 1e-2)}, dropout={"drop.?": Uniform(0, 0.5)})
    assert list(space) == ["l1", "l1[fc1.*]", "dropout[drop.?]"]
    assert Space.from_dict(json.loads(json.dumps(space.to_dict()))).to_dict() == space.to_dict()
    file = tmp_path / "space.toml"
    file.write_text(
        'l1 = {"*" = 1e-3, "fc1.*" = {kind = "log", low = 1e-5, high = 1e-2}}\n'
        '[dropout."drop.?"]\nkind = "uniform"\nlow = 0\nhigh = 0.5\n'
    )
    assert Space.from_toml(file).to_dict() == space.to_dict()
    assert space.weight(space.at([1.0, 1.0])) == 1.0  # they count as regularizing


def test_values_of_a_choice_survive_a_journal():
    sizes = [[64, 64], (32,), None, numpy.int64(3), numpy.float32(0.5), True, "a"]
    choice = Choice(sizes)
    assert choice.values == ((64, 64), (32,), None, 3, 0.5, True, "a")
    assert Choice(numpy.array([4, 8])).values == (4, 8) == Choice(range(4, 9, 4)).values
    for value in choice.values:
        outcome = Outcome(Trial(0, {"size": value}, 1), 0.5)
        again = Outcome.from_dict(json.loads(json.dumps(outcome.to_dict())))
        assert again == outcome and choice.unit(again.trial.config["size"]) == choice.unit(value)


@pytest.mark.parametrize("value", [dict, {"a": 1}, object(), len, [{1}]])
def test_values_that_a_journal_cannot_hold_are_refused(value):
    with pytest.raises(InputError, match="give numbers, strings, booleans, None or tuples"):
        Choice([1, value])


def test_a_space_survives_json_and_toml(tmp_path):
    assert Space.from_dict(json.loads(json.dumps(SPACE.to_dict()))).to_dict() == SPACE.to_dict()
    file = tmp_path / "space.toml"
    file.write_text('lr = {kind = "log", low = 1e-4, high = 0.1}\nweight_decay = "auto"\n')
    space = Space.from_toml(file)
    assert space["lr"] == Log(1e-4, 0.1) and space["weight_decay"] == "auto"
    file.write_text("lr = {")
    with pytest.raises(InputError, match="not TOML"):
        Space.from_toml(file)


@settings(deadline=None, max_examples=30)
@given(unit=st.floats(0, 1), low=st.floats(1e-6, 1), width=st.floats(1.01, 100))
def test_a_value_and_its_place_in_the_range_are_inverse(unit, low, width):
    for entry in (Uniform(low, low * width), Log(low, low * width)):
        assert entry.unit(entry.at(unit)) == pytest.approx(unit, abs=1e-6)


def test_importing_the_searches_loads_no_torch():
    code = (
        "import sys, tikhon.tuning.searches, tikhon.tuning.journal; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


TREE = Space(
    model=Choice(["mlp", "cnn"]),
    kernel=Int(3, 7).when(model="cnn"),
    lr=Log(1e-3, 1e-1),
    stride=Choice([1, 2, 4], ordered=True).when(model="cnn", kernel=[5, 6, 7]),
)


def _belongs(config):
    convolves = config["model"] == "cnn"
    strides = convolves and config["kernel"] >= 5
    assert ("kernel" in config) == convolves and ("stride" in config) == strides
    return convolves, strides


@pytest.mark.parametrize(
    "search",
    [
        Grid(TREE, points=3),
        Random(TREE, count=40),
        SpaceFilling(TREE, count=32),
        PopulationBased(TREE, Random(TREE, count=24), full=6, interval=1),
    ],
    ids=lambda s: type(s).__name__,
)
def test_conditional_entries_are_there_exactly_where_their_conditions_hold(search):
    history = run(search)
    kinds = {_belongs(outcome.trial.config) for outcome in history}
    assert kinds == {(False, False), (True, False), (True, True)}
    if isinstance(search, Grid):  # 3 of mlp, of cnn 3 with the kernel 3, 18 with 5 and 7
        configs = [repr(o.trial.config) for o in history]
        assert len(configs) == len(set(configs)) == 3 + 3 + 18


def test_ordered_choices_move_to_their_neighbours():
    space = Space(width=Choice([1, 2, 4, 8, 16], ordered=True))
    search = PopulationBased(space, Random(space, count=24), full=8, interval=1)
    history = run(search)
    values, far = [1, 2, 4, 8, 16], 0
    for outcome in history:
        if outcome.trial.parent is not None:
            parent = history.of(outcome.trial.parent).trial.config["width"]
            far += abs(values.index(parent) - values.index(outcome.trial.config["width"])) > 1
    assert far < 0.2 * len(history)  # a quarter of the moves is drawn again


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": Int(1, 2).when(b=1), "b": Choice([1, 2])}, "stands after it"),
        ({"a": Int(1, 2).when(b=1)}, "is not in the space"),
        ({"b": Choice([1, 2]), "a": Int(1, 2).when(b=3)}, "b is one of 1, 2"),
    ],
)
def test_conditions_that_cannot_hold_are_refused(entries, message):
    with pytest.raises(InputError, match=message):
        Space(**entries)


@pytest.mark.parametrize("name", list(TREE))
def test_conditions_can_be_made_to_hold(name):
    full = {n: TREE.range(n).at(0.0) for n in TREE}
    assert name in TREE.resolved({**full, **TREE.needed(name)})


def test_a_conditional_space_survives_json():
    again = Space.from_dict(json.loads(json.dumps(TREE.to_dict())))
    assert again.to_dict() == TREE.to_dict()
    assert again.at([0.9] * 4) == TREE.at([0.9] * 4)
