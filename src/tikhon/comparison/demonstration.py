"""The demonstration: one network that memorises wrong labels, trained in four ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from tikhon.comparison.statistics import interval
from tikhon.comparison.trainings import train_seeded
from tikhon.data import Dataset, load
from tikhon.data.batches import order
from tikhon.models import build
from tikhon.penalties import L1, L2
from tikhon.runs.interrupt import never_stop
from tikhon.training import measures
from tikhon.training.fit import Run
from tikhon.training.recipe import Recipe


@dataclass(frozen=True)
class Setting:
    """Data and training settings of the demonstration, all printed."""

    data: str = "digits"
    train_rows: int = 200
    valid_rows: int = 200
    wrong_labels: float = 0.2
    model: str = "mlp:256"
    lr: float = 2e-3
    batch_size: int = 50
    epochs: int = 120
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Variant:
    """One way of training, at several strengths."""

    name: str
    label: str
    strengths: tuple[float, ...]
    recipe: Callable[[float], Recipe]


METHODS = (
    Variant("none", "none", (0.0,), lambda s: Recipe()),
    Variant("l1", "L1", (3e-4, 1e-3, 2e-3, 4e-3), lambda s: Recipe(L1(s))),
    Variant("l2", "L2", (3e-3, 1e-2, 3e-2, 6e-2), lambda s: Recipe(L2(s))),
    Variant("dropout", "dropout", (0.3, 0.5, 0.7, 0.85), lambda s: Recipe(dropout=s)),
)


def draw_rows(data: Dataset, setting: Setting, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Training, validation and test rows of a seed, drawn at random.

    A share of the training labels is replaced by others.
    """
    rows, count = order(len(data.x), seed=seed, epoch=0), setting.train_rows
    sizes = [count, setting.valid_rows, len(rows) - count - setting.valid_rows]
    train, *held_out = [(data.x[part], data.y[part]) for part in rows.split(sizes)]
    generator = torch.Generator().manual_seed(seed)
    replaced = order(count, seed=seed, epoch=1)[: round(setting.wrong_labels * count)]
    shift = torch.randint(1, len(data.classes), (len(replaced),), generator=generator)
    labels = train[1].clone()
    labels[replaced] = (labels[replaced] + shift) % len(data.classes)
    return [(train[0], labels), *held_out]


def run_demonstration(
    setting: Setting,
    methods: Sequence[Variant] = METHODS,
    *,
    on_run: Callable[[Variant, float, int, Run], None] = lambda *a: None,
    stop: Callable[[], bool] = never_stop,
) -> dict[str, Any]:
    """Train every method at every strength and seed; choose strengths by validation rows only.

    Returns the `result.json` of a demo. Raises `Stopped`.
    """
    data = load(setting.data)
    parts = {seed: draw_rows(data, setting, seed) for seed in setting.seeds}
    results = []
    for method in methods:
        grid: list[tuple[float, list[Run]]] = []
        for strength in method.strengths:
            runs = []
            for seed in setting.seeds:
                run = train_seeded(
                    lambda: build(setting.model, data.shape, data.outputs),
                    parts[seed],
                    method.recipe(strength),
                    seed=seed,
                    stop=stop,
                    lr=setting.lr,
                    batch_size=setting.batch_size,
                    epochs=setting.epochs,
                )
                runs.append(run)
                on_run(method, strength, seed, run)
            grid.append((strength, runs))
        results.append(_method_result(method, grid))
    return {
        "kind": "demo",
        "setting": _describe(setting, data),
        "arms": results,
        "next": [
            "tikhon fit digits --l1 1e-3",
            "tikhon fit digits --dropout 0.5",
            "tikhon --help",
        ],
    }


def _method_result(method: Variant, grid: list[tuple[float, list[Run]]]) -> dict[str, object]:
    points = [
        {
            "strength": strength,
            "valid_accuracy": _mean(runs, "valid/accuracy"),
            "valid_loss": _mean(runs, "valid/loss"),
            "train_accuracy": _mean(runs, "train/accuracy"),
            "zeros": fmean(measures.zero_share(run.model) for run in runs),
        }
        for strength, runs in grid
    ]
    # test rows are never used to choose
    chosen = max(points, key=lambda point: (point["valid_accuracy"], -point["valid_loss"]))
    runs = grid[points.index(chosen)][1]
    tests = [(r.metrics or {})["test/accuracy"] for r in runs]
    mean, low, high = interval(tests, share=0.0)  # each seed draws its own rows
    return {
        "name": method.name,
        "label": method.label,
        "chosen_strength": chosen["strength"],
        "grid": points,
        "train_accuracy": chosen["train_accuracy"],
        "valid_accuracy": chosen["valid_accuracy"],
        "gap": chosen["train_accuracy"] - chosen["valid_accuracy"],
        "zeros": chosen["zeros"],
        "test_accuracy": {"mean": mean, "low": low, "high": high, "seeds": tests},
        "history": list(runs[0].history),
    }


def _mean(runs: Sequence[Run], key: str) -> float:
    return fmean((run.metrics or {})[key] for run in runs)


def _describe(setting: Setting, data: Dataset) -> dict[str, object]:
    test = len(data.x) - setting.train_rows - setting.valid_rows
    more = {"test_rows": test, "optimizer": "adam", "seeds": list(setting.seeds)}
    return asdict(setting) | more


def quick(setting: Setting) -> tuple[Setting, tuple[Variant, ...]]:
    """Return a smaller version: two strengths for each method, a third of the epochs."""
    variants = tuple(
        replace(method, strengths=method.strengths[1:3] or method.strengths) for method in METHODS
    )
    return replace(setting, epochs=setting.epochs // 3), variants
