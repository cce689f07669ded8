"""The tree keeps its shape: small files, telling names, one writer."""

from __future__ import annotations

import ast
import re
import sys
from graphlib import TopologicalSorter

import pytest

from sources import FILES, SOURCE, TEXTS, nodes, trees

BUDGET = 600  # lines of a file
FUNCTION = 60  # lines of a function without its docstring

LONG: dict[str, int] = {}  # file -> its budget, with the reason
LONG_FUNCTIONS = {
    # one line an option or an argument that is handed on
    "cli/tune.py:tune": 105,
    "cli/path.py:path": 80,
    "cures/cure.py:cure": 66,
}
FORBIDDEN = {"utils", "util", "core", "common", "manager", "helper", "helpers", "engine", "misc"}
WRITERS = {  # files that may write, and what they write
    "runs/files.py": "every file",
    "runs/run_directory.py": "the lock of a run and the rows of its history",
    "data/download.py": "downloads, moved into place when their checksum is right",
    "runs/journal.py": "the journal of a search or a comparison, one line an event",
}
WRITING = {
    "write_text", "write_bytes", "to_csv", "to_parquet", "to_json", "savetxt", "savez", "dump",
    "save_file", "rename", "replace_file", "symlink_to", "touch",
}  # fmt: skip


def test_files_are_small_and_say_what_they_hold():
    assert [n for n, t in TEXTS.items() if len(t.splitlines()) > LONG.get(n, BUDGET)] == []
    assert [name for name, tree in trees().items() if not ast.get_docstring(tree)] == []


