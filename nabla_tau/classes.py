"""What kind of forget set it is: a random subset, one skewed towards some classes, or whole classes.

"Unseen data" means something else for each. A retrained model has the held-out loss on a random subset; on a subset
of skewed classes it has the held-out loss of those classes; and of a class it never saw it knows only that the label
is never right: its loss there is the loss of that label on data of other classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2_contingency
from torch import Tensor, nn

from nabla_tau.batch import Forward
from nabla_tau.evaluation import SampleLoss, forward_batches
from nabla_tau.functional import sample_losses
from nabla_tau.objective import Target, target_from_losses
from nabla_tau.sources import Source

ForgetKind: TypeAlias = Literal["random subset", "class-skewed subset", "whole classes"]

WHOLE_CLASS = 0.95  # a class counts as removed when the forget set holds at least this share of its training samples
SKEW_P_VALUE = 1e-3  # a random subset is called skewed once in a thousand


def _counts(labels: ArrayLike, classes: int) -> NDArray[np.int64]:
    return np.bincount(np.asarray(labels, dtype=np.int64), minlength=classes).astype(np.int64)


def removed_classes(
    forget_targets: ArrayLike, retain_targets: ArrayLike, threshold: float = WHOLE_CLASS
) -> tuple[int, ...]:
    """Classes of which the forget set holds at least `threshold` of all training samples. Labels [N], non-negative."""
    forget, retain = np.asarray(forget_targets), np.asarray(retain_targets)
    classes = int(max(forget.max(initial=-1), retain.max(initial=-1))) + 1
    in_forget, in_retain = _counts(forget, classes), _counts(retain, classes)
    share = in_forget / np.maximum(in_forget + in_retain, 1)
    return tuple(int(label) for label in np.flatnonzero((share >= threshold) & (in_forget > 0)))


@dataclass(frozen=True)
class ForgetKindReport:
    """`kind`, the removed classes, and the share of each class in the forget set, [classes]; None where the targets
    are not class labels."""

    kind: ForgetKind
    removed: tuple[int, ...] = ()
    forget_share: NDArray[np.float64] | None = None


def forget_kind(forget_targets: Tensor, retain_targets: Tensor) -> ForgetKindReport:
    """Recognise the kind of a forget set from the labels; targets that are no class labels [N] make a random subset.

    Skewed means that a chi-square test rejects equal class proportions in forget and retain set at p < 0.001.
    """
    both = forget_targets, retain_targets
    if any(t.ndim != 1 or t.is_floating_point() or t.dtype == torch.bool or bool((t < 0).any()) for t in both):
        return ForgetKindReport("random subset")
    forget, retain = (t.cpu().numpy() for t in both)
    classes = int(max(forget.max(), retain.max())) + 1
    table = np.stack([_counts(forget, classes), _counts(retain, classes)])
    removed = removed_classes(forget, retain)
    share = table[0] / table[0].sum()
    present = table[:, table.sum(0) > 0]
    if removed and len(removed) < present.shape[1]:
        return ForgetKindReport("whole classes", removed, share)
    skewed = present.shape[1] > 1 and chi2_contingency(present).pvalue < SKEW_P_VALUE
    return ForgetKindReport("class-skewed subset" if skewed else "random subset", (), share)


def measure_target(
    model: nn.Module,
    held_out: Source,
    kind: ForgetKindReport,
    *,
    batch_size: int,
    forward: Forward | None = None,
    loss: SampleLoss | None = None,
    samples: int | None = None,
    seed: int | None = None,
    absent_limit: float = math.inf,
) -> Target:
    """Target of the forget losses for this kind of forget set, from one forward pass over the held-out data.

    Random subset: all held-out losses. Skewed: held-out losses weighted by w_c = (share of class c in the forget
    set) / (its share in the held-out set). Whole classes: -log p(removed label) on held-out samples of other classes,
    in the share that those classes have in the forget set, and the skewed rule for the rest; that loss is cut off at
    `absent_limit`, since the ascent raises it along with the forget losses. samples: for a random subset look only at
    about so many held-out samples, drawn by `seed`.
    """
    sample_loss = loss or sample_losses
    losses, labels, absent = [], [], []
    removed = torch.tensor(kind.removed)
    enough = samples if samples is not None and kind.kind == "random subset" else math.inf
    for logits, targets in forward_batches(model, held_out, batch_size, forward, seed):
        losses.append(sample_loss(logits, targets))
        labels.append(targets)
        if kind.removed:
            # Each sample is asked about one of the removed labels, in turn.
            asked = removed[torch.arange(len(targets)) % len(removed)].to(targets)
            absent.append(sample_loss(logits, asked).clamp(max=absent_limit))
        if sum(map(len, losses)) >= enough:
            break
    every = torch.cat(losses)
    if kind.kind == "random subset" or kind.forget_share is None:
        return target_from_losses(every)
    label = torch.cat(labels)
    forget_share = torch.as_tensor(kind.forget_share, device=every.device, dtype=every.dtype)
    unknown = int(label.max()) + 1 - len(forget_share)
    forget_share = torch.nn.functional.pad(forget_share, (0, max(unknown, 0)))
    share = torch.bincount(label, minlength=len(forget_share)).to(every) / len(label)
    weights = (forget_share / share.clamp(min=1e-12))[label]
    if not kind.removed:
        return target_from_losses(every, weights)
    is_removed = torch.isin(label, removed.to(label))
    if bool(is_removed.all()):
        raise ValueError(f"held-out data holds only the removed classes {kind.removed}; tau needs others too")
    weights = torch.where(is_removed, 0.0, weights)
    kept_share = 1 - forget_share[removed.to(every.device)].sum()
    weights = weights / weights.sum().clamp(min=1e-12) * kept_share
    absent_weights = (~is_removed).to(every) / (~is_removed).sum().clamp(min=1) * (1 - kept_share)
    return target_from_losses(torch.cat((every, *absent)), torch.cat((weights, absent_weights)))
