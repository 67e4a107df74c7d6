"""NGDiff: ascent on the forget samples and descent on the others, with gradients of the same length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nabla_tau.distributed import gradient_norm
from nabla_tau.methods.descent import falling
from nabla_tau.methods.setup import Setup
from nabla_tau.methods.stages import Drawn, Stage, Term


@dataclass(frozen=True)
class NGDiff:
    """Steps along g_r / |g_r| - g_f / |g_f|, the gradients of mean_r l and mean_f l (Bu et al. 2024, arXiv 2410.22086),
    by AdamW, in eval mode.

    To first order, and before AdamW scales it, neither loss goes the wrong way along it, whichever gradient is the
    longer one; in a plain difference the longer one has its way. Nothing ever stops the ascent. The learning rate falls
    linearly to 0; the paper fits one to the losses every few steps (GeN), on language models. Epochs are passes over
    the forget set.
    """

    epochs: float = 5
    learning_rate: float = 1e-4
    batch_size: int = 32
    name: str = "ng-diff"

    def stages(self, setup: Setup) -> list[Stage]:
        forget_size, retain_size = (setup.batch_size(name, self.batch_size) for name in ("forget", "retain"))
        steps = max(1, round(self.epochs * setup.batches_per_pass("forget", forget_size)))

        def terms(step: int, forget: Drawn, retain: Drawn) -> list[Term]:
            return [
                Term("forget_term", forget.batch),
                Term("retain_term", retain.batch),
            ]

        optimizer = partial(torch.optim.AdamW, lr=self.learning_rate, weight_decay=0.01)

        return [
            Stage(
                steps,
                terms,
                optimizer,
                forget=forget_size,
                retain=retain_size,
                rate=falling(steps),
                combine=normalised_difference,
            )
        ]


def normalised_difference(gradients: list[list[Tensor | None]]) -> list[Tensor | None]:
    """g_r / |g_r| - g_f / |g_f| of [g_f, g_r]; a gradient of length 0 is left out."""
    lengths = []
    for gradient in gradients:
        like = next(part for part in gradient if part is not None)
        norm = gradient_norm(gradient, like=like)
        lengths.append(norm.clamp(min=torch.finfo(norm.dtype).tiny))
    combined: list[Tensor | None] = []
    for of_forget, of_retain in zip(*gradients, strict=True):
        ascent = None if of_forget is None else -of_forget / lengths[0].to(of_forget.dtype)
        descent = None if of_retain is None else of_retain / lengths[1].to(of_retain.dtype)
        combined.append(ascent if descent is None else descent if ascent is None else ascent + descent)
    return combined
