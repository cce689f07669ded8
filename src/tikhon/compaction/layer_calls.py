"""Calls of functions on a model's parameters as the modules that they are."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument
from torch.nn import functional as F

from .modules import AnyBatchNorm, InputsFirst

Arguments = dict[str, Any]  # the arguments of a call by name: tensors of the model, numbers
_CONVOLVED = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_CONVOLVED[:5], "output_padding", "groups", "dilation")


def layer_calls_as_modules(graph: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """The graph with `F.linear(x, self.weight)` and the like as modules, where the weight is.

    A layer that has a `forward` of its own is one call of a module like any other then, and
    follows the mode (train or eval) of the whole. The new module holds the very parameters, under
    the name of the layer whose they are.
    """
    nodes = graph.graph.nodes
    for node in list(nodes):
        _expand_addcmul(node)
        _write_as_linear(node, graph)
        _take_bias(node, graph)
    called = {str(n.target) for n in nodes if n.op == "call_module"}
    users = Counter(str(n.target) for n in nodes if n.op == "get_attr" for _ in n.users)
    for node in list(nodes):
        found = _layer_arguments(node, graph, users)
        if found is None:
            continue
        source, args = found
        module = LAYERS[node.target][1](args)
        path, _, attribute = source.rpartition(".")
        name = path
        if (
            attribute == "weight"
            and path not in called | {""}
            and not _lacks_bias(module, path, graph)
        ):
            _adopt_members(module, graph.get_submodule(path), model.get_submodule(path))
        else:
            name = f"{path}_{node.name}".lstrip("_").replace(".", "_")
            name += "_" * hasattr(graph, name)
            _remove_moved_parameters(node, graph, model)
        called.add(name)
        graph.set_submodule(name, module.train(model.training))
        with graph.graph.inserting_before(node):
            new = graph.graph.call_module(name, (_input(node),))
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    for node in reversed(list(nodes)):
        if node.op == "get_attr" and not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _layer_arguments(
    node: fx.Node, graph: fx.GraphModule, users: Counter[str]
) -> tuple[str, Arguments] | None:
    """The name of the weight and all arguments; None where one is computed or used elsewhere."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    if node.target not in LAYERS:
        return None
    names = LAYERS[node.target][0]
    bound = {**dict(zip(names, node.args)), **node.kwargs}
    if not bound.keys() <= set(names):  # it does more than the layer
        return None
    source, args = "", Arguments()
    for name, value in bound.items():
        if name != "input" and isinstance(value, fx.Node):
            target = str(value.target)
            if value.op != "get_attr" or users[target] > 1:
                return None
            source = target if name == "weight" else source
            value = attrgetter(target)(graph)
        args[name] = value
    learned = [args.get("weight"), args.get("bias")]
    active = args.get("training", node.target is F.dropout)
    if active or args.get("max_norm") is not None:
        return None
    if not all(isinstance(one, nn.Parameter | None) for one in learned):
        return None
    if node.target in _WEIGHTED and not source:
        return None
    if node.target in _MATRICES and args["weight"].ndim != 2:
        return None
    return source, args


def _expand_addcmul(node: fx.Node) -> None:
    """A sum with a product, written as these two."""
    name = getattr(node.target, "__name__", str(node.target))
    if name.partition(".")[0] == "addcmul" and len(node.args) == 3 and not node.kwargs:
        term, *factors = node.args
        with node.graph.inserting_before(node):
            product = node.graph.call_function(operator.mul, tuple(factors))
            total = node.graph.call_function(operator.add, (term, product))
        node.replace_all_uses_with(total)
        node.graph.erase_node(node)


def _write_as_linear(node: fx.Node, graph: fx.GraphModule) -> None:
    """Write a product with a transposed weight, `x @ weight.T`, as the linear layer it is."""
    if node.target not in _PRODUCTS or len(node.args) != 2 or node.kwargs:
        return
    x, factor = node.args
    if not isinstance(factor, fx.Node) or len(factor.users) > 1 or not factor.args:
        return
    weight = factor.args[0]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return
    if attrgetter(str(weight.target))(graph).ndim == 2 and _is_transpose(factor):
        node.op, node.target, node.args = "call_function", F.linear, (x, weight)
        node.graph.erase_node(factor)


