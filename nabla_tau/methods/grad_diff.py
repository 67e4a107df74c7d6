"""GradDiff, and the stage that it and its successors for language models share: a forget and a retain term."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from nabla_tau.batch import Batch
from nabla_tau.methods.setup import Setup
from nabla_tau.methods.stages import Drawn, Stage, Term
from nabla_tau.methods.tokens import token_losses, token_mean


@dataclass(frozen=True)
class Beside:
    """Training settings of methods that take a batch of each in a step: AdamW with weight decay 0.01, whose learning
    rate rises linearly over the first pass of the forget samples and falls linearly to 0 over the others, in train mode
    (as in TOFU, Maini et al. 2024, arXiv 2401.06121). epochs: passes of the forget samples; a step takes `batch_size`
    of them, and as many retained ones. The learning rate of 1e-5 is that of models of billions of parameters: a small
    one hardly moves with it."""

    retain_weight: float = 1.0
    epochs: float = 5
    learning_rate: float = 1e-5
    batch_size: int = 32

    def stage(self, setup: Setup, forget_term: Callable[[Drawn], Term]) -> Stage:
        """forget_term: forget batch -> the term of it. Without a retain weight no retained sample is drawn."""
        size = setup.batch_size("forget", self.batch_size)
        in_pass = setup.batches_per_pass("forget", size)
        steps = max(1, round(self.epochs * in_pass))
        warm = min(in_pass, steps)

        def retained(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            return token_mean(*token_losses(setup, model, batch))

        def terms(step: int, forget: Drawn, retain: Drawn) -> list[Term]:
            kept = [Term("retain_term", retain.batch, retained, self.retain_weight)] if self.retain_weight else []
            return [forget_term(forget), *kept]

        return Stage(
            steps,
            terms,
            partial(torch.optim.AdamW, lr=self.learning_rate, weight_decay=0.01),
            forget=size,
            retain=setup.batch_size("retain", self.batch_size) if self.retain_weight else 0,
            rate=lambda step: (step + 1) / warm if step < warm else (steps - step) / (steps - warm),
            training=True,
        )


@dataclass(frozen=True)
class GradDiff(Beside):
    """min -forget_weight mean_f l + retain_weight mean_r l, the means over tokens (Maini et al. 2024, arXiv
    2401.06121). In any task but sequences a sample counts as one token. Nothing bounds the ascent: after more than a
    few passes the forget loss is far above that of unseen text, and the model is worse everywhere."""

    forget_weight: float = 1.0
    name: str = "grad-diff"

    def stages(self, setup: Setup) -> list[Stage]:
        def values(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            return token_mean(*token_losses(setup, model, batch))

        return [self.stage(setup, lambda forget: Term("forget_term", forget.batch, values, -self.forget_weight))]
