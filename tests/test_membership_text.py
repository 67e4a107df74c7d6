"""Scores of text: sorting and double loops written out, scipy, compressed bytes, and the signs of PrivLeak."""

import json
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from scipy.stats import ks_2samp

from nabla_tau.membership.bootstrap import bootstrap_auc
from nabla_tau.membership.curve import roc
from nabla_tau.membership.text import (
    ks_quality,
    min_k,
    min_k_pp,
    privleak,
    privleak_bootstrap,
    reference_difference,
    token_statistics,
    zlib_ratio,
)

tokens = st.lists(st.floats(-20, 0), max_size=30)


@settings(deadline=None)
@given(st.lists(tokens, min_size=1, max_size=5), st.integers(1, 100))
def test_min_k_is_the_mean_of_the_lowest_share_however_texts_are_given(texts, percent):
    expected = []
    for text in texts:
        lowest = sorted(text)[: max(1, percent * len(text) // 100)]
        expected.append(np.mean(lowest) if text else math.nan)
    width = max(1, *map(len, texts)) if len(texts) > 1 else max(1, len(texts[0]))
    padded, mask = np.full((len(texts), width), -99.0), np.zeros((len(texts), width), bool)
    for i, text in enumerate(texts):
        padded[i, : len(text)], mask[i, : len(text)] = text, True
    k = percent / 100
    for result in (
        min_k([np.array(t) for t in texts], k=k),
        min_k(padded, k=k, mask=mask),
        min_k(torch.from_numpy(padded), k=k, mask=torch.from_numpy(mask)),
        min_k(np.where(mask, padded, np.nan), k=k),
    ):
        np.testing.assert_allclose(result.score, expected, rtol=1e-12, atol=1e-300)
        np.testing.assert_array_equal(result.n_tokens, [len(t) for t in texts])
    assert min_k(np.where(mask, padded, np.nan), k=k).n_nan == (~mask).sum()


def test_min_k_of_a_share_that_binary_fractions_round_down():
    assert min_k([-np.arange(100.0)], k=0.29).score[0] == -np.mean(np.arange(71, 100))


def test_min_k_pp_standardises_each_token_and_bounds_the_variance():
    rng = np.random.default_rng(0)
    p, mu, var = rng.normal(-3, 1, (4, 50)), rng.normal(-3, 1, (4, 50)), rng.exponential(1, (4, 50))
    var[:, ::10] = 0
    result = min_k_pp(p, mu, var, k=0.3)
    for i in range(4):
        standardised = sorted((p[i, t] - mu[i, t]) / math.sqrt(max(var[i, t], 1e-6)) for t in range(50))
        assert result.score[i] == pytest.approx(np.mean(standardised[:15]))
    ragged = min_k_pp([p[0], p[1, :9]], [mu[0], mu[1, :9]], [var[0], var[1, :9]], k=0.3)
    assert ragged.score[0] == result.score[0]
    np.testing.assert_array_equal(ragged.n_tokens, [50, 9])
    with pytest.raises(ValueError, match="differ in tokens: 50, 49 and 50"):
        min_k_pp(p[:1], mu[:1, :49], var[:1])
    with pytest.raises(ValueError, match="k must be in"):
        min_k(p, k=0)
    with pytest.raises(TypeError, match="log_probs must hold real numbers"):
        min_k(p > 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_token_statistics_are_the_moments_of_log_p(dtype, monkeypatch):
    monkeypatch.setattr("nabla_tau.membership.text._CHUNK_ELEMENTS", 7 * 11)
    torch.manual_seed(0)
    logits, targets = (4 * torch.randn(40, 11)).to(dtype), torch.randint(11, (40,))
    logits[3, 5], targets[3] = -math.inf, 4
    found = token_statistics(logits, targets)
    log_p = log_softmax(logits.double().numpy(), axis=1)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for i in range(40):
        kept = np.isfinite(log_p[i])
        mean = np.sum(np.exp(log_p[i][kept]) * log_p[i][kept])
        second = np.sum(np.exp(log_p[i][kept]) * log_p[i][kept] ** 2)
        assert found.log_prob[i] == pytest.approx(log_p[i, targets[i]], rel=tolerance, abs=tolerance)
        assert found.mean[i] == pytest.approx(mean, rel=tolerance, abs=tolerance)
        assert found.variance[i] == pytest.approx(second - mean**2, rel=tolerance, abs=tolerance)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 11\)"):
        token_statistics(logits, targets + 11)
    with pytest.raises(TypeError, match="logits must be floating"):
        token_statistics(logits.long(), targets)
    with pytest.raises(ValueError, match=r"got \[40, 11\] and \[39\]"):
        token_statistics(logits, targets[1:])


def test_zlib_and_reference_scores_are_their_formulas():
    texts = ["a" * 400, "the quick brown fox", "über".encode()]
    losses = np.array([1.5, 2.0, 0.5], np.float32)
    sizes = [len(zlib.compress(t if isinstance(t, bytes) else t.encode())) for t in texts]
    expected = [-loss / size for loss, size in zip(losses, sizes, strict=True)]
    np.testing.assert_allclose(zlib_ratio(losses, texts), expected)
    np.testing.assert_allclose(reference_difference(losses, losses + 1), 1)
    with pytest.raises(ValueError, match="got 2 and 3"):
        zlib_ratio(losses, texts[:2])
    with pytest.raises(ValueError, match="same texts"):
        reference_difference(losses, losses[:2])


def test_every_text_score_is_higher_for_members():
    torch.manual_seed(1)
    member = np.arange(60) < 30
    logits = torch.randn(60, 80, 20)
    targets = torch.randint(20, (60, 80))
    logits[torch.from_numpy(member)] += 1.5 * torch.nn.functional.one_hot(targets[torch.from_numpy(member)], 20)
    found = [token_statistics(z, y) for z, y in zip(logits, targets, strict=True)]
    log_probs, means, variances = ([getattr(f, n) for f in found] for n in ("log_prob", "mean", "variance"))
    losses = [-p.mean() for p in log_probs]
    for score in (
        min_k(log_probs).score,
        min_k_pp(log_probs, means, variances).score,
        zlib_ratio(losses, ["some text"] * 60),
        reference_difference(losses, np.full(60, 3.5)),
    ):
        assert roc(score, member).auc > 0.9


def test_privleak_has_muses_signs_and_scale():
    assert privleak(1.0, 0.5).value == -100
    assert privleak(0.5, 0.5).value == 0
    assert privleak(0.0, 0.5).value == 100
    assert privleak(0.7, 0.6).value == pytest.approx(100 * ((1 - 0.7) - (1 - 0.6)) / (1 - 0.6))
    assert privleak(0.9, 0.5).reading == "under-unlearned"
    assert privleak(0.2, 0.5).reading == "over-unlearned"
    lost = privleak(0.7, 1.0)
    assert math.isnan(lost.value)
    assert not lost.resolvable
    json.dumps(lost.to_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="auc must be"):
        privleak(1.2, 0.5)


def test_privleak_of_a_bootstrap_has_an_interval_that_decides():
    rng = np.random.default_rng(2)
    inside, outside = rng.normal(size=300), rng.normal(size=300)
    shifts = {"kept": 1.0, "over": -1.0, "good": 0.0, "r1": 0.0, "r2": 0.0}
    attack = bootstrap_auc(
        {k: inside + s + 0.3 * rng.normal(size=300) for k, s in shifts.items()}, dict.fromkeys(shifts, outside)
    )
    found = {k: privleak_bootstrap(attack, k, ["r1", "r2"]) for k in ("kept", "over", "good")}
    assert [f.reading for f in found.values()] == ["under-unlearned", "over-unlearned", "no evidence"]
    reference = (attack.auc["r1"] + attack.auc["r2"]) / 2
    assert found["kept"].value == pytest.approx(privleak(attack.auc["kept"], reference).value)
    assert found["kept"].interval[0] < found["kept"].value < found["kept"].interval[1]
    assert found["kept"].n_members == 300


@pytest.mark.filterwarnings("ignore:ks_2samp. Exact calculation unsuccessful")
@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_ks_quality_is_scipys_test_with_the_smallest_p_value_beside_it(unlearned, retrained):
    result = ks_quality([*unlearned, math.nan], retrained)
    expected = ks_2samp(unlearned, retrained)
    assert (result.p_value, result.statistic) == (expected.pvalue, expected.statistic)
    assert (result.n_unlearned, result.n_retrained, result.n_nan) == (len(unlearned), len(retrained), 1)
    apart = ks_2samp(np.arange(len(unlearned)), np.arange(len(retrained)) + 100).pvalue
    assert result.smallest_p_value == pytest.approx(apart, rel=1e-6)
    assert result.resolvable == (apart <= 0.05)
    assert 10**result.log10_p_value == pytest.approx(result.p_value)


def test_ks_quality_needs_numbers():
    with pytest.raises(ValueError, match="all be NaN"):
        ks_quality([math.nan], [1.0])
