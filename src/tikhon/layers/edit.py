"""Insert noise into an existing model, with an exact undo."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tikhon.arguments import is_one_of
from tikhon.errors import describe, unknown_name
from tikhon.layers import attention, dropout, recurrent, structured
from tikhon.layers.learned import VariationalDropout
from tikhon.layers.masks import check_rate
from tikhon.layers.noise import NoiseLayer
from tikhon.layers.paths import Pattern, matches, pattern_name
from tikhon.layers.sources import noise_sources
from tikhon.layers.weights import _WeightNoise
from tikhon.wrappers import named_modules

T = TypeVar("T")
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
COUNTERPARTS: dict[type[nn.Module], type[NoiseLayer]] = {
    nn.Dropout: dropout.Dropout,
    nn.Dropout1d: structured.Dropout1d,
    nn.Dropout2d: structured.Dropout2d,
    nn.Dropout3d: structured.Dropout3d,
    nn.AlphaDropout: dropout.AlphaDropout,
    nn.FeatureAlphaDropout: dropout.FeatureAlphaDropout,
}
CHILD_NAMES = {"after": "noise_after", "before": "noise_before"}


class Edit:
    """A change of a model that can be undone; also a context manager.

    `paths` are the new layers, for `set_rate`.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._steps: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Restore the model exactly: modules, classes, attributes, hooks and state-dict keys."""
        while self._steps:
            self._steps.pop()()

    def __enter__(self) -> Edit:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Edit({', '.join(self.paths)})"


def insert_dropout(
    model: nn.Module, layers: Mapping[Pattern, NoiseLayer], *, where: str = "after"
) -> Edit:
    """Put a copy of a noise layer after, or before, every module that a pattern matches.

    `layers` maps patterns to layers, `where` is "after" or "before". A pattern is a shell glob on
    module paths or a module type; of nested modules that match a glob the outermost is used, and
    containers (Sequential, ...) only through their children. The layer becomes a child of the
    module, `<path>.noise_after`, called by a hook: no parameter changes its name, and old
    checkpoints load under `strict=True`. For a tuple output (LSTM, attention) the first tensor
    gets the noise. Raises ValueError, without any change, for a pattern that matches nothing and
    for a place that already has noise.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> edit = insert_dropout(model, {"0": dropout.Dropout(0.2)})
    >>> edit.paths, [name for name, _ in model.named_parameters()][0]
    (['0.noise_after'], '0.weight')
    >>> edit.undo()
    """
    if not is_one_of(where, tuple(CHILD_NAMES)):
        raise ValueError(unknown_name("place", where, CHILD_NAMES))
    places = {}
    for pattern, layer in _mapping("insert_dropout", layers).items():
        if isinstance(layer, (_WeightNoise, VariationalDropout, recurrent._RecurrentNoise)):
            name = type(layer).__name__
            raise TypeError(
                f"{name} takes a module: assign it, as in model.fc1 = {name}(model.fc1, 0.2)"
            )
        _check(layer, pattern)
        for path, module in _places(model, pattern):
            if path in places or hasattr(module, CHILD_NAMES[where]):
                has = getattr(module, CHILD_NAMES[where], None) or places[path][1]
                raise ValueError(
                    f"{path} already has noise {where} it, {has}: set_rate changes its rate, "
                    "undo() of the first edit removes it"
                )
            places[path] = (module, layer)
    edit = Edit()
    for path, (module, layer) in places.items():
        _insert(edit, path, module, layer, where)
    return edit


def replace_dropout(
    model: nn.Module, layers: Mapping[Pattern, NoiseLayer | None] | None = None
) -> Edit:
    """Turn fixed dropout into layers whose rate moves, at the same rates, in place.

    Without `layers` all of torch's dropout modules, `DropPath`/`StochasticDepth` modules of timm
    and torchvision, and the float rates of MultiheadAttention, LSTM, GRU and RNN are replaced;
    those become children `attention_dropout` and `between_layers`. `layers` maps patterns on
    the sources' paths to the layer to use instead (None: the same kind at the same rate).
    Raises ValueError for a pattern that matches no replaceable source.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3))
    >>> replace_dropout(model).paths, model[1]
    (['1'], Dropout(rate=0.3))
    """
    sources = [(s.path, m) for s, m in noise_sources(model) if not s.moving]
    fixed = {path: (module, new) for path, module in sources if (new := _equivalent_layer(module))}
    chosen: dict[str, tuple[nn.Module, NoiseLayer]] = {}
    asked: Mapping[Pattern, NoiseLayer | None] = {"*": None} if layers is None else layers
    for pattern, layer in _mapping("replace_dropout", asked).items():
        found = [p for p, (m, _) in fixed.items() if matches(pattern, p, m)]
        if not found:
            if fixed:
                raise ValueError(unknown_name("fixed dropout", pattern_name(pattern), fixed))
            raise ValueError(
                f"{type(model).__name__} has no fixed dropout that can be replaced: see "
                "layers.audit"
            )
        for path in found:
            module, (kind, rate, options) = fixed[path]
            if layer is not None:
                _check(layer, pattern)
            else:
                check_rate(rate, f"{path} ({type(module).__name__})")
            new = kind(rate, **options) if layer is None else copy.deepcopy(layer)
            chosen[path] = (module, new)
    edit = Edit()
    for path, (module, new) in chosen.items():
        _replace(edit, model, path, module, new)
    return edit


def _mapping(verb: str, layers: Mapping[Pattern, T]) -> Mapping[Pattern, T]:
    if not isinstance(layers, Mapping):
        raise TypeError(
            f"{verb}: layers map patterns to noise layers, received {describe(layers)}"
        )
    return layers


def _check(layer: object, pattern: Pattern) -> None:
    name = pattern_name(pattern)
    if not isinstance(layer, NoiseLayer):
        raise TypeError(f"{name}: expected a layer of tikhon.layers, received {layer!r}")
    if "rate" in layer._buffers:
        where = f"{name} ({type(layer).__name__})"
        check_rate(layer.rate, where, upper=layer.upper, closed=layer.closed)


def _places(model: nn.Module, pattern: Pattern) -> list[tuple[str, nn.Module]]:
    modules = [(p, m) for p, m in named_modules(model) if p and not isinstance(m, NoiseLayer)]
    found = [(p, m) for p, m in modules if matches(pattern, p, m)]
    if not found:
        raise ValueError(unknown_name("module", pattern_name(pattern), [p for p, _ in modules]))
    places = [(p, m) for p, m in found if not isinstance(m, CONTAINERS)]
    if isinstance(pattern, str):
        paths = [p for p, _ in places]
        places = [(p, m) for p, m in places if not any(p.startswith(f"{q}.") for q in paths)]
    if not places:
        paths = ", ".join(p for p, _ in found)
        raise ValueError(f"{pattern} names only containers ({paths}): name their children")
    return places


def _insert(edit: Edit, path: str, module: nn.Module, layer: NoiseLayer, where: str) -> None:
    child = CHILD_NAMES[where]
    layer = copy.deepcopy(layer).train(module.training)
    layer.path = f"{path}.{child}"
    device = next((p.device for p in module.parameters()), None)
    module.add_module(child, layer.to(device) if device else layer)
    if where == "after":
        hook = module.register_forward_hook(_after)
    else:
        hook = module.register_forward_pre_hook(_before, with_kwargs=True)
    edit.paths.append(layer.path)
    edit._steps.append(hook.remove)
    edit._steps.append(lambda: delattr(module, child))


def _after(module: nn.Module, args: tuple, output: Any) -> object:
    layer: Any = module.noise_after
    if isinstance(output, Tensor):
        return layer(output)
    if type(output) is tuple and output and isinstance(output[0], Tensor):
        return (layer(output[0]), *output[1:])
    raise TypeError(
        f"{layer.label}: the module returns {type(output).__name__}; noise needs a tensor or a "
        "tuple that begins with one"
    )


def _before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    layer: Any = module.noise_before
    if args and isinstance(args[0], Tensor):
        return (layer(args[0]), *args[1:]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, name: layer(value)}
    raise TypeError(f"{layer.label}: the module is called without a tensor")


def _equivalent_layer(module: Any) -> tuple[Callable[..., NoiseLayer], float, dict] | None:
    """Return class, rate and options of the layer equivalent to `module`, or None."""
    name = type(module).__name__
    if isinstance(module, nn.modules.dropout._DropoutNd):
        for theirs, ours in COUNTERPARTS.items():
            if isinstance(module, theirs) and type(module).forward is theirs.forward:
                return ours, float(module.p), {"inplace": module.inplace}
        return None
    if type(module) in (nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN):
        return dropout.Dropout, float(module.dropout), {}
    if name == "StochasticDepth":
        return structured.DropPath, module.p, {"mode": module.mode}
    if name == "DropPath" and getattr(module, "scale_by_keep", True):
        return structured.DropPath, module.drop_prob, {}
    return None


def _replace(edit: Edit, model: nn.Module, path: str, module: nn.Module, new: NoiseLayer) -> None:
    new.train(module.training)
    if isinstance(module, nn.MultiheadAttention):
        _change_class(edit, module, attention.MultiheadAttention, "attention_dropout", new)
        new.path = f"{path}.attention_dropout"
    elif isinstance(module, nn.RNNBase):
        own = {nn.LSTM: recurrent.LSTM, nn.GRU: recurrent.GRU, nn.RNN: recurrent.RNN}
        _change_class(edit, module, own[type(module)], "between_layers", new)
        new.path = f"{path}.between_layers"
    else:
        new.path = path
        for parent in model.modules():
            for name, child in list(parent._modules.items()):
                if child is module:
                    setattr(parent, name, new)
                    edit._steps.append(lambda p=parent, n=name: setattr(p, n, module))
    edit.paths.append(new.path)


def _change_class(edit: Edit, module: Any, kind: type, child: str, new: NoiseLayer) -> None:
    """Change the class of `module` in place and add the noise as a child."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    before, rate = type(module), module.dropout
    module.__class__, module.dropout = kind, 0.0
    module.add_module(child, new.to(device))

    def undo() -> None:
        delattr(module, child)
        module.__class__, module.dropout = before, rate

    edit._steps.append(undo)
