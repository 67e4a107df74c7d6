"""SFR-on: fast steps that forget, within the weights that matter for it, and slow ones that keep what remains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from nabla_tau.arguments import check_fields
from nabla_tau.batch import Batch, to_device
from nabla_tau.distributed import unwrapped
from nabla_tau.evaluation import counting_losses, evaluation_mode
from nabla_tau.methods.setup import Setup, scale_gradients
from nabla_tau.methods.stages import NOTHING, Drawn, Stage, Term
from nabla_tau.objective import masked_mean
from nabla_tau.row_objectives import adaptive_weights
from nabla_tau.sources import Source

PUBLISHED, FEWEST = 1500, 600  # iterations
PASSES = PUBLISHED * 128 / 45_000  # over the retained samples of CIFAR-10, without the 10 % that are forgotten
TermOf = Callable[[Drawn, float], Term]  # of a batch, at a factor c of the iteration
TINY = 1e-15  # makes a weight that neither part moves salient


@dataclass(frozen=True)
class SFRon:
    """Saliency forgetting in the remain-preserving manifold online (Huang et al. 2024, arXiv 2409.19732). Iteration t
    of n, in train mode, with c = (1 + cos(pi t / n)) / 2 on the learning rate:

        every `forget_freq`-th:  min -forget_alpha c sum_i e_i l_i,  e_i = l_i^-exponent / sum_j l_j^-exponent held
                                 constant, over a forget batch; gradient * mask, then clipped at norm `max_norm`
        always:                  min mean_r l over a retain batch, by the same optimizer, neither masked nor clipped
        then                     w <- slow w + (1 - slow) w of the iteration before

        mask = 1[F_f / F_r >= threshold], F the diagonals of the Fisher information of the original model

    The paper calls exponent lambda, threshold gamma and slow beta; slow=1, as released, does nothing. fisher: "sample",
    per sample, or "batch", mean over batches of the squared gradient of the batch's mean loss, as released: its noise
    is that of the batch size. Defaults are those for ResNet-18 on CIFAR-10; those for Swin-T on TinyImageNet are
    optimizer "adamw", learning_rate 2e-5, weight_decay .05, iterations 500, forget_freq 1, forget_alpha 500, exponent
    .6. iterations=None: as many as make the 4.3 passes over the retained samples that the published 1500 are, between
    600 and 1500. On little data 1500 would be hundreds of passes, longer than any training; but a memorised sample has
    hardly a gradient, so that it takes some steps until the ascent sets in, however small the data. A step of the
    history is one update, so an iteration with a fast step is two. Momentum and weight decay move the other weights in
    a fast step too, as in the released code. Clipping bounds the ascent but nothing stops it: it can destroy a model
    where the learning rate is above that of its training. Raises ValueError for settings that there are not.
    """

    iterations: int | None = None
    forget_freq: int = 5
    forget_alpha: float = 25.0
    exponent: float = 0.5
    threshold: float = 1.0
    slow: float = 1.0
    max_norm: float = 7.0
    fisher: Literal["sample", "batch"] = "sample"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 1e-2
    weight_decay: float = 5e-4
    batch_size: int = 128
    name: str = "sfr-on"

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value, known in (
            ("fisher", self.fisher, ("sample", "batch")),
            ("optimizer", self.optimizer, ("sgd", "adamw")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.forget_freq < 1 or (self.iterations is not None and self.iterations < 1):
            raise ValueError(
                f"iterations and forget_freq must be at least 1, got {self.iterations} and {self.forget_freq}"
            )

    def stages(self, setup: Setup) -> list[Stage]:
        mask = self.saliency(setup, setup.source("forget"))
        return [self.fast_and_slow(setup, mask, {"forget": self.unlearning(setup)})]

    def unlearning(self, setup: Setup, share: float = 1.0) -> TermOf:
        """-share forget_alpha c sum_i e_i l_i"""

        def values(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            losses, counts = setup.losses(model, batch)
            return losses, adaptive_weights(losses, self.exponent) * counts

        return lambda forget, c: Term("forget_term", forget.batch, values, -share * self.forget_alpha * c)

    def saliency(self, setup: Setup, *sources: Source) -> list[Tensor]:
        """mask, with F_f that of all samples of the sources together."""
        why = "its saliency mask is made of gradients of whole parameters on all data"
        setup.refuse(self.name, sharded_model=why, sharded_data=why)
        of = setup.fisher if self.fisher == "sample" else partial(batch_fisher, setup)
        count = sum(source.count for source in sources)
        parts = [[source.count / count * f for f in of(source, self.batch_size)] for source in sources]
        changed = [torch.stack(same).sum(0) for same in zip(*parts, strict=True)]
        remaining = of(setup.source("retain"), self.batch_size)
        masks = [(f + TINY) / (r + TINY) >= self.threshold for f, r in zip(changed, remaining, strict=True)]
        setup.say(salient=sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks))
        return masks

    def fast_and_slow(
        self, setup: Setup, mask: list[Tensor], fast: dict[str, TermOf], learn: Source | None = None
    ) -> Stage:
        """The iterations. fast: of which data sets there is a fast step, in this order, and what it minimises."""
        retain = setup.batch_size("retain", self.batch_size)
        count = self.iterations
        if count is None:
            count = default_iterations(setup.batches_per_pass("retain", retain))
        updates = [
            (t, name) for t in range(count) for name in ([*fast, "retain"] if t % self.forget_freq == 0 else ["retain"])
        ]
        parameters = setup.parameters
        before = {str(i): tensor for i, tensor in enumerate(setup.originals())} if self.slow != 1 else {}

        def cosine(step: int) -> float:
            return (1 + math.cos(math.pi * updates[step][0] / count)) / 2

        def terms(step: int, *sets: Drawn) -> list[Term]:
            (drawn,) = [given for given in sets if given is not NOTHING]
            name = updates[step][1]
            if name in fast:
                return [fast[name](drawn, cosine(step))]
            return [Term("retain_term", drawn.batch)]

        def gradient(step: int) -> None:
            if updates[step][1] in fast:
                scale_gradients(parameters, mask)
                torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)

        def after(step: int) -> None:
            if updates[step][1] == "retain":
                for name, tensor in stage.state.items():
                    parameter = parameters[int(name)]
                    tensor.copy_(parameter.lerp_(tensor, 1 - self.slow))

        kind = torch.optim.AdamW if self.optimizer == "adamw" else partial(torch.optim.SGD, momentum=0.9)
        optimizer = partial(kind, lr=self.learning_rate, weight_decay=self.weight_decay)

        stage = Stage(
            len(updates),
            terms,
            optimizer,
            forget=setup.batch_size("forget", self.batch_size) if "forget" in fast else 0,
            retain=retain,
            learn=None if learn is None else (learn, min(self.batch_size, learn.count)),
            draws=lambda step: (updates[step][1],),
            rate=cosine,
            training=True,
        )
        stage.gradient, stage.after, stage.state = gradient, after, before
        return stage


def default_iterations(batches_per_pass: int) -> int:
    return min(max(round(PASSES * batches_per_pass), FEWEST), PUBLISHED)


def batch_fisher(setup: Setup, source: Source, batch_size: int) -> list[Tensor]:
    """Mean over batches of the squared gradient of the batch's mean loss, for each parameter; eval mode."""
    model, batches = unwrapped(setup.model), 0
    total = [torch.zeros_like(parameter) for parameter in setup.parameters]
    with evaluation_mode(model):
        for batch in source.read(batch_size):
            output = setup.forward_alone(model, to_device(batch, setup.device))
            loss = masked_mean(*counting_losses(setup.job.loss, *output))
            found = torch.autograd.grad(loss, setup.parameters, allow_unused=True)
            for square, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    square += gradient.square()
            batches += 1
    return [square / batches for square in total]
