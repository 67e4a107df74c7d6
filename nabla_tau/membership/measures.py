"""Every number of one audited model, from its signals: attacks, accuracies, losses, and what its plots need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nabla_tau.evaluation import Signals
from nabla_tau.membership.comparison import Comparison
from nabla_tau.membership.curve import RocResult, roc
from nabla_tau.membership.logistic import simple_mia
from nabla_tau.membership.scores import rank_safe

ATTACKS = ("loss", "entropy", "margin")
# They judge a sample by other models' answers to it (`membership.shadow_attacks`).
MODEL_ATTACKS = ("lira", "ulira", "rmia")
# Low loss and low entropy speak for membership, and so does a large margin.
_ORIENTATION = {"loss": -1.0, "entropy": -1.0, "margin": 1.0}
_ROC_POINTS = 200
_BINS = 40
# Below this a cross-entropy is memorised beyond anything a plot could tell apart.
_SMALLEST_LOSS = 1e-8

Interval = tuple[float, float]


@dataclass(frozen=True)
class ModelAudit:
    """What an audit says of one model; a number that is unknown or cannot be resolved is None.

    role: "original", "retrained", "retrained run", "unlearned" or "compared"; runs: models averaged here.
    intervals, gap, gap_intervals, spread: measure -> value; gap is to the retrained model, spread the standard
    deviation over several of them. roc: attack -> {"fpr", "tpr"}, thinned. histogram: {"forget", "unseen"}, shares of
    the samples in the report's loss bins.
    """

    role: str
    runs: int = 1
    verdict: str | None = None
    auc_loss: float | None = None
    auc_entropy: float | None = None
    auc_margin: float | None = None
    auc_lira: float | None = None
    auc_ulira: float | None = None
    auc_rmia: float | None = None
    mia_loss: float | None = None
    mia_loss_std: float | None = None
    mia_entropy: float | None = None
    mia_entropy_std: float | None = None
    balanced_accuracy_loss: float | None = None
    balanced_accuracy_entropy: float | None = None
    balanced_accuracy_margin: float | None = None
    tpr_at_1_percent_fpr: float | None = None
    tpr_at_1_percent_fpr_lira: float | None = None
    tpr_at_1_percent_fpr_ulira: float | None = None
    tpr_at_1_percent_fpr_rmia: float | None = None
    forget_accuracy: float | None = None
    retain_accuracy: float | None = None
    test_accuracy: float | None = None
    unseen_removed_accuracy: float | None = None
    forget_loss: float | None = None
    unseen_loss: float | None = None
    retain_loss: float | None = None
    seconds: float | None = None
    non_finite: Mapping[str, int] = field(default_factory=dict)
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    gap: Mapping[str, float] = field(default_factory=dict)
    gap_intervals: Mapping[str, Interval] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)
    roc: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    histogram: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def number(self, measure: str) -> float | None:
        """A measure by its name, one of `MEASURES`."""
        if measure not in MEASURES:
            raise KeyError(measure)
        value: float | None = getattr(self, measure)
        return value


MEASURES = tuple(f.name for f in fields(ModelAudit) if f.type == "float | None")


def tpr_name(attack: str) -> str:
    """Name of the measure that holds an attack's TPR at 1 % FPR; that of the loss attack has no ending."""
    return "tpr_at_1_percent_fpr" + ("" if attack == "loss" else f"_{attack}")


def attack_scores(
    signals: Mapping[str, Signals], comparison: Comparison, by_models: Mapping[str, tuple[Any, Any]]
) -> dict[str, tuple[Any, Any]]:
    """Scores (members, non-members) of each attack that the signals allow, and of those `by_models`, given for the
    whole forget and unseen set; higher is more likely a member."""
    scores = {
        attack: (rank_safe(forget[comparison.members]), rank_safe(unseen[comparison.nonmembers]))
        for attack, (forget, unseen) in by_models.items()
    }
    for attack in ATTACKS:
        forget, unseen = (getattr(signals[name], attack) for name in ("forget", "unseen"))
        if forget is not None and unseen is not None:
            sign = _ORIENTATION[attack]
            scores[attack] = (
                rank_safe(sign * forget[comparison.members]),
                rank_safe(sign * unseen[comparison.nonmembers]),
            )
    return {attack: scores[attack] for attack in (*ATTACKS, *MODEL_ATTACKS) if attack in scores}


