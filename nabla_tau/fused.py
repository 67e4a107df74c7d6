"""Losses and the gradient of the logits in one call of a kernel: of the nabla-tau loss of a mixed batch, with its gate
and row weights, and of a plain mean.

The gate of the paper and its relatives need one number of the whole batch, so the row weights are known as soon as the
forget losses are: on the CPU the gradient is written in the very pass that reads the logits of the retained rows, on a
GPU the last block of the loss kernel leaves the row weights on the device and a second launch writes the gradient.
`objective.py` is the definition; what is not served here (`serves`) goes through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nabla_tau import _library
from nabla_tau.functional import (
    explained,
    infer_task,
    refuse_double_backward,
    samples_of_rows,
    wants_gradient,
)
from nabla_tau.kernels.reference import IGNORE_INDEX, RowSignals, compute_dtype
from nabla_tau.objective import Gate, Terms


def serves(logits: Tensor, gate: Gate) -> bool:
    """Whether `fused_terms` computes this batch of class labels: a fused kernel for the device, and a gate whose row
    weights follow from one number of the batch or, for "sample", from the row itself."""
    if torch.compiler.is_compiling() or _library.row_provider(logits) == "reference":
        return False
    return gate in ("batch", "two_sided") or (gate == "sample" and logits.ndim == 2)


class _NablaTau(torch.autograd.Function):
    """The total of what `_library.nabla_tau_rows` found for a batch, 0-d, as a function of the logits. One output, and
    few arguments: each costs as much as a small kernel."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, batch: _library.MixedRows, found: tuple[Any, ...]) -> Tensor:
        terms, weights, signals, gradient = found
        if gradient is not None:
            ctx.save_for_backward(gradient)
        else:
            ctx.save_for_backward(
                logits, batch.targets, signals.lse, signals.margin, weights, batch.options.class_weights
            )
        ctx.early, ctx.options = gradient is not None, batch.options
        total: Tensor = terms[0].clone()
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if ctx.early:
            (gradient,) = ctx.saved_tensors
            # A look at a CPU scalar is free, a pass over the gradient is not.
            found = gradient if upstream.item() == 1 else gradient * upstream.to(gradient)
        else:
            logits, targets, lse, margin, weights, class_weights = ctx.saved_tensors
            options = ctx.options.ignore_index, ctx.options.label_smoothing, class_weights
            found = _library.rows_backward(logits, targets, lse, margin, weights * upstream, *options)
        return found, None, None


def fused_terms(
    logits: Tensor,
    targets: Tensor,
    forget_mask: Tensor,
    tau: Tensor | float,
    alpha: Tensor | float,
    *,
    gate: Gate,
    power: int,
    options: _library.RowOptions,
) -> tuple[Terms, RowSignals]:
    """`objective` of `sample_losses` and the signals of the samples, for a batch that this module `serves`.

    logits [B, C] with targets [B], or [B, T, V] with [B, T]; forget_mask [B] bool. `total` carries the gradient.
    Raises ValueError for a label out of range (on the CPU).
    """
    assert gate != "quantile", "`serves` says no"
    targets = targets.long()
    kept = None
    if logits.ndim == 2:
        batch = _library.MixedRows(targets, forget_mask, tau, alpha, gate, power, options)
    else:
        kept = targets != options.ignore_index
        counts, base = _of_tokens(kept, compute_dtype(logits))
        forget = forget_mask.unsqueeze(1).expand_as(targets).flatten()
        of_samples = (forget_mask & counts).sum(), (~forget_mask & counts).sum()
        logits = logits.flatten(0, 1)
        batch = _library.MixedRows(targets.flatten(), forget, tau, alpha, gate, power, options, base, *of_samples)
    learns = wants_gradient(logits)
    # Scaled by 1/n a float16 gradient would underflow before a gradient scaler could lift it.
    early = learns and logits.dtype != torch.float16
    with explained(batch.targets, logits.shape[1], options.ignore_index):
        found = _library.nabla_tau_rows(logits, batch, with_gradient=early)
    terms, _, signals, _ = found
    total, *parts = terms.unbind()
    if learns:
        total = _NablaTau.apply(logits, batch, found)  # type: ignore[no-untyped-call]
    return Terms(total, *parts), signals if kept is None else samples_of_rows(signals, kept)


def _of_tokens(kept: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which sequences have a loss [B], and the weight of each token in that of its sequence [B * T]; kept: [B, T]."""
    count = kept.sum(1)
    return count > 0, (kept.to(dtype) / count.clamp(min=1).unsqueeze(1)).flatten()


def serves_mean(logits: Tensor, targets: Tensor) -> bool:
    """Whether `mean_gradient` computes this batch: class labels, and a kernel for the device."""
    labels = not targets.is_floating_point() and targets.dtype != torch.bool
    return labels and not torch.compiler.is_compiling() and _library.row_provider(logits) != "reference"


def mean_gradient(
    logits: Tensor, targets: Tensor, weight: float, total: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """weight times the mean loss of the samples that have one, 0-d, and its gradient by the logits, of their shape and
    dtype, for a batch that `serves_mean`: row weights that are known before the losses take one read of the logits,
    and no autograd function.

    total: number of samples here that have a loss, 0-d -> that of all processes, which the mean is over. logits and
    targets as in `fused_terms`. Raises TypeError and ValueError as `infer_task`, and ValueError for a label out of
    range (on the CPU).
    """
    targets, base, samples = targets.long(), None, None
    if infer_task(logits, targets) == "sequence":
        counts, base = _of_tokens(targets != IGNORE_INDEX, compute_dtype(logits))
        samples = counts.sum()
    elif total is not None:
        samples = (targets != IGNORE_INDEX).sum()
    if total is not None and samples is not None:
        samples = total(samples)
    rows, labels = logits.detach().flatten(0, -2), targets.flatten()
    with explained(labels, rows.shape[1], IGNORE_INDEX):
        mean, gradient = _library.rows_mean(rows, labels, weight, base, samples)
    return mean, gradient.view(logits.shape)
