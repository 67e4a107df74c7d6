"""The result of a comparison: a row a method and seed, their means, and what to look at."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nabla_tau.checkpoint import write_atomic
from nabla_tau.membership.audit_report import json_able
from nabla_tau.suites.measures import MEASURES, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Avg. D of Huang et al. 2024 (arXiv 2409.19732): the mean distance from retrained in these four.
AVERAGED = ("gap_forget_accuracy", "gap_retain_accuracy", "gap_test_accuracy", "gap_mia_loss")
SHOWN = (
    "gap_auc_loss",
    "gap_mia_loss",
    "gap_mia_entropy",
    "ulira",
    "ruli",
    "gap_forget_accuracy",
    "gap_retain_accuracy",
    "gap_test_accuracy",
    "tow",
    "kl_test",
    "share",
)
SCHEMA = "nabla_tau.comparison/1"
SUFFIXES = (".json", ".csv", ".html", ".png", ".svg")


@dataclass(frozen=True)
class Row:
    """One method and seed: `measures.MEASURES` by name (None or absent: unknown) and remarks."""

    method: str
    seed: int
    measures: Mapping[str, float | None]
    remarks: Sequence[str]


@dataclass(frozen=True)
class Summary:
    """A method over its seeds. measures: name -> (mean, standard deviation). distance: `AVERAGED`, in percentage
    points as published; None where the method served no seed."""

    method: str
    seeds: int
    measures: Mapping[str, tuple[float, float] | None]
    distance: float | None
    remarks: Sequence[str]


@dataclass(frozen=True)
class ComparisonTable:
    """counts: samples of each part. settings: seeds, shadow models, threads, device, versions."""

    suite: str
    scenario: str
    rows: Sequence[Row]
    counts: Mapping[str, int]
    settings: Mapping[str, Any]

    def summaries(self) -> list[Summary]:
        """By distance from retrained, methods without figures last."""
        found = []
        for method in dict.fromkeys(row.method for row in self.rows):
            rows = [row for row in self.rows if row.method == method]
            measures = {name: spread([row.measures.get(name) for row in rows]) for name in MEASURES}
            distances = [
                100 * sum(abs(row.measures[name] or 0.0) for name in AVERAGED) / len(AVERAGED)
                for row in rows
                if all(row.measures.get(name) is not None for name in AVERAGED)
            ]
            remarks = list(dict.fromkeys(remark for row in rows for remark in row.remarks))
            distance = sum(distances) / len(distances) if distances else None
            found.append(Summary(method, sum(bool(row.measures) for row in rows), measures, distance, remarks))
        return sorted(found, key=lambda s: (not s.seeds, s.distance is None, s.distance or 0.0))

    def shown(self) -> list[str]:
        """The measures of a table: those that are known of any method."""
        return [name for name in SHOWN if any(row.measures.get(name) is not None for row in self.rows)]

    def table(self) -> str:
        """For a terminal: gaps to retrained, means over the seeds."""
        shown = self.shown()
        heads = ["method", "Avg. D", *(MEASURES[name][0] for name in shown)]
        lines = []
        for s in self.summaries():
            distance = "-" if s.distance is None else f"{s.distance:.1f}"
            lines.append([s.method, distance, *(cell(name, s.measures[name], s.seeds) for name in shown)])
        widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
        found = []
        for line in [heads, *lines]:
            cells = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
            found.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
        seeds = len(self.settings["seeds"])
        head = f"{self.suite}, {self.scenario} forgotten, {seeds} seed{'s' * (seeds > 1)}: gaps to retrained"
        said = [f"{s.method}: {remark}" for s in self.summaries() for remark in s.remarks]
        return "\n".join([head, *found, *said])

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it; its schema is schemas/comparison.schema.json."""
        summaries = [dataclasses.asdict(summary) for summary in self.summaries()]
        content = {"schema": SCHEMA, **dataclasses.asdict(self), "summaries": summaries}
        found: dict[str, Any] = json_able(content, "the comparison")
        return found

    def save(self, path: str | Path) -> Path:
        """Write .json, .csv (a line a row), .html, .png or .svg (the plot), whole or not at all. ValueError for
        another suffix, ImportError where an optional package is missing."""
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise ValueError(f"a comparison is written as {', '.join(SUFFIXES)}, got {path}")
        if path.suffix == ".json":
            content = json.dumps(self.to_dict(), indent=2, allow_nan=False).encode()
        elif path.suffix == ".csv":
            content = self._csv().encode()
        elif path.suffix == ".html":
            from nabla_tau.suites.page import render

            content = render(self).encode()
        else:
            content = self._drawn(path.suffix[1:])
        write_atomic(path, content)
        return path

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["suite", "scenario", "method", "seed", *MEASURES, "remarks"])
        for row in self.rows:
            values = ["" if (v := row.measures.get(name)) is None else f"{v:.6g}" for name in MEASURES]
            writer.writerow([self.suite, self.scenario, row.method, row.seed, *values, "; ".join(row.remarks)])
        return text.getvalue()

    def _drawn(self, kind: str) -> bytes:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5), layout="constrained")
        self.plot(figure.subplots())
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=150)
        return content.getvalue()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Forgetting against utility: how far the attack is from retrained, and how far accuracy on unseen samples."""
        from nabla_tau.membership.outcome import axes_or_new
        from nabla_tau.suites.picture import draw

        points = {}
        for summary in self.summaries():
            x, y = (summary.measures[name] for name in ("gap_auc_loss", "gap_test_accuracy"))
            if x is not None and y is not None:
                points[summary.method] = x, y
        return draw(axes_or_new(ax), points, f"{self.suite}, {self.scenario} forgotten")


def cell(name: str, value: tuple[float, float] | None, seeds: int) -> str:
    """A measure as a person reads it: accuracies in points, the spread where there is one."""
    if value is None:
        return "-"
    if not name.startswith("gap_"):
        return f"{value[0]:.0%}" if name == "share" else f"{value[0]:.3f}"
    scale, digits = (100, 1) if name.endswith("accuracy") else (1, 3)
    mean, deviation = (scale * number for number in value)
    return f"{mean:+.{digits}f}" + f"±{deviation:.{digits}f}" * (seeds > 1)
