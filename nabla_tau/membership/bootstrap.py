"""Bootstrap intervals of the AUC, paired over models so that a difference between two models has its own interval.

Samples are resampled, not models: the interval says what other forget and unseen samples of the same kind would have
shown. It holds nothing about how much retraining with another seed would change the models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nabla_tau.membership.scores import Array, as_scores

# Counts held at one time: 4e6 int32 stay near the caches and bound the memory at some tens of megabytes.
_CHUNK_ELEMENTS = 4_000_000

Reference = str | Sequence[str] | float


@dataclass(frozen=True, eq=False)
class AucBootstrap:
    """AUC of each model and its replicates [B] under common resamples of members and non-members.

    A *model* argument below is a name or a sequence of names (their mean, replicate by replicate); a *reference* may
    also be a number, such as 0.5 for chance.
    """

    auc: Mapping[str, float]
    replicates: Mapping[str, NDArray[np.float64]]
    n_members: int
    n_nonmembers: int
    random_state: int

    def value(self, model: str | Sequence[str]) -> float:
        """AUC of the model on the samples themselves."""
        return float(np.mean([self.auc[name] for name in _names(model)]))

    def interval(self, model: str | Sequence[str], *, confidence: float = 0.95) -> tuple[float, float]:
        """Percentile interval of the AUC."""
        return percentile_interval(self._of(model), confidence)

    def gap(self, model: str | Sequence[str], reference: Reference) -> float:
        """AUC of the model minus that of the reference."""
        return self.value(model) - (reference if isinstance(reference, float) else self.value(reference))

    def gap_interval(
        self, model: str | Sequence[str], reference: Reference, *, confidence: float = 0.95
    ) -> tuple[float, float]:
        """Percentile interval of the gap: both models see the same resample, so what they share cancels."""
        other = reference if isinstance(reference, float) else self._of(reference)
        return percentile_interval(self._of(model) - other, confidence)

    def _of(self, model: str | Sequence[str]) -> NDArray[np.float64]:
        mean: NDArray[np.float64] = np.mean([self.replicates[name] for name in _names(model)], axis=0)
        return mean


def bootstrap_auc(
    members: Mapping[str, object],
    nonmembers: Mapping[str, object],
    *,
    replicates: int = 1000,
    random_state: int = 0,
) -> AucBootstrap:
    """Stratified bootstrap of the AUC of one or several models on the same samples.

    members maps each model to its scores [M] of the members, nonmembers to those [N] of the non-members (higher: more
    likely a member), in the same order of samples for every model. Each replicate draws M members and N non-members
    with replacement, once for all models; ties count one half. With perfect separation every replicate is 1, so the
    interval has no width: it cannot know about samples that were never seen. Results depend only on the arguments.
    ValueError for NaN, for models that differ in names or sample counts, and for fewer than 100 replicates.
    """
    if replicates < 100:
        raise ValueError(f"replicates must be at least 100 for percentiles to mean something, got {replicates}")
    if not members or members.keys() != nonmembers.keys():
        raise ValueError(f"members and nonmembers must name the same models, got {[*members]} and {[*nonmembers]}")
    scores = {name: (_ranked(members, name), _ranked(nonmembers, name)) for name in members}
    sizes = {(x_in.size, x_out.size) for x_in, x_out in scores.values()}
    if len(sizes) > 1:
        raise ValueError(f"every model must be scored on the same samples, got counts (in, out) = {sorted(sizes)}")
    ((n_in, n_out),) = sizes
    plans = {name: _Ranks.of(x_in, x_out) for name, (x_in, x_out) in scores.items()}
    drawn: dict[str, list[NDArray[np.float64]]] = {name: [] for name in plans}
    generator = np.random.default_rng(random_state)
    chunk = max(1, min(replicates, _CHUNK_ELEMENTS // (n_in + n_out)))
    for start in range(0, replicates, chunk):
        width = min(chunk, replicates - start)
        counts_in, counts_out = (_resample(generator, n, width) for n in (n_in, n_out))
        for name, plan in plans.items():
            drawn[name].append(plan.auc(counts_in, counts_out))
    return AucBootstrap(
        auc={name: _auc(plan) for name, plan in plans.items()},
        replicates={name: np.concatenate(parts) for name, parts in drawn.items()},
        n_members=n_in,
        n_nonmembers=n_out,
        random_state=random_state,
    )


def percentile_interval(values: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """Central interval that holds the share `confidence` of `values` [B]."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass(frozen=True, eq=False)
class _Ranks:
    """One model's order of the samples, found once: every replicate reuses it with other counts.

    below[i] and upto[i] are how many sorted non-members score less than, and at most, the i-th member.
    """

    order_out: NDArray[np.intp]
    below: NDArray[np.intp]
    upto: NDArray[np.intp]

    @classmethod
    def of(cls, x_in: Array, x_out: Array) -> _Ranks:
        order = np.argsort(x_out, kind="stable")
        ordered = x_out[order]
        return cls(order, np.searchsorted(ordered, x_in, "left"), np.searchsorted(ordered, x_in, "right"))

    def auc(self, counts_in: NDArray[np.int32], counts_out: NDArray[np.int32]) -> NDArray[np.float64]:
        """AUC of each replicate: counts_in [M, B], counts_out [N, B] -> [B]. Sums of integers, hence exact."""
        n_out, width = counts_out.shape
        cumulated = np.zeros((n_out + 1, width), np.int32)
        np.cumsum(counts_out[self.order_out], axis=0, dtype=np.int32, out=cumulated[1:])
        twice_wins = cumulated[self.below] + cumulated[self.upto]
        total: NDArray[np.float64] = np.einsum("mb,mb->b", counts_in, twice_wins, dtype=np.float64, casting="safe")
        aucs: NDArray[np.float64] = total / (2.0 * counts_in.shape[0] * n_out)
        return aucs


def _auc(plan: _Ranks) -> float:
    return float((plan.below + plan.upto).sum() / (2.0 * plan.below.size * plan.order_out.size))


def _resample(generator: np.random.Generator, n: int, width: int) -> NDArray[np.int32]:
    """How often each of n samples is drawn in each of `width` resamples of size n: [n, width].

    Samples run along the first axis so that putting them in a model's order moves whole contiguous rows.
    """
    cells = generator.integers(0, n, size=(n, width)) * width + np.arange(width)
    return np.bincount(cells.ravel(), minlength=n * width).reshape(n, width).astype(np.int32)


def _ranked(scores: Mapping[str, object], name: str) -> Array:
    array = as_scores(scores[name], f"scores of {name!r}")
    if np.isnan(array).any():
        raise ValueError(f"scores of {name!r} hold {int(np.isnan(array).sum())} NaN; they have no rank")
    return array


def _names(model: str | Sequence[str]) -> Sequence[str]:
    return (model,) if isinstance(model, str) else model
