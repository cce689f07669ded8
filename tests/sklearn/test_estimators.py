from __future__ import annotations

import pickle
import warnings

import joblib
import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, make_regression
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_selection import SelectFromModel
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.multioutput import MultiOutputRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tikhon.errors import DataError, StorageError
from tikhon.sklearn import RegularizedClassifier, RegularizedRegressor, load

# most tests train for a few epochs only
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
X, Y = load_diabetes(return_X_y=True)
XC, YC = load_breast_cancer(return_X_y=True)
BOTH = [RegularizedClassifier, RegularizedRegressor]


def linear(**parameters) -> RegularizedRegressor:
    return RegularizedRegressor(
        (), standardize=False, random_state=0, learning_rate_init=0.05, max_iter=1000, tol=0,
        n_iter_no_change=1000, batch_size=10_000, **parameters,
    )  # fmt: skip


PLANTED = make_regression(80, 12, n_informative=4, noise=3.0, random_state=0)
SCALED = (PLANTED[0], PLANTED[1] / 50)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"alpha": 0.1, "l1_ratio": 1}, Lasso(0.1, tol=1e-10)),
        ({"alpha": 0.1, "l1_ratio": 0}, Ridge(0.1 * 80)),
        ({"alpha": 0.1, "l1_ratio": 0.6}, ElasticNet(0.1, l1_ratio=0.6, tol=1e-10)),
    ],
)
def test_linear_models_equal_scikit_learns(ours, theirs):
    weights = np.random.default_rng(0).uniform(0, 2, 80)
    for sample_weight in (None, weights):
        alpha = ours["alpha"] * (weights.mean() if sample_weight is not None else 1)
        if isinstance(theirs, Ridge):
            theirs = Ridge(alpha * 80)
        theirs.fit(*SCALED, sample_weight=sample_weight)
        found = linear(**ours).fit(*SCALED, sample_weight=sample_weight)
        np.testing.assert_allclose(found.coef_, theirs.coef_, atol=2e-3)
        np.testing.assert_allclose(found.intercept_, theirs.intercept_, atol=2e-3)
        if ours["l1_ratio"] == 1:
            np.testing.assert_array_equal(found.support_, theirs.coef_ != 0)


def test_linear_classifier_equals_logistic_regression():
    x = StandardScaler().fit_transform(XC)
    theirs = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-8, max_iter=5000).fit(x, YC)
    ours = RegularizedClassifier(
        (), alpha=0.02, standardize=False, learning_rate_init=0.05, max_iter=700, tol=0,
        n_iter_no_change=700, batch_size=1000, random_state=0,
    ).fit(x, YC)  # fmt: skip
    # two symmetric logits share one weight: w/2 each, so the penalty on them is half of it
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=5e-3)
    assert (ours.predict(x) == theirs.predict(x)).mean() > 0.995


def test_coefficients_are_in_the_units_of_the_data():
    found = RegularizedRegressor((), alpha=1e-3, max_iter=50, random_state=0).fit(X * 7 + 3, Y)
    by_hand = (X * 7 + 3) @ found.coef_ + found.intercept_
    np.testing.assert_allclose(found.predict(X * 7 + 3), by_hand, rtol=1e-9)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_rows_of_weight_zero_are_not_there(kind, dropout):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(600, 4)), rng.integers(0, 2, 600)
    weights = rng.integers(0, 2, 600).astype(float)
    model = kind((8,), max_iter=4, dropout=dropout, random_state=0, early_stopping=True)
    a = clone(model).fit(x, y, sample_weight=weights)
    b = clone(model).fit(x[weights > 0], y[weights > 0])
    np.testing.assert_array_equal(a.predict(x), b.predict(x))
    assert a.loss_curve_ == b.loss_curve_


def test_sparse_equals_dense_without_standardization_and_fits_with_it():
    x = np.where(np.random.default_rng(0).random(XC.shape) < 0.5, XC / XC.std(0), 0.0)
    model = RegularizedClassifier((8,), max_iter=20, random_state=0, standardize=False)
    dense, csr = clone(model).fit(x, YC), clone(model).fit(sparse.csr_matrix(x), YC)
    np.testing.assert_allclose(dense.predict_proba(x), csr.predict_proba(x), rtol=1e-9)
    scaled = model.set_params(standardize=True).fit(sparse.csc_array(x), YC)
    assert scaled.score(sparse.csr_matrix(x), YC) > 0.85
    assert not scaled.network_.shift.any()


