"""What is said of records written by hand: no network is trained, each number is a choice."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tikhon.diagnosis.checks import initial, loss, static, wiring
from tikhon.diagnosis.checks.causes import gradient_decline
from tikhon.diagnosis.evidence import Evidence
from tikhon.diagnosis.record import Point, Probe, Record, Site, SiteReading

LINEAR = Site("0", "Linear 16>16", "weight", 16, 16)
TANH = Site("1", "tanh", "activation")
HEAD = Site("2", "Linear 16>2", "weight", 16, 2)


def evidence(
    *layers: tuple[Site, SiteReading], end: float = 0.0, steps: int = 100, **facts: Any
) -> Evidence:
    """Of a run that ends with a skill: 0 is a constant prediction, 1 is no loss."""
    probes = (Probe(0, 1.0, tuple(reading for _, reading in layers), gradient=1.0),)
    return Evidence(
        Record(
            model="", parameters=1, trainable=1, batch_size=32, steps=steps, seed=0, loss="",
            optimizer={}, data={}, sites=tuple(site for site, _ in layers), probes=probes,
            static={"trivial": 1.0, **facts.pop("static", {})},
            points=(Point(0, 1.0, 1.0), Point(100, 1.0 - end, 1.0 - end)), **facts,
        )
    )  # fmt: skip


def codes(module: Any, ev: Evidence) -> dict[str, Any]:
    return {finding.code: finding for check in module.CHECKS for finding in check(ev)}


def weights(factor: float, **values: Any) -> SiteReading:
    """Of a layer with 16 inputs."""
    return SiteReading(weight_rms=factor / 4, **values)


@pytest.mark.parametrize(
    ("factor", "bias", "named"),
    [(1.0, 0.0, ""), (2.5, 0.0, "saturated"), (1.0, 2.9, ""), (1.0, 3.0, "saturated_bias")],
)
def test_units_are_born_saturated_by_weights_or_a_bias_and_not_by_inputs(factor, bias, named):
    layer = weights(factor, rms=1.0, diversity=1.0, bias=bias)
    found = initial.poor_init(evidence((LINEAR, layer), (TANH, SiteReading(saturated=0.5))))
    assert (found.why.key if found else "") == (named and f"why_born_{named}")
    if found:
        assert found.where == ("0", "1")
        assert found.evidence == {"bias": bias, "weight_factor": factor}


@pytest.mark.parametrize(("dead", "named"), [(0.94, False), (0.95, True)])
def test_units_that_are_born_dead_are_named_whatever_the_weights_are(dead, named):
    reading = SiteReading(dead=dead)
    alone, behind = (
        evidence((TANH, reading)),
        evidence((LINEAR, weights(1.0)), (TANH, reading)),
    )
    for ev in (alone, behind):
        found = initial.poor_init(ev)
        assert (found is not None and found.why.key == "why_born_dead") == named
    reached = evidence((LINEAR, weights(1.0)), (TANH, reading), end=0.95)
    assert initial.poor_init(reached) is None


def test_saturated_units_without_a_layer_in_front_follow_from_the_inputs():
    assert initial.poor_init(evidence((TANH, SiteReading(saturated=0.9)))) is None


def test_the_decline_of_a_gradient_is_that_of_its_weights_and_slopes():
    relu = Site("1", "relu", "activation")
    ev = evidence(
        (LINEAR, SiteReading(signal=0.1)),
        (relu, SiteReading(slope=0.5)),
        (HEAD, SiteReading(signal=1.0, weight_factor=0.2)),
    )
    by_weights, by_slopes, numbers = gradient_decline(ev)
    assert by_weights == pytest.approx(math.log(1.41 / 0.2))
    assert by_slopes == pytest.approx(-math.log(0.5 * 1.41))
    assert numbers == {"weight_factor": 0.2, "ideal": 1.41}
    assert gradient_decline(evidence((LINEAR, SiteReading(signal=1.0)))) == (0.0, 0.0, {})


@pytest.mark.parametrize(
    ("readings", "named"),
    [
        ({}, True),
        ({"dead": 0.95}, True),
        ({"dead": 0.96}, False),
        ({"saturated": 0.96}, False),
        ({"constant": True}, False),
    ],
)
def test_equal_outputs_are_explained_by_units_at_their_place_alone(readings, named):
    def said(place: str) -> bool:
        ev = evidence(
            (LINEAR, weights(1.0, rms=1.0, diversity=1.0)),
            (TANH, SiteReading(**readings)),
            (HEAD, weights(1.0)),
            wiring={"alike": {"module": place}},
        )
        return "inputs_ignored" in codes(wiring, ev)

    assert said("0") == named
    assert said("1") or not named or readings == {}
    assert said("2")  # what is dead elsewhere is no reason here


def test_equal_weights_explain_equal_outputs_and_a_unit_behind_a_unit_does_not():
    alike = {"alike": {"module": "0"}}
    ev = evidence((LINEAR, weights(1.0, constant=True)), (HEAD, weights(1.0)), wiring=alike)
    assert "inputs_ignored" not in codes(wiring, ev)
    relu = Site("0", "relu", "activation")
    read = ((relu, SiteReading()), (TANH, SiteReading(dead=1.0)), (HEAD, weights(1.0)))
    assert "inputs_ignored" in codes(wiring, evidence(*read, wiring=alike))


@pytest.mark.parametrize(("bias", "named"), [(2.9, True), (3.0, False), (math.inf, True)])
def test_units_dead_of_a_bias_explain_equal_outputs_everywhere(bias, named):
    layer = weights(1.0, rms=1.0, diversity=0.0 if bias == math.inf else 1.0, bias=min(bias, 9.0))
    ev = evidence(
        (LINEAR, layer),
        (TANH, SiteReading(dead=1.0)),
        (HEAD, weights(1.0)),
        wiring={"alike": {"module": "2"}},
    )
    assert ("inputs_ignored" in codes(wiring, ev)) == named


def straight(
    *sites: Site, end: float = 0.0, steps: int = 9, signal: float | None = 1.0, **facts: Any
) -> str:
    """The severity of a network that is straight, or "" if nothing is said."""
    read = [(site, SiteReading(signal=signal)) for site in sites]
    found = codes(wiring, evidence(*read, end=end, steps=steps, wiring={"bend": 0.0, **facts}))
    return found["no_nonlinearity"].severity if "no_nonlinearity" in found else ""


@pytest.mark.parametrize(
    ("sites", "facts", "severity"),
    [
        ((LINEAR, HEAD), {}, "warning"),
        ((LINEAR, HEAD), {"end": 0.95}, "info"),
        ((LINEAR, HEAD), {"bend": 1e-3}, ""),
        ((LINEAR, HEAD), {"explained_bent": 0.5, "explained_straight": 0.44}, "critical"),
        ((LINEAR, HEAD), {"explained_bent": 0.5, "explained_straight": 0.46}, "warning"),
        ((LINEAR,), {}, ""),
        ((LINEAR,), {"explained_bent": 0.5, "explained_straight": 0.2}, "warning"),
        ((LINEAR,), {"explained_bent": 0.5, "explained_straight": 0.25}, "warning"),
        ((LINEAR,), {"explained_bent": 0.5, "explained_straight": 0.26}, ""),
        ((LINEAR,), {"explained_bent": 0.5, "explained_straight": 0.2, "end": 0.95}, ""),
        ((LINEAR, TANH, HEAD), {}, ""),
        ((LINEAR, TANH, HEAD), {"signal": None}, "warning"),
        ((LINEAR, TANH, HEAD), {"explained_bent": 0.5, "explained_straight": 0.2}, "critical"),
        ((TANH, HEAD), {"explained_bent": 0.5, "explained_straight": 0.3}, "warning"),
        ((LINEAR, HEAD), {"steps": 0}, "info"),
        ((), {}, ""),
    ],
)
def test_a_straight_network_is_told_where_the_targets_bend(sites, facts, severity):
    assert straight(*sites, **facts) == severity


@pytest.mark.parametrize(
    ("turn", "shape", "named"),
    [(3.0, [], False), (3.1, [], True), (3.1, [1], True), (9, [2], False)],
)
def test_an_angle_is_told_of_one_number_a_row(turn, shape, named):
    ev = evidence((LINEAR, SiteReading()), wiring={"turn": turn, "output_shape": shape})
    assert ("angle_wraps" in codes(loss, ev)) == named


@pytest.mark.parametrize(
    ("rate", "gain", "named"),
    [
        (0.5, 0.28, False),
        (0.5, 0.32, True),
        (0.8, 0.08, False),
        (0.8, 0.12, True),
        (0.91, 0, True),
    ],
)
def test_dropout_is_told_by_what_a_run_without_it_gains(rate, gain, named):
    ev = evidence(
        (LINEAR, SiteReading()),
        static={"dropout": {"drop": rate}},
        reference={"undropped_loss": 1.0 - gain},
    )
    assert ("excessive_dropout" in codes(static, ev)) == named
