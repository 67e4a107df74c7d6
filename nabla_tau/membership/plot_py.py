"""The statistic of the script published with LiRA, for comparison with figures made by it."""

from __future__ import annotations

import math

import numpy as np

from nabla_tau.membership.cells import Array, blocks
from nabla_tau.membership.groups import Doubles, GroupStats


def plot_py_scores(target: Array, stats: GroupStats, *, mode: str, variance: str) -> Doubles:
    """Minus the prediction of plot.py (its `generate_ours` and `generate_ours_offline`), [N]: higher is a member.

    As there: medians and population standard deviations plus 1e-30, over the first models of each sample, as many as
    every sample has (`group_stats(center="median", equal_counts=True)`); queries averaged; offline two-sided.
    variance="global" is the script's fix_variance: one standard deviation over all samples with their differences in
    level, and online that of the in-group for both groups. Equal to 1e-9 for scores of float64, the script's dtype.
    """
    if stats.center != "median" or stats.limit is None:
        raise ValueError('compat="plot.py" needs group_stats(..., center="median", equal_counts=True)')
    if mode == "offline" or variance not in ("example", "global"):
        raise ValueError(
            'plot.py has mode "online" and "offline_two_sided", variance "example" and "global"; '
            f"got {mode!r} and {variance!r}"
        )
    shared = _overall_std(stats, 1 if mode == "online" else 0) if variance == "global" else None
    score = np.empty(len(target))
    width = int(np.prod(target.shape[1:], dtype=np.int64))
    for part in blocks(len(target), width):
        x = np.asarray(target[part], np.float64)
        found = -_log_density(x, stats, 0, part, shared)
        if mode == "online":
            found += _log_density(x, stats, 1, part, shared)
        score[part] = found if found.ndim == 1 else found.mean(1)
    return score


def _log_density(x: Doubles, stats: GroupStats, g: int, part: slice, shared: float | None) -> Doubles:
    count = stats.count[g, part]
    with np.errstate(divide="ignore", invalid="ignore"):
        std = np.sqrt(stats.m2[g, part] / count) if shared is None else np.full(x.shape, shared)
        z = (x - stats.center_values[g, part]) / (std + 1e-30)
        log: Doubles = -0.5 * z**2 - np.log(std + 1e-30) - 0.5 * math.log(2 * math.pi)
    return log


def _overall_std(stats: GroupStats, g: int) -> float:
    """Standard deviation of all scores of a group about their one mean."""
    count = stats.count[g].astype(np.float64)
    total = count.sum()
    if total == 0:
        return math.nan
    known = np.where(count > 0, stats.mean[g], 0.0)
    mean = (count * known).sum() / total
    return math.sqrt((stats.m2[g].sum() + (count * (known - mean) ** 2).sum()) / total)
