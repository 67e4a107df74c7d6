"""Row and sample losses as differentiable functions, and all validation of their arguments.

`row_losses` is the one op the engine trains with. Its backward takes one weight a row, so every objective that is a
function of the per-row losses costs one weighted backward (`objective.py`, `row_objectives.py`). Which kernel serves
which tensor is decided in `_library.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nabla_tau import _library
from nabla_tau.arguments import check_kind, share, whole
from nabla_tau.kernels.reference import IGNORE_INDEX, RowSignals, compute_dtype

Task: TypeAlias = Literal["classification", "sequence", "multilabel"]


def refuse_double_backward() -> None:
    """For a backward that is not itself differentiable. PyTorch's `once_differentiable` lets a graph of it be made, in
    which the second derivative is silently missing."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the losses of nabla_tau cannot be differentiated twice: call backward or autograd.grad without "
            "create_graph=True, or write the loss in plain PyTorch (nabla_tau.kernels.reference)"
        )


class _Rows(torch.autograd.Function):
    """The loss of each row of some signals, [N], as a function of the logits: the row-weighted gradient comes from the
    saved normalisers. One output, since each costs as much as a small kernel."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, signals: RowSignals, options: _library.RowOptions) -> Tensor:
        ctx.save_for_backward(logits, targets, signals.lse, signals.margin, options.class_weights)
        ctx.options = options
        return signals.loss

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        logits, targets, lse, margin, class_weights = ctx.saved_tensors
        options = ctx.options.ignore_index, ctx.options.label_smoothing, class_weights
        return _library.rows_backward(logits, targets, lse, margin, weights, *options), None, None, None


class _MultilabelRows(torch.autograd.Function):
    """As `_Rows`, for the mean binary cross-entropy over the labels of a row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, signals: RowSignals) -> Tensor:
        ctx.save_for_backward(logits, targets)
        return signals.loss

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, None, None]:
        refuse_double_backward()
        logits, targets = ctx.saved_tensors
        return _library.multilabel_backward(logits, targets, weights), None, None


def _rows(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, class_weights: Tensor | None
) -> RowSignals:
    options = _library.RowOptions(ignore_index, label_smoothing, class_weights)
    if torch.compiler.is_compiling():
        return RowSignals(*_library.rows_forward_op(logits, targets, *options))
    with torch.no_grad(), explained(targets, logits.shape[1], ignore_index):
        signals = _library.rows_forward(logits, targets, *options)
    if not wants_gradient(logits):
        return signals
    loss = _Rows.apply(logits, targets, signals, options)  # type: ignore[no-untyped-call]
    return signals._replace(loss=loss)


def _multilabel_rows(logits: Tensor, targets: Tensor) -> RowSignals:
    if torch.compiler.is_compiling():
        return RowSignals(*_library.multilabel_forward_op(logits, targets))
    with torch.no_grad():
        signals = _library.multilabel_forward(logits, targets)
    if not wants_gradient(logits):
        return signals
    return signals._replace(loss=_MultilabelRows.apply(logits, targets, signals))  # type: ignore[no-untyped-call]


def wants_gradient(logits: Tensor) -> bool:
    """Whether an autograd function is to be called: also for forward-mode derivatives, which it refuses."""
    return (logits.requires_grad and torch.is_grad_enabled()) or getattr(forward_ad, "_current_level", -1) >= 0


@contextlib.contextmanager
def explained(targets: Tensor, classes: int, ignore_index: int) -> Iterator[None]:
    """Around a kernel that looks at the labels itself: what it refuses is said in the words of `check_labels`."""
    try:
        yield
    except ValueError:
        check_labels(targets, classes, ignore_index)
        raise


def checked_options(logits: Tensor, label_smoothing: float, class_weights: Tensor | None) -> Tensor | None:
    """class_weights as the kernels take them; ValueError for a smoothing outside [0, 1] or weights that do not fit."""
    share(label_smoothing, "label_smoothing")
    if class_weights is None:
        return None
    check_kind(class_weights, Tensor, "class_weights")
    if class_weights.shape != logits.shape[-1:] or not class_weights.is_floating_point():
        raise ValueError(
            f"class_weights must be floating [{logits.shape[-1]}], one a class, "
            f"got {class_weights.dtype} of shape {tuple(class_weights.shape)}"
        )
    if class_weights.requires_grad:
        raise ValueError("class_weights must not require a gradient")
    return class_weights.to(device=logits.device, dtype=compute_dtype(logits))


