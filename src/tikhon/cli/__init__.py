"""The command line: a command is one file here and one line in `COMMANDS`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from tikhon import __version__
from tikhon.cli import startup
from tikhon.cli.configuration import defaults
from tikhon.cli.option_groups import expand_groups
from tikhon.cli.streams import Stdout, discard_output, one_line_warnings
from tikhon.errors import DataError, InputError, StorageError, unknown_name
from tikhon.runs.files import DISK_FULL_ERRORS

COMMANDS = (
    "demo",
    "fit",
    "tune",
    "path",
    "compare",
    "predict",
    "diagnose",
    "cure",
    "report",
    "live",
)

SETTINGS: dict[str, object] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@cache
def parser() -> Any:
    """Return the command line parser, built once.

    Its help shows arguments by name, without types and braces, and flags without types.
    """
    found: Any = typer.main.get_command(build())
    for command in (found, *found.commands.values()):
        for parameter in command.get_params(typer.Context(command, **command.context_settings)):
            if parameter.param_type_name == "argument":
                parameter.display_type_rich = lambda ctx: None
                parameter._usage_display_name = partial(str, parameter.metavar)
            elif parameter.is_flag:
                parameter.metavar = ""
    return found


def build() -> typer.Typer:
    """Build the application. Command files import nothing heavy at the top."""
    app = typer.Typer(
        name="tikhon",
        invoke_without_command=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        context_settings=SETTINGS,
        help="Find out why a PyTorch model overfits or does not train, and fix it.",
        epilog="Defaults of options are read from tikhon.toml in the current folder.",
    )
    app.callback()(_root)
    for name in COMMANDS:
        command = expand_groups(getattr(import_module(f"tikhon.cli.{name}"), name))
        app.command(name, context_settings=SETTINGS)(_exit_on_interrupt(command))
    return app


def _exit_on_interrupt(command: Callable[..., object]) -> Callable[..., object]:
    """Report Ctrl-C, on which the parser would exit silently."""

    @wraps(command)
    def run(*arguments: object, **options: object) -> object:
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt:
            return _report_interrupt()

    return run


def _report_interrupt() -> int:
    print("stopped", file=sys.stderr)
    return 128 + signal.SIGINT


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tikhon {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit
    context.default_map = defaults(Path("tikhon.toml"), context)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; errors are one message, never a traceback."""
    startup.is_program = arguments is None
    given, own = sys.argv[1:] if arguments is None else arguments, sys.argv
    sys.argv = ["tikhon", *given]  # a run keeps the command that made it
    try:
        return _run(_complete_ray_option(given))
    finally:
        sys.argv = own


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["help"]:  # as in `git help commit`
        arguments = [*arguments[1:2], "--help"]
    try:
        with one_line_warnings() if startup.is_program else nullcontext():
            code = parser().main(arguments, prog_name="tikhon", standalone_mode=False)
        Stdout().flush()
        return code if isinstance(code, int) else 0
    except Exception as error:
        if "--debug" in arguments:
            raise
        return _report_error(error, arguments)
    except KeyboardInterrupt:
        return _report_interrupt()


def _complete_ray_option(arguments: list[str]) -> list[str]:
    """Rewrite `--ray` without an address as `--ray=local`, as the parser lacks optional values."""
    following = [*arguments[1:], "-"]
    return [
        "--ray=local" if argument == "--ray" and after.startswith("-") else argument
        for argument, after in zip(arguments, following)
    ]


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, as reported by Python, NumPy or torch on any device."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _report_error(error: Any, arguments: list[str]) -> int:
    if isinstance(error, BrokenPipeError):
        discard_output()
        return 128 + signal.SIGPIPE
    if hasattr(error, "format_message"):  # raised by the argument parser
        shown = error.format_message()
        if "No such command" in shown and arguments:
            shown = unknown_name("command", arguments[0], COMMANDS)
        if meant := _meant_option(error):
            shown = f"No such option: {error.option_name}; did you mean {meant}?"
        shown += _received_value(error, arguments)
        path = getattr(getattr(error, "ctx", None), "command_path", "tikhon")
        print(f"tikhon: {shown}\n  see: {path} --help", file=sys.stderr)
        return 2
    if type(error).__name__ in ("Abort", "Exit"):
        return getattr(error, "exit_code", 1)
    if (
        isinstance(error, OSError)
        and error.errno in DISK_FULL_ERRORS
        and not isinstance(error, StorageError)
    ):
        error = StorageError(f"no space to write or print ({error})")
    elif isinstance(error, OSError) and error.filename and not isinstance(error, StorageError):
        error = StorageError(f"{error.filename}: {error.strerror}; look at its kind and rights")
    if _is_out_of_memory(error):
        lines = str(error).strip().splitlines() or ["not enough memory"]
        error = InputError(
            f"out of memory ({lines[0]}); use fewer rows or columns, or a smaller model, "
            "batch size or number of runs"
        )
    kinds = ((DataError, 4), (InputError, 2), (StorageError, 5))
    for kind, code in kinds:
        if isinstance(error, kind):
            print(f"tikhon: {error}", file=sys.stderr)
            discard_output()
            return code
    print(
        f"tikhon: unexpected {type(error).__name__}: {error}\n  --debug shows where",
        file=sys.stderr,
    )
    return 1


# What people call an option elsewhere -> the options that may be meant, the best first.
_CALLED_ELSEWHERE = {
    "--lr": ("--optimizer adam:1e-3",),
    "--learning-rate": ("--lr", "--optimizer adam:1e-3"),
    "--wd": ("--weight-decay",),
    "--bs": ("--batch-size",),
    "--batch": ("--batch-size",),
    "--label": ("--target",),
    "--time-limit": ("--budget",),
    "--out": ("--output",),
}


def _meant_option(error: Any) -> str | None:
    """Return the option of the command that an unknown one stands for elsewhere."""
    names = _CALLED_ELSEWHERE.get(getattr(error, "option_name", ""), ())
    taken = {name for option in error.ctx.command.params for name in option.opts} if names else ()
    return next((name for name in names if name.split()[0] in taken), None)


def _received_value(error: object, arguments: list[str]) -> str:
    """Return the value that the parser could not read, which its message omits."""
    for option in getattr(getattr(error, "param", None), "opts", ()):
        for i, argument in enumerate(arguments):
            name, equals, value = argument.partition("=")
            if name == option and (equals or i + 1 < len(arguments)):
                return f" (received {value if equals else arguments[i + 1]!r})"
    return ""
