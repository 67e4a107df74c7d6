"""Attacks against a population or reference models: counting written out, analytic Gaussians, false-positive rates."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.linear_model import QuantileRegressor

from nabla_tau.membership.curve import roc
from nabla_tau.membership.population import attack_p, attack_r, quantile_attack

some = st.lists(st.one_of(st.integers(-3, 3), st.just(math.nan)), min_size=1, max_size=25)


@settings(deadline=None)
@given(some, some)
def test_attack_p_counts_the_population(scores, population):
    known = [z for z in population if not math.isnan(z)]
    result = attack_p(scores, population)
    for s, score, p in zip(scores, result.score, result.p_value, strict=True):
        if math.isnan(s) or not known:
            assert (math.isnan(score), p) == (True, 1)
        else:
            assert score == pytest.approx(np.mean([(z < s) + (z == s) / 2 for z in known]))
            assert p == pytest.approx((1 + sum(z >= s for z in known)) / (1 + len(known)))
    assert (result.n_population, result.n_nan_population) == (len(known), len(population) - len(known))
    assert result.n_nan == sum(map(math.isnan, scores))


def test_attack_p_keeps_the_false_positive_rate_it_is_given():
    rng = np.random.default_rng(0)
    result = attack_p(rng.normal(size=200_000), rng.normal(size=99_999))
    for fpr in (0.001, 0.01, 0.1):
        assert result.called(fpr).mean() == pytest.approx(fpr, rel=0.15)
    # Also for few and tied: the chance of p <= alpha is at most alpha.
    found = [attack_p(rng.integers(0, 3, 50), rng.integers(0, 3, 19)).called(0.1).mean() for _ in range(2000)]
    assert np.mean(found) <= 0.1
    assert [attack_p([0.0], np.zeros(50)).resolution(f) for f in (0.01, 0.05, 0.5)] == [
        "not resolvable",
        "weak",
        "resolved",
    ]


def test_attack_p_by_class_is_attack_p_within_each_class():
    rng = np.random.default_rng(1)
    scores, classes = rng.normal(size=80), rng.integers(0, 4, 80)
    population, of = rng.normal(size=120) + 3, rng.integers(0, 3, 120)
    result = attack_p(scores, population, classes=classes, population_classes=of)
    for c in range(3):
        np.testing.assert_array_equal(
            result.score[classes == c], attack_p(scores[classes == c], population[of == c]).score
        )
    assert np.isnan(result.score[classes == 3]).all()
    assert (result.p_value[classes == 3] == 1).all()
    assert result.n_population == 0
    with pytest.raises(ValueError, match="together"):
        attack_p(scores, population, classes=classes)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_attack_r_counts_the_models_that_score_at_most_as_high(models, n, seed):
    rng = np.random.default_rng(seed)
    target, references = rng.integers(0, 3, n).astype(float), rng.integers(0, 3, (models, n)).astype(float)
    references[rng.random((models, n)) < 0.2] = np.nan
    result = attack_r(target, references)
    for i in range(n):
        known = references[~np.isnan(references[:, i]), i]
        if known.size == 0:
            assert (math.isnan(result.score[i]), result.p_value[i]) == (True, 1)
        else:
            assert result.score[i] == np.mean(known <= target[i])
            assert result.p_value[i] == (1 + (known >= target[i]).sum()) / (1 + known.size)
    assert result.n_nan_population == np.isnan(references).sum()


def test_attack_r_finds_what_attack_p_cannot_where_samples_differ_in_difficulty(tmp_path):
    rng = np.random.default_rng(2)
    difficulty, member = rng.normal(0, 3, 2000), np.arange(2000) < 1000
    target = difficulty + member + rng.normal(0, 1, 2000)
    references = np.memmap(tmp_path / "r", np.float16, "w+", shape=(64, 2000))
    references[:] = difficulty + rng.normal(0, 1, (64, 2000))
    by_reference, by_population = attack_r(target, references), attack_p(target, references[0])
    # Known difficulty leaves two Gaussians one apart; 64 models nearly know it.
    assert roc(by_reference.score, member).auc == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=0.03)
    assert roc(by_population.score, member).auc < 0.65
    np.testing.assert_array_equal(attack_r(target, torch.from_numpy(np.array(references))).score, by_reference.score)
    assert by_reference.resolution(0.01) == "not resolvable"
    with pytest.raises(ValueError, match=r"shape \[R, 5\], got \[64, 2000\]"):
        attack_r(target[:5], references)


# Boosted trees fit their quartiles a little too close.
@pytest.mark.parametrize(("regressor", "tolerance"), [(None, 0.25), (QuantileRegressor(alpha=0.0), 0.08)])
def test_quantile_attack_standardises_by_what_features_say(regressor, tolerance):
    rng = np.random.default_rng(3)

    def sample(n, lift):
        x = rng.uniform(-1, 1, (n, 2))
        return 4 * x[:, 0] + lift + rng.normal(0, 1, n), x

    (scores_in, x_in), (scores_out, x_out), population = sample(1500, 1.0), sample(1500, 0.0), sample(4000, 0.0)
    scores, features = np.concatenate([scores_in, scores_out]), np.concatenate([x_in, x_out])
    member = np.arange(3000) < 1500
    result = quantile_attack(scores, features, *population, regressor=regressor)
    assert roc(result.score, member).auc == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=0.04)
    assert roc(scores, member).auc < 0.65
    # A non-member's standardised score has the quartiles of a standard Gaussian, and its p-value is one.
    quartiles = np.quantile(result.score[~member], [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quartiles, norm.ppf([0.25, 0.5, 0.75]), atol=tolerance)
    assert result.called(0.1)[~member].mean() == pytest.approx(0.1, abs=0.03)
    assert result.n_population == 1000
    json.dumps(result.to_dict(), allow_nan=False)


def test_quantile_attack_floors_a_spread_of_nothing_and_says_so():
    rng = np.random.default_rng(4)
    x = np.repeat([[0.0], [1.0]], 200, 0)
    population = np.r_[np.zeros(200), rng.normal(5, 1, 200)]
    result = quantile_attack([0.01, 5.0], [[0.0], [1.0]], population, x)
    # The population's quartiles are about 0 and 5: a thousandth of its spread is .0037.
    assert result.score[0] == pytest.approx(0.01 / 0.0037, rel=0.2)
    assert result.n_floored == 1
    with pytest.raises(ValueError, match="40 or more"):
        quantile_attack([0.0], [[0.0]], [0.0] * 39, [[0.0]] * 39)
    with pytest.raises(ValueError, match="those of the scores"):
        quantile_attack([0.0], [[0.0]], population, x[:, [0, 0]])
