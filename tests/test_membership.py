"""Membership statistics: against independent oracles, over ties, and with intervals that cover what they claim to."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import StratifiedShuffleSplit

from nabla_tau.membership import bootstrap_auc, choose_comparison, judge, roc, simple_mia
from nabla_tau.membership.recall import paired_interval

# Few distinct values, so that ties are the rule and not the exception.
tied = st.lists(st.integers(-3, 3), min_size=1, max_size=30)


def auc_by_pairs(members, nonmembers):
    wins = [(a > b) + (a == b) / 2 for a in members for b in nonmembers]
    return sum(wins) / len(wins)


def joined(members, nonmembers):
    scores = np.concatenate([members, nonmembers]).astype(float)
    return scores, np.arange(scores.size) < len(members)


@settings(deadline=None)
@given(tied, tied)
def test_roc_agrees_with_all_pairs_and_with_scikit_learn(members, nonmembers):
    scores, labels = joined(members, nonmembers)
    curve = roc(scores, labels)
    assert curve.auc == pytest.approx(auc_by_pairs(members, nonmembers), abs=1e-14)
    assert curve.auc == pytest.approx(roc_auc_score(labels, scores), abs=1e-14)
    fpr, tpr, thresholds = roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.fpr, fpr)
    np.testing.assert_allclose(curve.tpr, tpr)
    np.testing.assert_array_equal(curve.thresholds[1:], thresholds[1:])
    assert curve.advantage == pytest.approx(max(tpr - fpr))
    # Every threshold by brute force: the rate of the rule "member iff score >= t".
    best = max((np.mean(scores[labels] >= t) + np.mean(scores[~labels] < t)) / 2 for t in [*scores, np.inf])
    assert curve.balanced_accuracy == pytest.approx(best)


@settings(deadline=None)
@given(tied, tied, st.randoms())
def test_auc_ignores_order_and_any_increasing_map_and_turns_over_with_the_sign(members, nonmembers, random):
    scores, labels = joined(members, nonmembers)
    order = list(range(scores.size))
    random.shuffle(order)
    auc = roc(scores, labels).auc
    assert roc(scores[order], labels[order]).auc == auc
    assert roc(np.exp(scores), labels).auc == auc
    assert roc(-scores, labels).auc == pytest.approx(1 - auc)


def test_roc_ranks_infinities_and_takes_tensors():
    curve = roc(torch.tensor([math.inf, 1.0, 0.0, -math.inf]), torch.tensor([True, True, False, False]))
    assert curve.auc == 1.0
    assert curve.balanced_accuracy == 1.0


def test_tpr_is_that_of_a_real_threshold_and_unresolved_without_enough_nonmembers():
    rng = np.random.default_rng(0)
    scores, labels = joined(rng.normal(1, 1, 500), rng.normal(0, 1, 2000))
    curve = roc(scores, labels)
    allowed = np.sort(scores[~labels])[::-1][20]  # at most 20 of 2000 above this
    assert curve.tpr_at(0.01) == pytest.approx(np.mean(scores[labels] > allowed))
    assert curve.resolution(0.01) == "resolved"
    few = roc(*joined(rng.normal(1, 1, 50), rng.normal(0, 1, 99)))
    assert few.resolution(0.01) == "not resolvable"
    assert math.isnan(few.tpr_at(0.01))
    assert few.to_dict()["tpr_at_1_percent_fpr"] is None
    assert few.resolution(0.05) == "weak"


@pytest.mark.parametrize(
    ("scores", "labels", "error"),
    [
        ([1.0, math.nan], [True, False], ValueError),
        ([1.0, 2.0], [True, True], ValueError),
        ([1.0, 2.0], [True], ValueError),
        ([[1.0], [2.0]], [True, False], ValueError),
        ([], [], ValueError),
        ([1j, 2j], [True, False], TypeError),
        ([1.0, 2.0], [1, 2], TypeError),
    ],
)
def test_roc_refuses_what_has_no_curve(scores, labels, error):
    with pytest.raises(error):
        roc(scores, labels)


def oracle_mia(members, nonmembers):
    """Ten stratified splits, one number, equal classes: written out, without cross_val_score."""
    x, y = np.concatenate([members, nonmembers])[:, None], np.r_[np.ones(len(members)), np.zeros(len(nonmembers))]
    accuracy = []
    for train, test in StratifiedShuffleSplit(10, random_state=0).split(x, y):
        accuracy.append(np.mean(LogisticRegression().fit(x[train], y[train]).predict(x[test]) == y[test]))
    return np.mean(accuracy), np.std(accuracy)


def test_simple_mia_equals_the_protocol_written_out():
    rng = np.random.default_rng(1)
    members, nonmembers = rng.exponential(0.5, 300), rng.exponential(1.0, 300)
    result = simple_mia(members, nonmembers)
    assert (result.accuracy, result.std) == pytest.approx(oracle_mia(members, nonmembers))
    assert result.converged


def test_simple_mia_balances_the_classes():
    rng = np.random.default_rng(2)
    # Nothing to find: unbalanced classes alone would give 90 % by always guessing the larger.
    result = simple_mia(rng.normal(size=100), rng.normal(size=900))
    assert (result.n, result.n_members, result.n_nonmembers) == (100, 100, 900)
    assert 0.35 < result.accuracy < 0.65
    assert simple_mia(rng.normal(size=100) + 9, rng.normal(size=900)).accuracy > 0.99


def test_simple_mia_clips_and_counts_what_is_not_finite():
    rng = np.random.default_rng(3)
    members, nonmembers = rng.exponential(0.5, 60), rng.exponential(1.0, 60)
    clipped = nonmembers.copy()
    nonmembers[:3] = math.inf, math.nan, -math.inf
    high = max(members.max(), nonmembers[3:].max())
    clipped[:3] = high, high, min(members.min(), nonmembers[3:].min())
    result = simple_mia(members, nonmembers)
    assert result.n_non_finite == 3
    assert result.accuracy == simple_mia(members, clipped).accuracy
    with pytest.raises(ValueError, match="finite"):
        simple_mia(np.full(30, math.nan), np.full(30, math.inf))


def test_simple_mia_refuses_sets_too_small_to_split():
    with pytest.raises(ValueError, match="at least 20"):
        simple_mia(np.zeros(19), np.zeros(500))


def test_bootstrap_interval_covers_the_true_auc_as_often_as_it_claims():
    rng = np.random.default_rng(4)
    truth = 0.5 * (1 + math.erf(0.5))  # Phi(1 / sqrt 2), for unit Gaussians one apart
    covered = 0
    repetitions = 300
    for seed in range(repetitions):
        members, nonmembers = rng.normal(1, 1, 80), rng.normal(0, 1, 120)
        result = bootstrap_auc({"m": members}, {"m": nonmembers}, replicates=400, random_state=seed)
        low, high = result.interval("m", confidence=0.9)
        covered += low <= truth <= high
    # Binomial(300, .9) has a standard deviation of .017; the percentile interval itself is a little short.
    assert 0.84 < covered / repetitions < 0.95


def test_gap_interval_is_paired_over_models():
    rng = np.random.default_rng(5)
    members, nonmembers = rng.normal(0.5, 1, 200), rng.normal(0, 1, 300)
    noise_in, noise_out = rng.normal(0, 0.05, 200), rng.normal(0, 0.05, 300)
    result = bootstrap_auc(
        {"a": members, "same": members, "near": members + noise_in},
        {"a": nonmembers, "same": nonmembers, "near": nonmembers + noise_out},
    )
    assert result.gap("a", "same") == 0
    assert result.gap_interval("a", "same") == (0.0, 0.0)
    assert result.gap_interval("a", ("a", "same")) == (0.0, 0.0)
    low, high = result.interval("a")
    gap_low, gap_high = result.gap_interval("near", "a")
    assert 0 < gap_high - gap_low < (high - low) / 5  # unpaired it would be wider than either interval
    assert result.gap("a", 0.5) == pytest.approx(result.auc["a"] - 0.5)


def test_bootstrap_of_a_model_does_not_depend_on_the_others():
    rng = np.random.default_rng(6)
    members, nonmembers = rng.normal(size=50).round(1), rng.normal(size=70).round(1)
    alone = bootstrap_auc({"a": members}, {"a": nonmembers})
    beside = bootstrap_auc({"b": -members, "a": members}, {"b": -nonmembers, "a": nonmembers})
    np.testing.assert_array_equal(alone.replicates["a"], beside.replicates["a"])
    np.testing.assert_allclose(beside.replicates["b"], 1 - beside.replicates["a"])


@pytest.mark.parametrize(
    ("members", "nonmembers", "replicates"),
    [
        ({"a": [1.0]}, {"b": [1.0]}, 100),
        ({"a": [1.0], "b": [1.0, 2.0]}, {"a": [1.0], "b": [1.0]}, 100),
        ({"a": [math.nan]}, {"a": [1.0]}, 100),
        ({"a": [1.0]}, {"a": [1.0]}, 99),
    ],
)
def test_bootstrap_refuses_what_it_cannot_pair(members, nonmembers, replicates):
    with pytest.raises(ValueError):
        bootstrap_auc(members, nonmembers, replicates=replicates)


def test_nonmembers_are_of_the_forgotten_classes_and_test_samples_of_the_others():
    forget, unseen = np.array([3, 3, 7]), np.array([3, 1, 7, 2, 3])
    chosen = choose_comparison(forget, unseen, n_forget=3, n_unseen=5, removed=(3,))
    np.testing.assert_array_equal(unseen[chosen.nonmembers], [3, 7, 3])
    np.testing.assert_array_equal(unseen[chosen.test], [1, 7, 2])
    np.testing.assert_array_equal(unseen[chosen.unseen_removed], [3, 3])
    assert chosen.members.all()
    assert chosen.classes == (3, 7)


def test_classes_without_unseen_samples_are_never_compared_with_others():
    with pytest.raises(ValueError, match="classes 3"):
        choose_comparison(np.array([3, 3]), np.array([1, 2]), n_forget=2, n_unseen=2)
    chosen = choose_comparison(np.array([3, 4, 4]), np.array([4, 1]), n_forget=3, n_unseen=2)
    np.testing.assert_array_equal(chosen.members, [False, True, True])
    assert any("classes 3 have no unseen" in note for note in chosen.notes)


def test_a_class_mix_that_gives_membership_away_is_noted():
    rng = np.random.default_rng(8)
    unseen = rng.integers(0, 5, 1000)
    skewed = np.where(rng.random(300) < 0.6, 0, rng.integers(0, 5, 300))
    even = rng.integers(0, 5, 300)
    notes = [choose_comparison(f, unseen, n_forget=300, n_unseen=1000).notes for f in (skewed, even)]
    assert any("how often each class occurs" in note for note in notes[0])
    assert notes[1] == ()


def gaussian_attacks(shift, n=1500, original=1.0, retrained=0.0):
    """One attack on three models; members stand `shift` above non-members for the model judged."""
    rng = np.random.default_rng(9)
    members, nonmembers = rng.normal(size=n), rng.normal(size=2 * n)
    shifts = {"unlearned": shift, "retrained": retrained, "original": original}
    # Each model has half of its scores' variance of its own.
    scores = [{k: x + s + rng.normal(size=x.size) for k, s in shifts.items()} for x in (members, nonmembers)]
    scores[1] = {k: v - shifts[k] for k, v in scores[1].items()}
    return {"loss": bootstrap_auc(scores[0], scores[1])}


@pytest.mark.parametrize(
    ("shift", "code"), [(0.0, "forgotten"), (0.4, "partly remembered"), (1.0, "remembered"), (-0.4, "over-unlearned")]
)
def test_verdict_follows_the_distance_from_the_retrained_model(shift, code):
    verdict = judge(gaussian_attacks(shift), subject="unlearned", retrained=["retrained"], original="original")
    assert verdict.code == code


def test_verdict_is_open_when_there_are_too_few_samples_or_nothing_was_remembered():
    few = judge(gaussian_attacks(0.0, n=40), subject="unlearned", retrained=["retrained"], original="original")
    assert few.code == "inconclusive"
    blind = judge(
        gaussian_attacks(0.0, original=0.0), subject="unlearned", retrained=["retrained"], original="original"
    )
    assert blind.code == "inconclusive"
    assert "even in the original" in blind.sentence


def test_an_auc_below_the_retrained_models_but_above_one_half_is_a_warning():
    attacks = gaussian_attacks(0.1, retrained=0.6)
    verdict = judge(attacks, subject="unlearned", retrained=["retrained"], original="original")
    assert verdict.code == "forgotten"
    assert any(f.level == "warning" and "than by retraining" in f.text for f in verdict.findings)
    level = judge(
        gaussian_attacks(0.6, retrained=0.6), subject="unlearned", retrained=["retrained"], original="original"
    )
    assert not any("than by retraining" in f.text for f in level.findings)


def attack(seed, n=1500, **shifts):
    """An attack whose members stand the given shift above non-members, by model; half of the variance is a model's."""
    rng = np.random.default_rng(seed)
    members, nonmembers = rng.normal(size=n), rng.normal(size=2 * n)
    inside = {name: members + shift + rng.normal(size=n) for name, shift in shifts.items()}
    return bootstrap_auc(inside, {name: nonmembers + rng.normal(size=2 * n) for name in shifts})


