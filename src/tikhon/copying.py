"""Copy models, including those that keep tensors of a forward pass; build them afresh."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from functools import update_wrapper
from types import CellType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tikhon.data.forward import call_model
from tikhon.data.nested import tensors
from tikhon.errors import InputError

_MAX_NODES = 200_000  # graph nodes visited at most
T = TypeVar("T")


class FreshModels:
    """`build_model`, each of whose models begins in its initial state.

    A model that reuses tensors of the first one is copied with the values that these began with:
    otherwise it would continue training the weights of the one before. Lazy layers are
    initialised by `example`, some rows of inputs.

    Raises `InputError` for anything but a function or class that builds modules, and for tensors
    of a later model that are reused, as their initial state is unknown.

    >>> layer = nn.Linear(2, 2)
    >>> build = FreshModels(lambda: layer)
    >>> build() is layer, build() is layer
    (True, False)
    """

    def __init__(self, build_model: Callable[..., nn.Module], example: object = None) -> None:
        if isinstance(build_model, nn.Module):
            raise InputError(
                f"build_model must build a fresh model each time it is called, received a model "
                f"({type(build_model).__name__}): give lambda: copy.deepcopy(model)"
            )
        if not callable(build_model):
            raise InputError(
                f"build_model must be a function or a class, received {build_model!r}"
            )
        self.build_model, self.example = build_model, example
        self._reset_seen_tensors()

    def __call__(self, *arguments: object, **named: object) -> nn.Module:
        """Build a model."""
        model = self.build_model(*arguments, **named)
        if not isinstance(model, nn.Module):
            returned = "None: is a return missing?" if model is None else repr(model)
            raise InputError(f"build_model must return a torch module, it returned {returned}")
        if any(map(nn.parameter.is_lazy, _own_tensors(model))):
            with torch.no_grad():
                call_model(model.eval(), self.example)
            model.train()
        return self._with_initial_values(model)

    def _with_initial_values(self, model: nn.Module) -> nn.Module:
        own = _own_tensors(model)
        if self._first_model is None:
            self._first_model = model  # a reference, so that ids of its tensors are not reused
            self._initial_values = {id(t): t.detach().clone() for t in own}
            return model
        if any(self._later_tensors.get(id(tensor)) is tensor for tensor in own):
            raise InputError(
                "build_model returned parameters of an earlier model again, so that one would go "
                "on training those of the other: build a fresh model, or return "
                "copy.deepcopy(model)"
            )
        if not any(id(tensor) in self._initial_values for tensor in own):
            self._later_tensors.update((id(tensor), tensor) for tensor in own)
            return model
        fresh = copy_with_model(model, model)
        with torch.no_grad():
            for given, copied in zip(own, _own_tensors(fresh), strict=True):
                if id(given) in self._initial_values:
                    copied.copy_(self._initial_values[id(given)])
        return fresh

    def _reset_seen_tensors(self) -> None:
        self._first_model: nn.Module | None = None
        self._initial_values: dict[int, Tensor] = {}  # initial values of the first model's tensors
        self._later_tensors = weakref.WeakValueDictionary[int, Tensor]()  # tensors of later models

    def __getstate__(self) -> dict[str, object]:
        return {"build_model": self.build_model, "example": self.example}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._reset_seen_tensors()


def _own_tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def copy_with_model(model: nn.Module, value: T) -> T:
    """Deep-copy `value`, which holds `model`, where `copy.deepcopy` fails or is wrong.

    Non-leaf tensors kept as attributes (weights computed by `torch.nn.utils.prune`, attention
    maps, the last hidden state) are copied by value without their graph, which `copy.deepcopy`
    refuses. One computed from a parameter that the model does not have (`self.w =
    nn.Parameter(...) * 0.1`) requires a gradient. Functions kept by a module (`self.mlpf = lambda
    x: m.c_proj(m.c_fc(x))`) call the layers of the copy, also in further copies; `copy.deepcopy`
    keeps the original layers.

    >>> import torch
    >>> from torch.nn.utils import prune
    >>> layer = prune.l1_unstructured(nn.Linear(2, 2), "weight", amount=2)
    >>> torch.equal(copy_with_model(layer, layer).weight, layer.weight)
    True
    """
    stored = (t for m in model.modules() for t in tensors(list(vars(m).values())))
    own = {id(p) for p in model.parameters()}
    memo: dict[int, object] = {
        id(t): t.detach().clone().requires_grad_(_depends_on_unregistered(t, own))
        for t in stored
        if not t.is_leaf
    }
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a scripted one has no copy that trains: give the module it was made from")
    copied = copy.deepcopy(value, memo)
    for module in model.modules():
        if isinstance(other := memo.get(id(module)), nn.Module):
            for container, key, function in _stored_functions(vars(other)):
                if names := [
                    n for n, v in _referenced_objects(function).items() if _holds_copied(v, memo)
                ]:
                    container[key] = Closure(function, names, memo)
    return copied


class Closure:
    """A function that calls layers of its model, and in a copy those of the copy."""

    def __init__(self, function: FunctionType, names: list[str], memo: dict[int, Any]) -> None:
        self.names = names  # names of the model's own objects
        self.function = _rebind_function(function, names, memo)
        update_wrapper(self, self.function)  # for its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Closure:
        return Closure(self.function, self.names, memo)


def _stored_functions(space: dict[str, Any]) -> Iterator[tuple[Any, Any, FunctionType]]:
    """Yield the functions in a module's attributes, and in lists and dictionaries there."""
    for container in (space, *[v for v in space.values() if isinstance(v, dict | list)]):
        pairs = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in list(pairs):
            if isinstance(value, FunctionType):
                yield container, key, value


