"""Bad Teacher: the student learns the forget samples from a teacher that knows nothing."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch

from nabla_tau.distributed import unwrapped
from nabla_tau.initialisation import initialise
from nabla_tau.methods.distillation import matching, refuse_own_loss
from nabla_tau.methods.mixture import mixture
from nabla_tau.methods.setup import Setup
from nabla_tau.methods.stages import Drawn, Stage, Term


@dataclass(frozen=True)
class BadTeacher:
    """min mean KL(teacher || model) over forget and some retained samples, where the teacher of a forget sample is a
    model that was initialised anew, and that of a retained one the original (Chundawat et al. 2023, arXiv 2205.08096);
    Adam, in eval mode, on `retain_fraction` of the retained samples.

    KL is the sum over the classes. (The public code takes the mean, which is C times smaller; to Adam it is the same.)
    A model that was initialised anew is nearly uniform on every sample, which one that never saw the forget set is not:
    with more epochs the forget loss goes to log C.
    """

    retain_fraction: float = 0.3
    temperature: float = 1.0
    epochs: float = 1
    learning_rate: float = 1e-4
    batch_size: int = 256
    name: str = "bad-teacher"

    def stages(self, setup: Setup) -> list[Stage]:
        setup.refuse(self.name, sharded_model="a teacher like it cannot be made")
        refuse_own_loss(setup, self.name)
        if not 0 < self.retain_fraction <= 1:
            raise ValueError(f"retain_fraction must be in (0, 1], got {self.retain_fraction}")
        nobody = copy.deepcopy(unwrapped(setup.model))
        initialise([nobody], setup.generator())
        bad, good = setup.outputs("forget", teacher=nobody), setup.outputs("retain")
        mixed = mixture(setup, self.batch_size, self.retain_fraction)

        def terms(step: int, forget: Drawn, retain: Drawn) -> list[Term]:
            unlearned, kept = (
                matching(setup, t(d.batch, d.numbers), self.temperature) for t, d in ((bad, forget), (good, retain))
            )
            return [
                Term("forget_term", forget.batch, unlearned, mixed.share),
                Term("retain_term", retain.batch, kept, 1 - mixed.share),
            ]

        optimizer = partial(torch.optim.Adam, lr=self.learning_rate)

        steps = max(1, round(self.epochs * mixed.steps))
        return [Stage(steps, terms, optimizer, forget=mixed.forget, retain=mixed.retain)]
