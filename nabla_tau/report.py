"""An audit as one self-contained HTML page: words first, then figures, then plots; nothing is loaded from elsewhere.

Plots are drawn by matplotlib as inline SVG in placeholder colours, which become the page's CSS variables: so they
follow the page's light, dark and print colours. No text of a user's enters a plot; legends are HTML, escaped there.
"""

from __future__ import annotations

import importlib
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from nabla_tau.membership.audit_report import AuditReport
from nabla_tau.membership.definitions import ATTACK_NAMES, GROUPS, LIMITS, Row, number, signed
from nabla_tau.membership.facts import facts, part
from nabla_tau.membership.measures import ModelAudit

# Verdict code -> (title, title without a retrained model or None, tone).
_TITLES = {
    "forgotten": ("Forgotten, as far as these attacks see", "Looks forgotten; no retrained model to compare", "good"),
    "partly remembered": ("Partly remembered", None, "warn"),
    "remembered": ("Still remembered", None, "bad"),
    "over-unlearned": ("Over-unlearned", None, "bad"),
    "damaged": ("The model is damaged", None, "bad"),
    "inconclusive": ("Inconclusive", None, "open"),
}

_MODEL_COLOURS = 8
_INK, _MUTED, _GRID = "#0a0b00", "#0a0bfd", "#0a0bfe"
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)"} | {
    f"#0a0b{i:02x}": f"var(--m{i})" for i in range(1, _MODEL_COLOURS + 1)
}


def render_html(report: AuditReport) -> str:
    """The page of a report. ImportError, naming what to install, without jinja2 or matplotlib."""
    pages, pyplot = environment(), _import("matplotlib.figure")
    main = {name: model for name, model in report.models.items() if model.role != "retrained run"}
    colours = {name: _colour(name, model, main) for name, model in report.models.items()}
    title, title_by_chance, tone = _TITLES[report.verdict]
    n_nonmembers = report.comparison["n_nonmembers"]
    page: str = pages.get_template("report.html").render(
        report=report,
        facts=facts(report),
        record={name: part(report.record, name) for name in ("settings", "counts", "versions")},
        title=title_by_chance or title if report.reference == "chance" else title,
        tone=tone,
        cards=_cards(report),
        main=main,
        colours=colours,
        groups=_shown(report),
        attacks={a: name for a, name in ATTACK_NAMES.items() if _known(report, f"auc_{a}")},
        by_models=report.statistics.get("by_models"),
        axis=_axis(report),
        gap_tone=_gap_tone,
        limits=LIMITS,
        roc_plots={
            ATTACK_NAMES[attack]: [
                _roc_plot(pyplot, main, colours, attack, 1 / n_nonmembers, log=log) for log in (False, True)
            ]
            for attack in ("loss", "lira", "rmia")
            if all(attack in model.roc for model in main.values())
        },
        histograms={name: _histogram_plot(pyplot, report, name, colours[name]) for name in main},
        history=_history_plots(pyplot, part(report.record, "history")),
    )
    return page


def environment() -> Any:
    """Where the pages' templates are read, with everything escaped. ImportError, naming what to install, without
    jinja2."""
    jinja2 = _import("jinja2")
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("nabla_tau"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"number": number, "signed": signed, "spread": _spread, "setting": _setting}
    return found


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"an HTML report needs {name.split('.')[0]}: pip install nabla_tau[report]") from error


def _colour(name: str, model: ModelAudit, main: Mapping[str, ModelAudit]) -> int:
    """Palette entry, the same on every page for the same role."""
    fixed = {"original": 1, "retrained": 2, "retrained run": 2, "unlearned": 3}
    if model.role in fixed:
        return fixed[model.role]
    compared = [other for other, m in main.items() if m.role == "compared"]
    return 4 + compared.index(name) % (_MODEL_COLOURS - 3)


def _known(report: AuditReport, measure: str) -> bool:
    return any(model.number(measure) is not None for model in report.models.values())


def _shown(report: AuditReport) -> dict[str, list[Row]]:
    """Groups of table rows that at least one model has a number for."""
    groups = {title: [row for row in rows if _known(report, row.measure)] for title, rows in GROUPS.items()}
    return {title: rows for title, rows in groups.items() if rows}


