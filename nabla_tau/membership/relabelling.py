"""Models of two groups dealt out anew: what a statistic says when the groups do not differ."""

from __future__ import annotations

import numpy as np

from nabla_tau.membership.cells import Array


def relabelled(first: Array, second: Array, samples: int, random_state: int) -> tuple[Array, Array]:
    """first [Mf, K] and second [Ms, K] for at most `samples` of their columns, each column's values shuffled between
    the two groups. Under the null hypothesis that the groups are alike a shuffled column is as likely as the true one.
    """
    generator = np.random.default_rng(random_state)
    size = first.shape[1]
    chosen = np.sort(generator.choice(size, min(samples, size), replace=False))
    pooled = np.concatenate([first[:, chosen], second[:, chosen]])
    generator.permuted(pooled, axis=0, out=pooled)
    return pooled[: len(first)], pooled[len(first) :]
