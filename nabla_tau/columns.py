"""Tensors and lists with one entry a sample, in any structure, and rows of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nabla_tau.batch import Batch, map_leaves, tensors_of


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
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
        return torch.as_tensor(leaf)
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
            return leaf[index.to(leaf.device)]
        return leaf[index.cpu().numpy()].tolist() if isinstance(leaf, np.ndarray) else leaf

    return map_leaves(take, columns)
