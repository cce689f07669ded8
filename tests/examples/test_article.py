import re
import runpy
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples/article.py"


def test_the_example_runs_and_learns(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "digits"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    found = re.fullmatch(
        r"epoch 10  loss [\d.]+  penalty ([\d.]+)  exact zeros ([\d.]+)%  test accuracy ([\d.]+)",
        last,
    )
    assert found and float(found[1]) > 0 and float(found[3]) > 0.4


def test_it_is_a_plain_loop_of_about_thirty_lines():
    lines = [line for line in EXAMPLE.read_text().splitlines() if line.strip()]
    assert len(lines) <= 35 and sum("tk." in line for line in lines) == 1
