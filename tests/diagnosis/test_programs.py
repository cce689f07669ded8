"""The labelled benchmark programs, where they are: nothing moves, faults are found."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from faulty import fingerprint, same
from tikhon.diagnosis import LABELS, diagnose


@pytest.fixture(scope="module")
def programs(shared_data):
    path = Path(__file__).parents[2] / "benchmarks" / "diagnosis.py"
    spec = importlib.util.spec_from_file_location("benchmark_diagnosis", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.programs(shared_data)
    if found is None:
        pytest.skip("faulty_programs.json absent: set TIKHON_BENCHMARK_DATA to its folder")
    return found


def agrees(found, case):
    expected = set(case["expected"])
    return (
        bool(found.labels & expected)
        if expected != {"healthy"}
        else not found.labels & set(LABELS)
    )


@pytest.mark.slow
def test_labels_of_all_programs_and_the_first_seed(programs):
    runner, cases = programs
    wrong = []
    for case in cases:
        program = runner.load(case, 0)
        found = diagnose(
            program.model,
            program.train,
            program.loss,
            optimizer=program.optimizer,
            valid=program.valid,
            steps=program.steps,
            batch_size=program.batch_size,
            penalty=program.penalty,
            clip=program.clip,
        )
        if not agrees(found, case):
            wrong.append((case["id"], sorted(found.labels)))
    assert len(wrong) <= 1, wrong


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_programs_are_bit_identical_afterwards(programs, every):
    runner, cases = programs
    for case in cases[::every]:
        program = runner.load(case, 1)
        program.model.eval()
        before = fingerprint(program.model, program.optimizer)
        data = [t.clone() for t in program.train]
        diagnose(
            program.model,
            [t[:96] for t in program.train],
            program.loss,
            optimizer=program.optimizer,
            steps=2,
            batch_size=8,
            penalty=program.penalty,
            clip=program.clip,
        )
        assert same(before, fingerprint(program.model, program.optimizer)), case["id"]
        assert all(torch.equal(a, b) for a, b in zip(data, program.train)), case["id"]