def test_computes_in_the_type_of_the_inputs():
    for dtype in (np.float32, np.float64):
        model = RegularizedClassifier((4,), max_iter=3, random_state=0).fit(XC.astype(dtype), YC)
        assert model.coefs_[0].dtype == model.predict_proba(XC.astype(dtype)).dtype == dtype


def test_several_outputs_and_labels():
    two = np.stack([Y, -2 * Y], axis=1)
    model = RegularizedRegressor((16,), max_iter=60, random_state=0).fit(X, two)
    assert model.predict(X).shape == two.shape and model.score(X, two) > 0.4
    assert MultiOutputRegressor(RegularizedRegressor((4,), max_iter=3)).fit(X, two)
    labels = np.stack([YC, 1 - YC, XC[:, 0] > 14], axis=1).astype(int)
    found = RegularizedClassifier((16,), max_iter=40, random_state=0).fit(XC, labels)
    assert found.predict(XC).shape == found.predict_proba(XC).shape == labels.shape
    assert found.score(XC, labels) > 0.8


def test_class_weight_moves_the_boundary():
    rare = np.r_[np.flatnonzero(YC == 0)[:25], np.flatnonzero(YC == 1)]
    x, y = XC[rare][:, :3], YC[rare]
    plain = RegularizedClassifier((4,), max_iter=60, random_state=0).fit(x, y)
    balanced = clone(plain).set_params(class_weight="balanced").fit(x, y)
    recalls = [(m.predict(x)[y == 0] == 0).mean() for m in (plain, balanced)]
    assert recalls[1] > recalls[0]


@pytest.mark.parametrize("hidden", [(), (6,)])
def test_balanced_classes_are_counted_with_the_sample_weights(hidden):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 4, len(YC[:200]))
    x, y = XC[:200, :5], YC[:200]
    model = RegularizedClassifier(hidden, class_weight="balanced", max_iter=20, random_state=0)
    weighted = clone(model).fit(x, y, sample_weight=counts)
    if not hidden:  # batches of repeated rows are other batches
        repeated = clone(model).fit(np.repeat(x, counts, axis=0), np.repeat(y, counts))
        np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=1e-6)
        alone = {"alpha": 0.01, "standardize": False}
        ours = clone(model).set_params(**alone).fit(x, y, sample_weight=counts)
        sums = np.bincount(y, counts)
        factors = sums.sum() / (2 * sums)[y] * counts
        theirs = LogisticRegression(C=2 / (0.01 * factors.sum()), tol=1e-12, max_iter=100_000)
        theirs.fit(x, y, sample_weight=factors)
        np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-5)
    left = clone(model).fit(x[counts > 0], y[counts > 0], sample_weight=counts[counts > 0])
    np.testing.assert_allclose(weighted.predict_proba(x), left.predict_proba(x), rtol=1e-6)


def test_class_weights_that_cannot_count_are_refused():
    balanced = RegularizedClassifier((4,), class_weight="balanced")
    with pytest.raises(ValueError, match="one class a row"):
        balanced.fit(XC, np.stack([YC, 1 - YC], axis=1))
    with pytest.raises(ValueError, match="partial_fit does not support class_weight"):
        balanced.partial_fit(XC, YC, classes=[0, 1])
    for factors in ({0: -1.0, 1: 1.0}, {0: 0.0, 1: 0.0}):
        with pytest.raises(ValueError, match="class_weight must be >= 0"):
            RegularizedClassifier((4,), class_weight=factors).fit(XC, YC)


@pytest.mark.parametrize("setting", [{"alpha": "auto"}, {"early_stopping": True}])
def test_a_class_of_one_row_is_learned_from_and_not_held_out(setting):
    y = YC.copy()
    y[3] = 7
    model = RegularizedClassifier((4,), max_iter=30, random_state=0, **setting).fit(
        XC[:90], y[:90]
    )
    assert model.classes_.tolist() == [0, 1, 7]
    few = RegularizedClassifier((4,), max_iter=30, random_state=0, **setting)
    few.fit(XC[:6], [0, 0, 0, 1, 1, 2])  # fewer held-out rows than classes
    with pytest.raises(ValueError, match="2 rows are too few to hold out"):
        few.fit(XC[:2], [0, 1])


