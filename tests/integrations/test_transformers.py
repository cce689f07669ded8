from __future__ import annotations

import pytest
import torch

import tikhon as tk
from integrations import plain

pytestmark = pytest.mark.filterwarnings("ignore")  # the Trainer's advice
TERMS = {f"net.{pattern}": term for pattern, term in plain.TERMS.items()}


@pytest.fixture(scope="module")
def programs():
    """The programs, imported by the first test that runs them."""
    pytest.importorskip("transformers", reason="pip install tikhon[hf]")
    pytest.importorskip("accelerate", reason="pip install tikhon[hf]")
    from integrations import transformers_programs

    return transformers_programs


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_equals_the_plain_loop(programs, tmp_path, accumulate):
    penalty = programs.Regularize(TERMS)
    run = programs.trainer(tmp_path, penalty, gradient_accumulation_steps=accumulate)
    run.train()
    expected = plain.train(accumulate=accumulate).state_dict()
    for name, value in run.model.net.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-6), name
    assert penalty.regularizer.steps == plain.EPOCHS * 6 // accumulate
    assert max(penalty.regularizer.sparsity().values()) > 0


def test_a_resumed_training_equals_the_uninterrupted_one(programs, tmp_path):
    whole = programs.trainer(tmp_path / "whole", programs.Regularize(TERMS))
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 12, "max_steps": 24}
    programs.trainer(tmp_path / "half", programs.Regularize(TERMS), **saving).train()
    penalty = programs.Regularize(TERMS)
    resumed = programs.trainer(tmp_path / "half", penalty, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-12"))
    assert penalty.regularizer.steps == 24
    plain.assert_same(resumed.model, whole.model)


def test_a_checkpoint_without_penalties_is_said(programs, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 12, "max_steps": 24}
    programs.trainer(tmp_path, **saving).train()
    resumed = programs.trainer(tmp_path, programs.Regularize(TERMS), **saving)
    with pytest.warns(UserWarning, match="no state of Regularize"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))


def test_the_log_history_holds_the_penalties(programs, tmp_path):
    run = programs.trainer(tmp_path, programs.Regularize(TERMS))
    run.train()
    logged = [line for line in run.state.log_history if "loss" in line]
    strengths = [line["penalty/L1/strength"] for line in logged]
    assert strengths == sorted(strengths) and strengths[-1] == pytest.approx(0.05)


def test_the_watch_stops_at_the_first_bad_number(programs, tmp_path):
    data = programs.rows()
    data[20]["x"] = torch.full((6,), float("nan"))
    with pytest.raises(tk.NonFiniteError, match=r"step 2: .* is input"):
        programs.trainer(tmp_path, programs.Watch(every=1), data=data).train()


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_the_watch_says_in_one_line_that_nothing_was_found(
    programs, tmp_path, capsys, disable_tqdm
):
    watch = programs.Watch(every=1)
    programs.trainer(tmp_path, watch, disable_tqdm=disable_tqdm).train()
    said = [line for line in capsys.readouterr().err.splitlines() if "tikhon watch" in line]
    assert said == [watch.watch.verdict] * (not disable_tqdm)
    assert f"no problem found in {watch.watch.step} steps" in watch.watch.verdict


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_sparse_training_equals_the_plain_loop(programs, tmp_path, accumulate):
    sparse = programs.Sparsify("60%", within="net")
    run = programs.trainer(tmp_path, sparse, gradient_accumulation_steps=accumulate)
    run.train()
    expected = plain.train(accumulate=accumulate, share=0.6).state_dict()
    for name, value in run.model.net.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert sparse.sparsifier.audit().share == pytest.approx(0.6, abs=0.02)
    logged = [line["sparsity/zeros"] for line in run.state.log_history if "loss" in line]
    assert logged == sorted(logged) and logged[-1] > 0.5


def test_a_resumed_sparse_training_equals_the_uninterrupted_one(programs, tmp_path):
    whole = programs.trainer(tmp_path / "whole", programs.Sparsify(0.6))
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 12, "max_steps": 24}
    programs.trainer(tmp_path / "half", programs.Sparsify(0.6), **saving).train()
    resumed = programs.trainer(tmp_path / "half", programs.Sparsify(0.6), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-12"))
    plain.assert_same(resumed.model, whole.model)
