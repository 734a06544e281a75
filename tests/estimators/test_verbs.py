"""Fit loops equal scikit-learn's own, given the estimators, rows and states that it draws."""

import re
import subprocess
import sys
import warnings

import numpy as np
import pytest

from taskcarrier import StaticParallelMapper, fit_many, last_report, predict_array, share
from taskcarrier.random_streams import RandomStreams
from taskcarrier.scheduling import history
from tests.strategies import (
    ROOT,
    assert_same,
    keep_pools_warm,
    run_script,
)

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is optional")
from sklearn import datasets  # noqa: E402  # only where it is there
from sklearn.base import BaseEstimator, clone  # noqa: E402  # likewise
from sklearn.dummy import DummyClassifier  # noqa: E402  # likewise
from sklearn.ensemble import BaggingClassifier, RandomForestClassifier  # noqa: E402  # likewise
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge  # noqa: E402  # likewise
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score  # noqa: E402  # likewise
from sklearn.multiclass import OneVsRestClassifier  # noqa: E402  # likewise
from sklearn.pipeline import make_pipeline  # noqa: E402  # likewise
from sklearn.preprocessing import LabelBinarizer, StandardScaler  # noqa: E402  # likewise
from sklearn.tree import DecisionTreeClassifier  # noqa: E402  # likewise

X, y = datasets.load_iris(return_X_y=True)
order = np.random.default_rng(0).permutation(len(X))
X, y = X[order], y[order]


# Workers have scikit-learn after a fit.
pools = keep_pools_warm(2, warm_up=lambda: fit_many([Ridge()] * 2, X, y, n_jobs=2, backend="loky"))


class TestAgainstScikitLearn:
    def test_fits_equal_cross_validation(self, run):
        folds = list(KFold(5).split(X))
        fitted = fit_many(Ridge(), X, y, rows=[train for train, _ in folds], **run)
        scores = [one.score(X[test], y[test]) for one, (_, test) in zip(fitted, folds, strict=True)]
        assert_same(np.array(scores), cross_val_score(Ridge(), X, y, cv=KFold(5)))

    def test_fits_equal_bagging(self, run):
        theirs = BaggingClassifier(DecisionTreeClassifier(), 8, random_state=0).fit(X, y)
        states = [one.random_state for one in theirs.estimators_]
        # Bagging gives weights where estimators take them: how often each row was drawn.
        counts = [np.bincount(rows, minlength=len(X)) for rows in theirs.estimators_samples_]
        ours = fit_many(
            [DecisionTreeClassifier(random_state=state) for state in states],
            X,
            y,
            sample_weight=np.array(counts, float),
            **run,
        )
        for one, other in zip(ours, theirs.estimators_, strict=True):
            assert_same(one.predict_proba(X), other.predict_proba(X))
            assert_same(one.tree_.threshold, other.tree_.threshold)

    def test_fits_equal_a_random_forest(self, run):
        theirs = RandomForestClassifier(8, random_state=0).fit(X, y)
        counts = [np.bincount(rows, minlength=len(X)) for rows in theirs.estimators_samples_]
        trees = [clone(one) for one in theirs.estimators_]
        ours = fit_many(trees, X, y, sample_weight=np.array(counts, float), **run)
        votes = np.mean([one.predict_proba(X) for one in ours], axis=0)
        assert np.allclose(votes, theirs.predict_proba(X), rtol=1e-15, atol=0)
        for one, other in zip(ours, theirs.estimators_, strict=True):
            assert_same(one.tree_.threshold, other.tree_.threshold)
            assert_same(one.predict_proba(X), other.predict_proba(X))

    def test_fits_equal_one_against_the_rest(self, run):
        theirs = OneVsRestClassifier(LogisticRegression()).fit(X, y)
        targets = LabelBinarizer().fit_transform(y)
        ours = fit_many(LogisticRegression(), X, targets, columns=range(3), **run)
        for one, other in zip(ours, theirs.estimators_, strict=True):
            assert_same(one.coef_, other.coef_)
            assert_same(one.intercept_, other.intercept_)

    def test_fits_equal_the_inner_loop_of_a_grid_search(self, run):
        grid = {"alpha": [0.1, 1.0, 10.0]}
        folds = list(KFold(3).split(X))
        theirs = GridSearchCV(Ridge(), grid, cv=folds).fit(X, y)
        tried = [(alpha, fold) for alpha in grid["alpha"] for fold in folds]
        ours = fit_many(
            [Ridge(alpha=alpha) for alpha, _ in tried],
            X,
            y,
            rows=[train for _, (train, _) in tried],
            **run,
        )
        scores = [
            one.score(X[test], y[test]) for one, (_, (_, test)) in zip(ours, tried, strict=True)
        ]
        assert_same(np.reshape(scores, (3, 3)).mean(axis=1), theirs.cv_results_["mean_test_score"])

    def test_a_bootstrap_may_be_drawn_in_the_workers(self, run):
        n = len(X)
        ours = fit_many(
            [LinearRegression()] * 6, X, y, rows=lambda rng: rng.integers(n, size=n), rng=3, **run
        )
        for number, one in enumerate(ours):
            rows = RandomStreams.from_seed(3).stream(number).integers(n, size=n)
            assert_same(one.coef_, LinearRegression().fit(X[rows], y[rows]).coef_)


