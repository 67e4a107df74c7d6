"""Random label: the forget samples are learned with labels that say nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from nabla_tau.methods.relabelling import random_labels, relabelling
from nabla_tau.methods.setup import Setup
from nabla_tau.methods.stages import Stage


@dataclass(frozen=True)
class RandomLabel:
    """min mean l over all samples, where the label of a forget sample is y' ~ U{1..C} (Golatkar et al. 2020, arXiv
    1911.04933), drawn anew whenever the sample comes; SGD with momentum 0.9, in train mode.

    One label in C is the right one. The model is taught to be unsure of the forget set, which no model is that never
    saw it: with more epochs the forget loss goes beyond that of unseen data, towards log C, and gives the set away.
    """

    epochs: float = 10
    learning_rate: float = 1e-2
    decay: float = 5e-4
    batch_size: int = 256
    name: str = "random-label"

    def stages(self, setup: Setup) -> list[Stage]:
        relabel = random_labels(setup, setup.classes(self.name))

        optimizer = partial(torch.optim.SGD, lr=self.learning_rate, momentum=0.9, weight_decay=self.decay)

        return [relabelling(setup, relabel, optimizer, epochs=self.epochs, batch_size=self.batch_size)]
