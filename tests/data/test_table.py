from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import make_column_transformer
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from tikhon.data import load, split
from tikhon.data.columns import infer_column
from tikhon.data.encoding import encode_column, encode_columns
from tikhon.data.preprocessing import Preprocessing, rare_threshold
from tikhon.data.raw_column import RawColumn
from tikhon.data.reading import read_table
from tikhon.data.source import Format
from tikhon.data.table import TableOptions, load_table
from tikhon.errors import DataError, InputError


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture
def csv(tmp_path: Path):
    return lambda text, name="data.csv": write(tmp_path / name, text)


def customers(rows: int = 240, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "customer_id": range(1000, 1000 + rows),
            "age": rng.integers(18, 80, rows).astype(float),
            "income": rng.lognormal(10, 1, rows).round(2),
            "city": rng.choice(["Rome", "Oslo", "Bonn", "Lima"], rows, p=[0.5, 0.3, 0.185, 0.015]),
            "member": rng.choice(["yes", "no"], rows),
            "since": pd.date_range("2020-01-01", periods=rows).strftime("%Y-%m-%d"),
            "zip": rng.choice(["00123", "00456", "10101"], rows),
            "same": 1,
        }
    )
    frame.loc[::7, "age"] = np.nan
    frame.loc[::11, "city"] = None
    noise = rng.random(rows) < 0.1
    frame["churned"] = np.where((frame["income"] > np.exp(10)) ^ noise, "gone", "stays")
    return frame


@pytest.fixture
def churn(tmp_path: Path) -> Path:
    customers().to_csv(tmp_path / "churn.csv", index=False)
    return tmp_path / "churn.csv"


def table(path: Path, target: str = "y", **options):
    return load_table(path, TableOptions(target, **options))


def kinds(data) -> dict[str, str]:
    return {c.name: c.kind for c in (*data.table.columns, *data.table.dropped)}


def test_kinds_task_and_notices(churn: Path):
    data = table(churn, "churned")
    assert kinds(data) == {
        "age": "number", "income": "number", "city": "category", "member": "boolean",
        "since": "date", "zip": "category", "customer_id": "dropped", "same": "dropped",
    }  # fmt: skip
    assert (data.task, data.classes) == ("classification", ("gone", "stays"))
    assert "holds text" in data.origin["task"]
    assert "'customer_id' (an identifier" in data.notices[0]
    assert "'same' (the same value '1'" in data.notices[0]


def test_parts_are_finite_and_scaled_by_the_training_rows(churn: Path):
    parts = split(table(churn, "churned"))
    assert parts.preprocessing is not None
    train = parts.train.x.numpy()
    assert train.dtype == np.float32 and np.isfinite(train).all()
    assert np.isfinite(parts.test.x.numpy()).all()
    assert parts.train.feature_names == parts.preprocessing.feature_names
    age = parts.train.feature_names.index("age")
    assert abs(train[:, age].mean()) < 1e-6 and abs(train[:, age].std() - 1) < 1e-6
    assert abs(parts.test.x[:, age].mean()) > 1e-4
    assert "age missing" in parts.train.feature_names
    assert "city=(missing)" in parts.train.feature_names


def test_a_target_is_scaled_by_the_training_rows(churn: Path):
    parts = split(table(churn, "income"))
    assert abs(parts.train.y.mean()) < 1e-6 and abs(parts.train.y.std(correction=0) - 1) < 1e-6
    assert abs(parts.test.y.mean()) > 1e-4


def test_a_class_that_a_group_split_leaves_to_the_test_part_is_named(csv):
    rows = [f"{i % 7},{i // 10},{'rare' if i < 10 else 'often'}" for i in range(100)]
    data = table(csv("a,shop,y\n" + "\n".join(rows)), "y", group="shop")
    with pytest.raises(DataError, match="class 'rare' is not in the training rows"):
        for seed in range(50):
            split(data, seed=seed)


