"""Losses of a linear head (the output layer of a language model) whose logits are never stored whole.

`linear_nabla_tau_loss` is nabla-tau on hidden vectors and the head's weight. The row weights of its gate follow from
one number of the forget rows. So these go first, with the weights they have within the mean loss; once that is known,
one multiplication of the head's gradient by a scalar on the device gives them their weight, and the retained rows are
added to the same buffer with theirs: every chunk of logits is made once. Any other function of row losses goes through
`linear_row_losses`, whose backward makes the chunks again.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nabla_tau import _library
from nabla_tau.functional import check_labels, checked_options, has_loss, refuse_double_backward
from nabla_tau.kernels.linear_rows import Gradients, Head, Rows, index, linear_rows_forward, linear_rows_gradient
from nabla_tau.kernels.reference import IGNORE_INDEX, RowSignals, compute_dtype
from nabla_tau.loss import as_target, check_mixed
from nabla_tau.objective import Gate, Target, objective


class _Options(NamedTuple):
    """Of the row ops; dtype is that of the logits. The order is that of the operators below."""

    class_weights: Tensor | None
    ignore_index: int
    label_smoothing: float
    dtype: torch.dtype

    def of(self, op: Callable[..., Any]) -> Callable[..., Any]:
        """The row op with these options."""
        return functools.partial(
            op,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            class_weights=self.class_weights,
        )


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype) -> Head:
    return Head(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), targets)


def _without_autocast(hidden: Tensor) -> contextlib.AbstractContextManager[Any]:
    # The head is cast already, and what is computed in float32 must stay so.
    return torch.autocast(hidden.device.type, enabled=False)


def _rows_where(mask: Tensor, device: torch.device) -> Rows:
    """Where a mask [N] on the CPU is True."""
    at = mask.nonzero().squeeze(1)
    if len(at) == 0:
        return range(0)
    first, last = int(at[0]), int(at[-1])
    return range(first, last + 1) if last - first + 1 == len(at) else at.to(device, non_blocking=True)


def _rows_that_count(targets: Tensor, ignore_index: int, weights: Tensor | None = None) -> Rows:
    """All rows, less those without a loss or a weight where the host can look for free."""
    if targets.device.type != "cpu":
        return range(len(targets))
    kept = targets != ignore_index
    return _rows_where(kept if weights is None else kept & (weights != 0), targets.device)


def _losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any) -> Tensor:
    chosen = _Options(*options)
    with _without_autocast(hidden):
        head = _head(hidden, weight, bias, targets, chosen.dtype)
        rows = _rows_that_count(targets, chosen.ignore_index)
        signals: RowSignals = linear_rows_forward(head, rows, chosen.of(_library.rows_forward))
        return signals.loss


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    wanted: Sequence[bool],
    *options: Any,
) -> list[Tensor]:
    """The gradients of sum_i weights_i l_i that are wanted, in the dtypes of hidden, weight and bias."""
    chosen = _Options(*options)
    with _without_autocast(hidden):
        head = _head(hidden, weight, bias, targets, chosen.dtype)
        into = Gradients(head, *wanted)
        rows = _rows_that_count(targets, chosen.ignore_index, weights)
        linear_rows_gradient(head, rows, weights, into, None, chosen.of(_library.rows_gradient))
        found = zip((into.hidden, into.weight, into.bias), (hidden, weight, bias), strict=True)
        return [total.to(given.dtype) for total, given in found if total is not None and given is not None]


class _LinearRows(torch.autograd.Function):
    """Loss of each row; the backward makes the logits again, chunk by chunk, to weigh their gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs, None)
        return _losses(*inputs)

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        return _backward(_gradients, ctx, weights)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    hidden, weight, bias, targets, class_weights, *options = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, class_weights)
    ctx.options = options


def _backward(op: Callable[..., list[Tensor]], ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
    *head, class_weights = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    found = iter(op(*head, weights, wanted, class_weights, *ctx.options))
    return *(next(found) if want else None for want in wanted), *[None] * 5


# What torch.compile sees; in eager mode the call of such an operator costs more than that of an autograd.Function.
@torch.library.custom_op("nabla_tau::linear_row_losses", mutates_args=())
def _losses_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
) -> Tensor:
    return _losses(hidden, weight, bias, targets, class_weights, ignore_index, label_smoothing, dtype)


@torch.library.custom_op("nabla_tau::linear_row_gradients", mutates_args=())
def _gradients_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    wanted: Sequence[bool],
    class_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    return _gradients(
        hidden, weight, bias, targets, weights, wanted, class_weights, ignore_index, label_smoothing, dtype
    )


@_losses_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any) -> Tensor:
    return hidden.new_empty(targets.shape, dtype=compute_dtype(hidden.to(_Options(*options).dtype)))


@_gradients_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    wanted: Sequence[bool],
    *options: Any,
) -> list[Tensor]:
    given = zip((hidden, weight, bias), wanted, strict=True)
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, want in given
        if want and tensor is not None
    ]


