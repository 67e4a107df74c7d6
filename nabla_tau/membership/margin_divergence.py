"""KL divergence of margins: how far unlearned models' margins are distributed from those of retrained ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from nabla_tau import _C
from nabla_tau.arguments import numbers_checked
from nabla_tau.membership.cells import Array, as_cells, threads
from nabla_tau.membership.outcome import Outcome, axes_or_new
from nabla_tau.membership.relabelling import relabelled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Histograms are as sure of a bin without retrained models as if they had seen this share of them there.
_FLOOR = 1e-5


@dataclass(frozen=True, eq=False)
class KlomResult(Outcome):
    """divergence [N] in nats, 0: distributed alike; NaN where a group has no margin. null [K]: the same of relabelled
    models, what a perfect method would show with so many models; it is well above 0. n_dropped: margins that are NaN.
    """

    derived = ("orientation", "mean", "quantile_95", "null_mean", "n_nan")

    divergence: NDArray[np.float64]
    null: NDArray[np.float64]
    n_unlearned: int
    n_retrained: int
    n_dropped: int
    random_state: int

    @property
    def orientation(self) -> str:
        return "higher: further from retrained models"

    @property
    def mean(self) -> float:
        return _quiet_mean(self.divergence)

    @property
    def null_mean(self) -> float:
        return _quiet_mean(self.null)

    @property
    def n_nan(self) -> int:
        return int(np.isnan(self.divergence).sum())

    @property
    def quantile_95(self) -> float:
        return self.quantile()

    def quantile(self, share: float = 0.95) -> float:
        """The divergence that `share` of the samples stay below, as the paper reports."""
        known = self.divergence[~np.isnan(self.divergence)]
        return float(np.quantile(known, share)) if known.size else math.nan

    def plot(self, ax: Axes | None = None) -> Axes:
        """Histograms of the divergence and of that of relabelled models."""
        ax = axes_or_new(ax)
        parts = [values[~np.isnan(values)] for values in (self.divergence, self.null)]
        ax.hist(parts, bins=50, histtype="step", density=True, label=["unlearned", "relabelled"])
        ax.set_xlabel("KL divergence of margins")
        ax.legend()
        return ax


@numbers_checked
def klom(
    unlearned: object,
    retrained: object,
    *,
    bins: int = 20,
    clip: float = 100.0,
    compat: Literal["data-unlearning-bench"] | None = None,
    null_samples: int = 1024,
    random_state: int = 0,
) -> KlomResult:
    """KLOM (Georgiev et al. 2024) of each of N samples: KL(unlearned || retrained) of histograms of their margins.

    unlearned [Mu, N] and retrained [Mr, N]: logit margins, one dtype; clipped to +-`clip`, in `bins` equal bins over
    the range of both; retrained shares below 1e-5 are raised to it where unlearned models are, and the shares
    normalised. compat: as the published benchmark, whose last bin leaves out the largest margin. With a hundred models
    even equal groups have a divergence of some tenths: compare with `null`. TypeError for another dtype, ValueError for
    another shape.
    """
    first, second = as_cells(unlearned, "unlearned", "M, N"), as_cells(retrained, "retrained", "M, N")
    if compat not in (None, "data-unlearning-bench"):
        raise ValueError(f'compat must be None or "data-unlearning-bench", got {compat!r}')

    def diverge(a: Array, b: Array) -> NDArray[np.float64]:
        return _C.klom(a, b, bins, clip, _FLOOR, open_top=compat is not None, num_threads=threads())

    return KlomResult(
        divergence=diverge(first, second),
        null=diverge(*relabelled(first, second, null_samples, random_state)),
        n_unlearned=len(first),
        n_retrained=len(second),
        n_dropped=sum(int(np.isnan(row).sum()) for margins in (first, second) for row in margins),
        random_state=random_state,
    )


def _quiet_mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan
