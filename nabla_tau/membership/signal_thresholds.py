"""The four metric-based attacks of Song and Mittal, "Systematic Evaluation of Privacy Risks of Machine Learning Models"
(USENIX Security 2021): correctness, confidence, entropy and modified entropy, with a threshold for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nabla_tau.arguments import numbers_checked
from nabla_tau.membership.outcome import Outcome, axes_or_new, draw_estimates
from nabla_tau.membership.scores import Array, as_classes, as_matrix
from nabla_tau.membership.thresholds import ThresholdAttack, class_thresholds, rule_outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Rows are worked on in pieces of this many float64, which stay in the cache.
_CHUNK_ELEMENTS = 1 << 16


@dataclass(frozen=True, eq=False)
class SongMittalSignals(Outcome):
    """Four scores of each sample [N]; higher means more likely a member.

    correctness: 1 or 0. confidence: log p_y; the logarithm, because p_y of memorised samples rounds to 1 and ties.
    entropy: minus the entropy of the prediction. modified_entropy: minus Mentr. NaN where the outputs hold NaN or +inf.
    """

    correctness: NDArray[np.float64]
    confidence: NDArray[np.float64]
    entropy: NDArray[np.float64]
    modified_entropy: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SongMittalResult(Outcome):
    """The four attacks by name, each judged on samples that its thresholds were not chosen on.

    chosen_on: "shadow", or "other half" where every half of the samples was judged by thresholds from the other one.
    """

    attacks: Mapping[str, ThresholdAttack]
    chosen_on: str
    n_members: int
    n_nonmembers: int
    random_state: int
    orientation: str = "higher scores mean members"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Advantage of each attack with its interval."""
        found = {name: (attack.advantage, attack.interval) for name, attack in self.attacks.items()}
        ax = draw_estimates(axes_or_new(ax), found, reference=0)
        ax.set_xlabel("advantage, TPR - FPR")
        return ax


def song_mittal_signals(outputs: object, targets: object, *, outputs_are: str = "logits") -> SongMittalSignals:
    """Signals of N samples from their outputs [N, C], "logits" or "probabilities", and targets [N] in [0, C).

    Mentr = -(1 - p_y) log p_y - sum over j != y of p_j log(1 - p_j). Stable: 1 - p of the most likely class is the sum
    of the others, and no other p exceeds 1/2, so nothing cancels; from logits the terms keep their relative precision
    however confident the model is. From stored probabilities they keep what is stored: zeros give infinite terms, and
    with them a score of -inf. Rows are worked on in float64 a piece at a time, so a memory map is never copied whole.
    ValueError for fewer than two classes, for a target out of range, and for probabilities outside [0, 1] or of a sum
    that differs from 1 by more than 0.01.
    """
    if outputs_are not in ("logits", "probabilities"):
        raise ValueError(f"outputs_are must be 'logits' or 'probabilities', got {outputs_are!r}")
    array = as_matrix(outputs, "outputs", "[N, C]")
    target = as_classes(targets, len(array), "targets")
    if array.shape[1] < 2 or target.max() >= array.shape[1]:
        raise ValueError(f"outputs must have two or more classes, and all targets, got {list(array.shape)}")
    found = np.empty((4, len(array)))
    step = max(1, _CHUNK_ELEMENTS // array.shape[1])
    for start in range(0, len(array), step):
        part = slice(start, start + step)
        rows = array[part].astype(np.float64)
        if outputs_are == "probabilities":
            rows = _log_probabilities(rows, start)
        found[:, part] = _signals(rows, target[part])
    return SongMittalSignals(*found)


@numbers_checked
def song_mittal(
    members: object,
    member_targets: object,
    nonmembers: object,
    nonmember_targets: object,
    *,
    outputs_are: str = "logits",
    shadow: Sequence[Any] | None = None,
    random_state: int = 0,
    confidence: float = 0.95,
) -> SongMittalResult:
    """Judge the four attacks on a model's outputs for members [M, C] and non-members [N, C], with targets [M] and [N].

    Correctness calls a sample a member when it is classified rightly; the others by class thresholds chosen on
    `shadow` (the same four arguments of a shadow model, as published) or, without one, on the other half of the samples
    (split at random by `random_state`), so that no sample is judged by a threshold it helped to choose. NaN scores
    choose nothing and are never called members. ValueError as for `song_mittal_signals`, and where the samples that
    choose lack members or non-members.
    """
    scores, label, target = _scored((members, member_targets, nonmembers, nonmember_targets), outputs_are)
    chosen = None if shadow is None else _scored(shadow, outputs_are)
    sizes = int(label.sum()), int((~label).sum())
    if min(sizes) < 2:
        raise ValueError(f"two or more members and non-members are needed, got {sizes[0]} and {sizes[1]}")
    first = _halves(sizes, np.random.default_rng(random_state))
    attacks = {}
    for name, score in scores.items():
        if name == "correctness":
            called = score == 1
        elif chosen is not None:
            called = _called(chosen[0][name], *chosen[1:], score, target)
        else:
            called = np.empty(score.size, bool)
            for half in (first, ~first):
                called[half] = _called(score[~half], label[~half], target[~half], score[half], target[half])
        attacks[name] = rule_outcome(
            called[label], called[~label], n_nan=int(np.isnan(score).sum()), confidence=confidence
        )
    return SongMittalResult(
        attacks=attacks,
        chosen_on="other half" if shadow is None else "shadow",
        n_members=sizes[0],
        n_nonmembers=sizes[1],
        random_state=random_state,
    )


def _scored(
    samples: Sequence[Any], outputs_are: str
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.bool_], NDArray[np.int64]]:
    """Scores by signal, labels and classes of (members, targets, non-members, targets), members first."""
    if len(samples) != 4:
        raise ValueError(f"members, their targets, non-members and theirs are needed, got {len(samples)} items")
    parts = [song_mittal_signals(samples[i], samples[i + 1], outputs_are=outputs_are) for i in (0, 2)]
    sizes = [part.confidence.size for part in parts]
    scores = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(SongMittalSignals)}
    classes = np.concatenate([as_classes(samples[i], n, "targets") for i, n in zip((1, 3), sizes, strict=True)])
    return scores, np.repeat([True, False], sizes), classes


