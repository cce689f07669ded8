"""Run directories made by really training small models with plain torch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

Split = dict[str, tuple[Tensor, Tensor]]


def digits(seed: int = 0, noise: float = 0.2) -> Split:
    """200 training rows of digits with some labels wrong, 200 for validation, 400 for test."""
    X, y = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(X), generator=generator)
    X, y = torch.tensor(X, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]
    wrong = torch.rand(200, generator=generator) < noise
    y[:200] = torch.where(wrong, torch.randint(0, 10, (200,), generator=generator), y[:200])
    return {
        "train": (X[:200], y[:200]),
        "valid": (X[200:400], y[200:400]),
        "test": (X[400:800], y[400:800]),
    }


def network(seed: int, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 10)
    )  # fmt: skip


def train(
    data: Split, *, l1: float = 0.0, l2: float = 0.0, dropout: float = 0.0, epochs=40, seed=0
) -> tuple[nn.Sequential, list[dict]]:
    """Full-batch gradient descent with momentum, then the prox of L1 by hand."""
    model, rate = network(seed, dropout), 0.1
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    weights = [p for p in model.parameters() if p.ndim > 1]
    history = []
    for epoch in range(1, epochs + 1):
        model.train()
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data["train"][0]), data["train"][1])
            (loss + l2 / 2 * sum(w.square().sum() for w in weights)).backward()
            optimizer.step()
            with torch.no_grad():
                for w in weights:
                    w.copy_(w.sign() * (w.abs() - rate / 0.1 * l1).clamp(min=0))
        history.append({"epoch": epoch, "step": epoch * 5, "lr": rate, **measure(model, data)})
        if l1:
            history[-1] |= {
                "penalty/l1/value": l1 * sum(float(w.detach().abs().sum()) for w in weights),
                "penalty/l1/strength": l1,
                "penalty/l1/zeros": zeros(model),
            }
    return model, history


@torch.no_grad()
def measure(model: nn.Module, data: Split) -> dict:
    model.eval()
    scores = {}
    for part in ("train", "valid"):
        X, y = data[part]
        out = model(X)
        scores[f"{part}/loss"] = float(nn.functional.cross_entropy(out, y))
        scores[f"{part}/accuracy"] = accuracy(model, data, part)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            scores[f"norm/{name}/l1"] = float(p.abs().sum())
            scores[f"norm/{name}/l2"] = float(p.norm())
    return scores


@torch.no_grad()
def accuracy(model: nn.Module, data: Split, part: str) -> float:
    X, y = data[part]
    return float((model.eval()(X).argmax(1) == y).float().mean())


def zeros(model: nn.Module) -> float:
    entries = torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim > 1])
    return float((entries == 0).float().mean())


def save(path: Path, config: dict, history: list[dict], result: dict | None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "schema_version": 1,
        "device": "cpu",
        "versions": {"torch": torch.__version__},
    } | config
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    lines = "".join(json.dumps(record) + "\n" for record in history)
    (path / "history.jsonl").write_text(lines, encoding="utf-8")
    if result is not None:
        document = {"schema_version": 1, **result}
        (path / "result.json").write_text(json.dumps(document), encoding="utf-8")
    return path


def fit_run(path: Path, l1: float = 2e-3, parameter: str = "{}", epochs: int = 40) -> Path:
    """A finished fit with an L1 penalty; `parameter` may decorate the parameters' names."""
    data = digits()
    model, history = train(data, l1=l1, epochs=epochs)
    weights = {}
    for name, p in model.named_parameters():
        if p.ndim > 1:
            counts, edges = torch.histogram(p.detach().flatten(), 41)
            weights[parameter.format(name)] = {
                "zeros": float((p == 0).float().mean()),
                "l1": float(p.detach().abs().sum()),
                "l2": float(p.detach().norm()),
                "histogram": {"edges": edges.tolist(), "counts": counts.int().tolist()},
            }
    best = min(history, key=lambda r: r["valid/loss"])["epoch"]
    last = history[-1]
    result = {
        "kind": "fit",
        "verdict": "",
        "metrics": {"test/accuracy": accuracy(model, data, "test")},
        "penalties": {
            "l1": {"strength": l1, "value": last["penalty/l1/value"], "zeros": zeros(model)}
        },
        "weights": weights,
        "best_epoch": best,
        "seconds": 1.0,
        "next": ["tikhon report run"],
    }
    config = {
        "kind": "fit",
        "command": ["tikhon", "fit", "digits", "--l1", str(l1)],
        "data": {"name": "digits", "rows": 200, "features": 64, "classes": 10},
        "model": {"name": "mlp-64-64-10"},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "recipe": {"l1": l1},
        "seed": 0,
    }
    return save(path, config, history, result)


