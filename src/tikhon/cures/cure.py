"""`cure`: try treatments on copies, paired and in rungs, and keep only what proves to help."""

from __future__ import annotations

import json
import math
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from torch import nn

from tikhon.budget import seconds_of
from tikhon.cures.arms import Arm, Trials, shell, train
from tikhon.cures.treatments import NOTHING, Treatment, popular
from tikhon.data.rows import Batch
from tikhon.diagnosis.diagnose import Diagnosis, anew, diagnose, draw
from tikhon.diagnosis.feed import Feed, feed
from tikhon.diagnosis.keep import keep
from tikhon.diagnosis.letter import WIDTH
from tikhon.diagnosis.record import Point, finite
from tikhon.diagnosis.replica import Loss, Replica, isolated
from tikhon.errors import InputError
from tikhon.training.losses import in_a_loop

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from tikhon.training.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Cure:
    """What `cure` tried and what proved to help: the treated model, a patch and a recipe.

    `patch` is the change as the PyTorch code that was run, empty where nothing helped; `model` is
    the treated model before training, `replica` the whole treated program, and `train` runs it.
    """

    diagnosis: Diagnosis
    arms: tuple[Arm, ...]
    treatment: Treatment | None
    program: Callable[[int], Replica] = field(repr=False)
    batch_size: int
    source: Feed = field(repr=False)
    judge: Batch | None = field(repr=False)
    loss: Loss = field(repr=False)
    patch: str = ""
    seconds: float = 0.0

    @property
    def confirmed(self) -> bool:
        """Whether a treatment beat doing nothing with every seed, beyond the spread."""
        return self.treatment is not None

    @property
    def best(self) -> Arm | None:
        """The arm of the chosen treatment."""
        name = self.treatment.name if self.treatment is not None else None
        return next((a for a in self.arms if a.name == name), None)

    @property
    def recipe(self) -> Recipe:
        """What of the cure a recipe can hold: clipping, dropout, decay and early stopping."""
        from tikhon.penalties import L2
        from tikhon.regularizer.terms import Term
        from tikhon.training.recipe import Recipe

        known = dict((self.treatment or NOTHING).recipe)
        strength = known.pop("decay", None)
        decay = Term(L2(strength), how="decoupled") if strength else ()
        return Recipe(decay, **known)

    def replica(self, seed: int = 0) -> Replica:
        """The treated program before its first step, drawn with a seed."""
        return self.program(seed)

    @property
    def model(self) -> nn.Module:
        """The treated model, before training."""
        return self.program(0).model

    def train(self, steps: int, *, seed: int = 0) -> tuple[nn.Module, Point]:
        """Run the treated program in full; the trained model and its last scores."""
        with isolated(nn.Module(), seed):
            replica = self.program(seed)
            end = train(
                replica, self.source, self.judge, steps, self.batch_size, seed, loss=self.loss
            )
        return replica.model, end

    def __str__(self) -> str:
        return _letter(self)

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(str(self))}</pre>"

    def to_dict(self) -> dict[str, Any]:
        """Plain values without NaN."""
        best = self.best
        return {
            "schema_version": 1,
            "kind": "cure",
            "confirmed": self.confirmed,
            "treatment": self.treatment.name if self.treatment else None,
            "patch": self.patch,
            "recipe": self.recipe.to_dict(),
            "effect": finite(best.effect) if best else None,
            "seconds": self.seconds,
            "arms": [finite({**a.__dict__, "effect": a.effect}) for a in self.arms],
            "diagnosis": self.diagnosis.to_dict(),
        }

    def to_json(self) -> str:
        """`to_dict` as one JSON document."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Keep it as a run folder for `tikhon report`; `result.json` is `to_dict`."""
        keep(self.to_dict(), path, overwrite=overwrite)

    def figures(self) -> dict[str, Figure]:
        """The diagnosis' figures, and the effect of each arm with its spread."""
        from tikhon.diagnosis.figure import effects

        return {**self.diagnosis.figures(), "effects": effects(self.arms)}


