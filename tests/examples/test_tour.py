"""The tour runs as it is kept: the same cells, every one without an error."""

import ast
import json
from pathlib import Path

import pytest

TOUR = Path(__file__).parents[2] / "examples/tour.ipynb"


def kinds(notebook):
    """What each cell shows, without its values, which differ from machine to machine."""
    return [
        [sorted(output.get("data", {})) for output in cell.get("outputs", [])]
        for cell in notebook["cells"]
    ]


SHORTER = {
    "epochs=60": "epochs=3",
    "range(300)": "range(3)",
    "strengths=40": "strengths=5",
    'budget="12runs", epochs=40': 'budget="2runs", epochs=4',
    "cross_entropy, optimizer=optimizer)": "cross_entropy, optimizer=optimizer, steps=20)",
}


def test_the_cells_run_when_shortened_and_show_tables_and_pictures_where_the_tour_does(
    monkeypatch,
):
    """In this process, without a kernel."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    notebook, names = json.loads(TOUR.read_text("utf-8")), {"__name__": "__main__"}
    left = set(SHORTER)
    for cell, kept in zip(notebook["cells"], kinds(notebook)):
        if cell["cell_type"] != "code":
            continue
        code = "".join(cell["source"])
        for whole, part in SHORTER.items():
            left -= {whole} if whole in code else set()
            code = code.replace(whole, part)
        *lines, last = ast.parse(code).body
        exec(compile(ast.Module(lines, []), "<cell>", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
            told = {data for output in kept for data in output}
            shown = not code.endswith(";")
            assert ("text/html" in told) == (shown and bool(value._repr_html_()))
            assert ("image/png" in told) == bool(pyplot.get_fignums())
        else:
            exec(compile(ast.Module([last], []), "<cell>", "exec"), names)
        pyplot.close("all")
    assert not left


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of the kernel's own transport
def test_the_tour_runs_and_shows_what_is_kept_with_it():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    kept = nbformat.read(TOUR, as_version=4)
    fresh = nbformat.from_dict(kept)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell["outputs"] = []
    nbclient.NotebookClient(fresh, timeout=300, kernel_name="python3").execute()
    assert kinds(fresh) == kinds(kept)
    pictures = [data for cell in kinds(kept) for data in cell if "image/png" in data]
    tables = [data for cell in kinds(kept) for data in cell if "text/html" in data]
    assert len(pictures) == 5 and len(tables) == 6
    outputs = [o for cell in kept.cells for o in cell.get("outputs", [])]
    assert not any(o["output_type"] in ("error", "stream") for o in outputs)
