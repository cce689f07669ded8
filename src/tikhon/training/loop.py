"""The training loop, shared by the command line, the estimators and the runners."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn

from tikhon.copying import copy_with_model
from tikhon.data.batches import pair
from tikhon.data.forward import call_model
from tikhon.data.nested import slice_rows, to_device
from tikhon.data.stream import Stream
from tikhon.errors import DataError, InputError
from tikhon.layers import set_rate
from tikhon.layers.noise import NoiseLayer
from tikhon.regularizer.regularizer import Regularizer, regularize
from tikhon.regularizer.terms import Term
from tikhon.runs.interrupt import never_stop
from tikhon.sparsity import Sparsifier
from tikhon.strengths.hypergradient import Hypergradient
from tikhon.strengths.sensitivity import steps_between_moves
from tikhon.training import measures
from tikhon.training.losses import loss_of
from tikhon.training.measures import Epoch
from tikhon.training.objective import Objective
from tikhon.training.recipe import Recipe
from tikhon.training.settings import Settings, pick_device
from tikhon.training.step import Step

_TICK = 0.1  # seconds between checks of progress, finiteness and checkpoints
_MIN_IMPROVEMENT = 1e-4  # of the first validation loss: improvements below this do not count
_MAX_SCORED_ROWS = 10_000  # training rows scored after an epoch, at most


class Best(TypedDict):
    """Epoch and score of the best state so far, and the state itself if it is to be restored."""

    score: float
    epoch: int
    model: dict[str, Tensor]


class Diverged(InputError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class Progress:
    """Position of a training run, as shown by a progress bar."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float


class StrengthReplay(Protocol):
    """Strengths recorded by an earlier training run."""

    def replay(self, steps: int) -> dict[object, list[Term]]:
        """Return the terms with the recorded strengths as schedules over `steps` steps."""
        ...


