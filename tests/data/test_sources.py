import gzip
import io
import zipfile

import numpy as np
import pytest
import torch

from tikhon.data import NAMES, load, pair, split
from tikhon.data.arrays import from_arrays
from tikhon.data.batches import order, slices
from tikhon.data.table import TableOptions
from tikhon.errors import DataError, InputError

BUNDLED = [name for name in NAMES if "mnist" not in name]
X = np.random.default_rng(0).normal(size=(60, 4))
Y = np.arange(60) % 3


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_sets_are_finite_and_split(name):
    data = load(name)
    parts = split(data)
    assert torch.isfinite(data.x).all() and len(data.x) == len(data.y)
    assert sum(len(p.x) for p in (parts.train, parts.valid, parts.test)) == len(data.x)
    if data.scale:
        assert parts.train.x.mean(0).abs().max() < 1e-5
        assert (parts.train.x.std(0, correction=0) - 1).abs().max() < 1e-4


def test_split_is_disjoint_stratified_and_a_function_of_the_seed():
    data = from_arrays(np.arange(200, dtype=float)[:, None], np.arange(200) % 4)
    data = type(data)("rows", data.x, data.y, data.task, data.classes)
    a, b, c = split(data, seed=3), split(data, seed=3), split(data, seed=4)
    rows = torch.cat([a.train.x, a.valid.x, a.test.x]).flatten()
    assert sorted(rows.tolist()) == list(range(200))
    assert torch.equal(a.train.x, b.train.x) and not torch.equal(a.train.x, c.train.x)
    assert torch.bincount(a.valid.y).tolist() == [10] * 4


def test_scaling_uses_training_rows_alone():
    parts = split(from_arrays(X * 100 + 7, X[:, 0]))
    mean = torch.tensor(parts.scaling["mean"], dtype=torch.float64)
    unscaled = parts.train.x.double() * torch.tensor(parts.scaling["scale"]) + mean
    assert torch.allclose(unscaled.mean(0), mean, atol=1e-4)
    assert parts.train.unit == pytest.approx(parts.scaling["target_scale"])


def test_order_is_a_permutation_that_depends_on_seed_and_epoch():
    assert sorted(order(50, seed=1, epoch=2).tolist()) == list(range(50))
    assert not torch.equal(order(50, seed=1, epoch=2), order(50, seed=2, epoch=1))
    before = torch.get_rng_state()
    order(50, seed=1, epoch=2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("rows, size", [(9, 4), (8, 4), (1, 4), (5, 1), (3, 10)])
def test_slices_cover_every_row_once_and_leave_no_single_row(rows, size):
    parts = slices(torch.arange(rows), size)
    assert torch.cat(parts).tolist() == list(range(rows))
    assert rows == 1 or size == 1 or all(len(p) > 1 for p in parts)


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_npz_and_folders(tmp_path):
    path = save(tmp_path / "own.npz", X=X, y=np.array(["a", "b", "c"])[Y],
                feature_names=list("pqrs"))  # fmt: skip
    data = load(path)
    assert (data.name, data.classes, data.feature_names) == ("own", ("a", "b", "c"), tuple("pqrs"))
    assert torch.equal(load(tmp_path).y, data.y)
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    np.save(arrays / "X.npy", X)
    np.save(arrays / "y.npy", Y)
    assert torch.equal(load(arrays).x, data.x)
    assert load("own", data_dir=tmp_path).fingerprint() == data.fingerprint()


def test_targets_decide_the_task():
    assert from_arrays(X, X[:, 0]).task == "regression"
    assert from_arrays(X, np.arange(60)).task == "regression"
    assert from_arrays(X, Y).classes == ("0", "1", "2")
    assert from_arrays(X, Y == 1).classes == ("False", "True")
    assert from_arrays(X, Y, classes=["p", "q", "r"]).classes == ("p", "q", "r")
    assert from_arrays(X, X[:, :2]).outputs == 2


BROKEN = {
    "X has 60 rows but y has 59": {"X": X, "y": Y[:-1]},
    "one class only": {"X": X, "y": np.zeros(60, int)},
    "column 'q' has 1 value.* first in row 7": {
        "X": np.where((np.arange(60)[:, None] == 7) & (np.arange(4) == 1), np.nan, X),
        "y": Y,
        "feature_names": list("pqrs"),
    },
    "column 2 has 2 value": {
        "X": np.where((np.arange(60)[:, None] > 57) & (np.arange(4) == 2), np.inf, X),
        "y": Y,
    },
    "y has 60 value.* that are NaN": {"X": X, "y": np.full(60, np.nan)},
    "column 2 has 1 value beyond 1e\\+18, first in row 3": {
        "X": np.where((np.arange(60)[:, None] == 3) & (np.arange(4) == 2), 1e200, X),
        "y": Y,
    },
    "y has 60 values beyond": {"X": X, "y": X[:, 0] * 1e30 + 1e31},
    "must have rows and columns": {"X": X[:, 0], "y": Y},
    "X must be numeric": {"X": X.astype(str), "y": Y},
    "lacks y": {"X": X, "z": Y},
    "has no rows": {"X": X[:0], "y": Y[:0]},
}


@pytest.mark.parametrize("message", BROKEN)
def test_bad_arrays_are_refused_by_name(tmp_path, message):
    path = save(tmp_path / "bad.npz", **BROKEN[message])
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert "bad" in str(caught.value)


def test_objects_are_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    path = tmp_path / "trap.npz"
    np.savez(path, X=np.array([Trap()], dtype=object), y=Y)
    with pytest.raises(DataError, match="never unpickled"):
        load(path)


def test_truncated_and_oversized_archives(tmp_path, monkeypatch):
    path = save(tmp_path / "whole.npz", X=X, y=Y)
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"not a complete .npz"):
        load(tmp_path / "cut.npz")
    monkeypatch.setattr("tikhon.data.arrays._LIMIT", 100)
    with pytest.raises(DataError, match=r"unpacks to .* the limit is 100"):
        load(path)


