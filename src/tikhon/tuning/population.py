"""K models of one architecture, trained at once, each with its own hyperparameters.

Parameters live in one flat buffer (each layer's K copies side by side), a plain torch optimizer
with lr 1 turns the flat gradient into moves, and every member scales its move by its own learning
rate. No operation mixes members: one that diverges leaves the others bit-identical.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn, optim

from tikhon.errors import InputError
from tikhon.layers.noise import NoiseLayer
from tikhon.metric import stationary_gain
from tikhon.moves import convex_limit
from tikhon.penalties import Penalty
from tikhon.recipe import penalty_names
from tikhon.targets import slots
from tikhon.terms import Binding, bind
from tikhon.tuning.batched import Blocks, Forward, choose
from tikhon.tuning.decay import AdaptiveDecay
from tikhon.tuning.objective import Objective, mean_over
from tikhon.tuning.settings import Settings

ELEMENTWISE = (optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad)


class Population:
    """Members, their optimizer and their penalties; `step` trains all of them on one batch."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        settings: Settings,
        *,
        objective: Objective,
        example: Tensor,
        steps: int,
        optimizer: Callable[..., optim.Optimizer] = optim.AdamW,
    ) -> None:
        self.model, self.members = models[0], len(models)
        self.settings, self.objective, self.steps = settings, objective, steps
        self.generator = torch.Generator(example.device)
        self.failed: dict[int, str] = {}
        self.mask: Tensor | None = None  # flat; 0 marks weights that stay as they are
        self._stack(models)
        self._noise()
        self.forward, self.reason = choose(self.model, self.members, self._probe(example))
        if self.members == 1:
            self._adopt()
        self._optimizer(optimizer)
        self.slots = [s for s in slots(self.model) if not s.excluded and s.param.requires_grad]
        self.bindings = self._bindings()
        self.decay: AdaptiveDecay | None = None
        if settings.adaptive:
            weights = [self.blocks[slot.name].detach() for slot in self.slots]
            self.decay = AdaptiveDecay(weights, lr=settings.lr, steps=steps)

    # ---- building

    def _stack(self, models: Sequence[nn.Module]) -> None:
        named = [dict(m.named_parameters()) for m in models]
        shapes = {name: p.shape for name, p in named[0].items()}
        for other in named[1:]:
            if {name: p.shape for name, p in other.items()} != shapes:
                raise InputError("the members of a population must have one architecture")
        first = next(iter(named[0].values()))
        sizes = [p.numel() * self.members for p in named[0].values()]
        self.edges = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        self.names = list(shapes)
        self.shapes = list(shapes.values())
        self.flat = torch.empty(self.edges[-1], dtype=first.dtype, device=first.device)
        self.gradient = torch.zeros_like(self.flat)
        self.blocks: dict[str, Tensor] = {}
        for name, view, grad in zip(self.names, self.views(self.flat), self.views(self.gradient)):
            view.copy_(torch.stack([p[name].detach() for p in named]))
            leaf = view.detach().requires_grad_(named[0][name].requires_grad)
            leaf.grad = grad if leaf.requires_grad else None
            self.blocks[name] = leaf
        stacks = [dict(m.named_buffers()) for m in models]
        self.buffers = {n: torch.stack([b[n] for b in stacks]) for n in stacks[0]}

    def views(self, flat: Tensor) -> list[Tensor]:
        """A flat tensor cut into (members, *shape) blocks, one a parameter."""
        cuts = pairwise(self.edges)
        return [flat[a:b].view(self.members, *s) for (a, b), s in zip(cuts, self.shapes)]

    def _noise(self) -> None:
        """All noise comes from one generator, so members share their draws."""
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, NoiseLayer)}
        rates = self.settings.dropout
        if rates is not None and not layers:
            raise InputError(
                "the space varies dropout, but the model has no dropout layer: add "
                "tikhon.layers.Dropout (or use tikhon.layers.insert_dropout)"
            )
        for name, layer in layers.items():
            layer.generator = self.generator
            if rates is not None:
                self.buffers[f"{name}.rate" if name else "rate"].copy_(rates)

    def _probe(self, example: Tensor) -> Callable[[Forward], None]:
        def probe(forward: Forward) -> None:
            buffers = {name: b.clone() for name, b in self.buffers.items()}
            with torch.no_grad():
                for training in (True, False):
                    forward.train(training)
                    forward(self.blocks, buffers, example, shared=True)

        return probe

    def _adopt(self) -> None:
        """A population of one trains the module's own parameters, as views of the buffer."""
        for name, parameter in self.model.named_parameters():
            parameter.data = self.blocks[name].detach()[0]
            block = self.blocks[name]
            parameter.grad = None if block.grad is None else block.grad[0]
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self.buffers[name][0])
            self.buffers[name] = buffer.unsqueeze(0)

    def _optimizer(self, build: Callable[..., optim.Optimizer]) -> None:
        """For one member the optimizer owns the weights; for more it fills a flat `move`."""
        self.move = self.flat if self.members == 1 else torch.zeros_like(self.flat)
        self.move.requires_grad_(False)
        handle = nn.Parameter(self.move, requires_grad=True)
        handle.grad = self.gradient
        try:
            self.optimizer = build([handle], lr=1.0, weight_decay=0.0, fused=True)
        except (TypeError, RuntimeError):
            self.optimizer = build([handle], lr=1.0, weight_decay=0.0)
        if type(self.optimizer) not in ELEMENTWISE:
            raise InputError(
                f"{type(self.optimizer).__name__} does not act entry by entry, so it cannot train "
                f"a population: use one of {', '.join(o.__name__ for o in ELEMENTWISE)}"
            )
        self.handle = handle
        self.rate = torch.cat(
            [self._column(self.settings.lr, view).expand_as(view).reshape(-1)
             for view in self.views(self.flat)]
        ) if self.members > 1 else self.settings.lr  # fmt: skip

    @staticmethod
    def _column(values: Tensor, block: Tensor) -> Tensor:
        return values.to(block).view(-1, *[1] * (block.ndim - 1))

    def _bindings(self) -> list[tuple[Binding, Tensor]]:
        types = penalty_names()
        pairs: list[tuple[Penalty, Tensor]] = [
            (types[name](), strengths) for name, strengths in self.settings.penalties.items()
        ]
        if self.settings.max_norm is not None:
            pairs.append((types["max_norm"](), self.settings.max_norm))
        return [
            (binding, values)
            for penalty, values in pairs
            for binding in bind(self.model, self.slots, {"*": penalty})
        ]

    # ---- training

    def step(self, x: Tensor, y: Tensor, weights: Tensor | None, step: int, seed: int) -> Tensor:
        """One optimizer step of every member on one batch; (members,) losses before it."""
        self.forward.train(True)
        self.gradient.zero_()
        self.generator.manual_seed(seed)
        losses = self._losses(x, y, weights, self.settings.label_smoothing, seed)
        losses.sum().backward()
        with torch.no_grad():
            self._update(0.5 * (1 + math.cos(math.pi * step / self.steps)))
        return losses.detach()

    def _losses(
        self, x: Tensor, y: Tensor, weights: Tensor | None, smoothing: Tensor | None, seed: int
    ) -> Tensor:
        if weights is not None and self.members == 1:
            kept = weights[0] > 0
            x, y, weights = x[kept], y[kept], None
        if self.settings.mixup is None:
            rows = self.objective.rows(self.outputs(x), y, smoothing)
            return mean_over(rows, weights)
        share, mixed, order = self._mixed(x, seed)
        out = self.forward(self.blocks, self.buffers, mixed, shared=False)
        first = self.objective.rows(out, y, smoothing)
        second = self.objective.rows(out, y[order], smoothing)
        paired = None if weights is None else weights * weights[:, order]
        rows = share[:, None] * first + (1 - share[:, None]) * second
        return mean_over(rows, paired)

    def _mixed(self, x: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows mixed in pairs, in a share of each member's own; one draw serves all."""
        from scipy.special import betaincinv

        generator = torch.Generator().manual_seed(seed + 1)
        order = torch.randperm(len(x), generator=generator)
        unit = torch.rand((), generator=generator, dtype=torch.float64).item()
        assert self.settings.mixup is not None
        alpha = self.settings.mixup.double().cpu().numpy()
        share = torch.from_numpy(betaincinv(alpha.clip(1e-3), alpha.clip(1e-3), unit))
        share = torch.where(self.settings.mixup > 0, share, 1.0).to(x)
        column = self._column(share, x.unsqueeze(0))
        return share, column * x + (1 - column) * x[order], order

    def outputs(self, x: Tensor) -> Tensor:
        """(members, rows, ...)."""
        return self.forward(self.blocks, self.buffers, x, shared=True)

    def _update(self, factor: float) -> None:
        lr = self.settings.lr.to(self.flat) * factor
        if self.mask is not None:
            self.gradient.mul_(self.mask)
        self._clip()
        self._penalty_gradients()
        if self.decay is not None:
            self.decay.decay_(lr)
        elif self.settings.weight_decay is not None:
            keep = 1 - lr * self.settings.weight_decay.to(lr)
            for slot in self.slots:
                block = self.blocks[slot.name].detach()
                block.mul_(self._column(keep, block))
        if self.members == 1:
            self.optimizer.param_groups[0]["lr"] = float(lr)
            self.optimizer.step()
        else:
            self.move.zero_()
            self.optimizer.step()
            self.flat.addcmul_(self.move, self.rate, value=factor)
        self._prox(lr, factor)

    def _clip(self) -> None:
        if self.settings.clip is None:
            return
        blocks = self.views(self.gradient)
        norm = torch.stack([b.flatten(1).square().sum(1) for b in blocks]).sum(0).sqrt()
        scale = (self.settings.clip.to(norm) / (norm + 1e-6)).clamp_max(1)
        for block in blocks:
            block.mul_(self._column(scale, block))

    def _tensors(self, binding: Binding, flat: Tensor) -> tuple[Tensor, ...]:
        by_name = dict(zip(self.names, self.views(flat)))
        names = {id(p): n for n, p in self.model.named_parameters()}
        return tuple(by_name[names[id(p)]] for p in binding.target.params)

    def _penalty_gradients(self) -> None:
        for binding, strengths in self.bindings:
            if binding.route != "gradient":
                continue

            def gradient(strength: Tensor, w: Tensor, penalty=binding.base) -> Tensor:
                return penalty.with_strength(strength).grad(w)

            (block,) = self._tensors(binding, self.flat)
            (grad,) = self._tensors(binding, self.gradient)
            grad.add_(torch.vmap(gradient)(strengths.to(block), block))

    def _prox(self, lr: Tensor, factor: float) -> None:
        bindings = [(b, s) for b, s in self.bindings if b.route in ("prox", "project")]
        if not bindings:
            return
        gain = stationary_gain(
            self.optimizer, self.optimizer.param_groups[0], self.optimizer.state[self.handle]
        ).dense()
        metric = torch.as_tensor(gain, dtype=self.flat.dtype).expand_as(self.flat)
        if self.members > 1:
            metric = metric * self.rate * factor
        for binding, strengths in bindings:
            blocks, steps = self._tensors(binding, self.flat), self._tensors(binding, metric)
            if binding.base.constraint:
                self._project(binding, strengths, blocks, steps)
                continue

            def move(strength, blocks, steps, binding=binding):
                penalty = binding.base.with_strength(strength)
                prox, limit = penalty.prox, convex_limit(penalty)  # type: ignore[attr-defined]
                step = binding.arrange(steps)
                new = prox(binding.arrange(blocks), step.clamp_max(limit) if limit else step)
                if binding.whole:
                    return (new,)
                written = [block.clone() for block in blocks]
                binding.target.place_(written, new)
                return tuple(written)

            for block, new in zip(blocks, torch.vmap(move)(strengths.to(lr), blocks, steps)):
                block.copy_(new)

    @staticmethod
    def _project(
        binding: Binding,
        limits: Tensor,
        blocks: tuple[Tensor, ...],
        steps: tuple[Tensor, ...],
    ) -> None:
        """A constraint checks its limit, which vmap cannot: member by member."""
        for member, limit in enumerate(limits.tolist()):
            own = [block[member] for block in blocks]
            project = type(binding.base)(limit).prox  # type: ignore[attr-defined]
            metric = binding.target.arrange([step[member] for step in steps])
            binding.target.place_(own, project(binding.target.arrange(own), metric))

    def adapt(self, x: Tensor, y: Tensor, weights: Tensor | None, step: int) -> None:
        """Let the adaptive weight decay look at one validation batch, if it is due."""
        if self.decay is None or not self.decay.due(step):
            return
        self.forward.train(False)
        if self.members == 1:
            named = dict(self.model.named_parameters())
            leaves = [named[slot.name] for slot in self.slots]
        else:
            leaves = [self.blocks[slot.name] for slot in self.slots]
        rows = self.objective.rows(self.outputs(x), y)
        gradients = torch.autograd.grad(mean_over(rows, weights).sum(), leaves)
        if self.members == 1:
            gradients = [g.unsqueeze(0) for g in gradients]
        self.decay.adapt_(gradients)

    # ---- reading

    @torch.no_grad()
    def row_losses(self, x: Tensor, y: Tensor, *, batch: int = 4096) -> Tensor:
        """(members, rows) losses in evaluation mode."""
        self.forward.train(False)
        parts = zip(x.split(batch), y.split(batch))
        return torch.cat([self.objective.rows(self.outputs(a), b) for a, b in parts], dim=1)

    def fail(self, member: int, why: str) -> None:
        """Take a diverged member out: its weights and state become zero and stay so."""
        self.failed[member] = why
        state = self.optimizer.state[self.handle]
        flats = [self.flat, *(v for v in state.values() if torch.is_tensor(v) and v.ndim)]
        for flat in flats:
            for block in self.views(flat.detach()):
                block[member] = 0
        self.settings.lr[member] = 0
        if self.members > 1:
            for block in self.views(self.rate):
                block[member] = 0

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on; every tensor has the member axis first."""
        rows = {"weights": self.flat}
        for name, value in self.optimizer.state[self.handle].items():
            if torch.is_tensor(value) and value.ndim:
                rows[f"optimizer.{name}"] = value
            elif torch.is_tensor(value):
                rows[f"counter.{name}"] = value
        found = {}
        for name, value in rows.items():
            if name.startswith("counter."):
                found[name] = value.detach().reshape(1).repeat(self.members)
            else:
                parts = [b.flatten(1) for b in self.views(value.detach())]
                found[name] = torch.cat(parts, dim=1)
        found |= {f"buffer.{name}": b.clone() for name, b in self.buffers.items()}
        return found | (self.decay.state() if self.decay is not None else {})

    def load(self, state: Blocks) -> None:
        """Continue from `state()` of a population with the same architecture."""
        memory: dict[str, Any] = self.optimizer.state[self.handle]
        sizes = [math.prod(shape) for shape in self.shapes]
        for name, value in state.items():
            kind, _, rest = name.partition(".")
            if kind == "counter":
                memory[rest] = value[0].clone()
            elif kind == "buffer" and not rest.endswith("rate"):
                self.buffers[rest].copy_(value)
            elif kind in ("weights", "optimizer"):
                flat = self.flat if kind == "weights" else torch.zeros_like(self.flat)
                for view, part in zip(self.views(flat), value.split(sizes, dim=1)):
                    view.copy_(part.view_as(view))
                if kind == "optimizer":
                    memory[rest] = flat
        if self.decay is not None:
            self.decay.load(dict(state))

    def state_dict_of(self, member: int) -> dict[str, Tensor]:
        """One member as the state dict of its module."""
        tensors = {**self.blocks, **self.buffers}
        return {name: block.detach()[member].clone() for name, block in tensors.items()}