class Training:
    """One training run in progress: model, optimizer, regularizer and all state needed to resume.

    Random numbers come from torch's generator (seeded once); the row order depends on (seed,
    epoch) alone. `state_dict` in the middle of an epoch is therefore enough to resume bit for bit
    on the same machine and versions.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Any,
        recipe: Recipe,
        settings: Settings,
        *,
        valid: tuple[Any, Tensor] | None = None,
        unit: float = 1.0,
        recorded: StrengthReplay | None = None,
    ) -> None:
        if recipe.early_stopping and valid is None:
            raise InputError("early_stopping needs validation data: give `valid`")
        self.recipe, self.settings, self.unit = recipe, settings, unit
        self.device = pick_device(settings.device)
        self.model = model.to(self.device)
        stream = Stream(train, size=settings.batch_size, seed=settings.seed, name="train")
        if stream.batches is None:  # the length is known only by reading: read it once
            held = pair(train, name="train")
            stream = Stream(held, size=settings.batch_size, seed=settings.seed, name="train")
        self.stream = stream.to(self.device)
        self.x, y = to_device(
            self.stream.held or self.stream.sample(_MAX_SCORED_ROWS), self.device
        )
        self.loss = loss_of(settings.loss, y)
        self.y = self.loss.targets(y)
        held_out = None if valid is None else to_device(valid, self.device)
        self.valid = None if held_out is None else (held_out[0], self.loss.targets(held_out[1]))
        with _as_input_errors():
            apply_dropout(model, recipe)
        self.batches = self.stream.batches or 0
        self.steps = self.batches * settings.epochs
        self.objective = Objective(recipe, self.loss, self.x, self.y)
        self.optimizer = settings.build_optimizer(model, recipe.learning_rates)
        has_schedule = settings.schedule != "constant"
        self._take_step = Step(
            model,
            self.optimizer,
            lambda batch: self.objective(model, *batch),
            clip=recipe.clipping or None,
            rate=(lambda step: settings.rate(step, self.steps)) if has_schedule else None,
        )
        self.regularizer = self._attach_penalties(recorded)
        self.sparsifier = self._attach_sparsifier()
        self.average = self._build_average()
        self.epoch = self.batch = self.step = 0
        self.seconds = 0.0
        self.seen = 0  # rows in this epoch so far
        self.total = torch.zeros((), device=self.device, dtype=torch.float32)
        self.history: list[Epoch] = []
        self.best: Best = {"score": float("inf"), "epoch": 0, "model": {}}
        self.reason = ""

    # -- running ------------------------------------------------------------------------------

    def run(
        self,
        *,
        stop: Callable[[], bool] = never_stop,
        on_tick: Callable[[Progress], None] | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
        save: Callable[[], None] | None = None,
        save_every: float = 10.0,
        until: int | None = None,
    ) -> str:
        """Train until the end, epoch `until`, or `stop()` returns true; return why it ended.

        `save` is called every `save_every` seconds between steps, and on `stop()`.
        """
        clock = _Timer(self.seconds, save_every)
        self.model.train()
        while self.epoch < self.settings.epochs and not self.reason:
            if self.epoch == until:
                return "until"
            batches = self.stream.epoch(self.epoch, self.batch)
            while self.batch < self.batches:
                self._step(self._next_batch(batches))
                if stop():
                    self.seconds = clock.elapsed()
                    if save is not None:
                        save()
                    return "stopped"
                if clock.is_tick():
                    self._check_progress(on_tick, clock)
                    if save is not None and clock.is_save_due():
                        self.seconds = clock.elapsed()
                        save()
                    if self.reason:
                        break
            self.seconds = clock.elapsed()
            if self.batch == self.batches:
                self._end_epoch()
                if on_epoch is not None:
                    on_epoch(self.history[-1])
            if save is not None and clock.is_save_due():
                save()
        self._load_final_weights()
        return self.reason or "epochs"

    def _next_batch(self, batches: Iterator[Any]) -> Any:
        batch = next(batches, None)
        if batch is None:
            raise DataError(
                f"train: the loader has a length of {self.batches} and gave {self.batch} batches"
            )
        return batch if self.stream.held is not None else to_device(batch, self.device)

    def _step(self, batch: tuple[Any, Tensor]) -> None:
        loss = self._take_step(batch, self.step)
        if self.average is not None and self._should_average():
            self.average.update_parameters(self.model)
        self.seen += len(batch[1])
        self.total.add_(loss, alpha=len(batch[1]))
        self.batch += 1
        self.step += 1

    def _check_progress(self, on_tick: Callable[[Progress], None] | None, clock: _Timer) -> None:
        """Check finiteness, progress and budget; rarely called, as it synchronises the device."""
        total = self.total.item()
        if not (abs(total) < float("inf")):
            self._diverged(total)
        if on_tick is not None:
            loss = total / max(1, self.seen)
            on_tick(Progress(self.epoch, self.settings.epochs, self.step, self.steps, loss))
        if self.settings.budget is not None and clock.elapsed() >= self.settings.budget:
            self.reason = "budget"

    def _end_epoch(self) -> None:
        objective = self.total.item() / max(1, self.seen)
        if not (abs(objective) < float("inf")):
            self._diverged(objective)
        self.epoch, self.batch, self.seen = self.epoch + 1, 0, 0
        self.total.zero_()
        if self.average is not None and self.sparsifier is not None:
            self.sparsifier.apply(self.average)
        self.history.append(self._score_epoch(objective))
        self._update_best(self.history[-1])

    def _score_epoch(self, objective: float) -> Epoch:
        row: Epoch = {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": round(self.seconds, 4),
            "lr": self.optimizer.param_groups[0]["lr"],
            "train/objective": objective,
        }
        stride = slice(None, None, 1 + (len(self.y) - 1) // _MAX_SCORED_ROWS)
        parts = {"train": slice_rows((self.x, self.y), stride)}
        if self.valid is not None:
            parts["valid"] = self.valid
        for part, (x, y) in parts.items():
            for key, value in measures.score(self.scored, x, y, self.loss, self.unit).items():
                row[f"{part}/{key}"] = value
        for name, values in measures.penalty_readings(self.regularizer).items():
            numbers = {k: value for k, value in values.items() if isinstance(value, int | float)}
            row.update({f"penalty/{name}/{key}": value for key, value in numbers.items()})
        if self.sparsifier is not None:
            row["sparsity/zeros"] = self.sparsifier.audit().share
        for name, sizes in measures.weight_norms(self.model, self.regularized).items():
            row.update({f"norm/{name}/{key}": value for key, value in sizes.items()})
        return row

    def _update_best(self, row: Epoch) -> None:
        """Keep the best state by validation loss, and stop when patience runs out.

        Skipped while `sparsify` is still pruning: those states are not as sparse as requested.
        """
        if self.sparsifier is not None and self.sparsifier.phase != "repair":
            return
        score = row.get("valid/loss", row["train/loss"])
        stops_early = self.recipe.early_stopping is not None
        min_gain = _MIN_IMPROVEMENT * abs(self.history[0]["valid/loss"]) if stops_early else 0.0
        if score < self.best["score"] - min_gain:
            self.best = {"score": score, "epoch": self.epoch, "model": {}}
            if self.recipe.early_stopping:
                state = self.scored.state_dict()
                self.best["model"] = {name: t.detach().clone() for name, t in state.items()}
        if self.recipe.early_stopping is not None:
            if self.epoch - self.best["epoch"] >= self.recipe.early_stopping:
                self.reason = "early stopping"

    def _load_final_weights(self) -> None:
        """Load the best state or the average into the model, if the recipe asks for it."""
        if self.average is not None and not self.best["model"]:
            if self.sparsifier is not None:
                self.sparsifier.apply(self.average)
            if self.average.n_averaged > 0:
                self.model.load_state_dict(self.average.module.state_dict())
                torch.optim.swa_utils.update_bn([(self.x,)], _SingleInput(self.model))
        elif self.best["model"]:
            self.model.load_state_dict(self.best["model"])

    # -- what is trained ----------------------------------------------------------------------

    @property
    def scored(self) -> nn.Module:
        """The model to score: the average once it exists."""
        if self.average is not None and self.average.n_averaged > 0:
            return self.average.module
        return self.model

    @property
    def regularized(self) -> list[str]:
        """Names of the penalised parameters."""
        return [] if self.regularizer is None else list(self.regularizer.sparsity())

    def _attach_penalties(self, recorded: StrengthReplay | None) -> Regularizer | None:
        """Attach the penalties, with strengths of the recipe or replayed from an earlier run."""
        terms = (
            self.recipe.terms(self._build_hypergradient)
            if recorded is None
            else recorded.replay(self.steps)
        )
        with _as_input_errors():
            return regularize(self.model, self.optimizer, terms) if terms else None

    def _attach_sparsifier(self) -> Sparsifier | None:
        requested = self.recipe.sparsify
        if requested is None:
            return None
        example = slice_rows(self.x, slice(2))
        with _as_input_errors():
            return Sparsifier(
                self.model, self.optimizer, requested, steps=self.steps, example=example
            )

    def _build_hypergradient(self) -> object:
        if self.valid is None:
            raise InputError("strength 'auto' needs validation data: give `valid`")
        every = steps_between_moves(self.steps)
        return Hypergradient(self.valid, self.loss.for_strengths, steps=self.steps, every=every)

    def _build_average(self) -> torch.optim.swa_utils.AveragedModel | None:
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        if self.recipe.averaging is None:
            return None
        ema = get_ema_multi_avg_fn(self.recipe.ema_decay)
        average = ema if self.recipe.averaging == "ema" else None
        return AveragedModel(
            copy_with_model(self.model, self.model), multi_avg_fn=average, use_buffers=False
        )

    def _should_average(self) -> bool:
        """EMA from the first step; SWA at each epoch's end in the last quarter."""
        if self.recipe.averaging == "ema":
            return True
        last = self.batch == self.batches - 1
        return last and self.epoch >= (3 * self.settings.epochs) // 4

    def _diverged(self, loss: float) -> None:
        raise Diverged(
            f"the loss is {loss} by step {self.step} (epoch {self.epoch + 1}); not finite first: "
            f"{measures.first_non_finite(self.model)}. Lower lr (now "
            f"{self.optimizer.param_groups[0]['lr']:g}) or set clip_norm"
        )

    # -- resume -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything the next step depends on."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        optimizer = {
            names[id(p)]: dict(state)
            for p, state in self.optimizer.state.items()
            if id(p) in names
        }
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": optimizer,
            "lrs": [group["lr"] for group in self.optimizer.param_groups],
            "regularizer": None if self.regularizer is None else self.regularizer.state_dict(),
            "sparsity": None if self.sparsifier is None else self.sparsifier.state_dict(),
            "average": None if self.average is None else dict(self.average.state_dict()),
            "rng": _rng_state(self.device),
            "total": self.total,
            "seen": self.seen,
            "best": self.best,
            "history": self.history,
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "seconds": self.seconds,
            "reason": self.reason,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.model.load_state_dict(state["model"])
        params = dict(self.model.named_parameters())
        for name, values in state["optimizer"].items():
            param, restored = params[name], dict(values)
            for key, value in values.items():
                if getattr(value, "shape", None) == param.shape:  # step counters stay put
                    restored[key] = value.to(param.device)
            self.optimizer.state[param] = restored
        for group, lr in zip(self.optimizer.param_groups, state["lrs"]):
            group["lr"] = lr
        if self.regularizer is not None:
            self.regularizer.load_state_dict(state["regularizer"])
        if self.sparsifier is not None:
            self.sparsifier.load_state_dict(state["sparsity"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.total.copy_(state["total"])
        self.seen = state["seen"]
        self.best, self.history = state["best"], list(state["history"])
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.seconds, self.reason = state["seconds"], state["reason"]
        _set_rng_state(state["rng"], self.device)


class _SingleInput(nn.Module):
    """Wrap a model so that it takes all its inputs as one value."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        """Return the model's outputs."""
        return call_model(self.model, inputs)


class _Timer:
    """Monotonic timer of progress ticks and checkpoints."""

    def __init__(self, before: float, save_every: float) -> None:
        self._start = time.perf_counter() - before
        self._save_every = save_every
        self._next = self._saved = time.perf_counter()
        self._tick = min(_TICK, save_every)

    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def is_tick(self) -> bool:
        now = time.perf_counter()
        if now < self._next:
            return False
        self._next = now + self._tick
        return True

    def is_save_due(self) -> bool:
        now = time.perf_counter()
        if now - self._saved < self._save_every:
            return False
        self._saved = now
        return True


def apply_dropout(model: nn.Module, recipe: Recipe) -> None:
    """Set the rates of the model's noise layers to those of the recipe."""
    has_noise = any(isinstance(module, NoiseLayer) for module in model.modules())
    if recipe.dropout is None or (recipe.dropout == 0 and not has_noise):
        return
    rates = recipe.dropout if isinstance(recipe.dropout, Mapping) else {"*": recipe.dropout}
    for pattern, rate in rates.items():
        set_rate(model, pattern, rate)


@contextmanager
def _as_input_errors() -> Iterator[None]:
    """Re-raise ValueError and TypeError of penalties, patterns and layers as `InputError`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
