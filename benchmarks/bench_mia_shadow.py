"""mia, many models: LiRA's moments and medians, RMIA, forgetting quality and KLOM, against good numpy and scipy.

Each against the best numpy that we could write, and against scipy, sample by sample, as published scripts do it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from case import Case, Provider
from numpy.typing import NDArray
from scipy import stats
from scipy.special import expit

from nabla_tau.membership.forgetting import neurips_forgetting
from nabla_tau.membership.groups import group_stats
from nabla_tau.membership.likelihood_ratio import lira
from nabla_tau.membership.margin_divergence import klom
from nabla_tau.membership.relative_membership import rmia

Array = NDArray[np.float32]
Groups = NDArray[np.bool_]


def numpy_moments(scores: Array, group: Groups) -> list[NDArray[np.float64]]:
    """Two-pass means and variances of both groups, a block of samples at a time, in float64."""
    found = []
    for start in range(0, scores.shape[1], 512):
        x = scores[:, start : start + 512].astype(np.float64)
        for member in (~group[:, start : start + 512], group[:, start : start + 512]):
            w = member if x.ndim == 2 else member[..., None]
            count = w.sum(0)
            mean = np.einsum("mn...,mn->n...", x, member) / count
            d = x - mean
            found.append(np.einsum("mn...,mn...,mn->n...", d, d, member) / (count - 1))
    return found


def numpy_medians(scores: Array, group: Groups) -> list[NDArray[np.float64]]:
    found = []
    for start in range(0, scores.shape[1], 512):
        for member in (~group[:, start : start + 512], group[:, start : start + 512]):
            w = member if scores.ndim == 2 else member[..., None]
            found.append(np.nanmedian(np.where(w, scores[:, start : start + 512], np.nan), axis=0))
    return found


def per_sample_lira(target: Array, scores: Array, group: Groups) -> list[float]:
    """scipy's densities with medians and deviations, sample by sample."""
    found = []
    for n in range(scores.shape[1]):
        logs = [
            stats.norm.logpdf(target[n], np.median(x, 0), np.std(x, 0) + 1e-30).mean()
            for x in (scores[~group[:, n], n], scores[group[:, n], n])
        ]
        found.append(logs[1] - logs[0])
    return found


def numpy_rmia(target: Array, refs: Array, group: Groups, z: Array, z_refs: Array) -> NDArray[np.float64]:
    """Sums in float64, as ours, a block of samples at a time; counting by a sort."""
    usual = []
    for start in range(0, refs.shape[1], 512):
        x, g = refs[:, start : start + 512].astype(np.float64), group[:, start : start + 512]
        usual.append(np.einsum("mn,mn->n", x, ~g) / (~g).sum(0) + np.einsum("mn,mn->n", x, g) / g.sum(0))
    ratio, ratio_z = target / np.concatenate(usual) * 2, np.sort(z / z_refs.mean(0, dtype=np.float64))
    return np.searchsorted(ratio_z, ratio / 2, "right") / len(ratio_z)


