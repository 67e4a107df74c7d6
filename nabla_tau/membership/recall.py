"""Where whole classes were removed: does the model still know them?

A model retrained without a class never names it, neither for forgotten samples nor for unseen ones. So it is the
accuracy on both that shows whether a class was forgotten; attacks can only tell samples of the class from one another.

    partly remembered  on forgotten or on unseen samples of the classes the accuracy lies above the reference's, and by
                       more than the tolerance
    remembered         the same, and less than a quarter of what the original model had over the reference is gone
    forgotten          on both the gap is at most the tolerance, and so is the upper end of its interval on all samples
    inconclusive       anything else, and where the original model itself did not know the classes

The reference is the retrained models or, without any, an accuracy of 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from nabla_tau.classes import WHOLE_CLASS
from nabla_tau.evaluation import Signals
from nabla_tau.membership.comparison import Comparison

HARDLY_CLOSED = 0.25

_Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Recall:
    """What a model knows of the removed classes: `code` (as of a verdict) and a sentence with the accuracies.

    whole: the forget set holds little else, so that this is the question to ask.
    """

    code: str
    sentence: str
    whole: bool


def paired_interval(difference: _Vector, confidence: float) -> tuple[float, float]:
    """Interval of a mean of paired differences in accuracy [N], with two samples added that disagree by half each way
    (Agresti and Min): so it has a width even where two models agree on every sample."""
    n = difference.size + 2
    mean = difference.sum() / n
    variance = ((difference**2).sum() + 1) / n - mean**2
    half = NormalDist().inv_cdf((1 + confidence) / 2) * np.sqrt(variance / n)
    return float(mean - half), float(mean + half)


def recall_of(
    signals: Mapping[str, Mapping[str, Signals]],
    model: str,
    retrained: Sequence[str],
    original: str | None,
    comparison: Comparison,
    *,
    confidence: float,
    tolerance: float,
) -> Recall | None:
    """Judge what `model` knows of the removed classes; None where none were removed or correctness is unknown."""
    target = signals[model]["forget"].target
    if not comparison.removed or target is None or not comparison.unseen_removed.any():
        return None
    removed = np.isin(target, comparison.removed)
    if not removed.any():
        return None

    def correct(names: Sequence[str]) -> tuple[_Vector, _Vector] | None:
        parts = []
        for of_set, mask in (("forget", removed), ("unseen", comparison.unseen_removed)):
            columns = [c[mask] for name in names if (c := signals[name][of_set].correct) is not None]
            if len(columns) < len(names):
                return None
            share: _Vector = np.asarray(columns, dtype=np.float64).reshape(-1, int(mask.sum())).sum(0)
            parts.append(share / max(len(columns), 1))
        return parts[0], parts[1]

    ours, reference = correct([model]), correct(retrained)
    before = correct([original]) if original is not None else None
    if ours is None or reference is None or (original is not None and before is None):
        return None
    gaps = [a - b for a, b in zip(ours, reference, strict=True)]
    original_gaps = None if before is None else [a - b for a, b in zip(before, reference, strict=True)]
    code, reason = _decide(gaps, original_gaps, confidence, tolerance)
    return Recall(
        code=code,
        sentence=f"{reason} {_figures(ours, before, reference if retrained else None, gaps, original_gaps)}",
        whole=bool(removed.mean() >= WHOLE_CLASS),
    )


def _decide(
    gaps: Sequence[_Vector], original_gaps: Sequence[_Vector] | None, confidence: float, tolerance: float
) -> tuple[str, str]:
    wide = 1 - (1 - confidence) / len(gaps)
    known = [i for i, gap in enumerate(gaps) if paired_interval(gap, wide)[0] > 0 and float(gap.mean()) > tolerance]
    if known:
        most = max(known, key=lambda i: float(gaps[i].mean()))
        closed = None if original_gaps is None else _closed(gaps[most], original_gaps[most])
        hardly = closed is not None and closed < HARDLY_CLOSED
        return "remembered" if hardly else "partly remembered", "The model still knows the removed classes."
    if original_gaps is not None and paired_interval(np.concatenate(original_gaps), confidence)[0] <= 0:
        return "inconclusive", "Not even the original model knew the removed classes, so nothing shows their removal."
    if (
        max(float(gap.mean()) for gap in gaps) <= tolerance
        and paired_interval(np.concatenate(gaps), confidence)[1] <= tolerance
    ):
        return "forgotten", "The model no longer knows the removed classes."
    return "inconclusive", "Whether the model still knows the removed classes cannot be told from so few samples."


def _closed(gap: _Vector, original_gap: _Vector) -> float:
    before = float(original_gap.mean())
    return 1 - float(gap.mean()) / before if before > 0 else 0.0


def _figures(
    ours: tuple[_Vector, _Vector],
    before: tuple[_Vector, _Vector] | None,
    reference: tuple[_Vector, _Vector] | None,
    gaps: Sequence[_Vector],
    original_gaps: Sequence[_Vector] | None,
) -> str:
    others = [(name, pair) for name, pair in (("retrained", reference), ("original", before)) if pair is not None]
    texts = []
    for i, which in enumerate(("forgotten samples", "unseen samples")):
        beside = ", ".join(f"{name} {pair[i].mean():.1%}" for name, pair in others)
        texts.append(f"{ours[i].mean():.1%} of the {ours[i].size} {which} of them" + (f" ({beside})" if beside else ""))
    text = f"It names {texts[0]} and {texts[1]} rightly"
    if original_gaps is None or not (total := float(np.concatenate(original_gaps).mean())) > 0:
        return f"{text}."
    share = 1 - float(np.concatenate(gaps).mean()) / total
    return f"{text}: {max(min(share, 1.0), 0.0):.0%} of what the original model knew of them is gone."
