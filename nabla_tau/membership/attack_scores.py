"""What every attack with one score a sample can do with its scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from nabla_tau.membership.bootstrap import bootstrap_auc
from nabla_tau.membership.curve import RocResult, roc
from nabla_tau.membership.outcome import Outcome, axes_or_new
from nabla_tau.membership.scores import as_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class AttackScores(Outcome):
    """score [N] float64, higher: more likely a member; NaN where there is too little to judge a sample by."""

    derived: ClassVar[tuple[str, ...]] = ("orientation", "n_nan")

    score: NDArray[np.float64]

    @property
    def orientation(self) -> str:
        return "higher: more likely a member"

    @property
    def n_nan(self) -> int:
        """Samples without a score."""
        return int(np.isnan(self.score).sum())

    def roc(self, members: object) -> RocResult:
        """ROC curve for the truth `members` [N]; samples without a score are left out."""
        return roc(*self._judged(members))

    def auc_interval(
        self, members: object, *, confidence: float = 0.95, replicates: int = 1000, random_state: int = 0
    ) -> tuple[float, float]:
        """Stratified bootstrap interval of the AUC over samples, for the models at hand; see `bootstrap_auc`."""
        score, member = self._judged(members)
        drawn = bootstrap_auc(
            {"attack": score[member]}, {"attack": score[~member]}, replicates=replicates, random_state=random_state
        )
        return drawn.interval("attack", confidence=confidence)

    def plot(self, ax: Axes | None = None, *, members: object = None) -> Axes:
        """Histogram of the scores, of `members` [N] and others apart if they are known."""
        return draw_scores(axes_or_new(ax), self.score, members, self.orientation)

    def _judged(self, members: object) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        member = as_labels(members, self.score.size)
        known = ~np.isnan(self.score)
        return self.score[known], member[known]


def draw_scores(ax: Axes, score: NDArray[np.float64], members: object, orientation: str) -> Axes:
    """Histogram of the finite scores [N], of `members` [N] and others apart unless that is None."""
    finite = np.isfinite(score)
    if members is None:
        ax.hist(score[finite], bins=60)
    else:
        member = as_labels(members, score.size)
        parts = [score[member & finite], score[~member & finite]]
        ax.hist(parts, bins=60, histtype="step", density=True, label=["members", "others"])
        ax.legend()
    ax.set_xlabel(f"score ({orientation})")
    return ax
