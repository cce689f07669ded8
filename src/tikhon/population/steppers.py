"""Optimizer steps of members: on the module itself for one, on a flat buffer for many."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn, optim

from tikhon.errors import InputError
from tikhon.population.stack import Stack, column
from tikhon.regularizer.metric import rule_of, stationary_gain
from tikhon.regularizer.targets import Entry

Build = Callable[..., optim.Optimizer]
# a moment block, its lower bound for a given slope, and the members' rates
BoundedMoment = tuple[Tensor, Callable[[Tensor], Tensor], Tensor]

ELEMENTWISE = (optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad)


class Stepper(ABC):
    """The optimizer of a population, with learning rates for each member times a factor.

    `rates` maps parameter names to (members,) tensors; parameters with equal rates share a tensor.
    """

    optimizer: optim.Optimizer

    def __init__(
        self, stack: Stack, rates: Mapping[str, Tensor], decayed: Sequence[Entry]
    ) -> None:
        self.stack, self.rates, self.decayed = stack, rates, decayed
        self.distinct_rates = list({id(rate): rate for rate in rates.values()}.values())

    @abstractmethod
    def zero_grad(self) -> None:
        """Clear gradients before the backward pass."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Return writable gradient blocks after the backward pass."""

    @abstractmethod
    def leaves(self) -> list[Tensor]:
        """Return the tensors to differentiate by for gradients of the decayed weights."""

    @abstractmethod
    def step(self, factor: float) -> None:
        """Update every member."""

    @abstractmethod
    def handles(self) -> list[Tensor]:
        """Return the parameters held by the optimizer."""

    @abstractmethod
    def as_blocks(self, values: Sequence[Tensor | None]) -> list[Tensor]:
        """Convert one tensor for each handle to one block for each parameter."""

    @abstractmethod
    def as_handles(self, flat: Tensor) -> list[Tensor]:
        """Invert `as_blocks`, from a flat tensor."""

    def decay_(
        self, strengths: Tensor, factor: float, entries: Sequence[Entry] | None = None
    ) -> None:
        """Apply decoupled weight decay to all or some parameters; strengths: (members,)."""
        keep = {id(lr): 1 - lr.to(strengths) * factor * strengths for lr in self.distinct_rates}
        for entry in self.decayed if entries is None else entries:
            block = self.stack.blocks[entry.name].detach()
            block.mul_(column(keep[id(self.rates[entry.name])], block))

    def fail(self, member: int) -> None:
        """Freeze a member."""
        for lr in self.distinct_rates:
            lr[member] = 0

    def _build(self, build: Build, groups: Sequence[Sequence[Tensor]]) -> None:
        names = ", ".join(kind.__name__ for kind in ELEMENTWISE)
        try:
            kind = type(build([nn.Parameter(torch.zeros(1))], lr=1.0, weight_decay=0.0))
        except (TypeError, ValueError) as error:
            raise InputError(
                "each trial builds its optimizer by optimizer(params, lr=..., weight_decay=...), "
                f"which failed ({error}): give {names}, or a functools.partial of one"
            ) from error
        if kind not in ELEMENTWISE:
            raise InputError(
                f"{kind.__name__} does not act entry by entry, so it cannot train "
                f"a population: use one of {names}"
            )
        parameters = [{"params": list(group)} for group in groups if group]
        try:
            self.optimizer = build(parameters, lr=1.0, weight_decay=0.0, fused=True)
        except (TypeError, RuntimeError):
            self.optimizer = build(parameters, lr=1.0, weight_decay=0.0)

    def _gains(self) -> list[Tensor]:
        """Return the optimizer's gain for each handle."""
        found = {}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                gain = stationary_gain(self.optimizer, group, self.optimizer.state[p]).dense()
                found[id(p)] = torch.as_tensor(gain, dtype=p.dtype).expand_as(p)
        return [found[id(p)] for p in self.handles()]

    def bounded_moments(self, factor: float) -> dict[str, BoundedMoment] | None:
        """Return lower-bounded optimizer state by parameter; None before any state exists."""
        rule = rule_of(self.optimizer)
        if rule is None or rule.memory is None:
            return {}
        (group, *_), handles = self.optimizer.param_groups, self.handles()
        states = [self.optimizer.state.get(handle) for handle in handles]
        if not all(states):
            return None
        memories = [rule.memory(group, state) for state in states]
        extras = [memory.beyond for memory in memories]
        gain = stationary_gain(self.optimizer, group, states[0])
        own = factor * (gain.numerator / group["lr"] if group["lr"] else 1.0)
        blocks = self.as_blocks([m.tensor for m in memories])
        added = self.as_blocks(extras) if any(b is not None for b in extras) else blocks
        first = memories[0]

        def least(own: Tensor | None) -> Callable[[Tensor], Tensor]:
            return lambda slope: first._replace(beyond=own).least(slope)  # type: ignore[return-value]

        return {
            name: (block, least(more if first.beyond is not None else None), lr * own)
            for (name, lr), block, more in zip(self.rates.items(), blocks, added)
        }

    @abstractmethod
    def metric(self, factor: float) -> dict[str, Tensor]:
        """Return the optimizer's gain for each weight as blocks, including the learning rate."""

    def memory(self) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
        """Return the optimizer's state: blocks of all parameters, and counters."""
        states = [self.optimizer.state.get(handle, {}) for handle in self.handles()]
        tensors = {n: v for s in states for n, v in s.items() if torch.is_tensor(v)}
        counters = {n: v.detach() for n, v in tensors.items() if not v.ndim}
        blocks = {
            name: self.as_blocks([s.get(name) for s in states])
            for name in tensors
            if name not in counters
        }
        return blocks, counters

    def remember(self, state: Mapping[str, Tensor], counters: Mapping[str, Tensor]) -> None:
        """Restore `memory`, with blocks given as flat tensors."""
        for name, value in counters.items():
            for handle in self.handles():
                self.optimizer.state[handle][name] = value.clone()
        for name, flat in state.items():
            for handle, part in zip(self.handles(), self.as_handles(flat)):
                self.optimizer.state[handle][name] = part