def test_a_network_goes_on_with_the_parameters_as_they_are_now():
    model = RegularizedClassifier((4,), warm_start=True, max_iter=3, random_state=0).fit(XC, YC)
    model.set_params(activation="tanh", dropout=0.5, early_stopping=True)
    model.fit(XC.astype(np.float32), YC)
    assert model.network_.activation == "tanh" and float(model.network_.dropout[0].rate) == 0.5
    assert len(model.validation_scores_) == 3
    online = RegularizedClassifier((4,), random_state=0).partial_fit(XC, YC, classes=[0, 1])
    assert online.partial_fit(sparse.csr_matrix(XC, dtype=np.float32), YC).n_iter_ == 2
    for now in ({"hidden_layer_sizes": (5,)}, {"hidden_layer_sizes": ()}, {"standardize": False}):
        with pytest.raises(ValueError, match=f"to continue has .*{next(iter(now))[:9]}"):
            clone_of = pickle.loads(pickle.dumps(model))
            clone_of.set_params(**now).fit(XC, YC)


def test_warm_start_and_partial_fit_continue():
    whole = {"batch_size": len(X), "random_state": 0}
    model = RegularizedRegressor((8,), max_iter=5, warm_start=True, **whole).fit(X, Y)
    first = model.loss_curve_[-1]
    model.fit(X, Y)
    assert len(model.loss_curve_) == model.n_iter_ == 10 and model.loss_curve_[-1] < first
    steps = RegularizedRegressor((8,), **whole)
    for _ in range(5):
        steps.partial_fit(X, Y)
    assert steps.loss_curve_ == pytest.approx(model.loss_curve_[:5], rel=1e-9)
    three = load_iris()
    online = RegularizedClassifier((8,), random_state=0)
    online.partial_fit(three.data[:50], three.target[:50], classes=[0, 1, 2])
    online.partial_fit(three.data[50:], three.target[50:])
    assert online.predict_proba(three.data).shape == (150, 3)
    with pytest.raises(ValueError, match="classes that were not there"):
        online.partial_fit(three.data[:3], [0, 1, 7])


def test_exact_zeros_select_features():
    model = RegularizedClassifier(
        (8,), alpha=0.05, penalty="group_lasso", max_iter=200, random_state=0
    ).fit(XC, YC)
    assert 0 < model.support_.sum() < 15
    assert ((model.feature_importances_ > 0) == model.support_).all()
    assert model.score(XC, YC) > 0.9
    selected = SelectFromModel(model, prefit=True, threshold=1e-12).transform(XC)
    assert selected.shape[1] == model.support_.sum()


@pytest.mark.filterwarnings("ignore:Hypergradient.*upper end")  # 29 of 30 columns are noise
def test_auto_finds_a_strength_in_one_run():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(150, 30)), rng.normal(size=150)
    y += 0.7 * x[:, 0]
    for l1_ratio in (0.0, 1.0):
        model = RegularizedRegressor(
            (30,), alpha="auto", l1_ratio=l1_ratio, max_iter=150, random_state=0
        ).fit(x, y)
        assert 0 < model.alpha_ < np.inf
        assert len(model.alpha_curve_) == model.n_iter_ == 150
        assert len(set(np.round(model.alpha_curve_, 12))) > 5


def test_classes_that_a_penalty_keeps_finite_are_not_called_separable():
    x, y = np.array([[-2.0], [-1.0], [1.0], [2.0]]), np.array([0, 0, 1, 1])
    model = RegularizedClassifier((), alpha=1e-7, standardize=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(x, y)
    theirs = LogisticRegression(C=2 / (1e-7 * 4), tol=1e-12, max_iter=10_000).fit(x, y)
    np.testing.assert_allclose(model.coef_, theirs.coef_, rtol=1e-3)
    with pytest.raises(ValueError, match="one class only: 1"):
        model.fit(x, y, sample_weight=y)


def test_early_stopping_keeps_the_best_weights():
    model = RegularizedClassifier((32,), max_iter=300, early_stopping=True, random_state=0)
    model.fit(XC, YC)
    assert model.n_iter_ < 300 and len(model.validation_scores_) == model.n_iter_
    assert model.score(XC, YC) > 0.93


def test_pipelines_searches_and_joblib():
    pipe = make_pipeline(
        StandardScaler(), RegularizedClassifier((8,), max_iter=20, random_state=0)
    )
    assert cross_val_score(pipe, XC, YC, cv=3).mean() > 0.9
    grid = {"regularizedclassifier__alpha": [1e-4, 1e-2]}
    search = GridSearchCV(pipe, grid, cv=2, n_jobs=1).fit(XC, YC)
    assert search.best_score_ > 0.9
    fits = joblib.Parallel(n_jobs=2, backend="threading")(
        joblib.delayed(lambda m: m.fit(XC, YC).predict_proba(XC))(clone(pipe)) for _ in range(2)
    )
    assert fits[0].shape == fits[1].shape


def test_names_of_features():
    frame = pd.DataFrame(XC[:, :3], columns=["a", "b", "c"])
    model = RegularizedClassifier((4,), max_iter=3, random_state=0).fit(frame, YC)
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[["b", "a", "c"]])


