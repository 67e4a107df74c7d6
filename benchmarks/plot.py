"""Plots of the committed results, one a table, into docs/: python benchmarks/plot.py [RESULTS] [DOCS]

How many times faster than the baseline of its table, on a logarithmic axis: the dot is the ratio of the medians, its
line goes from the ratio at p80 to that at p20 of the provider's own times. Panels side by side are the ways the same
cases were run, all with one axis, and peak memory. What was skipped is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from record import read_csv, read_head

ROOT = Path(__file__).resolve().parents[1]
BASELINE = "eager"
TITLES = {
    "rows": "nabla-tau loss and gradient of a logits matrix, with and without attack signals",
    "linear_rows": "nabla-tau loss and gradients of a linear head, logits never stored",
}
OURS, OTHERS = "#c2410c", ["#2563eb", "#0f766e", "#7c3aed", "#64748b", "#a16207", "#be185d"]
RULE = "#e5e7eb"

Row = dict[str, str]
Points = dict[str, dict[str, tuple[float, ...]]]  # provider -> case -> ratio at p80, p50, p20
Panel = tuple[str, Points]


def points(rows: list[Row], field: str, ratio: Callable[[Row, Row], tuple[float, ...]]) -> Points:
    """Ratios of the rows that have `field`, each from the baseline's row of its case and its own."""
    base = {row["case"]: row for row in rows if row["provider"] == BASELINE}
    found: Points = {}
    for row in rows:
        if row[field] and row["provider"] != BASELINE:
            found.setdefault(row["provider"], {})[row["case"]] = ratio(base[row["case"]], row)
    return found


def of_times(base: Row, row: Row) -> tuple[float, ...]:
    return tuple(float(base["p50"]) / float(row[key]) for key in ("p80", "p50", "p20"))


def of_memory(base: Row, row: Row) -> tuple[float, ...]:
    return (float(base["peak_mb"]) / float(row["peak_mb"]),) * 3


def layout(rows: list[Row]) -> list[tuple[list[str], list[Panel]]]:
    """Lines of panels, each of the same cases and dtype; what is the same in all rows is not named."""
    named = [key for key in ("dtype", "setting") if len({row[key] for row in rows}) > 1]
    ways: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        ways.setdefault((row["dtype"], row["setting"]), []).append(row)
    lines: dict[tuple[str, ...], list[list[Row]]] = {}
    for (dtype, _), found in ways.items():
        lines.setdefault((dtype, *dict.fromkeys(row["case"] for row in found)), []).append(found)

    def title(what: str, row: Row, *keys: str) -> str:
        return ", ".join([what, *(row[key] for key in keys if key in named and row[key])])

    drawn = []
    for (_, *cases), groups in lines.items():
        panels = [(title("time", found[0], "dtype", "setting"), points(found, "p50", of_times)) for found in groups]
        # The way it was run does not change what it allocates.
        memory = title("peak memory", groups[0][0], "dtype"), points(groups[0], "peak_mb", of_memory)
        drawn.append((cases, [*panels, *([memory] if memory[1] else [])]))
    return drawn


def draw(axes: Axes, cases: list[str], panel: Panel, palette: dict[str, str]) -> None:
    """The first case on top; providers side by side within it."""
    axes.set_title(panel[0], fontsize=10, loc="left")
    for index, (name, colour) in enumerate(palette.items()):
        at = {case: row + 0.6 * ((index + 0.5) / len(palette) - 0.5) for row, case in enumerate(cases)}
        for case, (low, middle, high) in panel[1].get(name, {}).items():
            axes.plot([low, high], [at[case]] * 2, lw=1.6, color=colour, solid_capstyle="butt")
            axes.plot(middle, at[case], "o", ms=5, color=colour, label=name)
            if name == "nabla_tau":
                style = {"textcoords": "offset points", "va": "center", "fontsize": 8, "weight": "bold"}
                axes.annotate(f"{middle:.1f}x", (high, at[case]), (5, 0), **style)
    axes.set_xscale("log", base=2)
    axes.axvline(1, color="#111827", lw=1, zorder=1)
    axes.hlines([row + 0.5 for row in range(len(cases) - 1)], 0, 1, RULE, lw=0.8, transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(cases)), cases if axes.get_subplotspec().is_first_col() else [""] * len(cases))
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color=RULE, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def label(figure: Figure, row: Row, head: Row, palette: dict[str, str]) -> None:
    figure.suptitle(TITLES[row["bench"]] + "\n", x=0.01, ha="left", fontsize=12, weight="bold")
    dots = [plt.Line2D([], [], marker="o", ms=5, lw=1.6, color=colour) for colour in palette.values()]
    below_title = 0.01, 1 - 0.26 / figure.get_figheight()
    style = {"ncols": 6, "frameon": False, "fontsize": 9, "borderaxespad": 0.2, "borderpad": 0}
    figure.legend(dots, palette.keys(), loc="upper left", bbox_to_anchor=below_title, **style)
    threads = f"{row['threads']} thread{'s' * (row['threads'] != '1')}, " if row["device"] == "cpu" else ""
    figure.supxlabel(
        f"times faster, or smaller, than {BASELINE} PyTorch; dot: medians, line: p20 to p80\n"
        f"{threads}{head['device']}, torch {head['torch']}, Python {head['python']}, {head['date']}",
        fontsize=8,
        color="#4b5563",
    )


def plot(path: Path, out: Path) -> None:
    rows = [row for row in read_csv(path) if row["baseline"] == BASELINE]
    names = sorted({row["provider"] for row in rows if row["p50"]} - {BASELINE, "nabla_tau"})
    palette = {"nabla_tau": OURS} | dict(zip(names, OTHERS, strict=False))
    lines = layout(rows)
    edges = [1.0, 2.0]
    for _, panels in lines:
        edges += [edge for _, found in panels for of in found.values() for point in of.values() for edge in point]
    heights = [len(cases) + 1.5 for cases, _ in lines]
    size = 10, 1.2 + (0.16 + 0.08 * len(palette)) * sum(heights)
    figure = plt.figure(figsize=size, layout="constrained")
    subfigures = figure.subfigures(len(lines), 1, height_ratios=heights, squeeze=False)
    for (subfigure,), (cases, panels) in zip(subfigures, lines, strict=True):
        for axes, panel in zip(subfigure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw(axes, cases, panel, palette)
            axes.set_xlim(min(edges) / 1.15, max(edges) * 1.6)  # room for the last label
    label(figure, rows[0], read_head(path), palette)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)
    print(out)


def main(arguments: list[str]) -> None:
    results = Path(arguments[0]) if arguments else ROOT / "benchmarks" / "results"
    docs = Path(arguments[1]) if len(arguments) > 1 else ROOT / "docs"
    for path in sorted(results.glob("*rows_*.csv")):
        plot(path, docs / f"{path.stem}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
