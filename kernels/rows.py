# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Cross-entropy, attack signals, gate and gradient of rows of logits, in Triton. Formulas: `reference.py`.

With m the largest of the other logits of a row, and the target kept out of every sum,

    S = sum_{j != y} e^(z_j - m),   T = sum_{j != y} (z_j - m) e^(z_j - m),   Q = sum_{j != y} e^(2 (z_j - m))
    margin  = (z_y - m) - log S,    loss = log(1 + e^-margin),   q = 1 - p_y = sigmoid(-margin)
    entropy = p_y loss + q (lse - m - T / S),   |dloss/dz|^2 = q^2 (1 + Q / S^2),   p_j = e^(z_j - m) q / S

so that a memorised row keeps its 5e-9, and a large common offset costs nothing.

Bytes moved, with NV = rows x classes x bytes of a logit; the per-row arrays are small beside them:

| op | up to 32K classes | beyond |
|---|---|---|
| `rows_forward`, `nabla_tau_rows` | NV | NV, 2 NV with label smoothing |
| `rows_gradient` | 2 NV, which is the floor | 3 NV |
| `rows_backward` | 2 NV | 2 NV |
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nabla_tau.kernels import launch
from nabla_tau.kernels.reference import IGNORE_INDEX, RowSignals, compute_dtype


@triton.jit
def _log1p(x):
    # Exact to rounding on [0, 1]: the quotient undoes what 1 + x lost. Triton has no log1p that its interpreter runs.
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def _exp(x):
    # tl.exp in float32 spends three more instructions on results under 1e-38, which may as well be 0 here.
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _exp_of_minus(x):
    # e^-x for x >= 0 to rounding. The relative error of `_exp` grows with x, and of a memorised row this number is the
    # whole loss: whole powers of two first, then what little remains.
    if x.dtype == tl.float64:
        return tl.exp(-x)
    else:
        x = tl.where(x > 200.0, 200.0, x)  # 0 in float32; infinity would become NaN below
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        return tl.exp2(-n) * tl.exp((n * 0.693359375 - x) + n * -2.12194440e-4)


@triton.jit
def _target(targets, rows, inside, classes, ignore_index):
    # Whether a row counts, and its class: 0 for an ignored row, as in the reference, and -1 for a label out of range,
    # whose row becomes NaN instead of an illegal read.
    label = tl.load(targets + rows, mask=inside, other=0).to(tl.int64)
    keep = inside & (label != ignore_index)
    y = tl.where(keep, label, 0)
    return keep, tl.where((y >= 0) & (y < classes), y, -1).to(tl.int32)


@triton.jit
def tails(margin):
    # loss = -log p, p = sigmoid(margin), q = 1 - p and log(1 + e^-|margin|), none of them by a difference.
    decay = _exp_of_minus(tl.abs(margin))
    tail = _log1p(decay)
    wins = margin > 0
    p = tl.where(wins, 1.0, decay) / (1.0 + decay)
    q = tl.where(wins, decay, 1.0) / (1.0 + decay)
    return tl.where(wins, 0.0, -margin) + tail, p, q, tail


@triton.jit
def _finish(z_y, m, total, slope):
    # From the sums of a row (m, S, T) to its numbers; `above` is lse - m, `ratio` is q / S.
    log_total = tl.log(total)
    margin = (z_y - m) - log_total
    loss, p, q, tail = tails(margin)
    wins = margin > 0
    # The larger of the two sides carries lse; starting from the smaller one would cancel.
    lse = tl.where(wins, z_y + tail, m + (log_total + tail))
    above = tl.where(wins, z_y - m, log_total) + tail
    # q = 0 leaves one possible class (S may be 0), p = 0 an infinite loss: both have entropy terms of 0.
    ratio = tl.where(q == 0, 0.0, q / total)
    entropy = tl.where(p == 0, 0.0, p * loss) + tl.where(q == 0, 0.0, q * (above - slope / total))
    return loss, lse, entropy, margin, p, q, ratio, above


@triton.jit
def _unit_gradient(e, is_target, ratio, p, q, c_y, c, mean_c, classes, SMOOTHING: tl.constexpr):
    # dloss/dz where e ratio are the probabilities of the classes that are not the target; c are class weights.
    if SMOOTHING == 0:
        return tl.where(is_target, -c_y * q, e * (c_y * ratio))
    else:
        own = (1 - SMOOTHING) * c_y
        even = SMOOTHING * mean_c
        return tl.where(is_target, even * p - own * q, e * ((own + even) * ratio)) - c * (SMOOTHING / classes)