def cure(
    model: nn.Module | Callable[[], nn.Module],
    data: Any,
    loss: str | Loss,
    *,
    optimizer: Any,
    diagnosis: Diagnosis | None = None,
    valid: Any = None,
    budget: str = "60s",
    seeds: int = 3,
    steps: int = 300,
    batch_size: int = 64,
    seed: int = 0,
    penalty: Any = None,
    clip: float | None = None,
) -> Cure:
    """Find a change that makes the model train, and prove it against doing nothing.

    The findings choose treatments; each is tried on copies with the same seeds, batches and draws
    as the untreated program, in rungs of 20, 75 and `steps` steps; learning rates are always
    tried too. The score is the training loss plus the validation loss (the validation loss alone
    against overfitting). "Confirmed" means: better with every seed, by more than the spread.
    Among equals the smallest edit wins.

    Args:
        model: the module, or a factory of it (then each seed draws new weights).
        data, loss, valid, batch_size, penalty, clip: as for `diagnose`.
        optimizer: an optimizer bound to the model, or a factory called with the parameters.
        diagnosis: of the same program; None diagnoses first, within the budget.
        budget: a time such as "60s" or "2m", counted in CPU seconds: other programs take none.
        seeds: paired repetitions, >= 2.
        steps: length of the last rung, >= 1.

    Raises:
        InputError: as `diagnose`, and for a missing optimizer or a budget that is no time.

    References:
        Jamieson and Talwalkar, successive halving, 2016, https://arxiv.org/abs/1502.07943

    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(256, 8); y = (x[:, 0] > 0).long()
    >>> net = nn.Sequential(nn.Linear(8, 2))
    >>> found = cure(net, (x, y), nn.CrossEntropyLoss(), steps=60, budget="10s",
    ...              optimizer=torch.optim.SGD(net.parameters(), lr=1e-6))
    >>> found.confirmed
    True
    """
    if optimizer is None:
        raise InputError("cure trains: pass an optimizer, or a factory such as torch.optim.Adam")
    if seeds < 2 or steps < 1:
        raise InputError(f"seeds must be >= 2 and steps >= 1, received {seeds} and {steps}")
    began = time.process_time()
    limit = began + (seconds_of(budget) or math.inf)
    if diagnosis is None:
        fixed = isinstance(model, nn.Module)
        diagnosis = diagnose(
            model if fixed else draw(model, seed), data, loss,
            optimizer=optimizer if fixed else anew(optimizer), valid=valid, steps=min(steps, 200),
            batch_size=batch_size, seed=seed, penalty=penalty, clip=clip,
        )  # fmt: skip
    if "nothing_to_train" in diagnosis.labels:
        raise InputError(
            "no parameter requires a gradient: call requires_grad_(True) on what is to learn"
        )
    with isolated(shell(model), seed):
        source = feed(data)
        loss = in_a_loop(loss, source.probe[1])
        judge = feed(valid, rows=512, name="valid").probe if valid is not None else None
    trials = Trials(
        model=model, loss=loss, optimizer=optimizer, penalty=penalty, clip=clip, source=source,
        judge=judge, batch_size=min(batch_size, source.rows),
        seeds=[seed + i for i in range(seeds)], codes=diagnosis.labels, limit=limit,
    )  # fmt: skip
    arms, chosen = trials.search(steps)
    treatment = chosen or NOTHING
    return Cure(
        diagnosis=diagnosis,
        arms=arms,
        treatment=chosen,
        program=lambda s: trials.build(treatment, s),
        batch_size=treatment.batch or trials.batch_size,
        source=source,
        judge=judge,
        loss=loss,
        patch=trials.build(treatment, seed).patch if chosen is not None else "",
        seconds=time.process_time() - began,
    )


def _letter(found: Cure) -> str:
    """The verdict, the arms that were tried to the end, what failed, and the patch."""
    base = found.arms[0]
    chosen = found.best
    seeds, steps = len(base.scores), base.steps
    lines = [
        f"tikhon cure: {len(found.arms) - 1} treatments, {seeds} seeds x {steps} steps, "
        f"{found.seconds:.0f} CPU seconds"
    ]
    if chosen is None:
        lines.append(" no cure found: nothing beat doing nothing with every seed")
        urgent = [f for f in found.diagnosis.findings if f.severity == "critical" and f.advice]
        lines += [f" {f.code} is yours to change: {f.advice[0]}" for f in urgent]
    else:
        lines.append(
            f" {chosen.name}: loss {mean(base.scores):.3g} -> {mean(chosen.scores):.3g} "
            f"({chosen.effect:.3g} ± {chosen.spread:.2g}), confirmed by {seeds} of {seeds} seeds"
        )
    lines.append(f" {'treatment':44} {'loss':>9} {'effect':>9} {'±':>8}  verdict")
    finals = [a for a in found.arms if a.steps == steps]
    for arm in finals:
        verdict = arm.verdict if arm is not base else ""
        lines.append(
            f" {arm.name[:44]:44} {mean(arm.scores):>9.3g} {arm.effect:>9.3g} {arm.spread:>8.2g}"
            f"  {verdict}"
        )
    failed = [a.name for a in found.arms if a.verdict in ("worse", "not confirmed")]
    known = {t.name for t in popular(found.diagnosis.labels)}
    failed += [a.name for a in found.arms if a.name in known and a.effect <= 0.05 * base.scores[0]]
    if failed:
        text = f"did not help: {', '.join(dict.fromkeys(failed))}"
        lines += textwrap.wrap(text, WIDTH, initial_indent=" ", subsequent_indent="   ")
    if found.patch:
        lines += [" patch:", *(f"   {line}" for line in found.patch.splitlines())]
    return "\n".join(lines)