def test_figures_do_what_the_column_transformer_does(churn: Path):
    data = table(churn, "churned")
    values, columns = data.x.numpy(), data.table.columns
    rows = np.arange(len(values)) % 3 > 0
    ours = Preprocessing.fit(values[rows], data.table)
    numeric = [i for i, c in enumerate(columns) if c.kind in ("number", "boolean")]
    category = [i for i, c in enumerate(columns) if c.kind == "category"]
    coded = values.copy()
    coded[:, category] = np.where(np.isnan(coded[:, category]), -2, coded[:, category])
    theirs = make_column_transformer(
        (make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), numeric),
        (MissingIndicator(error_on_new=False), numeric),
        (
            OneHotEncoder(
                min_frequency=rare_threshold(int(rows.sum())),
                handle_unknown="infrequent_if_exist",
                sparse_output=False,
            ),
            category,
        ),
    )
    theirs.fit(coded[rows])
    coded[0, category[0]] = -1  # unseen
    values = values.copy()
    values[0, category[0]] = -1
    dates = [i for i, n in enumerate(ours.feature_names) if n.startswith("since")]
    received = np.delete(ours.apply(values), dates, axis=1)
    np.testing.assert_allclose(received, theirs.transform(coded), atol=1e-6)


def test_preprocessing_survives_json(churn: Path):
    parts = split(table(churn, "churned"))
    plain = json.loads(json.dumps(parts.preprocessing.to_dict(), allow_nan=False))
    again = Preprocessing.from_dict(plain)
    assert again == parts.preprocessing
    source = read_table(churn)
    np.testing.assert_array_equal(again.transform(source), parts.preprocessing.transform(source))
    with pytest.raises(DataError, match="not a table's preprocessing"):
        Preprocessing.from_dict({"columns": []})


def test_new_rows_by_name_in_any_order_with_unseen_values(churn: Path, tmp_path: Path):
    fitted = split(table(churn, "churned")).preprocessing
    frame = customers(40, seed=5)
    frame.to_csv(tmp_path / "a.csv", index=False)
    shuffled = frame[sorted(frame.columns, reverse=True)].assign(extra="x")
    shuffled.drop(columns=["churned", "same"]).to_csv(tmp_path / "b.csv", index=False)
    a, b = (fitted.transform(read_table(tmp_path / f"{n}.csv")) for n in "ab")
    np.testing.assert_array_equal(a, b)
    frame.loc[0, ["city", "age"]] = ["Atlantis", np.nan]
    frame.to_csv(tmp_path / "c.csv", index=False)
    rare = fitted.feature_names.index("city=(rare)")
    assert fitted.transform(read_table(tmp_path / "c.csv"))[0, rare] == 1
    frame.drop(columns="age").to_csv(tmp_path / "d.csv", index=False)
    with pytest.raises(DataError, match=r"d.csv lacks columns.*'age'"):
        fitted.transform(read_table(tmp_path / "d.csv"))
    frame.astype({"age": object}).assign(age="old").to_csv(tmp_path / "e.csv", index=False)
    with pytest.raises(DataError, match=r"column 'age' holds numbers.*'old' in line 2"):
        fitted.transform(read_table(tmp_path / "e.csv"))
    frame.assign(since="soon").to_csv(tmp_path / "f.csv", index=False)
    with pytest.raises(DataError, match=r"column 'since' holds dates, but .*'soon' in line 2"):
        fitted.transform(read_table(tmp_path / "f.csv"))


def test_parquet_equals_csv(churn: Path, tmp_path: Path):
    frame = customers()
    frame["since"] = pd.to_datetime(frame["since"])
    frame["member"] = frame["member"] == "yes"
    frame.to_parquet(tmp_path / "churn.parquet")
    a, b = table(churn, "churned"), table(tmp_path / "churn.parquet", "churned")
    assert kinds(a) == kinds(b)
    np.testing.assert_array_equal(a.x.numpy(), b.x.numpy())
    assert (a.y == b.y).all()


def test_task_from_the_target(csv):
    def of(values, **options):
        lines = "\n".join(f"{i % 7},{v}" for i, v in enumerate(values))
        return table(csv(f"x,y\n{lines}\n"), **options).task

    assert of([0, 1] * 20) == "classification"
    assert of([0.5, 2.5] * 20) == "classification"
    assert of([1, 2, 3] * 20) == "classification"
    assert of([i / 7 for i in range(40)]) == "regression"
    assert of(range(100, 160)) == "regression"
    assert of([1, 2, 3] * 20, task="regression") == "regression"
    assert of(["a", "b"] * 9) == "classification"


