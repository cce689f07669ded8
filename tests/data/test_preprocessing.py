"""What columns become: identities, large numbers, target means, text, and what is said of rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.preprocessing import TargetEncoder

from tikhon.data import split
from tikhon.data.encoding import encode_columns
from tikhon.data.preprocessing import Preprocessing
from tikhon.data.reading import read_table
from tikhon.data.source import Format
from tikhon.data.table import TableOptions, load_table
from tikhon.errors import DataError, InputError


def table(path: Path, frame: pd.DataFrame, **options):
    frame.to_csv(path / "t.csv", index=False)
    return load_table(path / "t.csv", TableOptions("y", **options))


def labels(rows: int) -> np.ndarray:
    return np.where(np.arange(rows) % 3 == 0, "p", "n")


def test_names_made_from_columns_never_take_the_place_of_real_ones(tmp_path: Path):
    rng = np.random.default_rng(0)
    rows = 120
    frame = pd.DataFrame({
        "d days": rng.normal(1e4, 1, rows), "d": pd.date_range("2020-01-01", periods=rows),
        "a": np.where(np.arange(rows) % 4, rng.normal(size=rows), np.nan),
        "a missing": rng.normal(-50, 3, rows), "y": labels(rows),
    })  # fmt: skip
    parts = split(table(tmp_path, frame))
    x = parts.train.x.numpy()
    assert parts.preprocessing is not None and x.shape[1] == 9
    names = parts.preprocessing.feature_names
    assert names.count("d days") == 2 and names.count("a missing") == 2
    flags = {names.index("a missing", names.index("a missing") + 1)}
    for place in set(range(9)) - flags:
        assert abs(x[:, place].mean()) < 1e-5 and abs(x[:, place].std() - 1) < 1e-4
    plain = json.loads(json.dumps(parts.preprocessing.to_dict(), allow_nan=False))
    assert Preprocessing.from_dict(plain) == parts.preprocessing


def test_runs_of_before_are_read_as_they_were(tmp_path: Path):
    (tmp_path / "new.csv").write_text("d,a,c,flag\n03/04/2021,1,x,yes\n14/04/2021,,z,no\n")
    number = {"fill": 2.0, "mean": 1.0, "scale": 0.5, "indicator": False}
    date = {"fill": 0.0, "mean": 0.0, "scale": 1.0, "indicator": False}
    parts = ["days", "year sin", "year cos", "week sin", "week cos"]
    old = {
        "columns": [
            {"name": "d", "kind": "date", "format": "%d/%m/%Y"}, {"name": "a", "kind": "number"},
            {"name": "c", "kind": "category", "categories": ["x", "z"]},
            {"name": "flag", "kind": "boolean", "categories": ["no", "yes"]},
        ],
        "numbers": {**{f"d {part}": date for part in parts}, "a": {**number, "indicator": True},
                    "flag": {**number, "fill": 0.0, "mean": 0.0, "scale": 1.0}},
        "levels": {"c": {"codes": [0, 1], "rare": False}}, "decimal": ".",
    }  # fmt: skip
    found = Preprocessing.from_dict(old).transform(read_table(tmp_path / "new.csv"))
    assert found.shape == (2, 10)
    np.testing.assert_array_equal(found[:, 0], [18720, 18731])
    np.testing.assert_array_equal(found[:, 5:], [[0, 1, 0, 1, 0], [2, 0, 1, 0, 1]])
    with pytest.raises(DataError, match="figures do not fit its columns"):
        Preprocessing.from_dict({**old, "numbers": {"a": number}})


@pytest.mark.parametrize("base", [10**12, 10**15, 10**17])
def test_large_numbers_that_differ_little_are_scaled(tmp_path: Path, base: int):
    frame = pd.DataFrame({"a": [base + 64 * (i % 50) for i in range(200)], "y": labels(200)})
    x = split(table(tmp_path, frame)).train.x.numpy()
    assert abs(x.std() - 1) < 1e-3 and abs(x.mean()) < 0.1


def test_a_number_that_training_rows_do_not_vary_is_no_input(tmp_path: Path):
    frame = pd.DataFrame({"t": range(100), "a": [7.0] * 80 + [1e9] * 20, "y": labels(100)})
    parts = split(table(tmp_path, frame, time="t", drop=()))
    assert parts.preprocessing is not None
    place = parts.preprocessing.feature_names.index("a")
    assert not any(part.x[:, place].any() for part in (parts.train, parts.valid, parts.test))


def test_numbers_far_outside_are_cut_off_and_said(tmp_path: Path):
    frame = pd.DataFrame({"a": np.arange(60) / 7, "y": labels(60)})
    fitted = split(table(tmp_path, frame)).preprocessing
    (tmp_path / "new.csv").write_text("a\n1e80\n2\n")
    source = read_table(tmp_path / "new.csv")
    values = encode_columns(source, fitted.columns)
    assert np.isfinite(fitted.apply(values)).all()
    assert "'a': 1 value far outside those of training" in fitted.remarks(source, values)


def shops(rows: int = 900, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    shop = rng.integers(0, 120, rows)
    effect = np.random.default_rng(99).normal(size=120)
    frame = pd.DataFrame({"shop": [f"shop {s}" for s in shop], "a": rng.normal(size=rows)})
    return frame.assign(y=10 + 3 * effect[shop] + 0.1 * rng.normal(size=rows))


def test_large_categories_give_cross_fitted_target_means(tmp_path: Path):
    parts = split(table(tmp_path, shops()))
    fitted = parts.preprocessing
    assert fitted is not None
    place = fitted.feature_names.index("shop: mean target")
    train, test = parts.train.x[:, place].numpy(), parts.test.x[:, place].numpy()
    for found, part in ((train, parts.train), (test, parts.test)):
        assert np.corrcoef(found, part.y.numpy())[0, 1] > 0.9
    levels = fitted.levels[0]
    assert 0 < len(levels.means) and not np.isin(train, levels.mean_of(np.arange(120))).all()


def test_target_means_are_scikit_learns(tmp_path: Path):
    data = table(tmp_path, shops())
    fitted = Preprocessing.fit(data.x.numpy(), data.table, data.y.numpy())
    codes, y = data.x.numpy()[:, :1], data.y.numpy()
    theirs = TargetEncoder(target_type="continuous").fit(codes, y).transform(codes)[:, 0]
    place = fitted.feature_names.index("shop: mean target")
    ours = fitted.apply(data.x.numpy())[:, place] * y.std() + y.mean()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_target_means_of_noise_tell_nothing(tmp_path: Path):
    noise = shops().assign(y=np.random.default_rng(1).normal(size=900))
    parts = split(table(tmp_path, noise))
    place = parts.preprocessing.feature_names.index("shop: mean target")
    told = np.corrcoef(parts.train.x[:, place].numpy(), parts.train.y.numpy())[0, 1]
    assert abs(told) < 0.12  # it is about 0.35 without folds


def test_free_text_tells_what_its_words_tell(tmp_path: Path):
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    words = np.array("bread milk tea rice salt oil jam nuts figs".split())
    rows = [rng.choice(words, 4) for _ in range(300)]
    frame = pd.DataFrame({
        "note": [f"order {i}: " + " ".join(row) for i, row in enumerate(rows)],
        "y": ["sweet" if {"jam", "figs"} & set(row) else "plain" for row in rows],
    })  # fmt: skip
    data = table(tmp_path, frame)
    assert data.table.columns[0].kind == "text"
    assert any("free text, hashed by words" in notice for notice in data.notices)
    parts = split(data)
    model = LogisticRegression(C=100).fit(parts.train.x.numpy(), parts.train.y.numpy())
    assert model.score(parts.test.x.numpy(), parts.test.y.numpy()) > 0.9


def test_numbers_written_as_text_are_learnt_from(tmp_path: Path):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 240))
    written = [f"{v:.3f}".replace("-", "\u2212") for v in a]
    frame = pd.DataFrame({"a": written, "b": b, "y": np.where(a > 0, "p", "n")})
    parts = split(table(tmp_path, frame))
    place = parts.preprocessing.feature_names.index("a")
    split_at = parts.train.x[:, place] > (0 - np.mean(a)) / np.std(a)
    assert (split_at.long() == parts.train.y).float().mean() > 0.97


LEAKS = {
    "threshold": lambda y, rng: y * 10 + rng.random(len(y)),
    "copy": lambda y, rng: np.where(y == 1, "yes", "no"),
    "empty in one class": lambda y, rng: np.where(y == 1, rng.random(len(y)), np.nan),
    "pure levels": lambda y, rng: [f"{'ab'[v]}{rng.integers(6)}" for v in y],
}


@pytest.mark.parametrize("kind", LEAKS)
def test_leaks_are_noticed_and_honest_columns_are_not(tmp_path: Path, kind: str):
    rng = np.random.default_rng(0)
    y = (np.arange(200) % 3 == 0).astype(int)
    frame = pd.DataFrame({"fair": y + rng.normal(0, 1, 200), "leak": LEAKS[kind](y, rng)})
    frame["codes"] = rng.permutation(200) // 2
    said = " ".join(table(tmp_path, frame.assign(y=np.where(y, "p", "n"))).notices)
    assert "'leak' alone predicts the target" in said


def leaks(data) -> list[str]:
    return [n for n in data.notices if n.key.startswith("notice_leak")]


def test_a_column_that_tells_nearly_every_row_is_a_leak(tmp_path: Path):
    rng = np.random.default_rng(0)
    y = np.array(["yes"] * 300 + ["no"] * 700 + ["pending"] * 3)
    frame = pd.DataFrame({"a": rng.normal(size=1003), "code": np.where(y == "yes", "X1", "A0")})
    [told] = leaks(table(tmp_path, frame.assign(y=y)))
    assert told.startswith("'code' alone predicts the target of 99.7% of the rows")
    frame["code"] = np.where(rng.random(1003) < 0.05, "X1", frame["code"])  # an honest, good one
    assert not leaks(table(tmp_path, frame.assign(y=y)))


def test_a_level_in_another_spelling_is_the_same_for_new_rows(tmp_path: Path):
    frame = pd.DataFrame({"a": ["Yes", "no", "maybe"] * 10, "y": labels(30)})
    fitted = split(table(tmp_path, frame)).preprocessing
    (tmp_path / "new.csv").write_text("a\nYES\nNo\nMaybe\nnever\n")
    assert encode_columns(read_table(tmp_path / "new.csv"), fitted.columns)[:, 0].tolist() == [
        0,
        2,
        1,
        -1,
    ]


def test_a_rising_function_of_the_target_is_a_leak(tmp_path: Path):
    rng = np.random.default_rng(0)
    y = rng.lognormal(size=200)
    frame = pd.DataFrame({"fair": y + rng.normal(size=200), "log": np.log(y), "y": y})
    assert "'log' alone predicts the target" in " ".join(table(tmp_path, frame).notices)


def test_rows_in_two_parts_are_counted(tmp_path: Path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=150), "b": rng.normal(size=150)}).assign(
        y=labels(150)
    )
    clean = split(table(tmp_path, frame)).train.notices
    assert not any("are also in the training rows" in notice for notice in clean)
    twice = pd.concat([frame, frame.iloc[:60]])
    parts = split(table(tmp_path, twice))
    train = {row.tobytes() for row in parts.train.x.numpy()}
    count = sum(row.tobytes() in train for row in parts.valid.x.numpy())
    assert count > 0
    assert any(
        f"{count} of {len(parts.valid.x)} validation rows" in n for n in parts.train.notices
    )


def test_sentinels_are_noticed(tmp_path: Path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": np.where(np.arange(90) % 9, rng.normal(size=90), -999),
                          "b": rng.integers(-1, 4, 90), "y": labels(90)})  # fmt: skip
    found = [n for n in table(tmp_path, frame).notices if "--na-values" in n]
    assert len(found) == 1 and "'a' is -999 in 10 rows" in found[0]


@pytest.mark.parametrize(
    ("order", "options", "told"),
    [("up", {}, True), ("down", {}, True), ("shuffled", {}, False), ("up", {"time": "day"}, False),
     ("up", {"group": "shop"}, False), ("up", {"drop": ("day",)}, False)],
)  # fmt: skip
def test_rows_in_the_order_of_a_date_are_noticed(tmp_path: Path, order, options, told):
    day = pd.date_range("2021-01-01", periods=90).strftime("%Y-%m-%d")
    rng = np.random.default_rng(0)
    place = {"up": slice(None), "down": slice(None, None, -1), "shuffled": rng.permutation(90)}
    shop = rng.choice(["north", "south", "west"], 90)
    columns = {"day": day[place[order]], "a": rng.normal(size=90), "shop": shop, "y": labels(90)}
    frame = pd.DataFrame(columns)
    found = [n for n in table(tmp_path, frame, **options).notices if "--time 'day'" in n]
    assert len(found) == told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": ("y",)}, "also to be dropped"),
        ({"features": ("a", "y")}, "also among the features"),
        ({"group": "y"}, "cannot be the group column"),
        ({"time": "y"}, "cannot be the time column"),
    ],
)
def test_a_target_has_no_second_role(options: dict, message: str):
    with pytest.raises(InputError, match=message):
        TableOptions("y", **options)


def test_formats_are_checked():
    for wrong in ({"dates": "dym"}, {"decimal": ";"}, {"separator": ";;"}, {"bad_rows": "x"}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} must be"):
            Format(**wrong)


def test_new_rows_of_other_notation_are_refused_or_read(tmp_path: Path):
    frame = pd.DataFrame({"a": [f"{i / 4:.2f}" for i in range(60)], "y": labels(60)})
    fitted = split(table(tmp_path, frame)).preprocessing
    (tmp_path / "same.csv").write_text('a\n"1,250.50"\n$2\n<3\nNA\n1.036\n')
    values = encode_columns(read_table(tmp_path / "same.csv"), fitted.columns)
    np.testing.assert_array_equal(values[:, 0], [1250.5, 2, 3, np.nan, 1.036])
    (tmp_path / "comma.csv").write_text('a\n"1,5"\n')
    assert encode_columns(read_table(tmp_path / "comma.csv"), fitted.columns)[0, 0] == 1.5
    (tmp_path / "other.csv").write_text("a\n1;5\n")
    with pytest.raises(DataError, match=r"'1;5' in line 2"):
        encode_columns(read_table(tmp_path / "other.csv"), fitted.columns)


def test_a_number_without_a_flag_and_a_duration_add_no_inputs(tmp_path: Path):
    rows = np.arange(400)
    frame = pd.DataFrame({
        "a": np.where(rows % 5, (rows % 7 + 0.5).astype(str), np.where(rows % 2, "<0.5", "low")),
        "b": np.where(rows == 1, ">9", (rows % 11 + 0.25).astype(str)),
        "span": [f"{i % 4} yrs {i % 11} mos" for i in rows], "y": labels(400),
    })  # fmt: skip
    parts = split(table(tmp_path, frame))
    names = ("a", "b", "span time", "a missing", "a <", "a low", "b (rare)")
    assert parts.train.feature_names == names
    x = np.concatenate([part.x.numpy() for part in (parts.train, parts.valid, parts.test)])
    assert x[:, -1].sum() == 1 and x[:, 4].sum() == x[:, 5].sum() == 40
