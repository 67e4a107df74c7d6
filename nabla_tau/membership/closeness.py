"""How close an unlearned model is to a retrained one, in its outputs and in its accuracies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from nabla_tau.membership.cells import Array, as_cells, blocks
from nabla_tau.membership.outcome import Outcome, axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class JsResult(Outcome):
    """divergence [N] in nats, from 0 (alike) to log 2; NaN where a row of logits holds NaN or +inf."""

    derived = ("orientation", "mean", "n_nan")

    divergence: NDArray[np.float64]

    @property
    def orientation(self) -> str:
        return "higher: outputs further apart"

    @property
    def n_nan(self) -> int:
        return int(np.isnan(self.divergence).sum())

    @property
    def mean(self) -> float:
        known = self.divergence[~np.isnan(self.divergence)]
        return float(known.mean()) if known.size else float("nan")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Histogram over samples."""
        ax = axes_or_new(ax)
        ax.hist(self.divergence[~np.isnan(self.divergence)], bins=50)
        ax.set_xlabel("Jensen-Shannon divergence of outputs, nats")
        return ax


def js_divergence(logits: object, other: object) -> JsResult:
    """Jensen-Shannon divergence of the softmax of two models' logits [N, C] on the same samples.

    JS = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2 (Lin 1991), from log-probabilities. float16, float32 or
    float64; converted a block at a time. TypeError for another dtype, ValueError for another shape.
    """
    first, second = as_cells(logits, "logits", "N, C"), as_cells(other, "other", "N, C")
    if first.shape != second.shape:
        raise ValueError(f"other must have shape {list(first.shape)}, like logits, got {list(second.shape)}")
    divergence = np.empty(len(first))
    for part in blocks(len(first), first.shape[1]):
        divergence[part] = _js(_log_softmax(first[part]), _log_softmax(second[part]))
    return JsResult(divergence)


def tow(*, forget: tuple[float, float], retain: tuple[float, float], test: tuple[float, float]) -> float:
    """Tug of war (Zhao et al. 2024): (1 - |dF|)(1 - |dR|)(1 - |dT|), the differences of accuracies from retraining.

    forget, retain, test: accuracies (unlearned, retrained), each in [0, 1]. 1: accuracies of the retrained model.
    ValueError for an accuracy out of range.
    """
    product = 1.0
    for name, pair in (("forget", forget), ("retain", retain), ("test", test)):
        if len(pair) != 2 or not all(0 <= value <= 1 for value in pair):
            raise ValueError(f"{name} must be two accuracies in [0, 1], (unlearned, retrained), got {pair}")
        product *= 1 - abs(pair[0] - pair[1])
    return product


def _log_softmax(z: Array) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        log: NDArray[np.float64] = log_softmax(np.asarray(z, np.float64), axis=1)
    return log


def _js(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.zeros(len(log_p))
    with np.errstate(invalid="ignore"):
        middle = np.logaddexp(log_p, log_q) - np.log(2)
        for log in (log_p, log_q):
            # A class that is ruled out (-inf) adds nothing.
            total += np.where(np.isneginf(log), 0.0, np.exp(log) * (log - middle)).sum(1)
    return np.maximum(total / 2, 0.0)
