"""Threshold attacks: class thresholds by brute force, modified entropy in 60 digits, the protocols written out."""

import json
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.svm import SVC

from nabla_tau import _C
from nabla_tau.membership.signal_thresholds import song_mittal, song_mittal_signals
from nabla_tau.membership.svc import svc_mia
from nabla_tau.membership.thresholds import class_thresholds, yeom

samples = st.lists(st.tuples(st.integers(-4, 4), st.booleans(), st.integers(0, 3)), min_size=2, max_size=60)


def brute_force(scores, labels, classes, c):
    """Every threshold of the class, from the highest down; the first of the best."""
    inside, outside = scores[labels & (classes == c)], scores[~labels & (classes == c)]
    if not inside.size or not outside.size:
        return math.nan, math.nan
    candidates = sorted({*inside, *outside}, reverse=True)
    # Compared as integers, over the common denominator of both rates.
    value = [int((inside >= t).sum()) * outside.size + int((outside < t).sum()) * inside.size for t in candidates]
    best = int(np.argmax(value))
    return candidates[best], value[best] / (2 * inside.size * outside.size)


@settings(deadline=None, max_examples=300)
@given(samples, st.sampled_from([np.float32, np.float64]))
def test_class_thresholds_equal_brute_force(rows, dtype):
    scores, labels, classes = (np.array(column) for column in zip(*rows, strict=True))
    scores = scores.astype(dtype) / 2
    if labels.all() or not labels.any():
        with pytest.raises(ValueError, match="both members and non-members"):
            class_thresholds(scores, labels, classes)
        return
    result = class_thresholds(scores, labels, classes)
    for c in range(classes.max() + 1):
        threshold, accuracy = brute_force(scores, labels, classes, c)
        assert result.thresholds[c] == pytest.approx(threshold, abs=0, nan_ok=True)
        assert result.balanced_accuracy[c] == pytest.approx(accuracy, nan_ok=True)
        assert result.n_members[c] == (labels & (classes == c)).sum()
    assert result.fallback == brute_force(scores, labels, 0 * classes, 0)[0]
    table = np.where(np.isnan(result.thresholds), result.fallback, result.thresholds)
    np.testing.assert_array_equal(result.predict(scores, classes), scores >= table[classes])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_class_thresholds_equal_brute_force_on_long_sorts_and_infinities(dtype):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=6000).astype(dtype).round(2)
    scores[:4] = -np.inf, np.inf, -0.0, 0.0
    labels, classes = rng.random(6000) < 0.4, rng.integers(0, 3, 6000)
    result = class_thresholds(scores, labels, classes)
    for c in range(3):
        threshold, accuracy = brute_force(scores, labels, classes, c)
        assert result.thresholds[c] == threshold
        assert result.balanced_accuracy[c] == pytest.approx(accuracy, abs=1e-15)


def test_class_thresholds_find_the_likelihood_ratio_of_two_gaussians():
    rng = np.random.default_rng(1)
    scores = np.concatenate([rng.normal(1, 1, 200_000), rng.normal(-1, 1, 200_000)])
    labels, classes = np.repeat([True, False], 200_000), np.tile([0, 1], 200_000)
    result = class_thresholds(scores + 5 * classes, labels, classes)
    np.testing.assert_allclose(result.thresholds, [0, 5], atol=0.1)
    np.testing.assert_allclose(result.balanced_accuracy, norm.cdf(1), atol=0.005)


def test_a_class_that_was_not_seen_falls_back_on_all_and_nan_is_no_member():
    result = class_thresholds([3.0, 1.0, 9.0], [True, False, True], [0, 0, 2])
    assert np.isnan(result.thresholds[[1, 2]]).all()
    np.testing.assert_array_equal(result.predict([3.0, 2.0, 3.0, np.nan], [7, 1, 2, 0]), [True, False, True, False])
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("scores", "labels", "classes", "error", "message"),
    [
        ([1.0, math.nan], [True, False], [0, 0], ValueError, r"scores\[1\] is NaN"),
        ([1.0, 2.0], [True, False], [0, -1], ValueError, "negative, got -1"),
        ([1.0, 2.0], [True, False], [0], ValueError, r"shape \[2\], got \[1\]"),
        ([1.0, 2.0], [True, False], [0.0, 1.0], TypeError, "classes must be integers, got dtype float64"),
    ],
)
def test_class_thresholds_refuse_and_say_why(scores, labels, classes, error, message):
    with pytest.raises(error, match=message):
        class_thresholds(scores, labels, classes)
    with pytest.raises(ValueError, match=r"classes\[1\] is 2; it must be in \[0, 2\)"):
        _C.class_thresholds(np.zeros(2), np.ones(2, bool), np.array([0, 2]), 2)


