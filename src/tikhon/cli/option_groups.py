"""Expand command parameters that stand for groups of options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.models import OptionInfo

from tikhon.options import Option, options_of


@dataclass(frozen=True, eq=False)
class OptionGroup:
    """A group of options, and a function that combines their values."""

    options: Mapping[str, tuple[Option, object]]
    make: Callable[[dict[str, object]], object]

    def parameters(self) -> list[inspect.Parameter]:
        """Return one parameter for each option."""
        return [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[option.kind | None if default is None else option.kind, flag],
            )
            for name, (option, default) in self.options.items()
            for flag in [typer_option(option)]
        ]


def option_group(kind: type, *, without: tuple[str, ...] = ()) -> OptionGroup:
    """Return options for the fields of a dataclass; those in `without` keep their defaults."""
    kept = {name: found for name, found in options_of(kind).items() if name not in without}
    return OptionGroup(kept, lambda values: kind(**values))


def given_options(options: Mapping[str, Option]) -> OptionGroup:
    """Return options without defaults, collected into a mapping of those given."""
    return OptionGroup(
        {name: (option, None) for name, option in options.items()},
        lambda values: {name: value for name, value in values.items() if value is not None},
    )


def typer_option(option: Option) -> object:
    """Convert an option to typer's form."""
    return typer.Option(
        *option.flags,
        help=option.help,
        metavar=option.metavar,
        show_default=option.shown or True,
        rich_help_panel=option.panel,
        autocompletion=completion(option.names) if option.names else None,
    )


def flag(
    help: str,
    panel: str | None = None,
    metavar: str | None = None,
    *,
    shown: str | None = None,
    names: Sequence[str] = (),
    flags: tuple[str, ...] = (),
) -> object:
    """Return an option of a single command; arguments as for `Option`."""
    return typer_option(
        Option(help, panel=panel, metavar=metavar, shown=shown, names=tuple(names), flags=flags)
    )


def completion(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a completion by these names, of the last part where several are joined.

    >>> completion(["l1", "l2", "mcp"])("fc1.weight=l"), completion(["none", "l2"])("none,")
    (['fc1.weight=l1', 'fc1.weight=l2'], ['none,none', 'none,l2'])
    """

    def complete(incomplete: str) -> list[str]:
        begun = re.split(r"[=,+|]", incomplete)[-1]
        before = incomplete.removesuffix(begun)
        return [before + name for name in names if name.startswith(begun)]

    return complete


_PLACEHOLDERS = {bool: "", int: "N", float: "X"}  # for options without a metavar


def _with_placeholder(parameter: inspect.Parameter) -> inspect.Parameter:
    """Add a placeholder for the value; flags that default to off get no negation."""
    kind, *flags = get_args(parameter.annotation) or (parameter.annotation,)
    kinds = [part for part in get_args(kind) or (kind,) if part in _PLACEHOLDERS]
    for flag in flags:
        if not kinds or not isinstance(flag, OptionInfo):
            continue
        if flag.metavar is None:
            flag.metavar = _PLACEHOLDERS[kinds[0]]
        if kind is bool and parameter.default is False and not flag.param_decls:
            flag.param_decls = (f"--{parameter.name.replace('_', '-')}",)
    return parameter


def expand_groups(command: Callable[..., object]) -> Callable[..., Any]:
    """Expand groups to one parameter for each option, in order."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, OptionGroup] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        hint = hints[name]
        group = next(
            (m for m in getattr(hint, "__metadata__", ()) if isinstance(m, OptionGroup)), None
        )
        if group is None:
            own = parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)
            parameters.append(own)
        else:
            groups[name] = group
            parameters += group.parameters()

    def call(**values: object) -> Any:
        for name, group in groups.items():
            values[name] = group.make({option: values.pop(option) for option in group.options})
        return command(**values)

    call.__doc__ = _join_lines(command.__doc__ or "")
    parameters = [_with_placeholder(parameter) for parameter in parameters]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__signature__ = inspect.Signature(parameters)
    return call


def _join_lines(text: str) -> str:
    """Join the lines of each paragraph of help, as the terminal wraps them."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