def demo_run(path: Path) -> Path:
    """A finished demo: four methods, each at a few strengths, chosen on validation rows."""
    grids = {
        "none": [0.0],
        "l1": [5e-4, 2e-3, 5e-3],
        "l2": [3e-3, 1e-2, 3e-2],
        "dropout": [0.3, 0.6],
    }
    data, arms = digits(), []
    for name, grid in grids.items():
        tried = []
        for value in grid:
            model, history = train(data, epochs=15, **({} if name == "none" else {name: value}))
            last = history[-1]
            tried.append(
                (last["valid/accuracy"], -last["valid/loss"], value, zeros(model), history)
            )
        _, _, chosen, share, history = max(tried)
        scores = []
        for seed in range(3):
            again = digits(seed)
            given = {} if name == "none" else {name: chosen}
            model, _ = train(again, epochs=15, seed=seed, **given)
            scores.append(accuracy(model, again, "test"))
        mean = sum(scores) / 3
        half = 4.303 * torch.tensor(scores).std().item() / 3**0.5
        last = history[-1]
        span = {"mean": mean, "low": mean - half, "high": mean + half, "seeds": scores}
        arms.append({
            "name": name,
            "label": name,
            "chosen_strength": chosen,
            "grid": [
                {"strength": s, "valid_accuracy": a, "valid_loss": -nl, "zeros": z}
                for a, nl, s, z, _ in tried
            ],
            "train_accuracy": last["train/accuracy"],
            "valid_accuracy": last["valid/accuracy"],
            "gap": last["train/accuracy"] - last["valid/accuracy"],
            "zeros": share,
            "test_accuracy": span,
            "history": history,
        })  # fmt: skip
    result = {
        "kind": "demo",
        "verdict": "",
        "setting": {"data": "digits", "train_rows": 200, "wrong_labels": 0.2},
        "arms": arms,
        "next": ["tikhon fit digits --l1 2e-3"],
    }
    config = {"kind": "demo", "command": ["tikhon", "demo"], "data": {"name": "digits"}, "seed": 0}
    return save(path, config, [], result)


def tune_run(path: Path) -> Path:
    """A finished search over three hyperparameters of a small network."""
    import tikhon
    from tikhon.tuning.space import Log, Space, Uniform
    from tikhon.tuning.tune import tune

    data = digits()

    def build() -> nn.Module:
        layers = (nn.Linear(64, 32), nn.ReLU(), tikhon.layers.Dropout(0.1), nn.Linear(32, 10))
        return nn.Sequential(*layers)

    space = Space(lr=Log(1e-4, 1e-1), dropout=Uniform(0, 0.8), weight_decay=Log(1e-4, 10.0))
    found = tune(build, data["train"], valid=data["valid"], space=space, budget="8runs", epochs=12)
    config = {"kind": "tune", "command": ["tikhon", "tune", "digits"], "data": {"name": "digits"}}
    return save(path, config, [], found.to_dict())


def path_run(path: Path) -> Path:
    """A finished lasso path on the diabetes data."""
    from sklearn.datasets import load_diabetes

    import tikhon
    from tikhon.paths.path import path as solve

    bunch = load_diabetes()
    X = torch.tensor(bunch.data, dtype=torch.float32)
    y = torch.tensor(bunch.target, dtype=torch.float32)
    rows = ((X - X.mean(0)) / X.std(0), ((y - y.mean()) / y.std())[:, None])
    found = solve(
        None, rows, tikhon.L1(), folds=3, strengths=20, feature_names=bunch.feature_names
    )
    config = {
        "kind": "path",
        "command": ["tikhon", "path", "diabetes"],
        "data": {"name": "diabetes"},
    }
    return save(path, config, [], found.to_dict())


def deep_sigmoid() -> nn.Sequential:
    """Twelve sigmoid layers: no signal reaches the first ones."""
    layers: list[nn.Module] = []
    for i in range(12):
        layers += [nn.Linear(48 if i else 64, 48), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(48, 10))


def adam(parameters) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, 1e-3)


def diagnosis_run(path: Path) -> Path:
    """A diagnosis of a network whose gradient vanishes."""
    from tikhon.diagnosis.diagnose import diagnose

    torch.manual_seed(0)
    data, loss = digits(), nn.CrossEntropyLoss()
    found = diagnose(
        deep_sigmoid(), data["train"], loss, optimizer=adam, valid=data["valid"], steps=30
    )
    config = {"kind": "diagnosis", "command": ["tikhon", "diagnose", "model.py:make"]}
    return save(path, config, [], found.to_dict())


def cure_run(path: Path) -> Path:
    """A cure of the same network."""
    from tikhon.cures.cure import cure

    data, loss = digits(), nn.CrossEntropyLoss()
    found = cure(
        deep_sigmoid, data["train"], loss, optimizer=adam, valid=data["valid"], budget="1s",
        seeds=2, steps=20,
    )  # fmt: skip
    config = {"kind": "cure", "command": ["tikhon", "cure", "model.py:make"]}
    return save(path, config, [], found.to_dict())


def compare_run(path: Path) -> Path:
    """A finished comparison of two methods, and of two widths."""
    from tikhon.comparison.architecture import balance
    from tikhon.comparison.compare import compare
    from tikhon.data import load

    data = load("breast_cancer")
    found = compare(data, ["none", "l1"], splits=2, trials=1, epochs=3, seeds=2)
    shapes = balance(data, widths=(8, 16), depths=(2, 6), strengths=(0.0, 1e-2), epochs=2)
    config = {
        "kind": "compare",
        "command": ["tikhon", "compare"],
        "data": {"name": "breast_cancer"},
    }
    return save(path, config, [], {**found.to_dict(), "architecture": shapes.to_dict()})
