"""Where a penalty applies: patterns on parameter names, and rows of the weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tikhon.arguments import is_one_of
from tikhon.errors import unknown_name
from tikhon.regularizer.heads import head_rows
from tikhon.wrappers import named_modules, unwrap

ROWS = ("tensor", "out", "in", "filter", "channel", "head", "feature", "product")
ALL_PARAMETERS = "all"  # the pattern for every parameter
Pattern = str | type[nn.Module] | tuple["str | type[nn.Module]", ...]

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# words in parameter names that are not matrix factors, by kind
_KIND_WORDS = {
    "bias": {"bias", "biases"},
    "embedding": {"emb", "pos", "position", "positions", "positional", "rel", "relative"}
    | {"token", "tokens", "cls", "prompt", "prompts", "latent", "latents"},
    "normalisation scale": {"scale", "scales", "gamma", "gain"},
    "logarithm": {"log", "logs"},
}
# last word of the name of a matrix factor
_MATRIX_WORDS = {"weight", "weights", "kernel", "matrix", "proj", "projection"}


@dataclass(frozen=True)
class RowView:
    """Rows of a tensor: split dimension `split[0]` into `split[1]`, then put dims `lead` first."""

    lead: tuple[int, ...] = ()
    split: tuple[int, tuple[int, ...]] | None = None

    def of(self, w: Tensor) -> Tensor:
        """Return a matrix (rows, size); a view of `w` if its strides allow it."""
        w = self._lead_first(w)
        return w.reshape(prod(w.shape[: len(self.lead)]), -1) if w.numel() else w.reshape(0, 0)

    def write_(self, w: Tensor, rows: Tensor) -> None:
        """Invert `of`, in place."""
        w = self._lead_first(w)
        w.copy_(rows.reshape(w.shape))

    def _lead_first(self, w: Tensor) -> Tensor:
        if self.split:
            w = w.unflatten(*self.split)
        return w.movedim(self.lead, tuple(range(len(self.lead)))) if self.lead else w


@dataclass(frozen=True, eq=False)
class Target:
    """Parameters viewed by a penalty as one matrix, shape (rows, size).

    Several parameters (`rows="feature"`) are concatenated along rows. Sharded parameters (DTensor)
    are read locally.

    >>> fc = nn.Linear(3, 2)
    >>> select(fc, "weight", rows="in")[0].read().shape
    torch.Size([3, 2])
    """

    name: str
    params: tuple[nn.Parameter, ...]
    rows: str = "tensor"
    views: tuple[RowView, ...] = (RowView(),)
    padding: int | None = None  # padding row of an embedding, not a weight

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(self.name.split("+"))

    def read(self) -> Tensor:
        """Return the weights, shape (rows, size), without gradient."""
        return self.arrange(self.params)

    def write_(self, w: Tensor) -> None:
        """Set the weights from a matrix as returned by `read`."""
        self.place_(self.params, w)

    def place_(self, tensors: Sequence[Tensor], w: Tensor) -> None:
        """Set tensors of the parameters' shapes from such a matrix; inverts `arrange`."""
        sizes = [local(t).numel() // max(1, w.shape[0]) for t in tensors]
        for tensor, view, part in zip(tensors, self.views, w.split(sizes, dim=1)):
            view.write_(local(tensor), part)

    def arrange(self, tensors: Sequence[Tensor]) -> Tensor:
        """Arrange tensors of the parameters' shapes (gradients, steps) in the same rows."""
        parts = [view.of(local(t)) for view, t in zip(self.views, tensors)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@dataclass(frozen=True, eq=False)
class Product(Target):
    """Two factors viewed as the matrix `params[0] @ params[1]`.

    For LoRA pairs, a penalty on the product penalises the learned change however it is divided
    between the factors. It can be read and differentiated, not set.
    """

    @property
    def shape(self) -> torch.Size:
        """Shape of the product."""
        return torch.Size((self.params[0].shape[0], self.params[1].shape[1]))

    def arrange(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the product."""
        first, second = map(local, tensors)
        return first @ second

    def pull_back(self, gradient: Tensor) -> list[Tensor]:
        """Return the gradients of the factors from that of the product."""
        first, second = (local(param).to(gradient) for param in self.params)
        return [gradient @ second.mT, first.mT @ gradient]


@dataclass(frozen=True, eq=False)
class Entry:
    """One parameter with all its names, its shape (or ()), and why a glob excludes it (or "")."""

    names: tuple[str, ...]
    param: nn.Parameter
    shape: tuple[int, ...]
    owners: tuple[nn.Module, ...]
    excluded: str

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


def select(model: nn.Module, pattern: Pattern = "*", *, rows: str = "tensor") -> list[Target]:
    """Return the parameters that `pattern` matches, each viewed as rows.

    Args:
        model: the module; wrappers (DistributedDataParallel, torch.compile) are unwrapped.
        pattern: a shell glob on the names of parameters or submodules, a literal name of either,
            a module type, or a tuple of these. A glob covers weights with two or more dimensions,
            but no biases, normalisation scales or embeddings (nor tables of positions, tokens and
            logarithms, by their names); a literal name or module type overrides that. "all" is
            every parameter. Tied parameters count once; those shared with an embedding are matched
            only by name or by the embedding's type.
        rows: meaning of a row. "tensor": the whole tensor. "out"/"in": an output or input channel
            (dims 0 and 1; reversed for transposed convolutions). "filter" and "channel": the same
            for convolutions only. "head": an attention head. "feature": an input feature, across
            all matching parameters. "product": the product of two factors, `lora_B` and `lora_A`
            of each module or the two named ones.

    Raises ValueError for a pattern that matches nothing (with the closest names), for a
    parametrised weight, and for rows that a parameter does not have.

    >>> mlp = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> [target.name for target in select(mlp)]
    ['0.weight', '2.weight']
    >>> [target.read().shape for target in select(mlp, "2.weight", rows="out")]
    [torch.Size([2, 3])]
    """
    model = unwrap(model)
    return targets_of(match(model, entries_of(model), pattern), model, rows)


def is_distributed() -> bool:
    """Return whether this process is part of a distributed run."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def local(tensor: Tensor) -> Tensor:
    """Return the tensor without gradient, or this process's shard of a DTensor."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def all_reduce_sum(amount: Tensor, param: Tensor) -> Tensor:
    """Sum `amount` over the processes that hold shards of `param`, by one all-reduce."""
    for dimension, placement in enumerate(getattr(param, "placements", ())):
        if not placement.is_replicate():
            group = param.device_mesh.get_group(dimension)  # type: ignore[attr-defined]
            torch.distributed.all_reduce(amount, group=group)
    return amount


def is_lazy(param: Tensor) -> bool:
    """Return whether the parameter's shape is not yet known (lazy modules)."""
    return nn.parameter.is_lazy(param)


def shape_of(param: Tensor) -> tuple[int, ...]:
    """Return the parameter's shape, () if not yet known."""
    return () if is_lazy(param) else tuple(param.shape)


def entries_of(model: nn.Module) -> list[Entry]:
    """Return every parameter of the (unwrapped) model once, in order, with all its names."""
    found: dict[int, tuple[list[str], nn.Parameter, list[nn.Module]]] = {}
    for prefix, module in named_modules(model, remove_duplicate=False):
        for attribute, param in module.named_parameters(recurse=False):
            name = f"{prefix}.{attribute}" if prefix else attribute
            names, _, owners = found.setdefault(id(param), ([], param, []))
            names.append(name)
            owners.append(module)
    return [
        Entry(
            tuple(names),
            param,
            shape_of(param),
            tuple(owners),
            _exclusion_reason(names, param, owners),
        )
        for names, param, owners in found.values()
    ]


# reasons for excluding a parameter that is not a matrix factor
EXCLUSION_REASONS = (*_KIND_WORDS, "fewer than two dimensions", "one number a channel")


_CODES = "codes of a quantised weight"


def _exclusion_reason(names: list[str], param: nn.Parameter, owners: list[nn.Module]) -> str:
    real = param.is_floating_point() or param.is_complex()
    packed = hasattr(param, "__tensor_flatten__") and not hasattr(param, "to_local")
    if not real or param.dtype.itemsize == 1 or (packed and not param.requires_grad):
        return _CODES  # integers, floats of 8 bits, or a frozen tensor made of such
    for name, owner in zip(names, owners):
        attribute = name.rpartition(".")[2]
        if ".parametrizations." in f".{name}":
            return f"part of the parametrised {name.replace('parametrizations.', '', 1)}"
        if factored := _kind_of_factor(owner, attribute):
            return factored
        if kind := _kind_by_name(attribute, owner):
            return kind
        if isinstance(owner, NORMS):
            return "normalisation scale"
    if not is_lazy(param) and param.ndim < 2:
        return "fewer than two dimensions"
    if not is_lazy(param) and _is_scale(names, param, owners):
        return "one number a channel"
    return ""


def _kind_of(param: Tensor) -> str:
    packed = hasattr(param, "__tensor_flatten__")
    return type(param).__name__ if packed else str(param.dtype)


def _kind_by_name(attribute: str, owner: nn.Module) -> str:
    """Return the kind of a parameter that shifts, scales or is looked up, else ""."""
    words = [word for word in re.split(r"[_\d]+", attribute.lower()) if word]
    looked_up = hasattr(owner, "padding_idx") or hasattr(owner, "num_embeddings")
    if words and words[0] == "bias":
        return "bias"
    if isinstance(owner, nn.EmbeddingBag) or looked_up or "embed" in attribute:
        return "embedding"
    if not words or words[-1] in _MATRIX_WORDS:
        return ""
    return next((what for what, known in _KIND_WORDS.items() if not known.isdisjoint(words)), "")


def _kind_of_factor(owner: nn.Module, attribute: str) -> str:
    """Describe a parameter created by older functions of torch.nn.utils in place of a weight."""
    weight, _, part = attribute.rpartition("_")
    if weight in owner._parameters or not weight:
        return ""
    if part == "orig" and f"{weight}_mask" in owner._buffers:
        return f"the stored values of a {weight} pruned by torch.nn.utils.prune"
    if part == "orig" and f"{weight}_u" in owner._buffers:
        return f"the stored values of a {weight} under spectral_norm"
    if part in ("g", "v") and {f"{weight}_g", f"{weight}_v"} <= owner._parameters.keys():
        return f"the {'length' if part == 'g' else 'direction'} of a {weight} under weight_norm"
    return ""


def _is_scale(names: list[str], param: nn.Parameter, owners: list[nn.Module]) -> bool:
    """Return whether a parameter of shape (1, C, 1, 1) or similar only scales or shifts."""
    filters = (
        isinstance(owner, _CONVOLUTIONS + _TRANSPOSED) and name.endswith("weight")
        for name, owner in zip(names, owners)
    )
    return param.ndim > 2 and not any(filters) and sum(size > 1 for size in param.shape) <= 1


def match(model: nn.Module, candidates: Sequence[Entry], pattern: Pattern) -> list[Entry]:
    """Return the entries that a pattern matches; for a tuple in its order."""
    if not candidates:
        raise ValueError(
            f"{type(model).__name__} has no parameters (a quantised model holds its weights as "
            f"constants): nothing of it can be trained"
        )
    if isinstance(pattern, tuple):
        found = [entry for part in pattern for entry in match(model, candidates, part)]
        return list(dict.fromkeys(found))
    if isinstance(pattern, str):
        exact = [entry for entry in candidates if pattern in entry.names]
        if exact and exact[0].excluded == _CODES:
            raise ValueError(
                f"{pattern!r} holds {_CODES} ({_kind_of(exact[0].param)}), whose size and zeros "
                f"are not those of the weight: leave it out, or keep the weight in floating point"
            )
        if exact:
            return exact
        if why := reason_computed(model, pattern):
            raise ValueError(why)
        hits = [s for s in candidates if any(_glob_matches(pattern, name) for name in s.names)]
        if pattern == ALL_PARAMETERS and not hits:  # unless a module has that name
            return [entry for entry in candidates if entry.excluded != _CODES]
        known = [name for entry in candidates for name in entry.names]
        label = pattern
    elif not isinstance(pattern, type):
        raise TypeError(
            f"a pattern is a glob on names, a module type or a tuple of these, received "
            f"{_describe_pattern(model, candidates, pattern)}"
        )
    else:
        hits = [s for s in candidates if any(isinstance(owner, pattern) for owner in s.owners)]
        left_out = ("bias", _CODES)
        explicit = [
            s for s in hits if s.excluded not in left_out and not _is_tied_embedding(s, pattern)
        ]
        if explicit:
            return explicit
        inside = {id(p) for m in model.modules() if isinstance(m, pattern) for p in m.parameters()}
        hits = [s for s in candidates if id(s.param) in inside]
        known = sorted({type(module).__name__ for module in model.modules()})
        label = pattern.__name__
    chosen = [entry for entry in hits if not entry.excluded]
    if hits and not chosen:
        reasons = ", ".join(f"{entry.name} ({entry.excluded})" for entry in hits[:5])
        raise ValueError(
            f"pattern {label!r} matches only parameters that a pattern leaves out: {reasons}; "
            f"name them literally to include them"
        )
    if not chosen:
        raise ValueError(f"no parameter matches: {unknown_name('pattern', label, known)}")
    return chosen


def _describe_pattern(model: nn.Module, candidates: Sequence[Entry], pattern: object) -> str:
    """Describe an invalid pattern; for part of the model, suggest its name."""
    named = dict(named_modules(model)) | {entry.name: entry.param for entry in candidates}
    name = next((name for name, part in named.items() if part is pattern and name), None)
    if name is None:
        return f"a {type(pattern).__name__}"
    return f"the {type(pattern).__name__} {name!r}: write that name"


def entries_matching(candidates: Sequence[Entry], pattern: str) -> list[Entry]:
    """Return the entries whose names a glob matches, including biases, scales and embeddings.

    For settings of any parameter, such as its learning rate.
    Raises ValueError for a pattern without match, naming the closest.
    """
    found = [e for e in candidates if any(_glob_matches(pattern, name) for name in e.names)]
    if not found:
        known = [name for entry in candidates for name in entry.names]
        raise ValueError(f"no parameter matches: {unknown_name('pattern', pattern, known)}")
    return found


def _glob_matches(pattern: str, name: str) -> bool:
    """Return whether a glob matches the parameter's name or that of an enclosing module."""
    if fnmatchcase(name, pattern):
        return True
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:depth]), pattern) for depth in range(1, len(parts)))


