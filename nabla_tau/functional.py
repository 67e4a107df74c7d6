"""Row losses as differentiable functions: which kernel serves which tensor, and all validation of their arguments.

`row_losses` is the one op the engine trains with. Its backward takes one weight a row, so every objective that is a
function of the per-row losses costs one weighted backward (`objective.py`). CPU tensors in float32, float64 and
bfloat16 are served by the C++ kernels, everything else by `kernels/reference.py`.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from nabla_tau import _C
from nabla_tau.kernels import reference
from nabla_tau.kernels.reference import IGNORE_INDEX, RowSignals

Task: TypeAlias = Literal["classification", "sequence", "multilabel"]

CPP_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def row_provider(logits: Tensor) -> str:
    """Name of the implementation that serves the rows of this tensor: "cpp" or "reference"."""
    # While compiling, plain PyTorch operations are what the compiler can fuse.
    use_cpp = logits.device.type == "cpu" and logits.dtype in CPP_DTYPES and not torch.compiler.is_compiling()
    return "cpp" if use_cpp else "reference"


def _as_numpy(tensor: Tensor) -> Any:
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _rows_cpp(logits: Tensor, targets: Tensor, ignore_index: int) -> RowSignals:
    out = _C.rows_forward(_as_numpy(logits), _as_numpy(targets), ignore_index, torch.get_num_threads())
    return RowSignals(*(torch.from_numpy(array) for array in out))


def _rows(logits: Tensor, targets: Tensor, ignore_index: int) -> RowSignals:
    if row_provider(logits) == "cpp":
        return _rows_cpp(logits, targets, ignore_index)
    return reference.rows(logits, targets, ignore_index=ignore_index)


class _RowLoss(torch.autograd.Function):
    """Loss of each row; the backward is the row-weighted gradient, from the saved normalisers."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        signals = _rows(logits, targets, ignore_index)
        ctx.save_for_backward(logits, targets, signals.lse, signals.margin)
        ctx.ignore_index = ignore_index
        return signals.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, weights: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, lse, margin = ctx.saved_tensors  # type: ignore[attr-defined]
        ignore_index: int = ctx.ignore_index  # type: ignore[attr-defined]
        if row_provider(logits) != "cpp":
            return reference.rows_grad(logits, targets, weights, ignore_index=ignore_index), None, None
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        _C.rows_backward(
            _as_numpy(logits),
            _as_numpy(targets),
            lse.numpy(),
            margin.numpy(),
            _as_numpy(weights),
            ignore_index,
            torch.get_num_threads(),
            _as_numpy(grad),
        )
        return grad, None, None


def check_rows(logits: Tensor, targets: Tensor, ignore_index: int) -> None:
    """Raise TypeError or ValueError unless logits [N, V] are floating and targets [N] are labels of them.

    The values of the targets are looked at only on the CPU: on a GPU that would make the host wait in every step
    (`unlearn` looks at them once, before the first step).
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype} of shape {tuple(logits.shape)}")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integer class labels, got {targets.dtype} of shape {tuple(targets.shape)}")
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be [rows, classes] and targets [rows], got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and targets.numel():
        check_labels(targets, logits.shape[1], ignore_index)


def check_labels(targets: Tensor, classes: int, ignore_index: int = IGNORE_INDEX) -> None:
    """Raise ValueError for a label outside [0, classes) that is not `ignore_index`; makes the host wait on a GPU."""
    targets = targets.long()
    wrong = ((targets < 0) | (targets >= classes)) & (targets != ignore_index)
    if bool(wrong.any()):
        row = int(wrong.flatten().nonzero()[0])
        raise ValueError(
            f"label out of range: target {int(targets.flatten()[row])} in row {row}, "
            f"but the logits have {classes} classes (ignore_index is {ignore_index})"
        )


def check_multilabel(targets: Tensor) -> None:
    """Raise ValueError for multi-label targets outside [0, 1]; makes the host wait on a GPU."""
    if targets.is_floating_point() and targets.numel():
        low, high = (float(end) for end in targets.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"floating targets of the logits' shape are multi-label and must lie in [0, 1], got {low:g} to "
                f"{high:g}; for another task pass loss=, a function (logits, targets) -> per-sample losses"
            )


def row_losses(logits: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Cross-entropy of each row, [N]; differentiable once in the logits.

    logits [N, V] float32, float64, bfloat16 or float16; targets [N] integer labels. The result is float32 (float64
    for float64 logits) and 0 where the target is `ignore_index`. Raises TypeError and ValueError (`check_rows`).
    """
    check_rows(logits, targets, ignore_index)
    loss: Tensor = _RowLoss.apply(logits, targets.long(), ignore_index)  # type: ignore[no-untyped-call]
    return loss