def check_rows(logits: Tensor, targets: Tensor, ignore_index: int) -> None:
    """Raise TypeError or ValueError unless logits [N, V] are floating and targets [N] are labels of them.

    The values of the targets are looked at only on the CPU, where C++ kernels serve by these: on a GPU that would make
    the host wait in every step (`unlearn` looks at them once, before the first step).
    """
    check_kind(logits, Tensor, "logits")
    check_kind(targets, Tensor, "targets")
    whole(ignore_index, "ignore_index", least=None)
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype} of shape {tuple(logits.shape)}")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integer class labels, got {targets.dtype} of shape {tuple(targets.shape)}")
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be [rows, classes] and targets [rows], got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    looked_at = targets.device.type == "cpu" and not torch.compiler.is_compiling() and targets.numel() > 0
    if looked_at and _library.row_provider(logits) != "cpp":
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


def row_losses(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each row, [N]; differentiable once in the logits.

    logits [N, V] float32, float64, bfloat16 or float16; targets [N] integer labels; label_smoothing in [0, 1] and
    class_weights [V] as in torch.nn.functional.cross_entropy with reduction="none". The result is float32 (float64
    for float64 logits) and 0 where the target is `ignore_index`. Raises TypeError and ValueError (`check_rows`,
    `checked_options`).
    """
    check_rows(logits, targets, ignore_index)
    class_weights = checked_options(logits, label_smoothing, class_weights)
    return _rows(logits, targets.long(), ignore_index, label_smoothing, class_weights).loss


def row_signals(logits: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX) -> RowSignals:
    """Loss and attack signals of each row (`RowSignals`), without gradient."""
    check_rows(logits, targets, ignore_index)
    with torch.no_grad():
        return _rows(logits, targets.long(), ignore_index, 0.0, None)


def infer_task(logits: Tensor, targets: Tensor) -> Task:
    """What the shapes and dtypes say the task is.

    logits [B, C] with integer targets [B]: classification. logits [B, T, V] with integer targets [B, T]: sequence.
    logits [B, C] with floating or bool targets [B, C]: multilabel. Anything else raises ValueError.
    """
    check_kind(logits, Tensor, "logits")
    check_kind(targets, Tensor, "targets")
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


def has_loss(targets: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Which samples count, [B] bool: not those of which every target is `ignore_index`; their loss is 0 by convention
    and says nothing."""
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.ndim > 2:
        return torch.ones(targets.shape[:1], dtype=torch.bool, device=targets.device)
    kept = targets.long() != ignore_index
    return kept if kept.ndim == 1 else kept.any(1)


def samples_of_rows(rows: RowSignals, kept: Tensor) -> RowSignals:
    """Signals of sequences, each [B], from those of their tokens [B * T] and the mask of the tokens that count [B, T].

    Means over a sample's tokens; grad_sq is the squared norm of the gradient of that mean loss, and a sample counts as
    correct when every token is.
    """
    count = kept.sum(1).clamp(min=1)
    means = (torch.where(kept, value.view(kept.shape), 0.0).sum(1) / count for value in rows[:6])
    loss, lse, entropy, margin, p_max, grad_sq = means
    correct = (rows.correct.view(kept.shape) | ~kept).all(1)
    return RowSignals(loss, lse, entropy, margin, p_max, grad_sq / count, correct)


def sample_losses(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Loss of each sample, [B]: what is forgotten or kept is a sample, whatever it is made of.

    Classification: cross-entropy. Sequence: mean cross-entropy over the tokens whose target is not `ignore_index`
    (0 for a sample that has none). Multi-label: mean binary cross-entropy over the labels, from logits. Shapes as in
    `infer_task`; for a causal language model the caller shifts the targets, so that targets[:, t] is what
    logits[:, t] predicts. label_smoothing and class_weights [V]: as in `row_losses`, not for multi-label targets.
    """
    return differentiable_signals(
        logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, class_weights=class_weights
    ).loss


def sample_signals(logits: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX) -> RowSignals:
    """Attack signals of each sample, each [B], without gradient; of a sequence as in `samples_of_rows`."""
    with torch.no_grad():
        return differentiable_signals(logits, targets, ignore_index=ignore_index)


def differentiable_signals(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> RowSignals:
    """`sample_losses`, which carries the gradient, and the other signals of each sample from the same read."""
    task = infer_task(logits, targets)
    class_weights = checked_options(logits, label_smoothing, class_weights)
    if task == "multilabel":
        if label_smoothing or class_weights is not None:
            raise ValueError("label_smoothing and class_weights are for class labels, not for multi-label targets")
        if targets.device.type == "cpu" and not torch.compiler.is_compiling():
            check_multilabel(targets)
        return _multilabel_rows(logits, targets)
    targets = targets.long()  # before comparing: as uint8, 156 equals -100
    if task == "classification":
        check_rows(logits, targets, ignore_index)
        return _rows(logits, targets, ignore_index, label_smoothing, class_weights)
    logits, labels = logits.flatten(0, 1), targets.flatten()
    check_rows(logits, labels, ignore_index)
    rows = _rows(logits, labels, ignore_index, label_smoothing, class_weights)
    return samples_of_rows(rows, targets != ignore_index)
