"""Strengths from the training rows alone: what finds them without rows that are held out for good.

For each data set and split, an MLP is trained on all rows that are not test rows with AdamW and
decoupled weight decay. The peer tries 32 strengths, even in the logarithm from 1e-4 to 30, on four
fifths of the rows, takes the best on the last fifth, and trains it again on all rows; its trials
are members of one population and charged at what that costs. Against it stand

* held out: `Hypergradient` on a fifth, then a run on all rows with the strengths that were found
  (`fit(..., refit=True)`);
* folds: three folds as members of a population, each of which adapts on the third it leaves out,
  then a run on all rows with the mean of the strengths (what `tune` does); "half folds" train
  half as long;
* trajectory: one run on all rows. Batches come from four groups in turn; beside the weights the
  part that each group had in the last moves is carried along, and the strength descends the loss
  of a group at the weights without that part;
* evidence: one run. MacKay's fixed point of the marginal likelihood, `s = gamma / (n |W|^2)`, with
  a diagonal Fisher information from squared gradients; "emphasised" counts the data
  parameters / rows times (after Harvey et al., 2025, https://arxiv.org/abs/2502.01861);
* default: decay 0.01, and none.

Printed: test log-loss (RMSE for regression) relative to the peer, and CPU time in plain runs.

    python benchmarks/without_validation.py --data FOLDER [--sets ...] [--output FILE]

Developed on `SELECTION` of hypergradient.py; `REPORT` is what the documentation quotes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import hypergradient as grid
import torch
from torch import Tensor, nn

import tikhon as tk
from tikhon.population.losses import RowLosses
from tikhon.strengths.sensitivity import (
    descend_log_strength,
    first_decay,
    initial_memory,
    log_rate,
    propagate_decay,
)
from tikhon.training.recipe import Auto
from tikhon.tuning.runners import PopulationRunner, SearchJob, train_fully
from tikhon.tuning.trials import Trial

COUNT, LOW, HIGH = 32, 1e-4, 30.0
EVERY, DAMPING, CAUTION, FROZEN, GROUPS = 5, 3.0, 0.5, 0.9, 4
METHODS = (
    "fit",
    "held out",
    "folds",
    "half folds",
    "trajectory",
    "evidence",
    "emphasised",
    "default",
    "none",
)


class Setting:
    """One data set, split and seed: the rows, the network, the loss."""

    def __init__(self, data, epochs: int, seed: int) -> None:
        self.regression, self.outputs, (self.train, self.valid, self.test) = data
        self.all = tuple(torch.cat(parts) for parts in zip(self.train, self.valid))
        self.loss = nn.functional.mse_loss if self.regression else nn.functional.cross_entropy
        self.epochs, self.seed, self.data = epochs, seed, data

    def net(self) -> nn.Module:
        """The network, with the same initial weights in every run."""
        return grid.build("mlp", self.all[0].shape[1], self.outputs, self.seed)

    def score(self, net: nn.Module, rows: tuple[Tensor, Tensor]) -> float:
        """Log-loss, or RMSE."""
        net.eval()
        with torch.no_grad():
            loss = float(self.loss(net(rows[0]), rows[1]))
        return math.sqrt(loss) if self.regression else loss

    def job(self, rows, *, valid=None, fold_mask=None) -> SearchJob:
        """The same training as a population's."""
        objective = RowLosses("mse" if self.regression else "cross_entropy", rows[1])
        return SearchJob(
            lambda config: self.net(), *rows, objective, self.epochs, grid.BATCH,
            valid=valid, fold_mask=fold_mask, seed=self.seed,
        )  # fmt: skip


def peer(setting: Setting) -> float:
    """The best of many strengths by validation, trained again on all rows."""
    configs = [
        {"lr": grid.LR, "weight_decay": LOW * (HIGH / LOW) ** (k / (COUNT - 1))}
        for k in range(COUNT)
    ]
    runner = PopulationRunner(setting.job(setting.train, valid=setting.valid), 16)
    found = runner.run([Trial(k, config, setting.epochs) for k, config in enumerate(configs)])
    scores = [math.inf if o.failed else o.curve[-1][1] for o in found]
    return again(setting, configs[scores.index(min(scores))], None)


