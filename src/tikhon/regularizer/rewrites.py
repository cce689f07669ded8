"""Detect loops that set weights again after `optimizer.step()`, which undoes penalties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from tikhon.penalties.base import upcast
from tikhon.penalties.elementwise import L2
from tikhon.regularizer.plan import DeferredFlag
from tikhon.regularizer.targets import is_lazy, local
from tikhon.regularizer.terms import Binding

_CHECKED = {1, 2, 10, 11, 100, 101, 1000, 1001}  # steps compared with the start of the next
_PREDICTED = 5  # edits once an epoch whose next one is predicted, and compared
_SAMPLE_SIZE = 4096  # entries of a parameter
_FEW = 8  # entries compared in every step, in the first steps
_SAMPLED_STEPS = 2000
_RESTORED = 0.1  # of a change of the norm: what may be left when it has been undone
_CHANGED = 1e-5  # relative change of a norm that counts
Found = tuple[str, str]  # name of a term, and what it loses


class RewriteDetector:
    """Detect zeros, bounds and decay that are lost between two steps.

    So by clipping, renormalising, or copying an average into the model after each step. Changes
    that keep them (masks, a stricter bound) do not count, nor does a single one (a checkpoint).
    In other than a few steps nothing is read, and on a device nothing waits. Edits once an epoch
    are noticed by the version of a parameter, or in the first steps on a CPU by a few weights (for
    those through `param.data`), and the next one is expected as much later.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._checked = set(_CHECKED)
        # a parameter at the last step's end: its version and some of its weights
        self._state: tuple[Tensor, int, Tensor | None] | None = None
        self._few: Tensor | None = None  # a view of some weights of that parameter
        self._last_edit = 1  # the step before which it was edited last
        self._norms: dict[Binding, Tensor] = {}  # at the start of the step
        self._recorded: list[tuple[Binding, str, Tensor]] = []  # at its end
        self._flags: list[tuple[Found, Tensor | DeferredFlag]] = []
        self._losses: Counter[Found] = Counter()

    def begin(self, bindings: Sequence[Binding]) -> Found | None:
        """Note a step's start; return a term whose effect was lost twice, and what it loses."""
        self._steps += 1
        self._predict_edit()
        if self._steps in self._checked:
            self._norms = {b: _norm(b) for b in bindings if _decays(b) and _is_readable(b)}
        if not (self._flags or self._recorded):
            return None
        self._losses.update(found for found, flag in self._flags if flag)
        self._flags = [
            ((b.name, what), _later(_is_lost(b, what, w))) for b, what, w in self._recorded
        ]
        self._recorded = []
        return next((found for found, count in self._losses.items() if count > 1), None)

    def _predict_edit(self) -> None:
        """Check the next edit too, if the weights were edited since the last step."""
        if self._state is None:
            return
        param, version, sample = self._state
        if param._version == version and self._is_same(param, sample):
            return
        spacing, self._last_edit = self._steps - self._last_edit, self._steps
        if spacing > 1 and not self.is_done:
            self._checked.add(self._steps + spacing - 1)

    def end(self, bindings: Sequence[Binding]) -> None:
        """Note its end."""
        if bindings:
            param = bindings[0].target.params[0]
            is_sampled = param.is_cpu and self._steps < _SAMPLED_STEPS and not is_lazy(param)
            sample = self._view_few(param).clone() if is_sampled else None
            self._state = param, param._version, sample
        if self._steps not in self._checked:
            return
        for binding in filter(_is_readable, bindings):
            if binding.base.constraint:
                self._recorded.append((binding, "bound", binding.base.value(binding.read())))
            elif binding.route == "prox":
                self._recorded.append((binding, "zeros", _sample(binding) == 0))
            elif binding in self._norms:
                norms = torch.stack([self._norms[binding], _norm(binding)])
                self._recorded.append((binding, "decay", norms))
        self._norms = {}

    def _is_same(self, param: Tensor, sample: Tensor | None) -> bool:
        """Return whether a few weights are still the same, as far as can be read at no cost."""
        if sample is None or not param.is_cpu:
            return True
        now = self._view_few(param)
        return now.dtype == sample.dtype and torch.equal(now, sample)

    def _view_few(self, param: Tensor) -> Tensor:
        """Return a few weights, spread over the parameter: a view, renewed when they move."""
        weights = local(param)
        if self._few is None or self._few.data_ptr() != weights.data_ptr():
            flat = weights.view(-1) if weights.is_contiguous() else weights[0].flatten()
            self._few = flat[:: max(1, flat.numel() // _FEW)]
        return self._few

    @property
    def is_done(self) -> bool:
        """Whether enough steps have been checked."""
        return len(self._checked) >= len(_CHECKED) + _PREDICTED and self._steps > (
            max(self._checked) + 1
        )


def _is_lost(binding: Binding, what: str, recorded: Tensor) -> Tensor:
    """Return whether a bound, zeros or decay at the end of a step are gone, 0-d."""
    if what == "bound":
        return (recorded == 0) & (binding.base.value(binding.read()) > 0)
    if what == "zeros":
        now = _sample(binding)  # of another shape if the parameter's data were replaced
        return (recorded & (now != 0)).any() if now.shape == recorded.shape else now.new_zeros(())
    start, end = recorded
    change = (end - start).abs()
    restored = (_norm(binding) - start).abs() <= _RESTORED * change
    return restored & (change > _CHANGED * start)


def _later(flag: Tensor) -> Tensor | DeferredFlag:
    return flag if flag.is_cpu else DeferredFlag(flag)


def _decays(binding: Binding) -> bool:
    return isinstance(binding.base, L2) and binding.base.center is None


def _is_readable(binding: Binding) -> bool:
    """Return whether a term acts on weights that may be read now."""
    (param, *_) = binding.target.params
    if not binding.is_active or is_lazy(param) or param.is_meta:
        return False
    return not (param.is_cuda and torch.cuda.is_current_stream_capturing())


def _norm(binding: Binding) -> Tensor:
    norms = [upcast(local(param)).norm().double() for param in binding.target.params]
    return torch.stack(norms).norm()


def _sample(binding: Binding) -> Tensor:
    weights = [local(param).flatten() for param in binding.target.params]
    return torch.cat([w[:: max(1, w.numel() // _SAMPLE_SIZE)].clone() for w in weights])
