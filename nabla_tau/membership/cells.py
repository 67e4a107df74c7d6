"""Arrays over many models: checked and looked at where they lie, never copied or cast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

# Elements of a temporary float64 array: 2 MB, so that a dozen of them stay small beside any result.
_BLOCK = 1 << 18


def as_cells(values: object, name: str, dims: str | tuple[str, ...]) -> Array:
    """`values` as an array of float16, float32 or float64 with one of the forms `dims`, like "M, N": a view.

    Takes arrays, memory maps and CPU tensors, with any strides. TypeError for anything else, ValueError for another
    number of axes.
    """
    array = as_view(values, name)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise TypeError(f"{name} must be float16, float32 or float64, got {array.dtype}")
    forms = (dims,) if isinstance(dims, str) else dims
    if array.ndim not in {form.count(",") + 1 for form in forms}:
        raise ValueError(f"{name} must be {' or '.join(f'[{form}]' for form in forms)}, got {list(array.shape)}")
    return array


def as_group(values: object, models: int, samples: int) -> Array:
    """Which model was trained on which sample: bool [M, N], or uint8 as from numpy.packbits(group, axis=1); a view."""
    group = as_view(values, "group")
    if group.dtype not in (np.bool_, np.uint8):
        raise TypeError(f"group must be bool, or uint8 from numpy.packbits(group, axis=1), got {group.dtype}")
    width = samples if group.dtype == np.bool_ else -(-samples // 8)
    if group.shape != (models, width):
        raise ValueError(f"group must be [{models}, {width}], one row a model, got {list(group.shape)}")
    return group


def as_view(values: object, name: str) -> Array:
    if isinstance(values, torch.Tensor):
        if values.device.type != "cpu":
            raise TypeError(f"{name} must be on the CPU, got a tensor on {values.device}")
        if values.dtype == torch.bfloat16:
            raise TypeError(f"{name} is bfloat16, which numpy does not know: pass .float() or .half()")
        view: Array = values.detach().numpy()
        return view
    if not isinstance(values, np.ndarray):
        raise TypeError(f"{name} must be an array or a CPU tensor, got {type(values).__name__}")
    return values


def blocks(samples: int, width: int = 1) -> Iterator[slice]:
    """Slices of the samples, each of so many that `width` numbers a sample make a small array."""
    step = max(1, _BLOCK // width)
    for start in range(0, samples, step):
        yield slice(start, min(samples, start + step))


def threads() -> int:
    """Threads that the C++ core may use: as many as PyTorch."""
    return torch.get_num_threads()
