"""Descent on the retained samples, the stage that many methods are made of or end with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import nn

from nabla_tau.methods.setup import Setup
from nabla_tau.methods.stages import Drawn, Stage, Term


def falling(steps: int, end: float = 0.0) -> Callable[[int], float]:
    """A learning rate that falls linearly from 1 to `end` over the steps."""
    return lambda step: 1 + (end - 1) * step / max(steps, 1)


class Training(Protocol):
    """The settings of a method that descends."""

    @property
    def epochs(self) -> float: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def batch_size(self) -> int: ...


def descent(
    setup: Setup, training: Training, *, min_steps: int = 1, parameters: list[nn.Parameter] | None = None
) -> Stage:
    """min mean_r l by AdamW with weight decay 0.01, learning rate falling linearly to a tenth, in train mode, for so
    many epochs but at least `min_steps` steps."""
    size = setup.batch_size("retain", training.batch_size)
    steps = max(min_steps, round(training.epochs * setup.batches_per_pass("retain", size)))

    def terms(step: int, forget: Drawn, retain: Drawn) -> list[Term]:
        return [Term("retain_term", retain.batch)]

    return Stage(
        steps,
        terms,
        lambda moved: setup.adamw([(moved, training.learning_rate)], weight_decay=0.01),
        retain=size,
        repeats=True,
        rate=falling(steps, 0.1),
        training=True,
        parameters=parameters,
    )
