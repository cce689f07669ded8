"""Train K models of one architecture at once, each with its own hyperparameters.

No operation mixes members: a diverging one leaves the others bit-identical. A population of one
is the plain loop on the module's own parameters and gradients, with torch's weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn, optim

from tikhon.data.nested import iterate_slices, take_rows, tensors
from tikhon.data.splits import assign_parts
from tikhon.errors import InputError, unknown_name
from tikhon.layers.noise import NoiseLayer
from tikhon.layers.paths import matches
from tikhon.options import split_name
from tikhon.penalties import Penalty, penalty_names
from tikhon.population.batched import Blocks, Forward, Unsupported, choose_forward
from tikhon.population.decay import AdaptiveDecay
from tikhon.population.hyperparameters import Hyperparameters
from tikhon.population.losses import RowLosses, weighted_mean
from tikhon.population.stack import Stack, column
from tikhon.population.steppers import FlatStepper, OwnStepper
from tikhon.regularizer.plan import convex_step_limit
from tikhon.regularizer.targets import Entry, entries_matching, entries_of, match
from tikhon.regularizer.terms import Binding, bind
from tikhon.strengths.validation import without_noise


class Population:
    """Members with their optimizer and penalties; `step` trains all of them on one batch."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        settings: Hyperparameters,
        *,
        objective: RowLosses,
        example: Any,
        steps: int,
        optimizer: Callable[..., optim.Optimizer] = optim.AdamW,
    ) -> None:
        self.model, self.members = models[0], len(models)
        self.settings, self.objective, self.steps = settings, objective, steps
        if objective.batch_only and self.members > 1:
            raise Unsupported(objective.batch_only)
        if objective.batch_only and settings.mixup is not None:
            raise InputError(f"the space varies mixup, but {objective.batch_only}")
        self.failed: dict[int, str] = {}
        self.mask: Tensor | None = None  # flat; 0 marks frozen weights
        self.stack = Stack(models)
        self.generators: list[torch.Generator] = []  # one for each noise layer
        self.inactive_noise: list[NoiseLayer] = []
        self._seed_noise_layers(tensors(example)[0].device)
        self.forward, self.reason = choose_forward(self.model, self.members, self._probe(example))
        self.entries = [
            s for s in entries_of(self.model) if not s.excluded and s.param.requires_grad
        ]
        rates = self._rates()
        if self.members == 1:
            self.stepper = OwnStepper(self.model, self.stack, rates, self.entries, optimizer)
        else:
            self.stepper = FlatStepper(self.stack, rates, self.entries, optimizer)
        self.paths = {id(p): name for name, p in self.model.named_parameters()}
        self.bindings, self.decays = self._bindings(), self._decays()
        self.decay: AdaptiveDecay | None = None
        if settings.adaptive:
            weights = [self.stack.blocks[entry.name].detach() for entry in self.entries]
            self.decay = AdaptiveDecay(weights, lr=self.layer_rates(), steps=steps)

    # ---- building

    def _seed_noise_layers(self, device: torch.device) -> None:
        """Give each noise layer a generator shared by all members, for reproducibility.

        Layers with rate 0 in every member draw nothing.
        """
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, NoiseLayer)}
        if self.settings.dropout and not layers:
            raise InputError(
                "the space varies dropout, but the model has no dropout layer: add "
                "tikhon.layers.Dropout (or use tikhon.layers.insert_dropout)"
            )
        chosen: dict[str, Tensor] = {}
        for pattern, rates in self.settings.dropout.items():
            named = [n for n, layer in layers.items() if matches(pattern, n, layer)]
            if not named:
                raise InputError(
                    f"the space varies dropout: {unknown_name('layer', pattern, layers)}"
                )
            chosen |= dict.fromkeys(named, rates)
        for name, layer in layers.items():
            layer.generator = torch.Generator(device)
            self.generators.append(layer.generator)
            rate = self.stack.buffers.get(f"{name}.rate" if name else "rate")
            if name in chosen:
                cast(Tensor, rate).copy_(chosen[name])
            elif rate is not None and not rate.any():
                self.inactive_noise.append(layer)

    @cached_property
    def _drops_masked_rows(self) -> bool:
        """Return whether zero-weight rows affect the others, or only cost time.

        With noise they are kept, so that other rows get the same draws as beside other members.
        """
        averages = any("running_mean" in name for name, _ in self.model.named_buffers())
        drawing = len(self.generators) > len(self.inactive_noise)
        return bool(self.objective.batch_only) or averages or not drawing

    def _set_mode(self, training: bool) -> None:
        self.forward.train(training)
        for layer in self.inactive_noise:
            layer.training = False

    def _probe(self, example: Any) -> Callable[[Forward], None]:
        if self.members > 1 and not isinstance(example, Tensor):
            raise Unsupported("the model takes several inputs")

        def probe(forward: Forward) -> None:
            buffers = {name: b.clone() for name, b in self.stack.buffers.items()}
            with torch.no_grad():
                for training in (True, False):
                    forward.train(training)
                    forward(self.stack.blocks, buffers, example, shared=True)

        return probe

    def _bindings(self) -> list[tuple[Binding, Tensor]]:
        types, bindings = penalty_names(), []
        terms: dict[str, list[Penalty]] = {}
        try:
            for name, values in self.settings.penalties.items():
                own, pattern = split_name(name)
                terms.setdefault(pattern, []).append(types[own]())
                bound = bind(self.model, self.entries, {pattern: terms[pattern][-1]})
                bindings += [(binding, values) for binding in bound]
            if terms:
                bind(self.model, self.entries, terms)  # raises for two proxes on one parameter
        except ValueError as error:
            raise InputError(f"the space's penalties: {error}") from error
        return bindings

    def _rates(self) -> dict[str, Tensor]:
        """Return the learning rates of each parameter, (members,); patterns replace lr."""
        by_name = dict.fromkeys(self.stack.names, self.settings.lr)
        entries = entries_of(self.model)
        for pattern, rates in self.settings.rates.items():
            try:
                named = entries_matching(entries, pattern)
            except ValueError as error:
                raise InputError(f"the space's lr: {error}") from error
            by_name |= {entry.name: rates for entry in named}
        return by_name

    def layer_rates(self) -> Tensor:
        """Learning rates of decayed parameters, (members, layers), or one column for all."""
        if not self.settings.rates:
            return self.settings.lr[:, None]
        return torch.stack([self.stepper.rates[entry.name] for entry in self.entries], dim=1)

    def _decays(self) -> list[tuple[Tensor, list[Entry] | None]]:
        """Return decay strengths with their parameters, None for the whole model."""
        decays: list[tuple[Tensor, list[Entry] | None]] = []
        for pattern, values in self.settings.weight_decay.items():
            try:
                named = None if pattern == "*" else match(self.model, self.entries, pattern)
            except ValueError as error:
                raise InputError(f"the space's weight_decay: {error}") from error
            decays.append((values, named))
        return decays

    # ---- training

    def step(self, x: Any, y: Tensor, weights: Tensor | None, step: int, seed: int) -> Tensor:
        """Take one optimizer step of every member on a batch; return prior losses (members,).

        The counterpart of `tikhon.training.step.Step`, to which it is equal for one member. A
        single member may have several inputs and a loss that calls the model; its noise is seeded
        by `seed`.
        """
        self._set_mode(True)
        self.stepper.zero_grad()
        for place, generator in enumerate(self.generators):
            generator.manual_seed(seed + 2 * place)  # mixing uses seed + 1
        with _torch_seed(seed if self.objective.batch_only else None):
            losses = self._losses(x, y, weights, self.settings.label_smoothing, seed)
        (losses if self.members == 1 else losses.sum()).backward()
        with torch.no_grad():
            self._update(step)
        return losses.detach()

    def _losses(
        self, x: Any, y: Tensor, weights: Tensor | None, smoothing: Tensor | None, seed: int
    ) -> Tensor:
        if weights is not None and self.members == 1 and self._drops_masked_rows:
            kept = (weights[0] > 0).nonzero()[:, 0]
            if not len(kept):  # the batch is in the held-out fold
                return torch.zeros_like(self.stack.flat[:1], requires_grad=True)
            x, y, weights = take_rows(x, kept), y[kept], None
        if self.settings.mixup is None and weights is None and self.members == 1:
            return self.objective.on(self.model, (x, y), smoothing).view(1)
        if self.settings.mixup is None:
            rows = self.objective.rows(self.outputs(x), y, smoothing)
            return weighted_mean(rows, weights)
        share, mixed, order = self._mixed(x, seed)
        out = self.forward(self.stack.blocks, self.stack.buffers, mixed, shared=False)
        first = self.objective.rows(out, y, smoothing)
        second = self.objective.rows(out, y[order], smoothing)
        paired = None if weights is None else weights * weights[:, order]
        rows = share[:, None] * first + (1 - share[:, None]) * second
        return weighted_mean(rows, paired)

    def _mixed(self, x: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mix rows in pairs, with a share for each member from one common draw."""
        from scipy.special import betaincinv

        generator = torch.Generator().manual_seed(seed + 1)
        order = torch.randperm(len(x), generator=generator)
        unit = torch.rand((), generator=generator, dtype=torch.float64).item()
        assert self.settings.mixup is not None
        alpha = self.settings.mixup.double().cpu().numpy()
        share = torch.from_numpy(betaincinv(alpha.clip(1e-3), alpha.clip(1e-3), unit))
        share = torch.where(self.settings.mixup > 0, share, 1.0).to(x)
        part = column(share, x.unsqueeze(0))
        return share, part * x + (1 - part) * x[order], order

    def outputs(self, x: Any) -> Tensor:
        """Outputs of all members, (members, rows, ...)."""
        return self.forward(self.stack.blocks, self.stack.buffers, x, shared=True)

    def _update(self, step: int) -> None:
        factor = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        if self.mask is not None:
            masks = self.stack.named(self.mask)
            for name, grad in self.stepper.gradients().items():
                grad.mul_(masks[name])
        self._clip()
        self._penalty_gradients()
        if self.decay is not None:
            self.decay.decay_(self.layer_rates().to(self.stack.flat) * factor, step)
        for strengths, entries in self.decays:
            self.stepper.decay_(strengths.to(self.stack.flat), factor, entries)
        is_bounded = self._bound_gains(factor)
        self.stepper.step(factor)
        if not is_bounded:
            self._bound_gains(factor)
        self._prox(factor)

    def _clip(self) -> None:
        if self.settings.clip_norm is None:
            return
        blocks = list(self.stepper.gradients().values())
        norm = torch.stack([b.flatten(1).square().sum(1) for b in blocks]).sum(0).sqrt()
        scale = (self.settings.clip_norm.to(norm) / (norm + 1e-6)).clamp_max(1)
        for block in blocks:
            block.mul_(column(scale, block))

    def _tensors(self, binding: Binding, blocks: Blocks) -> tuple[Tensor, ...]:
        return tuple(blocks[self.paths[id(p)]] for p in binding.target.params)

    def _penalty_gradients(self) -> None:
        for binding, strengths in self.bindings:
            if binding.route != "gradient":
                continue

            def gradient(strength: Tensor, w: Tensor, penalty=binding.base) -> Tensor:
                return penalty.with_strength(strength).grad(w)

            (block,) = self._tensors(binding, self.stack.named(self.stack.flat))
            (grad,) = self._tensors(binding, self.stepper.gradients())
            grad.add_(torch.vmap(gradient)(strengths.to(block), block))

    def _bound_gains(self, factor: float) -> bool:
        """Bound the optimizer's gain where gradients vanish, as `regularize` does; False if no
        state.

        Second moments are kept at or above the slope of the penalty.
        """
        bindings = [(b, s) for b, s in self.bindings if b.route == "prox"]
        moments = self.stepper.bounded_moments(factor) if bindings else {}
        if moments is None:
            return False
        for binding, strengths in bindings:
            limit = convex_step_limit(binding.base)
            for name, slopes in zip(self._names(binding), slopes_at_zero(binding)):
                if name not in moments:
                    continue
                block, least, rate = moments[name]
                slope = column(strengths.to(block), block) * slopes.to(block)
                if limit is not None:
                    slope = torch.maximum(slope, column(rate.to(block) / limit, block))
                block.clamp_min_(least(slope))
        return True

    def _names(self, binding: Binding) -> list[str]:
        return [self.paths[id(p)] for p in binding.target.params]

    def _prox(self, factor: float) -> None:
        bindings = [(b, s) for b, s in self.bindings if b.route in ("prox", "project")]
        if not bindings:
            return
        weights, metric = self.stack.named(self.stack.flat), self.stepper.metric(factor)
        for binding, strengths in bindings:
            blocks, steps = self._tensors(binding, weights), self._tensors(binding, metric)
            if binding.base.constraint:
                self._project(binding, strengths, blocks, steps)
                continue

            def move(strength, blocks, steps, binding=binding):
                penalty = binding.base.with_strength(strength)
                prox, limit = penalty.prox, convex_step_limit(penalty)  # type: ignore[attr-defined]
                step = binding.arrange(steps)
                new = prox(binding.arrange(blocks), step.clamp_max(limit) if limit else step)
                if binding.sees_own_shape:
                    return (new,)
                written = [block.clone() for block in blocks]
                binding.target.place_(written, new)
                return tuple(written)

            for block, new in zip(
                blocks, torch.vmap(move)(strengths.to(blocks[0]), blocks, steps)
            ):
                block.copy_(new)

    @staticmethod
    def _project(
        binding: Binding, limits: Tensor, blocks: tuple[Tensor, ...], steps: tuple[Tensor, ...]
    ) -> None:
        """Project member by member, as constraints check their limit, which vmap cannot."""
        for member, limit in enumerate(limits.tolist()):
            own = [block[member] for block in blocks]
            project = type(binding.base)(limit).prox  # type: ignore[attr-defined]
            metric = binding.target.arrange([step[member] for step in steps])
            binding.target.place_(own, project(binding.target.arrange(own), metric))

    def adapt(self, x: Any, y: Tensor, weights: Tensor | None, step: int) -> None:
        """Update the adaptive weight decay from a validation batch, if due."""
        if self.decay is None or not self.decay.due(step):
            return
        self._set_mode(True)
        averages = {name: buffer.clone() for name, buffer in self.stack.buffers.items()}
        with (
            without_noise(self.model),
            _torch_seed(step if self.objective.batch_only else None),
        ):
            outputs, losses = self._validation_outputs(x, y, weights)
            gradients = torch.autograd.grad(losses.sum(), self.stepper.leaves())
        with torch.no_grad():
            for name, buffer in averages.items():
                self.stack.buffers[name].copy_(buffer)
            constant_losses = torch.full_like(losses, torch.nan)
            if outputs is not None:
                constant = outputs.mean(1, keepdim=True).expand_as(outputs)
                constant_losses = weighted_mean(self.objective.rows(constant, y), weights)
        gradients = [g.view_as(w) for g, w in zip(gradients, self.decay.weights)]
        of_step = self.stepper.gradients()
        training = [of_step[entry.name] for entry in self.entries]
        self.decay.adapt_(losses.detach(), constant_losses, gradients, training)

    def _validation_outputs(
        self, x: Any, y: Tensor, weights: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Return outputs, if available, and losses (members,)."""
        if not self.objective.batch_only:
            outputs = self.outputs(x)
            return outputs, weighted_mean(self.objective.rows(outputs, y), weights)
        if weights is not None:
            x, y = take_rows((x, y), (weights[0] > 0).nonzero()[:, 0])
        return None, self.objective.on(self.model, (x, y)).view(1)

    # ---- reading

    @torch.no_grad()
    def row_losses(self, x: Any, y: Tensor) -> Tensor:
        """Row losses in evaluation mode, (members, rows)."""
        self._set_mode(False)
        rows = [self.objective.rows(self.outputs(a), b) for a, b in iterate_slices((x, y))]
        return torch.cat(rows, dim=1)

    @torch.no_grad()
    def block_losses(self, x: Any, y: Tensor, blocks: int) -> Tensor:
        """Losses of one member in evaluation mode, (1, blocks), on parts with similar targets."""
        self._set_mode(False)
        part = assign_parts(y, blocks)
        rows = (take_rows((x, y), (part == k).nonzero()[:, 0]) for k in range(blocks))
        with _torch_seed(0):
            return torch.stack([self.objective.on(self.model, batch) for batch in rows])[None]

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Outputs in evaluation mode, (members, rows, ...)."""
        self._set_mode(False)
        return torch.cat([self.outputs(part) for part in iterate_slices(x)], dim=1)

    def fail(self, member: int, why: str) -> None:
        """Disable a diverged member: its weights and optimizer state become and stay zero."""
        self.failed[member] = why
        moments, _ = self.stepper.memory()
        for blocks in (self.stack.views(self.stack.flat), *moments.values()):
            for block in blocks:
                block[member] = 0
        self.stepper.fail(member)

    def state(self) -> dict[str, Tensor]:
        """Return everything the next step depends on; every tensor leads with the member axis."""
        moments, counters = self.stepper.memory()
        rows = {"weights": self.stack.views(self.stack.flat)}
        rows |= {f"optimizer.{name}": blocks for name, blocks in moments.items()}
        found = {n: torch.cat([b.flatten(1) for b in blocks], dim=1) for n, blocks in rows.items()}
        found |= {f"counter.{n}": v.reshape(1).repeat(self.members) for n, v in counters.items()}
        found |= {f"buffer.{name}": b.clone() for name, b in self.stack.buffers.items()}
        return found | (self.decay.state() if self.decay is not None else {})

    def load(self, state: Blocks) -> None:
        """Restore the `state()` of a population with the same architecture."""
        moments: dict[str, Tensor] = {}
        counters: dict[str, Tensor] = {}
        noisy = (n for n, m in self.model.named_modules() if isinstance(m, NoiseLayer))
        rates = {f"{name}.rate".lstrip(".") for name in noisy}  # set for each member
        for name, value in state.items():
            kind, _, rest = name.partition(".")
            if kind == "counter":
                counters[rest] = value[0]
            elif kind == "buffer" and rest not in rates:
                self.stack.buffers[rest].copy_(value)
            elif kind == "weights":
                self.stack.fill_(self.stack.flat, value)
            elif kind == "optimizer":
                moments[rest] = self.stack.fill_(torch.zeros_like(self.stack.flat), value)
        self.stepper.remember(moments, counters)
        if self.decay is not None:
            self.decay.load(dict(state))

    def state_dict_of(self, member: int) -> dict[str, Tensor]:
        """Return one member as the state dict of its module."""
        return self.stack.state_dict_of(member)


@contextmanager
def _torch_seed(seed: int | None) -> Iterator[None]:
    """Seed torch within the block, if a seed is given, and restore it afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def slopes_at_zero(binding: Binding) -> list[Tensor]:
    """Slope at zero of a penalty of strength 1, for each entry of the binding's parameters."""
    params = binding.target.params
    found = [torch.empty_like(p, requires_grad=False) for p in params]
    whole = torch.as_tensor(binding.steepness).to(found[0])
    binding.target.place_(found, whole.expand(binding.read().shape))
    return found