class TestRandomStates:
    def test_random_states_come_from_the_stream_of_the_fit(self, run):
        nested = make_pipeline(StandardScaler(), DecisionTreeClassifier(max_features=1))
        ours = fit_many([nested] * 4, X, y, rng=7, **run)
        for number, one in enumerate(ours):
            stream = RandomStreams.from_seed(7).stream(number)
            state = int(stream.integers(np.iinfo(np.int32).max))
            tree = DecisionTreeClassifier(max_features=1, random_state=state)
            theirs = make_pipeline(StandardScaler(), tree).fit(X, y)
            assert one[-1].random_state == state
            assert_same(one.predict_proba(X), theirs.predict_proba(X))

    def test_random_states_stay_without_a_stream(self, run):
        (one,) = fit_many(DecisionTreeClassifier(random_state=5), X, y, **run)
        assert one.random_state == 5


class TestArguments:
    def test_given_estimators_are_not_changed(self, run):
        ridge = Ridge()
        fitted = fit_many([ridge, ridge], X, y, **run)
        assert not hasattr(ridge, "coef_")
        assert fitted[0] is not fitted[1]

    def test_rows_may_be_masks_or_indices(self, run):
        masks = [y != 0, y != 1]
        by_mask = fit_many(Ridge(), X, y, rows=masks, **run)
        by_index = fit_many(Ridge(), X, y, rows=[np.flatnonzero(mask) for mask in masks], **run)
        for one, other, mask in zip(by_mask, by_index, masks, strict=True):
            assert_same(one.coef_, other.coef_)
            assert_same(one.coef_, Ridge().fit(X[mask], y[mask]).coef_)

    def test_rows_may_be_of_several_types(self, run):
        mask = np.arange(len(X)) < 70
        rows = [mask, np.arange(80, dtype=np.int8), np.arange(90, dtype=np.uint64), [-1, -2, 3]]
        ours = fit_many(Ridge(), X, y, rows=rows, **run)
        for one, some in zip(ours, rows, strict=True):
            assert_same(one.coef_, Ridge().fit(X[some], y[some]).coef_)

    def test_each_fit_starts_from_a_fresh_clone(self, run):
        given = Growing(seen=[0])
        for estimators in (given, [given] * 5):
            ours = fit_many(estimators, X, rows=[[number] for number in range(5)], **run)
            assert [one.seen for one in ours] == [[0, number] for number in X[:5, 0].tolist()]
        assert given.seen == [0]

    def test_clones_keep_more_than_plain_parameters(self, run):
        scaler = StandardScaler().set_output(transform="default")  # is kept beside the parameters
        nested = make_pipeline(scaler, Ridge(alpha=2))
        theirs = clone(nested).fit(X, y)
        for one in fit_many([nested] * 3, X, y, **run):
            assert one[0]._sklearn_output_config == theirs[0]._sklearn_output_config
            assert one[1] is not nested[1]
            assert np.allclose(one.predict(X), theirs.predict(X), rtol=1e-12)
        for one in fit_many([scaler] * 3, X, **run):
            assert one._sklearn_output_config == scaler._sklearn_output_config

    def test_an_estimator_may_say_how_it_is_cloned(self, run):
        given = ClonesItself.with_level(2)
        for one in fit_many([given] * 3, X, **run):
            assert one.level == 2
            assert one.seen == len(X)

    def test_data_keep_their_memory_order(self, run):
        turned = np.asfortranarray(np.tile(X, (4, 1)))
        targets = np.tile(y, 4)
        rows = [np.arange(0, 600, step) for step in (2, 3)]
        orders = [one.order for one in fit_many([Order()] * 2, turned, targets, rows=rows, **run)]
        assert orders == [turned[some].strides for some in rows]

    def test_rows_out_of_bounds_are_an_error(self):
        rows = [np.arange(3)] * 100 + [np.array([0, -151])]
        with pytest.raises(IndexError, match="-151"):
            fit_many(Ridge(), X, y, rows=rows, n_jobs=1)

    def test_an_estimator_that_cannot_be_cloned_is_an_error_before_anything_starts(self, run):
        with pytest.raises(RuntimeError, match="constructor"):
            fit_many(Changing(alpha=1), X, rows=[[0], [1]], **run)

    def test_weights_are_taken_by_rows(self, run):
        weights = np.arange(len(X)) % 4 + 1.0
        rows = np.arange(0, 150, 2)
        (one,) = fit_many(Ridge(), X, y, rows=[rows], sample_weight=weights, **run)
        theirs = Ridge().fit(X[rows], y[rows], sample_weight=weights[rows])
        assert np.allclose(one.coef_, theirs.coef_, rtol=1e-12)  # BLAS has more threads outside
        drawn = fit_many(
            [Ridge()] * 3, X, y, sample_weight=lambda rng: rng.random(len(X)), rng=1, **run
        )
        for number, one in enumerate(drawn):
            stream = RandomStreams.from_seed(1).stream(number)
            stream.integers(np.iinfo(np.int32).max)  # Ridge's random_state comes first
            weights = stream.random(len(X))
            theirs = Ridge().fit(X, y, sample_weight=weights)
            assert np.allclose(one.coef_, theirs.coef_, rtol=1e-12)

    def test_targets_may_be_left_out(self, run):
        (one,) = fit_many(StandardScaler(), X, **run)
        assert_same(one.mean_, StandardScaler().fit(X).mean_)

    def test_sparse_matrices_are_fitted(self, run):
        sparse = pytest.importorskip("scipy.sparse", reason="SciPy is optional")
        (one,) = fit_many(Ridge(), sparse.csc_matrix(X), y, rows=[np.arange(90)], **run)
        theirs = Ridge().fit(sparse.csr_matrix(X)[:90], y[:90])
        assert np.allclose(one.coef_, theirs.coef_)

    def test_shared_data_are_not_copied(self):
        shared, targets = share(np.tile(X, (50, 1))), share(np.tile(y, 50).astype(float))
        fit_many([Ridge()] * 4, shared, targets, n_jobs=2, backend="loky")
        assert last_report().bytes_copied < 10_000  # the estimators themselves