def test_regression_target_keeps_its_unit(csv):
    rng = np.random.default_rng(0)
    x = rng.normal(size=80)
    lines = "\n".join(f"{a},{1e6 + 1e3 * a}" for a in x)
    parts = split(table(csv(f"x,z,y\n{lines}".replace("\n", "\n", 1).replace("z,", "", 1))))
    assert parts.train.task == "regression"
    assert parts.train.unit == pytest.approx(1e3 * x.std(), rel=0.2)


def test_time_and_group_splits(churn: Path):
    customers().sample(frac=1, random_state=0).to_csv(churn, index=False)  # not in order of time
    data = table(churn, "churned", time="since")
    parts = split(data)
    days = parts.train.feature_names.index("since days")
    assert parts.train.x[:, days].max() < parts.valid.x[:, days].min()
    assert parts.valid.x[:, days].max() < parts.test.x[:, days].min()
    frame = customers()
    frame["shop"] = np.arange(len(frame)) // 6
    frame.to_csv(churn, index=False)
    data = table(churn, "churned", group="shop")
    assert "shop" not in kinds(data)
    from tikhon.data.splits import _draw_part

    kept, drawn = _draw_part(data, 48, 0)
    groups = data.table.groups
    assert not set(groups[kept.numpy()]) & set(groups[drawn.numpy()])
    assert 30 <= len(drawn) <= 66
    with pytest.raises(InputError, match="both decide the split"):
        table(churn, "churned", group="shop", time="since")


def test_imbalance_and_leaks_are_noticed(csv):
    rows = [f"{i % 13},{'late' if i % 25 == 0 else 'fine'},{int(i % 25 == 0)}" for i in range(200)]
    notices = " ".join(table(csv("a,y,refund\n" + "\n".join(rows))).notices)
    assert "class 'late' is 4.0% of the rows" in notices
    assert "'refund' alone predicts the target" in notices
    rows = [f"{(i * 7) % 31},{i * 2.5},{i * 5.0 + 1}" for i in range(60)]
    assert "'twice' alone predicts" in " ".join(
        table(csv("a,y,twice\n" + "\n".join(rows))).notices
    )


BODY = "".join(f"{i % 9},{i % 4},{'ab'[i % 2]}\n" for i in range(60))
GOOD = "a,b,y\n" + BODY


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("a,b,a,y\n1,2,3,u\n", r"'a' appears twice, as column 1 and column", id="D1"),
        pytest.param("a,b,y\n1,2,3,u\n", r"line 2: 4 fields, the header has 3", id="D3"),
        pytest.param(GOOD + "1,2,a,9\n1,2,a,9\n", r"line 62: 4 fields.*1 more such", id="D4-long"),
        pytest.param(GOOD + "1\n", r"line 62: 1 fields", id="D4-short"),
        pytest.param("a;b|y\n1;2|u\n2;1|v\n", r"more than one separator; say --sep", id="D5"),
        pytest.param("a;y\n1,u\n2,v\n", r"separated by ';'", id="D5-other"),
        pytest.param(b"a,y\n1,caf\xe9\n", r"line 2: byte 0xe9.*--encoding", id="D6"),
        pytest.param(GOOD.encode("utf-16")[:-1], r"is not utf-16 text", id="D6-16"),
        pytest.param("a,y\n1,u\n2,\0v\n", r"line 3 holds a NUL byte", id="D7"),
        pytest.param("", r"is empty", id="D8-empty"),
        pytest.param("\n\n", r"is empty", id="D8-blank"),
        pytest.param("a,b,y\n", r"no data rows in .*data.csv", id="D8-header"),
        pytest.param("a,b,y\n1,2,u\n", r"is 'u' in all 1 rows", id="D8-one"),
        pytest.param(GOOD + "x7,1,a\n", r"column 'a' holds numbers.*'x7' in line 62", id="D9"),
        pytest.param(GOOD + "inf,1,a\n1e400,1,b\n", r"'a' has 2 infinite.*line 62", id="D11"),
        pytest.param('a,b,y\n"1,000",2,u\n"2,500",1,v\n', r"1000 or 1, .*--decimal", id="D12"),
        pytest.param("a,y\n1,u\n2,u\n3,u\n", r"is 'u' in all 3 rows", id="D14"),
        pytest.param("a,y\n1,\n2,\n", r"target 'y' is empty in every row", id="D15-empty"),
        pytest.param('a,y\n1,"u\n2,v\n', r"line 2: a quote is opened and never", id="quote"),
    ],
)  # fmt: skip
def test_bad_files(csv, text: str | bytes, message: str):
    with pytest.raises(DataError, match=message):
        table(csv(text))