def exact_signals(logits, target):
    """log p_y, minus entropy and minus modified entropy in 60 digits."""
    with mpmath.workdps(400):
        weights = [mpmath.exp(mpmath.mpf(float(z))) for z in logits]
        total = mpmath.fsum(weights)
        p = [w / total for w in weights]
        entropy = -mpmath.fsum(q * mpmath.log(q) for q in p if q)
        others = mpmath.fsum(q * mpmath.log(1 - q) for j, q in enumerate(p) if j != target)
        mentr = -(1 - p[target]) * mpmath.log(p[target]) - others
        return float(mpmath.log(p[target])), -float(entropy), -float(mentr)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=6),
    st.integers(0, 5),
    st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_song_mittal_signals_are_exact_from_logits(logits, target, dtype):
    target %= len(logits)
    z = np.array([logits], dtype)
    found = song_mittal_signals(z, [target])
    expected = exact_signals(z[0], target)
    for value, truth in zip((found.confidence, found.entropy, found.modified_entropy), expected, strict=True):
        assert value[0] == pytest.approx(truth, rel=1e-12, abs=1e-300)
    assert found.correctness[0] == (z[0].argmax() == target)


def test_song_mittal_signals_keep_their_precision_where_probabilities_saturate():
    z = np.array([[800.0, 0.0, -30.0], [800.0, 0.0, -30.0], [0.0, -50.0, -50.0], [np.inf, 0, 0], [0, np.nan, 0]])
    found = song_mittal_signals(z, [0, 1, 0, 0, 0])
    for i, target in enumerate([0, 1, 0]):
        expected = exact_signals(z[i], target)
        assert found.modified_entropy[i] == pytest.approx(expected[2], rel=1e-12)
        assert found.confidence[i] == pytest.approx(expected[0], rel=1e-12)
    assert np.isnan(found.modified_entropy[3:]).all()
    assert np.isnan(found.correctness[3:]).all()
    ruled_out = song_mittal_signals(np.array([[0.0, -np.inf, 1.0]]), [1])
    assert ruled_out.confidence[0] == ruled_out.modified_entropy[0] == -np.inf


