"""Lower bounds on the epsilon of differential privacy that an attack proves, from its scores.

(epsilon, delta) of differential privacy limits every attack: TPR <= e^epsilon FPR + delta, and the same of the rates
at which it is wrong. An attack that does better shows a larger epsilon. What a bound assumes of the samples differs;
each function says it. Scores are oriented so that higher means a member: where members score lower (over-unlearned),
negate them, for that gives membership away just as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nabla_tau.arguments import numbers_checked
from nabla_tau.membership.curve import roc
from nabla_tau.membership.outcome import Outcome, axes_or_new, draw_estimates
from nabla_tau.membership.scores import Array, as_labels, as_scores, refuse_nan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LARGEST_EPSILON = 50.0


@dataclass(frozen=True)
class EpsilonBound(Outcome):
    """epsilon: lower bound at `confidence` on the epsilon of any (epsilon, delta) guarantee that can hold; 0: none.

    ceiling: the bound a perfect attack would have given from as many samples; an epsilon beyond it cannot be shown.
    resolvable: whether that is above 0. upper: end of the Bayesian interval, None for the other methods. threshold:
    that of the rule behind the bound; true_positives of n_members and false_positives of n_nonmembers are at or above
    it. tests: rules among which the best was taken, which the bound allows for.
    """

    epsilon: float
    upper: float | None
    ceiling: float
    resolvable: bool
    delta: float
    confidence: float
    method: str
    threshold: float | None
    true_positives: int
    n_members: int
    false_positives: int
    n_nonmembers: int
    tests: int
    random_state: int | None
    orientation: str = "higher scores mean members"

    def plot(self, ax: Axes | None = None) -> Axes:
        """From the bound to what could have been shown at most, or to the end of the Bayesian interval."""
        most = self.ceiling if self.upper is None else self.upper
        ax = draw_estimates(axes_or_new(ax), {self.method: (self.epsilon, (self.epsilon, most))})
        ax.set(xlim=(0, None), xlabel=f"epsilon at delta {self.delta:g}, confidence {self.confidence:g}")
        return ax


@dataclass(frozen=True)
class Rule:
    """Calls at or above a threshold, and upper bounds of both error rates that hold together (NaN: none taken)."""

    threshold: float
    true_positives: int
    n_members: int
    false_positives: int
    n_nonmembers: int
    fnr: float = math.nan
    fpr: float = math.nan

    def epsilon(self, delta: float) -> float:
        return max(_log_ratio(1 - delta - a, b) for a, b in ((self.fnr, self.fpr), (self.fpr, self.fnr)))


@numbers_checked
def eps_clopper_pearson(
    scores: object,
    labels: object,
    *,
    delta: float = 0.0,
    confidence: float = 0.95,
    threshold: float | None = None,
    selection: str = "bonferroni",
    random_state: int = 0,
) -> EpsilonBound:
    """epsilon >= log((1 - FNR_ub - delta) / FPR_ub), or the same with the rates exchanged, by Clopper and Pearson.

    scores [N], labels [N] (True: member): independent trials, such as one sample in each of many models. Samples of one
    model are not independent; `eps_one_run` is for those. A `threshold` given beforehand costs nothing. Otherwise the
    best of several rules is taken: with selection="bonferroni" of thresholds at fixed ranks of either group, about
    3 log2 of its size, each at its share of the error (the false-positive rate above the r-th highest non-member is at
    most Beta(r, N - r + 1), an exact bound, and the members are independent of it); with "split" the rule that does
    best on a random half is judged on the other. ValueError for NaN and when a class is absent.
    """
    members, nonmembers = _groups(scores, labels)
    check_levels(delta, confidence)
    tail = (1 - confidence) / 2
    if threshold is None and selection == "bonferroni":
        ranks = _ranks(members.size), _ranks(nonmembers.size)
        tests = ranks[0].size + ranks[1].size
        rules = list(_rules_at_ranks(members, nonmembers, *ranks, tail / tests))
        perfect = _perfect(members.size, nonmembers.size, tail / tests, delta)
        method = "Clopper-Pearson, Bonferroni"
    elif threshold is not None or selection == "split":
        method = "Clopper-Pearson, threshold given"
        if threshold is None:
            members, nonmembers, threshold = _split(members, nonmembers, tail, delta, random_state)
            method = "Clopper-Pearson, split"
        tests = 1
        rules = [_rule_at(members, nonmembers, threshold, tail)]
        perfect = _perfect(members.size, nonmembers.size, tail, delta)
    else:
        raise ValueError(f"selection must be 'bonferroni' or 'split', got {selection!r}")
    best = max(rules, key=lambda rule: rule.epsilon(delta))
    return bound_of(best, best.epsilon(delta), None, perfect, delta, confidence, method, tests, random_state)


@numbers_checked
def eps_bayes(
    scores: object,
    labels: object,
    *,
    delta: float = 0.0,
    confidence: float = 0.95,
    threshold: float | None = None,
    random_state: int = 0,
) -> EpsilonBound:
    """Posterior of epsilon (Zanella-Beguelin et al. 2023): `epsilon` and `upper` are its quantiles at 1 - confidence
    and at confidence, so that epsilon lies above the first with that probability.

    FNR and FPR have Jeffreys' posterior Beta(k + 1/2, n - k + 1/2), independently; epsilon is the smallest that allows
    both, max(log((1 - delta - FPR) / FNR), log((1 - delta - FNR) / FPR), 0). Its distribution is a one-dimensional
    integral, taken by Gauss-Legendre quadrature on both sides of its only kink. A credible bound is no confidence
    bound: where both directions are equally strong the larger of two noisy figures leans upwards (of bounds at 80 % on
    randomised response a third, not a fifth, lie above its epsilon). scores, labels and threshold as for
    `eps_clopper_pearson`; without a threshold the one that does best on a random half is judged on the other.
    """
    members, nonmembers = _groups(scores, labels)
    check_levels(delta, confidence)
    given = threshold is not None
    if threshold is None:
        members, nonmembers, threshold = _split(members, nonmembers, (1 - confidence) / 2, delta, random_state)
    rule = _rule_at(members, nonmembers, threshold, (1 - confidence) / 2)

    def quantile(missed: int, false: int, level: float) -> float:
        cdf = _posterior(missed, members.size, false, nonmembers.size, delta)
        return largest_epsilon(lambda epsilon: cdf(epsilon) < level)

    missed = rule.n_members - rule.true_positives
    low, high = (quantile(missed, rule.false_positives, level) for level in (1 - confidence, confidence))
    ceiling = quantile(0, 0, 1 - confidence)
    method = f"Bayesian, {'threshold given' if given else 'split'}"
    return bound_of(rule, low, high, ceiling, delta, confidence, method, 1, random_state)


def _posterior(missed: int, n_members: int, false: int, n_nonmembers: int, delta: float) -> Callable[[float], float]:
    """P(epsilon <= e) as a function of e."""
    from scipy.special import betainc, betaincinv

    fnr = (missed + 0.5, n_members - missed + 0.5)
    fpr = (false + 0.5, n_nonmembers - false + 0.5)
    nodes, weights = np.polynomial.legendre.leggauss(200)

    def cdf(epsilon: float) -> float:
        shrink = math.exp(-epsilon)
        # epsilon is allowed where FNR is at least both lines; they cross at this FPR.
        kink = betainc(*fpr, (1 - delta) * shrink / (1 + shrink))
        total = 0.0
        for low, high in ((0.0, kink), (kink, 1.0)):
            x = betaincinv(*fpr, low + (high - low) * (nodes + 1) / 2)
            needed = np.clip(np.maximum((1 - delta - x) * shrink, 1 - delta - x / shrink), 0, 1)
            total += (high - low) / 2 * float(weights @ (1 - betainc(*fnr, needed)))
        return total

    return cdf


def largest_epsilon(holds: Callable[[float], bool]) -> float:
    """The largest epsilon up to which `holds`, which does below some value and not above it; 0 if it never does."""
    if not holds(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < _LARGEST_EPSILON and holds(high):
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _rules_at_ranks(
    members: Array, nonmembers: Array, member_ranks: NDArray[np.int64], nonmember_ranks: NDArray[np.int64], tail: float
) -> Iterator[Rule]:
    """Thresholds just above the r-th highest non-member, and at the s-th lowest member."""
    m, n = members.size, nonmembers.size
    for r in nonmember_ranks.tolist():
        limit = nonmembers[n - r]
        tp = m - int(np.searchsorted(members, limit, "right"))
        # r - 1 stands for the number above it: by ties there may be fewer, on which no bound could build.
        fp = n - int(np.searchsorted(nonmembers, limit, "right"))
        threshold = float(np.nextafter(limit, limit.dtype.type(np.inf)))
        yield Rule(threshold, tp, m, fp, n, _at_most(m - tp, m, tail), _at_most(r - 1, n, tail))
    for s in member_ranks.tolist():
        limit = members[s - 1]
        tp = m - int(np.searchsorted(members, limit, "left"))
        fp = n - int(np.searchsorted(nonmembers, limit, "left"))
        yield Rule(float(limit), tp, m, fp, n, _at_most(s - 1, m, tail), _at_most(fp, n, tail))


def _rule_at(members: Array, nonmembers: Array, threshold: float, tail: float) -> Rule:
    tp, fp = int((members >= threshold).sum()), int((nonmembers >= threshold).sum())
    m, n = members.size, nonmembers.size
    return Rule(threshold, tp, m, fp, n, _at_most(m - tp, m, tail), _at_most(fp, n, tail))


def _split(
    members: Array, nonmembers: Array, tail: float, delta: float, random_state: int
) -> tuple[Array, Array, float]:
    """Another random half of either group, and the threshold that does best on the first."""
    if min(members.size, nonmembers.size) < 2:
        raise ValueError(f"two of each group are needed to split, got {members.size} and {nonmembers.size}")
    generator = np.random.default_rng(random_state)
    (m_a, m_b), (n_a, n_b) = (np.array_split(generator.permutation(x), 2) for x in (members, nonmembers))
    curve = roc(np.concatenate([m_a, n_a]), np.repeat([True, False], [m_a.size, n_a.size]))
    fnr = _at_most(np.rint((1 - curve.tpr[1:]) * m_a.size), m_a.size, tail)
    fpr = _at_most(np.rint(curve.fpr[1:] * n_a.size), n_a.size, tail)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.fmax((1 - delta - fnr) / fpr, (1 - delta - fpr) / fnr)
    return m_b, n_b, float(curve.thresholds[1:][np.argmax(ratio)])


def _at_most(count: float | NDArray[np.float64], n: int, tail: float) -> Any:
    """Clopper and Pearson's upper bound of a rate, `count` of n, wrong with probability `tail`."""
    from scipy.special import betaincinv

    inside = np.minimum(count, n - 1)
    return np.where(np.asarray(count) >= n, 1.0, betaincinv(inside + 1.0, n - inside, 1 - tail))[()]


