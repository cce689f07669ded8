"""tikhon: regularization of PyTorch models, attached, audited, tuned and diagnosed.

`import tikhon` loads nothing heavy: modules are imported on first use of a name. Names are
declared in `__init__.pyi`, for editors and type checkers.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
