"""Membership and forgetting of text: scores from log-probabilities of tokens, PrivLeak, TOFU's forget quality."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from nabla_tau.arguments import numbers_checked
from nabla_tau.membership.attack_scores import draw_scores
from nabla_tau.membership.bootstrap import AucBootstrap, percentile_interval
from nabla_tau.membership.outcome import Outcome, axes_or_new, draw_estimates
from nabla_tau.membership.scores import as_labels, as_matrix, as_same_scores, as_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Logits worked on at one time by `token_statistics`.
_CHUNK_ELEMENTS = 1 << 22
_SMALLEST_VARIANCE = 1e-6

Tokens = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TextScores(Outcome):
    """Score of each text [N], higher for members, from n_tokens [N] tokens; NaN for a text without tokens.

    n_nan: tokens that were dropped because they are NaN.
    """

    score: NDArray[np.float64]
    n_tokens: NDArray[np.int64]
    n_nan: int
    orientation: str = "higher scores mean members"

    def plot(self, ax: Axes | None = None, *, members: object = None) -> Axes:
        """Histogram of the scores, of `members` [N] and others apart if they are known."""
        return draw_scores(axes_or_new(ax), self.score, members, self.orientation)


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """Of each token [T]: log-probability, and mean and variance of log p over the vocabulary under p itself."""

    log_prob: NDArray[np.float64]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


def token_statistics(logits: object, targets: object) -> TokenStatistics:
    """What Min-K and Min-K++ need of each token, from logits [T, V] that predict targets [T].

    In float32, or float64 for float64 logits, a piece of the rows at a time; on the device of the logits. ValueError
    for another shape and for a target out of range.
    """
    z = logits if isinstance(logits, torch.Tensor) else torch.from_numpy(as_matrix(logits, "logits", "[T, V]"))
    try:
        y = torch.as_tensor(targets)
    except RuntimeError as error:
        raise TypeError(f"targets must be integers: {error}") from error
    if not z.is_floating_point() or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"logits must be floating and targets integers, got {z.dtype} and {y.dtype}")
    if z.ndim != 2 or z.numel() == 0 or y.shape != z.shape[:1]:
        raise ValueError(f"logits must be [T, V] and targets [T], got {list(z.shape)} and {list(y.shape)}")
    if y.min() < 0 or y.max() >= z.shape[1]:
        raise ValueError(f"targets must be in [0, {z.shape[1]}), got {int(y.min())} to {int(y.max())}")
    y = y.to(z.device, torch.int64)
    parts = []
    step = max(1, _CHUNK_ELEMENTS // z.shape[1])
    with torch.no_grad():
        for start in range(0, len(z), step):
            rows = z[start : start + step]
            log_p = rows.log_softmax(1, dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)
            p = log_p.exp()
            # A class that is ruled out has p = 0 and log p = -inf, and adds nothing.
            finite = torch.where(p > 0, log_p, 0)
            mean = (p * finite).sum(1)
            variance = (p * (finite - mean[:, None]) ** 2).sum(1)
            own = log_p.gather(1, y[start : start + step, None])[:, 0]
            parts.append(torch.stack([own, mean, variance]).double().cpu())
    return TokenStatistics(*torch.cat(parts, 1).numpy())


@numbers_checked
def min_k(log_probs: object, *, k: float = 0.2, mask: object = None) -> TextScores:
    """Min-K% (Shi et al. 2024): mean of the lowest max(1, floor(k n)) log-probabilities of a text's n tokens.

    log_probs: [N, T], where mask [N, T] (True: a token) or NaN tells padding, or a sequence of N arrays.
    """
    return _lowest(_texts(log_probs, mask, "log_probs"), k)


@numbers_checked
def min_k_pp(log_probs: object, mean: object, variance: object, *, k: float = 0.2, mask: object = None) -> TextScores:
    """Min-K%++ (Zhang et al. 2025): Min-K of (log p - mean) / sqrt(max(variance, 1e-6)), all three of one shape.

    mean, variance: of log p over the vocabulary at that token, as from `token_statistics`.
    """
    texts = [_texts(x, mask, name) for x, name in ((log_probs, "log_probs"), (mean, "mean"), (variance, "variance"))]

    def standardised() -> Iterator[Tokens]:
        for p, mu, var in zip(*texts, strict=True):
            if not p.shape == mu.shape == var.shape:
                raise ValueError(f"log_probs, mean and variance differ in tokens: {p.size}, {mu.size} and {var.size}")
            yield (p - mu) / np.sqrt(np.maximum(var, _SMALLEST_VARIANCE))

    return _lowest(standardised(), k)


def zlib_ratio(losses: object, texts: Sequence[str | bytes]) -> NDArray[np.float64]:
    """Score [N]: minus the mean token loss [N] over the bytes of the text's zlib compression (Carlini et al. 2021)."""
    loss = as_scores(losses, "losses")
    if len(texts) != loss.size:
        raise ValueError(f"as many texts as losses are needed, got {len(texts)} and {loss.size}")
    size = [len(zlib.compress(t.encode() if isinstance(t, str) else t)) for t in texts]
    score: NDArray[np.float64] = -loss.astype(np.float64) / size
    return score


