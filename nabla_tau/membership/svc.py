"""The support-vector attack that the unlearning literature reports as "MIA-efficacy"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nabla_tau.arguments import numbers_checked
from nabla_tau.membership.outcome import Outcome, axes_or_new, draw_estimates
from nabla_tau.membership.scores import Array, as_matrix, as_scores, clip_finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class SvcMiaResult(Outcome):
    """What a support-vector machine that tells retain from test samples says of the forgotten ones.

    efficacy: share of the forget set called non-member; compare it with a retrained model's figure, 1 is not the aim.
    interval: Clopper and Pearson's of the efficacy, at `confidence`, for this machine. retain_rate and test_rate:
    shares called member among the samples it was trained on; where they hardly differ the attack knows nothing, and
    its efficacy means nothing. n: samples taken of retain and of test each; n_non_finite: values clipped to the finite
    range of their feature.
    """

    efficacy: float
    interval: tuple[float, float]
    retain_rate: float
    test_rate: float
    n: int
    n_retain: int
    n_test: int
    n_forget: int
    n_non_finite: int
    confidence: float
    random_state: int

    def plot(self, ax: Axes | None = None) -> Axes:
        """Efficacy with its interval, between the shares called member that it has to be read against."""
        found = {
            "retain called member": (self.retain_rate, None),
            "forgotten called non-member": (self.efficacy, self.interval),
            "test called member": (self.test_rate, None),
        }
        ax = draw_estimates(axes_or_new(ax), found)
        ax.set(xlim=(0, 1), xlabel="share")
        return ax


@numbers_checked
def svc_mia(
    retain: object,
    test: object,
    forget: object,
    *,
    max_samples: int = 10_000,
    random_state: int = 0,
    confidence: float = 0.95,
) -> SvcMiaResult:
    """Membership attack of SalUn (Fan et al. 2024): `SVC(C=3, gamma="auto", kernel="rbf")` on retain against test.

    retain, test and forget: one signal of each sample [N] (papers print the one on p_y, "confidence") or features
    [N, F]; either orientation. The two training groups are balanced by subsampling, and cut to max_samples each, since
    time is quadratic. ValueError for sets that are empty or differ in features.
    """
    from scipy.stats import binomtest
    from sklearn.svm import SVC

    groups = [_features(x, name) for x, name in ((retain, "retain"), (test, "test"), (forget, "forget"))]
    if len({g.shape[1] for g in groups}) > 1:
        raise ValueError(f"retain, test and forget must have the same features, got {[g.shape[1] for g in groups]}")
    sizes = [len(g) for g in groups]
    n = min(sizes[0], sizes[1], max_samples)
    generator = np.random.default_rng(random_state)
    groups[:2] = [g if len(g) == n else g[generator.choice(len(g), n, replace=False)] for g in groups[:2]]
    train, judged, n_non_finite = _finite(np.concatenate(groups[:2]), groups[2])
    model = SVC(C=3, gamma="auto", kernel="rbf").fit(train, np.repeat([1, 0], n))
    called, forgotten = model.predict(train), int((model.predict(judged) == 0).sum())
    interval = binomtest(forgotten, sizes[2]).proportion_ci(confidence)
    return SvcMiaResult(
        efficacy=forgotten / sizes[2],
        interval=(float(interval.low), float(interval.high)),
        retain_rate=float(called[:n].mean()),
        test_rate=float(called[n:].mean()),
        n=n,
        n_retain=sizes[0],
        n_test=sizes[1],
        n_forget=sizes[2],
        n_non_finite=n_non_finite,
        confidence=confidence,
        random_state=random_state,
    )


def _features(values: object, name: str) -> Array:
    return as_scores(values, name)[:, None] if np.ndim(values) == 1 else as_matrix(values, name, "[N] or [N, F]")  # type: ignore[arg-type]


def _finite(train: Array, judged: Array) -> tuple[Array, Array, int]:
    columns = [clip_finite(train[:, f], judged[:, f]) for f in range(train.shape[1])]
    return (
        np.column_stack([c[0] for c in columns]),
        np.column_stack([c[1] for c in columns]),
        sum(c[2] for c in columns),
    )
