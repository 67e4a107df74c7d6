"""Every row op in plain PyTorch: the oracle of the tests, the baseline of the benchmarks, the fallback of the engine.

A row is one line of the logits matrix: a sample in classification, a token in language modelling. All of a row's
numbers follow from its logit margin

    margin = z_y - logsumexp_{j != y} z_j = log p_y - log(1 - p_y)
    loss   = log(1 + exp(-margin)),   lse = z_y + loss,   dloss/dz = softmax(z) - onehot(y)

so nothing is lost to cancellation on the memorised samples that unlearning is about: with p_y = 1 - 5e-9 a float32
`log_softmax` says loss 0 and gradient 0, this form says 5e-9 for both, as float64 does. Low-precision logits are
computed in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100


class RowSignals(NamedTuple):
    """Per-row results, each [N]: float32 (float64 for float64 logits), `correct` bool.

    An ignored row has loss 0, margin 0 and correct False; its lse and entropy are those of its logits.
    """

    loss: Tensor
    lse: Tensor
    entropy: Tensor
    margin: Tensor
    correct: Tensor


def compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def rows(logits: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX) -> RowSignals:
    """Cross-entropy and attack signals of each row. logits [N, V] floating, targets [N] int64."""
    z = logits.to(compute_dtype(logits))
    keep = targets != ignore_index
    y = torch.where(keep, targets, 0).unsqueeze(1)
    z_y = z.gather(1, y).squeeze(1)
    others = z.scatter(1, y, float("-inf"))
    lse_others = others.logsumexp(1)
    margin = z_y - lse_others
    loss = F.softplus(-margin, threshold=88.0)
    # From the larger of the two: z_y + loss cancels when the target is far below the rest.
    lse = torch.where(margin > 0, z_y + loss, lse_others + F.softplus(margin, threshold=88.0))
    p = (z - lse.unsqueeze(1)).exp().scatter(1, y, 0.0)
    # Every term is non-negative, so a confident row keeps its relative precision.
    surprise = torch.where(p > 0, lse.unsqueeze(1) - z, 0.0)
    own = torch.where(loss.isinf(), 0.0, torch.exp(-loss) * loss)
    entropy = own + (p * surprise).sum(1)
    correct = z.argmax(1) == targets
    return RowSignals(
        loss=torch.where(keep, loss, 0.0),
        lse=lse,
        entropy=entropy,
        margin=torch.where(keep, margin, 0.0),
        correct=correct & keep,
    )


def rows_grad(logits: Tensor, targets: Tensor, weights: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Row-weighted gradient weights_i * (softmax(z_i) - onehot(y_i)), [N, V] in the dtype of the logits."""
    signals = rows(logits, targets, ignore_index=ignore_index)
    z = logits.to(compute_dtype(logits))
    keep = targets != ignore_index
    y = torch.where(keep, targets, 0).unsqueeze(1)
    p = (z - signals.lse.unsqueeze(1)).exp()
    p = p.scatter(1, y, -torch.sigmoid(-signals.margin).unsqueeze(1))
    w = torch.where(keep, weights.to(z.dtype), 0.0).unsqueeze(1)
    return (w * p).to(logits.dtype)


def multilabel_rows(logits: Tensor, targets: Tensor) -> RowSignals:
    """The same signals for multi-label rows: logits [N, C], targets [N, C] in [0, 1].

    loss is the mean over labels of the binary cross-entropy; entropy the mean binary entropy; margin the mean of
    the label margins (2 t - 1) z; correct means that every label is right at threshold 0.5; lse is 0.
    """
    z = logits.to(compute_dtype(logits))
    t = targets.to(z.dtype)
    # Not sigmoid(z) - t for the gradient, which is 0 for a memorised label: here each part keeps its own tail.
    loss = (t * F.softplus(-z, threshold=88.0) + (1 - t) * F.softplus(z, threshold=88.0)).mean(1)
    # H(sigmoid(z)) = softplus(z) - z sigmoid(z), written so that both tails keep their precision.
    a = z.abs()
    entropy = (F.softplus(-a) + a * torch.sigmoid(-a)).mean(1)
    margin = ((2 * t - 1) * z).mean(1)
    correct = ((z > 0) == (t > 0.5)).all(1)
    return RowSignals(loss=loss, lse=torch.zeros_like(loss), entropy=entropy, margin=margin, correct=correct)