def _perfect(n_members: int, n_nonmembers: int, tail: float, delta: float) -> float:
    fnr, fpr = _at_most(0, n_members, tail), _at_most(0, n_nonmembers, tail)
    return max(_log_ratio(1 - delta - fnr, fpr), _log_ratio(1 - delta - fpr, fnr))


def _log_ratio(above: float, below: float) -> float:
    return max(0.0, math.log(above / below)) if above > 0 else 0.0


def _ranks(n: int) -> NDArray[np.int64]:
    """Fixed ranks of a group of n, three to a doubling."""
    grid = np.geomspace(1, n, 1 + math.ceil(3 * math.log2(n + 1)))
    ranks: NDArray[np.int64] = np.unique(grid.round().astype(np.int64))
    return ranks


def _groups(scores: object, labels: object) -> tuple[Array, Array]:
    """Members and non-members, each sorted."""
    values = refuse_nan(as_scores(scores, "scores"), "scores")
    member = as_labels(labels, values.size)
    groups = np.sort(values[member]), np.sort(values[~member])
    if not groups[0].size or not groups[1].size:
        raise ValueError(f"labels need both members and non-members, got {groups[0].size} of {values.size}")
    return groups


def check_levels(delta: float, confidence: float) -> None:
    if not 0.0 <= delta < 1.0:
        raise ValueError(f"delta must be in [0, 1), got {delta}")
    if not 0.5 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0.5, 1), got {confidence}")


def bound_of(
    rule: Rule,
    epsilon: float,
    upper: float | None,
    ceiling: float,
    delta: float,
    confidence: float,
    method: str,
    tests: int,
    random_state: int,
) -> EpsilonBound:
    return EpsilonBound(
        epsilon=float(epsilon),
        upper=upper,
        ceiling=float(ceiling),
        resolvable=ceiling > 0,
        delta=delta,
        confidence=confidence,
        method=method,
        threshold=rule.threshold,
        true_positives=rule.true_positives,
        n_members=rule.n_members,
        false_positives=rule.false_positives,
        n_nonmembers=rule.n_nonmembers,
        tests=tests,
        random_state=random_state,
    )
