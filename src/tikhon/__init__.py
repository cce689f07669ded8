"""tikhon: regularization of PyTorch models, attached, audited, tuned and diagnosed.

`import tikhon` loads nothing heavy: modules are imported on first use of a name. Names are
declared in `__init__.pyi`, for editors and type checkers.
"""

import lazy_loader

from tikhon.errors import unknown_name

__version__ = "0.1.0"

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name in __all__ or name.startswith("__"):
        return _load(name)
    names = [*__all__, *(f"layers.{layer}" for layer in _load("layers").__all__)]
    # without the module as `obj`, Python adds no suggestion of its own
    raise AttributeError(unknown_name("name in tikhon", name, names), name=name)