class ClonesItself:
    """Nothing but plain parameters, but not made by its constructor."""

    @classmethod
    def with_level(cls, level):
        made = cls()
        made.level = level
        return made

    def get_params(self, deep=True):
        return {"level": self.level}

    def __sklearn_clone__(self):
        return self.with_level(self.level)

    def fit(self, X):
        self.seen = len(X)
        return self


class Growing(BaseEstimator):
    """Changes its own parameter, which no other fit may see."""

    def __init__(self, seen):
        self.seen = seen

    def fit(self, X):
        self.seen.append(float(X[0, 0]))
        return self


class Order(BaseEstimator):
    """Keeps the strides of its rows."""

    def fit(self, X, y):
        self.order = X.strides
        return self


class Changing(BaseEstimator):
    """Does not keep what it is given."""

    def __init__(self, alpha):
        self.alpha = [alpha]

    def fit(self, X):
        return self


class Moody(BaseEstimator):
    def __init__(self, fails=False):
        self.fails = fails

    def fit(self, X, y=None):
        if self.fails:
            raise ZeroDivisionError("moody")
        warnings.warn("careful", stacklevel=1)
        self.sklearn_says_ = sklearn.get_config()["assume_finite"]
        return self


def warns(item):
    warnings.warn("careful", stacklevel=1)