@pytest.mark.parametrize(
    "model",
    [
        RegularizedClassifier((8, 4), dropout=0.1, max_iter=5, class_weight={"benign": 2.0}),
        RegularizedClassifier((), alpha=0.1, l1_ratio=1, max_iter=5, random_state=3),
        RegularizedRegressor((8,), max_iter=5, early_stopping=True),
    ],
)
def test_saved_estimators_predict_the_same(model, tmp_path):
    y = np.where(YC, "benign", "malign") if isinstance(model, RegularizedClassifier) else YC
    frame = pd.DataFrame(XC).rename(columns=str)
    model = clone(model).fit(frame, y)
    model.save(tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(again.predict(frame), model.predict(frame))
    assert again.get_params() == model.get_params()
    np.testing.assert_array_equal(again.support_, model.support_)
    assert again.loss_curve_ == model.loss_curve_
    if not model.early_stopping:
        again.partial_fit(frame, y)
    unpickled = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(unpickled.predict(frame), model.predict(frame))
    if not model.early_stopping:
        both = [m.partial_fit(frame, y).loss_curve_ for m in (unpickled, model)]
        assert both[0] == both[1]


def test_saved_parameters_are_those_that_were_set(tmp_path):
    model = RegularizedClassifier(
        (), class_weight={0: 1.0, 1: 2.0}, n_iter_no_change=np.inf, random_state=0
    )
    model.fit(XC, YC).save(tmp_path / "model.safetensors")
    found = load(tmp_path / "model.safetensors")
    assert found.get_params() == model.get_params()
    np.testing.assert_allclose(found.fit(XC, YC).coef_, model.coef_)


def test_a_flipped_bit_of_a_saved_estimator_is_noticed(tmp_path):
    path = tmp_path / "m.safetensors"
    RegularizedClassifier((), alpha=0.1, random_state=3).fit(XC, YC).save(path)
    whole = path.read_bytes()
    for where in [*range(8, len(whole), 29), len(whole) - 5]:
        damaged = bytearray(whole)
        damaged[where] ^= 2
        path.write_bytes(damaged)
        with pytest.raises(DataError):
            load(path)


def test_a_file_from_before_checksums_is_called_old_and_not_damaged(tmp_path):
    path = tmp_path / "m.safetensors"
    RegularizedClassifier((), alpha=0.1, random_state=3).fit(XC, YC).save(path)
    with safe_open(path, framework="pt") as file:
        header = {"estimator": file.metadata()["estimator"]}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors, path, metadata=header)
    with pytest.raises(DataError, match="older version of tikhon") as caught:
        load(path)
    assert "damaged" not in str(caught.value)


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"not an estimator of tikhon\.sklearn"):
        load(tmp_path / "a")
    with pytest.raises(StorageError, match="cannot be read"):
        load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alpha": -1}, r"alpha must be finite and >= 0.*received -1"),
        ({"alpha": "best"}, "received 'best'"),
        ({"l1_ratio": 1.5}, r"l1_ratio must be in \[0, 1\], received 1.5"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"hidden_layer_sizes": (3, 0)}, "hidden_layer_sizes must be positive"),
        ({"hidden_layer_sizes": (2.5,)}, "hidden_layer_sizes must be positive integers"),
        ({"hidden_layer_sizes": "a"}, "hidden_layer_sizes must be positive integers"),
        ({"hidden_layer_sizes": [[3, 4]]}, "hidden_layer_sizes must be positive integers"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"activation": "relo"}, "did you mean 'relu'"),
        ({"penalty": "l3"}, "unknown penalty 'l3'"),
        ({"max_iter": 0}, "max_iter must be a positive integer"),
        ({"n_iter_no_change": 0}, "n_iter_no_change must be a positive integer or np.inf"),
        ({"learning_rate_init": 1e12, "max_iter": 50, "standardize": False}, "the loss is"),
    ],
)
def test_bad_parameters_are_named(parameters, message):
    with pytest.raises(ValueError, match=message):
        RegularizedRegressor(**{"hidden_layer_sizes": (4,), **parameters}).fit(X * 1e200, Y)


