"""Lower bounds on epsilon: Clopper-Pearson by scipy, the published recursion, and mechanisms of known epsilon."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest

from nabla_tau.membership.one_run import eps_one_run, one_run_p_value
from nabla_tau.membership.privacy import eps_bayes, eps_clopper_pearson


def responses(rng, n, epsilon):
    """n fair coins and what randomised response of that epsilon says of them."""
    coins = rng.random(n) < 0.5
    truthful = rng.random(n) < 1 / (1 + math.exp(-epsilon))
    return np.where(truthful, coins, ~coins).astype(float), coins


def counted(tp, m, fp, n):
    """Scores 1 and 0 and labels with these counts at the threshold 1/2."""
    scores = np.r_[np.arange(m) < tp, np.arange(n) < fp].astype(float)
    return scores, np.arange(m + n) < m


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.data(), st.sampled_from([0.0, 1e-5, 0.1]))
def test_clopper_pearson_at_a_given_threshold_is_scipys(m, n, data, delta):
    tp, fp = data.draw(st.integers(0, m)), data.draw(st.integers(0, n))
    result = eps_clopper_pearson(*counted(tp, m, fp, n), threshold=0.5, delta=delta)
    fnr = binomtest(m - tp, m).proportion_ci(0.95).high  # two-sided 95 %: 2.5 % a tail, for two rates
    fpr = binomtest(fp, n).proportion_ci(0.95).high
    expected = max(math.log(max((1 - a - delta) / b, 1e-300)) for a, b in ((fnr, fpr), (fpr, fnr)))
    assert result.epsilon == pytest.approx(max(expected, 0), abs=1e-9)
    assert (result.true_positives, result.false_positives, result.n_members, result.n_nonmembers) == (tp, fp, m, n)
    assert result.epsilon <= result.ceiling + 1e-12
    perfect = eps_clopper_pearson(*counted(m, m, 0, n), threshold=0.5, delta=delta)
    assert perfect.epsilon == pytest.approx(result.ceiling)


BOUNDS = {
    "threshold": lambda s, y: eps_clopper_pearson(s, y, threshold=0.5, confidence=0.8),
    "bonferroni": lambda s, y: eps_clopper_pearson(s, y, confidence=0.8),
    "split": lambda s, y: eps_clopper_pearson(s, y, selection="split", confidence=0.8),
    "one run": lambda s, y: eps_one_run(s, y, confidence=0.8),
    "one run with delta": lambda s, y: eps_one_run(s, y, confidence=0.8, delta=1e-6),
    "bayes": lambda s, y: eps_bayes(s, y, threshold=0.5, confidence=0.8),
}


# A credible bound claims nothing of the kind: see its docstring.
@pytest.mark.parametrize("name", sorted(BOUNDS.keys() - {"bayes"}))
def test_the_bound_exceeds_the_epsilon_of_randomised_response_as_rarely_as_it_claims(name):
    rng = np.random.default_rng(0)
    found = np.array([BOUNDS[name](*responses(rng, 400, 1.0)).epsilon for _ in range(200)])
    # At most one in five; Binomial(200, .2) has a standard deviation of 5.7.
    assert (found > 1.0).sum() <= 40 + 3 * 5.7
    assert found.max() > 0.5


@pytest.mark.parametrize("name", BOUNDS)
def test_the_bound_approaches_the_epsilon_of_randomised_response(name):
    rng = np.random.default_rng(1)
    assert 0.8 < BOUNDS[name](*responses(rng, 40_000, 1.0)).epsilon < 1.05
    assert BOUNDS[name](*responses(rng, 40_000, 0.0)).epsilon < 0.05


@pytest.mark.parametrize("selection", ["bonferroni", "split"])
def test_thresholds_that_were_chosen_from_the_data_claim_nothing_where_there_is_nothing(selection):
    rng = np.random.default_rng(2)
    above = 0
    for seed in range(300):
        scores, labels = rng.normal(size=120).round(1), np.arange(120) < 50
        bound = eps_clopper_pearson(scores, labels, selection=selection, confidence=0.8, random_state=seed)
        above += bound.epsilon > 0
    assert above <= 60 + 3 * 7


@pytest.mark.parametrize("selection", ["bonferroni", "split"])
def test_chosen_thresholds_stay_below_the_epsilon_of_a_laplace_mechanism_and_come_near(selection):
    rng = np.random.default_rng(3)

    def bound(n, **options):
        scores = rng.laplace(size=2 * n) + np.repeat([1.0, 0.0], n)
        return eps_clopper_pearson(scores, np.arange(2 * n) < n, selection=selection, **options).epsilon

    assert 0.8 < bound(20_000) < 1.0
    assert sum(bound(100, confidence=0.8) > 1 for _ in range(200)) <= 40 + 3 * 5.7


def clopper_pearson(tp, m, fp, n, tail):
    fnr, fpr = (binomtest(k, size).proportion_ci(1 - 2 * tail).high for k, size in ((m - tp, m), (fp, n)))
    return max(0, math.log(max((1 - fnr) / fpr, (1 - fpr) / fnr)))


def test_the_best_of_several_thresholds_pays_for_all_of_them():
    rng = np.random.default_rng(7)
    scores, labels = rng.normal(size=300) + 1.5 * (np.arange(300) < 120), np.arange(300) < 120
    result = eps_clopper_pearson(scores, labels)
    tp, fp = ((scores[group] >= result.threshold).sum() for group in (labels, ~labels))
    assert (result.true_positives, result.false_positives) == (tp, fp)
    assert result.epsilon == pytest.approx(clopper_pearson(tp, 120, fp, 180, 0.025 / result.tests))
    assert 30 < result.tests < 50


def test_a_split_judges_on_the_half_that_did_not_choose():
    rng = np.random.default_rng(8)
    scores, labels = rng.normal(size=300) + 1.5 * (np.arange(300) < 120), np.arange(300) < 120
    result = eps_clopper_pearson(scores, labels, selection="split", random_state=3)
    shuffle = np.random.default_rng(3)
    (m_a, m_b), (n_a, n_b) = (np.split(shuffle.permutation(np.sort(scores[g])), 2) for g in (labels, ~labels))

    def epsilon(inside, outside, t):
        return clopper_pearson((inside >= t).sum(), inside.size, (outside >= t).sum(), outside.size, 0.025)

    best = max([*m_a, *n_a], key=lambda t: epsilon(m_a, n_a, t))
    assert epsilon(m_a, n_a, result.threshold) == pytest.approx(epsilon(m_a, n_a, best))
    assert result.epsilon == pytest.approx(epsilon(m_b, n_b, result.threshold))


def test_a_threshold_at_a_rank_is_bounded_by_the_law_of_order_statistics():
    # Above the r-th highest of n non-members lies a share Beta(r, n - r + 1): Clopper and Pearson's bound for r - 1.
    rng = np.random.default_rng(4)
    n, r = 50, 5
    shares = 1 - np.sort(rng.random((20_000, n)), axis=1)[:, n - r]
    for tail in (0.01, 0.1):
        limit = binomtest(r - 1, n).proportion_ci(1 - 2 * tail).high
        assert limit == pytest.approx(beta.ppf(1 - tail, r, n - r + 1))
        assert (shares > limit).mean() == pytest.approx(tail, rel=0.2)


def published_p_value(m, r, v, eps, delta):
    """Steinke et al. (2023), their algorithm by loops over probabilities."""
    q = math.exp(eps) / (1 + math.exp(eps))
    mass = [binom.pmf(k, r, q) for k in range(r + 1)]
    f = [math.fsum(mass[k:]) for k in range(r + 2)]
    worst = max((f[max(v - i, 0)] - f[v]) / i for i in range(1, m + 1))
    return min(1.0, f[v] + 2 * m * delta * worst)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 40), st.integers(0, 20), st.data(), st.floats(0, 6), st.sampled_from([0.0, 1e-5, 1e-2]))
def test_one_run_p_value_is_the_theorems(r, abstained, data, eps, delta):
    v = data.draw(st.integers(0, r))
    expected = published_p_value(r + abstained, r, v, eps, delta)
    assert one_run_p_value(v, r, r + abstained, eps, delta) == pytest.approx(expected, rel=1e-8, abs=1e-13)
    later = one_run_p_value(v, r, r + abstained, eps + 0.1, delta)
    assert later >= one_run_p_value(v, r, r + abstained, eps, delta) - 1e-12


def test_one_run_epsilon_is_where_the_p_value_crosses():
    scores, labels = np.arange(200.0), np.arange(200) >= 100
    flipped = labels.copy()
    flipped[[3, 30, 180]] ^= True
    result = eps_one_run(scores, flipped, guesses=120, delta=1e-5)
    right = int(flipped[140:].sum() + (~flipped[:60]).sum())
    assert one_run_p_value(right, 120, 200, result.epsilon, 1e-5) == pytest.approx(0.05, rel=1e-6)
    assert result.true_positives + (result.n_nonmembers - result.false_positives) == right
    assert (result.threshold, result.n_members + result.n_nonmembers) == (140.0, 120)
    # All right: accuracy^r = level gives e^eps / (1 + e^eps) = level^(1/r).
    perfect = eps_one_run(scores, labels, guesses=50)
    accuracy = 0.05 ** (1 / 50)
    assert perfect.epsilon == pytest.approx(math.log(accuracy / (1 - accuracy)), rel=1e-9)
    assert perfect.epsilon == perfect.ceiling


def test_one_run_breaks_ties_without_looking_at_the_order_of_members():
    for labels in (np.arange(1000) < 500, np.arange(1000) >= 500):
        assert eps_one_run(np.zeros(1000), labels).epsilon < 0.2
    with pytest.raises(ValueError, match="fair coin flips, but 100 of 1000"):
        eps_one_run(np.zeros(1000), np.arange(1000) < 100)
    with pytest.raises(ValueError, match="guesses must be from 1 to 10"):
        eps_one_run(np.zeros(10), np.arange(10) < 5, guesses=[2, 11])


@pytest.mark.parametrize(
    ("tp", "m", "fp", "n", "delta"), [(30, 40, 5, 60, 0.0), (9, 10, 0, 8, 0.01), (20, 30, 1, 30, 0.2)]
)
def test_bayes_quantiles_are_those_of_a_simulated_posterior(tp, m, fp, n, delta):
    rng = np.random.default_rng(5)
    fnr, fpr = rng.beta(m - tp + 0.5, tp + 0.5, 2_000_000), rng.beta(fp + 0.5, n - fp + 0.5, 2_000_000)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = np.fmax(np.fmax(np.log((1 - delta - fpr) / fnr), np.log((1 - delta - fnr) / fpr)), 0)
    result = eps_bayes(*counted(tp, m, fp, n), threshold=0.5, delta=delta, confidence=0.9)
    low, high = np.quantile(drawn, [0.1, 0.9])
    assert (result.epsilon, result.upper) == pytest.approx((low, high), abs=0.01, rel=0.005)


def test_bounds_tell_what_they_rest_on():
    rng = np.random.default_rng(6)
    scores, labels = rng.normal(size=600) + 2 * (np.arange(600) < 300), np.arange(600) < 300
    for bound in (eps_clopper_pearson(scores, labels), eps_bayes(scores, labels), eps_one_run(scores, labels)):
        found = json.loads(json.dumps(bound.to_dict(), allow_nan=False))
        assert 0 < found["epsilon"] < found["ceiling"]
        assert found["resolvable"]
    assert eps_clopper_pearson(scores, labels).tests > 10
    assert eps_clopper_pearson(scores, labels, selection="split").n_members == 150
    few = eps_clopper_pearson([1.0, 0.0], [True, False], threshold=0.5)
    assert (few.epsilon, few.resolvable) == (0, False)
    # Over-unlearned: nothing for these scores, and as much as before for their negatives.
    assert eps_clopper_pearson(-scores, labels).epsilon == 0
    assert eps_clopper_pearson(-scores, ~labels).epsilon > 1


@pytest.mark.parametrize("function", [eps_clopper_pearson, eps_bayes, eps_one_run])
def test_bounds_refuse_what_has_none(function):
    scores, labels = np.arange(100.0), np.arange(100) < 50
    with pytest.raises(ValueError, match="NaN"):
        function([math.nan, *scores[1:]], labels)
    with pytest.raises(ValueError, match="members"):
        function(scores, labels | True)
    with pytest.raises(ValueError, match="delta"):
        function(scores, labels, delta=1.0)
    with pytest.raises(ValueError, match="confidence"):
        function(scores, labels, confidence=95)
    with pytest.raises(ValueError, match="selection"):
        eps_clopper_pearson(scores, labels, selection="best")
