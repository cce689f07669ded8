from __future__ import annotations

import itertools
import json
import re
import string
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from scipy import stats

import tikhon
from sample_runs import save
from tikhon import report
from tikhon.diagnosis.thresholds import MEASURES
from tikhon.errors import DataError, InputError, StorageError
from tikhon.languages import strings
from tikhon.report import charts
from tikhon.report.html import render, script_json, to_json
from tikhon.report.kinds import compare, diagnosis, elements, path, predictions, run_groups
from tikhon.report.page import (
    LANGUAGES,
    Chart,
    Fact,
    Label,
    Name,
    Page,
    PageTable,
    Section,
    label,
)
from tikhon.report.saved import SavedRun, read

VERBATIM = {"change_target_is_model", "change_rate_beside_groups", "change_slope_without_graph"}
KINDS = ["fitted", "demoed", "tuned", "pathed", "diagnosed", "cured", "compared", "hostile"]
SOURCE = Path(report.__file__).parent


def html(run, **options):
    return report.write(run, **options).read_text(encoding="utf-8")


def test_every_language_says_the_same_things():
    filled = {
        name: {
            key: {f for _, f, _, _ in string.Formatter().parse(text) if f}
            for key, text in strings(name).items()
        }
        for name in LANGUAGES
    }
    assert filled["en"] == filled["zh"]
    same = {
        key
        for key, words in strings("en").items()
        if words == strings("zh")[key] and re.search("[a-z]", re.sub(r"{.*?}", "", words))
    }
    assert same <= {"arm_dropout", "arm_l2", *(f"cures_{code}" for code in SAME), *VERBATIM}


def test_every_text_is_used():
    code = "".join(
        file.read_text(encoding="utf-8")
        for file in SOURCE.parent.rglob("*")
        if file.suffix in (".py", ".jinja") and file.is_file()
    )
    families = tuple(  # the beginnings of keys that are put together, and those that tables name
        re.findall(r'f"([a-z]+_[a-z_]*){', code)
        + "effect_ cures_ alarm_ change_ treatment_ target_ audit_ cost_ units_".split()
    )
    unused = [
        key for key in strings("en") if f'"{key}"' not in code and not key.startswith(families)
    ]
    assert unused == []


SAME = ("loss_is_a_sum", "nothing_to_train")  # code, or a dash


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_valid_plotly(kind, request):
    page = report.build(read(request.getfixturevalue(kind)))
    figures = [b.figure for s in page.sections for b in s.blocks if isinstance(b, Chart)]
    assert len(figures) >= 3
    for figure in figures:
        for language in LANGUAGES:
            go.Figure(one_language(to_json(figure), language))


def one_language(value, language, key=""):
    """What page.js does before it draws: a text of one language, a colour for a palette name."""
    if isinstance(value, dict):
        if {"en", "zh"} <= value.keys():
            return value[language]
        return {k: one_language(v, language, k) for k, v in value.items()}
    if key == "colorscale":
        return [[at, "#123456"] for at, _ in value]
    if isinstance(value, list):
        return [one_language(v, language, key) for v in value]
    return "#123456" if isinstance(value, str) and key.endswith("color") else value


def test_palette_names_exist(fitted, demoed, tuned, pathed, diagnosed):
    css = (SOURCE / "static/page.css").read_text(encoding="utf-8")
    light, dark = css.split("@media screen and (prefers-color-scheme: dark)")
    for run in (fitted, demoed, tuned, pathed, diagnosed):
        page = report.build(read(run))
        text = json.dumps(
            [to_json(b.figure) for s in page.sections for b in s.blocks if isinstance(b, Chart)]
        )
        scale = re.findall(r'\[[0-9.]+, "([a-z]+)"\]', text)
        for name in {*re.findall(r'"[a-z]*color": "([^"]+)"', text), *scale}:
            assert f"--{name}:" in light, name
            assert f"--{name}:" in dark, name


