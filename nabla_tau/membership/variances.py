"""How wide a group's scores spread: from each sample alone, from all samples, from its class, or shrunk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import digamma, polygamma

from nabla_tau.membership.cells import blocks
from nabla_tau.membership.groups import Doubles, GroupStats

Rule = Literal["example", "global", "class", "shrink"]

# A group of scores is not narrower than a hundredth of the usual spread of such groups: what looks narrower comes from
# few models or from rounding, and would make single samples infinitely certain.
_FLOOR = 1e-4
_SMALLEST = 1e-12


class Prior(NamedTuple):
    """Scaled inverse chi-square distribution of variances over samples: its degrees of freedom and its scale."""

    dof: float
    variance: float


class Spread(NamedTuple):
    """variance: squared scale of a score's predictive distribution; dof: of its Student t, None for a Gaussian."""

    variance: Doubles
    dof: Doubles | None
    floored: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Variances:
    """A rule, with what it learned from all samples; the pairs are (out, in)."""

    rule: Rule
    pooled: tuple[float, float]
    floor: tuple[float, float]
    by_class: Doubles | None = None
    classes: NDArray[np.intp] | None = None
    priors: tuple[Prior, Prior] | None = None

    def at(self, stats: GroupStats, g: int, part: slice) -> Spread:
        """Of group g, for a block of samples: arrays like its scores. NaN with fewer than two models."""
        count = stats.count[g, part]
        m2 = stats.m2[g, part]
        dof: Doubles = count - np.float64(1)
        scored = dof >= 1
        t_dof: Doubles | None = None
        if self.rule == "example":
            variance = m2 / np.maximum(dof, 1)
        elif self.rule == "global":
            variance = np.full(count.shape, self.pooled[g])
        elif self.rule == "class":
            assert self.by_class is not None
            assert self.classes is not None
            variance = np.broadcast_to(over_queries(self.by_class[g][self.classes[part]], count), count.shape)
        else:
            assert self.priors is not None
            prior = self.priors[g]
            # What the mean does not know of itself widens the prediction.
            variance = prior_mean(prior, m2, dof) * (1 + 1 / np.maximum(count, 1))
            t_dof = prior.dof + dof
        floored = scored & (variance < self.floor[g])
        variance = np.where(scored, np.maximum(variance, self.floor[g]), np.nan)
        return Spread(variance, t_dof, floored)


def fit_variances(
    stats: GroupStats, rule: Rule, *, classes: NDArray[np.intp] | None = None, floor: float | None = None
) -> Variances:
    """What `rule` needs to know of all samples. floor: smallest variance, by default 1e-4 of the pooled one."""
    pooled = _pair(lambda g: _pooled(stats, g))
    floors = _pair(lambda g: floor if floor is not None else max(_FLOOR * pooled[g], _SMALLEST))
    by_class = None
    if rule == "class":
        assert classes is not None
        by_class = np.stack([_by_class(stats, g, classes) for g in (0, 1)])
    priors = (_fit_prior(stats, 0, floors[0]), _fit_prior(stats, 1, floors[1])) if rule == "shrink" else None
    return Variances(rule, pooled, floors, by_class, classes, priors)


def prior_mean(prior: Prior, m2: Doubles, dof: Doubles) -> Doubles:
    """Variance expected of a sample whose squared differences sum to m2 (Smyth 2004, equation 3)."""
    if math.isinf(prior.dof):
        return np.full(np.shape(m2), prior.variance)
    mean: Doubles = (prior.dof * prior.variance + m2) / (prior.dof + np.maximum(dof, 0))
    return mean


def over_queries(values: Doubles, like: NDArray[np.int32]) -> Doubles:
    return values if like.ndim == 1 else values[:, None]


def _pair(f: object) -> tuple[float, float]:
    assert callable(f)
    return float(f(0)), float(f(1))


def _pooled(stats: GroupStats, g: int) -> float:
    total, dof = 0.0, 0
    for part in blocks(stats.shape[0], _width(stats)):
        count = stats.count[g, part]
        total += float(stats.m2[g, part].sum())
        dof += int(np.maximum(count - 1, 0).sum(dtype=np.int64))
    return total / dof if dof else math.nan


def _by_class(stats: GroupStats, g: int, classes: NDArray[np.intp]) -> Doubles:
    size = int(classes.max(initial=0)) + 1
    m2 = stats.m2[g].reshape(len(classes), -1).sum(1)
    dof = np.maximum(stats.count[g] - 1, 0).reshape(len(classes), -1).sum(1)
    dofs = np.bincount(classes, dof, size)
    return np.where(dofs > 0, np.bincount(classes, m2, size) / np.maximum(dofs, 1), np.nan)


def _fit_prior(stats: GroupStats, g: int, floor: float) -> Prior:
    """Moments of log variances (Smyth 2004, section 6.2): what they vary beyond chance is the prior's width."""
    n, total, squares, chance = 0, 0.0, 0.0, 0.0
    for part in blocks(stats.shape[0], _width(stats)):
        known = stats.count[g, part] >= 2
        half = (stats.count[g, part][known] - 1) / 2
        logs = np.log(np.maximum(stats.m2[g, part][known] / (2 * half), floor)) - digamma(half) + np.log(half)
        n, total, squares = n + logs.size, total + logs.sum(), squares + (logs**2).sum()
        chance += polygamma(1, half).sum()
    if n < 2:
        return Prior(math.inf, math.nan if n == 0 else math.exp(total))
    mean = total / n
    excess = (squares - n * mean**2) / (n - 1) - chance / n
    if excess <= 0:
        return Prior(math.inf, math.exp(mean))
    half_dof = _inverse_trigamma(excess)
    return Prior(2 * half_dof, math.exp(mean + float(digamma(half_dof)) - math.log(half_dof)))


def _inverse_trigamma(value: float) -> float:
    """x with trigamma(x) = value, by Newton's method on 1 / trigamma, which is nearly linear."""
    x = 0.5 + 1 / value
    for _ in range(50):
        trigamma = float(polygamma(1, x))
        step = trigamma * (1 - trigamma / value) / float(polygamma(2, x))
        x += step
        if abs(step) < 1e-10 * x:
            break
    return x


def _width(stats: GroupStats) -> int:
    return int(np.prod(stats.shape[1:], dtype=np.int64))