def measure(
    signals: Mapping[str, Signals], scores: Mapping[str, tuple[Any, Any]], comparison: Comparison, *, random_state: int
) -> tuple[dict[str, float | None], dict[str, RocResult], dict[str, int]]:
    """(numbers by the names of `ModelAudit`, ROC of each attack, count of non-finite values by "set signal").

    signals maps "forget" and "unseen", and optionally "retain", to one model's signals; scores are its `attack_scores`.
    """
    forget, unseen, retain = signals["forget"], signals["unseen"], signals.get("retain")
    compared = unseen.select(comparison.nonmembers)
    numbers: dict[str, float | None] = {
        "forget_accuracy": forget.accuracy,
        "retain_accuracy": None if retain is None else retain.accuracy,
        "test_accuracy": _accuracy(unseen, comparison.test),
        "unseen_removed_accuracy": _accuracy(unseen, comparison.unseen_removed),
        "forget_loss": _mean(forget.loss),
        "unseen_loss": _mean(compared.loss),
        "retain_loss": None if retain is None else _mean(retain.loss),
    }
    curves = {}
    for attack, (x_in, x_out) in scores.items():
        curve = roc(np.concatenate([x_in, x_out]), np.repeat([True, False], [x_in.size, x_out.size]))
        curves[attack] = curve
        numbers[f"auc_{attack}"] = curve.auc
        if attack in ATTACKS:
            numbers[f"balanced_accuracy_{attack}"] = curve.balanced_accuracy
        if tpr_name(attack) in MEASURES:
            tpr = curve.tpr_at(0.01)
            numbers[tpr_name(attack)] = None if math.isnan(tpr) else tpr
    members = forget.select(comparison.members)
    for attack in ("loss", "entropy"):
        x_in, x_out = getattr(members, attack), getattr(compared, attack)
        # A model that answers NaN everywhere leaves the regression nothing to learn from.
        if x_in is not None and np.isfinite(np.concatenate([x_in, x_out])).any():
            attacked = simple_mia(x_in, x_out, random_state=random_state)
            numbers[f"mia_{attack}"], numbers[f"mia_{attack}_std"] = attacked.accuracy, attacked.std
    return numbers, curves, _non_finite(signals)


def thin_curve(curve: RocResult) -> dict[str, list[float]]:
    """At most 200 points of a ROC curve: evenly along it, and denser at low false-positive rates."""
    length = curve.fpr + curve.tpr
    even = np.searchsorted(length, np.linspace(0, 2, 3 * _ROC_POINTS // 4))
    low = np.searchsorted(curve.fpr, np.geomspace(1 / curve.n_nonmembers, 1, _ROC_POINTS // 4 - 2))
    last = length.size - 1
    index = np.unique(np.concatenate([[0, last], np.minimum(even, last), np.minimum(low, last)]))
    return {"fpr": curve.fpr[index].round(6).tolist(), "tpr": curve.tpr[index].round(6).tolist()}


def mean_curve(curves: Sequence[RocResult]) -> dict[str, list[float]]:
    """Several models' curves averaged at equal false-positive rates."""
    grid = np.unique(np.concatenate([np.linspace(0, 1, _ROC_POINTS // 2), np.geomspace(1e-4, 1, _ROC_POINTS // 2)]))
    tpr = np.mean([np.interp(grid, c.fpr, c.tpr) for c in curves], axis=0)
    return {"fpr": [0.0, *grid[1:].round(6).tolist()], "tpr": tpr.round(6).tolist()}


def loss_bins(losses: Sequence[NDArray[np.float64]]) -> dict[str, Any]:
    """Common bins of all losses, {"scale": "log" or "linear", "edges": [41]}; losses below the first edge count in it.

    Logarithmic when the losses are not negative and span more than two decades, as memorised samples make them do.
    """
    pooled = np.concatenate(losses)
    pooled = pooled[np.isfinite(pooled)]
    if pooled.size == 0:
        return {"scale": "linear", "edges": np.linspace(0, 1, _BINS + 1).tolist()}
    low, high = np.quantile(pooled, [0.005, 0.999])
    if pooled.min() >= 0 and high > 100 * max(low, _SMALLEST_LOSS):
        return {"scale": "log", "edges": np.geomspace(max(low, _SMALLEST_LOSS), high, _BINS + 1).tolist()}
    return {"scale": "linear", "edges": np.linspace(low, high if high > low else low + 1, _BINS + 1).tolist()}


def histogram(losses: NDArray[np.float64], bins: Mapping[str, Any]) -> list[float]:
    """Share of the samples in each bin; what lies outside counts in the first or last bin, NaN and inf in the last."""
    edges = np.asarray(bins["edges"])
    index = np.searchsorted(edges, np.nan_to_num(losses, nan=np.inf), side="right") - 1
    counts = np.bincount(np.clip(index, 0, edges.size - 2), minlength=edges.size - 1)
    shares: list[float] = (counts / losses.size).round(6).tolist()
    return shares


def _accuracy(signals: Signals, mask: NDArray[np.bool_]) -> float | None:
    return signals.select(mask).accuracy if mask.any() else None


def _mean(values: NDArray[np.float64]) -> float | None:
    mean = float(values.mean())
    return mean if math.isfinite(mean) else None


def _non_finite(signals: Mapping[str, Signals]) -> dict[str, int]:
    counts = {}
    for name, of_set in signals.items():
        for attack in ATTACKS:
            values = getattr(of_set, attack)
            if values is not None and (count := int((~np.isfinite(values)).sum())):
                counts[f"{name} {attack}"] = count
    return counts