_losses_op.register_autograd(functools.partial(_backward, _gradients_op), setup_context=_save)


class _Groups(NamedTuple):
    """Forget and retain rows; base [N], the weight of a row within the loss of its sample, up to a factor (None: 1)."""

    forget: Rows
    retain: Rows
    base: Tensor | None


class _LinearNablaTau(torch.autograd.Function):
    """The objective `total` of the row losses [N], in which all forget rows have one common weight times their base."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        groups: _Groups,
        total: Callable[[Tensor], Tensor],
        options: _Options,
    ) -> Tensor:
        with _without_autocast(hidden):
            head = _head(hidden, weight, bias, targets, options.dtype)
            into = Gradients(head, *ctx.needs_input_grad[:3])
            losses = head.hidden.new_zeros(len(targets), dtype=compute_dtype(head.hidden))
            op = options.of(_library.rows_gradient)

            linear_rows_gradient(head, groups.forget, groups.base, into, losses, op)
            # The retained losses are not known yet, nor needed: the objective is linear in them.
            with torch.enable_grad():
                leaf = losses.detach().requires_grad_()
                (weights,) = torch.autograd.grad(total(leaf), leaf)
            unit = torch.ones_like(losses[0])
            if options.dtype == torch.float16 and len(groups.retain):
                # 1/n of a logit gradient underflows in float16 before a gradient scaler could lift it.
                largest = weights[index(groups.retain)].amax()
                unit = torch.where(largest > 0, largest, 1.0)
            scale = unit.expand_as(losses).clone()
            if len(groups.forget):
                low, high = weights[index(groups.forget)].aminmax()
                common = torch.where(low < 0, low, high)
                into.scale_(common / unit)
                scale[index(groups.forget)] = common
            linear_rows_gradient(head, groups.retain, weights / unit, into, losses, op)

            ctx.save_for_backward(into.hidden, into.weight, into.bias, scale.unsqueeze(1), unit)
            ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
            return total(losses)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        *gradients, scale, unit = ctx.saved_tensors
        factors = scale * upstream, unit * upstream, unit * upstream
        found = (
            None if gradient is None else _scaled(gradient, factor, dtype)
            for gradient, factor, dtype in zip(gradients, factors, ctx.dtypes, strict=True)
        )
        return *found, None, None, None, None


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    # Never in place: the graph may be kept for another backward. A look at a CPU scalar is free, the pass is not.
    if factor.device.type == "cpu" and factor.ndim == 0 and factor.item() == 1:
        return gradient.to(dtype)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _refuse_dtensor(**tensors: Tensor | None) -> None:
    module = sys.modules.get("torch.distributed.tensor")  # who has a DTensor has imported it
    if module is None:
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, module.DTensor):
            raise TypeError(
                f"{name} is a DTensor of shape {tuple(tensor.shape)}: gather it first (full_tensor(), or FSDP2's "
                "unshard() of the module that owns it)"
            )


def _checked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    class_weights: Tensor | None,
) -> tuple[Tensor, Tensor, _Options]:
    """hidden as [N, D], targets as [N] int64 and the options; TypeError or ValueError for what does not fit."""
    _refuse_dtensor(hidden=hidden, weight=weight, bias=bias)

    def got() -> str:
        tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
        return "got " + ", ".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items())

    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integer class labels, got {targets.dtype} of shape {tuple(targets.shape)}")
    if hidden.ndim not in (2, 3) or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden must be [B, D] or [B, T, D] and weight [V, D], {got()}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must be {tuple(hidden.shape[:-1])}, one a row of hidden, got {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}], one a class, {got()}")
    dtypes = {tensor.dtype for tensor in (hidden, weight, bias) if tensor is not None}
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and torch.float64 not in dtypes
    if not hidden.is_floating_point() or (len(dtypes) > 1 and not autocast):
        raise TypeError(f"hidden, weight and bias must be floating point and of one dtype, {got()}")
    class_weights = checked_options(weight.t(), label_smoothing, class_weights)  # it looks at the last dimension
    targets = targets.long().flatten()
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and targets.numel():
        check_labels(targets, len(weight), ignore_index)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    return hidden.flatten(0, -2), targets, _Options(class_weights, ignore_index, label_smoothing, dtype)


def linear_row_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each row of a linear head, [B] or [B, T], differentiable once in hidden, weight and bias.

    hidden [B, D] with integer targets [B], or [B, T, D] with [B, T]; weight [V, D]; bias [V]; all floating and of one
    dtype, or cast as autocast casts for torch.nn.functional.linear. The other arguments, and the result, are those of
    `functional.row_losses` on linear(hidden, weight, bias), of which a chunk at a time exists. Any function of the
    losses may follow (`row_objectives`). The backward makes the chunks again: 4/3 of the operations of a head that
    stores its logits, less those of rows without a loss or a weight where the host can look for free (on the CPU).

    The gradient of the weight is summed in float32 for 16-bit heads. Raises TypeError and ValueError for arguments that
    do not fit together, and RuntimeError where its backward runs with create_graph=True.
    """
    rows, labels, options = _checked(hidden, weight, targets, bias, ignore_index, label_smoothing, class_weights)
    op = _losses_op if torch.compiler.is_compiling() else _LinearRows.apply
    losses: Tensor = op(rows, weight, bias, labels, *options)  # type: ignore[no-untyped-call]
    return losses.view(targets.shape)