def verdict_of(attacks):
    return judge(attacks, subject="unlearned", retrained=["retrained"], original="original")


def test_a_weak_attack_does_not_decide_over_a_strong_one_that_found_nothing():
    strong = attack(0, unlearned=0.0, retrained=0.0, original=0.8)
    weak = attack(3, n=300, unlearned=0.05, retrained=0.0, original=0.3)
    assert weak.gap_interval("original", "retrained", confidence=0.98)[0] > 0
    assert weak.gap_interval("unlearned", "retrained")[1] > 0.03
    verdict = verdict_of({"loss": strong, "entropy": weak})
    assert verdict.code == "forgotten"
    assert "AUC on loss" in verdict.sentence
    assert any("leaves it open" in f.text and "entropy" in f.text for f in verdict.findings)
    # As strong on the original as the other, it must vouch too.
    as_strong = attack(3, n=300, unlearned=0.05, retrained=0.0, original=0.8)
    assert verdict_of({"loss": strong, "entropy": as_strong}).code == "inconclusive"
    # And what it finds beyond doubt it may say.
    accusing = attack(0, unlearned=0.25, retrained=0.0, original=0.3)
    accused = verdict_of({"loss": strong, "entropy": accusing})
    assert accused.code == "remembered"
    assert "AUC on entropy" in accused.sentence
    assert "AUC on loss" in accused.sentence