class TestSettings:
    def test_settings_of_scikit_learn_reach_the_workers(self, run):
        with sklearn.config_context(assume_finite=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert all(one.sklearn_says_ for one in fit_many([Moody()] * 3, X, **run))

    def test_filters_of_warnings_do_not_stay_in_workers(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit_many([Moody()] * 3, X, n_jobs=2, backend="loky")
        with pytest.warns(UserWarning, match="careful"):
            StaticParallelMapper(n_jobs=2, backend="loky").map(warns, [0, 1])

    @pytest.mark.parametrize("backend", ["sequential", "loky"])
    def test_filters_of_warnings_reach_the_workers(self, backend):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="careful") as caught:
                fit_many([Moody()] * 3, X, n_jobs=2, backend=backend)
        assert any("while mapping fit 0" in note for note in caught.value.__notes__)

    def test_an_error_names_its_fit(self, run):
        many = [Moody(), Moody(fails=True), Moody()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ZeroDivisionError, match="moody") as caught:
                fit_many(many, X, **run)
            assert "func failed on fit 1" in caught.value.__notes__
            assert any(re.match("while mapping fits? 1", n) for n in caught.value.__notes__)
            fitted, failures = fit_many(many, X, on_error="collect", **run)
        assert "while mapping fit 1" in failures[0].error.__notes__
        assert [one is None for one in fitted] == [False, True, False]
        assert [one[:2] for one in failures] == [(1, 2)]


class TestBackend:
    def test_trees_are_fitted_in_threads_with_the_reason(self, hand_over_after):
        hand_over_after(1)
        fit_many([DecisionTreeClassifier()] * 4, X, y, n_jobs=2)
        report = last_report()
        assert report.backend == "threading"
        assert "threads, as trees release the GIL" in report.reason

    def test_other_estimators_are_fitted_in_processes(self, hand_over_after):
        hand_over_after(1)
        fit_many([DecisionTreeClassifier(), Ridge()], X, y, n_jobs=2)
        assert last_report().backend == "loky"


class TestBadArguments:
    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"rows": [np.arange(3)], "columns": [0, 1]}, ValueError, "rows has 1, columns has 2"),
            ({"rows": [np.ones(3, bool)]}, ValueError, r"shape \(150,\)"),
            ({"rows": [np.ones((2, 2))]}, TypeError, "indices or a boolean mask"),
            ({"rows": [np.array([150])]}, IndexError, "there are 150 samples"),
            ({"rows": lambda rng: [0]}, ValueError, "pass rng="),
            ({"sample_weight": np.ones(3)}, ValueError, r"shape \(150,\) or"),
            ({"columns": [5]}, IndexError, "column 5"),
            ({"columns": 5}, TypeError, r"columns must be column numbers of y, .* got 5 \(int\)"),
            ({"rows": 5}, TypeError, r"rows must be arrays of indices or masks, .* got 5 \(int\)"),
        ],
    )
    def test_bad_arguments_are_errors_before_anything_starts(self, options, error, words):
        targets = np.stack([y, y], 1)
        with pytest.raises(error, match=words):
            fit_many(Ridge(), X, targets, n_jobs=2, **options)

    def test_different_lengths_are_refused(self):
        with pytest.raises(ValueError, match="X has 150 samples, but y has 3"):
            fit_many(Ridge(), X, y[:3])

    def test_data_are_called_by_their_names(self):
        masked = np.ma.masked_array(y, y == 1)
        with pytest.raises(TypeError, match=r"y is masked, .*: pass its \.filled\(value\)"):
            fit_many(Ridge(), X, masked)
        with pytest.raises(TypeError, match="X is masked"):
            fit_many(Ridge(), np.ma.masked_array(X, X > 3), y)
        with pytest.raises(TypeError, match="y has no axis to map over: int is 0-dimensional"):
            fit_many(Ridge(), X, 3)
        with pytest.raises(TypeError, match="X is a masked array"):
            predict_array(Ridge().fit(X, y), np.ma.masked_array(X, X > 3))

    def test_missing_estimators_are_refused(self):
        with pytest.raises(TypeError, match="must have a method fit, got 3"):
            fit_many([3], X)
        with pytest.raises(ValueError, match="no estimator"):
            fit_many([], X)


