"""The API reference, made from `tikhon.__all__`, so that no public name can be left out."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import tikhon

GUIDES = {  # the groups of the front page, in reading order
    "start": ("quickstart", "concepts", "words"),
    "regularize": ("regularize", "penalties", "layers", "mc_dropout", "sparsity", "compaction"),
    "strengths": ("hypergradient", "tuning"),
    "diagnose": ("diagnosis",),
    "shell": ("cli", "data", "report", "compare", "live", "reliability"),
    "integrations": ("sklearn", "integrations", "examples"),
    "background": ("article", "article_gradients", "article_faq", "spred", "benchmarks"),
}
PROJECT = ("architecture", "contributing", "changelog")


def submodules() -> list[str]:
    """The modules that are public by themselves."""
    return [name for name in tikhon.__all__ if isinstance(getattr(tikhon, name), ModuleType)]


def write(folder: Path) -> None:
    """Write the pages of the reference; raises for a public name without a docstring."""
    folder.mkdir(exist_ok=True)
    pages = {name: module_page(name, getattr(tikhon, name)) for name in submodules()}
    for name, text in {"tikhon": top_page(), **pages}.items():
        target = folder / f"{name}.md"
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


def top_page() -> str:
    """Every name of `import tikhon as tk`; those of a public module are described there."""
    rows: dict[str, list[str]] = {"function": [], "class": [], "module": []}
    blocks = []
    for name in tikhon.__all__:
        value = getattr(tikhon, name)
        home = (
            ""
            if isinstance(value, ModuleType)
            else next((m for m in submodules() if name in public_names(getattr(tikhon, m))), "")
        )
        page = f"{name}.md" if isinstance(value, ModuleType) else f"{home or 'tikhon'}.md"
        anchor = "" if isinstance(value, ModuleType) else f"#{name.lower()}"
        kind = "module" if not anchor else "class" if inspect.isclass(value) else "function"
        rows[kind].append(f"| [`{name}`]({page}{anchor}) | {summary(name, value)} |")
        if not home and not isinstance(value, ModuleType):
            blocks.append(block("tikhon", name, value))
    tables = [
        f"| {kind} | what it is |\n|---|---|\n" + "\n".join(found) for kind, found in rows.items()
    ]
    return "# `import tikhon as tk`\n\n" + "\n\n".join([*tables, *blocks])


def module_page(name: str, module: ModuleType) -> str:
    """One public module: its docstring, then everything in its `__all__`."""
    text = inspect.getdoc(module)
    if not text:
        raise RuntimeError(f"tikhon.{name} is public and has no docstring")
    blocks = [
        block(module.__name__, entry, getattr(module, entry))
        for entry in public_names(module)
        if not isinstance(getattr(module, entry), ModuleType)
    ]
    return f"# `tikhon.{name}`\n\n{text}\n\n" + "\n".join(blocks)


def public_names(module: ModuleType) -> list[str]:
    """What a public module offers: its `__all__`, or else what it defines itself."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = {n: v for n, v in vars(module).items() if not n.startswith("_")}
    return [n for n, v in own.items() if getattr(v, "__module__", "") == module.__name__]


def summary(name: str, value: object) -> str:
    """The first sentence of a docstring."""
    text = inspect.getdoc(value)
    if not text:
        raise RuntimeError(f"tikhon.{name} is public and has no docstring")
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def block(module: str, name: str, value: Any) -> str:
    """The directive that describes one name."""
    summary(name, value)
    kind = "autoclass" if inspect.isclass(value) else "autofunction"
    if not inspect.isclass(value) and not callable(value):
        kind = "autodata"
    options = "\n   :members:" if kind == "autoclass" else ""
    if kind == "autoclass" and value.__bases__ != (object,):
        options += "\n   :show-inheritance:"
    directive = f".. {kind}:: {module}.{name}{options}"
    return f"## {name}\n\n```{{eval-rst}}\n{directive}\n```\n"


def to_rst(app, what, name, value, options, lines: list[str]) -> None:
    """Docstrings are plain text with `code` in backticks; make that valid reStructuredText."""
    chunks: list[tuple[bool, list[str]]] = [(False, [])]
    for line in lines:
        shown = line.lstrip().startswith(">>>") or (chunks[-1][0] and bool(line.strip()))
        if shown != chunks[-1][0]:
            chunks.append((shown, []))
        chunks[-1][1].append(line)
    parts = [text if shown else _escape("\n".join(text)).split("\n") for shown, text in chunks]
    lines[:] = [line for part in parts for line in part]


def _escape(text: str) -> str:
    parts = re.split(r"(`+[^`]+`+)", text)
    for i, part in enumerate(parts):
        if part.startswith("`"):
            parts[i] = f"``{part.strip('`')}``"
            if i + 1 < len(parts) and parts[i + 1][:1].isalnum():
                parts[i] += "\\ "
        else:
            part = re.sub(r"([|*])", r"\\\1", part)
            parts[i] = re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", part)
    return "".join(parts)


def list_pages(app, docname: str, source: list[str]) -> None:
    """Fill in the front page's lists with the pages that there are, in reading order."""
    if docname != "index":
        return
    here = Path(app.srcdir)
    found = {p.stem for p in here.glob("*.md") if ".zh-CN" not in p.name} - {"index"}
    known = {name for names in (*GUIDES.values(), PROJECT) for name in names}
    lists = {
        **{group: [n for n in names if n in found] for group, names in GUIDES.items()},
        "tutorials": [n for n in _below(here) if not n.endswith(".zh-CN")],
        "chinese": [n for n in _below(here) if n.endswith(".zh-CN")],
        "reference": ["api/tikhon", *(f"api/{name}" for name in submodules())],
        "project": [n for n in PROJECT if n in found],
    }
    lists["background"] += sorted(found - known)
    for name, pages in lists.items():
        source[0] = source[0].replace(f"%{name}%", "\n".join(pages))


def _below(here: Path) -> list[str]:
    """Return the tutorials and translations, the quickstart first."""
    pages = [*here.glob("tutorials/*.md"), *here.glob("*.zh-CN.md")]
    names = sorted(p.relative_to(here).as_posix().removesuffix(".md") for p in pages)
    return sorted(names, key=lambda name: not name.startswith("quickstart"))
