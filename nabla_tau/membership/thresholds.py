"""Attacks by one threshold: on the loss (Yeom et al. 2018), and one for each class (Song and Mittal 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nabla_tau import _C
from nabla_tau.arguments import numbers_checked
from nabla_tau.membership.outcome import Outcome, axes_or_new, draw_estimates
from nabla_tau.membership.scores import as_classes, as_labels, as_same_scores, as_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class ThresholdAttack(Outcome):
    """How often a rule that was chosen beforehand calls members members (TPR), and non-members (FPR).

    advantage: TPR - FPR, in [-1, 1]; below 0 the rule is worse than guessing, because members stand out the other way
    (over-unlearned). interval: of the advantage, at `confidence`, by Agresti and Caffo (2000).
    balanced_accuracy: (1 + advantage) / 2. threshold: the rule's, None where it has several.
    n_nan: samples without a score, which are called non-members.
    """

    advantage: float
    interval: tuple[float, float]
    balanced_accuracy: float
    tpr: float
    fpr: float
    threshold: float | None
    n_members: int
    n_nonmembers: int
    n_nan: int
    confidence: float

    def plot(self, ax: Axes | None = None) -> Axes:
        """Advantage with its interval, and the two rates that it is the difference of."""
        found = {"advantage": (self.advantage, self.interval), "TPR": (self.tpr, None), "FPR": (self.fpr, None)}
        return draw_estimates(axes_or_new(ax), found, reference=0)


@dataclass(frozen=True, eq=False)
class ClassThresholds(Outcome):
    """The best threshold of each class; a sample is called a member when its score is >= that of its class.

    thresholds [C]: NaN where a class has no members or no non-members; `predict` then takes `fallback`, the best of all
    classes together. n_members, n_nonmembers, true_positives, false_positives [C]: counts on the samples that the
    thresholds were chosen on. balanced_accuracy [C] is on these very samples too, hence at least 1/2 always: judge an
    attack on other ones.
    """

    thresholds: NDArray[np.float64]
    fallback: float
    n_members: NDArray[np.int64]
    n_nonmembers: NDArray[np.int64]
    true_positives: NDArray[np.int64]
    false_positives: NDArray[np.int64]
    orientation: str = "higher scores mean members"

    @property
    def balanced_accuracy(self) -> NDArray[np.float64]:
        """(P[member >= t] + P[non-member < t]) / 2 of each class [C]; NaN where a class is missing."""
        with np.errstate(invalid="ignore"):
            tpr, fpr = self.true_positives / self.n_members, self.false_positives / self.n_nonmembers
        accuracy: NDArray[np.float64] = np.where(np.isnan(self.thresholds), np.nan, (1 + tpr - fpr) / 2)
        return accuracy

    def predict(self, scores: object, classes: object) -> NDArray[np.bool_]:
        """Whether each sample is called a member, [N]: scores [N] (never where NaN), classes [N]."""
        values = as_scores(scores, "scores")
        index = as_classes(classes, values.size)
        table = np.append(np.where(np.isnan(self.thresholds), self.fallback, self.thresholds), self.fallback)
        called: NDArray[np.bool_] = values >= table[np.minimum(index, self.thresholds.size)]
        return called

    def plot(self, ax: Axes | None = None) -> Axes:
        """Threshold of each class, and the one of all together."""
        ax = axes_or_new(ax)
        ax.plot(self.thresholds, "o")
        ax.axhline(self.fallback, color="grey", linestyle=":", label="all classes")
        ax.set(xlabel="class", ylabel="threshold")
        ax.legend()
        return ax


def class_thresholds(scores: object, labels: object, classes: object) -> ClassThresholds:
    """For each class the threshold t = argmax (P[member >= t] + P[non-member < t]) / 2 over its scores; the highest of
    equals (Song and Mittal 2021, section 4).

    scores [N] (higher: more likely a member), labels [N] (True: member), classes [N] integers >= 0. Ties are one
    group. One radix sort of all samples and one pass in C++, 3 times as fast as a sort for each class in numpy.
    ValueError for NaN, for shapes that differ and when members or non-members are absent.
    """
    values = as_scores(scores, "scores")
    member, index = as_labels(labels, values.size), as_classes(classes, values.size)
    if not 0 < int(member.sum()) < values.size:
        raise ValueError(f"labels need both members and non-members, got {int(member.sum())} of {values.size}")
    thresholds, counts = _C.class_thresholds(values, member, index, int(index.max()) + 1)
    return ClassThresholds(thresholds[:-1], float(thresholds[-1]), *counts[:, :-1])


@numbers_checked
def yeom(
    member_losses: object,
    nonmember_losses: object,
    *,
    mean_train_loss: float | None = None,
    confidence: float = 0.95,
) -> ThresholdAttack:
    """The attack that calls a sample a member when its loss is at most the mean training loss (Yeom et al. 2018).

    member_losses [M], nonmember_losses [N]: losses, so lower means a member; `threshold` in the result is a loss.
    mean_train_loss: of the model's whole training set; without it that of the members stands in. NaN losses are never
    members, and counted. ValueError when the mean is not finite.
    """
    inside, outside = as_same_scores(member_losses, "member_losses", nonmember_losses, "nonmember_losses")
    known = inside[~np.isnan(inside)]
    if mean_train_loss is None:
        mean_train_loss = float(known.mean(dtype=np.float64)) if known.size else math.nan
    threshold = float(mean_train_loss)
    if not math.isfinite(threshold):
        raise ValueError(f"the mean training loss must be finite, got {threshold}")
    return rule_outcome(
        inside <= threshold,
        outside <= threshold,
        threshold=threshold,
        n_nan=int(np.isnan(inside).sum() + np.isnan(outside).sum()),
        confidence=confidence,
    )


def rule_outcome(
    members: NDArray[np.bool_],
    nonmembers: NDArray[np.bool_],
    *,
    threshold: float | None = None,
    n_nan: int = 0,
    confidence: float = 0.95,
) -> ThresholdAttack:
    """The result of a rule from its calls on members [M] and non-members [N] (True: called a member)."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    tpr, fpr = float(members.mean()), float(nonmembers.mean())
    # One call of each kind is added to either side, so that the interval has a width where all calls agree.
    rates = [(int(calls.sum()) + 1, calls.size + 2) for calls in (members, nonmembers)]
    (p, m), (q, n) = ((k / size, size) for k, size in rates)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(p * (1 - p) / m + q * (1 - q) / n)
    return ThresholdAttack(
        advantage=tpr - fpr,
        interval=(max(p - q - half, -1.0), min(p - q + half, 1.0)),
        balanced_accuracy=(1 + tpr - fpr) / 2,
        tpr=tpr,
        fpr=fpr,
        threshold=threshold,
        n_members=members.size,
        n_nonmembers=nonmembers.size,
        n_nan=n_nan,
        confidence=confidence,
    )
