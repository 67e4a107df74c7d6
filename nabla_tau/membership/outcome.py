"""What every result of a statistic can do: turn itself into plain numbers, and find axes to draw on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Outcome:
    """Base of the frozen dataclasses that statistics return."""

    # Properties that `to_dict` gives beside the fields.
    derived: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Its fields, and what follows from them, in plain JSON types; NaN and infinity are None."""
        names = [*(f.name for f in fields(self)), *self.derived]  # type: ignore[arg-type]
        return {name: plain(getattr(self, name)) for name in names}


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


def draw_estimates(
    ax: Axes, estimates: Mapping[str, tuple[float, tuple[float, float] | None]], *, reference: float | None = None
) -> Axes:
    """A line for each (value, interval or None), the first on top, and `reference` across; NaN is not drawn."""
    for y, (value, interval) in enumerate(estimates.values()):
        if interval is not None:
            ax.plot(interval, (y, y), color="C0")
        ax.plot(value, y, "o", color="C0")
    if reference is not None:
        ax.axvline(reference, color="grey", linestyle=":")
    ax.set_yticks(range(len(estimates)), list(estimates))
    ax.set_ylim(len(estimates) - 0.5, -0.5)
    return ax


def axes_or_new(ax: Axes | None) -> Axes:
    """`ax`, or the axes of a new figure. ImportError without matplotlib (`pip install nabla_tau[report]`)."""
    if ax is not None:
        return ax
    from matplotlib import pyplot

    new: Axes = pyplot.subplots()[1]
    return new