def _called(scores: Array, labels: Array, classes: Array, judged: Array, judged_classes: Array) -> NDArray[np.bool_]:
    known = ~np.isnan(scores)
    return class_thresholds(scores[known], labels[known], classes[known]).predict(judged, judged_classes)


def _halves(sizes: Sequence[int], generator: np.random.Generator) -> NDArray[np.bool_]:
    """A random half of each group."""
    return np.concatenate([generator.permutation(n) < n // 2 for n in sizes])


def _log_probabilities(rows: NDArray[np.float64], start: int) -> NDArray[np.float64]:
    total = rows.sum(1)
    bad = (rows < 0).any(1) | (np.abs(total - 1) > 0.01)
    if bad.any():
        first = int(bad.argmax())
        raise ValueError(
            f"probabilities must lie in [0, 1] and sum to 1; row {start + first} sums to {total[first]:.4g}"
        )
    with np.errstate(divide="ignore"):
        logs: NDArray[np.float64] = np.log(rows)
    return logs


def _signals(z: NDArray[np.float64], target: NDArray[np.int64]) -> NDArray[np.float64]:
    """The four signals [4, n] of rows of logits [n, C]."""
    index = np.arange(len(z))
    top = z.argmax(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        largest = z[index, top]
        z = z - largest[:, None]
        # Everything in units of the likeliest class: its weight is 1, and that of all others together is `rest`.
        weight = np.exp(z)
        weight[index, top] = 0
        rest = weight.sum(1)
        log_total = np.log1p(rest)
        p = weight / (1 + rest)[:, None]
        entropy = log_total - (p * np.where(weight > 0, z, 0)).sum(1)
        log_rest = np.log(rest)
        if (tiny := rest < 1e-290).any():
            log_rest[tiny] = _log_rest(z[tiny], top[tiny])
        p_top, log_1_minus_top = 1 / (1 + rest), log_rest - log_total
        log_1_minus = np.log1p(-p)
        others = p * log_1_minus
        correct = top == target
        p_y, log_p_y = p[index, target], z[index, target] - log_total
        total = others.sum(1)
        # 0 log 0 is 0: the likeliest class counts unless it is the target, the target only by its own term.
        right = np.where(rest > 0, rest / (1 + rest) * log_p_y, 0) + total
        wrong = (1 - p_y) * log_p_y + (total - others[index, target]) + p_top * log_1_minus_top
    signals = np.stack([correct.astype(np.float64), log_p_y, -entropy, np.where(correct, right, wrong)])
    signals[:, ~np.isfinite(largest)] = np.nan
    return signals


def _log_rest(z: NDArray[np.float64], top: NDArray[np.intp]) -> NDArray[np.float64]:
    """log of the sum of exp over all classes but `top`, where the sum itself underflows."""
    others = z.copy()
    others[np.arange(len(z)), top] = -np.inf
    second = others.max(1)
    sums: NDArray[np.float64] = second + np.log(np.exp(others - second[:, None]).sum(1))
    return np.where(np.isneginf(second), second, sums)
