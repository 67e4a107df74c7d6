"""The nabla-tau objective as pure functions of per-sample losses: gates, targets (tau), alpha.

    L = alpha * gate(l_forget; tau) + (1 - alpha) * mean(l_retain)    (Trippa et al. 2024, arXiv 2403.14339)

with tau the mean loss of held-out data. Losses of forget and retain samples come as one vector with a mask, so a
mixed batch needs one forward and one backward, and an empty group contributes 0. Nothing here makes the host wait
for the device.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

Gate: TypeAlias = Literal["batch", "two_sided", "sample", "quantile"]
GATES: tuple[str, ...] = get_args(Gate)

QUANTILES = 512  # entries of the table that stands for the held-out loss distribution


class Target(NamedTuple):
    """What the forget losses are to become: `mean` (tau) 0-d, and `quantiles` [K] ascending, the held-out losses at
    the ranks (k + 1/2) / K; None where only the mean is known."""

    mean: Tensor
    quantiles: Tensor | None


class Terms(NamedTuple):
    """The objective and its parts, all 0-d on the device of the losses; `total` carries the gradient."""

    total: Tensor
    forget_term: Tensor
    forget_loss: Tensor
    retain_loss: Tensor
    gate_open: Tensor


def target_from_losses(losses: Tensor, weights: Tensor | None = None) -> Target:
    """Target from held-out losses [H], optionally with sample weights [H] >= 0 (class matching, `classes.py`)."""
    losses = losses.detach().flatten()
    if losses.numel() == 0:
        raise ValueError("tau needs at least one held-out loss, got none")
    if weights is None:
        weights = torch.ones_like(losses)
        mean = losses.mean()
    else:
        weights = weights.to(losses)
        mean = (losses * weights).sum() / weights.sum()
    ordered, order = losses.sort()
    cumulative = weights[order].cumsum(0)
    # Mid-ranks of the samples, then linear interpolation at the mid-ranks of the table.
    ranks = (cumulative - 0.5 * weights[order]) / cumulative[-1]
    at = (torch.arange(QUANTILES, device=losses.device, dtype=losses.dtype) + 0.5) / QUANTILES
    right = torch.searchsorted(ranks, at).clamp(max=losses.numel() - 1)
    left = (right - 1).clamp(min=0)
    span = (ranks[right] - ranks[left]).clamp(min=torch.finfo(losses.dtype).tiny)
    fraction = ((at - ranks[left]) / span).clamp(0, 1)
    return Target(mean, ordered[left] + fraction * (ordered[right] - ordered[left]))


def alpha_start(forget_count: int, train_count: int) -> float:
    """Published starting weight of the ascent, min(1, 5/3 |D_f| / |D_train|); above .6 of the data it is capped."""
    return min(1.0, 5.0 / 3.0 * forget_count / train_count)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values [N] where mask [N] is True, 0-d; 0 where none is."""
    # where, not a product: an infinite loss in the other group must not become 0 * inf = nan here.
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def rank_targets(losses: Tensor, mask: Tensor, quantiles: Tensor) -> Tensor:
    """Held-out loss at the rank that each forget loss has among the forget losses of its batch, [B]."""
    ranks = torch.where(mask, losses.detach(), torch.inf).argsort().argsort()
    at = (ranks + 0.5) / mask.sum().clamp(min=1) * quantiles.numel()
    return quantiles[at.long().clamp(max=quantiles.numel() - 1)]


def objective(
    losses: Tensor,
    forget_mask: Tensor,
    target: Target,
    alpha: Tensor | float,
    *,
    gate: Gate = "batch",
    power: int = 2,
    forget_weight: Tensor | float = 1.0,
    counts: Tensor | None = None,
) -> Terms:
    """The objective of a mixed batch. losses [B], forget_mask [B] bool (True: forget), target as above; counts [B]
    bool leaves out the samples that are False (`functional.has_loss`).

        gate="batch"      relu(tau - mean_f)^p, the paper's
        gate="two_sided"  |tau - mean_f|^p, what the authors' text notebook computes: also pulls down a loss above tau
        gate="sample"     mean over forget samples of relu(tau - l_i)^p
        gate="quantile"   mean over forget samples of relu(q_i - l_i)^p with q_i the held-out loss of the sample's rank,
                          so that the whole distribution of losses, not only its mean, becomes that of unseen data

    with p = `power` (the paper's is 2). `gate_open` is 1 or 0 for "batch", always 1 for "two_sided", and the fraction
    of forget samples still below their target for the others. Without forget samples the forget term is 0.
    `forget_weight` multiplies the forget term and `gate_open`: 0 holds the ascent (`mean_rank`).
    """
    retain_mask = ~forget_mask
    if counts is not None:
        forget_mask, retain_mask = forget_mask & counts, retain_mask & counts
    forget_mean = masked_mean(losses, forget_mask)
    retain_mean = masked_mean(losses, retain_mask)
    some_forget = forget_mask.any()
    if gate in ("batch", "two_sided"):
        gap = torch.where(some_forget, target.mean - forget_mean, 0.0)
        gap = gap.relu() if gate == "batch" else gap.abs()
        forget_term = gap**power
        gate_open = (gap > 0) if gate == "batch" else some_forget
    else:
        if gate == "sample":
            wanted = target.mean.expand_as(losses)
        else:
            assert target.quantiles is not None
            wanted = rank_targets(losses, forget_mask, target.quantiles)
        gaps = torch.where(forget_mask, wanted - losses, 0.0).relu()
        forget_term = masked_mean(gaps**power, forget_mask)
        gate_open = masked_mean((gaps > 0).to(losses), forget_mask)
    forget_term = forget_weight * forget_term
    total = alpha * forget_term + (1 - alpha) * retain_mean
    return Terms(total.to(losses), forget_term, forget_mean, retain_mean, forget_weight * gate_open.to(losses))


def mean_rank(losses: Tensor, forget_mask: Tensor, quantiles: Tensor) -> Tensor:
    """Mean rank of the forget losses among the held-out losses, 0-d in [0, 1]; 0.5 where they are alike.

    This is the AUC of the loss attack that an adversary without the model's training data could run on this batch.
    """
    losses = losses.detach()
    below = torch.searchsorted(quantiles, losses)
    not_above = torch.searchsorted(quantiles, losses, right=True)
    return masked_mean((below + not_above) / (2 * quantiles.numel()), forget_mask)
