"""The row ops on tensors: which implementation serves which tensor, and the operators that torch.compile sees.

C++ serves CPU tensors, Triton CUDA tensors, `kernels/reference.py` everything else. Called directly in eager mode: a
`torch.library` operator costs several times the call of an `autograd.Function` there, so those are used only while
compiling. Nothing here validates; that is `functional.py`.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from nabla_tau import _C
from nabla_tau.kernels import reference
from nabla_tau.kernels.reference import IGNORE_INDEX, RowSignals, compute_dtype

Provider: TypeAlias = Literal["cpp", "triton", "reference"]
CPP_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def row_provider(logits: Tensor) -> Provider:
    """Name of the implementation that serves the rows of this tensor."""
    if logits.device.type == "cpu" and logits.dtype in CPP_DTYPES:
        return "cpp"
    if logits.device.type == "cuda" and has_triton():
        return "triton"
    return "reference"


class RowOptions(NamedTuple):
    """What F.cross_entropy takes beside logits and targets; class_weights [V] in the computing dtype."""

    ignore_index: int = IGNORE_INDEX
    label_smoothing: float = 0.0
    class_weights: Tensor | None = None


class MixedRows(NamedTuple):
    """A mixed batch beside its logits: targets [N] int64, forget [N] bool.

    Where rows are tokens, base [N], in the computing dtype, is the weight of a row in its sample's loss, and the
    counts, 0-d, are the numbers of samples that have a loss.
    """

    targets: Tensor
    forget: Tensor
    tau: Tensor | float
    alpha: Tensor | float
    gate: Literal["batch", "two_sided", "sample"]
    power: int
    options: RowOptions
    base: Tensor | None = None
    forget_count: Tensor | None = None
    retain_count: Tensor | None = None


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _triton() -> ModuleType:
    return importlib.import_module("nabla_tau.kernels.rows")


@functools.cache
def _triton_multilabel() -> ModuleType:
    return importlib.import_module("nabla_tau.kernels.multilabel")


@functools.cache
def _triton_gram() -> ModuleType:
    return importlib.import_module("nabla_tau.kernels.gram")


def gram_norms(inputs: Tensor, gradients: Tensor) -> Tensor:
    """`reference.gram_norms` by the fastest implementation: Triton does not store the Grams, PyTorch does."""
    narrow = inputs.dtype == gradients.dtype and inputs.dtype in (torch.float32, torch.bfloat16, torch.float16)
    triton = narrow and row_provider(inputs) == "triton"
    norms: Tensor = (_triton_gram() if triton else reference).gram_norms(inputs, gradients)
    return norms


def _as_numpy(tensor: Tensor) -> Any:
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _optional_numpy(tensor: Tensor | None) -> Any:
    return None if tensor is None else _as_numpy(tensor)


def _as_gradient(array: Any, logits: Tensor) -> Tensor:
    gradient = torch.from_numpy(array)
    return gradient.view(torch.bfloat16) if logits.dtype == torch.bfloat16 else gradient


def _as_signals(arrays: Any) -> RowSignals:
    return RowSignals(*map(torch.from_numpy, arrays))


def rows_forward(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> RowSignals:
    """`reference.rows` by the fastest implementation. logits [N, V], targets [N] int64, class_weights [V] in the
    computing dtype."""
    provider = row_provider(logits)
    if provider == "cpp":
        options = ignore_index, torch.get_num_threads(), label_smoothing, _optional_numpy(class_weights)
        return _as_signals(_C.rows_forward(_as_numpy(logits), _as_numpy(targets), *options))
    op = _triton().rows_forward if provider == "triton" else reference.rows
    signals: RowSignals = op(
        logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, class_weights=class_weights
    )
    return signals


def rows_backward(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    margin: Tensor,
    weights: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """`reference.rows_grad`, from the lse and margin [N] that `rows_forward` returned; weights [N]."""
    provider = row_provider(logits)
    if provider == "cpp":
        found = _C.rows_backward(
            _as_numpy(logits),
            _as_numpy(targets),
            _as_numpy(lse),
            _as_numpy(margin),
            _as_numpy(weights),
            ignore_index,
            torch.get_num_threads(),
            label_smoothing,
            _optional_numpy(class_weights),
        )
        return _as_gradient(found, logits)
    if provider == "triton":
        gradient: Tensor = _triton().rows_backward(
            logits,
            targets,
            lse,
            margin,
            weights,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
        )
        return gradient
    return reference.rows_grad(
        logits,
        targets,
        weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
    )


def rows_gradient(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[RowSignals, Tensor]:
    """Signals and row-weighted gradient in one read of the logits, for weights [N] known beforehand (None: 1).

    out: contiguous [N, V] of the logits' dtype that receives the gradient; it may be the logits.
    """
    provider = row_provider(logits)
    if provider == "cpp":
        *signals, gradient = _C.rows_gradient(
            _as_numpy(logits),
            _as_numpy(targets),
            _optional_numpy(weights),
            ignore_index,
            torch.get_num_threads(),
            label_smoothing,
            _optional_numpy(class_weights),
            _optional_numpy(out),
        )
        return _as_signals(signals), _as_gradient(gradient, logits) if out is None else out
    if provider == "triton":
        found: tuple[RowSignals, Tensor] = _triton().rows_gradient(
            logits,
            targets,
            weights,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            out=out,
        )
        return found
    row_signals = rows_forward(logits, targets, ignore_index, label_smoothing, class_weights)
    weights = torch.ones_like(row_signals.loss) if weights is None else weights
    gradient = rows_backward(
        logits,
        targets,
        row_signals.lse,
        row_signals.margin,
        weights,
        ignore_index,
        label_smoothing,
        class_weights,
    )
    return row_signals, gradient if out is None else out.copy_(gradient)


def rows_mean(
    logits: Tensor,
    targets: Tensor,
    weight: float = 1.0,
    base: Tensor | None = None,
    samples: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor]:
    """weight / samples * sum_i base_i loss_i, 0-d, and its gradient [N, V], in one read of the logits.

    base [N] in the computing dtype, the weight of a row in its sample's loss, None where each row is a sample; samples
    0-d, None for the rows that are not ignored, which base does without.
    """
    if row_provider(logits) == "cpp":
        mean, gradient = _C.rows_mean(
            _as_numpy(logits),
            _as_numpy(targets),
            weight,
            _optional_numpy(base),
            None if samples is None else float(samples),
            ignore_index,
            torch.get_num_threads(),
        )
        return torch.from_numpy(mean), _as_gradient(gradient, logits)
    kept = targets != ignore_index
    count = (kept.sum() if samples is None else samples).clamp(min=1)
    weights = (kept if base is None else base) * (weight / count.to(compute_dtype(logits)))
    signals, gradient = rows_gradient(logits, targets, weights, ignore_index)
    return (signals.loss * weights).sum(), gradient


def nabla_tau_rows(
    logits: Tensor, batch: MixedRows, *, with_gradient: bool
) -> tuple[Tensor, Tensor, RowSignals, Tensor | None]:
    """The five `objective.Terms` [5], the row weights [N], the signals [N] and, where the weights are known in the same
    pass (C++), the gradient. CPU tensors with a C++ kernel or CUDA tensors with Triton."""
    if row_provider(logits) == "cpp":
        terms, weights, signals, gradient = _C.nabla_tau_rows(
            _as_numpy(logits),
            _as_numpy(batch.targets),
            _as_numpy(batch.forget),
            float(batch.tau),
            float(batch.alpha),
            batch.gate,
            batch.power,
            _optional_numpy(batch.base),
            0.0 if batch.forget_count is None else float(batch.forget_count),
            0.0 if batch.retain_count is None else float(batch.retain_count),
            batch.options.ignore_index,
            torch.get_num_threads(),
            batch.options.label_smoothing,
            _optional_numpy(batch.options.class_weights),
            with_gradient,
        )
        found = None if gradient is None else _as_gradient(gradient, logits)
        return torch.from_numpy(terms), torch.from_numpy(weights), _as_signals(signals), found
    # A number is filled in on the device: copying it there would make the host wait.
    like = logits.new_empty((), dtype=compute_dtype(logits))
    tau, alpha = (
        value.to(like) if isinstance(value, Tensor) else like.new_full((), value) for value in (batch.tau, batch.alpha)
    )
    terms, weights, signals = _triton().nabla_tau_rows(
        logits,
        batch.targets,
        batch.forget,
        tau,
        alpha,
        gate=batch.gate,
        power=batch.power,
        base=batch.base,
        forget_count=batch.forget_count,
        retain_count=batch.retain_count,
        ignore_index=batch.options.ignore_index,
        label_smoothing=batch.options.label_smoothing,
        class_weights=batch.options.class_weights,
    )
    return terms, weights, signals, None


def multilabel_forward(logits: Tensor, targets: Tensor) -> RowSignals:
    """`reference.multilabel_rows`. logits and targets [N, C]."""
    provider, targets = row_provider(logits), targets.to(compute_dtype(logits))
    if provider == "cpp":
        return _as_signals(_C.multilabel_forward(_as_numpy(logits), _as_numpy(targets), torch.get_num_threads()))
    if provider == "triton":
        signals: RowSignals = _triton_multilabel().multilabel_forward(logits, targets)
        return signals
    return reference.multilabel_rows(logits, targets)


def multilabel_backward(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """`reference.multilabel_rows_grad`. weights [N]."""
    provider, targets = row_provider(logits), targets.to(compute_dtype(logits))
    if provider == "cpp":
        arrays = _as_numpy(logits), _as_numpy(targets), _as_numpy(weights)
        return _as_gradient(_C.multilabel_backward(*arrays, torch.get_num_threads()), logits)
    if provider == "triton":
        gradient: Tensor = _triton_multilabel().multilabel_backward(logits, targets, weights)
        return gradient
    return reference.multilabel_rows_grad(logits, targets, weights)


# What torch.compile sees. Tuples, since an operator cannot return a NamedTuple.
_Signals: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("nabla_tau::rows_forward", mutates_args=())
def rows_forward_op(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, class_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return rows_forward(logits, targets, ignore_index, label_smoothing, class_weights)[:]


@torch.library.custom_op("nabla_tau::rows_backward", mutates_args=())
def rows_backward_op(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    margin: Tensor,
    weights: Tensor,
    ignore_index: int,
    label_smoothing: float,
    class_weights: Tensor | None,
) -> Tensor:
    return rows_backward(logits, targets, lse, margin, weights, ignore_index, label_smoothing, class_weights)


@torch.library.custom_op("nabla_tau::multilabel_forward", mutates_args=())
def multilabel_forward_op(
    logits: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return multilabel_forward(logits, targets)[:]


@torch.library.custom_op("nabla_tau::multilabel_backward", mutates_args=())
def multilabel_backward_op(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return multilabel_backward(logits, targets, weights)


def _fake_signals(logits: Tensor, *_: Any) -> _Signals:
    def row(dtype: torch.dtype) -> Tensor:
        return logits.new_empty(logits.shape[:1], dtype=dtype)

    loss, lse, entropy, margin, p_max, grad_sq = (row(compute_dtype(logits)) for _ in range(6))
    return loss, lse, entropy, margin, p_max, grad_sq, row(torch.bool)


def _fake_gradient(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: _Signals) -> None:
    logits, targets, ignore_index, label_smoothing, class_weights = inputs
    _, lse, _, margin, *_ = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, targets, lse, margin, class_weights)
    ctx.options = ignore_index, label_smoothing


def _rows_gradients(ctx: Any, weights: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logits, targets, lse, margin, class_weights = ctx.saved_tensors
    gradient = rows_backward_op(logits, targets, lse, margin, weights, *ctx.options, class_weights)
    return gradient, None, None, None, None


def _save_multilabel(ctx: Any, inputs: tuple[Any, ...], output: _Signals) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs)


def _multilabel_gradients(ctx: Any, weights: Tensor, *_: Any) -> tuple[Tensor, None]:
    return multilabel_backward_op(*ctx.saved_tensors, weights), None


for _op in (rows_forward_op, multilabel_forward_op):
    _op.register_fake(_fake_signals)
for _op in (rows_backward_op, multilabel_backward_op):
    _op.register_fake(_fake_gradient)
rows_forward_op.register_autograd(_rows_gradients, setup_context=_save_rows)
multilabel_forward_op.register_autograd(_multilabel_gradients, setup_context=_save_multilabel)
