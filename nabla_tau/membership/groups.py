"""How each sample's score is distributed over models trained on it and over models that were not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from nabla_tau import _C
from nabla_tau.membership.cells import Array, as_cells, as_group, blocks, threads
from nabla_tau.membership.outcome import axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Center = Literal["mean", "median"]
Doubles = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class GroupStats:
    """Statistics of scores over models. Arrays are [2, N] or [2, N, A]: index 0 models without the sample, 1 with it.

    count: models with a finite score. mean (NaN where count is 0), m2: sum of squared differences from it. median:
    with center="median". scatter [2, N, A, A]: sums of products of the queries' differences, with joint=True. models:
    how many were seen. limit: (out, in), how many models of a sample were used at most.
    """

    count: NDArray[np.int32]
    mean: Doubles
    m2: Doubles
    median: Doubles | None
    scatter: Doubles | None
    models: int
    limit: tuple[int, int] | None = None

    @property
    def center(self) -> Center:
        return "mean" if self.median is None else "median"

    @property
    def center_values(self) -> Doubles:
        return self.mean if self.median is None else self.median

    @property
    def shape(self) -> tuple[int, ...]:
        """[N] or [N, A]."""
        return self.count.shape[1:]

    @property
    def n_out(self) -> NDArray[np.int32]:
        """Models without the sample, [N]; of several queries, for the one with the fewest."""
        return self._fewest(0)

    @property
    def n_in(self) -> NDArray[np.int32]:
        return self._fewest(1)

    @property
    def n_dropped(self) -> int:
        """Scores that were not used: not finite, or beyond `limit`."""
        return int(self.models * self.count[0].size - self.count.sum(dtype=np.int64))

    def update(self, scores: object, group: object) -> GroupStats:
        """These statistics and those of further models, scores [M, N(, A)] and group [M, N], at once.

        Feed models in chunks: memory is that of the results. Equal to one call up to rounding. ValueError for medians,
        which need all models at once (from a memory map `group_stats` takes them without loading it), and for another
        shape.
        """
        self._require_joinable()
        array = self._like(as_cells(scores, "scores", ("M, N", "M, N, A")))
        known = (self.count, self.mean, self.m2, self.scatter)
        return _stats(array, group, joint=self.scatter is not None, known=known, models=self.models)

    def merge(self, other: GroupStats) -> GroupStats:
        """These statistics and those of other models of the same samples (Chan et al. 1979)."""
        self._require_joinable()
        other._require_joinable()
        if self.shape != other.shape or (self.scatter is None) != (other.scatter is None):
            raise ValueError(f"cannot merge statistics of {list(self.shape)} and {list(other.shape)}, or joint and not")
        merged = replace(
            self,
            count=self.count + other.count,
            mean=np.empty_like(self.mean),
            m2=np.empty_like(self.m2),
            scatter=None if self.scatter is None else np.empty_like(self.scatter),
            models=self.models + other.models,
        )
        width = int(np.prod(self.shape[1:], dtype=np.int64)) * (1 if self.scatter is None else self.shape[-1])
        for part in blocks(self.shape[0], width):
            _merge(self, other, merged, (slice(None), part))
        return merged

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: sizes and counts, not the arrays."""
        return {
            "models": self.models,
            "samples": self.shape[0],
            "queries": self.shape[1] if len(self.shape) > 1 else 1,
            "center": self.center,
            "n_in": _spread(self.n_in),
            "n_out": _spread(self.n_out),
            "n_fewer_than_two": int(((self.n_in < 2) | (self.n_out < 2)).sum()),
            "n_dropped": self.n_dropped,
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Center of the scores with the sample against that without it, a point a sample."""
        ax = axes_or_new(ax)
        out, with_it = (self.center_values[g].reshape(self.shape[0], -1)[:, 0] for g in (0, 1))
        ax.plot(out, with_it, ".", markersize=2)
        ax.axline((0, 0), slope=1, color="grey", linewidth=0.8)
        ax.set_xlabel(f"{self.center} score of models without the sample")
        ax.set_ylabel(f"{self.center} score of models with it")
        return ax

    def _fewest(self, g: int) -> NDArray[np.int32]:
        fewest: NDArray[np.int32] = self.count[g] if self.count.ndim == 2 else self.count[g].min(1)
        return fewest

    def _like(self, scores: Array) -> Array:
        if scores.shape[1:] != self.shape:
            raise ValueError(f"scores must be [M, {', '.join(map(str, self.shape))}], got {list(scores.shape)}")
        return scores

    def _require_joinable(self) -> None:
        if self.median is not None or self.limit is not None:
            raise ValueError("medians and equal counts need all models at once: call group_stats on a memory map")


def group_stats(
    scores: object, group: object, *, center: Center = "mean", joint: bool = False, equal_counts: bool = False
) -> GroupStats:
    """Distribution of scores [M, N] or [M, N, A] of M models, N samples and A queries, with and without each sample.

    scores: logit margins, or any other score, float16, float32 or float64; arrays, memory maps and CPU tensors with any
    strides are read where they lie. group [M, N]: True where the model was trained on the sample; bool, or packed by
    numpy.packbits(group, axis=1). center: what `lira` takes as the middle of a group, besides the mean and m2, which
    are always there. joint: also how queries vary together (A^2 numbers a sample), for `lira(queries="joint")`; a model
    with a query that is not finite is then left out for that sample. equal_counts: use only as many in- and
    out-models of a sample as every sample has, the first ones, as the published LiRA script does.

    Scores that are not finite are dropped and counted. Sums are in float64, taken in two passes over tiles; results do
    not depend on the number of threads.
    """
    array = as_cells(scores, "scores", ("M, N", "M, N, A"))
    if center not in ("mean", "median"):
        raise ValueError(f'center must be "mean" or "median", got {center!r}')
    limit = _fewest_models(as_group(group, *array.shape[:2]), array.shape[1]) if equal_counts else None
    return _stats(array, group, joint=joint, median=center == "median", limit=limit)


def two_group_stats(
    out_scores: object, in_scores: object, *, center: Center = "mean", joint: bool = False
) -> GroupStats:
    """As `group_stats`, of models in separate arrays [M, N(, A)] that all have, or have not, seen the samples."""
    parts = []
    for scores, name, member in ((out_scores, "out_scores", False), (in_scores, "in_scores", True)):
        array = as_cells(scores, name, ("M, N", "M, N, A"))
        # One byte for all, by strides of zero.
        group = np.broadcast_to(np.bool_(member), array.shape[:2])
        parts.append(_stats(array, group, joint=joint, median=center == "median"))
    out, with_it = parts
    if out.shape != with_it.shape:
        raise ValueError(f"both groups must have the same samples, got {list(out.shape)} and {list(with_it.shape)}")
    # Each half is written where the other array has nothing.
    for name in ("count", "mean", "m2", "median", "scatter"):
        if getattr(out, name) is not None:
            getattr(out, name)[1] = getattr(with_it, name)[1]
    return replace(out, models=out.models + with_it.models)


def _stats(
    scores: Array,
    group: object,
    *,
    joint: bool,
    median: bool = False,
    limit: tuple[int, int] | None = None,
    known: Any = None,
    models: int = 0,
) -> GroupStats:
    if joint and scores.ndim != 3:
        raise ValueError(f"joint statistics need queries, scores [M, N, A], got {list(scores.shape)}")
    member = as_group(group, *scores.shape[:2])
    allowed = limit or (-1, -1)
    count, mean, m2, scatter = _C.group_moments(
        scores, member, limit=allowed, joint=joint, known=known, num_threads=threads()
    )
    assert m2 is not None
    middle = _C.group_medians(scores, member, limit=allowed, joint=joint, num_threads=threads()) if median else None
    return GroupStats(count, mean, m2, middle, scatter, models + len(scores), limit)


def _fewest_models(group: Array, samples: int) -> tuple[int, int]:
    """(out, in): the fewest models that any sample has on each side."""
    n_in = np.zeros(samples, np.int64)
    for row in group:
        n_in += row if group.dtype == np.bool_ else np.unpackbits(row, count=samples)
    return int(len(group) - n_in.max(initial=0)), int(n_in.min(initial=len(group)))


def _merge(a: GroupStats, b: GroupStats, to: GroupStats, at: tuple[slice, slice]) -> None:
    n_a, n_b = a.count[at].astype(np.float64), b.count[at].astype(np.float64)
    share = n_b / np.maximum(n_a + n_b, 1)
    delta = np.where((n_a > 0) & (n_b > 0), b.mean[at] - a.mean[at], 0.0)
    to.mean[at] = np.where(n_a > 0, a.mean[at], b.mean[at]) + delta * share
    to.m2[at] = a.m2[at] + b.m2[at] + delta**2 * n_a * share
    if a.scatter is not None and b.scatter is not None and to.scatter is not None:
        weighted = delta * n_a * share
        to.scatter[at] = a.scatter[at] + b.scatter[at] + weighted[..., :, None] * delta[..., None, :]


def _spread(counts: NDArray[np.int32]) -> dict[str, float]:
    if not counts.size:
        return {"fewest": 0, "median": 0.0, "most": 0}
    return {"fewest": int(counts.min()), "median": float(np.median(counts)), "most": int(counts.max())}
