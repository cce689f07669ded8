from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import tikhon as tk
from integrations import plain

TERMS = {f"net.{pattern}": term for pattern, term in plain.TERMS.items()}
QUIET = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers, logs and devices


@pytest.fixture(scope="module")
def programs():
    """The programs, imported by the first test that runs them."""
    pytest.importorskip("pytorch_lightning", reason="pip install tikhon[lightning]")
    from integrations import lightning_programs

    return lightning_programs


@QUIET
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_equals_the_plain_loop_bit_for_bit(programs, tmp_path, accumulate):
    module, penalty = programs.Module(), programs.Regularize(TERMS)
    programs.trainer(tmp_path, penalty, accumulate_grad_batches=accumulate).fit(
        module, plain.loader()
    )
    plain.assert_same(module.net, plain.train(accumulate=accumulate))
    assert max(penalty.regularizer.sparsity().values()) > 0
    assert penalty.regularizer.steps == plain.EPOCHS * 6 // accumulate


@QUIET
def test_a_resumed_fit_equals_the_uninterrupted_one(programs, tmp_path):
    first = programs.trainer(tmp_path, programs.Regularize(TERMS), epochs=2)
    first.fit(programs.Module(), plain.loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    module, penalty = programs.Module(), programs.Regularize(TERMS)
    programs.trainer(tmp_path, penalty).fit(
        module, plain.loader(), ckpt_path=tmp_path / "half.ckpt"
    )
    plain.assert_same(module.net, plain.train())
    assert penalty.regularizer.steps == 24


@QUIET
def test_each_of_two_optimizers_gets_its_own_penalty(programs, tmp_path):
    module = programs.Manual()
    strong = programs.Regularize({"net.0.weight": tk.L1(10.0)}, optimizer=0)
    none = programs.Regularize({"net.2.weight": tk.L1(0.0)}, optimizer=1)
    programs.trainer(tmp_path, strong, none).fit(module, plain.loader())
    assert strong.regularizer.sparsity() == {"net.0.weight": 1.0}
    assert none.regularizer.sparsity() == {"net.2.weight": 0.0}
    assert strong.state_key != none.state_key


@QUIET
def test_all_optimizers_are_one_by_default(programs, tmp_path):
    module, penalty = programs.Manual(), programs.Regularize(tk.L1(10.0))
    programs.trainer(tmp_path, penalty).fit(module, plain.loader())
    assert penalty.regularizer.sparsity() == {"net.0.weight": 1.0, "net.2.weight": 1.0}


@QUIET
@pytest.mark.parametrize("terms", [{"backbone.*": tk.L1(10.0)}, tk.L1(10.0)], ids=["part", "all"])
def test_a_backbone_that_unfreezes_later_is_regularized(programs, tmp_path, terms):
    module, penalty = programs.Pretrained(), programs.Regularize(terms)
    thaw = programs.lightning.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    before = module.net[0].weight.detach().clone()
    kept = []

    class Look(programs.lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            kept.append(module.net[0].weight.detach().clone())

    programs.trainer(tmp_path, thaw, penalty, Look(), epochs=2).fit(module, plain.loader())
    assert torch.equal(kept[0], before)
    assert not kept[1].any()


@QUIET
def test_lbfgs_reaches_the_penalized_minimum(programs, tmp_path):
    def lbfgs(parameters):
        return torch.optim.LBFGS(parameters, lr=1.0, max_iter=30, line_search_fn="strong_wolfe")

    module = programs.Module(lbfgs)
    module.net = nn.Linear(6, 1, bias=False)
    x, y = plain.data()
    whole = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=48)
    programs.trainer(tmp_path, programs.Regularize(tk.L2(0.3)), epochs=10).fit(module, whole)
    # mse is 1/m |Xw - y|^2, so the normal equations read (2/m X'X + s I) w = 2/m X'y
    expected = torch.linalg.solve(2 / 48 * x.T @ x + 0.3 * torch.eye(6), 2 / 48 * x.T @ y)
    assert torch.allclose(module.net.weight.flatten(), expected.flatten(), atol=1e-4)


@QUIET
def test_every_epoch_is_logged(programs, tmp_path):
    fit = programs.trainer(tmp_path, programs.Regularize(TERMS))
    fit.fit(programs.Module(), plain.loader())
    logged = {k: float(v) for k, v in fit.logged_metrics.items()}
    assert logged["penalty/L1/strength"] == pytest.approx(0.05)
    assert logged["penalty/L1/value"] > 0


@QUIET
def test_a_second_fit_does_not_penalize_twice(programs, tmp_path):
    penalty, module = programs.Regularize(tk.L2(1.0)), programs.Module()
    for _ in range(2):
        programs.trainer(tmp_path, penalty, epochs=1).fit(module, plain.loader())
    hooks = penalty.regularizer.optimizer._optimizer_step_pre_hooks
    assert not hooks


@QUIET
def test_a_missing_optimizer_is_named(programs, tmp_path):
    with pytest.raises(IndexError, match="Module has 1 optimizer; count from 0"):
        programs.trainer(tmp_path, programs.Regularize(tk.L1(0.1), optimizer=1)).fit(
            programs.Module(), plain.loader()
        )


@QUIET
def test_the_watch_stops_at_the_first_bad_number(programs, tmp_path):
    x, y = plain.data()
    x[20] = float("nan")
    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    watch = programs.Watch(every=1)
    with pytest.raises(tk.NonFiniteError, match=r"step 2: .* is input"):
        programs.trainer(tmp_path, watch).fit(programs.Module(), rows)
    assert len(watch.watch.rows) >= 2


@QUIET
def test_the_watch_says_in_one_line_that_nothing_was_found(programs, tmp_path, monkeypatch):
    told = []
    logger, handler = logging.getLogger("pytorch_lightning"), logging.Handler()
    handler.emit = told.append
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    programs.trainer(tmp_path, watch := programs.Watch(every=1)).fit(
        programs.Module(), plain.loader()
    )
    said = [m for r in told if (m := r.getMessage()).startswith("tikhon watch")]
    assert said == [watch.watch.verdict]
    assert f"no problem found in {watch.watch.step} steps" in said[0]


@QUIET
def test_a_sparse_fit_equals_the_plain_loop(programs, tmp_path):
    module, sparse = programs.Module(), programs.Sparsify("60%", within="net")
    programs.trainer(tmp_path, sparse).fit(module, plain.loader())
    plain.assert_same(module.net, plain.train(share=0.6))
    assert sparse.sparsifier.audit().share == pytest.approx(0.6, abs=0.02)
    programs.trainer(tmp_path, programs.Sparsify("60%", within="net")).fit(
        module, plain.loader()
    )  # detached


@QUIET
def test_a_resumed_sparse_fit_equals_the_uninterrupted_one(programs, tmp_path):
    first = programs.trainer(tmp_path, programs.Sparsify(0.6, within="net", steps=24), epochs=2)
    first.fit(programs.Module(), plain.loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    module = programs.Module()
    again = programs.trainer(tmp_path, programs.Sparsify(0.6, within="net"))
    again.fit(module, plain.loader(), ckpt_path=tmp_path / "half.ckpt")
    plain.assert_same(module.net, plain.train(share=0.6))


@QUIET
def test_averaged_weights_of_a_sparse_fit_have_the_zeros(programs, tmp_path):
    from pytorch_lightning.callbacks import StochasticWeightAveraging

    module, sparse = programs.Module(), programs.Sparsify(0.6, within="net")
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    programs.trainer(tmp_path, sparse, average).fit(module, plain.loader())
    assert sum(int((p == 0).sum()) for p in module.net.parameters() if p.ndim > 1) == 21


@QUIET
def test_a_fit_without_an_end_must_say_its_steps(programs, tmp_path):
    with pytest.raises(ValueError, match="the Trainer has no end"):
        programs.trainer(tmp_path, programs.Sparsify(0.6), epochs=-1, max_time="00:00:00:01").fit(
            programs.Module(), plain.loader()
        )


def averages():
    from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging

    return {
        "swa": StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
        "ema": EMAWeightAveraging(decay=0.9),
    }


@QUIET
@pytest.mark.parametrize("kind", ["swa", "ema"])
@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_have_the_zeros_and_bounds_of_the_trained(
    programs, tmp_path, kind, first
):
    terms = {"net.0.weight": [tk.L1(lambda step: 1e-2 * step), tk.Box(-0.05, 0.05)]}
    module, callback = programs.Module(), programs.Regularize(terms)
    masks = []

    class Seen(programs.lightning.Callback):
        def on_train_batch_end(self, trainer, module, *given):
            masks.append(module.net[0].weight.detach() == 0)

    order = [callback, averages()[kind]] if first else [averages()[kind], callback]
    programs.trainer(tmp_path, Seen(), *order, epochs=5).fit(module, plain.loader())
    weight = module.net[0].weight.detach()
    last = masks[callback.regularizer.steps - 1]
    assert torch.equal(weight == 0, last) and last.any() and not last.all()
    assert weight.abs().max() <= 0.05
