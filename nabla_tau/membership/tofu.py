"""The measures of TOFU (Maini et al. 2024, arXiv 2401.06121): truth ratio, recall of an answer, model utility.

    ratio = truth_ratio(paraphrase_losses, perturbed_losses)              # of each question of the forget set
    ks_quality(ratio, ratio_of_the_retrained_model)                       # forget quality
    model_utility([probabilities, recalls, truth_score(ratio_of_retained), ...])

The losses are means over an answer's tokens, so that exp(-loss) is P(a|q)^(1/|a|), the paper's probability of an answer
whatever its length.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nabla_tau.membership.scores import as_matrix, as_scores

Values = NDArray[np.float64]


def truth_ratio(true_losses: object, wrong_losses: object) -> Values:
    """R [N] = mean_j P(wrong_j) / P(true): below 1 where the model prefers the truth, about 1 where it knows nothing.

    true_losses [N]: of the paraphrased answer, or of the answer itself where there is no paraphrase. wrong_losses
    [N, K]: of K false answers in its form. NaN stays NaN, which `ks_quality` leaves out. ValueError for other shapes.
    """
    true, wrong = _true_and_wrong(true_losses, wrong_losses)
    with np.errstate(over="ignore"):
        ratio: Values = np.exp(true[:, None] - wrong).mean(1)
    return ratio


def truth_score(ratio: object) -> Values:
    """max(0, 1 - R) [N] of truth ratios [N]: what counts for utility, 1 where the model is sure of the truth."""
    score: Values = np.maximum(0.0, 1.0 - as_scores(ratio, "ratio").astype(np.float64))
    return score


def choice_probability(true_losses: object, wrong_losses: object) -> Values:
    """P(true) / (P(true) + sum_j P(wrong_j)) [N]: a question with K false answers [N, K] as multiple choice."""
    true, wrong = _true_and_wrong(true_losses, wrong_losses)
    with np.errstate(over="ignore"):
        probability: Values = 1 / (1 + np.exp(true[:, None] - wrong).sum(1))
    return probability


def rouge_l_recall(answer: str, reference: str) -> float:
    """Share of the reference's words that are in the answer too, in the same order: their longest common subsequence
    over the reference's length (ROUGE-L, Lin 2004); 0 where the reference has no word.

    Words are runs of letters and digits in lower case. They are not stemmed, as TOFU's are: "wrote" is not "writes".
    """
    words, wanted = (re.findall(r"\w+", text.lower()) for text in (answer, reference))
    longest = [0] * (len(wanted) + 1)  # common to the words so far and the first k wanted ones
    for word in words:
        above_left = 0
        for k, other in enumerate(wanted, 1):
            above = longest[k]
            longest[k] = above_left + 1 if word == other else max(above, longest[k - 1])
            above_left = above
    return longest[-1] / len(wanted) if wanted else 0.0


def model_utility(measures: Sequence[object]) -> float:
    """Harmonic mean of the means of measures in [0, 1], each [N] over the questions of one set; 0 where one of the
    means is 0. TOFU takes nine: probability, ROUGE-L recall and truth score on three sets. ValueError for none, and
    for one that is not within [0, 1]."""
    means = []
    for index, values in enumerate(measures):
        of_set = as_scores(values, f"measures[{index}]").astype(np.float64)
        if not ((of_set >= 0) & (of_set <= 1)).all():
            raise ValueError(f"measures[{index}] must be in [0, 1], got {of_set.min()} to {of_set.max()}")
        means.append(float(of_set.mean()))
    if not means:
        raise ValueError("model_utility needs at least one measure")
    return statistics.harmonic_mean(means)


def _true_and_wrong(true_losses: object, wrong_losses: object) -> tuple[Values, Values]:
    true, wrong = as_scores(true_losses, "true_losses"), as_matrix(wrong_losses, "wrong_losses", "[N, K]")
    if len(true) != len(wrong) or not wrong.shape[1]:
        raise ValueError(f"wrong_losses must be [{len(true)}, K], one row a question, got {list(wrong.shape)}")
    return true.astype(np.float64), wrong.astype(np.float64)
