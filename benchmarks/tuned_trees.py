"""Boosted trees as they are tuned in practice, within a limit of CPU time.

Optuna's TPE starts from the library's defaults and goes on in its customary ranges; every trial
stops early on held-out rows (a fifth, or each of three folds below 2,500 rows, as `tikhon.tune`
has them). The best is trained again on all rows with the mean of the rounds that were best, where
the time allows, and otherwise the mean of its folds predicts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tikhon.paths.targets import fold_rows
from tikhon.tuning.preparation import FEW

ROUNDS, PATIENCE = 2_000, 50
SEARCH = 0.75  # share of the limit; the rest is for the last training
Config = dict[str, Any]


def catboost(
    config: Config, train: Any, held: Any, rounds: int, late: Callable[[], bool], seed: int
) -> tuple[Any, int]:
    """A model and its rounds; `held` rows stop it early, `late` at once."""
    import catboost

    class Watch:
        def after_iteration(self, info: Any) -> bool:
            return not late()

    kind = catboost.CatBoostRegressor if _numbers(train[1]) else catboost.CatBoostClassifier
    model = kind(iterations=rounds, random_seed=seed, verbose=0, thread_count=1,
                 allow_writing_files=False, **config)  # fmt: skip
    if held is None:
        return model.fit(*train, callbacks=[Watch()]), rounds
    model.fit(*train, eval_set=held, early_stopping_rounds=PATIENCE, callbacks=[Watch()])
    return model, model.tree_count_


def lightgbm(
    config: Config, train: Any, held: Any, rounds: int, late: Callable[[], bool], seed: int
) -> tuple[Any, int]:
    """As `catboost`."""
    import lightgbm

    def watch(env: Any) -> None:
        if late():
            raise lightgbm.callback.EarlyStopException(env.iteration, env.evaluation_result_list)

    kind = lightgbm.LGBMRegressor if _numbers(train[1]) else lightgbm.LGBMClassifier
    model = kind(n_estimators=rounds, random_state=seed, verbose=-1, n_jobs=1, **config)
    if held is None:
        return model.fit(*train, callbacks=[watch]), rounds
    stopping = lightgbm.early_stopping(PATIENCE, verbose=False)
    model.fit(*train, eval_set=[held], callbacks=[stopping, watch])
    return model, model.best_iteration_ or rounds


def _catboost_space(trial: Any) -> Config:
    return {
        "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.3, log=True),
        "depth": trial.suggest_int("depth", 3, 9),
        "l2_leaf_reg": trial.suggest_float("l2_leaf_reg", 1, 10, log=True),
        "bagging_temperature": trial.suggest_float("bagging_temperature", 0, 1),
        "random_strength": trial.suggest_float("random_strength", 0.1, 10, log=True),
    }


def _lightgbm_space(trial: Any) -> Config:
    return {
        "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.3, log=True),
        "num_leaves": trial.suggest_int("num_leaves", 4, 128, log=True),
        "min_child_samples": trial.suggest_int("min_child_samples", 2, 100, log=True),
        "colsample_bytree": trial.suggest_float("colsample_bytree", 0.4, 1),
        "subsample": trial.suggest_float("subsample", 0.5, 1),
        "subsample_freq": 1,
        "reg_lambda": trial.suggest_float("reg_lambda", 1e-3, 10, log=True),
    }


TREES = {
    "CatBoost + Optuna": (catboost, _catboost_space),
    "LightGBM + Optuna": (lightgbm, _lightgbm_space),
}


def tuned(label: str, x: Any, y: Any, xt: Any, seed: int, seconds: float) -> np.ndarray:
    """Predictions for `xt`: probabilities (rows, classes), or numbers (rows,)."""
    import optuna
    import torch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    boost, space = TREES[label]
    began = time.process_time()
    cuts = fold_rows(torch.from_numpy(y), 3 if len(y) < FEW else 5, seed)
    cuts = [(a.numpy(), b.numpy()) for a, b in (cuts if len(y) < FEW else cuts[:1])]
    best: dict[str, Any] = {"score": np.inf}

    def late() -> bool:
        return time.process_time() - began > SEARCH * seconds

    def objective(trial: Any) -> float:
        config = {} if trial.number == 0 else space(trial)
        start, found, scores = time.process_time(), [], []
        for train, test in cuts:
            held = x[test], y[test]
            boosted = boost(config, (x[train], y[train]), held, ROUNDS, late, seed)
            if late() and found:
                break  # a fold that was cut short
            found.append(boosted)
            scores.append(_loss(held[1], predict(found[-1][0], x[test])))
        score, cost = float(np.mean(scores)), time.process_time() - start
        whole = len(found) == len(cuts)
        if score < best["score"] and (whole or trial.number == 0):
            best.update(score=score, config=config, found=found, cost=cost)
        return score

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    while not late():
        study.optimize(objective, n_trials=1)
    models = [model for model, _ in best["found"]]
    share = (len(cuts) - 1) / len(cuts) if len(cuts) > 1 else 0.8
    last = best["cost"] / len(cuts) / share
    if time.process_time() - began + last < seconds:
        rounds = max(1, round(np.mean([rounds for _, rounds in best["found"]])))
        models = [boost(best["config"], (x, y), None, rounds, lambda: False, seed)[0]]
    return np.mean([predict(model, xt) for model in models], axis=0)


def predict(model: Any, x: np.ndarray) -> np.ndarray:
    """Probabilities of a classifier, numbers of anything else."""
    ask = model.predict_proba if hasattr(model, "predict_proba") else model.predict
    return np.asarray(ask(x))


def _numbers(y: Any) -> bool:
    return y.dtype.kind == "f"


def _loss(y: np.ndarray, p: np.ndarray) -> float:
    from sklearn.metrics import log_loss

    return float(
        np.mean((y - p) ** 2) if _numbers(y) else log_loss(y, p, labels=range(p.shape[1]))
    )
