"""The reasons of a diagnosis: made from one table, told in every language."""

from __future__ import annotations

import ast
import json
import pickle
import re
import string
from pathlib import Path

import pytest

import tikhon
from tikhon.diagnosis import checks
from tikhon.diagnosis.checks import operations
from tikhon.diagnosis.codes import CODES
from tikhon.diagnosis.findings import Finding
from tikhon.languages import Sentence, fill, sentence, strings
from tikhon.report.kinds import diagnosis
from tikhon.report.page import LANGUAGES, Label, saved_label


def calls() -> list[tuple[re.Pattern[str], set[str | None]]]:
    """The keys of every `sentence(...)` and of `PLACED`, as patterns, with the names of values."""
    found = []
    for path in sorted(Path(tikhon.__file__).parent.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "sentence(" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "sentence":
                key = pattern(node.args[0])
                if not key.pattern.startswith("["):  # of a family by name
                    found.append((key, {k.arg for k in node.keywords}))
    found += [(re.compile(row.why), {None}) for row in operations.PLACED]  # **values of a fact
    return found


def pattern(node: ast.expr) -> re.Pattern[str]:
    """What a literal key, or one with parts that are put in, can be."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return re.compile("".join(p.value if isinstance(p, ast.Constant) else "[a-z]+" for p in parts))


def fields(key: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(strings("en")[key]) if name}


def test_every_call_names_a_sentence_and_its_values():
    told = calls()
    assert len(told) > 150
    for key, names in told:
        known = [k for k in strings("en") if key.fullmatch(k)]
        assert known, key.pattern
        if None not in names:  # no **values
            assert all(fields(k) == names for k in known), key.pattern


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_sentence_is_written_twice(language):
    text = (Path(tikhon.__file__).parent / "languages" / f"{language}.json").read_text("utf-8")
    keys = [key for key, _ in json.loads(text, object_pairs_hook=list)]
    assert len(keys) == len(set(keys)), {key for key in keys if keys.count(key) > 1}


def test_every_reason_is_in_use():
    told = [key for key, _ in calls()]
    keys = {key for key in strings("en") if key.startswith(("why_", "called_", "effect_"))}
    keys -= {f"effect_{code}" for code in CODES} | {"effect_note"}
    keys -= {key.replace("why", "effect") for key in keys}  # of a reason
    assert {key for key in keys if not any(t.fullmatch(key) for t in told)} == set()


DEAD = sentence("why_dead", share=0.97, layer=sentence("called_layer", name="3"), start=0.02)
REASONS = [
    (
        sentence("why_inits", why=sentence("why_scale", why=DEAD, size=300.0), count=3, all=5),
        "97% of the units of layer 3 are zero for all samples (2% at the start); inputs have "
        "size 300 (about 1 is healthy) (in 3 of 5 initialisations)",
        "第 3 层有 97% 的单元对所有样本都为零（开始时为 2%）；输入的大小为 300（健康值约为 1）"
        "（5 次初始化中有 3 次）",
    ),
    (
        sentence("why_passes_weights", layer="encoder.fc", gain=1e-9, weight=0.001, slope=1.0),
        "encoder.fc passes 1e-09 of the signal back: its weights (weights 0.001, slope 1)",
        "encoder.fc只把信号的 1e-09 传回：问题在其权重（权重 0.001，斜率 1）",
    ),
    (
        sentence("why_born_saturated_bias", layer=sentence("called_model"), bias=3.0),
        "the model is saturated before the first step, because of a bias 3.0 times the weighted "
        "input",
        "模型在第一步之前就已饱和，原因是偏置为加权输入的 3.0 倍",
    ),
    (
        sentence("why_large", gain=2.0, excess=float("inf")),
        "weights have gain 2.0 (Xavier 1, He 1.4); the initial loss is inf times that of a "
        "constant prediction",
        "权重的增益为 2.0（Xavier 为 1，He 为 1.4）；最初的损失是常数预测的 inf 倍",
    ),
    (
        sentence("why_equal", count=1),
        "all weights of 1 layer are equal: its units get equal gradients forever",
        "1 层的所有权重都相等：其单元将永远得到相等的梯度",
    ),
]


@pytest.mark.parametrize(("reason", "english", "chinese"), REASONS)
def test_a_reason_is_told_in_both_languages_from_the_saved_finding(reason, english, chinese):
    saved = json.loads(json.dumps(Finding("poor_init", "critical", why=reason).to_dict()))
    assert saved["why"] == reason == english
    told = saved_label(saved["sentences"]["why"])
    assert (told.text("en"), told.text("zh")) == (english, chinese)
    again = pickle.loads(pickle.dumps(reason))
    assert isinstance(again, Sentence) and again == reason and again.to_dict() == reason.to_dict()


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_choice_of_words_follows_the_number(language):
    for key, words in strings(language).items():
        for _, name, spec, _ in string.Formatter().parse(words):
            if name and "|" in (spec or ""):
                assert spec and spec.count("|") == 1 and f"{{{name}" in words, key
    assert "1 unit in" in sentence("why_narrow", width=1, layer="fc")
    assert "2 units in" in sentence("why_narrow", width=2, layer="fc")


def test_a_finding_without_keys_is_told_as_it_was_written():
    early = "what came early in a sequence is not learned"
    found = {"code": "vanishing_gradient", "why": "the moon is full", "effect": early}
    cell = diagnosis._reason(found)
    assert isinstance(cell, Label)
    assert "the moon is full" in cell.text("zh") and early in cell.text("zh")
    bare = diagnosis._reason({"code": "vanishing_gradient", "why": "no parameters"})
    assert bare.text("zh").startswith(strings("zh")["finding_vanishing_gradient"])


def changes() -> list[str]:
    """Every literal of the checks that a finding gives as its `fix`, values put in as `x`."""
    found = []
    for path in sorted(Path(checks.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "fix":
                found += literals(node.value)
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "fix":
                found += literals(node.value)
    return found


def literals(node: ast.expr) -> list[str]:
    if isinstance(node, ast.IfExp):
        return literals(node.body) + literals(node.orelse)
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    if not all(isinstance(p, ast.Constant | ast.FormattedValue) for p in parts):
        return []
    return ["".join(str(p.value) if isinstance(p, ast.Constant) else "x" for p in parts)]


def test_a_change_that_is_not_code_alone_has_a_sentence_in_every_language():
    assert len(changes()) > 20
    for text in filter(None, changes()):
        ast.parse(text)  # words are no Python: they belong into `languages`


def test_a_change_stands_on_the_page_in_its_language():
    fix = sentence("fix_rsample")
    saved = json.loads(json.dumps(Finding("detached", "critical", fix=fix).to_dict()))
    for language in LANGUAGES:
        change = fill(language, "fix_rsample", {})
        assert diagnosis.finding_sentences([saved])[-1].text(language).endswith(change)
        assert diagnosis.findings([saved]).blocks[0].rows[0][-1].text(language).endswith(change)
    saved = Finding("detached", "critical", fix="x = x.relu()").to_dict()
    assert "x = x.relu()" in diagnosis.finding_sentences([saved])[-1].text("zh")
