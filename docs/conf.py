"""Sphinx configuration: furo, MyST, and an API reference written from the public names."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import reference  # noqa: E402

import tikhon  # noqa: E402

project = "tikhon"
author = "The tikhon developers"
copyright = "The tikhon developers"
version = release = tikhon.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "images"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_use_param = False
napoleon_use_rtype = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_math_renderer = "mathml"
html_theme = "furo"
html_extra_path = ["llms.txt", "diagnosis.schema.json"]
html_title = "tikhon"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1d4ed8", "color-brand-content": "#1d4ed8"},
    "dark_css_variables": {"color-brand-primary": "#7db0ff", "color-brand-content": "#7db0ff"},
}

reference.write(HERE / "api")


def setup(app) -> None:
    app.connect("autodoc-process-docstring", reference.to_rst, priority=400)
    app.connect("source-read", reference.list_pages)
    app.connect("env-get-outdated", lambda *_: ["index"])  # its lists follow the pages there are