def test_an_npy_header_that_claims_more_than_the_file_holds(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)}
    )
    with zipfile.ZipFile(tmp_path / "claim.npz", "w") as archive:
        archive.writestr("X.npy", header.getvalue())
        archive.writestr("y.npy", header.getvalue())
    with pytest.raises(DataError):
        load(tmp_path / "claim.npz")


def test_unknown_names_and_paths():
    with pytest.raises(InputError, match="did you mean 'digits'"):
        load("digit")
    with pytest.raises(DataError, match=r"no file or folder 'absent.npz'"):
        load("absent.npz")


def test_rare_classes_and_bad_fractions():
    few = from_arrays(X, np.r_[np.zeros(59), 1].astype(int))
    parts = split(few)
    assert (parts.train.y == 1).sum() == 1
    assert "class '1': too few rows to hold some out" in " ".join(parts.train.notices)
    with pytest.raises(InputError, match="valid must be a fraction"):
        split(load("iris"), valid=1.5)


def test_pair_takes_what_users_call_data():
    tensors = torch.tensor(X).float(), torch.tensor(Y)
    dataset = torch.utils.data.TensorDataset(*tensors)
    for data in (tensors, (X, Y), torch.utils.data.DataLoader(dataset, batch_size=7)):
        x, y = pair(data)
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert torch.allclose(x, tensors[0]) and torch.equal(y, tensors[1])
    assert pair("iris")[0].shape == (150, 4)


@pytest.mark.parametrize(
    "data, message",
    [
        (([[1.0]], [0, 1]), "x has 1 rows but y has 2"),
        (([[1.0], [float("nan")]], [0, 1]), "1 value.* first in row 1, column 0"),
        ((np.zeros((0, 3)), []), "no rows"),
        ((["a"], [0]), "must be numeric"),
        (42, "a pair .* received int"),
        (([1.0],), "received inputs alone"),
    ],
)
def test_pair_refuses(data, message):
    with pytest.raises(DataError, match=message):
        pair(data)


NAMES_OF_ARRAYS = [
    ("X", "y"),
    ("x", "Y"),
    ("x_train", "y_train"),
    ("train_images", "train_labels"),
]


@pytest.mark.parametrize(("inputs", "targets"), NAMES_OF_ARRAYS)
def test_arrays_are_found_under_the_names_that_the_field_gives_them(tmp_path, inputs, targets):
    x, y = np.arange(24.0).reshape(8, 3), np.arange(8) % 2
    np.savez(tmp_path / "a.npz", **{inputs: x, targets: y})
    data = load(str(tmp_path / "a.npz"))
    assert data.x.tolist() == x.tolist() and data.y.tolist() == y.tolist() and data.test is None


@pytest.mark.parametrize("names", [("x_test", "y_test"), ("test_images", "test_labels")])
def test_rows_to_test_stay_the_sources_own(tmp_path, names):
    x, y = np.arange(24.0).reshape(8, 3), np.array(list("abababab"))
    parts = dict(zip(names, (x[6:], y[6:])))
    np.savez(tmp_path / "a.npz", x_train=x[:6], y_train=y[:6], **parts)
    data = load(str(tmp_path / "a.npz"))
    assert data.test is not None and data.classes == data.test.classes == ("a", "b")
    assert data.x.tolist() == x[:6].tolist() and data.test.x.tolist() == x[6:].tolist()
    assert data.y.tolist() == [0, 1] * 3 and data.test.y.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("held", "said"),
    [({"a": 1}, "lacks X and y; it holds a"), ({"X": 1, "x": 2, "y": 3}, "holds X and x")],
)
def test_arrays_that_cannot_be_told_are_named(tmp_path, held, said):
    np.savez(tmp_path / "a.npz", **{key: np.ones((4, 2)) for key in held})
    with pytest.raises(DataError, match=said):
        load(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("name", ["digits", "mnist", "rows.npz", "folder"])
def test_a_target_of_what_is_no_table_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("rows.npz", X=np.eye(4), y=[0, 1, 0, 1])
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        InputError, match=f"'y' names a column of a table .--target., and {name} is"
    ):
        load(name, table=TableOptions("y"))


@pytest.mark.parametrize("name", ["iris.data", "iris.dat", "IRIS.DATA", "iris.data.gz"])
def test_files_as_archives_name_them_are_tables(tmp_path, name):
    path = tmp_path / name
    text = b"a,y\n1,p\n2,n\n3.5,n\n"
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert load(path, table=TableOptions("y")).x[:, 0].tolist() == [1, 2, 3.5]


def test_standard_input_is_refused_with_the_reason():
    with pytest.raises(InputError, match="not read from standard input"):
        load("-")
