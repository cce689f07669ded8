"""Every alarm of `watch` has its meaning and its change in both languages, from one table."""

from __future__ import annotations

import ast
import json
import pickle
import string
from pathlib import Path

import pytest

from tikhon import monitoring
from tikhon.languages import fill, strings
from tikhon.monitoring.alarms import alarm
from tikhon.monitoring.rules import FIGURES, OTHER_RULES, ROOT_RULES

PLACED = {"where", "severity", "key"}  # arguments of `alarm` that no sentence shows


def fields(language: str, key: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(strings(language)[key]) if name}


def written() -> dict[str, set[str]]:
    """Keys after `alarm_`: those that calls of `alarm` write out, and the signs of the rules."""
    found = {rule: set(FIGURES.get(rule, ())) for rule in (*ROOT_RULES, *OTHER_RULES)
             if isinstance(rule, str)}  # fmt: skip
    for path in Path(monitoring.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
        keys = {t for t in texts if isinstance(t, str) and f"alarm_{t}" in strings("en")}
        found |= {key: found.get(key, set()) for key in keys}
    return found


def test_every_alarm_is_in_use_and_has_a_change():
    keys = {k.removeprefix("alarm_") for k in strings("en") if k.startswith("alarm_")}
    assert keys == {k.removeprefix("change_") for k in strings("en") if k.startswith("change_")}
    assert keys == set(written())


@pytest.mark.parametrize("key", sorted(k for k in strings("en") if k.startswith("alarm_")))
def test_both_languages_show_the_same_figures(key):
    assert fields("en", key) == fields("zh", key)
    assert not fields("en", key.replace("alarm_", "change_")), "a change has no figures"


def test_calls_give_the_figures_that_their_sentences_show():
    checked = 0
    for path in Path(monitoring.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "alarm":
                names = {k.arg: k.value for k in node.keywords}
                key = names.get("key", node.args[0])
                if None not in names and isinstance(key, ast.Constant):
                    assert fields("en", f"alarm_{key.value}") == set(names) - PLACED, key.value
                    checked += 1
    assert checked > 25
    for code, names in FIGURES.items():
        assert fields("en", f"alarm_{code}") == set(names)


def test_an_alarm_is_told_in_both_languages_from_what_was_saved():
    found = alarm("schedule_overrun", where=("cosine",), length=10, moves=120)
    assert "10 steps and made 120" in found.meaning and str(found).endswith(found.change)
    saved = json.loads(json.dumps(found.to_dict()))
    assert saved["meaning"] == found.meaning and saved["where"] == ["cosine"]
    told = saved["sentences"]["meaning"]
    assert "10 步，却走了 120 步" in fill("zh", told["key"], told["values"])
    assert pickle.loads(pickle.dumps(found)) == found
