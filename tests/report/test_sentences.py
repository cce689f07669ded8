"""Every reason that a diagnosis can give is known to the report in both languages."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tikhon
from tikhon.languages import strings
from tikhon.report.kinds import diagnosis
from tikhon.report.kinds.sentences import sentence
from tikhon.report.page import Label

SOURCES = Path(tikhon.__file__).parent / "diagnosis"


def reasons() -> list[str]:
    """What is assigned to `why` in the checks, with 7 in the place of every number and name."""
    found = []
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and "why" in {ast.unparse(t) for t in node.targets}:
                values = node.value.values if isinstance(node.value, ast.BoolOp) else [node.value]
                values += [v.body for v in values if isinstance(v, ast.IfExp)]
                found += [filled(value) for value in values]
    return [text for text in found if text and not text.endswith(" ")]


def filled(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "7" for v in node.values)
    return ""


def test_every_reason_is_known():
    texts = reasons()
    assert len(texts) > 25
    # "at fault" and "dead or saturated" are words that the code puts in, not numbers
    unknown = [
        text
        for text in texts
        if not isinstance(sentence(text.replace("7 at fault", "ReLU is at fault")), Label)
        and " is 7 before the first step" not in text
        and text != "7 at 7, at step 7: 7"  # of `nothing_attended`, whose end is a name here
    ]
    assert unknown == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "97% of the units of layer 3 are zero on all samples (2% at the start); inputs have "
            "size 300 (about 1 is healthy) (in 3 of 5 inits)",
            "第 3 层有 97% 的单元对所有样本都为零（开始时为 2%）；输入的大小为 300（健康值约为 1）"
            "（5 次初始化中有 3 次）",
        ),
        (
            "encoder.fc passes 1e-09 of the signal back: its weights (weights 0.001, slope 1)",
            "encoder.fc只把信号的 1e-09 传回：问题在其权重（权重 0.001，斜率 1）",
        ),
        (
            "the model is saturated before the first step, through a bias 3.0 times the weighted "
            "input",
            "模型在第一步之前就已饱和，原因是偏置为加权输入的 3.0 倍",
        ),
    ],
)
def test_a_reason_in_chinese(text, shown):
    def words(label: Label | str, language: str) -> str:
        if isinstance(label, str):
            return label
        values = {name: words(value, language) for name, value in label.values.items()}
        return strings(language)[label.key].format(**values)

    assert words(sentence(text), "en") == text
    assert words(sentence(text), "zh") == shown


def test_an_unknown_reason_stays_as_it_is():
    assert sentence("the moon is full") == "the moon is full"


def test_the_effect_is_that_of_the_finding():
    early = "what came early in a sequence is not learned"
    found = {"code": "vanishing_gradient", "why": "no parameters", "effect": early}
    cell = diagnosis._reason(found)
    assert isinstance(cell, Label) and strings("en")[cell.values["effect"].key] == early
    usual = diagnosis._reason({"code": "vanishing_gradient", "why": "no parameters"})
    assert isinstance(usual, Label)
    assert usual.values["effect"].key == "effect_vanishing_gradient"
