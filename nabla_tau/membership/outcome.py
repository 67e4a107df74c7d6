"""What every result of a statistic can do: turn itself into plain numbers, and find axes to draw on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Outcome:
    """Base of the frozen dataclasses that statistics return."""

    def to_dict(self) -> dict[str, Any]:
        """Its fields in plain JSON types; NaN and infinity are None."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]


def plain(value: Any) -> Any:
    """A copy in plain JSON types: arrays and tuples become lists, keys strings, NaN and infinity None."""
    if isinstance(value, Outcome):
        return value.to_dict()
    if isinstance(value, (np.generic, np.ndarray)):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def axes_or_new(ax: Axes | None) -> Axes:
    """`ax`, or the axes of a new figure. ImportError without matplotlib (`pip install nabla_tau[report]`)."""
    if ax is not None:
        return ax
    from matplotlib import pyplot

    new: Axes = pyplot.subplots()[1]
    return new