def linear_row_signals(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> RowSignals:
    """Loss and attack signals of each row of a linear head (`RowSignals`, each [B] or [B, T]), without gradient.

    Arguments as in `linear_row_losses`.
    """
    rows, labels, options = _checked(hidden, weight, targets, bias, ignore_index, 0.0, None)
    with torch.no_grad(), _without_autocast(hidden):
        head = _head(rows, weight, bias, labels, options.dtype)
        found = linear_rows_forward(head, range(len(labels)), options.of(_library.rows_forward))
    return RowSignals(*(signal.view(targets.shape) for signal in found))


def linear_nabla_tau_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    forget_mask: Tensor,
    *,
    tau: float | Tensor | Target,
    alpha: float | Tensor,
    bias: Tensor | None = None,
    gate: Gate = "batch",
    power: int = 2,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """`nabla_tau_loss` of linear(hidden, weight, bias), a 0-d tensor, whose logits are never stored whole.

    hidden [B, D] with integer targets [B], or [B, T, D] with [B, T] (a sample's loss is the mean over its tokens other
    than `ignore_index`; a sample without any does not count); weight [V, D]; bias [V]; dtypes as in
    `linear_row_losses`. forget_mask [B] bool, in any order; a group of samples that lie together is not copied. The
    other arguments are those of `nabla_tau_loss`. Differentiable once, in hidden, weight and bias.

    With gate="batch" or "two_sided" the gradients, of what requires one, are made in the forward, and each chunk of
    logits once; a closed gate saves nothing, since it is known only after the forget rows' chunks. The host must know
    which rows go first, and does not wait for a GPU to tell: **keep forget_mask on the CPU** where the rest is on a
    GPU. For a mask on the GPU, for the other gates and under torch.compile the chunks are made again in the backward
    (`linear_row_losses`).

    Raises TypeError and ValueError for arguments that do not fit together, and RuntimeError where its backward runs
    with create_graph=True.
    """
    rows, labels, options = _checked(hidden, weight, targets, bias, ignore_index, label_smoothing, class_weights)
    check_mixed(targets, forget_mask, alpha, gate, power)
    kept = labels.view(targets.shape) != ignore_index
    counts = has_loss(targets, ignore_index=ignore_index)
    target = as_target(tau, gate, like=rows.new_empty((), dtype=compute_dtype(rows)))
    alpha = alpha.detach() if isinstance(alpha, Tensor) else alpha
    on_device = _on_device(forget_mask, rows.device)

    def total(losses: Tensor) -> Tensor:
        if kept.ndim == 2:
            losses = losses.view(kept.shape).sum(1) / kept.sum(1).clamp(min=1)
        return objective(losses, on_device, target, alpha, gate=gate, power=power, counts=counts).total

    head = rows, weight, bias, labels
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in head)
    known = forget_mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if gate in ("batch", "two_sided") and wanted and known and len(labels):
        groups = _groups(forget_mask, kept, compute_dtype(rows))
        found: Tensor = _LinearNablaTau.apply(*head, groups, total, options)  # type: ignore[no-untyped-call]
        return found
    op = _losses_op if torch.compiler.is_compiling() else _LinearRows.apply
    return total(op(*head, *options))  # type: ignore[no-untyped-call]


def _on_device(mask: Tensor, device: torch.device) -> Tensor:
    if mask.device == device:
        return mask
    # Filled there where it can be: a copy from the host's pageable memory cannot be captured in a CUDA graph.
    moved = torch.zeros_like(mask, device=device)
    moved[index(_rows_where(mask, device))] = True
    return moved


def _groups(forget_mask: Tensor, kept: Tensor, dtype: torch.dtype) -> _Groups:
    """forget_mask [B] on the CPU, kept [B] or [B, T]; dtype that of the losses."""
    forget, base = forget_mask, None
    if kept.ndim == 2:
        forget = forget_mask.repeat_interleave(kept.shape[1])
        base = (kept.to(dtype) / kept.sum(1, keepdim=True).clamp(min=1)).flatten()
    seen = kept.flatten() if kept.device.type == "cpu" else torch.ones_like(forget)
    groups = _rows_where(forget & seen, kept.device), _rows_where(~forget & seen, kept.device)
    if base is not None and len(groups[0]):
        # The largest is 1, so that no base underflows in float16.
        base = base / base[index(groups[0])].amax().clamp(min=torch.finfo(base.dtype).tiny)
    return _Groups(*groups, base)