@pytest.mark.parametrize("hidden", [(), (4,)])
@pytest.mark.parametrize(
    ("x_unit", "y_unit", "dtype", "message"),
    [
        (1e200, 1.0, np.float64, "column 0 of X is too large to be squared"),
        (1.0, 1e200, np.float64, "y is too large to be squared"),
        (1.0, 1e50, np.float32, "y has a mean or deviation of .* beyond the float type of X"),
        (1.0, 1e-60, np.float32, "y has a mean or deviation of .* beyond the float type of X"),
    ],
)
def test_data_that_their_float_type_cannot_hold_are_named(hidden, x_unit, y_unit, dtype, message):
    x, y = np.random.default_rng(0).normal(size=(2, 40, 3))
    with pytest.raises(ValueError, match=message):
        RegularizedRegressor(hidden).fit((x * x_unit).astype(dtype), y[:, 0] * y_unit)


def test_what_is_not_read_or_not_finite_is_told():
    x = np.random.default_rng(0).normal(size=(40, 3))
    y = x[:, 0] > 0
    with pytest.warns(UserWarning, match="l1_ratio=0.5 is of penalty='elastic_net'") as caught:
        RegularizedClassifier((), penalty="group_lasso", l1_ratio=0.5).fit(x, y)
    assert caught[0].filename == __file__
    with pytest.warns(ConvergenceWarning, match="the classes are separable") as caught:
        RegularizedClassifier((), alpha=0.0).fit(x, y)
    assert {w.filename for w in caught if w.category is ConvergenceWarning} == {__file__}


def test_targets_that_no_float_can_square_are_named():
    with pytest.raises(ValueError, match=r"y is too large to be squared, up to 3.46e\+202"):
        RegularizedRegressor((4,)).fit(X, Y * 1e200)


