"""mia: statistics on the scores of one model, against good numpy, scikit-learn and scipy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from case import Case, Provider
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score, roc_curve

from nabla_tau.membership.bootstrap import bootstrap_auc
from nabla_tau.membership.curve import roc
from nabla_tau.membership.delong import delong_test
from nabla_tau.membership.signal_thresholds import song_mittal_signals
from nabla_tau.membership.thresholds import class_thresholds

Array = NDArray[np.float64]
REPLICATES = 1000
FPR = 0.01
# scikit-learn takes turns with the others only if it makes few resamples; its time is scaled up.
SKLEARN_SHARE = 50


def numpy_roc(scores: Array, label: NDArray[np.bool_]) -> tuple[Array, Array, Array, float]:
    """One sort, cumulated calls, the last of each group of ties; the AUC from integer counts."""
    order = np.argsort(scores)[::-1]
    ordered, member = scores[order], label[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    tp, fp = np.append(0, np.cumsum(member)[last]), np.append(0, np.cumsum(~member)[last])
    auc = (np.diff(tp) @ (2 * fp[-1] - fp[1:] - fp[:-1])) / (2 * tp[-1] * fp[-1])
    return fp / fp[-1], tp / tp[-1], np.append(np.inf, ordered[last]), float(auc)


def numpy_bootstrap(inside: Array, outside: Array) -> tuple[Array, Array]:
    """AUC and TPR of every replicate by cumulated counts over presorted ranks, 80 replicates at a time."""
    outside, inside = np.sort(outside), np.sort(inside)
    below, upto = np.searchsorted(outside, inside, "left"), np.searchsorted(outside, inside, "right")
    members_upto = np.searchsorted(inside, outside, "right")
    m, n = inside.size, outside.size
    allowed, generator, aucs, tprs = int(FPR * n), np.random.default_rng(0), [], []
    for start in range(0, REPLICATES, 80):
        width = min(80, REPLICATES - start)
        counts = []
        for size in (m, n):
            cells = generator.integers(0, size, size=(size, width)) * width + np.arange(width)
            counts.append(np.bincount(cells.ravel(), minlength=size * width).reshape(size, width).astype(np.int32))
        sums = [np.zeros((c.shape[0] + 1, width), np.int32) for c in counts]
        for c, s in zip(counts, sums, strict=True):
            np.cumsum(c, axis=0, dtype=np.int32, out=s[1:])
        twice = sums[1][below] + sums[1][upto]
        aucs.append(np.einsum("mb,mb->b", counts[0], twice, dtype=np.float64, casting="safe") / (2 * m * n))
        refused = (sums[1] < n - allowed).sum(0) - 1
        tprs.append((m - sums[0][members_upto[refused], np.arange(width)]) / m)
    return np.concatenate(aucs), np.concatenate(tprs)


def sklearn_bootstrap(inside: Array, outside: Array) -> None:
    generator = np.random.default_rng(0)
    label = np.repeat([1, 0], [inside.size, outside.size])
    for _ in range(REPLICATES // SKLEARN_SHARE):
        scores = np.concatenate([generator.choice(inside, inside.size), generator.choice(outside, outside.size)])
        fpr, tpr, _ = roc_curve(label, scores)
        roc_auc_score(label, scores), tpr[fpr <= FPR].max()


def numpy_class_thresholds(scores: Array, labels: NDArray[np.bool_], classes: NDArray[np.int64]) -> Array:
    """One sort for each class, cumulated calls, and the last of each group of ties."""
    found = []
    for c in range(int(classes.max()) + 1):
        mine = classes == c
        s, member = scores[mine], labels[mine]
        order = np.argsort(s)[::-1]
        s, member = s[order], member[order]
        tp, fp = np.cumsum(member), np.cumsum(~member)
        value = np.where(np.append(s[1:] != s[:-1], True), tp / tp[-1] - fp / fp[-1], -1)
        found.append(s[value.argmax()])
    return np.array(found)


def numpy_delong(a: Array, b: Array, label: NDArray[np.bool_]) -> float:
    """Placements by sort and binary search of sorted values."""
    placements = []
    for x in (a, b):
        groups = [x[label], x[~label]]
        of_both = []
        for own, other in (groups, groups[::-1]):
            order, ordered = np.argsort(own), np.sort(other)
            twice = np.searchsorted(ordered, own[order], "left") + np.searchsorted(ordered, own[order], "right")
            v = np.empty(own.size)
            v[order] = twice / (2 * other.size)
            of_both.append(v)
        placements.append(of_both)
    (in_a, out_a), (in_b, out_b) = placements
    return float((in_a - in_b).var(ddof=1) / in_a.size + (out_a - out_b).var(ddof=1) / out_a.size)


def midrank_delong(a: Array, b: Array, label: NDArray[np.bool_]) -> float:
    """Sun and Xu's midranks, by scipy."""
    v10, v01 = [], []
    for x in (a, b):
        pooled = rankdata(x)
        v10.append((pooled[label] - rankdata(x[label])) / (~label).sum())
        v01.append((pooled[~label] - rankdata(x[~label])) / label.sum())
    return float(np.subtract(*v10).var(ddof=1) / len(v10[0]) + np.subtract(*v01).var(ddof=1) / len(v01[0]))


