"""Forgetting quality against the competition's rule, threshold by threshold, and KLOM against its published script."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as dist

from nabla_tau import _C
from nabla_tau.membership.forgetting import neurips_forgetting
from nabla_tau.membership.margin_divergence import klom

DELTA = 1e-5


def epsilon_of(hits, alarms, n_positive, n_negative):
    """max log((1 - delta - FPR) / FNR), log((1 - delta - FNR) / FPR) over rules given by counts [T]; NaN if none."""
    fnr, fpr = 1 - hits / n_positive, alarms / n_negative
    fnr[hits == n_positive] = 0
    if ((fnr == 0) & (fpr == 0)).any():
        return math.inf
    both = (fnr > 0) & (fpr > 0)
    fnr, fpr = fnr[both], fpr[both]
    with np.errstate(all="ignore"):
        pair = np.stack([np.log(1 - DELTA - fpr) - np.log(fnr), np.log(1 - DELTA - fnr) - np.log(fpr)])
    pair = pair[:, ~np.isnan(pair).all(0)]
    return max(np.nanmax(pair), 0) if pair.size else math.nan


def within(margins, left, right):
    return ((margins[:, None] >= left) & (margins[:, None] <= right)).sum(0)


def exact_oracle(unlearned, retrained):
    retrained_is_larger = np.median(retrained) > np.median(unlearned)
    positive, negative = (retrained, unlearned) if retrained_is_larger else (unlearned, retrained)
    thresholds = np.concatenate([positive, negative])
    counts = [(margins[:, None] >= thresholds).sum(0) for margins in (positive, negative)]
    return min(epsilon_of(*counts, positive.size, negative.size), 50)


def published_oracle(unlearned, retrained):
    """The competition's grids, every threshold tried."""
    retrained_is_larger = np.median(retrained) > np.median(unlearned)
    positive, negative = (retrained, unlearned) if retrained_is_larger else (unlearned, retrained)
    widths = [np.ptp(positive), np.ptp(negative)]
    if min(widths) / max(widths) < 0.01:
        return 50
    pooled = torch.from_numpy(np.concatenate([positive, negative]))
    points = int(torch.ceil((pooled.max() - pooled.min()) * 100))
    thresholds = torch.linspace(pooled.min(), pooled.max(), points).numpy()
    single = epsilon_of(
        within(positive, thresholds, np.inf), within(negative, thresholds, np.inf), *[len(positive)] * 2
    )
    narrow, wide = (negative, positive) if widths[0] >= widths[1] else (positive, negative)
    low, high = narrow.min() + min(widths) - 2.0, narrow.max() + 2.0
    rights = np.linspace(low, high, int(np.ceil((high - low) * 100)))
    lefts = np.stack([np.linspace(r - min(widths) - 2.0, r - min(widths) + 2.0, 400) for r in rights])
    rights = np.broadcast_to(rights[:, None], lefts.shape)
    pair = epsilon_of(
        within(narrow, lefts.ravel(), rights.ravel()), within(wide, lefts.ravel(), rights.ravel()), *[len(narrow)] * 2
    )
    return min(np.nanmax([single, pair]), 50)


def models(samples, count=24, seed=0, dtype=np.float64):
    """Margins of two groups that differ in level and width, from not at all to entirely."""
    rng = np.random.default_rng(seed)
    unlearned = rng.normal(size=(count, samples)) * rng.choice([0.005, 0.3, 1, 3], samples) + rng.normal(size=samples)
    retrained = 1.5 * rng.normal(size=(count, samples)) + rng.choice([0, 0.5, 6], samples)
    return unlearned.astype(dtype), retrained.astype(dtype)


def test_published_rule_equals_every_threshold_of_its_grids():
    unlearned, retrained = models(128)
    found = _C.forgetting_epsilon(unlearned, retrained, False, DELTA)
    wanted = [published_oracle(u, r) for u, r in zip(unlearned.T, retrained.T, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert len(np.unique(found)) > 20
    assert (found == 50).any()


@settings(deadline=None, max_examples=200)
@given(data=st.data(), dtype=st.sampled_from([np.float16, np.float32, np.float64]))
def test_exact_rule_equals_every_threshold_under_ties(data, dtype):
    values = st.one_of(st.integers(-3, 3), st.sampled_from([np.nan, np.inf, 0.25]))
    first, second = (
        np.array(data.draw(st.lists(values, min_size=1, max_size=12)), np.float64)[:, None].astype(dtype) for _ in "ab"
    )
    (found,) = _C.forgetting_epsilon(first, second, True, DELTA)
    first, second = (x[np.isfinite(x)].astype(np.float64) for x in (first, second))
    wanted = exact_oracle(first, second) if first.size and second.size else math.nan
    assert found == pytest.approx(wanted, rel=1e-12, nan_ok=True)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), exact=st.booleans())
