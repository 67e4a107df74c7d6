"""The receiver operating characteristic of a membership attack, ties grouped, from the C++ core."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nabla_tau import _C
from nabla_tau.membership.outcome import axes_or_new, plain
from nabla_tau.membership.scores import as_labels, as_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Counts = NDArray[np.int64]


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

    @property
    def auc_variance(self) -> float:
        """Variance of the AUC over other samples of the same kind (DeLong, DeLong and Clarke-Pearson 1988).

        var(V10) / M + var(V01) / N, where V10 is the share of non-members that a member beats, V01 the share of
        members that beat a non-member, ties one half. NaN with fewer than two samples on a side. It is 0 for perfect
        separation, which says only that these samples cannot tell.
        """
        if min(self.n_members, self.n_nonmembers) < 2:
            return math.nan
        tp, fp = _calls(self.tpr, self.n_members), _calls(self.fpr, self.n_nonmembers)
        variance = 0.0
        for counts, twice_wins, of, against in (
            (np.diff(tp), 2 * self.n_nonmembers - fp[1:] - fp[:-1], self.n_members, self.n_nonmembers),
            (np.diff(fp), tp[1:] + tp[:-1], self.n_nonmembers, self.n_members),
        ):
            deviation = twice_wins / (2 * against) - self.auc
            variance += float(counts @ deviation**2) / (of - 1) / of
        return variance

    def auc_interval(self, *, confidence: float = 0.95) -> tuple[float, float]:
        """Normal interval of the AUC by DeLong's variance, cut to [0, 1]; (NaN, NaN) where there is no variance."""
        half = NormalDist().inv_cdf((1 + _level(confidence)) / 2) * math.sqrt(self.auc_variance)
        if math.isnan(half):
            return math.nan, math.nan
        return max(self.auc - half, 0.0), min(self.auc + half, 1.0)

    @property
    def p_value(self) -> float:
        """Two-sided p-value of an AUC this far from 1/2, had membership no bearing on the scores: Mann and Whitney's
        test, with ties and the continuity correction, in its normal approximation."""
        m, n = self.n_members, self.n_nonmembers
        tied = (np.diff(_calls(self.tpr, m)) + np.diff(_calls(self.fpr, n))).astype(np.float64)
        total = m + n
        variance = m * n / 12 * ((total + 1) - float((tied**3 - tied).sum()) / (total * (total - 1)))
        distance = abs(self.auc - 0.5) * m * n - 0.5
        if variance <= 0 or distance <= 0:
            return 1.0
        return math.erfc(distance / math.sqrt(2 * variance))

    def reading(self, *, confidence: float = 0.95) -> str:
        """What the AUC says, both ways, where `p_value` is at most 1 - confidence: "members found" (above 1/2) or
        "over-unlearned" (below: members stand out by scoring too low, the Streisand effect); else "no evidence"."""
        if self.p_value > 1 - _level(confidence):
            return "no evidence"
        return "members found" if self.auc > 0.5 else "over-unlearned"

    def resolution(self, fpr: float) -> str:
        """How far `tpr_at(fpr)` can be trusted: "resolved", "weak" (fewer than ten false positives allowed) or
        "not resolvable" (not even one)."""
        return resolution(fpr, self.n_nonmembers)

    def tpr_at(self, fpr: float) -> float:
        """Largest true-positive rate of a threshold whose false-positive rate is at most `fpr`; no interpolation.

        NaN where `resolution(fpr)` is "not resolvable": fewer than 1 / fpr non-members cannot measure the rate.
        """
        if self.resolution(fpr) == "not resolvable":
            return math.nan
        return float(self.tpr[self.fpr <= fpr * (1 + 1e-12)].max())

    def plot(self, ax: Axes | None = None) -> Axes:
        """The curve on logarithmic axes, where low false-positive rates show, with chance beside it."""
        ax = axes_or_new(ax)
        low = 0.5 / self.n_nonmembers
        ax.plot(self.fpr, self.tpr, drawstyle="steps-post", label=f"AUC {self.auc:.3f}")
        ax.plot([low, 1], [low, 1], color="grey", linestyle=":", label="chance")
        ax.set(xscale="log", yscale="log", xlim=(low, 1), ylim=(low, 1))
        ax.set(xlabel="false-positive rate", ylabel="true-positive rate")
        ax.legend()
        return ax

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists; a number that could not be resolved and an infinite threshold are None."""
        found: dict[str, Any] = plain(
            {
                "auc": self.auc,
                "auc_interval": self.auc_interval(),
                "p_value": self.p_value,
                "reading": self.reading(),
                "advantage": self.advantage,
                "balanced_accuracy": self.balanced_accuracy,
                "tpr_at_1_percent_fpr": self.tpr_at(0.01),
                "resolution_at_1_percent_fpr": self.resolution(0.01),
                "n_members": self.n_members,
                "n_nonmembers": self.n_nonmembers,
                "orientation": "higher scores mean members",
                "fpr": self.fpr,
                "tpr": self.tpr,
                "thresholds": self.thresholds,
            }
        )
        return found


def roc(scores: object, labels: object) -> RocResult:
    """ROC curve and exact AUC of `scores` [N] (higher: more likely a member) for `labels` [N] (True: member).

    Ties count one half (Hanley & McNeil 1982), so the result does not depend on the order of the samples. Infinite
    scores are ranked. ValueError for NaN, for shapes that differ, and when members or non-members are absent.
    """
    array = as_scores(scores, "scores")
    member = as_labels(labels, array.size)
    n_members = int(member.sum())
    n_nonmembers = array.size - n_members
    if n_members == 0 or n_nonmembers == 0:
        raise ValueError(f"labels need both members and non-members, got {n_members} members of {array.size} samples")
    if np.isnan(array).any():
        raise ValueError(f"scores hold {int(np.isnan(array).sum())} NaN of {array.size} values; they have no rank")
    fpr, tpr, thresholds, auc = _C.roc(array, member)
    return RocResult(
        auc=auc,
        fpr=fpr,
        tpr=tpr,
        thresholds=thresholds,
        n_members=n_members,
        n_nonmembers=n_nonmembers,
    )


def resolution(fpr: float, n_nonmembers: int) -> str:
    """How far a rate of `fpr` can be measured on so many non-members: "resolved", "weak" (fewer than ten of them are
    allowed above the threshold) or "not resolvable" (not even one)."""
    allowed = _rate(fpr) * n_nonmembers
    # The slack forgives rounding: 0.01 * 100 samples is one false positive, whatever binary fractions say.
    return "not resolvable" if allowed < 1 - 1e-9 else "weak" if allowed < 10 - 1e-9 else "resolved"


def _calls(rate: NDArray[np.float64], n: int) -> _Counts:
    """The counts behind rates that are k / n."""
    counts: _Counts = np.rint(rate * n).astype(np.int64)
    return counts


def _rate(value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"a rate must be in [0, 1], got {value}")
    return float(value)


def _level(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    return confidence