def test_a_gap_within_the_tolerance_is_no_forgetting_where_the_original_had_little_more():
    original = attack(1, n=20_000, unlearned=0.06, retrained=0.0, original=0.08)
    hardly = verdict_of({"loss": original})
    assert original.gap_interval("unlearned", "retrained")[1] < 0.03
    assert hardly.code != "forgotten"
    closed = verdict_of({"loss": attack(0, n=20_000, unlearned=0.0, retrained=0.0, original=0.08)})
    assert closed.code == "forgotten"
    # Two thirds closed by the figures, but the samples do not show that anything changed.
    chance = verdict_of({"loss": attack(0, n=3000, unlearned=0.01, retrained=0.0, original=0.06)})
    assert chance.code == "inconclusive"
    assert "no clear change" in chance.sentence


@pytest.mark.parametrize(
    ("shift", "code", "closed"), [(0.0, "forgotten", 1.0), (0.4, "partly remembered", 0.6), (0.9, "remembered", 0.1)]
)
def test_the_sentence_says_how_much_of_the_gap_is_closed(shift, code, closed):
    verdict = verdict_of({"loss": attack(0, unlearned=shift, retrained=0.0, original=1.0)})
    assert verdict.code == code
    said = re.search(r"(all|none|[0-9]+%) of the original model's gap of [+]0[.]\d+ is closed", verdict.sentence)[1]
    share = {"all": 1.0, "none": 0.0}[said] if said in ("all", "none") else int(said[:-1]) / 100
    assert share == pytest.approx(closed, abs=0.1)


def test_paired_interval_of_accuracies_covers_and_has_a_width_where_all_agree():
    low, high = paired_interval(np.zeros(98), 0.95)
    assert high == -low == pytest.approx(0.0196, abs=1e-4)
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        low, high = paired_interval((rng.random(60) < 0.1) * 1.0 - (rng.random(60) < 0.02), 0.9)
        covered += low <= 0.08 <= high
    assert 0.87 < covered / 2000 < 0.95
