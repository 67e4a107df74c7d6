"""Tensors and lists with one entry a sample, in any structure, and rows of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from nabla_tau.batch import Batch, map_leaves, tensors_of


def _as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """A tensor on the memory of an array: of one that is mapped from a file nothing is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a read-only array: nothing here writes
        return torch.as_tensor(array)


def _is_numeric(leaf: Any) -> TypeGuard[np.ndarray[Any, Any]]:
    return isinstance(leaf, np.ndarray) and leaf.ndim > 0 and leaf.dtype.kind in "biufc"


def with_tensors(data: Any) -> Any:
    """A tuple or mapping without tensors, with its arrays of numbers as such; anything else as it is."""
    return data if tensors_of(data) else _with_tensors(data)


def _with_tensors(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _with_tensors(value) for key, value in data.items()}
    if isinstance(data, tuple):
        entries = [_with_tensors(value) for value in data]
        return type(data)(*entries) if hasattr(data, "_fields") else tuple(entries)
    return _as_tensor(data) if _is_numeric(data) else data


def is_mapped(data: Any) -> bool:
    """Whether some of it lies in a file that NumPy maps (np.memmap)."""
    if isinstance(data, Mapping):
        return any(map(is_mapped, data.values()))
    if isinstance(data, tuple):
        return any(map(is_mapped, data))
    return isinstance(data, np.memmap)


def are_columns(data: Any) -> bool:
    """Whether a list of tensors is (x, y) rather than samples: as many rows each, and two of them or of two kinds."""
    if not isinstance(data, list) or len(data) < 2 or not all(isinstance(t, Tensor) and t.ndim for t in data):
        return False
    kinds = {(t.shape, t.dtype) for t in data}
    return len({len(t) for t in data}) == 1 and (len(data) == 2 or len(kinds) > 1)


def _column(leaf: Any, count: int, name: str, key: str) -> Any:
    """A leaf of a tensor source as it is indexed: a tensor, an object array, or a constant of all samples."""
    if leaf is None or isinstance(leaf, (Tensor, bool, int, float, str)):
        return leaf
    if not isinstance(leaf, (list, tuple, np.ndarray)) or (isinstance(leaf, np.ndarray) and leaf.ndim == 0):
        raise TypeError(
            f"{name}[{key}] must be a tensor, or a list or array of {count} entries, got {type(leaf).__name__}"
        )
    if len(leaf) != count:
        raise TypeError(f"{name}[{key}] must have one entry for each of the {count} samples, got {len(leaf)}")
    if _is_numeric(leaf):
        return _as_tensor(leaf)
    if isinstance(leaf, (list, tuple)) and all(isinstance(entry, (bool, int, float)) for entry in leaf):
        return torch.tensor(leaf)
    return np.fromiter(leaf, dtype=object, count=count)


def columns_of(data: Any, count: int, name: str, key: str = "") -> Any:
    """Tensors, object arrays and constants in the structure of `data`."""
    if isinstance(data, Mapping):
        return {k: columns_of(value, count, name, f"{key}.{k}" if key else str(k)) for k, value in data.items()}
    if isinstance(data, (tuple, list)) and tensors_of(data):
        entries = [columns_of(value, count, name, f"{key}.{i}" if key else str(i)) for i, value in enumerate(data)]
        return type(data)(*entries) if hasattr(data, "_fields") else type(data)(entries)
    return _column(data, count, name, key)


def rows_of(columns: Batch, index: Tensor) -> Batch:
    def take(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            own = index.to(leaf.device)
            # Up to five times as fast, but it lays out anew what is not contiguous, such as images in channels_last.
            return leaf.index_select(0, own) if leaf.is_contiguous() else leaf[own]
        return leaf[index.cpu().numpy()].tolist() if isinstance(leaf, np.ndarray) else leaf

    return map_leaves(take, columns)
