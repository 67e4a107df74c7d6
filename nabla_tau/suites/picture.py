"""Forgetting against utility: where each method ends, seen from the retrained model."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

OURS, OTHERS, REFERENCE, RULE = "#c2410c", "#2866b1", "#1d2126", "#9aa2ab"
Spread = tuple[float, float]  # mean and standard deviation


def draw(ax: Axes, points: Mapping[str, tuple[Spread, Spread]], title: str) -> Axes:
    """points: method -> gap of the attack's AUC, gap of the test accuracy as a share; numbered in their order, and
    named beside the axes."""
    for number, (name, (x, y)) in enumerate(points.items(), 1):
        reference = name in ("original", "retrained again")
        colour = OURS if name.startswith(("default", "nabla-tau")) else REFERENCE if reference else OTHERS
        at, mark = (x[0], 100 * y[0]), "s" if reference else "o"
        ax.errorbar(*at, xerr=x[1], yerr=100 * y[1], fmt=mark, color=colour, ms=4, lw=0.8, alpha=0.85)
        ax.annotate(str(number), at, xytext=(4, 3), textcoords="offset points", fontsize=7.5, color=colour)
        place = 1.02, 1 - (number - 0.5) / max(len(points), 24)
        ax.text(
            *place,
            f"{number}  {_fitting(name, 32)}",
            transform=ax.transAxes,
            fontsize=7.5,
            color=colour,
            va="center",
            parse_math=False,
        )
    ax.axvline(0, color=RULE, lw=0.8, zorder=0)
    ax.axhline(0, color=RULE, lw=0.8, zorder=0)
    # Near retrained linear, beyond it logarithmic: a model that collapsed must not hide how the others differ.
    ax.set_xscale("symlog", linthresh=0.05)
    ax.set_yscale("symlog", linthresh=2)
    for axis, ticks, least in ((ax.xaxis, (0.02, 0.05, 0.1, 0.3), 0.06), (ax.yaxis, (1, 2, 5, 10, 20, 50), 2.2)):
        low, high = axis.get_view_interval()
        low, high = min(-least, 1.3 * low), max(least, 1.3 * high)
        axis.set_ticks([tick for t in (0, *ticks) for tick in (-t, t) if low <= tick <= high])
        axis.set_view_interval(low, high, ignore=True)
        axis.set_major_formatter("{x:g}")
    ax.set_xlabel("attack AUC minus that of retrained (right: still remembered)")
    ax.set_ylabel("test accuracy minus that of retrained, points")
    ax.set_title(_fitting(title, 80), fontsize=10, parse_math=False)
    return ax


def _fitting(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
