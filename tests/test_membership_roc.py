"""ROC, DeLong and the paired bootstrap: against brute force over all pairs, scipy and scikit-learn."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp, mannwhitneyu, norm
from sklearn.metrics import roc_auc_score

from nabla_tau import _C
from nabla_tau.membership.bootstrap import bootstrap_auc
from nabla_tau.membership.curve import roc
from nabla_tau.membership.delong import delong_test

tied = st.lists(st.integers(-3, 3), min_size=1, max_size=30)


def joined(members, nonmembers):
    scores = np.concatenate([members, nonmembers]).astype(float)
    return scores, np.arange(scores.size) < len(members)


def wins(members, nonmembers):
    """psi(x, y) of every pair [M, N]."""
    x, y = np.asarray(members, float)[:, None], np.asarray(nonmembers, float)[None]
    return (x > y) + (x == y) / 2


@settings(deadline=None)
@given(tied, tied)
def test_auc_is_the_exact_count_to_the_last_bit(members, nonmembers):
    twice = sum(2 * (a > b) + (a == b) for a in members for b in nonmembers)
    exact = Fraction(twice, 2 * len(members) * len(nonmembers))
    curve = roc(*joined(members, nonmembers))
    assert curve.auc == float(exact)
    assert abs(curve.auc - roc_auc_score(*joined(members, nonmembers)[::-1])) <= 1e-15


@pytest.mark.parametrize("distinct", [1, 2, 300, None])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_auc_is_scikit_learns_within_1e_15(distinct, dtype):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=50_000).astype(dtype) if distinct is None else rng.integers(distinct, size=50_000) + 0.5
    labels = rng.random(50_000) < 0.3
    assert abs(roc(scores.astype(dtype), labels).auc - roc_auc_score(labels, scores)) <= 1e-15
    if distinct == 1:
        assert roc(scores, labels).auc == 0.5


@settings(deadline=None)
@given(tied, tied)
def test_delong_variance_equals_that_of_all_pairs(members, nonmembers):
    psi, curve = wins(members, nonmembers), roc(*joined(members, nonmembers))
    if min(psi.shape) < 2:
        assert math.isnan(curve.auc_variance)
        assert all(map(math.isnan, curve.auc_interval()))
        return
    expected = psi.mean(1).var(ddof=1) / psi.shape[0] + psi.mean(0).var(ddof=1) / psi.shape[1]
    assert curve.auc_variance == pytest.approx(expected, abs=1e-15)


def test_delong_interval_covers_the_auc_of_two_gaussians_as_often_as_it_claims():
    rng = np.random.default_rng(1)
    truth = norm.cdf(1 / math.sqrt(2))
    covered = 0
    for _ in range(1000):
        low, high = roc(*joined(rng.normal(1, 1, 80), rng.normal(0, 1, 120))).auc_interval(confidence=0.9)
        covered += low <= truth <= high
    assert 0.87 < covered / 1000 < 0.93


@settings(deadline=None)
@given(tied, tied)
def test_p_value_is_mann_and_whitneys(members, nonmembers):
    curve = roc(*joined(members, nonmembers))
    if len({*members, *nonmembers}) == 1:
        assert curve.p_value == 1
        return
    expected = mannwhitneyu(members, nonmembers, method="asymptotic").pvalue
    assert curve.p_value == pytest.approx(expected, rel=1e-9)


def test_reading_says_which_way_an_auc_leans():
    rng = np.random.default_rng(2)
    base = rng.normal(size=400)
    readings = [roc(*joined(base[:200] + shift, base[200:])).reading() for shift in (-0.5, 0.0, 0.5)]
    assert readings == ["over-unlearned", "no evidence", "members found"]
    # Perfect separation of three and three is no evidence at this level: 2 of the 20 orders are as extreme.
    assert roc(*joined([3, 4, 5], [0, 1, 2])).reading() == "no evidence"
    assert roc(*joined(base[:200] - 9, base[200:])).reading() == "over-unlearned"


def covariance(psi_a, psi_b):
    """2 x 2 covariance of two AUCs from the matrices of all pairs."""
    m, n = psi_a.shape
    return np.cov(psi_a.mean(1), psi_b.mean(1)) / m + np.cov(psi_a.mean(0), psi_b.mean(0)) / n


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.booleans()), min_size=6, max_size=40))
def test_delong_test_equals_the_covariance_of_all_pairs(samples):
    a, b, label = (np.array(column) for column in zip(*samples, strict=True))
    if min(label.sum(), (~label).sum()) < 2:
        return
    psi = [wins(x[label], x[~label]) for x in (a, b)]
    s = covariance(*psi)
    expected = s[0, 0] + s[1, 1] - 2 * s[0, 1]
    result = delong_test(a, b, label)
    assert (result.auc_a, result.auc_b) == pytest.approx((psi[0].mean(), psi[1].mean()), abs=1e-14)
    if expected > 1e-12:
        assert result.variance == pytest.approx(expected, rel=1e-9)
        z = (psi[0].mean() - psi[1].mean()) / math.sqrt(expected)
        assert result.p_value == pytest.approx(2 * norm.sf(abs(z)), abs=1e-9)


def test_delong_test_rejects_equal_attacks_as_rarely_as_it_claims_and_finds_a_better_one():
    rng = np.random.default_rng(3)
    label = np.arange(300) < 100
    found = []
    for better in (0.0, 0.8):
        rejected = 0
        for _ in range(400):
            common = rng.normal(size=300) + label
            a, b = common + rng.normal(size=300) + better * label, common + rng.normal(size=300)
            rejected += delong_test(a, b, label).p_value < 0.05
        found.append(rejected / 400)
    assert 0.02 < found[0] < 0.09
    assert found[1] > 0.9


def test_delong_test_of_degenerate_attacks():
    label = np.arange(8) < 4
    up = label.astype(float)
    same = delong_test(up, 3 * up, label)
    assert (same.difference, same.p_value, same.resolvable) == (0, 1, True)
    opposite = delong_test(up, -up, label)
    assert opposite.difference == 1
    assert not opposite.resolvable
    assert math.isnan(opposite.p_value)
    json.dumps(opposite.to_dict(), allow_nan=False)
    alone = delong_test([1.0, 0.0, 2.0], [1.0, 3.0, 2.0], [True, False, False])
    assert not alone.resolvable
    with pytest.raises(ValueError, match="same members"):
        delong_test([1.0, 2.0], [1.0, 2.0, 3.0], [True, False])
    with pytest.raises(ValueError, match="NaN"):
        delong_test([1.0, math.nan], [1.0, 2.0], [True, False])


def resample(seed, replicate, group, n):
    """The draws of the bootstrap from their definition: SplitMix64 by counter, two draws from one word."""
    mask = 2**64 - 1

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    key, drawn = mix(mix(seed) + 2 * replicate + group & mask), []
    for word in range(1, n // 2 + n % 2 + 1):
        product = mix(key + word * 0x9E3779B97F4A7C15 & mask) * n
        drawn += [product >> 64, (product & mask) * n >> 64]
    return np.array(drawn[:n])


@settings(deadline=None, max_examples=40)
@given(tied, tied)
def test_bootstrap_replicates_are_aucs_of_resamples(members, nonmembers):
    result = bootstrap_auc({"m": members}, {"m": nonmembers}, replicates=100, random_state=7)
    assert result.auc["m"] == pytest.approx(wins(members, nonmembers).mean(), abs=1e-14)
    # The same draws, made by hand and scored pair by pair.
    for column in (0, 99):
        a, b = (resample(7, column + 1, group, len(x)) for group, x in enumerate((members, nonmembers)))
        expected = wins(np.array(members)[a], np.array(nonmembers)[b]).mean()
        assert result.replicates["m"][column] == pytest.approx(expected, abs=1e-14)


def drawn_tpr(members, nonmembers, fpr):
    """Every threshold tried."""
    allowed = [t for t in [*members, *nonmembers, np.inf] if np.mean(nonmembers >= t) <= fpr * (1 + 1e-12)]
    return max(np.mean(members >= t) for t in allowed)


@settings(deadline=None, max_examples=60)
@given(tied, tied, st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.5, 1.0]))
def test_bootstrap_rates_are_those_of_the_roc_of_each_resample(members, nonmembers, fpr):
    members, nonmembers = np.array(members, float), np.array(nonmembers, float)
    allowed = math.floor(fpr * nonmembers.size * (1 + 1e-12))
    _, tpr = _C.bootstrap([members], [nonmembers], [allowed], 3, 5)
    assert tpr[0, 0, 0] == pytest.approx(drawn_tpr(members, nonmembers, fpr))
    for b in (1, 3):
        a, o = members[resample(5, b, 0, members.size)], nonmembers[resample(5, b, 1, nonmembers.size)]
        assert tpr[0, 0, b] == pytest.approx(drawn_tpr(a, o, fpr))


def test_bootstrap_is_the_same_at_any_thread_count_and_follows_its_seed():
    rng = np.random.default_rng(4)
    members, nonmembers = rng.normal(0.3, 1, 501), rng.normal(size=700)
    one, two, seven = (_C.bootstrap([members], [nonmembers], [7], 200, 11, t) for t in (1, 2, 7))
    for other in (two, seven):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    assert not np.array_equal(one[0], _C.bootstrap([members], [nonmembers], [7], 200, 12)[0])


def test_bootstrap_draws_every_sample_as_often_and_independently():
    n, replicates = 50, 4000
    # One member that beats everything, the others nothing: the AUC is its count over n.
    members = np.r_[1.0, np.zeros(n - 1)]
    auc, _ = _C.bootstrap([members], [np.full(3, 0.5)], [], replicates, 0)
    counts = np.rint(auc[0, 1:] * n)
    # Binomial(50, 1/50): mean 1, variance .98.
    assert counts.mean() == pytest.approx(1, abs=4 * math.sqrt(0.98 / replicates))
    assert counts.var() == pytest.approx(0.98, abs=0.1)
    table = np.stack([np.bincount(resample(0, b, 0, n), minlength=n) for b in range(1, 1001)])
    assert abs(table.mean(0) - 1).max() < 5 * math.sqrt(0.98 / 1000)
    correlation = np.corrcoef(table.T) - np.eye(n)
    assert abs(correlation).max() < 5 / math.sqrt(1000)


def test_bootstrap_agrees_in_distribution_with_numpys():
    rng = np.random.default_rng(5)
    members, nonmembers = rng.normal(0.7, 1, 60), rng.normal(size=90)
    ours = bootstrap_auc({"m": members}, {"m": nonmembers}, fpr=[0.1], replicates=2000)
    theirs = [(rng.choice(members, 60), rng.choice(nonmembers, 90)) for _ in range(2000)]
    assert ks_2samp(ours.replicates["m"], [wins(a, b).mean() for a, b in theirs]).pvalue > 1e-3
    tpr = [drawn_tpr(a, b, 0.1) for a, b in theirs]
    assert ks_2samp(ours.tpr[0.1].replicates["m"], tpr).pvalue > 1e-3


def test_bootstrap_of_rates_is_paired_and_knows_what_it_cannot_resolve():
    rng = np.random.default_rng(6)
    members, nonmembers = rng.normal(1, 1, 500), rng.normal(size=500)
    result = bootstrap_auc(
        {"a": members, "b": members, "c": members - 0.8},
        {"a": nonmembers, "b": nonmembers, "c": nonmembers},
        fpr=[0.001, 0.01, 0.1],
    )
    curve = roc(*joined(members, nonmembers))
    at = result.tpr[0.1]
    assert at.tpr["a"] == curve.tpr_at(0.1)
    assert at.interval("a")[0] < at.tpr["a"] < at.interval("a")[1]
    assert at.gap_interval("a", "b") == (0.0, 0.0)
    assert at.gap_interval("a", "c")[0] > 0
    assert [result.tpr[f].resolution for f in (0.001, 0.01, 0.1)] == ["not resolvable", "weak", "resolved"]
    assert all(map(math.isnan, result.tpr[0.001].interval("a")))
    json.dumps(result.to_dict(), allow_nan=False)


def test_bootstrap_takes_what_roc_takes():
    rng = np.random.default_rng(7)
    members, nonmembers = rng.normal(0.5, 1, 64).astype(np.float16), rng.normal(size=64).astype(np.float16)
    wide = np.repeat(members.astype(np.float64), 2)
    forms = (members, torch.from_numpy(members), members.astype(np.float32), wide[::2], members.tolist())
    reference = bootstrap_auc({"m": forms[0]}, {"m": nonmembers})
    for form in forms[1:]:
        np.testing.assert_array_equal(bootstrap_auc({"m": form}, {"m": nonmembers}).replicates["m"],
                                      reference.replicates["m"])  # fmt: skip
    for seed in (-1, 2**70):
        assert bootstrap_auc({"m": members}, {"m": nonmembers}, random_state=seed).random_state == seed


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"members": [np.zeros(3, np.int64)]}, TypeError, "members must be float32 or float64, got int64"),
        ({"nonmembers": [np.zeros(3, np.float32)]}, TypeError, "nonmembers must be the dtype of members, got float32"),
        ({"members": [np.zeros((3, 1))]}, ValueError, r"members must be \[N\], got \(3, 1\)"),
        ({"members": [np.zeros(6)[::2]]}, ValueError, "C-contiguous"),
        ({"members": [np.zeros(0)]}, ValueError, "members has 0 values"),
        ({"nonmembers": [np.array([0.0, np.nan])]}, ValueError, r"nonmembers\[1\] is NaN"),
        ({"members": []}, ValueError, "got 0 and 1"),
        ({"members": [np.zeros(3)] * 2, "nonmembers": [np.zeros(3), np.zeros(4)]}, ValueError, "model 1 has other"),
        ({"replicates": -1}, ValueError, "replicates must be at least 0, got -1"),
        ({"num_threads": 0}, ValueError, "num_threads must be at least 1, got 0"),
    ],
)
def test_the_bootstrap_kernel_refuses_and_says_why(change, error, message):
    arguments = {"members": [np.zeros(3)], "nonmembers": [np.zeros(3)], "allowed_false": [], "replicates": 1, "seed": 0}
    with pytest.raises(error, match=message):
        _C.bootstrap(**(arguments | change))


def test_plots_and_dictionaries_hold_the_counts():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    rng = np.random.default_rng(8)
    members, nonmembers = rng.normal(0.5, 1, 90), rng.normal(size=120)
    curve = roc(*joined(members, nonmembers))
    found = json.loads(json.dumps(curve.to_dict(), allow_nan=False))
    assert (found["n_members"], found["n_nonmembers"], found["thresholds"][0]) == (90, 120, None)
    assert found["auc_interval"] == list(curve.auc_interval())
    assert "AUC" in curve.plot().get_legend_handles_labels()[1][0]
    axes = bootstrap_auc({"a": members, "b": -members}, {"a": nonmembers, "b": -nonmembers}).plot()
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"]
