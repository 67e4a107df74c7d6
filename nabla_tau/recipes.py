"""Recipes: every number that `unlearn` sets by itself, and the plan that follows from the size of the data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from nabla_tau.arguments import check_fields
from nabla_tau.loss import check_gate
from nabla_tau.objective import Gate, alpha_start


@dataclass(frozen=True)
class Recipe:
    """Settings of an unlearning run; nothing in them depends on the data set.

    gate, power, balance: as in `Unlearner`. alpha: weight of the ascent, None for min(1, 5/3 |D_f| / |D_train|).
    alpha_end: what it falls to over the run, as a share of its start. learning_rate: at the start, None to take it
    from the weights (`learning_rate_from_weights`); it falls linearly to `learning_rate_end` times itself.

    schedule: "forget_epochs" is the published one, E = int(6 |R| / (2 |F|)) passes over the forget batches, one retain
    batch beside each, learning rate and alpha changing from epoch to epoch and tau measured every `tau_every` epochs;
    "retain_passes" runs `retain_passes` passes over the retain batches, but at least `min_steps` steps, learning rate
    and alpha changing from step to step and tau measured every `tau_every` of the run (a share). tau_samples: held-out
    samples it is measured on, drawn anew each time; None for all.

    batch_size: retain samples a step. forget_ratio: forget samples a step are forget_ratio * (forgotten share of the
    data) * batch_size, between 8 and batch_size; None for batch_size (a DataLoader keeps its own). hold: leave the
    ascent out of the steps in which the forget losses, in a running mean, rank no lower than held-out losses. shrink,
    noise: before the first step every trainable matrix w (any tensor of two or more dimensions) becomes
    shrink * w + noise * std(w) * N(0, 1). match_classes: tau follows the kind of the forget set (`classes.py`) instead
    of being the plain mean.
    """

    name: str
    gate: Gate
    power: int
    alpha: float | None
    alpha_end: float
    balance: float | None
    learning_rate: float | None
    learning_rate_end: float
    schedule: Literal["forget_epochs", "retain_passes"]
    retain_passes: float
    min_steps: int
    tau_every: float
    tau_samples: int | None
    batch_size: int
    forget_ratio: float | None
    hold: bool
    shrink: float
    noise: float
    match_classes: bool

    def __post_init__(self) -> None:
        check_fields(self)
        check_gate(self.gate, self.power)
        for name in (
            "learning_rate",
            "retain_passes",
            "min_steps",
            "tau_every",
            "tau_samples",
            "batch_size",
            "forget_ratio",
            "shrink",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"recipe: {name} must be positive, got {getattr(self, name)!r}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"recipe: alpha must be in [0, 1], got {self.alpha}")
        for name in ("alpha_end", "learning_rate_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"recipe: {name} must be in [0, 1], got {getattr(self, name)}")
        if self.noise < 0:
            raise ValueError(f"recipe: noise must not be negative, got {self.noise}")
        if self.hold and self.gate != "quantile":
            raise ValueError(f'recipe: hold needs gate="quantile", got {self.gate!r}')
        if self.schedule not in ("forget_epochs", "retain_passes"):
            raise ValueError(f"recipe: schedule must be forget_epochs or retain_passes, got {self.schedule!r}")


PAPER = Recipe(
    name="paper",
    gate="batch",
    power=2,
    alpha=None,
    alpha_end=0.0,
    balance=None,
    learning_rate=1e-3,
    learning_rate_end=0.1,
    schedule="forget_epochs",
    retain_passes=3.0,
    min_steps=1,
    tau_every=5,
    tau_samples=None,
    batch_size=256,
    forget_ratio=None,
    hold=False,
    shrink=1.0,
    noise=0.0,
    match_classes=False,
)
ASCENT = Recipe(
    name="ascent",
    gate="quantile",
    power=1,
    alpha=0.5,
    alpha_end=1.0,
    balance=0.25,
    learning_rate=None,
    learning_rate_end=0.0,
    schedule="retain_passes",
    retain_passes=2.5,
    min_steps=200,
    tau_every=0.1,
    tau_samples=500,
    batch_size=64,
    forget_ratio=3.0,
    hold=True,
    shrink=0.6,
    noise=0.1,
    match_classes=True,
)
# For a model that knows more than its training data could teach it again: nothing is shrunk away.
GENTLE = replace(ASCENT, name="gentle", shrink=1.0, noise=0.0)
RECIPES = {recipe.name: recipe for recipe in (ASCENT, GENTLE, PAPER)}


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to on data of a given size: step counts, and learning rate and alpha as functions of the
    step. `retain_restart` is the number of steps after which the retain pass starts anew (published recipe only)."""

    steps: int
    tau_every: int
    retain_restart: int | None
    alpha0: float
    learning_rate0: float
    stage_steps: int
    stages: int
    recipe: Recipe

    def _progress(self, step: int) -> float:
        """Share of the way that the schedules have gone: by stage, an epoch as published or a single step."""
        return (step // self.stage_steps) / self.stages

    def alpha(self, step: int) -> float:
        return self.alpha0 * (1 + (self.recipe.alpha_end - 1) * self._progress(step))

    def learning_rate(self, step: int) -> float:
        return self.learning_rate0 * (1 + (self.recipe.learning_rate_end - 1) * self._progress(step))


def forget_batch_size(recipe: Recipe, forget_count: int, retain_count: int) -> int:
    """Forget samples a step, at most those there are."""
    if recipe.forget_ratio is None:
        return recipe.batch_size
    share = forget_count / (forget_count + retain_count)
    wanted = max(8, round(recipe.forget_ratio * share * recipe.batch_size))
    return min(wanted, recipe.batch_size, forget_count)


def learning_rate_from_weights(parameters: Iterable[Tensor]) -> float:
    """Learning rate for AdamW: 1/25 of the median root mean square of the weight matrices (tensors of two or more
    dimensions; the lower one of two medians).

    An AdamW step moves each weight by about the learning rate, so this is a first step of 4 % of a typical weight,
    whatever the model was trained with. Measured on CNNs, bag-of-embedding and tabular models.
    """
    scales = [float(p.detach().float().square().mean().sqrt()) for p in parameters if p.ndim > 1]
    scales = sorted(scale for scale in scales if scale > 0)
    if not scales:
        raise ValueError("no trainable weight matrix to take a learning rate from: give the recipe a learning_rate")
    return statistics.median_low(scales) / 25


def make_plan(
    recipe: Recipe,
    *,
    forget_batches: int,
    retain_batches: int,
    forget_count: int,
    retain_count: int,
    learning_rate: float,
) -> Plan:
    """Plan of a recipe for loaders of `forget_batches` and `retain_batches` batches a pass, starting at
    `learning_rate`."""
    alpha0 = alpha_start(forget_count, forget_count + retain_count) if recipe.alpha is None else recipe.alpha
    if recipe.schedule == "forget_epochs":
        epochs = max(1, int(retain_batches / (2 * forget_batches) * (2 * recipe.retain_passes)))
        return Plan(
            steps=epochs * forget_batches,
            tau_every=max(1, round(recipe.tau_every)) * forget_batches,
            retain_restart=max(1, retain_batches // forget_batches) * forget_batches,
            alpha0=alpha0,
            learning_rate0=learning_rate,
            stage_steps=forget_batches,
            stages=epochs,
            recipe=recipe,
        )
    steps = max(recipe.min_steps, math.ceil(recipe.retain_passes * retain_batches))
    return Plan(
        steps=steps,
        tau_every=max(1, round(recipe.tau_every * steps)),
        retain_restart=None,
        alpha0=alpha0,
        learning_rate0=learning_rate,
        stage_steps=1,
        stages=steps,
        recipe=recipe,
    )
