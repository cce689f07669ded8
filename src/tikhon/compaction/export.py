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

from .layer_calls import LAYERS
from .rules import RULES

Call = tuple[Any, list[Any]]  # a function, or the name of a method, with its arguments


def export_graph(
    model: nn.Module, inputs: tuple[object, ...], *, free_sizes: bool
) -> fx.GraphModule:
    """The operations of one forward pass as calls of torch's functions and methods of tensors.

    Branches are those that the inputs take. With `free_sizes`, which can take minutes, sizes stay
    free where the model allows it and the example has at least two of them. What is lost on the
    way is named in `meta["lost"]`.
    """
    free = None
    if free_sizes:
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
            _to_named_function(node)
            if node.target is F.batch_norm:
                _drop_statistics(node)
    _flatten_signature(graph, inputs)
    graph.eliminate_dead_code()
    found = fx.GraphModule(module, graph)
    found.meta["lost"] = "dropout" if mutable and drops else ""
    found.meta["fixed sizes"] = not free_sizes
    return found


def _flatten_signature(graph: fx.Graph, inputs: tuple[object, ...]) -> None:
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


def _to_named_function(node: fx.Node) -> None:
    """Write an operator of ATen as a function or method that has a rule, where there is one."""
    name = str(getattr(node.target, "overloadpacket").__name__)  # noqa: B009
    args: list[Any] = list(node.args)
    target: Any = node.target
    functions = [getattr(home, name, None) for home in (F, torch)]
    if name in _REWRITES:
        target, args = _REWRITES[name](args)
    elif name in _OPERATORS and not node.kwargs:
        target = getattr(operator, _OPERATORS[name])
    elif layer := next((f for f in functions if f in LAYERS), None):
        target, args = layer, args[: len(LAYERS[layer][0])]  # what follows is of the kernels
    elif name in RULES:
        target = name
    else:
        target = next((f for f in functions if f in RULES), target)
    if target == "to":  # what it is laid out as is what it was
        node.kwargs = {k: v for k, v in node.kwargs.items() if k in ("dtype", "device")}
    node.op = "call_method" if isinstance(target, str) else "call_function"
    node.target, node.args = target, tuple(args)


def _batch_norm(args: list[Any]) -> Call:
    x, weight, bias, mean, variance, *rest = args
    return F.batch_norm, [x, mean, variance, weight, bias, *rest[:3]]


def _drop_statistics(node: fx.Node) -> None:
    """Read the output alone of a batch norm that was decomposed, where it comes with others."""
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(node)
            node.graph.erase_node(user)


def _decomposed_batch_norm(args: list[Any]) -> Call:
    x, weight, bias, mean, variance, momentum, eps = args
    return F.batch_norm, [x, mean, variance, weight, bias, False, momentum, eps]


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


_OPERATORS = {name: name for name in ("add", "sub", "mul", "neg", "pow")} | {
    **{name: name for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "div": "truediv",
}
_REWRITES: dict[str, Callable[[list[Any]], Call]] = {
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _decomposed_batch_norm,
    "embedding": _embedding,
    "slice": _slice,
    "select": _select,
    "sym_size": lambda args: ("size", args),
    "detach_": lambda args: ("detach", args),
    "lift_fresh_copy": lambda args: ("clone", args),
    # the strides of attention depend on the kernel that is chosen, so a view may be a copy
    **dict.fromkeys(("view", "_unsafe_view"), lambda args: ("reshape", args)),
    "_to_copy": lambda args: ("to", args),
}