def test_song_mittal_signals_of_probabilities_are_the_published_formula():
    rng = np.random.default_rng(2)
    z = rng.normal(size=(5000, 7)) * 2
    y = rng.integers(0, 7, 5000)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    own, rest = p[np.arange(5000), y], p.copy()
    rest[np.arange(5000), y] = 0
    mentr = -(1 - own) * np.log(own) - (rest * np.log(1 - rest)).sum(1)
    for outputs, kind in ((z, "logits"), (p, "probabilities"), (torch.from_numpy(p), "probabilities")):
        found = song_mittal_signals(outputs, y, outputs_are=kind)
        np.testing.assert_allclose(found.modified_entropy, -mentr, rtol=1e-10)
        np.testing.assert_allclose(found.confidence, np.log(own), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(found.entropy, (p * np.log(p)).sum(1), rtol=1e-10)
        np.testing.assert_array_equal(found.correctness, p.argmax(1) == y)
    certain = song_mittal_signals([[1.0, 0.0, 0.0]] * 2, [0, 1], outputs_are="probabilities")
    np.testing.assert_array_equal(certain.modified_entropy, [0, -np.inf])
    with pytest.raises(ValueError, match="row 1 sums to 2"):
        song_mittal_signals([[0.5, 0.5], [1.0, 1.0]], [0, 0], outputs_are="probabilities")
    with pytest.raises(ValueError, match="all targets"):
        song_mittal_signals(z, y + 1)
    with pytest.raises(ValueError, match="outputs_are must be"):
        song_mittal_signals(z, y, outputs_are="p")


def outputs(rng, n, lift):
    """Logits [n, 5] of targets that stand `lift` above the other classes."""
    y = rng.integers(0, 5, n)
    z = rng.normal(size=(n, 5))
    z[np.arange(n), y] += lift
    return z, y


def test_song_mittal_finds_members_and_is_not_fooled_by_its_own_thresholds():
    rng = np.random.default_rng(3)
    found = song_mittal(*outputs(rng, 2000, 3.0), *outputs(rng, 3000, 1.0), random_state=4)
    assert found.attacks["modified_entropy"].advantage > found.attacks["correctness"].advantage > 0.2
    assert (found.n_members, found.n_nonmembers, found.chosen_on) == (2000, 3000, "other half")
    json.dumps(found.to_dict(), allow_nan=False)
    # Nothing to find: thresholds judged on the samples that chose them would always find something.
    covered = sum(
        (a := song_mittal(*outputs(rng, 60, 1.0), *outputs(rng, 60, 1.0)).attacks["modified_entropy"]).interval[0] <= 0
        and a.interval[1] >= 0
        for _ in range(100)
    )
    assert covered > 85
    shadow = (*outputs(rng, 2000, 3.0), *outputs(rng, 2000, 1.0))
    by_shadow = song_mittal(*outputs(rng, 2000, 3.0), *outputs(rng, 3000, 1.0), shadow=shadow)
    assert by_shadow.chosen_on == "shadow"
    assert by_shadow.attacks["confidence"].advantage == pytest.approx(found.attacks["confidence"].advantage, abs=0.05)


def test_song_mittal_with_a_shadow_model_is_the_protocol_written_out():
    rng = np.random.default_rng(5)
    target = (*outputs(rng, 300, 2.0), *outputs(rng, 200, 1.0))
    shadow = (*outputs(rng, 250, 2.0), *outputs(rng, 250, 1.0))
    result = song_mittal(*target, shadow=shadow).attacks["entropy"]
    s_in, s_out, t_in, t_out = (
        song_mittal_signals(*x).entropy for x in (shadow[:2], shadow[2:], target[:2], target[2:])
    )
    called = []
    for scores, classes in ((t_in, target[1]), (t_out, target[3])):
        limits = [
            brute_force(np.r_[s_in, s_out], np.r_[s_in * 0 == 0, s_out != s_out], np.r_[shadow[1], shadow[3]], c)[0]
            for c in classes
        ]
        called.append(np.mean(scores >= np.array(limits)))
    assert (result.tpr, result.fpr) == pytest.approx(tuple(called))


def test_yeom_calls_members_what_is_at_most_the_mean_training_loss():
    rng = np.random.default_rng(6)
    inside, outside = rng.exponential(0.5, 4000).astype(np.float32), rng.exponential(1.0, 4000).astype(np.float32)
    result = yeom(inside, outside, mean_train_loss=0.5)
    # P(loss <= 1/2) is 1 - e^-1 for members and 1 - e^-1/2 for others.
    assert result.advantage == pytest.approx(math.exp(-0.5) - math.exp(-1), abs=0.03)
    assert result.interval[0] < math.exp(-0.5) - math.exp(-1) < result.interval[1]
    assert yeom(inside, outside).threshold == pytest.approx(inside.mean(dtype=np.float64))
    over = yeom(outside, inside, mean_train_loss=0.5)
    assert over.interval[1] < 0
    agreed = yeom([0.1] * 20, [9.0] * 20)
    assert agreed.interval[0] < agreed.advantage == agreed.interval[1] == 1
    with_nan = yeom([0.1, math.nan], [math.nan, 3.0])
    assert (with_nan.tpr, with_nan.fpr, with_nan.n_nan) == (0.5, 0, 2)
    with pytest.raises(ValueError, match="finite"):
        yeom([0.1, math.inf], [1.0])


def test_the_interval_of_an_advantage_covers_as_often_as_it_claims():
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(1000):
        result = yeom(rng.random(40) * (1 / 0.9), rng.random(60) * 2, mean_train_loss=1.0, confidence=0.9)
        covered += result.interval[0] <= 0.4 <= result.interval[1]
    assert 0.87 < covered / 1000 < 0.95


def test_svc_mia_is_salun_s_protocol():
    rng = np.random.default_rng(8)
    retain, test = rng.beta(8, 1, 500), rng.beta(3, 2, 500)
    forget = rng.beta(3, 2, 150)
    result = svc_mia(retain, test, forget)
    model = SVC(C=3, gamma="auto", kernel="rbf").fit(np.r_[retain, test][:, None], np.repeat([1, 0], 500))
    assert result.efficacy == pytest.approx(1 - model.predict(forget[:, None]).mean())
    assert result.retain_rate == pytest.approx(model.predict(retain[:, None]).mean())
    assert result.test_rate == pytest.approx(model.predict(test[:, None]).mean())
    assert result.interval[0] < result.efficacy < result.interval[1]
    assert svc_mia(retain, test, retain[:100]).efficacy < result.efficacy - 0.2


def test_svc_mia_balances_clips_and_takes_features():
    rng = np.random.default_rng(9)
    retain, test, forget = rng.normal(1, 1, (300, 2)), rng.normal(-1, 1, (90, 2)), rng.normal(-1, 1, (50, 2))
    retain[0, 0], forget[0, 1] = np.inf, np.nan
    result = svc_mia(retain, test, forget, max_samples=60)
    assert (result.n, result.n_retain, result.n_test, result.n_forget) == (60, 300, 90, 50)
    assert result.n_non_finite in (1, 2)  # the inf may not be among the samples taken
    assert result.efficacy > 0.7
    assert result == svc_mia(retain, test, forget, max_samples=60)
    with pytest.raises(ValueError, match="same features"):
        svc_mia(retain, test, forget[:, :1])