def _take_bias(node: fx.Node, graph: fx.GraphModule) -> None:
    """Write a product and the sum with a bias that follows it as one layer."""
    if node.target not in (operator.add, torch.add, "add") or len(node.args) != 2 or node.kwargs:
        return
    first, second = node.args
    for product, bias in ((first, second), (second, first)):
        if not isinstance(product, fx.Node) or not isinstance(bias, fx.Node):
            continue
        weight = _weight_of_product(product)
        if weight is None or bias.op != "get_attr":
            continue
        matrix, vector = (attrgetter(str(part.target))(graph) for part in (weight, bias))
        rows = product.target is F.linear
        outputs = matrix.shape[:1] if rows else matrix.shape[1:]
        if matrix.ndim == 2 and vector.shape == outputs:
            x, layer = product.args[0], F.linear if rows else torch.addmm
            node.op, node.target = "call_function", layer
            node.args = (x, weight, bias) if rows else (bias, x, weight)
            node.graph.erase_node(product)
            return


def _weight_of_product(product: fx.Node) -> fx.Node | None:
    """The weight of a linear layer without bias that nothing but its sum reads."""
    if len(product.args) != 2 or product.kwargs:
        return None
    weight = product.args[1]
    if product.target not in (F.linear, *_PRODUCTS) or len(product.users) > 1:
        return None
    return weight if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def _lacks_bias(module: nn.Module, path: str, graph: fx.GraphModule) -> bool:
    """Whether the layer has a bias that is added elsewhere."""
    own = graph.get_submodule(path)._parameters.get("bias")
    return own is not None and getattr(module, "bias", own) is None


def _is_transpose(node: fx.Node) -> bool:
    """Whether a node exchanges the axes of a matrix, by its strides after the call."""
    if node.target is getattr:
        return node.args[1] in ("T", "mT")
    if getattr(node.target, "__name__", node.target) not in _TRANSPOSES:
        return False
    call = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
    return call(torch.empty(2, 3), *node.args[1:], **node.kwargs).stride() == (1, 3)


def _input(node: fx.Node) -> Argument:
    """What the layer of a call is applied to."""
    return node.args[LAYERS[node.target][0].index("input")]


def _remove_moved_parameters(node: fx.Node, graph: fx.GraphModule, model: nn.Module) -> None:
    """Take from where the graph holds them the parameters that a module holds now."""
    for part in (one for one in node.all_input_nodes if one is not _input(node)):
        path, _, attribute = str(part.target).rpartition(".")
        holder = graph.get_submodule(path)
        if holder is not model.get_submodule(path):  # it is the graph's own
            delattr(holder, attribute)


def _adopt_members(new: nn.Module, old: nn.Module, original: nn.Module) -> None:
    """Hold what else the old module holds, and remember which of it."""
    extra_members: list[str] = []
    for store in ("_parameters", "_buffers", "_modules"):
        for name, value in getattr(old, store).items():
            if not hasattr(new, name):
                getattr(new, store)[name] = value
                extra_members.append(name)
    counted = original._buffers.get("num_batches_tracked")
    if counted is not None and isinstance(new, AnyBatchNorm):
        new.num_batches_tracked = counted
    new.extra_members = extra_members  # type: ignore[assignment]


