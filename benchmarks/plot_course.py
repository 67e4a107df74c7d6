"""Figures of how nabla-tau works: its gates, and from course_*.csv a run step by step and the losses that it leaves."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from record import read_csv, read_head
from torch import Tensor

from nabla_tau.objective import Target, objective, rank_targets, target_from_losses

TITLE = {"fontsize": 10, "loc": "left"}
FORGET, UNSEEN, RETAIN = "#c2410c", "#2563eb", "#64748b"
TITLES = {
    "original": "original",
    "retrained": "retrained",
    "nabla_tau": "nabla-tau, default",
    "nabla_tau, paper": "nabla-tau, paper",
}

Row = dict[str, str]


def plot_gates(out: Path) -> None:
    """The terms are those of `objective`, and the quantiles those of `target_from_losses`, on made-up losses."""
    figure, (of_mean, *of_samples) = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    tau = torch.tensor(2.0)
    at = torch.linspace(0, 4, 200)
    for gate, power, colour, style in (
        ("two_sided", 2, UNSEEN, "--"),
        ("batch", 1, RETAIN, ":"),
        ("batch", 2, FORGET, "-"),
    ):
        values = [
            objective(loss[None], torch.tensor([True]), Target(tau, None), 1.0, gate=gate, power=power).forget_term
            for loss in at
        ]
        of_mean.plot(at, values, style, lw=1.8, color=colour, label=f"{gate}, power {power}")
    of_mean.axvline(tau, color="#6b7280", lw=0.8)
    of_mean.set_title("batch and two_sided", **TITLE)
    of_mean.set(xlabel="mean forget loss (tau = 2)", ylabel="forget term")
    of_mean.legend(frameon=False, fontsize=8)
    ranks = (torch.arange(12) + 0.5) / 12
    held_out, losses = target_from_losses(-2.0 * torch.log1p(-(torch.arange(400) + 0.5) / 400)), 2.2 * ranks**3
    assert held_out.quantiles is not None
    wanted = rank_targets(losses, torch.ones(12, dtype=torch.bool), held_out.quantiles)
    for axes, gate, targets in zip(of_samples, ("sample", "quantile"), (held_out.mean.expand(12), wanted), strict=True):
        draw_targets(axes, ranks, losses, targets, held_out)
        axes.set_title(gate, **TITLE)
    save(figure, out)


def draw_targets(axes: Axes, ranks: Tensor, losses: Tensor, targets: Tensor, held_out: Target) -> None:
    """An arrow from each forget loss to where the gate wants it."""
    assert held_out.quantiles is not None
    steps = (torch.arange(len(held_out.quantiles)) + 0.5) / len(held_out.quantiles)
    axes.plot(steps, held_out.quantiles, color=UNSEEN, lw=1.4, label="held-out losses")
    axes.axhline(held_out.mean, color=UNSEEN, lw=1, ls=":", label="their mean, tau")
    axes.plot(ranks, losses, "o", ms=4, color=FORGET, label="forget losses")
    for rank, loss, target in zip(ranks.tolist(), losses.tolist(), targets.tolist(), strict=True):
        if target > loss:
            axes.annotate("", (rank, target), (rank, loss), arrowprops={"arrowstyle": "->", "color": FORGET, "lw": 0.8})
    axes.set(xlabel="rank", ylabel="loss", ylim=(-0.2, 7))
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def plot_course(path: Path, out: Path) -> None:
    """A panel a recipe: forget loss (band: p20 to p80 of the steps in a window), retain loss and tau."""
    rows = [row for row in read_csv(path) if row["case"].startswith("course: ")]
    recipes = [name for name in TITLES if any(row["provider"] == name for row in rows)]
    figure, panels = plt.subplots(1, len(recipes), figsize=(10, 3.4), layout="constrained", sharey=True, squeeze=False)
    for axes, recipe in zip(panels[0], recipes, strict=True):
        for measure, colour, band in (("forget loss", FORGET, 0.2), ("retain loss", RETAIN, 0.0), ("tau", UNSEEN, 0.0)):
            found = [row for row in rows if row["provider"] == recipe and row["case"] == f"course: {measure}"]
            passes = [float(row["note"].removesuffix(" passes")) for row in found]
            low, middle, high = ([float(row[key]) for row in found] for key in ("p20", "p50", "p80"))
            axes.fill_between(passes, low, high, color=colour, alpha=band, lw=0)
            axes.plot(passes, middle, color=colour, lw=1.6, label=measure)
        axes.set_title(TITLES[recipe], **TITLE)
        axes.set(xlabel="passes of the retain set", ylim=(0, None))
    panels[0][0].set_ylabel("mean loss of a batch")
    panels[0][0].legend(frameon=False, fontsize=8)
    save(figure, out, path)


def plot_losses(path: Path, out: Path) -> None:
    """A panel a model: how many samples of the forget and of the unseen set have a loss of at most x."""
    rows = read_csv(path)
    models = [name for name in TITLES if any(row["provider"] == name for row in rows)]
    figure, panels = plt.subplots(1, len(models), figsize=(11, 3.4), layout="constrained", sharey=True, squeeze=False)
    for axes, model in zip(panels[0], models, strict=True):
        mine = [row for row in rows if row["provider"] == model]
        for name, colour in (("unseen", UNSEEN), ("forget", FORGET)):
            found = [row for row in mine if row["case"] == f"losses of the {name} set"]
            losses = [max(float(row["p50"]), 1e-9) for row in found]
            axes.plot(losses, [float(row["note"]) for row in found], color=colour, lw=1.6, label=f"{name} set")
        accuracy = {row["case"].split()[3]: 100 * float(row["p50"]) for row in mine if "accuracy on" in row["case"]}
        shown = " / ".join(f"{accuracy[name]:.1f}" for name in ("forget", "retain", "unseen"))
        axes.set(xscale="log", xlim=(1e-5, 20), xlabel=f"loss\naccuracy {shown} %")
        axes.set_title(TITLES[model], **TITLE)
    panels[0][0].set_ylabel("share of samples below")
    panels[0][0].legend(frameon=False, fontsize=8)
    save(figure, out, path)


def save(figure: plt.Figure, out: Path, results: Path | None = None) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    if results is not None:
        head = read_head(results)
        made = f"{head['device']}, torch {head['torch']}, {head['date']}"
        figure.supxlabel(made, fontsize=8, color="#4b5563")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    print(out)
