"""Every row op in plain PyTorch: the oracle of the tests, the baseline of the benchmarks, the fallback of the engine.

A row is one line of the logits matrix: a sample in classification, a token in language modelling. All of a row's
numbers follow from its logit margin

    margin = z_y - logsumexp_{j != y} z_j = log p_y - log(1 - p_y)
    loss   = log(1 + exp(-margin)),   lse = z_y + loss,   dloss/dz = softmax(z) - onehot(y)

so nothing is lost to cancellation on the memorised samples that unlearning is about: with p_y = 1 - 5e-9 a float32
`log_softmax` says loss 0 and gradient 0, this form says 5e-9 for both, as float64 does. Low-precision logits are
computed in float32.

With label smoothing e and class weights c [V] the loss of a row is, as in torch.nn.functional.cross_entropy,

    (1 - e) c_y (-log p_y) + e/V sum_j c_j (-log p_j)

and `margin`, `entropy` and the other signals stay those of the softmax.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100


class RowSignals(NamedTuple):
    """Per-row results, each [N]: float32 (float64 for float64 logits), `correct` bool.

    p_max is the largest probability; grad_sq the squared norm of dloss/dz. An ignored row has loss 0, margin 0,
    grad_sq 0 and correct False; its lse, entropy and p_max are those of its logits.
    """

    loss: Tensor
    lse: Tensor
    entropy: Tensor
    margin: Tensor
    p_max: Tensor
    grad_sq: Tensor
    correct: Tensor


class _Softmax(NamedTuple):
    """What forward and gradient share. y [N, 1]; `others` are the probabilities with 0 at the target; `surprise` is
    -log p of every class."""

    keep: Tensor
    y: Tensor
    top: Tensor
    lse: Tensor
    loss: Tensor
    margin: Tensor
    others: Tensor
    surprise: Tensor


def compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _softmax(logits: Tensor, targets: Tensor, ignore_index: int) -> _Softmax:
    z = logits.to(compute_dtype(logits))
    # Differences first: a large offset common to the row would swallow the digits of everything below.
    top = z.amax(1, keepdim=True)
    z = z - top
    keep = targets != ignore_index
    y = torch.where(keep, targets, 0).unsqueeze(1)
    z_y = z.gather(1, y).squeeze(1)
    lse_others = z.scatter(1, y, float("-inf")).logsumexp(1)
    margin = z_y - lse_others
    loss = F.softplus(-margin, threshold=88.0)
    # From the larger of the two: z_y + loss cancels when the target is far below the rest.
    lse = torch.where(margin > 0, z_y + loss, lse_others + F.softplus(margin, threshold=88.0))
    surprise = lse.unsqueeze(1) - z
    return _Softmax(keep, y, top.squeeze(1), lse, loss, margin, (-surprise).exp().scatter(1, y, 0.0), surprise)


def _unit_gradient(s: _Softmax, label_smoothing: float, class_weights: Tensor | None) -> Tensor:
    """dloss/dz of every row, [N, V] in the computing dtype."""
    # The target's entry is p_y - 1 without the subtraction.
    plain = s.others.scatter(1, s.y, -torch.sigmoid(-s.margin).unsqueeze(1))
    if class_weights is not None:
        plain = plain * class_weights[s.y]
    if label_smoothing == 0:
        return plain
    p = (-s.surprise).exp()
    classes = p.shape[1]
    c = torch.ones_like(p[0]) if class_weights is None else class_weights
    return (1 - label_smoothing) * plain + label_smoothing * (p * (c.sum() / classes) - c / classes)


def rows(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> RowSignals:
    """Cross-entropy and attack signals of each row. logits [N, V] floating, targets [N] int64, class_weights [V]."""
    if logits.shape[0] == 0:
        # Six tensors, not one six times: autograd tells the differentiable one from the others by identity.
        a, b, c, d, e, f = (logits.new_zeros(0, dtype=compute_dtype(logits)) for _ in range(6))
        return RowSignals(a, b, c, d, e, f, logits.new_zeros(0, dtype=torch.bool))
    s = _softmax(logits, targets, ignore_index)
    weights = None if class_weights is None else class_weights.to(s.loss)
    loss = s.loss if weights is None else s.loss * weights[s.y.squeeze(1)]
    if label_smoothing:
        smooth = (s.surprise if weights is None else s.surprise * weights).mean(1)
        loss = (1 - label_smoothing) * loss + label_smoothing * smooth
    # Every term is non-negative, so a confident row keeps its relative precision.
    own = torch.where(s.loss.isinf(), 0.0, torch.exp(-s.loss) * s.loss)
    entropy = own + (s.others * torch.where(s.others > 0, s.surprise, 0.0)).sum(1)
    correct = (logits.argmax(1) == targets) & ~s.loss.isnan()
    grad_sq = _unit_gradient(s, label_smoothing, weights).square().sum(1)
    return RowSignals(
        loss=torch.where(s.keep, loss, 0.0),
        lse=s.lse + s.top,
        entropy=entropy,
        margin=torch.where(s.keep, s.margin, 0.0),
        p_max=torch.maximum(s.others.amax(1), torch.exp(-s.loss)),
        grad_sq=torch.where(s.keep, grad_sq, 0.0),
        correct=correct & s.keep,
    )


def rows_grad(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Row-weighted gradient weights_i * dloss_i/dz_i, [N, V] in the dtype of the logits; weights [N]. Rows that are
    ignored or of weight 0 get zeros."""
    if logits.shape[0] == 0:
        return torch.zeros_like(logits, memory_format=torch.contiguous_format)
    s = _softmax(logits, targets, ignore_index)
    c = None if class_weights is None else class_weights.to(s.loss)
    w = torch.where(s.keep, weights.to(s.loss), 0.0).unsqueeze(1)
    gradient = torch.where(w == 0, 0.0, w * _unit_gradient(s, label_smoothing, c))
    return gradient.to(logits.dtype)