@triton.jit
def _exponentials(x):
    # e^x and x e^x; from -1e4 on e^x is 0, and -inf must not become inf 0. A NaN stays a NaN.
    x = tl.maximum(x, -1e4, propagate_nan=tl.PropagateNan.ALL)
    e = _exp(x)
    return e, x * e


@triton.jit
def _store_signals(signals, correct, rows, N, inside, keep, loss, lse, entropy, margin, p_max, grad_sq, first):
    # Steps of N on the pointer, which has 64 bits.
    at = signals + rows
    tl.store(at, tl.where(keep, loss, 0.0), mask=inside)
    at += N
    tl.store(at, lse, mask=inside)
    at += N
    tl.store(at, entropy, mask=inside)
    at += N
    tl.store(at, tl.where(keep, margin, 0.0), mask=inside)
    at += N
    tl.store(at, p_max, mask=inside)
    at += N
    tl.store(at, tl.where(keep, grad_sq, 0.0), mask=inside)
    # A NaN makes the margin NaN, whichever way the maximum takes it.
    tl.store(correct + rows, keep & first & (margin == margin), mask=inside)


@triton.jit
def _groups(signals, targets, forget, base, start, N, ignore_index, BLOCK: tl.constexpr):
    rows = start + tl.arange(0, BLOCK)
    inside = rows < N
    # Past the first-level cache, which does not see what other multiprocessors wrote.
    loss = tl.load(signals + rows, mask=inside, other=0.0, cache_modifier=".cg")
    keep = inside & (tl.load(targets + rows, mask=inside, other=0).to(tl.int64) != ignore_index)
    leaves = tl.load(forget + rows, mask=inside, other=0) != 0
    if base is None:
        share = tl.full([BLOCK], 1.0, loss.dtype)
    else:
        share = tl.load(base + rows, mask=inside, other=0.0).to(loss.dtype)
    # A row of weight 0 is out of its group, so that its loss may be anything.
    counts = keep & (share != 0)
    return rows, inside, loss, counts & leaves, counts & (leaves == 0), share


