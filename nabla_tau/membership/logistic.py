"""The simple attack of the unlearning literature: logistic regression on one number per sample, cross-validated."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nabla_tau.arguments import numbers_checked
from nabla_tau.membership.outcome import Outcome, axes_or_new, draw_estimates
from nabla_tau.membership.scores import as_scores, clip_finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_SAMPLES = 20
N_SPLITS = 10


@dataclass(frozen=True)
class MiaResult(Outcome):
    """Accuracy of the simple attack over its ten splits; 1/2 is chance, and below 1/2 is chance too.

    n: samples taken of each class after balancing; n_non_finite: values clipped to the finite range before that;
    converged: whether every one of the ten fits did.
    """

    accuracy: float
    std: float
    n: int
    n_members: int
    n_nonmembers: int
    n_non_finite: int
    converged: bool
    random_state: int

    def plot(self, ax: Axes | None = None) -> Axes:
        """Mean accuracy and one standard deviation of the splits to either side; 1/2 is chance."""
        found = {"accuracy": (self.accuracy, (self.accuracy - self.std, self.accuracy + self.std))}
        return draw_estimates(axes_or_new(ax), found, reference=0.5)


@numbers_checked
def simple_mia(members: object, nonmembers: object, *, random_state: int = 0) -> MiaResult:
    """Simple membership-inference attack on one signal (a loss or an entropy; either orientation) per sample.

    members [M] and nonmembers [N] are balanced by subsampling the larger without replacement, then
    `LogisticRegression()` is scored by accuracy over `StratifiedShuffleSplit(10, random_state=random_state)`: the
    protocol of the NeurIPS 2023 unlearning challenge's starting kit, which nabla-tau reports (Trippa et al. 2024).
    The regression's penalty acts on the raw scale of the signal, as published, so that even separated classes may fall
    short of 1; the AUC has no such scale. Non-finite values are clipped to the finite range of both sets and counted
    in the result. ValueError for fewer than 20 samples on either side (a test split of a tenth would then hold less
    than two of each) or no finite value at all.
    """
    # Imported here: scikit-learn takes about a second, which `import nabla_tau` should not pay.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    x_in, x_out = as_scores(members, "members"), as_scores(nonmembers, "nonmembers")
    n = min(x_in.size, x_out.size)
    if n < MIN_SAMPLES:
        raise ValueError(
            f"the attack needs at least {MIN_SAMPLES} members and {MIN_SAMPLES} non-members, "
            f"got {x_in.size} and {x_out.size}"
        )
    n_members, n_nonmembers = x_in.size, x_out.size
    x_in, x_out, n_non_finite = clip_finite(x_in, x_out)
    generator = np.random.default_rng(random_state)
    x_in, x_out = (x if x.size == n else x[generator.choice(x.size, n, replace=False)] for x in (x_in, x_out))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        accuracy = cross_val_score(
            LogisticRegression(),
            np.concatenate([x_in, x_out])[:, None],
            np.repeat([1, 0], n),
            cv=StratifiedShuffleSplit(N_SPLITS, random_state=random_state),
            scoring="accuracy",
        )
    return MiaResult(
        accuracy=float(accuracy.mean()),
        std=float(accuracy.std()),
        n=n,
        n_members=n_members,
        n_nonmembers=n_nonmembers,
        n_non_finite=n_non_finite,
        converged=not any(issubclass(w.category, ConvergenceWarning) for w in caught),
        random_state=random_state,
    )
