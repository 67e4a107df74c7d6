"""Batches of any structure: tensors in nested tuples, lists and mappings; what a model is called with; mixing two.

A batch is what one's own training loop would use: `(x, y)`, `(x1, x2, y)`, or a mapping with a "labels" entry, as
Hugging Face models take it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Batch: TypeAlias = Any
Forward: TypeAlias = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]

LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def _is_structure(value: Any) -> bool:
    """Whether a value is to be looked into: a mapping, or a tuple or list in which there are tensors."""
    if isinstance(value, (tuple, list)):
        return any(isinstance(entry, Tensor) or _is_structure(entry) for entry in value)
    return isinstance(value, Mapping)


def map_leaves(function: Callable[..., Any], batch: Batch, *others: Batch) -> Batch:
    """Apply `function` to each leaf of `batch` (and what is at the same place in `others`); the structure stays.

    A leaf is a tensor or anything without tensors in it, such as a list of strings. Raises ValueError where the
    structures differ.
    """
    if isinstance(batch, Tensor):
        return function(batch, *others)
    if isinstance(batch, Mapping):
        if any(not isinstance(other, Mapping) or other.keys() != batch.keys() for other in others):
            raise ValueError("batches differ in their keys")
        return {key: map_leaves(function, value, *(other[key] for other in others)) for key, value in batch.items()}
    if _is_structure(batch):
        if any(not isinstance(other, (tuple, list)) or len(other) != len(batch) for other in others):
            raise ValueError("batches differ in their number of entries")
        mapped = [map_leaves(function, *column) for column in zip(*[batch, *others], strict=True)]
        return type(batch)(*mapped) if hasattr(batch, "_fields") else type(batch)(mapped)
    return function(batch, *others)


def map_tensors(function: Callable[[Tensor], Any], batch: Batch) -> Batch:
    """Apply `function` to each tensor of `batch`; everything else is passed through."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, batch)


def tensors_of(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(found.append, batch)
    return found


def to_device(batch: Batch, device: torch.device) -> Batch:
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def split_targets(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Positional inputs, keyword inputs and targets of a batch; ValueError if it has no targets to find."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    if isinstance(batch, Mapping):
        key = next((key for key in LABEL_KEYS if key in batch), None)
        if key is None:
            raise ValueError(f"a mapping batch needs one of the keys {', '.join(LABEL_KEYS)}, got {sorted(batch)}")
        args, kwargs, targets = (), {name: value for name, value in batch.items() if name != key}, batch[key]
    elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
        one_mapping = len(batch) == 2 and isinstance(batch[0], Mapping)
        args, kwargs = ((), dict(batch[0])) if one_mapping else (tuple(batch[:-1]), {})
        targets = batch[-1]
    else:
        raise ValueError(
            f"a batch must be (inputs, ..., targets) or a mapping with labels, got {type(batch).__name__}; "
            "for anything else pass forward=, a function (model, batch) -> (logits, targets)"
        )
    if not isinstance(targets, Tensor):
        raise TypeError(f"the targets of a batch must be a tensor, got {type(targets).__name__}")
    return args, kwargs, targets


def default_forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and targets of a batch: the model called on everything but the targets.

    The logits are the output itself, its `.logits` or "logits" entry, or the first entry of a tuple.
    """
    args, kwargs, targets = split_targets(batch)
    output = model(*args, **kwargs)
    if isinstance(output, Tensor):
        return output, targets
    if hasattr(output, "logits"):
        return output.logits, targets
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"], targets
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0], targets
    raise TypeError(
        f"cannot find logits in a model output of type {type(output).__name__}: return a tensor, an object with "
        ".logits, or pass forward=, a function (model, batch) -> (logits, targets)"
    )


def sample_count(batch: Batch) -> int:
    """Samples of a batch by its first tensor; 1 where that has no dimension."""
    first = batch[0] if isinstance(batch, tuple) and batch else None
    found = [first] if isinstance(first, Tensor) else tensors_of(batch)
    return len(found[0]) if found and found[0].ndim else 1


def rows_between(batch: Batch, rows: slice) -> Batch:
    """These samples of a batch; what is not a tensor or a list (None, a number, a string) goes with each.

    Raises ValueError for tensors and lists that do not have one entry a sample.
    """
    count = sample_count(batch)

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, (Tensor, tuple, list)) or (isinstance(leaf, Tensor) and leaf.ndim == 0):
            return leaf
        if len(leaf) != count:
            raise ValueError(
                "cannot take a part of this batch: every tensor and list must have one entry a sample, got lengths "
                f"{count} and {len(leaf)}"
            )
        return leaf[rows]

    return map_leaves(cut, batch)


def concatenate(forget: Batch, retain: Batch) -> Batch | None:
    """One batch with the forget samples first, or None where the two cannot be one batch.

    They can where both have the same structure, every tensor and list has one entry a sample, shapes agree beyond it,
    and what remains (None, a number, a string) is the same in both.
    """
    tensors = tensors_of(forget), tensors_of(retain)
    if any(not own or any(t.ndim == 0 or len(t) != len(own[0]) for t in own) for own in tensors):
        return None
    counts = len(tensors[0][0]), len(tensors[1][0])

    def join(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape[1:] == b.shape[1:] and a.dtype == b.dtype:
                return torch.cat((a, b))
        elif type(a) is type(b):
            if isinstance(a, (tuple, list)) and not _is_structure(b):
                if (len(a), len(b)) == counts:
                    return a + b
            elif a is b or (isinstance(a, (bool, int, float, str)) and a == b):
                return a
        raise ValueError("batches differ in an entry")

    try:
        return map_leaves(join, forget, retain)
    except ValueError:
        return None


@contextlib.contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's buffers and the random states are as they were: what is drawn inside is drawn again by
    what follows."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def uses_batch_statistics(model: nn.Module) -> str | None:
    """Name of a module that mixes the rows of a batch (BatchNorm in train mode or without running statistics)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            return name or type(module).__name__
    return None
