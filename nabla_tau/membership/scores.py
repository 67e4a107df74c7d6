"""One number per sample: checked, made contiguous, and made finite where a statistic needs it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]


def as_scores(values: object, name: str) -> Array:
    """`values` as a contiguous 1-D float array (float32 stays float32, everything else becomes float64).

    Takes CPU tensors, arrays, memory maps and sequences. TypeError for bool, complex and object values, ValueError for
    another shape than [N] and for an empty array.
    """
    if isinstance(values, torch.Tensor):
        tensor = values.detach().cpu()
        values = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape [N], got {list(array.shape)}")
    if array.size == 0:
        raise ValueError(f"{name} is empty")
    return np.ascontiguousarray(array, dtype=np.float32 if array.dtype == np.float32 else np.float64)


def as_labels(labels: object, n: int) -> NDArray[np.bool_]:
    """Membership labels [n] as bool; integers are taken when they are 0 and 1."""
    array = np.asarray(labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else labels)
    if array.shape != (n,):
        raise ValueError(f"labels must have shape [{n}], like the scores, got {list(array.shape)}")
    if array.dtype.kind != "b":
        if array.dtype.kind not in "iu" or not np.isin(array, (0, 1)).all():
            raise TypeError(f"labels must be bool, or integers 0 and 1, got dtype {array.dtype}")
        array = array.astype(bool)
    return np.ascontiguousarray(array)


def rank_safe(scores: Array) -> Array:
    """Scores without NaN or infinity and with the same order; NaN ranks below everything (least like a member).

    A model that answers NaN gives an attacker no evidence of membership, and a rank statistic needs only the order.
    """
    largest = np.finfo(scores.dtype).max
    return np.nan_to_num(scores, nan=-largest, posinf=largest, neginf=-largest)


def clip_finite(members: Array, nonmembers: Array) -> tuple[Array, Array, int]:
    """Both arrays within the finite range of their union, and how many values had to be changed.

    +inf and NaN become the largest finite value, -inf the smallest. ValueError if no value is finite.
    """
    pooled = np.concatenate([members, nonmembers])
    finite = np.isfinite(pooled)
    n_changed = int(pooled.size - finite.sum())
    if n_changed == 0:
        return members, nonmembers, 0
    if n_changed == pooled.size:
        raise ValueError(f"none of the {pooled.size} values is finite")
    low, high = pooled[finite].min(), pooled[finite].max()
    members, nonmembers = (np.nan_to_num(a, nan=high, posinf=high, neginf=low) for a in (members, nonmembers))
    return members, nonmembers, n_changed
