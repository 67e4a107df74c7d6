"""Amnesiac unlearning: every forget sample gets one wrong label, which is learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nabla_tau.methods.relabelling import relabelling
from nabla_tau.methods.setup import Setup
from nabla_tau.methods.stages import Drawn, Stage


@dataclass(frozen=True)
class Amnesiac:
    """min mean l over all samples, where the label of a forget sample is y' != y, drawn once (Graves et al. 2021, arXiv
    2010.10981), Adam, in train mode.

    Of the two methods of that paper this is the one that needs no record of the training; it is what other work
    compares with under this name. It teaches the model to be wrong, and with enough steps to memorise the wrong labels:
    then the forget loss is higher than that of unseen data. A sample must be known again: no DataLoader.
    """

    epochs: float = 3
    learning_rate: float = 1e-4
    batch_size: int = 256
    name: str = "amnesiac"

    def stages(self, setup: Setup) -> list[Stage]:
        setup.refuse(self.name, loader="a sample keeps the label it was given, and nobody knows which sample is which")
        classes = setup.classes(self.name)
        if classes < 2:
            raise ValueError(f"{self.name} needs another class to relabel with, and the model has {classes}")
        shifts = torch.randint(1, classes, (setup.source("forget").count,), generator=setup.generator())

        def relabel(step: int, forget: Drawn) -> Callable[[Tensor], Tensor]:
            assert forget.numbers is not None
            own = shifts[forget.numbers.cpu()].to(setup.device)
            return lambda targets: (targets.long() + own) % classes

        optimizer = partial(torch.optim.Adam, lr=self.learning_rate)

        return [relabelling(setup, relabel, optimizer, epochs=self.epochs, batch_size=self.batch_size)]