def _with_tensors(module: nn.Module, args: Arguments) -> nn.Module:
    """The module with the model's own tensors."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(args.get(name), Tensor) or (name in args and hasattr(module, name)):
            setattr(module, name, args[name])
    return module


def _linear(args: Arguments) -> nn.Module:
    rows, columns = args["weight"].shape
    bias = args.get("bias") is not None
    return _with_tensors(nn.Linear(columns, rows, bias=bias, device="meta"), args)


def _convolution(
    kind: Callable[..., nn.Module], *, transposed: bool
) -> Callable[[Arguments], nn.Module]:
    def make(args: Arguments) -> nn.Module:
        weight, groups = args["weight"], args.get("groups", 1)
        first, second = weight.shape[0], weight.shape[1] * groups
        options = {
            name: args[name]
            for name in ("stride", "padding", "output_padding", "dilation", "groups")
            if name in args
        }
        sizes = (first, second) if transposed else (second, first)
        bias = args.get("bias") is not None
        return _with_tensors(
            kind(*sizes, weight.shape[2:], bias=bias, device="meta", **options), args
        )

    return make


def _layer_norm(args: Arguments) -> nn.Module:
    affine, bias = (args.get(name) is not None for name in ("weight", "bias"))
    shape, eps = args["normalized_shape"], args.get("eps", 1e-5)
    return _with_tensors(nn.LayerNorm(shape, eps, affine, bias, device="meta"), args)


def _rms_norm(args: Arguments) -> nn.Module:
    affine = args.get("weight") is not None
    shape, eps = args["normalized_shape"], args.get("eps")
    return _with_tensors(nn.RMSNorm(shape, eps, affine, device="meta"), args)


def _batch_norm(args: Arguments) -> nn.Module:
    mean, affine = args["running_mean"], args.get("weight") is not None
    eps, momentum = args.get("eps", 1e-5), args.get("momentum", 0.1)
    return _with_tensors(AnyBatchNorm(len(mean), eps, momentum, affine=affine), args)


def _group_norm(args: Arguments) -> nn.Module:
    weight = args["weight"]
    norm = nn.GroupNorm(args["num_groups"], len(weight), args.get("eps", 1e-5), device="meta")
    return _with_tensors(norm, args)


def _embedding(args: Arguments) -> nn.Module:
    rows, columns = args["weight"].shape
    padding = args.get("padding_idx")
    return _with_tensors(nn.Embedding(rows, columns, padding, device="meta"), args)


LAYERS: dict[Any, tuple[tuple[str, ...], Callable[[Arguments], nn.Module]]] = {
    F.linear: (("input", "weight", "bias"), _linear),
    **dict.fromkeys(
        (F.layer_norm, torch.layer_norm),
        (("input", "normalized_shape", "weight", "bias", "eps"), _layer_norm),
    ),
    F.rms_norm: (("input", "normalized_shape", "weight", "eps"), _rms_norm),
    F.group_norm: (("input", "num_groups", "weight", "bias", "eps"), _group_norm),
    F.batch_norm: (
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        _batch_norm,
    ),
    torch.addmm: (
        ("bias", "input", "weight"),
        lambda args: InputsFirst(args["weight"], args["bias"]),
    ),
    F.embedding: (("input", "weight", "padding_idx", "max_norm"), _embedding),
    F.dropout: (
        ("input", "p", "training", "inplace"),
        lambda args: nn.Dropout(args.get("p", 0.5)),
    ),
    F.conv1d: (_CONVOLVED, _convolution(nn.Conv1d, transposed=False)),
    F.conv2d: (_CONVOLVED, _convolution(nn.Conv2d, transposed=False)),
    F.conv3d: (_CONVOLVED, _convolution(nn.Conv3d, transposed=False)),
    F.conv_transpose1d: (_TRANSPOSED, _convolution(nn.ConvTranspose1d, transposed=True)),
    F.conv_transpose2d: (_TRANSPOSED, _convolution(nn.ConvTranspose2d, transposed=True)),
    F.conv_transpose3d: (_TRANSPOSED, _convolution(nn.ConvTranspose3d, transposed=True)),
}
_PRODUCTS = (operator.matmul, torch.matmul, "matmul")
LAYERS |= dict.fromkeys(
    _PRODUCTS, (("input", "weight"), lambda args: InputsFirst(args["weight"], None))
)
_TRANSPOSES = ("t", "numpy_T", "transpose", "permute")
_MATRICES = {F.linear, torch.addmm, *_PRODUCTS}
_WEIGHTED = {F.group_norm, torch.addmm} | {
    target for target, (names, _) in LAYERS.items() if names[1] == "weight"
}