def reference_difference(losses: object, reference_losses: object) -> NDArray[np.float64]:
    """Score [N]: loss of a reference model, which never saw the texts, minus the loss [N] (Carlini et al. 2021)."""
    own, other = as_same_scores(losses, "losses", reference_losses, "reference_losses")
    if own.size != other.size:
        raise ValueError(f"both models must be scored on the same texts, got {own.size} and {other.size}")
    score: NDArray[np.float64] = other.astype(np.float64) - own
    return score


@dataclass(frozen=True)
class PrivLeakResult(Outcome):
    """value: 100 (AUC_ref - AUC) / (1 - AUC_ref), in percent; NaN, and resolvable False, where AUC_ref is 1.

    0: as a retrained model. Towards -100: members are still found (under-unlearned). Above 0: they stand out by scores
    that are too low (over-unlearned). interval: percentile, paired over the models; (NaN, NaN) from AUCs alone.
    """

    value: float
    interval: tuple[float, float]
    auc: float
    auc_retrained: float
    reading: str
    resolvable: bool
    confidence: float
    n_members: int | None = None
    n_nonmembers: int | None = None
    random_state: int | None = None
    orientation: str = "AUC above 1/2: members score higher"

    def plot(self, ax: Axes | None = None) -> Axes:
        """The value with its interval; 0 is a retrained model."""
        ax = draw_estimates(axes_or_new(ax), {"PrivLeak": (self.value, self.interval)}, reference=0)
        ax.set_xlabel("percent: below 0 under-unlearned, above 0 over-unlearned")
        return ax


