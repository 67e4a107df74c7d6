"""The receiver operating characteristic of a membership attack, ties grouped, from the C++ core."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nabla_tau import _C
from nabla_tau.membership.scores import as_labels, as_scores


@dataclass(frozen=True, eq=False)
class RocResult:
    """ROC curve of one attack; a sample is called a member when its score is >= a threshold.

    auc: P(member scores higher) + P(equal) / 2. fpr, tpr, thresholds: [T], one entry per distinct score, from (0, 0)
    at threshold inf to (1, 1). The best threshold is chosen on the very samples it is judged on, so
    `balanced_accuracy` is above 1/2 even for an attack that knows nothing: compare it between models, not with 1/2.
    """

    auc: float
    fpr: NDArray[np.float64]
    tpr: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    n_members: int
    n_nonmembers: int

    @property
    def advantage(self) -> float:
        """max over thresholds of TPR - FPR, in [0, 1]."""
        return float((self.tpr - self.fpr).max())

    @property
    def balanced_accuracy(self) -> float:
        """(TPR + 1 - FPR) / 2 at the best threshold, in [1/2, 1]."""
        return (1.0 + self.advantage) / 2.0

    def resolution(self, fpr: float) -> str:
        """How far `tpr_at(fpr)` can be trusted: "resolved", "weak" (fewer than ten false positives allowed) or
        "not resolvable" (not even one)."""
        allowed = _rate(fpr) * self.n_nonmembers
        # The slack forgives rounding: 0.01 * 100 samples is one false positive, whatever binary fractions say.
        return "not resolvable" if allowed < 1 - 1e-9 else "weak" if allowed < 10 - 1e-9 else "resolved"

    def tpr_at(self, fpr: float) -> float:
        """Largest true-positive rate of a threshold whose false-positive rate is at most `fpr`; no interpolation.

        NaN where `resolution(fpr)` is "not resolvable": fewer than 1 / fpr non-members cannot measure the rate.
        """
        if self.resolution(fpr) == "not resolvable":
            return math.nan
        return float(self.tpr[self.fpr <= fpr * (1 + 1e-12)].max())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists; a number that could not be resolved and an infinite threshold are None."""
        tpr_1 = self.tpr_at(0.01)
        return {
            "auc": self.auc,
            "advantage": self.advantage,
            "balanced_accuracy": self.balanced_accuracy,
            "tpr_at_1_percent_fpr": None if math.isnan(tpr_1) else tpr_1,
            "n_members": self.n_members,
            "n_nonmembers": self.n_nonmembers,
            "fpr": self.fpr.tolist(),
            "tpr": self.tpr.tolist(),
            "thresholds": [t if math.isfinite(t) else None for t in self.thresholds.tolist()],
        }


def roc(scores: object, labels: object) -> RocResult:
    """ROC curve and exact AUC of `scores` [N] (higher: more likely a member) for `labels` [N] (True: member).

    Ties count one half (Hanley & McNeil 1982), so the result does not depend on the order of the samples. Infinite
    scores are ranked. ValueError for NaN, for shapes that differ, and when members or non-members are absent.
    """
    array = as_scores(scores, "scores")
    member = as_labels(labels, array.size)
    n_members = int(member.sum())
    if n_members in (0, array.size):
        raise ValueError(f"labels need both members and non-members, got {n_members} members of {array.size} samples")
    if np.isnan(array).any():
        raise ValueError(f"scores hold {int(np.isnan(array).sum())} NaN of {array.size} values; they have no rank")
    fpr, tpr, thresholds = (np.asarray(a, dtype=np.float64) for a in _C.roc(array, member))
    return RocResult(
        auc=float(_C.auc(array, member)),
        fpr=fpr,
        tpr=tpr,
        thresholds=thresholds,
        n_members=n_members,
        n_nonmembers=array.size - n_members,
    )


def _rate(value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"a rate must be in [0, 1], got {value}")
    return float(value)
