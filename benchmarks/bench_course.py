"""course: what a run of unlearning does, step by step, and to the losses and accuracies of the model.

The demo's CNN on Fashion-MNIST, 15 % forgotten, seed 0, by either recipe. "forget loss", "retain loss" and "tau" are
those of the steps, about 40 windows of a run each; p20, p50 and p80 are of the steps in a window, and the note says how
many passes of the retain set lie behind its middle. "losses of the ... set" are quantiles over the samples of a set,
with the quantile as their note.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from record import Record
from torch import nn
from workloads import images

from nabla_tau import demo, unlearn
from nabla_tau.evaluation import evaluate
from nabla_tau.result import UnlearnResult
from nabla_tau.suites.scenarios import Scenario

WINDOWS, QUANTILES = 40, 50
COURSE = ("forget_loss", "retain_loss", "tau")
RECIPES = {"nabla_tau": "ascent", "nabla_tau, paper": "paper"}


def of_steps(history: dict[str, list[float]], passes: float, **same: Any) -> Iterator[Record]:
    """passes: of the retain set, in all steps together."""
    steps = len(history["step"])
    edges = np.linspace(0, steps, min(WINDOWS, steps) + 1).round().astype(int).tolist()
    for name in COURSE:
        for first, end in itertools.pairwise(edges):
            low, middle, high = np.quantile(history[name][first:end], (0.2, 0.5, 0.8)).tolist()
            note = f"{passes * (first + end) / 2 / steps:.3f} passes"
            measure = name.replace("_", " ")
            yield Record(case=f"course: {measure}", p20=low, p50=middle, p80=high, unit="nats", note=note, **same)


def of_model(model: nn.Module, parts: dict[str, demo.Data], **same: Any) -> Iterator[Record]:
    at = (np.arange(QUANTILES) + 0.5) / QUANTILES
    for name in ("forget", "retain", "unseen"):
        signals = evaluate(model, parts[name])
        yield Record(case=f"accuracy on the {name} set", p50=float(signals.accuracy), unit="rate", **same)
        for rank, loss in zip(at, np.quantile(signals.loss, at), strict=True):
            yield Record(case=f"losses of the {name} set", p50=float(loss), unit="nats", note=f"{rank:.2f}", **same)


def run(device: str, threads: int, quick: bool) -> Iterator[Record]:
    if device != "cpu":
        raise SystemExit("course: measured on the CPU only, as the demo trains there")
    work, seed = images(), 0
    parts = work.split(Scenario("random", 0.15), seed)._asdict()
    if quick:
        parts = {name: (x[:300], y[:300]) for name, (x, y) in parts.items()}
    original = work.train(work.make, parts["train"], seed)
    same: dict[str, Any] = {"bench": "course", "device": device, "dtype": "float32", "threads": threads}
    yield from of_model(original, parts, provider="original", **same)
    yield from of_model(work.train(work.make, parts["retain"], seed + 1), parts, provider="retrained", **same)
    for provider, recipe in RECIPES.items():
        result = unlearned(original, parts, recipe, seed)
        passes = result.settings["steps"] / result.settings["retain_batches_per_pass"]
        yield from of_steps(result.history, passes, provider=provider, **same)
        yield from of_model(result.model, parts, provider=provider, **same)


def unlearned(model: nn.Module, parts: dict[str, demo.Data], recipe: str, seed: int) -> UnlearnResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what a recipe fails to do is what is shown
        data = {name: parts[name] for name in ("forget", "retain", "held_out")}
        return unlearn(model, **data, recipe=recipe, seed=seed)