def pairwise_rmia(target: Array, refs: Array, group: Groups, z: Array, z_refs: Array) -> NDArray[np.float64]:
    """All pairs, a block of samples at a time."""
    out = np.where(~group, refs, 0).sum(0) / (~group).sum(0)
    within = np.where(group, refs, 0).sum(0) / group.sum(0)
    ratio, ratio_z = target / (out + within) * 2, z / z_refs.mean(0)
    return np.concatenate([(part[:, None] / ratio_z >= 2).mean(1) for part in np.array_split(ratio, 1 + len(z) // 500)])


def numpy_exact_epsilon(unlearned: Array, retrained: Array, delta: float = 1e-5) -> NDArray[np.float64]:
    """One threshold at every margin, all samples of a block at once."""
    found = []
    models = len(unlearned)
    for start in range(0, unlearned.shape[1], 256):
        u, r = unlearned[:, start : start + 256], retrained[:, start : start + 256]
        positive = np.where(np.median(r, 0) > np.median(u, 0), 1, 0)
        order = np.argsort(np.concatenate([u, r]), axis=0)
        is_positive = (order >= models) == positive
        fnr = np.cumsum(is_positive, 0) / models
        fpr = 1 - np.cumsum(~is_positive, 0) / models
        with np.errstate(all="ignore"):
            epsilon = np.maximum(np.log(1 - delta - fpr) - np.log(fnr), np.log(1 - delta - fnr) - np.log(fpr))
        epsilon[(fnr == 0) | (fpr == 0)] = np.nan
        epsilon[(fnr == 0) & (fpr == 0)] = np.inf
        found.append(np.nanmax(epsilon, 0))
    return np.concatenate(found)


def numpy_published_epsilon(unlearned: Array, retrained: Array, delta: float = 1e-5) -> list[float]:
    """The competition's grids with sorted margins and searchsorted, sample by sample."""
    found = []
    n = len(unlearned)
    for u, r in zip(unlearned.T, retrained.T, strict=True):
        pair = (np.sort(u), np.sort(r))
        p, q = pair if np.median(u) >= np.median(r) else pair[::-1]
        low, high = min(p[0], q[0]), max(p[-1], q[-1])
        grid = np.linspace(low, high, int(np.ceil((high - low) * 100)))
        hits, alarms = [n - np.searchsorted(x, grid) for x in (p, q)]
        narrow, wide = (q, p) if np.ptp(p) >= np.ptp(q) else (p, q)
        w = np.ptp(narrow)
        rights = np.linspace(narrow[0] + w - 2, narrow[-1] + 2, 400)
        lefts = (rights[:, None] - w + np.linspace(-2, 2, 400)).ravel()
        inside = []
        for x in (narrow, wide):
            upper = np.repeat(np.searchsorted(x, rights, "right"), 400)
            inside.append(np.maximum(upper - np.searchsorted(x, lefts), 0))
        fnr = 1 - np.concatenate([hits, inside[0]]) / n
        fpr = np.concatenate([alarms, inside[1]]) / n
        keep = (fnr > 0) & (fpr > 0)
        fnr, fpr = fnr[keep], fpr[keep]
        with np.errstate(all="ignore"):
            epsilon = np.fmax(np.log(1 - delta - fpr) - np.log(fnr), np.log(1 - delta - fnr) - np.log(fpr))
        found.append(float(np.nanmax(epsilon)))
    return found


def numpy_klom(unlearned: Array, retrained: Array) -> NDArray[np.float64]:
    """All samples of a block at once: bins by arithmetic, counts by bincount."""
    found = []
    for start in range(0, unlearned.shape[1], 4096):
        u, r = unlearned[:, start : start + 4096], retrained[:, start : start + 4096]
        low = np.minimum(u.min(0), r.min(0))
        wide = (np.maximum(u.max(0), r.max(0)) - low) / 20
        size = u.shape[1]
        shares = []
        for x in (u, r):
            bins = np.minimum(((x - low) / wide).astype(np.int64), 19) + 20 * np.arange(size)
            shares.append(np.bincount(bins.ravel(), minlength=20 * size).reshape(size, 20) / len(x))
        p, q = shares
        q = np.where(p > 0, np.maximum(q, 1e-5), q)
        q /= q.sum(1, keepdims=True)
        with np.errstate(all="ignore"):
            found.append(np.where(p > 0, p * np.log(p / q), 0).sum(1))
    return np.concatenate(found)


def per_sample_klom(unlearned: Array, retrained: Array) -> list[float]:
    """numpy.histogram and scipy's entropy, sample by sample."""
    found = []
    for u, r in zip(unlearned.T, retrained.T, strict=True):
        edges = np.linspace(min(u.min(), r.min()), max(u.max(), r.max()), 21)
        p, q = (np.histogram(x, edges)[0] / len(x) for x in (u, r))
        found.append(float(stats.entropy(p, np.where(p > 0, np.maximum(q, 1e-5), q))))
    return found


def cases(quick: bool) -> Iterator[Case]:
    """Margins as float32; 256 shadow models, 512 models a group for forgetting quality, 100 for KLOM."""
    rng = np.random.default_rng(0)
    models, n, queries = (32, 1000, 3) if quick else (256, 50_000, 18)
    for a in (1, queries):
        shape = (n,) if a == 1 else (n, a)
        scores = rng.standard_normal((models, *shape), dtype=np.float32)
        group = rng.random((models, n)) < 0.5
        target = rng.standard_normal(shape, dtype=np.float32)
        tenth, some = n // 10, n // 50 if a == 1 else n // 250
        name = f"{models}x{n}" + (f"x{a}" if a > 1 else "")
        yield Case(
            f"moments {name}",
            "float32",
            "numpy",
            {
                "nabla_tau": Provider(lambda s=scores, g=group: group_stats(s, g)),
                "numpy": Provider(lambda s=scores[:, :tenth], g=group[:, :tenth]: numpy_moments(s, g), 10),
            },
        )
        yield Case(
            f"medians {name}",
            "float32",
            "numpy",
            {
                "nabla_tau": Provider(lambda s=scores, g=group: group_stats(s, g, center="median")),
                "numpy": Provider(lambda s=scores[:, :some], g=group[:, :some]: numpy_medians(s, g), n / some),
            },
        )
        yield Case(
            f"LiRA {name}",
            "float32",
            "scipy",
            {
                "nabla_tau": Provider(
                    lambda t=target, s=scores, g=group: lira(t, group_stats(s, g, center="median")),
                ),
                "scipy": Provider(
                    lambda t=target[:some], s=scores[:, :some], g=group[:, :some]: per_sample_lira(t, s, g),
                    n / some,
                ),
            },
        )
        del scores
    n_z, n_x = n, n // 5
    chances = [rng.random(shape, dtype=np.float32) for shape in ((n_x,), (models, n_x), (n_z,), (models, n_z))]
    group = rng.random((models, n_x)) < 0.5
    inputs = (chances[0], chances[1], group, chances[2], chances[3])
    part = (chances[0][: n_x // 20], chances[1][:, : n_x // 20], group[:, : n_x // 20], *chances[2:])
    name = f"{n_x} against {n_z}, {models} references"
    yield Case(
        f"RMIA, probabilities, {name}",
        "float32",
        "numpy",
        {
            "nabla_tau": Provider(lambda: rmia(*inputs, signal="probability")),
            "numpy": Provider(lambda: numpy_rmia(*inputs)),
            "numpy pairs": Provider(lambda: pairwise_rmia(*part), 20),
        },
    )
    yield Case(
        f"RMIA, margins, {name}",
        "float32",
        "numpy",
        {
            "nabla_tau": Provider(lambda: rmia(*inputs)),
            "numpy": Provider(lambda: numpy_rmia(*[a if a.dtype == bool else expit(a) for a in inputs])),
        },
    )
    models, n = (64, 100) if quick else (512, 5000)
    unlearned, retrained = rng.standard_normal((2, models, n), dtype=np.float64)
    few = [a[:, : n // 50] for a in (unlearned, retrained)]
    yield Case(
        f"forgetting exact {models}x{n}",
        "float64",
        "numpy",
        {
            "nabla_tau": Provider(lambda: neurips_forgetting(unlearned, retrained)),
            "numpy": Provider(lambda: numpy_exact_epsilon(unlearned, retrained)),
        },
    )
    yield Case(
        f"forgetting published rule {models}x{n // 50}",
        "float64",
        "numpy",
        {
            "nabla_tau": Provider(lambda: neurips_forgetting(*few, rule="kaggle", null_samples=1)),
            "numpy": Provider(lambda: numpy_published_epsilon(*few)),
        },
    )
    models, n = (20, 1000) if quick else (100, 60_000)
    clear, fresh = rng.standard_normal((2, models, n), dtype=np.float32)
    yield Case(
        f"KLOM {models}x{n}",
        "float32",
        "numpy",
        {
            "nabla_tau": Provider(lambda: klom(clear, fresh)),
            "numpy": Provider(lambda: numpy_klom(clear, fresh)),
            "scipy": Provider(lambda: per_sample_klom(clear[:, : n // 100], fresh[:, : n // 100]), 100),
        },
    )
