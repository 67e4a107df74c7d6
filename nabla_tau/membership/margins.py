"""The logit margin of a prediction, the signal that likelihood-ratio attacks are made of."""

from __future__ import annotations

import numpy as np

from nabla_tau import _C
from nabla_tau.membership.cells import Array, as_cells, as_view, threads

# Logits converted at a time.
_CHUNK = 1 << 20


def logit_margin(logits: object, labels: object) -> Array:
    """phi = z_y - log sum_{j != y} exp z_j, which is log p_y / (1 - p_y): how sure a model is of the label.

    logits [..., C] float16, float32 or float64, any strides; labels [...] integer in [0, C), or a shape that broadcasts
    to it, as for the models of [M, N, C]. Returns [...] float32 (float64 for float64 logits), oriented so that higher
    means more likely a member. Near-Gaussian over models, which probabilities are not (Carlini et al. 2022); and from
    stored probabilities most margins of a sure model would be infinite, so rows that look like probabilities raise.
    NaN for a row with a NaN. TypeError for another dtype, ValueError for another shape or a label out of range.
    """
    z = as_view(logits, "logits")
    z = as_cells(z, "logits", ", ".join(["..."] * (z.ndim - 1) + ["C"]))
    if z.ndim == 0 or z.shape[-1] < 2:
        raise ValueError(f"logits must be [..., C] with at least two classes, got {list(z.shape)}")
    y = as_view(labels, "labels")
    if y.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got {y.dtype}")
    try:
        y = np.broadcast_to(y, z.shape[:-1])
    except ValueError:
        expected, got = list(z.shape[:-1]), list(y.shape)
        raise ValueError(f"labels must have shape {expected}, like the logits, got {got}") from None
    margin = np.empty(z.shape[:-1], np.float64 if z.dtype == np.float64 else np.float32)
    _fill(z, y, margin)
    return margin


def _fill(z: Array, y: Array, margin: Array) -> None:
    """Margins of z [..., C] into `margin` [...], a chunk of rows at a time."""
    rows = max(1, _CHUNK // z.shape[-1])
    if margin.ndim > 1:
        for index in range(len(margin)):
            _fill(z[index], y[index], margin[index])
        return
    for start in range(0, margin.size, rows):
        part = np.s_[start : start + rows] if margin.ndim else np.s_[None]
        chunk = np.ascontiguousarray(z[part], dtype=margin.dtype)
        if start == 0 and _are_probabilities(chunk[:64]):
            raise ValueError("logits hold probabilities; pass logits: a margin of stored probabilities is mostly inf")
        targets = np.ascontiguousarray(y[part], dtype=np.int64)
        # A label that means "ignore" to the row kernel is out of range here.
        margin[part] = _C.rows_forward(chunk, targets, ignore_index=np.iinfo(np.int64).min, num_threads=threads())[3]


def _are_probabilities(rows: Array) -> bool:
    return bool((rows >= 0).all() and np.allclose(rows.sum(1, dtype=np.float64), 1, atol=1e-3))
