"""Differences to the retrained models: of every number, and with an interval where samples can be paired.

A *model* here is a tuple of names; several names stand for their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from nabla_tau.evaluation import Signals
from nabla_tau.membership.bootstrap import AucBootstrap
from nabla_tau.membership.comparison import Comparison
from nabla_tau.membership.measures import MEASURES, Interval, tpr_name
from nabla_tau.membership.verdict import Utility

Numbers = Mapping[str, float | None]
SetsOf = Mapping[str, Mapping[str, Signals]]

# The standard deviation over cross-validation splits and the wall time are no properties to be matched.
_COMPARED = tuple(name for name in MEASURES if name != "seconds" and not name.endswith("_std"))


def mean_numbers(numbers: Mapping[str, Numbers], model: Sequence[str]) -> dict[str, float | None]:
    """Every measure averaged over the model's names; None where one of them has none."""
    means: dict[str, float | None] = {}
    for measure in MEASURES:
        values = [numbers[name].get(measure) for name in model]
        known = [v for v in values if v is not None]
        means[measure] = float(np.mean(known)) if len(known) == len(values) else None
    return means


def gaps(numbers: Mapping[str, Numbers], model: Sequence[str], reference: Sequence[str]) -> dict[str, float]:
    """Measure -> value of the model minus that of the reference, where both are known; {} without a reference."""
    if not reference:
        return {}
    ours, theirs = mean_numbers(numbers, model), mean_numbers(numbers, reference)
    return {m: a - b for m in _COMPARED if (a := ours[m]) is not None and (b := theirs[m]) is not None}


def spread(numbers: Mapping[str, Numbers], model: Sequence[str]) -> dict[str, float]:
    """Measure -> sample standard deviation over several models; {} for a single one."""
    if len(model) < 2:
        return {}
    columns = {m: [v for name in model if (v := numbers[name].get(m)) is not None] for m in _COMPARED}
    return {m: float(np.std(column, ddof=1)) for m, column in columns.items() if len(column) == len(model)}


def gap_intervals(
    attacks: Mapping[str, AucBootstrap],
    signals: SetsOf,
    model: Sequence[str],
    reference: Sequence[str],
    comparison: Comparison,
    confidence: float,
) -> dict[str, Interval]:
    """Intervals of the gaps in AUC and TPR (paired bootstrap) and accuracy (paired, normal); {} without a reference."""
    if not reference:
        return {}
    found = {
        f"auc_{name}": attack.gap_interval(tuple(model), tuple(reference), confidence=confidence)
        for name, attack in attacks.items()
    }
    for name, attack in attacks.items():
        tpr = attack.tpr[0.01]
        if tpr_name(name) in MEASURES and tpr.resolution != "not resolvable":
            found[tpr_name(name)] = tpr.gap_interval(tuple(model), tuple(reference), confidence=confidence)
    everything = np.ones(comparison.members.size, bool)
    for measure, of_set, mask in (
        ("forget", "forget", everything),
        ("test", "unseen", comparison.test),
        ("unseen_removed", "unseen", comparison.unseen_removed),
    ):
        interval = accuracy_gap_interval(signals, model, reference, of_set, mask, confidence)
        if interval is not None:
            found[f"{measure}_accuracy"] = interval
    return found


def accuracy_gap_interval(
    signals: SetsOf,
    model: Sequence[str],
    reference: Sequence[str],
    of_set: str,
    mask: NDArray[np.bool_],
    confidence: float,
) -> Interval | None:
    """Normal interval of the difference in accuracy on the samples of `mask`: both answer the same samples, so only
    those they disagree on count. None where correctness is unknown or fewer than two samples are left."""
    ours, theirs = (_correct(signals, names, of_set) for names in (model, reference))
    if ours is None or theirs is None or mask.sum() < 2:
        return None
    difference = (ours - theirs)[mask]
    half = NormalDist().inv_cdf((1 + confidence) / 2) * difference.std(ddof=1) / np.sqrt(difference.size)
    return float(difference.mean() - half), float(difference.mean() + half)


def utility_of(
    which: str,
    signals: SetsOf,
    numbers: Mapping[str, Numbers],
    model: Sequence[str],
    retrained: Sequence[str],
    original: str | None,
    comparison: Comparison,
    confidence: float,
) -> Utility | None:
    """Accuracy on the "Test" or "Retain" set beside that of the retrained models or, without them, of the original;
    None without either or without that set."""
    reference = tuple(retrained) or ((original,) if original else ())
    of_set = {"Test": "unseen", "Retain": "retain"}[which]
    if not reference or any(of_set not in signals[name] for name in (*model, *reference)):
        return None
    mask = comparison.test if which == "Test" else np.ones(len(signals[model[0]][of_set]), bool)
    interval = accuracy_gap_interval(signals, model, reference, of_set, mask, confidence)
    measure = f"{which.lower()}_accuracy"
    ours, theirs = (mean_numbers(numbers, names)[measure] for names in (model, reference))
    if interval is None or ours is None or theirs is None:
        return None
    return Utility(which, ours, theirs, "retrained" if retrained else "original", *interval)


def _correct(signals: SetsOf, names: Sequence[str], of_set: str) -> NDArray[np.float64] | None:
    columns = [signals[name][of_set].correct for name in names]
    known = [c for c in columns if c is not None]
    if len(known) < len(columns):
        return None
    mean: NDArray[np.float64] = np.mean(known, axis=0, dtype=np.float64)
    return mean