def test_d2_label_text_is_not_missing(csv):
    rows = "".join(f"{i % 5},{['NA', 'None', 'null', 'ok'][i % 4]}\n" for i in range(40))
    data = table(csv("a,y\n" + rows))
    assert data.classes == ("NA", "None", "null", "ok")
    assert any("10 rows hold text 'NA' in 'y'" in notice for notice in data.notices)
    missing = table(csv("a,y\n" + rows), format=Format(missing=("NA", "None")))
    assert missing.classes == ("null", "ok") and len(missing.y) == 20
    assert "rows without a 'y', left out: 20" in missing.notices


def test_d4_bad_rows_can_be_skipped_and_are_counted(csv):
    path = csv('a,b,y\n1,"x,\n1",u\n1,2,3,4\n2,y,v\n1\n' + "1,z,u\n2,x,v\n" * 9)
    data = table(path, format=Format(bad_rows="skip"))
    assert len(data.x) == 20
    assert "2 rows of the wrong length were left out" in data.notices


def test_d5_other_separators_and_decimals(csv):
    rows = "".join(f"{i / 4:.2f};{'uv'[i % 2]}\n".replace(".", ",") for i in range(40))
    data = table(csv("a;y\n" + rows), format=Format(separator=";", decimal=","))
    assert data.x[1, 0] == 0.25 and kinds(data) == {"a": "number"}
    with pytest.raises(InputError, match="one character"):
        Format(separator=";;")


def test_d6_encodings_and_marks(csv):
    data = table(csv(b"\xef\xbb\xbf" + GOOD.encode()))
    assert data.feature_names == ("a", "b")
    text = GOOD.replace("y\n", "caf\u00e9\n", 1)
    data = table(csv(text.encode("latin-1")), "caf\u00e9", format=Format(encoding="latin-1"))
    assert data.classes == ("a", "b")
    with pytest.raises(InputError, match="unknown encoding 'klingon'"):
        table(csv(GOOD), format=Format(encoding="klingon"))


def test_d10_kinds_do_not_depend_on_where_a_text_is(csv):
    rows = [f"{i % 90},{'uv'[i % 2]}" for i in range(30_000)]
    rows[25_000] = "oops,u"
    with pytest.raises(DataError, match=r"column 'a'.*'oops' in line 25002"):
        table(csv("a,y\n" + "\n".join(rows)))
    data = table(csv("a,y\n" + "\n".join(rows)), categorical=("a",))
    assert kinds(data) == {"a": "category"}


def test_an_identifier_may_be_repeated_and_may_be_missing(csv):
    """Rows that stand twice or lack their code do not make features of the codes."""
    lines = [f"u{i},{1000 + i},{i % 7},{'uv'[i % 2]}" for i in range(60)]
    lines += [*lines[:3], ",,4,u"]
    data = table(csv("customer_id,account id,a,y\n" + "\n".join(lines) + "\n"))
    dropped = {c.name: c.reason for c in data.table.dropped}
    assert dropped == {
        "customer_id": "an identifier: 60 codes in 64 rows",
        "account id": "an identifier: 60 numbers in 64 rows",
    }
    often = [f"u{i % 25},{i % 7},{'uv'[i % 2]}" for i in range(64)]  # rows of the same customers
    kept = table(csv("customer_id,a,y\n" + "\n".join(often) + "\n"))
    assert kinds(kept)["customer_id"] != "dropped"


def test_d12_identifiers_and_leading_zeros(csv):
    rows = "".join(f"{i:05d},{i},{i % 7},u{i},{'uv'[i % 2]}\n" for i in range(60))
    data = table(csv("code,number,a,name,y\n" + rows))
    assert kinds(data) == {"number": "number", "a": "number", "code": "dropped", "name": "dropped"}
    assert any("'number': a different whole number in every row" in n for n in data.notices)