class Outside(HTMLParser):
    """Collects what a page would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self.policy = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href") and not value.startswith(("#", "data:")):
                self.links.append(value)
            if name.startswith("on"):
                self.handlers.append(f"{tag} {name}")
            if name == "id":
                self.ids.append(value)
        if tag == "meta" and ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"]


@pytest.mark.parametrize("kind", KINDS)
def test_page_is_self_contained(kind, request):
    seen = Outside(html(request.getfixturevalue(kind)))
    assert (seen.links, seen.handlers) == ([], [])
    assert len(seen.ids) == len(set(seen.ids))
    assert "default-src 'none'" in seen.policy
    assert "unsafe-inline" not in seen.policy.split("style-src")[0]


def test_hostile_text_is_escaped_everywhere():
    evil = "</script><img src=x onerror=alert(1)>\"'&\u2028"
    chart = Chart(
        Name(evil),
        charts.lines_over_epochs([1], {evil: [1.0]}, label("zeros")),
        label("alt_over_time", what=evil, last=evil),
    )
    table = PageTable(
        label("alt_over_time", what=evil, last=evil),
        (Name(evil), label("value")),
        ((Name(evil), "1"), (Name(evil), Name(evil))),
        0,
    )
    page = Page(
        title=Name(evil), level="good",
        verdict=label("fit_plain", metric=evil, train=evil, valid=evil),
        facts=(Fact(label("zeros"), evil),), about=((label("about_data"), evil),),
        sections=(Section(Name(evil), (chart, table)),),
    )  # fmt: skip
    seen = Outside(render(page))
    assert (seen.links, seen.handlers) == ([], [])
    text = render(page)
    data = re.search(r'id="charts">(.*?)</script>', text, re.DOTALL)
    assert data and "<" not in data[1] and "\u2028" not in data[1]
    figure = json.loads(data[1])["0"]
    assert figure["data"][0]["name"].startswith("&lt;/script&gt;&lt;img src=x")


def test_numbers_that_are_not_finite_become_null():
    assert to_json({"y": [1.0, float("nan"), float("inf")]}) == {"y": [1.0, None, None]}
    with pytest.raises(ValueError):
        script_json([float("nan")])


def test_long_and_broken_names_stay_on_one_line():
    page = Page(Name("a\nb"), "good", Name("x" * 10_000))
    assert "x" * 100 not in render(page)
    assert len(charts.escape_name("y" * 10_000)) == 48


def test_unfinished_run(tmp_path, fitted):
    run = save(tmp_path / "run", {"kind": "fit"}, list(read(fitted).history[:3]), None)
    assert "This run has not finished: 3 epochs so far." in html(run)
    rows = [{"epoch": e, "seconds": 2.0 * e, "train/loss": 1.0} for e in (1, 2, 100)]
    config = {"kind": "fit", "optimizer": {"epochs": 400}}
    timed = save(tmp_path / "timed", config, rows, None)
    assert "Not finished: 100 of 400 epochs, 10 min left at this pace." in html(timed)
    early = save(tmp_path / "early", config | {"recipe": {"early_stopping": 9}}, rows[:2], None)
    assert "2 of at most 400 epochs, at most 13 min left" in html(early)
    short = save(tmp_path / "short", config | {"budget": 230.0}, rows, None)
    assert "Not finished: 100 of at most 400 epochs, at most 30 s left" in html(short)
    empty = save(tmp_path / "empty", {"kind": "fit"}, [], None)
    assert "No epoch was recorded." in html(empty)


def test_a_run_that_kept_no_sentences_is_shown_without_a_verdict(tmp_path):
    """Of a version before the yardsticks: its scores stand, nothing is claimed of them."""
    rows = [{"epoch": e, "train/rmse": 1 / e, "valid/rmse": 1.0, "train/loss": 1 / e,
             "valid/loss": 1.0} for e in (1, 2)]  # fmt: skip
    run = save(tmp_path / "run", {"kind": "fit"}, rows, {"kind": "fit", "best_epoch": 2})
    page = report.build(read(run))
    assert page.level == "plain"
    assert page.verdict.text("en").startswith("RMSE 1.000 on validation rows, 0.500 on training")


@pytest.mark.parametrize(("recipe", "kept"), [({"early_stopping": 2}, True), ({}, False)])
def test_the_best_epoch_is_called_kept_where_its_state_is(tmp_path, recipe, kept):
    rows = [{"epoch": e, "train/loss": 1 / e, "valid/loss": abs(e - 2) + 1.0} for e in (1, 2, 3)]
    result = {"kind": "fit", "best_epoch": 2, "epochs": 3, "metrics": {"valid/loss": 1.0}}
    text = html(save(tmp_path / "run", {"kind": "fit", "recipe": recipe}, rows, result))
    assert ("epoch 2 kept" in text) == kept
    assert ("the state at the end was kept" in text) == (not kept)


def test_default_output_and_language(fitted):
    target = report.write(fitted, language="zh-CN")
    assert target == fitted / "report.html"
    assert '<html lang="zh-CN" data-language="zh">' in target.read_text(encoding="utf-8")


def test_what_cannot_be_reported(tmp_path, fitted):
    with pytest.raises(InputError, match="unknown language 'fr'"):
        report.write(fitted, language="fr")
    with pytest.raises(InputError, match="no run directory at"):
        report.write(tmp_path / "absent")
    with pytest.raises(InputError, match="holds neither"):
        report.write(tmp_path)
    with pytest.raises(InputError, match="at least one"):
        report.write()
    odd = save(tmp_path / "odd", {"kind": "fiit"}, [], None)
    with pytest.raises(InputError, match="did you mean 'fit'"):
        report.write(odd)
    (odd / "config.json").write_text('{"schema_version": 99}')
    with pytest.raises(DataError, match="schema_version 99"):
        report.write(odd)
    (odd / "config.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        report.write(odd)
    with pytest.raises(StorageError):
        report.write(fitted, output=tmp_path / "no" / "such" / "folder.html")
    save(odd, {"kind": "fit"}, [], None)
    (odd / "history.jsonl").write_text('{"epoch": 1}\nnot json\n{"epoch": 3}\n')
    with pytest.raises(DataError, match=r"history\.jsonl:2"):
        report.write(odd)


def test_labels_need_every_language():
    with pytest.raises(KeyError):
        label("no such text")
    assert Label("score_on", {"part": label("part_test"), "metric": "R²"}).text("zh") == "测试R²"


def test_public_names():
    assert tikhon.report is report


def sentence(run):
    return report.build(read(run)).verdict.text("en")


def test_verdict_of_a_search(tuned, tmp_path):
    result = json.loads((tuned / "result.json").read_text())
    config = {"kind": "tune"}
    better = {**result["audit"], "worth_it": True, "default_score": 2.0, "gain": 1.0}
    run = save(tmp_path / "better", config, [], {**result, "audit": better})
    assert sentence(run).startswith("Better than the default: lr ")
    same = {**better, "worth_it": False, "gain": 0.01, "gain_error": 0.2}
    run = save(tmp_path / "same", config, [], {**result, "audit": same})
    assert sentence(run).startswith("The default would have done as well")
    edge = {**better, "edges": ["lr"], "failed": 2, "default_score": None, "gain": None}
    run = save(tmp_path / "edge", config, [], {**result, "audit": edge})
    assert sentence(run).startswith("Chosen: ")
    assert "widen the space in lr" in html(run)


@pytest.mark.parametrize(
    ("metrics", "praised"),
    [
        ({"test/accuracy": 0.7, "test/loss": 0.6}, False),
        ({"test/accuracy": 0.6, "test/loss": 0.9}, False),
        ({"test/accuracy": 0.9, "test/loss": 0.3}, True),
        ({"test/accuracy": 0.7, "test/loss": 0.4}, True),  # its probabilities say more
        ({"test/rmse": 1.01}, False),
        ({"test/rmse": 0.5}, True),
    ],
)
def test_a_search_whose_choice_learned_nothing_is_not_praised(tuned, tmp_path, metrics, praised):
    result = json.loads((tuned / "result.json").read_text())
    better = {**result["audit"], "worth_it": True, "default_score": 2.0, "gain": 1.0}
    constant = {"test/accuracy": 0.7, "test/loss": 0.6, "test/rmse": 1.0}
    held = {"metrics": metrics, "yardsticks": {"constant": constant}, "answer": "'no'"}
    run = save(tmp_path / "run", {"kind": "tune"}, [], {**result, "audit": better, **held})
    start = "Better than the default" if praised else "Not measurably better than always"
    assert sentence(run).startswith(start)


@pytest.mark.parametrize(
    ("accuracy", "loss", "praised"),
    [((0.02, 0.02), (0.001, 0.01), False), ((-0.1, 0.01), (-0.2, 0.01), False),
     ((0.1, 0.02), (-0.2, 0.01), True), ((0.0, 0.02), (0.1, 0.01), True)],
)  # fmt: skip
def test_a_choice_within_the_noise_of_a_constant_is_not_praised(
    tuned, tmp_path, accuracy, loss, praised
):
    result = json.loads((tuned / "result.json").read_text())
    better = {**result["audit"], "worth_it": True, "default_score": 2.0, "gain": 1.0}
    held = {
        "metrics": {"test/accuracy": 0.71, "test/loss": 0.59},
        "yardsticks": {"constant": {"test/accuracy": 0.7, "test/loss": 0.6}},
        "margins": {"constant": {"accuracy": accuracy, "loss": loss}},
    }
    run = save(tmp_path / "run", {"kind": "tune"}, [], {**result, "audit": better, **held})
    assert sentence(run).startswith(
        "Better" if praised else "Not measurably better than always predicting"
    )


def test_the_page_of_a_search_speaks_in_the_numbers_of_its_metric(tuned, tmp_path):
    result = json.loads((tuned / "result.json").read_text())
    trials = [
        t | {"score": -0.8123, "curve": [[1, -0.7123], [2, -0.8123]]} for t in result["trials"]
    ]
    trials[1]["score"] = -0.95
    audit = {**result["audit"], "metric": "roc_auc", "maximised": True, "best_score": 0.95}
    saved = {**result, "metric": "roc_auc", "audit": audit, "trials": trials, "score": 0.95}
    page = html(save(tmp_path / "run", {"kind": "tune"}, [], saved))
    assert "validation roc_auc of 0.950" in page and "alidation loss" not in page
    assert not any(f"-0.{digits}" in page for digits in ("812", "712", "950"))
    header = {"metric": "roc_auc", "trials": trials}
    unfinished = save(tmp_path / "unfinished", {"kind": "tune"}, [], header)
    assert "the best validation roc_auc is 0.950" in sentence(unfinished)


def test_a_run_is_not_compared_with_itself(fitted, tmp_path):
    (tmp_path / "link").symlink_to(fitted)
    for again in (fitted, tmp_path / "link", fitted / ".." / fitted.name):
        with pytest.raises(InputError, match="given twice"):
            report.write(fitted, again, output=tmp_path / "page.html")


def test_search_where_trials_diverged(tuned, tmp_path):
    result = json.loads((tuned / "result.json").read_text())
    for trial in result["trials"][1:4]:
        trial |= {"score": None, "failure": "loss is not finite"}
    run = save(tmp_path / "run", {"kind": "tune"}, [], result)
    assert "diverged" in html(run)


def test_search_where_only_the_default_was_left(tuned, tmp_path):
    result = json.loads((tuned / "result.json").read_text())
    result["audit"] |= {"candidates": 1, "failed": 4, "worth_it": False}
    run = save(tmp_path / "run", {"kind": "tune"}, [], result)
    assert sentence(run).startswith("Every configuration of the space diverged")


def test_the_features_in_use_are_the_named_lines_of_a_path():
    rows = [[0.0, 0.1, 0.0], [0.9, 0.2, 0.1]]
    figure = charts.importance_lines(
        [2.0, 1.0], rows, ["large", "used", "small"], label("importance"), 1, [1]
    )
    shown = [trace["name"]["text"] if isinstance(trace["name"], dict) else str(trace["name"])
             for trace in figure["data"] if trace["showlegend"]]  # fmt: skip
    assert len(shown) == 1 and "used" in shown[0]


def test_a_path_says_what_its_choice_gives_up(pathed, tmp_path):
    result = json.loads((pathed / "result.json").read_text())
    losses = result["scores"]
    best = min(range(len(losses)), key=losses.__getitem__)
    config = {"kind": "path"}
    run = save(tmp_path / "sparser", config, [], {**result, "chosen": best - 1})
    assert (
        f", {elements.format_number(losses[best])} with {result['counts'][best]} feat"
        in sentence(run)
    )
    run = save(tmp_path / "lowest", config, [], {**result, "chosen": best})
    assert "have the lowest validation loss" in sentence(run)
    tied = [losses[best] if i == best - 1 else loss for i, loss in enumerate(losses)]
    counts = [1000 + count for count in result["counts"]]
    run = save(
        tmp_path / "tied", config, [], {**result, "chosen": best, "scores": tied, "counts": counts}
    )
    assert sentence(run).startswith(f"{counts[best]:,} of ")
    assert path.best_of(read(run)) == best  # the rings of equals lie on each other


def test_path_without_scores(pathed, tmp_path):
    result = json.loads((pathed / "result.json").read_text())
    blank = [None] * len(result["scores"])
    result |= {"chosen": None, "selected": [], "scores": blank, "errors": blank}
    run = save(tmp_path / "run", {"kind": "path"}, [], result)
    assert sentence(run).startswith("20 strengths were solved; there were no validation rows")


def fits(tmp_path, *names, data="a", **scores):
    """Saved fits on some data, with a validation accuracy and its standard error each."""
    made = []
    for name in names:
        accuracy, error = scores.get(name, (0.9, 0.01))
        row = {"epoch": 1, "train/accuracy": 1.0, "valid/accuracy": accuracy, "train/loss": 0.1}
        config = {"kind": "fit", "data": {"name": data, "task": "classification",
                                          "fingerprint": data}, "optimizer": {"lr": len(made)},
                  "recipe": {"dropout": 0.5} if name == "b" else {}}  # fmt: skip
        result = {"kind": "fit", "metrics": row, "score_errors": {"valid/accuracy": error}}
        made.append(save(tmp_path / f"{data}-{name}", config, [row], result))
    return made


def pairs(seed: int, rows: int, own: float, apart: float) -> tuple[np.ndarray, np.ndarray]:
    """Right answers of two models that differ in some rows, mostly in favour of the first."""
    rng = np.random.default_rng(seed)
    first = rng.random(rows) < own
    return first, first ^ (rng.random(rows) < np.where(first, apart, apart / 10))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("rows", "own", "apart"),
    [(400, 0.9, 0.03), (400, 0.9, 0.2), (30, 0.9, 0.03), (2000, 0.7, 0.02), (100, 1.0, 0.0)],
)
def test_runs_on_the_same_rows_are_compared_row_by_row(seed, rows, own, apart):
    first, second = pairs(seed, rows, own, apart)
    texts = ["".join("01"[int(one)] for one in answers) for answers in (first, second)]
    better, worse = int((first & ~second).sum()), int((~first & second).sum())
    exact = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    told = run_groups.differ_by_row(*texts)
    assert told == run_groups.differ_by_row(*texts[::-1])
    assert told == (exact < 0.05) or 0.005 < exact < 0.2  # McNemar's exact test
    errors = np.random.default_rng(seed).exponential(size=(2, rows)) ** 2
    errors[1] = errors[0] + (errors[1] - 1.5) * apart
    t = stats.ttest_rel(*errors)
    assert run_groups.differ_by_row(*errors.tolist()) == (abs(t.statistic) > 1.96)


def test_a_pair_of_runs_on_the_same_rows_is_told_apart_where_two_samples_would_not(tmp_path):
    a, b = fits(tmp_path, "a", "b", a=(0.92, 0.02), b=(0.90, 0.02))
    said = "within the noise"
    assert said in report.build(read(a), read(b)).verdict.text("en")
    answers = ["1" * 184 + "0" * 16, "1" * 174 + "0" * 26]
    for rows, tied in ((("r", "r"), False), (("r", "s"), True)):
        for run, row, answer in zip((a, b), rows, answers, strict=True):
            result = json.loads((run / "result.json").read_text())
            result["by_row"] = {"rows": row, "accuracy": answer}
            (run / "result.json").write_text(json.dumps(result))
        assert (said in report.build(read(a), read(b)).verdict.text("en")) == tied


APART = "These {} runs cannot be compared"


def test_runs_are_compared_where_data_and_score_are_the_same(tmp_path, fitted, demoed, tuned):
    a, b = fits(tmp_path, "a", "b", a=(0.95, 0.005))
    page = report.build(read(a), read(b))
    assert page.verdict.text("en") == "a-a has the best validation accuracy of 2 runs: 0.950."
    score, settings = page.sections[0].blocks
    assert score.chosen == 0 and score.tag == "best"
    names = [row[0] for row in settings.rows]
    assert [name.text("en") for name in names] == ["learning rate", "dropout"]
    assert [name.text("zh") for name in names] == ["学习率", "丢弃率"]
    (c,) = fits(tmp_path, "c", data="other", c=(0.99, 0.001))
    mixed = report.build(read(a), read(b), read(c))
    assert mixed.verdict.text("en").startswith(
        "3 runs in 2 groups of the same data, score and command"
    )
    apart = report.build(read(a), read(c), read(tuned), read(demoed))
    assert apart.verdict.text("en").startswith(APART.format(4))
    blocks = [block for section in apart.sections for block in section.blocks]
    assert not any(isinstance(block, PageTable) and block.chosen is not None for block in blocks)
    assert all(words not in render(apart) for words in ("has the best", ">best<"))


def test_a_curve_of_one_epoch_is_drawn_as_a_point():
    modes = [charts.line([1, 2], y, "a", "blue")["mode"] for y in ([0.5, None], [0.5, 0.6])]
    assert modes == ["lines+markers", "lines"]


def test_a_difference_within_the_noise_makes_no_run_the_best(tmp_path):
    a, b = fits(tmp_path, "a", "b", a=(0.92, 0.02))
    page = report.build(read(a), read(b))
    assert page.verdict.text("en").endswith("the difference from a-b is within the noise.")
    assert page.sections[0].blocks[0].chosen is None


def test_an_accuracy_is_not_ranked_against_an_error(tmp_path):
    (a,) = fits(tmp_path, "a")
    row = {"epoch": 1, "train/rmse": 1.0, "valid/rmse": 0.5, "train/loss": 0.1}
    config = {"kind": "fit", "data": {"name": "a", "fingerprint": "a", "task": "regression"}}
    b = save(tmp_path / "b", config, [row], {"kind": "fit", "metrics": row})
    assert report.build(read(a), read(b)).verdict.text("en").startswith(APART.format(2))


def test_the_page_of_a_fit_says_what_the_run_said(tmp_path):
    from tikhon.training.verdict import LEVELS, Scores, judge_run

    assert {f"verdict_{code}" for code in LEVELS} <= strings("en").keys()
    errors = {"train/accuracy": 0.01, "valid/accuracy": 0.02}
    for train, valid in [(1.0, 0.8), (0.9, 0.88), (0.9, 0.95), (0.93, 0.899)]:
        metrics = {"train/accuracy": train, "valid/accuracy": valid}
        found = judge_run(Scores(metrics, {"train": 300, "valid": 200}, errors))
        kept = {"metrics": metrics, "statements": [s.to_dict() for s in found]}
        page = report.build(read(save(tmp_path / "run", {"kind": "fit"}, [metrics], kept)))
        assert [w.text("en") for w in page.sentences] == [str(s) for s in found]
        assert "过拟合" in page.verdict.text("zh")


def test_verdict_of_a_diagnosis(diagnosed, cured, tmp_path):
    from tikhon.diagnosis.thresholds import VANISHED
    from tikhon.report.kinds.diagnosis import HEALTHY_SIGNAL

    assert HEALTHY_SIGNAL == VANISHED
    assert sentence(diagnosed).startswith("Vanishing gradient in 0 … ")
    result = json.loads((diagnosed / "result.json").read_text())
    well = {**result, "nothing_learned": False, "ok": True, "findings": []}
    run = save(tmp_path / "well", {"kind": "diagnosis"}, [], well)
    assert sentence(run).startswith("No problem found")
    other = {**result["findings"][0], "code": "frozen <b>", "severity": "warning", "where": []}
    run = save(tmp_path / "other", {"kind": "diagnosis"}, [], {**result, "findings": [other]})
    assert "frozen &lt;b&gt;" in html(run)
    assert report.build(read(run)).level == "watch"
    result = json.loads((cured / "result.json").read_text())
    assert (" helps: " in sentence(cured)) == result["confirmed"]
    if result["confirmed"]:
        first, *rest = result["arms"]
        arms = [{**first, "scores": [None, *first["scores"][1:]]}, *rest]
        run = save(tmp_path / "diverged", {"kind": "cure"}, [], {**result, "arms": arms})
        assert "without treatment it is not finite" in sentence(run)
    failed = {**result, "confirmed": False, "treatment": None, "patch": ""}
    run = save(tmp_path / "failed", {"kind": "cure"}, [], failed)
    assert sentence(run).startswith("No treatment helped")


def test_what_was_measured_is_named_in_words():
    cell = diagnosis.evidence_cell({"signal_ratio": 3e-11, "layers": 9})
    assert cell.text("en") == "signal, first layer over last 3e-11, layers 9"
    assert cell.text("zh") == "首层与末层的信号之比 3e-11，层数 9"
    assert diagnosis.evidence_cell({}).text == "–"
    assert diagnosis.evidence_cell({"of_a_check": 1.0}).text("en") == "of a check 1"
    for key in MEASURES:
        chinese = diagnosis.evidence_cell({key: 1.0}).text("zh")
        assert any("\u4e00" <= character <= "\u9fff" for character in chinese), key


def test_a_finding_without_a_place_is_named_without_one():
    found = {"code": "exploding_gradient", "severity": "critical"}
    verdict = diagnosis.verdict([found], {})
    assert (verdict.text("en"), verdict.text("zh")) == ("Exploding gradient.", "梯度爆炸。")
    two = diagnosis.verdict([{**found, "where": ["fc1"]}, found], {})
    assert two.text("en") == "Exploding gradient in fc1, and 1 more finding."


def test_every_finding_is_told_in_both_languages(diagnosed, tmp_path):
    from tikhon.diagnosis.codes import CODES

    for code in CODES:
        for family in ("finding", "effect", "cures"):
            chinese = strings("zh")[f"{family}_{code}"]
            assert chinese != strings("en")[f"{family}_{code}"] or code in SAME, (family, code)
    result = json.loads((diagnosed / "result.json").read_text())
    [table] = [
        b for s in report.build(read(diagnosed)).sections for b in s.blocks
        if isinstance(b, PageTable) and b.caption == label("findings_caption")
    ]  # fmt: skip
    first = result["findings"][0]
    assert table.rows[0][3].text("zh").startswith(strings("zh")[f"effect_{first['code']}"])
    assert first["why"] in table.rows[0][3].text("en")
    assert table.rows[0][-1].text("zh") == strings("zh")[f"cures_{first['code']}"]
    mine = {**first, "advice": ["call <b>Bob</b>"], "sentences": {}}
    run = save(tmp_path / "mine", {"kind": "diagnosis"}, [], {**result, "findings": [mine]})
    assert "call &lt;b&gt;Bob&lt;/b&gt;" in html(run)


def test_every_treatment_is_named_in_both_languages():
    from tikhon.cures import treatments

    names = {t.name for found in treatments.TREATMENTS_BY_CODE.values() for t in found}
    names |= {t.name for t in (*treatments.RATES, *treatments.ADAMS)}
    for name in names:
        cell = diagnosis.treatment_label(f"{name} + lr x10")
        assert cell.text("en") == f"{name} + lr x10"
        own = re.search("[a-z]{3}", re.sub(CODE, "", cell.text("zh")).removesuffix("学习率 ×10"))
        assert own is None, cell.text("zh")


CODE = (
    "Adam|LSUV|ReLU|GRU|BatchNorm|LayerNorm|Dropout|batch_first=False|batch_first|float32|log_softmax|sigmoid|"
    "maximize=False|chrono|pre-norm|shuffle=True|softmax|Tanh"
)  # words that Chinese texts keep


def test_verdict_of_a_comparison(compared, tmp_path):
    result = json.loads((compared / "result.json").read_text())
    best, other = result["methods"]
    config = {"kind": "compare"}

    from tikhon.comparison.compare import Comparison, Constant

    def of(*rows, metric="accuracy", constant=None):
        found = Comparison("d", metric, rows, 1, result["splits"], 1, 1.0, None, constant)
        run = save(tmp_path / "run", config, [], {**result, **found.to_dict()})
        told = sentence(run)
        assert told == found.verdict()
        return told

    third = {**other, "method": "third", "tied": False}
    for bare, tied in itertools.product(("none", "third"), (True, False)):
        for first, second in ((bare, "l2"), ("l2", bare)):
            rows = ({**best, "method": first, "tied": True},
                    {**other, "method": second, "tied": tied}, third)  # fmt: skip
            said = of(*rows)
            helps = bare == "none" and first == "l2" and not tied
            assert said.startswith("Regularization helps") == helps
    for gain, tail in (
        (0.001, ": doing nothing is as good"),
        (0.2, ", but .* cannot rule it out"),
    ):
        bare = {**other, "method": "none", "test": 0.6, "tied": True, "behind": (gain, -0.1, 0.3)}
        for metric, sign in (("accuracy", 1), ("rmse", -1)):
            told = of(third, {**bare, "test": 0.6 * sign}, metric=metric)
            assert re.match(f"No measurable benefit from regularization here{tail}", told)
            assert (gain < 0.1) == ("-0.1" not in told)
    for answer, beaten in itertools.product(("'no'", None), (True, False)):
        constant = Constant(answer, 0.25, beaten)
        said = of(best, other, constant=constant)
        nothing = f"No method is measurably better than always predicting {answer or 'the mean'}: "
        assert said.startswith(nothing) != beaten
        assert ("scores 0.250." in html(tmp_path / "run")) == beaten
    error = {**best, "test": -2.5, "low": -3.0, "high": -2.0}
    assert "RMSE 2.500" in of(error, {**error, "tied": False}, metric="rmse")
    assert "2.000–3.000" in html(tmp_path / "run")
    wide = {**error, "low": -6.3, "high": 2.5}  # of two splits, around a mean of numbers > 0
    of(wide, {**wide, "tied": False}, metric="rmse")
    assert "0.000–6.300" in html(tmp_path / "run") or "0–6.300" in html(tmp_path / "run")
    shown = Comparison("d", "rmse", (wide,), 1, 2, 1, 1.0)._shown_interval(wide)
    assert shown == (2.5, 0.0, 6.3)
    assert "no_such" not in of(best, {**other, "low": None, "high": None, "tied": True})


def test_one_split_gives_no_interval_and_no_verdict_on_regularization(compared, tmp_path):
    from tikhon.comparison.compare import Comparison

    result = json.loads((compared / "result.json").read_text())
    bare = {"low": float("nan"), "high": float("nan"), "tied": True}
    rows = [
        {**row, **bare, "method": name} for row, name in zip(result["methods"], ("l1", "none"))
    ]
    found = Comparison("d", "accuracy", tuple(rows), 1, 1, 1, 1.0)
    for order in (rows, [{**row, "test": 0.5} for row in rows[::-1]]):
        said = Comparison("d", "accuracy", tuple(order), 1, 1, 1, 1.0).verdict()
        assert said.startswith("One split cannot tell whether regularization helps here")
        assert "with l1, the best of the others" in said
    rows = [{**row, "low": None, "high": None} for row in rows]  # as result.json holds them
    run = save(tmp_path / "run", {"kind": "compare"}, [], {**found.to_dict(), "methods": rows})
    charts_of = [
        b for s in report.build(read(run)).sections for b in s.blocks if b.kind == "chart"
    ]
    assert charts_of[0].note == label("compare_note_one")
    assert not any("error_x" in dot for dot in charts_of[0].figure["data"])


def test_a_recipe_reads_as_the_command_line_takes_it():
    recipe = {
        "penalties": [
            {"pattern": "*", "penalty": "l2", "strength": "auto", "how": "decoupled"},
            {"pattern": "fc1", "penalty": "l1", "strength": 0.000316228, "rows": None},
        ],
        "dropout": 0.375,
        "mixup": 0.0,
    }
    shown = compare.settings({"lr": 0.003, "recipe": recipe})
    assert shown == ["lr 0.003", "l2:auto,how=decoupled", "fc1=l1:0.0003162", "dropout 0.375"]
    told = elements.format_settings(recipe)
    assert isinstance(told, Label)
    assert told.text("en") == "penalties l2:auto,how=decoupled; fc1=l1:0.0003162, dropout 0.375"
    assert told.text("zh") == "惩罚项 l2:auto,how=decoupled; fc1=l1:0.0003162，丢弃率 0.375"


def test_every_setting_is_named_in_both_languages():
    from tikhon.comparison.demonstration import Setting
    from tikhon.options import training_fields
    from tikhon.training.fit import versions

    names = {name for name, _, _ in training_fields()}
    for name in names - {"device", "budget"} | {"model", "parameters", "split"}:
        assert isinstance(elements.named(f"setting_name_{name}", name), Label), name
    names |= {f.name for f in fields(Setting)} | versions().keys() - {"tikhon", "torch", "python"}
    for name in names:
        english, chinese = (strings(language)[f"setting_{name}"] for language in LANGUAGES)
        assert chinese != english or name == "machine"


def test_the_small_print_is_words(tmp_path, fitted):
    """No braces, no keys of a dictionary, in either language."""
    data = {"name": "rows.csv", "rows": {"train": 1200, "valid": 40, "test": 40}, "features": 3,
            "classes": ["a", "<b>"], "fingerprint": "ab" * 32, "split": {"valid": 0.2},
            "origin": {"source": "rows.csv", "sha256": "0123456789abcdef",
                       "target": "y"}}  # fmt: skip
    config = {"kind": "fit", "data": data, "optimizer": {"name": "adam", "lr": 0.001}, "seed": 0,
              "model": {"name": "mlp", "shape": [3], "parameters": 1026}}  # fmt: skip
    page = report.build(read(save(tmp_path / "run", config, [], {"kind": "fit"})))
    told = [value.text("en") if isinstance(value, Label) else value for _, value in page.about]
    assert "rows.csv: 1,200 rows to train on, 40 to validate, 40 to test; 3 features" in told
    assert "rows.csv (SHA-256 0123456789ab)" in told and "mlp, 1,026 parameters" in told
    assert "adam, learning rate 0.001" in told
    assert not any(sign in text for text in told for sign in "{}=[]_")


def test_answers_on_test_rows_are_drawn():
    counts = [[8, 2], [0, 10]]
    bins = [
        {"confidence": 0.7, "accuracy": 0.5, "rows": 4},
        {"confidence": 0.95, "accuracy": 1.0, "rows": 16},
    ]
    found = {"confusion": counts, "classes": ["<b>", "no"], "calibration": bins}
    matrix, curve = predictions.section(found).blocks
    assert matrix.alt.values == {"wrong": "2", "rows": "20"}
    assert matrix.figure["data"][0]["z"] == counts
    assert curve.note.values["error"] == "0.080"
    (pairs,) = predictions.section(
        {"pairs": [[1.0, 2.0], [3.0, 2.5]], "median_error": 0.75, "largest_error": 1.0}
    ).blocks
    assert pairs.figure["data"][0]["x"] == [1.0, 3.0]
    assert predictions.section({}) is None


def test_a_comparison_has_no_column_that_no_row_fills():
    from tikhon.report.kinds import compare, elements
    from tikhon.report.page import label

    row = {"method": "none", "test": 0.7, "tied": True, "gap": 0.1, "zeros": 0.0, "size": 1.0}
    row |= {"low": None, "high": None, "seed_std": None, "seconds": 1.0}
    metric = elements.ScoreKind("accuracy", label("metric_accuracy"), True)
    keys = [head.key for head in compare.table([row, row], metric).head]
    assert keys == ["method", "verdict", "test", "train_test_gap", "zeros", "time"]
    fuller = row | {"low": 0.6, "high": 0.8, "seed_std": 0.01, "size": 0.5}
    assert len(compare.table([row, fuller], metric).head) == 9


@pytest.mark.parametrize(
    ("score", "told"), [(0.338, "Cannot tell whether 1 of 17"), (0.21, "1 of 17 features are")]
)
def test_few_features_are_enough_only_where_little_is_given_up(score, told):
    """One standard error may be most of what is explained: 1 of 17 left R2 0.39 of 0.56."""
    names = list("abcdefghijklmnopq")
    result = {"counts": [0, 1, 7], "scores": [0.401, score, 0.201], "chosen": 1,
              "strengths": [0.67, 0.36, 0.04], "feature_names": names}  # fmt: skip
    said = path.verdict(SavedRun(Path("run"), {}, (), result), 1)
    assert said.text("en").startswith(told)
    assert "17" in said.text("zh") and ("--select best" in said.text("zh")) == (score > 0.3)


@pytest.mark.parametrize("beaten", [True, False])
def test_a_constant_that_no_method_beats_is_in_the_picture(beaten):
    """The headline named its 0.867, and the chart ended at the 0.850 of the best method."""
    row = {"method": "none", "test": 0.85, "low": None, "high": None, "tied": True}
    result = {"constant": {"answer": "'no'", "test": 0.867, "beaten": beaten}}
    metric = elements.ScoreKind("accuracy", label("metric_accuracy"), True)
    chart = compare.scores(SavedRun(Path("run"), {}, (), result), [row], metric)
    dots = [trace["x"][0] for trace in chart.figure["data"]]
    assert dots == ([0.85] if beaten else [0.85, 0.867])