def test_any_values_and_strides_are_taken(data, exact):
    samples = data.draw(st.integers(0, 20))

    def margins():
        shape = (data.draw(st.integers(0, 6)), samples)
        values = data.draw(st.lists(st.floats(width=32), min_size=shape[0] * samples, max_size=shape[0] * samples))
        return np.array(values, np.float32).reshape(shape)

    first, second = np.asfortranarray(margins()), margins()[:, ::-1]
    found = _C.forgetting_epsilon(first, second, exact, DELTA)
    assert found.shape == (samples,)
    assert (np.isnan(found) | ((found >= 0) & (found <= 50))).all()
    if exact:
        copies = _C.forgetting_epsilon(np.ascontiguousarray(first), np.ascontiguousarray(second), exact, DELTA)
        np.testing.assert_array_equal(found, copies)
    divergence = _C.klom(first, second)
    assert (np.isnan(divergence) | (divergence >= -1e-12)).all()


@pytest.mark.parametrize("rule", ["exact", "kaggle"])
def test_score_follows_from_the_epsilons(rule):
    unlearned, retrained = models(50, count=20)
    accuracies = {"retain_accuracy": (0.9, 1.0), "test_accuracy": (0.8, 0.9)}
    result = neurips_forgetting(unlearned, retrained, rule=rule, **accuracies)
    largest = math.ceil(math.log(19))
    points = []
    for epsilon in result.epsilon:
        bins = [k for k in range(2 * largest) if epsilon < (k + 1) / 2]
        points.append(2.0 ** -bins[0] if bins else 0.0)
    np.testing.assert_array_equal(result.H, points)
    assert {0.0, 2.0**-5} <= set(points)  # the last points to be had, and none
    assert pytest.approx(np.mean(points) * 0.9 * 8 / 9) == result.F
    assert json.loads(json.dumps(result.to_dict()))["rule"] == rule
    assert result.resolution == pytest.approx(math.log(19), abs=1e-3)


@pytest.mark.parametrize("rule", ["exact", "kaggle"])
def test_a_perfect_method_scores_what_the_null_says(rule):
    rng = np.random.default_rng(4)
    unlearned, retrained = 2 * rng.normal(size=(2, 100, 300))
    result = neurips_forgetting(unlearned, retrained, rule=rule, null_samples=300)
    assert result.F < 0.6  # far from 1, though nothing is remembered
    sd = result.H.std() / math.sqrt(300)
    assert abs(result.F - result.F_null) < 4 * math.sqrt(2) * sd
    low, high = result.F_null_interval
    assert low < result.F_null < high
    remembered = neurips_forgetting(unlearned + 4, retrained, rule=rule, null_samples=100)
    assert 0.2 * remembered.F_null > remembered.F


def test_what_cannot_be_judged_is_counted():
    unlearned, retrained = models(5)
    unlearned[:, 1] = np.nan
    unlearned[3, 2] = np.inf
    unlearned[:, 3] = retrained[:, 3] = 1.0
    result = neurips_forgetting(unlearned, retrained)
    assert np.flatnonzero(np.isnan(result.epsilon)).tolist() == [1, 3]
    assert (result.n_undecided, result.n_dropped) == (2, 25)
    assert np.isfinite(result.F)
    with pytest.raises(ValueError, match="at least three models, got 2 and 24"):
        neurips_forgetting(unlearned[:2], retrained)
    with pytest.raises(ValueError, match="with one N, got"):
        _C.forgetting_epsilon(unlearned, retrained[:, 1:], True, DELTA)
    with pytest.raises(TypeError, match="retrained must be of the dtype of unlearned"):
        _C.forgetting_epsilon(unlearned, retrained.astype(np.float32), True, DELTA)
    with pytest.raises(ValueError, match="delta must be in"):
        neurips_forgetting(unlearned, retrained, delta=1.0)
    with pytest.raises(ValueError, match="rule must be"):
        neurips_forgetting(unlearned, retrained, rule="best")


