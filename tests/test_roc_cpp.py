"""ROC curve and AUC of the C++ extension against scikit-learn, and where scikit-learn does not go."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn import metrics

from nabla_tau import _C

# Below and above the length at which the sort changes from comparisons to digits.
SIZES = [2, 3, 100, 5000]


def sample(n, dtype, distinct=None, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.3
    labels[:2] = [False, True]
    scores = rng.normal(size=n) + labels
    if distinct is not None:
        scores = np.round(scores * distinct)
    return scores.astype(dtype), labels


def auc(scores, labels):
    return _C.roc(scores, labels)[3]


def assert_same_curve(scores, labels):
    wanted = metrics.roc_curve(labels, scores, drop_intermediate=False)
    *curve, area = _C.roc(scores, labels)
    for ours, theirs in zip(curve, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-15)
    assert area == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-15)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("distinct", [None, 1, 10])
def test_equals_scikit_learn(n, dtype, distinct):
    assert_same_curve(*sample(n, dtype, distinct))


@given(
    scores=arrays.arrays(np.float64, st.shared(st.integers(2, 60), key="n"), elements=st.integers(-3, 3)),
    flags=arrays.arrays(np.bool_, st.shared(st.integers(2, 60), key="n")),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_equals_scikit_learn_under_ties(scores, flags, dtype):
    flags[0], flags[1] = True, False
    assert_same_curve(scores.astype(dtype) / 4, flags)


@given(
    scores=arrays.arrays(np.float64, 12, elements=st.floats(allow_nan=False)),
    flags=arrays.arrays(np.bool_, 12),
)
def test_auc_counts_pairs_for_any_scores(scores, flags):
    flags[0], flags[1] = True, False
    positive, negative = scores[flags][:, None], scores[~flags][None]
    pairs = (positive > negative).mean() + (positive == negative).mean() / 2
    assert auc(scores, flags) == pytest.approx(pairs, abs=1e-15)


@pytest.mark.parametrize("n", SIZES)
def test_a_digit_sort_orders_every_magnitude_and_sign(n):
    rng = np.random.default_rng(n)
    for dtype, top in ((np.float32, 38), (np.float64, 307)):
        scores = (rng.choice([-1, 1], n) * 10.0 ** rng.uniform(-top, top, n)).astype(dtype)
        labels = np.arange(n) % 2 == 0
        thresholds = _C.roc(scores, labels)[2][1:]
        np.testing.assert_array_equal(thresholds, np.unique(scores)[::-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_infinities_are_ordered_and_zeros_are_equal(dtype):
    scores = np.array([-np.inf, np.inf, np.inf, -0.0, 0.0], dtype)
    labels = np.array([False, True, False, True, False])
    # Of six pairs: inf beats -inf and 0 and ties inf; -0 beats -inf, ties 0, loses to inf.
    assert auc(scores, labels) == 4 / 6
    fpr, tpr, thresholds, _ = _C.roc(scores, labels)
    np.testing.assert_array_equal(thresholds, [np.inf, np.inf, 0.0, -np.inf])
    np.testing.assert_array_equal(tpr, [0, 0.5, 1, 1])
    np.testing.assert_array_equal(fpr, [0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("n", SIZES)
def test_equal_scores_are_worth_exactly_one_half(n):
    labels = np.arange(n) % 2 == 0
    assert auc(np.full(n, 0.3), labels) == 0.5
    assert len(_C.roc(np.full(n, 0.3), labels)[0]) == 2


def test_swapping_the_classes_mirrors_the_area():
    scores, labels = sample(5000, np.float32, distinct=20)
    assert auc(scores, labels) + auc(scores, ~labels) == pytest.approx(1, abs=1e-15)
    assert auc(scores, labels) + auc(-scores, labels) == pytest.approx(1, abs=1e-15)


def test_inputs_without_an_answer_are_refused():
    scores, labels = sample(10, np.float64)
    with pytest.raises(ValueError, match="0 True among 10"):
        _C.roc(scores, np.zeros(10, bool))
    with pytest.raises(ValueError, match="10 True among 10"):
        _C.roc(scores, np.ones(10, bool))
    with pytest.raises(ValueError, match="0 True among 0"):
        _C.roc(scores[:0], labels[:0])
    with pytest.raises(ValueError, match=r"scores\[4\] is NaN"):
        _C.roc(np.where(np.arange(10) == 4, np.nan, scores), labels)
    with pytest.raises(TypeError, match="scores must be float32 or float64, got int64"):
        _C.roc(np.arange(10), labels)
    with pytest.raises(TypeError, match="labels must be bool, got int64"):
        _C.roc(scores, labels.astype(np.int64))
    with pytest.raises(ValueError, match=r"labels must have shape \(10,\), got \(9,\)"):
        _C.roc(scores, labels[:9])
    with pytest.raises(ValueError, match="scores must be C-contiguous"):
        _C.roc(np.repeat(scores, 2)[::2], labels)
    with pytest.raises(ValueError, match=r"scores must be \[N\], got \(10, 1\)"):
        _C.roc(scores[:, None], labels)
