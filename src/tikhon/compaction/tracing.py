"""The graph of a model, by torch.fx or by torch.export."""

from __future__ import annotations

from torch import fx, nn

from .analysis import Interpreter
from .export import export_graph
from .layer_calls import layer_calls_as_modules
from .modules import SelectLinear
from .rules import RULES


class Tracer(fx.Tracer):
    """Stops at torch's modules and at tikhon's layers, goes into everything else."""

    proxy_buffer_attributes = True  # a mask may be sliced to the length of the input

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module is one call of the graph."""
        ours = type(m).__module__.startswith("tikhon.layers")
        return (
            ours or isinstance(m, SelectLinear) or super().is_leaf_module(m, module_qualified_name)
        )


def interpreter_of(
    model: nn.Module, inputs: tuple[object, ...], *, free_sizes: bool = False
) -> Interpreter:
    """What finds the units of a model as it runs: its graph with the rule of each operation.

    See `trace` for `free_sizes`, which can take minutes.
    """
    return Interpreter(trace(model, inputs, free_sizes=free_sizes), RULES)


def trace(model: nn.Module, inputs: tuple[object, ...], *, free_sizes: bool) -> fx.GraphModule:
    """The graph of the model; its submodules are the model's own, or hold its parameters.

    By torch.fx, or by torch.export on these inputs where the forward branches on them; the graph
    is then of their sizes alone unless `free_sizes`.
    """
    try:
        graph = Tracer().trace(model)
        for node in graph.nodes:  # an annotation that is text cannot be pickled
            node.type = None if isinstance(node.type, str) else node.type
        found = fx.GraphModule(model, graph)
    except Exception as error:
        try:
            found = export_graph(model, inputs, free_sizes=free_sizes)
        except Exception as second:
            kind, by_fx, by_export = type(model).__name__, *map(_first_sentence, (error, second))
            raise ValueError(
                f"{kind} cannot be traced by torch.fx ({by_fx}) nor by torch.export "
                f"({by_export}); compact a part of it whose forward has no branch on tensor values"
            ) from second
    return layer_calls_as_modules(found, model)


def _first_sentence(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0]
