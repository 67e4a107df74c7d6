"""Several queries of one sample as one Gaussian: their scores rise and fall together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from nabla_tau.membership.cells import blocks
from nabla_tau.membership.groups import Doubles, GroupStats
from nabla_tau.membership.variances import Variances


@dataclass(frozen=True, eq=False)
class Covariances:
    """Covariances of queries pooled over samples, [2, K, A, A] for K classes (one, unless the rule is "class")."""

    stats: GroupStats
    variances: Variances
    pooled: Doubles

    def log_density(self, x: Doubles, g: int, part: slice) -> tuple[Doubles, NDArray[np.bool_]]:
        """Log density [n] of x [n, A] under group g for a block of samples, and where the floor carried it.

        Covariances as the rule says; "shrink" is the normal-inverse-Wishart posterior whose margins are the
        normal-inverse-gamma of each query. The floor is added to the diagonal. NaN with fewer than two models.
        """
        queries = x.shape[1]
        dof: Doubles = self.stats.count[g, part, 0] - np.float64(1)
        covariance, t_dof = self._of(g, part, dof)
        covariance = covariance + self.variances.floor[g] * np.eye(queries)
        unknown = (dof < 1) | ~np.isfinite(covariance).all((1, 2)) | ~np.isfinite(x).all(1)
        covariance[unknown] = np.eye(queries)
        root = np.linalg.cholesky(covariance)
        difference = np.where(unknown[:, None], 0.0, x - self.stats.center_values[g, part])
        z2: Doubles = (np.linalg.solve(root, difference[..., None])[..., 0] ** 2).sum(1)
        log_det = 2 * np.log(np.einsum("naa->na", root)).sum(1)
        if t_dof is None:
            log = -0.5 * (z2 + log_det + queries * math.log(2 * math.pi))
        else:
            whole = t_dof + queries
            log = gammaln(whole / 2) - gammaln(t_dof / 2) - 0.5 * (queries * np.log(t_dof * np.pi) + log_det)
            log -= whole / 2 * np.log1p(z2 / t_dof)
        # With no more models than queries a sample's own covariance knows nothing of some directions.
        raised = ~unknown & (dof < queries) & (self.variances.rule == "example")
        return np.where(unknown, np.nan, log), raised

    def _of(self, g: int, part: slice, dof: Doubles) -> tuple[Doubles, Doubles | None]:
        """Covariances [n, A, A] and the degrees of freedom [n] of their Student t, None for a Gaussian."""
        assert self.stats.scatter is not None
        scatter = self.stats.scatter[g, part]
        rule, classes, priors = self.variances.rule, self.variances.classes, self.variances.priors
        if rule == "example":
            return scatter / np.maximum(dof, 1)[:, None, None], None
        if rule == "class" and classes is not None:
            return self.pooled[g][classes[part]], None
        pooled = self.pooled[g, 0]
        if rule == "global" or priors is None:
            return np.broadcast_to(pooled, scatter.shape), None
        prior = priors[g]
        usual = pooled * (prior.variance / self.variances.pooled[g])
        wider = (1 + 1 / np.maximum(dof + 1, 1))[:, None, None]
        if math.isinf(prior.dof):
            return usual * wider, None
        total = prior.dof + np.maximum(dof, 0)
        return (prior.dof * usual + scatter) / total[:, None, None] * wider, total


def fit_covariances(stats: GroupStats, variances: Variances) -> Covariances:
    """What the rule of `variances` needs to know of all samples."""
    assert stats.scatter is not None
    classes = np.zeros(stats.shape[0], np.intp) if variances.classes is None else variances.classes
    queries = stats.shape[1]
    total = np.zeros((2, int(classes.max(initial=0)) + 1, queries, queries))
    dof = np.zeros(total.shape[:2])
    for g in (0, 1):
        for part in blocks(stats.shape[0], queries**2):
            np.add.at(total[g], classes[part], stats.scatter[g, part])
            np.add.at(dof[g], classes[part], np.maximum(stats.count[g, part, 0] - 1.0, 0.0))
    with np.errstate(invalid="ignore"):
        return Covariances(stats, variances, total / dof[..., None, None])