def _cards(report: AuditReport) -> list[dict[str, Any]]:
    """Key figures: the unlearned model's value, where it came from, and where it should be."""
    original = next((m for m in report.models.values() if m.role == "original"), None)
    retrained = next((m for m in report.models.values() if m.role == "retrained"), None)
    subject = report.models["unlearned"]
    cards = []
    for measure, label, kind in (
        ("auc_loss", "Attack AUC on the loss", "rate"),
        ("mia_loss", "Attack accuracy (MIA)", "rate"),
        ("forget_accuracy", "Forget accuracy", "percent"),
        ("test_accuracy", "Test accuracy", "percent"),
    ):
        value = subject.number(measure)
        if value is None:
            continue
        target = retrained.number(measure) if retrained else 0.5 if kind == "rate" else None
        cards.append(
            {
                "label": label,
                "value": number(value, kind),
                "interval": [number(end, kind) for end in subject.intervals.get(measure, ())],
                "before": number(original.number(measure), kind) if original else None,
                "target": number(target, kind) if target is not None else None,
                "target_name": "retrained" if retrained else "chance",
                "tone": "" if target is None else _gap_tone(value - target, kind, target),
            }
        )
    if subject.seconds is not None:
        retraining = retrained.seconds if retrained else None
        faster = f"{retraining / subject.seconds:.3g}x faster" if retraining and subject.seconds > 0 else None
        cards.append(
            {
                "label": "Wall time",
                "value": number(subject.seconds, "seconds"),
                "interval": [],
                "before": None,
                "target": None if retraining is None else number(retraining, "seconds"),
                "target_name": "retraining" + (f", {faster}" if faster and retraining > subject.seconds else ""),  # type: ignore[operator]
                "tone": "",
            }
        )
    return cards


def _axis(report: AuditReport) -> dict[str, Any]:
    """A common axis of every AUC interval, with a map from values to per cent of its length."""
    values = [0.5]
    for model in report.models.values():
        values += [v for key, pair in model.intervals.items() if key.startswith("auc_") for v in pair]
    low, high = math.floor(10 * min(values) - 0.1) / 10, math.ceil(10 * max(values) + 0.1) / 10
    low, high = max(low, 0.0), min(high, 1.0)
    # Either step has a tick at 0.5, the line that the page explains.
    step = 0.1 if high - low <= 0.51 else 0.25
    ticks = [t for t in (round(i * step, 2) for i in range(11)) if low <= t <= high]

    def place(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    return {"ticks": ticks, "place": place}


def _gap_tone(gap: float | None, kind: str, reference: float | None) -> str:
    """How far from the retrained model, as a CSS class: g0 (close) to g3 (far)."""
    if gap is None or kind == "seconds":
        return ""
    limits = (0.1, 0.3, 1.0) if kind == "loss" else (0.01, 0.03, 0.08)
    size = abs(gap) / max(abs(reference or 0.0), 1e-3) if kind == "loss" else abs(gap)
    return f"g{sum(size > limit for limit in limits)}"


def _spread(value: float, kind: str) -> str:
    return f"{value:.2g}" if kind == "loss" else number(value, kind)


def _setting(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_setting(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    return f"{value:.4g}" if isinstance(value, float) else "not set" if value is None else str(value)


def _figure(pyplot: ModuleType, draw: Callable[[Any], None], size: tuple[float, float] = (3.7, 2.7)) -> Any:
    """Draw on fresh axes; size in inches is about the width on a page, so that type is not scaled out of sight."""
    from markupsafe import Markup
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nabla_tau", "font.size": 10, "axes.unicode_minus": True}):
        figure = pyplot.Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("none")
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.tick_params(colors=_MUTED, which="both", length=0)
        draw(axes)
        axes.xaxis.label.set_color(_MUTED)
        axes.yaxis.label.set_color(_MUTED)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()[stream.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg)( [^>]*?)? (?:width|height)="[^"]*"(.*?) (?:width|height)="[^"]*"', r"\1\2\3", svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", svg)
    svg = re.sub(r"#0a0b[0-9a-f]{2}", lambda m: _VARIABLES[m.group()], svg)
    return Markup(svg)


def _roc_plot(
    pyplot: ModuleType,
    models: Mapping[str, ModelAudit],
    colours: Mapping[str, int],
    attack: str,
    lowest: float,
    *,
    log: bool,
) -> Any:
    def draw(axes: Any) -> None:
        ends = np.geomspace(lowest, 1, 50) if log else np.array([0, 1])
        axes.plot(ends, ends, color=_MUTED, linewidth=1, dashes=(3, 3))
        for name, model in models.items():
            curve = model.roc[attack]
            wide = 2.4 if model.role == "unlearned" else 1.4
            fpr, tpr = (np.array(curve[rate]) for rate in ("fpr", "tpr"))
            seen = (fpr > 0) & (tpr > 0) if log else slice(None)
            axes.plot(fpr[seen], tpr[seen], color=_placeholder(colours[name]), linewidth=wide)
        if log:
            axes.set(xscale="log", yscale="log", xlim=(lowest, 1), ylim=(lowest, 1.05))
            _plain_log_ticks(axes.xaxis)
            _plain_log_ticks(axes.yaxis)
        else:
            axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.set(xlabel="unseen samples accused (FPR)", ylabel="forgotten found (TPR)")

    return _figure(pyplot, draw, (5.0, 3.6))


def _histogram_plot(pyplot: ModuleType, report: AuditReport, name: str, colour: int) -> Any:
    shares = report.models[name].histogram
    edges = report.loss_bins["edges"]
    # A compared model that diverged has all its samples in one bin, and would flatten the others.
    own = [m for m in report.models.values() if m.role != "compared"]
    top = max(share for m in own for which in m.histogram.values() for share in which)

    def draw(axes: Any) -> None:
        # Peaks on memorised samples are so high that everything else would vanish: a square root keeps both in sight.
        axes.set_yscale("function", functions=(np.sqrt, np.square))
        axes.stairs(shares["forget"], edges, fill=True, color=_placeholder(colour), alpha=0.45, linewidth=0)
        axes.stairs(shares["forget"], edges, color=_placeholder(colour), linewidth=1.2, baseline=None)
        axes.stairs(shares["unseen"], edges, color=_INK, linewidth=1.6, baseline=None)
        axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.05 * top), xlabel="loss", ylabel="share of samples")
        ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0) if top / 30 <= t <= 1.05 * top]
        axes.set_yticks(ticks, [f"{100 * t:g}%" for t in ticks])
        if report.loss_bins["scale"] == "log":
            axes.set_xscale("log")
            _plain_log_ticks(axes.xaxis)

    return _figure(pyplot, draw)


