"""Forgetting quality of the NeurIPS 2023 unlearning competition, always beside what a perfect method would score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from nabla_tau import _C
from nabla_tau.arguments import numbers_checked
from nabla_tau.membership.cells import as_cells, threads
from nabla_tau.membership.outcome import Outcome, axes_or_new
from nabla_tau.membership.relabelling import relabelled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Doubles = NDArray[np.float64]

# Of the competition: epsilons are cut here, and points halve every half unit of epsilon.
_CAP = 50.0
_BIN = 0.5


@dataclass(frozen=True, eq=False)
class ForgettingResult(Outcome):
    """epsilon [N]: what the best attack on a sample shows, NaN where none errs on both sides; H [N]: its points,
    1, 1/2, 1/4 ... for each half unit of epsilon and 0 beyond what so many models can show. F: mean of H times
    `utility`; higher is better forgotten. F_null: F of a method that is as good as retraining, from relabelled models,
    with its 95 % interval: compare F with it, not with 1. resolution: the largest finite epsilon of so many models.
    """

    derived = ("orientation", "resolution", "resolvable")

    epsilon: Doubles
    H: Doubles
    F: float
    F_null: float
    F_null_interval: tuple[float, float]
    utility: float
    rule: Literal["exact", "kaggle"]
    delta: float
    n_unlearned: int
    n_retrained: int
    n_undecided: int
    n_dropped: int
    n_null: int
    random_state: int

    @property
    def orientation(self) -> str:
        return "epsilon: higher, more told apart from retrained models; F: higher, better forgotten"

    @property
    def resolution(self) -> float:
        n = min(self.n_unlearned, self.n_retrained)
        return math.log(n * (1 - self.delta) - 1) if n * (1 - self.delta) > 1 else 0.0

    @property
    def resolvable(self) -> bool:
        """Whether so many models leave room for more than two steps of points."""
        return self.resolution >= 2 * _BIN

    def plot(self, ax: Axes | None = None) -> Axes:
        """Histogram of epsilon over samples."""
        ax = axes_or_new(ax)
        ax.hist(np.minimum(self.epsilon[~np.isnan(self.epsilon)], self.resolution + 1), bins=40)
        ax.set_xlabel("epsilon of the best attack on a sample")
        ax.set_title(f"F = {self.F:.3f}, of a perfect method {self.F_null:.3f}")
        return ax


@numbers_checked
def neurips_forgetting(
    unlearned: object,
    retrained: object,
    *,
    delta: float = 1e-5,
    rule: Literal["exact", "kaggle"] = "exact",
    retain_accuracy: tuple[float, float] | None = None,
    test_accuracy: tuple[float, float] | None = None,
    null_samples: int = 256,
    random_state: int = 0,
) -> ForgettingResult:
    """How well attacks on single samples tell unlearned from retrained models (Triantafillou et al. 2024).

    unlearned [Mu, N] and retrained [Mr, N]: logit margins of the N forget samples, one dtype. For each sample,
    epsilon = max over attacks of log (1 - delta - FPR) / FNR and log (1 - delta - FNR) / FPR, infinite where both rates
    are 0 and not counted where one is; capped at 50. rule: "exact", one threshold, at every margin; "kaggle", the
    competition's code: one threshold on a grid and pairs of thresholds on grids, 50 for a group that is a hundred times
    narrower than the other. Taking the best of many attacks on few models finds an epsilon even where there is none,
    hence F_null, from `null_samples` samples whose models are relabelled at random.
    retain_accuracy, test_accuracy: (unlearned, retrained) pairs, whose ratios multiply F.
    Margins that are not finite are dropped and counted. TypeError for another dtype, ValueError for another shape or
    fewer than three models in a group.
    """
    first, second = as_cells(unlearned, "unlearned", "M, N"), as_cells(retrained, "retrained", "M, N")
    if min(len(first), len(second)) < 3:
        raise ValueError(f"each group needs at least three models, got {len(first)} and {len(second)}")
    if rule not in ("exact", "kaggle"):
        raise ValueError(f'rule must be "exact" or "kaggle", got {rule!r}')
    exact = rule == "exact"
    epsilon = _C.forgetting_epsilon(first, second, exact, delta, _CAP, threads())
    null = _C.forgetting_epsilon(*relabelled(first, second, null_samples, random_state), exact, delta, _CAP, threads())
    largest = math.ceil(math.log(min(len(first), len(second)) - 1))
    points, null_points = _points(epsilon, largest), _points(null, largest)
    utility = _ratio(retain_accuracy, "retain_accuracy") * _ratio(test_accuracy, "test_accuracy")
    null_mean, null_sd, n_null = _mean_sd(null_points)
    margin = 1.96 * null_sd / math.sqrt(n_null) if n_null else math.nan
    return ForgettingResult(
        epsilon=epsilon,
        H=points,
        F=_mean_sd(points)[0] * utility,
        F_null=null_mean * utility,
        F_null_interval=((null_mean - margin) * utility, (null_mean + margin) * utility),
        utility=utility,
        rule=rule,
        delta=delta,
        n_unlearned=len(first),
        n_retrained=len(second),
        n_undecided=int(np.isnan(epsilon).sum()),
        n_dropped=_not_finite(first) + _not_finite(second),
        n_null=n_null,
        random_state=random_state,
    )


def _points(epsilon: Doubles, largest: int) -> Doubles:
    bin_of = np.floor(epsilon / _BIN)
    return np.where(np.isnan(epsilon), np.nan, np.where((bin_of + 1) * _BIN <= largest, 0.5**bin_of, 0.0))


def _ratio(pair: tuple[float, float] | None, name: str) -> float:
    if pair is None:
        return 1.0
    mine, other = pair
    if not (mine >= 0 and other > 0):
        raise ValueError(f"{name} must be (unlearned, retrained) accuracies, got {pair}")
    return mine / other


def _mean_sd(points: Doubles) -> tuple[float, float, int]:
    known = points[~np.isnan(points)]
    if not known.size:
        return math.nan, math.nan, 0
    return float(known.mean()), float(known.std(ddof=1)) if known.size > 1 else 0.0, known.size


def _not_finite(margins: NDArray[Any]) -> int:
    return sum(int(row.size - np.isfinite(row).sum()) for row in margins)