SCALES = [1e-6, 1e-2, 1e6]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("first", "second"), [(5.0, 0.0), (0.0, 2.0), (2.5, 2.5)])
def test_a_linear_regressor_is_exact_at_every_scale(scale, first, second):
    """At its defaults; `first` and `second` are the strengths of the two parts of the penalty."""
    x, y = PLANTED
    alpha = first * scale + second  # the first part has the unit of the targets
    model = RegularizedRegressor(
        (), standardize=False, alpha=alpha, l1_ratio=first * scale / alpha
    ).fit(x, y * scale)
    total, exact = first + second, {"tol": 1e-12, "max_iter": 100_000}
    theirs = ElasticNet(total, l1_ratio=first / total, **exact)
    theirs = theirs if first else Ridge(second * len(x), tol=1e-12)
    theirs.fit(x, y)
    np.testing.assert_allclose(model.coef_ / scale, theirs.coef_, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(model.intercept_ / scale, theirs.intercept_, rtol=1e-5)
    np.testing.assert_array_equal(model.support_, theirs.coef_ != 0)
    scaled = [RegularizedRegressor((), alpha=0.1, l1_ratio=0.5).fit(x, v) for v in (y, y * scale)]
    np.testing.assert_allclose(scaled[1].coef_, scaled[0].coef_ * scale, rtol=1e-7)


@pytest.mark.filterwarnings("error")
def test_a_linear_classifier_is_exact_for_any_kind_of_classes():
    x = StandardScaler().fit_transform(XC)
    for y in (YC, np.where(YC, 1, -1), np.digitize(XC[:, 0], [12, 16])):
        model = RegularizedClassifier((), alpha=0.02, standardize=False).fit(x, y)
        classes = len(model.classes_)
        strength = 0.01 if classes == 2 else 0.02  # of two symmetric logits each has half
        theirs = LogisticRegression(C=1 / (strength * len(x)), tol=1e-10, max_iter=5000)
        np.testing.assert_allclose(model.coef_, theirs.fit(x, y).coef_, atol=1e-4)
    labels = np.stack([YC, XC[:, 0] > 14], axis=1).astype(int)
    both = RegularizedClassifier((), alpha=0.02).fit(XC, labels)
    alone = [RegularizedClassifier((), alpha=0.02).fit(XC, labels[:, [k, k]]) for k in (0, 1)]
    for k in (0, 1):
        np.testing.assert_allclose(both.coef_[k], alone[k].coef_[k], atol=1e-6)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("hidden", [(), (6,)])
def test_float32_and_float64_rows_give_the_same_model(kind, hidden):
    x, y = (XC, YC) if kind is RegularizedClassifier else (X, Y)
    model = kind(hidden, dropout=0.2, max_iter=3, random_state=0)
    wide, narrow = (clone(model).fit(rows, y) for rows in (x, x.astype(np.float32)))
    for a, b in zip(wide.coefs_, narrow.coefs_, strict=True):
        assert b.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("scale", SCALES)
def test_a_network_learns_targets_in_any_unit(scale):
    plain = RegularizedRegressor((8,), alpha=0, standardize=False, max_iter=30, random_state=0)
    other = clone(plain).fit(SCALED[0], SCALED[1] * scale)
    plain.fit(*SCALED)
    rows = SCALED[0][:20] + 0.1
    np.testing.assert_allclose(other.predict(rows) / scale, plain.predict(rows), rtol=1e-6)
    assert other.loss_curve_ == pytest.approx([loss * scale**2 for loss in plain.loss_curve_])


def test_the_objective_of_a_network_is_in_the_units_of_its_targets():
    model = RegularizedRegressor(
        (5,), alpha=0.3, l1_ratio=0.4, standardize=False, max_iter=4, random_state=0, batch_size=80
    ).fit(*SCALED)
    before = clone(model).set_params(max_iter=3).fit(*SCALED)
    loss = 0.5 * np.mean((SCALED[1] - before.predict(SCALED[0])) ** 2)
    weights = np.concatenate([w.ravel() for w in before.coefs_])
    after = np.concatenate([w.ravel() for w in model.coefs_])
    penalty = 0.3 * (0.4 * np.abs(after).sum() + 0.3 * (after**2).sum())
    assert model.loss_curve_[-1] == pytest.approx(loss + penalty, rel=1e-6)
    hidden = np.maximum(SCALED[0] @ before.coefs_[0] + before.intercepts_[0], 0)
    by_hand = hidden @ before.coefs_[1] + before.intercepts_[1]
    np.testing.assert_allclose(before.predict(SCALED[0]), by_hand[:, 0])
    assert len(weights) == len(after)


@pytest.mark.filterwarnings("default::sklearn.exceptions.ConvergenceWarning")
def test_training_that_is_cut_short_is_told():
    with pytest.warns(ConvergenceWarning, match="3 epochs of training did not converge") as told:
        RegularizedRegressor((4,), max_iter=3).fit(X, Y)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RegularizedRegressor((4,), max_iter=3, n_iter_no_change=np.inf).fit(X, Y)  # asked for
        RegularizedRegressor((4,)).partial_fit(X, Y)


@pytest.mark.parametrize("name", ["early_stopping", "alpha"])
def test_partial_fit_refuses_what_needs_a_whole_run(name):
    model = RegularizedRegressor((4,), **{name: True if name == "early_stopping" else "auto"})
    with pytest.raises(ValueError, match=f"partial_fit does not support {name}"):
        model.partial_fit(X, Y)


def test_logarithms_of_probabilities_are_finite():
    x, y = XC[:, :1] - XC[:, 0].mean(), (XC[:, 0] > XC[:, 0].mean()).astype(int)
    model = RegularizedClassifier((), alpha=1e-6, standardize=False).fit(x, y)
    assert (model.predict_proba(x * 1e6) == 0).any()
    log = model.predict_log_proba(x * 1e6)
    assert np.isfinite(log).all()
    np.testing.assert_allclose(np.exp(model.predict_log_proba(x)), model.predict_proba(x))
    labels = np.stack([y, 1 - y], axis=1)
    two = RegularizedClassifier((), alpha=1e-6, standardize=False).fit(x, labels)
    assert np.isfinite(two.predict_log_proba(x * 1e6)).all()
