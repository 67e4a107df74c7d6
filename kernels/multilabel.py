# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Mean binary cross-entropy over the labels of a row, its signals and its gradient, in Triton.

With a = |z| and d = log(1 + e^-a), for logits z and targets t in [0, 1], a row has the means over its C labels of

    loss    = t max(-z, 0) + (1 - t) max(z, 0) + d
    entropy = d + a sigmoid(-a),   margin = (2 t - 1) z,   p_max = sigmoid(a)
    dloss/dz = (1 - t) sigmoid(z) - t sigmoid(-z)

as `reference.multilabel_rows`: no tail is found by a subtraction. Bytes: the forward reads NC logits and targets, the
backward reads them and writes NC gradients; nothing is carried from one to the other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_tau.kernels import launch
from nabla_tau.kernels.reference import RowSignals, compute_dtype
from nabla_tau.kernels.rows import contiguous_rows, tails


@triton.jit
def _load(logits, targets, rows, live, cols, labels, stride, target_stride, Real: tl.constexpr):
    mask = live[:, None] & (cols < labels)
    z = tl.load(logits + (rows * stride)[:, None] + cols, mask=mask, other=0.0).to(Real)
    t = tl.load(targets + (rows * target_stride)[:, None] + cols, mask=mask, other=0.0).to(Real)
    return z, t, mask


@triton.jit
def _label_gradient(t, p, q):
    return (1 - t) * p - t * q


@triton.jit
def _pair_sum(a, b, mask):
    return tl.sum(tl.join(tl.where(mask, a, 0.0), tl.where(mask, b, 0.0)), 1)


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    logits, targets, signals, correct, N, units, stride_units, target_units,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    Real: tl.constexpr = signals.dtype.element_ty
    labels = units * ALIGN
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    rows = rows.to(tl.int64)
    # Sums in pairs: half the reductions, and fewer numbers that wait for theirs.
    loss_entropy = tl.zeros([BLOCK_N, 2], Real)
    margin_p_max = tl.zeros([BLOCK_N, 2], Real)
    squares_wrong = tl.zeros([BLOCK_N, 2], Real)
    for begin in range(0, labels, BLOCK_V):
        cols = begin + tl.arange(0, BLOCK_V)[None, :]
        z, t, mask = _load(
            logits, targets, rows, inside, cols, labels, stride_units * ALIGN, target_units * ALIGN, Real
        )
        minus_log_p, p, q, tail = tails(z)
        positive = z > 0
        entropy = tail + tl.abs(z) * tl.where(positive, q, p)
        g = _label_gradient(t, p, q)
        loss = t * minus_log_p + (1 - t) * (tl.where(positive, z, 0.0) + tail)
        wrong = (positive != (t > 0.5)).to(Real)
        loss_entropy += _pair_sum(loss, entropy, mask)
        margin_p_max += _pair_sum((2 * t - 1) * z, tl.where(positive, p, q), mask)
        squares_wrong += _pair_sum(g * g, wrong, mask)
    loss, entropy = tl.split(loss_entropy)
    margin, p_max = tl.split(margin_p_max)
    grad_sq, wrong = tl.split(squares_wrong)
    count = labels.to(Real)
    at = signals + rows
    tl.store(at, loss / count, mask=inside)
    at += N
    tl.store(at, tl.zeros([BLOCK_N], Real), mask=inside)
    at += N
    tl.store(at, entropy / count, mask=inside)
    at += N
    tl.store(at, margin / count, mask=inside)
    at += N
    tl.store(at, p_max / count, mask=inside)
    at += N
    tl.store(at, grad_sq / (count * count), mask=inside)
    tl.store(correct + rows, wrong == 0, mask=inside)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    logits, targets, weights, gradient, N, units, stride_units, target_units, weight_stride,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, Real: tl.constexpr,
):  # fmt: skip
    labels = units * ALIGN
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    rows = rows.to(tl.int64)
    w = tl.load(weights + rows * weight_stride, mask=inside, other=0.0).to(Real)
    live = w != 0
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    z, t, _ = _load(logits, targets, rows, live, cols, labels, stride_units * ALIGN, target_units * ALIGN, Real)
    _, p, q, _ = tails(z)
    value = tl.where(live[:, None], (w / labels.to(Real))[:, None] * _label_gradient(t, p, q), 0.0)
    out = gradient + (rows * labels)[:, None] + cols
    tl.store(out, value.to(gradient.dtype.element_ty), mask=inside[:, None] & (cols < labels))


def multilabel_forward(logits: Tensor, targets: Tensor) -> RowSignals:
    """Signals of multi-label rows (`reference.multilabel_rows`) in one launch. logits [N, C] float32, float64,
    bfloat16 or float16 and targets [N, C] in [0, 1], floating or bool, with any stride between rows."""
    logits, targets = contiguous_rows(logits), contiguous_rows(targets)
    count, labels = logits.shape
    signals = torch.empty(6, count, dtype=compute_dtype(logits), device=logits.device)
    correct = torch.empty(count, dtype=torch.bool, device=logits.device)
    if count:
        align = launch.alignment(labels, logits.stride(0), targets.stride(0))
        config = launch.labels(labels, logits.element_size())
        with torch.cuda.device_of(logits):
            _forward_kernel[(triton.cdiv(count, config.rows),)](
                logits, targets, signals, correct,
                count, labels // align, logits.stride(0) // align, targets.stride(0) // align,
                ALIGN=align, BLOCK_N=config.rows, BLOCK_V=config.classes, num_warps=config.num_warps(),
            )  # fmt: skip
    loss, lse, entropy, margin, p_max, grad_sq = signals.unbind()
    return RowSignals(loss, lse, entropy, margin, p_max, grad_sq, correct)


def multilabel_backward(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The row-weighted gradient [N, C] (`reference.multilabel_rows_grad`) in one launch. weights [N], any stride. Rows
    of weight 0 are not read."""
    logits, targets = contiguous_rows(logits), contiguous_rows(targets)
    count, labels = logits.shape
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if count:
        align = launch.alignment(labels, logits.stride(0), targets.stride(0))
        config = launch.elementwise(labels)
        real = tl.float64 if logits.dtype == torch.float64 else tl.float32
        with torch.cuda.device_of(logits):
            _backward_kernel[(triton.cdiv(count, config.rows), triton.cdiv(labels, config.classes))](
                logits, targets, weights, gradient,
                count, labels // align, logits.stride(0) // align, targets.stride(0) // align, weights.stride(0),
                ALIGN=align, BLOCK_N=config.rows, BLOCK_V=config.classes, Real=real, num_warps=config.num_warps(),
            )  # fmt: skip
    return gradient