def _binary_parts(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    z = logits.to(compute_dtype(logits))
    return z, targets.to(z.dtype)


def multilabel_rows(logits: Tensor, targets: Tensor) -> RowSignals:
    """The same signals for multi-label rows: logits [N, C], targets [N, C] in [0, 1].

    loss is the mean over labels of the binary cross-entropy, grad_sq the squared norm of its gradient; entropy, margin
    and p_max are means over labels of the binary entropy, of the label margin (2 t - 1) z and of the larger
    probability; correct means that every label is right at threshold 0.5; lse is 0.
    """
    z, t = _binary_parts(logits, targets)
    loss = (t * F.softplus(-z, threshold=88.0) + (1 - t) * F.softplus(z, threshold=88.0)).mean(1)
    # H(sigmoid(z)) = softplus(z) - z sigmoid(z), written so that both tails keep their precision.
    a = z.abs()
    entropy = (F.softplus(-a) + a * torch.sigmoid(-a)).mean(1)
    margin = ((2 * t - 1) * z).mean(1)
    p_max = torch.sigmoid(a).mean(1)
    grad_sq = _binary_gradient(z, t).square().sum(1)
    correct = ((z > 0) == (t > 0.5)).all(1)
    return RowSignals(loss, torch.zeros_like(loss), entropy, margin, p_max, grad_sq, correct)


def _binary_gradient(z: Tensor, t: Tensor) -> Tensor:
    # Not sigmoid(z) - t, which is 0 for a memorised label: here each part keeps its own tail.
    return ((1 - t) * torch.sigmoid(z) - t * torch.sigmoid(-z)) / z.shape[1]


def multilabel_rows_grad(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Row-weighted gradient weights_i * dloss_i/dz_i of multi-label rows, [N, C] in the dtype of the logits."""
    z, t = _binary_parts(logits, targets)
    w = weights.to(z.dtype).unsqueeze(1)
    return torch.where(w == 0, 0.0, w * _binary_gradient(z, t)).to(logits.dtype)


def gram_norms(inputs: Tensor, gradients: Tensor) -> Tensor:
    """|sum_t g_t a_t^T|^2 of each sample, = sum_{t,s} (a_t . a_s)(g_t . g_s), without the sum itself.

    inputs [B, T, p], gradients [B, T, q]; the result is [B], float32 (float64 where the inputs are).
    """
    a, g = (value.to(compute_dtype(inputs)) for value in (inputs, gradients))
    # Rounding may leave a sum of nothing below 0.
    return (torch.bmm(a, a.mT) * torch.bmm(g, g.mT)).sum((1, 2)).clamp(min=0)
