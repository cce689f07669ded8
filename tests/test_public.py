"""The public surface: every name resolves, is documented, and costs nothing until it is used."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import tikhon

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import reference
from reference import public_names

from sources import nodes, trees

HEAVY = ("torch", "numpy", "sklearn", "pandas", "scipy", "plotly", "jinja2")
SUBMODULES = [n for n in tikhon.__all__ if isinstance(getattr(tikhon, n), ModuleType)]


def described() -> dict[str, object]:
    """Every public function and class, by the name under which a user finds it."""
    found = {f"tk.{n}": getattr(tikhon, n) for n in tikhon.__all__ if n not in SUBMODULES}
    for name in SUBMODULES:
        module = getattr(tikhon, name)
        found |= {f"tk.{name}.{n}": getattr(module, n) for n in public_names(module)}
    seen: dict[int, str] = {}
    return {n: v for n, v in found.items() if seen.setdefault(id(v), n) == n}


NAMES = described()


@pytest.mark.parametrize("name", tikhon.__all__)
def test_name_resolves(name):
    value = getattr(tikhon, name)
    assert name in dir(tikhon)
    assert (inspect.getdoc(value) or "").strip()


@pytest.mark.parametrize(
    ("name", "meant"),
    [("L3", "L1"), ("GroupLaso", "GroupLasso"), ("regularise", "regularize"),
     ("Dropout", "layers.Dropout")],
)  # fmt: skip
def test_an_unknown_name_is_answered_with_the_closest(name, meant):
    with pytest.raises(AttributeError, match=rf"{name}.*did you mean [^?]*'{meant}'") as caught:
        getattr(tikhon, name)
    assert "".join(traceback.format_exception(caught.value)).lower().count("did you mean") == 1
    assert not hasattr(tikhon, name)


@pytest.mark.parametrize("name", SUBMODULES)
def test_modules_say_what_they_offer(name):
    module = getattr(tikhon, name)
    names = public_names(module)
    assert names
    assert sorted(names) == sorted(set(names))
    assert all(hasattr(module, entry) for entry in names)


def parameters(value: object) -> list[str]:
    """The arguments that a caller gives."""
    if dataclasses.is_dataclass(value):
        return [f.name for f in dataclasses.fields(value) if f.init]
    try:
        given = inspect.signature(value).parameters.values()  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return []
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in given if p.kind not in several]


@pytest.mark.parametrize("name", [n for n, v in NAMES.items() if callable(v)])
def test_docstring_is_complete(name):
    value = NAMES[name]
    text = own_docstring(value)
    assert text, f"{name} has no docstring of its own"
    first = text.split("\n\n")[0]
    assert first.rstrip().endswith((".", ":")), f"{name}: the first sentence ends without a point"
    if inspect.isclass(value) and issubclass(value, Exception):
        return
    text += inherited(value)
    given = [p for p in parameters(value) if not (p.startswith("_") or p.endswith("_"))]
    silent = [p for p in given if not re.search(rf"\b{re.escape(p)}\b", text)]
    assert not silent, f"{name}: the docstring does not mention {silent}"


@pytest.mark.parametrize("name", [n for n in tikhon.__all__ if n not in SUBMODULES])
def test_the_reference_has_a_signature_a_sentence_and_an_example(name):
    value = getattr(tikhon, name)
    pages = [
        reference.top_page(),
        *(reference.module_page(m, getattr(tikhon, m)) for m in SUBMODULES),
    ]
    assert any(f"## {name}\n" in page and f".{name}" in page for page in pages)
    if not (inspect.isclass(value) and issubclass(value, Exception)):
        assert ">>> " in (inspect.getdoc(value) or ""), f"{name} has no example"


def own_docstring(value: object) -> str:
    """The docstring that stands in the source, not the signature that dataclass makes up."""
    text = inspect.cleandoc(getattr(value, "__doc__", None) or "")
    name = getattr(value, "__name__", "")
    return "" if text.startswith(f"{name}(") and "\n" not in text else text


def inherited(value: object) -> str:
    """What abstract parents say of a class's fields, and a module of laws of its functions."""
    parents = value.__mro__[1:] if inspect.isclass(value) else ()
    texts = [own_docstring(p) for p in parents if p.__module__.startswith("tikhon.")]
    if getattr(value, "__module__", "") == "tikhon.testing":
        texts.append(tikhon.testing.__doc__ or "")
    return "\n".join(texts)


@pytest.mark.parametrize(
    "code",
    [
        "import tikhon",
        "import tikhon.errors",
        "from tikhon.cli import main; main(['--help'])",
        "from tikhon.cli import main; main(['--version'])",
        "from tikhon.cli import main; main(['fit', '--help'])",
    ],
)
def test_light_imports(code):
    check = f"import sys; {code}; print('loaded', *({HEAVY!r} & sys.modules.keys()))"
    check = check.replace(repr(HEAVY), repr(set(HEAVY)))
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "loaded"


DOCS = Path(__file__).parents[1]
PAGES = [*DOCS.glob("README*.md"), *DOCS.glob("docs/**/*.md"), *DOCS.glob("examples/*.py")]
IMPORT = re.compile(r"from (tikhon(?:\.\w+)*) import (?:\(([^)]*)\)|([^(\n#]*))")


def shown() -> dict[str, list[str]]:
    """The names of tikhon in the texts that people read, each with the files that show it."""
    found: dict[str, list[str]] = {}
    for file, tree in trees().items():
        for text in texts(tree):
            for name in named(text):
                found.setdefault(name, []).append(file)
    for path in PAGES:
        for name in named(path.read_text(encoding="utf-8")):
            found.setdefault(name, []).append(path.name)
    return found


def texts(tree: ast.Module) -> Iterator[str]:
    """What a file prints or raises: its strings that are no docstrings."""
    kept = {
        id(node.value)
        for node in nodes(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in nodes(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in kept:
            yield node.value


def named(text: str) -> Iterator[str]:
    for module, several, one in IMPORT.findall(text):
        for name in re.findall(r"(?:^|,)\s*(\w+)", several or one):
            yield f"{module}.{name}"


def test_texts_patches_and_pages_name_public_things_alone():
    """A name is public where its package lists it, and in each file of the integrations."""
    deep = {name: files for name, files in shown().items() if not public(name)}
    assert deep == {}


def public(name: str) -> bool:
    module, _, last = name.rpartition(".")
    if module.startswith("tikhon.integrations."):
        return True
    return last in public_names(importlib.import_module(module))


def test_searches_need_no_torch():
    code = (
        "import sys, tikhon.tuning.trials, tikhon.tuning.space, tikhon.tuning.searches; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