@triton.jit
def _gate(
    signals, targets, forget, base, tau, alpha, forget_count, retain_count, terms, weights, N, ignore_index,
    GATE: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program, lanes summed in a fixed order: the same result in every run.
    Real: tl.constexpr = signals.dtype.element_ty
    target = tl.load(tau).to(Real)
    a = tl.load(alpha).to(Real)
    forget_sum = tl.zeros([BLOCK], Real)
    retain_sum = tl.zeros([BLOCK], Real)
    gap_sum = tl.zeros([BLOCK], Real)
    forget_rows = tl.zeros([BLOCK], tl.int32)
    retain_rows = tl.zeros([BLOCK], tl.int32)
    open_rows = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        _, _, loss, forgets, retains, share = _groups(signals, targets, forget, base, start, N, ignore_index, BLOCK)
        forget_sum += tl.where(forgets, share * loss, 0.0)
        retain_sum += tl.where(retains, share * loss, 0.0)
        forget_rows += forgets.to(tl.int32)
        retain_rows += retains.to(tl.int32)
        if GATE == "sample":
            gap = tl.where(forgets & ~(loss >= target), target - loss, 0.0)
            gap_sum += gap * gap if POWER == 2 else gap
            open_rows += (gap > 0).to(tl.int32)
    if forget_count is None:
        forget_n = tl.sum(forget_rows, 0).to(Real)
        retain_n = tl.sum(retain_rows, 0).to(Real)
    else:
        forget_n = tl.load(forget_count).to(Real)
        retain_n = tl.load(retain_count).to(Real)
    has_forget = forget_n > 0
    forget_n = tl.where(has_forget, forget_n, 1.0)
    retain_n = tl.where(retain_n > 0, retain_n, 1.0)
    forget_mean = tl.sum(forget_sum, 0) / forget_n
    retain_mean = tl.sum(retain_sum, 0) / retain_n
    gap = tl.where(has_forget, target - forget_mean, 0.0)
    if GATE == "sample":
        term = tl.sum(gap_sum, 0) / forget_n
        is_open = tl.sum(open_rows, 0).to(Real) / forget_n
    else:
        if GATE == "batch":
            gap = tl.where(gap <= 0, 0.0, gap)  # a NaN stays
            is_open = (gap > 0).to(Real)
        else:
            is_open = has_forget.to(Real)
        term = gap * gap if POWER == 2 else tl.abs(gap)
    tl.store(terms, a * term + (1 - a) * retain_mean)
    tl.store(terms + 1, term)
    tl.store(terms + 2, forget_mean)
    tl.store(terms + 3, retain_mean)
    tl.store(terms + 4, is_open)
    for start in range(0, N, BLOCK):
        rows, inside, loss, forgets, retains, share = _groups(
            signals, targets, forget, base, start, N, ignore_index, BLOCK
        )
        if GATE == "sample":
            reach = tl.where(forgets & ~(loss >= target), target - loss, 0.0)
        else:
            reach = tl.where(forgets, gap, 0.0)
        descent = 2 * reach if POWER == 2 else tl.where(reach > 0, 1.0, tl.where(reach < 0, -1.0, 0.0))
        of_forget = -a * descent * share / forget_n
        weight = tl.where(forgets, of_forget, tl.where(retains, (1 - a) * share / retain_n, 0.0))
        tl.store(weights + rows, weight, mask=inside)


@triton.jit
def _is_last(counter):
    # All threads of the program have stored before one of them counts; the last to count sees what all stored.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(counter, 0)  # ready for the next launch
    return last


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _tile_kernel(
    logits, targets, signals, correct, gradient, row_weights, class_weights, mean_class_weight,
    forget, base, tau, alpha, forget_count, retain_count, terms, gate_weights, counter,
    N, units, stride_units, out_units, weight_stride, ignore_index,
    SMOOTHING: tl.constexpr, GATE: tl.constexpr, POWER: tl.constexpr, GATE_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # Whole rows in registers: each logit is read once, whatever is asked for.
    Real: tl.constexpr = signals.dtype.element_ty
    classes = units * ALIGN
    real_classes = classes.to(Real)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    keep, y = _target(targets, rows, inside, classes, ignore_index)
    long_rows = rows.to(tl.int64)  # N V may exceed 2^31
    start = logits + long_rows * stride_units * ALIGN
    z_y = tl.load(start + y, mask=inside & (y >= 0), other=float("nan")).to(Real)
    cols = tl.arange(0, BLOCK_V)[None, :]
    present = cols < classes
    z = tl.load(start[:, None] + cols, mask=inside[:, None] & present, other=float("-inf")).to(Real)
    is_target = cols == y[:, None]
    z = tl.where(is_target, float("-inf"), z)
    peak = tl.max(z, 1)
    ahead = tl.full([BLOCK_N], float("-inf"), Real)
    if tl.max((z_y == peak).to(tl.int32), 0) != 0:
        # A tie: the first of equal logits wins. Rare, so what precedes the target is read again, in parts that find
        # room beside the row.
        PART: tl.constexpr = BLOCK_V // 8 if BLOCK_N == 1 else BLOCK_V
        for begin in range(0, BLOCK_V, PART):
            part = begin + tl.arange(0, PART)[None, :]
            earlier = tl.load(start[:, None] + part, mask=inside[:, None] & (part < y[:, None]), other=float("-inf"))
            ahead = tl.maximum(ahead, tl.max(earlier.to(Real), 1))
    m = tl.where(peak == float("-inf"), 0.0, peak)
    x = z - m[:, None]
    e, xe = _exponentials(x)
    # Joined, the sums are one reduction: a third of the barriers, and no logit waits in a register for the next sum.
    sums, slopes = tl.split(tl.sum(tl.join(tl.join(e, e * e), tl.join(xe, xe)), 1))
    total, squares = tl.split(sums)
    slope, _ = tl.split(slopes)
    loss, lse, entropy, margin, p, q, ratio, above = _finish(z_y, m, total, slope)
    c_y = tl.full([BLOCK_N], 1.0, Real)
    if class_weights is not None:
        c_y = tl.load(class_weights + y, mask=inside & (y >= 0), other=0.0)
    # The mean is there when smoothing asks for the weights of all classes.
    c = 1.0 if mean_class_weight is None else tl.load(class_weights + cols, mask=present, other=0.0)
    mean_c = tl.full([], 1.0, Real) if mean_class_weight is None else tl.load(mean_class_weight)
    unit = _unit_gradient(
        e, is_target, ratio[:, None], p[:, None], q[:, None], c_y[:, None], c, mean_c, real_classes, SMOOTHING
    )
    loss_c = c_y * loss
    if SMOOTHING == 0:
        grad_sq = c_y * c_y * (q * q + ratio * ratio * squares)
    else:
        grad_sq = tl.sum(tl.where(present, unit * unit, 0.0), 1)
        # -log p_j of the other classes; both parts are non-negative.
        surprise = tl.where(present & (is_target == 0), c * (above[:, None] - x), 0.0)
        loss_c = (1 - SMOOTHING) * loss_c + SMOOTHING * ((tl.sum(surprise, 1) + loss_c) / real_classes)
    first = (z_y >= peak) & (z_y > ahead)
    _store_signals(
        signals, correct, long_rows, N, inside, keep,
        loss_c, lse, entropy, margin, tl.maximum(p, ratio), grad_sq, first,
    )  # fmt: skip
    if gradient is not None:
        if row_weights is None:
            w = keep.to(Real)
        else:
            w = tl.load(row_weights + long_rows * weight_stride, mask=keep, other=0.0).to(Real)
        out = gradient + long_rows * out_units * ALIGN
        value = tl.where((w != 0)[:, None], w[:, None] * unit, 0.0)
        tl.store(out[:, None] + cols, value.to(gradient.dtype.element_ty), mask=inside[:, None] & present)
    if GATE is not None:  # noqa: SIM102 (decided while compiling)
        if _is_last(counter):
            _gate(
                signals, targets, forget, base, tau, alpha, forget_count, retain_count, terms, gate_weights,
                N, ignore_index, GATE, POWER, GATE_BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _online_kernel(
    logits, targets, signals, correct, gradient, row_weights, class_weights, mean_class_weight,
    forget, base, tau, alpha, forget_count, retain_count, terms, gate_weights, counter,
    N, units, stride_units, out_units, weight_stride, ignore_index,
    SMOOTHING: tl.constexpr, GATE: tl.constexpr, POWER: tl.constexpr, GATE_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # One row a program, in blocks. The sums stay in lanes, so that a block costs one reduction, that of its maximum.
    Real: tl.constexpr = signals.dtype.element_ty
    classes = units * ALIGN
    real_classes = classes.to(Real)
    row = tl.program_id(0).to(tl.int64)
    keep, y = _target(targets, row, row < N, classes, ignore_index)
    start = logits + row * stride_units * ALIGN
    z_y = tl.load(start + y, mask=y >= 0, other=float("nan")).to(Real)
    lanes = tl.arange(0, BLOCK_V)
    peak = tl.full([], float("-inf"), Real)
    total_lanes = tl.zeros([BLOCK_V], Real)
    slope_lanes = tl.zeros([BLOCK_V], Real)
    square_lanes = tl.zeros([BLOCK_V], Real)
    upcoming = tl.load(start + lanes, mask=lanes < classes, other=float("-inf"))
    for begin in range(0, classes, BLOCK_V):
        cols = begin + lanes
        z = tl.where(cols == y, float("-inf"), upcoming.to(Real))
        # While this block is reduced, the next is on its way.
        upcoming = tl.load(start + cols + BLOCK_V, mask=cols + BLOCK_V < classes, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(z, 0))
        if new_peak > peak:
            # Beyond any exponent, so that the sums before the first finite peak, which are 0, stay 0.
            drop = tl.maximum(peak - new_peak, -1e4)
            scale = _exp(drop)
            slope_lanes = scale * (slope_lanes + drop * total_lanes)
            total_lanes = scale * total_lanes
            square_lanes = scale * scale * square_lanes
            peak = new_peak
        e, xe = _exponentials(z - tl.where(peak == float("-inf"), 0.0, peak))
        total_lanes += e
        slope_lanes += xe
        square_lanes += e * e
    m = tl.where(peak == float("-inf"), 0.0, peak)
    loss, lse, entropy, margin, p, q, ratio, above = _finish(z_y, m, tl.sum(total_lanes, 0), tl.sum(slope_lanes, 0))
    ahead = tl.full([], float("-inf"), Real)
    if z_y == peak:
        for begin in range(0, y, BLOCK_V):
            cols = begin + lanes
            ahead = tl.maximum(ahead, tl.max(tl.load(start + cols, mask=cols < y, other=float("-inf")).to(Real), 0))
    c_y = tl.full([], 1.0, Real)
    if class_weights is not None:
        c_y = tl.load(class_weights + y, mask=y >= 0, other=0.0)
    mean_c = tl.full([], 1.0, Real) if mean_class_weight is None else tl.load(mean_class_weight)
    loss_c = c_y * loss
    grad_sq = c_y * c_y * (q * q + ratio * ratio * tl.sum(square_lanes, 0))
    if gradient is not None or SMOOTHING != 0:
        if gradient is not None:
            if row_weights is None:
                w = keep.to(Real)
            else:
                w = tl.load(row_weights + row * weight_stride, mask=keep, other=0.0).to(Real)
            out = gradient + row * out_units * ALIGN
        surprise_lanes = tl.zeros([BLOCK_V], Real)
        square_lanes = tl.zeros([BLOCK_V], Real)
        for begin in range(0, classes, BLOCK_V):
            cols = begin + lanes
            present = cols < classes
            is_target = cols == y
            x = tl.load(start + cols, mask=present, other=float("-inf")).to(Real) - m
            # A mean is there when smoothing asks for the weights of all classes.
            c = 1.0 if mean_class_weight is None else tl.load(class_weights + cols, mask=present, other=0.0)
            unit = _unit_gradient(_exp(x), is_target, ratio, p, q, c_y, c, mean_c, real_classes, SMOOTHING)
            if SMOOTHING != 0:
                surprise_lanes += tl.where(present & (is_target == 0), c * (above - x), 0.0)
                square_lanes += tl.where(present, unit * unit, 0.0)
            if gradient is not None:
                value = tl.where(w != 0, w * unit, 0.0)
                tl.store(out + cols, value.to(gradient.dtype.element_ty), mask=present)
        if SMOOTHING != 0:
            loss_c = (1 - SMOOTHING) * loss_c + SMOOTHING * ((tl.sum(surprise_lanes, 0) + loss_c) / real_classes)
            grad_sq = tl.sum(square_lanes, 0)
    first = (z_y >= peak) & (z_y > ahead)
    _store_signals(
        signals, correct, row, N, row < N, keep, loss_c, lse, entropy, margin, tl.maximum(p, ratio), grad_sq, first
    )
    if GATE is not None:  # noqa: SIM102 (decided while compiling)
        if _is_last(counter):
            _gate(
                signals, targets, forget, base, tau, alpha, forget_count, retain_count, terms, gate_weights,
                N, ignore_index, GATE, POWER, GATE_BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _gate_kernel(
    signals, targets, forget, base, tau, alpha, forget_count, retain_count, terms, weights, N, ignore_index,
    GATE: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _gate(
        signals, targets, forget, base, tau, alpha, forget_count, retain_count, terms, weights, N, ignore_index,
        GATE, POWER, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _backward_kernel(
    logits, targets, lse, margin, weights, class_weights, mean_class_weight, gradient,
    N, units, stride_units, weight_stride, ignore_index,
    SMOOTHING: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    Real: tl.constexpr = lse.dtype.element_ty
    classes = units * ALIGN
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    keep, y = _target(targets, rows, inside, classes, ignore_index)
    long_rows = rows.to(tl.int64)
    w = tl.load(weights + long_rows * weight_stride, mask=keep, other=0.0).to(Real)
    live = w != 0  # the other rows are not read: their gradient is 0 whatever they hold
    start = logits + long_rows * stride_units * ALIGN
    z_y = tl.load(start + y, mask=live & (y >= 0), other=float("nan")).to(Real)
    log_sum = tl.load(lse + rows, mask=live, other=0.0)
    loss, p, q, _ = tails(tl.load(margin + rows, mask=live, other=0.0))
    # lse = z_y + loss, rounded: under a large common offset the two parts keep the digits that lse has lost. For a
    # target far below the rest it is the loss that is large, and lse serves.
    parts = loss <= tl.abs(log_sum)
    reference = tl.where(parts, z_y, log_sum)
    excess = tl.where(parts, loss, 0.0)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    present = cols < classes
    z = tl.load(start[:, None] + cols, mask=live[:, None] & present, other=float("-inf")).to(Real)
    others = _exp((z - reference[:, None]) - excess[:, None])
    c_y = tl.full([BLOCK_N], 1.0, Real)
    if class_weights is not None:
        c_y = tl.load(class_weights + y, mask=live & (y >= 0), other=0.0)
    c = 1.0 if mean_class_weight is None else tl.load(class_weights + cols, mask=present, other=0.0)
    mean_c = tl.full([], 1.0, Real) if mean_class_weight is None else tl.load(mean_class_weight)
    unit = _unit_gradient(
        others, cols == y[:, None], 1.0, p[:, None], q[:, None], c_y[:, None], c, mean_c, classes.to(Real), SMOOTHING
    )
    value = tl.where(live[:, None], w[:, None] * unit, 0.0)
    out = gradient + long_rows * classes
    tl.store(out[:, None] + cols, value.to(gradient.dtype.element_ty), mask=inside[:, None] & present)


def contiguous_rows(tensor: Tensor) -> Tensor:
    """Any stride between rows will do; within a row the kernels want neighbours, and copy what has none."""
    return tensor if tensor.shape[1] == 1 or tensor.stride(1) == 1 else tensor.contiguous()


def _class_weights(
    class_weights: Tensor | None, label_smoothing: float, real: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Class weights and their mean, which only smoothing asks for: the one case of an additional small launch."""
    if class_weights is None:
        return None, None
    class_weights = class_weights.to(real).contiguous()
    return class_weights, class_weights.mean() if label_smoothing else None


@functools.lru_cache(maxsize=64)
def _standing_counter(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def _counter(device: torch.device) -> Tensor:
    """A zero that counts the programs that are done; the last one sets it back to zero.

    One a stream, since launches of one stream do not overlap: no launch is spent on clearing it. A CUDA graph may be
    replayed beside anything, so what is captured gets a counter of its own, from the pool of the graph, and clears it
    in every replay.
    """
    if device.type == "cpu":
        return torch.zeros(1, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    return _standing_counter(device, torch.cuda.current_stream(device).cuda_stream)


class _GateArguments(NamedTuple):
    """Arguments of the row kernels in their order; all None without a gate."""

    forget: Tensor | None = None
    base: Tensor | None = None
    tau: Tensor | None = None
    alpha: Tensor | None = None
    forget_count: Tensor | None = None
    retain_count: Tensor | None = None
    terms: Tensor | None = None
    weights: Tensor | None = None
    counter: Tensor | None = None


def _launch_rows(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    class_weights: Tensor | None,
    *,
    gradient: Tensor | None = None,
    row_weights: Tensor | None = None,
    arguments: _GateArguments = _GateArguments(),  # noqa: B008 (immutable)
    gate: str | None = None,
    power: int = 2,
) -> RowSignals:
    count, classes = logits.shape
    real = compute_dtype(logits)
    signals = torch.empty(6, count, dtype=real, device=logits.device)
    correct = torch.empty(count, dtype=torch.bool, device=logits.device)
    if count:
        stride = logits.stride(0)
        out_stride = 0 if gradient is None else gradient.stride(0)
        align = launch.alignment(classes, stride, out_stride)
        weights, mean_weight = _class_weights(class_weights, label_smoothing, real)
        config = launch.rows(classes, real, smoothing=label_smoothing > 0, gate=gate is not None)
        kernel = _online_kernel if config.online else _tile_kernel
        with torch.cuda.device_of(logits):
            kernel[(triton.cdiv(count, config.rows),)](
                logits, targets.contiguous(), signals, correct, gradient, row_weights, weights, mean_weight, *arguments,
                count, classes // align, stride // align, out_stride // align,
                0 if row_weights is None else row_weights.stride(0), ignore_index,
                SMOOTHING=label_smoothing, GATE=gate, POWER=power, GATE_BLOCK=launch.GATE_BLOCK,
                ALIGN=align, BLOCK_N=config.rows, BLOCK_V=config.classes, num_warps=config.num_warps(),
            )  # fmt: skip
    loss, lse, entropy, margin, p_max, grad_sq = signals.unbind()
    return RowSignals(loss, lse, entropy, margin, p_max, grad_sq, correct)


def rows_forward(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> RowSignals:
    """Signals of each row (`reference.rows`) in one launch. logits [N, V] float32, float64, bfloat16 or float16 with
    any stride between rows, targets [N] integers, class_weights [V]."""
    return _launch_rows(contiguous_rows(logits), targets, ignore_index, label_smoothing, class_weights)


def rows_gradient(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[RowSignals, Tensor]:
    """Signals and the row-weighted gradient (`reference.rows_grad`) from one read, in one launch.

    weights [N], any stride; None stands for ones. out [N, V] receives the gradient; it may be the logits themselves,
    where nothing else needs them any more.
    """
    logits = contiguous_rows(logits)
    if out is None:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    signals = _launch_rows(
        logits, targets, ignore_index, label_smoothing, class_weights, gradient=out, row_weights=weights
    )
    return signals, out


def rows_backward(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    margin: Tensor,
    weights: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """The row-weighted gradient [N, V] from lse and margin [N] of `rows_forward`, in one launch. weights [N], any
    stride. Rows of weight 0 are not read."""
    logits = contiguous_rows(logits)
    count, classes = logits.shape
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if count:
        align = launch.alignment(classes, logits.stride(0))
        class_weights, mean_weight = _class_weights(class_weights, label_smoothing, lse.dtype)
        config = launch.elementwise(classes)
        with torch.cuda.device_of(logits):
            _backward_kernel[(triton.cdiv(count, config.rows), triton.cdiv(classes, config.classes))](
                logits, targets.contiguous(), lse.contiguous(), margin.contiguous(), weights,
                class_weights, mean_weight, gradient,
                count, classes // align, logits.stride(0) // align, weights.stride(0), ignore_index,
                SMOOTHING=label_smoothing, ALIGN=align, BLOCK_N=config.rows, BLOCK_V=config.classes,
                num_warps=config.num_warps(),
            )  # fmt: skip
    return gradient


def nabla_tau_rows(
    logits: Tensor,
    targets: Tensor,
    forget: Tensor,
    tau: Tensor,
    alpha: Tensor,
    *,
    gate: str = "batch",
    power: int = 2,
    base: Tensor | None = None,
    forget_count: Tensor | None = None,
    retain_count: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, RowSignals]:
    """The objective of a mixed batch (`objective.objective`) and its derivative by each row's loss: one launch.

    forget [N] bool: True for a row to forget, in any order. tau, alpha 0-d on the device. gate "batch", "two_sided" or
    "sample"; power 1 or 2. With base [N], the weight of a row within its sample, forget_count and retain_count (0-d)
    are the numbers of samples; without it each row is a sample, and "sample" is allowed.

    Returns terms [5] (total, forget term, forget loss, retain loss, gate_open), weights [N] and the signals; the
    gradient of the logits is `rows_backward` with these weights. The host never waits.

    The program that finishes last adds the N losses up and writes the N weights; beyond `launch.GATE_ROWS` rows, where
    a launch is nothing beside the rows, a second launch does it with more threads.
    """
    logits = contiguous_rows(logits)
    count, real, device = logits.shape[0], compute_dtype(logits), logits.device
    if count == 0:
        terms, weights = torch.zeros(5, dtype=real, device=device), torch.empty(0, dtype=real, device=device)
        return terms, weights, _launch_rows(logits, targets, ignore_index, label_smoothing, class_weights)
    terms = torch.empty(5, dtype=real, device=device)
    weights = torch.empty(count, dtype=real, device=device)
    base = None if base is None else base.contiguous()
    groups = (forget.contiguous(), base, tau, alpha, forget_count, retain_count, terms, weights)
    options = (ignore_index, label_smoothing, class_weights)
    if torch.version.hip is None and count <= launch.GATE_ROWS:
        arguments = _GateArguments(*groups, _counter(device))
        signals = _launch_rows(logits, targets, *options, arguments=arguments, gate=gate, power=power)
    else:
        # On AMD always: a barrier of CDNA does not wait for the stores of other wavefronts to reach the second-level
        # cache, so the last program could miss some.
        signals = _launch_rows(logits, targets, *options)
        config = launch.gate()
        with torch.cuda.device_of(logits):
            _gate_kernel[(1,)](
                signals.loss, targets.contiguous(), *groups, count, ignore_index,
                GATE=gate, POWER=power, BLOCK=config.rows, num_warps=config.num_warps(),
            )  # fmt: skip
    return terms, weights, signals