def row_signals(logits: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX) -> RowSignals:
    """Loss, logsumexp, entropy, margin and correctness of each row (`RowSignals`), without gradient."""
    check_rows(logits, targets, ignore_index)
    with torch.no_grad():
        return _rows(logits, targets.long(), ignore_index)


def infer_task(logits: Tensor, targets: Tensor) -> Task:
    """What the shapes and dtypes say the task is.

    logits [B, C] with integer targets [B]: classification. logits [B, T, V] with integer targets [B, T]: sequence.
    logits [B, C] with floating or bool targets [B, C]: multilabel. Anything else raises ValueError.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype} of shape {tuple(logits.shape)}")
    integer = not (targets.is_floating_point() or targets.dtype == torch.bool)
    if integer and logits.ndim == 2 and targets.shape == logits.shape[:1]:
        return "classification"
    if integer and logits.ndim == 3 and targets.shape == logits.shape[:2]:
        return "sequence"
    if not integer and logits.ndim == 2 and targets.shape == logits.shape:
        return "multilabel"
    raise ValueError(
        "cannot tell the task from logits and targets: expected [B, C] with integer [B] (classification), "
        "[B, T, V] with integer [B, T] (sequence) or [B, C] with floating [B, C] (multi-label), "
        f"got logits {tuple(logits.shape)} {logits.dtype} and targets {tuple(targets.shape)} {targets.dtype}"
    )


def _mean_over_tokens(values: Tensor, kept: Tensor) -> Tensor:
    return (values * kept).sum(1) / kept.sum(1).clamp(min=1)


def has_loss(targets: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Which samples count, [B] bool: not those of which every target is `ignore_index`; their loss is 0 by convention
    and says nothing."""
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.ndim > 2:
        return torch.ones(targets.shape[:1], dtype=torch.bool, device=targets.device)
    kept = targets.long() != ignore_index
    return kept if kept.ndim == 1 else kept.any(1)


def sample_losses(logits: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Loss of each sample, [B]: what is forgotten or kept is a sample, whatever it is made of.

    Classification: cross-entropy. Sequence: mean cross-entropy over the tokens whose target is not `ignore_index`
    (0 for a sample that has none). Multi-label: mean binary cross-entropy over the labels, from logits. Shapes as in
    `infer_task`; for a causal language model the caller shifts the targets, so that targets[:, t] is what
    logits[:, t] predicts.
    """
    task = infer_task(logits, targets)
    if task == "classification":
        return row_losses(logits, targets, ignore_index=ignore_index)
    if task == "multilabel":
        if targets.device.type == "cpu" and not torch.compiler.is_compiling():
            check_multilabel(targets)
        return reference.multilabel_rows(logits, targets).loss
    targets = targets.long()  # before comparing: as uint8, 156 equals -100
    rows = row_losses(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index)
    return _mean_over_tokens(rows.view(targets.shape), targets != ignore_index)


def sample_signals(logits: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX) -> RowSignals:
    """Attack signals of each sample, each [B], without gradient; a sequence's are means over its unmasked tokens,
    and it counts as correct when every unmasked token is."""
    task = infer_task(logits, targets)
    if task == "classification":
        return row_signals(logits, targets, ignore_index=ignore_index)
    if task == "multilabel":
        with torch.no_grad():
            return reference.multilabel_rows(logits, targets)
    targets = targets.long()
    rows = row_signals(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index)
    kept = targets != ignore_index
    loss, lse, entropy, margin = (_mean_over_tokens(value.view(targets.shape), kept) for value in rows[:4])
    return RowSignals(loss, lse, entropy, margin, (rows.correct.view(targets.shape) | ~kept).all(1))
