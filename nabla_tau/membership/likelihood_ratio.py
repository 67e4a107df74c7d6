"""Likelihood-ratio attack: is a score more likely under models trained on the sample, or under the others?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, log_ndtr, stdtr

from nabla_tau.arguments import check_kind, numbers_checked
from nabla_tau.membership.attack_scores import AttackScores
from nabla_tau.membership.cells import Array, as_cells, as_view, blocks
from nabla_tau.membership.groups import Center, Doubles, GroupStats, two_group_stats
from nabla_tau.membership.joint import fit_covariances
from nabla_tau.membership.plot_py import plot_py_scores
from nabla_tau.membership.variances import Prior, Rule, Spread, Variances, fit_variances

Mode = Literal["online", "offline", "offline_two_sided"]

# Below so many models a sample's own variance says little (AUC at 8 models: .675 by example, .702 shrunk).
_FEW_MODELS = 16
# Beyond so many degrees of freedom a Student t is a Gaussian to rounding.
_MANY_DOF = 1e7


@dataclass(frozen=True, eq=False)
class LiraResult(AttackScores):
    """score [N] of `lira`. floored [N]: a variance was below the floor (out, in) and was raised to it.

    n_in, n_out [N]: models behind each sample's score. n_dropped: scores of models that were not used. n_too_few:
    samples that have fewer than two models in a group that counts; their score is NaN. prior (out, in): what shrinking
    found.
    """

    derived = (*AttackScores.derived, "n_floored")

    mode: Mode
    variance: Rule
    queries: Literal["mean", "joint"]
    center: Center
    compat: str | None
    n_in: NDArray[np.int32]
    n_out: NDArray[np.int32]
    n_dropped: int
    n_too_few: int
    floored: NDArray[np.bool_]
    floor: tuple[float, float]
    prior: tuple[Prior, Prior] | None

    @property
    def n_floored(self) -> int:
        return int(self.floored.sum())


@numbers_checked
def lira(
    target: object,
    stats: GroupStats,
    *,
    mode: Mode = "online",
    variance: Rule | Literal["auto"] = "auto",
    queries: Literal["mean", "joint"] = "mean",
    classes: object = None,
    variance_floor: float | None = None,
    compat: Literal["plot.py"] | None = None,
) -> LiraResult:
    """Likelihood-ratio attack (Carlini et al. 2022) on a model's scores `target` [N] or [N, A], like the statistics.

    stats: of shadow models' scores, from `group_stats`; the target model must not be among them.
    mode: "online", log p(phi | in) - log p(phi | out); "offline", log P(score of an out-model < phi), which needs no
    in-models; "offline_two_sided", -log p(phi | out): how unusual, in either direction.
    variance: "example", of each sample; "global", pooled over samples; "class", pooled over those of one label of
    `classes` [N]; "shrink", each sample's drawn to what is usual (normal-inverse-gamma, so a Student t; Smyth 2004);
    "auto", "shrink" below 16 models a group and else "example". Variances are about the mean, whatever the center.
    queries: "mean" of A log-ratios, or "joint", one Gaussian of all (stats with joint=True).
    variance_floor: no variance is less, by default 1e-4 of the pooled one.
    compat "plot.py": the statistic of the published script, of the opposite sign; see `plot_py_scores`.
    TypeError for a dtype that is not a float, ValueError for another shape or a combination without meaning.
    """
    check_kind(stats, GroupStats, "stats")
    x = as_cells(target, "target", ("N", "N, A"))
    if x.shape != stats.shape:
        raise ValueError(f"target must have shape {list(stats.shape)}, like the statistics, got {list(x.shape)}")
    rule = _rule(variance, stats)
    _check(mode, rule, queries, classes, variance_floor, stats)
    codes = None if classes is None else _class_codes(classes, len(x))
    if compat is not None:
        score, floored = plot_py_scores(x, stats, mode=mode, variance=rule), np.zeros(len(x), np.bool_)
        fitted = Variances(rule, (math.nan, math.nan), (1e-60, 1e-60))
    else:
        fitted = fit_variances(stats, rule, classes=codes, floor=variance_floor)
        score, floored = _score(x, stats, fitted, mode, queries)
    few = stats.n_out < 2
    if mode == "online":
        few = few | (stats.n_in < 2)
    return LiraResult(
        score=score,
        mode=mode,
        variance=rule,
        queries=queries,
        center=stats.center,
        compat=compat,
        n_in=stats.n_in,
        n_out=stats.n_out,
        n_dropped=stats.n_dropped,
        n_too_few=int(few.sum()),
        floored=floored,
        floor=fitted.floor,
        prior=fitted.priors,
    )


def ulira(
    target: object, unlearned: object, retrained: object, *, center: Center = "mean", **options: Any
) -> LiraResult:
    """U-LiRA (Hayes et al. 2024): was `target` trained on a sample and then unlearned it, or never trained on it?

    unlearned [Mu, N(, A)]: scores of models that were trained on the N forget samples and unlearned them; retrained
    [Mr, N(, A)]: of models that never saw them; options as for `lira`, whose likelihood ratio this is. An unlearning
    method is exact only if the score tells nothing, for target models of either kind. joint statistics are taken when
    queries="joint".
    """
    stats = two_group_stats(retrained, unlearned, center=center, joint=options.get("queries") == "joint")
    return lira(target, stats, **options)


def _rule(variance: str, stats: GroupStats) -> Rule:
    if variance == "auto":
        few = stats.count.size > 0 and min(np.median(stats.n_in), np.median(stats.n_out)) < _FEW_MODELS
        return "shrink" if few else "example"
    if variance not in ("example", "global", "class", "shrink"):
        raise ValueError(f'variance must be "example", "global", "class", "shrink" or "auto", got {variance!r}')
    return variance  # type: ignore[return-value]


def _check(
    mode: str, rule: Rule, queries: str, classes: object, variance_floor: float | None, stats: GroupStats
) -> None:
    if mode not in ("online", "offline", "offline_two_sided"):
        raise ValueError(f'mode must be "online", "offline" or "offline_two_sided", got {mode!r}')
    if queries not in ("mean", "joint"):
        raise ValueError(f'queries must be "mean" or "joint", got {queries!r}')
    if (rule == "class") != (classes is not None):
        raise ValueError('classes [N] go with variance="class", and it needs them')
    if variance_floor is not None and not variance_floor > 0:
        raise ValueError(f"variance_floor must be positive, got {variance_floor}")
    if queries == "joint" and stats.scatter is None:
        raise ValueError('queries="joint" needs group_stats(..., joint=True)')
    if queries == "joint" and mode == "offline":
        raise ValueError('several scores have no tail: queries="joint" goes with mode "online" or "offline_two_sided"')


def _class_codes(classes: object, samples: int) -> NDArray[np.intp]:
    labels = as_view(classes, "classes")
    if labels.shape != (samples,):
        raise ValueError(f"classes must have shape [{samples}], got {list(labels.shape)}")
    codes: NDArray[np.intp] = np.unique(labels, return_inverse=True)[1].reshape(samples)
    return codes


def _score(
    x: Array, stats: GroupStats, variances: Variances, mode: Mode, queries: str
) -> tuple[Doubles, NDArray[np.bool_]]:
    score = np.empty(len(x))
    floored = np.zeros(len(x), np.bool_)
    groups = (0, 1) if mode == "online" else (0,)
    width = int(np.prod(x.shape[1:], dtype=np.int64)) ** (2 if queries == "joint" else 1)
    joint = fit_covariances(stats, variances) if queries == "joint" else None
    for part in blocks(len(x), width):
        value = np.asarray(x[part], np.float64)
        logs = []
        for g in groups:
            if joint is not None:
                log, raised = joint.log_density(value, g, part)
            else:
                spread = variances.at(stats, g, part)
                difference = value - stats.center_values[g, part]
                log = (_log_tail if mode == "offline" else _log_density)(difference, spread)
                raised = spread.floored
            logs.append(log)
            floored[part] |= raised.reshape(len(value), -1).any(1)
        found = logs[1] - logs[0] if mode == "online" else logs[0] if mode == "offline" else -logs[0]
        score[part] = found if found.ndim == 1 else found.mean(1)
    return score, floored


def _log_density(difference: Doubles, spread: Spread) -> Doubles:
    z2 = difference**2 / spread.variance
    log: Doubles = -0.5 * (z2 + np.log(2 * np.pi * spread.variance))
    if spread.dof is not None:
        student = np.isfinite(spread.dof) & (spread.dof < _MANY_DOF)
        dof = np.where(student, spread.dof, 1.0)
        heavy = gammaln((dof + 1) / 2) - gammaln(dof / 2) - 0.5 * np.log(dof * np.pi * spread.variance)
        log = np.where(student, heavy - (dof + 1) / 2 * np.log1p(z2 / dof), log)
    return log


def _log_tail(difference: Doubles, spread: Spread) -> Doubles:
    """log P(a score of the group is less)."""
    z = difference / np.sqrt(spread.variance)
    log: Doubles = log_ndtr(z)
    if spread.dof is not None:
        student = np.isfinite(spread.dof) & (spread.dof < _MANY_DOF)
        dof = np.where(student, spread.dof, 1.0)
        # The smaller tail carries the digits.
        tail = stdtr(dof, -np.abs(z))
        with np.errstate(divide="ignore"):
            log = np.where(student, np.where(z > 0, np.log1p(-tail), np.log(tail)), log)
    return log
