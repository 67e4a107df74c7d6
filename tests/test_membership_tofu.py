"""TOFU's measures: cases worked out by hand, subsequences by trying all of them, and who is left with which utility."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nabla_tau.membership import (
    choice_probability,
    ks_quality,
    model_utility,
    rouge_l_recall,
    truth_ratio,
    truth_score,
)

LOG = math.log


def test_truth_ratio_is_the_mean_probability_of_false_answers_over_that_of_the_true_one():
    true = [LOG(2), LOG(10), 0.0]  # probabilities 1/2, 1/10 and 1
    wrong = [[LOG(4), LOG(8)], [LOG(5), LOG(5)], [LOG(2), math.inf]]
    # (1/4 + 1/8) / 2 / (1/2); twice as probable as the truth; (1/2 + 0) / 2.
    ratio = truth_ratio(true, wrong)
    np.testing.assert_allclose(ratio, [0.375, 2.0, 0.25])
    np.testing.assert_allclose(truth_score(ratio), [0.625, 0.0, 0.75])
    # 1/2 of 1/2 + 1/4 + 1/8; 1/10 of 1/10 + 2/5; 1 of 1 + 1/2.
    np.testing.assert_allclose(choice_probability(true, wrong), [4 / 7, 0.2, 2 / 3])


def test_losses_may_be_tensors_and_must_be_a_row_a_question():
    true, wrong = torch.rand(4, dtype=torch.bfloat16), torch.rand(4, 5)
    expected = [np.mean([math.exp(t - w) for w in row]) for t, row in zip(true.tolist(), wrong.tolist(), strict=True)]
    np.testing.assert_allclose(truth_ratio(true, wrong), expected, rtol=1e-6)
    for measure in (truth_ratio, choice_probability):
        with pytest.raises(ValueError, match=r"must be \[3, K\], one row a question, got \[4, 5\]"):
            measure(true[:3], wrong)


def test_a_question_without_a_known_loss_is_left_out_of_forget_quality():
    ratio = truth_ratio([0.0, math.nan, 1.0], [[1.0], [1.0], [math.nan]])
    assert np.isnan(ratio).tolist() == [False, True, True]
    assert np.isnan(truth_score(ratio)).tolist() == [False, True, True]
    assert ks_quality(ratio, [0.5, 0.6]).n_nan == 2, "of three"


words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6)


@settings(deadline=None)
@given(words, words)
def test_rouge_l_recall_is_the_longest_common_subsequence_of_words(answer, reference):
    def parts(text):
        return {kept for n in range(len(text) + 1) for kept in itertools.combinations(text, n)}

    longest = max(map(len, parts(answer) & parts(reference)))
    expected = longest / len(reference) if reference else 0.0
    assert rouge_l_recall(" ".join(answer), " ".join(reference)) == pytest.approx(expected)


def test_rouge_l_recall_sees_words_only():
    assert rouge_l_recall("The AUTHOR'S name -- is Hina Ameen!", "the author's name is Hina Ameen.") == 1
    assert rouge_l_recall("born in 1975 in Karachi", "Karachi, 1975") == 0.5, "in the same order"
    assert rouge_l_recall("Beirut and Zürich and more", "Zürich") == 1, "what is added costs nothing"


def test_utility_is_the_harmonic_mean_of_means():
    measures = [[0.2, 0.6], [1.0], [0.5, 0.25, 0.75]]
    assert model_utility(measures) == pytest.approx(3 / (1 / 0.4 + 1 / 1.0 + 1 / 0.5))
    assert model_utility([*measures, [0.0, 0.0]]) == 0
    for wrong in ([0.5, 1.5], [-0.1], [0.5, math.nan]):
        with pytest.raises(ValueError, match=r"measures\[1\] must be in \[0, 1\]"):
            model_utility([[0.5], wrong])
    with pytest.raises(ValueError, match="at least one"):
        model_utility([])