def _history_plots(pyplot: ModuleType, history: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(title, plot) of each history that the record holds."""
    plots = []
    for title, ylabel, lines in (
        ("Forget loss against its target", "loss", (("forget_loss", _placeholder(3), "-"), ("tau", _INK, "--"))),
        ("Retain loss", "loss", (("retain_loss", _placeholder(3), "-"),)),
        ("Share of the gate that is open", "share", (("gate_open", _placeholder(3), "-"),)),
        ("Ascent weight", "alpha", (("alpha", _placeholder(3), "-"),)),
        ("Learning rate", "learning rate", (("learning_rate", _placeholder(3), "-"),)),
    ):
        columns = [(_column(history.get(key)), colour, style) for key, colour, style in lines]
        if not columns[0][0].size:
            continue

        def draw(axes: Any, columns: Any = columns, ylabel: str = ylabel) -> None:
            for values, colour, style in columns:
                steps = _column(history.get("step"))
                steps = steps if steps.size == values.size else np.arange(values.size)
                axes.plot(steps, values, style, color=colour, linewidth=1.5)
            axes.set(xlabel="step", ylabel=ylabel)
            axes.set_ylim(bottom=0 if ylabel != "loss" else None, top=1.05 if ylabel == "share" else None)
            axes.margins(x=0.01)

        plots.append((title, _figure(pyplot, draw)))
    return plots


def _column(values: object) -> Any:
    """A history column as floats, None as NaN; empty for anything that is no list of numbers."""
    if not isinstance(values, Sequence) or not all(v is None or isinstance(v, (int, float)) for v in values):
        return np.empty(0)
    return np.array([math.nan if v is None else float(v) for v in values])


def _placeholder(colour: int) -> str:
    return f"#0a0b{colour:02x}"


def _plain_log_ticks(axis: Any) -> None:
    """Decades as 0.01, 0.1, 1, and 10 to a power below that; every tick stays text that needs no mathematics font."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

    def text(value: float, _: object) -> str:
        power = round(math.log10(value)) if value > 0 else 0
        return f"{value:g}" if -3 < power < 4 else "10" + str(power).translate(raised)

    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(text))
