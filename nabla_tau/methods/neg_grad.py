"""NegGrad and NegGrad+: plain ascent on the forget samples, alone and beside descent on the retained ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from nabla_tau.methods.descent import falling
from nabla_tau.methods.setup import Setup
from nabla_tau.methods.stages import Drawn, Stage, Term


@dataclass(frozen=True)
class NegGrad:
    """min -mean_f l (Golatkar et al. 2020, arXiv 1911.04933), SGD with momentum 0.9, in eval mode. Nothing ever stops
    the ascent and nothing keeps what was learned: with more steps every such run ends in a model that knows nothing."""

    epochs: float = 3
    learning_rate: float = 1e-3
    batch_size: int = 64
    name: str = "neg-grad"

    def stages(self, setup: Setup) -> list[Stage]:
        size = setup.batch_size("forget", self.batch_size)
        steps = max(1, round(self.epochs * setup.batches_per_pass("forget", size)))

        def terms(step: int, forget: Drawn, retain: Drawn) -> list[Term]:
            return [Term("forget_term", forget.batch, weight=-1.0)]

        optimizer = partial(torch.optim.SGD, lr=self.learning_rate, momentum=0.9)

        return [Stage(steps, terms, optimizer, forget=size)]


@dataclass(frozen=True)
class NegGradPlus:
    """min alpha (mean_r l + (decay/2) |w - w0|^2) - (1 - alpha) mean_f l with w0 the original weights (Kurmanji et al.
    2023, arXiv 2302.09880), SGD with momentum 0.9 whose learning rate falls linearly to 0, in eval mode."""

    alpha: float = 0.95
    decay: float = 5e-4
    epochs: float = 5
    learning_rate: float = 1e-2
    batch_size: int = 128
    name: str = "neg-grad-plus"

    def stages(self, setup: Setup) -> list[Stage]:
        size, forget_size = (setup.batch_size(name, self.batch_size) for name in ("retain", "forget"))
        steps = max(1, round(self.epochs * setup.batches_per_pass("retain", size)))
        originals = setup.originals()

        def terms(step: int, forget: Drawn, retain: Drawn) -> list[Term]:
            return [
                Term("forget_term", forget.batch, weight=self.alpha - 1),
                Term("retain_term", retain.batch, weight=self.alpha),
            ]

        def stay_near(step: int) -> None:
            for parameter, before in zip(setup.parameters, originals, strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - before, alpha=self.alpha * self.decay)

        optimizer = partial(torch.optim.SGD, lr=self.learning_rate, momentum=0.9)

        stage = Stage(steps, terms, optimizer, forget=forget_size, retain=size, rate=falling(steps))
        stage.gradient = stay_near
        return [stage]
