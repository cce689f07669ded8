"""Load user objects named as train.py:make_model or package.module:name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tikhon.cli.tables import TableArguments, load_and_split
from tikhon.errors import InputError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tikhon.cli.terminal import Terminal
    from tikhon.data import Split

_modules: dict[str, ModuleType] = {}


def load_object(spec: str, option: str, terminal: Terminal) -> Any:
    """Return the object FILE.py:NAME or MODULE:NAME; running the file is noted on stderr.

    Raises `InputError` for a missing file or name, with the closest names, and for code that
    fails.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise InputError(f"{option}: FILE.py:NAME or MODULE:NAME is needed, received {spec!r}")
    if not source.endswith(".py") and not _is_module(source):
        raise InputError(
            f"{option}: no module {source} is found ({spec!r}); give FILE.py:NAME or MODULE:NAME"
        )
    if source not in _modules:
        terminal.note(f"running {source} for {option}")
        _modules[source] = _import_source(source, option)
    module = _modules[source]
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise InputError(f"{option}: {unknown_name(f'name in {source}', name, public)}")
    return getattr(module, name)


def _is_module(name: str) -> bool:
    """Return whether a module of that name exists, seen from the current folder."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _import_source(source: str, option: str) -> ModuleType:
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        path = Path(source).resolve()
        if not path.is_file():
            raise InputError(f"{option}: there is no file {source}")
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        return module
    except InputError:
        raise
    except Exception as error:  # user code may raise anything
        text = f"{type(error).__name__}: {error}"
        raise InputError(f"{option}: {source} failed when it ran ({text})") from error


def call_if_function(value: object, option: str) -> Any:
    """Return the value, or the result of calling it if it is a function."""
    if inspect.isfunction(value):
        try:
            return value()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise InputError(f"{option}: {value.__name__}() failed ({text})") from error
    return value


def parse_loss(spec: str, terminal: Terminal) -> Any:
    """Return a built-in loss by name, or the user's own."""
    if "." in spec.rpartition(":")[0]:
        return load_object(spec, "--loss", terminal)
    from tikhon.training.losses import canonical_name

    try:
        return spec if spec == "auto" else canonical_name(spec)
    except InputError as error:
        raise InputError(f"--loss: {error}, or FILE.py:NAME") from error


def parse_optimizer(spec: str, terminal: Terminal) -> object:
    """Return an optimizer factory for adam, adam:1e-3, sgd:0.1,momentum=0.9, or the user's own."""
    import torch

    name, _, rest = spec.partition(":")
    classes = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad")
    known = {n.lower(): n for n in classes}
    if name.lower() not in known:
        if "." in spec.rpartition(":")[0]:
            return load_object(spec, "--optimizer", terminal)
        raise InputError(f"--optimizer: {unknown_name('optimizer', name, known)}, or FILE.py:NAME")
    settings: dict[str, Any] = {}
    for index, part in enumerate(p for p in rest.split(",") if p):
        key, equals, text = part.rpartition("=")
        try:
            settings[key if equals else "lr"] = float(text)
        except ValueError:
            raise InputError(f"--optimizer: {part!r} is not a number or KEY=NUMBER") from None
        if index and not equals:
            raise InputError(f"--optimizer: only the first value may lack KEY=, received {part!r}")
    kind = getattr(torch.optim, known[name.lower()])
    allowed = set(inspect.signature(kind).parameters) - {"params"}
    for key in settings:
        if key not in allowed:
            raise InputError(f"--optimizer: {unknown_name(f'setting of {name}', key, allowed)}")
    if kind is torch.optim.SGD:
        settings.setdefault("lr", 0.01)
    return lambda parameters: kind(parameters, **settings)


def is_user_object(spec: str) -> bool:
    """Return whether FILE.py:NAME or MODULE:NAME is meant, not a file or a data set."""
    source = spec.rpartition(":")[0]
    return source.endswith(".py") or (bool(source) and not Path(spec).exists())


def load_split(terminal: Terminal, spec: str, *, table: TableArguments, seed: int) -> Split:
    """Return a data set or a table, split and scaled as by `fit`."""
    return load_and_split(terminal, spec, table, None, test=0.2, seed=seed)[-1]


def network_for(name: str, spec: str, split_of: Callable[[str], Split]) -> Callable[[], nn.Module]:
    """Return a function that builds the network of that name for a data set or a table."""
    from tikhon.models import build

    if is_user_object(spec):
        raise InputError(
            f"MODEL: {name!r} is built for a data set or a table, and --data is {spec!r}: give "
            "FILE.py:NAME of your model"
        )
    rows = split_of(spec).train

    def make() -> nn.Module:
        return build(name, rows.shape, rows.outputs, rows=rows.x)

    make()  # widths that do not match the data are said here
    return make


def load_data(
    spec: str,
    option: str,
    terminal: Terminal,
    *,
    split_of: Callable[[str], Split],
    model: Callable[[], nn.Module],
) -> tuple[object, object]:
    """Return (training, validation): user data, or a source split and scaled as by `fit`, with
    numeric targets in the shape of the model's output.

    `model` returns a copy of the model; it is called for numeric targets only.
    """
    if is_user_object(spec):
        return call_if_function(load_object(spec, option, terminal), option), None
    parts = split_of(spec)
    loaded = [(part.x, part.y) for part in (parts.train, parts.valid)]
    if parts.train.task == "regression" and _outputs_one_column(model, parts.train.x):
        loaded = [(x, y[:, None] if y.ndim == 1 else y) for x, y in loaded]
    return loaded[0], loaded[1]


def _outputs_one_column(model: Callable[[], nn.Module], x: Tensor) -> bool:
    """Return whether the model outputs a column, one number for each row."""
    import torch

    with suppress(Exception), torch.random.fork_rng(), torch.no_grad():  # diagnosed later
        return model()(x[:2]).shape == (2, 1)
    return False