@numbers_checked
def privleak(auc: float, auc_retrained: float) -> PrivLeakResult:
    """PrivLeak of MUSE (Shi et al. 2025), 100 ((1 - AUC) - (1 - AUC_ref)) / (1 - AUC_ref), from AUCs of forgotten
    against unseen texts (higher scores mean members) of an unlearned and of a retrained model.

    With one AUC each there is no interval, and `reading` goes by the sign alone; `privleak_bootstrap` has one.
    """
    for name, value in (("auc", auc), ("auc_retrained", auc_retrained)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    value = _leak(auc, auc_retrained)
    return PrivLeakResult(
        value=value,
        interval=(math.nan, math.nan),
        auc=auc,
        auc_retrained=auc_retrained,
        reading=_reading(value, value),
        resolvable=auc_retrained < 1,
        confidence=math.nan,
    )


def privleak_bootstrap(
    attack: AucBootstrap, model: str, retrained: str | Sequence[str], *, confidence: float = 0.95
) -> PrivLeakResult:
    """PrivLeak with an interval, from a bootstrap of AUCs that holds both models; several retrained: their mean."""
    value = _leak(attack.value(model), attack.value(retrained))
    names = (retrained,) if isinstance(retrained, str) else retrained
    reference = np.mean([attack.replicates[name] for name in names], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = percentile_interval(100 * (reference - attack.replicates[model]) / (1 - reference), confidence)
    return PrivLeakResult(
        value=value,
        interval=(low, high),
        auc=attack.value(model),
        auc_retrained=attack.value(retrained),
        reading=_reading(low, high),
        resolvable=math.isfinite(value),
        confidence=confidence,
        n_members=attack.n_members,
        n_nonmembers=attack.n_nonmembers,
        random_state=attack.random_state,
    )


@dataclass(frozen=True)
class KsResult(Outcome):
    """TOFU's forget quality: p_value of the two-sample Kolmogorov-Smirnov test; small: told from a retrained model.

    smallest_p_value: what two samples of these sizes give when they do not overlap at all; `resolvable` if that is at
    most 0.05. A large p-value of few samples says little. n_nan: values dropped.
    """

    p_value: float
    log10_p_value: float
    statistic: float
    smallest_p_value: float
    resolvable: bool
    n_unlearned: int
    n_retrained: int
    n_nan: int

    def plot(self, ax: Axes | None = None) -> Axes:
        """The p-value on a logarithmic axis down to the smallest that these sample sizes can give, with 0.05 across."""
        found = {"KS": (self.p_value, (self.smallest_p_value, 1.0))}
        ax = draw_estimates(axes_or_new(ax), found, reference=0.05)
        ax.set(xscale="log", xlabel="p-value; small: told from a retrained model")
        return ax


def ks_quality(unlearned: object, retrained: object) -> KsResult:
    """Forget quality (Maini et al. 2024): do the truth ratios [N] of an unlearned model on the forget set look like
    those [M] of a model retrained without it? Two-sided `scipy.stats.ks_2samp`. ValueError if one holds only NaN."""
    from scipy.stats import ks_2samp

    a, b = (as_scores(x, name) for x, name in ((unlearned, "unlearned"), (retrained, "retrained")))
    kept = [x[~np.isnan(x)] for x in (a, b)]
    if not kept[0].size or not kept[1].size:
        raise ValueError(f"truth ratios must not all be NaN, got {kept[0].size} and {kept[1].size} others")
    test = ks_2samp(*kept)
    n, m = kept[0].size, kept[1].size
    # Of all orders of n + m distinct values two separate the samples.
    log_orders = math.lgamma(n + m + 1) - math.lgamma(n + 1) - math.lgamma(m + 1)
    smallest = min(1.0, 2 * math.exp(-log_orders))
    p_value = float(test.pvalue)
    return KsResult(
        p_value=p_value,
        log10_p_value=math.log10(p_value) if p_value > 0 else -math.inf,
        statistic=float(test.statistic),
        smallest_p_value=smallest,
        resolvable=smallest <= 0.05,
        n_unlearned=n,
        n_retrained=m,
        n_nan=a.size + b.size - n - m,
    )


def _texts(values: object, mask: object, name: str) -> list[Tokens]:
    """The tokens of each text."""
    if isinstance(values, (list, tuple)) and mask is None:
        return [as_scores(v, f"{name}[{i}]") if np.size(v) else np.empty(0) for i, v in enumerate(values)]
    array = as_matrix(values, name, "[N, T]")
    if mask is None:
        return list(array)
    kept = np.asarray(mask)
    if kept.shape != array.shape:
        raise ValueError(f"mask must have shape {list(array.shape)}, got {list(kept.shape)}")
    return [row[as_labels(row_mask, row.size)] for row, row_mask in zip(array, kept, strict=True)]


def _lowest(texts: Sequence[Tokens] | Iterator[Tokens], k: float) -> TextScores:
    if not 0.0 < k <= 1.0:
        raise ValueError(f"k must be in (0, 1], got {k}")
    scores, counts, n_nan = [], [], 0
    for tokens in texts:
        known = tokens[~np.isnan(tokens)]
        n_nan += tokens.size - known.size
        counts.append(known.size)
        if known.size == 0:
            scores.append(math.nan)
            continue
        # The slack forgives rounding: 0.29 of 100 tokens are 29, whatever binary fractions say.
        lowest = max(1, math.floor(k * known.size + 1e-9))
        scores.append(float(np.partition(known, lowest - 1)[:lowest].mean(dtype=np.float64)))
    return TextScores(np.array(scores), np.array(counts, np.int64), n_nan)


def _leak(auc: float, reference: float) -> float:
    return 100 * (reference - auc) / (1 - reference) if reference < 1 else math.nan


def _reading(low: float, high: float) -> str:
    if high < 0:
        return "under-unlearned"
    return "over-unlearned" if low > 0 else "no evidence"