class TestPredict:
    @pytest.mark.parametrize("method", ["predict", "predict_proba", "apply"])
    def test_forests_predict_as_in_scikit_learn(self, method, run):
        forest = RandomForestClassifier(5, random_state=0).fit(X, y)
        expected = getattr(forest, method)(X)
        assert_same(predict_array(forest, X, method, chunksize=7, **run), expected)
        assert_same(predict_array(forest, X, method, **run), expected)

    def test_transformations_are_written_to_a_file(self, tmp_path, run):
        np.save(tmp_path / "X.npy", X)
        scaler = StandardScaler().fit(X)
        out = tmp_path / "Y.npy"
        predict_array(scaler, tmp_path / "X.npy", "transform", out=out, chunksize=9, **run)
        assert_same(np.load(out), scaler.transform(X))

    def test_predictions_may_be_text(self, run):
        labels = np.array(["a", "bb", "c"])[y]
        dummy = DummyClassifier(strategy="most_frequent").fit(X, labels)
        assert_same(predict_array(dummy, X, chunksize=20, **run), dummy.predict(X))

    def test_missing_methods_are_refused(self):
        with pytest.raises(TypeError, match="LinearRegression has no method 'predict_proba'"):
            predict_array(LinearRegression().fit(X, y), X, "predict_proba")
        for method in (None, 5, LinearRegression.predict):
            with pytest.raises(TypeError, match="method must be the name of a method, such as"):
                predict_array(LinearRegression().fit(X, y), X, method)


def test_the_report_does_not_count_rows_as_carried_by_the_function():
    rows = [np.arange(10_000), np.arange(10_000, 20_000)]
    wide = np.ones((20_000, 2))
    fit_many(DummyClassifier(), wide, np.zeros(20_000), rows=rows, n_jobs=2, backend="loky")
    assert last_report().notes == ()


PLACES = """
import numpy as np
from taskcarrier import StaticParallelMapper, fit_many

class Base:
    __slots__ = "alpha"

class Mean(Base):
    __slots__ = ("mean_", "__hidden")
    def __init__(self, alpha=1): self.alpha = alpha
    def get_params(self, deep=True): return {"alpha": self.alpha}
    def set_params(self, **parameters):
        for name, value in parameters.items(): setattr(self, name, value)
        return self
    def fit(self, X, y):
        self.mean_ = X.mean() * self.alpha
        self.__hidden = self.mean_ + 1
        return self
    def hidden(self): return float(self.__hidden)

def doubled(mean):
    assert not hasattr(mean, "__dict__")
    return Mean(mean.alpha * 2)

if __name__ == "__main__":
    run = {"n_jobs": 2, "backend": "loky"}
    fitted = fit_many([Mean(1), Mean(2)], np.ones((4, 2)), np.zeros(4), **run)
    print([(float(one.mean_), one.hidden()) for one in fitted])
    print([one.alpha for one in StaticParallelMapper(**run).map(doubled, [Mean(1), Mean(2)])])
"""


def test_estimators_of_a_program_may_have_slots(tmp_path):
    assert run_script(tmp_path, PLACES) == "[(1.0, 2.0), (2.0, 3.0)]\n[2, 4]\n"


def test_fit_many_works_without_scikit_learn():
    code = """
import sys
import numpy as np
from taskcarrier import fit_many, predict_array
class Mean:
    def __init__(self, shift): self.shift = shift
    def fit(self, X, y): self.mean_ = y.mean() + self.shift; return self
    def predict(self, X): return np.full(len(X), self.mean_)
run = {"n_jobs": 2, "backend": "loky"}
fitted = fit_many([Mean(0), Mean(1)], np.ones((4, 2)), np.arange(4.0), **run)
print([float(predict_array(one, np.ones((4, 2)), **run)[0]) for one in fitted])
assert not any(name.startswith("sklearn") for name in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "[1.5, 2.5]\n"


def test_fits_of_the_same_kind_are_known_again(monkeypatch):
    subjects = []
    monkeypatch.setattr(history, "find_alone_seconds", lambda *a: subjects.append(a[0]) or 0.0)
    for estimator in (Ridge(), Ridge(), Ridge(2.0), LogisticRegression()):
        fit_many([estimator] * 2, X, y > 0, n_jobs=2)
    fit_many([Ridge()] * 2, X[:5], y[:5], n_jobs=2)
    first, again, *others = subjects
    assert first == again
    assert len({first, *others}) == 4