class OwnStepper(Stepper):
    """A population of one, trained on the module's own parameters and gradients."""

    def __init__(
        self,
        model: nn.Module,
        stack: Stack,
        rates: Mapping[str, Tensor],
        decayed: Sequence[Entry],
        build: Build,
    ) -> None:
        super().__init__(stack, rates, decayed)
        stack.adopt_parameters(model)
        self.parameters = dict(model.named_parameters())
        self.trained = {n: p for n, p in self.parameters.items() if p.requires_grad}
        known = dict.fromkeys(entry.name for entry in decayed)
        parts = [list(known), [n for n in self.trained if n not in known]]
        cuts = [
            (part is parts[0], lr, [self.parameters[n] for n in part if rates[n] is lr])
            for lr in self.distinct_rates
            for part in parts
        ]
        self.groups = [(shrinks, lr) for shrinks, lr, group in cuts if group]
        self._build(build, [group for _, _, group in cuts])

    def zero_grad(self) -> None:
        """Clear the gradients, as `optimizer.zero_grad()`."""
        for parameter in self.trained.values():
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the module's parameters."""
        self._fill()
        return {n: p.grad.unsqueeze(0) for n, p in self.trained.items() if p.grad is not None}

    def _fill(self) -> None:
        """Fill missing gradients with zeros: the optimizer updates those too, as for many."""
        for parameter in self.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def leaves(self) -> list[Tensor]:
        """Return the module's parameters."""
        return [self.parameters[entry.name] for entry in self.decayed]

    def step(self, factor: float) -> None:
        """Take one optimizer step."""
        self._fill()
        for group, (_, lr) in zip(self.optimizer.param_groups, self.groups):
            group["lr"] = float(lr) * factor
        self.optimizer.step()

    def metric(self, factor: float) -> dict[str, Tensor]:
        """Return the gain of each parameter; it includes the optimizer's lr."""
        return dict(zip(self.stack.names, self.as_blocks(self._gains())))

    def handles(self) -> list[Tensor]:
        """Return the trained parameters."""
        return list(self.trained.values())

    def as_blocks(self, values: Sequence[Tensor | None]) -> list[Tensor]:
        """Return one tensor for each parameter; zeros for those not trained."""
        found = dict(zip(self.trained, values))
        pairs = [(found.get(n), shape) for n, shape in zip(self.stack.names, self.stack.shapes)]
        return [
            self.stack.flat.new_zeros(1, *shape) if value is None else value.detach().unsqueeze(0)
            for value, shape in pairs
        ]

    def as_handles(self, flat: Tensor) -> list[Tensor]:
        """Return the parts of trained parameters."""
        return [block[0] for name, block in self.stack.named(flat).items() if name in self.trained]

    def decay_(
        self, strengths: Tensor, factor: float, entries: Sequence[Entry] | None = None
    ) -> None:
        """Use torch's decoupled weight decay where available, if all parameters decay."""
        if entries is None and self.decayed and isinstance(self.optimizer, optim.AdamW):
            for group, (shrinks, _) in zip(self.optimizer.param_groups, self.groups):
                group["weight_decay"] = float(strengths) if shrinks else 0.0
        else:
            super().decay_(strengths, factor, entries)