def _referenced_objects(function: FunctionType) -> dict[str, Any]:
    """Return the objects a function refers to: closure, defaults and globals."""
    code, space = function.__code__, function.__globals__
    named = {name: space[name] for name in code.co_names if name in space}
    named |= {str(place): value for place, value in enumerate(function.__defaults__ or ())}
    for name, cell in zip(code.co_freevars, function.__closure__ or ()):
        if cell != CellType():
            named[name] = cell.cell_contents
    return named


def _holds_copied(value: object, memo: dict[int, Any]) -> bool:
    """Return whether a value is a copied layer or parameter, or a container of one."""
    parts = [value]
    if isinstance(value, dict | list | tuple):
        parts = list(value.values() if isinstance(value, dict) else value)
    return any(isinstance(v, nn.Module | nn.Parameter) and id(v) in memo for v in parts)


def _rebind_function(
    function: FunctionType, names: list[str], memo: dict[int, Any]
) -> FunctionType:
    """Return the function with copies of the objects of these names."""
    objects = _referenced_objects(function)
    own = {name: copy.deepcopy(objects[name], memo) for name in names}
    code, cells = function.__code__, function.__closure__ or ()
    closure = [CellType(own[n]) if n in own else c for n, c in zip(code.co_freevars, cells)]
    defaults = tuple(own.get(str(k), v) for k, v in enumerate(function.__defaults__ or ()))
    named = {n: v for n, v in own.items() if n in code.co_names}
    space = {**function.__globals__, **named} if named else function.__globals__
    made = FunctionType(code, space, function.__name__, defaults, tuple(closure))
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def gradient_leaves(value: Tensor) -> list[Tensor]:
    """Return the tensors in which a backward pass would accumulate gradients."""
    found: list[Tensor] = []
    seen: set[object] = set()
    todo = [value.grad_fn] if value.grad_fn is not None else []
    while todo and len(seen) < _MAX_NODES:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found.append(leaf)
        todo += [following for following, _ in node.next_functions]
    return found


def _depends_on_unregistered(value: Tensor, own: set[int]) -> bool:
    """Return whether a tensor depends on parameters, but on none of the model's."""
    found = gradient_leaves(value)
    has_parameters = any(isinstance(t, nn.Parameter) for t in found)
    return has_parameters and not any(id(t) in own for t in found)