def test_d13_empty_columns_are_dropped(csv):
    rows = "".join(f"{i % 7},,c,{'uv'[i % 2]}\n" for i in range(30))
    data = table(csv("a,empty,const,y\n" + rows))
    assert [c.name for c in data.table.dropped] == ["empty", "const"]
    with pytest.raises(DataError, match="no column is left"):
        table(csv("empty,y\n" + ",u\n,v\n" * 5))


def test_d14_rare_classes_and_text_targets(csv):
    rows = "".join(f"{i % 7},{'uv'[i % 2]}\n" for i in range(30))
    parts = split(table(csv("a,y\n" + rows + "1,w\n")))
    assert (parts.train.y == 2).sum() == 1 and not (parts.test.y == 2).any()
    assert any(
        "class 'w': too few rows to hold some out" in notice for notice in parts.train.notices
    )
    with pytest.raises(DataError, match=r"class 'u' has 1 row.* smaller fraction"):
        split(table(csv("a,y\n1,u\n2,v\n3,w\n")), test=0.4)
    with pytest.raises(DataError, match="regression needs numbers, but 'y' holds 'u'"):
        table(csv("a,y\n" + rows), task="regression")
    many = "".join(f"{i % 7},{i / 3}\n" for i in range(60))
    with pytest.raises(DataError, match="too many to learn as classes"):
        table(csv("a,y\n" + many), task="classification")


def test_d15_targets_that_are_not_there(csv):
    with pytest.raises(InputError, match="unknown column 'yeild'; did you mean 'yield'"):
        table(csv("a,yield,y\n1,2,u\n2,1,v\n"), "yeild")
    with pytest.raises(InputError, match="also among the features"):
        table(csv(GOOD), features=("a", "y"))
    with pytest.raises(InputError, match="--target COLUMN"):
        load(csv(GOOD))


def test_d16_d17_d18_arrays_are_never_trusted(tmp_path: Path):
    np.savez(tmp_path / "o.npz", X=np.array([[1], ["a"]], object), y=np.array([0, 1]))
    with pytest.raises(DataError, match="objects are never unpickled"):
        load(tmp_path / "o.npz")
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000, 1), }"
    padded = header + b" " * (118 - len(header) - 1) + b"\n"
    folder = tmp_path / "huge"
    folder.mkdir()
    (folder / "X.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00" + padded)
    np.save(folder / "y.npy", np.array([0, 1]))
    with pytest.raises(DataError, match=r"X\.npy"):
        load(folder)


