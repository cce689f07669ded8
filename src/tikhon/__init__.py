"""tikhon: regularization of PyTorch models, attached, audited, tuned and diagnosed.

`import tikhon` loads nothing heavy: a name imports its module when it is first used. The names
stand in `__init__.pyi`, where editors and type checkers find them too.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
