"""What every attack with one score a sample can do with its scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nabla_tau.membership.bootstrap import bootstrap_auc
from nabla_tau.membership.curve import RocResult, roc
from nabla_tau.membership.scores import as_labels


@dataclass(frozen=True, eq=False)
class AttackScores:
    """score [N] float64, higher: more likely a member; NaN where there is too little to judge a sample by."""

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

    def plot(self, ax: Any = None, *, members: object = None) -> Any:
        """Histogram of the scores, of members and others apart if they are known; returns the axes."""
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.subplots()[1]
        if members is None:
            ax.hist(self.score[np.isfinite(self.score)], bins=60)
        else:
            score, member = self._judged(members)
            finite = np.isfinite(score)
            parts = [score[member & finite], score[~member & finite]]
            ax.hist(parts, bins=60, histtype="step", density=True, label=["members", "others"])
            ax.legend()
        ax.set_xlabel(f"score ({self.orientation})")
        return ax

    def _judged(self, members: object) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        member = as_labels(members, self.score.size)
        known = ~np.isnan(self.score)
        return self.score[known], member[known]
