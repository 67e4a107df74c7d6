"""Rows of a linear head, z = h W^T + b, without the N x V logits: a chunk of rows at a time through one buffer.

hidden h [N, D], weight W [V, D], bias b [V], targets [N]. The row ops come as arguments (C++ on the CPU, Triton on the
GPU), their options bound:

    rows_forward(logits, targets) -> RowSignals
    rows_gradient(logits, targets, weights, out=logits) -> (RowSignals, gradient)      weights [n] or None (all 1)

A chunk with a gradient is three GEMMs and one read of its logits, which become their own gradient g in place:

    z = h W^T + b,    g_i = w_i dl_i/dz_i,    dh = g W,    dW += g^T h,    db += sum_i g_i

Beside the buffer it moves W twice and dW in and out, 4 V D entries against 6 n V D operations: a chunk of few rows n
would spend its time on that traffic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from nabla_tau.kernels.reference import RowSignals, compute_dtype

# Which rows: a range where they lie together, so that nothing is copied, else their indices on the device.
Rows: TypeAlias = range | Tensor
RowsForward: TypeAlias = Callable[[Tensor, Tensor], RowSignals]
RowsGradient: TypeAlias = Callable[..., tuple[RowSignals, Tensor]]

BLOCK = 1024  # classes of a product of 16-bit matrices, where a GEMM cannot add it to a float32 matrix


class Head(NamedTuple):
    """What the logits are made of, in the dtype of the logits; targets [N] int64."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor


def chunk_rows(rows: int, classes: int, itemsize: int, device_type: str) -> int:
    """Rows of a chunk of logits, the chunks of about one size.

    CPU: 32 MiB of logits stay near a last-level cache; 128 rows at least, where the traffic of dW is about a tenth of
    the GEMMs' time. Elsewhere 512 MiB and at least 2048 rows, for the same reason.
    """
    budget, least, tile = (32 << 20, 128, 32) if device_type == "cpu" else (512 << 20, 2048, 128)
    most = max(least, budget // (classes * itemsize) // tile * tile)
    even = -(-rows // max(1, -(-rows // most)))
    return min(rows, -(-even // tile) * tile)


def index(rows: Rows) -> slice | Tensor:
    """What takes these rows out of a tensor, as a view where it can."""
    return slice(rows.start, rows.stop) if isinstance(rows, range) else rows


def _logits(head: Head, rows: Rows) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
    """Which rows, their hidden vectors and their logits, of every chunk; the logits lie in the same buffer."""
    size = chunk_rows(len(rows), len(head.weight), head.weight.element_size(), head.weight.device.type)
    buffer = head.weight.new_empty(size, len(head.weight))
    weight = head.weight.t()
    for start in range(0, len(rows), size or 1):
        part = rows[start : start + size]
        at = index(part)
        hidden, logits = head.hidden[at], buffer[: len(part)]
        if head.bias is None:
            torch.mm(hidden, weight, out=logits)
        else:
            torch.addmm(head.bias, hidden, weight, out=logits)
        yield at, hidden, logits


def linear_rows_forward(head: Head, rows: Rows, rows_forward: RowsForward) -> RowSignals:
    """`RowSignals` [N] of the head; zeros in the rows left out."""
    count, dtype = len(head.targets), compute_dtype(head.hidden)
    found = RowSignals(
        *(head.hidden.new_zeros(count, dtype=torch.bool if name == "correct" else dtype) for name in RowSignals._fields)
    )
    for at, _, logits in _logits(head, rows):
        for whole, part in zip(found, rows_forward(logits, head.targets[at]), strict=True):
            whole[at] = part
    return found


@functools.cache
def _mixes_precisions(device_type: str) -> bool:
    """Whether a GEMM of this device adds a product of 16-bit matrices to a float32 matrix."""
    narrow = torch.zeros(16, 16, dtype=torch.bfloat16, device=device_type)
    wide = narrow.float()
    try:
        torch.addmm(wide, narrow, narrow, out_dtype=torch.float32, out=wide)
    except (RuntimeError, TypeError):
        return False
    return True


class Gradients:
    """Sums of a head's gradients, None where none is wanted: hidden [N, D] in the head's dtype, zero in rows that were
    never added; weight [V, D] and bias [V] in the computing dtype (float32 for 16-bit heads)."""

    def __init__(self, head: Head, hidden: bool, weight: bool, bias: bool) -> None:
        dtype = compute_dtype(head.weight)
        self.hidden = torch.zeros_like(head.hidden, memory_format=torch.contiguous_format) if hidden else None
        self._weight = (
            torch.empty_like(head.weight, dtype=dtype, memory_format=torch.contiguous_format) if weight else None
        )
        self.bias = head.weight.new_zeros(len(head.weight), dtype=dtype) if bias else None
        self._started = False

    @property
    def weight(self) -> Tensor | None:
        if self._weight is not None and not self._started:
            self._weight.zero_()
        return self._weight

    def scale_(self, factor: Tensor) -> None:
        """Multiply what weight and bias have so far by a 0-d tensor."""
        for total in (self.weight, self.bias):
            if total is not None:
                total.mul_(factor)

    def add_(self, at: slice | Tensor, hidden: Tensor, gradient: Tensor, weight: Tensor) -> None:
        """Add the rows `at`, of these hidden vectors [n, D] and logit gradients [n, V]; weight [V, D] is the head's."""
        if self.hidden is not None:
            self.hidden[at] = gradient @ weight
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)
        if self._weight is not None:
            _add_product(self._weight, gradient, hidden, beta=int(self._started))
        self._started = True


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor, beta: int) -> None:
    """total = beta total + gradient^T hidden; with beta 0, which saves a pass, total may hold anything."""
    dtype = total.dtype
    if hidden.dtype == dtype:
        total.addmm_(gradient.t(), hidden, beta=beta)
    elif _mixes_precisions(hidden.device.type):
        torch.addmm(total, gradient.t(), hidden, beta=beta, out_dtype=dtype, out=total)
    else:
        # By blocks whose products stay in the cache on their way to the sum.
        for start in range(0, len(total), BLOCK):
            part, product = total[start : start + BLOCK], gradient[:, start : start + BLOCK].t() @ hidden
            part.add_(product) if beta else part.copy_(product)


def linear_rows_gradient(
    head: Head, rows: Rows, weights: Tensor | None, into: Gradients, losses: Tensor | None, rows_gradient: RowsGradient
) -> None:
    """Add the gradients of sum_i weights_i l_i over the rows to `into`, and write l_i to `losses` [N]. weights [N]."""
    for at, hidden, logits in _logits(head, rows):
        signals, gradient = rows_gradient(
            logits, head.targets[at], None if weights is None else weights[at], out=logits
        )
        if losses is not None:
            losses[at] = signals.loss
        into.add_(at, hidden, gradient, head.weight)
