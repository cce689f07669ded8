"""When: penalties on the user's own optimizer, through its step hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn, optim

from tikhon.assignments import Audit, assign
from tikhon.metric import stationary_gain
from tikhon.penalties.elementwise import L2
from tikhon.strengths.controllers import Controller
from tikhon.targets import local, slots, unwrap
from tikhon.terms import Binding, How, Terms, bind, warn_of_contradictions

_LOW = (torch.float16, torch.bfloat16)


def regularize(
    model: nn.Module, optimizer: optim.Optimizer, terms: Terms, *, how: How = "objective"
) -> Regularizer:
    """Put penalties and constraints on the weights that `optimizer` trains; your loop stays.

    `how="objective"` minimises exactly `loss + strength * penalty`: by gradient for smooth
    penalties, otherwise by prox in the optimizer's own metric, which leaves exact zeros.
    `how="decoupled"` moves by `lr * strength` outside the metric, as AdamW decays weights.

    Args:
        model: the module; wrappers (DistributedDataParallel, torch.compile) are looked through.
        optimizer: any torch optimizer; wrappers such as Accelerate's are looked through.
        terms: a penalty for all weights, or a dict from patterns (see `select`) to a penalty, a
            `Term` or a list of these. Every matching term applies.
        how: the mode of terms that do not name their own.

    Raises ValueError for a pattern without match, two prox terms on one parameter, or when the
    optimizer holds none of the parameters; TypeError where the optimizer cannot do it exactly.

    >>> model = nn.Linear(3, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    >>> reg = tk.regularize(model, optimizer, tk.L1(10.0))
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(8, 3)).square().mean().backward()
    ...     optimizer.step()
    >>> reg.sparsity()
    {'weight': 1.0}
    """
    return Regularizer(model, optimizer, terms, how=how)


class Regularizer:
    """Penalties attached to an optimizer; a handle, and a context manager that removes itself.

    The order within a step: penalty gradients (after the user's own clipping), decoupled smooth
    decay, the optimizer's step, prox, constraints, controllers. After the step `.grad` is what the
    user's backward left there. A parameter whose `.grad` is None is left alone, as weight_decay
    leaves it alone.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        terms: Terms,
        *,
        how: How = "objective",
    ) -> None:
        self.model = unwrap(model)
        self.terms = terms
        self.how: How = how
        self.steps = 0
        self._bindings: list[Binding] = bind(self.model, slots(self.model), terms, how)
        self._gradients: dict[nn.Parameter, Tensor] = {}  # what the user's backward left
        self._residuals: dict[str, Tensor] = {}  # what rounding to 16 bits has lost
        self._handles: list[Any] = []
        self.attach(optimizer)

    # -- the handle ---------------------------------------------------------------------------

    def attach(self, optimizer: optim.Optimizer) -> None:
        """Move to `optimizer`; its copies by deepcopy or pickle have lost the hooks."""
        self.remove()
        while isinstance(inner := getattr(optimizer, "optimizer", None), optim.Optimizer):
            optimizer = inner  # Accelerate's and Lightning's wrappers
        self.optimizer = optimizer
        self._index_groups()
        if not any(self._held(binding) for binding in self._bindings):
            names = ", ".join(binding.target.name for binding in self._bindings[:5])
            raise ValueError(
                f"the optimizer holds none of the matched parameters ({names}, ...); give it "
                f"parameters of this model, or attach to the optimizer that trains them"
            )
        warn_of_contradictions(self._bindings, lambda p: self._group(p).get("weight_decay", 0))
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Detach from the optimizer; weights and the optimizer stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Regularizer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    # -- reading ------------------------------------------------------------------------------

    @torch.no_grad()
    def value(self) -> Tensor:
        """Sum of all penalties at the present weights, a detached 0-d tensor."""
        values = [b.penalty.value(b.read()) for b in self._bindings if not b.base.constraint]
        return sum(values, torch.zeros(()))

    @torch.no_grad()
    def sparsity(self) -> dict[str, float]:
        """Share of exact zeros in each regularized parameter."""
        params = {b.target.name: b.target.params for b in self._bindings}
        return {
            name: 1 - sum(int(p.count_nonzero()) for p in group) / sum(p.numel() for p in group)
            for name, group in params.items()
        }

    @torch.no_grad()
    def measure(self) -> dict[str, dict[str, float]]:
        """Value, strength and share of exact zeros of every term on every parameter, for logs."""
        found = {}
        for binding in self._bindings:
            w, penalty = binding.read(), binding.penalty
            value = 0.0 if binding.base.constraint else float(penalty.value(w))
            zeros = 1 - int(w.count_nonzero()) / max(1, w.numel())
            found[binding.name] = {
                "value": value,
                "strength": float(binding.dial.value),
                "zeros": zeros,
            }
        return found

    def audit(self) -> Audit:
        """Who gets what: every parameter, its terms, mode, strength now, and why excluded."""
        return assign(self.model, slots(self.model), self._bindings, self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Steps, strengths and what controllers remember, by parameter name."""
        dials = {b.dial.name: b.dial for b in self._bindings}
        return {
            "schema_version": 1,
            "steps": self.steps,
            "strengths": {name: dial.value for name, dial in dials.items()},
            "memory": {name: dict(dial.memory) for name, dial in dials.items()},
            "residuals": {name: part.clone() for name, part in self._residuals.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the `state_dict` was taken; the terms must have the same names."""
        dials = {b.dial.name: b.dial for b in self._bindings}
        if set(dials) != set(state["strengths"]):
            raise ValueError(
                f"the state is of other terms: it has {sorted(state['strengths'])}, this "
                f"Regularizer has {sorted(dials)}; build it with the same terms first"
            )
        self.steps = state["steps"]
        for name, dial in dials.items():
            dial.memory = dict(state["memory"][name])
            if isinstance(dial.source, Controller):
                dial.set(state["strengths"][name])
            else:
                dial.turn(self.steps)
        self._residuals = {name: part.clone() for name, part in state["residuals"].items()}

    # -- one step -----------------------------------------------------------------------------

    def _before(self, optimizer: optim.Optimizer, args: Any, kwargs: Any) -> Any:
        if self._signature != _signature(optimizer):
            self._index_groups()
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            self._add_gradients()
            self._decay()
            return None
        return (args[0], self._wrap(closure)), {k: v for k, v in kwargs.items() if k != "closure"}

    def _wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure with the penalty's gradients: it may zero what a pre-hook has added."""
        decayed = False

        def evaluate() -> Any:
            nonlocal decayed
            self._restore_gradients()
            loss = closure()
            self._add_gradients()
            if not decayed:
                self._decay()
                decayed = True
            return loss

        return evaluate

    @torch.no_grad()
    def _add_gradients(self) -> None:
        scale = getattr(self.optimizer, "grad_scale", None)  # fused optimizers unscale inside
        for binding in self._of("gradient"):
            sign = -1 if self._group(binding.target.params[0]).get("maximize") else 1
            factor = sign if scale is None else sign * scale
            params = binding.target.params
            totals = [self._user_gradient(p, binding) for p in params]
            if _is_plain_decay(binding):
                amount = factor * binding.dial.value
                if isinstance(amount, Tensor):
                    total = totals[0] + amount * params[0].detach()
                else:
                    total = torch.add(totals[0], params[0].detach(), alpha=amount)
                params[0].grad = total
                continue
            grad = binding.penalty.grad(binding.read()) * factor
            totals = [total.clone() for total in totals]
            if binding.whole:
                local(totals[0]).add_(grad)
            else:
                binding.target.place_(totals, binding.target.arrange(totals) + grad)
            for param, total in zip(params, totals):
                param.grad = total

    def _user_gradient(self, param: nn.Parameter, binding: Binding) -> Tensor:
        grad = param.grad
        assert grad is not None
        if grad.is_sparse:
            raise TypeError(
                f"{binding.name} adds a gradient to {binding.target.name!r}, whose gradient is "
                f'sparse; use how="decoupled" or Embedding(sparse=False)'
            )
        self._gradients.setdefault(param, grad)
        return grad

    def _restore_gradients(self) -> None:
        for param, grad in self._gradients.items():
            param.grad = grad
        self._gradients.clear()

    @torch.no_grad()
    def _decay(self) -> None:
        skip = getattr(self.optimizer, "found_inf", None)
        for binding in self._of("decay"):
            lr = self._group(binding.target.params[0])["lr"]
            if skip is not None:
                lr = lr * (1 - skip)
            w = self._read(binding)
            if _is_plain_decay(binding):
                if w.dtype == binding.target.params[0].dtype and binding.whole:
                    w.mul_(1 - lr * binding.dial.value)
                    continue
                new = w * (1 - lr * binding.dial.value)
            else:
                new = w - lr * binding.penalty.grad(w)
            self._write(binding, new)

    @torch.no_grad()
    def _after(self, optimizer: optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._restore_gradients()
        skip = getattr(optimizer, "found_inf", None)
        for route in ("prox", "project"):
            for binding in self._of(route):
                w = self._read(binding)
                new = binding.penalty.prox(w, self._step_size(binding))  # type: ignore[attr-defined]
                self._write(binding, new if skip is None else torch.where(skip.bool(), w, new))
        self.steps += 1
        for dial in {id(b.dial): b.dial for b in self._bindings}.values():
            dial.turn(self.steps)

    # -- one binding --------------------------------------------------------------------------

    def _of(self, route: str) -> Iterable[Binding]:
        """Bindings of a route that act in this step: trained here, with a gradient, not at 0."""
        for binding in self._bindings:
            if binding.route != route or not self._held(binding):
                continue
            off = isinstance(binding.dial.value, float | int) and binding.dial.value == 0
            if (off and route != "project") or any(p.grad is None for p in binding.target.params):
                continue
            yield binding

    def _step_size(self, binding: Binding) -> float | Tensor:
        if binding.how == "decoupled" or binding.base.constraint:
            return self._group(binding.target.params[0])["lr"]
        gains = []
        for param in binding.target.params:
            gain = stationary_gain(self.optimizer, self._group(param), self.optimizer.state[param])
            gains.append(gain.dense())
        if len(gains) == 1 and not (isinstance(gains[0], Tensor) and gains[0].ndim):
            return gains[0]
        full = [
            g if isinstance(g, Tensor) and g.ndim else torch.full_like(local(p), g)
            for g, p in zip(gains, binding.target.params)
        ]
        return binding.arrange(full)

    def _read(self, binding: Binding) -> Tensor:
        """The weights as the penalty sees them, in float32 with what rounding has lost."""
        params = binding.target.params
        if params[0].dtype not in _LOW:
            return binding.read()
        names = self._residual_names(binding)
        return binding.arrange(
            [local(p).float() + self._residuals.get(n, 0.0) for n, p in zip(names, params)]
        )

    def _write(self, binding: Binding, w: Tensor) -> None:
        params = binding.target.params
        if params[0].dtype not in _LOW:
            if binding.whole:
                local(params[0]).copy_(w)
            else:
                binding.target.write_(w)
            return
        exact = [local(p).float() for p in params]
        if binding.whole:
            exact[0] = w
        else:
            binding.target.place_(exact, w)
        for name, param, value in zip(self._residual_names(binding), params, exact):
            local(param).copy_(value)
            self._residuals[name] = value - local(param).float()

    def _residual_names(self, binding: Binding) -> list[str]:
        return binding.target.name.split("+")

    # -- the optimizer's groups ---------------------------------------------------------------

    def _index_groups(self) -> None:
        groups = self.optimizer.param_groups
        self._signature = _signature(self.optimizer)
        self._group_index = {id(p): i for i, g in enumerate(groups) for p in g["params"]}

    def _held(self, binding: Binding) -> bool:
        return all(id(param) in self._group_index for param in binding.target.params)

    def _group(self, param: nn.Parameter) -> dict[str, Any]:
        index = self._group_index.get(id(param))
        return {} if index is None else self.optimizer.param_groups[index]


def _signature(optimizer: optim.Optimizer) -> tuple[int, ...]:
    return tuple(len(group["params"]) for group in optimizer.param_groups)


def _is_plain_decay(binding: Binding) -> bool:
    base = binding.base
    return type(base) is L2 and base.center is None and base.weights is None
