"""Learning other labels for the forget samples beside the right ones for the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nabla_tau.batch import Batch
from nabla_tau.functional import has_loss, row_losses
from nabla_tau.methods.mixture import mixture
from nabla_tau.methods.setup import Setup
from nabla_tau.methods.stages import Drawn, Optimizer, Stage, Term

Relabel = Callable[[int, Drawn], Callable[[Tensor], Tensor]]  # (step, forget batch) -> (targets [n] -> labels [n])


def relabelling(setup: Setup, relabel: Relabel, optimizer: Optimizer, *, epochs: float, batch_size: int) -> Stage:
    """min mean l over all samples, with the labels of the forget samples replaced, in train mode."""
    mixed = mixture(setup, batch_size)

    def terms(step: int, forget: Drawn, retain: Drawn) -> list[Term]:
        labels_for = relabel(step, forget)

        def values(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            logits, targets = setup.forward(model, batch)
            kept = has_loss(targets)
            return row_losses(logits, labels_for(torch.where(kept, targets, 0))), kept

        return [
            Term("forget_term", forget.batch, values, mixed.share),
            Term("retain_term", retain.batch, weight=1 - mixed.share),
        ]

    steps = max(1, round(epochs * mixed.steps))
    return Stage(steps, terms, optimizer, forget=mixed.forget, retain=mixed.retain, training=True)


def random_labels(setup: Setup, classes: int) -> Relabel:
    """Labels ~ U{0, .., classes - 1}, drawn anew in every step."""
    count = setup.source("forget").count

    def relabel(step: int, forget: Drawn) -> Callable[[Tensor], Tensor]:
        # Of all samples, so that each process finds its own.
        drawn = torch.randint(classes, (count,), generator=setup.generator(step))

        def labels_for(targets: Tensor) -> Tensor:
            rows = torch.arange(len(targets)) if forget.numbers is None else forget.numbers.cpu()
            return drawn[rows].to(targets.device)

        return labels_for

    return relabel