def again(setting: Setting, config, trace: Tensor | None) -> float:
    """A training on all rows, and its test loss."""
    (state,) = train_fully(setting.job(setting.all), [config], [trace])
    net = setting.net()
    net.load_state_dict(state)
    return setting.score(net, setting.test)


def folds(setting: Setting, *, count: int = 3, share: int = 1) -> float:
    """Strengths found by folds that train at once, replayed on all rows."""
    place = torch.randperm(len(setting.all[0]), generator=torch.Generator().manual_seed(7))
    fold_mask = torch.stack([(place % count != fold).float() for fold in range(count)])
    job = setting.job(setting.all, fold_mask=fold_mask)
    job = replace(job, epochs=setting.epochs // share)
    runner = PopulationRunner(job, count)
    config = {"lr": grid.LR, "weight_decay": "auto"}
    runner.run([Trial(0, config, job.epochs)])
    return again(setting, config, runner.states[0]["decay.trace"].mean(0))


def fit(setting: Setting, strength) -> float:
    """What `tikhon.fit` does with a strength "auto" and no validation rows, or with a number."""
    net = setting.net()
    tk.fit(
        net,
        setting.all,
        tk.Recipe(tk.Term(tk.L2(), how="decoupled", strength=strength)),
        optimizer="adamw",
        lr=grid.LR,
        schedule="cosine",
        batch_size=grid.BATCH,
        epochs=setting.epochs,
        seed=setting.seed,
        linear=False,
        device="cpu",
        loss="mse" if setting.regression else "cross_entropy",
    )
    return setting.score(net, setting.test)


def held_out(setting: Setting) -> float:
    """`Hypergradient` on a fifth of the rows, replayed on all."""

    def strength(valid, loss, steps):
        return tk.Hypergradient(valid, loss, steps=steps)

    given = {"epochs": setting.epochs, "seed": setting.seed}
    _, found = grid.train("mlp", setting.data, strength, **given)
    ended, _ = grid.train("mlp", setting.data, None, replay=found, **given)
    return ended["test"]


class Rule:
    """One strength a weight matrix, and how it moves from training rows."""

    def __init__(self, net: nn.Module, rows: int, steps: int) -> None:
        self.weights = [p for p in net.parameters() if p.ndim > 1]
        self.rows, self.steps = rows, steps
        start = first_decay(steps) / grid.LR
        self.memory = [initial_memory(math.log(start)) for _ in self.weights]
        self.strengths = [start] * len(self.weights)

    def after(self, net, optimizer, lr: float, step: int, group: int, setting: Setting) -> None:
        """Called after every backward pass, before the step."""


class Evidence(Rule):
    """MacKay's fixed point, with a diagonal Fisher information."""

    def __init__(self, net, rows, steps, *, emphasised: bool) -> None:
        super().__init__(net, rows, steps)
        count = sum(p.numel() for p in net.parameters())
        self.emphasis = max(1.0, count / rows) if emphasised else 1.0
        self.fisher = [torch.zeros_like(w) for w in self.weights]

    def after(self, net, optimizer, lr, step, group, setting) -> None:
        """The squared gradient of a batch is a row's Fisher information by its size."""
        for k, (w, fisher) in enumerate(zip(self.weights, self.fisher)):
            fisher.lerp_(grid.BATCH * w.grad.square(), 0.01)
            if step < 50:
                continue
            information = fisher / (1 - 0.99 ** (step + 1))
            s = self.strengths[k]
            scaled = self.emphasis * self.rows * information
            gamma = float((scaled / (scaled + self.emphasis * self.rows * s)).sum())
            size = float(w.detach().square().sum())
            target = gamma / (self.emphasis * self.rows * size)
            self.strengths[k] = min(max(s**0.95 * target**0.05, 1e-8), 30.0)


class Trajectory(Rule):
    """The loss of a group of rows at the weights without the group's part in the last moves."""

    def __init__(self, net, rows, steps) -> None:
        super().__init__(net, rows, steps)
        self.z = [torch.zeros_like(w) for w in self.weights]
        self.parts = [[torch.zeros_like(p) for p in net.parameters()] for _ in range(GROUPS)]
        self.rate = log_rate((LOW, HIGH), steps / EVERY)

    def after(self, net, optimizer, lr, step, group, setting) -> None:
        """Carry the parts on; move the strengths every few steps."""
        decays = {id(w): s for w, s in zip(self.weights, self.strengths)}
        for g, parts in enumerate(self.parts):
            for p, part in zip(net.parameters(), parts):
                part.mul_(1 - lr * (decays.get(id(p), 0.0) + DAMPING))
                state = optimizer.state.get(p)
                if g == group and state:
                    part.addcdiv_(p.grad, state["exp_avg_sq"].sqrt() + 1e-8, value=lr)
        for z, w, s in zip(self.z, self.weights, self.strengths):
            propagate_decay(z, w.detach(), lr * s, lr * (s + DAMPING))
        if step % EVERY == 0 and step < FROZEN * self.steps and step > 20:
            self._move(net, step, setting)

    def _move(self, net, step, setting) -> None:
        group = (step // EVERY) % GROUPS
        rows = torch.arange(group, self.rows, GROUPS)
        initial_memory = (step * 64) % max(len(rows) - 64, 1)
        rows = rows[initial_memory : initial_memory + 64]
        params = list(net.parameters())
        others = [
            sum(self.parts[h][k] for h in range(GROUPS) if h != group) / (GROUPS - 1)
            for k in range(len(params))
        ]
        with torch.no_grad():
            for p, own, other in zip(params, self.parts[group], others):
                p.add_(own - other)
        loss = setting.loss(net(setting.all[0][rows]), setting.all[1][rows])
        gradients = torch.autograd.grad(loss, self.weights)
        with torch.no_grad():
            for p, own, other in zip(params, self.parts[group], others):
                p.sub_(own - other)
        bounds = (math.log(LOW), math.log(HIGH))
        for k, (z, g) in enumerate(zip(self.z, gradients)):
            slope = float((z * g).sum())
            if math.isfinite(slope):
                descend_log_strength(
                    self.memory[k], slope, float(loss.detach()), rate=self.rate, caution=CAUTION,
                    bounds=bounds,
                )  # fmt: skip
            self.strengths[k] = math.exp(self.memory[k]["log"])


def follow(setting: Setting, rule, *, coupled: bool = False) -> float:
    """One run on all rows; `rule` moves the strengths. Row i is in group i % GROUPS."""
    net, rows = setting.net(), len(setting.all[0])
    optimizer = torch.optim.AdamW(net.parameters(), lr=grid.LR, weight_decay=0.0, fused=True)
    per_epoch = rows // grid.BATCH
    steps = setting.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    moved = rule(net, rows, steps)
    generator = torch.Generator().manual_seed(setting.seed)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(rows, generator=generator)
            grouped = [order[order % GROUPS == g] for g in range(GROUPS)]
        group, turn = step % GROUPS, step % per_epoch // GROUPS
        pool = grouped[group] if isinstance(moved, Trajectory) else order
        turn = turn if isinstance(moved, Trajectory) else step % per_epoch
        initial_memory = turn * grid.BATCH % max(len(pool) - grid.BATCH + 1, 1)
        batch = pool[initial_memory : initial_memory + grid.BATCH]
        optimizer.zero_grad()
        setting.loss(net(setting.all[0][batch]), setting.all[1][batch]).backward()
        lr = schedule.get_last_lr()[0]
        moved.after(net, optimizer, lr, step, group, setting)
        with torch.no_grad():
            for w, s in zip(moved.weights, moved.strengths):
                if coupled:
                    w.grad.add_(w, alpha=s)
                else:
                    w.mul_(1 - min(lr * s, 0.5))
        optimizer.step()
        schedule.step()
    return setting.score(net, setting.test)


def measure(setting: Setting, done: dict, wanted: set[str]) -> dict[str, dict[str, float]]:
    """Test loss and CPU seconds of the peer and of every wanted method that is not done."""
    plain = {"lr": grid.LR, "weight_decay": 0.01}
    tried = {
        "peer": lambda: peer(setting),
        "default": lambda: again(setting, plain, None),
        "none": lambda: again(setting, {**plain, "weight_decay": 0.0}, None),
        "fit": lambda: fit(setting, Auto()),
        "plain fit": lambda: fit(setting, 0.01),
        "held out": lambda: held_out(setting),
        "folds": lambda: folds(setting),
        "half folds": lambda: folds(setting, share=2),
        "trajectory": lambda: follow(setting, Trajectory),
        "evidence": lambda: follow(
            setting, lambda *a: Evidence(*a, emphasised=False), coupled=True
        ),
        "emphasised": lambda: follow(
            setting, lambda *a: Evidence(*a, emphasised=True), coupled=True
        ),
    }  # fmt: skip
    found = dict(done)
    for name, run in tried.items():
        if name in found or name not in wanted:
            continue
        began = time.process_time()
        score = run()
        found[name] = {"test": score, "cpu": time.process_time() - began}
    return found


def table(cells: list[dict]) -> str:
    """One line a data set: each method's loss over the peer's, geometric mean over the splits."""
    lines = [f"{'set':<24}" + "".join(f"{m:>12}" for m in METHODS)]
    sets = list(dict.fromkeys(cell["set"] for cell in cells))

    def ratio(method: str, chosen: list[dict], what: str = "test", base: str = "peer") -> float:
        known = [c["found"] for c in chosen if method in c["found"]]
        logs = [math.log(found[method][what] / found[base][what]) for found in known]
        return math.exp(sum(logs) / len(logs)) if logs else math.nan

    for name in sets:
        own = [c for c in cells if c["set"] == name]
        lines.append(f"{name:<24}" + "".join(f"{ratio(m, own):12.3f}" for m in METHODS))
    lines.append(f"{'geometric mean':<24}" + "".join(f"{ratio(m, cells):12.3f}" for m in METHODS))
    each = {m: [ratio(m, [c]) for c in cells if m in c["found"]] for m in METHODS}
    worst = [max(each[m], default=math.nan) for m in METHODS]
    lines.append(f"{'worst cell':<24}" + "".join(f"{w:12.3f}" for w in worst))
    bases = {"fit": "plain fit"}  # a run of fit also scores and records every epoch
    cost = [ratio(m, cells, "cpu", bases.get(m, "default")) for m in METHODS]
    lines.append(f"{'CPU, plain runs':<24}" + "".join(f"{c:12.2f}" for c in cost))
    lines.append(f"the peer costs {ratio('peer', cells, 'cpu', 'default'):.1f} plain runs")
    return "\n".join(lines)


def main() -> None:
    """Measure the sets that are not in the output yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of NAME.npz")
    parser.add_argument("--sets", nargs="+", default=grid.REPORT)
    parser.add_argument("--splits", type=int, default=2)
    parser.add_argument("--first", type=int, default=100, help="number of the first split")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    grid.ROWS = given.rows
    cells = json.loads(given.output.read_text()) if given.output and given.output.exists() else []
    for split in range(given.first, given.first + given.splits):
        for name in given.sets:
            cell = next((c for c in cells if (c["set"], c["split"]) == (name, split)), None)
            if cell is None:
                cell = {"set": name, "split": split, "found": {}}
                cells.append(cell)
            data = grid.load(given.data, name, split)
            wanted = {"peer", "default", *given.methods}
            wanted |= {"plain fit"} if "fit" in wanted else set()
            cell["found"] = measure(Setting(data, given.epochs, split), cell["found"], wanted)
            if given.output:
                given.output.write_text(json.dumps(cells, indent=1))
            print(table([cell]), flush=True)
    print(table([c for c in cells if c["set"] in given.sets]))


if __name__ == "__main__":
    main()