class FlatStepper(Stepper):
    """Many members: an optimizer with lr 1 turns the flat gradient into updates."""

    def __init__(
        self, stack: Stack, rates: Mapping[str, Tensor], decayed: Sequence[Entry], build: Build
    ) -> None:
        super().__init__(stack, rates, decayed)
        self.move, self.gradient = torch.zeros_like(stack.flat), torch.zeros_like(stack.flat)
        self.grads = {
            n: g for n, g in stack.named(self.gradient).items() if stack.blocks[n].requires_grad
        }
        for name, grad in self.grads.items():
            stack.blocks[name].grad = grad
        self.handle = nn.Parameter(self.move)
        self.handle.grad = self.gradient
        views = stack.views(stack.flat)
        spread = (column(rates[n], v).expand_as(v).reshape(-1) for n, v in zip(stack.names, views))
        self.rate = torch.cat(list(spread))
        self._build(build, [[self.handle]])

    def zero_grad(self) -> None:
        """Zero the flat gradient, of which all gradients are views."""
        self.gradient.zero_()

    def gradients(self) -> dict[str, Tensor]:
        """Return views of the flat gradient."""
        return self.grads

    def leaves(self) -> list[Tensor]:
        """Return the blocks of all members."""
        return [self.stack.blocks[entry.name] for entry in self.decayed]

    def step(self, factor: float) -> None:
        """Scale each member's update by its learning rate."""
        self.move.zero_()
        self.optimizer.step()
        self.stack.flat.addcmul_(self.move, self.rate, value=factor)

    def metric(self, factor: float) -> dict[str, Tensor]:
        """Gain of the flat update times each member's learning rate."""
        (gain,) = self._gains()
        return self.stack.named(gain * self.rate * factor)

    def handles(self) -> list[Tensor]:
        """Return the flat update."""
        return [self.handle]

    def as_blocks(self, values: Sequence[Tensor | None]) -> list[Tensor]:
        """Return views of the flat tensor."""
        (flat,) = values
        assert flat is not None
        return self.stack.views(flat.detach())

    def as_handles(self, flat: Tensor) -> list[Tensor]:
        """Return the flat tensor itself."""
        return [flat]

    def fail(self, member: int) -> None:
        """Freeze a member."""
        super().fail(member)
        for block in self.stack.views(self.rate):
            block[member] = 0