def _is_tied_embedding(entry: Entry, kind: type[nn.Module]) -> bool:
    """Return whether a parameter in a module of this kind is shared with another's embedding."""
    embeddings = [m for m in entry.owners if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    return bool(embeddings) and not any(isinstance(module, kind) for module in embeddings)


def reason_computed(model: nn.Module, name: str) -> str:
    """Return why a weight is computed from others, with a remedy; "" if it is stored."""
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except (AttributeError, RuntimeError):  # scripted modules have none
        return ""
    if f"{attribute}_orig" in module._parameters and f"{attribute}_mask" in module._buffers:
        return (
            f"{name!r} is pruned by torch.nn.utils.prune: it is computed as {name}_orig times a "
            f"mask, so no prox can set it; make the pruning permanent by prune.remove(module, "
            f"{attribute!r}), or name '{name}_orig' if the stored values are what you mean"
        )
    if is_parametrized(module, attribute):
        kinds = [type(p).__name__ for p in module.parametrizations[attribute]]  # type: ignore[index]
        return (
            f"{name!r} is parametrised ({', '.join(kinds)}): it is computed, not stored, so no "
            f"prox can set it; remove the parametrisation, or name one of its factors, such as "
            f"'{path}.parametrizations.{attribute}.original0', if that is what you mean"
        )
    return ""


def targets_of(chosen: Sequence[Entry], model: nn.Module, rows: str) -> list[Target]:
    """Return one target for each entry, or one for all if rows are features."""
    if not is_one_of(rows, ROWS):
        raise ValueError(unknown_name("rows", rows, ROWS))
    if rows == "product":
        return [
            Product(f"{a.name}+{b.name}", (a.param, b.param), rows, (RowView(), RowView()))
            for a, b in _factor_pairs(chosen)
        ]
    if rows != "feature":
        return [
            Target(
                entry.name,
                (entry.param,),
                rows,
                (row_view(entry, model, rows),),
                _padding_index(entry),
            )
            for entry in chosen
        ]
    views = tuple(row_view(entry, model, "in") for entry in chosen)
    counts = {entry.name: view.of(entry.param).shape[0] for entry, view in zip(chosen, views)}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f'rows="feature" couples parameters with the same number of input features, '
            f"received {counts}; match only the layers that read the input"
        )
    name = "+".join(entry.name for entry in chosen)
    return [Target(name, tuple(entry.param for entry in chosen), rows, views)]


