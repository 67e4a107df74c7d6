"""Plots of the committed results, one a table, into docs/: python benchmarks/plot.py [RESULTS] [DOCS]

How many times faster than the baseline of its table, on a logarithmic axis: the dot is the ratio of the medians, its
line goes from the ratio at p80 to that at p20 of the provider's own times. Panels side by side are the ways the same
cases were run, all with one axis, and peak memory. What was skipped is left out.

unlearn_*.csv and paper_*.csv become time_to_forget_*.png: what `bench_unlearn` found at each look, over seconds.
quality_*.csv becomes comparison_*.png, one a case: forgetting against utility. course_*.csv becomes course_*.png and
losses_*.png, and gates.png needs none (`plot_course`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from plot_course import plot_course, plot_gates, plot_losses
from record import read_csv, read_head

from nabla_tau.suites.picture import draw as draw_points

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


LOOKED_AT = {  # the case of a look ends so: label of its axis, factor, the band that counts as retrained
    "AUC gap at": ("AUC, gap to retrained", 1, (-0.02, 0.02)),
    "test accuracy gap at": ("test accuracy,\ngap in points", 100, (-1, 100)),
}
Curve = list[tuple[float, float]]  # seconds and value of each look


def curves(rows: list[Row]) -> dict[str, dict[str, dict[str, Curve]]]:
    """Measure -> data and fraction -> provider -> looks, of the first seed of each; the look at 0 s has no place on a
    logarithmic axis."""
    found: dict[str, dict[str, dict[str, Curve]]] = {measure: {} for measure in LOOKED_AT}
    for row in rows:
        *what, seed, measure = row["case"].split(", ")
        if measure in found and seed == "seed 0":
            seconds = float(row["note"].removesuffix(" s"))
            if seconds:
                of_case = found[measure].setdefault(", ".join(what), {})
                of_case.setdefault(row["provider"], []).append((seconds, float(row["p50"])))
    return found


def plot_time_to_forget(path: Path, out: Path) -> None:
    """A column for each fraction, two lines of panels for each kind of data; dotted: retraining takes so long."""
    rows = read_csv(path)
    found = curves(rows)
    cases = list(found["AUC gap at"])
    data = sorted({case.rsplit(", ", 1)[0] for case in cases})
    columns = max(sum(case.startswith(name) for case in cases) for name in data)
    names = ["nabla_tau", "nabla_tau, ascent", "nabla_tau, paper", "as published", "retrain"]
    palette = dict(zip(names, [OURS, OTHERS[4], *OTHERS], strict=False))
    # Wide enough for the title and the legend above.
    width = max(3.4 * columns + 0.4, 9)
    size = {"figsize": (width, 2.1 * 2 * len(data) + 0.9), "layout": "constrained"}
    figure, grid = plt.subplots(2 * len(data), columns, squeeze=False, sharex="row", sharey="row", **size)
    for line, (name, measure) in enumerate((name, measure) for name in data for measure in LOOKED_AT):
        title, factor, band = LOOKED_AT[measure]
        for axes, case in zip(grid[line], (case for case in cases if case.startswith(name)), strict=True):
            draw_curves(axes, found[measure][case], palette, factor, band)
            if measure == "AUC gap at":
                axes.set_title(f"{case} forgotten", fontsize=10, loc="left")
        looked = [
            factor * value
            for case in cases
            if case.startswith(name)
            for curve in found[measure][case].values()
            for _, value in curve
        ]
        room = 0.08 * (max(looked) - min(looked))
        grid[line][0].set_ylim(min(looked) - room, max(looked) + room)  # that of the whole line of panels
        grid[line][0].set_ylabel(title, fontsize=9)
    figure.suptitle(
        "Time to forget: how close to a retrained model, after how long\n\n", x=0.01, ha="left", weight="bold"
    )
    lines = [plt.Line2D([], [], marker="o", ms=3.5, lw=1.6, color=colour) for colour in palette.values()]
    below = 0.01, 1 - 0.28 / figure.get_figheight()
    figure.legend(lines, palette, loc="upper left", bbox_to_anchor=below, ncols=6, frameon=False, fontsize=9)
    head, threads = read_head(path), rows[0]["threads"]
    clock = "processor seconds" if rows[0]["device"] == "cpu" else "seconds"
    figure.supxlabel(
        f"{clock}, logarithmic; grey: as good as retrained; dotted: retraining is done\n"
        f"{threads} thread, {head['device']}, torch {head['torch']}, Python {head['python']}, {head['date']}",
        fontsize=8,
        color="#4b5563",
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    plt.close(figure)
    print(out)


def draw_curves(
    axes: Axes, of_case: dict[str, Curve], palette: dict[str, str], factor: float, band: tuple[float, float]
) -> None:
    axes.axhspan(*band, color=RULE, zorder=0)
    axes.axhline(0, color="#6b7280", lw=0.8)
    axes.axvline(of_case["retrain"][-1][0], color=palette["retrain"], lw=1, ls=":")
    for name, colour in reversed(palette.items()):  # ours on top
        seconds, looked = zip(*of_case[name], strict=True)
        axes.plot(seconds, [factor * value for value in looked], "o-", ms=3.5, lw=1.6, color=colour)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def plot_comparisons(path: Path, docs: Path) -> None:
    """Nearest to retrained first, as in the CSV."""
    cases: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for row in read_csv(path):
        case, _, measure = row["case"].partition(": ")
        if measure in ("gap_auc_loss", "gap_test_accuracy"):
            mean = float(row["p50"])
            cases.setdefault(case, {}).setdefault(row["provider"], {})[measure] = mean, float(row["p80"]) - mean
    head = read_head(path)
    for case, found in cases.items():
        figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
        points = {name: (of["gap_auc_loss"], of["gap_test_accuracy"]) for name, of in found.items() if len(of) == 2}
        draw_points(axes, points, f"{case} forgotten")
        figure.supxlabel(f"{head['device']}, torch {head['torch']}, {head['date']}", fontsize=8, color="#4b5563")
        out = docs / f"comparison_{re.sub('[^a-z0-9]+', '_', case.lower()).strip('_')}.png"
        figure.savefig(out, dpi=120)
        plt.close(figure)
        print(out)


def main(arguments: list[str]) -> None:
    results = Path(arguments[0]) if arguments else ROOT / "benchmarks" / "results"
    docs = Path(arguments[1]) if len(arguments) > 1 else ROOT / "docs"
    for path in sorted(results.glob("*rows_*.csv")):
        plot(path, docs / f"{path.stem}.png")
    for path in sorted([*results.glob("unlearn_*.csv"), *results.glob("paper_*.csv")]):
        plot_time_to_forget(path, docs / f"time_to_forget_{path.stem.removeprefix('unlearn_')}.png")
    for path in sorted(results.glob("quality_*.csv")):
        plot_comparisons(path, docs)
    for path in sorted(results.glob("course_*.csv")):
        plot_course(path, docs / f"{path.stem}.png")
        plot_losses(path, docs / f"{path.stem.replace('course', 'losses')}.png")
    plot_gates(docs / "gates.png")


if __name__ == "__main__":
    main(sys.argv[1:])
