"""Graphs by torch.export, of models whose forward torch.fx cannot follow."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.nn import functional as F
from torch.utils import _pytree as pytree

Call = tuple[Any, list[Any]]  # a function, or the name of a method, with its arguments


def exported(model: nn.Module, inputs: tuple[object, ...]) -> fx.GraphModule:
    """The operations of one forward pass as calls of torch's functions and methods of tensors.

    Branches are those that the inputs take. Sizes stay free where the model allows it and the
    example has at least two of them. What is lost on the way is named in `meta["lost"]`.
    """
    free = pytree.tree_map(
        lambda x: [torch.export.Dim.AUTO] * x.ndim if isinstance(x, Tensor) else None, inputs
    )
    with torch.enable_grad(), warnings.catch_warnings(action="ignore"):  # torch's, of itself
        program = torch.export.export(model, inputs, dynamic_shapes=free, strict=False)
        mutable = any(_is_mutable(node) for node in program.graph.nodes)
        drops = any("dropout" in str(node.target) for node in program.graph.nodes)
        if mutable:  # dropout, which does nothing in evaluation, is lost in it
            program = program.run_decompositions({})
        module: Any = program.module()
    graph = module.graph
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            _respell(node)
    _take_tensors(graph, inputs)
    graph.eliminate_dead_code()
    found = fx.GraphModule(module, graph)
    found.meta["lost"] = "dropout" if mutable and drops else ""
    return found


def _take_tensors(graph: fx.Graph, inputs: tuple[object, ...]) -> None:
    """Have plain arguments and results where they are tensors or a tuple of these."""
    end = graph.output_node()
    results: Any = end.args[0]
    structure = cast(Any, graph._codegen).pytree_info.out_spec
    alone = structure == pytree.tree_structure(0)
    if all(isinstance(x, Tensor) for x in inputs) and (
        alone or structure == pytree.tree_structure((0,) * len(results))
    ):
        graph.set_codegen(CodeGen())
        end.args = (results[0],) if alone else (tuple(results),)


def _is_mutable(node: fx.Node) -> bool:
    """Whether a call changes what it is given, so that later calls read something else."""
    op = node.target
    mutable = isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable
    return mutable and str(op) != "aten.detach_.default"


def _respell(node: fx.Node) -> None:
    """Write an operator of ATen as the function or method that people call, where it is known."""
    name = str(getattr(node.target, "overloadpacket").__name__)  # noqa: B009
    args, target = list(node.args), node.target
    if name in _SPELLED:
        target, args = _SPELLED[name](args)
    elif name in _OPERATORS and not node.kwargs:
        target = getattr(operator, _OPERATORS[name])
    elif name in _METHODS:
        target = name
    elif name in _FUNCTIONS:
        target = getattr(torch, name, getattr(F, name, node.target))
    if target == "to":  # what it is laid out as is what it was
        node.kwargs = {k: v for k, v in node.kwargs.items() if k in ("dtype", "device")}
    node.op = "call_method" if isinstance(target, str) else "call_function"
    node.target, node.args = target, tuple(args)


def _first(function: Callable[..., object], count: int) -> Callable[[list[Any]], Call]:
    """The function with so many of the arguments: what follows is of the kernels alone."""
    return lambda args: (function, args[:count])


def _batch_norm(args: list[Any]) -> Call:
    x, weight, bias, mean, variance, *rest = args
    return F.batch_norm, [x, mean, variance, weight, bias, *rest[:3]]


def _slice(args: list[Any]) -> Call:
    x, dim, *bounds = [*args, *(0, None, None)[len(args) - 1 :]]
    start, end, *step = bounds
    end = None if isinstance(end, int) and end >= torch.iinfo(torch.int64).max else end
    if dim < 0:
        return operator.getitem, [x, (Ellipsis, slice(start, end, *step)) + (slice(None),) * ~dim]
    return operator.getitem, [x, (slice(None),) * dim + (slice(start, end, *step),)]


def _select(args: list[Any]) -> Call:
    x, dim, index = args
    if dim < 0:
        return operator.getitem, [x, (Ellipsis, index) + (slice(None),) * ~dim]
    return operator.getitem, [x, (slice(None),) * dim + (index,)]


def _embedding(args: list[Any]) -> Call:
    weight, index, *padding = args
    padding = [row for row in padding[:1] if row >= 0]
    return F.embedding, [index, weight, *padding]


_OPERATORS = {"add": "add", "sub": "sub", "mul": "mul", "div": "truediv", "neg": "neg"} | {
    name: name for name in ("pow", "eq", "ne", "lt", "le", "gt", "ge")
}
_METHODS = {
    *("view", "reshape", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "flatten"),
    *("expand", "contiguous", "clone", "detach", "split", "chunk", "unbind", "matmul", "bmm"),
    *("softmax", "masked_fill", "mean", "sum", "amax", "amin", "max", "min", "relu", "tanh"),
    *("sigmoid", "abs", "square", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "erf", "clamp"),
    *("bool", "logical_not", "type_as", "flip", "to"),
}
_FUNCTIONS = {
    *("cat", "stack", "gelu", "silu", "leaky_relu", "elu", "selu", "mish", "softplus", "pad"),
    *("hardtanh", "relu6", "glu", "ones", "zeros", "full", "arange", "eye", "tril", "triu"),
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg") for n in (1, 2)),
}
_SPELLED: dict[str, Callable[[list[Any]], Call]] = {
    "linear": _first(F.linear, 3),
    "layer_norm": _first(F.layer_norm, 5),
    "rms_norm": _first(F.rms_norm, 4),
    "group_norm": _first(F.group_norm, 5),
    "batch_norm": _batch_norm,
    "embedding": _embedding,
    "dropout": _first(F.dropout, 3),
    "slice": _slice,
    "select": _select,
    "sym_size": lambda args: ("size", args),
    "detach_": lambda args: ("detach", args),
    "lift_fresh_copy": lambda args: ("clone", args),
    "_unsafe_view": lambda args: ("view", args),
    "_to_copy": lambda args: ("to", args),
    "scaled_dot_product_attention": lambda args: (F.scaled_dot_product_attention, args),
    **{
        f"conv{turned}{n}d": _first(getattr(F, f"conv{turned}{n}d"), 8 if turned else 7)
        for n in (1, 2, 3)
        for turned in ("", "_transpose")
    },
}