def numpy_signals(logits: Array, targets: NDArray[np.int64]) -> Array:
    """Song and Mittal's signals as one writes them, the whole matrix at a time."""
    z = logits.astype(np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    index = np.arange(len(z))
    log_p, log_1_minus, own = np.log(np.maximum(p, 1e-30)), np.log(np.maximum(1 - p, 1e-30)), p[index, targets]
    rest = (p * log_1_minus).sum(1) - (own * log_1_minus[index, targets])
    return np.stack([p.argmax(1) == targets, own, (p * log_p).sum(1), (1 - own) * log_p[index, targets] + rest])


def cases(quick: bool) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    shrink = 50 if quick else 1
    for n in (50_000 // shrink, 1_000_000 // shrink):
        scores, label = rng.normal(size=n), rng.random(n) < 0.5
        yield Case(
            f"roc and auc {n}",
            "float64",
            "scikit-learn",
            {
                "nabla_tau": Provider(lambda s=scores, y=label: roc(s, y)),
                "numpy": Provider(lambda s=scores, y=label: numpy_roc(s, y)),
                "scikit-learn": Provider(lambda s=scores, y=label: (roc_curve(y, s), roc_auc_score(y, s))),
            },
        )
    n = 25_000 // shrink
    inside, outside = rng.normal(0.5, 1, n), rng.normal(size=n)
    yield Case(
        f"bootstrap {REPLICATES} x {2 * n}, auc + tpr",
        "float64",
        "numpy",
        {
            "nabla_tau": Provider(
                lambda: bootstrap_auc({"m": inside}, {"m": outside}, fpr=[FPR], replicates=REPLICATES)
            ),
            "numpy": Provider(lambda: numpy_bootstrap(inside, outside)),
            "scikit-learn": Provider(lambda: sklearn_bootstrap(inside, outside), SKLEARN_SHARE),
        },
    )
    a, b = (np.concatenate([inside, outside]) + rng.normal(size=2 * n) for _ in range(2))
    half = np.arange(2 * n) < n
    yield Case(
        f"delong test {2 * n}",
        "float64",
        "numpy",
        {
            "nabla_tau": Provider(lambda: delong_test(a, b, half)),
            "numpy": Provider(lambda: numpy_delong(a, b, half)),
            "scipy midranks": Provider(lambda: midrank_delong(a, b, half)),
        },
    )
    n = 50_000 // shrink
    losses, member = rng.normal(size=2 * n), np.arange(2 * n) < n
    classes = rng.integers(0, 10, 2 * n)
    yield Case(
        f"class thresholds {n} + {n}, C = 10",
        "float64",
        "numpy",
        {
            "nabla_tau": Provider(lambda: class_thresholds(losses, member, classes)),
            "numpy": Provider(lambda: numpy_class_thresholds(losses, member, classes)),
        },
    )
    logits, targets = 4 * rng.normal(size=(n, 10)).astype(np.float32), rng.integers(0, 10, n)
    yield Case(
        f"song-mittal signals {n} x 10",
        "float32",
        "numpy",
        {
            "nabla_tau": Provider(lambda: song_mittal_signals(logits, targets)),
            "numpy": Provider(lambda: numpy_signals(logits, targets)),
        },
    )