def klom_oracle(p, q, open_top, bins=20, clip=100.0):
    """One sample, by numpy's histogram, or by its digitize as the published script does."""
    p, q = np.clip(p, -clip, clip), np.clip(q, -clip, clip)
    start, stop = min(p.min(), q.min()), max(p.max(), q.max())
    edges = np.linspace(start, stop if stop > start else start + 1, bins + 1)
    if open_top:
        counts = [np.bincount(np.digitize(x, edges), minlength=bins + 2)[1 : bins + 1] for x in (p, q)]
    else:
        counts = [np.histogram(x, edges)[0] for x in (p, q)]
    if not counts[0].sum() or not counts[1].sum():
        return math.nan
    shares = [c / c.sum() for c in counts]
    return dist.entropy(shares[0], np.where(shares[0] > 0, np.maximum(shares[1], 1e-5), shares[1]))


@pytest.mark.parametrize("open_top", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_klom_equals_its_reference(open_top, dtype):
    unlearned, retrained = models(300, count=40, dtype=dtype)
    unlearned[0, :20], retrained[1, 10:30] = 500, -1000
    unlearned[:, 30] = retrained[:, 30] = 3
    compat = "data-unlearning-bench" if open_top else None
    result = klom(unlearned, retrained, compat=compat)
    wanted = [klom_oracle(p, q, open_top) for p, q in zip(unlearned.T, retrained.T, strict=True)]
    np.testing.assert_allclose(result.divergence, wanted, rtol=0, atol=1e-14)
    assert result.divergence[30] == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_klom_decides_margins_on_an_edge_by_the_edge(dtype):
    rng = np.random.default_rng(8)
    edges = np.array([np.linspace(a, a + b, 21, dtype=dtype) for a, b in rng.normal(size=(400, 2)) ** 2 + 0.01]).T
    # Just below, on and just above each edge that is not an end.
    near = np.stack([np.nextafter(edges, -np.inf, dtype=dtype), edges, np.nextafter(edges, np.inf, dtype=dtype)])
    pick = rng.integers(1, 20, (2, 30, 400)), rng.integers(0, 3, (2, 30, 400))
    groups = near[pick[1], pick[0], np.arange(400)]
    groups[0, :2] = edges[[0, 20]]
    found = _C.klom(groups[0], groups[1], open_top=True)
    wanted = [klom_oracle(p, q, True) for p, q in zip(groups[0].T, groups[1].T, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-14)


def test_klom_of_equal_groups_is_its_null_and_counts_what_it_leaves_out():
    rng = np.random.default_rng(6)
    unlearned, retrained = rng.normal(size=(2, 50, 2000)).astype(np.float32)
    result = klom(torch.from_numpy(unlearned), torch.from_numpy(retrained))
    assert result.mean == pytest.approx(result.null_mean, rel=0.05)
    assert result.mean > 0.1
    far = klom(unlearned + 1, retrained)
    assert far.mean > 2 * far.null_mean
    assert far.quantile() > far.quantile(0.5)
    unlearned[:, 0] = np.nan
    unlearned[3, 1] = np.nan
    few = klom(unlearned, retrained)
    assert few.n_dropped == 51
    assert np.isnan(few.divergence[0])
    assert few.divergence[1] == pytest.approx(klom_oracle(np.delete(unlearned[:, 1], 3), retrained[:, 1], False))
    assert json.loads(json.dumps(few.to_dict()))["divergence"][0] is None
    with pytest.raises(ValueError, match="compat must be"):
        klom(unlearned, retrained, compat="other")
    with pytest.raises(ValueError, match="bins must be"):
        klom(unlearned, retrained, bins=0)


@pytest.mark.parametrize("threads", [2, 7])
def test_results_do_not_depend_on_the_number_of_threads(threads):
    unlearned, retrained = models(200)
    for one, many in (
        (_C.klom(unlearned, retrained), _C.klom(unlearned, retrained, num_threads=threads)),
        (
            _C.forgetting_epsilon(unlearned, retrained, True, DELTA),
            _C.forgetting_epsilon(unlearned, retrained, True, DELTA, num_threads=threads),
        ),
    ):
        np.testing.assert_array_equal(one, many)
