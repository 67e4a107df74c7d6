"""What kind of forget set it is: a random subset, one skewed towards some classes, or whole classes.

"Unseen data" means something else for each. A retrained model has the held-out loss on a random subset; on a subset
of skewed classes it has the held-out loss of those classes; and of a class it never saw it knows only that the label
is never right: its loss there is the loss of that label on data of other classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2_contingency, hypergeom
from torch import Tensor, nn

from nabla_tau.batch import Batch, Forward
from nabla_tau.distributed import Ranks, Share
from nabla_tau.evaluation import SampleLoss, counting_losses, over_samples
from nabla_tau.kernels.reference import compute_dtype
from nabla_tau.objective import Target, target_from_losses
from nabla_tau.sources import Source

ForgetKind: TypeAlias = Literal["random subset", "class-skewed subset", "whole classes"]

WHOLE_CLASS = 0.95  # a class counts as removed when the forget set holds at least this share of its training samples
CHANCE = 1e-3  # probability under a random choice below which it is not called random
SMALLEST_EXPECTED = 5  # of the chi-square test; rarer classes are counted together


def _counts(labels: ArrayLike, classes: int) -> NDArray[np.int64]:
    return np.bincount(np.asarray(labels, dtype=np.int64), minlength=classes).astype(np.int64)


def removed_classes(
    forget_targets: ArrayLike, retain_targets: ArrayLike, threshold: float = WHOLE_CLASS
) -> tuple[int, ...]:
    """Classes of which the forget set holds at least `threshold` of all training samples, and would not by chance.

    Labels [N], non-negative. A class of few samples may lie in a random forget set as a whole: it counts only where
    that has a probability below 0.001 over all classes (hypergeometric, Bonferroni).
    """
    forget, retain = np.asarray(forget_targets), np.asarray(retain_targets)
    classes = int(max(forget.max(initial=-1), retain.max(initial=-1))) + 1
    in_forget, in_retain = _counts(forget, classes), _counts(retain, classes)
    in_all = in_forget + in_retain
    share = in_forget / np.maximum(in_all, 1)
    by_chance = hypergeom.sf(in_forget - 1, len(forget) + len(retain), in_all, len(forget))
    removed = (share >= threshold) & (in_forget > 0) & (by_chance * classes < CHANCE)
    return tuple(int(label) for label in np.flatnonzero(removed))


@dataclass(frozen=True)
class ForgetKindReport:
    """`kind`, the removed classes, and the share of each class in the forget set, [classes]; None where the targets
    are not class labels."""

    kind: ForgetKind
    removed: tuple[int, ...] = ()
    forget_share: NDArray[np.float64] | None = None


def forget_kind(forget_targets: Tensor | None, retain_targets: Tensor | None) -> ForgetKindReport:
    """Recognise the kind of a forget set from the labels; targets that are no class labels [N] make a random subset.

    Skewed means that a chi-square test rejects equal class proportions in forget and retain set at p < 0.001.
    """
    if forget_targets is None or retain_targets is None:
        return ForgetKindReport("random subset")
    both = forget_targets, retain_targets
    if any(t.ndim != 1 or t.is_floating_point() or t.dtype == torch.bool or bool((t < 0).any()) for t in both):
        return ForgetKindReport("random subset")
    forget, retain = (t.cpu().numpy() for t in both)
    classes = int(max(forget.max(), retain.max())) + 1
    table = np.stack([_counts(forget, classes), _counts(retain, classes)])
    removed = removed_classes(forget, retain)
    share = table[0] / table[0].sum()
    if removed and len(removed) < np.count_nonzero(table.sum(0)):
        return ForgetKindReport("whole classes", removed, share)
    return ForgetKindReport("class-skewed subset" if _is_skewed(table) else "random subset", (), share)


def _is_skewed(table: NDArray[np.int64]) -> bool:
    """Whether the class counts [2, classes] of forget and retain set differ by more than chance."""
    expected = table.sum(0) * table[0].sum() / table.sum()
    rare = expected < SMALLEST_EXPECTED
    pooled = np.column_stack([table[:, ~rare], table[:, rare].sum(1)])
    pooled = pooled[:, pooled.sum(0) > 0]
    return bool(pooled.shape[1] > 1 and chi2_contingency(pooled).pvalue < CHANCE)


def measure_target(
    model: nn.Module,
    held_out: Source,
    kind: ForgetKindReport,
    *,
    batch_size: int,
    forward: Forward | None = None,
    loss: SampleLoss | None = None,
    samples: int | None = None,
    seed: int = 0,
    absent_limit: float = math.inf,
    ranks: Ranks | None = None,
    sharded: bool = False,
) -> Target:
    """Target of the forget losses for this kind of forget set, from one forward pass over the held-out data.

    Random subset: all held-out losses. Skewed: held-out losses weighted by w_c = (share of class c in the forget
    set) / (its share in the held-out set). Whole classes: -log p(removed label) on held-out samples of other classes,
    in the share that those classes have in the forget set, and the skewed rule for the rest; that loss is cut off at
    `absent_limit`, since the ascent raises it along with the forget losses. samples: for a random subset look only at
    about so many held-out samples, drawn by `seed`. ranks, sharded: as in `over_samples`; every rank gets the target of
    all held-out samples. Raises ValueError where the held-out data has no sample of the classes that the target is
    about.
    """
    plain = kind.kind == "random subset" or kind.forget_share is None
    few = plain and samples is not None
    removed = torch.tensor(kind.removed, dtype=torch.long)

    def read(share: Share) -> Iterator[Batch]:
        if few:
            wanted = -(-(samples or 0) // (ranks.size if ranks and sharded else 1))
            return held_out.sample(wanted, batch_size, seed, share)
        return held_out.read(batch_size, share=share)

    def compute(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        losses, counts = counting_losses(loss, logits, targets)
        if plain:
            return losses, counts
        return losses, counts, targets, -logits.to(compute_dtype(logits)).log_softmax(1)[:, removed.to(logits.device)]

    columns = over_samples(model, read, compute, forward=forward, ranks=ranks, sharded=sharded)
    every, *others = (column[columns[1]] for column in (columns[0], *columns[2:]))
    if kind.forget_share is None or plain:
        return target_from_losses(every)
    label, absent = others[0].long(), others[1]
    wanted = torch.as_tensor(kind.forget_share, device=every.device, dtype=every.dtype)
    wanted = torch.nn.functional.pad(wanted, (0, max(int(label.max()) + 1 - len(wanted), 0)))
    share = torch.bincount(label, minlength=len(wanted)).to(every) / len(label)
    weights = (wanted / share.clamp(min=1e-12))[label]
    is_removed = torch.isin(label, removed.to(label))
    kept = torch.where(is_removed, 0.0, weights)
    kept_share = 1 - wanted[removed.to(every.device)].sum()
    if bool(is_removed.all()) or (kind.kind == "class-skewed subset" and bool(kept.sum() == 0)):
        present, asked = sorted(set(label.tolist())), np.flatnonzero(kind.forget_share).tolist()
        raise ValueError(
            f"held-out data holds only classes {present[:10]}, which say nothing of forget samples of classes "
            f"{asked[:10]}: give held-out data like all of the training data"
        )
    if not kind.removed:
        return target_from_losses(every, kept)
    kept = kept / kept.sum().clamp(min=1e-12) * kept_share
    surprise = absent.to(every).clamp(max=absent_limit)[~is_removed]
    each = wanted[removed.to(every.device)] / len(surprise)
    all_losses = torch.cat((every, surprise.flatten()))
    return target_from_losses(all_losses, torch.cat((kept, each.expand(len(surprise), -1).flatten())))