def _factor_pairs(chosen: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
    """Return the pairs whose product the model uses, left factor first."""
    named = {entry.name: entry for entry in chosen}
    pairs = []
    if any("lora_B" in name for name in named):
        pairs = [
            (entry, named[other])
            for name, entry in named.items()
            if "lora_B" in name and (other := name.replace("lora_B", "lora_A")) in named
        ]
    elif len(chosen) == 2:
        first, second = chosen
        fits = first.param.ndim == 2 and first.param.shape[-1] == second.param.shape[0]
        pairs = [(first, second) if fits else (second, first)]
    fitting = all(
        a.param.ndim == b.param.ndim == 2 and a.param.shape[1] == b.param.shape[0]
        for a, b in pairs
    )
    if not (pairs and fitting and 2 * len(pairs) == len(chosen)):
        shapes = {entry.name: tuple(entry.param.shape) for entry in chosen}
        raise ValueError(
            f'rows="product" needs pairs of matrices (rows, r) and (r, columns), named lora_B and '
            f"lora_A or two in all, received {shapes}"
        )
    return pairs


def row_view(entry: Entry, model: nn.Module, rows: str) -> RowView:
    """Return the view of one parameter by `rows`; ValueError if unsupported."""
    owner, param = entry.owners[0], entry.param
    if rows == "tensor" or is_lazy(param):
        return RowView()
    if rows in ("filter", "channel"):
        if not isinstance(owner, _CONVOLUTIONS + _TRANSPOSED):
            raise ValueError(
                f"rows={rows!r} needs a convolution, {entry.name!r} belongs to "
                f'{type(owner).__name__}; use rows="out" or rows="in"'
            )
        rows = "out" if rows == "filter" else "in"
    if rows == "head":
        inputs_first = _stores_inputs_first(owner)
        lead, split = head_rows(model, entry.name, param.shape, inputs_first=inputs_first)
        return RowView((lead,), split)
    if rows in ("in", "feature") and param.ndim < 2:
        raise ValueError(f"rows={rows!r} needs two dimensions, {entry.name!r} has {param.ndim}")
    transposed = _stores_inputs_first(owner) and param.ndim > 1
    grouped = getattr(owner, "groups", 1) if isinstance(owner, _CONVOLUTIONS + _TRANSPOSED) else 1
    stored_first = (rows == "out") != transposed
    if stored_first:
        return RowView((0,))
    return RowView((0, 2), (0, (grouped, -1))) if grouped > 1 else RowView((1,))


def _padding_index(entry: Entry) -> int | None:
    """Return an embedding's padding row; None if another module reads the rows."""
    found = {getattr(owner, "padding_idx", None) for owner in entry.owners}
    embeds = all(isinstance(owner, nn.Embedding | nn.EmbeddingBag) for owner in entry.owners)
    return found.pop() if embeds and len(found) == 1 else None


def _stores_inputs_first(owner: nn.Module) -> bool:
    """Return whether dimension 0 is the inputs: transposed convolutions and GPT-2's Conv1D."""
    return isinstance(owner, _TRANSPOSED) or any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
        for kind in type(owner).__mro__
    )