def test_functions_are_short():
    lengths = {
        f"{name}:{node.name}": length(node)
        for name, tree in trees().items()
        for node in nodes(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    long = {n: size for n, size in lengths.items() if size > LONG_FUNCTIONS.get(n, FUNCTION)}
    assert long == {}


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_exceptions_are_still_needed():
    for name in LONG:
        assert TEXTS[name].count("\n") > BUDGET, f"{name} is short again: take it off the list"
    for name in LONG_FUNCTIONS:
        assert name.split(":")[0] in TEXTS
    for name in WRITERS:
        assert list(writes(trees()[name])), f"{name} no longer writes: take it off the list"


def test_nothing_is_kept_from_the_formatter():
    assert [name for name, text in TEXTS.items() if "fmt: skip" in text] == []


HIDDEN = {  # where functions import tikhon itself, and why
    "cli": "a command tells its options before torch is imported",
}
LIGHT = {"tikhon", *sys.stdlib_module_names} - {"fcntl"}  # which not every system has


def test_no_import_of_the_package_hides_in_a_function():
    """What a file needs stands at its top: the contracts hold the order there."""
    checked = {name: tree for name, tree in trees().items() if name.split("/")[0] not in HIDDEN}
    assert {n: found for n, tree in checked.items() if (found := list(hidden_imports(tree)))} == {}


def hidden_imports(tree: ast.Module):
    """Imports of the package and of the standard library within functions."""
    for function in nodes(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if any(name.split(".")[0] in LIGHT for name in names):
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_a_hidden_import_is_recognised():
    for line in ("from tikhon.data import load", "import tikhon.data", "import math"):
        assert list(hidden_imports(ast.parse(f"def f():\n    if True:\n        {line}\n")))
        assert not list(hidden_imports(ast.parse(f"{line}\ndef f():\n    import pandas\n")))
    for name in HIDDEN:
        mine = (tree for file, tree in trees().items() if file.split("/")[0] == name)
        assert any(list(hidden_imports(tree)) for tree in mine)


def test_what_is_imported_stands_where_it_is_imported_from():
    # the command line imports within its functions, where nothing but a run of them would tell
    held = {name: defined(tree) for name, tree in trees().items()}
    stub = (SOURCE / "__init__.pyi").read_text(encoding="utf-8")
    held["__init__.py"] |= defined(ast.parse(stub))
    missing = [
        f"{file}: {node.module}.{name.name}"
        for file, tree in trees().items()
        for node in nodes(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tikhon"
        for name in node.names
        if not stands(node.module or "", name.name, held)
    ]
    assert not missing


def defined(tree: ast.Module) -> set[str]:
    """The names that a module has outside its functions and classes."""
    names: set[str] = set()
    for node in tree.body:
        for inner in [node, *ast.walk(node)] if isinstance(node, ast.If | ast.Try) else [node]:
            if isinstance(inner, ast.Import | ast.ImportFrom):
                names |= {(name.asname or name.name).split(".")[0] for name in inner.names}
            elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(inner.name)
            elif isinstance(inner, ast.Assign | ast.AnnAssign):
                names |= {name.id for name in ast.walk(inner) if isinstance(name, ast.Name)}
    return names


def stands(module: str, name: str, held: dict[str, set[str]]) -> bool:
    """Whether a module of the package has the name, or a module of that name inside."""
    path = "/".join(module.split(".")[1:])
    parts = [f"{path}.py", f"{path}/__init__.py".lstrip("/")]
    inside = f"{path}/{name}".lstrip("/")
    return any(name in held.get(part, ()) for part in parts) or bool(
        {f"{inside}.py", f"{inside}/__init__.py"} & held.keys()
    )


def test_no_circle_among_modules_not_even_of_types():
    """The contracts see what is imported when a module is; this sees every import there is."""
    within = {name: set(imported(tree)) - {name} for name, tree in trees().items()}
    assert len(tuple(TopologicalSorter(within).static_order())) >= len(FILES)


def imported(tree: ast.Module):
    """The files of the package that a module names in an import, wherever that stands."""
    for node in nodes(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tikhon":
            for alias in node.names:
                path = "/".join([*(node.module or "").split(".")[1:], alias.name])
                home = path.rpartition("/")[0]
                files = (f"{path}.py", f"{home}.py", f"{home}/__init__.py".lstrip("/"))
                yield next(file for file in files if file in TEXTS)


def test_little_is_of_any_type():
    """`Any` is said in 12 of 1,000 lines at most, imports of it included."""
    named = sum(len(re.findall(r"\bAny\b", text)) for text in TEXTS.values())
    assert 1000 * named / sum(len(text.splitlines()) for text in TEXTS.values()) < 12


def test_names_say_what_is_inside():
    parts = {part for path in FILES for part in path.relative_to(SOURCE).with_suffix("").parts}
    assert parts & FORBIDDEN == set()


def test_every_class_has_a_name_of_its_own():
    """Callbacks of the frameworks alone share theirs: one of each framework."""
    places: dict[str, list[str]] = {}
    for name, tree in trees().items():
        if name.split("/")[0] != "integrations":
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(name)
    assert not {name: files for name, files in places.items() if len(files) > 1}


def test_only_the_writers_write():
    others = {name: tree for name, tree in trees().items() if name not in WRITERS}
    assert {name: found for name, tree in others.items() if (found := list(writes(tree)))} == {}


def writes(tree: ast.Module):
    """Calls that create or change a file."""
    for node in nodes(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        plain = node.func.id if isinstance(node.func, ast.Name) else name
        if name.startswith("to_") and not node.args:
            continue  # a frame as text
        if name in WRITING or (plain == "open" and opens_for_writing(node)):
            yield f"line {node.lineno}: {ast.unparse(node.func)}"
        elif name in ("save", "replace") and owner(node) in ("torch", "np", "numpy", "os"):
            yield f"line {node.lineno}: {ast.unparse(node.func)}"


def owner(call: ast.Call) -> str:
    value = call.func.value if isinstance(call.func, ast.Attribute) else None
    return value.id if isinstance(value, ast.Name) else ""


def opens_for_writing(call: ast.Call) -> bool:
    """Whether `open` gets a mode that writes (`os.open` counts by its flags)."""
    if call.args and ast.unparse(call.args[0]) == "os.devnull":
        return False
    if owner(call) == "os":
        return any(flag in ast.unparse(call) for flag in ("O_WRONLY", "O_RDWR", "O_CREAT"))
    texts = [*call.args, *(k.value for k in call.keywords if k.arg == "mode")]
    modes = [t.value for t in texts if isinstance(t, ast.Constant) and isinstance(t.value, str)]
    return any(set(mode) & set("wax+") and set(mode) <= set("rwaxbt+") for mode in modes)


@pytest.mark.parametrize(
    ("code", "caught"),
    [
        ("open('f', 'w')", True),
        ("open('f')", False),
        ("path.open('ab')", True),
        ("path.open(mode='rb')", False),
        ("path.write_text('x')", True),
        ("frame.to_csv('f')", True),
        ("frame.to_csv(index=False)", False),
        ("write_bytes(path, b'')", False),
        ("torch.save(x, 'f')", True),
        ("os.open('f', os.O_RDONLY)", False),
        ("os.open('f', os.O_WRONLY)", True),
        ("text.replace('a', 'b')", False),
    ],
)
def test_writing_is_recognised(code, caught):
    assert bool(list(writes(ast.parse(code)))) == caught
