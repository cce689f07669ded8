"""The page of a table: columns, reasons, notices and what the model relies on."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

import pytest

import tikhon
from sample_runs import save
from tikhon import report
from tikhon.data.columns import Column
from tikhon.report.kinds import columns, sentences
from tikhon.report.kinds.sentences import sentence
from tikhon.report.page import Label, Page, PageTable
from tikhon.report.saved import read

DATA = Path(tikhon.__file__).parent / "data"
TABLE = {
    "columns": [
        {"name": "age", "kind": "number", "missing": 1200, "inputs": 2, "readings": ["in kg"],
         "mean": 40.0, "deviation": 2.0},
        {"name": "plan", "kind": "category", "missing": 0, "inputs": 9, "readings": [],
         "levels": ["x", "y"], "of": 9},
    ],
    "left_out": [{"name": "id", "reason": "an identifier: another code in each of 30 rows"}],
    "target": {"classes": ["no", "yes"],
               "rows": {"train": [5, 4], "valid": [2, 1], "test": [1, 1]}},
    "notices": [{"kind": "leak", "text": "'plan' alone predicts the target: is it known at "
                 "prediction time? "
                                         "(--drop leaves it out)"},
                {"kind": "left_out", "text": "columns not used: 'id' (an identifier)"}],
}  # fmt: skip
RELIED = {"rows": 364, "columns": [["age", 0.2, 0.1, 0.3], ["plan", 0.01, -0.01, 0.03]]}


def page(folder: Path, relied: dict, *, statements: Sequence = ({"code": "one_epoch"},)) -> Page:
    config = {"kind": "fit", "data": {"name": "t", "table": TABLE}}
    told = [{"level": "watch"} | statement for statement in statements]
    result = {"kind": "fit", "importances": relied, "statements": told}
    return report.build(read(save(folder, config, [], result)))


def tables(page: Page) -> dict[str, PageTable]:
    blocks = [b for s in page.sections for b in s.blocks if isinstance(b, PageTable)]
    return {table.caption.key: table for table in blocks}


def shown(cell, language: str = "en") -> str:
    return cell.text(language) if isinstance(cell, Label) else getattr(cell, "text", cell)


def test_columns_of_a_table_are_shown(tmp_path):
    found = tables(page(tmp_path / "run", RELIED))
    used = [[shown(cell) for cell in row] for row in found["columns_caption"].rows]
    assert used[0] == ["age", "number", "40.0 ± 2.000; in kg", "1,200", "2"]
    assert used[1][:3] == ["plan", "category", "x, y, ..."]
    assert shown(found["columns_caption"].rows[0][2], "zh") == "40.0 ± 2.000；单位 kg"
    [[_, reason]] = found["left_out_caption"].rows
    assert shown(reason, "zh") == "标识符：30 行各有不同的编码"
    assert [row[1:] for row in found["classes_caption"].rows] == [("5", "2", "1"), ("4", "1", "1")]
    [[notice]] = found["notices_caption"].rows
    assert "就能得出目标" in shown(notice, "zh")


def test_a_suspected_leak_comes_before_praise(tmp_path):
    found = page(tmp_path / "run", RELIED)
    assert "'plan' alone predicts the target" in shown(found.verdict) and found.level == "watch"
    assert found.more[0].key == "verdict_one_epoch"


def test_only_a_certain_rise_is_relied_on(tmp_path):
    told = page(tmp_path / "a", RELIED)
    assert [shown(s) for s in told.more[1:]] == [
        "Relies most on (increase in loss when shuffled): age (+0.200)."
    ]
    [chart] = next(s for s in told.sections if s.title.key == "relies").blocks
    assert [trace["marker"]["color"] for trace in chart.figure["data"]] == ["series-1", "muted"]
    none = {"rows": 9, "columns": [["age", 0.2, -0.1, 0.5]]}
    assert "no single column" in shown(page(tmp_path / "b", none).more[-1])
    assert [shown(s) for s in page(tmp_path / "c", {}).more] == [shown(told.more[0])]


def test_a_model_that_is_no_better_than_one_answer_relies_on_nothing(tmp_path):
    worse = [
        {"code": "no_better_mean", "rows": "9", "part": "test", "score": "1", "baseline": "1"}
    ]
    told = page(tmp_path / "run", RELIED, statements=worse)
    assert not any("elies" in shown(s) for s in (told.verdict, *told.more))
    assert all(s.title.key != "relies" for s in told.sections)


def texts(name: str, wanted) -> list[str]:
    """The sentences of a module, with 7 in the place of every number and name."""
    found = []
    for node in ast.walk(ast.parse((DATA / name).read_text(encoding="utf-8"))):
        found += [filled(part) for part in wanted(node)]
    return [text for text in found if " " in text]


def filled(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "7" for v in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else ""


NOTICING = ("noticing.py", "target.py", "reading.py")


def noticed(name: str) -> list[tuple[str, str]]:
    """The kind and the text of every notice that a module makes."""
    found = []
    for function in ast.walk(ast.parse((DATA / name).read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef):
            continue
        named = {
            ast.unparse(node.targets[0]): filled(node.value)
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Notice":
                kinds = ast.unparse(node.args[0]).split(" if ")[0].strip("f'").split("_{")
                text = named.get(ast.unparse(node.args[1])) or filled(node.args[1])
                text = text.replace("7 rows are also", "test rows are also")  # of a part
                found.append((kinds[0], text.replace("out7", "out (7 read as no value)")))
    return [
        (kind, text) for kind, text in found if " " in text and kind not in ("left_out", "leak")
    ]


EVERY_WAY = [
    {"decimal": ",", "unit": "€", "missing": ("-",), "words": ("<", "low")},
    {"decimal": ""},
    {"format": "dmy", "short": True},
    {"format": "mdy"},
    {"kind": "boolean", "spellings": ("0", "Y", "no", "yes")},
    {"kind": "category", "spellings": ("PRO",)},
    {"kind": "text", "format": "words"},
    {"kind": "text", "format": "letters"},
]


@pytest.mark.parametrize("given", EVERY_WAY, ids=str)
def test_how_a_column_was_read_is_told_in_both_languages(given):
    readings = Column(**{"name": "a", "kind": "number", **given}).readings
    assert readings
    assert [r for r in readings if not isinstance(sentence(r, "reading_"), Label)] == []


def reasons(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.keyword) and node.arg == "reason":
        return [node.value]
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "reason":
        return [node.value]
    return []


def test_every_notice_and_reason_is_told_in_both_languages():
    told = [entry for name in NOTICING for entry in noticed(name)]
    assert len(told) >= 13
    asked = ": is it known at prediction time? (--drop leaves it out)"
    told += [("leak", f"'a' alone predicts the target{share}{asked}")
             for share in ("", " of 99.1% of the rows")]  # fmt: skip
    missing = [(kind, text) for kind, text in told
               if not isinstance(sentence(text, f"notice_{kind}"), Label)]  # fmt: skip
    assert missing == []
    why = [*texts("columns.py", reasons), *texts("table.py", reasons)]
    assert len(why) >= 5
    assert [t for t in why if not isinstance(sentence(t, "reason_"), Label)] == []
    assert isinstance(sentences.told("something else", "notice_"), columns.Name)
