"""The page of a table: columns, reasons, notices and what the model relies on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sample_runs import save
from tikhon import report
from tikhon.data.column import Column
from tikhon.languages import sentence
from tikhon.report.kinds import columns
from tikhon.report.kinds.columns import PARTS
from tikhon.report.page import Label, Page, PageTable
from tikhon.report.saved import read

TABLE = {
    "columns": [
        {"name": "age", "kind": "number", "missing": 1200, "inputs": 2, "mean": 40.0,
         "deviation": 2.0, "readings": [sentence("reading_unit", unit="kg").with_text()]},
        {"name": "plan", "kind": "category", "missing": 0, "inputs": 9, "readings": [],
         "levels": ["x", "y"], "of": 9},
    ],
    "left_out": [{"name": "id", "reason": sentence("reason_code", rows=30).with_text()}],
    "target": {"classes": ["no", "yes"],
               "rows": {"train": [5, 4], "valid": [2, 1], "test": [1, 1]}},
    "notices": [
        sentence("notice_leak", columns="'plan'").with_text(),
        sentence("notice_left_out", columns="'id' (an identifier)").with_text(),
    ],
}  # fmt: skip
RELIED = {"rows": 364, "columns": [["age", 0.2, 0.1, 0.3], ["plan", 0.01, -0.01, 0.03]]}


def page(folder: Path, relied: dict, **more: object) -> Page:
    config = {"kind": "fit", "data": {"name": "t", "table": TABLE}}
    told = [{"level": "watch", "code": "one_epoch"}]
    result = {"kind": "fit", "importances": relied, "statements": told, **more}
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


def test_of_thousands_of_columns_and_classes_a_page_has_the_first(tmp_path, monkeypatch):
    many = {"classes": [f"c{i}" for i in range(300)], "rows": dict.fromkeys(PARTS, [2] * 300)}
    monkeypatch.setitem(TABLE, "target", many)
    table = tables(page(tmp_path / "run", RELIED))["first_rows"]
    assert len(table.rows) == 50
    assert shown(table.caption).endswith("The first 50 of 300; config.json has them all.")


def test_a_suspected_leak_comes_before_praise(tmp_path):
    found = page(tmp_path / "run", RELIED)
    assert "'plan' alone predicts the target" in shown(found.verdict) and found.level == "watch"
    assert found.remarks[0].key == "verdict_one_epoch"


def test_only_a_certain_rise_is_relied_on(tmp_path):
    told = page(tmp_path / "a", RELIED)
    assert [shown(s) for s in told.remarks[1:]] == [
        "Relies most on (increase in loss when shuffled): age (+0.200)."
    ]
    [chart] = next(s for s in told.sections if s.title.key == "relies").blocks
    assert [trace["marker"]["color"] for trace in chart.figure["data"]] == ["series-1", "muted"]
    none = {"rows": 9, "columns": [["age", 0.2, -0.1, 0.5]]}
    assert "no single column" in shown(page(tmp_path / "b", none).remarks[-1])
    assert [shown(s) for s in page(tmp_path / "c", {}).remarks] == [shown(told.remarks[0])]


def test_a_model_that_is_no_better_than_one_answer_relies_on_nothing(tmp_path):
    told = page(tmp_path / "run", RELIED, margins={"constant": {"rmse": [0.1, 0.2]}})
    assert not any("elies" in shown(s) for s in (told.verdict, *told.remarks))
    assert all(s.title.key != "relies" for s in told.sections)


EVERY_WAY = [
    {"decimal": ",", "unit": "€", "missing": ("-",), "words": ("<", "low")},
    {"decimal": ""},
    {"format": "dmy", "short": True},
    {"format": "mdy"},
    {"kind": "boolean", "spellings": ("0", "Y", "no", "yes")},
    {"kind": "category", "spellings": ("PRO",)},
    {"kind": "text", "format": "words"},
    {"kind": "text", "format": "letters"},
    {"kind": "date", "format": "%Y%m%d"},
    {"words": ("*",)},
]


@pytest.mark.parametrize("given", EVERY_WAY, ids=str)
def test_how_a_column_was_read_is_told_in_both_languages(given):
    column = Column(**{"name": "a", "kind": "number", **given})
    saved = json.loads(json.dumps([told.with_text() for told in column.readings]))
    cells = [columns.saved_text(entry) for entry in saved]
    assert [shown(cell) for cell in cells] == [str(told) for told in column.readings] != []
    assert all(re.search("[\u4e00-\u9fff]", shown(cell, "zh")) for cell in cells)
    assert column.reading == ", ".join(column.readings)


def test_runs_from_before_sentences_had_keys_are_told_as_they_are():
    assert shown(columns.saved_text("an identifier"), "zh") == "an identifier"
    older = [{"kind": "leak", "text": "'a' alone"}, {"kind": "read", "text": "read as 'b'"}]
    assert [shown(cell) for [cell] in columns.notice_table({"notices": older}).rows] == [
        "'a' alone"
    ]
