"""Attacks that compare a sample with a population or with reference models, and the p-value that comes with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nabla_tau.arguments import numbers_checked
from nabla_tau.membership.curve import resolution
from nabla_tau.membership.outcome import Outcome, axes_or_new
from nabla_tau.membership.scores import Array, as_classes, as_matrix, as_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class PopulationResult(Outcome):
    """Score and p-value of each sample [N]; higher scores mean members.

    p_value: (1 + number of the population at least as high) / (1 + size of the population): calling members those with
    p <= alpha has a false-positive rate of at most alpha, if non-members and population are alike. NaN targets have
    score NaN and p-value 1, and so have samples without a population. n_population: the smallest population that
    a sample was compared with; n_nan_population: values of it that were dropped; n_floored: samples whose spread was
    raised to the floor.
    """

    score: NDArray[np.float64]
    p_value: NDArray[np.float64]
    n_population: int
    n_nan: int
    n_nan_population: int
    n_floored: int = 0
    orientation: str = "higher scores mean members"

    def called(self, fpr: float) -> NDArray[np.bool_]:
        """Whether each sample is called a member at a false-positive rate of at most `fpr`."""
        called: NDArray[np.bool_] = self.p_value <= fpr
        return called

    def resolution(self, fpr: float) -> str:
        """How far `called(fpr)` can be trusted: "resolved", "weak" or "not resolvable", as `RocResult.resolution`."""
        return resolution(fpr, self.n_population)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Histogram of the p-values: flat for non-members, piled up near 0 for members."""
        ax = axes_or_new(ax)
        ax.hist(self.p_value, bins=np.linspace(0, 1, 41).tolist(), density=True)
        ax.axhline(1, color="grey", linestyle=":")
        ax.set(xlabel="p-value", ylabel="density")
        return ax


def attack_p(
    scores: object, population: object, *, classes: object = None, population_classes: object = None
) -> PopulationResult:
    """Attack-P (Ye et al. 2022): how high a sample's score [N] stands among those of non-members, population [P].

    score: share of the population below, ties one half; with classes [N] and population_classes [P], of the population
    of its class. A sort and a binary search in numpy, O((N + P) log P).
    """
    values, others = as_scores(scores, "scores"), as_scores(population, "population")
    if (classes is None) != (population_classes is None):
        raise ValueError("classes and population_classes must be given together")
    if classes is None:
        index, other_index = np.zeros(values.size, np.int64), np.zeros(others.size, np.int64)
    else:
        index = as_classes(classes, values.size)
        other_index = as_classes(population_classes, others.size, "population_classes")
    known = ~np.isnan(others)
    score, p_value = np.full(values.size, np.nan), np.ones(values.size)
    sizes = []
    for c in np.unique(index):
        these = np.flatnonzero((index == c) & ~np.isnan(values))
        ordered = np.sort(others[known & (other_index == c)])
        sizes.append(ordered.size)
        if ordered.size:
            below, upto = (np.searchsorted(ordered, values[these], side) for side in ("left", "right"))
            score[these] = (below + upto) / (2 * ordered.size)
            p_value[these] = (1 + ordered.size - below) / (1 + ordered.size)
    return PopulationResult(score, p_value, min(sizes), int(np.isnan(values).sum()), int((~known).sum()))


def attack_r(scores: object, references: object) -> PopulationResult:
    """Attack-R (Ye et al. 2022): share of the reference models, not trained on a sample, that score it at most as high.

    scores [N] of the target model, such as log p(x) (higher: more likely a member), references [R, N] of R models:
    Pr over theta' of [p(x | theta) / p(x | theta') >= 1]. Read one model at a time, so that a memory map is never held
    whole. NaN references are dropped, and counted. With R references no false-positive rate below 1 / R can be told.
    """
    values = as_scores(scores, "scores")
    table = as_matrix(references, "references", "[R, N]")
    if table.shape[1] != values.size:
        raise ValueError(f"references must have shape [R, {values.size}], got {list(table.shape)}")
    at_most, at_least, known = (np.zeros(values.size, np.int64) for _ in range(3))
    for row in table:
        at_most += row <= values
        at_least += row >= values
        known += ~np.isnan(row)
    usable = (known > 0) & ~np.isnan(values)
    score = np.full(values.size, np.nan)
    np.divide(at_most, known, out=score, where=usable)
    p_value = np.where(usable, (1 + at_least) / (1 + known), 1.0)
    return PopulationResult(
        score, p_value, int(known.min()), int(np.isnan(values).sum()), int(table.size - known.sum())
    )


@numbers_checked
def quantile_attack(
    scores: object,
    features: object,
    population_scores: object,
    population_features: object,
    *,
    regressor: Any = None,
    calibration: float = 0.25,
    random_state: int = 0,
) -> PopulationResult:
    """Quantile-regression attack (Bertran et al. 2023): is a score high for a non-member with these features?

    Quantiles of the score given the features are learnt on non-members, population_scores [P] and population_features
    [P, F]; the attack's score is (phi - mu(x)) / sigma(x) with mu the median and sigma the interquartile range over
    1.349, at least a thousandth of the population's. A share `calibration` of the population is kept from the
    regression and gives the p-values, which therefore hold however poor the regression is. regressor: an unfitted
    scikit-learn regressor with a parameter `quantile`; by default `HistGradientBoostingRegressor(loss="quantile")`.
    scores [N], features [N, F]. Population samples with NaN scores are dropped. ValueError for fewer than 40 others.
    """
    from sklearn.base import clone
    from sklearn.ensemble import HistGradientBoostingRegressor

    values, others = as_scores(scores, "scores"), as_scores(population_scores, "population_scores")
    x, z = as_matrix(features, "features", "[N, F]"), as_matrix(population_features, "population_features", "[P, F]")
    if len(x) != values.size or len(z) != others.size or x.shape[1] != z.shape[1]:
        raise ValueError(
            f"features must be those of the scores, got {list(x.shape)} for {values.size} scores and {list(z.shape)} "
            f"for {others.size} of the population"
        )
    if not 0.0 < calibration < 1.0:
        raise ValueError(f"calibration must be in (0, 1), got {calibration}")
    order = np.random.default_rng(random_state).permutation(np.flatnonzero(np.isfinite(others)))
    if order.size < 40:
        raise ValueError(f"the population must hold 40 or more finite scores, got {order.size}")
    kept, fitted = np.split(order, [max(1, round(calibration * order.size))])
    if regressor is None:
        regressor = HistGradientBoostingRegressor(loss="quantile", quantile=0.5, random_state=random_state)
    if not hasattr(regressor, "set_params"):
        raise TypeError(f"regressor must be an estimator of scikit-learn, got {type(regressor).__name__}")
    models = [clone(regressor).set_params(quantile=level).fit(z[fitted], others[fitted]) for level in (0.25, 0.5, 0.75)]
    floor = max(1e-3 * _spread(*np.quantile(others[fitted], [0.25, 0.75])), float(np.finfo(np.float64).tiny))

    def standardised(phi: Array, of: Array) -> tuple[NDArray[np.float64], int]:
        low, median, high = (model.predict(of) for model in models)
        spread = _spread(low, high)
        return (phi - median) / np.maximum(spread, floor), int((spread < floor).sum())

    own, n_floored = standardised(values, x)
    found = attack_p(own, standardised(others[kept], z[kept])[0])
    return PopulationResult(own, found.p_value, kept.size, found.n_nan, others.size - order.size, n_floored)


def _spread(low: Any, high: Any) -> Any:
    """Standard deviation of a Gaussian with these quartiles."""
    return (high - low) / 1.3489795003921634
