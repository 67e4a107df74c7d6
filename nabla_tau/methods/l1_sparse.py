"""L1-sparse: finetuning on the retained samples that drives weights to zero."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from nabla_tau.methods.setup import Setup
from nabla_tau.methods.stages import Drawn, Stage, Term


@dataclass(frozen=True)
class L1Sparse:
    """min mean_r l + a_t |w|_1 with a_t falling linearly from `penalty` to 0 over the epochs (Jia et al. 2023, arXiv
    2304.04934), SGD with momentum 0.9 and weight decay, in train mode. SGD brings no weight to 0 itself, but within a
    step of it. The penalty is on all trainable weights, those of normalisation layers too."""

    penalty: float = 5e-4
    epochs: float = 10
    learning_rate: float = 1e-2
    decay: float = 5e-4
    batch_size: int = 256
    name: str = "l1-sparse"

    def stages(self, setup: Setup) -> list[Stage]:
        size = setup.batch_size("retain", self.batch_size)
        of_pass = setup.batches_per_pass("retain", size)
        steps = max(1, round(self.epochs * of_pass))

        def terms(step: int, forget: Drawn, retain: Drawn) -> list[Term]:
            return [Term("retain_term", retain.batch)]

        def shrink(step: int) -> None:
            penalty = self.penalty * (1 - step // of_pass * of_pass / steps)
            for parameter in setup.parameters:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach().sign(), alpha=penalty)

        optimizer = partial(torch.optim.SGD, lr=self.learning_rate, momentum=0.9, weight_decay=self.decay)

        return [Stage(steps, terms, optimizer, retain=size, training=True, gradient=shrink)]