def test_d19_damaged_parquet(churn: Path, tmp_path: Path):
    customers().to_parquet(tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    for cut in (content[: len(content) // 2], b"", content[:-4] + b"XXXX"):
        (tmp_path / "b.parquet").write_bytes(cut)
        with pytest.raises(DataError, match="is not a complete Parquet file"):
            table(tmp_path / "b.parquet", "churned")


def test_d21_the_origin_tells_when_a_file_changed(churn: Path):
    before = table(churn, "churned")
    churn.write_text(churn.read_text() + churn.read_text().splitlines()[-1] + "\n")
    after = table(churn, "churned")
    assert before.origin["sha256"] != after.origin["sha256"]
    assert before.origin["bytes"] < after.origin["bytes"]
    assert before.fingerprint() != after.fingerprint()


def test_d22_hostile_names(csv):
    names = ["<img onerror=alert(1)>", "</script>", '"line\nbreak"', "x" * 10_000, "\u202eltr"]
    rows = "".join(f"{i % 5},{i % 3},{i % 4},{i % 6},{i % 7},{'uv'[i % 2]}\n" for i in range(60))
    data = table(csv(",".join(names) + ",y\n" + rows))
    assert data.feature_names[2] == "line\nbreak" and len(data.feature_names[3]) == 10_000
    assert split(data).train.x.shape[1] == 5


def test_d23_large_values_are_scaled_in_double_precision(csv):
    rows = "".join(f"{1e39 + 1e35 * i:.17g},{'uv'[i % 2]}\n" for i in range(60))
    train = split(table(csv("a,y\n" + rows))).train.x
    assert train.isfinite().all() and train.std() == pytest.approx(1, abs=0.02)


def test_ambiguous_dates_are_not_guessed(csv):
    def kind(dates: list[str]) -> str:
        rows = "".join(f"{d},{i % 7},{'uv'[i % 2]}\n" for i, d in enumerate(dates))
        data = table(csv("d,a,y\n" + rows))
        return kinds(data)["d"] + " clock" * data.table.columns[0].clock

    with pytest.raises(DataError, match=r"'12/01/2020' .*2020-01-12 or 2020-12-01.*--dates dmy"):
        kind([f"{i % 12 + 1:02d}/{i % 11 + 1:02d}/2020" for i in range(11, 60)])
    assert kind([f"{i % 28 + 1:02d}/{i % 11 + 1:02d}/2020" for i in range(60)]) == "date"
    assert kind([f"2020-01-{i % 28 + 1:02d} {i % 24:02d}:00" for i in range(60)]) == "date clock"


def test_rows_without_a_line_have_a_number(tmp_path: Path):
    frame = customers()
    frame.loc[3, "income"] = np.inf
    frame.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"'income' has 1 infinite value.*row 3"):
        table(tmp_path / "a.parquet", "churned")


@pytest.mark.parametrize("mark", ["^", "~", ":", "\x01"])
def test_one_column_with_the_name_of_the_target_in_it_is_a_matter_of_the_separator(csv, mark):
    path = csv("a,b,y\n1,2,p\n2,3,n\n".replace(",", mark))
    with pytest.raises(InputError, match=r"one column found .* --sep"):
        table(path)
    assert table(path, format=Format(separator=mark)).feature_names == ("a", "b")


@pytest.mark.parametrize(
    ("learnt", "new", "right"),
    [
        ("5 kg | 7 kg | 9 kg", "5 kg | 8 KG", [5, 8]),
        ("5 kg | 7 kg | 9 kg", "5 | 8", [5, 8]),
        ("5 kg | 7 kg | 9 kg", "5 kg | 8 lb", "'8 lb' in line 3, and .* in kg"),
        ("5 kg | 7 kg | 9 kg", "5% | 8%", "'5%' in line 2"),
        ("$5 | $7 | $9", "5 | $1.2k", [5, 1200]),
        ("$5 | $7 | $9", "€5 | €8", "'€5' in line 2, and .* in \\$"),
        ("5 | 7 | 9", "$5 | 8", [5, 8]),
        ("0.05 | 0.07 | 0.09", "5% | 8%", "'5%' in line 2, and .* without a unit"),
        ("5 years | 7 years | 9 years", "1 year | 8 years", [1, 8]),
        ("5% | 7% | 9%", "0.5% | 8", [0.5, 8]),
    ],
)
def test_new_numbers_are_in_the_unit_that_was_learnt(csv, learnt, new, right):
    rows = "".join(f"{cell},{i % 2}\n" for i, cell in enumerate(learnt.split(" | ")))
    data = table(csv("a,y\n" + rows))
    source = read_table(csv("a\n" + "\n".join(new.split(" | ")) + "\n", "new.csv"))
    if isinstance(right, str):
        with pytest.raises(DataError, match=right):
            encode_columns(source, data.table.columns)
    else:
        assert encode_columns(source, data.table.columns)[:, 0].tolist() == right


SHORT = [
    "1 | 2 | 30", "0.5 |  | -2.25", "1.036 | 2.500", "1.036 | 0.5", "-1.036 | 2", "007 | 12",
    "1234.500 | 1.036", "1e5 | 2", "0 | 1 | 0", "1 | NA | 3", "-0 | 0", "1.0 | 2.0000",
    "12345678901234567890 | 1", "1 | x | 3", " 1 | 2", "1,5 | 2", " |  ", "1 | 1 | 1",
]  # fmt: skip


@pytest.mark.parametrize("decimal", [None, ".", ","])
@pytest.mark.parametrize("cells", SHORT)
def test_short_columns_are_read_as_long_ones(csv, monkeypatch, cells, decimal):
    path = csv("a,b\n" + "".join(f'"{cell}",1\n' for cell in cells.split(" | ")))

    def found() -> object:
        raw = RawColumn(read_table(path, Format(decimal=decimal)), "a")
        try:
            column = infer_column(raw)
            if column.kind == "dropped":
                return column
            values = encode_column(raw, column)
            return column, [None if np.isnan(v) else v for v in values.ravel().tolist()]
        except DataError as error:
            return str(error)

    short = found()
    monkeypatch.setattr("tikhon.data.raw_column._FEW_CELLS", 0)
    assert found() == short
